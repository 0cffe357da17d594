"""Tidy tables and the directory that keeps them."""

import json
import os

import numpy as np
import pandas as pd
import pytest

from soap_jax import data
from soap_jax.study import results
from soap_jax.study.config import StudyConfig
from soap_jax.study.experiment import Record

CONFIG = StudyConfig(learning_rates=(0.1, 1.0), seeds=2, evaluations=2, target_loss=0.5)
MARKS = np.array([0, 2, 4])


def record(train_loss):
    """A record of 2 rates x 2 seeds with the given losses `(2, 2, 4)`."""
    shape = (2, 2, 3)
    return Record(
        train_loss=np.asarray(train_loss, np.float32),
        evaluations={
            "validation_accuracy": np.full(shape, 0.5),
            "validation_loss": np.full(shape, 1.0),
        },
        test_loss=np.full((2, 2), 0.9),
        test_accuracy=np.full((2, 2), 0.8),
    )


def facts():
    return results.provenance(CONFIG, data.load("digits"))


def tables():
    falling, slow = [1.0, 0.2, 0.2, 0.2], [1.0, 0.9, 0.9, 0.9]
    broken = [1.0, np.nan, np.nan, np.nan]
    return results.tidy(CONFIG, "fa", record([[falling, slow], [broken, falling]]), MARKS)


def test_there_is_one_row_per_run_and_one_per_evaluation():
    tidy = tables()
    assert len(tidy["runs"]) == 4
    assert len(tidy["evaluations"]) == 4 * 3
    keys = ["method", "learning_rate", "seed", "period"]
    assert not tidy["runs"].duplicated(keys).any()
    assert not tidy["evaluations"].duplicated([*keys, "step"]).any()


def long_run(losses):
    config = StudyConfig(learning_rates=(0.1,), seeds=1, evaluations=2, target_loss=0.5)
    one = Record(
        train_loss=np.asarray(losses, np.float32)[None, None],
        evaluations={
            "validation_accuracy": np.ones((1, 1, 3)),
            "validation_loss": np.ones((1, 1, 3)),
        },
        test_loss=np.ones((1, 1)),
        test_accuracy=np.ones((1, 1)),
    )
    return results.tidy(config, "fa", one, np.array([0, 50, 100]))


def test_the_training_loss_is_a_centred_moving_average_that_does_not_lag():
    falling = np.linspace(1, 0, 100)
    tidy = long_run(falling)
    at_50 = tidy["evaluations"].query("step == 50")["train_loss"].item()
    assert at_50 == pytest.approx(falling[49], abs=1e-6)
    assert tidy["runs"]["steps_to_target"].item() == 51  # falling[50] is the first below 0.5


def test_noise_of_single_batches_does_not_count_as_arrival():
    losses = np.full(100, 0.9)
    losses[20] = 0.1
    assert np.isnan(long_run(losses)["runs"]["steps_to_target"].item())


def test_a_run_that_broke_never_arrives_however_low_it_comes_back():
    losses = np.full(100, 0.9)
    losses[30], losses[31:] = np.inf, 0.1
    runs = long_run(losses)["runs"]
    assert runs["diverged"].item() and np.isnan(runs["steps_to_target"].item())


def test_a_run_that_never_arrives_has_no_steps():
    assert np.isnan(long_run(np.full(100, 0.6))["runs"]["steps_to_target"].item())


def test_a_diverged_run_is_recorded_and_never_reaches_the_target():
    runs = tables()["runs"].set_index(["learning_rate", "seed"])
    assert runs["diverged"].tolist() == [False, False, True, False]
    assert np.isnan(runs.loc[(1.0, 0), "steps_to_target"])
    assert np.isnan(runs.loc[(1.0, 0), "train_loss"])


def test_a_run_that_breaks_in_the_last_update_is_diverged_too():
    late = record(np.ones((2, 2, 4)))
    late.evaluations["validation_loss"][0, 1, -1] = np.inf
    runs = results.tidy(CONFIG, "fa", late, MARKS)["runs"]
    assert runs["diverged"].tolist() == [False, True, False, False]


def test_results_are_read_as_they_were_written(tmp_path):
    directory = results.ResultsDir(tmp_path / "new" / "out", CONFIG)
    assert not directory.finished
    directory.write(tables(), facts())
    again = results.ResultsDir(tmp_path / "new" / "out", CONFIG)
    assert again.finished
    for name, table in again.read().items():
        pd.testing.assert_frame_equal(table, tables()[name], check_dtype=False)
    assert again.facts["data_source"] == data.load("digits").source


def test_provenance_names_versions_device_and_data():
    known = facts()
    assert {"soap_jax", "jax", "flax", "optax", "python"} <= set(known["versions"])
    assert known["device"]["platform"] == "cpu" and known["device"]["processor"]
    assert known["config"]["learning_rates"] == (0.1, 1.0)
    assert known["rules"]["sign"] == "SignSync(period=1, magnitude='unit')"
    assert known["examples"] == {"train": 1151, "validation": 287, "test": 359}
    assert json.dumps(known)


def test_another_configurations_results_are_refused(tmp_path):
    results.ResultsDir(tmp_path, CONFIG).write(tables(), facts())
    other = StudyConfig(learning_rates=(0.1, 1.0), seeds=3, evaluations=2, target_loss=0.5)
    with pytest.raises(ValueError, match=r"another configuration's results \(seeds: 2 there, 3"):
        results.ResultsDir(tmp_path, other)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot write results to .*--out"):
        results.ResultsDir(tmp_path / "file" / "out", CONFIG)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot write results"):
        results.ResultsDir(tmp_path, CONFIG)


@pytest.mark.parametrize("text", ['{"config": ', "[]", "{}"])
def test_a_damaged_study_file_is_named(text, tmp_path):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(ValueError, match=r"study\.json is not the description of a study"):
        results.ResultsDir(tmp_path, CONFIG)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.csv"
    results.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        results.write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
