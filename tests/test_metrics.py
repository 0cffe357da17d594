"""Alignment metrics: hand-computed tables, NumPy twins, and the angles that theory predicts."""

import functools

import chex
import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import soap_jax
from soap_jax import metrics, ops

ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


# Jitted, since op by op each new shape compiles again.
angle = jax.jit(metrics.angle)
cotangent_angle = jax.jit(metrics.cotangent_angle, static_argnames=("op", "per_example"))
error_angle = jax.jit(metrics.error_angle, static_argnames="per_example")
path_angle = jax.jit(metrics.path_angle)
direct_weight_angle = jax.jit(metrics.direct_weight_angle)
effective_rank = jax.jit(metrics.effective_rank, static_argnames="batch_size")
descent_condition = jax.jit(metrics.descent_condition, static_argnames="op")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def numpy_angle(a, b):
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return np.degrees(np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)))


def as_float64(*trees):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), trees)


# angle


@pytest.mark.parametrize("factor", [1.0, 3.0, 1e-6, 1e6])
@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([3.0, 0.1, -2.0], [3.0, 0.1, -2.0], 0),
        ([3.0, 0.1, -2.0], [-3.0, -0.1, 2.0], 180),
        ([1.0, 0.0, 0.0], [0.0, -1.0, 0.0], 90),
        ([1.0, 0.0, 0.0], [1.0, 1.0, 0.0], 45),
        ([1.0, 0.0, 0.0], [-1.0, 0.0, 3.0**0.5], 120),
        ([1.0, 0.0, 0.0], [3.0**0.5, 0.0, 1.0], 30),
    ],
)
def test_angle_of_known_vectors_at_every_scale(a, b, expected, factor):
    got = angle(jnp.array(a), factor * jnp.array(b))
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_angle_of_a_tensor_to_itself_is_0_and_to_its_negative_180():
    a = normal(0, 37, 11)
    assert float(metrics.angle(a, a)) == 0
    assert float(metrics.angle(a, -a)) == 180
    # jit may multiply and add in one step, which leaves a rounding.
    np.testing.assert_allclose(angle(a, a), 0, atol=1e-5)


@pytest.mark.parametrize("degrees", [1e-5, 1e-3, 0.02])
def test_angle_is_accurate_where_arccos_is_not(degrees):
    t = np.radians(degrees)
    a, b = jnp.array([1.0, 0.0]), jnp.array([np.cos(t), np.sin(t)], jnp.float32)
    arccos = jnp.degrees(jnp.arccos(jnp.clip(jnp.vdot(a, b), -1, 1)))
    assert abs(float(arccos) / degrees - 1) > 0.01
    np.testing.assert_allclose(angle(a, b), degrees, rtol=1e-5)
    # Near 180 the rounding of the answer itself, 1.5e-5 degrees, is the limit.
    np.testing.assert_allclose(angle(a, -b), 180 - degrees, atol=3e-5)


@hypothesis.given(seed=st.integers(0, 10**6), log_scale=st.integers(-8, 8))
@hypothesis.settings(max_examples=25)
def test_angle_is_symmetric_scale_free_and_arccos_of_the_cosine(seed, log_scale):
    a, b = np.random.default_rng(seed).standard_normal((2, 5, 3), np.float32)
    got = angle(a, np.float32(10.0**log_scale) * b)
    np.testing.assert_allclose(got, numpy_angle(a, b), rtol=1e-5)
    np.testing.assert_allclose(got, angle(b, a), rtol=1e-5)
    np.testing.assert_allclose(got, 180 - angle(a, -b), rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_angle_survives_squares_that_leave_the_range_of_float32(factor):
    a = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(angle(a, factor * a), 0, atol=1e-4)


def test_angle_of_trees_is_that_of_one_long_vector():
    a = {"w": normal(0, 3, 5), "b": (normal(1, 7), None)}
    b = {"w": normal(2, 3, 5), "b": (normal(3, 7), None)}
    flat = [jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in (a, b)]
    np.testing.assert_allclose(angle(a, b), numpy_angle(*flat), rtol=1e-5)


def test_angle_of_half_precision_is_summed_in_float32():
    a = jnp.ones(3001, jnp.bfloat16)  # a bfloat16 sum would stop at 256
    b = a.at[1501:].set(-1)
    got = angle(a, b)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.degrees(np.arccos(1 / 3001)), atol=1e-4)


def test_angle_of_float16_does_not_overflow():
    a = jnp.full(9, 6e4, jnp.float16)
    np.testing.assert_allclose(angle(a, a), 0)


def test_angle_of_integers_is_that_of_their_values():
    got = angle(jnp.array([1, 0]), jnp.array([1, 1]))
    np.testing.assert_allclose(got, 45, atol=1e-4)


@pytest.mark.parametrize(
    ("a", "b"), [(0, 1), (1, 0), (0, 0)], ids=["zero_first", "zero_second", "zero_both"]
)
def test_angle_of_zeros_is_nan(a, b):
    assert jnp.isnan(angle(jnp.full((2, 3), float(a)), jnp.full((2, 3), float(b))))


def test_a_zero_leaf_in_a_tree_that_is_not_zero_gives_no_nan():
    a = {"w": jnp.ones(2), "b": jnp.zeros(3)}
    np.testing.assert_allclose(angle(a, a), 0)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (jnp.ones(3), jnp.ones(4)),
        (jnp.ones((2, 3)), jnp.ones((3, 2))),
        (jnp.ones((1, 3)), jnp.ones(3)),
        ({"w": jnp.ones(2)}, {"v": jnp.ones(2)}),
        ({"w": jnp.ones(2)}, {"w": jnp.ones(2), "b": jnp.ones(2)}),
        ({"w": jnp.ones(2)}, {"w": None}),
        ([jnp.ones(2)], (jnp.ones(2),)),
    ],
)
def test_angle_of_trees_that_differ_raises(a, b):
    with pytest.raises(ValueError, match="expected the same structure and shapes"):
        angle(a, b)


# Metrics of weights

TABLE = [  # kernel, feedback, weight_angle, norm_ratio, sign_concordance, effective rate at 0.1
    ([[3.0, 4.0]], [[3.0, 4.0]], 0, 1, 1, 0.1),
    ([[1.0, 2.0, 2.0]], [[-2.0, -4.0, -4.0]], 180, 2, 0, -0.2),
    ([[3.0], [4.0]], [[4.0], [-3.0]], 90, 1, 0.5, 0),
    ([[1.0, 0.0]], [[1.0, 1.0]], 45, 2**0.5, 1, 0.1),
    ([[3.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 10.0]], 36.869898, 2, 0.5, 0.16),
    ([[1.0, 1.0], [-1.0, -1.0]], [[2.0, 2.0], [-2.0, 2.0]], 60, 2, 0.75, 0.1),
    ([[0.5, -0.5, 0.5]], [[1.0, -1.0, 1.0]], 0, 2, 1, 0.2),
]
COLUMNS = {
    "weight_angle": jax.jit(metrics.weight_angle),
    "norm_ratio": jax.jit(metrics.norm_ratio),
    "sign_concordance": jax.jit(metrics.sign_concordance),
    "effective_learning_rate": jax.jit(functools.partial(metrics.effective_learning_rate, 0.1)),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_metrics_of_weights_agree_with_a_table_by_hand(name):
    params = {str(i): {"kernel": jnp.array(row[0])} for i, row in enumerate(TABLE)}
    feedback = {str(i): {"kernel": jnp.array(row[1])} for i, row in enumerate(TABLE)}
    got = COLUMNS[name](params, feedback)
    column = 2 + list(COLUMNS).index(name)
    for i, row in enumerate(TABLE):
        np.testing.assert_allclose(got[str(i)]["kernel"], row[column], atol=1e-4, rtol=1e-6)


@hypothesis.given(seed=st.integers(0, 10**6))
@hypothesis.settings(max_examples=25)
def test_metrics_of_weights_agree_with_numpy(seed):
    w, b = np.random.default_rng(seed).standard_normal((2, 7, 3), np.float32)
    w[0] = 0
    got = {name: metric({"w": w}, {"w": b})["w"] for name, metric in COLUMNS.items()}
    norm_w, norm_b = np.linalg.norm(w.astype(np.float64)), np.linalg.norm(b.astype(np.float64))
    expected = {
        "weight_angle": numpy_angle(b, w),
        "norm_ratio": norm_b / norm_w,
        "sign_concordance": np.mean(np.sign(w[w != 0]) == np.sign(b[w != 0])),
        "effective_learning_rate": 0.1 * np.sum(b * w, dtype=np.float64) / norm_w**2,
    }
    for name in COLUMNS:
        np.testing.assert_allclose(got[name], expected[name], err_msg=name, **ROUNDING)


def test_effective_learning_rate_is_rate_times_norm_ratio_times_cosine():
    params = {f"layer_{i}": {"kernel": normal(i, 5, 3 + i)} for i in range(4)}
    feedback = jax.tree.map(lambda w: 3 * normal(9, *w.shape) - w, params)
    angles, ratios = (COLUMNS[f](params, feedback) for f in ("weight_angle", "norm_ratio"))
    got = jax.jit(metrics.effective_learning_rate)(0.3, params, feedback)
    for layer in params:
        degrees, ratio = np.asarray(angles[layer]["kernel"]), np.asarray(ratios[layer]["kernel"])
        expected = 0.3 * ratio * np.cos(np.radians(degrees))
        np.testing.assert_allclose(got[layer]["kernel"], expected, **ROUNDING)


def test_metrics_of_half_precision_weights_are_those_of_their_values():
    # One scaled by 1.5 is exact; sums of 3000 bfloat16 ones are not.
    params = {"w": jnp.ones((1000, 3), jnp.bfloat16)}
    feedback = {"w": 1.5 * params["w"]}
    for name, expected in zip(COLUMNS, (0, 1.5, 1, 0.15), strict=True):
        got = COLUMNS[name](params, feedback)["w"]
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16, jnp.float16])
def test_metrics_of_feedback_stored_in_fewer_bits_are_those_of_its_values(dtype):
    params = {"w": normal(0, 300, 301)}  # 90,000 ones: more than float16 can sum
    stored = {"w": jnp.sign(normal(1, 300, 301) + params["w"]).astype(dtype)}
    values = {"w": stored["w"].astype(jnp.float32)}
    for name, metric in COLUMNS.items():
        got, expected = metric(params, stored)["w"], metric(params, values)["w"]
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6, err_msg=name)
    error = normal(2, 7, 301)
    for metric in (cotangent_angle, descent_condition):
        got, expected = (metric(error, params["w"], b["w"]) for b in (stored, values))
        chex.assert_trees_all_close(got, expected, rtol=1e-6)

    def gradient(params, feedback):
        def loss(below, top):
            return jnp.sum(jnp.sin(ops.feedback_dense(jnp.tanh(x @ below), top, feedback["w"])))

        return jax.grad(loss)(below, params["w"])

    x, below = normal(3, 7, 5), normal(4, 5, 300)
    of_gradient = jax.jit(functools.partial(metrics.gradient_angle, gradient))
    assert float(of_gradient(params, stored)) == pytest.approx(float(of_gradient(params, values)))
    assert float(of_gradient(params, {"w": params["w"]})) < 0.01


def test_zero_weights_do_not_count_for_sign_concordance():
    params, feedback = {"w": jnp.array([[0.0, 0.0, 2.0]])}, {"w": jnp.array([[1.0, -1.0, 3.0]])}
    assert float(metrics.sign_concordance(params, feedback)["w"]) == 1


@pytest.mark.parametrize("name", ["weight_angle", "sign_concordance", "effective_learning_rate"])
def test_metrics_of_a_zero_kernel_are_nan(name):
    params, feedback = {"w": jnp.zeros((2, 3))}, {"w": jnp.ones((2, 3))}
    assert jnp.isnan(COLUMNS[name](params, feedback)["w"])


def test_norm_ratio_to_a_zero_kernel_is_infinite():
    assert jnp.isinf(metrics.norm_ratio({"w": jnp.zeros((2, 3))}, {"w": jnp.ones((2, 3))})["w"])


def draws(kind, seed):
    rng = np.random.default_rng(seed)
    w = rng.uniform(-1, 1, (301, 207)) if kind == "uniform" else rng.normal(size=(301, 207))
    return {"kernel": jnp.asarray(w, jnp.float32)}


@pytest.mark.parametrize(
    ("kind", "magnitude", "expected"),
    [
        ("gaussian", "unit", np.degrees(np.arccos(np.sqrt(2 / np.pi)))),  # 37.1
        ("uniform", "unit", 30.0),
        ("gaussian", "preserve", np.degrees(np.arccos(2 / np.pi))),  # 50.5
        ("uniform", "preserve", np.degrees(np.arccos(3 / 4))),  # 41.4
        ("gaussian", "norm", np.degrees(np.arccos(np.sqrt(2 / np.pi)))),
        ("gaussian", None, 90.0),
        ("uniform", None, 90.0),
    ],
    ids=str,
)
def test_weight_angle_after_a_sync_is_what_theory_says(kind, magnitude, expected):
    params, feedback = draws(kind, 0), draws(kind, 1)
    rule = soap_jax.SignSync(magnitude=magnitude) if magnitude else soap_jax.Fixed()
    state = soap_jax.init_feedback(jax.random.key(0), params, rule, feedback=feedback)
    synced = soap_jax.sync_feedback(params, state, 0)
    # 62307 weights: the cosine's standard error is 0.004, a quarter of a degree.
    got = COLUMNS["weight_angle"](params, synced.feedback)["kernel"]
    np.testing.assert_allclose(got, expected, atol=0.7)


def test_weight_angle_of_fr_sf_is_not_that_of_its_magnitudes():
    # BioTorch compares W with abs(B0) and reports 90 degrees where the truth is 41.
    params, feedback = draws("uniform", 0), draws("uniform", 1)
    signs, magnitudes = jax.tree.map(jnp.sign, params), jax.tree.map(jnp.abs, feedback)
    right = COLUMNS["weight_angle"](params, jax.tree.map(jnp.multiply, magnitudes, signs))
    wrong = COLUMNS["weight_angle"](params, magnitudes)
    np.testing.assert_allclose(right["kernel"], 41.4, atol=0.7)
    np.testing.assert_allclose(wrong["kernel"], 90, atol=0.7)


# gradient_angle, of a two-hidden-layer network without Flax

SIZES = (4, 7, 5, 3)
X, LABELS = normal(20, 6, 4), jnp.array([0, 2, 1, 1, 0, 2])


def network(params, feedback, x):
    h = jnp.tanh(x @ params["0"]["w"] + params["0"]["b"][None])
    h = jnp.tanh(ops.feedback_dense(h, params["1"]["w"], feedback["1"]["w"]))
    return ops.feedback_dense(h, params["2"]["w"], feedback["2"]["w"])


def loss(params, feedback, x=X):
    return -jnp.mean(jax.nn.log_softmax(network(params, feedback, x))[jnp.arange(6), LABELS])


gradient = jax.grad(loss)
gradient_angle = jax.jit(functools.partial(metrics.gradient_angle, gradient))


def make_params(seed):
    keys = range(100 * seed, 100 * seed + 3)
    params = {str(i): {"w": normal(k, SIZES[i], SIZES[i + 1])} for i, k in enumerate(keys)}
    params["0"]["b"] = normal(100 * seed + 50, SIZES[1])
    return params


def make_feedback(seed):
    params = make_params(seed)
    return {"0": None, "1": {"w": params["1"]["w"]}, "2": {"w": params["2"]["w"]}}


def test_the_loss_in_place_of_its_gradient_is_refused():
    with pytest.raises(ValueError, match="scalar, like a loss"):
        metrics.gradient_angle(loss, make_params(0), make_feedback(1))


def numpy_gradient(params, feedback):
    """Feedback alignment by hand, in float64."""
    params, feedback, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, feedback, X))
    h1 = np.tanh(x @ params["0"]["w"] + params["0"]["b"])
    h2 = np.tanh(h1 @ params["1"]["w"])
    logits = h2 @ params["2"]["w"]
    e = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    e = (e - np.eye(3)[LABELS]) / len(x)
    d2 = e @ feedback["2"]["w"].T * (1 - h2**2)
    d1 = d2 @ feedback["1"]["w"].T * (1 - h1**2)
    return {"0": {"w": x.T @ d1, "b": d1.sum(0)}, "1": {"w": h1.T @ d2}, "2": {"w": h2.T @ e}}


def test_gradient_angle_at_equal_feedback_is_zero_everywhere():
    params = make_params(1)
    feedback = {"0": None, "1": params["1"], "2": params["2"]}
    got = gradient_angle(params, feedback)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    # jit may sum the two gradients in different orders: 1e-7 relative is 1e-5 degrees.
    np.testing.assert_allclose(jax.tree.leaves(got), 0, atol=1e-3)


def test_gradient_angle_is_that_of_feedback_alignment_by_hand():
    params, feedback = make_params(1), make_feedback(2)
    got = gradient_angle(params, feedback)
    pseudo, true = numpy_gradient(params, feedback), numpy_gradient(params, params)
    expected = jax.tree.map(numpy_angle, pseudo, true)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-3), got, expected)
    assert float(got["2"]["w"]) == 0  # the top layer's error passes no feedback
    assert min(float(got["0"]["w"]), float(got["0"]["b"]), float(got["1"]["w"])) > 1


def test_gradient_angle_keeps_none_leaves_of_the_gradient():
    def with_frozen(params, feedback):
        return gradient(params, feedback) | {"0": None}

    pair = make_params(1), make_feedback(2)
    got = jax.jit(functools.partial(metrics.gradient_angle, with_frozen))(*pair)
    assert got["0"] is None
    assert float(got["1"]["w"]) > 1


# Metrics of one layer's error


def conv_op(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def numpy_conv_cotangents(y_bar, kernel, shape):
    """The transposed convolution of `conv_op`, one tap at a time."""
    _, height, width, _ = shape
    kh, kw = kernel.shape[:2]
    out_h, out_w = y_bar.shape[1:3]
    top = max((out_h - 1) * 2 + kh - height, 0) // 2
    left = max((out_w - 1) + kw - width, 0) // 2
    padded = np.zeros((shape[0], height + 2 * kh, width + 2 * kw, shape[3]))
    for i in range(out_h):
        for j in range(out_w):
            for p in range(kh):
                for q in range(kw):
                    padded[:, 2 * i + p, j + q] += y_bar[:, i, j] @ kernel[p, q].T
    return padded[:, top : top + height, left : left + width]


def dense_case():
    e, w, b = normal(0, 9, 3), normal(1, 5, 3), normal(2, 5, 3)
    return (e, w, b), {}, np.asarray(e) @ np.asarray(b).T, np.asarray(e) @ np.asarray(w).T


def conv_case():
    x = jnp.zeros((9, 5, 4, 2))
    e, w, b = normal(0, 9, 3, 4, 3), normal(1, 3, 2, 2, 3), normal(3, 3, 2, 2, 3)
    cotangents = [numpy_conv_cotangents(np.asarray(e), np.asarray(k), x.shape) for k in (b, w)]
    return (e, w, b), {"op": conv_op, "x": x}, *cotangents


CASES = pytest.mark.parametrize("case", [dense_case, conv_case], ids=["dense", "conv"])


@CASES
def test_cotangent_angle_agrees_with_numpy(case):
    arrays, options, pseudo, true = case()
    got = cotangent_angle(*arrays, **options)
    expected = [numpy_angle(p, t) for p, t in zip(pseudo, true, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@CASES
def test_cotangent_angle_of_the_batch_is_that_of_one_long_vector(case):
    arrays, options, pseudo, true = case()
    got = cotangent_angle(*arrays, per_example=False, **options)
    assert got.shape == ()
    np.testing.assert_allclose(got, numpy_angle(pseudo, true), rtol=1e-5)


@CASES
def test_descent_condition_agrees_with_numpy(case):
    arrays, options, pseudo, true = case()
    got = descent_condition(*arrays, **options)
    products = (pseudo * true).reshape(9, -1).sum(1)
    assert 0 < (products > 0).mean() < 1
    np.testing.assert_allclose(got.mean, products.mean(), **ROUNDING)
    np.testing.assert_allclose(got.share, (products > 0).mean(), rtol=1e-6)


@CASES
def test_descent_condition_holds_where_the_cotangent_angle_is_below_90(case):
    arrays, options, *_ = case()
    angles = cotangent_angle(*arrays, **options)
    share = descent_condition(*arrays, **options).share
    np.testing.assert_allclose(share, np.mean(angles < 90), rtol=1e-6)
    for i in range(len(angles)):
        one = arrays[0][i : i + 1]
        options_i = options | {"x": options["x"][i : i + 1]} if options else {}
        descends = descent_condition(one, *arrays[1:], **options_i).mean > 0
        assert bool(descends) == bool(angles[i] < 90)


@CASES
def test_equal_feedback_sends_back_the_true_error(case):
    (e, w, _), options, _, true = case()
    np.testing.assert_allclose(cotangent_angle(e, w, w, **options), 0, atol=1e-4)
    np.testing.assert_allclose(cotangent_angle(e, w, -w, **options), 180, atol=1e-4)
    descent = descent_condition(e, w, w, **options)
    np.testing.assert_allclose(descent.mean, (true**2).sum() / 9, rtol=1e-5)
    assert float(descent.share) == 1


def test_descent_condition_by_hand():
    # W x and B e as matrices (1, 2) and (2, 1): e (W B) e with W B = 1 * 2 + 3 * (-1) = -1.
    e, kernel, feedback = jnp.array([[2.0], [-1.0]]), jnp.array([[1.0], [3.0]]), [[2.0], [-1.0]]
    got = descent_condition(e, kernel, jnp.array(feedback))
    assert (float(got.mean), float(got.share)) == (-2.5, 0)


def test_an_example_without_error_has_no_cotangent_angle():
    (e, w, b), *_ = dense_case()
    got = cotangent_angle(e.at[4].set(0), w, b)
    np.testing.assert_array_equal(jnp.isnan(got), np.arange(9) == 4)


def test_cotangent_metrics_take_errors_with_more_axes():
    (e, w, b), *_ = dense_case()
    got = cotangent_angle(e.reshape(3, 3, 3), w, b)
    expected = [numpy_angle(part @ b.T, part @ w.T) for part in e.reshape(3, 3, 3)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_cotangent_metrics_of_half_precision_are_widened():
    arrays = [a.astype(jnp.bfloat16) for a in dense_case()[0]]
    wide = [a.astype(jnp.float32) for a in arrays]
    got = cotangent_angle(*arrays)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, cotangent_angle(*wide))
    op = {"op": jnp.matmul, "x": jnp.zeros((9, 5), jnp.bfloat16)}
    np.testing.assert_allclose(cotangent_angle(*arrays, **op), got, rtol=1e-6)
    np.testing.assert_array_equal(descent_condition(*arrays), descent_condition(*wide))


@pytest.mark.parametrize("metric", [metrics.cotangent_angle, metrics.descent_condition])
def test_cotangent_metrics_reject_transposed_feedback_and_a_missing_x(metric):
    (e, w, b), *_ = dense_case()
    with pytest.raises(ValueError, match=r"has shape \(3, 5\); expected \(5, 3\)"):
        metric(e, w, b.T)
    with pytest.raises(ValueError, match="expected also the layer's input"):
        metric(e, w, b, op=jnp.matmul)


# Metrics of the whole chain


def test_error_angle_agrees_with_numpy_example_by_example_and_as_one_vector():
    pseudo = {"h": normal(0, 9, 5), "conv": [normal(1, 9, 3, 4, 2), None]}
    true = {"h": normal(2, 9, 5), "conv": [normal(3, 9, 3, 4, 2), None]}
    per_example, of_batch = error_angle(pseudo, true), error_angle(pseudo, true, per_example=False)
    assert jax.tree.structure(per_example) == jax.tree.structure(of_batch)
    assert jax.tree.structure(per_example) == jax.tree.structure(true)
    leaves = map(jax.tree.leaves, (pseudo, true, per_example, of_batch))
    for p, t, examples, whole in zip(*leaves, strict=True):
        expected = [numpy_angle(*pair) for pair in zip(p, t, strict=True)]
        np.testing.assert_allclose(examples, expected, rtol=1e-5)
        np.testing.assert_allclose(whole, angle(p, t), rtol=1e-6)


@jax.jit
def cotangents(params, b1, b2):
    """Of both hidden layers' sums, by zeros that are added to them; and the gradient by params."""
    zeros = {"1": jnp.zeros((6, 7)), "2": jnp.zeros((6, 5))}

    def loss(zeros, params):
        h = jnp.tanh(X @ params["0"]["w"] + params["0"]["b"][None] + zeros["1"])
        h = jnp.tanh(ops.feedback_dense(h, params["1"]["w"], b1) + zeros["2"])
        logits = ops.feedback_dense(h, params["2"]["w"], b2)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(6), LABELS])

    return jax.grad(loss, argnums=(0, 1))(zeros, params)


def test_error_angle_is_that_of_the_whole_chain_and_cotangent_angle_of_one_layer():
    params, feedback = make_params(1), make_feedback(2)
    kernels = params["1"]["w"], params["2"]["w"]
    feedbacks = feedback["1"]["w"], feedback["2"]["w"]
    pseudo, of_params = cotangents(params, *feedbacks)
    true, _ = cotangents(params, *kernels)
    # The gradient by a bias is its layer's cotangent, summed over the batch.
    np.testing.assert_allclose(pseudo["1"].sum(0), of_params["0"]["b"], rtol=1e-5, atol=1e-6)
    p, t, b, w = as_float64(pseudo["2"], true["2"], feedbacks[0], kernels[0])
    slope = 1 - np.tanh(X @ params["0"]["w"] + params["0"]["b"][None]) ** 2
    chain = [numpy_angle(*pair) for pair in zip(p @ b.T * slope, t @ w.T * slope, strict=True)]
    got = error_angle(pseudo["1"], true["1"])
    np.testing.assert_allclose(got, chain, rtol=1e-4)
    # Seen alone, a layer is compared at the one error that it got.
    local = cotangent_angle(pseudo["2"], kernels[0], feedbacks[0])
    expected = [numpy_angle(*pair) for pair in zip(p @ b.T, p @ w.T, strict=True)]
    np.testing.assert_allclose(local, expected, rtol=1e-4)
    assert np.all(np.abs(local - got) > 0.01)


def test_an_example_without_an_error_has_no_angle():
    pseudo = normal(0, 9, 5).at[4].set(0)
    got = error_angle(pseudo, normal(1, 9, 5))
    np.testing.assert_array_equal(jnp.isnan(got), np.arange(9) == 4)
    assert jnp.isfinite(error_angle(pseudo, normal(1, 9, 5), per_example=False))


KERNELS = [normal(30, 6, 5), normal(31, 5, 4), normal(32, 4, 3)]
FEEDBACKS = [normal(33, 6, 5), normal(34, 5, 4), normal(35, 4, 3)]


def test_path_angle_agrees_with_numpy_whatever_the_lengths():
    w, b = as_float64(*KERNELS), as_float64(*FEEDBACKS)
    for i in range(3):
        expected = numpy_angle(
            np.linalg.multi_dot([*b[i:], np.eye(3)]), np.linalg.multi_dot([*w[i:], np.eye(3)])
        )
        np.testing.assert_allclose(path_angle(KERNELS[i:], FEEDBACKS[i:]), expected, rtol=1e-5)
    other = [normal(36, 6, 9), normal(37, 9, 3)]
    expected = numpy_angle(np.linalg.multi_dot(as_float64(*other)), np.linalg.multi_dot(w))
    np.testing.assert_allclose(path_angle(KERNELS, other), expected, rtol=1e-5)


def test_path_angle_of_one_layer_is_its_weight_angle():
    expected = metrics.angle(FEEDBACKS[0], KERNELS[0])
    np.testing.assert_allclose(path_angle(KERNELS[:1], FEEDBACKS[:1]), expected, rtol=1e-6)


def test_path_angle_is_zero_where_products_agree():
    np.testing.assert_allclose(path_angle(KERNELS, KERNELS), 0, atol=1e-4)
    # A DFA projection (out, in) that is the kernels' own chain, transposed.
    projection = (KERNELS[1] @ KERNELS[2]).T
    np.testing.assert_allclose(path_angle(KERNELS[1:], [projection.T]), 0, atol=1e-4)
    np.testing.assert_allclose(path_angle(KERNELS[1:], [-2 * projection.T]), 180, atol=1e-4)
    # Products may align where no factor does: feedback turned by Q between the layers.
    turn = jnp.asarray(np.linalg.qr(normal(38, 5, 5))[0], jnp.float32)
    turned = [KERNELS[0] @ turn, turn.T @ KERNELS[1], KERNELS[2]]
    assert float(angle(turned[0], KERNELS[0])) > 60
    np.testing.assert_allclose(path_angle(KERNELS, turned), 0, atol=1e-3)


def test_direct_weight_angle_is_to_what_the_projections_ask_for():
    kernel, below, above = normal(0, 5, 4), normal(1, 3, 5), normal(2, 3, 4)
    w, p0, p1 = as_float64(kernel, below, above)
    expected = numpy_angle(w, p0.T @ p1)
    np.testing.assert_allclose(direct_weight_angle(kernel, below, above), expected, rtol=1e-5)
    top = normal(3, 5, 3)
    got = direct_weight_angle(top, below)
    np.testing.assert_allclose(got, numpy_angle(as_float64(top)[0], p0.T), rtol=1e-5)
    # Of a network of such kernels the chain agrees with the projections, if these are orthonormal.
    p0, p1 = (
        np.linalg.qr(normal(seed, n, 3))[0].T.astype(np.float32) for seed, n in ((4, 5), (5, 4))
    )
    kernels = [jnp.asarray(2 * p0.T @ p1), jnp.asarray(3 * p1.T)]
    np.testing.assert_allclose(direct_weight_angle(kernels[0], p0, p1), 0, atol=1e-4)
    np.testing.assert_allclose(direct_weight_angle(kernels[1], p1), 0, atol=1e-4)
    np.testing.assert_allclose(path_angle(kernels, [p0.T]), 0, atol=1e-3)


def test_metrics_of_the_chain_widen_half_precision():
    small = [[a.astype(jnp.bfloat16) for a in path] for path in (KERNELS, FEEDBACKS)]
    wide = [[a.astype(jnp.float32) for a in path] for path in small]
    np.testing.assert_allclose(path_angle(*small), path_angle(*wide), rtol=1e-6)
    a, b = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((5, 3), (3, 5)))
    for metric, arrays in ((error_angle, (a, a)), (direct_weight_angle, (a, b))):
        assert jax.eval_shape(metric, *arrays).dtype == jnp.float32


@pytest.mark.parametrize(
    ("kernels", "feedback", "name"),
    [
        ([], [(3, 2)], "kernels"),
        ([(3, 2)], [], "feedback"),
        ([(3, 4), (5, 2)], [(3, 2)], "kernels"),
        ([(3, 2)], [(3, 4), (2, 4)], "feedback"),
        ([(3, 2)], [(6,)], "feedback"),
        ([(1, 3, 2)], [(3, 2)], "kernels"),
    ],
)
def test_a_path_that_does_not_chain_raises(kernels, feedback, name):
    ones = [[jnp.ones(shape) for shape in shapes] for shapes in (kernels, feedback)]
    with pytest.raises(ValueError, match=rf"{name} have the shapes \[.*\]; expected matrices"):
        metrics.path_angle(*ones)


def test_chains_whose_shapes_differ_raise():
    same = "expected the same structure and shapes"
    with pytest.raises(ValueError, match=same):
        metrics.path_angle([jnp.ones((3, 2))], [jnp.ones((2, 3))])
    shapes = r"kernel, below and above have the shapes .*; expected kernel \(in, width\), below"
    for below, above in (((3, 4), (3, 5)), ((5, 3), (3, 4)), ((3, 5), (2, 4)), ((3, 5), None)):
        with pytest.raises(ValueError, match=shapes):
            ones = None if above is None else jnp.ones(above)
            metrics.direct_weight_angle(jnp.ones((5, 4)), jnp.ones(below), ones)
    with pytest.raises(ValueError, match=same):
        metrics.error_angle({"h": jnp.ones((2, 3))}, {"g": jnp.ones((2, 3))})
    for per_example in (True, False):
        with pytest.raises(ValueError, match=same):
            metrics.error_angle(jnp.ones((2, 3)), jnp.ones((2, 4)), per_example=per_example)


# effective_rank


def numpy_effective_rank(x):
    values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    share = values / values.sum()
    share = share[share > 0]
    return np.exp(-np.sum(share * np.log(share)))


def fed_back(seed, batch, width, outputs, scale):
    """Errors as of a tanh layer of FA, `e B (1 - h²)` of few outputs: the spectrum decays."""
    e, b = normal(seed, batch, outputs), normal(seed + 1, outputs, width)
    return e @ b * (1 - jnp.tanh(scale * normal(seed + 2, batch, width)) ** 2)


def test_effective_rank_by_hand():
    lengths = jnp.array([[0.0, 3.0, 0.0], [-1.0, 0.0, 0.0]])  # p = 3/4, 1/4
    by_hand = np.exp(0.75 * np.log(4 / 3) + 0.25 * np.log(4))
    np.testing.assert_allclose(effective_rank(lengths), by_hand, rtol=1e-6)
    np.testing.assert_allclose(effective_rank(normal(0, 1, 7)), 1, rtol=1e-6)
    np.testing.assert_allclose(effective_rank(normal(0, 7, 1)), 1, rtol=1e-6)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_orthogonal_errors_of_one_length_have_their_number_as_effective_rank(shape, scale):
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((9, 9)))
    x = scale * jnp.asarray(basis[: shape[0], :6] @ basis[:6, : shape[1]], jnp.float32)
    turned = scale * jnp.asarray(np.linalg.qr(basis[:5, :5])[0][:3], jnp.float32)
    np.testing.assert_allclose(effective_rank(turned), 3, rtol=1e-5)
    np.testing.assert_allclose(effective_rank(x), numpy_effective_rank(x / scale), rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 0.03, 0.3, 1.0])
def test_effective_rank_counts_the_small_singular_values_of_fed_back_errors(scale):
    """By the Gram matrix in float32 it would be up to a tenth off."""
    for shape in ((33, 70), (70, 33)):
        x = fed_back(0, *shape, 4, scale)
        expected = numpy_effective_rank(x)
        np.testing.assert_allclose(effective_rank(x), expected, rtol=1e-4)
        assert expected < 4 if scale == 0 else expected > 3.5


def test_of_errors_that_are_zero_the_effective_rank_is_zero_and_of_nan_nan():
    x = normal(0, 4, 3)
    found = effective_rank(
        {"zero": 0 * x, "nan": x.at[1, 2].set(jnp.nan), "inf": x.at[0, 0].set(-jnp.inf)}
    )
    assert found["zero"] == 0 and np.isnan(found["nan"]) and np.isnan(found["inf"])
    np.testing.assert_allclose(effective_rank(x.at[2:].set(0)), numpy_effective_rank(x[:2]), 1e-4)


def test_effective_rank_flattens_all_axes_but_the_examples():
    x = normal(0, 5, 2, 3, 4)
    expected = numpy_effective_rank(x.reshape(5, 24))
    np.testing.assert_allclose(effective_rank(x), expected, rtol=1e-4)
    over_time = jnp.moveaxis(x, 0, 2)
    np.testing.assert_allclose(effective_rank(over_time, batch_size=5), expected, rtol=1e-4)


def test_effective_rank_of_the_errors_of_layers():
    """A linear net's errors have at most the outputs' rank, by feedback as by backprop."""
    params = {"a": normal(0, 6, 9), "b": normal(1, 9, 8), "c": normal(2, 8, 3)}
    feedback = {"b": normal(3, 9, 8), "c": normal(4, 8, 3)}
    x = normal(5, 12, 6)

    def loss(params, x, power):
        return jnp.mean(jnp.abs(x @ params["a"] @ params["b"] @ params["c"]) ** power)

    def ranks(feedback):
        errors = soap_jax.transform.layer_errors(loss)(params, feedback, x, 3)
        return metrics.effective_rank(errors, batch_size=12), errors

    found, errors = jax.jit(ranks)(feedback)
    assert set(found) == {"a", "b", "c"} and all(1 < rank <= 3 for rank in found.values())
    for name, error in errors.items():
        np.testing.assert_allclose(found[name], numpy_effective_rank(error), rtol=1e-4)
    exact, _ = jax.jit(ranks)(None)
    np.testing.assert_allclose(exact["c"], found["c"], rtol=1e-5)  # no feedback on its way
    assert abs(exact["a"] - found["a"]) > 1e-3


def test_effective_rank_under_vmap_and_in_half_precision():
    x = normal(0, 3, 5, 4)
    several = jax.jit(jax.vmap(metrics.effective_rank))(x)
    np.testing.assert_allclose(several, [effective_rank(one) for one in x], rtol=1e-5)
    half = effective_rank(x[0].astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, several[0], rtol=1e-2)


def test_effective_rank_of_a_batch_spread_over_an_explicit_mesh(mesh):
    x = normal(0, 8, 5)
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", None)))
    np.testing.assert_allclose(effective_rank(spread), numpy_effective_rank(x), rtol=1e-4)


@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (3, 0)])
def test_errors_without_examples_or_units_have_no_effective_rank(shape):
    message = r"the error at Dense_0/kernel has the shape .*; expected \(batch, ...\)"
    with pytest.raises(ValueError, match=message):
        metrics.effective_rank({"Dense_0/kernel": jnp.zeros(shape)})


def test_errors_without_an_axis_of_the_batch_have_no_effective_rank():
    with pytest.raises(ValueError, match=r"shape \(4, 3\); expected .* with 5 examples"):
        metrics.effective_rank(jnp.ones((4, 3)), batch_size=5)


# All of them, under JAX's transformations and in NNX

METRICS = COLUMNS | {"gradient_angle": gradient_angle}


def stacked(make, seeds):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(make, seeds))


@pytest.mark.parametrize("name", METRICS)
def test_metrics_of_weights_under_vmap_and_scan_are_those_of_each_run(name):
    metric = METRICS[name]
    params, feedback = stacked(make_params, (1, 2, 3)), stacked(make_feedback, (4, 5, 6))
    loop = [metric(make_params(i), make_feedback(i + 3)) for i in (1, 2, 3)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop)
    mapped = jax.jit(jax.vmap(metric))(params, feedback)
    _, scanned = lax.scan(lambda _, pair: (None, metric(*pair)), None, (params, feedback))
    for got in (mapped, scanned):
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        # The same gradients, summed in another order: 1e-3 degrees.
        jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-3), got, expected)


@pytest.mark.parametrize("metric", [metrics.cotangent_angle, metrics.descent_condition])
def test_cotangent_metrics_under_vmap_and_scan_are_those_of_each_run(metric):
    runs = normal(0, 3, 9, 3), normal(1, 3, 5, 3), normal(2, 3, 5, 3)
    expected = jax.tree.map(lambda *a: jnp.stack(a), *(metric(*run) for run in zip(*runs)))  # noqa: B905
    mapped = jax.jit(jax.vmap(metric))(*runs)
    _, scanned = lax.scan(lambda _, run: (None, metric(*run)), None, runs)
    for got in (mapped, scanned):
        jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, **ROUNDING), got, expected)


@pytest.mark.parametrize("options", [{}, {"op": jnp.matmul}], ids=["dense", "op"])
def test_cotangent_metrics_take_a_batch_spread_over_an_explicit_mesh(mesh, options):
    e, w, b = (np.asarray(a) for a in (normal(0, 8, 3), normal(1, 5, 3), normal(2, 5, 3)))
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec()))
    put_batch = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))
    if options:
        options = options | {"x": put_batch(np.zeros((8, 5), np.float32))}
    angles = cotangent_angle(put_batch(e), put(w), put(b), **options)
    expected = [numpy_angle(p, t) for p, t in zip(e @ b.T, e @ w.T, strict=True)]
    np.testing.assert_allclose(angles, expected, rtol=1e-5)
    share = descent_condition(put_batch(e), put(w), put(b), **options).share
    np.testing.assert_allclose(share, np.mean(np.array(expected) < 90))


@pytest.mark.parametrize("name", COLUMNS)
def test_metrics_of_weights_have_feedbacks_structure_and_keep_none(name):
    got = COLUMNS[name](make_params(1), make_feedback(2))
    assert got["0"] is None
    assert jnp.shape(got["1"]["w"]) == () and "b" not in got["1"]


@pytest.mark.parametrize("name", COLUMNS)
def test_metrics_of_weights_reject_feedback_that_does_not_fit(name):
    params = make_params(1)
    with pytest.raises(ValueError, match=r"\['1'\]\['v'\] has no kernel"):
        COLUMNS[name](params, {"1": {"v": params["1"]["w"]}})
    with pytest.raises(ValueError, match=r"has shape \(5, 7\); expected \(7, 5\)"):
        COLUMNS[name](params, {"1": {"w": params["1"]["w"].T}})


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.below = nnx.Linear(4, 5, rngs=rngs)
        self.top = soap_jax.nnx.FeedbackLinear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.top(jnp.tanh(self.below(x)))


def test_metrics_of_weights_pair_nnx_states():
    model = NnxModel(nnx.Rngs(0))
    graph, params, feedback = nnx.split(model, nnx.Param, soap_jax.nnx.Feedback)
    w, b = model.top.kernel[...], model.top.feedback[...]
    for name, metric in COLUMNS.items():
        got = metric(params, feedback)
        assert jax.tree.structure(got) == jax.tree.structure(feedback), name
        expected = metric({"w": w}, {"w": b})["w"]
        np.testing.assert_allclose(jax.tree.leaves(got), [expected], **ROUNDING)

    def gradient(params, feedback):
        return jax.grad(lambda p: jnp.sum(nnx.merge(graph, p, feedback)(X) ** 2))(params)

    angles = nnx.to_pure_dict(
        jax.jit(functools.partial(metrics.gradient_angle, gradient))(params, feedback)
    )
    np.testing.assert_allclose(angles["top"]["kernel"], 0, atol=1e-3)
    assert float(angles["below"]["kernel"]) > 1


def test_gradient_angle_takes_a_linen_models_collections():
    model = nn.Sequential([nn.Dense(5), nn.tanh, soap_jax.linen.FeedbackDense(3)])
    variables = model.init(jax.random.key(0), X)

    def gradient(params, feedback):
        def loss(params):
            return jnp.sum(model.apply({"params": params, "feedback": feedback}, X) ** 2)

        return jax.grad(loss)(params)

    angles = metrics.gradient_angle(gradient, variables["params"], variables["feedback"])
    np.testing.assert_allclose(angles["layers_2"]["kernel"], 0, atol=1e-3)
    assert float(angles["layers_0"]["kernel"]) > 1


def test_an_error_without_a_batch_or_of_another_layer_raises():
    kernel, feedback = jnp.ones((3, 2)), jnp.ones((3, 2))
    for metric in (metrics.cotangent_angle, metrics.descent_condition):
        with pytest.raises(ValueError, match=r"y_bar has shape \(2,\); expected \(batch, ...\)"):
            metric(jnp.ones(2), kernel, feedback)
        with pytest.raises(ValueError, match=r"y_bar has shape \(4, 3\) and the kernel \(3, 2\)"):
            metric(jnp.ones((4, 3)), kernel, feedback)


def test_the_angle_of_nothing_raises():
    with pytest.raises(ValueError, match="without arrays; expected arrays"):
        metrics.angle({}, {})


def test_every_metric_is_flat_by_name():
    params = {"a": {"kernel": normal(0, 4, 3), "bias": normal(1, 3)}, "b": {"kernel": X[:3, :3]}}
    feedback = {"a": None, "b": {"kernel": X[:3, :3]}}
    found = soap_jax.trees.named(
        {"ratio": metrics.norm_ratio(params, feedback), "angle": metrics.angle(X, X)}
    )
    assert {name: float(value) for name, value in found.items()} == {
        "ratio/b/kernel": 1,
        "angle": 0,
    }
