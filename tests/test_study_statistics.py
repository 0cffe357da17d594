"""Intervals and p-values: worked out by hand, equivalent, and right as often as they say."""

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

from soap_jax.study import statistics

INF = np.inf
finite = st.floats(-5, 5, allow_subnormal=False)


def make_runs(log_steps, accuracy, *, censored=None, diverged=None):
    """Runs from `(rates, seeds)` arrays."""
    log_steps, accuracy = np.asarray(log_steps, float), np.asarray(accuracy, float)
    no = np.zeros(log_steps.shape, bool)
    diverged = no if diverged is None else np.asarray(diverged)
    censored = diverged if censored is None else np.asarray(censored) | diverged
    return statistics.Runs(log_steps, censored, diverged, accuracy, -accuracy)


# Losses


def test_smoothing_is_a_mean_of_what_there_is_up_to_the_first_break():
    losses = np.random.default_rng(0).random((2, 3, 40))
    smooth = statistics.smooth(losses, 5)
    for t in range(40):
        mean = losses[..., max(t - 2, 0) : t + 3].mean(axis=-1)
        assert smooth[..., t] == pytest.approx(mean)
    losses[0, 1, 7] = np.inf
    broken = statistics.smooth(losses, 5)
    assert np.isnan(broken[0, 1, 7:]).all() and np.isfinite(broken[0, 1, :7]).all()
    assert broken[0, 1, 6] == pytest.approx(losses[0, 1, 4:7].mean())
    assert broken[1] == pytest.approx(smooth[1])


def test_a_loss_out_of_all_proportion_leaves_no_trace_behind_it():
    losses = np.array([1.0, 1e30, *np.full(20, 0.5)])
    assert statistics.smooth(losses, 3)[5:].tolist() == [0.5] * 17


def test_steps_are_batches_seen_and_nan_where_a_run_never_arrives():
    losses = np.array([[3.0, 2.0, 1.0, 5.0], [3.0, 3.0, np.nan, 0.0], [0.5, 9.0, 9.0, 9.0]])
    steps = statistics.steps_to_loss(losses, 2.0, window=1)
    np.testing.assert_array_equal(steps, [2, np.nan, 1])
    assert statistics.steps_to_loss(losses[0], 2.0, window=3) == 2  # mean of 3, 2 and 1


# Ratios


def test_a_paired_ratio_by_hand():
    found = statistics.paired_ratio([20.0, 40.0, 80.0, 50.0], [10.0, 20.0, 40.0, 20.0])
    logs = np.log([2, 2, 2, 2.5])
    half = 3.182446 * logs.std(ddof=1) / 2  # t(0.975, 3) from a table
    ends = np.exp(logs.mean() + np.array([0, -half, half]))
    assert (found.value, found.low, found.high) == pytest.approx(tuple(ends), rel=1e-6)


def test_a_swap_inverts_a_ratio():
    a, b = [3.0, 5.0, 9.0], [2.0, 2.0, 7.0]
    one, other = statistics.paired_ratio(a, b), statistics.paired_ratio(b, a)
    assert (other.value, other.low, other.high) == pytest.approx(
        (1 / one.value, 1 / one.high, 1 / one.low)
    )


def test_identical_samples_give_a_point_and_one_value_no_interval():
    same = statistics.paired_ratio([20.0, 40.0], [20.0, 40.0])
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    one = statistics.paired_ratio([20.0], [10.0])
    assert one.value == pytest.approx(2.0) and np.isnan([one.low, one.high]).all()
    assert str(one) == "2.00"


def test_a_run_that_never_arrives_makes_a_bound():
    steps = np.array([20.0, 22.0, 19.0, 21.0, 20.0, 22.0, 19.0, 21.0, 20.0, np.nan])
    found = statistics.paired_ratio(steps, np.full(10, 10.0), budget=40)
    assert found.high == INF and 1.8 < found.low < found.value
    other = statistics.paired_ratio(np.full(10, 10.0), steps, budget=40)
    assert other.low == 0 and other.value < other.high < 0.54
    with pytest.raises(ValueError, match=r"never reached the loss; expected budget="):
        statistics.paired_ratio(steps, np.full(10, 10.0))
    with pytest.raises(ValueError, match="not positive"):
        statistics.paired_ratio([0.0, 1.0], [1.0, 1.0])


# In words


@pytest.mark.parametrize(
    ("estimate", "said"),
    [
        ((1.8, 1.7512, 1.85), "1.80 [1.75, 1.85]"),
        ((1.8, 1.7, INF), "1.80 [1.70, ∞)"),
        ((1.8, 0.0, 1.9), "1.80 (0, 1.90]"),
        ((0.0, 0.0, 0.0), "0 [0, 0]"),
        ((-0.01, -INF, 0.0), "−0.0100 (−∞, 0]"),
        ((1.8, 0.0, INF), "1.80"),
        ((1234.5, np.nan, np.nan), "1,234"),
        ((np.nan, 0.0, INF), "–"),
    ],
)
def test_estimates_in_words(estimate, said):
    assert str(statistics.Estimate(*estimate)) == said


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


def test_a_region_takes_both_its_ends():
    mean = statistics.student(np.random.default_rng(0).normal(0, 1, 8))
    assert mean.judge((-1, 2)).p_holds == 2 * max(mean.p_above(-1), mean.p_below(2))
    assert mean.judge((1, 2)).p_fails == 2 * min(mean.p_below(1), mean.p_above(2))
    assert mean.judge((-1, INF)).p_holds == 2 * mean.p_above(-1)
    assert mean.judge((-INF, INF))[3:] == (0.0, 1.0)


def test_ratios_are_judged_on_the_log_scale():
    logs = np.log([1.9, 2.2, 2.0])
    result = statistics.student(logs).judge_ratio((1.5, 3.0))
    found = statistics.paired_ratio([1.9, 2.2, 2.0], np.ones(3))
    assert result[:3] == pytest.approx((found.value, found.low, found.high))
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
        assert (result.p_holds < 0.05) == known
        assert result[1:3] == (0.0, 0.0) and result.p_fails == 1


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


def test_intervals_of_paired_ratios_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    seeds = rng.normal(0, 0.3, (1500, 1, 10))  # what pairing removes
    above, below = np.moveaxis(np.exp(5 + seeds + rng.normal(0, 0.1, (1500, 2, 10))), 1, 0)
    found = [statistics.paired_ratio(*pair) for pair in zip(2 * above, below, strict=True)]
    assert 0.93 < np.mean([estimate.low < 2 < estimate.high for estimate in found]) < 0.97


# The bootstrap


@pytest.mark.parametrize("seed", range(3))
def test_a_resample_chooses_as_its_runs_alone_would(seed):
    rng = np.random.default_rng(seed)
    shape = (4, 6)
    accuracy = rng.integers(8, 10, shape) / 10  # many ties
    diverged = rng.random(shape) < [[0.0], [0.1], [0.3], [0.0]]
    runs = make_runs(np.zeros(shape), accuracy, diverged=diverged)._replace(loss=rng.random(shape))
    draws = rng.integers(0, 6, (40, 6))
    counts = np.stack([np.bincount(draw, minlength=6) for draw in draws])
    for draw, chosen in zip(draws, statistics.choose_rates(runs, counts), strict=True):
        means = [
            (-round(runs.score[rate, draw].mean(), 6), runs.loss[rate, draw].mean(), rate)
            for rate in range(4)
            if not diverged[rate, draw].any()
        ]
        assert chosen == min(means)[2]
        assert chosen == statistics.Runs(*(array[:, draw] for array in runs)).best_rate_index


def test_without_a_rate_at_which_no_run_diverged_none_is_best():
    runs = make_runs(np.zeros((2, 2)), np.ones((2, 2)), diverged=[[True, False], [False, True]])
    assert runs.best_rate_index is None
    assert make_runs(np.zeros((1, 2)), [[np.nan, 1.0]]).best_rate_index is None


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
    student = statistics.student(above.values[0] - below.values[0])
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
    assert statistics.bootstrap_t(above, above).judge((-1, 1))[1:] == (0, 0, 2**-seeds * 2, 1)


@pytest.mark.parametrize("which", [0, 1])
def test_censored_runs_at_a_rate_that_resamples_choose_make_a_bound(which):
    rng = np.random.default_rng(0)
    accuracy = rng.normal(0.9, 0.01, (2, 10))
    censored = np.zeros((2, 10), bool)
    pair = [make_runs(rng.normal(0, 0.1, (2, 10)), accuracy) for _ in range(2)]
    censored[1 - pair[which].best_rate_index, 3] = True
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
    adjusted = np.array(list(map(statistics.holm, holds, fails)))
    wrong = np.where(shift > 0, fails < holds, holds < fails)
    rate = np.mean(np.any((adjusted < 0.05) & wrong, axis=1))
    assert rate < 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)


# Fieller's interval


def fieller(part, whole):
    """The share and its interval."""
    found = statistics.fieller(part, whole)
    return found.estimate, *found.interval


def test_a_share_is_judged_by_the_interval_that_it_has():
    rng = np.random.default_rng(0)
    whole = rng.normal(-0.9, 0.2, 10)
    share = statistics.fieller(0.7 * whole + rng.normal(0, 0.1, 10), whole)
    low, high = share.interval
    inside, outside = share.judge((low - 1e-6, high + 1e-6)), share.judge((high + 1e-6, INF))
    assert inside.p_holds == pytest.approx(0.05, abs=1e-4) and inside.p_holds < 0.05
    assert outside.p_fails == pytest.approx(0.05, abs=1e-4) and outside.p_fails < 0.05
    assert share.judge((low + 1e-6, INF)).p_holds > 0.05
    assert share.judge((-INF, INF))[3:] == (0.0, 1.0)


def test_fiellers_bounds_are_where_the_difference_is_just_significant():
    rng = np.random.default_rng(0)
    whole = rng.normal(-0.9, 0.2, 10)
    part = 0.7 * whole + rng.normal(0, 0.1, 10)
    share, *bounds = fieller(part, whole)
    assert share == pytest.approx(part.mean() / whole.mean())
    for bound in bounds:
        assert stats.ttest_1samp(part - bound * whole, 0).pvalue == pytest.approx(0.05)
    assert bounds[0] < share < bounds[1]
    flipped = fieller(-part, -whole)
    assert flipped == pytest.approx((share, *bounds))


def test_fiellers_interval_of_constants_is_a_point_and_of_nothing_unknown():
    assert fieller([0.5] * 4, [2.0] * 4) == (0.25, 0.25, 0.25)
    assert np.isnan(fieller([0.5, 0.1], [0.0, 0.0])).all()
    share, low, high = fieller([0.5, 0.6, 0.4], [-1.0, 2.0, 0.5])
    assert share == pytest.approx(1.0) and math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize("effect", [0.9, 0.1])
def test_fiellers_intervals_cover_as_often_as_they_say(effect):
    """Unbounded ones count as covering: the set that they stand for mostly does."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(2000):
        whole = rng.normal(effect, 0.1, 10)
        _, low, high = fieller(0.7 * whole + rng.normal(0, 0.05, 10), whole)
        covered.append(math.isnan(low) or low < 0.7 < high)
    assert 0.93 < np.mean(covered) < 0.98
