"""Rules: how feedback weights change outside the optimiser.

A rule is a frozen, hashable value whose heart is one pure function on a pair of arrays,
`rule(kernel, feedback, key) -> feedback`. `sync_feedback` calls it where
`step % period == 0`. A rule of your own is one small class:

    >>> import dataclasses
    >>> import jax.numpy as jnp
    >>> from soap_jax import rules
    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Leak(rules.Rule):
    ...     "Feedback forgets a part of itself: B <- (1 - rate) B."
    ...     rate: float
    ...     def __call__(self, kernel, feedback, key):
    ...         return (1 - self.rate) * feedback
    >>> Leak(period=10, rate=0.5)
    Leak(period=10, rate=0.5)

A rule that remembers something from sync to sync says by `init` what, and then is
`rule(kernel, feedback, key, memory) -> (feedback, memory)`.

Rules hold numbers and strings, never functions or arrays (two equal initialisers do not compare
equal, and would retrace). The one exception is an array `period`, for sweeps over the period: it
makes the rule unhashable until `init_feedback` has moved the period into the state.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from soap_jax import draws, dtypes

Magnitude = Literal["norm", "unit", "preserve", "glorot", "redraw", "kernel"]

Made = jax.Array | tuple[jax.Array, chex.ArrayTree]
"""What a rule returns: feedback, and its memory if it has one."""

LARGEST = np.iinfo(np.int32).max
"""The largest step and period."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Base of all rules.

    Attributes:
        period: feedback is synced every so many parameter updates, counted from 0.

    Raises:
        ValueError: if the period is not an integer from 1 to the largest of int32, or not a scalar;
            or if values are given without their names. The value of a traced period is not looked
            at: one below 1 never syncs.
    """

    period: ArrayLike = 1

    def __new__(cls, *args, **kwargs):  # noqa: D102
        fields = [field for field in dataclasses.fields(cls) if field.init]
        if args and all(field.kw_only for field in fields):
            raise ValueError(
                f"{cls.__name__}({', '.join(map(repr, args))}) has values without names; expected "
                f"{cls.__name__}({', '.join(f'{field.name}=...' for field in fields)})."
            )
        return super().__new__(cls)

    def __post_init__(self):
        check_period(type(self).__name__, self.period)

    @property
    def accumulates(self) -> bool:
        """Whether new feedback is computed from the old, so that fewer bits would lose small steps.

        Where it is False, feedback that products take in fewer bits may be stored in these, and
        training has the same bits: `init_feedback(dtype="used")`. Else that keeps the kernel's
        dtype, as it does for a rule that does not say.
        """
        return True

    def init(
        self, kernel: jax.Array, feedback: jax.Array, key: chex.PRNGKey
    ) -> chex.ArrayTree | None:
        """What the rule remembers of one kernel's feedback; None, as by default, if nothing.

        `init_feedback` calls it once. It is kept in the state, and handed on from sync to sync.

        Args:
            kernel: forward weights W.
            feedback: feedback weights B as they are stored.
            key: differs from layer to layer.

        Returns:
            None, or a tree of arrays.
        """
        del kernel, feedback, key
        return None

    def __call__(self, kernel: jax.Array, feedback: jax.Array, key: chex.PRNGKey) -> Made:
        """Computes new feedback weights for one kernel.

        Args:
            kernel: forward weights W.
            feedback: feedback weights B, of the kernel's shape.
            key: differs from layer to layer and step to step.
            memory: a fourth argument, of a rule whose `init` returns something: that, or what the
                last sync returned.

        Returns:
            The new B, of the same shape; it is cast to B's dtype. Where B is stored as integers
            (`init_feedback(dtype=...)`), integers. Of a rule with a memory the pair `(B, memory)`,
            the memory of the same structure, shapes and dtypes.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__.")


@dataclasses.dataclass(frozen=True)
class Fixed(Rule):
    """Feedback alignment: fixed random feedback, `B <- B`.

    Example:
        >>> Fixed()
        Fixed()

    References:
        Lillicrap et al. Random synaptic feedback weights support error backpropagation for deep
        learning. Nature Communications, 2016. https://doi.org/10.1038/ncomms13276
    """

    period: ArrayLike = dataclasses.field(default=1, init=False, repr=False)
    accumulates = False

    def __call__(self, kernel: jax.Array, feedback: jax.Array, key: chex.PRNGKey) -> jax.Array:
        """Returns `feedback`."""
        del kernel, key
        return feedback


@dataclasses.dataclass(frozen=True, kw_only=True)
class SignSync(Rule):
    """Sign synchronisation: one bit per synapse leaks, `B <- m * sign(W)`.

    The magnitudes m are, by name,

        "norm"      norm(B0) / sqrt(size), so norm(B) = norm(B0) forever: the clean control
        "kernel"    norm(W) / norm(sign(W)) of now, so norm(B) = norm(W): Moskovitz's strict
                    normalisation. sign(0) = 0
        "unit"      1: SOAP's sync, and uSF. sign(0) = 0
        "glorot"    sqrt(2 / (fan_in + fan_out)): uSF as BioTorch scales it. sign(0) = 0
        "preserve"  abs(B), so abs(B0) forever: SOAP's remedy, and frSF at period 1
        "redraw"    abs of a fresh draw at every sync, Glorot's uniform one: brSF

    "norm" is the default, since it changes the direction of feedback alone. "unit" also makes it
    larger, often ten times as large as the kernel, which multiplies the learning rate of the layers
    below and easily passes for a better method. In "norm", "preserve" and "redraw" a zero weight
    counts as positive, so that no magnitude is ever lost.

    "norm" remembers one number a kernel, the root mean square of B0 (`init`). The norm of "kernel"
    is the whole kernel's, wherever its parts lie on a mesh; but under `shard_map` a rule sees its
    shard, and takes the norm of that.

    A kernel is taken for one matrix or convolution, `(*window, in, out)`. Of kernels stacked by
    `nn.scan`, "norm" and "kernel" would pool the layers, and "glorot" and "redraw" would count the
    layers as a window: use "unit" or "preserve", or a rule of your own around
    `jax.vmap(SignSync(...))` and, for "norm", `jax.vmap(SignSync(...).init)`.

    Attributes:
        period: as in `Rule`.
        magnitude: one of the names above.

    Raises:
        ValueError: for an unknown magnitude, or as `Rule`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> kernel, feedback = jnp.array([0.5, -3.0]), jnp.array([-0.1, 0.2])
        >>> SignSync(magnitude="preserve")(kernel, feedback, jax.random.key(0))
        Array([ 0.1, -0.2], dtype=float32)
        >>> SignSync()
        SignSync(period=1, magnitude='norm')

    References:
        Qianli Liao, Joel Z. Leibo, Tomaso Poggio. How important is weight symmetry in
        backpropagation? AAAI, 2016. https://arxiv.org/abs/1510.05067

        Theodore H. Moskovitz, Ashok Litwin-Kumar, L. F. Abbott. Feedback alignment in deep
        convolutional networks. 2018 ("kernel", and "preserve" at period 1).
        https://arxiv.org/abs/1812.06488
    """

    magnitude: Magnitude = "norm"

    def __post_init__(self):
        super().__post_init__()
        if self.magnitude not in get_args(Magnitude):
            raise ValueError(
                f"SignSync: magnitude is {self.magnitude!r}; expected one of "
                f"{', '.join(map(repr, get_args(Magnitude)))}."
            )

    @property
    def accumulates(self) -> bool:
        """Of the old feedback only magnitudes are kept, one by one, but for "norm" their mean."""
        return self.magnitude == "norm"

    def init(self, kernel: jax.Array, feedback: jax.Array, key: chex.PRNGKey) -> jax.Array | None:
        """Returns the root mean square of `feedback` for "norm"."""
        return root_mean_square(feedback) if self.magnitude == "norm" else None

    def __call__(
        self,
        kernel: jax.Array,
        feedback: jax.Array,
        key: chex.PRNGKey,
        memory: chex.ArrayTree | None = None,
    ) -> Made:
        """Returns the magnitudes with the signs of `kernel`; "norm", which has a memory, both."""
        match self.magnitude:
            case "unit":
                return jnp.sign(kernel).astype(feedback.dtype)  # whole numbers, also as integers
            case "glorot":
                return _glorot_deviation(kernel.shape) * jnp.sign(kernel)
            case "preserve":
                if jnp.issubdtype(feedback.dtype, jnp.integer):
                    feedback = feedback.astype(jnp.int32)  # there is no abs of int4
                magnitude = jnp.abs(feedback)
            case "kernel":
                w = kernel.astype(dtypes.wide(kernel))
                alive = jnp.maximum(jnp.sum(w != 0), 1).astype(jnp.abs(w).dtype)
                return jnp.sqrt(jnp.sum(jnp.square(jnp.abs(w))) / alive) * jnp.sign(w)
            case "norm":
                if memory is None:
                    raise ValueError(
                        f"{self} was called without its memory; expected `rule(kernel, feedback, "
                        "key, rule.init(kernel, feedback, key))`, which returns (feedback, memory)."
                    )
                return jnp.where(kernel < 0, -memory, memory), memory
            case "redraw":
                largest = math.sqrt(3) * _glorot_deviation(kernel.shape)
                draw = largest * (1 - draws.uniform(key, kernel.shape))  # never 0
                magnitude = shard_like(draw.astype(kernel.dtype), kernel)
        return jnp.where(kernel < 0, -magnitude, magnitude)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transport(Rule):
    """Weight transport: `B <- B + rate * (W - B)`.

    With `rate=1` feedback is a copy of the kernel, `period` updates old at most; with
    `period=1` too, training is exact backpropagation.

    Attributes:
        period: as in `Rule`.
        rate: the step towards W, in [0, 1].

    Raises:
        ValueError: if the rate is outside [0, 1], or as `Rule`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> Transport(rate=0.5)(jnp.array([1.0]), jnp.array([3.0]), jax.random.key(0))
        Array([2.], dtype=float32)

    References:
        Akrout et al. Deep learning without weight transport. NeurIPS, 2019 (the problem's
        statement). https://arxiv.org/abs/1904.05391
    """

    rate: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not (isinstance(self.rate, numbers.Real) and 0 <= self.rate <= 1):
            raise ValueError(f"Transport: rate is {self.rate!r}; expected a number in [0, 1].")

    @property
    def accumulates(self) -> bool:
        """At a rate of 1 feedback is a copy of the kernel, whatever it was."""
        return self.rate != 1

    def __call__(self, kernel: jax.Array, feedback: jax.Array, key: chex.PRNGKey) -> jax.Array:
        """Returns `feedback`, moved towards `kernel`."""
        del key
        if self.rate == 1:
            return kernel  # exactly, whatever the rounding of W - B
        w, b = dtypes.widen(kernel, feedback)
        return _rounded(b + float(self.rate) * (w - b), feedback)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightMirror(Rule):
    """Weight mirror: feedback learned from noise that is sent through the layer.

        B <- (1 - decay) B + rate * xᵀ (x W) / batch_size,      x ~ Normal(0, scale²)

    On average that is `B <- (1 - decay) B + rate * scale² W`, so B settles around
    rate * scale² / decay times W, by default around W itself. It is noisy weight transport: after
    some 1 / decay syncs the angle of B to W is about

        atan √(decay * fan_in / (2 * batch_size))

    and norm(B) about norm(W) / cos(angle). By default that is 11 degrees at a fan-in of 500, to
    which comes what W changes within that time; where W changes much, training may diverge at a
    learning rate that backprop stands, as it does with `Transport` at the same rate.

    A convolution's kernel `(*window, in, out)` counts as a matrix of fan-in window * in: noise
    comes as independent patches. So does any kernel of more axes: of stacked kernels (`nn.scan`)
    and attention's `(in, heads, size)` all axes but the last make the fan-in, which is more noise
    than need be; a rule of your own around `jax.vmap(WeightMirror())` mirrors each by itself.

    Between the syncs the network learns as with fixed feedback: the paper's mirror and engaged
    modes, alternating.

    Attributes:
        period: as in `Rule`.
        rate: learning rate of feedback, positive.
        decay: weight decay of feedback, in (0, 1]; by default rate * scale².
        scale: standard deviation of the noise, positive.
        batch_size: examples of noise per sync, at least 1.

    Raises:
        ValueError: if a value is out of range; or as `Rule`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> kernel, feedback = jnp.array([[1.0, -1.0]]), jnp.array([[5.0, 5.0]])
        >>> mirror = WeightMirror(rate=1.0, batch_size=100_000)
        >>> mirror(kernel, feedback, jax.random.key(0)).round(1)
        Array([[ 1., -1.]], dtype=float32)

    References:
        Mohamed Akrout, Collin Wilson, Peter Humphreys, Timothy Lillicrap, Douglas Tweed. Deep
        learning without weight transport. NeurIPS, 2019. https://arxiv.org/abs/1904.05391
    """

    rate: float = 0.01
    decay: float | None = None
    scale: float = 1.0
    batch_size: int = 64

    def __post_init__(self):
        super().__post_init__()
        for name in ("rate", "scale"):
            value: float = getattr(self, name)
            if not (isinstance(value, numbers.Real) and 0 < value < math.inf):
                raise ValueError(f"WeightMirror: {name} is {value!r}; expected a positive number.")
        if not (isinstance(self.batch_size, numbers.Integral) and self.batch_size >= 1):
            raise ValueError(
                f"WeightMirror: batch_size is {self.batch_size!r}; expected an integer of at least "
                "1, the examples of noise per sync."
            )
        if not (isinstance(self._decay, numbers.Real) and 0 < self._decay <= 1):
            raise ValueError(
                f"WeightMirror: decay is {self._decay!r}; expected a number in (0, 1]. By default "
                "it is rate * scale², so that feedback becomes as large as its kernel."
            )

    @property
    def _decay(self):
        return self.rate * self.scale**2 if self.decay is None else self.decay

    def __call__(self, kernel: jax.Array, feedback: jax.Array, key: chex.PRNGKey) -> jax.Array:
        """Returns `feedback` after a step of mirroring."""
        if kernel.ndim < 2:
            raise ValueError(
                f"a kernel of shape {kernel.shape} takes no noise; expected (*window, in, out). "
                "Use another rule for it."
            )
        wide = dtypes.wide(kernel, feedback)  # half precision rounds 1 - decay
        matrix = replicated(kernel).reshape(-1, kernel.shape[-1]).astype(wide)
        batch_size = int(self.batch_size)
        noise = float(self.scale) * draws.normal(key, (batch_size, len(matrix))).astype(wide)
        seen = noise.T @ (noise @ matrix) / batch_size
        step = shard_like(float(self.rate) * seen.reshape(kernel.shape), kernel)
        new = float(1 - self._decay) * feedback.astype(wide) + step
        return _rounded(new, feedback)


def check_period(name: str, period: ArrayLike) -> None:
    """Raises ValueError unless the period is an integer, 1 or more; a traced value passes."""
    if np.ndim(period) > 0:
        raise ValueError(
            f"{name}: period has shape {np.shape(period)}; expected a scalar. For a sweep over "
            f"periods map over them: jax.vmap(lambda period: ... {name}(period=period) ...)."
        )
    if not _is_period(period):
        raise ValueError(
            f"{name}: period is {period!r}; expected an integer of at least 1, the number of "
            f"parameter updates from one time to the next (at most {LARGEST}, int32's largest)."
        )


def shard_like(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Gives `x` the kernel's sharding: by `device_put`, or in the type under an explicit mesh."""
    if not isinstance(kernel, jax.Array):
        return x
    if not isinstance(kernel, jax.core.Tracer) and not isinstance(x, jax.core.Tracer):
        if isinstance(x, jax.Array) and x.sharding == kernel.sharding:
            return x  # device_put would commit it, even if the kernel is not
        return jax.device_put(x, kernel.sharding)
    return jax.sharding.reshard(x, jax.typeof(kernel).sharding) if _is_explicit(kernel) else x


def partition_spec(kernel: jax.Array) -> tuple:
    """The axes of a mesh over which each axis of the kernel is split; None where it is not."""
    is_traced = isinstance(kernel, jax.core.Tracer)
    sharding = jax.typeof(kernel).sharding if is_traced else getattr(kernel, "sharding", None)
    spec = sharding.spec if isinstance(sharding, jax.sharding.NamedSharding) else ()
    return (*spec, *[None] * (jnp.ndim(kernel) - len(spec)))


def shard_as(x: jax.Array, kernel: jax.Array, split: tuple) -> jax.Array:
    """Splits `x` so over the kernel's mesh, if the kernel lies on one."""
    spec = jax.sharding.PartitionSpec(*split)
    if isinstance(kernel, jax.core.Tracer) or isinstance(x, jax.core.Tracer):
        return jax.sharding.reshard(x, spec) if _is_explicit(kernel) else x
    sharding = getattr(kernel, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return shard_like(x, kernel)
    return jax.device_put(x, jax.sharding.NamedSharding(sharding.mesh, spec))


def replicated(x: jax.Array) -> jax.Array:
    """`x`, whole on every device where an explicit mesh has it in shards."""
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec()) if _is_explicit(x) else x


def _rounded(new, feedback):
    """What a rule computed, as feedback stores it; but never as integers, which cut it off."""
    return new.astype(feedback.dtype) if jnp.issubdtype(feedback.dtype, jnp.inexact) else new


def _is_explicit(x):
    """Whether the array's type says how it lies on a mesh."""
    return jax.sharding.AxisType.Explicit in (jax.typeof(x).sharding.mesh.axis_types or ())


def _glorot_deviation(shape: tuple[int, ...]) -> float:
    """`sqrt(2 / (fan_in + fan_out))` for a kernel `(*window, in, out)`."""
    if len(shape) < 2:
        raise ValueError(
            f"a kernel of shape {shape} has no fan-in and fan-out, which the magnitudes 'glorot' "
            "and 'redraw' need; expected (*window, in, out). Use another magnitude for it."
        )
    return math.sqrt(2 / (math.prod(shape[:-2]) * (shape[-2] + shape[-1])))


@jax.jit  # one program, also where `x` lies on several devices
def root_mean_square(x: jax.Array) -> jax.Array:
    """`√(mean(x²))`, a scalar, also where squares of the numbers leave their range.

    Example:
        >>> import jax.numpy as jnp
        >>> root_mean_square(jnp.array([3e-30, -3e-30]))
        Array(3.e-30, dtype=float32)
    """
    magnitude = jnp.abs(x.astype(dtypes.wide(x)))
    largest = jnp.max(magnitude)
    size = jnp.sqrt(jnp.mean(jnp.square(magnitude)))
    divisor = jnp.where(largest > 0, largest, 1)
    scaled = divisor * jnp.sqrt(jnp.mean(jnp.square(magnitude / divisor)))
    return jnp.where((size > 0) & jnp.isfinite(size), size, scaled)


def _is_period(period) -> bool:
    if isinstance(period, jax.Array | np.ndarray):  # only sweeps use them; the rule is transient
        if not jnp.issubdtype(period.dtype, jnp.integer):
            return False
        return isinstance(period, jax.core.Tracer) or 1 <= int(period) <= LARGEST
    is_integer = isinstance(period, numbers.Integral) and not isinstance(period, bool)
    return is_integer and 1 <= int(period) <= LARGEST
