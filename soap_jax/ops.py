"""Bilinear ops that compute the cotangent of their input with feedback weights.

An op that is bilinear in an input `x` and a `kernel` has two cotangents. Backpropagation computes
the cotangent of `x` with the kernel. Feedback alignment (FA) uses another array, `feedback`:

    y          = op(x, kernel)
    x_bar      = the op's cotangent for x, at feedback in place of kernel
    kernel_bar = the op's own cotangent for kernel at (x, kernel)

All ops use one mechanism. JAX computes the forward pass and `kernel_bar`: `op` is applied to a
detached `x`, which gets no cotangent. Then an identity on `y` adds the cotangent of `x`: JAX
transposes `op` at `feedback`. So strides, groups, batch dimensions, einsum strings, `precision`,
`vmap`, higher derivatives and shardings are correct without a hand-written contraction. The
backward pass keeps only `x` and `feedback`, and both passes compile to the matrix products of
plain backpropagation.

References:
    Timothy P. Lillicrap, Daniel Cownden, Douglas B. Tweed, Colin J. Akerman. Random synaptic
    feedback weights support error backpropagation for deep learning. Nature Communications, 2016.
    https://doi.org/10.1038/ncomms13276
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from soap_jax import factors, trees

__all__ = [
    "BilinearOp",
    "Feedback",
    "FeedbackBar",
    "FeedbackBarFn",
    "FeedbackOp",
    "LocalLoss",
    "detach",
    "feedback_conv",
    "feedback_conv_transpose",
    "feedback_dense",
    "feedback_einsum",
    "feedback_op",
    "through_feedback",
]

BilinearOp = Callable[[jax.Array, jax.Array], jax.Array]
"""`(x, kernel) -> y`, linear in each argument."""

Feedback = factors.Feedback

FeedbackBarFn = Callable[[BilinearOp, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""A function `(op, x, kernel, feedback, y_bar) -> feedback_bar`, of feedback's shape.

`op(x, kernel)` is the product without the layer's bias and mask."""

FeedbackBar = Literal["kernel"] | FeedbackBarFn | None
"""The cotangent of feedback: zeros (`None`), the kernel's cotangent ("kernel"), or a function.

"kernel" is for Kolen-Pollack learning. The losses of `soap_jax.local` are functions."""


class LocalLoss:
    """A loss of one product's feedback; the base class of the losses in `soap_jax.local`.

    It depends on the product's input and weights, and not on the error. Given as `feedback_bar`, it
    sets feedback's cotangent to the gradient of the loss by feedback, for any op and layout.
    """

    def loss(
        self, op: BilinearOp, x: jax.Array, kernel: jax.Array, feedback: jax.Array
    ) -> jax.Array:
        """Computes the loss of `feedback`, a scalar.

        Args:
            op: the bilinear op, `(x, kernel) -> y`.
            x: the op's input, the activity of the batch.
            kernel: forward weights W.
            feedback: feedback weights B, of the kernel's shape and dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `loss`.")

    def __call__(
        self, op: BilinearOp, x: jax.Array, kernel: jax.Array, feedback: jax.Array, y_bar: jax.Array
    ) -> jax.Array:
        """Returns the loss's gradient by feedback."""
        del y_bar
        return jax.grad(self.loss, argnums=3)(op, x, kernel, cast_feedback(feedback, kernel))


SCOPE = "through_feedback"
"""The name of `through_feedback` in profiles."""

DIRECT = "direct_feedback"
"""The name of direct feedback in profiles, by which `soap_jax.transform` finds it."""

MARK = "soap_jax.ops.through_feedback"
"""The `checkpoint_name` of the kernel, by which `soap_jax.transform` finds `through_feedback`."""

FeedbackOp = Callable[[jax.Array, jax.Array, Feedback | None], jax.Array]
"""A function `(x, kernel, feedback) -> y`."""


@jax.custom_jvp
def detach(x: jax.Array) -> jax.Array:
    """Returns `x`, with a derivative of zero.

    Unlike `jax.lax.stop_gradient` it stops only the innermost differentiation, so the derivative of
    a pseudo-gradient is correct.

    Example:
        >>> import jax
        >>> jax.grad(lambda x: x * detach(x))(3.0)
        Array(3., dtype=float32, weak_type=True)
        >>> jax.grad(jax.grad(lambda x: x * detach(x)))(3.0)
        Array(1., dtype=float32, weak_type=True)
    """
    return x


@functools.partial(detach.defjvp, symbolic_zeros=True)
def _detach_jvp(primals, tangents):
    del tangents
    (x,) = primals
    return x, jax.custom_derivatives.zero_from_primal(x, symbolic_zeros=True)


def check_feedback_bar(feedback_bar: FeedbackBar) -> None:
    """Raises ValueError unless `feedback_bar` is a valid option."""
    is_function = callable(feedback_bar) and not isinstance(feedback_bar, type)
    if not (feedback_bar is None or feedback_bar == "kernel" or is_function):
        raise ValueError(
            f"feedback_bar is {feedback_bar!r}; expected None, 'kernel', a local loss such as "
            "soap_jax.local.SymmetricAlignment(), or a function of op, x, kernel, feedback and "
            "y_bar."
        )


def on_cotangent(x: jax.Array, callback: Callable[[], object]) -> jax.Array:
    """Returns `x`; calls `callback` only when a backward pass reaches `x`."""

    @jax.custom_vjp
    def f(x):
        return x

    def f_bwd(_, x_bar):
        callback()
        return (x_bar,)

    f.defvjp(lambda x: (x, None), f_bwd)
    return f(x)


def through_feedback(
    op: BilinearOp,
    x: jax.Array,
    kernel: jax.Array,
    feedback: Feedback | None,
    *,
    forward: Callable[[jax.Array], jax.Array] | None = None,
    feedback_bar: FeedbackBar = None,
    mask: jax.Array | None = None,
    in_turn: bool = False,
    path: trees.Path = (),
) -> jax.Array:
    """Applies a bilinear op, and computes the cotangent of `x` with `feedback`.

    `feedback_op` is simpler to use. This function is for layers whose forward pass does more than
    `op`: give that pass as `forward`. Its derivatives by everything but `x` do not change.

    Args:
        op: the bilinear op, a pure function that closes over no traced value.
        x: the op's input; its cotangent is the op's cotangent for x, at `feedback`.
        kernel: the op's kernel.
        feedback: feedback weights, of the kernel's shape, or factors; cast to the kernel's dtype.
            None means exact backpropagation.
        forward: `x -> y`, by default `op(x, kernel)`; may add terms that do not depend on `x`, such
            as a bias.
        feedback_bar: the cotangent of feedback; see `feedback_op`.
        mask: an array by which `forward`, but not `op`, multiplies the kernel; may be traced.
        in_turn: whether the error is multiplied by one factor after the other, instead of by their
            product; only for a matrix product without a mask.
        path: path of the feedback, for error messages.

    Returns:
        `forward(x)`.

    Raises:
        ValueError: if feedback's shape is not the kernel's (the forward pass does not use it); if
            feedback is complex and the kernel real; if `feedback_bar` is not None, "kernel", a
            local loss or a function; or if that function does not return an array of feedback's
            shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, kernel, feedback = jnp.ones(2), jnp.eye(2), jnp.full((2, 2), 5.0)
        >>> def layer(x):
        ...     forward = lambda x: x @ kernel + 1
        ...     return through_feedback(jnp.dot, x, kernel, feedback, forward=forward)
        >>> layer(x), jax.grad(lambda x: layer(x).sum())(x)
        (Array([2., 2.], dtype=float32), Array([10., 10.], dtype=float32))
    """
    check_feedback_bar(feedback_bar)
    forward = forward or (lambda x: op(x, kernel))
    if feedback is None:
        return forward(x)
    trees.check_feedback(feedback, kernel, path)
    if mask is not None or not in_turn:
        feedback = factors.as_array(feedback, kernel.dtype)
    if mask is not None:
        masked: Any = feedback
        feedback = cast_feedback(masked, kernel) * jnp.asarray(mask).astype(kernel.dtype)
    x_type, kernel_type = jax.typeof(x), jax.typeof(kernel)
    bar_of: Any = feedback_bar
    learns = feedback_bar is not None and all(map(_has_cotangent, jax.tree.leaves(feedback)))

    def f(y, x, kernel, feedback):
        del x, kernel, feedback
        return y

    def f_fwd(y, x, kernel, feedback):
        if not learns:
            return y, (feedback,)
        return y, (feedback, x) if feedback_bar == "kernel" else (feedback, x, kernel)

    def f_bwd(residuals, y_bar):
        feedback, *activities = residuals
        at_feedback = jax.tree.map(lambda b: cast_feedback(b, kernel_type), feedback)
        x_bar = bar = None
        if _has_cotangent(x_type):
            back = jax.linear_transpose(lambda x: factors.in_turn(op, x, at_feedback), x_type)
            (x_bar,) = back(y_bar)
        if learns and feedback_bar == "kernel":
            (x,) = activities
            bar = _kernel_bar(op, x, kernel_type, at_feedback, y_bar)
        elif learns:
            x, kernel = activities
            x = x if _has_cotangent(x) else x.astype(kernel.dtype)  # a loss may differentiate by x
            whole, pull_back = jax.vjp(lambda own: factors.as_array(own, kernel.dtype), feedback)
            bar = bar_of(op, x, kernel, whole, y_bar)
            _check_bar(bar, whole)
            (bar,) = pull_back(bar.astype(whole.dtype))
        if learns:
            bar = jax.tree.map(lambda bar, stored: bar.astype(stored.dtype), bar, feedback)
        return y_bar, x_bar, None, bar

    f = jax.custom_vjp(f)
    f.defvjp(f_fwd, f_bwd)
    y = forward(detach(x))
    with jax.named_scope(SCOPE):
        return f(y, x, jax.ad_checkpoint.checkpoint_name(kernel, MARK), feedback)


def _kernel_bar(op, x, kernel_type, feedback, y_bar):
    """The cotangent of feedback, or of its factors, if feedback were the kernel."""
    if isinstance(feedback, factors.Product):  # factor by factor, without the kernel's cotangent
        return jax.vjp(lambda own: factors.in_turn(op, x, own), feedback)[1](y_bar)[0]
    (bar,) = jax.linear_transpose(lambda kernel: op(x, kernel), kernel_type)(y_bar)
    return jax.vjp(factors.as_array, feedback)[1](bar)[0]


def _check_bar(bar, feedback):
    """Raises ValueError unless `bar` is an array of feedback's shape."""
    if getattr(bar, "shape", None) != feedback.shape:
        got = f"shape {bar.shape}" if hasattr(bar, "shape") else type(bar).__name__
        raise ValueError(
            f"feedback_bar returned {got}; expected an array of shape {feedback.shape}, the shape "
            "of feedback."
        )


def cast_feedback(feedback: jax.Array, kernel: jax.Array) -> jax.Array:
    """Casts feedback from the dtype in which it is stored to the kernel's dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> cast_feedback(jnp.array([1, -1], jnp.int4), jnp.ones(2, jnp.float16))
        Array([ 1., -1.], dtype=float16)
    """
    return jnp.asarray(feedback).astype(kernel.dtype)


def feedback_op(op: BilinearOp, *, feedback_bar: FeedbackBar = None) -> FeedbackOp:
    """Gives a bilinear op a feedback argument.

    With `f = feedback_op(op)`, `f(x, kernel, feedback)` equals `op(x, kernel)`. In the backward
    pass,

        x_bar      = opᵀ(y_bar; feedback)      the op's cotangent for x, at feedback
        kernel_bar = opᵀ(y_bar; x)             independent of feedback

    so `f(x, kernel, kernel)` is exact backpropagation. `x` and `kernel` are promoted to a common
    inexact dtype, as in Flax layers, and every cotangent has its primal's dtype. Only reverse mode
    works: `jax.jvp` raises, since a pseudo-gradient is defined by its backward pass.

    Args:
        op: `(x, kernel) -> y`, linear in each argument, closing over no traced value.
        feedback_bar: the cotangent of feedback. None: zeros. "kernel": the kernel's cotangent, for
            Kolen-Pollack learning. A loss of `soap_jax.local`: its gradient by feedback, for rules
            that learn from the activity of the batch. A function `(op, x, kernel, feedback,
            y_bar) -> array` of feedback's shape: its value. Integer feedback has no cotangent.

    Returns:
        A function `(x, kernel, feedback) -> y`; `feedback=None` means exact backpropagation.
        It raises ValueError at trace time if feedback's shape is not the kernel's or the kernel is
        not floating point. With `jax_numpy_dtype_promotion="strict"` give `x` the kernel's dtype;
        feedback may have any dtype.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from soap_jax import ops
        >>> matvec = ops.feedback_op(lambda x, kernel: x @ kernel)
        >>> x, kernel, feedback = jnp.ones(2), jnp.eye(2, 3), jnp.full((2, 3), 5.0)
        >>> matvec(x, kernel, feedback)
        Array([1., 1., 0.], dtype=float32)
        >>> jax.grad(lambda x: matvec(x, kernel, feedback).sum())(x)
        Array([15., 15.], dtype=float32)

    References:
        Lillicrap et al. (2016), above. For "kernel": Mohamed Akrout et al. Deep learning without
        weight transport. NeurIPS, 2019. https://arxiv.org/abs/1904.05391
    """

    def f(x: jax.Array, kernel: jax.Array, feedback: Feedback | None) -> jax.Array:
        trees.check_kernel(kernel)
        x, kernel = _promote(x, kernel)
        return through_feedback(op, x, kernel, feedback, feedback_bar=feedback_bar)

    return f


def feedback_dense(
    x: jax.Array,
    kernel: jax.Array,
    feedback: Feedback | None,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    feedback_bar: FeedbackBar = None,
) -> jax.Array:
    """A feedback-alignment dense layer without bias.

        y = x · kernel              x_bar = y_bar · feedbackᵀ

    Args:
        x: `(..., in)`.
        kernel: `(in, out)`.
        feedback: `(in, out)`, or factors (`soap_jax.factors`); None for exact backpropagation.
        precision: as in `jax.lax.dot_general`.
        preferred_element_type: as in `jax.lax.dot_general`.
        feedback_bar: as in `feedback_op`.

    Returns:
        `(..., out)`.

    Raises:
        ValueError: see `feedback_op`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from soap_jax import ops
        >>> x, kernel = jnp.ones((4, 3)), jnp.ones((3, 2))
        >>> ops.feedback_dense(x, kernel, jnp.zeros((3, 2))).shape
        (4, 2)

    References:
        Lillicrap et al. (2016); see the module's docstring.
    """

    def op(x, kernel):
        return lax.dot_general(
            x,
            kernel,
            (((x.ndim - 1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=preferred_element_type,
        )

    trees.check_kernel(kernel)
    x, kernel = _promote(x, kernel)
    return through_feedback(op, x, kernel, feedback, feedback_bar=feedback_bar, in_turn=True)


def feedback_einsum(
    spec: str,
    x: jax.Array,
    kernel: jax.Array,
    feedback: Feedback | None,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    feedback_bar: FeedbackBar = None,
) -> jax.Array:
    """Feedback alignment for `einsum(spec, x, kernel)`.

    Args:
        spec: an einsum string with two operands, first `x`, such as "bti,iho->btho".
        x: first operand.
        kernel: second operand.
        feedback: of the kernel's shape, or factors; None for exact backpropagation.
        precision: as in `jax.numpy.einsum`.
        preferred_element_type: as in `jax.numpy.einsum`.
        feedback_bar: as in `feedback_op`.

    Returns:
        The result of `jnp.einsum`.

    Raises:
        ValueError: see `feedback_op`.

    Example:
        >>> import jax.numpy as jnp
        >>> from soap_jax import ops
        >>> x, kernel = jnp.ones((2, 5, 3)), jnp.ones((3, 4, 7))
        >>> ops.feedback_einsum("bti,iho->btho", x, kernel, kernel).shape
        (2, 5, 4, 7)

    References:
        Lillicrap et al. (2016); see the module's docstring.
    """
    op = functools.partial(
        jnp.einsum, spec, precision=precision, preferred_element_type=preferred_element_type
    )
    return feedback_op(op, feedback_bar=feedback_bar)(x, kernel, feedback)


def feedback_conv(
    x: jax.Array,
    kernel: jax.Array,
    feedback: Feedback | None,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    input_dilation: int | Sequence[int] = 1,
    kernel_dilation: int | Sequence[int] = 1,
    feature_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    feedback_bar: FeedbackBar = None,
) -> jax.Array:
    """A feedback-alignment convolution over any number of spatial axes.

    `y = x ⋆ kernel`; `x_bar` is the transpose of the same convolution, at `feedback`.

    Args:
        x: `(batch, *spatial, in)`.
        kernel: `(*window, in / feature_group_count, out)`.
        feedback: of the kernel's shape, or factors; None for exact backpropagation.
        strides: window strides, one number or one per spatial axis.
        padding: "SAME", "VALID", or `(low, high)` per spatial axis; with `input_dilation` only the
            last form.
        input_dilation: dilation of `x`, one number or one per spatial axis.
        kernel_dilation: dilation of the window, one number or one per spatial axis.
        feature_group_count: number of groups of features.
        precision: as in `jax.lax.conv_general_dilated`.
        preferred_element_type: as in `jax.lax.conv_general_dilated`.
        feedback_bar: as in `feedback_op`.

    Returns:
        `(batch, *spatial', out)`.

    Raises:
        ValueError: see `feedback_op`.

    Example:
        >>> import jax.numpy as jnp
        >>> from soap_jax import ops
        >>> x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
        >>> ops.feedback_conv(x, kernel, kernel, strides=2).shape
        (2, 4, 4, 5)

    References:
        Lillicrap et al. (2016); see the module's docstring.
    """
    rank = _spatial_rank(x, kernel)
    op = functools.partial(
        lax.conv_general_dilated,
        window_strides=_per_axis(strides, rank),
        padding=padding,
        lhs_dilation=_per_axis(input_dilation, rank),
        rhs_dilation=_per_axis(kernel_dilation, rank),
        dimension_numbers=_channels_last(rank),
        feature_group_count=feature_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return feedback_op(op, feedback_bar=feedback_bar)(x, kernel, feedback)


def feedback_conv_transpose(
    x: jax.Array,
    kernel: jax.Array,
    feedback: Feedback | None,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    kernel_dilation: int | Sequence[int] = 1,
    transpose_kernel: bool = False,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    feedback_bar: FeedbackBar = None,
) -> jax.Array:
    """A feedback-alignment transposed (fractionally strided) convolution.

    Args:
        x: `(batch, *spatial, in)`.
        kernel: `(*window, in, out)`; with `transpose_kernel`, `(*window, out, in)`.
        feedback: of the kernel's shape, or factors; None for exact backpropagation.
        strides: upsampling factors, one number or one per spatial axis.
        padding: "SAME", "VALID", or `(low, high)` per spatial axis.
        kernel_dilation: dilation of the window, one number or one per spatial axis.
        transpose_kernel: whether to flip the window and swap the kernel's feature axes.
        precision: as in `jax.lax.conv_transpose`.
        preferred_element_type: as in `jax.lax.conv_transpose`.
        feedback_bar: as in `feedback_op`.

    Returns:
        `(batch, *spatial', out)`.

    Raises:
        ValueError: see `feedback_op`.

    Example:
        >>> import jax.numpy as jnp
        >>> from soap_jax import ops
        >>> x, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 5))
        >>> ops.feedback_conv_transpose(x, kernel, kernel, strides=2).shape
        (2, 8, 8, 5)

    References:
        Lillicrap et al. (2016); see the module's docstring.
    """
    rank = _spatial_rank(x, kernel)
    op = functools.partial(
        lax.conv_transpose,
        strides=_per_axis(strides, rank),
        padding=padding,
        rhs_dilation=_per_axis(kernel_dilation, rank),
        dimension_numbers=_channels_last(rank),
        transpose_kernel=transpose_kernel,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return feedback_op(op, feedback_bar=feedback_bar)(x, kernel, feedback)


def _has_cotangent(x) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _promote(x, kernel):
    dtype = jnp.result_type(x, kernel)  # inexact, since the kernel is
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def _spatial_rank(x, kernel) -> int:
    if jnp.ndim(kernel) < 2 or jnp.ndim(x) != jnp.ndim(kernel):
        raise ValueError(
            f"x has shape {jnp.shape(x)} and the kernel {jnp.shape(kernel)}; expected (batch, "
            "*spatial, in) and (*window, in, out), with the same number of axes."
        )
    return jnp.ndim(kernel) - 2


def _per_axis(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int | np.integer) else tuple(value)


def _channels_last(rank: int) -> lax.ConvDimensionNumbers:
    """Flax's layout: x `(batch, *spatial, in)`, kernel `(*window, in, out)`."""
    spatial = tuple(range(1, rank + 1))
    x_spec = (0, rank + 1, *spatial)
    kernel_spec = (rank + 1, rank, *range(rank))
    return lax.ConvDimensionNumbers(x_spec, kernel_spec, x_spec)
