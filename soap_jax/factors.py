"""Feedback weights stored as a product of two factors, which learn separately.

    B = left · right        left: (*window, in, rank), right: (rank, out)

A leaf of a feedback tree may be a `Product` or a `LowRank` instead of an array. The error is
multiplied by B; an optimiser updates the factors. Let F_bar be the cotangent of B as one array.
With `feedback_bar="kernel"` it is the kernel's cotangent, xᵀ · y_bar, and

    left_bar = F_bar · rightᵀ = xᵀ · (y_bar · rightᵀ)

The left factor needs only the layer's input and the error after the right factor; it does not
depend on W. As in Kolen-Pollack learning, weight decay aligns B with W: initial values decay, and
the updates of B are the updates of W times rightᵀ · right. The two kinds differ in the right
factor:

    Product     PFA: right is fixed and random; the rank is at least out
    LowRank     LDFA: right learns the main directions of the gradient; the rank is at most out

Draw them with `soap_jax.initializers.product` and `low_rank(rank, as_factors=True)`:

    state = init_feedback(key, params, where=..., initializer=initializers.product(10))
    loss_fa = with_feedback(loss, feedback_bar="kernel")
    optimizer = optimizers.hold_fixed(optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1)))
    grads = jax.grad(loss_fa, argnums=(0, 1))(params, state.feedback, batch)

`soap_jax.ops.feedback_dense` multiplies the error by one factor after the other; all other ops
compute B first. Kernels stacked by a scan, `(layers, in, out)`, share one right factor. For one
right factor per layer draw the factors under `jax.vmap` and adopt them
(`init_feedback(feedback=...)`); this is not possible for stacked convolutions.

References:
    Li Ji-An, Marcus K. Benna. Deep learning without weight symmetry. 2024 (PFA).
    https://arxiv.org/abs/2405.20594
    Maher Hanut, Jonathan Kadmon. Training large neural networks with low-dimensional error
    feedback. 2025 (LDFA). https://arxiv.org/abs/2502.20580
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from soap_jax import dtypes

__all__ = [
    "Feedback",
    "LowRank",
    "Product",
    "fixed",
]


class Product(NamedTuple):
    """Feedback weights `left · right`, with a learned left factor and a fixed right factor.

    Attributes:
        left: `(*window, in, rank)`, R in the paper, learned.
        right: `(rank, out)`, B in the paper, fixed: its gradient is 0, and
            `soap_jax.optimizers.hold_fixed` exempts it from weight decay. For stacked kernels
            `(layers, rank, out)`.

    References:
        Li, Benna (2024); see the module's docstring. The equations follow its public code,
        https://github.com/jil095/product_feedback_alignment.
    """

    left: jax.Array
    right: jax.Array


class LowRank(NamedTuple):
    """Feedback weights `left · right`; the right factor learns by Oja's rule.

        right_bar = (GᵀG · right - Gᵀ · F_bar) / |F_bar|²        G = F_bar · rightᵀ

    with F_bar as a matrix `(*, out)`. right converges to an orthonormal basis of the main
    directions of F_bar's rows; the product keeps only these components of the error. The rank
    should be at least the number of the network's outputs.

    right_bar is not a gradient. It does not depend on the size of the error, so weight decay does
    not shrink right when errors vanish. If you use loss scaling and divide the gradients by the
    scale, right learns slower by that factor. right_bar is not linear either: its sum over parts
    of a batch (`vmap` over examples, several uses of a kernel in `soap_jax.ops`) is not its value
    for the whole batch. `with_feedback` first sums F_bar over all uses.

    Attributes:
        left: `(*window, in, rank)`, Q in the paper.
        right: `(rank, out)`, P in the paper; for stacked kernels `(layers, rank, out)`.

    References:
        Hanut, Kadmon (2025); see the module's docstring. Its public reviews describe the first
        version: Q learns like Kolen-Pollack feedback, and P by Oja's rule from each error y_bar.
        Here P learns from the rows of xᵀ · y_bar, which every product has, divided by their size.
        The local layers of the public code learn P by the chain rule, starting from a decomposition
        of W; from a random start this diverged in our trials.
    """

    left: jax.Array
    right: jax.Array


Feedback = jax.Array | LowRank | Product
"""Feedback weights as stored: an array of the kernel's shape, or its factors."""


def is_factored(leaf: Any) -> TypeGuard[LowRank | Product]:
    """Whether a leaf of a feedback tree is stored as factors."""
    return isinstance(leaf, LowRank | Product)


def as_array(feedback: Any, dtype: DTypeLike | None = None) -> Any:
    """Returns a leaf of a feedback tree as one array: the product, if it is factored.

    Args:
        feedback: a leaf; if it is not factored, it is returned unchanged.
        dtype: the dtype to which factors are cast before the product, usually their kernel's; by
            default they are not cast.

    Example:
        >>> import jax.numpy as jnp
        >>> as_array(LowRank(jnp.ones((3, 2)), jnp.ones((2, 4)))).shape
        (3, 4)
    """
    if not is_factored(feedback):
        return feedback
    left, right = (factor if dtype is None else factor.astype(dtype) for factor in feedback)
    if isinstance(feedback, LowRank):
        return _low_rank(left, right)
    return jnp.matmul(left, lax.stop_gradient(right))


def in_turn(op, x: jax.Array, feedback: Feedback) -> jax.Array:
    """Computes `op(x, feedback)` for a matrix product, with one factor after the other.

    Args:
        op: `(x, matrix) -> y`, the product over the last axis of x and the first of the matrix.
        x: the input.
        feedback: an array or factors.

    Example:
        >>> import jax.numpy as jnp
        >>> in_turn(jnp.dot, jnp.ones((5, 3)), Product(jnp.ones((3, 2)), jnp.ones((2, 4)))).shape
        (5, 4)
    """
    if not is_factored(feedback):
        return op(x, feedback)
    passed = op(x, feedback.left).astype(feedback.right.dtype)
    return op(passed, lax.stop_gradient(feedback.right))


def fixed(feedback: chex.ArrayTree) -> chex.ArrayTree:
    """Returns a tree of bools of feedback's structure: True at the right factor of each `Product`.

    Example:
        >>> import jax.numpy as jnp
        >>> fixed({"a": Product(jnp.ones((3, 2)), jnp.ones((2, 4))), "b": jnp.ones((2, 2))})
        {'a': Product(left=False, right=True), 'b': False}
    """

    def one(leaf):
        leaves, structure = jax.tree.flatten(leaf)
        held = [False, True] if isinstance(leaf, Product) else [False] * len(leaves)
        return jax.tree.unflatten(structure, held)

    return jax.tree.map(one, feedback, is_leaf=is_factored)


def arrays_only(initializer):
    """Returns the initialiser with a check: it raises ValueError if it draws factors."""

    def init(*args, **kwargs):
        drawn = initializer(*args, **kwargs)
        if is_factored(drawn):
            raise ValueError(
                f"an initializer returned a {type(drawn).__name__}; expected one that returns an "
                "array. Only init_feedback(..., initializer=...) can draw factors."
            )
        return drawn

    return init


@jax.custom_vjp
def _low_rank(left, right):
    return jnp.matmul(left, right)


def _low_rank_fwd(left, right):
    return jnp.matmul(left, right), (left, right)


def _low_rank_bwd(residuals, bar):
    left, right = (factor.astype(dtypes.wide(factor)) for factor in residuals)
    types = [factor.dtype for factor in residuals]
    bar = bar.astype(left.dtype)
    is_stack = right.ndim > 2  # each matrix of a stack has its own size
    keep: dict[str, Any] = {"axis": (-2, -1) if is_stack else None, "keepdims": is_stack}
    largest = jnp.max(jnp.abs(bar), **keep)
    unit = bar / jnp.where(largest > 0, largest, 1)  # so that squares do not overflow
    size = jnp.sqrt(jnp.sum(jnp.square(unit), **keep))
    unit = unit / jnp.where(size > 0, size, 1)
    # Transposition also sums over shards correctly.
    (passed,) = jax.linear_transpose(lambda left: jnp.matmul(left, right), left)(unit)
    lost = jnp.matmul(passed, right) - unit
    (oja,) = jax.linear_transpose(lambda right: jnp.matmul(passed, right), right)(lost)
    return (largest * size * passed).astype(types[0]), oja.astype(types[1])


_low_rank.defvjp(_low_rank_fwd, _low_rank_bwd)
