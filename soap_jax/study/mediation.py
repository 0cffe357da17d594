"""How much of raw sign sync's effect on speed goes through the hidden layers' learning rate.

    rule ──> effective learning rate of the hidden layers ──> steps to the target loss
      └────> direction of the error that reaches them ─────────────────┘

Raw signs change both. Two controls change one alone: `bp_scaled_live` has the size of `sign`'s
error and the direction of backprop, `sign_norm` the direction of `sign` and nearly backprop's size.
What an error of the same size, but off the true direction, loses in speed counts as direction.
Steps are compared at the shared rate, seed by seed, and the logarithms of ratios add up:

    rate first         log(sign / bp) = log(bp_scaled_live / bp) + log(sign / bp_scaled_live)
    direction first    log(sign / bp) = log(sign_norm / bp) + log(sign / sign_norm)

The two orders differ by how rate and direction interact; the average of both is Shapley's.

References:
    VanderWeele, Explanation in Causal Inference, 2015, chapters 2 and 7.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from soap_jax.study import contrasts, statistics
from soap_jax.study.config import StudyConfig
from soap_jax.study.paired import NotTestable, Study

CORE = ("bp", "sign", "sign_norm", "bp_scaled_live")
START = "bp_scaled"
"""The control whose factor is fixed before training: a check of how much that matters."""


class Contrast(NamedTuple):
    """A part of the effect: a weighted sum of log steps.

    Attributes:
        order: which link is changed first; "total" for the whole.
        path: "total", "rate" or "direction".
        term: what VanderWeele calls it.
        weights: of the methods' log steps.
    """

    order: str
    path: str
    term: str
    weights: dict[str, float]


CONTRASTS = (
    Contrast("total", "total", "total effect", {"sign": 1, "bp": -1}),
    Contrast("rate first", "rate", "pure natural indirect effect", {"bp_scaled_live": 1, "bp": -1}),
    Contrast(
        "rate first", "direction", "total natural direct effect", {"sign": 1, "bp_scaled_live": -1}
    ),
    Contrast(
        "direction first", "direction", "pure natural direct effect", {"sign_norm": 1, "bp": -1}
    ),
    Contrast(
        "direction first", "rate", "total natural indirect effect", {"sign": 1, "sign_norm": -1}
    ),
    Contrast(
        "average",
        "rate",
        "mean of pure and total natural indirect effects",
        {"bp_scaled_live": 0.5, "bp": -0.5, "sign": 0.5, "sign_norm": -0.5},
    ),
    Contrast(
        "average",
        "direction",
        "mean of pure and total natural direct effects",
        {"sign_norm": 0.5, "bp": -0.5, "sign": 0.5, "bp_scaled_live": -0.5},
    ),
    Contrast(
        "rate first, fixed at the start",
        "rate",
        "pure natural indirect effect, factor fixed",
        {START: 1, "bp": -1},
    ),
    Contrast(
        "rate first, fixed at the start",
        "direction",
        "total natural direct effect, factor fixed",
        {"sign": 1, START: -1},
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
    """A factor on the steps to the target loss, and its share of the total on the log scale.

    Attributes:
        order: which link is changed first; "total" for the whole.
        path: "total", "rate" or "direction".
        term: what VanderWeele calls it.
        ratio: the factor; below 1 is faster. NaN where censored runs leave no estimate.
        low: lower end of its 95 % interval; 0 where censored runs leave it open.
        high: upper end; infinite where they leave it open.
        share: log of the factor over that of the total; NaN where runs are censored.
        share_low: lower end of its 95 % interval (Fieller's); NaN where that is unbounded.
        share_high: upper end.
    """

    order: str
    path: str
    term: str
    ratio: float
    low: float
    high: float
    share: float
    share_low: float
    share_high: float


class EffectiveRate(NamedTuple):
    """Learning rate that counts in the first hidden layer, mean over seeds at the shared rate."""

    method: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mediation:
    """The effect of raw sign sync on steps, taken apart.

    Attributes:
        testable: False where `note` says why there is nothing else.
        note: what a reader must know beside the numbers, or "".
        learning_rate: the shared rate.
        effects: the total, both orders, their average, and the check with a fixed factor.
        effective_rates: by method.
    """

    testable: bool
    note: str = ""
    learning_rate: float = math.nan
    effects: tuple[Effect, ...] = ()
    effective_rates: tuple[EffectiveRate, ...] = ()

    def effect(self, path: str, order: str = "average") -> Effect:
        """The effect along a path ("total", "rate" or "direction").

        Raises:
            KeyError: if there is none: not testable, or `bp_scaled` is not in the study.
        """
        order = "total" if path == "total" else order
        for effect in self.effects:
            if (effect.path, effect.order) == (path, order):
                return effect
        raise KeyError(f"no effect along {path!r} in the order {order!r}")


def mediate(config: StudyConfig, tables: Mapping[str, pd.DataFrame]) -> Mediation:
    """Takes the effect of raw sign sync apart.

    Args:
        config: the study's configuration.
        tables: its tidy tables "runs" and "evaluations".

    Raises:
        ValueError: if the tables are not those of the configuration.
    """
    study = Study(config, tables)
    try:
        return _mediate(study)
    except NotTestable as reason:
        return Mediation(testable=False, note=str(reason))


def tabulate(mediation: Mediation) -> pd.DataFrame:
    """One row per effect; no rows where it is not testable."""
    columns = [field.name for field in dataclasses.fields(Effect)]
    return pd.DataFrame([dataclasses.asdict(e) for e in mediation.effects], columns=columns)


def fieller(part: ArrayLike, whole: ArrayLike) -> tuple[float, float, float]:
    """Ratio of two paired means with Fieller's 95 % interval, `(ratio, low, high)`.

    The interval holds each ρ for which the mean of part - ρ whole is not significantly other than
    zero. Where the mean of the whole itself is not, that set is unbounded: NaN bounds.

    Example:
        >>> ratio, low, high = fieller([1.0, 1.2, 0.9], [2.0, 2.2, 2.0])
        >>> round(ratio, 3), round(low, 3), round(high, 3)
        (0.5, 0.363, 0.608)

    References:
        Fieller, Some problems in interval estimation, 1954.
    """
    a, b = np.asarray(part, float), np.asarray(whole, float)
    mean_a, mean_b = a.mean(), b.mean()
    if abs(mean_b) <= statistics.TINY:
        return math.nan, math.nan, math.nan
    ratio = float(mean_a / mean_b)
    quantile = stats.t.ppf(1 - statistics.ALPHA / 2, a.size - 1)
    aa, ab, _, bb = (quantile**2 * np.cov(a, b) / a.size).flat
    # (mean_a - ρ mean_b)² ≤ aa - 2 ρ ab + ρ² bb, which is square ρ² - 2 half ρ + rest ≤ 0
    square, half, rest = mean_b**2 - bb, mean_a * mean_b - ab, mean_a**2 - aa
    if square <= 0:
        return ratio, math.nan, math.nan
    root = math.sqrt(max(half**2 - square * rest, 0.0))
    return ratio, float((half - root) / square), float((half + root) / square)


def _mediate(study):
    study.require()
    if study.config.init != "matched":
        raise NotTestable(contrasts.DIFFERENT_STARTS)
    rate = study.shared_rate()
    runs = {method: study.runs(method) for method in CORE}
    if START in study.config.methods:
        runs[START] = study.runs(START)
    many = [m for m in runs if statistics.too_many(runs[m].censored[rate])]
    notes = [contrasts.missing(of_method, rate) for of_method in runs.values()]
    if set(many) - {START}:
        raise NotTestable(
            "more than a tenth of a method's runs are censored: " + "; ".join(filter(None, notes))
        )
    if many:
        runs.pop(START)
        notes.append(f"so nothing is said of {START}")
    effects = tuple(_effect(c, runs, rate) for c in CONTRASTS if c.weights.keys() <= runs.keys())
    if any(of_method.censored[rate].any() for of_method in runs.values()):
        notes.append("effects with censored runs are bounds, without shares")
    elif np.isnan(effects[0].share_low):
        notes.append("the total effect is not clearly other than none: shares have no interval")
    column = "effective_learning_rate/Dense_0"
    return Mediation(
        testable=True,
        note="; ".join(filter(None, notes)),
        learning_rate=study.config.learning_rates[rate],
        effects=effects,
        effective_rates=tuple(
            EffectiveRate(
                method,
                *(
                    float(study.measured(column, method, rate, end=end).mean())
                    for end in (False, True)
                ),
            )
            for method in (*CORE, START)
            if method in study.config.methods
        ),
    )


def _effect(contrast, runs, rate):
    logs = {method: np.log(of_method.steps[rate]) for method, of_method in runs.items()}
    whole = logs["sign"] - logs["bp"]
    part = sum(weight * logs[method] for method, weight in contrast.weights.items())
    censored = {method: runs[method].censored[rate].any() for method in runs}
    above, below = (
        any(censored[m] for m, weight in contrast.weights.items() if sign * weight > 0)
        for sign in (1, -1)
    )
    mean = dataclasses.replace(statistics.student(part), has_low=not below, has_high=not above)
    known = not (above or below or censored["sign"])
    share = fieller(part, whole) if known else (math.nan,) * 3
    result = mean.judge_ratio((0.0, math.inf))
    return Effect(
        order=contrast.order,
        path=contrast.path,
        term=contrast.term,
        ratio=math.nan if above and below else result.estimate,
        low=result.low,
        high=result.high,
        share=share[0],
        share_low=share[1],
        share_high=share[2],
    )
