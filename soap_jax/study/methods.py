"""What each method of a study trains with: its rule of feedback, its start and its optimiser.

    method           feedback                what it isolates
    bp               none: backprop          the reference
    fa               Fixed()                 fixed random feedback
    sign             sign(W)                 the naive sign sync: direction and scale at once
    sign_preserve    abs(B₀) · sign(W)       the remedy: no scale, but another direction
    sign_norm        c · sign(W)             the clean control: the direction of `sign` alone
    bp_scaled        none                    the scale of `sign` alone, as it is at the start
    bp_scaled_live   none                    the scale of `sign` alone, as the weights grow
    frozen           none                    hidden layers untrained: what a method must beat

Feedback larger than its kernel multiplies the learning rate of the layers below, and of no other.
`bp_scaled` does that to backprop: it multiplies a layer's gradient by the product of
`norm(sign(W)) / norm(W)` over the layers above, which is what `sign` does to its size.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.typing import ArrayLike

from soap_jax import rules
from soap_jax.study import config

Factors = dict[str, jax.Array]
"""What a layer's gradient is multiplied by, by the layer's name."""

torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""PyTorch's default for linear layers: uniform within 1 / √fan_in."""


def rule_of(method: str, period: ArrayLike) -> rules.Rule | None:
    """The rule behind a method's name; None for methods without feedback.

    Raises:
        ValueError: for an unknown method.

    Example:
        >>> rule_of("sign_preserve", 10)
        SignSync(period=10, magnitude='preserve')
    """
    match method:
        case "fa":
            return rules.Fixed()
        case "sign":
            return rules.SignSync(period=period, magnitude="unit")
        case "sign_preserve":
            return rules.SignSync(period=period, magnitude="preserve")
        case "sign_norm":
            return rules.SignSync(period=period, magnitude="norm")
        case "sign_glorot":
            return rules.SignSync(period=period, magnitude="glorot")
        case "sign_redraw":
            return rules.SignSync(period=period, magnitude="redraw")
        case "transport":
            return rules.Transport(period=period, rate=1.0)
        case _ if method in config.METHODS:
            return None
    raise ValueError(f"method is {method!r}; expected one of {', '.join(config.METHODS)}.")


def layers(params: chex.ArrayTree) -> list[str]:
    """The names of a network's layers, `Dense_0` first, as `soap_jax.models.MLP` has them."""
    return sorted(params, key=lambda name: int(re.sub(r"\D", "", name)))


def amplification(params: chex.ArrayTree) -> Factors:
    """How much larger gradients become if the sign of every kernel stands in for it.

        factor of a layer = product over the layers above of norm(sign(W)) / norm(W)

    Args:
        params: of `soap_jax.models.MLP`.

    Returns:
        A factor for each layer; 1 for the last.

    Example:
        >>> params = {"Dense_0": {"kernel": jnp.ones((2, 2))},
        ...           "Dense_1": {"kernel": jnp.full((2, 1), 0.25)}}
        >>> {name: float(factor) for name, factor in amplification(params).items()}
        {'Dense_1': 1.0, 'Dense_0': 4.0}
    """
    factor, factors = jnp.ones(()), {}
    for name in reversed(layers(params)):
        factors[name] = factor
        kernel = params[name]["kernel"]
        factor = factor * jnp.linalg.norm(jnp.sign(kernel)) / jnp.linalg.norm(kernel)
    return factors


def only_output(params: chex.ArrayTree) -> Factors:
    """Factors that leave every layer but the last untrained."""
    *hidden, output = layers(params)
    return dict.fromkeys(hidden, jnp.zeros(())) | {output: jnp.ones(())}


class ScaleLayersState(NamedTuple):
    """State of `scale_layers`.

    Attributes:
        layer_factors: the factors last used.
    """

    layer_factors: Factors


def scale_layers(
    factors: Callable[[chex.ArrayTree], Factors], *, live: bool = False
) -> optax.GradientTransformation:
    """Multiplies each layer's gradient by a factor of its own.

    Args:
        factors: `params -> factors`.
        live: whether they are computed again at each update, from the parameters before it; else
            those of the initial parameters stay.
    """

    def init(params):
        return ScaleLayersState(factors(params))

    def update(updates, state, params=None):
        if live:
            state = ScaleLayersState(factors(params))
        scaled = {
            name: jax.tree.map(lambda leaf, f=state.layer_factors[name]: leaf * f, layer)
            for name, layer in updates.items()
        }
        return scaled, state

    return optax.GradientTransformation(init, update)


def optimizer_of(
    method: str, learning_rate: ArrayLike, *, optimizer: str = "sgd"
) -> optax.GradientTransformation:
    """The optimiser of a method: the study's own, after what the method does to gradients.

    Raises:
        ValueError: for an unknown method or optimiser.
    """
    match optimizer:
        case "sgd":
            base = optax.sgd(learning_rate)
        case "momentum":
            base = optax.sgd(learning_rate, momentum=0.9)
        case "adam":
            base = optax.adam(learning_rate)
        case _:
            raise ValueError(
                f"optimizer is {optimizer!r}; expected one of {', '.join(config.OPTIMIZERS)}."
            )
    match method:
        case "bp_scaled":
            return optax.chain(scale_layers(amplification), base)
        case "bp_scaled_live":
            return optax.chain(scale_layers(amplification, live=True), base)
        case "frozen":
            return optax.chain(scale_layers(only_output), base)
        case _ if method in config.METHODS:
            return base
    raise ValueError(f"method is {method!r}; expected one of {', '.join(config.METHODS)}.")


def init_as_torch(key: chex.PRNGKey, params: chex.ArrayTree) -> chex.ArrayTree:
    """Draws kernels and biases anew as PyTorch's linear layers do.

    Args:
        key: a PRNG key.
        params: of `soap_jax.models.MLP`; only shapes count.
    """
    drawn = {}
    for name, layer_key in zip(params, jax.random.split(key, len(params)), strict=True):
        kernel_key, bias_key = jax.random.split(layer_key)
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        bound = kernel.shape[0] ** -0.5
        drawn[name] = {
            "kernel": torch_uniform(kernel_key, kernel.shape, kernel.dtype),
            "bias": jax.random.uniform(bias_key, bias.shape, bias.dtype, -bound, bound),
        }
    return drawn
