"""The tests of claims: each has a contrast of methods, a measure and a region."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from soap_jax import grids
from soap_jax.study import statistics
from soap_jax.study.results import NotTestable, Periods, Results, joined
from soap_jax.study.statistics import Estimate, Result, format_number

INF = math.inf
Region = tuple[float, float]
"""An interval for the true value; infinite (for ratios 0) on open sides."""


@dataclasses.dataclass(frozen=True)
class Part:
    """The result of one test of a claim; `claims.format_part` formats it.

    Attributes:
        label: the measured quantity, as text.
        measure: "ratio", "difference", "share", "degrees" or "trend" (a rank correlation).
        within: the region, fixed before the study.
        estimate: the estimate; NaN if there is none.
        low: lower end of its 95 % interval; NaN if there is none, and infinite (for ratios 0) if
            censored runs leave it open.
        high: upper end, likewise.
        p_holds: two-sided p-value of "the truth is inside the region"; see `statistics`.
        p_fails: two-sided p-value of "the truth is outside the region".
        runs: the number of runs.
        note: remarks on the numbers, or "".
        censored: the number of runs that never reached the target or diverged.
        testable: False if there are no numbers; `note` then gives the reason.
    """

    label: str
    measure: str
    within: Region
    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p_holds: float = math.nan
    p_fails: float = math.nan
    runs: int = 0
    note: str = ""
    censored: int = 0
    testable: bool = True


@dataclasses.dataclass(frozen=True)
class Test:
    """Base class of tests.

    A test of your own defines `measure`, `evaluate`, and either `words` or `label`.

    Attributes:
        within: the region in which the true value must lie.
    """

    within: Region = dataclasses.field(kw_only=True)
    measure: ClassVar[str]
    words: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type[Test]]] = {}
    __test__ = False  # not a test for pytest

    def __init_subclass__(cls):
        Test.kinds[cls.__name__] = cls

    def __post_init__(self):
        low, high = self.within
        if not low < high or (self.measure == "ratio" and low < 0):
            raise ValueError(
                f"within is {self.within}; expected (low, high) with low < high, and for ratios "
                "low >= 0."
            )

    def label(self, comparison: Results) -> str:
        """The measured quantity: `words` with the labels of the methods, and the metric."""
        named = {k: comparison.label(v) for k, v in vars(self).items() if isinstance(v, str)}
        if "metric" in named:
            named["metric"] = named["metric"].replace("_", " ")
        return self.words.format(**named)

    def evaluate(self, comparison: Results) -> Part:
        """Evaluates the test; raises `NotTestable` if the comparison does not allow it."""
        raise NotImplementedError(f"{type(self).__name__} must define evaluate.")

    def part(self, comparison: Results) -> Part:
        """The result of the test, or the reason why there is none."""
        try:
            if len(comparison.seeds) < 2:
                raise NotTestable("there is one seed; at least 2 are needed for an interval")
            return self.evaluate(comparison)
        except NotTestable as reason:
            return self.untested(comparison, str(reason))

    def untested(self, comparison: Results, why: str) -> Part:
        """The result of a test that cannot be evaluated, with the reason."""
        label = self.label(comparison)
        return Part(label, self.measure, self.within, note=why, testable=False)

    def with_result(self, comparison: Results, where: str, result: Result, *more: Any) -> Part:
        """The result of the test; `more` are the fields runs, note and censored of `Part`."""
        label = f"{self.label(comparison)} {where}"
        return Part(label, self.measure, self.within, *result, *more)

    @property
    def method_names(self) -> tuple[str, ...]:
        """The methods that it names, in its fields `method`, `reference`, `over` and `methods`."""
        single = (getattr(self, name, None) for name in ("method", "reference", "over"))
        return (*filter(None, single), *getattr(self, "methods", ()))

    def to_dict(self) -> dict[str, Any]:
        """The test as a dict for JSON; open ends of the region are None."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        plain["within"] = [float(end) if math.isfinite(end) else None for end in self.within]
        return {"test": type(self).__name__} | plain

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> Test:
        """The test that `to_dict` stored."""
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        kind = str(fields.pop("test"))
        grids.check_known("test", kind, Test.kinds)
        low, high = fields["within"]
        fields["within"] = (-INF if low is None else low, INF if high is None else high)
        return Test.kinds[kind](**fields)


@dataclasses.dataclass(frozen=True)
class Ratio(Test):
    """Steps to the target loss of one method over those of another, seed by seed.

    The test is the paired t-test on the log scale; at best rates it is the bootstrap-t.

    Attributes:
        method: the method of the numerator.
        reference: the method of the denominator.
        at: "shared", the rate that all methods share; "best", each method's best rate, which must
            not be at the edge of the grid; or a learning rate.
        periods: the periods of numerator and denominator; None is a method's smallest.
        matched: whether the test requires that both methods start from the same weights.
        amplification: whether the note reports the method's initial amplification of the hidden
            layers' learning rates: norm ratio times cosine.
    """

    method: str
    reference: str = "bp"
    _: dataclasses.KW_ONLY
    at: str | float = "shared"
    periods: Periods = (None, None)
    matched: bool = True
    amplification: bool = False
    measure: ClassVar[str] = "ratio"
    sign: ClassVar[str] = " / "

    def label(self, comparison: Results) -> str:
        """The methods, with their periods where these are given, and the metric or "steps"."""
        names = zip((self.method, self.reference), self.periods, strict=True)
        pair = self.sign.join(comparison.label(m) + (f", T = {t}" if t else "") for m, t in names)
        return f"{pair}, {self._quantity(comparison)}"

    def _quantity(self, comparison):
        target = comparison.target_loss
        known = not math.isnan(target)
        return f"steps to {f'loss {format_number(target)}' if known else 'the target loss'}"

    def evaluate(self, comparison: Results) -> Part:
        """Evaluates the test; raises `NotTestable` if the comparison does not allow it."""
        metric = getattr(self, "metric", None)
        pair = self.method, self.reference
        starts = comparison.different_starts(*pair)
        if self.matched and starts:
            raise NotTestable(starts)
        _check_inside(comparison, self.at, pair, self.periods)
        found = comparison.paired_difference(*pair, at=self.at, periods=self.periods, metric=metric)
        result = (found.mean.judge if metric else found.mean.judge_ratio)(self.within)
        notes = [found.note, starts]
        if self.amplification:
            notes.insert(1, _amplification(comparison, self.method, found.rates[0]))
        if (period := self.periods[0]) and not metric:
            values = comparison.grid(self.method, period).values
            steps = np.exp(values[comparison.rates.index(found.rates[0])])
            if steps.max() <= period:
                notes.append("every run ended within one period: it synced only at the start")
        flags, where = found.censored, _format_rates(self.at, *found.rates)
        return self.with_result(
            comparison, where, result, np.size(flags), joined(*notes), int(np.sum(flags))
        )


@dataclasses.dataclass(frozen=True)
class Difference(Ratio):
    """A metric of one method minus that of another, seed by seed.

    Attributes:
        metric: a column of the table "runs", such as "test_accuracy". Bounds are in its unit: a
            bound of 0.01 is one point of accuracy.
    """

    _: dataclasses.KW_ONLY
    metric: str
    at: str | float = "best"
    measure: ClassVar[str] = "difference"
    sign: ClassVar[str] = " − "

    def _quantity(self, comparison):
        return self.metric.replace("_", " ")


@dataclasses.dataclass(frozen=True)
class Share(Test):
    """A method's share of the gain of a reference over a control: (m - c) / (r - c) of a metric.

    Each method is at its best rate. The interval is Fieller's; the test is not testable if the
    reference has no significant gain.

    Attributes:
        method: the method with the metric m.
        reference: the reference with the metric r.
        over: the control with the metric c, such as "frozen".
        metric: a column of the table "runs".
    """

    method: str
    reference: str = "bp"
    _: dataclasses.KW_ONLY
    over: str
    metric: str
    measure: ClassVar[str] = "share"
    words: ClassVar[str] = "{method}: share of the gain of {reference} over {over}, {metric}"

    def evaluate(self, comparison: Results) -> Part:
        """Evaluates the test; raises `NotTestable` if the comparison does not allow it."""
        methods = self.method, self.reference, self.over
        rates = _check_inside(comparison, "best", methods)
        grids = [comparison.grid(method, metric=self.metric) for method in methods]
        method, reference, over = (
            grid.values[comparison.rates.index(rate)]
            for grid, rate in zip(grids, rates, strict=True)
        )
        if np.isnan([method, reference, over]).any():
            raise NotTestable(f"{self.metric} is not known for every run")
        sign = comparison.improvement_sign(self.metric) or np.sign(np.mean(reference - over))
        gain = statistics.student(sign * (reference - over))
        if not gain.interval[0] > 0:
            gained = Estimate(gain.estimate, *gain.interval)
            raise NotTestable(
                f"the gain of the reference over the control is not significant: {gained}"
            )
        result = statistics.fieller(method - over, reference - over).judge(self.within)
        where = _format_rates("best", *rates)
        return self.with_result(comparison, where, result, 3 * over.size)


@dataclasses.dataclass(frozen=True)
class Trend(Test):
    """Steps to the target loss grow from method to method, by Page's test with seeds as blocks.

    Attributes:
        methods: the methods, in the order in which steps grow.
        at: "shared" or a learning rate.
    """

    methods: tuple[str, ...]
    _: dataclasses.KW_ONLY
    at: str | float = "shared"
    within: Region = (0.0, INF)
    measure: ClassVar[str] = "trend"

    def label(self, comparison: Results) -> str:
        """The methods in order."""
        return "steps grow from " + " to ".join(map(comparison.label, self.methods))

    def evaluate(self, comparison: Results) -> Part:
        """Evaluates the test; raises `NotTestable` if the comparison does not allow it."""
        rate, logs, flags, notes = comparison.log_steps_at(self.methods, self.at)
        result = statistics.trend(logs.T)
        if any(map(statistics.too_many, flags)):
            result = result._replace(p_holds=1.0, p_fails=1.0)
            notes.insert(
                0, "more than a tenth of a method's runs are censored, so there is no conclusion"
            )
        columns = [c for c in map(str, comparison.evaluations) if c.startswith("weight_angle/")]
        angles = [
            np.mean([comparison.measured(name, method, rate, end=False) for name in columns])
            for method in self.methods * bool(columns)
        ]
        if angles:
            notes.append(f"angles of feedback to weights at the start: {_listed(angles)} degrees")
        more = np.size(flags), joined(*notes), int(np.sum(flags))
        return self.with_result(comparison, f"at rate {rate:g}", result, *more)


@dataclasses.dataclass(frozen=True)
class FinalAngle(Test):
    """The angle between the final error and the true one, at the last hidden layer.

    Attributes:
        method: the method, at its best rate.
    """

    method: str
    measure: ClassVar[str] = "degrees"
    words: ClassVar[str] = "{method}, final error angle at the last hidden layer"

    def evaluate(self, comparison: Results) -> Part:
        """Evaluates the test; raises `NotTestable` if the comparison does not allow it."""
        where, angles = _final_error_angles(comparison, self.method, comparison.hidden[-1:])
        result = statistics.student(angles[:, 0]).judge(self.within)
        return self.with_result(comparison, where, result, len(angles))


@dataclasses.dataclass(frozen=True)
class ErrorAngleTrend(Test):
    """The final error angle grows with distance from the output, by Page's test.

    Attributes:
        method: the method, at its best rate.
    """

    method: str
    _: dataclasses.KW_ONLY
    within: Region = (0.0, INF)
    measure: ClassVar[str] = "trend"
    words: ClassVar[str] = "{method}, final error angle grows with distance from the output"

    def evaluate(self, comparison: Results) -> Part:
        """Evaluates the test; raises `NotTestable` if the comparison does not allow it."""
        depth = len(comparison.hidden)
        if depth < 3:
            raise NotTestable(
                f"a trend over hidden layers needs at least 3; the network has {depth}"
            )
        where, angles = _final_error_angles(comparison, self.method, comparison.hidden[::-1])
        note = f"from the output to the input: {_listed(angles.mean(axis=0))} degrees"
        return self.with_result(comparison, where, statistics.trend(angles), len(angles), note)


def _format_rates(at, *rates):
    *most, last = (f"{rate:g}" for rate in rates)
    return (
        f"at the best rates ({', '.join(most)} and {last})" if at == "best" else f"at rate {last}"
    )


def _listed(numbers):
    return ", ".join(f"{round(float(number), 4):.3g}" for number in numbers)


def _check_inside(comparison, at, methods, periods=(None, None, None)):
    """The methods' rates; raises NotTestable for best rates at the edge of the grid."""
    rates = [comparison.rate(m, at, t) for m, t in zip(methods, periods, strict=False)]
    for method, rate in zip(methods, rates, strict=True):
        if at == "best" and len(comparison.rates) == 1:
            raise NotTestable("best rates need a grid of at least 2 learning rates")
        if at == "best" and comparison.at_edge(rate):
            raise NotTestable(
                f"the best rate of {method}, {rate:g}, lies at the edge of the grid: a better one "
                "may lie outside, so use a wider grid of learning rates"
            )
    return rates


def _amplification(comparison, method, rate):
    """A note on the initial amplification of hidden learning rates by the kernels above them."""

    def start(name, path):
        return comparison.measured(f"{name}/{path}", method, rate, end=False)

    factors = [
        start("norm_ratio", path) * np.cos(np.radians(start("weight_angle", path)))
        for path in comparison.kernels[1:]
    ]
    above = np.cumprod(factors[::-1], axis=0)[::-1].mean(axis=1)
    return (
        "effective rates of the hidden layers (norm ratio × cosine) start at "
        f"{_listed(above)} times the rate"
    )


def _final_error_angles(comparison, method, kernels):
    """The rate at which they are measured, as text, and `(seeds, kernels)` degrees."""
    (rate,) = _check_inside(comparison, "best", [method])
    angles = [comparison.measured(f"error_angle/{k}", method, rate, end=True) for k in kernels]
    if not angles or not np.isfinite(angles).all():
        raise NotTestable(f"the final error angle of {method} is not known for every seed")
    return f"at its best rate ({rate:g})", np.stack(angles, axis=1)
