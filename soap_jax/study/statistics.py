"""Estimates, intervals and p-values from paired seeds.

All functions work on arrays: `smooth` and `steps_to_loss` take losses as a sweep returns them, and
`paired_ratio` takes the steps of two methods, seed by seed.

A `Mean` is an estimate with its standard error and its *pivot*, the distribution of
(estimate - truth) / error. The pivot is Student's t (`student`) or, if each method's learning rate
was chosen on the same seeds, a bootstrap distribution (`bootstrap_t`). The interval and the
p-values come from the same pivot, so that they never contradict each other.

A hypothesis here says that the truth lies in a region. It has two p-values: `p_holds`, of "the
truth is inside", and `p_fails`, of "the truth is outside". A small p-value supports its statement.
Both are two-sided: for α = 0.05, `p_holds` is below α exactly if the 95 % interval lies inside the
region, and `p_fails` is below α exactly if the interval lies outside.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from statsmodels.stats import multitest

ALPHA = 0.05
WINDOW = 11
"""The batches in the moving average of the training loss, which is centred to avoid a lag."""
RESAMPLES = 9999
RESAMPLING_SEED = 20160715
TINY = 1e-12
"""The largest standard error, of logs or degrees, that counts as a rounding error of zero."""

Pivot: TypeAlias = Any
"""A distribution of (estimate - truth) / error, such as `scipy.stats.t(df)` or an `Empirical`."""


def smooth(losses: ArrayLike, window: int = WINDOW) -> np.ndarray:
    """A centred mean over `window` batches, fewer at the ends.

    It is NaN from the first loss on that is not finite.

    Args:
        losses: `(..., steps)`.
        window: the number of batches.

    Example:
        >>> smooth([1.0, 3.0, np.inf, 1.0]).tolist()
        [2.0, 2.0, nan, nan]
    """
    values = np.asarray(losses, float)
    unbroken = np.logical_and.accumulate(np.isfinite(values), axis=-1)
    steps, before = values.shape[-1], window // 2
    margin = [(0, 0)] * (values.ndim - 1) + [(before, window - 1 - before)]
    total, count = (
        sum(padded[..., k : k + steps] for k in range(window))
        for padded in (
            np.pad(np.where(unbroken, values, 0.0), margin),
            np.pad(unbroken.astype(int), margin),
        )
    )
    return np.where(unbroken, total / np.maximum(count, 1), np.nan)


def steps_to_loss(losses: ArrayLike, target: float, window: int = WINDOW) -> np.ndarray:
    """The number of batches until a run's smoothed loss first reaches a target.

    Args:
        losses: `(..., steps)`, the loss of each batch before its update.
        target: the loss to reach.
        window: the window of `smooth`; 1 for losses that are already smoothed.

    Returns:
        `(...)`, NaN for runs that never reach the target.

    Example:
        >>> steps_to_loss([[2.0, 0.4, 0.6], [2.0, 2.0, 2.0]], 0.5, window=1).tolist()
        [2.0, nan]
    """
    arrived = smooth(losses, window) <= target
    return np.where(arrived.any(-1), arrived.argmax(-1) + 1.0, np.nan)


def format_number(value: float) -> str:
    """A number as text: three digits, commas between thousands, a dash for NaN.

    Example:
        >>> [format_number(value) for value in (1234.6, 0.22871, 0.5, float("nan"))]
        ['1,235', '0.229', '0.5', '–']
    """
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if math.isnan(value):
        return "–"
    said = f"{abs(value):,.0f}" if abs(value) >= 99.95 else f"{abs(value):.3g}"
    return f"−{said}" if value < 0 and said != "0" else said


def format_p_value(value: float) -> str:
    """A p-value as text.

    Example:
        >>> format_p_value(0.00002), format_p_value(0.0314)
        ('p < 0.001', 'p = 0.031')
    """
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimate and its 95 % interval; `str` formats both.

    Attributes:
        value: the estimate; NaN if there is none.
        low: lower end of the interval; infinite (for ratios 0) if the interval is open on this
            side, NaN if there is no interval.
        high: upper end, likewise.
        note: remarks on the numbers, or "".

    Example:
        >>> print(Estimate(1.8, 1.7512, 1.85), Estimate(1.8, 1.7, math.inf), sep="; ")
        1.80 [1.75, 1.85]; 1.80 [1.70, ∞)
        >>> print(Estimate(1.1174, 0.96104, 1.2993))
        1.12 [0.96, 1.30]
    """

    value: float
    low: float
    high: float
    note: str = ""

    def __str__(self):
        return self.format()

    def format(self, unit: str = "") -> str:
        """The estimate with its unit, and its interval if there is one."""
        if math.isnan(self.value):
            return "–"
        said = format_like(self.value, self.value) + unit
        open_high = self.high == math.inf
        open_low = self.low == -math.inf or self.low == 0 < self.value  # 0 means open for ratios
        if math.isnan(self.low) or (open_low and open_high):
            return said
        low = f"({format_number(self.low)}" if open_low else f"[{format_like(self.low, self.value)}"
        return f"{said} {low}, " + ("∞)" if open_high else f"{format_like(self.high, self.value)}]")


def format_like(value: float, reference: float) -> str:
    """A number with the decimals that a reference has when it is written with three digits.

    Example:
        >>> [format_like(*pair) for pair in ((1.3, 0.9612), (0.961, 1.1174), (1234.6, 1))]
        ['1.300', '0.96', '1,235']
        >>> format_like(0.0012, 97)
        '0.0012'
    """
    size = math.floor(math.log10(abs(reference))) if reference and math.isfinite(reference) else 2
    decimals = max(0, 2 - size)
    vanishes = abs(value) < 0.5 * 10.0**-decimals
    if not math.isfinite(value) or abs(value) >= 99.95 or decimals > 6 or vanishes:
        return format_number(value)
    return f"{value:.{decimals}f}".replace("-", "−")


class Result(NamedTuple):
    """An estimate, its 95 % interval, and the two p-values of a hypothesis."""

    estimate: float
    low: float
    high: float
    p_holds: float
    p_fails: float


@dataclasses.dataclass(frozen=True, eq=False)
class Empirical:
    """A pivot from resampling. The sample counts as one more resample, so no p-value is 0.

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
        """The order statistics outside which `cdf` or `sf` is below (1 - confidence) / 2."""
        tail = math.ceil(round((1 - confidence) / 2 * (1 + self.values.size), 6)) - 1
        if tail < 1:
            return -np.inf, np.inf
        return float(self.values[tail - 1]), float(self.values[-tail])


@dataclasses.dataclass(frozen=True)
class Mean:
    """An estimated mean.

    Attributes:
        estimate: the estimate.
        error: its standard error. If all values of the sample are equal, it is 0, and the interval
            is a point. NaN for a single value.
        pivot: the distribution of (estimate - truth) / error.
        has_low: whether the interval has a lower end; False if the estimate is an upper bound.
        has_high: whether the interval has an upper end; False if the estimate is a lower bound.
        smallest_p: the smallest one-sided p-value of a sample whose values are all equal.
    """

    estimate: float
    error: float
    pivot: Pivot
    has_low: bool = True
    has_high: bool = True
    smallest_p: float = 0.0

    @property
    def too_few(self) -> bool:
        """Whether a bootstrap has too few seeds for an interval, even without censored runs."""
        ends = self.pivot.interval(1 - ALPHA)
        return self.error == 0 or bool(np.isinf(ends).any())

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval; infinite on an open side, NaN for a single value."""
        lower, upper = self.pivot.interval(1 - ALPHA) if self.error else (0.0, 0.0)
        low = float(self.estimate - self.error * upper) if self.has_low else -np.inf
        high = float(self.estimate - self.error * lower) if self.has_high else np.inf
        return low, high

    def p_above(self, bound: float) -> float:
        """The one-sided p-value of "the truth is above `bound`"; a small one supports it."""
        return self._p(bound, -np.inf, self.has_low)

    def p_below(self, bound: float) -> float:
        """The one-sided p-value of "the truth is below `bound`"; a small one supports it."""
        return self._p(bound, np.inf, self.has_high)

    def _p(self, bound, open_end, is_known):
        if bound == open_end or not is_known:
            return float(bound != open_end)
        difference = self.estimate - bound
        if not self.error:
            return self.smallest_p if difference * open_end < 0 else 1.0
        tail = self.pivot.sf if open_end < 0 else self.pivot.cdf
        return float(tail(difference / self.error))

    def judge(self, within: tuple[float, float]) -> Result:
        """Tests the hypothesis that the truth lies inside a region, infinite on open sides.

        "Inside" needs both one-sided conclusions, so it takes the larger p-value (the
        intersection-union test; for a bounded region, Schuirmann's equivalence test). "Outside"
        needs one of the two, so it takes the smaller p-value. Both are doubled, so that they agree
        with the two-sided interval.

        Example:
            >>> result = student([1.9, 2.0, 2.1]).judge((0.0, np.inf))
            >>> round(result.p_holds, 4), result.p_fails
            (0.0008, 1.0)
        """
        low, high = within
        p_holds = min(1.0, 2 * max(self.p_above(low), self.p_below(high)))
        p_fails = min(1.0, 2 * min(self.p_below(low), self.p_above(high)))
        return Result(self.estimate, *self.interval, p_holds, p_fails)

    def judge_ratio(self, within: tuple[float, float] = (0.0, np.inf)) -> Result:
        """As `judge`, for the exponential of the mean and a region of ratios (0 if open below)."""
        low, high = (math.log(end) if end else -np.inf for end in within)
        result = self.judge((low, high))
        estimate, least, most = np.exp(result[:3]).tolist()
        return result._replace(estimate=estimate, low=least, high=most)


def student(sample: ArrayLike) -> Mean:
    """The mean of independent values, with Student's t as pivot.

    `p_above` and `p_below` are those of `scipy.stats.ttest_1samp`. If all values are equal, their
    spread is unknown, and the p-values are those of the sign test.

    Example:
        >>> low, high = student([1.0, 2.0, 3.0]).interval
        >>> round(low, 3), round(high, 3)
        (-0.484, 4.484)
    """
    values = np.asarray(sample, float)
    if values.size < 2:
        return Mean(float(values.mean()) if values.size else np.nan, np.nan, _student_t(1))
    pivot = _student_t(values.size - 1)
    if np.ptp(values) <= TINY:
        return Mean(float(values[0]), 0.0, pivot, smallest_p=0.5**values.size)
    return Mean(float(values.mean()), float(stats.sem(values)), pivot)


_student_t = functools.cache(stats.t)  # its constructor is slow


@dataclasses.dataclass(frozen=True)
class Quotient(Mean):
    """The ratio of two paired means, by Fieller's method; see `fieller`.

    Attributes:
        part: `(seeds,)`, the values of the numerator.
        whole: `(seeds,)`, the values of the denominator.
    """

    part: np.ndarray = dataclasses.field(kw_only=True)
    whole: np.ndarray = dataclasses.field(kw_only=True)

    @property
    def interval(self) -> tuple[float, float]:
        """The set of ρ for which the mean of part - ρ whole does not differ significantly from 0.

        NaN if the mean of the whole does not differ significantly from 0: the set is then
        unbounded.
        """
        a, b = self.part, self.whole
        quantile = stats.t.ppf(1 - ALPHA / 2, a.size - 1)
        aa, ab, _, bb = (quantile**2 * np.cov(a, b) / a.size).flat
        # (mean(a) - ρ mean(b))² ≤ aa - 2 ρ ab + ρ² bb, which is square ρ² - 2 half ρ + rest ≤ 0
        square, rest = b.mean() ** 2 - bb, a.mean() ** 2 - aa
        half = a.mean() * b.mean() - ab
        if square <= TINY**2:
            return np.nan, np.nan
        root = math.sqrt(max(half**2 - square * rest, 0.0))
        return float((half - root) / square), float((half + root) / square)

    def _p(self, bound, open_end, is_known):
        if not np.isfinite(bound):
            return float(bound != open_end)
        side = np.sign(self.whole.mean())
        return student(side * (self.part - bound * self.whole))._p(0.0, open_end, is_known)


def fieller(part: ArrayLike, whole: ArrayLike) -> Quotient:
    """The ratio of two paired means, with Fieller's interval.

    Example:
        >>> share = fieller([1.0, 1.2, 0.9], [2.0, 2.2, 2.0])
        >>> [round(value, 3) for value in (share.estimate, *share.interval)]
        [0.5, 0.363, 0.608]

    References:
        Fieller, Some problems in interval estimation, 1954.
    """
    a, b = np.asarray(part, float), np.asarray(whole, float)
    known = abs(b.mean()) > TINY
    ratio = float(a.mean() / b.mean()) if known else np.nan
    return Quotient(ratio, np.nan, _student_t(max(a.size - 1, 1)), part=a, whole=b)


class Runs(NamedTuple):
    """The runs of one method, over learning rates and paired seeds.

    Attributes:
        values: `(rates, seeds)`, the values to compare: logarithms of steps, or a metric.
        censored: `(rates, seeds)` bool, whether the value is only a bound, since the run never
            reached the target or diverged.
        diverged: `(rates, seeds)` bool, whether the run diverged.
        score: `(rates, seeds)`, the score that chooses the learning rate; larger is better.
        loss: `(rates, seeds)`, the loss that decides between equal scores; smaller is better.
    """

    values: np.ndarray
    censored: np.ndarray
    diverged: np.ndarray
    score: np.ndarray
    loss: np.ndarray

    @property
    def best_rate_index(self) -> int | None:
        """The index of the best learning rate; None if some run diverged at every rate."""
        if (self.diverged | np.isnan(self.score)).any(axis=1).all():
            return None
        return int(choose_rates(self, np.ones((1, self.score.shape[1]), int))[0])


def choose_rates(runs: Runs, counts: np.ndarray) -> np.ndarray:
    """The learning rates with the best mean scores, one for each of many resamples.

    Scores are float32, so a relative difference of less than a millionth counts as equal; the lower
    mean loss then decides. A rate at which some run of the resample diverged is not chosen.

    Args:
        runs: the runs of one method.
        counts: `(resamples, seeds)`, the number of times that each resample contains each seed.

    Returns:
        `(resamples,)` indices of learning rates.
    """
    unknown = runs.diverged | np.isnan(runs.score)

    def mean(values):
        return counts @ np.where(unknown, 0.0, values).T / counts[0].sum()

    score = np.where(counts @ unknown.T > 0, -np.inf, mean(runs.score))
    most = score.max(axis=1, keepdims=True)
    best = score >= most - 1e-6 * np.abs(most)
    return np.where(best, mean(runs.loss), np.inf).argmin(axis=1)


@functools.cache
def _resamples(seeds: int, resamples: int) -> np.ndarray:
    """The counts of seeds in resamples, the same for every pair of methods."""
    rng = np.random.default_rng(RESAMPLING_SEED)
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)


def bootstrap_t(method: Runs, reference: Runs, *, resamples: int = RESAMPLES) -> Mean:
    """Mean paired difference of two methods, each at its best rate, by the bootstrap-t over seeds.

    Each resample of the seeds chooses each method's rate again, so that the pivot includes the
    variance from this choice. The pivot is made symmetric. If two rates have nearly the same score,
    the choice switches between them and the difference jumps; an equal-tailed bootstrap-t reflects
    this jump to the wrong side. (Its 95 % intervals then covered 69 %, and symmetric ones 95 %.)
    Censored values are used as they are. If a rate that some resample chose has censored runs, the
    mean is a bound (see `censor`).

    Args:
        method: the runs of one method; `best_rate_index` must not be None.
        reference: the runs of the other method, with the same seeds, whose values are subtracted.
        resamples: the number of resamples; the generator's seed is fixed, so results repeat.

    References:
        Hall, On symmetric bootstrap confidence intervals, 1988.
    """
    pair = (method, reference)
    seeds = method.values.shape[1]
    counts = _resamples(seeds, resamples)
    rates = [choose_rates(runs, counts) for runs in pair]
    a, b = (runs.values[chosen] for runs, chosen in zip(pair, rates, strict=True))
    differences = np.where(counts > 0, a - b, 0.0)
    means = np.sum(counts * differences, axis=1) / seeds
    squares = np.sum(counts * (differences - means[:, None]) ** 2, axis=1)
    errors = np.sqrt(squares / max(seeds - 1, 1) / seeds)

    mean = student(
        method.values[method.best_rate_index] - reference.values[reference.best_rate_index]
    )
    shifts = np.where(np.abs(means - mean.estimate) > TINY, means - mean.estimate, 0.0)
    flat = errors <= TINY  # resamples without variance: their ratio is infinite or 0
    ratios = shifts / np.where(flat, 1.0, errors)
    pivot = np.where(flat & (shifts != 0), np.inf, ratios)  # made symmetric below
    unsure = not mean.error and bool(shifts.any())  # only resamples vary
    return dataclasses.replace(
        mean,
        pivot=Empirical(np.sort(np.concatenate([pivot, -pivot]))),
        has_low=not (unsure or reference.censored[rates[1]].any()),
        has_high=not (unsure or method.censored[rates[0]].any()),
    )


def too_many(censored: ArrayLike) -> bool:
    """Whether more than a tenth of a method's runs are censored, so that there is no conclusion."""
    flags = np.asarray(censored)
    return 10 * int(flags.sum()) > flags.size


def censor(mean: Mean, numerator: ArrayLike, denominator: ArrayLike) -> Mean:
    """Opens the interval of a mean difference on the sides that censored runs leave unknown.

    A censored run counts with its budget of steps, which is too small. If runs of the numerator are
    censored, the ratio is therefore a lower bound, without an upper end. If runs of the denominator
    are censored, it is an upper bound. If both are, there is no estimate; if more than a tenth of
    either are, there is no conclusion.

    Args:
        mean: the mean of log(numerator's steps / denominator's steps).
        numerator: bool, whether each run of the numerator is censored.
        denominator: the same for the denominator.
    """
    nothing = too_many(numerator) or too_many(denominator)
    return dataclasses.replace(
        mean,
        estimate=np.nan if np.any(numerator) and np.any(denominator) else mean.estimate,
        has_low=mean.has_low and not (nothing or np.any(denominator)),
        has_high=mean.has_high and not (nothing or np.any(numerator)),
    )


def paired_ratio(
    numerators: ArrayLike, denominators: ArrayLike, *, budget: float | None = None
) -> Estimate:
    """The geometric mean of paired ratios, for example of steps to a loss, with its t interval.

    Args:
        numerators: `(seeds,)`, the numerators; NaN for a run that never reached the loss.
        denominators: `(seeds,)`, the denominators for the same seeds.
        budget: the number of steps of each run. NaNs are replaced by it and make the ratio a bound:
            the interval is then open on one side.

    Raises:
        ValueError: for NaNs without a budget, or values that are not positive.

    Example:
        >>> print(paired_ratio([20.0, 40.0, 84.0], [10.0, 20.0, 40.0]))
        2.03 [1.90, 2.18]
    """
    pair = [np.asarray(steps, float) for steps in (numerators, denominators)]
    missing = [np.isnan(steps) for steps in pair]
    if budget is None and np.any(missing):
        raise ValueError(
            "some values are NaN, of runs that never reached the loss; expected budget=, the "
            "number of steps of each run."
        )
    if any(np.any(steps <= 0) for steps in pair):
        raise ValueError(
            "some values are not positive; expected positive numbers, since ratios are averaged on "
            "the log scale."
        )
    a, b = (np.log(np.where(np.isnan(steps), budget or np.nan, steps)) for steps in pair)
    return Estimate(*censor(student(a - b), *missing).judge_ratio()[:3])


def trend(table: ArrayLike) -> Result:
    """Page's test of whether values grow from column to column.

    Args:
        table: `(blocks, columns)`; only ranks within a block are used.

    Returns:
        Page's L scaled to [-1, 1], without interval. Without ties it is the mean over blocks of the
        Spearman correlation with the order of columns. `p_holds` is the p-value of a rise and
        `p_fails` that of a fall, both two-sided.

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
    """The p-values of a claim with several parts: it holds if all hold, and fails if any fails.

    For "all hold" the p-value is the largest one, without correction (Berger 1982). For "any fails"
    it is the smallest one times the number of parts (Bonferroni).
    """
    return max(p_holds), min(1.0, len(p_fails) * min(p_fails))


def holm(p_holds: ArrayLike, p_fails: ArrayLike) -> np.ndarray:
    """Holm-adjusted p-values of "this claim is decided", one per claim.

    Each claim either holds or does not hold, so the smaller of its two p-values decides it, in the
    direction of that p-value. Both p-values are two-sided, which corrects for testing both
    directions. Holm's procedure keeps the probability of any wrong verdict at α. This is proven for
    independent tests (Shaffer 1980), and simulated for the tests used here.

    References:
        Holm, A simple sequentially rejective multiple test procedure, 1979.
        Shaffer, Control of directional errors with stagewise rejective multiple test procedures,
        1980.
    """
    smaller = np.minimum(p_holds, p_fails)
    return multitest.multipletests(smaller, method="holm")[1] if smaller.size else smaller
