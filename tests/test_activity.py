"""Activity propagation: a NumPy twin, closed forms, every way of writing a model, errors."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from soap_jax import activity, ops, with_feedback

SIZES = (7, 5, 4, 3)
BATCH = 8
# So large a rate, and so many times an activation's rounding, that float32 resolves g - g'.
RATE, BIAS = 300.0, 3e-3
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def weights(seed=0):
    """Three kernels."""
    shapes = itertools.pairwise(SIZES)
    return [draw(*shape, seed=10 * seed + i) / 2 for i, shape in enumerate(shapes)]


def batch(seed=0, size=BATCH):
    rng = np.random.default_rng(seed)
    return draw(size, SIZES[0], seed=seed), rng.integers(0, SIZES[-1], size, np.int32)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def loss(tap, params, x, labels):
    """A tanh network with both hidden layers tapped."""
    first, second, third = params
    x = tap("hidden_0", jnp.tanh(x @ first))
    x = tap("hidden_1", jnp.tanh(x @ second))
    return cross_entropy(x @ third, labels)


def make(loss=loss, **options):
    options = {"learning_rate": RATE, "bias": BIAS} | options
    return activity.value_and_grad(loss, **options)


def assert_close(actual, expected, **tolerances):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, **(tolerances or ROUNDING))


# The reference: the same network by hand, in float64


def numpy_reference(params, x, labels, *, back=None, arrives_replaced=True):
    """Value and gradients; `back` are the matrices that the error goes through, from W₁ on."""
    w0, w1, w2 = (np.asarray(w, np.float64) for w in params)
    back1, back2 = (w1, w2) if back is None else (np.asarray(b, np.float64) for b in back)
    x = np.asarray(x, np.float64)

    def forward(shift0, shift1):
        h0 = np.tanh(x @ w0)
        moved0 = h0 - shift0
        h1 = np.tanh(moved0 @ w1)
        moved1 = h1 - shift1
        logits = moved1 @ w2
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        value = -np.log(p[np.arange(len(x)), labels]).mean()
        error = (p - np.eye(SIZES[-1])[labels]) / len(x)
        return h0, moved0, h1, moved1, error, value

    h0, _, h1, _, error, value = forward(0, 0)
    g1 = error @ back2.T
    g0 = g1 * (1 - h1**2) @ back1.T
    rate0, rate1 = RATE / h0.size, RATE / h1.size

    def secant(g, arrived, rate):
        d = g - arrived
        d = np.where(d == 0, BIAS, d + 2 * BIAS * np.sign(d))
        return rate * g**2 / d

    h0, moved0, h1, moved1, error, _ = forward(rate0 * g0, rate1 * g1)
    arrived1 = error @ back2.T
    bar1 = secant(g1, arrived1, rate1)
    sent1 = bar1 * (1 - h1**2)
    arrived0 = (sent1 if arrives_replaced else arrived1 * (1 - h1**2)) @ back1.T
    bar0 = secant(g0, arrived0, rate0)
    sent0 = bar0 * (1 - h0**2)
    return value, [x.T @ sent0, moved0.T @ sent1, moved1.T @ error]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_taps_by_hand(seed):
    params, data = weights(seed), batch(seed)
    value, gradients = jax.jit(make())(params, *data, step=0)
    expected_value, expected = numpy_reference(params, *data)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    assert_close(gradients, expected)
    assert_close(value, loss(activity.untapped, params, *data), rtol=1e-6)
    # The reference tells the two apart: what arrives at the lower tap was replaced by the upper.
    _, other = numpy_reference(params, *data, arrives_replaced=False)
    assert np.abs(other[0] - expected[0]).max() > 0.1
    assert_close(other[1:], expected[1:])


def feedback_loss(tap, params, feedback, x, labels):
    """`loss` with feedback above the first layer."""
    (first, second, third), (back1, back2) = params, feedback
    x = tap("hidden_0", jnp.tanh(x @ first))
    x = tap("hidden_1", jnp.tanh(ops.feedback_dense(x, second, back1)))
    return cross_entropy(ops.feedback_dense(x, third, back2), labels)


def rewritten_loss(tap, params, feedback, x, labels):
    """The same by rewriting: the tap lies inside."""
    plain = functools.partial(loss, tap)
    return with_feedback(plain)(params, [None, *feedback], x, labels)


@pytest.mark.parametrize("loss_fa", [feedback_loss, rewritten_loss])
def test_both_passes_go_through_feedback(loss_fa):
    params, feedback, data = weights(), weights(5)[1:], batch()
    value, gradients = jax.jit(make(loss_fa))(params, feedback, *data, step=0)
    expected_value, expected = numpy_reference(params, *data, back=feedback)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    assert_close(gradients, expected)
    _, backprop = numpy_reference(params, *data)
    assert np.abs(backprop[0] - expected[0]).max() > 0.1


# Closed forms


def test_a_tapped_quadratic_takes_newtons_step():
    """L = Σ h a² / 2 has g = h a and d = (lr / n) h g, so a_bar = g / h = a, but for bias."""
    h, a = np.array([0.5, 1.0, 8.0], np.float32), np.array([3.0, -2.0, 0.25], np.float32)

    def quadratic(tap, a):
        return jnp.sum(h * tap("a", a) ** 2) / 2

    rate = 0.3 / 3
    _, newton = make(quadratic, learning_rate=0.3, bias=1e-12)(a, step=0)
    np.testing.assert_allclose(newton, a, rtol=1e-5)
    bias = 0.05
    _, biased = make(quadratic, learning_rate=0.3, bias=bias)(a, step=0)
    g = h * a
    np.testing.assert_allclose(
        biased, rate * g**2 / (rate * h * g + 2 * bias * np.sign(g)), rtol=1e-5
    )
    # Where bias outweighs all, what is left is g² with the sign of g - g'.
    _, heavy = make(quadratic, learning_rate=0.3, bias=1e4)(a, step=0)
    np.testing.assert_allclose(heavy, rate * g * np.abs(g) / 2e4, rtol=1e-4)


def test_where_the_gradient_does_not_change_bias_stands_in():
    """A linear loss: d = 0, so a_bar = (lr / n) g² / bias, never negative."""
    c = np.array([[2.0, -3.0, 0.0]], np.float32)
    _, a_bar = make(lambda tap, a: jnp.sum(c * tap("a", a)), learning_rate=0.3, bias=0.5)(c, step=0)
    np.testing.assert_allclose(a_bar, 0.1 * c**2 / 0.5, rtol=1e-6)


def test_an_activation_that_does_not_matter_gets_no_error():
    def f(tap, a):
        tap("unused", 2 * a)
        return jnp.sum(tap("used", a) ** 2)

    _, a_bar = make(f, learning_rate=0.3, bias=1e-12)(jnp.ones(3), step=0)
    np.testing.assert_allclose(a_bar, 1, rtol=1e-5)


def test_tiny_errors_do_not_underflow():
    c = np.float32(1e-25)  # whose square is zero in float32
    _, a_bar = make(lambda tap, a: c * tap("a", a), learning_rate=1.0, bias=1e-20)(1.0, step=0)
    np.testing.assert_allclose(a_bar, 1e-30, rtol=1e-5)


def test_the_tap_above_a_layer_leaves_its_own_gradient_to_the_moved_activation():
    """W₂'s gradient is taken at the second pass's activation, h - (lr / n) g."""
    w, h = np.array([[1.0], [2.0]], np.float32), np.array([[0.5, -1.0]], np.float32)

    def f(tap, w):
        return jnp.sum(tap("h", h) @ w)

    _, w_bar = make(f, learning_rate=0.2)(w, step=0)
    np.testing.assert_allclose(w_bar, (h - 0.1 * w.T).T, rtol=1e-6)


# Warm-up and transformations


def test_warmup_is_backprop_and_then_it_is_not():
    params, data = weights(), batch()
    traces = []

    def counted(tap, *args):
        traces.append(tap)
        return loss(tap, *args)

    f = jax.jit(make(counted, warmup=3))
    backprop = jax.jit(jax.value_and_grad(functools.partial(loss, activity.untapped)))
    expected = backprop(params, *data)
    always = jax.jit(make())(params, *data, step=0)
    for step in (0, 2, 3, 10**6):
        value, gradients = f(params, *data, step=step)
        assert_close((value, gradients), expected if step < 3 else always, rtol=1e-6, atol=1e-7)
    assert len(traces) == 4  # types, first and second pass, backprop: once each
    distance = np.abs(np.asarray(always[1][0]) - np.asarray(expected[1][0])).max()
    assert distance > 0.1


def train(params, steps, *, warmup, scanned):
    f = make(warmup=warmup)

    def body(carry, data):
        params, step = carry
        value, gradients = f(params, *data, step=step)
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, gradients)
        return (params, step + 1), value

    batches = jax.tree.map(lambda *leaves: np.stack(leaves), *map(batch, range(steps)))
    if scanned:
        return jax.jit(lambda c: lax.scan(body, c, batches))((params, 0))
    carry, values, body = (params, 0), [], jax.jit(body)
    for i in range(steps):
        carry, value = body(carry, jax.tree.map(lambda leaf, i=i: leaf[i], batches))
        values.append(value)
    return carry, np.array(values)


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_scan_equals_a_python_loop(warmup):
    scanned = train(weights(), 4, warmup=warmup, scanned=True)
    looped = train(weights(), 4, warmup=warmup, scanned=False)
    assert_close(scanned, looped, rtol=1e-4, atol=1e-4)  # small differences d grow over steps


def test_vmap_over_seeds_and_rates_equals_a_python_loop():
    """Each run has its own mean, its own n and its own warm-up."""
    data = batch()
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(weights, range(3)))
    rates, steps = jnp.array([100.0, 300.0, 500.0]), jnp.array([0, 1, 2])

    @jax.jit
    def f(rate, step, params):
        return make(learning_rate=rate, warmup=1)(params, *data, step=step)

    together = jax.vmap(f)(rates, steps, stacked)
    for i in range(3):
        alone = f(rates[i], steps[i], weights(i))
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone)


def test_aux_is_the_first_passs():
    def with_aux(tap, params, x, labels):
        kept = {}

        def keep(name, a):
            kept[name] = tap(name, a)
            return kept[name]

        return loss(keep, params, x, labels), kept

    params, (x, labels) = weights(), batch()
    for warmup in (0, 1):
        f = jax.jit(make(with_aux, has_aux=True, warmup=warmup))
        (value, kept), gradients = f(params, x, labels, step=1)
        assert_close((value, gradients), jax.jit(make())(params, x, labels, step=0))
        np.testing.assert_allclose(kept["hidden_0"], np.tanh(x @ params[0]), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_its_dtype_and_steps_in_float32(dtype):
    a = jnp.array([3.0, -2.0], dtype)

    def quadratic(tap, a):
        return jnp.sum(tap("a", a).astype(jnp.float32) ** 2)

    _, a_bar = make(quadratic, learning_rate=1.0, bias=1e-9)(a, step=0)
    assert a_bar.dtype == dtype
    np.testing.assert_allclose(a_bar.astype(jnp.float32), [3, -2], rtol=2e-2)


def test_it_differentiates_by_the_rate():
    """A learned learning rate: for L = h a² / 2 with bias, a_bar depends on it."""

    def a_bar(rate):
        f = make(lambda tap, a: 2 * tap("a", a) ** 2, learning_rate=rate, bias=0.5)
        return f(1.0, step=0)[1]  # g = h = 4: rate * 16 / (rate * 16 + 1)

    np.testing.assert_allclose(jax.grad(a_bar)(0.5), 16 / 81, rtol=1e-5)


# Any model


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, tap):
        for i, width in enumerate(SIZES[1:]):
            x = nn.Dense(width, use_bias=False, name=f"dense_{i}")(x)
            x = tap(f"hidden_{i}", jnp.tanh(x)) if i < 2 else x
        return x


def linen_gradients(params, *data, net=LinenNet):
    def f(tap, params, x, labels):
        return cross_entropy(net().apply({"params": params}, x, tap), labels)

    tree = {f"dense_{i}": {"kernel": w} for i, w in enumerate(params)}
    _, gradients = jax.jit(make(f))(tree, *data, step=0)
    return [gradients[f"dense_{i}"]["kernel"] for i in range(3)]


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        pairs = itertools.pairwise(SIZES)
        self.dense = nnx.List([nnx.Linear(*p, use_bias=False, rngs=rngs) for p in pairs])

    def __call__(self, x, tap):
        x = tap("hidden_0", jnp.tanh(self.dense[0](x)))
        x = tap("hidden_1", jnp.tanh(self.dense[1](x)))
        return self.dense[2](x)


def nnx_gradients(params, *data):
    model = NnxNet(nnx.Rngs(0))
    for layer, w in zip(model.dense, params, strict=True):
        layer.kernel[...] = w
    graph, state = nnx.split(model)

    def f(tap, state, x, labels):
        return cross_entropy(nnx.merge(graph, state)(x, tap), labels)

    _, gradients = jax.jit(make(f))(state, *data, step=0)
    return [gradients["dense"][i]["kernel"][...] for i in range(3)]


def jitted_inside(params, *data):
    """Taps under the loss's own `jit`: a closure, and one that lives outside."""

    @functools.partial(jax.jit, static_argnames=("tap", "name"))
    def layer(tap, name, x, w):
        return tap(name, jnp.tanh(x @ w))

    def f(tap, params, x, labels):
        x = layer(tap, "hidden_0", x, params[0])
        x = jax.jit(lambda x: tap("hidden_1", jnp.tanh(x @ params[1])))(x)
        return cross_entropy(x @ params[2], labels)

    return jax.jit(make(f))(params, *data, step=0)[1]


def rematerialised(params, *data):
    def f(tap, params, x, labels):
        hidden = jax.checkpoint(lambda x, w: tap("hidden_0", jnp.tanh(x @ w)))
        x = tap("hidden_1", jnp.tanh(hidden(x, params[0]) @ params[1]))
        return cross_entropy(x @ params[2], labels)

    return jax.jit(make(f))(params, *data, step=0)[1]


WAYS = {
    "linen": linen_gradients,
    "linen, nn.jit": functools.partial(linen_gradients, net=nn.jit(LinenNet, static_argnums=2)),
    "linen, nn.remat": functools.partial(linen_gradients, net=nn.remat(LinenNet, static_argnums=2)),
    "nnx": nnx_gradients,
    "jit inside": jitted_inside,
    "checkpoint inside": rematerialised,
    "outside jit": lambda params, *data: make()(params, *data, step=0)[1],
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_a_model_gives_the_same_gradients(way):
    params, data = weights(), batch()
    assert_close(WAYS[way](params, *data), numpy_reference(params, *data)[1])


def test_arguments_need_not_be_arrays():
    def f(tap, params, x, labels, *, activation=None):
        del activation
        return loss(tap, params, x, labels) if labels is not None else None

    params, data = weights(), batch()
    g = make(lambda tap, params, x, labels, kind: f(tap, params, x, labels), warmup=1)
    assert_close(g(params, *data, "a string", step=1)[1], numpy_reference(params, *data)[1])


# Several devices


def test_an_explicitly_sharded_batch_changes_nothing(mesh):
    params, (x, labels) = weights(), batch()
    expected = numpy_reference(params, x, labels)
    params, x, labels = jax.device_put((params, x, labels), (P(), P("data"), P("data")))

    def one_hot_loss(tap, params, x, labels):  # a gather over a sharded axis needs more words
        (first, second, third), classes = params, jnp.arange(SIZES[-1])
        x = tap("hidden_0", jnp.tanh(x @ first))
        x = tap("hidden_1", jnp.tanh(x @ second))
        return -jnp.mean(
            jnp.sum((labels[:, None] == classes[None]) * jax.nn.log_softmax(x @ third), -1)
        )

    assert_close(jax.jit(make(one_hot_loss))(params, x, labels, step=0), expected)


def test_in_shard_map_each_device_taps_its_own_share(auto_mesh):
    params, data = weights(), batch(size=4 * BATCH)
    f = jax.jit(
        jax.shard_map(
            lambda *args: make()(*args, step=0)[1],
            mesh=auto_mesh,
            in_specs=(P(), P("data"), P("data")),
            out_specs=P(),
        )
    )
    shares = [[leaf[i : i + BATCH] for leaf in data] for i in range(0, 4 * BATCH, BATCH)]
    parts = [numpy_reference(params, *share)[1] for share in shares]
    assert_close(f(params, *data), [sum(part) for part in zip(*parts, strict=True)])


# Errors


def raises(message, f, *args, **options):
    with pytest.raises(ValueError, match=message):
        make(f, **options)(jnp.ones((2, 3)), *args, step=0)


def test_no_tap_raises():
    raises("the loss taps nothing; expected at least one", lambda tap, w: jnp.sum(w))


@pytest.mark.parametrize("other", [jnp.ones(3), jnp.ones((2, 3))])
def test_a_name_used_twice_raises(other):
    def f(tap, w):
        return jnp.sum(tap("h", w)) + jnp.sum(tap("h", other))

    raises("tap's name 'h' is used twice; expected a different name", f)


def test_a_name_used_twice_by_one_jitted_function_raises():
    def f(tap, w):
        twice = jax.jit(lambda w: tap("h", jnp.sin(w)))
        return jnp.sum(twice(twice(w)))

    raises("tap's name 'h' is used twice", f)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_tapping_what_is_not_floating_point_raises(dtype):
    def f(tap, w):
        return jnp.sum(tap("h", w.astype(dtype)).astype(jnp.float32))

    raises(f"activation at tap 'h' has dtype {dtype}; expected a floating-point dtype", f)


def test_a_name_that_is_no_string_raises():
    raises("tap's name is 0; expected a string", lambda tap, w: jnp.sum(tap(0, w)))


def in_scan(tap, w):
    return lax.scan(lambda c, row: (c + jnp.sum(tap("h", row)), None), 0.0, w)[0]


def in_fori(tap, w):
    return lax.fori_loop(0, 2, lambda i, w: tap("h", jnp.sin(w)), w).sum()


def in_while(tap, w):
    return lax.while_loop(lambda w: w.sum() < 1, lambda w: tap("h", w + 1), w).sum()


def in_cond(tap, w):
    return lax.cond(w.sum() > 0, lambda w: tap("h", w), lambda w: w, w).sum()


def in_vmap(tap, w):
    return jax.vmap(lambda row: tap("h", jnp.sin(row)))(w).sum()


def in_vmap_in_jit(tap, w):
    return jax.vmap(jax.jit(lambda row: tap("h", jnp.sin(row))), in_axes=1)(w).sum()


def in_custom_vjp(tap, w):
    f = jax.custom_vjp(lambda w: tap("h", w))
    f.defvjp(lambda w: (w, None), lambda _, bar: (bar,))
    return f(w).sum()


@pytest.mark.parametrize(
    "f, inside",
    [
        (in_scan, "scan"),
        (in_fori, "scan"),
        (in_while, "while"),
        (in_cond, "cond"),
        (in_vmap, "vmap"),
        (in_vmap_in_jit, "vmap"),
        (in_custom_vjp, "custom_vjp_call"),
    ],
)
def test_a_tap_in_a_mapped_or_repeated_part_raises(f, inside):
    raises(f"tap 'h' is inside {inside}.*, so it is not called once on a whole", f)


def test_outside_a_scan_or_vmap_one_may_tap():
    def f(tap, w):
        states = lax.scan(lambda c, row: (c + row, jnp.tanh(c + row)), jnp.zeros(3), w)[1]
        return jnp.sum(tap("mapped", jax.vmap(jnp.sin)(tap("states", states))))

    assert np.all(np.isfinite(make(f)(jnp.ones((2, 3)), step=0)[1]))


@pytest.mark.parametrize("name", ["learning_rate", "bias"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "x", None, np.ones(2)])
def test_numbers_that_are_not_positive_raise(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*; expected a positive number"):
        make(**{name: value})


@pytest.mark.parametrize("warmup", [-1, 1.0, None, "x"])
def test_a_warmup_that_is_no_count_raises(warmup):
    with pytest.raises(ValueError, match=f"warmup is {warmup!r}; expected a number of updates"):
        make(warmup=warmup)


@pytest.mark.parametrize("step", [0.0, None, {"w": 1}, np.zeros(2, np.int32), jnp.float32(0)])
def test_a_step_that_is_no_integer_scalar_raises(step):
    with pytest.raises(ValueError, match=r"step is .*; expected an integer scalar, the number of"):
        make()(weights(), *batch(), step=step)
