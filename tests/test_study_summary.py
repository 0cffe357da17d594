"""Conclusions from tidy runs, against tables worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from soap_jax.study import summary
from soap_jax.study.config import StudyConfig


def runs(rows):
    """Rows of (method, rate, seed, steps, validation accuracy, diverged)."""
    columns = ["method", "learning_rate", "seed", "steps_to_target", "validation_accuracy"]
    table = pd.DataFrame([row[:5] for row in rows], columns=columns)
    table["diverged"] = [row[5] if len(row) > 5 else False for row in rows]
    table["steps"] = 100
    table["period"] = (table["method"] == "sign").astype(int)
    table["validation_loss"] = 1 - table["validation_accuracy"]
    table["test_accuracy"] = table["validation_accuracy"] - 0.01
    return table


NAN = np.nan
RUNS = runs(
    [
        ("bp", 0.01, 0, NAN, 0.50),
        ("bp", 0.01, 1, 90, 0.52),
        ("bp", 0.1, 0, 20, 0.90),
        ("bp", 0.1, 1, 40, 0.92),
        ("bp", 1.0, 0, 5, 0.80),
        ("bp", 1.0, 1, 5, 0.80),
        ("fa", 0.01, 0, NAN, 0.30),
        ("fa", 0.01, 1, NAN, 0.30),
        ("fa", 0.1, 0, 40, 0.80),
        ("fa", 0.1, 1, 80, 0.82),
        ("fa", 1.0, 0, 10, 0.99),
        ("fa", 1.0, 1, NAN, NAN, True),
    ]
)


def test_mean_interval_is_students_t():
    mean, low, high = summary.mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * np.std([1, 2, 3, 4], ddof=1) / 2  # t(0.975, 3) from a table
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), rel=1e-6)


def test_one_value_has_no_interval():
    mean, low, high = summary.mean_interval([3.0])
    assert mean == 3.0 and np.isnan(low) and np.isnan(high)


def test_pairing_removes_what_seeds_share():
    ratio, low, high = summary.ratio_interval([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert (ratio, low, high) == pytest.approx((2.0, 2.0, 2.0))


def test_swapping_a_ratio_inverts_it():
    a, b = [3.0, 5.0, 9.0], [2.0, 2.0, 7.0]
    ratio, low, high = summary.ratio_interval(a, b)
    assert summary.ratio_interval(b, a) == pytest.approx((1 / ratio, 1 / high, 1 / low))


def test_the_best_rate_is_chosen_on_validation_accuracy():
    assert summary.best_rate(RUNS[RUNS["method"] == "bp"]) == 0.1


def test_a_rate_with_a_diverged_run_is_never_best():
    assert summary.best_rate(RUNS[RUNS["method"] == "fa"]) == 0.1
    assert np.isnan(summary.best_rate(runs([("fa", 0.1, 0, NAN, NAN, True)])))


def test_ties_go_to_the_lower_validation_loss():
    tied = runs([("bp", 0.1, 0, 1, 0.9), ("bp", 1.0, 0, 1, 0.9)])
    tied["validation_loss"] = [0.3, 0.2]
    assert summary.best_rate(tied) == 1.0


def test_the_shared_rate_is_the_smallest_at_which_every_run_of_backprop_arrives():
    assert summary.shared_rate(RUNS) == 0.1
    assert np.isnan(summary.shared_rate(RUNS[RUNS["learning_rate"] == 0.01]))
    slow = RUNS.copy()  # what another method does has no say
    slow.loc[slow["method"] == "fa", "steps_to_target"] = NAN
    assert summary.shared_rate(slow) == 0.1


def test_without_backprop_every_method_has_a_say():
    renamed = RUNS.replace({"method": {"bp": "sign"}})
    assert summary.shared_rate(renamed[renamed["method"] == "sign"]) == 0.1
    assert summary.shared_rate(renamed) == 0.1
    renamed.loc[renamed["method"] == "fa", "steps_to_target"] = NAN
    assert np.isnan(summary.shared_rate(renamed))


def test_a_run_of_backprop_that_arrives_and_then_diverges_does_not_count():
    broken = RUNS.copy()
    broken.loc[(broken["method"] == "bp") & (broken["learning_rate"] == 0.1), "diverged"] = True
    assert summary.shared_rate(broken) == 1.0


def test_a_run_that_never_arrives_makes_the_ratio_a_bound_without_interval():
    late = RUNS.copy()
    fa = (late["method"] == "fa") & (late["learning_rate"] == 0.1) & (late["seed"] == 1)
    late.loc[fa, "steps_to_target"] = NAN
    row = summary.summarise(late).set_index("method").loc["fa"]
    assert row["censored"] == 1
    assert row["ratio_to_bp"] == pytest.approx((40 / 20 * 100 / 40) ** 0.5)
    assert np.isnan(row["ratio_to_bp_low"])


def test_summary_against_a_table_worked_out_by_hand():
    table = summary.summarise(RUNS).set_index("method")
    assert table["test_accuracy"].tolist() == pytest.approx([0.90, 0.80])
    assert table["steps_to_target"].tolist() == pytest.approx([800**0.5, 3200**0.5])
    assert table.loc["fa", "ratio_to_bp"] == pytest.approx(2.0)
    assert np.isnan(table.loc["bp", "ratio_to_bp"])
    assert table["diverged"].tolist() == [0, 1]
    assert not table["best_rate_at_edge"].any()
    assert table["fewest_steps"].tolist() == pytest.approx([5, 3200**0.5])
    assert table["fastest_rate"].tolist() == [1.0, 0.1]


def test_periods_have_rows_of_their_own_and_base_keeps_the_smallest():
    signs = RUNS[RUNS["method"] == "fa"].replace({"method": {"fa": "sign"}})
    table = pd.concat([RUNS, signs.assign(period=5), signs.assign(period=50)])
    rows = summary.summarise(table)
    assert list(zip(rows["method"], rows["period"], strict=True)) == [
        ("bp", 0),
        ("fa", 0),
        ("sign", 5),
        ("sign", 50),
    ]
    assert rows["ratio_to_bp"].tolist()[1:] == pytest.approx([2, 2, 2])
    kept = summary.base(StudyConfig(periods=(50, 5)), rows)
    assert kept["period"].tolist() == [0, 0, 5]


def test_a_run_that_arrives_and_then_diverges_counts_as_never_arrived():
    broken = RUNS.copy()
    fa = (broken["method"] == "fa") & (broken["learning_rate"] == 0.1) & (broken["seed"] == 1)
    broken.loc[fa, "diverged"] = True
    assert summary.summarise(broken).set_index("method").loc["fa", "censored"] == 1


def test_a_best_rate_at_the_edge_of_the_grid_is_marked():
    kept = RUNS[RUNS["learning_rate"] < 1]
    assert summary.summarise(kept)["best_rate_at_edge"].tolist() == [True, True]


def test_nothing_to_compare_gives_nan_not_a_crash():
    table = summary.summarise(RUNS[RUNS["learning_rate"] == 0.01])
    assert table[["steps_to_target", "ratio_to_bp"]].isna().all(axis=None)
    assert table["test_accuracy"].notna().all()
