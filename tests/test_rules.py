"""Rules as functions of one kernel and its feedback: tables, angles, invariants."""

import copy
import dataclasses
import functools
import pickle
import re

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from soap_jax import init_feedback, rules, sync_feedback

KEY = jax.random.key(0)
MAGNITUDES = ("unit", "glorot", "preserve", "norm", "redraw", "kernel")
every_magnitude = pytest.mark.parametrize("magnitude", MAGNITUDES)
ALL_RULES = (
    rules.Fixed(),
    *(rules.SignSync(magnitude=magnitude) for magnitude in MAGNITUDES),
    rules.Transport(),
    rules.Transport(rate=0.25),
    rules.WeightMirror(rate=0.25, batch_size=3),
)
every_rule = pytest.mark.parametrize("rule", ALL_RULES, ids=str)


def first_sync(rule, kernel, feedback, key=KEY):
    """The feedback that a rule makes, with its memory if it has one."""
    memory = rule.init(kernel, feedback, key)
    if memory is None:
        return rule(kernel, feedback, key)
    return rule(kernel, feedback, key, memory)[0]


apply = jax.jit(first_sync, static_argnums=0)


def sign_sync(magnitude, kernel, feedback, key=KEY):
    return apply(
        rules.SignSync(magnitude=magnitude), jnp.asarray(kernel), jnp.asarray(feedback), key
    )


def angle(a, b):
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


@functools.cache
def draw(family, seed, shape=(500, 600), scale=0.05):
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal(shape) if family == "Gaussian" else rng.uniform(-1, 1, shape)
    return np.asarray(scale * drawn, np.float32)


# Identities: angles. With 300,000 weights an angle's standard error is below 0.1 degrees.


@pytest.mark.parametrize("magnitude", ["unit", "glorot", "norm"])
@pytest.mark.parametrize(
    "family, expected", [("Gaussian", np.degrees(np.arccos(np.sqrt(2 / np.pi)))), ("uniform", 30.0)]
)
def test_signs_are_at_their_familys_angle_to_the_kernel(family, expected, magnitude):
    kernel, feedback = draw(family, 0), draw(family, 1)
    assert angle(sign_sync(magnitude, kernel, feedback), kernel) == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize("family, expected", [("Gaussian", 50.5), ("uniform", 41.4)])
def test_preserved_magnitudes_are_at_their_familys_angle_to_the_kernel(family, expected):
    kernel, feedback = draw(family, 0), draw(family, 1)
    synced = sign_sync("preserve", kernel, feedback)
    assert angle(synced, kernel) == pytest.approx(expected, abs=0.5)


def test_redrawn_magnitudes_are_at_the_angle_of_uniform_to_gaussian_ones():
    kernel, feedback = draw("Gaussian", 0), draw("Gaussian", 1)
    assert angle(sign_sync("redraw", kernel, feedback), kernel) == pytest.approx(46.3, abs=0.5)


@pytest.mark.parametrize("family", ["Gaussian", "uniform"])
def test_fixed_feedback_is_at_a_right_angle_to_the_kernel(family):
    kernel, feedback = draw(family, 0), draw(family, 1)
    assert angle(apply(rules.Fixed(), kernel, feedback), kernel) == pytest.approx(90, abs=0.5)


@pytest.mark.parametrize("family", ["Gaussian", "uniform"])
def test_full_transport_is_at_no_angle_to_the_kernel(family):
    kernel, feedback = draw(family, 0), draw(family, 1)
    # arccos loses half of the digits at 1.
    assert angle(apply(rules.Transport(), kernel, feedback), kernel) < 1e-5


# Identities: invariants


@functools.partial(jax.jit, static_argnames=("magnitude", "syncs"))
def synced_many_times(feedback, *, magnitude, syncs):
    """Feedback after syncs with kernels whose signs change all the time."""
    rule = rules.SignSync(magnitude=magnitude)
    state = init_feedback(KEY, {"w": feedback}, rule, feedback={"w": feedback})

    def body(state, step):
        kernel = jnp.cos(step * jnp.arange(1.0, feedback.size + 1)).reshape(feedback.shape)
        return sync_feedback({"w": kernel.astype(feedback.dtype)}, state, 0), None

    state = lax.scan(body, state, jnp.arange(syncs, dtype=jnp.float32))[0]
    return state.feedback["w"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_preserve_never_changes_a_magnitude(dtype):
    feedback = jnp.asarray(draw("Gaussian", 1, (7, 5)), dtype)
    synced = synced_many_times(feedback, magnitude="preserve", syncs=10_000)
    chex.assert_trees_all_equal(jnp.abs(synced), jnp.abs(feedback), strict=True)
    assert np.any(np.asarray(synced) != np.asarray(feedback))


@pytest.mark.parametrize("dtype, rounding", [(jnp.float32, 2e-7), (jnp.bfloat16, 2**-8)])
# XLA divides by multiplying with the inverse: 41 * (1 / 41) < 1 in float32.
@pytest.mark.parametrize("shape", [(7, 5), (3, 3, 2, 11), (41, 3), (1, 1)])
def test_norm_keeps_the_norm_and_never_drifts(shape, dtype, rounding):
    feedback = jnp.asarray(draw("Gaussian", 1, shape, 1 / 3), dtype)
    once = synced_many_times(feedback, magnitude="norm", syncs=1)
    often = synced_many_times(feedback, magnitude="norm", syncs=10_000)
    chex.assert_trees_all_equal(jnp.abs(often), jnp.abs(once), strict=True)
    before, after = (np.linalg.norm(np.asarray(b, np.float64)) for b in (feedback, often))
    assert after == pytest.approx(before, rel=rounding)


@pytest.mark.parametrize("dtype, rounding", [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_kernel_has_the_norm_of_the_kernel(dtype, rounding):
    kernel = jnp.asarray(draw("Gaussian", 0, (41, 3)), dtype).at[:7].set(0)
    synced = sign_sync("kernel", kernel, jnp.ones((41, 3), dtype))
    norms = [float(jnp.linalg.norm(w.astype(jnp.float32))) for w in (synced, kernel)]
    assert norms[0] == pytest.approx(norms[1], rel=rounding)


floats = st.floats(-2, 2, width=32, allow_subnormal=False)


@hypothesis.given(
    magnitude=st.sampled_from(MAGNITUDES),
    kernel=st.lists(floats, min_size=6, max_size=6),
    feedback=st.lists(floats, min_size=6, max_size=6),
)
def test_signs_agree_wherever_the_kernel_is_not_zero(magnitude, kernel, feedback):
    kernel, feedback = (np.array(values, np.float32).reshape(2, 3) for values in (kernel, feedback))
    synced = np.asarray(sign_sync(magnitude, kernel, feedback))
    has_magnitude = {"preserve": feedback != 0, "norm": np.any(feedback)}.get(magnitude, True)
    decided = (kernel != 0) & has_magnitude
    chex.assert_trees_all_equal(np.sign(synced)[decided], np.sign(kernel)[decided])
    if magnitude == "preserve":
        chex.assert_trees_all_equal(np.abs(synced), np.abs(feedback))


@every_magnitude
def test_syncing_twice_is_syncing_once(magnitude):
    kernel, feedback = draw("Gaussian", 0, (7, 5)), draw("Gaussian", 1, (7, 5))
    once = sign_sync(magnitude, kernel, feedback)
    # "norm" takes the root mean square of equal numbers here, as it does not from sync to sync.
    rtol = 2e-7 if magnitude == "norm" else 0
    chex.assert_trees_all_close(sign_sync(magnitude, kernel, once), once, rtol=rtol)


@every_rule
def test_vmap_equals_a_python_loop(rule):
    kernels = np.stack([draw("Gaussian", seed, (3, 5)) for seed in (0, 1, 2)])
    feedbacks = np.stack([draw("Gaussian", seed, (3, 5)) for seed in (3, 4, 5)])
    keys = jax.random.split(KEY, 3)
    together = jax.vmap(functools.partial(apply, rule))(kernels, feedbacks, keys)
    for i in range(3):
        alone = apply(rule, kernels[i], feedbacks[i], keys[i])
        chex.assert_trees_all_close(together[i], alone, rtol=1e-6)


@every_rule
def test_jit_changes_nothing(rule):
    kernel, feedback = (
        jnp.asarray(draw("Gaussian", 0, (3, 5))),
        jnp.asarray(draw("Gaussian", 1, (3, 5))),
    )
    chex.assert_trees_all_close(
        first_sync(rule, kernel, feedback), apply(rule, kernel, feedback), rtol=1e-6
    )


# Tables by hand

KERNEL = [[0.5, -3.0, 2.0], [-0.25, 0.0, -0.0]]
FEEDBACK = [[-3.0, 4.0, 0.0], [5.0, -6.0, 7.0]]


@pytest.mark.parametrize(
    "magnitude, expected",
    [
        ("unit", [[1, -1, 1], [-1, 0, 0]]),
        ("glorot", np.sqrt(2 / 5) * np.array([[1, -1, 1], [-1, 0, 0]])),
        ("preserve", [[3, -4, 0], [-5, 6, 7]]),
        ("norm", np.sqrt(135 / 6) * np.array([[1, -1, 1], [-1, 1, 1]])),
        ("kernel", np.sqrt(13.3125 / 4) * np.array([[1, -1, 1], [-1, 0, 0]])),
    ],
)
def test_a_sync_by_hand(magnitude, expected):
    actual = sign_sync(magnitude, KERNEL, FEEDBACK)
    chex.assert_trees_all_close(actual, np.asarray(expected, np.float32), rtol=1e-6)


@pytest.mark.parametrize(
    "rate, expected",
    [
        (0, [[-3.0, 4.0, 0.0], [5.0, -6.0, 7.0]]),
        (0.25, [[-2.125, 2.25, 0.5], [3.6875, -4.5, 5.25]]),
        (1, KERNEL),
    ],
)
def test_transport_by_hand(rate, expected):
    actual = apply(rules.Transport(rate=rate), jnp.array(KERNEL), jnp.array(FEEDBACK))
    chex.assert_trees_all_equal(actual, jnp.array(expected))


def test_full_transport_copies_every_bit_of_the_kernel():
    kernel, feedback = draw("Gaussian", 0), 1e6 * draw("Gaussian", 1)
    chex.assert_trees_all_equal(apply(rules.Transport(), kernel, feedback), kernel)
    negative_zero = apply(rules.Transport(), jnp.array([[-0.0]]), jnp.array([[1.0]]))
    assert np.signbit(np.asarray(negative_zero)).all()


def test_repeated_transport_decays_geometrically():
    kernel, feedback = jnp.array(KERNEL), jnp.array(FEEDBACK)
    for _ in range(3):
        feedback = apply(rules.Transport(rate=0.25), kernel, feedback)
    expected = jnp.array(KERNEL) + 0.75**3 * (jnp.array(FEEDBACK) - jnp.array(KERNEL))
    chex.assert_trees_all_close(feedback, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((3, 5), 1 / 2),
        ((3, 3, 2, 6), 1 / 6),
        ((2, 1, 1), 1 / np.sqrt(2)),
        ((2, 3, 3, 1, 1), 1 / np.sqrt(18)),
    ],
)
def test_glorot_counts_a_convolutions_window_in_its_fans(shape, expected):
    """sqrt(2 / (window * (in + out))) for a kernel `(*window, in, out)`."""
    synced = sign_sync("glorot", np.ones(shape, np.float32), np.zeros(shape, np.float32))
    chex.assert_trees_all_close(synced, np.full(shape, expected, np.float32), rtol=1e-6)


# Draws


def test_redraws_mean_square_is_glorots():
    kernel = draw("Gaussian", 0)
    synced = np.asarray(sign_sync("redraw", kernel, kernel), np.float64)
    # 300,000 squared uniform deviates: a relative standard error of 0.16 %.
    assert np.mean(synced**2) == pytest.approx(2 / (500 + 600), rel=0.01)


def test_redraw_depends_on_the_key_and_the_kernels_signs_alone():
    kernel, feedback = draw("Gaussian", 0, (7, 5)), draw("Gaussian", 1, (7, 5))
    first = sign_sync("redraw", kernel, feedback, jax.random.key(1))
    again = sign_sync("redraw", 3 * kernel, 2 * feedback, jax.random.key(1))
    other = sign_sync("redraw", kernel, feedback, jax.random.key(2))
    chex.assert_trees_all_equal(first, again)
    assert not np.any(np.abs(first) == np.abs(other))


# Weight mirror


@functools.partial(jax.jit, static_argnums=(0, 2))
def mirrored(rule, kernel, syncs, feedback=None):
    """Feedback after syncs with one kernel, from zeros if not told."""

    def body(feedback, step):
        synced = rule(kernel, feedback, jax.random.fold_in(KEY, step))
        return synced.astype(kernel.dtype), None

    start = jnp.zeros_like(kernel) if feedback is None else feedback
    return lax.scan(body, start, jnp.arange(syncs))[0]


@pytest.mark.parametrize("shape", [(7, 5), (3, 2, 4, 5), (2, 1, 3)], ids=str)
def test_a_step_of_mirroring_by_hand(shape):
    rule = rules.WeightMirror(rate=0.3, decay=0.2, scale=1.5, batch_size=11)
    kernel, feedback = draw("Gaussian", 0, shape), draw("Gaussian", 1, shape)
    fan_in = kernel.size // shape[-1]
    x = 1.5 * np.asarray(jax.random.normal(KEY, (11, fan_in)), np.float64)
    seen = x.T @ (x @ kernel.reshape(fan_in, -1)) / 11
    expected = 0.8 * feedback + 0.3 * seen.reshape(shape)
    np.testing.assert_allclose(apply(rule, kernel, feedback), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        (rules.WeightMirror(), (500, 40)),
        (rules.WeightMirror(rate=0.1, batch_size=16), (120, 80)),
        (rules.WeightMirror(rate=0.05, batch_size=4), (3, 3, 8, 60)),
    ],
    ids=str,
)
def test_mirrored_feedback_settles_at_the_angle_and_norm_of_its_formula(rule, shape):
    kernel, syncs = draw("Gaussian", 0, shape), int(4.5 / rule.rate)
    feedback = mirrored(rule, kernel, syncs, draw("Gaussian", 1, shape))
    fan_in = kernel.size // shape[-1]
    expected = np.arctan(np.sqrt(rule.rate * fan_in / (2 * rule.batch_size)))
    assert np.degrees(expected) > 11
    # The formula leaves out second orders of the decay.
    assert angle(feedback, kernel) == pytest.approx(np.degrees(expected), abs=1.5)
    ratio = np.linalg.norm(feedback) / np.linalg.norm(kernel)
    assert ratio == pytest.approx(1 / np.cos(expected), rel=0.05)


def test_mirrored_feedback_is_its_kernel_on_average():
    kernel = draw("Gaussian", 0, (5, 3), 1)
    rule = rules.WeightMirror(rate=1.0, batch_size=100_000)
    # The means of 100,000 products of normal deviates, times a norm of 3 at most: 0.01.
    np.testing.assert_allclose(apply(rule, kernel, 9 * kernel), kernel, atol=0.04)


def test_mirrored_feedback_settles_at_rate_scale_and_decays_multiple_of_its_kernel():
    kernel = draw("Gaussian", 0, (5, 3), 1)
    rule = rules.WeightMirror(rate=0.1, decay=0.2, scale=3.0, batch_size=10_000)
    # sqrt(decay * fan_in / (2 * batch_size)) is 0.7 %.
    error = mirrored(rule, kernel, 60) - 0.1 * 3**2 / 0.2 * kernel
    assert np.linalg.norm(error) < 0.03 * 4.5 * np.linalg.norm(kernel)


def test_louder_noise_at_a_lower_rate_is_the_same_mirror():
    kernel = draw("Gaussian", 0, (7, 5))
    expected = mirrored(rules.WeightMirror(rate=0.25), kernel, 20)
    loud = rules.WeightMirror(rate=0.25 / 10**2, scale=10.0)
    np.testing.assert_allclose(mirrored(loud, kernel, 20), expected, rtol=1e-5, atol=1e-6)


def test_a_mirror_of_half_precision_settles_too():
    rule = rules.WeightMirror(rate=0.1, batch_size=16)
    kernel = jnp.asarray(draw("Gaussian", 0, (120, 80)), jnp.bfloat16)
    feedback = mirrored(rule, kernel, 60)
    assert feedback.dtype == jnp.bfloat16
    expected = np.degrees(np.arctan(np.sqrt(0.1 * 120 / (2 * 16))))
    assert angle(feedback.astype(jnp.float32), kernel) == pytest.approx(expected, abs=2)


def test_noise_is_given_by_key_step_and_layer():
    kernel = draw("Gaussian", 0, (7, 5))
    params = {name: {"kernel": kernel} for name in ("a", "b")}

    @jax.jit
    def synced(seed, step):
        zeros = jax.tree.map(jnp.zeros_like, params)
        state = init_feedback(
            jax.random.key(seed), params, rules.WeightMirror(period=2), feedback=zeros
        )
        return sync_feedback(params, state, step).feedback

    first = synced(0, 4)
    chex.assert_trees_all_equal(synced(0, 4), first)
    others = [synced(0, 6)["a"], synced(1, 4)["a"], first["b"]]
    assert all(np.all(other["kernel"] != first["a"]["kernel"]) for other in others)
    assert not np.any(synced(0, 5)["a"]["kernel"])


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 4), P("data", None)),
        ((8, 4), P(None, "data")),
        ((3, 2, 4, 8), P(None, None, "data", None)),
        ((3, 2, 4, 8), P(None, None, None, "data")),
    ],
    ids=str,
)
def test_a_mirror_of_a_sharded_kernel_is_that_of_a_whole_one(mesh, shape, spec):
    rule = rules.WeightMirror(rate=0.25, batch_size=16)
    kernel, feedback = draw("Gaussian", 0, shape), draw("Gaussian", 1, shape)
    alone = jax.device_get(apply(rule, kernel, feedback))
    split = jax.device_put((kernel, feedback), NamedSharding(mesh, spec))
    together = apply(rule, *split)
    assert jax.typeof(together) == jax.typeof(split[0])
    np.testing.assert_allclose(jax.device_get(together), alone, rtol=1e-5, atol=1e-6)


# Zeros


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("magnitude", ["unit", "glorot", "kernel"])
def test_the_sign_of_a_zero_weight_is_zero(magnitude, zero):
    kernel, feedback = jnp.full((2, 3), zero), jnp.full((2, 3), -5.0)
    chex.assert_trees_all_equal(sign_sync(magnitude, kernel, feedback), jnp.zeros((2, 3)))


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("magnitude", ["preserve", "norm", "redraw"])
def test_a_zero_weight_counts_as_positive_where_magnitudes_are_kept(magnitude, zero):
    feedback = -5.0 * np.ones((2, 3), np.float32)
    synced = sign_sync(magnitude, np.full((2, 3), zero, np.float32), feedback)
    assert np.all(np.asarray(synced) > 0)
    if magnitude != "redraw":
        chex.assert_trees_all_equal(synced, jnp.full((2, 3), 5.0))


def test_magnitudes_survive_a_kernel_that_passes_through_zero():
    feedback = draw("Gaussian", 1, (7, 5))
    for kernel in (draw("Gaussian", 0, (7, 5)), np.zeros((7, 5), np.float32)):
        feedback = sign_sync("preserve", kernel, feedback)
    chex.assert_trees_all_equal(feedback, np.abs(draw("Gaussian", 1, (7, 5))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@every_rule
def test_zeros_everywhere_give_no_nan(rule, dtype):
    kernel, zeros = jnp.asarray(draw("Gaussian", 0, (3, 5)), dtype), jnp.zeros((3, 5), dtype)
    for pair in ((kernel, zeros), (zeros, kernel), (zeros, zeros)):
        assert np.all(np.isfinite(np.asarray(apply(rule, *pair), np.float32)))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_norm_neither_underflows_nor_overflows(size):
    for first, rms in ((3, 12.5**0.5), (0, 8**0.5), (1e-25, 8**0.5)):
        feedback = np.float32(size) * np.array([[first, 4]], np.float32)
        synced = sign_sync("norm", np.array([[1, -1]], np.float32), feedback)
        expected = np.float32(size) * np.float32(rms) * np.array([[1, -1]], np.float32)
        chex.assert_trees_all_close(synced, expected, rtol=1e-6)


# Dtypes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@every_rule
def test_rules_keep_shape_and_dtype(rule, dtype):
    kernel = jax.ShapeDtypeStruct((3, 5), dtype)
    synced = jax.eval_shape(functools.partial(apply, rule), kernel, kernel, KEY)
    assert synced.shape == (3, 5)
    if getattr(rule, "magnitude", None) in ("norm", "kernel"):
        assert synced.dtype == jnp.float32  # summed in float32; `sync_feedback` casts it back
    else:
        assert synced.dtype == dtype


# Rules as values


@every_rule
def test_rules_are_values(rule):
    same = dataclasses.replace(rule) if not isinstance(rule, rules.Fixed) else rules.Fixed()
    assert rule == same == copy.deepcopy(rule) == pickle.loads(pickle.dumps(rule))
    assert hash(rule) == hash(same)
    assert sum(rule == other for other in ALL_RULES) == 1
    assert eval(repr(rule), vars(rules)) == rule
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.period = 2


def test_rules_print_as_they_are_written():
    assert repr(rules.Fixed()) == "Fixed()"
    assert repr(rules.SignSync(period=10, magnitude="norm")) == (
        "SignSync(period=10, magnitude='norm')"
    )
    assert repr(rules.Transport(rate=0.5)) == "Transport(period=1, rate=0.5)"
    assert repr(rules.WeightMirror(rate=0.5)) == (
        "WeightMirror(period=1, rate=0.5, decay=None, scale=1.0, batch_size=64)"
    )


def test_periods_tell_rules_apart():
    assert rules.SignSync(period=2) != rules.SignSync(period=3)
    assert rules.SignSync(period=np.int64(3)) == rules.SignSync(period=3)


def test_equal_rules_do_not_retrace():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(rule, kernel):
        traces.append(rule)
        return first_sync(rule, kernel, kernel)

    for _ in range(3):
        run(rules.SignSync(magnitude="norm"), jnp.ones((2, 3)))
    assert traces == [rules.SignSync(magnitude="norm")]


def test_a_rule_with_an_array_period_is_accepted_and_not_hashable():
    for period in (jnp.array(5), np.array(3)):
        rule = rules.SignSync(period=period)
        assert rule.period is period
        with pytest.raises(TypeError, match="unhashable"):
            hash(rule)


def test_a_rule_takes_a_traced_period():
    periods = jax.jit(lambda period: rules.SignSync(period=period).period + 1)(jnp.array(5))
    assert periods == 6


# Errors


@pytest.mark.parametrize("period", [0, -3, 2.5, "x", None, float("nan"), 1.0])
@pytest.mark.parametrize("rule", [rules.SignSync, rules.Transport, rules.WeightMirror])
def test_a_period_that_is_no_positive_integer_raises(rule, period):
    message = rf"{rule.__name__}: period is {period!r}; expected an integer of at least 1"
    with pytest.raises(ValueError, match=message):
        rule(period=period)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), float("inf"), "fast", None])
def test_a_rate_outside_the_unit_interval_raises(rate):
    message = rf"Transport: rate is {rate!r}; expected a number in \[0, 1\]"
    with pytest.raises(ValueError, match=message):
        rules.Transport(rate=rate)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "a", None])
@pytest.mark.parametrize("name", ["rate", "scale"])
def test_a_mirrors_rate_and_scale_are_positive(name, value):
    with pytest.raises(ValueError, match=rf"WeightMirror: {name} is {value!r}; expected a positiv"):
        rules.WeightMirror(**{name: value})


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, None])
def test_a_mirrors_batch_has_an_example(batch_size):
    message = rf"WeightMirror: batch_size is {batch_size!r}; expected an integer of at least 1"
    with pytest.raises(ValueError, match=message):
        rules.WeightMirror(batch_size=batch_size)


@pytest.mark.parametrize(
    ("options", "shown"),
    [({"decay": 0}, "0"), ({"decay": 1.1}, "1.1"), ({"rate": 0.5, "scale": 2.0}, "2.0")],
)
def test_a_mirrors_decay_lies_in_the_unit_interval(options, shown):
    message = rf"WeightMirror: decay is {shown}; expected a number in \(0, 1\]. By default it is"
    with pytest.raises(ValueError, match=message):
        rules.WeightMirror(**options)


@pytest.mark.parametrize("shape", [(3,), ()])
def test_a_kernel_of_one_axis_takes_no_noise(shape):
    kernel = jnp.ones(shape)
    with pytest.raises(
        ValueError, match=rf"has shape {re.escape(str(shape))}; expected \(\*window"
    ):
        rules.WeightMirror()(kernel, kernel, KEY)


def test_check_period_names_who_asks_and_lets_traced_ones_pass():
    for period in (1, np.int64(7), jnp.array(2)):
        rules.check_period("me", period)
    jax.eval_shape(lambda period: rules.check_period("me", period), jnp.array(0))
    with pytest.raises(ValueError, match="me: period is 0; expected an integer of at least 1"):
        rules.check_period("me", 0)


@pytest.mark.parametrize("magnitude", ["Unit", "", None, 1])
def test_an_unknown_magnitude_raises(magnitude):
    message = rf"magnitude is {magnitude!r}; expected one of 'norm', 'unit', 'preserve', 'glorot'"
    with pytest.raises(ValueError, match=message):
        rules.SignSync(magnitude=magnitude)


@pytest.mark.parametrize("shape", [(3,), ()])
@pytest.mark.parametrize("magnitude", ["glorot", "redraw"])
def test_a_kernel_without_fans_raises_for_magnitudes_that_need_them(magnitude, shape):
    message = rf"kernel of shape {re.escape(str(shape))} has no fan-in and fan-out"
    with pytest.raises(ValueError, match=message):
        sign_sync(magnitude, np.ones(shape, np.float32), np.ones(shape, np.float32))


@pytest.mark.parametrize("magnitude", ["unit", "preserve", "norm"])
def test_other_magnitudes_take_a_kernel_of_one_axis(magnitude):
    synced = sign_sync(magnitude, np.array([2.0, -3.0]), np.array([-1.0, 1.0]))
    chex.assert_trees_all_equal(synced, jnp.array([1.0, -1.0]))


def test_periods_and_rates_go_by_name():
    for make, message in (
        (
            lambda: rules.SignSync(10),
            r"SignSync\(10\) .* expected SignSync\(period=..., magnitude=",
        ),
        (lambda: rules.SignSync("unit"), r"SignSync\('unit'\) has positional arguments"),
        (lambda: rules.Transport(10, 0.5), r"Transport\(10, 0.5\) .* Transport\(period=..., rate="),
        (lambda: rules.WeightMirror(10), r"expected WeightMirror\(period=..., rate=..., decay="),
        (lambda: rules.Fixed(10), r"Fixed\(10\) has positional arguments; expected Fixed\(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="unexpected keyword argument 'period'"):
        rules.Fixed(period=10)


def test_a_rule_without_a_formula_says_so():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Empty(rules.Rule):
        pass

    with pytest.raises(NotImplementedError, match="Empty must define __call__"):
        Empty(period=2)(jnp.ones(2), jnp.ones(2), KEY)


@pytest.mark.parametrize("period", [jnp.array(0), np.array(-3), jnp.array(2.5), True, np.True_])
def test_a_concrete_period_is_validated_whatever_holds_it(period):
    with pytest.raises(ValueError, match="SignSync: period is"):
        rules.SignSync(period=period)


@pytest.mark.parametrize("period", [2**31, np.int64(2**31), np.array(2**40), 10**30])
def test_a_period_beyond_int32_raises(period):
    with pytest.raises(ValueError, match=rf"period is .*; .* \(at most {2**31 - 1}, int32's large"):
        rules.SignSync(period=period)
    assert rules.SignSync(period=2**31 - 1).period == 2**31 - 1


@pytest.mark.parametrize("period", [np.array([3, 0]), jnp.array([1, 2]), [1, 2]])
def test_several_periods_in_one_rule_raise(period):
    with pytest.raises(ValueError, match=r"period has shape \(2,\); expected a scalar. .*vmap"):
        rules.SignSync(period=period)


def test_a_rule_of_ones_own_may_take_values_by_place():
    @dataclasses.dataclass(frozen=True)
    class Leak(rules.Rule):
        rate: float = 0.0

    assert Leak(0.5) == Leak(rate=0.5) == copy.deepcopy(Leak(0.5))


def test_signs_that_keep_the_norm_are_the_default():
    assert rules.SignSync() == rules.SignSync(magnitude="norm")
    feedback = sign_sync("norm", np.array([[2.0, -3.0]]), np.array([[0.3, 0.4]]))
    np.testing.assert_allclose(np.linalg.norm(feedback), 0.5, rtol=1e-6)


def test_a_rule_with_another_signature_is_refused_where_it_is_defined():
    message = r"Short.__call__ has the signature \(self, kernel, feedback\); expected \(self, ker"
    with pytest.raises(ValueError, match=message):

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Short(rules.Rule):
            def __call__(self, kernel, feedback):
                return feedback


def test_a_rule_with_fields_that_is_not_a_dataclass_is_refused():
    class Leak(rules.Rule):
        rate: float = 0.1

    with pytest.raises(
        ValueError, match="Leak declares rate but is not a dataclass; put @dataclass"
    ):
        Leak()


def own_init(self, *, scale=1.0, period=1):
    object.__setattr__(self, "scale", scale)
    object.__setattr__(self, "period", period)


@pytest.mark.parametrize(
    "decorate", [lambda cls: cls, dataclasses.dataclass], ids=["plain", "data"]
)
@pytest.mark.parametrize("base", [rules.Rule, rules.SignSync])
def test_a_rule_with_an_init_of_its_own_is_refused_where_it_is_defined(base, decorate):
    message = (
        r"Scaled has an __init__ of its own; .* @dataclasses.dataclass.*`scale: float`.*__post"
    )
    with pytest.raises(ValueError, match=message):
        decorate(type("Scaled", (base,), {"__init__": own_init}))
    mixed = type("Mixed", (), {"__init__": own_init})
    with pytest.raises(ValueError, match="an __init__ of its own, by its base Mixed; expected"):
        type("Scaled", (mixed, base), {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Percent(rules.Rule):
    """A rule that changes its values when it is made."""

    rate: float

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "rate", self.rate / 100)

    def __call__(self, kernel, feedback, key):
        return self.rate * kernel


@pytest.mark.parametrize("slots", [False, True])
def test_a_state_keeps_all_values_of_its_rule_but_the_period(slots):
    @dataclasses.dataclass(frozen=True, kw_only=True, slots=slots)
    class Own(Percent):
        shift: float

    for rule in (Percent(rate=50.0, period=5), Own(rate=50.0, shift=2.0, period=5), *ALL_RULES):
        state = init_feedback(KEY, {"kernel": jnp.ones((2, 2))}, rule)
        assert type(state.rule) is type(rule) and int(state.period) == rule.period
        assert dataclasses.asdict(state.rule) == dataclasses.asdict(rule) | {"period": 1}


def test_a_rule_is_compared_by_all_its_fields():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Part(rules.Rule):
        scale: float = dataclasses.field(compare=False)

    @dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
    class Identical(rules.Rule):
        scale: float

    for kind, how in ((Part, "compare=False for scale"), (Identical, r"dataclass\(eq=False\)")):
        with pytest.raises(
            ValueError, match=f"{kind.__name__} has {how}; expected a comparison of"
        ):
            kind(scale=2.0)


def test_a_rule_whose_init_and_call_disagree_is_refused():
    def first(self, kernel, feedback, key):
        return jnp.zeros(())

    def text(self, kernel, feedback, key):
        return "abc"

    def short(self, kernel):
        return None

    def with_memory(self, kernel, feedback, key, memory):
        return feedback, memory

    def without(self, kernel, feedback, key):
        return feedback

    def pair(self, kernel, feedback, key):
        return feedback, jnp.zeros(())

    def forgets(self, kernel, feedback, key, memory):
        return feedback, "abc"

    params = {"kernel": jnp.ones((2, 2))}
    for methods, message in (
        ({"init": first, "__call__": without}, r"init returned a memory .* \(kernel, .*memory\)"),
        ({"__call__": with_memory}, r"Own.__call__ has .* with a memory.* a method init\(self"),
        ({"init": short, "__call__": without}, r"Own.init has the signature \(kernel\); expected"),
        ({"__call__": pair}, r"a tuple for \['kernel'\]; expected feedback alone.* init\("),
        ({"init": text, "__call__": with_memory}, "Own.init returned 'abc'; expected None or a"),
        ({"init": first, "__call__": forgets}, r"a memory of str for .* expected \(\(\), "),
    ):
        rule = dataclasses.dataclass(frozen=True)(type("Own", (rules.Rule,), methods))()
        with pytest.raises(ValueError, match=message):
            sync_feedback(params, init_feedback(KEY, params, rule), 0)
