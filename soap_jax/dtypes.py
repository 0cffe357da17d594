"""Explicit dtypes for arithmetic on arrays of different dtypes.

Feedback may have another dtype than its kernel: bfloat16, an 8-bit float, or int8, int4 or int2 for
signs. JAX promotes some of these pairs implicitly, others never, and none under
`jax_numpy_dtype_promotion="strict"`. So this library casts the arrays to the dtype that these
functions give before every sum, difference or comparison.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def wide(*arrays: Any) -> np.dtype:
    """Returns the dtype for arithmetic on the arrays: float32, or the widest of them if wider.

    Args:
        arrays: arrays or dtypes of any kind of number.

    Example:
        >>> import jax.numpy as jnp
        >>> wide(jnp.ones(2, jnp.int4), jnp.ones(2, jnp.bfloat16)), wide(jnp.complex64)
        (dtype('float32'), dtype('complex64'))
    """

    def one(array):
        dtype = np.dtype(jnp.result_type(array))
        return dtype if jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4 else np.float32

    return np.result_type(*map(one, arrays))


def widen(*arrays: Any) -> list[jax.Array]:
    """Casts all arrays to the dtype `wide(*arrays)`.

    Example:
        >>> import jax.numpy as jnp
        >>> widen(jnp.ones(1, jnp.int8), jnp.ones(1, jnp.float16))
        [Array([1.], dtype=float32), Array([1.], dtype=float32)]
    """
    dtype = wide(*arrays) if arrays else np.float32
    return [jnp.asarray(x).astype(dtype) for x in arrays]


def of(leaf: Any) -> np.dtype | None:
    """Returns the dtype of an array or a number; None for anything else, such as a function.

    Example:
        >>> of(1.0), of(None), of(print)
        (dtype('float32'), None, None)
    """
    try:
        return None if leaf is None else np.dtype(jnp.result_type(leaf))
    except TypeError:  # not a number, or a dtype that is not numeric, such as a key's
        return None


def holds(dtype: Any, other: Any) -> bool:
    """Whether numbers of the dtype `other` may be cast to the floating-point `dtype`.

    Example:
        >>> import jax.numpy as jnp
        >>> holds(jnp.float32, jnp.int4), holds(jnp.float32, jnp.complex64)
        (True, False)
    """
    is_number = jnp.issubdtype(other, jnp.number) or jnp.issubdtype(other, jnp.bool_)
    is_complex = jnp.issubdtype(other, jnp.complexfloating)
    return is_number and (not is_complex or jnp.issubdtype(dtype, jnp.complexfloating))


def check_stored(dtype: DTypeLike | None, name: str = "dtype") -> None:
    """Raises ValueError unless feedback can be stored in the dtype.

    Args:
        dtype: a floating-point dtype with both signs, a signed integer dtype, or None.
        name: the name of the argument, for the message.
    """
    if dtype is None:
        return
    try:
        dtype = np.dtype(dtype)
        if jnp.issubdtype(dtype, jnp.signedinteger):
            serves = jnp.iinfo(dtype).max >= 1
        else:  # XLA does not support 6-bit arrays
            info = jnp.finfo(dtype) if jnp.issubdtype(dtype, jnp.floating) else None
            serves = info is not None and bool(info.min < 0) and info.bits != 6
    except (TypeError, ValueError):  # not a dtype, or not of numbers
        serves = False
    if not serves:
        raise ValueError(
            f"{name} is {dtype!r}; expected a floating-point dtype of jax.numpy with both signs, "
            "such as jax.numpy.bfloat16; a signed integer dtype, such as jax.numpy.int8, to store "
            "signs; or None for the kernel's dtype."
        )


def stored(feedback: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    """Casts feedback to the dtype for storage: rounded, or its signs for an integer dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> stored(jnp.array([0.3, -0.2]), jnp.int8)
        Array([ 1, -1], dtype=int8)
    """
    if dtype is None:
        return feedback
    feedback = jnp.asarray(feedback)
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    return (jnp.sign(feedback) if is_integer else feedback).astype(dtype)
