"""Sweeps: every run of a grid is the run alone, on however many devices."""

import functools
import re

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


@pytest.mark.parametrize("num", [3, np.int64(3)])
def test_a_number_of_seeds_stands_for_the_seeds_from_zero(num):
    got, expected = (sweeps.sweep(record, seeds=s, learning_rates=[0.1]) for s in (num, range(3)))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert sweeps.grid(seeds=num, learning_rates=[0.1])[2] == (2, 0.1, 1)


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


def test_the_same_sweep_compiles_once():
    """Other seeds, rates, periods and data, and as many runs: what JAX compiled serves again."""
    compiled = []

    def run(seed, learning_rate, period, data):
        return seed + learning_rate * period + data.sum()

    def listen(event, duration, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    def sweep(seeds, rates, value):
        return training.sweep(
            run, seeds=seeds, learning_rates=rates, args=(jnp.full(3, value),), chunk_size=2
        )

    first = sweep([1, 2], [0.5], 1.0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        again = sweep([3, 4], [0.25], 2.0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert first.tolist() == [[[4.5, 5.5]]]
    assert again.tolist() == [[[9.25, 10.25]]]
    assert compiled == []


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
    ({"seeds": 0}, "seeds is 0; expected at least 1"),
    ({"seeds": 2.5}, "seeds is 2.5; expected an integer"),
    ({"seeds": None}, "seeds is None; expected a list of integers from 0"),
    ({"learning_rates": 0.1}, "learning_rates is 0.1; expected a list of positive"),
    ({"periods": 3}, "periods is 3; expected a list of integers from 1"),
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
    ({"periods": [0]}, "periods has 0 at index 0; expected integers from 1 to 2147483647"),
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


POINTS = sweeps.grid(seeds=[5, 1, 2], learning_rates=[0.1, 0.3], periods=[7, 1])


def collected(parts):
    """All parts as one, in the order of the points, and what each held."""
    parts = list(parts)
    indices = [i for part in parts for i in part.indices]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *[part.results for part in parts])
    order = np.argsort(indices)
    return jax.tree.map(lambda leaf: leaf[order], joined), [part.indices for part in parts]


def test_a_grid_has_seeds_fastest_then_rates_then_periods():
    assert POINTS[:4] == [(5, 0.1, 7), (1, 0.1, 7), (2, 0.1, 7), (5, 0.3, 7)]
    assert POINTS[6:] == [(s, r, 1) for s, r, _ in POINTS[:6]]
    with pytest.raises(ValueError, match="seeds is empty"):
        sweeps.grid(seeds=[], learning_rates=[0.1])


@pytest.mark.parametrize(
    ("num_devices", "chunk_size", "calls"),
    [
        (1, 1, [[i] for i in range(12)]),
        (1, 4, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]),  # as equal as can be
        (1, None, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]),
        (2, 2, [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11]]),
        (4, 9, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]),  # a call is of one period
    ],
)
def test_parts_are_calls_in_order_and_each_run_is_its_own(num_devices, chunk_size, calls):
    devices = jax.devices()[:num_devices]
    if len(devices) < num_devices or jax.default_backend() != "cpu":
        pytest.skip("needs CPU devices")
    parts = sweeps.iterate(record, POINTS, chunk_size=chunk_size, devices=devices)
    got, indices = collected(parts)
    assert indices == calls
    assert list(zip(got["seed"], got["rate"], got["period"], strict=True)) == [
        (s, np.float32(r), t) for s, r, t in POINTS
    ]


@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("done", [[0], [0, 1, 2, 3, 4, 5], [1, 4, 6, 7, 8, 9, 11], range(11)])
def test_what_is_done_is_left_out_and_the_rest_is_as_ever(done, one_by_one, monkeypatch):
    real = sweeps._compile
    monkeypatch.setattr(sweeps, "_compile", lambda *args, **_: real(*args, one_by_one=one_by_one))
    told = []
    options = {"chunk_size": 1, "devices": jax.devices()[:2]}
    everything, calls = collected(sweeps.iterate(record, POINTS, **options))
    parts = sweeps.iterate(
        record, POINTS, done=done, on_progress=lambda *call: told.append(call), **options
    )
    got, indices = collected(parts)
    rest = [i for i in range(12) if i not in done]
    assert [i for part in indices for i in part] == rest
    assert indices == [[i for i in call if i in rest] for call in calls if set(call) & set(rest)]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[rest]), got, everything)
    assert told[0] == (len(done), 12) and told[-1] == (12, 12) and len(told) == 1 + len(indices)


def test_nothing_is_traced_where_all_is_done():
    def run(*_):
        raise AssertionError("traced")

    assert list(sweeps.iterate(run, POINTS, done=range(12))) == []
    assert list(sweeps.iterate(run, [])) == []


def test_parts_come_as_soon_as_they_are_there():
    calls = []
    parts = sweeps.iterate(
        record,
        POINTS,
        chunk_size=1,
        devices=jax.devices()[:1],
        on_progress=lambda *c: calls.append(c),
    )
    assert calls == []  # nothing happens before it is asked for
    next(parts)
    assert calls == [(0, 12), (1, 12)]


def chaos(seed, learning_rate, period):
    """A chain of numbers that shows the last bit of whatever was rounded on the way."""
    x = jnp.sin(seed + learning_rate) + period
    x, path = lax.scan(lambda x, _: (jnp.cos(3.7 * x) + learning_rate * x,) * 2, x, length=60)
    return path


@pytest.mark.parametrize(("num_devices", "chunk_size"), [(2, 1), (2, 2), (3, 1), (4, 1), (4, 3)])
def test_the_bits_of_a_run_do_not_depend_on_chunks_or_devices_on_cpu(num_devices, chunk_size):
    if jax.default_backend() != "cpu" or jax.device_count() < 4:
        pytest.skip("needs four CPU devices")
    options = {"chunk_size": chunk_size, "devices": jax.devices()[:num_devices]}
    got, _ = collected(sweeps.iterate(chaos, POINTS, **options))
    expected, _ = collected(sweeps.iterate(chaos, POINTS, chunk_size=2, devices=jax.devices()[2:]))
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(got[:, 0], [jax.jit(chaos)(*p)[0] for p in POINTS], rtol=1e-6)


def test_a_device_without_a_run_does_none():
    """On CPU; there 5 runs on 4 devices take as long as 2 runs."""
    if jax.default_backend() != "cpu" or jax.device_count() < 4:
        pytest.skip("needs four CPU devices")
    done = []

    def run(seed, learning_rate, period):
        jax.debug.callback(lambda seed: done.append(int(seed)), seed)
        return seed

    got = sweeps.sweep(run, seeds=[3, 1, 4, 15, 9], learning_rates=[0.1], devices=jax.devices()[:4])
    jax.effects_barrier()
    assert got.tolist() == [[[3, 1, 4, 15, 9]]] and sorted(done) == [1, 3, 4, 9, 15]


def bulky(seed, learning_rate, period, table):
    """About a mebibyte of temporaries and a kibibyte of results."""
    x = jnp.sin(table * learning_rate + seed)
    return (x @ jnp.cos(x) @ x)[0] * period


TABLE = np.ones((256, 256), np.float32)


def bytes_needed(program):
    memory = program.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


@pytest.fixture
def compiled(monkeypatch, request):
    """Bytes that each compiled chunk needs; runs go at once, as on accelerators, if so asked."""
    sizes, real = {}, sweeps._compile

    def compile_and_note(run, mesh, chunk, args, *, one_by_one):
        one_by_one = one_by_one and request.param == "one by one"
        program = real(run, mesh, chunk, args, one_by_one=one_by_one)
        assert chunk // mesh.size not in sizes, "compiled twice"
        sizes[chunk // mesh.size] = bytes_needed(program)
        return program

    monkeypatch.setattr(sweeps, "_compile", compile_and_note)
    return sizes


def swept(**options):
    return sweeps.sweep(
        bulky, seeds=range(40), learning_rates=[0.1], args=(TABLE,), chunk_size=20, **options
    )


@pytest.mark.parametrize("compiled", ["at once"], indirect=True)
@pytest.mark.parametrize("num_devices", [1, 2])
def test_the_chunk_is_the_largest_that_fits_the_limit(compiled, num_devices):
    devices = jax.devices()[:num_devices]
    swept(devices=devices)
    [(most, size_of_most)] = compiled.items()
    assert most == 20
    for limit, expected in [(size_of_most, 20), (size_of_most - 1, 19), (size_of_most / 2, None)]:
        compiled.clear()
        got = swept(devices=devices, memory_limit=limit)
        fitting = max(chunk for chunk, size in compiled.items() if size <= limit)
        assert fitting == expected or expected is None
        assert fitting == most or compiled[fitting + 1] > limit, "one more would fit"
        assert len(compiled) <= 6  # few programs are compiled to find it
        np.testing.assert_allclose(got, swept_alone(), rtol=1e-4)


@functools.cache
def swept_alone():
    return np.stack([[[jax.jit(bulky)(s, np.float32(0.1), 1, TABLE) for s in range(40)]]])


@pytest.mark.parametrize("compiled", ["at once"], indirect=True)
def test_memory_is_counted_per_device(compiled):
    for num_devices in (1, 2, 4):
        for _ in sweeps.iterate(
            bulky,
            sweeps.grid(seeds=range(4 * num_devices), learning_rates=[0.1]),
            args=(TABLE,),
            chunk_size=4,
            devices=jax.devices()[:num_devices],
        ):
            pass
        assert compiled.pop(4) == pytest.approx(4 * 2**20, rel=0.5), num_devices


@pytest.mark.parametrize("compiled", ["one by one", "at once"], indirect=True)
def test_too_low_a_limit_says_what_is_needed(compiled):
    with pytest.raises(
        ValueError, match=r"memory_limit is 1e\+05 bytes per device, but the smallest program n"
    ):
        swept(memory_limit=1e5)
    needed = min(compiled.values())
    compiled.clear()
    with pytest.raises(
        ValueError, match=re.escape(f"the smallest program needs {needed:.3g} bytes.")
    ):
        swept(memory_limit=1e5)


@pytest.mark.parametrize("compiled", ["one by one"], indirect=True)
def test_a_limit_changes_no_bit_on_cpu(compiled):
    if jax.default_backend() != "cpu":
        pytest.skip("of the CPU")
    expected = swept(devices=jax.devices()[:2])
    limit = compiled[20] - 10_000
    compiled.clear()
    got = swept(devices=jax.devices()[:2], memory_limit=limit)
    assert max(chunk for chunk, size in compiled.items() if size <= limit) < 20
    np.testing.assert_array_equal(got, expected)
