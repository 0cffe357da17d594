"""Flax NNX layers that learn by feedback alignment.

Each is Flax's own layer, with all its arguments, plus `feedback_init`. The forward pass, the
parameters and their gradients are Flax's; only the way back to the layer's input goes through
`layer.feedback` in place of `layer.kernel`. `Feedback` is a variable type of its own, not a
`Param`, so that no optimiser sees it:

    params, feedback = nnx.state(model, nnx.Param), nnx.state(model, Feedback)
    state = init_feedback(key, params, SignSync(period=10), feedback=feedback)
    state = sync_feedback(params, state, step)
    nnx.update(model, state.feedback)

The same `rngs` give the same kernels as in a model of plain Flax layers, whether `rngs` has a
stream `feedback` or not, so runs with and without feedback are paired. The first layer of a model
needs no feedback (nobody uses its input's cotangent): use Flax's own there. The value `None` in
place of feedback runs that layer by exact backpropagation.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
from flax import nnx

from soap_jax import ops, trees


class Feedback(nnx.Variable):
    """Feedback weights, of the shape of the sibling `kernel`. Not a `Param`.

    Example:
        >>> from flax import nnx
        >>> layer = FeedbackLinear(3, 2, rngs=nnx.Rngs(0))
        >>> layer.feedback.shape
        (3, 2)
        >>> list(nnx.state(layer, nnx.Param))
        ['bias', 'kernel']
    """


_Base: Any = object  # to the type checker: whatever layer of Flax the mixin comes before


class _FeedbackLayer(_Base):
    """Mixin before one of Flax's layers: a bilinear op of input and kernel, and perhaps a bias."""

    kernel: Any

    def __init__(
        self,
        *args,
        feedback_init: nnx.Initializer | None = None,
        feedback_bar: ops.FeedbackBar = None,
        rngs: nnx.Rngs,
        **kwargs,
    ):
        feedback_rngs = nnx.Rngs(params=_feedback_key(rngs))
        super().__init__(*args, rngs=rngs, **kwargs)
        if feedback_init is not None:
            kwargs["kernel_init"] = feedback_init
        twin = _flax_layer(type(self))(*args, rngs=feedback_rngs, **kwargs)
        self.feedback: Feedback | None = Feedback(twin.kernel[...])
        self.feedback_bar = feedback_bar

    def __call__(self, inputs: jax.Array, *args, **kwargs) -> jax.Array:
        """Applies Flax's layer; its input's cotangent goes through feedback."""
        feedback = None if self.feedback is None else self.feedback.get_value()
        if feedback is None:
            return super().__call__(inputs, *args, **kwargs)
        kernel = self.kernel[...]
        trees.check_feedback(feedback, kernel, ("feedback",))
        flax_layer = _flax_layer(type(self))
        if getattr(self, "mask", None) is not None:
            feedback = feedback * self.mask  # out here, where a traced mask is an argument
        flax_call = super().__call__
        # `op` may close over no traced value: not over the layer, but over its structure.
        graph, state = nnx.split(self)
        shapes = jax.eval_shape(lambda: state)

        def op(x, kernel):
            layer = nnx.merge(graph, shapes)
            layer.kernel, layer.bias, layer.use_bias = nnx.Param(kernel), None, False
            layer.mask = None
            return flax_layer.__call__(layer, x, *args, **kwargs)

        def forward(x):
            return flax_call(x, *args, **kwargs)

        return ops.through_feedback(
            op, inputs, kernel, feedback, forward=forward, feedback_bar=self.feedback_bar
        )


def _flax_layer(cls: type) -> Any:
    """Flax's own layer, from which a feedback layer derives."""
    return next(c for c in cls.__mro__ if c.__module__.startswith("flax."))


def _feedback_key(rngs: nnx.Rngs) -> jax.Array:
    """A key for feedback that leaves the stream of the kernels as Flax's layers would find it."""
    if "feedback" in rngs:
        return rngs.feedback()
    stream = rngs.params  # falls back to the default stream
    key = jax.random.fold_in(stream.key[...], stream.count[...])
    return jax.random.fold_in(key, zlib.crc32(b"feedback"))


class FeedbackLinear(_FeedbackLayer, nnx.Linear):
    """Feedback-alignment `nnx.Linear`: `(..., in_features) -> (..., out_features)`.

    Takes the arguments of Flax's layer, and

    Args:
        feedback_init: initialiser of the feedback weights, by default `kernel_init`, so that both
            start of one size.
        feedback_bar: feedback's own cotangent, as in `soap_jax.ops.feedback_op`.
        rngs: as in Flax; a stream `feedback`, if there is one, draws the feedback weights.

    Raises:
        ValueError: when called with feedback of a shape that is not the kernel's.

    Example:
        >>> from flax import nnx
        >>> FeedbackLinear(3, 2, rngs=nnx.Rngs(0)).feedback.shape
        (3, 2)

    References:
        Lillicrap et al. (2016). https://doi.org/10.1038/ncomms13276
    """


class FeedbackLinearGeneral(_FeedbackLayer, nnx.LinearGeneral):
    """Feedback-alignment `nnx.LinearGeneral`: a linear layer over any axes.

    Takes the arguments of Flax's layer, and

    Args:
        feedback_init: initialiser of the feedback weights, by default `kernel_init`, so that both
            start of one size.
        feedback_bar: feedback's own cotangent, as in `soap_jax.ops.feedback_op`.
        rngs: as in Flax; a stream `feedback`, if there is one, draws the feedback weights.

    Raises:
        ValueError: when called with feedback of a shape that is not the kernel's.

    Example:
        >>> from flax import nnx
        >>> FeedbackLinearGeneral(3, (2, 5), rngs=nnx.Rngs(0)).feedback.shape
        (3, 2, 5)

    References:
        Lillicrap et al. (2016). https://doi.org/10.1038/ncomms13276
    """


class FeedbackEinsum(_FeedbackLayer, nnx.Einsum):
    """Feedback-alignment `nnx.Einsum`: an einsum of the input with the kernel.

    Takes the arguments of Flax's layer, and

    Args:
        feedback_init: initialiser of the feedback weights, by default `kernel_init`, so that both
            start of one size.
        feedback_bar: feedback's own cotangent, as in `soap_jax.ops.feedback_op`.
        rngs: as in Flax; a stream `feedback`, if there is one, draws the feedback weights.

    Raises:
        ValueError: when called with feedback of a shape that is not the kernel's.

    Example:
        >>> from flax import nnx
        >>> FeedbackEinsum("bi,io->bo", (3, 2), rngs=nnx.Rngs(0)).feedback.shape
        (3, 2)

    References:
        Lillicrap et al. (2016). https://doi.org/10.1038/ncomms13276
    """


class FeedbackConv(_FeedbackLayer, nnx.Conv):
    """Feedback-alignment `nnx.Conv`: a convolution over `(batch, *spatial, features)`.

    Takes the arguments of Flax's layer, and

    Args:
        feedback_init: initialiser of the feedback weights, by default `kernel_init`, so that both
            start of one size.
        feedback_bar: feedback's own cotangent, as in `soap_jax.ops.feedback_op`.
        rngs: as in Flax; a stream `feedback`, if there is one, draws the feedback weights.

    Raises:
        ValueError: when called with feedback of a shape that is not the kernel's.

    Example:
        >>> from flax import nnx
        >>> FeedbackConv(1, 2, (3, 3), rngs=nnx.Rngs(0)).feedback.shape
        (3, 3, 1, 2)

    References:
        Lillicrap et al. (2016). https://doi.org/10.1038/ncomms13276
    """


class FeedbackConvTranspose(_FeedbackLayer, nnx.ConvTranspose):
    """Feedback-alignment `nnx.ConvTranspose`: a transposed convolution.

    Takes the arguments of Flax's layer, and

    Args:
        feedback_init: initialiser of the feedback weights, by default `kernel_init`, so that both
            start of one size.
        feedback_bar: feedback's own cotangent, as in `soap_jax.ops.feedback_op`.
        rngs: as in Flax; a stream `feedback`, if there is one, draws the feedback weights.

    Raises:
        ValueError: when called with feedback of a shape that is not the kernel's.

    Example:
        >>> from flax import nnx
        >>> FeedbackConvTranspose(1, 2, (3, 3), rngs=nnx.Rngs(0)).feedback.shape
        (3, 3, 1, 2)

    References:
        Lillicrap et al. (2016). https://doi.org/10.1038/ncomms13276
    """
