"""Direct feedback by names: what one writes by hand with `direct_feedback`, to the last bit."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import soap_jax
from soap_jax import direct, direct_feedback, init_projections, with_direct_feedback, with_feedback
from soap_jax.ops import detach
from soap_jax.transform import layer_errors

KEY = jax.random.key(0)
BATCH, STEPS, IN, WIDTH, OUT = 5, 7, 3, 4, 2


def draw(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


X, Y = draw(0, BATCH, IN), draw(1, BATCH, OUT)
PARAMS = {"in": draw(2, IN, WIDTH), "mid": draw(3, WIDTH, 6), "out": draw(4, 6, OUT)}
P = {"h1": draw(5, OUT, WIDTH), "h2": draw(6, OUT, 6)}


def same(x):
    return x


def mlp(params, x, y, wrap=same, whole=same):
    """Two blocks and a head, each of them wrapped."""
    first = wrap(lambda w, x: checkpoint_name(jnp.tanh(x @ w), "h1"))
    second = wrap(lambda w, h: checkpoint_name(jnp.tanh(h @ w), "h2"))
    head = wrap(lambda w, h: checkpoint_name(h @ w, "z"))

    @whole
    def f(params, x):
        return head(params["out"], second(params["mid"], first(params["in"], x)))

    return jnp.mean((f(params, x) - y) ** 2)


def by_hand(params, projections, x, y, **kwargs):
    h1 = jnp.tanh(x @ params["in"])
    h2 = jnp.tanh(detach(h1) @ params["mid"])
    z = direct_feedback(detach(h2) @ params["out"], {"h1": h1, "h2": h2}, projections, **kwargs)
    return jnp.mean((z - y) ** 2)


LOSS = with_direct_feedback(mlp, ("h1", "h2"), "z")


def gradient(loss, *args, **kwargs):
    return jax.jit(lambda *args: jax.grad(loss)(*args, **kwargs))(*args)


@functools.cache
def expected():
    return gradient(by_hand, PARAMS, P, X, Y)


# By hand


WRAPS = {
    "nothing": {},
    "jit": {"wrap": jax.jit},
    "remat": {"wrap": jax.checkpoint},
    "remat that saves names": {
        "wrap": functools.partial(
            jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("h1")
        )
    },
    "remat of two operands": {"wrap": functools.partial(jax.checkpoint, prevent_cse=(True, False))},
    "one jit around all": {"whole": jax.jit},
    "one remat around all, jits inside": {"wrap": jax.jit, "whole": jax.checkpoint},
    "vmap": {"wrap": lambda f: jax.vmap(f, (None, 0))},
    "donating jit": {"wrap": functools.partial(jax.jit, donate_argnums=1)},
}


@pytest.mark.parametrize("wraps", WRAPS)
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_it_is_direct_feedback_written_by_hand(wraps):
    loss = with_direct_feedback(functools.partial(mlp, **WRAPS[wraps]), ("h1", "h2"), "z")
    # What remat computes again may round in another way, as it does with JAX 0.11.
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if "remat" in wraps else {"rtol": 0}
    chex.assert_trees_all_close(gradient(loss, PARAMS, P, X, Y), expected(), **tolerance)


def test_the_value_is_the_functions():
    chex.assert_trees_all_equal(jax.jit(LOSS)(PARAMS, P, X, Y), jax.jit(mlp)(PARAMS, X, Y))


def test_signs_are_sent_as_by_hand():
    loss = with_direct_feedback(mlp, ("h1", "h2"), "z", error="sign")
    actual = gradient(loss, PARAMS, P, X, Y)
    by_signs = functools.partial(by_hand, error="sign")
    chex.assert_trees_all_equal(actual, gradient(by_signs, PARAMS, P, X, Y))


def test_a_target_is_sent_as_direct_target_sends_it():
    loss = with_direct_feedback(mlp, ("h1", "h2"), target=lambda params, x, y: y)

    def drtp(params, x, y):
        h1 = soap_jax.direct_target(jnp.tanh(x @ params["in"]), y, P["h1"])
        h2 = soap_jax.direct_target(jnp.tanh(h1 @ params["mid"]), y, P["h2"])
        return jnp.mean((h2 @ params["out"] - y) ** 2)

    assert jax.tree.map(jnp.shape, init_projections(KEY, loss, PARAMS, X, Y)) == {
        "h1": (OUT, WIDTH),
        "h2": (OUT, 6),
    }
    chex.assert_trees_all_equal(gradient(loss, PARAMS, P, X, Y), gradient(drtp, PARAMS, X, Y))


def test_a_tap_without_a_projection_is_not_cut():
    backprop = gradient(mlp, PARAMS, X, Y)
    for projections in (None, {"h1": None, "h2": None}):
        chex.assert_trees_all_equal(gradient(LOSS, PARAMS, projections, X, Y), backprop)

    def only_h1(params):
        h1 = jnp.tanh(X @ params["in"])
        z = jnp.tanh(detach(h1) @ params["mid"]) @ params["out"]
        return jnp.mean((direct_feedback(z, h1, P["h1"]) - Y) ** 2)

    actual = gradient(LOSS, PARAMS, P | {"h2": None}, X, Y)
    chex.assert_trees_all_equal(actual, gradient(only_h1, PARAMS))


def test_all_uses_of_a_named_value_are_cut_also_the_identity():
    """A residual stream that is named after each sum: no error passes the stream."""

    def stream(params, x, y):
        s = checkpoint_name(x @ params["in"], "s0")
        s = checkpoint_name(s + jnp.tanh(s @ params["u"]), "s1")
        z = checkpoint_name(jnp.tanh(s) @ params["out"] + s @ params["skip"], "z")
        return jnp.mean((z - y) ** 2) + 0.1 * jnp.mean(z)  # the output is used twice

    def hand(params, projections):
        s0 = X @ params["in"]
        s1 = detach(s0) + jnp.tanh(detach(s0) @ params["u"])
        z = jnp.tanh(detach(s1)) @ params["out"] + detach(s1) @ params["skip"]
        z = direct_feedback(z, {"s0": s0, "s1": s1}, projections)
        return jnp.mean((z - Y) ** 2) + 0.1 * jnp.mean(z)

    params = {"in": draw(1, IN, 4), "u": draw(2, 4, 4), "out": draw(3, 4, 2), "skip": draw(4, 4, 2)}
    loss = with_direct_feedback(stream, ("s0", "s1"), "z")
    projections = init_projections(KEY, loss, params, X, Y)
    actual = gradient(loss, params, projections, X, Y)
    chex.assert_trees_all_equal(actual, gradient(hand, params, projections))


def test_other_outputs_and_keyword_arguments_pass_through():
    def loss(params, x, *, y, mode):
        h1 = jnp.tanh(x @ params["in"])
        aux = {"before": h1, "mode": mode}
        h1 = checkpoint_name(h1, "h1")
        h2 = checkpoint_name(jnp.tanh(h1 @ params["mid"]), "h2")
        z = checkpoint_name(h2 @ params["out"], "z")
        return jnp.mean((z - y) ** 2), aux | {"z": z}

    loss_dfa = with_direct_feedback(loss, ["h1", "h2"], "z")
    both = functools.partial(jax.grad(loss_dfa, has_aux=True), y=Y, mode="train")
    grads, aux = both(PARAMS, P, X)
    chex.assert_trees_all_close(grads, expected(), rtol=1e-5, atol=1e-6)  # not jitted
    assert aux["mode"] == "train" and aux["z"].shape == (BATCH, OUT)
    assert init_projections(KEY, loss_dfa, PARAMS, X, y=Y, mode="train").keys() == P.keys()


def test_a_model_without_its_loss_will_do():
    def model(params, x):
        h1 = checkpoint_name(jnp.tanh(x @ params["in"]), "h1")
        h2 = checkpoint_name(jnp.tanh(h1 @ params["mid"]), "h2")
        return checkpoint_name(h2 @ params["out"], "z")

    apply_fn = with_direct_feedback(model, ("h1", "h2"), "z")

    def loss(params):
        return jnp.mean((apply_fn(params, P, X) - Y) ** 2)

    chex.assert_trees_all_equal(gradient(loss, PARAMS), expected())


def test_projections_get_no_gradient():
    bars = jax.jit(jax.grad(LOSS, argnums=1))(PARAMS, P, X, Y)
    chex.assert_trees_all_equal(bars, jax.tree.map(jnp.zeros_like, P))


def test_several_outputs_are_several_transforms():
    def loss(params, x, y):
        h1 = checkpoint_name(jnp.tanh(x @ params["in"]), "h1")
        z1 = checkpoint_name(h1 @ params["early"], "z1")
        h2 = checkpoint_name(jnp.tanh(h1 @ params["mid"]), "h2")
        z2 = checkpoint_name(h2 @ params["out"], "z2")
        return jnp.mean((z1 - y) ** 2) + jnp.mean((z2 - y) ** 4)

    def hand(params, p):
        h1 = jnp.tanh(X @ params["in"])
        z1 = direct_feedback(detach(h1) @ params["early"], h1, p["h1"])
        h2 = jnp.tanh(detach(h1) @ params["mid"])
        z2 = direct_feedback(detach(h2) @ params["out"], h2, p["h2"])
        return jnp.mean((z1 - Y) ** 2) + jnp.mean((z2 - Y) ** 4)

    params = PARAMS | {"early": draw(9, WIDTH, OUT)}
    outer = with_direct_feedback(with_direct_feedback(loss, "h1", "z1"), "h2", "z2")
    actual = gradient(outer, params, {"h2": P["h2"]}, {"h1": P["h1"]}, X, Y)
    chex.assert_trees_all_equal(actual, gradient(hand, params, P))


# Under other transformations


def test_vmap_over_projections_is_a_loop():
    several = jax.vmap(lambda key: init_projections(key, LOSS, PARAMS, X, Y))(
        jax.random.split(KEY, 3)
    )
    actual = jax.jit(jax.vmap(jax.grad(LOSS), (None, 0, None, None)))(PARAMS, several, X, Y)
    step = jax.jit(jax.grad(LOSS))
    expected = [step(PARAMS, jax.tree.map(lambda p, i=i: p[i], several), X, Y) for i in range(3)]
    expected = jax.tree.map(lambda *grads: jnp.stack(grads), *expected)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_per_example_under_vmap_is_that_of_the_batch():
    def of_one(params, projections, x, y):
        return jax.vmap(LOSS, (None, None, 0, 0))(params, projections, x, y).mean()

    chex.assert_trees_all_equal(gradient(of_one, PARAMS, P, X, Y), expected())
    projections = init_projections(KEY, LOSS, PARAMS, X[0], Y[0])
    chex.assert_trees_all_equal(projections, init_projections(KEY, LOSS, PARAMS, X, Y))


def test_it_may_close_over_what_is_traced_outside():
    def loss(params, projections, x, y):
        inner = with_direct_feedback(lambda params: mlp(params, x, y), ("h1", "h2"), "z")
        return inner(params, projections)

    chex.assert_trees_all_equal(gradient(loss, PARAMS, P, X, Y), expected())


def test_errors_inside_a_block_go_through_feedback_if_one_wishes():
    def loss(params, x, y):
        h = checkpoint_name(jnp.tanh(x @ params["in"]) @ params["mid"], "h")
        return jnp.mean((checkpoint_name(jnp.tanh(h) @ params["out"], "z") - y) ** 2)

    def hand(params, projections, b, x, y):
        h = soap_jax.ops.feedback_dense(jnp.tanh(x @ params["in"]), params["mid"], b)
        z = direct_feedback(jnp.tanh(detach(h)) @ params["out"], h, projections["h"])
        return jnp.mean((z - y) ** 2)

    both = with_feedback(with_direct_feedback(loss, "h", "z"))
    projections, b = {"h": P["h2"]}, draw(8, WIDTH, 6)
    feedback = {"in": None, "mid": b, "out": None}
    actual = gradient(both, PARAMS, feedback, projections, X, Y)
    expected = gradient(hand, PARAMS, projections, b, X, Y)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_errors_of_layers_are_those_of_direct_feedback():
    actual = jax.jit(layer_errors(LOSS))(PARAMS, None, P, X, Y)
    backprop = jax.jit(layer_errors(mlp))(PARAMS, None, X, Y)
    e = np.asarray(backprop["out"])
    h2 = np.tanh(np.tanh(X @ PARAMS["in"]) @ PARAMS["mid"])
    np.testing.assert_allclose(actual["mid"], e @ P["h2"] * (1 - h2**2), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(actual["out"], e)


@pytest.mark.parametrize("mode", ["bfloat16", "x64", "strict"])
def test_dtypes_are_kept(mode):
    dtype = {"bfloat16": jnp.bfloat16, "x64": jnp.float64, "strict": jnp.float32}[mode]
    with jax.enable_x64(mode == "x64"), jax.numpy_dtype_promotion("strict"):
        args = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), dtype), (PARAMS, X, Y))
        projections = init_projections(KEY, LOSS, *args)
        assert {p.dtype for p in jax.tree.leaves(projections)} == {jnp.dtype("float32")}
        actual = gradient(LOSS, args[0], projections, *args[1:])
        chex.assert_trees_all_equal(actual, gradient(by_hand, args[0], projections, *args[1:]))
        assert {g.dtype for g in jax.tree.leaves(actual)} == {jnp.dtype(dtype)}


def test_a_batch_of_integers():
    def loss(params, tokens):
        h = checkpoint_name(params["embed"][tokens], "h")
        z = checkpoint_name(h @ params["out"], "z")
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), tokens[..., None] % OUT, -1))

    params, tokens = {"embed": draw(0, 9, 6), "out": PARAMS["out"]}, jnp.arange(8).reshape(2, 4)
    loss_dfa = with_direct_feedback(loss, "h", "z")
    projections = init_projections(KEY, loss_dfa, params, tokens)
    assert projections["h"].shape == (OUT, 6)
    assert np.all(np.any(gradient(loss_dfa, params, projections, tokens)["embed"][:8] != 0, -1))


# Projections


def test_projections_are_drawn_as_for_activations_by_hand():
    h1, h2, z = (jax.ShapeDtypeStruct((BATCH, n), jnp.float32) for n in (WIDTH, 6, OUT))
    hand = direct.draw_projections(KEY, z, {"h1": h1, "h2": h2})
    shapes = jax.eval_shape(lambda *args: args, PARAMS, X, Y)
    chex.assert_trees_all_equal(init_projections(KEY, LOSS, *shapes), hand)


def test_keys_stand_for_their_projections():
    stored = init_projections(KEY, LOSS, PARAMS, X, Y)
    keys = init_projections(KEY, LOSS, PARAMS, X, Y, stored=False)
    assert all(jnp.issubdtype(key.dtype, jax.dtypes.prng_key) for key in keys.values())
    actual, expected = (gradient(LOSS, PARAMS, p, X, Y) for p in (keys, stored))
    chex.assert_trees_all_equal(actual, expected)


@pytest.mark.parametrize("kind", ["sparse", "low_rank"])
def test_projections_are_drawn_by_the_given_initializer(kind):
    initializers = soap_jax.initializers
    mine = initializers.sparse(0.5, axis=-2) if kind == "sparse" else initializers.low_rank(1)
    loss = with_direct_feedback(mlp, ("h1", "h2"), "z", initializer=mine)
    stored = init_projections(KEY, loss, PARAMS, X, Y)
    hand = direct.draw_projections(KEY, Y, {"h1": X @ PARAMS["in"]}, initializer=mine)
    chex.assert_trees_all_equal(stored["h1"], hand["h1"])
    keys = init_projections(KEY, loss, PARAMS, X, Y, stored=False)
    actual, expected = (gradient(loss, PARAMS, p, X, Y) for p in (keys, stored))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)  # drawn in another program


def project(p, error, shape, key):
    del key
    return (error @ p).reshape(shape)


def test_a_function_stands_for_a_projection():
    device = jax.tree_util.Partial(project, P["h2"])  # an argument of jit
    actual = gradient(LOSS, PARAMS, {"h1": P["h1"], "h2": device}, X, Y)
    chex.assert_trees_all_equal(actual, expected())


def test_a_callback_to_a_device_stands_for_a_projection():
    def on_device(error, shape, key):
        del key
        out = jax.ShapeDtypeStruct(shape, error.dtype)
        return jax.pure_callback(lambda e: np.asarray(e) @ np.asarray(P["h2"]), out, error)

    actual = jax.jit(lambda params: jax.grad(LOSS)(params, {"h1": P["h1"], "h2": on_device}, X, Y))(
        PARAMS
    )
    chex.assert_trees_all_close(actual, expected(), rtol=1e-5, atol=1e-6)


def test_noise_comes_with_the_key_and_differs_by_tap():
    def noisy(error, shape, key):
        del error
        return jax.random.normal(key, shape)

    def loss(params, x):  # the gradient by `params` is what arrives
        h1 = checkpoint_name(x + params["a"], "h1")
        h2 = checkpoint_name(h1 + params["b"], "h2")
        return checkpoint_name(h2, "z").sum()

    @jax.jit
    def noise(key):
        projections = {"h1": noisy, "h2": noisy}
        loss_dfa = with_direct_feedback(loss, ("h1", "h2"), "z")
        return jax.grad(loss_dfa)({"a": X, "b": X}, projections, X, projection_key=key)

    one, again, other = noise(KEY), noise(KEY), noise(jax.random.key(1))
    chex.assert_trees_all_equal(one, again)
    assert np.all(one["a"] != one["b"]) and np.all(one["a"] != other["a"])


# Scans


BLOCKS = {"blocks": draw(1, 6, IN, IN), "out": draw(2, IN, OUT)}
STACK = draw(3, 6, OUT, IN)


def stack(params, x, y, wrap=same, chunks=None, **options):
    def block(h, w):
        return wrap(lambda w, h: checkpoint_name(jnp.tanh(h @ w), "block"))(w, h), None

    def chunk(h, ws):
        return lax.scan(block, h, ws, **options)[0], None

    blocks = params["blocks"]
    if chunks:
        blocks = blocks.reshape(chunks, -1, IN, IN)
    h, _ = lax.scan(jax.checkpoint(chunk) if chunks else block, x, blocks, **options)
    return jnp.mean((checkpoint_name(h @ params["out"], "z") - y) ** 2)


def stack_by_hand(params, projections, x, y, **options):
    def block(h, w):
        h = jnp.tanh(h @ w)
        return detach(h), h

    h, hs = lax.scan(block, x, params["blocks"], **options)
    z = direct_feedback(h @ params["out"], hs, projections["block"], stacked=True)
    return jnp.mean((z - y) ** 2)


@pytest.mark.parametrize("case", ["plain", "remat", "reverse", "in chunks"])
def test_blocks_of_a_scan_have_a_projection_each(case):
    options = {"reverse": True, "unroll": 2} if case == "reverse" else {}
    mine = {"wrap": jax.checkpoint} if case == "remat" else {}
    mine |= {"chunks": 2} if case == "in chunks" else {}
    loss = functools.partial(stack, **mine, **options)
    loss_dfa = with_direct_feedback(loss, "block", "z", stacked="blocks")
    projections = init_projections(KEY, loss_dfa, BLOCKS, X, Y)
    assert projections["block"].shape == (6, OUT, IN)
    hand = direct.draw_projections(KEY, Y, {"block": jnp.ones((6, BATCH, IN))}, stacked=True)
    chex.assert_trees_all_equal(projections, hand)
    actual = gradient(loss_dfa, BLOCKS, {"block": STACK}, X, Y)
    by_hand = functools.partial(stack_by_hand, **options)
    chex.assert_trees_all_equal(actual, gradient(by_hand, BLOCKS, {"block": STACK}, X, Y))


def test_a_loop_of_a_fixed_number_of_rounds_is_a_scan():
    def loss(params, x, y):
        h = lax.fori_loop(
            0, 6, lambda i, h: checkpoint_name(jnp.tanh(h @ params["blocks"][i]), "block"), x
        )
        return jnp.mean((checkpoint_name(h @ params["out"], "z") - y) ** 2)

    loss_dfa = with_direct_feedback(loss, "block", "z", stacked="blocks")
    actual = gradient(loss_dfa, BLOCKS, {"block": STACK}, X, Y)
    expected = gradient(stack_by_hand, BLOCKS, {"block": STACK}, X, Y)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


RECURRENT = {"in": draw(1, IN, 4), "u": draw(2, 4, 4), "out": draw(3, 4, OUT)}
XS, YS = draw(4, STEPS, BATCH, IN), draw(5, STEPS, BATCH, OUT)
ONE = {"h": draw(6, OUT, 4)}


def cell(params, h, x):
    return jnp.tanh(x @ params["in"] + h @ params["u"])


def each_step(params, xs, ys):
    def step(h, x):
        h = checkpoint_name(cell(params, h, x), "h")
        return h, checkpoint_name(h @ params["out"], "z")

    return jnp.mean((lax.scan(step, jnp.zeros((BATCH, 4)), xs)[1] - ys) ** 2)


def unrolled(params, projections, xs, ys, **kwargs):
    """Every step by itself, its state detached."""
    h, loss = jnp.zeros((BATCH, 4)), 0.0
    for x, y in zip(xs, ys, strict=True):
        h = cell(params, detach(h), x)
        z = direct_feedback(detach(h) @ params["out"], h, projections["h"], **kwargs)
        loss += jnp.mean((z - y) ** 2) / len(xs)
    return loss


@pytest.mark.parametrize("error", ["exact", "sign"])
def test_a_tap_and_an_output_in_one_body_pair_step_by_step(error):
    loss_dfa = with_direct_feedback(each_step, "h", "z", error=error)
    chex.assert_shape(init_projections(KEY, loss_dfa, RECURRENT, XS, YS)["h"], (OUT, 4))
    rows = {} if error == "exact" else {"rows": STEPS * BATCH}
    by_hand = functools.partial(unrolled, error=error, **rows)
    actual = gradient(loss_dfa, RECURRENT, ONE, XS, YS)
    expected = gradient(by_hand, RECURRENT, ONE, XS, YS)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_steps_that_are_read_out_after_the_scan_get_their_own_errors():
    """The output has the steps as an axis: `stacked` is its number."""

    def loss(axis, params, xs, ys):
        def step(h, x):
            return (checkpoint_name(cell(params, h, x), "h"),) * 2

        hs = jnp.moveaxis(lax.scan(step, jnp.zeros((BATCH, 4)), xs)[1], 0, axis)
        return jnp.mean((checkpoint_name(hs @ params["out"], "z") - ys) ** 2)

    loss_dfa = with_direct_feedback(each_step, "h", "z")
    expected = gradient(loss_dfa, RECURRENT, ONE, XS, YS)
    for axis in (0, 1):
        loss_dfa = with_direct_feedback(functools.partial(loss, axis), "h", "z", stacked=axis)
        ys = jnp.moveaxis(YS, 0, axis)
        chex.assert_shape(init_projections(KEY, loss_dfa, RECURRENT, XS, ys)["h"], (OUT, 4))
        actual = gradient(loss_dfa, RECURRENT, ONE, XS, ys)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def at_the_end(params, xs, y):
    def step(h, x):
        return checkpoint_name(cell(params, h, x), "h"), None

    h, _ = lax.scan(step, jnp.zeros((BATCH, 4)), xs)
    return jnp.mean((checkpoint_name(h @ params["out"], "z") - y) ** 2)


@pytest.mark.parametrize("send", ["error", "target"])
def test_all_steps_get_the_same_error_through_one_projection(send):
    def by_hand(params, projections, xs, y):
        def step(h, x):
            h = cell(params, h, x)
            return detach(h), h

        h, hs = lax.scan(step, jnp.zeros((BATCH, 4)), xs)
        hs, target = jnp.moveaxis(hs, 0, 1), {"target": y} if send == "target" else {}
        z = direct_feedback(h @ params["out"], hs, projections["h"], **target)
        return jnp.mean((z - y) ** 2)

    what = {"output": "z"} if send == "error" else {"target": lambda params, xs, y: y}
    loss_dfa = with_direct_feedback(at_the_end, "h", **what, stacked="time")
    chex.assert_shape(init_projections(KEY, loss_dfa, RECURRENT, XS, Y)["h"], (OUT, 4))
    actual = gradient(loss_dfa, RECURRENT, ONE, XS, Y)
    chex.assert_trees_all_equal(actual, gradient(by_hand, RECURRENT, ONE, XS, Y))


def test_what_is_tapped_before_a_scan_gets_the_errors_of_all_its_outputs():
    def loss(params, x, ys):
        h = checkpoint_name(jnp.tanh(x @ params["in"]), "start")

        def step(h, _):
            h = checkpoint_name(jnp.tanh(h @ params["u"]), "h")
            return h, checkpoint_name(h @ params["out"], "z")

        return jnp.mean((lax.scan(step, h, None, STEPS)[1] - ys) ** 2)

    def by_hand(params, projections, x, ys):
        start = h = jnp.tanh(x @ params["in"])
        loss = 0.0
        for y in ys:
            h = jnp.tanh(detach(h) @ params["u"])
            z = direct_feedback(detach(h) @ params["out"], {"start": start, "h": h}, projections)
            loss += jnp.mean((z - y) ** 2) / STEPS
        return loss

    projections = {"start": draw(7, OUT, 4), **ONE}
    loss_dfa = with_direct_feedback(loss, ("start", "h"), "z")
    actual = gradient(loss_dfa, RECURRENT, projections, X, YS)
    expected = gradient(by_hand, RECURRENT, projections, X, YS)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_noise_differs_by_step():
    def noisy(error, shape, key):
        del error
        return jax.random.normal(key, shape)

    def loss(offsets):
        def step(h, offset):
            h = checkpoint_name(h + offset, "h")
            return h, checkpoint_name(h, "z").sum()

        return lax.scan(step, jnp.zeros((BATCH, 4)), offsets)[1].sum()

    loss_dfa = with_direct_feedback(loss, "h", "z")
    found = jax.jit(lambda offsets: jax.grad(loss_dfa)(offsets, {"h": noisy}, projection_key=KEY))(
        jnp.zeros((STEPS, BATCH, 4))
    )
    assert len(np.unique(found)) == found.size


# Bad input


def test_projections_that_do_not_fit_are_named_with_the_taps_lines():
    with pytest.raises(
        ValueError, match=r"at \['h2'\] has shape \(2, 4\).*'h2' at .*test_transfor"
    ):
        LOSS(PARAMS, {"h1": P["h1"], "h2": P["h1"]}, X, Y)
    for wrong in (P["h1"], {"h1": P["h1"]}, P | {"h3": P["h1"]}):
        with pytest.raises(ValueError, match=r"expected a mapping with .* \('h1', 'h2'\)"):
            LOSS(PARAMS, wrong, X, Y)


@pytest.mark.parametrize(
    "returned", [lambda e, s: e, lambda e, s: None, lambda e, s: jnp.ones(s, complex)]
)
def test_a_function_that_returns_something_else_is_refused(returned):
    def device(error, shape, key):
        del key
        return returned(error, shape)

    with pytest.raises(ValueError, match=r"at \['h2'\], a function, returned .* \(5, 6\)"):
        jax.grad(LOSS)(PARAMS, {"h1": P["h1"], "h2": device}, X, Y)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"taps": ()}, "at least one tap"),
        ({"taps": ("h", "h")}, "different names"),
        ({"taps": "z"}, "different names"),
        ({"taps": (3,)}, "different names"),
        ({"output": None}, "or a function of fun's arguments"),
        ({"target": lambda *args: X}, "only a function of fun"),
        ({"output": None, "target": X}, "function of fun's arguments"),
        ({"output": None, "target": lambda *args: X, "error": "sign"}, "only a function"),
        ({"error": "signs"}, "'exact' .* or 'sign'"),
        ({"stacked": "layers"}, "'blocks' .* 'time'"),
        ({"stacked": -1}, "the output's axis"),
        ({"stacked": True}, "the output's axis"),
        ({"stacked": {"other": "time"}}, "mapping from taps"),
    ],
)
def test_bad_arguments_are_refused_at_once(kwargs, message):
    with pytest.raises(ValueError, match=message):
        with_direct_feedback(mlp, **{"taps": "h", "output": "z"} | kwargs)


def test_projections_are_drawn_for_nothing_else():
    with pytest.raises(ValueError, match="expected the result of with_direct_feed"):
        init_projections(KEY, mlp, PARAMS, X, Y)
