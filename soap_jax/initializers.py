"""Initialisers for feedback and projections, with JAX's signature `(key, shape, dtype) -> array`.

All of JAX's initialisers work too, such as `jax.nn.initializers.orthogonal()` or `.he_normal()`:

    init_feedback(key, params, initializer=jax.nn.initializers.orthogonal())

The initialisers of this module wrap another one, to make its draws sparse, of low rank, or larger.
They can be nested, and work in `init_feedback(initializer=...)`, in `feedback_init` and
`projection_init` of the layers, and in `soap_jax.direct.draw_projection`. `product`, and `low_rank`
with `as_factors=True`, draw feedback as `soap_jax.factors`, only for `init_feedback`.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from soap_jax import dtypes, factors, rules
from soap_jax.feedback import glorot_normal

Initializer = jax.nn.initializers.Initializer
"""A function `(key, shape, dtype) -> array`."""


def sparse(density: float, initializer: Initializer = glorot_normal, *, axis: int) -> Initializer:
    """Makes sparse draws: random entries of every row or column are kept, all others are zero.

    Of the n entries of a row or column, exactly k = max(1, round(density * n)) are kept. They are
    multiplied by sqrt(n / k), so the expected squared norm is the same as without sparsity.

    Args:
        density: share of the entries that are kept, in (0, 1].
        initializer: draws the entries.
        axis: -2 to make every column of the matrix `(size of the other axes, shape[-1])` sparse, -1
            to make every row sparse. Use -2 for projections `(out, features)`: each hidden unit
            gets the error of k outputs. Use -1 for feedback `(in, out)`, where each row belongs to
            a hidden unit.

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
        entries = factors.arrays_only(initializer)(entries_key, shape, dtype)
        matrix = entries.reshape(-1, entries.shape[-1])
        length = matrix.shape[axis]
        kept = max(1, round(density * length))
        order = jnp.argsort(jax.random.uniform(places_key, matrix.shape), axis)
        scale = jnp.where(jnp.argsort(order, axis) < kept, math.sqrt(length / kept), 0.0)
        matrix *= scale.astype(matrix.dtype)
        return _shard(matrix.reshape(entries.shape), out_sharding)

    return _named(init, f"sparse({density}, {_name(initializer)}, axis={axis})")


def low_rank(
    rank: int, initializer: Initializer = glorot_normal, *, as_factors: bool = False
) -> Initializer:
    """Draws a product of two random factors, with the size of another initialiser's draw D.

        B = c · U · V        U: (rows, rank), V: (rank, columns), standard normal

    where c gives B the root mean square of D; nothing else of D is used. B has the shape
    `(size of the other axes, shape[-1])` as a matrix.

    Args:
        rank: rank of the matrix, from 1 to its smaller side.
        initializer: draws D.
        as_factors: whether to return c · U and V as a `soap_jax.factors.LowRank`, whose factors
            learn; V then has orthonormal rows. Only for `init_feedback`.

    Returns:
        An initialiser, which raises ValueError if the matrix of a shape is too small.

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
                f"matrix ({rows}, {columns}) for the shape {tuple(shape)}."
            )
        size_key, *keys = jax.random.split(key, 3)
        size = factors.arrays_only(initializer)(size_key, shape, dtype)
        wide = dtypes.wide(size)
        u = jax.random.normal(keys[0], (rows, rank), wide)
        draw = jax.nn.initializers.orthogonal() if as_factors else jax.random.normal
        v = draw(keys[1], (rank, columns), wide)
        # At the lower default precision of accelerators, rounding errors would raise the rank.
        matrix = jnp.dot(u, v, precision="highest")
        c = rules.root_mean_square(size) / rules.root_mean_square(matrix)
        if as_factors and out_sharding is not None:
            raise ValueError(f"out_sharding is {out_sharding}; expected None for factors.")
        if as_factors:
            left = (c * u).reshape(*size.shape[:-1], rank)
            return factors.LowRank(left.astype(size.dtype), v.astype(size.dtype))
        matrix *= c
        return _shard(matrix.reshape(size.shape).astype(size.dtype), out_sharding)

    return _named(init, f"low_rank({rank}, {_name(initializer)}, as_factors={as_factors})")


def product(expansion: int = 1, *, orthogonal: bool = False) -> Initializer:
    """Draws feedback of product feedback alignment (PFA): `left · right`, with right fixed.

        left: (*window, in, expansion · out), Glorot uniform
        right: (expansion · out, out), of mean 0 and variance 1 / (expansion · out), or orthogonal

    so that rightᵀ · right is about the identity. However long B learns, the angle between B and its
    kernel stays at about atan √(1 / expansion), 18 degrees at expansion=10. With an orthogonal
    right factor the angle falls as in Kolen-Pollack learning.

    Args:
        expansion: rank of the product divided by out, at least 1.
        orthogonal: whether the right factor is orthogonal.

    Returns:
        An initialiser of `soap_jax.factors.Product`, for `init_feedback` alone.

    Raises:
        ValueError: if `expansion` is below 1.

    Example:
        >>> import jax
        >>> feedback = product(10)(jax.random.key(0), (7, 3))
        >>> feedback.left.shape, feedback.right.shape
        ((7, 30), (30, 3))

    References:
        Li Ji-An, Marcus K. Benna. Deep learning without weight symmetry. 2024.
        https://arxiv.org/abs/2405.20594. Both draws follow its public code ("xavier"),
        https://github.com/jil095/product_feedback_alignment.
    """
    if not (isinstance(expansion, numbers.Integral) and expansion >= 1):
        raise ValueError(f"expansion is {expansion!r}; expected an integer, 1 or more.")

    def init(key, shape, dtype=jnp.float32):
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype is {np.dtype(dtype)}; expected a real floating-point dtype.")
        *rows, out = shape
        left_key, right_key = jax.random.split(key)
        left = jax.nn.initializers.glorot_uniform()(left_key, (*rows, expansion * out), dtype)
        shape = expansion * out, out
        if orthogonal:
            return factors.Product(left, jax.nn.initializers.orthogonal()(right_key, shape, dtype))
        bound = math.sqrt(3 / (expansion * out))
        return factors.Product(left, jax.random.uniform(right_key, shape, dtype, -bound, bound))

    return _named(init, f"product({expansion}, orthogonal={orthogonal})")


def match_projections(
    kernels: Sequence[jax.Array], *, rtol: float = 1e-6
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Feedback-weight matching: computes projections for trained kernels, and matching kernels.

    It prepares a network trained by backpropagation for fine-tuning with direct feedback. W_l, of
    shape (in, out), is the kernel from one activation with direct feedback to the next; the last
    kernel leads to the output. The result is

        P_L = W_Lᵀ                             the last activation's projection
        P_l = argmin |P_lᵀ · P_(l+1) - W_l|    by least squares, from the last one down
        W_l = P_lᵀ · P_(l+1)                   the new kernel; the last one stays

    Training then begins with kernels and projections aligned. The rank of projections and new
    kernels is at most the size of the output, so between wide layers most of W_l is lost.

    Args:
        kernels: at least one, `(in, out)`, where each `out` is the next kernel's `in`. Leave out
            the kernel below the first activation with direct feedback, which does not change.
        rtol: singular values below this share of the largest count as 0, as in `jnp.linalg.pinv`.

    Returns:
        The projections `(output, in)` of the activations before each kernel, and the new kernels.

    Raises:
        ValueError: if the kernels are not a chain of matrices, or `rtol` is not in [0, 1).

    Example:
        >>> import jax
        >>> keys = jax.random.split(jax.random.key(0))
        >>> trained = [jax.random.normal(keys[0], (5, 4)), jax.random.normal(keys[1], (4, 3))]
        >>> projections, kernels = match_projections(trained)
        >>> [p.shape for p in projections], [w.shape for w in kernels]
        ([(3, 5), (3, 4)], [(5, 4), (4, 3)])

    References:
        Enabling fine-tuning of direct feedback alignment via feedback-weight matching. 2026.
        https://openreview.net/forum?id=ASwAmbKJHr. Its summary gives the two conditions, but not
        how they are solved ("SVD or optimization"). Least squares, from the last kernel to the
        first, is our choice.
    """
    shapes = [jnp.shape(kernel) for kernel in kernels]
    chained = all(a[1:] == b[:1] for a, b in itertools.pairwise(shapes))
    if not shapes or any(len(shape) != 2 for shape in shapes) or not chained:
        raise ValueError(
            f"kernels have the shapes {shapes}; expected matrices (in, out), where each out is the "
            "next kernel's in."
        )
    if not (isinstance(rtol, numbers.Real) and 0 <= rtol < 1):
        raise ValueError(f"rtol is {rtol!r}; expected a number in [0, 1).")
    *below, last = map(jnp.asarray, kernels)
    projections, matched = [last.T], [last]
    for kernel in reversed(below):
        # Pᵀ · above = kernel, solved for the columns of P
        above, wanted = dtypes.widen(projections[0], kernel)
        fitted = jnp.linalg.pinv(above.T, rtol=rtol) @ wanted.T
        projections.insert(0, fitted.astype(kernel.dtype))
        matched.insert(0, (fitted.T @ above).astype(kernel.dtype))
    return projections, matched


def scaled(gain: float, initializer: Initializer = glorot_normal) -> Initializer:
    """Multiplies the draws of another initialiser by `gain`.

    Feedback larger than its kernel multiplies the learning rate of the layers below, which is
    easily mistaken for a better method: compare at several learning rates.

    Args:
        gain: a positive factor.
        initializer: draws the array that is multiplied.

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
        return _shard(
            float(gain) * factors.arrays_only(initializer)(key, shape, dtype), out_sharding
        )

    return _named(init, f"scaled({gain}, {_name(initializer)})")


def _named(init, name):
    """Sets the name by which the record of a study describes the initialiser."""
    init.__qualname__ = name
    return init


def _name(initializer):
    return getattr(initializer, "__qualname__", type(initializer).__name__)


def _shard(x, out_sharding):
    return x if out_sharding is None else jax.sharding.reshard(x, out_sharding)
