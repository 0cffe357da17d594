"""The claims that a study tests, with the bounds written down before any run.

A claim is a declaration: a statement in words and the tests that it takes, each a contrast, a
measure and the region in which the truth must lie. `evaluate` judges all from the tidy tables:

    holds               all of its tests are inside their regions, beyond doubt
    fails               one of them is outside, beyond doubt
    undecided           the data allow neither conclusion
    not testable here   the study lacks what one of its tests needs

"Beyond doubt" is α = 0.05 over all testable claims together, by Holm's correction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from soap_jax.study import contrasts, statistics
from soap_jax.study.config import StudyConfig
from soap_jax.study.contrasts import ErrorAngleTrend, FinalErrorAngle, Part, Ratio, StepsTrend
from soap_jax.study.paired import NotTestable, Study

HOLDS, FAILS, UNDECIDED, NOT_TESTABLE = "holds", "fails", "undecided", "not testable here"
INF = math.inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """A claim, evaluated.

    Attributes:
        key: the claim's number.
        statement: the claim in words.
        verdict: "holds", "fails", "undecided" or "not testable here".
        why: what was found, against which bound.
        p: Holm-adjusted p-value of the verdict; NaN where not testable.
        parts: the tests.
    """

    key: str
    statement: str
    verdict: str
    why: str
    p: float
    parts: tuple[Part, ...]


def _amplification(study):
    """What raw signs make of the hidden layers' learning rates before training."""
    i = study.shared_rate()
    columns = [f"effective_learning_rate/Dense_{k}" for k in range(len(study.config.hidden))]
    rates = np.mean([study.measured(name, "sign", i, end=False) for name in columns], axis=1)
    factors = contrasts.listed(rates / study.config.learning_rates[i])
    return f"hidden rates that count (norm ratio × cosine) start at {factors} times the rate"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement, and the tests that it takes: it holds if all of them do.

    Attributes:
        key: its number.
        statement: the claim in words.
        tests: what it takes.
    """

    key: str
    statement: str
    tests: tuple[Ratio | StepsTrend | FinalErrorAngle | ErrorAngleTrend, ...]


WITHIN_10_PERCENT = (1 / 1.1, 1.1)
CLAIMS = (
    Claim(
        "1",
        "Fixed random feedback (FA) needs about twice backprop's steps",
        (Ratio("fa", "bp", (1.5, 3.0), matched=False),),
    ),
    Claim(
        "2",
        "Raw sign sync needs far fewer steps than backprop",
        (Ratio("sign", "bp", (0.0, 0.8), matched=False),),
    ),
    Claim(
        "3",
        "That gain is the amplified learning rate of the hidden layers",
        (
            Ratio("sign", "bp_scaled_live", (0.9, INF), beside=_amplification),
            Ratio("sign_norm", "bp", (0.9, INF)),
        ),
    ),
    Claim(
        "4",
        "Keeping magnitudes loses the gain, and steps follow the initial angle",
        (
            Ratio("sign_preserve", "bp", (0.95, INF)),
            StepsTrend(("bp", "sign_norm", "sign_preserve", "fa")),
        ),
    ),
    Claim(
        "5",
        "Tuning one global rate per method does not undo it",
        (
            Ratio("fa", "bp", (1 / 1.25, 1.25), tuned=True),
            Ratio("sign", "bp", (0.0, 1.0), tuned=True),
            Ratio("sign", "bp_scaled_live", WITHIN_10_PERCENT, tuned=True),
        ),
    ),
    Claim(
        "6",
        "The sync period hardly matters",
        tuple(
            Ratio(method, method, WITHIN_10_PERCENT, periods=(period, 1))
            for method in ("sign", "sign_preserve")
            for period in (10, 100)
        ),
    ),
    Claim("7", "Alignment emerges under FA", (FinalErrorAngle("fa", (-INF, 75.0)),)),
    Claim("7b", "Alignment is best near the output", (ErrorAngleTrend("fa"),)),
)


def evaluate(
    config: StudyConfig,
    tables: Mapping[str, pd.DataFrame],
    only: Sequence[str] | None = None,
) -> list[Finding]:
    """Judges the claims on a study.

    Args:
        config: the study's configuration.
        tables: its tidy tables "runs" and "evaluations".
        only: keys of the claims to return, by default all. Holm's correction is over all that the
            study can test in any case, so a verdict does not depend on who asks.

    Raises:
        ValueError: for an unknown key, or tables that are not those of the configuration.
    """
    known = [claim.key for claim in CLAIMS]
    unknown = [key for key in only or () if key not in known]
    if unknown:
        raise ValueError(
            f"there is no claim {', '.join(map(repr, unknown))}; expected some of "
            f"{', '.join(known)}."
        )
    study = Study(config, tables)
    parts = {claim.key: tuple(_part(test, study) for test in claim.tests) for claim in CLAIMS}
    p_values = {
        key: statistics.intersection_union(*_p_values(ps))
        for key, ps in parts.items()
        if all(part.testable for part in ps)
    }
    adjusted = statistics.holm(*np.reshape(list(p_values.values()), (-1, 2)).T)
    verdicts = dict.fromkeys(known, (NOT_TESTABLE, math.nan))
    for (key, (p_holds, p_fails)), p in zip(p_values.items(), adjusted, strict=True):
        decided = HOLDS if p_holds < p_fails else FAILS
        verdicts[key] = (decided if p < statistics.ALPHA else UNDECIDED), float(p)
    return [
        Finding(
            key=claim.key,
            statement=claim.statement,
            verdict=verdicts[claim.key][0],
            why=_why(verdicts[claim.key][0], parts[claim.key]),
            p=verdicts[claim.key][1],
            parts=parts[claim.key],
        )
        for claim in CLAIMS
        if only is None or claim.key in only
    ]


def tabulate(findings: Sequence[Finding]) -> pd.DataFrame:
    """One row per part, with the verdict on the claim that it belongs to."""
    rows = []
    for finding in findings:
        for part in finding.parts:
            numbers = dataclasses.asdict(part)
            least, most = numbers.pop("within")
            rows.append(
                {
                    "claim": finding.key,
                    "statement": finding.statement,
                    "verdict": finding.verdict,
                    "p": finding.p,
                    "within_low": least,
                    "within_high": most,
                    **numbers,
                }
            )
    return pd.DataFrame(rows)


def _part(test, study):
    try:
        return test.evaluate(study)
    except NotTestable as reason:
        described = {"label": test.label, "measure": test.measure, "within": test.within}
        return Part(**described, note=str(reason), testable=False)


def _p_values(parts):
    return [part.p_holds for part in parts], [part.p_fails for part in parts]


def _why(verdict, parts):
    """What was found, in a sentence: of a failed claim only the parts that fail it."""
    if verdict == NOT_TESTABLE:
        said = list(dict.fromkeys(part.note for part in parts if not part.testable))
    elif verdict == FAILS:
        said = [_found(part) for part in parts if part.p_fails * len(parts) < statistics.ALPHA]
    else:
        said = [_found(part) for part in parts]
        alone = statistics.intersection_union(*_p_values(parts))
        if verdict == UNDECIDED and min(alone) < statistics.ALPHA:
            said.append("not enough for a verdict after the correction for the number of claims")
    sentence = "; ".join(said)
    return f"{sentence[:1].upper()}{sentence[1:]}."


def _found(part):
    low, high = part.within
    if part.measure == "trend":
        value, bound = f"rank correlation {part.estimate:.2f}", "above 0"
    else:
        unit = "°" if part.measure == "degrees" else ""
        value = f"{part.estimate:.3g}{unit}{_interval(part.low, part.high)}"
        value = "no estimate" if math.isnan(part.estimate) else value
        bound = f"{low:.3g} to {high:.3g}"
        bound = f"below {high:.3g}" if low in (0, -INF) else bound
        bound = f"above {low:.3g}" if high == INF else bound
    if part.p_holds < statistics.ALPHA:
        place = "inside the bound"
    else:
        place = "outside the bound" if part.p_fails < statistics.ALPHA else "not clear of the bound"
    note = f" ({part.note})" if part.note else ""
    return f"{part.label}: {value}, {place}, {bound}{note}"


def _interval(low, high):
    open_low, open_high = low in (0, -INF), high == INF
    if open_low and open_high:
        return ""
    if open_low or open_high:
        return f" (95 %: at most {high:.3g})" if open_low else f" (95 %: at least {low:.3g})"
    return f" (95 % interval {low:.3g} to {high:.3g})"
