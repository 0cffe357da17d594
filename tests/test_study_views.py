"""Each figure shows what the tidy tables hold."""

import dataclasses

import numpy as np
import pytest
from made_up import break_everything, make_findings, make_study
from matplotlib import figure

from soap_jax.study import config, figures, plots, views
from soap_jax.study.claims import FAILS, HOLDS, NOT_TESTABLE, UNDECIDED


@pytest.fixture(scope="module")
def study():
    return make_study(seeds=3, learning_rates=(0.02, 0.05, 0.1, 0.2, 2.0))


def describe(made, tables):
    """The figures of a study whose claims nobody asked about."""
    return views.describe(made, tables, [])


def at(chart, method, x):
    [point] = [point for point in chart.lines[method] if point.x == x]
    return point


def test_steps_are_geometric_means_over_seeds_with_t_intervals(study):
    made, tables = study
    point = at(describe(made, tables)["steps_to_loss"], "bp", 0.1)
    runs = tables["runs"]
    steps = runs[(runs["method"] == "bp") & (runs["learning_rate"] == 0.1)]["steps_to_target"]
    assert point.mean == pytest.approx(np.exp(np.log(steps).mean()))
    half = 4.302653 * np.log(steps).std(ddof=1) / 3**0.5  # t(0.975, 2) from a table
    assert point.high / point.mean == pytest.approx(np.exp(half), rel=1e-5)


def broken_runs(tables, where, **values):
    """Tables in which some runs have other results."""
    runs = tables["runs"].copy()
    for name, value in values.items():
        runs.loc[where(runs), name] = value
    return {**tables, "runs": runs}


def test_a_rate_that_some_run_never_reaches_has_a_marker_above_the_budget_and_no_mean(study):
    made, tables = study

    def one(runs):
        return (runs["method"] == "bp") & (runs["learning_rate"] == 0.2) & (runs["seed"] == 1)

    chart = describe(made, broken_runs(tables, one, steps_to_target=np.nan))["steps_to_loss"]
    point = at(chart, "bp", 0.2)
    assert np.isnan(point.mean) and point.note == "2 of 3 runs reach loss 0.5"
    assert point.x in [lost.x for lost, _ in chart.missing["bp"]] and chart.budget == 340


def test_a_run_that_diverges_after_it_arrived_did_not_arrive(study):
    made, tables = study
    broken = broken_runs(tables, lambda runs: runs["method"] == "bp", diverged=True)
    points = describe(made, broken)["steps_to_loss"].lines["bp"]
    assert all(np.isnan(point.mean) and "3 diverged" in point.note for point in points)


def test_curves_are_means_with_the_range_over_seeds(study):
    made, tables = study
    chart = describe(made, tables)["loss_curves"]
    table = tables["evaluations"]
    here = (table["method"] == "fa") & (table["learning_rate"] == 0.05) & (table["step"] == 34)
    losses = table.loc[here, "train_loss"]
    expected = losses.mean(), losses.min(), losses.max()
    assert at(chart, "fa", 34)[1:4] == pytest.approx(expected)
    assert "0.05" in chart.title and "every run of backprop" in chart.caption


def test_a_curve_ends_where_a_seed_broke_off(study):
    made, tables = study
    table = tables["evaluations"].copy()
    late = (table["method"] == "bp") & (table["seed"] == 2) & (table["step"] > 100)
    table.loc[late, "train_loss"] = np.nan
    chart = describe(made, {**tables, "evaluations": table})["loss_curves"]
    assert max(point.x for point in chart.lines["bp"]) <= 100
    assert max(point.x for point in chart.lines["fa"]) == 340


def test_only_base_periods_are_shown(study):
    made, tables = study

    def longer(runs):
        return runs["period"] == max(made.periods)

    broken = broken_runs(tables, longer, steps_to_target=1.0, test_accuracy=1.0)
    assert repr(describe(made, broken)) == repr(describe(made, tables))


def test_without_a_shared_rate_curves_are_at_the_rate_that_most_runs_like(study):
    made, tables = study

    def one_seed(runs):
        return (runs["method"] == "bp") & (runs["seed"] == 0)

    chart = describe(made, broken_runs(tables, one_seed, steps_to_target=np.nan))["loss_curves"]
    assert "most runs reach the target" in chart.caption and chart.lines


def test_methods_without_feedback_have_no_angles(study):
    shown = describe(*study)["angles"]
    assert list(shown.lines) == ["fa", "sign", "sign_preserve", "sign_norm"]


def test_error_angles_by_layer_are_shown_where_there_are_several():
    methods = ("bp", "fa")
    chart = describe(*make_study(seeds=2, hidden=(8, 8, 8), methods=methods))["error_angles"]
    points = chart.lines["fa"]
    assert [point.x for point in points] == [1, 2, 3] and list(chart.lines) == ["fa"]
    assert points[0].mean > points[1].mean > points[2].mean
    assert "error_angles" not in describe(*make_study(seeds=2, methods=methods))


def test_effective_rates_start_above_zero_on_their_logarithmic_axis(study):
    made, tables = study
    chart = describe(made, tables)["effective_learning_rate"]
    assert at(chart, "sign", 0).mean == pytest.approx(0.05 * 9.2)
    assert at(chart, "frozen", 0).mean == 0 and chart.y_log and chart.y_range[0] > 0


def test_accuracy_is_on_test_data_at_the_rate_that_validation_data_chose(study):
    made, tables = study
    rows = {row.style: row for row in describe(made, tables)["accuracy"].rows}
    runs = tables["runs"][tables["runs"]["method"] == "fa"]
    best = runs.groupby("learning_rate")["validation_accuracy"].mean().idxmax()
    expected = 100 * runs.loc[runs["learning_rate"] == best, "test_accuracy"].mean()
    assert rows["fa"].mean == pytest.approx(expected) and f"{best:g}" in rows["fa"].note


def test_claims_that_are_no_ratios_or_not_testable_have_no_row():
    rows = views.claim_ratios(make_findings()).rows
    assert [row.label.split(".")[0] for row in rows] == ["1", "2", "3", "3", "4", "6"]
    assert rows[1].within == (-np.inf, 0.8)  # a ratio's bound from zero on is open


def test_figures_are_told_in_words(study):
    made, tables = study
    for chart in views.describe(made, tables, make_findings()).values():
        assert chart.title in chart.alt and chart.caption and not chart.empty
    alt = describe(made, tables)["loss_curves"].alt
    assert all(config.METHODS[method] in alt for method in made.methods)


def test_where_nothing_is_left_figures_say_so(study):
    made, tables = study
    shown = describe(made, break_everything(tables))
    assert all(chart.empty for chart in shown.values())


@pytest.mark.parametrize("verdict", [HOLDS, FAILS, UNDECIDED, NOT_TESTABLE])
def test_a_ratio_is_drawn_whatever_the_verdict_on_its_claim(verdict):
    finding = dataclasses.replace(make_findings()[0], verdict=verdict)
    chart = views.claim_ratios([finding])
    name, _ = chart.styles[chart.rows[0].style]
    assert name == f"claim {verdict}"
    figures.draw(figure.Figure().subplots(), chart)
    assert name in plots.to_html(chart, with_library=False)
