"""Reference networks in Linen, for the study, the examples and the benchmarks.

The first layer of each network is a Flax layer: it needs no feedback, since the gradient by the
input is not computed. Layers have the names of the plain Flax model, so `feedback=False` gives the
same kernels. For `with_direct_feedback`, hidden activations are named "hidden_0" and so on, and the
output "logits".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from soap_jax import direct, linen, ops
from soap_jax.feedback import glorot_normal

Activation = Callable[[jax.Array], jax.Array]

Tap = Callable[[str, jax.Array], jax.Array]
"""A function `(name, h) -> h`, called with every hidden activation."""


class MLP(nn.Module):
    """A multilayer perceptron: `(batch, ...) -> (batch, features[-1])`.

    Attributes:
        features: widths of the layers; the last layer is the output, without activation.
        activation: the function between layers.
        feedback: whether layers after the first use feedback weights.
        kernel_init: initialiser of the kernels, and of feedback weights.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> variables = MLP((256, 10)).init(jax.random.key(0), jnp.ones((1, 28, 28, 1)))
        >>> jax.tree.map(jnp.shape, variables["feedback"])
        {'Dense_1': {'kernel': (256, 10)}}
    """

    features: Sequence[int]
    activation: Activation = nn.tanh
    feedback: bool = True
    kernel_init: nn.initializers.Initializer = glorot_normal

    @property
    def hidden(self) -> tuple[str, ...]:
        """The names of the hidden activations."""
        return tuple(f"hidden_{i}" for i in range(len(self.features) - 1))

    @nn.compact
    def __call__(self, x: jax.Array, tap: Tap | None = None) -> jax.Array:
        """Returns the logits; axes of `x` after the first are flattened.

        Args:
            x: `(batch, ...)`.
            tap: called as `tap("hidden_0", h)` and so on after each hidden layer; its result is
                the input of the next layer.
        """
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.features):
            layer = linen.FeedbackDense if self.feedback and i > 0 else nn.Dense
            x = layer(width, kernel_init=self.kernel_init, name=f"Dense_{i}")(x)
            if i < len(self.features) - 1:
                x = checkpoint_name(self.activation(x), f"hidden_{i}")
                x = x if tap is None else tap(f"hidden_{i}", x)
        return checkpoint_name(x, "logits")


class DirectMLP(nn.Module):
    """The network of `MLP` with direct feedback: `(batch, ...) -> (batch, features[-1])`.

    Kernels have the same names as in `MLP`, so the same key gives the same kernels. The last
    layer's gradient is exact.

    Attributes:
        features: as in `MLP`.
        activation: as in `MLP`.
        error: "exact" (DFA), "sign" (sDFA) or "target" (DRTP).
        kernel_init: as in `MLP`.
        projection_init: initialiser of the projections.
        projection_bar: the projections' cotangent, as in `soap_jax.direct.direct_feedback`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> variables = DirectMLP((64, 32, 10)).init(jax.random.key(0), jnp.ones((1, 28, 28, 1)))
        >>> jax.tree.map(jnp.shape, variables["projection"]["DirectFeedback_0"])
        {'projection': {'Dense_0': (10, 64), 'Dense_1': (10, 32)}}

    References:
        Nøkland (2016). https://arxiv.org/abs/1609.01596
        Frenkel et al. (2021). https://arxiv.org/abs/1909.01311
    """

    features: Sequence[int]
    activation: Activation = nn.tanh
    error: Literal["exact", "sign", "target"] = "exact"
    kernel_init: nn.initializers.Initializer = glorot_normal
    projection_init: nn.initializers.Initializer = glorot_normal
    projection_bar: direct.ProjectionBar = None

    @nn.compact
    def __call__(self, x: jax.Array, target: jax.Array | None = None) -> jax.Array:
        """Returns the logits; axes of `x` after the first are flattened.

        Args:
            x: `(batch, ...)`.
            target: `(batch, features[-1])`, one-hot, for error="target". Without it only the
                forward pass works: differentiation raises ValueError.
        """
        if self.error not in ("exact", "sign", "target"):
            raise ValueError(f"error is {self.error!r}; expected 'exact', 'sign' or 'target'.")
        target_bar = self.projection_bar if self.error == "target" else None
        direct.check_projection_bar(target_bar, self.error)
        x = x.reshape(x.shape[0], -1)
        hidden: dict[str, jax.Array] = {}
        for i, width in enumerate(self.features):
            name = f"Dense_{i}"
            x = nn.Dense(width, kernel_init=self.kernel_init, name=name)(x)
            if i == len(self.features) - 1:
                break
            x = self.activation(x)
            if self.error == "target":
                x = self._send_target(x, target)
            else:
                hidden[name], x = x, ops.detach(x)
        if not hidden:
            return x
        error: direct.Error = "sign" if self.error == "sign" else "exact"
        init, bar = self.projection_init, self.projection_bar
        return linen.DirectFeedback(error, projection_init=init, projection_bar=bar)(x, hidden)

    def _send_target(self, x, target):
        if target is None and self.is_initializing():
            target = jnp.zeros((x.shape[0], self.features[-1]), x.dtype)
        if target is None:
            return ops.on_cotangent(x, self._raise_no_target)
        return linen.DirectTarget(projection_init=self.projection_init)(x, target)

    def _raise_no_target(self):
        raise ValueError(
            "DirectMLP with error='target' was differentiated, but called without a target; "
            "expected model.apply(variables, x, target) with target = jax.nn.one_hot(labels, "
            "classes)."
        )


class ConvNet(nn.Module):
    """A small convolutional network: `(batch, height, width, channels) -> (batch, classes)`.

    It has strided 3 x 3 convolutions, then a dense layer.

    Attributes:
        channels: output channels of each convolution.
        classes: size of the output.
        activation: the function after each convolution.
        feedback: whether layers after the first use feedback weights.
        kernel_init: as in `MLP`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> variables = ConvNet((8, 16), 10).init(jax.random.key(0), jnp.ones((1, 28, 28, 1)))
        >>> jax.tree.map(jnp.shape, variables["feedback"])
        {'Conv_1': {'kernel': (3, 3, 8, 16)}, 'Dense_0': {'kernel': (784, 10)}}
    """

    channels: Sequence[int] = (32, 64)
    classes: int = 10
    activation: Activation = nn.tanh
    feedback: bool = True
    kernel_init: nn.initializers.Initializer = glorot_normal

    @property
    def hidden(self) -> tuple[str, ...]:
        """The names of the hidden activations."""
        return tuple(f"hidden_{i}" for i in range(len(self.channels)))

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits."""
        for i, width in enumerate(self.channels):
            conv = linen.FeedbackConv if self.feedback and i > 0 else nn.Conv
            name = f"Conv_{i}"
            x = conv(width, (3, 3), strides=2, kernel_init=self.kernel_init, name=name)(x)
            x = checkpoint_name(self.activation(x), f"hidden_{i}")
        x = x.reshape(x.shape[0], -1)
        dense = linen.FeedbackDense if self.feedback and self.channels else nn.Dense
        logits = dense(self.classes, kernel_init=self.kernel_init, name="Dense_0")(x)
        return checkpoint_name(logits, "logits")
