"""The values of a program: label, array, and the form computed with feedback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad

from soap_jax.transform import labels as lb


class Value(NamedTuple):
    """A value of the program.

    Attributes:
        label: the properties of the value that are known without computing it.
        array: the array; None if nothing is computed.
        feedback: the array computed with feedback instead of kernels; None if there is none.
    """

    label: lb.Label
    array: Any = None
    feedback: Any = None

    @property
    def with_feedback(self) -> Any:
        """The form with feedback if there is one, else the array."""
        return self.array if self.feedback is None else self.feedback


def constant(x: Any) -> Value:
    """Makes a value that the function closes over: a constant, unless it is a tracer."""
    traced = isinstance(x, jax.core.Tracer)
    label = lb.Label(data=traced, active=traced, floats=traced, number=not jnp.ndim(x))
    return Value(label, x)


def bind(eqn: core.JaxprEqn, arrays: Sequence[Any]) -> list:
    """Applies an equation's primitive to other operands."""
    got = eqn.primitive.get_bind_params(eqn.params)  # in JAX 0.8 also functions
    functions, params = got if isinstance(got, tuple) else ((), got)
    out = eqn.primitive.bind(*functions, *arrays, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def bind_wide(eqn: core.JaxprEqn, arrays: Sequence[Any]) -> list:
    """Applies an equation's primitive to operands, some of which are stored in fewer bits.

    These are cast at their use, so that a scan saves them in the dtype in which they are stored.
    """
    dtypes = [_dtype(var) for var in eqn.invars]
    narrow = [jnp.result_type(x) != dtype for x, dtype in zip(arrays, dtypes, strict=True)]
    if not any(narrow):
        return bind(eqn, arrays)
    name = eqn.primitive.name
    if name == "convert_element_type" and lb.is_float(eqn.outvars[0].aval):
        if bits(arrays[0].dtype) <= bits(_dtype(eqn.outvars[0])):
            return list(arrays)
    elif name in lb.MOVES:
        return bind(eqn, arrays)

    def wide(*arrays):
        return bind(
            eqn,
            [x.astype(d) if n else x for x, d, n in zip(arrays, dtypes, narrow, strict=True)],
        )

    return jax.checkpoint(wide, prevent_cse=False)(*arrays)


def linear(transpose, residuals: Any, tangents: Sequence[Any], avals: Sequence[Any]) -> list:
    """Applies a linear function to tangents, given only its transpose.

    Args:
        transpose: `(residuals, cotangents) -> cotangents of the tangents`.
        residuals: the residuals of `transpose`.
        tangents: the operands.
        avals: the types of the outputs.
    """

    @jax.custom_vjp
    def f(residuals, operands):
        del residuals, operands
        return list(map(zeros, avals))

    f.defvjp(
        lambda residuals, operands: (list(map(zeros, avals)), residuals),
        lambda residuals, cotangents: (None, transpose(residuals, cotangents)),
    )
    tangents = list(tangents)
    return jax.jvp(lambda x: f(residuals, x), (list(map(jnp.zeros_like, tangents)),), (tangents,))[
        1
    ]


def _dtype(var: Any) -> Any:
    return var.aval.dtype


def bits(dtype: Any) -> int:
    """The number of bits per element."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return 8 * jnp.dtype(dtype).itemsize
    return (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits


def inexact(x: Any) -> bool:
    """Whether a value can have a tangent."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def zeros(aval: Any) -> jax.Array:
    """Makes zeros of a type, with its sharding."""
    if isinstance(aval, jax.ShapeDtypeStruct):
        return jnp.zeros(aval.shape, aval.dtype)
    return ad.zeros_like_aval(aval)


def vary_like(x: Any, other: Any) -> Any:
    """Inside `shard_map`, marks `x` as varying over all axes over which `other` varies."""
    axes = tuple(varying(other) - varying(x))
    if not axes:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, axes, to="varying")
    return jax.lax.pvary(x, axes)  # type: ignore[attr-defined]  # before JAX 0.9


def varying(x: Any) -> frozenset:
    """The axes of a `shard_map` over which a value varies."""
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.mat.varying  # before JAX 0.10, and since
