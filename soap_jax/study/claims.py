"""Claims on a comparison: a statement, the tests that it takes, and their bounds.

    claim = Claim("1", "Mine is faster than backprop", (Ratio("mine", "bp", within=(0, 0.95)),))
    result = study.compare(task, methods, ..., claims=[claim])
    result.judge()

A test measures something and says in which region the truth must lie; alone it is a claim, too.

    holds               all of a claim's tests are inside their regions
    fails               one of them is outside
    undecided           the data allow neither conclusion
    not testable here   the comparison lacks what one of the tests needs

Verdicts are significant at 5 % over all testable claims together, by Holm's correction. The claims
are stored when a study starts; findings on others, or with other bounds, are *exploratory*.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd

from soap_jax.study import statistics
from soap_jax.study.comparison import Comparison, NotTestable, Periods, joined
from soap_jax.study.statistics import ALPHA, Estimate, number

HOLDS, FAILS, UNDECIDED, NOT_TESTABLE = "holds", "fails", "undecided", "not testable here"
INF = math.inf
Region = tuple[float, float]
"""In which the truth must lie; infinite (for ratios 0) where open."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One test within a claim, evaluated; `in_words` says it.

    Attributes:
        label: what is measured, in words.
        measure: "ratio", "difference", "share", "degrees" or "trend" (a rank correlation).
        within: the region written down beforehand.
        estimate: the estimate; NaN where there is none.
        low: lower end of its 95 % interval; NaN where there is none, and infinite (for ratios 0)
            where censored runs leave it open.
        high: upper end.
        p_holds: two-sided p-value of "the truth is inside"; see `statistics`.
        p_fails: two-sided p-value of "the truth is outside".
        censored: how many of the runs never reached the target, or diverged.
        runs: how many runs there are.
        note: what a reader must know beside the numbers, or "".
        testable: False where `note` says why there are no numbers.
    """

    label: str
    measure: str
    within: Region
    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p_holds: float = math.nan
    p_fails: float = math.nan
    censored: int = 0
    runs: int = 0
    note: str = ""
    testable: bool = True


@dataclasses.dataclass(frozen=True)
class Test:
    """What a claim takes. A test of your own subclasses this, with `measure` and `evaluate`."""

    __test__ = False  # nothing for pytest
    within: Region = dataclasses.field(kw_only=True)
    measure: ClassVar[str]

    def __post_init__(self):
        low, high = self.within
        if not low < high or (self.measure == "ratio" and low < 0):
            raise ValueError(f"within is {self.within}; expected (low, high), of ratios from 0 on.")

    def label(self, comparison: Comparison) -> str:
        """What is measured, in words."""
        raise NotImplementedError

    def evaluate(self, comparison: Comparison) -> dict[str, Any]:
        """The numbers of a `Part`, and "where" they were measured; may raise `NotTestable`."""
        raise NotImplementedError

    def part(self, comparison: Comparison) -> Part:
        """The test, evaluated."""
        told = {"label": self.label(comparison), "measure": self.measure, "within": self.within}
        try:
            if len(comparison.seeds) < 2:
                raise NotTestable("one seed has no spread: at least 2 are needed")
            found = self.evaluate(comparison)
        except NotTestable as reason:
            return Part(**told, note=str(reason), testable=False)
        told["label"] += f", {found.pop('where')}"
        return Part(**told, **found)

    def to_dict(self) -> dict[str, Any]:
        """The test as JSON has it; open ends are null."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        plain["within"] = [float(end) if math.isfinite(end) else None for end in self.within]
        return {"test": type(self).__name__} | plain

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> Test:
        """The test that `to_dict` stored."""
        named = {kind.__name__: kind for kind in Test.__subclasses__()}
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        if (kind := fields.pop("test")) not in named:
            raise ValueError(f"a stored test is a {kind}; expected one of {', '.join(named)}.")
        ends = zip(fields["within"], (-INF, INF), strict=True)
        fields["within"] = tuple(end if given is None else given for given, end in ends)
        return named[kind](**fields)


@dataclasses.dataclass(frozen=True)
class Ratio(Test):
    """Steps to the target loss of one method over those of another, seed by seed.

    Attributes:
        method: the numerator's.
        reference: the denominator's.
        at: "shared", the rate that all methods share; "best", each at its own, which must lie
            inside the grid; or a learning rate.
        periods: of numerator and denominator; None is a method's smallest.
        matched: whether it means something only if both methods start from the same weights.
        amplification: whether to say beside it what the method's feedback makes of the hidden
            learning rates: norm ratio times cosine.
    """

    method: str
    reference: str = "bp"
    _: dataclasses.KW_ONLY
    at: str | float = "shared"
    periods: Periods = (None, None)
    matched: bool = True
    amplification: bool = False
    measure: ClassVar[str] = "ratio"

    def label(self, comparison: Comparison) -> str:
        """The methods, with their periods if these are what differs."""
        return _pair(comparison, self)

    def evaluate(self, comparison: Comparison) -> dict[str, Any]:
        """By the paired t on the log scale, at best rates by the bootstrap-t."""
        starts = _starts(comparison, self.method, self.reference)
        if self.matched and starts:
            raise NotTestable(starts)
        pair = self.method, self.reference
        _check_inside(comparison, self.at, pair, self.periods)
        found = comparison.compared(*pair, at=self.at, periods=self.periods)
        i, period = comparison.rates.index(found.rates[0]), self.periods[0] or 0
        steps = np.exp(comparison.grid(self.method, period or None).values[i])
        short = steps.max() <= period and "no run lasted one period: it synced only at the start"
        beside = self.amplification and _amplification(comparison, self.method, found.rates[0])
        return {
            "where": f"steps to loss {comparison.target_loss:g} {_at(self.at, *found.rates)}",
            **found.mean.judge_ratio(self.within)._asdict(),
            **_counted(found.censored),
            "note": joined(found.note, beside, starts, short),
        }


@dataclasses.dataclass(frozen=True)
class Difference(Test):
    """A metric of one method minus that of another, seed by seed.

    Attributes:
        method: its metric.
        reference: what is taken off.
        metric: a column of the table "runs", such as "test_accuracy".
        at: as in `Ratio`.
        periods: as in `Ratio`.
    """

    method: str
    reference: str = "bp"
    _: dataclasses.KW_ONLY
    metric: str
    at: str | float = "best"
    periods: Periods = (None, None)
    measure: ClassVar[str] = "difference"

    def label(self, comparison: Comparison) -> str:
        """The methods, with their periods if these are what differs."""
        return _pair(comparison, self, " - ")

    def evaluate(self, comparison: Comparison) -> dict[str, Any]:
        """By the paired t, at best rates by the bootstrap-t."""
        _check_metric(comparison, self.metric)
        pair = self.method, self.reference
        _check_inside(comparison, self.at, pair, self.periods)
        found = comparison.compared(*pair, at=self.at, periods=self.periods, metric=self.metric)
        return {
            "where": f"{self.metric.replace('_', ' ')} {_at(self.at, *found.rates)}",
            **found.mean.judge(self.within)._asdict(),
            **_counted(found.censored),
            "note": found.note,
        }


@dataclasses.dataclass(frozen=True)
class Share(Test):
    """How much of a reference's gain over a control a method has: (m - c) / (r - c) of a metric.

    Each method is at its best rate. By Fieller's method; not testable where the reference may have
    no gain.

    Attributes:
        method: m.
        reference: r.
        over: c, such as "frozen".
        metric: a column of the table "runs".
    """

    method: str
    reference: str = "bp"
    _: dataclasses.KW_ONLY
    over: str
    metric: str
    measure: ClassVar[str] = "share"

    def label(self, comparison: Comparison) -> str:
        """The gain, in words."""
        method, reference, over = map(comparison.label, (self.method, self.reference, self.over))
        return f"{method}: share of the gain of {reference} over {over}"

    def evaluate(self, comparison: Comparison) -> dict[str, Any]:
        """By Fieller's method on paired seeds."""
        _check_metric(comparison, self.metric)
        methods = self.method, self.reference, self.over
        _check_inside(comparison, "best", methods)
        rates = [comparison.rate(method, "best") for method in methods]
        method, reference, over = (
            comparison.rows("runs", m, rate)[self.metric].to_numpy(float)
            for m, rate in zip(methods, rates, strict=True)
        )
        whole = statistics.student(reference - over)
        if not whole.interval[0] * whole.interval[1] > 0:  # also where it is NaN
            gain = Estimate(whole.estimate, *whole.interval)
            raise NotTestable(f"the reference may gain nothing over the control: {gain}")
        return {
            "where": f"{self.metric.replace('_', ' ')} {_at('best', *rates)}",
            **statistics.fieller(method - over, reference - over).judge(self.within)._asdict(),
            "runs": 3 * len(over),
        }


@dataclasses.dataclass(frozen=True)
class Trend(Test):
    """Steps to the target loss grow from method to method, by Page's test with seeds as blocks.

    Attributes:
        methods: in the order of growth.
        at: "shared" or a learning rate.
    """

    methods: tuple[str, ...]
    _: dataclasses.KW_ONLY
    at: str | float = "shared"
    within: Region = (0.0, INF)
    measure: ClassVar[str] = "trend"

    def label(self, comparison: Comparison) -> str:
        """The methods in order."""
        return "steps grow from " + " to ".join(map(comparison.label, self.methods))

    def evaluate(self, comparison: Comparison) -> dict[str, Any]:
        """By Page's test on the ranks within each seed."""
        columns = [comparison.grid(method) for method in self.methods]
        if starts := _starts(comparison, *self.methods):
            raise NotTestable(starts)
        rate = comparison.rate(self.methods[0], self.at)
        i = comparison.rates.index(rate)
        result = statistics.trend(np.stack([runs.values[i] for runs in columns], axis=1))
        many = any(statistics.too_many(runs.censored[i]) for runs in columns)
        if many:
            result = result._replace(p_holds=1.0, p_fails=1.0)
        return {
            "where": _at(self.at, rate),
            **result._asdict(),
            **_counted([runs.censored[i] for runs in columns]),
            "note": joined(
                many and "more than a tenth of a method's runs are censored: no conclusion",
                *(comparison.missing(method, rate) for method in self.methods),
                _start_angles(comparison, self.methods, rate),
            ),
        }


@dataclasses.dataclass(frozen=True)
class FinalAngle(Test):
    """The error that reaches the hidden kernel nearest the output, against the true one, in the end.

    Attributes:
        method: at its best rate.
    """

    method: str
    measure: ClassVar[str] = "degrees"

    def label(self, comparison: Comparison) -> str:
        """The method's."""
        return f"{comparison.label(self.method)}, final error angle at the last hidden layer"

    def evaluate(self, comparison: Comparison) -> dict[str, Any]:
        """By Student's t over seeds."""
        where, angles = _final_error_angles(comparison, self.method, comparison.hidden[-1:])
        found = statistics.student(angles[:, 0]).judge(self.within)
        return {"where": where, **found._asdict(), "runs": len(angles)}


@dataclasses.dataclass(frozen=True)
class ErrorAngleTrend(Test):
    """The final error angle grows with distance from the output, by Page's test.

    Attributes:
        method: at its best rate.
    """

    method: str
    _: dataclasses.KW_ONLY
    within: Region = (0.0, INF)
    measure: ClassVar[str] = "trend"

    def label(self, comparison: Comparison) -> str:
        """The method's."""
        name = comparison.label(self.method)
        return f"{name}, final error angle grows with distance from the output"

    def evaluate(self, comparison: Comparison) -> dict[str, Any]:
        """By Page's test on the ranks within each seed."""
        depth = len(comparison.hidden)
        if depth < 3:
            raise NotTestable(f"a trend over hidden layers needs at least 3 of them, not {depth}")
        where, angles = _final_error_angles(comparison, self.method, comparison.hidden[::-1])
        found = statistics.trend(angles)._asdict()
        note = f"from the output on, {_listed(angles.mean(axis=0))} degrees"
        return {"where": where, **found, "runs": len(angles), "note": note}


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement, and the tests that it takes: it holds if all of them do.

    Attributes:
        key: its name.
        statement: the claim in words.
        tests: what it takes.
        sgd_only: whether it is about SGD, and not testable with another optimiser: those change
            what a scale does (Adam cancels it).
    """

    key: str
    statement: str
    tests: tuple[Test, ...]
    sgd_only: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The claim as JSON has it."""
        tests = [test.to_dict() for test in self.tests]
        return {**vars(self), "tests": tests}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> Claim:
        """The claim that `to_dict` stored."""
        return Claim(**{**stored, "tests": tuple(map(Test.from_dict, stored["tests"]))})

    def parts(self, comparison: Comparison) -> tuple[Part, ...]:
        """Its tests, evaluated."""
        parts = tuple(test.part(comparison) for test in self.tests)
        optimizer = comparison.protocol["optimizer"]
        if self.sgd_only and optimizer != "sgd":
            note = f"the optimizer is {optimizer}: the claim is about SGD"
            parts = tuple(
                Part(label=p.label, measure=p.measure, within=p.within, note=note, testable=False)
                for p in parts
            )
        return parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """A claim, judged.

    Attributes:
        key: the claim's.
        statement: the claim in words.
        verdict: "holds", "fails", "undecided" or "not testable here".
        exploratory: whether the claim, its bounds or the target loss were chosen after the study
            had started.
        why: which test decides it, what it found, and where its bound lies.
        p: of the verdict, after Holm's correction; of an undecided claim, of the likelier one. NaN
            where not testable.
        family: how many claims the correction is for.
        parts: the tests.
    """

    key: str
    statement: str
    verdict: str
    exploratory: bool = False
    why: str
    p: float
    family: int
    parts: tuple[Part, ...]

    @property
    def p_words(self) -> str:
        """The p-value, and of what it is one; "" where there is none."""
        if math.isnan(self.p):
            return ""
        holds, fails = _union(self.parts)
        likelier = {True: f"for “{HOLDS}”", False: f"for “{FAILS}”"}
        which = "for either verdict" if holds == fails else likelier[holds < fails]
        family = f", corrected for {self.family} claims (Holm)" if self.family > 1 else ""
        return f"{statistics.p_value(self.p)} {which}{family}"


def as_claims(claims: Sequence[Claim | Test]) -> list[Claim]:
    """Claims as they are; of a test alone, the claim that it passes, with the test's words."""
    return [
        claim if isinstance(claim, Claim) else Claim(str(i), "", (claim,))
        for i, claim in enumerate(claims, start=1)
    ]


def judge(comparison: Comparison, claims: Sequence[Claim | Test] | None = None) -> list[Finding]:
    """Judges claims on a comparison.

    Args:
        comparison: what was found.
        claims: claims, or tests that are claims of their own; by default those stored when the
            study started. Holm's correction is over these and the stored ones, as far as they are
            testable, so that the verdict on a stored claim does not depend on who asks.
    """
    known = [claim["tests"] for claim in comparison.record["claims"]]
    stored = [Claim.from_dict(claim) for claim in comparison.record["claims"]]
    asked = stored if claims is None else as_claims(claims)
    tests = [claim.to_dict()["tests"] for claim in asked]
    others = [c for c, of_claim in zip(stored, known, strict=True) if of_claim not in tests]
    parts = [claim.parts(comparison) for claim in (*asked, *others)]
    testable = [all(part.testable for part in of_claim) for of_claim in parts]
    unions = np.array([_union(ps) for ps, can in zip(parts, testable, strict=True) if can])
    adjusted = iter(statistics.holm(*unions.reshape(-1, 2).T))
    findings = []
    for i, claim in enumerate(asked):
        of_claim, can = parts[i], testable[i]
        p = float(next(adjusted)) if can else math.nan
        verdict = UNDECIDED if can else NOT_TESTABLE
        if p < ALPHA:
            holds, fails = _union(of_claim)
            verdict = HOLDS if holds < fails else FAILS
        findings.append(
            Finding(
                key=claim.key,
                statement=claim.statement or of_claim[0].label,
                verdict=verdict,
                exploratory=comparison.exploratory or tests[i] not in known,
                why=_why(verdict, of_claim),
                p=p,
                family=len(unions),
                parts=of_claim,
            )
        )
    return findings


def tabulate(findings: Sequence[Finding]) -> pd.DataFrame:
    """One row per part, with the verdict on the claim that it belongs to."""
    rows = []
    for finding in findings:
        for part in finding.parts:
            numbers = dataclasses.asdict(part)
            least, most = numbers.pop("within")
            names = ("key", "statement", "verdict", "exploratory", "p")
            row = {name: getattr(finding, name) for name in names}
            rows.append({**row, "within_low": least, "within_high": most, **numbers})
    return pd.DataFrame(rows).rename(columns={"key": "claim"})


class Words(NamedTuple):
    """A test's numbers for people.

    Attributes:
        estimate: the estimate with its interval.
        bound: the region.
        place: where the interval, or the trend, lies in relation to it.
    """

    estimate: str
    bound: str
    place: str


def in_words(part: Part) -> Words:
    """A test's estimate and bound in words, for screens and pages alike.

    Example:
        >>> part = Part(label="", measure="ratio", within=(0, 1), estimate=0.9, low=0.7, high=1.2)
        >>> " / ".join(in_words(part))
        '0.900 [0.700, 1.20] / below 1 / the interval reaches beyond 1'
    """
    low, high = part.within
    open_low = low == -INF or (part.measure == "ratio" and low == 0)
    bound = f"{number(low)} to {number(high)}"
    bound = f"above {number(low)}" if high == INF else bound
    bound = f"below {number(high)}" if open_low else bound
    bound = "any" if open_low and high == INF else bound
    if not part.testable:
        return Words("–", bound, "not testable")
    unit = "°" if part.measure == "degrees" else ""
    estimate = Estimate(part.estimate, part.low, part.high).words(unit)
    holds, fails = part.p_holds < ALPHA, part.p_fails < ALPHA
    within = "within " if not open_low and high != INF else ""
    if part.measure == "trend":
        clear = "it rises" if holds else "it falls" if fails else "no clear trend"
        return Words(f"rank correlation {estimate}", "rises", clear)
    beyond = [end for end in (low,) if not open_low and not part.low > end]
    beyond += [end for end in (high,) if high != INF and not part.high < end]
    if holds:
        place = f"the interval lies {within}{bound}"
    elif fails:
        place = "the interval lies " + (
            f"below {number(low)}" if part.high <= low else f"above {number(high)}"
        )
    elif beyond:
        place = f"the interval reaches beyond {' and '.join(map(number, beyond))}"
    else:
        place = "all runs are alike, and too few for a conclusion"
    return Words(estimate, bound, place)


# Inside


def _pair(comparison, test, sign=" / "):
    names = zip((test.method, test.reference), test.periods, strict=True)
    return sign.join(comparison.label(m) + (f", T = {t}" if t else "") for m, t in names)


def _at(at, *rates):
    said = dict.fromkeys(f"{rate:g}" for rate in rates)
    if at == "best":
        *most, last = (f"{rate:g}" for rate in rates)
        return f"each at its best rate ({', '.join(most)} and {last})"
    return f"at rate {' and '.join(said)}"


def _counted(flags):
    return {"censored": int(np.sum(flags)), "runs": np.size(flags)}


def _listed(numbers):
    return ", ".join(f"{number:.3g}" for number in numbers)


def _check_inside(comparison, at, methods, periods=(None, None, None)):
    """That best rates are chosen among several, and lie inside the grid."""
    for method, period in zip(methods, periods, strict=False):
        rate = comparison.rate(method, at, period)
        if at == "best" and len(comparison.rates) == 1:
            raise NotTestable("one learning rate leaves none to choose: more are needed")
        if at == "best" and comparison.at_edge(rate):
            raise NotTestable(
                f"the best rate of {method}, {rate:g}, lies at the edge of the grid: a better one "
                "may lie beyond, so widen the learning rates"
            )


def _check_metric(comparison, metric):
    if metric not in comparison.runs:
        found = [name for name in comparison.runs if name.startswith(("test_", "valid", "train"))]
        raise ValueError(f"metric is {metric!r}; expected one of {', '.join(found)}.")


def _starts(comparison, *methods):
    """Says so if methods start from different params; else ""."""
    starts = {comparison.methods.get(method, {}).get("init") or None for method in methods}
    return "the methods start from different weights" if len(starts) > 1 else ""


def _amplification(comparison, method, rate):
    """What feedback makes of the hidden learning rates before training, from the kernels above."""

    def start(name, path):
        return comparison.measured(f"{name}/{path}", method, rate, end=False)

    factors = [
        start("norm_ratio", path) * np.cos(np.radians(start("weight_angle", path)))
        for path in comparison.kernels[1:]
    ]
    above = np.cumprod(factors[::-1], axis=0)[::-1].mean(axis=1)
    said = f"hidden rates that count (norm ratio × cosine) start at {_listed(above)} times the rate"
    return said if np.isfinite(above).all() else ""


def _start_angles(comparison, methods, rate):
    columns = [name for name in comparison.evaluations if name.startswith("weight_angle/")]
    if not columns:
        return ""
    angles = [
        np.mean([comparison.measured(column, method, rate, end=False) for column in columns])
        for method in methods
    ]
    return f"angles of feedback to weights at the start: {_listed(angles)} degrees"


def _final_error_angles(comparison, method, kernels):
    """Where they are measured, and `(seeds, kernels)` degrees."""
    rate = comparison.rate(method, "best")
    _check_inside(comparison, "best", [method])
    angles = [comparison.measured(f"error_angle/{k}", method, rate, end=True) for k in kernels]
    if not angles or not np.isfinite(angles).all():
        raise NotTestable(f"the final error angle of {method} is not known for every seed")
    return f"at its best rate ({rate:g})", np.stack(angles, axis=1)


def _union(parts):
    return statistics.intersection_union(
        [part.p_holds for part in parts], [part.p_fails for part in parts]
    )


def _why(verdict, parts):
    """Which test decides a claim, and what it found, in a sentence."""
    weakest = max(parts, key=lambda part: part.p_holds)
    if verdict == NOT_TESTABLE:
        intro, said = "", list(dict.fromkeys(part.note for part in parts if not part.testable))
    elif verdict == HOLDS:
        intro = "All tests hold; the weakest is " if len(parts) > 1 else ""
        said = [_said(weakest)]
    elif verdict == FAILS:
        intro = "Decided by " if len(parts) > 1 else ""
        said = [_said(part) for part in parts if part.p_fails * len(parts) < ALPHA]
    elif weakest.p_holds < ALPHA:
        intro = "Not significant after Holm's correction for the number of claims: "
        said = [_said(weakest)]
    else:
        intro = "Left open by " if len(parts) > 1 else ""
        said = [_said(part) for part in parts if part.p_holds >= ALPHA]
    sentence = intro + "; ".join(said)
    return f"{sentence[:1].upper()}{sentence[1:]}."


def _said(part):
    estimate, bound, place = in_words(part)
    note = f" ({part.note})" if part.note else ""
    return f"{part.label}: {estimate}, {place}{note}"
