"""What each method of a study trains with: its feedback, its gradient and its optimiser.

    method                 feedback                       what it isolates
    bp                     none: backprop                 the reference
    fa                     Fixed()                        fixed random feedback
    sign                   sign(W)                        the naive sign sync: direction and scale
    sign_preserve          abs(B₀) · sign(W)              the remedy: no scale, another direction
    sign_norm              c · sign(W)                    the clean control: direction alone
    bp_scaled              none                           the scale of `sign` alone, at the start
    bp_scaled_live         none                           that scale alone, as the weights grow
    frozen                 none                           hidden layers untrained: to be beaten
    sign_glorot            Glorot's deviation · sign(W)   uSF at another scale
    sign_redraw            abs(fresh draw) · sign(W)      brSF: magnitudes that carry nothing
    transport              W, every so many updates       how old a copy may be
    weight_mirror          learnt from noise through W    weight transport without transport
    kp                     learnt: W's own updates        Kolen-Pollack: decay makes B meet W
    information_alignment  learnt from the activities     local losses, which know no error:
    symmetric_alignment    learnt from W itself           see `soap_jax.local`
    activation_alignment   learnt from the activities
    dfa                    P, from the output's error     no error from layer to layer
    sdfa                   P, from the error's signs      not its size
    drtp                   P, from the target             no error at all
    activity_propagation   none                           a second-order step of activities

Feedback larger than its kernel multiplies the learning rate of the layers below, and of no other.
`bp_scaled` does that to backprop: it multiplies a layer's gradient by the product of
`norm(sign(W)) / norm(W)` over the layers above, which is what `sign` does to its size.

The weight mirror runs at every update, whatever the study's periods: at a rate of 0.01 it needs
hundreds of them, and with every hundredth alone it would not learn in time.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.typing import ArrayLike

from soap_jax import local, ops, rules
from soap_jax.study import config

Factors = dict[str, jax.Array]
"""What a layer's gradient is multiplied by, by the layer's name."""

FEEDBACK_RATE = 0.01
"""At which feedback descends the losses of `soap_jax.local`, by plain SGD, whatever rate is swept.

On digits with 256 tanh units, at a learning rate of 0.05, feedback is 71 degrees off its kernel
after 20 epochs of FA, 59 by information alignment, 65 by activation alignment, 2 by symmetric
alignment. With a third of this rate symmetric alignment is still at 21 degrees; with three times as
much information and activation alignment diverge at a learning rate of 0.3 in networks of ReLUs,
and the former in those of three hidden layers, too."""

WARMUP = 5
"""Updates of plain backprop before activity propagation begins, as the original has them. Its bias,
too, is the original's, `soap_jax.activity`'s default: on digits the hidden layers' gradient is then
about a thousandth of backprop's, so that they hardly learn. With 1e-8 or less the output does not
learn either."""

torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""PyTorch's default for linear layers: uniform within 1 / √fan_in."""


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
    factor, factors = jnp.ones((), jnp.float32), {}
    for name in reversed(layers(params)):
        factors[name] = factor
        kernel = params[name]["kernel"]
        factor = factor * jnp.linalg.norm(jnp.sign(kernel)) / jnp.linalg.norm(kernel)
    return factors


def only_output(params: chex.ArrayTree) -> Factors:
    """Factors that leave every layer but the last untrained."""
    *hidden, output = layers(params)
    zero, one = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
    return dict.fromkeys(hidden, zero) | {output: one}


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What a method trains with; all fields left alone make backprop.

    Attributes:
        rule: how its feedback weights change outside the optimiser; None if it has none. Where the
            method is in `config.PERIODIC`, its period is the study's.
        feedback_bar: the gradient by which the optimiser learns feedback, None if it does not: as
            in `soap_jax.ops.feedback_op`.
        error: what direct feedback sends, as in `soap_jax.models.DirectMLP`; None without it.
        factors: `params -> factors`, of the layers' gradients.
        live: as in `scale_layers`.
        propagates_activity: whether its gradient is that of `soap_jax.activity`.
    """

    rule: rules.Rule | None = None
    feedback_bar: ops.FeedbackBar = None
    error: Literal["exact", "sign", "target"] | None = None
    factors: Callable[[chex.ArrayTree], Factors] | None = None
    live: bool = False
    propagates_activity: bool = False

    @property
    def has_feedback(self) -> bool:
        """Whether it has feedback weights or projections."""
        return self.rule is not None or self.error is not None

    @property
    def learns_feedback(self) -> bool:
        """Whether its optimiser is one over `(params, feedback)`."""
        return self.feedback_bar is not None


_METHODS = {
    "bp": Method(),
    "fa": Method(rule=rules.Fixed()),
    "sign": Method(rule=rules.SignSync(magnitude="unit")),
    "sign_preserve": Method(rule=rules.SignSync(magnitude="preserve")),
    "sign_norm": Method(rule=rules.SignSync(magnitude="norm")),
    "bp_scaled": Method(factors=amplification),
    "bp_scaled_live": Method(factors=amplification, live=True),
    "frozen": Method(factors=only_output),
    "sign_glorot": Method(rule=rules.SignSync(magnitude="glorot")),
    "sign_redraw": Method(rule=rules.SignSync(magnitude="redraw")),
    "transport": Method(rule=rules.Transport(rate=1.0)),
    "weight_mirror": Method(rule=rules.WeightMirror()),
    "kp": Method(rule=rules.Fixed(), feedback_bar="kernel"),
    "information_alignment": Method(rule=rules.Fixed(), feedback_bar=local.InformationAlignment()),
    "symmetric_alignment": Method(rule=rules.Fixed(), feedback_bar=local.SymmetricAlignment()),
    "activation_alignment": Method(rule=rules.Fixed(), feedback_bar=local.ActivationAlignment()),
    "dfa": Method(error="exact"),
    "sdfa": Method(error="sign"),
    "drtp": Method(error="target"),
    "activity_propagation": Method(propagates_activity=True),
}


def of(method: str) -> Method:
    """What a method trains with, by its name.

    Raises:
        ValueError: for an unknown method.

    Example:
        >>> of("dfa").error, of("fa").rule
        ('exact', Fixed())
    """
    if method not in _METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(_METHODS)}.")
    return _METHODS[method]


def rule_of(method: str, period: ArrayLike) -> rules.Rule | None:
    """The rule behind a method's name; None for methods without feedback weights.

    Raises:
        ValueError: for an unknown method.

    Example:
        >>> rule_of("sign_preserve", 10)
        SignSync(period=10, magnitude='preserve')
    """
    rule = of(method).rule
    if rule is None or method not in config.PERIODIC:
        return rule
    return dataclasses.replace(rule, period=period)


def describe(method: str, period: ArrayLike) -> str:
    """A method's feedback in words that can be compared: all that is not among a state's arrays.

    Raises:
        ValueError: for an unknown method.

    Example:
        >>> describe("bp", 0), describe("kp", 0), describe("dfa", 0)
        ('None', "learnt, feedback_bar='kernel'", "direct, error='exact'")
    """
    spec = of(method)
    if spec.error is not None:
        return f"direct, error={spec.error!r}"
    if spec.feedback_bar is None:
        return repr(rule_of(method, period))
    rate = "" if spec.feedback_bar == "kernel" else f", rate={FEEDBACK_RATE:g}"
    return f"learnt, feedback_bar={spec.feedback_bar!r}{rate}"


def optimizer_of(
    method: str, learning_rate: ArrayLike, *, optimizer: str = "sgd", weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """The optimiser of a method: the study's own, after what the method does to gradients.

        w <- w + Δw - learning_rate * weight_decay * w

    with Δw the optimiser's update; layers that a method does not train do not decay. It is one over
    `(params, feedback)` for methods that learn feedback: by the same optimiser for Kolen-Pollack
    learning, else by SGD at `FEEDBACK_RATE`.

    Raises:
        ValueError: for an unknown method or optimiser.
    """
    spec = of(method)
    match optimizer:
        case "sgd":
            chosen = optax.sgd(learning_rate)
        case "momentum":
            chosen = optax.sgd(learning_rate, momentum=0.9)
        case "adam":
            chosen = optax.adam(learning_rate)
        case _:
            raise ValueError(
                f"optimizer is {optimizer!r}; expected one of {', '.join(config.OPTIMIZERS)}."
            )
    if weight_decay:
        trained = _is_output if spec.factors is only_output else None
        share = weight_decay * jnp.asarray(learning_rate, jnp.float32)
        decay = optax.add_decayed_weights(-share, mask=trained)
        chosen = optax.chain(chosen, decay)
    if spec.factors is not None:
        chosen = optax.chain(scale_layers(spec.factors, live=spec.live), chosen)
    if isinstance(spec.feedback_bar, ops.LocalLoss):
        parts = {"params": chosen, "feedback": optax.sgd(FEEDBACK_RATE)}
        return optax.partition(parts, ("params", "feedback"))
    return chosen


def _is_output(params):
    output = layers(params)[-1]
    return {name: name == output for name in params}


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
