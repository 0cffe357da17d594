"""Reference networks in Linen, for the study, the examples and the benchmarks.

The first layer is Flax's own in each: nobody uses its input's cotangent, so it needs no feedback.
Layers are named as in the plain Flax model, so that `feedback=False` gives the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from soap_jax import linen
from soap_jax.feedback import glorot_normal

Activation = Callable[[jax.Array], jax.Array]


class MLP(nn.Module):
    """A multilayer perceptron: `(batch, ...) -> (batch, features[-1])`.

    Attributes:
        features: widths of the layers; the last is the output, which has no activation.
        activation: applied between layers.
        feedback: whether layers after the first use feedback weights.
        kernel_init: initialiser of the kernels; the same family as feedback's, so that FA and
            backprop start matched.

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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits; axes of `x` after the first are flattened."""
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.features):
            layer = linen.FeedbackDense if self.feedback and i > 0 else nn.Dense
            x = layer(width, kernel_init=self.kernel_init, name=f"Dense_{i}")(x)
            if i < len(self.features) - 1:
                x = self.activation(x)
        return x


class ConvNet(nn.Module):
    """A small convolutional network: `(batch, height, width, channels) -> (batch, classes)`.

    Strided 3 x 3 convolutions, then a dense layer.

    Attributes:
        channels: output channels of each convolution.
        classes: size of the output.
        activation: applied after each convolution.
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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits."""
        for i, width in enumerate(self.channels):
            conv = linen.FeedbackConv if self.feedback and i > 0 else nn.Conv
            name = f"Conv_{i}"
            x = conv(width, (3, 3), strides=2, kernel_init=self.kernel_init, name=name)(x)
            x = self.activation(x)
        x = x.reshape(x.shape[0], -1)
        dense = linen.FeedbackDense if self.feedback and self.channels else nn.Dense
        return dense(self.classes, kernel_init=self.kernel_init, name="Dense_0")(x)
