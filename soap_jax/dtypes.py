"""Explicit dtypes where weights of several kinds meet.

Feedback may be stored in other bits than its kernel: bfloat16, signs in int8, int4 or int2, 8-bit
floats. JAX promotes some of these pairs implicitly, others never, and none at all under
`jax_numpy_dtype_promotion="strict"`. So every sum, difference or comparison of such arrays in this
library is taken in the dtype that these functions give.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def wide(*arrays: Any) -> np.dtype:
    """The dtype for arithmetic on all of the arrays: float32, or the widest that is wider.

    Args:
        arrays: arrays or dtypes, of numbers of any kind.

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
    """The arrays, all as `wide` of them.

    Example:
        >>> import jax.numpy as jnp
        >>> widen(jnp.ones(1, jnp.int8), jnp.ones(1, jnp.float16))
        [Array([1.], dtype=float32), Array([1.], dtype=float32)]
    """
    dtype = wide(*arrays) if arrays else np.float32
    return [jnp.asarray(x).astype(dtype) for x in arrays]


def of(leaf: Any) -> np.dtype | None:
    """The dtype of an array or a number; None of anything else, such as a model's function.

    Example:
        >>> of(1.0), of(None), of(print)
        (dtype('float32'), None, None)
    """
    try:
        return None if leaf is None else np.dtype(jnp.result_type(leaf))
    except TypeError:  # no number, or no dtype of numbers, as that of a key
        return None


def holds(dtype: Any, other: Any) -> bool:
    """Whether numbers of `other` dtype may be cast to the floating-point `dtype`.

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
        dtype: a floating-point dtype that holds both signs, a signed integer one, or None.
        name: of the argument, for the message.
    """
    if dtype is None:
        return
    try:
        dtype = np.dtype(dtype)
        if jnp.issubdtype(dtype, jnp.signedinteger):
            serves = jnp.iinfo(dtype).max >= 1
        else:  # XLA makes no arrays of 6 bits
            info = jnp.finfo(dtype) if jnp.issubdtype(dtype, jnp.floating) else None
            serves = info is not None and bool(info.min < 0) and info.bits != 6
    except (TypeError, ValueError):  # no dtype at all, or no number's
        serves = False
    if not serves:
        raise ValueError(
            f"{name} is {dtype!r}; expected a floating-point dtype of jax.numpy that holds both "
            "signs, such as jax.numpy.bfloat16, a signed integer one such as jax.numpy.int8 for "
            "signs, or None for the kernel's."
        )


def stored(feedback: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    """Feedback as it is stored in the dtype: rounded, or of an integer one its signs.

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
