"""Claims on a comparison: a statement, its tests, and their bounds.

    claim = Claim("1", "Mine is faster than backprop", (Ratio("mine", "bp", within=(0, 0.95)),))
    result = study.compare(task, methods, ..., claims=[claim])
    result.judge()

A test measures a quantity and names the region in which its true value must lie. A single test is
also a claim.

    holds               the true values of all tests are inside their regions
    fails               the true value of at least one test is outside its region
    undecided           the data allow neither conclusion
    not testable here   the comparison lacks something that one of the tests needs

The verdicts "holds" and "fails" are significant at 5 % over all testable claims, after Holm's
correction. The claims are stored when a study starts; findings on other claims, or with other
bounds, are *exploratory*.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from soap_jax.study import statistics
from soap_jax.study.contrasts import INF, Part, Test
from soap_jax.study.results import Results, joined
from soap_jax.study.statistics import ALPHA, Estimate, format_number

HOLDS, FAILS, UNDECIDED, NOT_TESTABLE = "holds", "fails", "undecided", "not testable here"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement and its tests: the claim holds if all tests hold.

    Attributes:
        key: the name of the claim.
        statement: the claim as text; if "", the label of its first test.
        tests: the tests.
        sgd_only: whether the claim is testable only with SGD, since other optimisers change the
            effect of a scale (Adam cancels it).
    """

    key: str
    statement: str
    tests: tuple[Test, ...]
    sgd_only: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The claim as a dict for JSON."""
        return {**vars(self), "tests": [test.to_dict() for test in self.tests]}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> Claim:
        """The claim that `to_dict` stored."""
        return Claim(**{**stored, "tests": tuple(map(Test.from_dict, stored["tests"]))})

    def parts(self, comparison: Results) -> tuple[Part, ...]:
        """The results of its tests."""
        optimizer = comparison.protocol["optimizer"]
        if self.sgd_only and optimizer.partition(",")[0] != "sgd":  # "sgd, weight decay 0.001"
            why = f"the optimizer is {optimizer}, and the claim is for SGD"
            return tuple(test.untested(comparison, why) for test in self.tests)
        return tuple(test.part(comparison) for test in self.tests)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """The verdict on a claim; `str` formats it in two lines.

    Attributes:
        key: the name of the claim.
        statement: the claim as text.
        verdict: "holds", "fails", "undecided" or "not testable here".
        why: the test that decides the verdict, with its estimate and bound.
        p: the p-value of the verdict after Holm's correction; for an undecided claim that of the
            likelier verdict. NaN if not testable.
        p_words: the p-value as text; "" if not testable.
        family: the number of claims in the correction.
        parts: the results of the claim's tests.
        exploratory: whether the claim, its bounds or the target loss were chosen after the study
            had started.
    """

    key: str
    statement: str
    verdict: str
    why: str
    p: float
    p_words: str = ""
    family: int = dataclasses.field(default=0, repr=False)
    parts: tuple[Part, ...] = dataclasses.field(repr=False)
    exploratory: bool = False

    def __str__(self):
        p_value = "" if math.isnan(self.p) else f", {statistics.format_p_value(self.p)}"
        verdict = f"{self.verdict}{p_value}{', exploratory' * self.exploratory}"
        start = f"{self.statement}: "
        repeats = self.why.lower().startswith(start.lower())  # the sentence has a capital letter
        return f"{start}{verdict}\n  {self.why[len(start) * repeats :]}"


def as_claims(claims: Sequence[Claim | Test]) -> list[Claim]:
    """Claims, with each single test turned into a claim."""
    several = isinstance(claims, Sequence) and not isinstance(claims, str)
    given: list[Any] = list(claims) if several else [claims]
    if not all(isinstance(claim, Claim | Test) for claim in given):
        raise ValueError(
            f"claims is {claims!r}; expected a list of Claims or Tests, such as study.Ratio(...)."
        )
    found = [
        claim if isinstance(claim, Claim) else Claim(str(i), "", (claim,))
        for i, claim in enumerate(given, 1)
    ]
    for claim in found:
        if not claim.tests or not all(isinstance(test, Test) for test in claim.tests):
            raise ValueError(
                f"claim {claim.key!r} has the tests {claim.tests}; expected at least one Test, "
                "such as study.Ratio(...)."
            )
    return found


def judge(comparison: Results, claims: Sequence[Claim | Test] | None = None) -> list[Finding]:
    """Judges claims on a comparison.

    Args:
        comparison: the results.
        claims: claims or single tests; by default the claims that were stored when the study
            started. Holm's correction is over these and all stored claims that are testable, so
            the verdict on a stored claim does not change if only some of them are given.
    """
    known = [claim["tests"] for claim in comparison.record["claims"]]
    stored = [Claim.from_dict(claim) for claim in comparison.record["claims"]]
    asked = stored if claims is None else as_claims(claims)
    tests = [claim.to_dict()["tests"] for claim in asked]
    others = [c for c, of_claim in zip(stored, known, strict=True) if of_claim not in tests]
    parts = [claim.parts(comparison) for claim in (*asked, *others)]
    unions = {
        i: statistics.intersection_union([p.p_holds for p in ps], [p.p_fails for p in ps])
        for i, ps in enumerate(parts)
        if all(part.testable for part in ps)
    }
    adjusted = statistics.holm(*np.reshape(list(unions.values()), (-1, 2)).T)
    p_values = dict(zip(unions, adjusted.tolist(), strict=True))
    return [
        Finding(
            key=claim.key,
            statement=claim.statement or parts[i][0].label,
            exploratory=comparison.exploratory or tests[i] not in known,
            parts=parts[i],
            family=len(unions),
            **_verdict(parts[i], p_values.get(i), unions.get(i), len(unions)),
        )
        for i, claim in enumerate(asked)
    ]


def _verdict(parts, p, union, family):
    """The verdict, its p-value, and the test that decides it."""
    if p is None:
        why = joined(*dict.fromkeys(part.note for part in parts if not part.testable))
        return {"verdict": NOT_TESTABLE, "p": math.nan, "why": _sentence(why)}
    holds, fails = union
    verdict = UNDECIDED if p >= ALPHA else HOLDS if holds < fails else FAILS
    weakest = max(parts, key=lambda part: part.p_holds)
    intro, named = "", [weakest]
    if verdict == HOLDS:
        intro = "all tests hold; the one with the largest p-value is "
    elif verdict == FAILS:
        intro = "decided by "
        named = [part for part in parts if part.p_fails * len(parts) < ALPHA]
    elif weakest.p_holds >= ALPHA:
        intro, named = "undecided because of ", [part for part in parts if part.p_holds >= ALPHA]
    intro = intro if len(parts) > 1 else ""
    if min(union) < ALPHA <= p:
        intro = f"not significant after Holm's correction for {family} claims: "
    likelier = "either verdict" if holds == fails else f"“{HOLDS if holds < fails else FAILS}”"
    corrected = f", corrected for {family} claims (Holm)" if family > 1 else ""
    p_words = f"{statistics.format_p_value(p)} for {likelier}{corrected}"
    why = _sentence(intro + "; ".join(map(_describe, named)))
    return {"verdict": verdict, "p": p, "p_words": p_words, "why": why}


def tabulate(findings: Sequence[Finding]) -> pd.DataFrame:
    """A table with one row per test, with the verdict on its claim."""
    names = ("key", "statement", "verdict", "exploratory", "p")
    rows = [
        {name: getattr(finding, name) for name in names} | vars(part)
        for finding in findings
        for part in finding.parts
    ]
    table = pd.DataFrame(rows, columns=[*names, *(f.name for f in dataclasses.fields(Part))])
    for i, end in enumerate(("within_low", "within_high")):
        table.insert(len(names) + i, end, table["within"].str[i])
    return table.drop(columns="within").rename(columns={"key": "claim"})


class FormattedPart(NamedTuple):
    """The result of a test as text.

    Attributes:
        estimate: the estimate with its interval.
        bound: the region.
        position: the position of the interval relative to the region, or the direction of a trend.
    """

    estimate: str
    bound: str
    position: str


def format_part(part: Part) -> FormattedPart:
    """A test's estimate, bound and position as text, for the terminal and the report.

    Example:
        >>> " / ".join(format_part(Part("", "ratio", (0, 1), 0.9, 0.7, 1.2, 0.2, 1.0)))
        '0.900 [0.700, 1.200] / below 1 / the interval contains 1'
    """
    low, high = part.within
    has_low = low > (0 if part.measure == "ratio" else -INF)
    has_high = high < INF
    lower, upper = (format_number(round(end, 2) if abs(end) >= 0.1 else end) for end in part.within)
    bound = f"{lower} to {upper}" if has_low else f"below {upper}"
    bound = bound if has_high else f"above {lower}"
    estimate = Estimate(part.estimate, part.low, part.high).format(
        "°" * (part.measure == "degrees")
    )
    holds, fails = part.p_holds < ALPHA, part.p_fails < ALPHA
    beyond = [lower] * (has_low and not part.low > low)
    beyond += [upper] * (has_high and not part.high < high)
    if part.measure == "trend":
        bound, estimate = "rises", f"rank correlation {estimate}"
        position = "it rises" if holds else "it falls" if fails else "no clear trend"
    elif holds:
        position = f"the interval lies {'within ' * (has_low and has_high)}{bound}"
    elif fails:
        side = f"below {lower}" if part.high <= low else f"above {upper}"
        position = f"the interval lies {side}"
    elif part.low in (0, -INF) and part.high == INF:
        position = "no interval"
    elif beyond:
        position = f"the interval contains {' and '.join(beyond)}"
    else:
        position = "all runs agree, but they are too few for a conclusion"
    if not part.testable:
        estimate, position = "–", "not testable"
    return FormattedPart(estimate, bound, position)


def _describe(part):
    estimate, _, position = format_part(part)
    note = f" ({part.note})" if part.note else ""
    return f"{part.label}: {estimate}, {position}{note}"


def _sentence(words):
    return f"{words[:1].upper()}{words[1:].removesuffix('.')}."
