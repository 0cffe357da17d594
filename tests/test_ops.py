"""Feedback ops: the identities of `soap_jax.ops`, for every op, dtype and transformation."""

import functools
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from soap_jax import local, ops

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
ULPS = {"rtol": 2e-6, "atol": 2e-6}  # the same products, perhaps fused or summed otherwise


class Case(NamedTuple):
    """A feedback op, the plain op that it should be, and shapes to try it at."""

    f: Callable
    op: Callable
    x: tuple
    kernel: tuple


def einsum(spec, x, kernel):
    def f(x, kernel, feedback):
        return ops.feedback_einsum(spec, x, kernel, feedback)

    return Case(f, functools.partial(jnp.einsum, spec), x, kernel)


LAYOUTS = {
    1: ("NWC", "WIO", "NWC"),
    2: ("NHWC", "HWIO", "NHWC"),
    3: ("NDHWC", "DHWIO", "NDHWC"),
}


def conv(x, kernel, *, strides=None, padding="SAME", lhs=None, rhs=None, groups=1):
    rank = len(x) - 2
    ones = (1,) * rank
    f = functools.partial(
        ops.feedback_conv,
        strides=strides or 1,
        padding=padding,
        input_dilation=lhs or 1,
        kernel_dilation=rhs or 1,
        feature_group_count=groups,
    )
    op = functools.partial(
        lax.conv_general_dilated,
        window_strides=strides or ones,
        padding=padding,
        lhs_dilation=lhs or ones,
        rhs_dilation=rhs or ones,
        dimension_numbers=LAYOUTS[rank],
        feature_group_count=groups,
    )
    return Case(f, op, x, kernel)


def conv_transpose(x, kernel, *, strides=None, padding="SAME", rhs=None, transpose_kernel=False):
    rank = len(x) - 2
    f = functools.partial(
        ops.feedback_conv_transpose,
        strides=strides or 1,
        padding=padding,
        kernel_dilation=rhs or 1,
        transpose_kernel=transpose_kernel,
    )
    op = functools.partial(
        lax.conv_transpose,
        strides=strides or (1,) * rank,
        padding=padding,
        rhs_dilation=rhs or (1,) * rank,
        dimension_numbers=LAYOUTS[rank],
        transpose_kernel=transpose_kernel,
    )
    return Case(f, op, x, kernel)


CASES = {
    "dense, no batch axis": Case(ops.feedback_dense, jnp.dot, (3,), (3, 4)),
    "dense": Case(ops.feedback_dense, jnp.dot, (5, 3), (3, 4)),
    "dense, two batch axes": Case(ops.feedback_dense, jnp.dot, (5, 2, 3), (3, 4)),
    "dense, three batch axes": Case(ops.feedback_dense, jnp.dot, (2, 1, 5, 3), (3, 4)),
    "einsum to heads": einsum("bti,iho->btho", (2, 5, 3), (3, 2, 7)),
    "einsum from heads": einsum("btho,hoi->bti", (2, 5, 2, 7), (2, 7, 3)),
    "einsum with a shared axis": einsum("ebi,eio->beo", (3, 5, 2), (3, 2, 7)),
    "einsum with an ellipsis": einsum("...i,oi->...o", (2, 5, 3), (4, 3)),
    "einsum with a summed axis": einsum("bti,io->ob", (2, 5, 3), (3, 4)),
    "conv 1-D": conv((2, 7, 3), (3, 3, 4)),
    "conv 1-D, strided": conv((2, 8, 3), (3, 3, 5), strides=(3,), padding="VALID"),
    "conv 2-D": conv((2, 5, 7, 3), (3, 2, 3, 4)),
    "conv 2-D, strided": conv((1, 5, 6, 2), (3, 3, 2, 3), strides=(2, 3)),
    "conv 2-D, padded": conv((1, 5, 6, 2), (3, 2, 2, 3), padding=((2, 0), (1, 3))),
    "conv 2-D, dilated": conv(
        (1, 7, 6, 2), (3, 2, 2, 3), padding=((1, 1), (0, 2)), lhs=(1, 2), rhs=(2, 3)
    ),
    "conv 2-D, grouped": conv((2, 5, 4, 6), (3, 3, 2, 9), strides=(2, 1), groups=3),
    "conv 2-D, depthwise": conv((2, 5, 4, 3), (3, 3, 1, 6), groups=3),
    "conv 3-D": conv((1, 3, 4, 5, 2), (2, 3, 1, 2, 3), strides=(1, 2, 2)),
    "conv transpose 1-D": conv_transpose((2, 5, 3), (3, 3, 4), strides=(2,)),
    "conv transpose 2-D": conv_transpose(
        (1, 4, 3, 2), (3, 2, 2, 5), strides=(2, 3), padding="VALID", rhs=(1, 2)
    ),
    "conv transpose 2-D, transposed kernel": conv_transpose(
        (1, 4, 3, 2), (3, 2, 5, 2), strides=(2, 1), transpose_kernel=True
    ),
}
ONE_OF_EACH = (
    "dense",
    "einsum with a shared axis",
    "conv 2-D, grouped",
    "conv transpose 2-D, transposed kernel",
)
every_case = pytest.mark.parametrize("name", CASES)
one_of_each = pytest.mark.parametrize("name", ONE_OF_EACH)


def draw(case, dtypes=(F32, F32, F32), seed=0):
    """x, kernel and feedback for a case; by NumPy, which compiles nothing for a new shape."""
    rng = np.random.default_rng(seed)
    shapes = (case.x, case.kernel, case.kernel)
    return tuple(
        jnp.asarray(rng.standard_normal(shape).astype(dtype))
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )


def y_bar_of(y):
    return jnp.asarray(np.cos(np.arange(y.size)).reshape(y.shape), y.dtype)


@functools.partial(jax.jit, static_argnums=0)
def pull_back(f, *args):
    """f's value and the cotangents of its arguments."""
    y, vjp = jax.vjp(f, *args)
    return y, *vjp(y_bar_of(y))


def promoted(op):
    """op as plain JAX code would compute it on arguments of two dtypes."""

    def f(x, kernel):
        dtype = jnp.promote_types(x.dtype, kernel.dtype)
        return op(x.astype(dtype), kernel.astype(dtype))

    return f


def loss(x, kernel, feedback):
    return jnp.sum(jnp.tanh(ops.feedback_dense(x, kernel, feedback)) ** 2)


def mlp(kernels, feedbacks, x):
    for kernel, feedback in zip(kernels[:-1], feedbacks[:-1], strict=True):
        x = jnp.tanh(ops.feedback_dense(x, kernel, feedback))
    return ops.feedback_dense(x, kernels[-1], feedbacks[-1])


def draw_mlp(*widths, seed=0):
    rng = np.random.default_rng(seed)
    shapes = itertools.pairwise(widths)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


# Identities


def assert_close(actual, expected, **tolerances):
    """Also of the same structure, shapes and dtypes."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, **tolerances)


@every_case
def test_equal_feedback_gives_backprop(name):
    case = CASES[name]
    x, kernel, _ = draw(case)
    y, x_bar, kernel_bar, _ = pull_back(case.f, x, kernel, kernel)
    assert_close((y, x_bar, kernel_bar), pull_back(case.op, x, kernel), **ULPS)


@every_case
def test_input_cotangent_is_the_ops_own_at_feedback(name):
    case = CASES[name]
    x, kernel, feedback = draw(case)
    _, x_bar, _, _ = pull_back(case.f, x, kernel, feedback)
    _, expected, _ = pull_back(case.op, x, feedback)
    chex.assert_trees_all_close(x_bar, expected, **ULPS)


@every_case
def test_kernel_cotangent_is_bit_identical_for_any_feedback(name):
    case = CASES[name]
    x, kernel, feedback = draw(case)
    bars = [
        pull_back(case.f, x, kernel, b)[2] for b in (feedback, -7 * np.asarray(feedback), kernel)
    ]
    chex.assert_trees_all_equal(*bars)
    assert np.any(np.asarray(bars[0]))


@one_of_each
def test_no_feedback_gives_backprop(name):
    case = CASES[name]
    x, kernel, _ = draw(case)
    actual = pull_back(lambda x, kernel: case.f(x, kernel, None), x, kernel)
    chex.assert_trees_all_close(actual, pull_back(case.op, x, kernel), **ULPS)


@pytest.mark.parametrize(
    "name, x_dtype, kernel_dtype",
    [
        *((name, BF16, BF16) for name in ONE_OF_EACH),
        ("dense", BF16, F32),
        ("dense", F16, BF16),
        ("conv 2-D, grouped", F32, BF16),
    ],
)
def test_equal_feedback_gives_backprop_in_low_precision(name, x_dtype, kernel_dtype):
    case = CASES[name]
    x, kernel, _ = draw(case, (x_dtype, kernel_dtype, F32))
    y, x_bar, kernel_bar, _ = pull_back(case.f, x, kernel, kernel)
    # One rounding of bfloat16 or float16 apart: the compiler may keep float32 longer in one.
    expected = pull_back(promoted(case.op), x, kernel)
    assert_close((y, x_bar, kernel_bar), expected, rtol=2**-7, atol=2**-6)


@one_of_each
def test_equal_feedback_gives_backprop_in_double_precision(name):
    case = CASES[name]
    with jax.enable_x64(True):
        x, kernel, _ = draw(case, (jnp.float64,) * 3)
        y, x_bar, kernel_bar, _ = pull_back(case.f, x, kernel, kernel)
        assert x_bar.dtype == kernel_bar.dtype == jnp.float64
        chex.assert_trees_all_close(
            (y, x_bar, kernel_bar), pull_back(case.op, x, kernel), rtol=1e-13, atol=1e-13
        )


@one_of_each
def test_cotangents_have_their_primals_dtypes(name):
    case = CASES[name]
    for x in (F32, BF16, F16):
        for kernel in (F32, BF16, F16):
            for feedback in (F32, BF16, F16):
                args = draw(case, (x, kernel, feedback))
                y, *bars = jax.eval_shape(functools.partial(pull_back, case.f), *args)
                assert y.dtype == jnp.promote_types(x, kernel)
                assert [bar.dtype for bar in bars] == [x, kernel, feedback]


def test_feedback_is_cast_to_the_promoted_dtype_of_the_kernel():
    x, kernel, feedback = draw(CASES["dense"], (BF16, F32, BF16))
    _, x_bar, _, _ = pull_back(ops.feedback_dense, x, kernel, feedback)
    _, expected, _, _ = pull_back(ops.feedback_dense, x, kernel, feedback.astype(F32))
    chex.assert_trees_all_equal(x_bar, expected)


@pytest.mark.parametrize("preferred", [F32, BF16])
def test_preferred_element_type_is_kept_and_equal_feedback_gives_backprop(preferred):
    f = functools.partial(ops.feedback_dense, preferred_element_type=preferred)
    op = functools.partial(jnp.dot, preferred_element_type=preferred)
    x, kernel, _ = draw(CASES["dense"], (BF16, BF16, BF16))
    y, x_bar, kernel_bar, _ = pull_back(f, x, kernel, kernel)
    assert y.dtype == preferred
    assert x_bar.dtype == kernel_bar.dtype == BF16
    # One rounding of bfloat16 apart, as above.
    chex.assert_trees_all_close(
        (y, x_bar, kernel_bar), pull_back(op, x, kernel), rtol=2**-7, atol=2**-6
    )


@one_of_each
def test_precision_reaches_every_product(name):
    case = CASES[name]
    f = case.f
    if name.startswith("einsum"):
        f = functools.partial(ops.feedback_einsum, "ebi,eio->beo", precision="highest")
    else:
        f = functools.partial(f, precision="highest")
    text = pull_back.lower(f, *draw(case)).as_text()
    products = len(re.findall(r"stablehlo\.(?:dot_general|convolution)\(?[^\n]*", text))
    assert products == 3
    assert len(re.findall(r"HIGHEST[^\n]*HIGHEST", text)) == products


# Transformations


@one_of_each
def test_vmap_equals_a_python_loop(name):
    case = CASES[name]
    members = [draw(case, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *members)
    together = jax.vmap(functools.partial(pull_back, case.f))(*stacked)
    alone = [pull_back(case.f, *member) for member in members]
    chex.assert_trees_all_close(
        together, jax.tree.map(lambda *leaves: np.stack(leaves), *alone), **ULPS
    )


@pytest.mark.parametrize("in_axes", [(None, 0, 0), (0, None, 0), (0, 0, None), (None, None, 0)])
def test_vmap_over_some_arguments_equals_a_python_loop(in_axes):
    members = [draw(CASES["dense"], seed=seed) for seed in range(3)]
    args = [
        np.stack([member[i] for member in members]) if axis == 0 else members[0][i]
        for i, axis in enumerate(in_axes)
    ]
    together = jax.vmap(functools.partial(pull_back, ops.feedback_dense), in_axes)(*args)
    for i in range(3):
        one = [arg[i] if axis == 0 else arg for arg, axis in zip(args, in_axes, strict=True)]
        alone = pull_back(ops.feedback_dense, *one)
        member = [np.asarray(leaf)[i] for leaf in together]
        chex.assert_trees_all_close(member, list(alone), **ULPS)


def recurrent(x, kernel, feedback):
    """Six steps of a tanh network; x is its first state."""

    def body(h, _):
        return jnp.tanh(ops.feedback_dense(h, kernel, feedback)), None

    return lax.scan(body, x, length=6)[0]


def unrolled(x, kernel, feedback):
    for _ in range(6):
        x = jnp.tanh(ops.feedback_dense(x, kernel, feedback))
    return x


SQUARE = Case(recurrent, None, (5, 3), (3, 3))


def test_scan_equals_the_unrolled_loop():
    args = draw(SQUARE)
    chex.assert_trees_all_close(pull_back(recurrent, *args), pull_back(unrolled, *args), **ULPS)


def test_equal_feedback_gives_backprop_through_time():
    x, kernel, _ = draw(SQUARE)

    def plain(x, kernel):
        return lax.scan(lambda h, _: (jnp.tanh(h @ kernel), None), x, length=6)[0]

    y, x_bar, kernel_bar, _ = pull_back(recurrent, x, kernel, kernel)
    chex.assert_trees_all_close((y, x_bar, kernel_bar), pull_back(plain, x, kernel), **ULPS)


def test_remat_changes_nothing():
    args = draw(SQUARE)
    chex.assert_trees_all_close(
        pull_back(jax.checkpoint(recurrent), *args), pull_back(recurrent, *args), **ULPS
    )


def test_a_rematerialised_scan_over_layers_equals_the_chain():
    x, _, _ = draw(SQUARE)
    kernels, feedbacks = np.random.default_rng(1).standard_normal((2, 4, 3, 3), np.float32)

    def stack(x, kernels, feedbacks):
        @jax.checkpoint
        def body(x, pair):
            return jnp.tanh(ops.feedback_dense(x, *pair)), None

        return lax.scan(body, x, (kernels, feedbacks))[0]

    def chain(x, kernels, feedbacks):
        for i in range(4):
            x = jnp.tanh(ops.feedback_dense(x, kernels[i], feedbacks[i]))
        return x

    args = (x, kernels, feedbacks)
    chex.assert_trees_all_close(pull_back(stack, *args), pull_back(chain, *args), **ULPS)


def test_new_feedback_does_not_retrace():
    traces = []

    @jax.jit
    def gradient(x, kernel, feedback):
        traces.append(1)
        return jax.grad(loss)(x, kernel, feedback)

    x, kernel, feedback = draw(CASES["dense"])
    first, second = gradient(x, kernel, feedback), gradient(x, kernel, 2 * feedback)
    assert len(traces) == 1
    chex.assert_trees_all_close(second, 2 * first, rtol=1e-5)


def squared_norm_of_gradient(dense, x):
    """A function of two kernels whose gradient needs second derivatives of a small network."""

    def half_square(w1, w2, b2):
        return jnp.sum(dense(jnp.tanh(x @ w1), w2, b2) ** 2) / 2

    def squared_norm(w1, w2, b2):
        return sum(jnp.sum(g**2) for g in jax.grad(half_square, (0, 1))(w1, w2, b2))

    return squared_norm


def test_second_derivatives_of_one_layer_equal_backprops_for_any_feedback():
    x, kernel, feedback = draw(CASES["dense"])

    def squared_norm(kernel, feedback):
        return jnp.sum(jax.grad(loss, 1)(x, kernel, feedback) ** 2)

    actual, expected = (jax.jit(jax.grad(squared_norm))(kernel, b) for b in (feedback, None))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_equal_feedback_gives_backprops_second_derivatives():
    w1, w2 = draw_mlp(3, 4, 2)
    x, _, _ = draw(CASES["dense"])
    fa = squared_norm_of_gradient(ops.feedback_dense, x)
    bp = squared_norm_of_gradient(lambda x, kernel, _: jnp.dot(x, kernel), x)
    actual = jax.jit(jax.grad(lambda w1: fa(w1, w2, w2)))(w1)
    expected = jax.jit(jax.grad(lambda w1: bp(w1, w2, w2)))(w1)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-3)


def test_second_derivatives_are_those_of_the_pseudo_gradient():
    """grad of grad differentiates the backward pass as it is written, at fixed feedback."""
    (w1, w2), (_, b2) = draw_mlp(3, 4, 2), draw_mlp(3, 4, 2, seed=1)
    x, _, _ = draw(CASES["dense"])

    def squared_norm_by_hand(w1, w2):
        h = jnp.tanh(x @ w1)
        y_bar = h @ w2
        return jnp.sum((h.T @ y_bar) ** 2) + jnp.sum((x.T @ ((1 - h**2) * (y_bar @ b2.T))) ** 2)

    squared_norm = squared_norm_of_gradient(ops.feedback_dense, x)
    chex.assert_trees_all_close(squared_norm(w1, w2, b2), squared_norm_by_hand(w1, w2), rtol=1e-5)
    actual = jax.jit(jax.grad(squared_norm, (0, 1)))(w1, w2, b2)
    expected = jax.jit(jax.grad(squared_norm_by_hand, (0, 1)))(w1, w2)
    # Sums of many products of both signs, near 100 each, in float32.
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-3)


def test_forward_mode_raises():
    x, kernel, feedback = draw(CASES["dense"])
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: ops.feedback_dense(x, kernel, feedback), (x,), (x,))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@one_of_each
def test_lowers_for_every_platform(name, platform):
    case = CASES[name]
    text = pull_back.trace(case.f, *draw(case)).lower(lowering_platforms=(platform,)).as_text()
    assert len(re.findall(r"stablehlo\.(?:dot_general|convolution)", text)) == 3


# Matrix products and memory


def products(fun, *args):
    """Matrix products as written, and as compiled; the text as written."""
    lowered = jax.jit(fun).lower(*args)
    written, compiled = lowered.as_text(), lowered.compile().as_text()
    return written.count("stablehlo.dot_general"), len(re.findall(r" dot\(", compiled)), written


def mlp_loss(kernels, feedbacks, x):
    return jnp.sum(mlp(kernels, feedbacks, x) ** 2)


def test_feedback_alignment_takes_the_matrix_products_of_backprop():
    kernels, feedbacks = draw_mlp(11, 13, 17, 19), draw_mlp(11, 13, 17, 19, seed=1)
    x = jnp.ones((7, 11))
    fa = products(jax.grad(mlp_loss), kernels, feedbacks, x)[:2]
    bp = products(jax.grad(lambda ks, x: mlp_loss(ks, [None] * 3, x)), kernels, x)[:2]
    assert fa == bp == (8, 8)  # three forward, three for kernels, two for hidden inputs


def test_per_example_under_vmap_is_the_batched_computation():
    kernels, feedbacks = draw_mlp(11, 13, 17, 19), draw_mlp(11, 13, 17, 19, seed=1)
    x = np.random.default_rng(2).standard_normal((7, 11), np.float32)

    def per_example(kernels, feedbacks, x):
        return jnp.sum(jax.vmap(mlp_loss, (None, None, 0))(kernels, feedbacks, x))

    args = (kernels, feedbacks, x)
    chex.assert_trees_all_close(
        jax.jit(jax.grad(per_example))(*args), jax.jit(jax.grad(mlp_loss))(*args), rtol=1e-5
    )
    written, compiled, text = products(jax.grad(per_example), *args)
    assert (written, compiled) == products(jax.grad(mlp_loss), *args)[:2]
    for fan_in, fan_out in ((11, 13), (13, 17), (17, 19)):
        outer = {f"tensor<7x{fan_in}x{fan_out}xf32>", f"tensor<7x{fan_out}x{fan_in}xf32>"}
        assert not any(shape in text for shape in outer)


class SmallOutputs(ops.LocalLoss):
    """Half the square of what feedback makes of the input, as far as the kernel makes some."""

    def loss(self, op, x, kernel, feedback):
        return jnp.sum(op(x, feedback) ** 2 * (op(x, kernel) > 0)) / 2


def residuals(f, *args):
    _, vjp = jax.vjp(f, *args)
    return [leaf for leaf in jax.tree.leaves(vjp) if jnp.ndim(leaf)]


@one_of_each
def test_the_backward_pass_keeps_input_and_feedback_only(name):
    case = CASES[name]
    x, kernel, feedback = draw(case)
    kept = residuals(case.f, x, kernel, feedback)
    assert sum(leaf.size for leaf in kept) == x.size + feedback.size
    assert not any(np.array_equal(leaf, kernel) for leaf in kept)


def test_a_frozen_kernel_keeps_feedback_only():
    x, kernel, feedback = draw(CASES["dense"])
    kept = residuals(lambda x: ops.feedback_dense(x, kernel, feedback), x)
    assert len(kept) == 1
    chex.assert_trees_all_equal(kept[0], feedback)


def test_the_backward_pass_of_kolen_pollack_keeps_input_and_feedback_only():
    x, kernel, feedback = draw(CASES["dense"])
    f = functools.partial(ops.feedback_dense, feedback_bar="kernel")
    kept = residuals(f, x, kernel, feedback)
    assert not any(np.array_equal(leaf, kernel) for leaf in kept)
    assert sum(leaf.size for leaf in kept) == x.size + feedback.size


def test_the_backward_pass_of_a_local_loss_keeps_input_feedback_and_kernel_only():
    x, kernel, feedback = draw(CASES["dense"])
    f = functools.partial(ops.feedback_dense, feedback_bar=SmallOutputs())
    assert sum(leaf.size for leaf in residuals(f, x, kernel, feedback)) == x.size + 2 * kernel.size


# Feedback's own cotangent


@one_of_each
def test_feedback_has_no_cotangent_by_default(name):
    case = CASES[name]
    x, kernel, feedback = draw(case)
    feedback_bar = pull_back(case.f, x, kernel, feedback)[3]
    chex.assert_trees_all_equal(feedback_bar, jnp.zeros_like(feedback))


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, BF16)])
@one_of_each
def test_feedbacks_cotangent_on_request_is_the_kernels(name, dtypes):
    case = CASES[name]
    if name.startswith("einsum"):
        f = functools.partial(ops.feedback_einsum, "ebi,eio->beo", feedback_bar="kernel")
    else:
        f = functools.partial(case.f, feedback_bar="kernel")
    x, kernel, feedback = draw(case, dtypes)
    _, _, kernel_bar, feedback_bar = pull_back(f, x, kernel, feedback)
    assert feedback_bar.dtype == feedback.dtype
    chex.assert_trees_all_close(feedback_bar, kernel_bar.astype(feedback.dtype), **ULPS)


def test_feedbacks_cotangent_is_a_given_functions_value():
    def feedback_bar(op, x, kernel, feedback, y_bar):
        return x.sum() * kernel + op(x, kernel).sum() * feedback + y_bar.sum()

    x, kernel, feedback = draw(CASES["dense"])
    f = functools.partial(ops.feedback_dense, feedback_bar=feedback_bar)
    y, x_bar, kernel_bar, actual = pull_back(f, x, kernel, feedback)
    chex.assert_trees_all_close(
        actual, feedback_bar(jnp.dot, x, kernel, feedback, y_bar_of(y)), rtol=1e-5, atol=1e-5
    )
    expected = pull_back(ops.feedback_dense, x, kernel, feedback)[:3]
    chex.assert_trees_all_close((y, x_bar, kernel_bar), expected, **ULPS)


def test_a_given_functions_value_gets_feedbacks_dtype():
    f = functools.partial(
        ops.feedback_dense, feedback_bar=lambda op, x, kernel, feedback, y_bar: 3.0 * kernel
    )
    x, kernel, feedback = draw(CASES["dense"], (F32, F32, BF16))
    feedback_bar = pull_back(f, x, kernel, feedback)[3]
    chex.assert_trees_all_equal(feedback_bar, (3 * kernel).astype(BF16), strict=True)


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F32, F32, BF16)])
@one_of_each
def test_feedbacks_cotangent_is_a_local_losss_gradient_of_the_layers_own_op(name, dtypes):
    case = CASES[name]
    if name.startswith("einsum"):
        f = functools.partial(ops.feedback_einsum, "ebi,eio->beo", feedback_bar=SmallOutputs())
    else:
        f = functools.partial(case.f, feedback_bar=SmallOutputs())
    x, kernel, feedback = draw(case, dtypes)
    y, x_bar, kernel_bar, feedback_bar = pull_back(f, x, kernel, feedback)

    @jax.jit
    def expected(x, kernel, feedback):
        y, transpose = jax.vjp(functools.partial(case.op, x), feedback.astype(kernel.dtype))
        return transpose(y * (case.op(x, kernel) > 0))[0].astype(feedback.dtype)

    assert_close(feedback_bar, expected(x, kernel, feedback), rtol=1e-5, atol=1e-5)
    plain = pull_back(case.f, x, kernel, feedback)[:3]
    chex.assert_trees_all_equal((y, x_bar, kernel_bar), plain)


def test_a_local_loss_is_given_integer_input_in_the_kernels_dtype():
    """So that it may transpose the op, which JAX does for floating point alone."""

    class SentBack(ops.LocalLoss):
        def loss(self, op, x, kernel, feedback):
            assert x.dtype == kernel.dtype == feedback.dtype == F32
            (back,) = jax.linear_transpose(lambda x: op(x, feedback), x)(op(x, kernel))
            return jnp.sum(back)

    _, kernel, feedback = draw(CASES["dense"])
    x = jnp.arange(15).reshape(5, 3)

    @jax.jit
    @jax.grad
    def bar(feedback):
        y = ops.through_feedback(jnp.dot, x, kernel, feedback, feedback_bar=SentBack())
        return jnp.sum(y)

    expected = np.broadcast_to((x @ kernel).sum(0), (3, 4))
    np.testing.assert_allclose(bar(feedback.astype(BF16)).astype(F32), expected, rtol=2**-8)


@pytest.mark.parametrize("feedback_bar", [None, "kernel", SmallOutputs()])
def test_integer_feedback_sends_errors_back_and_has_no_cotangent(feedback_bar):
    x, kernel, feedback = draw(CASES["dense"])
    signs = jnp.sign(feedback).astype(jnp.int8)
    f = functools.partial(ops.feedback_dense, feedback_bar=feedback_bar)
    y, vjp = jax.vjp(f, x, kernel, signs)
    x_bar, kernel_bar, signs_bar = vjp(y_bar_of(y))
    assert signs_bar.dtype == jax.dtypes.float0
    expected = pull_back(ops.feedback_dense, x, kernel, signs.astype(F32))
    chex.assert_trees_all_close((x_bar, kernel_bar), expected[1:3], **ULPS)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_integer_input_is_promoted_and_teaches_the_kernel(dtype):
    _, kernel, feedback = draw(CASES["dense"])
    x = (jnp.arange(15).reshape(5, 3) % 7).astype(dtype)
    f = functools.partial(ops.feedback_dense, feedback_bar="kernel")
    y, vjp = jax.vjp(functools.partial(f, x), kernel, feedback)
    expected = pull_back(jnp.dot, x.astype(F32), kernel)
    chex.assert_trees_all_close((y, *vjp(y_bar_of(y))), (*expected[::2], expected[2]), **ULPS)


def test_through_feedback_teaches_feedback_at_integer_input():
    _, kernel, feedback = draw(CASES["dense"])
    x = jnp.arange(15).reshape(5, 3)

    def f(kernel, feedback):
        return ops.through_feedback(jnp.dot, x, kernel, feedback, feedback_bar="kernel")

    _, kernel_bar, feedback_bar = pull_back(f, kernel, feedback)
    chex.assert_trees_all_close(feedback_bar, kernel_bar, **ULPS)


def test_through_feedback_leaves_the_cotangent_of_y_alone():
    x, kernel, feedback = draw(CASES["dense"])

    def f(x, bias):
        def forward(x):
            return jnp.dot(x, kernel) + bias

        return ops.through_feedback(jnp.dot, x, kernel, feedback, forward=forward)

    y, x_bar, bias_bar = pull_back(f, x, jnp.ones((5, 4)))
    chex.assert_trees_all_equal(bias_bar, y_bar_of(y))
    chex.assert_trees_all_close(x_bar, y_bar_of(y) @ feedback.T, **ULPS)


# Independent references


def test_a_deep_network_follows_the_published_backward_pass():
    """Lillicrap et al. (2016): delta_l = (delta_{l+1} B^T) * phi', dW_l = h_l^T delta_{l+1}."""
    kernels, feedbacks = draw_mlp(3, 5, 4, 2), draw_mlp(3, 5, 4, 2, seed=1)
    x = np.random.default_rng(2).standard_normal((6, 3), np.float32)

    def half_square(kernels, x):
        return jnp.sum((mlp(kernels, feedbacks, x) - 1) ** 2) / 2

    kernel_bars, x_bar = jax.jit(jax.grad(half_square, (0, 1)))(kernels, x)

    w1, w2, w3 = (np.asarray(kernel, np.float64) for kernel in kernels)
    b1, b2, b3 = (np.asarray(feedback, np.float64) for feedback in feedbacks)
    h0 = x.astype(np.float64)
    h1 = np.tanh(h0 @ w1)
    h2 = np.tanh(h1 @ w2)
    delta3 = h2 @ w3 - 1
    delta2 = delta3 @ b3.T * (1 - h2**2)
    delta1 = delta2 @ b2.T * (1 - h1**2)
    expected = [h0.T @ delta1, h1.T @ delta2, h2.T @ delta3]
    # The reference is in double precision.
    chex.assert_trees_all_close(kernel_bars, expected, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(x_bar, delta1 @ b1.T, rtol=1e-4, atol=1e-4)


def test_convolution_follows_explicit_loops():
    """y[n, i] = sum_k x[n, s i + d k - p] W[k], all by indices."""
    stride, dilation, low = 2, 2, 1
    case = conv((2, 6, 3), (2, 3, 4), strides=(stride,), padding=((low, 0),), rhs=(dilation,))
    x, kernel, feedback = draw(case)
    y, x_bar, kernel_bar, _ = pull_back(case.f, x, kernel, feedback)
    y_bar = np.asarray(y_bar_of(y))

    x, kernel, feedback = map(np.asarray, (x, kernel, feedback))
    expected = [np.zeros(leaf.shape) for leaf in (y, x, kernel)]
    for i in range(y.shape[1]):
        for k in range(kernel.shape[0]):
            at = stride * i + dilation * k - low
            if 0 <= at < x.shape[1]:
                expected[0][:, i] += x[:, at] @ kernel[k]
                expected[1][:, at] += y_bar[:, i] @ feedback[k].T
                expected[2][k] += x[:, at].T @ y_bar[:, i]
    chex.assert_trees_all_close([y, x_bar, kernel_bar], expected, rtol=1e-5, atol=1e-5)


@st.composite
def dense_cases(draw):
    size = st.integers(1, 4)
    batch = draw(st.lists(size, max_size=3))
    fan_in, fan_out = draw(size), draw(size)
    return Case(ops.feedback_dense, jnp.dot, (*batch, fan_in), (fan_in, fan_out))


@st.composite
def einsum_cases(draw):
    """Shared, contracted, x's own and the kernel's own axes, in any order."""
    sizes = {axis: draw(st.integers(1, 4)) for axis in "abijxyuv"}
    shared, contracted, own_x, own_kernel = (
        draw(st.sampled_from(["", axes[0], axes])) for axes in ("ab", "ij", "xy", "uv")
    )
    x = "".join(draw(st.permutations(shared + contracted + own_x)))
    kernel = "".join(draw(st.permutations(shared + contracted + own_kernel)))
    y = "".join(draw(st.permutations(shared + own_x + own_kernel)))
    return einsum(
        f"{x},{kernel}->{y}",
        tuple(sizes[axis] for axis in x),
        tuple(sizes[axis] for axis in kernel),
    )


@st.composite
def conv_cases(draw):
    rank = draw(st.integers(1, 2))

    def per_axis(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    window, strides, lhs, rhs = per_axis(1, 3), per_axis(1, 3), per_axis(1, 2), per_axis(1, 2)
    pads = tuple(zip(per_axis(0, 2), per_axis(0, 2), strict=True))
    padding = draw(st.sampled_from([pads] if max(lhs) > 1 else [pads, "SAME", "VALID"]))
    groups, fan_in, fan_out = (draw(st.integers(1, 2)) for _ in range(3))
    return conv(
        (draw(st.integers(1, 3)), *per_axis(5, 7), groups * fan_in),
        (*window, fan_in, groups * fan_out),
        strides=strides,
        padding=padding,
        lhs=lhs,
        rhs=rhs,
        groups=groups,
    )


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.one_of(dense_cases(), einsum_cases(), conv_cases()))
def test_cotangents_are_the_ops_own_at_any_configuration(case):
    args = draw(case)

    @jax.jit
    def both(x, kernel, feedback):
        y, x_bar, kernel_bar, _ = pull_back(case.f, x, kernel, feedback)
        expected_y, _, expected_kernel_bar = pull_back(case.op, x, kernel)
        _, expected_x_bar, _ = pull_back(case.op, x, feedback)
        return (y, x_bar, kernel_bar), (expected_y, expected_x_bar, expected_kernel_bar)

    actual, expected = both(*args)
    assert_close(actual, expected, **ULPS)


# Several devices

SHARDINGS = {
    "data parallel": (P("data", None), P(None, None)),
    "tensor parallel, outputs split": (P(None, None), P(None, "data")),
    "tensor parallel, inputs split": (P(None, "data"), P("data", None)),
}


def sharded_dense(x, kernel, feedback, feedback_bar=None):
    # A contraction of two split axes has to name its output's sharding, in any JAX program.
    split = jax.typeof(kernel).sharding.spec[0] is not None
    op = functools.partial(jnp.dot, out_sharding=P(None, None) if split else None)
    return ops.feedback_op(op, feedback_bar=feedback_bar)(x, kernel, feedback)


@pytest.mark.parametrize("feedback_bar", [None, "kernel"])
@pytest.mark.parametrize("layout", SHARDINGS)
def test_explicit_sharding_changes_no_gradient(mesh, layout, feedback_bar):
    args = draw(Case(None, None, (8, 4), (4, 12)))
    x_spec, kernel_spec = SHARDINGS[layout]

    def gradient(x, kernel, feedback):
        def loss(x, kernel, feedback):
            return jnp.sum(jnp.tanh(sharded_dense(x, kernel, feedback, feedback_bar)) ** 2)

        return jax.grad(loss, (0, 1, 2))(x, kernel, feedback)

    alone = jax.jit(gradient)(*args)
    split = jax.device_put(args, (x_spec, kernel_spec, kernel_spec))
    together = jax.jit(gradient)(*split)
    assert jax.tree.map(jax.typeof, together) == jax.tree.map(jax.typeof, split)
    chex.assert_trees_all_close(
        jax.device_get(together), jax.device_get(alone), rtol=1e-5, atol=1e-5
    )


BATCHED = {
    "einsum": einsum("bti,iho->btho", (4, 5, 3), (3, 2, 7)),
    "conv": conv((4, 5, 6, 2), (3, 2, 2, 3), strides=(2, 1)),
    "conv, grouped": conv((4, 5, 4), (3, 2, 6), groups=2),
    "conv transpose": conv_transpose((4, 5, 3), (3, 3, 4), strides=(2,)),
}


@pytest.mark.parametrize("name", BATCHED)
def test_every_op_takes_an_explicitly_sharded_batch(mesh, name):
    case = BATCHED[name]
    args = draw(case)

    def gradient(*args):
        return jax.grad(lambda *args: jnp.sum(jnp.tanh(case.f(*args)) ** 2), (0, 1, 2))(*args)

    alone = jax.jit(gradient)(*args)
    split = jax.device_put(args, (P("data"), P(), P()))
    together = jax.jit(gradient)(*split)
    assert jax.tree.map(jax.typeof, together) == jax.tree.map(jax.typeof, split)
    chex.assert_trees_all_close(
        jax.device_get(together), jax.device_get(alone), rtol=1e-5, atol=1e-5
    )


def test_per_example_under_vmap_works_over_an_explicitly_sharded_batch(mesh):
    x, kernel, feedback = draw(Case(None, None, (8, 4), (4, 12)))

    def per_example(x, kernel, feedback):
        return jnp.sum(jax.vmap(loss, (0, None, None))(x, kernel, feedback))

    alone = jax.jit(jax.grad(loss, (0, 1)))(x, kernel, feedback)
    split = jax.device_put((x, kernel, feedback), (P("data"), P(), P()))
    together = jax.jit(jax.grad(per_example, (0, 1)))(*split)
    chex.assert_trees_all_close(
        jax.device_get(together), jax.device_get(alone), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("layout", ["data parallel", "tensor parallel, outputs split"])
def test_shard_map_changes_no_gradient(auto_mesh, layout):
    x_spec, kernel_spec = SHARDINGS[layout]
    specs = (x_spec, kernel_spec, kernel_spec)
    args = draw(Case(None, None, (8, 4), (4, 12)))

    def local_loss(x, kernel, feedback):
        y = ops.feedback_dense(x, kernel, feedback, feedback_bar="kernel")
        return lax.psum(jnp.sum(jnp.tanh(y) ** 2), "data")

    def alone(x, kernel, feedback):
        y = ops.feedback_dense(x, kernel, feedback, feedback_bar="kernel")
        return jnp.sum(jnp.tanh(y) ** 2)

    def shard(f, out_specs):
        return jax.shard_map(f, mesh=auto_mesh, in_specs=specs, out_specs=out_specs)

    expected = jax.jit(jax.grad(alone, (0, 1, 2)))(*args)
    outside = jax.jit(jax.grad(shard(local_loss, P()), (0, 1, 2)))(*args)
    inside = jax.jit(shard(jax.grad(local_loss, (0, 1, 2)), specs))(*args)
    chex.assert_trees_all_close(outside, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(inside, expected, rtol=1e-5, atol=1e-5)


# Errors


@pytest.mark.parametrize("shape", [(4, 3), (3, 1), (12,), (1, 3, 4)])
def test_feedback_of_another_shape_raises_when_traced(shape):
    x, kernel, _ = draw(CASES["dense"])
    message = rf"feedback has shape {re.escape(str(shape))}; expected \(3, 4\).*not transposed"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(ops.feedback_dense, x, kernel, jnp.ones(shape))


def test_an_integer_kernel_raises():
    x, _, feedback = draw(CASES["dense"])
    kernel = jnp.ones((3, 4), jnp.int32)
    for either in (feedback, None):
        with pytest.raises(ValueError, match=r"kernel has dtype int32; expected a floating-point"):
            ops.feedback_dense(x, kernel, either)


def test_a_local_loss_without_a_formula_raises():
    f = functools.partial(ops.feedback_dense, feedback_bar=ops.LocalLoss())
    with pytest.raises(NotImplementedError, match="LocalLoss must define `loss`"):
        pull_back(f, *draw(CASES["dense"]))


@pytest.mark.parametrize("feedback_bar", ["kernels", 1, True])
def test_an_unknown_feedback_bar_raises(feedback_bar):
    with pytest.raises(ValueError, match=rf"feedback_bar is {feedback_bar!r}; expected None, 'ker"):
        ops.feedback_dense(*draw(CASES["dense"]), feedback_bar=feedback_bar)


def test_a_feedback_bar_of_another_shape_raises():
    f = functools.partial(
        ops.feedback_dense, feedback_bar=lambda op, x, kernel, feedback, y_bar: kernel.T
    )
    with pytest.raises(
        ValueError, match=r"feedback_bar returned shape \(4, 3\); expected .* \(3, 4\)"
    ):
        pull_back(f, *draw(CASES["dense"]))


# Finite differences


@one_of_each
def test_finite_differences_confirm_the_kernels_cotangent_and_refute_the_inputs(name):
    case = CASES[name]
    x, kernel, feedback = draw(case)
    # float32 differences at JAX's default step are good to two digits.
    check = functools.partial(check_grads, order=1, modes=["rev"], atol=1e-2, rtol=1e-2)
    check(jax.jit(lambda kernel: case.f(x, kernel, feedback)), (kernel,))
    check(jax.jit(lambda x: case.f(x, kernel, kernel)), (x,))
    with pytest.raises(AssertionError, match="VJP"):
        check(jax.jit(lambda x: case.f(x, kernel, feedback)), (x,))


def test_a_local_loss_that_is_a_class_raises():
    x, w = jnp.ones((2, 3)), jnp.ones((3, 4))
    with pytest.raises(ValueError, match="expected None, 'kernel', a local loss such as"):
        ops.feedback_dense(x, w, w, feedback_bar=local.SymmetricAlignment)


@pytest.mark.parametrize("bar", [None, (1, 2)])
def test_a_feedback_bar_function_that_returns_no_array_raises(bar):
    f = functools.partial(ops.feedback_dense, feedback_bar=lambda *args: bar)
    with pytest.raises(ValueError, match=r"feedback_bar returned .*; expected an array of shape"):
        jax.grad(lambda b: f(jnp.ones((2, 3)), jnp.ones((3, 4)), b).sum())(jnp.ones((3, 4)))


@pytest.mark.parametrize("op", [ops.feedback_conv, ops.feedback_conv_transpose])
@pytest.mark.parametrize(("x", "kernel"), [((2, 8, 3), (3, 3, 3, 5)), ((2, 3), (3,))])
def test_a_convolution_of_other_axes_than_its_kernels_raises(op, x, kernel):
    with pytest.raises(ValueError, match=r"x has shape .* and the kernel .*; expected \(batch, "):
        op(jnp.ones(x), jnp.ones(kernel), jnp.ones(kernel))


def test_strides_may_be_numpys_integers():
    x, kernel = jnp.ones((2, 8, 3)), jnp.ones((3, 3, 5))
    assert ops.feedback_conv(x, kernel, kernel, strides=np.int64(2)).shape == (2, 4, 5)


def test_feedback_that_is_no_array_of_numbers_raises():
    keys = jax.random.split(jax.random.key(0), 6).reshape(3, 2)
    with pytest.raises(
        ValueError, match=r"feedback .*key<fry>.*; expected|feedback is a .*; expec"
    ):
        ops.feedback_dense(jnp.ones((4, 3)), jnp.ones((3, 2)), keys)
