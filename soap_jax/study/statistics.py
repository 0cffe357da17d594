"""What a study's seeds allow one to conclude, and with which p-value.

A `Mean` is an estimate with its standard error and its *pivot*, the distribution of
(estimate - truth) / error: Student's t (`student`) or, for runs whose learning rates were chosen on
the same seeds, the one that a bootstrap finds (`bootstrap_t`). Interval and p-values come from
one pivot, so that they never contradict each other.

A statement says that the truth lies in a region. It has two p-values, of "it does" (`p_holds`) and
of "it does not" (`p_fails`), both two-sided: for α = 0.05 the first is below α exactly where the
95 % interval lies inside the region, the second exactly where it lies outside.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from statsmodels.stats import multitest

from soap_jax.study.paired import Runs

ALPHA = 0.05
RESAMPLES = 9999
RESAMPLING_SEED = 20160715
TINY = 1e-12
"""Standard errors of logs or degrees up to this are rounding, and count as zero."""


class Result(NamedTuple):
    """An estimate, its 95 % interval (NaN where there is none), and how a statement fares."""

    estimate: float
    low: float
    high: float
    p_holds: float
    p_fails: float


class Pivot(Protocol):
    """A distribution of (estimate - truth) / error; `scipy.stats.t(df)` is one."""

    def sf(self, t: float) -> float:
        """P(T ≥ t)."""

    def cdf(self, t: float) -> float:
        """P(T ≤ t)."""

    def interval(self, confidence: float) -> tuple[float, float]:
        """The quantiles that leave out (1 - confidence) / 2 on either side."""


@dataclasses.dataclass(frozen=True, eq=False)
class Empirical:
    """A pivot known by resampling. The sample counts as one more resample, so no p-value is 0.

    Attributes:
        values: `(resamples,)`, ascending.
    """

    values: np.ndarray

    def sf(self, t: float) -> float:
        """P(T ≥ t)."""
        beyond = self.values.size - np.searchsorted(self.values, t, side="left")
        return float((1 + beyond) / (1 + self.values.size))

    def cdf(self, t: float) -> float:
        """P(T ≤ t)."""
        beyond = np.searchsorted(self.values, t, side="right")
        return float((1 + beyond) / (1 + self.values.size))

    def interval(self, confidence: float) -> tuple[float, float]:
        """The order statistics beyond which `sf` or `cdf` is below (1 - confidence) / 2."""
        tail = math.ceil(round((1 - confidence) / 2 * (1 + self.values.size), 6)) - 1
        if tail < 1:
            return -np.inf, np.inf
        return float(self.values[tail - 1]), float(self.values[-tail])


@dataclasses.dataclass(frozen=True)
class Mean:
    """An estimated mean.

    Attributes:
        estimate: the estimate.
        error: its standard error; 0 where the sample does not vary, which is taken at its word.
        pivot: the distribution of (estimate - truth) / error.
        has_low: whether the sample says how small the truth can be: not if it is an upper bound.
        has_high: whether the sample says how large the truth can be: not if it is a lower bound.
        least: the smallest one-sided p-value of a sample that does not vary.
    """

    estimate: float
    error: float
    pivot: Pivot
    has_low: bool = True
    has_high: bool = True
    least: float = 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval; infinite where the sample says nothing."""
        if not self.error and 2 * self.least >= ALPHA:
            return -np.inf, np.inf
        below, above = self.pivot.interval(1 - ALPHA) if self.error else (0.0, 0.0)
        low = float(self.estimate - self.error * above) if self.has_low else -np.inf
        high = float(self.estimate - self.error * below) if self.has_high else np.inf
        return low, high

    def p_above(self, bound: float) -> float:
        """One-sided p-value of "the truth lies above `bound`": small speaks for it."""
        if bound == -np.inf or not self.has_low:
            return float(bound != -np.inf)
        difference = self.estimate - bound
        return (
            float(self.pivot.sf(difference / self.error))
            if self.error
            else self._flat(difference > 0)
        )

    def p_below(self, bound: float) -> float:
        """One-sided p-value of "the truth lies below `bound`": small speaks for it."""
        if bound == np.inf or not self.has_high:
            return float(bound != np.inf)
        difference = self.estimate - bound
        return (
            float(self.pivot.cdf(difference / self.error))
            if self.error
            else self._flat(difference < 0)
        )

    def _flat(self, speaks_for: bool) -> float:
        return self.least if speaks_for else 1.0

    def judge(self, within: tuple[float, float]) -> Result:
        """How the statement fares that the truth lies inside a region, infinite where open.

        Being inside takes two one-sided conclusions, so the larger p-value counts (the
        intersection-union test; for a bounded region, Schuirmann's equivalence test). Being outside
        takes one of two, so the smaller counts. Either is doubled, as those of intervals are.

        Example:
            >>> result = student([1.9, 2.0, 2.1]).judge((0.0, np.inf))
            >>> round(result.p_holds, 4), result.p_fails
            (0.0008, 1.0)
        """
        low, high = within
        p_holds = min(1.0, 2 * max(self.p_above(low), self.p_below(high)))
        p_fails = min(1.0, 2 * min(self.p_below(low), self.p_above(high)))
        return Result(self.estimate, *self.interval, p_holds, p_fails)

    def judge_ratio(self, within: tuple[float, float]) -> Result:
        """The same for the exponential of the mean, in a region of ratios (0 where open)."""
        low, high = (math.log(end) if end else -np.inf for end in within)
        result = self.judge((low, high))
        estimate, least, most = (math.exp(value) for value in result[:3])
        return result._replace(estimate=estimate, low=least, high=most)


def student(sample: ArrayLike) -> Mean:
    """The mean of two or more independent values, by Student's t.

    `p_above` and `p_below` are those of `scipy.stats.ttest_1samp`; where all values are the same,
    which says nothing of their spread, those of the sign test.

    Example:
        >>> low, high = student([1.0, 2.0, 3.0]).interval
        >>> round(low, 3), round(high, 3)
        (-0.484, 4.484)
    """
    values = np.asarray(sample, float)
    pivot = _student_t(values.size - 1)
    if np.ptp(values) <= TINY:
        return Mean(float(values[0]), 0.0, pivot, least=0.5**values.size)
    return Mean(float(values.mean()), float(stats.sem(values)), pivot)


_student_t = functools.cache(stats.t)  # slow to make


def choose_rates(runs: Runs, counts: np.ndarray) -> np.ndarray:
    """What `summary.best_rate` chooses in each of many resamples, all at once.

    Args:
        runs: the runs of one method.
        counts: `(resamples, seeds)`, how often each seed is in each resample.

    Returns:
        `(resamples,)` indices of learning rates.
    """

    def mean(values):
        return counts @ np.where(runs.diverged, 0.0, values).T / counts[0].sum()

    diverged = counts @ runs.diverged.T > 0
    accuracy = np.where(diverged, -np.inf, mean(runs.accuracy).round(6))  # ties are ties
    best = accuracy == accuracy.max(axis=1, keepdims=True)
    return np.where(best, mean(runs.loss), np.inf).argmin(axis=1)


@functools.cache
def _resamples(seeds: int, resamples: int) -> np.ndarray:
    """The same for every comparison, so that all methods are resampled jointly."""
    rng = np.random.default_rng(RESAMPLING_SEED)
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)


def bootstrap_t(numerator: Runs, denominator: Runs, *, resamples: int = RESAMPLES) -> Mean:
    """Mean log ratio of steps with each method at its tuned rate, by the bootstrap-t over seeds.

    In every resample of the seeds each method's rate is chosen anew, so that the pivot knows what
    the choice adds to the spread. The pivot is made symmetric: where two rates are nearly tied the
    ratio jumps from one to the other, and an equal-tailed bootstrap-t reflects that jump to the
    wrong side (its 95 % intervals then covered 69 %, the symmetric ones 95 %). Steps of censored
    runs enter as they are; where a rate that any resample chose has some, the mean is a bound
    (see `censor`).

    Args:
        numerator: the runs of one method; `tuned` must not be None.
        denominator: the runs of another, with the same rates and seeds.
        resamples: how many; the seed of the generator is fixed, so results repeat.

    References:
        Hall, On symmetric bootstrap confidence intervals, 1988.
    """
    seeds = numerator.steps.shape[1]
    counts = _resamples(seeds, resamples)
    pair = (numerator, denominator)
    rates = [choose_rates(runs, counts) for runs in pair]
    above, below = (np.log(runs.steps)[chosen] for runs, chosen in zip(pair, rates, strict=True))
    means = np.sum(counts * (above - below), axis=1) / seeds
    squares = np.sum(counts * (above - below - means[:, None]) ** 2, axis=1)
    errors = np.sqrt(squares / (seeds - 1) / seeds)

    mean = student(np.log(numerator.steps[numerator.tuned] / denominator.steps[denominator.tuned]))
    shifts = np.where(np.abs(means - mean.estimate) > TINY, means - mean.estimate, 0.0)
    flat = errors <= TINY  # resamples that do not vary: infinitely far off, or not at all
    ratios = shifts / np.where(flat, 1.0, errors)
    pivot = np.where(flat & (shifts != 0), np.inf, ratios)  # it is made symmetric below
    unsure = not mean.error and bool(shifts.any())  # the sample does not vary, its resamples do
    return dataclasses.replace(
        mean,
        pivot=Empirical(np.sort(np.concatenate([pivot, -pivot]))),
        has_low=not (unsure or denominator.censored[rates[1]].any()),
        has_high=not (unsure or numerator.censored[rates[0]].any()),
    )


def too_many(censored: ArrayLike) -> bool:
    """Whether more than a tenth of a method's runs are censored: then nothing is concluded."""
    flags = np.asarray(censored)
    return 10 * int(flags.sum()) > flags.size


def censor(mean: Mean, numerator: ArrayLike, denominator: ArrayLike) -> Mean:
    """Takes from a mean log ratio what censored runs do not allow it to say.

    With a run's steps cut at its budget the mean of a numerator's logs is that of smaller numbers:
    the ratio is a lower bound, which says nothing of how large the truth can be. A censored
    denominator makes an upper bound. Both leave not even an estimate; more than a tenth of either
    leaves no conclusion.

    Args:
        mean: of log(numerator's steps / denominator's).
        numerator: bool, which of the numerator's runs are censored.
        denominator: the same of the denominator's.
    """
    nothing = too_many(numerator) or too_many(denominator)
    return dataclasses.replace(
        mean,
        estimate=np.nan if np.any(numerator) and np.any(denominator) else mean.estimate,
        has_low=mean.has_low and not (nothing or np.any(denominator)),
        has_high=mean.has_high and not (nothing or np.any(numerator)),
    )


def trend(table: ArrayLike) -> Result:
    """Page's test of whether values grow from column to column.

    Args:
        table: `(blocks, columns)`; only ranks within a block count.

    Returns:
        Page's L scaled to [-1, 1] (without ties, the mean of the blocks' Spearman correlations with
        the order), without interval; `p_holds` is of a rise, `p_fails` of a fall, both two-sided.

    Example:
        >>> result = trend([[1, 2, 3], [4, 5, 6], [7, 9, 8]])
        >>> round(result.estimate, 3), round(result.p_holds, 3), result.p_fails
        (0.833, 0.065, 1.0)
    """
    values = np.asarray(table, float)
    blocks, columns = values.shape
    order = np.arange(1, columns + 1)
    rise = stats.page_trend_test(values, predicted_ranks=order)
    fall = stats.page_trend_test(values, predicted_ranks=order[::-1])
    scaled = 12 * rise.statistic / (blocks * columns * (columns**2 - 1))
    correlation = float(scaled - 3 * (columns + 1) / (columns - 1))
    p_holds, p_fails = (min(1.0, 2 * float(test.pvalue)) for test in (rise, fall))
    return Result(correlation, np.nan, np.nan, p_holds, p_fails)


def intersection_union(p_holds: Sequence[float], p_fails: Sequence[float]) -> tuple[float, float]:
    """The p-values of a claim with several parts: it holds if all do, and fails if any does.

    "All" is as credible as the least credible part, without correction (Berger 1982); "any" had as
    many chances as there are parts (Bonferroni).
    """
    return max(p_holds), min(1.0, len(p_fails) * min(p_fails))


def holm(p_holds: Sequence[float], p_fails: Sequence[float]) -> np.ndarray:
    """Holm-adjusted p-values of "this claim is decided", one per claim.

    Of each claim exactly one is true, that it holds or that it does not, so a claim is decided by
    the smaller of its two-sided p-values, in the direction that this names; the doubling in each
    pays for looking both ways. Holm's steps keep the probability of any wrong verdict at α: proven
    for independent tests (Shaffer 1980), and simulated for these in the tests.

    References:
        Holm, A simple sequentially rejective multiple test procedure, 1979.
        Shaffer, Control of directional errors with stagewise rejective multiple test procedures,
        1980.
    """
    smaller = np.minimum(p_holds, p_fails)
    return multitest.multipletests(smaller, method="holm")[1] if smaller.size else smaller
