"""Uniform and normal numbers, the same as `jax.random`'s, and signs, fast also on CPU.

To save compile time, JAX compiles its generator for CPU as a loop over arrays in memory. For a rule
that draws at every training step, this loop is most of the run time. Here the rounds of the
generator are unrolled, and XLA fuses them with the code that uses the numbers.

References:
    John K. Salmon, Mark A. Moraes, Ron O. Dror, David E. Shaw. Parallel random numbers: as easy as
    1, 2, 3. SC, 2011. https://doi.org/10.1145/2063384.2063405
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def uniform(key: chex.PRNGKey, shape: tuple[int, ...]) -> jax.Array:
    """Draws float32 numbers from [0, 1), bit-identical to `jax.random.uniform(key, shape)`.

    Example:
        >>> import jax
        >>> uniform(jax.random.key(0), (2,)) - jax.random.uniform(jax.random.key(0), (2,))
        Array([0., 0.], dtype=float32)
    """
    one = np.float32(1).view(np.uint32)
    return lax.bitcast_convert_type(_bits(key, shape) >> 9 | one, jnp.float32) - 1


def normal(key: chex.PRNGKey, shape: tuple[int, ...]) -> jax.Array:
    """Draws float32 standard normal numbers, equal up to rounding to `jax.random.normal`'s.

    Example:
        >>> import jax
        >>> normal(jax.random.key(0), (2,)) - jax.random.normal(jax.random.key(0), (2,))
        Array([0., 0.], dtype=float32)
    """
    low = np.nextafter(np.float32(-1), np.float32(0))
    u = jnp.maximum(low, uniform(key, shape) * (1 - low) + low)
    return np.float32(math.sqrt(2)) * lax.erf_inv(u)


def signs(key: chex.PRNGKey, shape: tuple[int, ...]) -> jax.Array:
    """Draws -1 or 1 in float32, each with probability 1/2.

    Example:
        >>> import jax
        >>> signs(jax.random.key(0), (5,))
        Array([-1., -1.,  1.,  1., -1.], dtype=float32)
    """
    return 1 - 2 * (_bits(key, shape) >> 31).astype(jnp.float32)


def typed(key: chex.PRNGKey) -> chex.PRNGKey:
    """Returns the key as a typed key.

    Raises:
        ValueError: if it is not one key from `jax.random.key` or `jax.random.PRNGKey`.

    Example:
        >>> import jax
        >>> typed(jax.random.PRNGKey(0)).dtype
        key<fry>
    """
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.ndim == 0:
            return key
        got = f"{key.shape} keys"
    else:
        if isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32 and key.ndim == 1:
            try:
                return jax.random.wrap_key_data(jnp.asarray(key))
            except TypeError:  # raw data of another generator
                pass
        is_array = isinstance(key, jax.Array | np.ndarray)
        got = f"{key.dtype}{list(key.shape)}" if is_array else repr(key)
    raise ValueError(
        f"key is {got}; expected one PRNG key, such as jax.random.key(0). Under `vmap` or `scan` "
        "give each run its own key."
    )


def _bits(key, shape):
    """Draws 32 random bits per number: Threefry-2x32 with twenty rounds, at the number's index."""
    size = math.prod(shape)
    if str(jax.random.key_impl(key)) != "threefry2x32" or size >= 2**32:
        return jax.random.bits(key, shape)
    data = jax.random.key_data(key)
    keys = data[0], data[1], data[0] ^ data[1] ^ np.uint32(_PARITY)
    # The indices are constant. Without the barrier XLA would move them out of a loop that draws
    # only at some steps.
    strides = [np.uint32(math.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    strides = lax.optimization_barrier((data, strides))[1]
    high = jnp.full(shape, keys[0])  # an index has 64 bits; the upper half is 0
    low = jnp.full(shape, keys[1])
    for axis, stride in enumerate(strides):
        low = low + lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            high = high + low
            low = high ^ (low << rotation | low >> 32 - rotation)
        high = high + keys[(group + 1) % 3]
        low = low + keys[(group + 2) % 3] + np.uint32(group + 1)
    return high ^ low
