"""Training goes on with what is missing, keeps each part at once, and does nothing twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from jax import lax
from soap_jax.study.config import StudyConfig
from soap_jax.study.directory import ResultsDir

from soap_jax import data, sweeps
from soap_jax.study import experiment, results, runner

CONFIG = StudyConfig(
    methods=("bp", "sign"),
    learning_rates=(0.1, 1.0),
    seeds=3,
    periods=(1, 4),
    epochs=2,
    batch_size=8,
    evaluations=2,
    hidden=(3,),
    chunk_size=1,
)
TOLD = {"bp": [0, 4, 6], "sign": [0, 4, 6, 10, 12]}
"""What progress says on four devices: a call is of one period."""


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch):
    """Runs that compile in no time: a chain of numbers that depends on all of a run's own."""

    def make_run(config, method, num_classes, scaling):
        def run(seed, learning_rate, period, arrays):
            steps = experiment.evaluation_steps(config, len(arrays.train.labels))
            x = jnp.sin(seed + learning_rate) + period + arrays.train.images.mean()
            losses = lax.scan(lambda x, _: (jnp.cos(x * 1.1) + 1.0,) * 2, x, length=steps[-1])[1]
            rows = {"validation_loss": losses[:3], "validation_accuracy": losses[1:4]}
            if method == "sign":
                rows["weight_angle/Dense_1"] = losses[2:5]
            return experiment.Record(losses, rows, losses[-1], losses[-2])

        return run

    monkeypatch.setattr(experiment, "make_run", make_run)


def toy():
    rng = np.random.default_rng(0)

    def split(num):
        return data.Split(
            rng.integers(0, 17, (num, 3, 3), np.uint8), rng.integers(0, 3, num, np.int32)
        )

    return data.Dataset("toy", split(50), split(9), 3, 16, "toy")


def begun(path, config=CONFIG):
    directory = ResultsDir(path, config)
    directory.begin(results.provenance(config, toy()))
    return directory


def finished(path, config=CONFIG, **options):
    directory = begun(path, config)
    runner.train(config, toy(), directory, **options)
    return directory.finish()


@pytest.fixture
def unbroken(tmp_path):
    """The tables of a study that nothing stopped."""
    return finished(tmp_path / "unbroken")


def assert_same(tables, others):
    for name, table in others.items():
        pd.testing.assert_frame_equal(tables[name], table, check_exact=True)


class Stop(BaseException):
    pass


def needs_four_devices():
    if jax.default_backend() != "cpu" or jax.device_count() != 4:
        pytest.skip("needs four CPU devices")


@pytest.mark.parametrize("stop_at", [("bp", 6), ("sign", 0), ("sign", 4), ("sign", 12)])
def test_a_study_stopped_anywhere_goes_on_with_the_rest_and_ends_alike(stop_at, unbroken, tmp_path):
    needs_four_devices()

    def stop(name, done, total):
        if (name, done) == stop_at:
            raise Stop

    directory = begun(tmp_path)
    with pytest.raises(Stop):
        runner.train(CONFIG, toy(), directory, on_progress=stop)
    kept = {name: len(directory.done(name)) for name in CONFIG.methods}
    method, done = stop_at  # told before the part is kept
    before = TOLD[method][max(TOLD[method].index(done) - 1, 0)]
    assert kept == ({"bp": 6, "sign": before} if method == "sign" else {"bp": before, "sign": 0})

    parts = {part: part.stat().st_mtime_ns for part in tmp_path.glob("parts/*")}
    told = {name: [] for name in CONFIG.methods}
    runner.train(
        CONFIG, toy(), begun(tmp_path), on_progress=lambda name, done, _: told[name].append(done)
    )
    assert parts.items() <= {p: p.stat().st_mtime_ns for p in tmp_path.glob("parts/*")}.items()
    for name in CONFIG.methods:
        rest = TOLD[name][TOLD[name].index(kept[name]) :]
        assert told[name] == [None, *(rest if len(rest) > 1 else [])]
    assert_same(begun(tmp_path).finish(), unbroken)


def test_nothing_is_compiled_where_nothing_is_missing(unbroken, tmp_path, monkeypatch):
    directory = begun(tmp_path)
    runner.train(CONFIG, toy(), directory)
    monkeypatch.setattr(sweeps, "_compile", None)
    told = []
    runner.train(CONFIG, toy(), directory, on_progress=lambda *call: told.append(call))
    assert told == [("bp", None, 6), ("sign", None, 12)]
    assert_same(directory.finish(), unbroken)


@pytest.mark.parametrize("num_devices", [2, 3])
def test_another_number_of_cpu_devices_gives_the_same(num_devices, unbroken, tmp_path, monkeypatch):
    needs_four_devices()

    def stop(name, done, total):
        if (name, done) == ("sign", 10):
            raise Stop

    with pytest.raises(Stop):
        runner.train(CONFIG, toy(), begun(tmp_path), on_progress=stop)
    devices = jax.devices()[:num_devices]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    assert_same(finished(tmp_path), unbroken)


@pytest.mark.parametrize("limit", [None, 1.0])
def test_chunk_size_and_memory_limit_do_not_change_cpu_results(limit, unbroken, tmp_path):
    config = dataclasses.replace(CONFIG, chunk_size=5, memory_limit=limit)
    assert_same(finished(tmp_path, config), unbroken)


def test_every_part_is_kept_before_the_next_is_trained(tmp_path):
    needs_four_devices()
    directory = begun(tmp_path)
    kept = {name: [] for name in CONFIG.methods}
    runner.train(
        CONFIG,
        toy(),
        directory,
        on_progress=lambda name, *_: kept[name].append(len(directory.done(name))),
    )
    # At the start of the method, when it is compiled, and after each call, before its part is kept.
    assert kept == {name: [0, 0, *told[:-1]] for name, told in TOLD.items()}


def test_one_process_listens_to_itself():
    assert runner.first_process_says(True) and not runner.first_process_says(False)
