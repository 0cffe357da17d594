"""Sweeps: every run of a grid is the run alone, on however many devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from soap_jax import Transport, init_feedback, models, sweeps, training

GRID = {"seeds": [3, 0, 7], "learning_rates": [0.5, 0.1], "periods": [1, 2]}
X = np.random.default_rng(0).random((24, 6), np.float32)
LABELS = X[:, :3].argmax(1).astype(np.int32)
MODEL = models.MLP((5, 3))


def train(seed, learning_rate, period, x, labels):
    """Two epochs of feedback alignment; streams of its own for init, feedback and order."""
    init_key, feedback_key, order_key = jax.random.split(jax.random.key(seed), 3)
    params = MODEL.init(init_key, x[:1])["params"]
    optimizer = optax.sgd(learning_rate)
    rule = Transport(period=period, rate=0.5)
    feedback = init_feedback(feedback_key, params, rule, where="Dense_1/kernel")

    def apply_fn(params, feedback, x):
        return MODEL.apply({"params": params, "feedback": feedback}, x)

    step = training.make_train_step(apply_fn, optimizer)
    state = training.init_train_state(params, optimizer, feedback=feedback)

    def epoch(state, key):
        return training.train_epoch(step, state, (x, labels), key, batch_size=5)

    state, losses = lax.scan(epoch, state, jax.random.split(order_key, 2))
    return {"losses": losses, "params": state.params, "feedback": state.feedback.feedback}


def cell(results, p, r, s):
    return jax.tree.map(lambda leaf: leaf[p, r, s], results)


@functools.cache
def solo_runs():
    """Each run of GRID alone, as a Python loop would do it."""
    alone = jax.jit(train)
    runs = [
        [
            [alone(np.int32(s), np.float32(r), np.int32(p), X, LABELS) for s in GRID["seeds"]]
            for r in GRID["learning_rates"]
        ]
        for p in GRID["periods"]
    ]
    flat = [run for by_rate in runs for by_seed in by_rate for run in by_seed]
    return jax.tree.map(lambda *leaves: np.stack(leaves).reshape(2, 2, 3, *leaves[0].shape), *flat)


@pytest.mark.parametrize(("num_devices", "chunk_size"), [(1, None), (1, 1), (2, 2), (4, 1)])
def test_every_run_is_the_run_alone_to_the_bit_on_cpu(num_devices, chunk_size):
    if jax.default_backend() != "cpu" or jax.device_count() < num_devices:
        pytest.skip("needs CPU devices")
    got = sweeps.sweep(
        train, **GRID, args=(X, LABELS), chunk_size=chunk_size, devices=jax.devices()[:num_devices]
    )
    jax.tree.map(np.testing.assert_array_equal, got, solo_runs())


def test_the_runs_of_the_reference_differ_by_seed_rate_and_period_and_learn():
    losses = solo_runs()["losses"]
    assert losses.shape == (2, 2, 3, 2, 4)
    assert len(np.unique(losses[..., -1, -1])) == 12
    assert losses[:, 0, :, 1].mean() < 0.9 * losses[:, 0, :, 0].mean()


def test_runs_at_once_under_vmap_are_the_runs_alone_to_rounding(monkeypatch):
    compiled = []
    real = sweeps._compile

    def at_once(*args, one_by_one):
        compiled.append(one_by_one)
        return real(*args, one_by_one=False)

    monkeypatch.setattr(sweeps, "_compile", at_once)
    got = sweeps.sweep(train, **GRID, args=(X, LABELS), chunk_size=2, devices=jax.devices()[:2])
    assert compiled == [jax.default_backend() == "cpu"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, solo_runs()
    )


@pytest.mark.parametrize("one_by_one", [True, False])
def test_a_device_does_its_runs_one_by_one_or_a_chunk_at_once(monkeypatch, one_by_one):
    batches = []

    @jax.custom_batching.custom_vmap
    def double(x):
        return 2 * x

    @double.def_vmap
    def batched(axis_size, in_batched, x):
        batches.append(axis_size)
        return 2 * x, in_batched[0]

    real = sweeps._compile
    monkeypatch.setattr(sweeps, "_compile", lambda *args, **_: real(*args, one_by_one=one_by_one))
    got = sweeps.sweep(
        lambda seed, learning_rate, period: double(seed),
        seeds=range(6),
        learning_rates=[0.1],
        chunk_size=3,
        devices=jax.devices()[:2],
    )
    np.testing.assert_array_equal(got, [[[0, 2, 4, 6, 8, 10]]])
    assert batches == ([] if one_by_one else [3])


def record(seed, learning_rate, period):
    return {"seed": seed, "rate": learning_rate, "period": period}


@pytest.mark.parametrize("num_devices", [1, 3, 4])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5])
def test_axes_are_periods_rates_seeds_in_the_order_given(num_devices, chunk_size):
    seeds, rates, periods = [5, 2, 9, 2**31 - 1, 0], [0.3, 0.1], [10, 1, 3]
    got = sweeps.sweep(
        record,
        seeds=seeds,
        learning_rates=rates,
        periods=periods,
        chunk_size=chunk_size,
        devices=jax.devices()[:num_devices],
    )
    p, r, s = np.meshgrid(periods, np.float32(rates), seeds, indexing="ij")
    np.testing.assert_array_equal(got["seed"], s)
    np.testing.assert_array_equal(got["rate"], r)
    np.testing.assert_array_equal(got["period"], p)
    assert [got[name].dtype for name in got] == [np.int32, np.float32, np.int32]
    assert all(isinstance(leaf, np.ndarray) for leaf in got.values())


def test_results_keep_their_tree_shapes_and_dtypes():
    def run(seed, learning_rate, period):
        return (
            jnp.full((2, 3), seed),
            None,
            {"hit": seed > 1, "b": learning_rate.astype("bfloat16")},
        )

    matrix, nothing, scalars = sweeps.sweep(run, seeds=[1, 2, 3], learning_rates=[0.5])
    assert (matrix.shape, matrix.dtype, nothing) == ((1, 1, 3, 2, 3), np.int32, None)
    np.testing.assert_array_equal(scalars["hit"], [[[False, True, True]]])
    assert scalars["b"].dtype == jnp.bfloat16


def test_grids_may_be_ranges_tuples_and_numpy_arrays():
    got = sweeps.sweep(
        record, seeds=range(3), learning_rates=np.array([0.1, 0.2]), periods=(np.int64(4),)
    )
    np.testing.assert_array_equal(got["seed"], np.tile(np.arange(3), (1, 2, 1)))
    assert got["period"].min() == got["period"].max() == 4


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_run_is_traced_once(chunk_size):
    traces = 0

    def run(seed, learning_rate, period):
        nonlocal traces
        traces += 1
        return seed * learning_rate * period

    sweeps.sweep(
        run,
        seeds=range(5),
        learning_rates=[0.1, 0.2],
        periods=[1, 2, 3],
        chunk_size=chunk_size,
        devices=jax.devices()[:2],
    )
    assert traces == 1


@pytest.mark.parametrize("num_devices", [1, 4])
def test_args_are_shared_by_all_runs(num_devices):
    def run(seed, learning_rate, period, table, nested):
        return table[seed] + nested["offset"] + jax.random.randint(nested["key"], (), 0, 1000)

    table, key = np.array([10, 20, 30], np.int32), jax.random.key(4)
    got = sweeps.sweep(
        run,
        seeds=[2, 0, 1],
        learning_rates=[0.1],
        args=(table, {"offset": jnp.int32(5), "key": key}),
        devices=jax.devices()[:num_devices],
    )
    drawn = int(jax.random.randint(key, (), 0, 1000))
    np.testing.assert_array_equal(got, [[[35 + drawn, 15 + drawn, 25 + drawn]]])


@pytest.mark.parametrize(
    ("num_devices", "chunk_size", "done"),
    [
        (1, 2, [0, 2, 4, 5, 7, 9, 10]),
        (2, 1, [0, 2, 4, 5, 7, 9, 10]),
        (1, None, [0, 3, 5, 8, 10]),
        (4, 100, [0, 5, 10]),
    ],
)
def test_progress_starts_at_zero_counts_runs_and_ends_at_all_of_them(num_devices, chunk_size, done):
    calls = []
    sweeps.sweep(
        record,
        seeds=range(5),
        learning_rates=[0.1],
        periods=[1, 2],
        chunk_size=chunk_size,
        devices=jax.devices()[:num_devices],
        on_progress=lambda *call: calls.append(call),
    )
    assert calls == [(n, 10) for n in done]


@pytest.mark.parametrize("one_by_one", [True, False])
def test_a_run_that_diverges_leaves_the_others_as_they_are(monkeypatch, one_by_one):
    def run(seed, learning_rate, period):
        def step(w, _):
            return w - learning_rate * 3 * w**2 * jnp.sign(w), None

        return lax.scan(step, jnp.float32(1 + seed), None, length=50)[0]

    real = sweeps._compile
    monkeypatch.setattr(sweeps, "_compile", lambda *args, **_: real(*args, one_by_one=one_by_one))
    rates = [0.01, 1e3, 0.02]
    options = {"seeds": [0, 1], "devices": jax.devices()[:2]}
    got = sweeps.sweep(run, learning_rates=rates, **options)
    assert not np.isfinite(got[0, 1]).any()
    assert np.isfinite(got[0, [0, 2]]).all()
    without = sweeps.sweep(run, learning_rates=[0.01, 0.02], **options)
    np.testing.assert_array_equal(got[0, [0, 2]], without[0])


BAD = [
    ({"seeds": []}, "seeds is empty"),
    ({"learning_rates": []}, "learning_rates is empty"),
    ({"periods": []}, "periods is empty"),
    ({"seeds": [0.5]}, "seeds has 0.5 at index 0; expected integers"),
    ({"seeds": [-1]}, "seeds has -1 at index 0"),
    ({"seeds": [True]}, "seeds has True at index 0"),
    ({"seeds": [1, 1]}, "seeds has a value twice"),
    ({"learning_rates": [0.1, 0.0]}, "learning_rates has 0.0 at index 1; expected positive"),
    ({"learning_rates": [-0.1]}, "learning_rates has -0.1"),
    ({"learning_rates": [float("nan")]}, "learning_rates has nan"),
    ({"learning_rates": [float("inf")]}, "learning_rates has inf"),
    ({"learning_rates": [0.1, 0.1]}, "learning_rates has a value twice"),
    ({"periods": [0]}, "periods has 0 at index 0; expected integers of at least 1"),
    ({"periods": [True]}, "periods has True at index 0"),
    ({"periods": [2, 2]}, "periods has a value twice"),
    ({"chunk_size": 0}, "chunk_size is 0; expected at least 1"),
    ({"chunk_size": -2}, "chunk_size is -2; expected at least 1"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(change) for change, _ in BAD])
def test_a_bad_grid_raises_before_anything_runs(change, message):
    def run(seed, learning_rate, period):
        raise AssertionError("traced")

    with pytest.raises(ValueError, match=message):
        sweeps.sweep(run, **{"seeds": [0], "learning_rates": [0.1]} | change)
