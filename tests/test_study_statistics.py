"""Intervals and p-values: worked out by hand, equivalent, and right as often as they say."""

import math

import hypothesis
import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st
from scipy import stats
from synthetic import at, make_study

from soap_jax.study import paired, statistics, summary

INF = np.inf
finite = st.floats(-5, 5, allow_subnormal=False)


def make_runs(log_steps, accuracy, *, censored=None, diverged=None):
    """Runs from `(rates, seeds)` arrays."""
    log_steps, accuracy = np.asarray(log_steps, float), np.asarray(accuracy, float)
    no = np.zeros(log_steps.shape, bool)
    diverged = no if diverged is None else np.asarray(diverged)
    censored = diverged if censored is None else np.asarray(censored) | diverged
    tuned = int(np.where(diverged.any(axis=1), -INF, accuracy.mean(axis=1)).argmax())
    return paired.Runs("fa", np.exp(log_steps), censored, diverged, accuracy, -accuracy, tuned)


# Student's t


def test_p_values_and_interval_are_those_of_scipy():
    sample = np.random.default_rng(0).normal(0.3, 1, 8)
    mean = statistics.student(sample)
    above = stats.ttest_1samp(sample, 0.1, alternative="greater")
    below = stats.ttest_1samp(sample, 0.1, alternative="less")
    assert mean.p_above(0.1) == pytest.approx(above.pvalue)
    assert mean.p_below(0.1) == pytest.approx(below.pvalue)
    interval = stats.ttest_1samp(sample, 0.0).confidence_interval(0.95)
    assert mean.interval == pytest.approx(tuple(interval))
    assert mean.interval == pytest.approx(summary.mean_interval(sample)[1:])


def test_a_region_takes_both_its_ends():
    mean = statistics.student(np.random.default_rng(0).normal(0, 1, 8))
    assert mean.judge((-1, 2)).p_holds == 2 * max(mean.p_above(-1), mean.p_below(2))
    assert mean.judge((1, 2)).p_fails == 2 * min(mean.p_below(1), mean.p_above(2))
    assert mean.judge((-1, INF)).p_holds == 2 * mean.p_above(-1)
    assert mean.judge((-INF, INF))[3:] == (0.0, 1.0)


def test_ratios_are_judged_on_the_log_scale():
    logs = np.log([1.9, 2.2, 2.0])
    result = statistics.student(logs).judge_ratio((1.5, 3.0))
    assert result[:3] == pytest.approx(summary.ratio_interval([1.9, 2.2, 2.0], np.ones(3)))
    assert result[3:] == statistics.student(logs).judge((math.log(1.5), math.log(3.0)))[3:]
    assert statistics.student(logs).judge_ratio((0.0, 3.0)).p_holds < result.p_holds


@pytest.mark.parametrize(
    ("within", "p_values"),
    [
        ((1.5, 3.0), (1 / 512, 1)),
        ((0.0, 3.0), (1 / 512, 1)),
        ((2.5, 3.0), (1, 1 / 512)),
        ((0.0, 1.9), (1, 1 / 512)),
        ((2.0, 3.0), (1, 1)),  # at the bound: neither
        ((0.0, 2.0), (1, 1)),
    ],
)
def test_ten_values_that_do_not_vary_have_the_sign_tests_p_value(within, p_values):
    tens = np.arange(10.0, 20.0)
    logs = np.log(2 * tens / tens)
    result = statistics.student(logs).judge_ratio(within)
    assert result[:3] == pytest.approx((2.0, 2.0, 2.0))
    assert result[3:] == p_values


def test_few_values_that_do_not_vary_allow_no_conclusion():
    for count, known in ((2, False), (5, False), (6, True)):
        result = statistics.student(np.zeros(count)).judge((-1.0, 1.0))
        assert (result.p_holds < 0.05) == known == (result.low > -INF)
        assert result.p_fails == 1


def test_two_values_are_enough():
    assert statistics.student([0.0, 1.0]).interval == pytest.approx(
        (0.5 - 12.7062 / 2, 0.5 + 12.7062 / 2), rel=1e-5
    )


@st.composite
def means(draw):
    """Means of every kind: by t, by resampling, flat, and bounds."""
    kind = draw(st.sampled_from(["t", "empirical", "flat"]))
    pivot = stats.t(draw(st.integers(1, 30)))
    if kind == "empirical":
        size = draw(st.sampled_from([19, 79, 80, 999, 1000]))
        values = np.random.default_rng(draw(st.integers(0, 99))).standard_t(3, size)
        values[: draw(st.integers(0, 9))] = INF
        pivot = statistics.Empirical(np.sort(values))
    error = 0.0 if kind == "flat" else draw(st.floats(0.01, 2))
    return statistics.Mean(draw(finite), error, pivot, draw(st.booleans()), draw(st.booleans()))


@hypothesis.given(means(), finite | st.just(-INF), finite | st.just(INF))
@hypothesis.settings(max_examples=300)
def test_p_values_are_small_exactly_where_the_interval_is_inside_or_outside(mean, low, high):
    hypothesis.assume(low < high)
    least, most = mean.interval
    hypothesis.assume(all(abs(a - b) > 1e-9 for a in mean.interval for b in (low, high) if a != b))
    result = mean.judge((low, high))
    inside = (low == -INF or least > low) and (high == INF or most < high)
    outside = most < low or least > high
    assert (result.p_holds < 0.05) == inside
    assert (result.p_fails < 0.05) == outside
    assert 0 <= result.p_holds <= 1 and 0 <= result.p_fails <= 1


def test_t_intervals_of_log_ratios_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    logs = np.log(2) + rng.normal(0, 0.1, (2000, 10)) - rng.normal(0, 0.1, (2000, 10))
    intervals = np.array([statistics.student(row).interval for row in logs])
    covered = np.mean((intervals[:, 0] < np.log(2)) & (np.log(2) < intervals[:, 1]))
    assert 0.93 < covered < 0.97


# The bootstrap


@pytest.mark.parametrize("seed", range(3))
def test_a_resample_chooses_as_the_summary_does(seed):
    rng = np.random.default_rng(seed)
    shape = (4, 6)
    accuracy = rng.integers(8, 10, shape) / 10  # many ties
    diverged = rng.random(shape) < [[0.0], [0.1], [0.3], [0.0]]
    runs = make_runs(np.zeros(shape), accuracy, diverged=diverged)
    runs = runs._replace(loss=rng.random(shape))
    draws = rng.integers(0, 6, (40, 6))
    counts = np.stack([np.bincount(draw, minlength=6) for draw in draws])
    for draw, chosen in zip(draws, statistics.choose_rates(runs, counts), strict=True):
        table = pd.DataFrame(
            {
                "learning_rate": np.repeat([0, 1, 2, 3], 6),
                "validation_accuracy": accuracy[:, draw].ravel(),
                "validation_loss": runs.loss[:, draw].ravel(),
                "diverged": diverged[:, draw].ravel(),
            }
        )
        table["validation_accuracy"] = (
            table.groupby("learning_rate")["validation_accuracy"].transform("mean").round(9)
        )
        assert chosen == summary.best_rate(table)


def test_values_of_diverged_runs_do_not_matter():
    accuracy = [[0.8, 0.9], [np.nan, np.inf]]
    runs = make_runs(np.zeros((2, 2)), accuracy, diverged=[[False, False], [True, True]])
    assert statistics.choose_rates(runs, np.array([[1, 1], [2, 0]])).tolist() == [0, 0]


def test_resampling_repeats_and_pairs_the_seeds():
    rng = np.random.default_rng(0)
    logs, accuracy = rng.normal(size=(2, 3, 10))
    runs = make_runs(logs, accuracy)
    twice = make_runs(logs + np.log(2), accuracy)
    other = make_runs(rng.normal(size=(3, 10)), accuracy)
    first, second = (statistics.bootstrap_t(runs, other) for _ in range(2))
    assert first.interval == second.interval
    assert statistics.bootstrap_t(twice, runs).interval == pytest.approx((np.log(2), np.log(2)))
    low, high = statistics.bootstrap_t(other, runs).interval
    assert (-high, -low) == pytest.approx(first.interval)  # a swap inverts the ratio


def test_without_a_choice_it_is_much_like_students_t():
    rng = np.random.default_rng(0)
    above, below = (make_runs(rng.normal(0, 0.1, (1, 20)), np.ones((1, 20))) for _ in range(2))
    mean = statistics.bootstrap_t(above, below)
    student = statistics.student(np.log(above.steps[0] / below.steps[0]))
    assert mean.estimate == student.estimate
    assert mean.interval == pytest.approx(student.interval, abs=0.15 * student.error)


def test_near_ties_of_rates_widen_the_interval():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, (2, 10))
    accuracy = rng.normal(0.9, 0.01, (2, 10))
    reference = make_runs(np.zeros((1, 10)), np.ones((1, 10)))
    widths = []
    for lead in (0.0, 0.1):
        runs = make_runs(np.array([[0.0], [0.5]]) + noise, accuracy + np.array([[lead], [0.0]]))
        low, high = statistics.bootstrap_t(runs, reference).interval
        widths.append(high - low)
    assert widths[0] > 4 * widths[1]


@pytest.mark.parametrize("seeds", [2, 3])
def test_so_few_seeds_that_resamples_do_not_vary_leave_no_interval(seeds):
    rng = np.random.default_rng(0)
    above, below = (make_runs(rng.normal(size=(1, seeds)), np.ones((1, seeds))) for _ in range(2))
    assert statistics.bootstrap_t(above, below).interval == (-INF, INF)
    assert statistics.bootstrap_t(above, above).judge((-1, 1))[1:] == (-INF, INF, 2**-seeds * 2, 1)


@pytest.mark.parametrize("which", [0, 1])
def test_censored_runs_at_a_rate_that_resamples_choose_make_a_bound(which):
    rng = np.random.default_rng(0)
    accuracy = rng.normal(0.9, 0.01, (2, 10))
    censored = np.zeros((2, 10), bool)
    pair = [make_runs(rng.normal(0, 0.1, (2, 10)), accuracy) for _ in range(2)]
    censored[1 - pair[which].tuned, 3] = True
    pair[which] = pair[which]._replace(censored=censored)
    mean = statistics.bootstrap_t(*pair)
    assert (mean.has_low, mean.has_high) == (which == 0, which == 1)


def near_tie_coverage(lead, *, studies, resamples, seed=0):
    """How often 95 % intervals cover, for two methods whose best rate leads another by `lead`.

    The other rate takes a quarter fewer steps; the mean accuracy's standard error is 0.0016.
    """
    rng = np.random.default_rng(seed)
    covered = 0
    for _ in range(studies):
        shared = rng.normal(0, 0.2, 10)
        pair = [
            make_runs(
                np.array([[0.5], [0.3], [0.0], [-0.1]]) + rng.normal(0, 0.05, (4, 10)) + shared + b,
                np.array([[0.8], [0.9], [0.9 - lead], [0.7]]) + rng.normal(0, 0.005, (4, 10)),
            )
            for b in (np.log(1.3), 0.0)
        ]
        low, high = statistics.bootstrap_t(*pair, resamples=resamples).interval
        covered += low < np.log(1.3) < high
    return covered / studies


@pytest.mark.parametrize("lead", [0.1, 0.004, 0.002])
def test_bootstrap_t_covers_also_where_rates_are_nearly_tied(lead):
    assert near_tie_coverage(lead, studies=400, resamples=399) > 0.92


@pytest.mark.slow
@pytest.mark.parametrize("lead", [0.1, 0.004, 0.002, 0.001, 0.0])
def test_bootstrap_t_covers_in_many_studies(lead):
    assert 0.93 < near_tie_coverage(lead, studies=2000, resamples=9999) < 0.99


# Censoring


@pytest.mark.parametrize(
    ("above", "below", "kept"),
    [
        (0, 0, (True, True)),
        (1, 0, (True, False)),  # a lower bound
        (0, 1, (False, True)),  # an upper bound
        (1, 1, (False, False)),
        (2, 0, (False, False)),  # more than a tenth
        (0, 2, (False, False)),
        (2, 2, (False, False)),
    ],
)
def test_censored_runs_leave_only_what_they_allow(above, below, kept):
    mean = statistics.student(np.log([2.0, 2.1, 1.9, 2.0, 2.05, 2.1, 1.9, 2.0, 2.1, 1.95]))
    flags = [np.arange(10) < count for count in (above, below)]
    censored = statistics.censor(mean, *flags)
    assert (censored.has_low, censored.has_high) == kept
    full, result = mean.judge_ratio((1.5, 3.0)), censored.judge_ratio((1.5, 3.0))
    assert result.low == (full.low if kept[0] else 0.0)
    assert result.high == (full.high if kept[1] else INF)
    assert np.isnan(result.estimate) == bool(above and below)
    assert result.p_holds == (full.p_holds if kept == (True, True) else 1.0)
    assert (censored.judge_ratio((1.5, INF)).p_holds < 0.05) == kept[0]
    assert (censored.judge_ratio((0.0, 1.5)).p_fails < 0.05) == kept[0]
    assert (censored.judge_ratio((0.0, 3.0)).p_holds < 0.05) == kept[1]
    assert (censored.judge_ratio((3.0, INF)).p_fails < 0.05) == kept[1]


@pytest.mark.parametrize(
    ("count", "total", "many"), [(1, 10, False), (2, 10, True), (3, 30, False)]
)
def test_a_tenth_is_not_too_many(count, total, many):
    assert statistics.too_many(np.arange(total) < count) == many
    assert statistics.too_many([True]) and not statistics.too_many([False])


def test_a_bound_is_concluded_from_no_more_often_than_it_may():
    """At a true ratio of 1.5, with the slowest runs cut, "above 1.5" is wrong."""
    rng = np.random.default_rng(0)
    budget = np.log(1.5) + 0.1 * stats.norm.ppf(0.95)
    logs = np.log(1.5) + rng.normal(0, 0.1, (2000, 10))
    logs = logs[np.sum(logs > budget, axis=1) <= 1]  # of ten: else nothing is concluded
    wrong = [
        statistics.student(np.minimum(row, budget)).judge_ratio((1.5, INF)).p_holds < 0.05
        for row in logs
    ]
    assert np.mean(wrong) < 0.035


# Trends


def test_a_perfect_trend_has_the_probability_of_a_perfect_order():
    result = statistics.trend([[1, 2, 3], [10, 20, 30]])
    assert result.estimate == pytest.approx(1.0)
    assert result.p_holds == pytest.approx(2 / math.factorial(3) ** 2)
    assert result.p_fails == 1.0
    assert np.isnan(result[1:3]).all()
    fall = statistics.trend([[3, 2, 1], [30, 20, 10]])
    assert (fall.p_fails, fall.p_holds) == (result.p_holds, 1.0)
    assert fall.estimate == pytest.approx(-1.0)


def test_the_trends_estimate_is_the_mean_of_spearmans_correlations():
    table = np.random.default_rng(0).normal(size=(6, 4))
    each = [stats.spearmanr(row, np.arange(4)).statistic for row in table]
    assert statistics.trend(table).estimate == pytest.approx(np.mean(each))
    assert statistics.trend(np.exp(table + np.arange(6)[:, None])) == pytest.approx(
        statistics.trend(table), nan_ok=True
    )


def test_no_differences_are_no_trend():
    result = statistics.trend(np.ones((10, 4)))
    assert result.estimate == pytest.approx(0.0)
    assert result.p_holds == result.p_fails == 1.0


# Several parts, several claims


def test_all_parts_must_hold_and_any_may_fail():
    assert statistics.intersection_union([0.01, 0.2], [0.9, 0.04]) == (0.2, 0.08)
    assert statistics.intersection_union([0.01], [0.9]) == (0.01, 0.9)
    assert statistics.intersection_union([1.0] * 4, [0.3] * 4) == (1.0, 1.0)


def test_holm_by_hand():
    holds, fails = [0.01, 0.9, 0.03, 0.005], [1.0, 0.04, 1.0, 1.0]
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, never falling
    assert statistics.holm(holds, fails) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.04], [1.0]) == pytest.approx([0.04])
    assert statistics.holm([], []).size == 0


def holm_of_many(p_values):
    """Holm's correction of each row; statsmodels collects garbage at every call, in 30 ms."""
    ordered = np.sort(p_values, axis=1) * np.arange(p_values.shape[1], 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(ordered, axis=1), 1.0)
    return np.take_along_axis(adjusted, p_values.argsort(axis=1).argsort(axis=1), axis=1)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95])
def test_wrong_verdicts_in_a_family_are_rare(correlation):
    """Eight claims with truths from at the bound to far from it, that share noise or do not."""
    rng = np.random.default_rng(0)
    shift = np.array([0, 0, 0, 0, 0, 0.5, 1.0, 3.0]) / np.sqrt(10)
    p_values = []
    for _ in range(300):
        noise = rng.normal(size=(8, 10)) * np.sqrt(1 - correlation)
        samples = noise + rng.normal(size=10) * np.sqrt(correlation) + shift[:, None]
        results = [statistics.student(sample).judge((0.0, INF)) for sample in samples]
        p_values.append([result[3:] for result in results])
    holds, fails = np.moveaxis(np.array(p_values), 2, 0)
    adjusted = holm_of_many(np.minimum(holds, fails))
    assert adjusted[0] == pytest.approx(statistics.holm(holds[0], fails[0]))
    wrong = np.where(shift > 0, fails < holds, holds < fails)
    rate = np.mean(np.any((adjusted < 0.05) & wrong, axis=1))
    assert rate < 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)


# Tables


def test_tables_are_read_by_rate_and_seed_whatever_their_order():
    config, tables = make_study()
    fa = paired.Study(config, tables).runs("fa")
    assert fa.steps.shape == (3, 10)
    rows = tables["runs"].loc[at(tables, "fa", 0.1)]
    np.testing.assert_array_equal(fa.steps[1], rows["steps_to_target"])
    np.testing.assert_array_equal(fa.accuracy[1], rows["validation_accuracy"])
    assert fa.tuned == 1
    mixed = {name: table.sample(frac=1, random_state=0) for name, table in tables.items()}
    study = paired.Study(config, mixed)
    for ours, theirs in zip(study.runs("fa"), fa, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    evaluations = tables["evaluations"]
    last = (evaluations["method"] == "fa") & (evaluations["learning_rate"] == 0.1)
    last &= evaluations["step"] == 5000
    np.testing.assert_array_equal(
        study.measured("error_angle/Dense_0", "fa", 1, end=True),
        evaluations.loc[last, "error_angle/Dense_0"],
    )


def test_a_run_is_censored_at_its_budget_if_it_diverged_or_never_arrived():
    config, tables = make_study()
    never, diverged = at(tables, "fa", 0.01, seeds=[2, 5])
    tables["runs"].loc[never, "steps_to_target"] = np.nan
    tables["runs"].loc[diverged, "diverged"] = True
    fa = paired.Study(config, tables).runs("fa")
    assert np.argwhere(fa.censored).tolist() == [[0, 2], [0, 5]]
    assert np.argwhere(fa.diverged).tolist() == [[0, 5]]
    assert fa.steps[0, [2, 5]].tolist() == [5000, 5000]


def test_periods_are_kept_apart():
    config, tables = make_study({("sign", 10): 7.0, "sign": 0.5}, noise=0.0, periods=(100, 10))
    study = paired.Study(config, tables)
    ratio = study.runs("sign", 10).steps[0] / study.runs("sign", 100).steps[0]
    assert ratio == pytest.approx(np.full(10, 14.0))
    assert study.runs("sign").steps[0] == pytest.approx(study.runs("sign", 10).steps[0])


@pytest.mark.parametrize("name", ["runs", "evaluations"])
def test_tables_that_are_not_the_configurations_are_refused(name):
    config, tables = make_study(methods=("bp", "fa"))
    table = tables[name]
    last = table.index[-1]

    def refused(changed, message):
        with pytest.raises(ValueError, match=message):
            paired.Study(config, tables | {name: changed})

    refused(
        table.drop(columns=["seed", "period"]),
        rf'"{name}" lacks the columns period, seed; it has method, .* another version .* again',
    )
    refused(
        pd.concat([table, table.loc[[last]]]),
        rf'"{name}" holds more than one row for method fa, period 0, learning_rate 1.0, seed 9.*; '
        r"expected one\. .* mixed: run the study again",
    )
    whole_run = table[(table["method"] == "fa") & (table["seed"] == 9)].index
    refused(
        table.drop(whole_run),
        rf'"{name}" lacks 3 runs \(the first: method fa, period 0, learning_rate 0.01, seed 9\); '
        "expected the configuration's 60, .* Finish the study",
    )
    other = table.copy()
    other.loc[last, "seed"] = 10
    pattern = "lacks" if name == "runs" else "holds besides"  # its first evaluation is still there
    refused(other, rf'"{name}" {pattern} 1 runs \(the first: method fa')


def test_a_run_that_was_not_evaluated_to_its_end_is_refused():
    config, tables = make_study(methods=("bp", "fa"))
    changed = tables["evaluations"].iloc[:-1]
    with pytest.raises(ValueError, match=r'"evaluations" holds 1 rows for method fa, .* seed 9'):
        paired.Study(config, tables | {"evaluations": changed})


def test_a_quantity_that_was_not_measured_is_named():
    config, tables = make_study()
    study = paired.Study(config, tables)
    with pytest.raises(ValueError, match=r'"evaluations" lacks the columns error_angle/Dense_7'):
        study.measured("error_angle/Dense_7", "fa", 0, end=True)
