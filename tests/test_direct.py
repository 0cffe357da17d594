"""Direct feedback: against NumPy by hand, against feedback alignment, and what it costs."""

import functools
import itertools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from soap_jax import direct, ops, with_direct_feedback, with_feedback
from soap_jax.direct import (
    direct_feedback,
    direct_target,
    draw_projection,
    draw_projections,
    scan_blocks,
)

KEY = jax.random.key(0)
ULPS = {"rtol": 2e-6, "atol": 2e-6}  # the same products, perhaps fused or summed otherwise
WIDTHS = (6, 7, 5, 3)


def normal(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


X, TARGETS = normal(0, 4, 6), jnp.asarray(np.eye(3, dtype=np.float32)[[0, 2, 1, 2]])
PROJECTIONS = [normal(10 + i, 3, width) for i, width in enumerate(WIDTHS[1:-1])]


def draw_params(widths=WIDTHS):
    return [
        {"kernel": normal(i, *shape), "bias": normal(20 + i, shape[1])}
        for i, shape in enumerate(itertools.pairwise(widths))
    ]


PARAMS = draw_params()


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"][None]


def dfa(params, x, projections, **kwargs):
    hidden = []
    for layer in params[:-1]:
        h = jnp.tanh(dense(layer, x))
        hidden.append(h)
        x = ops.detach(h)
    return direct_feedback(dense(params[-1], x), hidden, projections, **kwargs)


def drtp(params, x, targets, projections):
    for layer, projection in zip(params[:-1], projections, strict=True):
        x = direct_target(jnp.tanh(dense(layer, x)), targets, projection)
    return dense(params[-1], x)


def bp(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(dense(layer, x))
    return dense(params[-1], x)


def loss_of(output):
    """Mean cross-entropy over a batch of three logits."""
    return -jnp.mean(jnp.sum(TARGETS * jax.nn.log_softmax(output), -1))


def by_hand(params, x, send):
    """Gradients in double precision; `send(layer, e, batch)` is the cotangent of a hidden layer."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    activations = [np.asarray(x, np.float64)]
    for layer in params[:-1]:
        activations.append(np.tanh(activations[-1] @ layer["kernel"] + layer["bias"]))
    logits = activations[-1] @ params[-1]["kernel"] + params[-1]["bias"]
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    e = (probabilities - np.asarray(TARGETS)) / len(x)
    deltas = [send(i, e) * (1 - h**2) for i, h in enumerate(activations[1:])] + [e]
    return [
        {"kernel": h.T @ delta, "bias": delta.sum(0)}
        for h, delta in zip(activations, deltas, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0)
def pull_back(f, *args):
    """f's value and its arguments' cotangents."""
    y, vjp = jax.vjp(f, *args)
    return y, *vjp(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


def cotangent(shape):
    return np.cos(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)


# The methods, by hand


def test_dfa_is_the_published_backward_pass():
    """Nøkland (2016): delta_l = (e · P_l) * phi', dW_l = h_l^T · delta_l."""
    actual = jax.jit(jax.grad(lambda params: loss_of(dfa(params, X, PROJECTIONS))))(PARAMS)
    expected = by_hand(PARAMS, X, lambda i, e: e @ np.asarray(PROJECTIONS[i]))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_sdfa_sends_signs_over_the_number_of_rows():
    def loss(params):
        return loss_of(dfa(params, X, PROJECTIONS, error="sign"))

    actual = jax.jit(jax.grad(loss))(PARAMS)
    expected = by_hand(PARAMS, X, lambda i, e: np.sign(e) @ np.asarray(PROJECTIONS[i]) / 4)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_drtp_sends_targets_over_the_number_of_rows():
    """Frenkel et al. (2021): delta_l = (t · P_l) * phi', whatever the output."""

    def loss(params):
        return loss_of(drtp(params, X, TARGETS, PROJECTIONS))

    actual = jax.jit(jax.grad(loss))(PARAMS)
    expected = by_hand(PARAMS, X, lambda i, e: np.asarray(TARGETS) @ np.asarray(PROJECTIONS[i]) / 4)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_dfa_is_feedback_alignment_for_one_hidden_layer():
    params = draw_params((6, 7, 3))
    feedback = normal(5, 7, 3)

    def fa(params):
        h = jnp.tanh(dense(params[0], X))
        return ops.feedback_dense(h, params[1]["kernel"], feedback) + params[1]["bias"][None]

    actual = jax.jit(jax.grad(lambda params: loss_of(dfa(params, X, [feedback.T]))))(params)
    expected = jax.jit(jax.grad(lambda params: loss_of(fa(params))))(params)
    chex.assert_trees_all_close(actual, expected, **ULPS)


def test_kernels_themselves_as_projections_give_backprop_for_a_linear_network():
    kernels = [normal(i, *shape) for i, shape in enumerate(((6, 7), (7, 5), (5, 3)))]
    projections = [(kernels[1] @ kernels[2]).T, kernels[2].T]

    def by_dfa(kernels):
        h1 = X @ kernels[0]
        h2 = ops.detach(h1) @ kernels[1]
        return loss_of(direct_feedback(ops.detach(h2) @ kernels[2], (h1, h2), tuple(projections)))

    def by_bp(kernels):
        return loss_of(X @ kernels[0] @ kernels[1] @ kernels[2])

    actual, expected = jax.jit(jax.grad(by_dfa))(kernels), jax.jit(jax.grad(by_bp))(kernels)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_forward_pass_and_the_heads_gradients_are_those_of_backprop():
    def head(f):
        def loss(params):
            output = f(params)
            return loss_of(output), output

        grads, output = jax.jit(jax.grad(loss, has_aux=True))(PARAMS)
        return output, grads[-1]

    expected = head(lambda params: bp(params, X))
    for f in (
        lambda params: dfa(params, X, PROJECTIONS),
        lambda params: dfa(params, X, PROJECTIONS, error="sign"),
        lambda params: drtp(params, X, TARGETS, PROJECTIONS),
    ):
        chex.assert_trees_all_close(head(f), expected, **ULPS)


# Time and space

AXES = {  # output, activation, projection, and the error's way
    "each example its own": ((4, 3), (4, 7), (3, 7), "bo,of->bf"),
    "the same at every time": ((4, 3), (4, 5, 7), (3, 7), "bo,of->bf"),
    "another P at every time": ((4, 3), (4, 5, 7), (3, 5, 7), "bo,otf->btf"),
    "each time its own": ((4, 5, 3), (4, 5, 7), (3, 7), "bto,of->btf"),
    "summed over time": ((4, 5, 3), (4, 7), (3, 7), "bto,of->bf"),
    "summed over two axes": ((4, 5, 2, 3), (4, 7), (3, 7), "btuo,of->bf"),
    "convolution": ((4, 3), (4, 6, 5, 2), (3, 6, 5, 2), "bo,ohwc->bhwc"),
    "convolution, shared over space": ((4, 3), (4, 6, 5, 2), (3, 2), "bo,oc->bc"),
    "no leading axis": ((3,), (7,), (3, 7), "o,of->f"),
    "time without a batch": ((5, 3), (7,), (3, 7), "to,of->f"),
}


def expected_bar(sent, projection, shape, spec):
    bar = np.einsum(spec, sent, projection)
    while bar.ndim < len(shape):
        bar = np.expand_dims(bar, sent.ndim - 1)
    return np.broadcast_to(bar, shape)


@pytest.mark.parametrize("row", AXES)
def test_axes_are_aligned_as_in_the_table(row):
    output, activation, projection, spec = AXES[row]
    o, a, p = normal(0, *output), normal(1, *activation), normal(2, *projection)
    y, o_bar, a_bar, p_bar = pull_back(direct_feedback, o, a, p)
    chex.assert_trees_all_equal(y, o)
    chex.assert_trees_all_equal(p_bar, jnp.zeros_like(p))
    e = cotangent(output)
    np.testing.assert_allclose(o_bar, e, rtol=1e-6)
    np.testing.assert_allclose(a_bar, expected_bar(e, p, activation, spec), rtol=1e-5, atol=1e-5)

    rows = np.prod(output[:-1])
    y, a_bar, t_bar, p_bar = pull_back(direct_target, a, o, p)
    chex.assert_trees_all_equal((y, t_bar, p_bar), (a, 0 * o, 0 * p))
    expected = expected_bar(np.asarray(o) / rows, p, activation, spec)
    np.testing.assert_allclose(a_bar, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row", AXES)
def test_a_projection_learns_as_the_weights_of_that_connection_would(row):
    """P_bar · Q is what is sent through Q, times the activation, for any Q: P_bar = eᵀ · a."""
    output, activation, projection, spec = AXES[row]
    o, a, p = normal(0, *output), normal(1, *activation), normal(2, *projection)
    learned = functools.partial(direct_feedback, projection_bar="kernel")
    *others, p_bar = pull_back(learned, o, a, p)
    chex.assert_trees_all_equal(others, list(pull_back(direct_feedback, o, a, p)[:3]))
    e, units = cotangent(output), np.eye(p.size, dtype=np.float32).reshape(-1, *projection)
    expected = [np.sum(a * expected_bar(e, unit, activation, spec)) for unit in units]
    np.testing.assert_allclose(p_bar.ravel(), expected, rtol=1e-4, atol=1e-4)


def test_direct_kolen_pollack_by_hand_and_by_layers():
    """Webster et al. (2021): P gets eᵀ · a; the last one the transpose of the output kernel's."""
    from soap_jax import linen, nnx

    o, hidden = normal(0, 4, 3), [normal(1, 4, 7), normal(2, 4, 5)]
    e = cotangent((4, 3))
    expected = [e.T @ h for h in hidden]

    def of_linen(projections):
        layer = linen.DirectFeedback(projection_bar="kernel")
        variables = {"projection": {"projection": projections}}
        return layer.apply(variables, o, hidden)

    def of_nnx(projections):
        layer = nnx.DirectFeedback(3, [7, 5], projection_bar="kernel", rngs=flax_nnx.Rngs(0))
        layer.projection = nnx.Projection(projections)
        return layer(o, hidden)

    projections = [normal(3, 3, 7), normal(4, 3, 5)]
    for f in (of_linen, of_nnx):
        bars = pull_back(f, projections)[1]
        for bar, by_hand in zip(bars, expected, strict=True):
            np.testing.assert_allclose(bar, by_hand, rtol=1e-5, atol=1e-6)
    stack, p = normal(5, 2, 4, 7), normal(6, 2, 3, 7)
    f = functools.partial(direct_feedback, o, stack, stacked=True, projection_bar="kernel")
    np.testing.assert_allclose(
        pull_back(f, p)[1], np.einsum("bo,lbf->lof", e, stack), rtol=1e-5, atol=1e-5
    )
    signs = functools.partial(direct_feedback, o, hidden[0], error="sign", projection_bar="kernel")
    expected_signs = np.sign(e).T @ hidden[0] / 4
    np.testing.assert_allclose(pull_back(signs, projections[0])[1], expected_signs, rtol=1e-5)


def test_a_key_for_noise_and_a_projection_that_learns_go_together():
    o, a, p = normal(0, 4, 3), normal(1, 4, 7), normal(2, 3, 7)
    f = functools.partial(direct_feedback, o, a, key=KEY, projection_bar="kernel")
    np.testing.assert_allclose(
        jax.jit(pull_back, static_argnums=0)(f, p)[1], cotangent((4, 3)).T @ a, 1e-5, 1e-5
    )


def test_what_cannot_learn_as_a_projection_raises():
    o, a = jnp.ones((4, 3)), jnp.ones((4, 7))
    learned = functools.partial(direct_feedback, o, a, projection_bar="kernel")
    with pytest.raises(ValueError, match=r"the projection is of dtype key.*an optimiser updates"):
        learned(KEY)
    with pytest.raises(ValueError, match=r"the projection is a function; expected a floating"):
        learned(lambda error, shape, key: jnp.ones(shape))
    with pytest.raises(ValueError, match=r"the projection is of dtype int8"):
        learned(jnp.ones((3, 7), jnp.int8))
    with pytest.raises(ValueError, match=r"with a target; expected None"):
        learned(jnp.ones((3, 7)), target=o)
    with pytest.raises(
        ValueError, match=r"projection_bar is 'weights'; expected None, or 'kernel'"
    ):
        direct_feedback(o, a, jnp.ones((3, 7)), projection_bar="weights")
    with pytest.raises(ValueError, match=r"projection_bar is True"):
        with_direct_feedback(lambda p, x: x, "h", "y", projection_bar=True)


@pytest.mark.parametrize(
    "row, spec", [("the same at every time", "btf,of->bo"), ("summed over time", "bf,of->bo")]
)
def test_the_error_is_that_of_a_connection_to_the_output(row, spec):
    """The module's docstring: a_bar = the cotangent of a in `output + a · Pᵀ`."""
    output, activation, projection, _ = AXES[row]
    o, a, p = normal(0, *output), normal(1, *activation), normal(2, *projection)

    def connected(a):
        y = jnp.einsum(spec, a, p)
        return o + (y if y.ndim == o.ndim else y[:, None])

    actual, (_, expected) = pull_back(direct_feedback, o, a, p)[2], pull_back(connected, a)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_every_activation_of_a_tree_gets_its_own_error():
    o, hidden = normal(0, 4, 3), {"a": normal(1, 4, 7), "b": (normal(2, 4, 5), normal(3, 4, 2, 6))}
    projections = direct.draw_projections(KEY, o, hidden)
    together = pull_back(direct_feedback, o, hidden, projections)[2]

    def alone(a, p):
        return pull_back(direct_feedback, o, a, p)[2]

    chex.assert_trees_all_close(together, jax.tree.map(alone, hidden, projections), **ULPS)


def test_stacked_activations_are_a_loop_over_blocks():
    for output, activation, features in (
        ((4, 3), (2, 4, 7), (7,)),
        ((4, 3), (2, 4, 5, 7), (7,)),
        ((4, 3), (2, 4, 5, 7), (5, 7)),
        ((4, 5, 3), (2, 4, 7), (7,)),
    ):
        o, a, p = normal(0, *output), normal(1, *activation), normal(2, 2, 3, *features)
        stacked = functools.partial(direct_feedback, stacked=True)
        actual = pull_back(stacked, o, a, p)[2]
        expected = [pull_back(direct_feedback, o, a[i], p[i])[2] for i in range(2)]
        chex.assert_trees_all_close(actual, jnp.stack(expected), **ULPS)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))


@pytest.mark.parametrize(
    "block, shape", [(nn.Conv(5, (3, 3), strides=2), (4, 6, 5, 2)), (Attention(), (4, 5, 8))]
)
def test_any_block_gets_the_projected_error_and_passes_on_nothing(block, shape):
    x = normal(0, *shape)
    params = jax.jit(block.init)(KEY, x)
    a = jax.eval_shape(block.apply, params, x)
    kernel, projection = normal(1, a.size // 4, 3), normal(2, 3, *a.shape[1:])

    @jax.jit
    def actual(params, kernel):
        def loss(params, kernel):
            a = block.apply(params, x)
            return loss_of(direct_feedback(ops.detach(a).reshape(4, -1) @ kernel, a, projection))

        return jax.grad(loss, (0, 1))(params, kernel)

    @jax.jit
    def expected(params, kernel):
        a, pull = jax.vjp(lambda params: block.apply(params, x), params)
        e = jax.grad(loss_of)(a.reshape(4, -1) @ kernel)
        bar = jnp.tensordot(e, projection, 1)
        return *pull(bar), a.reshape(4, -1).T @ e

    chex.assert_trees_all_close(
        actual(params, kernel), expected(params, kernel), rtol=1e-5, atol=1e-6
    )


def test_an_activation_that_is_not_detached_gets_both_errors():
    """The trap that the docstring names: without `detach`, backprop's error is added."""
    h, kernel, projection = normal(0, 4, 7), normal(1, 7, 3), normal(2, 3, 7)

    def loss(stop, h):
        return loss_of(direct_feedback(stop(h) @ kernel, h, projection))

    both, ours, backprops = (
        jax.jit(jax.grad(f))(h)
        for f in (
            lambda h: loss(lambda h: h, h),
            lambda h: loss(ops.detach, h),
            lambda h: loss_of(h @ kernel),
        )
    )
    chex.assert_trees_all_close(both, ours + backprops, **ULPS)
    assert float(jnp.abs(backprops).max()) > 0.01


# Projections, keys and dtypes


def test_a_projection_is_one_matrix_from_the_output_to_all_features():
    matrix = jax.nn.initializers.glorot_normal()(KEY, (10, 24), jnp.float32)
    projection = draw_projection(KEY, 10, (2, 3, 4))
    chex.assert_trees_all_equal(projection, matrix.reshape(10, 2, 3, 4))
    chex.assert_trees_all_equal(draw_projection(KEY, 10, 24), matrix)
    ones = draw_projection(KEY, 2, 3, jnp.bfloat16, initializer=jax.nn.initializers.ones)
    chex.assert_trees_all_equal(ones, jnp.ones((2, 3), jnp.bfloat16), strict=True)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("output, activation", [((4, 3), (4, 7)), ((4, 5, 3), (4, 5, 2, 7))])
def test_a_key_stands_for_its_draw_to_the_bit(output, activation, dtype):
    o, a = normal(0, *output), normal(1, *activation, dtype=dtype)
    stored = draw_projection(KEY, 3, activation[len(output) - 1 :])
    for f in (direct_feedback, lambda o, a, p: direct_target(a, o, p)):
        drawn = pull_back(lambda o, a, f=f: f(o, a, KEY), o, a)
        chex.assert_trees_all_equal(drawn, pull_back(f, o, a, stored)[:3], strict=True)


def test_a_key_draws_by_the_given_initializer():
    he = jax.nn.initializers.he_uniform()
    o, a, stored = normal(0, 4, 3), normal(1, 4, 7), draw_projection(KEY, 3, 7, initializer=he)
    for f in (direct_feedback, lambda o, a, p, **kwargs: direct_target(a, o, p, **kwargs)):
        drawn = pull_back(lambda o, a, f=f: f(o, a, KEY, initializer=he), o, a)
        chex.assert_trees_all_equal(drawn, pull_back(f, o, a, stored)[:3])


@pytest.mark.parametrize("stacked", [False, True])
def test_keys_of_a_tree_stand_for_its_projections_to_the_bit(stacked):
    blocks = (2,) * stacked
    o, hidden = normal(0, 4, 3), {"a": normal(1, *blocks, 4, 7), "b": normal(2, *blocks, 4, 5, 2)}
    draw = functools.partial(direct.draw_projections, KEY, o, hidden, stacked=stacked)
    stored, keys = draw(), draw(stored=False)
    assert jax.tree.map(jnp.shape, stored) == {"a": (*blocks, 3, 7), "b": (*blocks, 3, 5, 2)}
    assert jax.tree.map(jnp.shape, keys) == {"a": blocks, "b": blocks}
    f = functools.partial(direct_feedback, stacked=stacked)
    by_keys = pull_back(lambda o, hidden: f(o, hidden, keys), o, hidden)
    chex.assert_trees_all_equal(by_keys, pull_back(f, o, hidden, stored)[:3])


def test_a_target_may_be_sent_in_place_of_the_error_also_to_a_stack():
    o, t, a, p = normal(0, 4, 3), normal(1, 4, 3), normal(2, 2, 4, 7), normal(3, 2, 3, 7)
    _, o_bar, a_bar = pull_back(lambda o, a: direct_feedback(o, a, p, target=t, stacked=True), o, a)
    np.testing.assert_allclose(o_bar, cotangent((4, 3)), rtol=1e-6)
    expected = [pull_back(direct_target, a[i], t, p[i])[1] for i in range(2)]
    chex.assert_trees_all_close(a_bar, jnp.stack(expected), **ULPS)
    with pytest.raises(ValueError, match="one of them"):
        direct_feedback(o, a[0], p[0], target=t, error="sign")


# Functions in place of projections


def project(p, error, shape, key):
    del key
    return (error @ p.reshape(len(p), -1)).reshape(shape)


@pytest.mark.parametrize("send", [{}, {"error": "sign"}, {"target": TARGETS}])
def test_a_function_gets_what_is_sent_and_returns_the_cotangent(send):
    o, a, p = normal(0, 4, 3), normal(1, 4, 2, 7), normal(2, 3, 2, 7)
    device = jax.tree_util.Partial(project, p)

    def f(o, a, projection):
        return direct_feedback(o, a, projection, **send)

    closed = pull_back(lambda o, a: f(o, a, lambda *args: project(p, *args)), o, a)
    for actual in (pull_back(lambda o, a: f(o, a, device), o, a), closed):
        chex.assert_trees_all_close(actual, pull_back(f, o, a, p)[:3], **ULPS)
    gradient = jax.jit(jax.grad(lambda o, a, p: f(o, a, p).sum(), (0, 1)))
    assert [bar.shape for bar in gradient(o, a, device)] == [o.shape, a.shape]


def test_a_stacks_function_is_called_once_for_all_blocks():
    shapes = []

    def device(error, shape, key):
        shapes.append((error.shape, shape, key))
        return jnp.zeros(shape)

    o, a = normal(0, 4, 3), normal(1, 2, 4, 7)
    a_bar = pull_back(lambda o, a: direct_feedback(o, a, device, stacked=True), o, a)[2]
    assert shapes == [((4, 3), (2, 4, 7), None)]
    chex.assert_trees_all_equal(a_bar, jnp.zeros_like(a))


def test_functions_get_keys_by_their_places_in_the_tree():
    def noise(error, shape, key):
        del error
        return jax.random.normal(key, shape)

    @jax.jit
    def bars(hidden, key):
        def loss(hidden):
            return direct_feedback(TARGETS, hidden, dict.fromkeys(hidden, noise), key=key).sum()

        return jax.grad(loss)(hidden)

    a = normal(0, 4, 5)
    both, one = bars({"a": a, "b": a}, KEY), bars({"b": a}, KEY)
    chex.assert_trees_all_equal(both["b"], one["b"])
    assert np.all(both["a"] != both["b"])
    assert np.all(one["b"] != bars({"b": a}, jax.random.key(1))["b"])
    target = jax.grad(lambda a: direct_target(a, TARGETS, noise, key=KEY).sum())(a)
    assert target.shape == a.shape


def test_a_functions_numbers_are_cast_and_others_refused():
    o, a = normal(0, 4, 3), normal(1, 4, 7, dtype=jnp.bfloat16)

    def returning(bar):
        return jax.grad(lambda a: direct_feedback(o, {"h": a}, {"h": lambda *_: bar}).sum())(a)

    for bar in (jnp.ones((4, 7)), jnp.ones((4, 7), jnp.int8), np.ones((4, 7))):
        chex.assert_trees_all_equal(returning(bar), jnp.ones_like(a), strict=True)
    for bar in (o, jnp.ones((4, 7), jnp.complex64), None, [1.0]):
        with pytest.raises(ValueError, match=r"at \['h'\], a function, returned .*\(4, 7\)"):
            returning(bar)


def test_functions_and_arrays_must_fit_the_tree_of_activations():
    with pytest.raises(ValueError, match=r"projections \('function', \(3, 7\)\); expected"):
        direct_feedback(normal(0, 4, 3), normal(1, 4, 7), (print, normal(2, 3, 7)))


def test_a_draw_depends_on_the_key_and_the_place_in_the_tree_alone():
    o, a = normal(0, 4, 3), normal(1, 4, 7)
    more, fewer = (direct.draw_projections(KEY, o, tree) for tree in ({"b": a, "a": a}, {"b": a}))
    chex.assert_trees_all_equal(more["b"], fewer["b"])
    stack = direct.draw_projections(KEY, o, normal(1, 2, 4, 7), stacked=True)
    for one, other in ((more["a"], more["b"]), (stack[0], stack[1])):
        assert not np.any(one == other)
    raw = direct.draw_projections(jax.random.PRNGKey(0), o, {"b": a})
    chex.assert_trees_all_equal(raw, fewer)


def test_integer_projections_are_cast():
    o, a, p = normal(0, 4, 3), normal(1, 4, 7), jnp.sign(normal(2, 3, 7)).astype(jnp.int8)
    actual = pull_back(lambda o, a: direct_feedback(o, a, p), o, a)
    expected = pull_back(lambda o, a: direct_feedback(o, a, p.astype(jnp.float32)), o, a)
    chex.assert_trees_all_equal(actual, expected)


def test_targets_keys_and_integers_have_no_gradient():
    o, a, p = normal(0, 4, 3), normal(1, 4, 7), normal(2, 3, 7)

    def loss(o, a, p):
        return jnp.sum(direct_feedback(o, a, p) ** 2)

    for projection in (KEY, jnp.ones((3, 7), jnp.int8)):
        bar = jax.grad(loss, 2, allow_int=True)(o, a, projection)
        assert bar.dtype == jax.dtypes.float0
    bars = jax.grad(lambda t, p: jnp.sum(direct_target(a, t, p) ** 2), (0, 1))(o, p)
    chex.assert_trees_all_equal(bars, (0 * o, 0 * p))


def test_cotangents_have_their_primals_dtypes():
    """Activations in bfloat16, outputs and projections in float32, or any other way round."""
    for output, activation, projection in (("f4", "bf16", "f4"), ("bf16", "f4", "bf16")):
        dtypes = [
            jnp.dtype("bfloat16" if d == "bf16" else d) for d in (output, activation, projection)
        ]
        args = [
            normal(i, *s, dtype=d)
            for i, (s, d) in enumerate(zip(((4, 3), (4, 7), (3, 7)), dtypes, strict=True))
        ]
        y, *bars = pull_back(direct_feedback, *args)
        assert [bar.dtype for bar in bars] == dtypes and y.dtype == dtypes[0]
        e = jnp.asarray(cotangent((4, 3)), dtypes[0])
        expected = (e.astype(dtypes[1]) @ args[2].astype(dtypes[1])).astype(jnp.float32)
        np.testing.assert_allclose(bars[1].astype(jnp.float32), expected, rtol=1e-2, atol=1e-2)


# Transformations


def grads_of(f, *args):
    return jax.grad(lambda params: loss_of(f(params, *args)))(PARAMS)


def test_new_params_projections_and_targets_do_not_retrace():
    traces = []

    @jax.jit
    def gradient(params, projections, targets):
        traces.append(1)
        return jax.grad(
            lambda params: loss_of(
                dfa(params, X, projections) + drtp(params, X, targets, [KEY] * 2)
            )
        )(params)

    for scale in (1.0, 2.0):
        gradient(*jax.tree.map(lambda leaf: scale * leaf, (PARAMS, PROJECTIONS, TARGETS)))  # noqa: B023
    assert len(traces) == 1


def test_per_example_under_vmap_is_the_batched_computation():
    def loss(params):
        outputs = jax.vmap(lambda x: dfa(params, x[None], PROJECTIONS)[0])(X)
        return loss_of(outputs)

    actual, expected = (
        jax.jit(jax.grad(loss))(PARAMS),
        jax.jit(grads_of, static_argnums=0)(dfa, X, PROJECTIONS),
    )
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keys", [False, True])
def test_vmap_over_networks_is_a_python_loop(keys):
    if keys:
        projections = jax.random.split(KEY, (2, 2))
    else:
        projections = [np.stack([p, -np.asarray(p)]) for p in PROJECTIONS]
    params = jax.tree.map(lambda leaf: np.stack([leaf, -np.asarray(leaf)]), PARAMS)

    def gradient(params, projections):
        return jax.grad(lambda params: loss_of(dfa(params, X, list(projections))))(params)

    together = jax.jit(jax.vmap(gradient))(params, projections)
    one = jax.jit(gradient)
    for i in range(2):
        alone = one(*jax.tree.map(lambda leaf: leaf[i], (params, projections)))  # noqa: B023
        member = jax.tree.map(lambda leaf: np.asarray(leaf)[i], together)  # noqa: B023
        chex.assert_trees_all_close(member, alone, rtol=1e-5, atol=1e-6)


def test_scan_over_time_is_the_unrolled_loop():
    """A recurrent cell, cut at every step, whose states hear the error of the last."""
    xs, params, projection = normal(0, 5, 4, 6), draw_params((13, 7, 3)), normal(1, 3, 7)

    def recurrent(params, loop):
        def cell(h, x):
            h = jnp.tanh(dense(params[0], jnp.concatenate([ops.detach(h), x], -1)))
            return h, h

        hs = loop(cell, jnp.zeros((4, 7)), xs)
        output = dense(params[1], ops.detach(hs[-1]))
        return loss_of(direct_feedback(output, jnp.moveaxis(hs, 0, 1), projection))

    def scanned(cell, h, xs):
        return lax.scan(cell, h, xs)[1]

    def unrolled(cell, h, xs):
        hs = [h := cell(h, x)[0] for x in xs]
        return jnp.stack(hs)

    actual, expected = (
        jax.jit(jax.grad(functools.partial(recurrent, loop=loop)))(params)
        for loop in (scanned, unrolled)
    )
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_remat_changes_nothing():
    f, g = (
        jax.jit(
            jax.grad(
                lambda params, wrap=wrap: wrap(
                    lambda params: loss_of(
                        dfa(params, X, [KEY, KEY]) + drtp(params, X, TARGETS, PROJECTIONS)
                    )
                )(params)
            )
        )
        for wrap in (jax.checkpoint, lambda f: f)
    )
    chex.assert_trees_all_close(f(PARAMS), g(PARAMS), **ULPS)


def test_second_derivatives_are_those_of_the_pseudo_gradient():
    w1, w2, p = normal(0, 6, 7), normal(1, 7, 3), PROJECTIONS[0]

    def squared_norm(w1, w2):
        def half_square(w1, w2):
            h = jnp.tanh(X @ w1)
            return jnp.sum(direct_feedback(ops.detach(h) @ w2, h, p) ** 2) / 2

        return sum(jnp.sum(g**2) for g in jax.grad(half_square, (0, 1))(w1, w2))

    def squared_norm_by_hand(w1, w2):
        h = jnp.tanh(X @ w1)
        e = h @ w2
        return jnp.sum((h.T @ e) ** 2) + jnp.sum((X.T @ ((1 - h**2) * (e @ p))) ** 2)

    actual = jax.jit(jax.grad(squared_norm, (0, 1)))(w1, w2)
    expected = jax.jit(jax.grad(squared_norm_by_hand, (0, 1)))(w1, w2)
    # Sums of many products of both signs, near 1000 each, in float32.
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-2)


SHARDINGS = {
    "batch": (P("data"), P("data"), P()),
    "batch, and time": (P("data"), P("data"), P()),
    "hidden units": (P(), P(None, "data"), P(None, "data")),
    "outputs": (P(None, "data"), P(), P("data")),
    "blocks' batch": (P("data"), P(None, "data"), P()),
    "a key": (P("data"), P("data"), None),
    "a key, hidden units": (P(), P(None, "data"), None),
}


@pytest.mark.parametrize("layout", SHARDINGS)
def test_explicit_sharding_changes_no_cotangent(mesh, layout):
    o, a, p = normal(0, 8, 4), normal(1, 8, 12), normal(2, 4, 12)
    kwargs = {}
    if layout == "batch, and time":
        a = normal(1, 8, 5, 12)
    if layout == "blocks' batch":
        a, p, kwargs = normal(1, 3, 8, 12), normal(2, 3, 4, 12), {"stacked": True}
    p = KEY if "key" in layout else p

    def f(o, a):
        def loss(o, a):
            return jnp.sum(jnp.sin(direct_feedback(o, a, p, **kwargs)))

        return jax.grad(loss, (0, 1))(o, a)

    expected = jax.device_get(jax.jit(f)(o, a))
    specs = SHARDINGS[layout]
    o, a = jax.device_put((o, a), specs[:2])
    p = p if specs[2] is None else jax.device_put(p, specs[2])
    actual = jax.jit(f)(o, a)
    assert jax.tree.map(jax.typeof, actual) == (jax.typeof(o), jax.typeof(a))
    chex.assert_trees_all_close(jax.device_get(actual), expected, rtol=1e-5, atol=1e-5)
    if not kwargs:
        bar = jax.jit(jax.grad(lambda a, o: jnp.sum(direct_target(a, o, p))))(a, o)
        assert jax.typeof(bar) == jax.typeof(a)


def test_per_example_under_vmap_works_over_an_explicitly_sharded_batch(mesh):
    o, a, p = normal(0, 8, 4), normal(1, 8, 12), normal(2, 4, 12)

    def f(o, a):
        return jax.grad(
            lambda a: jnp.sum(jnp.sin(jax.vmap(direct_feedback, (0, 0, None))(o, a, p)))
        )(a)

    expected = jax.device_get(jax.jit(f)(o, a))
    actual = jax.jit(f)(*jax.device_put((o, a), P("data")))
    chex.assert_trees_all_close(jax.device_get(actual), expected, rtol=1e-5, atol=1e-5)


def test_shard_map_changes_no_gradient(auto_mesh):
    params, projections = draw_params((6, 8, 3)), [normal(1, 3, 8)]

    def loss(params, x):
        return jnp.sum(jnp.sin(dfa(params, x, projections)))

    @functools.partial(jax.shard_map, mesh=auto_mesh, in_specs=(P(), P("data")), out_specs=P())
    def sharded(params, x):
        return lax.psum(loss(params, x), "data")

    x = normal(0, 8, 6)
    actual, expected = (jax.jit(jax.grad(f))(params, x) for f in (sharded, loss))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_batch_in_parts_learns_from_signs_and_targets_as_a_whole_one_does(auto_mesh):
    """Told the whole batch's size; each part knows its own only."""
    a, targets, p = normal(0, 8, 8), normal(1, 8, 3), normal(2, 3, 8)

    def of_signs(a, targets, rows=None):
        output = direct_feedback(targets + 0 * a[..., :3], a, p, error="sign", rows=rows)
        return jnp.mean(jnp.sum(jnp.sin(output), -1))

    def of_targets(a, targets, rows=None):
        return jnp.mean(jnp.sum(jnp.sin(direct_target(a, targets, p, rows=rows)), -1))

    for loss in (of_signs, of_targets):
        expected = jax.jit(jax.grad(loss))(a, targets)

        def mapped(a, targets, loss=loss, rows=8):
            return jnp.mean(jax.vmap(lambda a, t: loss(a, t, rows))(a, targets))

        @functools.partial(
            jax.shard_map, mesh=auto_mesh, in_specs=(P("data"), P("data")), out_specs=P()
        )
        def sharded(a, targets, loss=loss):
            return lax.pmean(loss(a, targets, 8), "data")

        for parts in (mapped, sharded):
            actual = jax.jit(jax.grad(parts))(a, targets)
            chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [0, -1, "8", jnp.ones(2)])
def test_rows_that_are_no_positive_number_raise(rows):
    with pytest.raises(
        ValueError, match=r"rows is .*; expected a positive number, the size of the"
    ):
        direct_feedback(normal(0, 4, 3), normal(1, 4, 8), normal(2, 3, 8), error="sign", rows=rows)


def test_a_projection_that_takes_the_batch_for_a_feature_raises():
    with pytest.raises(ValueError, match=r"has all axes of the activation \(4, 8\).* for a batch"):
        direct_feedback(normal(0, 4, 3), normal(1, 4, 8), normal(2, 3, 4, 8))
    with pytest.raises(ValueError, match=r"as features, so no axis is left after the axis of blo"):
        direct_feedback(normal(0, 4, 3), normal(1, 2, 4), normal(2, 2, 3, 4), stacked=True)


def test_an_output_of_one_number_per_example_raises_where_projections_are_drawn():
    with pytest.raises(ValueError, match=r"For one number per example give y\[:, None\]"):
        draw_projections(KEY, jnp.ones(4), jnp.ones((4, 8)))
    with pytest.raises(ValueError, match=r"the output has shape \(4,\) and an activation \(4, 8\)"):
        direct_feedback(jnp.ones(4), jnp.ones((4, 8)), KEY)


def test_a_list_in_place_of_an_array_raises():
    with pytest.raises(ValueError, match="the output is a list; expected one array"):
        direct_feedback([normal(0, 4, 8)], normal(1, 4, 3), normal(2, 3, 8))
    with pytest.raises(ValueError, match="the projection is a list; expected one array"):
        direct_target(normal(0, 4, 8), normal(1, 4, 3), [normal(2, 3, 8)])


@pytest.mark.parametrize("kind", ["key", "mask", "integer"])
def test_a_block_may_close_over_what_is_traced_and_has_no_gradient(kind):
    params, x = normal(0, 3, 4, 4), normal(1, 5, 4)
    closed = {"key": KEY, "mask": jnp.eye(5, 4) > 0, "integer": jnp.ones((5, 4), jnp.int32)}[kind]

    @functools.partial(jax.jit, static_argnums=2)
    def f(params, closed, parallel):
        def block(w, x):
            keep = jax.random.bernoulli(closed, 0.5, x.shape) if kind == "key" else closed > 0
            return jnp.where(keep, jnp.tanh(x @ w), 0.0)

        return scan_blocks(block, params, x, parallel=parallel).sum()

    actual, expected = (jax.grad(f)(params, closed, parallel) for parallel in (True, False))
    chex.assert_trees_all_close(actual, expected, rtol=1e-6, atol=1e-6)


# Matrix products and memory


def products_in(compiled):
    return len(re.findall(r" dot\(", compiled.as_text()))


def test_the_error_chains_products_are_gone():
    widths = (32, 64, 96, 128, 2)  # three hidden layers
    params, x, targets = draw_params(widths), normal(0, 8, 32), normal(1, 8, 2)
    projections = [normal(i, 2, width) for i, width in enumerate(widths[1:-1])]

    def cost(f, *args):
        compiled = jax.jit(jax.grad(lambda *args: jnp.sum(f(*args) ** 2))).lower(*args).compile()
        return products_in(compiled), compiled.cost_analysis()["flops"]

    of_bp = cost(bp, params, x)
    of_dfa = cost(dfa, params, x, projections)
    of_drtp = cost(drtp, params, x, targets, projections)
    # Forward, kernels' gradients, and errors: through kernels, or through matrices of two rows.
    assert of_bp[0] == of_dfa[0] == of_drtp[0] == 4 + 4 + 3
    chain = sum(2 * 8 * fan_in * fan_out for fan_in, fan_out in itertools.pairwise(widths[1:]))
    ours = sum(2 * 8 * 2 * width for width in widths[1:-1])
    for _, flops in (of_dfa, of_drtp):
        assert of_bp[1] - flops == pytest.approx(chain - ours, rel=0.02)


def residuals(f, *args):
    _, vjp = jax.vjp(f, *args)
    return [leaf for leaf in jax.tree.leaves(vjp) if jnp.ndim(leaf)]


def test_the_backward_pass_keeps_projections_only_and_of_a_key_nothing():
    o, a, p = normal(0, 4, 3), normal(1, 4, 7), normal(2, 3, 7)
    assert [leaf.shape for leaf in residuals(lambda o, a: direct_feedback(o, a, p), o, a)] == [
        (3, 7)
    ]
    assert residuals(lambda o, a: direct_feedback(o, a, KEY), o, a) == []


# Stacks of blocks

BLOCKS = {
    "dense": (
        lambda params, x: jnp.tanh(dense(params, x)),
        lambda: {"kernel": normal(0, 3, 5, 5), "bias": normal(1, 3, 5)},
        (4, 5),
    ),
    "residual, in bfloat16": (
        lambda params, x: x + jnp.tanh(x @ params),
        lambda: normal(0, 3, 5, 5, dtype=jnp.bfloat16),
        (4, 5),
    ),
    "convolution": (
        lambda params, x: jnp.tanh(
            lax.conv_general_dilated(
                x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        ),
        lambda: {"w": normal(0, 3, 3, 3, 2, 2)},
        (4, 6, 5, 2),
    ),
}
parallel_or_not = pytest.mark.parametrize("parallel", [True, False])


def stack_loss(run, projections, kernel):
    """Of the activations of all blocks: a head on the last, direct feedback for all."""

    def loss(params, x):
        activations = run(params, x)
        last = ops.detach(activations[-1]).reshape(4, -1).astype(jnp.float32)
        return loss_of(direct_feedback(last @ kernel, activations, projections, stacked=True))

    return loss


@parallel_or_not
@pytest.mark.parametrize("name", BLOCKS)
def test_a_stack_is_a_python_loop(name, parallel):
    block, make_params, shape = BLOCKS[name]
    params, x = make_params(), normal(2, *shape, dtype=jax.tree.leaves(make_params())[0].dtype)
    projections = normal(3, 3, 3, *shape[1:])
    kernel = normal(4, x.size // 4, 3)

    def loop(params, x):
        activations = []
        for i in range(3):
            x = block(jax.tree.map(lambda leaf: leaf[i], params), ops.detach(x))  # noqa: B023
            activations.append(x)
        return jnp.stack(activations)

    def stack(params, x):
        return scan_blocks(block, params, x, parallel=parallel)

    chex.assert_trees_all_close(stack(params, x), loop(params, x), rtol=1e-2, atol=1e-2)
    actual, expected = (
        jax.jit(jax.grad(stack_loss(run, projections, kernel), (0, 1)))(params, x)
        for run in (stack, loop)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    # One rounding of bfloat16 apart: the compiler may keep float32 longer in one.
    tolerance = 2e-2 if x.dtype == jnp.bfloat16 else 1e-5
    chex.assert_trees_all_close(
        *jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (actual, expected)),
        rtol=tolerance,
        atol=tolerance,
    )
    assert not np.any(actual[1])


@parallel_or_not
def test_a_block_may_close_over_what_is_differentiated_or_not(parallel):
    params, x, scale, shift = normal(0, 3, 5, 5), normal(1, 4, 5), normal(2, 5), normal(3, 1, 5)

    def stack(params, scale, x):
        block = lambda w, x: jnp.tanh(x @ w) * scale[None] + shift  # noqa: E731
        return jnp.sum(jnp.sin(scan_blocks(block, params, x, parallel=parallel)))

    def loop(params, scale, x):
        activations = []
        for w in params:
            x = jnp.tanh(ops.detach(x) @ w) * scale[None] + shift
            activations.append(x)
        return jnp.sum(jnp.sin(jnp.stack(activations)))

    actual, expected = (jax.jit(jax.grad(f, (0, 1)))(params, scale, x) for f in (stack, loop))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@parallel_or_not
def test_stacks_compose_with_vmap_remat_and_explicit_sharding(mesh, parallel):
    params, x = normal(0, 3, 5, 5), normal(1, 8, 5)

    def loss(params, x):
        activations = scan_blocks(lambda w, x: jnp.tanh(x @ w), params, x, parallel=parallel)
        return jnp.sum(jnp.sin(activations))

    expected = jax.device_get(jax.jit(jax.grad(loss))(params, x))
    split = jax.device_put(x, P("data"))

    def per_example(params, x):
        return jnp.sum(jax.vmap(loss, (None, 0))(params, x))

    for f, batch in ((loss, split), (per_example, x), (jax.checkpoint(loss), x)):
        actual = jax.device_get(jax.jit(jax.grad(f))(params, batch))
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def stack_of_dense(parallel):
    projections, kernel = normal(3, 3, 3, 5), normal(4, 5, 3)

    def run(params, x):
        return scan_blocks(lambda w, x: jnp.tanh(x @ w), params, x, parallel=parallel)

    return stack_loss(run, projections, kernel)


@pytest.mark.parametrize("parallel", [True, False])
def test_a_stack_takes_one_product_of_each_kind(parallel):
    """Forward, kernels' gradient, projection, and the head: none back to a block's input."""
    args = normal(0, 3, 5, 5), normal(1, 4, 5)
    compiled = jax.jit(jax.grad(stack_of_dense(parallel))).lower(*args).compile()
    assert products_in(compiled) == 1 + 1 + 1 + 1


def test_the_parallel_backward_pass_has_no_loop():
    args = normal(0, 3, 5, 5), normal(1, 4, 5)
    loops = [
        jax.jit(jax.grad(stack_of_dense(parallel))).lower(*args).as_text().count("stablehlo.while")
        for parallel in (True, False)
    ]
    assert loops == [1, 2]


def test_the_parallel_backward_pass_keeps_no_kernels():
    params, x = normal(0, 3, 5, 5), normal(1, 4, 5)

    def run(params):
        return scan_blocks(lambda w, x: jnp.tanh(x @ w), params, x, parallel=True)

    kept = residuals(run, params)
    assert not any(leaf.shape == params.shape for leaf in kept)
    assert kept


# With `with_feedback`


def test_with_feedback_and_direct_feedback_share_a_network():
    """Layers below h hear of it through feedback; h itself directly, through a projection."""
    kernels = {"in": normal(0, 6, 7), "middle": normal(1, 7, 5), "out": normal(2, 5, 3)}
    feedback, projection = {"middle": normal(3, 7, 5)}, normal(4, 3, 5)

    def loss(params, projection, x=X):
        h1 = jnp.tanh(x @ params["in"])
        h2 = jnp.tanh(h1 @ params["middle"])
        return loss_of(direct_feedback(ops.detach(h2) @ params["out"], h2, projection))

    actual = jax.jit(jax.grad(with_feedback(loss)))(kernels, feedback, projection, X)

    h1 = np.tanh(X @ kernels["in"])
    h2 = np.tanh(h1 @ kernels["middle"])
    e = np.asarray(jax.grad(loss_of)(h2 @ kernels["out"]))
    delta2 = e @ projection * (1 - h2**2)
    delta1 = delta2 @ feedback["middle"].T * (1 - h1**2)
    expected = {"in": X.T @ delta1, "middle": h1.T @ delta2, "out": h2.T @ e}
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)

    # Where the ordinary path is stopped, feedback has nothing to send; a projection may be closed
    # over, or be a key.
    feedback["out"] = normal(5, 5, 3)

    @jax.jit
    def closed_over(kernels, projection):
        fa = with_feedback(lambda params, x: loss(params, projection, x))
        return jax.grad(fa)(kernels, feedback, X)

    chex.assert_trees_all_close(closed_over(kernels, projection), actual, **ULPS)
    key = jax.jit(jax.grad(with_feedback(loss)))(kernels, feedback, KEY, X)
    drawn = jax.jit(jax.grad(with_feedback(loss)))(kernels, feedback, draw_projection(KEY, 3, 5), X)
    chex.assert_trees_all_close(key, drawn, **ULPS)


def test_with_feedback_reaches_into_the_blocks_of_a_stack_that_is_a_scan():
    x, params = normal(0, 4, 5), {"a": normal(1, 3, 5, 5), "b": normal(2, 3, 5, 5)}
    feedback = {"b": normal(3, 3, 5, 5)}

    def loss(params, x, parallel):
        def block(params, x):
            return jnp.tanh(x @ params["a"]) @ params["b"]

        return jnp.sum(jnp.sin(scan_blocks(block, params, x, parallel=parallel)))

    def loop(params):
        a = x
        total = 0.0
        for i in range(3):
            h = jnp.tanh(ops.detach(a) @ params["a"][i])
            a = ops.feedback_dense(h, params["b"][i], feedback["b"][i])
            total += jnp.sum(jnp.sin(a))
        return total

    expected = jax.jit(jax.grad(loop))(params)
    for parallel in (False, True):
        fa = with_feedback(functools.partial(loss, parallel=parallel))
        actual = jax.jit(jax.grad(fa))(params, feedback, x)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


# Errors


def shapes_error(activation, output, projection, **kwargs):
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (output, activation, projection)]
    jax.eval_shape(functools.partial(direct_feedback, **kwargs), *args)


@pytest.mark.parametrize(
    "activation, output, projection",
    [
        ((4, 7), (4, 3), (7, 3)),  # transposed
        ((4, 7), (4, 3), (3, 6)),
        ((4, 7), (4, 3), (3,)),
        ((5, 7), (4, 3), (3, 7)),  # another batch
        ((4, 5, 7), (4, 6, 3), (3, 7)),  # another time
        ((7,), (4, 3), (3, 4, 7)),
    ],
)
def test_shapes_that_do_not_fit_raise_when_traced(activation, output, projection):
    message = (
        rf"the projection has shape {re.escape(str(projection))}, the activation "
        rf"{re.escape(str(activation))} and the output {re.escape(str(output))}; expected a "
        r"projection \(out, \*features\)"
    )
    with pytest.raises(ValueError, match=message):
        shapes_error(activation, output, projection)
    with pytest.raises(ValueError, match=message.replace("output", "target")):
        direct_target(jnp.ones(activation), jnp.ones(output), jnp.ones(projection))


def test_an_error_names_the_activations_place():
    hidden, projections = {"a": jnp.ones((4, 7))}, {"a": jnp.ones((7, 3))}
    with pytest.raises(ValueError, match=r"the projection at \['a'\] has shape \(7, 3\)"):
        direct_feedback(jnp.ones((4, 3)), hidden, projections)


@pytest.mark.parametrize("projections", [jnp.ones((3, 7)), (jnp.ones((3, 7)),) * 3, [], {"a": 1}])
def test_trees_of_other_structures_raise(projections):
    hidden = (jnp.ones((4, 7)), jnp.ones((4, 7)))
    with pytest.raises(ValueError, match="expected one projection for each activation"):
        direct_feedback(jnp.ones((4, 3)), hidden, projections)


def test_no_activations_raise():
    with pytest.raises(ValueError, match="expected one projection for each activation"):
        direct_feedback(jnp.ones((4, 3)), (), ())


def test_an_unknown_error_raises():
    with pytest.raises(ValueError, match=r"error is 'target'; expected 'exact' \(DFA\) or 'sign'"):
        direct_feedback(jnp.ones((4, 3)), jnp.ones((4, 7)), KEY, error="target")


def test_class_labels_as_targets_raise():
    for dtype in (jnp.int32, jnp.uint8):
        labels = jnp.zeros(4, dtype)
        with pytest.raises(ValueError, match=r"the target has dtype.*jax.nn.one_hot\(labels"):
            direct_target(jnp.ones((4, 7)), labels, jnp.ones((3, 7)))


def test_what_is_not_floating_point_raises():
    with pytest.raises(ValueError, match="the activation has dtype int32; expected floating point"):
        direct_feedback(jnp.ones((4, 3)), jnp.ones((4, 7), jnp.int32), KEY)
    with pytest.raises(ValueError, match="the output has dtype int32; expected floating point"):
        direct_feedback(jnp.ones((4, 3), jnp.int32), jnp.ones((4, 7)), KEY)


def test_scalars_raise():
    with pytest.raises(ValueError, match=r"the output is a scalar; expected \(\*leading, out\)"):
        direct_feedback(jnp.float32(1.0), jnp.ones((4, 7)), jnp.ones((3, 7)))
    with pytest.raises(ValueError, match=r"the activation has shape \(\); expected \(\*leading"):
        direct_feedback(jnp.ones((4, 3)), jnp.float32(1.0), KEY)


def test_keys_of_another_kind_raise():
    with pytest.raises(ValueError, match=r"is a raw key.*from jax.random.key\."):
        direct_feedback(jnp.ones((4, 3)), jnp.ones((4, 7)), jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match=r"keys of shape \(2,\); expected one key per activ"):
        direct_feedback(jnp.ones((4, 3)), jnp.ones((4, 7)), jax.random.split(KEY))


@pytest.mark.parametrize("projection", [jnp.ones((3, 7)), jnp.ones((3, 3, 7)), KEY])
def test_a_stack_needs_a_projection_for_every_block(projection):
    with pytest.raises(ValueError, match=r"stacked=True the activation has shape \(2, 4, 7\)"):
        direct_feedback(jnp.ones((4, 3)), jnp.ones((2, 4, 7)), projection, stacked=True)


def test_a_stack_without_an_axis_of_blocks_raises():
    with pytest.raises(ValueError, match=r"expected \(blocks, \*leading, \*features\)"):
        direct_feedback(jnp.ones((4, 3)), jnp.ones(4), jnp.ones((4, 3)), stacked=True)


@pytest.mark.parametrize(
    "params", [{}, {"w": 1.0}, {"w": jnp.ones((3, 5, 5)), "b": jnp.ones((2, 5))}]
)
def test_params_that_are_no_stack_raise(params):
    with pytest.raises(ValueError, match="expected a first axis of one length"):
        scan_blocks(lambda params, x: x, params, jnp.ones((4, 5)))


@pytest.mark.parametrize("block", [lambda w, x: x[:, :2], lambda w, x: x.astype(jnp.bfloat16)])
def test_a_block_whose_output_is_unlike_its_input_raises(block):
    with pytest.raises(ValueError, match=r"block maps float32\[4, 5\] to .*; expected the same"):
        scan_blocks(block, jnp.ones((3, 5, 5)), jnp.ones((4, 5)))


@pytest.mark.parametrize("rows", [True, float("inf"), "8", 1j])
def test_rows_that_are_no_finite_number_raise(rows):
    with pytest.raises(ValueError, match=r"rows is .*; expected a positive number"):
        direct_target(jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.ones((2, 3)), rows=rows)


@pytest.mark.parametrize("size", [0, -1, 2.5, None, "3", (3, 0)])
def test_sizes_of_a_projection_that_are_no_positive_integers_raise(size):
    with pytest.raises(ValueError, match=r"out is .* and features are .*; expected a positive int"):
        draw_projection(KEY, 2, size)
    with pytest.raises(ValueError, match=r"out is .* and features are .*; expected a positive int"):
        draw_projection(KEY, size, 3)


@pytest.mark.parametrize("key", [0, None, jnp.ones(2), jax.random.split(KEY)])
def test_what_is_no_key_draws_no_projection(key):
    for draw in (
        lambda: draw_projection(key, 2, 3),
        lambda: draw_projections(key, jnp.ones((4, 2)), jnp.ones((4, 3))),
    ):
        with pytest.raises(ValueError, match=r"key is .*; expected one PRNG key"):
            draw()


@pytest.mark.parametrize("drawn", [None, jnp.ones((3, 2)), 1.0])
def test_an_initialiser_that_returns_no_projection_raises(drawn):
    with pytest.raises(ValueError, match=r"initializer returned .*; expected .* shape \(2, 3\)"):
        draw_projection(KEY, 2, 3, initializer=lambda key, shape, dtype: drawn)


def test_a_complex_projection_of_a_real_activation_raises():
    with pytest.raises(
        ValueError, match=r"projection has dtype complex64 and the activation float"
    ):
        direct_feedback(jnp.ones((4, 2)), jnp.ones((4, 3)), jnp.ones((2, 3), jnp.complex64))
