"""Flax Linen layers that learn by feedback alignment.

Each is Flax's own layer, with all its arguments, plus `feedback_init`. The forward pass, the
parameters and their gradients are Flax's; only the way back to the layer's input goes through the
variable `feedback/<layer>/kernel` in place of `params/<layer>/kernel`:

    model = nn.Sequential([nn.Dense(256), nn.tanh, FeedbackDense(10)])
    variables = model.init({"params": key, "feedback": other_key}, x)
    y = model.apply({"params": params, "feedback": feedback}, x)      # no `mutable` needed

The same key and names give the same kernels as in a model of plain Flax layers, so runs with and
without feedback are paired. The first layer of a model needs no feedback (nobody uses its input's
cotangent): use Flax's own there. In lifted transforms name the collection beside the parameters:
`nn.scan(..., variable_axes={"params": 0, "feedback": 0}, split_rngs={"params": True, "feedback":
True})`. The leaf `None` in place of feedback runs that layer by exact backpropagation, and so does
a missing leaf in a collection that is there.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
from flax.core import meta

from soap_jax import ops, trees

COLLECTION = "feedback"


class _FeedbackLayer(nn.Module, kw_only=True):
    """Mixin before one of Flax's layers: a bilinear op of input and kernel, and perhaps a bias."""

    feedback_init: nn.initializers.Initializer | None = None
    feedback_bar: ops.FeedbackBar = None

    @nn.nowrap  # Flax's own `__call__` is; twice would record its intermediates twice
    def __call__(self, inputs: jax.Array, *args, **kwargs) -> jax.Array:
        """Applies Flax's layer; its input's cotangent goes through feedback."""
        if self.is_initializing():
            # First, so that it draws what Flax's layer draws.
            y = super().__call__(inputs, *args, **kwargs)
            if not self.has_variable(COLLECTION, "kernel"):
                if not self.is_mutable_collection(COLLECTION):
                    raise ValueError(self._no_collection())
                twin = self._flax_layer(kernel_init=self.feedback_init or self.kernel_init)
                drawn = twin.init(self.make_rng(COLLECTION), inputs, *args, **kwargs)
                self.put_variable(COLLECTION, "kernel", drawn["params"]["kernel"])
            return y
        feedback = self._read_feedback()
        if feedback is None:
            return super().__call__(inputs, *args, **kwargs)
        kernel = meta.unbox(self.get_variable("params", "kernel"))
        trees.check_feedback(feedback, kernel, (*self.path, "kernel"))
        if getattr(self, "mask", None) is not None:
            feedback = feedback * self.mask  # out here, where a traced mask is an argument
        linear = self._flax_layer()
        flax_call = super().__call__

        def op(x, kernel):
            return linear.apply({"params": {"kernel": kernel}}, x, *args, **kwargs)

        def forward(x):
            return flax_call(x, *args, **kwargs)

        return ops.through_feedback(
            op, inputs, kernel, feedback, forward=forward, feedback_bar=self.feedback_bar
        )

    def _flax_layer(self, **changes):
        """Flax's own layer with this one's fields, without a bias: bilinear in input and kernel."""
        layer = next(c for c in type(self).__mro__ if c.__module__.startswith("flax."))
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(layer) if f.init}
        if "mask" in fields:
            fields["mask"] = None
        return layer(**fields | {"parent": None, "name": None, "use_bias": False} | changes)

    def _no_collection(self):
        path = "/".join(self.path)
        return (
            f"{type(self).__name__} at {path or 'the top'} found no collection 'feedback'. "
            "Pass it beside the parameters:\n"
            "    model.apply({'params': params, 'feedback': feedback}, x)\n"
            "with `feedback` from model.init(...)['feedback'] or init_feedback(...).feedback; "
            "under nn.scan or nn.vmap also give variable_axes={'params': 0, 'feedback': 0}. "
            "For exact backpropagation pass None as the layer's leaf."
        )

    def _read_feedback(self):
        assert self.scope is not None  # Flax has bound the module
        if COLLECTION not in self.scope.root.variables():
            raise ValueError(self._no_collection())
        return meta.unbox(self.get_variable(COLLECTION, "kernel"))


class FeedbackDense(_FeedbackLayer, nn.Dense):
    """Feedback-alignment `nn.Dense`: `(..., in) -> (..., features)`.

    Attributes:
        feedback_init: initialiser of the feedback weights, by default `kernel_init`, so that both
            start of one size; every attribute but these two is Flax's.
        feedback_bar: feedback's own cotangent, as in `soap_jax.ops.feedback_op`.

    Raises:
        ValueError: in `apply`, without the collection "feedback" or with feedback of a shape that
            is not the kernel's.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = FeedbackDense(features=2)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 3)))
        >>> variables["feedback"]["kernel"].shape
        (3, 2)

    References:
        Lillicrap et al. (2016). https://doi.org/10.1038/ncomms13276
    """


class FeedbackDenseGeneral(_FeedbackLayer, nn.DenseGeneral):
    """Feedback-alignment `nn.DenseGeneral`: a dense layer over any axes.

    Attributes:
        feedback_init: initialiser of the feedback weights, by default `kernel_init`, so that both
            start of one size; every attribute but these two is Flax's.
        feedback_bar: feedback's own cotangent, as in `soap_jax.ops.feedback_op`.

    Raises:
        ValueError: in `apply`, without the collection "feedback" or with feedback of a shape that
            is not the kernel's.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = FeedbackDenseGeneral(features=(2, 5))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 3)))
        >>> variables["feedback"]["kernel"].shape
        (3, 2, 5)

    References:
        Lillicrap et al. (2016). https://doi.org/10.1038/ncomms13276
    """


class FeedbackEinsum(_FeedbackLayer, nn.Einsum):
    """Feedback-alignment `nn.Einsum`: an einsum of the input with the kernel.

    Attributes:
        feedback_init: initialiser of the feedback weights, by default `kernel_init`, so that both
            start of one size; every attribute but these two is Flax's.
        feedback_bar: feedback's own cotangent, as in `soap_jax.ops.feedback_op`.

    Raises:
        ValueError: in `apply`, without the collection "feedback" or with feedback of a shape that
            is not the kernel's.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = FeedbackEinsum(shape=(3, 2), einsum_str="bi,io->bo")
        >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 3)))
        >>> variables["feedback"]["kernel"].shape
        (3, 2)

    References:
        Lillicrap et al. (2016). https://doi.org/10.1038/ncomms13276
    """


class FeedbackConv(_FeedbackLayer, nn.Conv):
    """Feedback-alignment `nn.Conv`: a convolution over `(batch, *spatial, features)`.

    Attributes:
        feedback_init: initialiser of the feedback weights, by default `kernel_init`, so that both
            start of one size; every attribute but these two is Flax's.
        feedback_bar: feedback's own cotangent, as in `soap_jax.ops.feedback_op`.

    Raises:
        ValueError: in `apply`, without the collection "feedback" or with feedback of a shape that
            is not the kernel's.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = FeedbackConv(features=2, kernel_size=(3, 3))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 8, 8, 1)))
        >>> variables["feedback"]["kernel"].shape
        (3, 3, 1, 2)

    References:
        Lillicrap et al. (2016). https://doi.org/10.1038/ncomms13276
    """


class FeedbackConvTranspose(_FeedbackLayer, nn.ConvTranspose):
    """Feedback-alignment `nn.ConvTranspose`: a transposed convolution.

    Attributes:
        feedback_init: initialiser of the feedback weights, by default `kernel_init`, so that both
            start of one size; every attribute but these two is Flax's.
        feedback_bar: feedback's own cotangent, as in `soap_jax.ops.feedback_op`.

    Raises:
        ValueError: in `apply`, without the collection "feedback" or with feedback of a shape that
            is not the kernel's.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = FeedbackConvTranspose(features=2, kernel_size=(3, 3))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 8, 8, 1)))
        >>> variables["feedback"]["kernel"].shape
        (3, 3, 1, 2)

    References:
        Lillicrap et al. (2016). https://doi.org/10.1038/ncomms13276
    """
