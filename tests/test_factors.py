"""Feedback as a product of factors: PFA and LDFA."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx
from flax import serialization
from jax.sharding import NamedSharding, PartitionSpec

import soap_jax
from soap_jax import (
    factors,
    initializers,
    linen,
    local,
    metrics,
    nnx,
    ops,
    optimizers,
    training,
)
from soap_jax.factors import LowRank, Product

KINDS = {
    "PFA": initializers.product(3),
    "PFA, orthogonal": initializers.product(orthogonal=True),
    "LDFA": initializers.low_rank(5, as_factors=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {"w1": draw(1, 8, 16) / 3, "w2": draw(2, 16, 12) / 4, "w3": draw(3, 12, 5) / 3}
X, Y = draw(4, 7, 8), draw(5, 7, 5)


def loss(params, x, y):
    x = jnp.tanh(jnp.tanh(x @ params["w1"]) @ params["w2"])
    return jnp.mean((x @ params["w3"] - y) ** 2)


def loss_by_ops(params, feedback, x, y):
    layer = functools.partial(ops.feedback_dense, feedback_bar="kernel")
    x = jnp.tanh(layer(jnp.tanh(x @ params["w1"]), params["w2"], feedback["w2"]))
    return jnp.mean((layer(x, params["w3"], feedback["w3"]) - y) ** 2)


def start(kind, params=PARAMS):
    where = ["w2", "w3"]
    return soap_jax.init_feedback(jax.random.key(0), params, where=where, initializer=KINDS[kind])


def numpy_step(params, feedback, x, y):
    """The gradients of one step by params, w2's and w3's feedback, without JAX."""
    p = {name: np.asarray(w, np.float64) for name, w in params.items()}
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    h1 = np.tanh(x @ p["w1"])
    h2 = np.tanh(h1 @ p["w2"])
    error = 2 * (h2 @ p["w3"] - y) / y.size
    bars, learnt = {}, {}
    for name, below in (("w3", h2), ("w2", h1)):
        left, right = (np.asarray(f, np.float64) for f in feedback[name])
        bars[name] = below.T @ error
        passed = below.T @ (error @ right.T)
        oja = passed.T @ passed @ right - passed.T @ bars[name]
        is_fixed = isinstance(feedback[name], Product)
        learnt[name] = passed, 0 * right if is_fixed else oja / (bars[name] ** 2).sum()
        error = error @ right.T @ left.T * (1 - below**2)
    bars["w1"] = x.T @ error
    return bars, learnt


@pytest.mark.parametrize("road", ["with_feedback", "ops"])
@every_kind
def test_one_step_is_that_of_numpy(kind, road):
    by_transform = soap_jax.with_feedback(loss, feedback_bar="kernel")
    f = by_transform if road == "with_feedback" else loss_by_ops
    feedback = start(kind).feedback
    bars, learnt = jax.jit(jax.grad(f, argnums=(0, 1)))(PARAMS, feedback, X, Y)
    expected, own = numpy_step(PARAMS, feedback, X, Y)
    for name, bar in expected.items():
        np.testing.assert_allclose(bars[name], bar, rtol=1e-4, atol=1e-6)
    for name, (left, right) in own.items():
        assert type(learnt[name]) is type(feedback[name])
        np.testing.assert_allclose(learnt[name].left, left, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(learnt[name].right, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [LowRank, Product])
def test_factors_of_the_kernels_are_backprop(kind):
    def split(w):
        u, s, v = np.linalg.svd(w, full_matrices=False)
        return kind(jnp.asarray(u * s), jnp.asarray(v))

    feedback = {"w1": None, "w2": split(PARAMS["w2"]), "w3": split(PARAMS["w3"])}
    exact = jax.grad(loss)(PARAMS, X, Y)
    for f in (soap_jax.with_feedback(loss), loss_by_ops):
        got = jax.grad(f)(PARAMS, feedback, X, Y)
        chex.assert_trees_all_close(got, exact, rtol=1e-4, atol=1e-6)


@every_kind
def test_feedback_meets_its_kernels_by_weight_decay(kind):
    """What both gain is alike, though the kernels are never seen."""
    target = draw(6, 8, 5)
    x = draw(7, 256, 8)
    y = jnp.tanh(x @ target)
    optimizer = optimizers.hold_fixed(optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.2)))
    loss_fa = soap_jax.with_feedback(loss, feedback_bar="kernel")
    step = training.make_gradient_step(
        lambda params, feedback, batch, step: jax.value_and_grad(loss_fa, (0, 1))(
            params, feedback, *batch
        ),
        optimizer,
        learn_feedback=True,
    )
    state = training.init_train_state(PARAMS, optimizer, feedback=start(kind), learn_feedback=True)
    right = state.feedback.feedback["w3"].right
    state, _ = jax.jit(
        lambda state: jax.lax.scan(lambda s, _: step(s, (x, y)), state, None, length=3000)
    )(state)
    feedback = state.feedback.feedback
    angles = metrics.weight_angle(state.params, feedback)
    below = {"PFA": 35, "PFA, orthogonal": 10, "LDFA": 50}[kind]  # PFA: atan(1 / sqrt(3)) is 30
    assert max(float(angles[name]) for name in ("w2", "w3")) < below
    if kind.startswith("PFA"):
        chex.assert_trees_all_equal(feedback["w3"].right, right)
    else:  # Oja's rule: orthonormal rows, but for what decay takes
        gram = feedback["w2"].right @ feedback["w2"].right.T
        np.testing.assert_allclose(gram, np.eye(5), atol=0.1)


def test_oja_finds_the_main_directions_of_a_gradient():
    basis = jnp.linalg.qr(draw(0, 6, 6))[0]
    bar = draw(1, 40, 6) * jnp.array([[3.0, 2.0, 0.3, 0.2, 0.1, 0.1]]) @ basis.T
    feedback = LowRank(draw(2, 40, 2), jnp.linalg.qr(draw(3, 6, 2))[0].T)

    def step(feedback, _):
        (own,) = jax.vjp(factors.as_array, feedback)[1](bar)
        return feedback._replace(right=feedback.right - 0.2 * own.right), None

    feedback, _ = jax.lax.scan(step, feedback, None, 2000)
    np.testing.assert_allclose(feedback.right @ feedback.right.T, np.eye(2), atol=1e-4)
    main = jnp.linalg.svd(bar)[2][:2]
    overlap = jnp.linalg.svd(feedback.right @ main.T, compute_uv=False)
    np.testing.assert_allclose(overlap, 1, atol=1e-3)


def test_a_gradient_of_zeros_moves_nothing():
    feedback = LowRank(draw(0, 6, 2), draw(1, 2, 4))
    (own,) = jax.vjp(factors.as_array, feedback)[1](jnp.zeros((6, 4)))
    chex.assert_trees_all_equal(own, jax.tree.map(jnp.zeros_like, own))


@pytest.mark.parametrize("strides", [1, 2])
@every_kind
def test_convolutions_by_ops_and_by_their_product_agree(kind, strides):
    x, kernel = draw(0, 2, 6, 6, 3), draw(1, 3, 3, 3, 5)
    feedback = KINDS[kind](jax.random.key(2), kernel.shape)

    def by_ops(x, kernel, feedback):
        y = ops.feedback_conv(x, kernel, feedback, strides=strides, feedback_bar="kernel")
        return jnp.sum(jnp.sin(y))

    def plain(params, x):
        own = {"window_strides": (strides, strides), "padding": "SAME"}
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, params["w"], dimension_numbers=numbers, **own)
        return jnp.sum(jnp.sin(y))

    got = jax.grad(by_ops, argnums=(0, 1, 2))(x, kernel, feedback)
    scale = {"w": kernel, "scale": jnp.ones((1, 1, 1, 3))}
    loss_fa = soap_jax.with_feedback(
        lambda params, x: plain(params, x * params["scale"]), feedback_bar="kernel"
    )
    bars, own = jax.grad(loss_fa, (0, 1))(scale, {"w": feedback, "scale": None}, x)
    of_scale = jnp.sum(got[0] * x, (0, 1, 2), keepdims=True)
    np.testing.assert_allclose(bars["scale"], of_scale, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(bars["w"], got[1], rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(own["w"], got[2], rtol=1e-3, atol=1e-3)


@every_kind
def test_grouped_convolutions_and_einsums_take_the_product(kind):
    feedback = KINDS[kind](jax.random.key(2), (3, 3, 2, 6))
    x, kernel = draw(0, 2, 6, 6, 4), draw(1, 3, 3, 2, 6)
    f = functools.partial(ops.feedback_conv, feature_group_count=2)

    def gradient(feedback):
        return jax.grad(lambda x: jnp.sum(jnp.sin(f(x, kernel, feedback))))(x)

    chex.assert_trees_all_close(gradient(feedback), gradient(factors.as_array(feedback)), rtol=1e-5)


@every_kind
def test_a_layer_of_linen_takes_factors(kind):
    layer = linen.FeedbackDense(5, feedback_bar="kernel")
    x = draw(0, 7, 12)
    params = layer.init(jax.random.key(0), x)["params"]
    feedback = {"kernel": KINDS[kind](jax.random.key(1), (12, 5)), "bias": None}

    def f(x, params, feedback):
        variables = {"params": params, "feedback": {"kernel": feedback["kernel"]}}
        return jnp.sum(jnp.sin(layer.apply(variables, x)))

    def by_ops(x, params, feedback):
        y = ops.feedback_dense(x, params["kernel"], feedback["kernel"], feedback_bar="kernel")
        return jnp.sum(jnp.sin(y + params["bias"][None]))

    got, expected = (jax.grad(g, (0, 1, 2))(x, params, feedback) for g in (f, by_ops))
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


@every_kind
def test_a_layer_of_nnx_takes_factors(kind):
    layer = nnx.FeedbackLinear(12, 5, feedback_bar="kernel", rngs=flax_nnx.Rngs(0))
    own, x = KINDS[kind](jax.random.key(1), (12, 5)), draw(0, 7, 12)
    graph, state = flax_nnx.split(layer)

    def f(x, own):
        layer = flax_nnx.merge(graph, state)
        layer.feedback = nnx.Feedback(own)
        return jnp.sum(jnp.sin(layer(x)))

    def by_ops(x, own):
        y = ops.feedback_dense(x, layer.kernel[...], own, feedback_bar="kernel")
        return jnp.sum(jnp.sin(y))

    got, expected = (jax.grad(g, (0, 1))(x, own) for g in (f, by_ops))
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


def test_factors_lie_where_their_kernel_lies(explicit_mesh):
    device = explicit_mesh.devices.flat[1]
    params = jax.device_put({"w": draw(0, 6, 4)}, device)
    for kind in KINDS.values():
        if kind is KINDS["LDFA"]:
            kind = initializers.low_rank(2, as_factors=True)
        state = soap_jax.init_feedback(jax.random.key(0), params, initializer=kind, where="w")
        adopted = soap_jax.init_feedback(
            jax.random.key(0), params, feedback={"w": kind(jax.random.key(1), (6, 4))}
        )
        for leaf in jax.tree.leaves((state.feedback, adopted.feedback)):
            assert leaf.devices() == {device}


@every_kind
def test_a_state_syncs_saves_and_loads(kind):
    state = start(kind)
    synced = jax.jit(soap_jax.sync_feedback)(PARAMS, state, 3)
    chex.assert_trees_all_equal(synced, state)
    like = jax.tree.map(jnp.zeros_like, state)
    loaded = serialization.from_bytes(like, serialization.to_bytes(state))
    chex.assert_trees_all_equal(loaded, state)
    assert type(loaded.feedback["w2"]) is type(state.feedback["w2"])
    half = soap_jax.init_feedback(
        jax.random.key(0), PARAMS, feedback=state.feedback, dtype=jnp.bfloat16
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.feedback)} == {"bfloat16"}


def test_a_local_loss_reaches_the_factors_by_the_product():
    own = initializers.low_rank(4, as_factors=True)(jax.random.key(0), (12, 5))
    x, kernel = draw(1, 7, 12), draw(2, 12, 5)

    def bar(feedback):
        f = functools.partial(ops.feedback_dense, feedback_bar=local.SymmetricAlignment())
        return jax.grad(lambda feedback: f(x, kernel, feedback).sum())(feedback)

    whole = bar(factors.as_array(own))
    expected = jax.vjp(factors.as_array, own)[1](whole)[0]
    chex.assert_trees_all_close(bar(own), expected, rtol=1e-5, atol=1e-6)


def test_the_draws_are_as_large_as_they_say():
    left, right = initializers.product(10)(jax.random.key(0), (300, 40))
    np.testing.assert_allclose(right.T @ right, np.eye(40), atol=0.25)
    np.testing.assert_allclose(jnp.std(left), (2 / (300 + 400)) ** 0.5, rtol=0.01)
    left, right = initializers.product(orthogonal=True)(jax.random.key(0), (300, 40))
    np.testing.assert_allclose(right.T @ right, np.eye(40), atol=1e-5)
    whole = initializers.low_rank(5, as_factors=True)(jax.random.key(0), (300, 40))
    np.testing.assert_allclose(whole.right @ whole.right.T, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(jnp.std(factors.as_array(whole)), (2 / 340) ** 0.5, rtol=0.05)


def test_what_is_fixed_stays_and_keeps_no_moments():
    feedback = start("PFA").feedback
    optimizer = optimizers.hold_fixed(optax.adamw(0.1, weight_decay=0.1))
    state = optimizer.init((PARAMS, feedback))
    learnt = sum(w.size for w in PARAMS.values())
    learnt += sum(feedback[name].left.size for name in ("w2", "w3"))
    kept = sum(jnp.size(leaf) for leaf in jax.tree.leaves(state))
    assert kept <= 2 * learnt + 10
    gradient = jax.tree.map(jnp.ones_like, (PARAMS, feedback))
    (_, updates), _ = optimizer.update(gradient, state, (PARAMS, feedback))
    assert not jnp.any(updates["w2"].right) and jnp.all(updates["w2"].left)


def test_ops_keep_no_product_for_the_backward_pass():
    """An error passes one factor after the other: nothing of the kernel's shape is made of them."""
    x, kernel = draw(0, 7, 50), draw(1, 50, 40)
    feedback = initializers.product(2)(jax.random.key(0), (50, 40))

    def f(x, feedback):
        return jnp.sum(ops.feedback_dense(x, kernel, feedback, feedback_bar="kernel") ** 2)

    jaxpr = str(jax.make_jaxpr(jax.grad(f, (0, 1)))(x, feedback))
    assert "f32[50,40] = dot_general" not in jaxpr


# What cannot be


def test_a_rule_for_factors_raises():
    for rule in (soap_jax.SignSync(), {"w2": soap_jax.Fixed(), "*": soap_jax.Transport()}):
        with pytest.raises(
            ValueError, match=r"is a Product and its rule .*expected the rule Fixed"
        ):
            soap_jax.init_feedback(
                jax.random.key(0), PARAMS, rule, where=["w2", "w3"], initializer=KINDS["PFA"]
            )


def test_factors_of_another_shape_raise():
    bad = {"w2": LowRank(jnp.ones((16, 3)), jnp.ones((4, 12)))}
    message = (
        r"\['w2'\] is a LowRank of float32\[16, 3\] and float32\[4, 12\]; expected \(16, rank\)"
    )
    with pytest.raises(ValueError, match=message):
        soap_jax.with_feedback(loss)(PARAMS, bad, X, Y)
    with pytest.raises(ValueError, match=r"LowRank of float32\[12, 16\]"):
        ops.feedback_dense(X, PARAMS["w1"], LowRank(jnp.ones((12, 16)), jnp.ones((16, 8))))


def test_a_rank_above_the_smaller_side_raises():
    draw_factors = initializers.low_rank(6, as_factors=True)
    with pytest.raises(ValueError, match="rank is 6; expected at most 5"):
        soap_jax.init_feedback(jax.random.key(0), PARAMS, where="w3", initializer=draw_factors)
    with pytest.raises(ValueError, match="expansion is 0"):
        initializers.product(0)


def test_integers_and_kolen_pollack_refuse_factors():
    with pytest.raises(ValueError, match=r"dtype is int8 and feedback at .* a Product"):
        soap_jax.init_feedback(
            jax.random.key(0), PARAMS, where="w2", initializer=KINDS["PFA"], dtype=jnp.int8
        )
    optimizer = optimizers.kolen_pollack(optax.sgd(0.1), decay=0.1)
    with pytest.raises(ValueError, match="is a Product; expected an array"):
        optimizer.init((PARAMS, start("PFA").feedback))


@pytest.mark.parametrize("kind", [Product, LowRank])
def test_a_function_gets_the_product_and_what_it_returns_reaches_the_factors(kind):
    """Also where an op takes factors in turn; the fixed factor of a Product gets nothing."""
    own = kind(draw(0, 16, 3), draw(1, 3, 12))
    x = draw(2, 4, 16)

    def bar(op, x, kernel, feedback, y_bar):
        assert feedback.shape == kernel.shape
        return feedback - kernel

    def gradient(f):
        return jax.grad(lambda b: f(x, PARAMS["w2"], b, feedback_bar=bar).sum())(own)

    einsum = functools.partial(ops.feedback_einsum, "bi,io->bo")
    expected = jax.vjp(factors.as_array, own)[1](factors.as_array(own) - PARAMS["w2"])[0]
    for f in (ops.feedback_dense, einsum):
        chex.assert_trees_all_close(gradient(f), expected, rtol=1e-5, atol=1e-6)


def test_what_a_function_returns_must_have_the_kernels_shape():
    f = functools.partial(ops.feedback_dense, feedback_bar=lambda *args: jnp.ones(3))
    for own in (PARAMS["w2"], start("LDFA").feedback["w2"]):
        with pytest.raises(ValueError, match=r"returned shape \(3,\); expected an array of shape"):
            jax.grad(lambda b: f(jnp.ones((2, 16)), PARAMS["w2"], b).sum())(own)


@pytest.mark.parametrize("scale", [1e-22, 1e-4, 1.0, 3e4, 1e19])
def test_ojas_rule_holds_at_any_size_of_the_error(scale):
    own, bar = LowRank(draw(0, 6, 2), draw(1, 2, 4)), draw(2, 6, 4)
    expected = jax.vjp(factors.as_array, own)[1](bar)[0].right
    got = jax.vjp(factors.as_array, own)[1](scale * bar)[0]
    np.testing.assert_allclose(got.right, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got.left, scale * bar @ own.right.T, rtol=1e-5)
    half = jax.tree.map(lambda f: f.astype(jnp.float16), own)
    got = jax.vjp(factors.as_array, half)[1]((min(scale, 1e4) * bar).astype(jnp.float16))[0]
    if scale >= 1e-4:
        np.testing.assert_allclose(got.right, expected, rtol=0.1, atol=5e-3)


@every_kind
def test_stacked_kernels_have_factors_of_their_own_when_mapped(kind):
    """Scanned layers: what a layer's factors get is what they would get by themselves."""
    stack = draw(0, 3, 12, 12) / 3
    keys = jax.random.split(jax.random.key(1), 3)
    own = jax.vmap(lambda key: KINDS[kind](key, (12, 12)))(keys)
    params = {"first": draw(2, 8, 12), "stack": stack, "last": draw(3, 12, 5)}
    state = soap_jax.init_feedback(
        jax.random.key(0), params, feedback={"first": None, "stack": own, "last": None}
    )

    def scanned(params, x):
        x, _ = jax.lax.scan(
            lambda x, w: (jnp.tanh(x @ w), None), x @ params["first"], params["stack"]
        )
        return jnp.sum(jnp.sin(x @ params["last"]))

    def unrolled(params, x):
        x = x @ params["first"]
        for w in params["stack"]:
            x = jnp.tanh(x @ w)
        return jnp.sum(jnp.sin(x @ params["last"]))

    grad = jax.grad(soap_jax.with_feedback(scanned, feedback_bar="kernel"), (0, 1))
    got = grad(params, state.feedback, X)
    apart = params | {"stack": list(stack)}
    parts = [type(own)(*layer) for layer in zip(*own, strict=True)]
    grad = jax.grad(soap_jax.with_feedback(unrolled, feedback_bar="kernel"), (0, 1))
    expected = grad(apart, {"first": None, "stack": parts, "last": None}, X)
    chex.assert_trees_all_close(got[0]["first"], expected[0]["first"], rtol=1e-4, atol=1e-5)
    together = jax.tree.map(lambda *f: jnp.stack(f), *expected[1]["stack"])
    chex.assert_trees_all_close(got[1]["stack"], together, rtol=1e-3, atol=1e-4)


@every_kind
def test_factors_are_split_over_a_mesh_as_their_kernels(kind, explicit_mesh):
    axis = explicit_mesh.axis_names[0]

    def put(x, *split):
        return jax.device_put(x, NamedSharding(explicit_mesh, PartitionSpec(*split)))

    for spec in ((axis, None), (None, axis)):
        params = {"w": put(draw(0, 16, 12), *spec)}
        state = soap_jax.init_feedback(
            jax.random.key(0), params, initializer=KINDS[kind], where="w"
        )
        left, right = state.feedback["w"]
        assert left.sharding.spec == PartitionSpec(spec[0], None)
        assert right.sharding.spec == PartitionSpec(None, spec[1])

    def f(x, w, own):
        return jnp.sum(jnp.sin(ops.feedback_dense(x, w, own, feedback_bar="kernel")) ** 2)

    args = draw(1, 8, 16), params["w"], state.feedback["w"]
    expected = jax.grad(f, (0, 2))(*jax.tree.map(np.asarray, args))
    with jax.set_mesh(explicit_mesh):
        got = jax.jit(jax.grad(f, (0, 2)))(*args)
    assert jax.tree.map(lambda leaf: leaf.sharding, got[1]) == jax.tree.map(
        lambda leaf: leaf.sharding, args[2]
    )
    got, expected = jax.tree.map(np.asarray, (got, expected))
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)


def test_factors_of_integers_and_of_complex_numbers_raise():
    with pytest.raises(
        ValueError, match=r"a Product of float32\[16, 3\] and int8\[3, 12\]; expected real"
    ):
        ops.feedback_dense(
            jnp.ones((2, 16)), PARAMS["w2"], Product(jnp.ones((16, 3)), jnp.ones((3, 12), jnp.int8))
        )
    with pytest.raises(ValueError, match=r"dtype is complex64; expected a real floating"):
        initializers.product()(jax.random.key(0), (3, 4), jnp.complex64)


def test_what_takes_no_factors_says_so():
    makes = [
        lambda: initializers.scaled(2.0, KINDS["PFA"])(jax.random.key(0), (4, 3)),
        lambda: initializers.sparse(0.5, KINDS["PFA"], axis=-1)(jax.random.key(0), (4, 3)),
        lambda: linen.FeedbackDense(3, feedback_init=KINDS["PFA"]).init(
            jax.random.key(0), jnp.ones((1, 4))
        ),
        lambda: nnx.FeedbackLinear(4, 3, feedback_init=KINDS["PFA"], rngs=flax_nnx.Rngs(0)),
    ]
    for make in makes:
        with pytest.raises(ValueError, match="returned a Product; expected one that returns an"):
            make()
    with pytest.raises(ValueError, match="is a tuple; expected an array of numbers, or factors"):
        ops.feedback_dense(X, PARAMS["w1"], (jnp.ones((8, 2)), jnp.ones((2, 16))))
    restored = {"w2": {"left": jnp.ones((16, 2)), "right": jnp.ones((2, 12))}}
    with pytest.raises(ValueError, match=r"Factors are a soap_jax.factors.Product or LowRank"):
        soap_jax.with_feedback(loss)(PARAMS, restored, X, Y)
    with pytest.raises(ValueError, match="optimizer is a float; expected an Optax optimiser"):
        optimizers.hold_fixed(0.1)


def test_hold_fixed_serves_optimisers_that_ask_for_the_loss():
    """A line search evaluates the loss of what it would learn."""
    feedback = start("PFA").feedback
    optimizer = optimizers.hold_fixed(optax.lbfgs())

    def value_fn(learnt):
        params, own = learnt
        return loss(params, X, Y) + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(own)) / 100

    learnt = PARAMS, feedback
    state, values = optimizer.init(learnt), []
    for _ in range(3):
        value, grads = jax.value_and_grad(value_fn)(learnt)
        values.append(value)
        updates, state = optimizer.update(
            grads, state, learnt, value=value, grad=grads, value_fn=value_fn
        )
        learnt = optax.apply_updates(learnt, updates)
    assert values[2] < values[1] < values[0]
    chex.assert_trees_all_equal(learnt[1]["w2"].right, feedback["w2"].right)
