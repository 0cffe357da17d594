"""Metrics within a scan: measured when due, and only then."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from soap_jax import SignSync, Transport, init_feedback, metrics, ops, recording
from soap_jax.recording import record_alignment, recorded
from soap_jax.transform import layer_errors


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


# Jitted, since op by op each shape compiles again.
weight_angle, norm_ratio = map(jax.jit, (metrics.weight_angle, metrics.norm_ratio))


def make_pair():
    params = {"a": {"kernel": draw(0, 5, 4), "bias": draw(1, 4)}, "b": {"kernel": draw(2, 4, 3)}}
    return params, {"a": None, "b": {"kernel": draw(3, 4, 3)}}


def scan(metrics, num_steps, *, period, start=0):
    """The rows of a run in which every step doubles feedback and adds 1."""
    params, feedback = make_pair()

    def body(feedback, step):
        row = record_alignment(metrics, params, feedback, step, period=period)
        return jax.tree.map(lambda b: 2 * b + 1, feedback), row

    steps = start + jnp.arange(num_steps)
    return jax.jit(lambda feedback: lax.scan(body, feedback, steps)[1])(feedback)


@pytest.mark.parametrize(("period", "start"), [(1, 0), (3, 0), (3, 4), (100, 0), (100, 1)])
def test_rows_are_the_metrics_at_every_period_and_nan_elsewhere(period, start):
    chosen = {"angle": weight_angle, "ratio": norm_ratio}
    rows = scan(chosen, 8, period=period, start=start)
    params, feedback = make_pair()
    for i in range(8):
        due = (start + i) % period == 0
        assert int(rows.step[i]) == (start + i if due else -1)
        for name, metric in chosen.items():
            expected = metric(params, feedback)["b"]["kernel"] if due else np.nan
            got = rows.values[f"{name}/b/kernel"][i]
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        assert set(rows.values) == {"angle/b/kernel", "ratio/b/kernel"}  # a has no feedback
        feedback = jax.tree.map(lambda b: 2 * b + 1, feedback)


def test_feedback_stored_in_fewer_bits_is_synced_and_measured():
    params, _ = make_pair()
    expected = weight_angle(params, jax.tree.map(jnp.sign, params))
    for dtype in (jnp.int8, jnp.bfloat16):
        state = init_feedback(jax.random.key(0), params, SignSync(magnitude="unit"), dtype=dtype)
        row = jax.jit(functools.partial(record_alignment, {"angle": weight_angle}, period=5))(
            params, state, 10
        )
        expected_row = {f"angle/{name}/kernel": expected[name]["kernel"] for name in "ab"}
        chex.assert_trees_all_close(row.values, expected_row, rtol=1e-6)


def test_between_the_periods_nothing_is_computed():
    measured = []

    def counted(params, feedback):
        jax.debug.callback(lambda: measured.append(1), ordered=True)
        return weight_angle(params, feedback)

    rows = scan({"angle": counted}, 10, period=4)
    jax.block_until_ready(rows)
    jax.effects_barrier()
    assert len(measured) == 3  # at 0, 4 and 8


def test_it_is_a_conditional_with_the_metrics_inside():
    params, feedback = make_pair()

    def row(step):
        return record_alignment({"angle": weight_angle}, params, feedback, step, period=4)

    jaxpr = jax.make_jaxpr(row)(0).jaxpr
    (cond,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond")
    sums = sorted(str(branch).count("reduce_sum") for branch in cond.params["branches"])
    assert sums[0] == 0 < sums[1] == str(jaxpr).count("reduce_sum")


def test_recorded_drops_the_steps_that_were_not_measured():
    chosen = {"angle": weight_angle, "ratio": norm_ratio}
    rows = recorded(scan(chosen, 10, period=4))
    every = scan(chosen, 10, period=1)
    assert isinstance(rows, recording.Row)
    np.testing.assert_array_equal(rows.step, [0, 4, 8])
    for name in chosen:
        name = f"{name}/b/kernel"
        got = rows.values[name]
        assert isinstance(got, np.ndarray) and got.shape == (3,)
        np.testing.assert_allclose(got, every.values[name][::4], rtol=1e-5)
    assert recorded(scan(chosen, 3, period=4, start=1)).step.shape == (0,)


def test_a_nan_that_was_measured_is_recorded():
    def zero(params, feedback):
        return weight_angle(params, jax.tree.map(jnp.zeros_like, feedback))

    rows = recorded(scan({"angle": zero}, 4, period=2))
    np.testing.assert_array_equal(rows.step, [0, 2])
    np.testing.assert_array_equal(rows.values["angle/b/kernel"], [np.nan, np.nan])


@pytest.mark.parametrize("step", [0, 1, np.int64(6), jnp.int32(7)])
def test_a_row_has_one_structure_at_every_step(step):
    params, feedback = make_pair()
    chosen = {
        "angle": weight_angle,
        "count": lambda params, feedback: jnp.int32(3),
        "number": lambda params, feedback: 2,
        "half": lambda params, feedback: jnp.bfloat16(0.5),
    }
    row = record_alignment(chosen, params, feedback, step, period=2)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    values = dict.fromkeys(("angle/b/kernel", "count", "number", "half"), scalar)
    expected = recording.Row(jax.ShapeDtypeStruct((), jnp.int32), values)
    chex.assert_trees_all_equal_shapes_and_dtypes(row, expected)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(row))
    if int(step) % 2 == 0:
        assert [float(row.values[name]) for name in ("count", "number", "half")] == [3, 2, 0.5]


def test_a_metric_that_needs_more_has_it_bound():
    params, feedback = make_pair()
    x = draw(4, 6, 5)

    def loss(params, feedback):
        h = jnp.tanh(x @ params["a"]["kernel"])
        b = feedback["b"]["kernel"]
        return jnp.sum(jnp.tanh(ops.feedback_dense(h, params["b"]["kernel"], b)) ** 2)

    gradient_angle = jax.jit(functools.partial(metrics.gradient_angle, jax.grad(loss)))
    chosen = {
        "gradient": gradient_angle,
        "rate": functools.partial(metrics.effective_learning_rate, 0.5),
    }
    rows = scan(chosen, 3, period=2)
    expected = gradient_angle(params, feedback)["a"]["kernel"]
    np.testing.assert_allclose(rows.values["gradient/a/kernel"][0], expected, rtol=1e-4)
    assert float(expected) > 1
    expected = metrics.effective_learning_rate(0.5, params, feedback)["b"]["kernel"]
    np.testing.assert_allclose(rows.values["rate/b/kernel"][0], expected, rtol=1e-5)


def test_the_ranks_of_a_batchs_errors_are_recorded_with_the_batch_bound():
    params, feedback = make_pair()
    x = draw(4, 6, 5)

    def loss(params, x):
        h = jnp.tanh(x @ params["a"]["kernel"])
        return jnp.mean((h @ params["b"]["kernel"]) ** 2)

    def rank(x, params, feedback):
        return metrics.effective_rank(layer_errors(loss)(params, feedback, x))

    rows = recorded(scan({"rank": functools.partial(rank, x)}, 5, period=2))
    assert set(rows.values) == {"rank/a/kernel", "rank/b/kernel"}
    expected = jax.jit(rank)(x, params, feedback)
    for name, value in expected.items():
        np.testing.assert_allclose(rows.values[f"rank/{name}"][0], value, rtol=1e-4)
    # Feedback that changes changes the error of the layer below, and that one's alone.
    below, above = (np.ptp(rows.values[f"rank/{name}/kernel"]) for name in "ab")
    assert below > 1e-3 > above


def test_metrics_of_one_name_raise():
    chosen = {"angle": weight_angle, "angle/b/kernel": lambda params, feedback: 1}
    with pytest.raises(ValueError, match="two leaves are called 'angle/b/kernel'"):
        record_alignment(chosen, *make_pair(), 0, period=1)


def test_kernels_may_be_spread_over_an_explicit_mesh(mesh):
    params, feedback = {"kernel": draw(0, 8, 4)}, {"kernel": draw(1, 8, 4)}
    sharding = NamedSharding(mesh, P("data", None))
    chosen = {"angle": weight_angle}
    alone = weight_angle(params, feedback)
    params, feedback = jax.device_put((params, feedback), sharding)
    row = jax.jit(lambda step: record_alignment(chosen, params, feedback, step, period=2))
    np.testing.assert_allclose(row(4).values["angle/kernel"], alone["kernel"], rtol=1e-5)
    assert jnp.isnan(row(5).values["angle/kernel"])


def test_under_vmap_each_run_has_its_own_clock():
    params, _ = make_pair()
    feedbacks = jnp.stack([draw(3, 4, 3), draw(4, 4, 3)])

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0))
    def rows(b, step):
        feedback = {"b": {"kernel": b}}
        return record_alignment({"angle": weight_angle}, params, feedback, step, period=3)

    row = rows(feedbacks, jnp.array([6, 7]))
    np.testing.assert_array_equal(row.step, [6, -1])
    expected = weight_angle(params, {"b": {"kernel": feedbacks[0]}})["b"]["kernel"]
    np.testing.assert_allclose(row.values["angle/b/kernel"], [expected, np.nan], rtol=1e-5)


# Errors


NO_METRICS = {"none": {}, "list": [], "function": metrics.weight_angle, "number": {"angle": 3}}


@pytest.mark.parametrize("metrics", NO_METRICS.values(), ids=NO_METRICS)
def test_what_are_no_metrics_by_name_raise(metrics):
    with pytest.raises(ValueError, match=r"expected functions of \(params, feedback\) by name"):
        record_alignment(metrics, *make_pair(), 0, period=1)


def test_a_feedback_state_is_synced_as_the_next_step_will_use_it():
    params, _ = make_pair()
    state = init_feedback(jax.random.key(0), params, Transport(period=2))
    chosen = {"weight_angle": metrics.weight_angle}
    for step, synced in ((2, True), (3, False)):
        row = record_alignment(chosen, params, state, step, period=1)
        angles = jnp.array(jax.tree.leaves(row.values))
        assert np.all((angles < 1e-3) == synced)


@pytest.mark.parametrize("period", [0, -1, 1.5, None, True])
def test_a_period_that_is_no_positive_integer_raises(period):
    message = rf"record_alignment: period is {period!r}; expected an integer of at least 1"
    with pytest.raises(ValueError, match=message):
        record_alignment({"angle": weight_angle}, *make_pair(), 0, period=period)


def test_feedback_that_does_not_fit_raises():
    params, feedback = make_pair()
    with pytest.raises(ValueError, match="has no kernel"):
        record_alignment({"angle": weight_angle}, feedback, params, 0, period=1)
