"""Tidy tables, and where they came from."""

import json

import numpy as np
import pytest
from soap_jax.study.config import StudyConfig
from soap_jax.study.experiment import Record

from soap_jax import data, sweeps
from soap_jax.study import results

CONFIG = StudyConfig(
    learning_rates=(0.1, 1.0), seeds=2, evaluations=2, target_loss=0.5, epochs=1, methods=("fa",)
)
MARKS = np.array([0, 2, 4])
POINTS = sweeps.grid(seeds=range(2), learning_rates=(0.1, 1.0))


def record(train_loss):
    """A record of four runs with the given losses `(4, steps)`."""
    num = len(train_loss)
    return Record(
        train_loss=np.asarray(train_loss, np.float32),
        evaluations={
            "validation_accuracy": np.full((num, 3), 0.5),
            "validation_loss": np.full((num, 3), 1.0),
        },
        test_loss=np.full(num, 0.9),
        test_accuracy=np.full(num, 0.8),
    )


def facts():
    return results.provenance(CONFIG, data.load("digits"))


def tables():
    falling, slow = [1.0, 0.2, 0.2, 0.2], [1.0, 0.9, 0.9, 0.9]
    broken = [1.0, np.nan, np.nan, np.nan]
    return results.tidy(CONFIG, "fa", POINTS, record([falling, slow, broken, falling]), MARKS)


def test_there_is_one_row_per_run_and_one_per_evaluation():
    tidy = tables()
    assert len(tidy["runs"]) == 4
    assert len(tidy["evaluations"]) == 4 * 3
    assert not tidy["runs"].duplicated(results.KEYS).any()
    assert not tidy["evaluations"].duplicated([*results.KEYS, "step"]).any()
    assert list(tidy["runs"]) == results.RUN_COLUMNS
    assert set(results.EVALUATION_COLUMNS) <= set(tidy["evaluations"])


def long_run(losses):
    return results.tidy(CONFIG, "fa", POINTS[:1], record([losses]), np.array([0, 50, 100]))


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
    late = record(np.ones((4, 4)))
    late.evaluations["validation_loss"][1, -1] = np.inf
    runs = results.tidy(CONFIG, "fa", POINTS, late, MARKS)["runs"]
    assert runs["diverged"].tolist() == [False, True, False, False]


def test_a_run_that_ends_far_above_where_it_began_is_diverged_though_finite():
    worse = [[2.3] * 4, [2.3, 3, 4, 4.5], [2.3, 150, 150, 150], [2.3, 150, 2, 1]]
    losses = np.repeat(worse, 25, axis=1)
    runs = results.tidy(CONFIG, "fa", POINTS, record(losses), np.array([0, 50, 100]))["runs"]
    assert runs["diverged"].tolist() == [False, False, True, False]
    assert runs["train_loss"].notna().all()


def test_provenance_names_versions_device_and_data():
    known = facts()
    assert {"soap_jax", "jax", "flax", "optax", "python"} <= set(known["versions"])
    assert known["device"]["platform"] == "cpu" and known["device"]["processor"]
    assert known["config"]["learning_rates"] == (0.1, 1.0)
    assert known["rules"] == {"fa": "Fixed()"} and known["format"] == results.FORMAT
    assert known["examples"] == {"train": 1151, "validation": 287, "test": 359}
    assert json.dumps(known)
