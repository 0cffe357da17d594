"""Initialisers for feedback and projections, with JAX's signature `(key, shape, dtype) -> array`.

All of JAX's serve as they are, `jax.nn.initializers.orthogonal()` or `.he_normal()` for instance:

    init_feedback(key, params, initializer=jax.nn.initializers.orthogonal())

These make another one's draws sparse, of low rank, or larger. They nest, and serve wherever an
initialiser does: `init_feedback(initializer=...)`, `feedback_init` and `projection_init` of the
layers, `soap_jax.direct.draw_projection`.
"""

from __future__ import annotations

import math
import numbers

import jax
import jax.numpy as jnp

from soap_jax import dtypes
from soap_jax.feedback import glorot_normal

Initializer = jax.nn.initializers.Initializer
"""`(key, shape, dtype) -> array`."""


def sparse(density: float, initializer: Initializer = glorot_normal, *, axis: int) -> Initializer:
    """Keeps some entries of every row or column at random; all others are zero.

    Of the n entries of a line, exactly k = max(1, round(density * n)) are kept, and multiplied by
    sqrt(n / k), so that its expected squared norm is as without sparsity.

    Args:
        density: share of the entries that are kept, in (0, 1].
        initializer: draws them.
        axis: along which a line runs in the matrix `(size of the other axes, shape[-1])`. -2 suits
            projections `(out, features)`: each hidden unit hears of k outputs. -1 suits feedback
            `(in, out)`, whose hidden units are its rows.

    Returns:
        An initialiser.

    Raises:
        ValueError: if `density` is not in (0, 1], or `axis` is neither -2 nor -1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> jnp.count_nonzero(sparse(0.2, axis=-2)(jax.random.key(0), (10, 4)), axis=0)
        Array([2, 2, 2, 2], dtype=int32)

    References:
        Brian Crafton, Abhinav Parihar, Evan Gebhardt, Arijit Raychowdhury. Direct feedback
        alignment with sparse connections for local learning. Frontiers in Neuroscience, 2019.
        https://arxiv.org/abs/1903.02083
    """
    if not (isinstance(density, numbers.Real) and 0 < density <= 1):
        raise ValueError(f"density is {density!r}; expected a share of the entries, in (0, 1].")
    if axis not in (-2, -1):
        raise ValueError(f"axis is {axis}; expected -2 (columns) or -1 (rows) of the matrix.")

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        entries_key, places_key = jax.random.split(key)
        entries = initializer(entries_key, shape, dtype)
        matrix = entries.reshape(-1, entries.shape[-1])
        length = matrix.shape[axis]
        kept = max(1, round(density * length))
        order = jnp.argsort(jax.random.uniform(places_key, matrix.shape), axis)
        scale = jnp.where(jnp.argsort(order, axis) < kept, math.sqrt(length / kept), 0.0)
        matrix *= scale.astype(matrix.dtype)
        return _shard(matrix.reshape(entries.shape), out_sharding)

    return init


def low_rank(rank: int, initializer: Initializer = glorot_normal) -> Initializer:
    """A product of two random factors, as large as another initialiser's draw D.

        B = c · U · V        U: (rows, rank), V: (rank, columns), standard normal

    where c gives B the root mean square of D, of which nothing else is used. The matrix is
    `(size of the other axes, shape[-1])`.

    Args:
        rank: of the matrix; 1 up to its smaller side.
        initializer: draws D.

    Returns:
        An initialiser, which raises ValueError for a shape whose matrix is too small.

    Raises:
        ValueError: if `rank` is below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> int(jnp.linalg.matrix_rank(low_rank(2)(jax.random.key(0), (10, 7))))
        2

    References:
        Maher Hanut, Jonathan Kadmon. Training large neural networks with low-dimensional error
        feedback. 2025. https://arxiv.org/abs/2502.20580
    """
    if not (isinstance(rank, numbers.Integral) and rank >= 1):
        raise ValueError(f"rank is {rank!r}; expected an integer, 1 or more.")

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        rows, columns = math.prod(shape[:-1]), shape[-1]
        if rank > min(rows, columns):
            raise ValueError(
                f"rank is {rank}; expected at most {min(rows, columns)}, the smaller side of the "
                f"matrix ({rows}, {columns}) that {tuple(shape)} is."
            )
        size_key, *keys = jax.random.split(key, 3)
        size = initializer(size_key, shape, dtype)
        wide = dtypes.wide(size)
        u = jax.random.normal(keys[0], (rows, rank), wide)
        v = jax.random.normal(keys[1], (rank, columns), wide)
        # At a lower precision, accelerators' default, rounding would fill up the rank.
        matrix = jnp.dot(u, v, precision="highest")
        matrix *= _root_mean_square(size.astype(wide)) / _root_mean_square(matrix)
        return _shard(matrix.reshape(size.shape).astype(size.dtype), out_sharding)

    return init


def scaled(gain: float, initializer: Initializer = glorot_normal) -> Initializer:
    """Another initialiser's draws, `gain` times.

    Feedback that is larger than its kernel multiplies the learning rate of the layers below, which
    easily passes for a better method: compare at several learning rates.

    Args:
        gain: positive.
        initializer: draws.

    Returns:
        An initialiser.

    Raises:
        ValueError: if `gain` is not positive and finite.

    Example:
        >>> import jax
        >>> scaled(0.5, jax.nn.initializers.ones)(jax.random.key(0), (2,))
        Array([0.5, 0.5], dtype=float32)
    """
    if not (isinstance(gain, numbers.Real) and 0 < gain < math.inf):
        raise ValueError(f"gain is {gain!r}; expected a positive, finite number.")

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        return _shard(float(gain) * initializer(key, shape, dtype), out_sharding)

    return init


def _shard(x, out_sharding):
    return x if out_sharding is None else jax.sharding.reshard(x, out_sharding)


def _root_mean_square(x):
    return jnp.sqrt(jnp.mean(jnp.square(x)))
