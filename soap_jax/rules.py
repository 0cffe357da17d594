"""Rules: how feedback weights change outside the optimiser.

A rule is a frozen, hashable object that is called as a pure function of one kernel and its
feedback, `rule(kernel, feedback, key) -> feedback`. `sync_feedback` calls it when
`step % period == 0`. To write your own rule, define one small class:

    >>> import dataclasses
    >>> import jax.numpy as jnp
    >>> from soap_jax import rules
    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Leak(rules.Rule):
    ...     "Feedback decays: B <- (1 - rate) B."
    ...     rate: float
    ...     def __call__(self, kernel, feedback, key):
    ...         return (1 - self.rate) * feedback
    >>> Leak(period=10, rate=0.5)
    Leak(period=10, rate=0.5)

A rule can keep a memory from one sync to the next. Its `init` returns the first memory, and it is
called as `rule(kernel, feedback, key, memory) -> (feedback, memory)`.

The fields of a rule are numbers and strings, never functions or arrays. (Two equal initialisers do
not compare equal, so they would cause a retrace.) The only exception is an array `period`, for
sweeps over the period: it makes the rule unhashable until `init_feedback` has moved the period into
the state. Rules are compared by all their fields, and equal rules share what JAX has compiled. So a
rule has no `__init__` of its own, and no field with `compare=False`.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import numbers
from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from soap_jax import draws, dtypes

__all__ = [
    "Fixed",
    "Made",
    "Magnitude",
    "Rule",
    "SignSync",
    "Transport",
    "WeightMirror",
]

Magnitude = Literal["norm", "unit", "preserve", "glorot", "redraw", "kernel"]

Made = jax.Array | tuple[jax.Array, chex.ArrayTree]
"""The result of a rule: feedback, or (feedback, memory) for a rule with a memory."""

LARGEST = np.iinfo(np.int32).max
"""The largest allowed step and period, the largest int32."""


def _binds(signature: inspect.Signature, num: int) -> bool:
    """Whether one may call a function of the signature with so many positional arguments."""
    try:
        signature.bind(*range(num))
    except TypeError:
        return False
    return True


def _check_init_is_made(cls: type, base: type) -> None:
    """Raises ValueError if `base`, which is `cls` or one of its bases, has its own `__init__`."""
    own = vars(base).get("__init__")
    if own is None or "__dataclass_fields__" in vars(base):  # a base, or made with slots=True
        return
    names = [name for name in inspect.signature(own).parameters if name not in ("self", "period")]
    where = "" if base is cls else f", by its base {base.__name__}"
    raise ValueError(
        f"{cls.__name__} has an __init__ of its own{where}; expected the one that dataclass makes, "
        "since rules are compared by their fields. Put @dataclasses.dataclass(frozen=True, "
        f"kw_only=True) before the class, and in the class, in place of __init__, the fields "
        f"`{'; '.join(f'{name}: float' for name in names) or 'name: type'}`, with their own types. "
        "To check values, define __post_init__."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """The base class of all rules.

    Attributes:
        period: the number of parameter updates from one sync to the next; the first sync is at
            step 0.

    Raises:
        ValueError: if the period is not an integer scalar from 1 to the largest int32, or if
            arguments are given by position. The value of a traced period is not checked: with a
            value below 1 feedback is never synced. A subclass raises it if it has another
            signature, defines `__init__`, or is not compared by all its fields.
    """

    period: ArrayLike = 1

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(Rule)]:
            _check_init_is_made(cls, base)
        signature = inspect.signature(cls.__call__)
        if not any(_binds(signature, num) for num in (4, 5)):
            raise ValueError(
                f"{cls.__name__}.__call__ has the signature {signature}; expected (self, kernel, "
                "feedback, key), and memory after these if `init` returns one."
            )

    def __new__(cls, *args, **kwargs):  # noqa: D102
        fields = [field for field in dataclasses.fields(cls) if field.init]
        declared = inspect.get_annotations(cls)
        if declared and "__dataclass_fields__" not in vars(cls):
            raise ValueError(
                f"{cls.__name__} declares {', '.join(declared)} but is not a dataclass; put "
                "@dataclasses.dataclass(frozen=True, kw_only=True) before the class."
            )
        ignored = [field.name for field in dataclasses.fields(cls) if not field.compare]
        if ignored or not cls.__dataclass_params__.eq:  # type: ignore[attr-defined]
            how = f"compare=False for {', '.join(ignored)}" if ignored else "dataclass(eq=False)"
            raise ValueError(
                f"{cls.__name__} has {how}; expected a comparison of all fields, since rules that "
                "are equal share one compiled sync. Leave it out."
            )
        if args and all(field.kw_only for field in fields):
            raise ValueError(
                f"{cls.__name__}({', '.join(map(repr, args))}) has positional arguments; expected "
                f"{cls.__name__}({', '.join(f'{field.name}=...' for field in fields)})."
            )
        return super().__new__(cls)

    def __post_init__(self):
        check_period(type(self).__name__, self.period)

    @property
    def accumulates(self) -> bool:
        """Whether new feedback depends on the old, so that a smaller dtype could lose small steps.

        If it is False, `init_feedback(dtype="used")` may store feedback in a smaller dtype in which
        products use it; training is bit-identical. If it is True, the default, feedback keeps the
        kernel's dtype.
        """
        return True

    def init(
        self, kernel: jax.Array, feedback: jax.Array, key: chex.PRNGKey
    ) -> chex.ArrayTree | None:
        """Returns the rule's first memory for one kernel; None, the default, for no memory.

        `init_feedback` calls it once. The state keeps the memory from one sync to the next.

        Args:
            kernel: forward weights W.
            feedback: feedback weights B as stored.
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
            memory: a fourth argument, only for a rule with a memory: the memory that the last sync
                returned, or at first the one from `init`.

        Returns:
            The new B, of the same shape; it is cast to B's dtype. If B is stored as integers
            (`init_feedback(dtype=...)`), the new B must be integers too. A rule with a memory
            returns `(B, memory)`, with a memory of the same structure, shapes and dtypes.
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
    """Sign synchronisation: copies one bit per weight, the sign: `B <- m * sign(W)`.

    `magnitude` names the magnitudes m:

        "norm"      norm(B0) / sqrt(size), so norm(B) = norm(B0) forever: the clean control
        "kernel"    norm(W) / norm(sign(W)) of the current W, so norm(B) = norm(W): Moskovitz's
                    strict normalisation. sign(0) = 0
        "unit"      1: SOAP's sync, and uSF. sign(0) = 0
        "glorot"    sqrt(2 / (fan_in + fan_out)): uSF as BioTorch scales it. sign(0) = 0
        "preserve"  abs(B), so abs(B0) forever: SOAP's remedy, and frSF at period 1
        "redraw"    abs of a fresh draw at every sync, from Glorot's uniform: brSF

    "norm" is the default, since it changes only the direction of feedback. "unit" also makes
    feedback larger, often ten times as large as the kernel. This multiplies the learning rate of
    the layers below, which is easily mistaken for a better method. With "norm", "preserve" and
    "redraw" a zero weight counts as positive, so no magnitude is lost.

    "norm" has a memory: one number per kernel, the root mean square of B0 (`init`). "kernel" uses
    the norm of the whole kernel, also if the kernel is sharded. Under `shard_map` a rule gets one
    shard, and uses the norm of the shard.

    A kernel is treated as one matrix or convolution, `(*window, in, out)`. For kernels stacked by
    `nn.scan`, "norm" and "kernel" would pool the layers, and "glorot" and "redraw" would count the
    layers as part of the window. Use "unit" or "preserve" for these, or write a rule that calls
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
        """True for "norm" only: its memory is a mean over the old feedback."""
        return self.magnitude == "norm"

    def init(self, kernel: jax.Array, feedback: jax.Array, key: chex.PRNGKey) -> jax.Array | None:
        """Returns the root mean square of `feedback` for "norm", else None."""
        return root_mean_square(feedback) if self.magnitude == "norm" else None

    def __call__(
        self,
        kernel: jax.Array,
        feedback: jax.Array,
        key: chex.PRNGKey,
        memory: chex.ArrayTree | None = None,
    ) -> Made:
        """Returns the magnitudes with the signs of `kernel`; for "norm" also the memory."""
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

    With `rate=1` feedback is a copy of the kernel, at most `period` updates old; if also
    `period=1`, training is exact backpropagation.

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
        """False at a rate of 1: new feedback is then a copy of the kernel."""
        return self.rate != 1

    def __call__(self, kernel: jax.Array, feedback: jax.Array, key: chex.PRNGKey) -> jax.Array:
        """Returns `feedback`, moved towards `kernel`."""
        del key
        if self.rate == 1:
            return kernel  # exact, without the rounding of W - B
        w, b = dtypes.widen(kernel, feedback)
        return _rounded(b + float(self.rate) * (w - b), feedback)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightMirror(Rule):
    """Weight mirror: feedback learns from noise that is sent through the layer.

        B <- (1 - decay) B + rate * xᵀ (x W) / batch_size,      x ~ Normal(0, scale²)

    The mean of this update is `B <- (1 - decay) B + rate * scale² W`. So B converges to about
    rate * scale² / decay times W, by default to about W. It is noisy weight transport: after
    about 1 / decay syncs the angle between B and W is about

        atan √(decay * fan_in / (2 * batch_size))

    and norm(B) is about norm(W) / cos(angle). With the defaults the angle is 11 degrees at a fan-in
    of 500, and larger if W changes within that time. If W changes much, training may diverge at a
    learning rate at which backprop is stable, as with `Transport` at the same rate.

    A convolution's kernel `(*window, in, out)` is treated as a matrix of fan-in window * in, so the
    noise consists of independent patches. Any kernel with more than two axes is treated in the same
    way. For stacked kernels (`nn.scan`) and attention's `(in, heads, size)` all axes but the last
    form the fan-in, which gives more noise than necessary. To mirror each kernel separately, write
    a rule that calls `jax.vmap(WeightMirror())`.

    Between syncs the network learns as with fixed feedback, so the paper's mirror and engaged modes
    alternate.

    Attributes:
        period: as in `Rule`.
        rate: learning rate of feedback, positive.
        decay: weight decay of feedback, in (0, 1]; by default rate * scale².
        scale: standard deviation of the noise, positive.
        batch_size: number of noise examples per sync, at least 1.

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
                "1, the number of noise examples per sync."
            )
        if not (isinstance(self._decay, numbers.Real) and 0 < self._decay <= 1):
            raise ValueError(
                f"WeightMirror: decay is {self._decay!r}; expected a number in (0, 1]. By default "
                "it is rate * scale², which makes feedback as large as its kernel."
            )

    @property
    def _decay(self):
        return self.rate * self.scale**2 if self.decay is None else self.decay

    def __call__(self, kernel: jax.Array, feedback: jax.Array, key: chex.PRNGKey) -> jax.Array:
        """Returns `feedback` after one weight-mirror update."""
        if kernel.ndim < 2:
            raise ValueError(
                f"WeightMirror: a kernel has shape {kernel.shape}; expected (*window, in, out). "
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


def at_every_step(rule: Rule) -> Rule:
    """Returns a copy of the rule with the period 1 and all other values as they are.

    `dataclasses.replace` would call `__post_init__` again, which may change values.

    Example:
        >>> at_every_step(SignSync(period=10, magnitude="unit"))
        SignSync(period=1, magnitude='unit')
    """
    static = copy.copy(rule)
    object.__setattr__(static, "period", 1)
    return static


def first_memory(
    rule: Rule, kernel: jax.Array, feedback: jax.Array, key: chex.PRNGKey
) -> chex.ArrayTree | None:
    """Returns `rule.init(kernel, feedback, key)`, as a copy, which can be donated.

    Raises:
        ValueError: if this is not a tree of arrays, or `__call__` does not take a memory if there
            is one, or needs a memory if there is none.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> first_memory(SignSync(), jnp.ones(2), jnp.array([3.0, -3.0]), jax.random.key(0))
        Array(3., dtype=float32)
    """
    name = type(rule).__name__
    start, call = inspect.signature(rule.init), inspect.signature(rule.__call__)
    if not _binds(start, 3):
        raise ValueError(
            f"{name}.init has the signature {start}; expected (kernel, feedback, key) after self."
        )
    memory = rule.init(kernel, feedback, key)
    if memory is None and not _binds(call, 3):
        raise ValueError(
            f"{name}.__call__ has the signature {call}, with a memory, and there is none; expected "
            "a method init(self, kernel, feedback, key) that returns the first memory. For a rule "
            "without a memory, leave the last argument out."
        )
    if memory is not None and not _binds(call, 4):
        raise ValueError(
            f"{name}.init returned a memory and {name}.__call__ has the signature {call}; expected "
            "(kernel, feedback, key, memory) after self, and (feedback, memory) as its result."
        )
    try:
        return jax.tree.map(jnp.array, memory)
    except TypeError as error:
        raise ValueError(
            f"{name}.init returned {memory!r}; expected None or a tree of arrays."
        ) from error


def check_period(name: str, period: ArrayLike) -> None:
    """Raises ValueError unless the period is an integer of at least 1; traced values pass."""
    if np.ndim(period) > 0:
        raise ValueError(
            f"{name}: period has shape {np.shape(period)}; expected a scalar. To sweep over "
            f"periods, use jax.vmap(lambda period: ... {name}(period=period) ...)."
        )
    if not _is_period(period):
        raise ValueError(
            f"{name}: period is {period!r}; expected an integer of at least 1, the number of "
            f"parameter updates from one sync to the next (at most {LARGEST}, int32's largest)."
        )


def shard_like(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Gives `x` the kernel's sharding, by `device_put` or, under an explicit mesh, `reshard`."""
    if not isinstance(kernel, jax.Array):
        return x
    if not isinstance(kernel, jax.core.Tracer) and not isinstance(x, jax.core.Tracer):
        if isinstance(x, jax.Array) and x.sharding == kernel.sharding:
            return x  # device_put would commit x, even if the kernel is uncommitted
        return jax.device_put(x, kernel.sharding)
    return jax.sharding.reshard(x, jax.typeof(kernel).sharding) if _is_explicit(kernel) else x


def partition_spec(kernel: jax.Array) -> tuple:
    """Returns, for each axis of the kernel, the mesh axes that split it, or None."""
    is_traced = isinstance(kernel, jax.core.Tracer)
    sharding = jax.typeof(kernel).sharding if is_traced else getattr(kernel, "sharding", None)
    spec = sharding.spec if isinstance(sharding, jax.sharding.NamedSharding) else ()
    return (*spec, *[None] * (jnp.ndim(kernel) - len(spec)))


def shard_as(x: jax.Array, kernel: jax.Array, split: tuple) -> jax.Array:
    """Shards `x` by the partition spec `split` over the kernel's mesh, if it has one."""
    spec = jax.sharding.PartitionSpec(*split)
    if isinstance(kernel, jax.core.Tracer) or isinstance(x, jax.core.Tracer):
        return jax.sharding.reshard(x, spec) if _is_explicit(kernel) else x
    sharding = getattr(kernel, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return shard_like(x, kernel)
    return jax.device_put(x, jax.sharding.NamedSharding(sharding.mesh, spec))


def replicated(x: jax.Array) -> jax.Array:
    """Replicates `x` on every device, if an explicit mesh shards it."""
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec()) if _is_explicit(x) else x


def _rounded(new, feedback):
    """Casts the result of a rule to feedback's dtype, unless that is an integer dtype."""
    return new.astype(feedback.dtype) if jnp.issubdtype(feedback.dtype, jnp.inexact) else new


def _is_explicit(x):
    """Whether the array's type contains its sharding (explicit mesh axes)."""
    return jax.sharding.AxisType.Explicit in (jax.typeof(x).sharding.mesh.axis_types or ())


def _glorot_deviation(shape: tuple[int, ...]) -> float:
    """Computes `sqrt(2 / (fan_in + fan_out))` for a kernel `(*window, in, out)`."""
    if len(shape) < 2:
        raise ValueError(
            f"a kernel of shape {shape} has no fan-in and fan-out, which the magnitudes 'glorot' "
            "and 'redraw' need; expected a shape (*window, in, out). Use another magnitude for it."
        )
    return math.sqrt(2 / (math.prod(shape[:-2]) * (shape[-2] + shape[-1])))


@jax.jit  # one program, also if `x` is on several devices
def root_mean_square(x: jax.Array) -> jax.Array:
    """Computes `√(mean(x²))`, a scalar, without overflow or underflow of the squares.

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
    if isinstance(period, jax.Array | np.ndarray):  # only in sweeps
        if not jnp.issubdtype(period.dtype, jnp.integer):
            return False
        return isinstance(period, jax.core.Tracer) or 1 <= int(period) <= LARGEST
    is_integer = isinstance(period, numbers.Integral) and not isinstance(period, bool)
    return is_integer and 1 <= int(period) <= LARGEST
