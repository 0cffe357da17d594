"""Mediation analysis: the part of raw sign sync's effect on speed due to the learning rate.

    rule ──> effective learning rate of the hidden layers ──> steps to the target loss
      └────> direction of the error that reaches them ─────────────────┘

Raw signs change both mediators: the effective learning rate of the hidden layers and the direction
of the error. Two controls change only one of them. `bp_scaled_live` has the size of `sign`'s error
and the direction of backprop; `sign_norm` has the direction of `sign` and nearly the size of
backprop's error. A loss of speed at the same size of the error, due to its wrong direction, counts
as an effect of direction. Steps are compared at the shared rate, seed by seed, and the logarithms
of ratios add up:

    rate first         log(sign / bp) = log(bp_scaled_live / bp) + log(sign / bp_scaled_live)
    direction first    log(sign / bp) = log(sign_norm / bp) + log(sign / sign_norm)

The two orders differ by the interaction of rate and direction; their average is the Shapley value.
`bp_scaled`, whose factor is fixed before training, checks how much an updated factor matters.

References:
    VanderWeele, Explanation in Causal Inference, 2015, chapters 2 and 7.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from soap_jax.study import statistics
from soap_jax.study.results import NotTestable, Results, joined

_CONTRASTS: tuple[
    tuple[Any, ...], ...
] = (  # order, path, VanderWeele's term; weights of the log steps of sign, bp and the two controls
    ("total", "total", "total effect", (1, -1, 0, 0)),
    ("rate first", "rate", "pure natural indirect effect", (0, -1, 1, 0)),
    ("rate first", "direction", "total natural direct effect", (1, 0, -1, 0)),
    ("direction first", "direction", "pure natural direct effect", (0, -1, 0, 1)),
    ("direction first", "rate", "total natural indirect effect", (1, 0, 0, -1)),
    ("average", "rate", "mean natural indirect effect", (0.5, -0.5, 0.5, -0.5)),
    ("average", "direction", "mean natural direct effect", (0.5, -0.5, -0.5, 0.5)),
)
_FIXED = "rate first, fixed at the start"


@dataclasses.dataclass(frozen=True)
class Effect:
    """An effect: a factor on the steps to the target loss, and its share of the total effect.

    Attributes:
        order: the mediator that is changed first, or "average"; "total" for the total effect.
        path: "total", "rate" or "direction".
        term: the name of the effect in VanderWeele's book.
        ratio: the factor; below 1 is faster. NaN if censored runs leave no estimate.
        low: lower end of its 95 % interval; 0 if censored runs leave it open.
        high: upper end; infinite if censored runs leave it open.
        share: log factor of this effect over log factor of the total; NaN if runs are censored.
        share_low: lower end of its 95 % interval (Fieller's); NaN if that is unbounded.
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


@dataclasses.dataclass(frozen=True)
class Mediation:
    """The effect of a method on steps, decomposed into the effects along two paths.

    Attributes:
        testable: False if there are no effects; `note` then gives the reason.
        note: remarks on the numbers, or "".
        learning_rate: the shared rate.
        effects: the total, both orders, their average, and the check with a fixed factor.
        effective_rates: for each method, the effective learning rates of the first kernel before
            and after training; means over seeds at the shared rate.
    """

    testable: bool
    note: str = ""
    learning_rate: float = math.nan
    effects: tuple[Effect, ...] = ()
    effective_rates: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)

    def effect(self, path: str, order: str = "average") -> Effect:
        """The effect along a path ("total", "rate" or "direction").

        Raises:
            KeyError: if there is none, since it is not testable or `fixed` is not in the study.
        """
        order = "total" if path == "total" else order
        for effect in self.effects:
            if (effect.path, effect.order) == (path, order):
                return effect
        raise KeyError(f"no effect along {path!r} in the order {order!r}")


def mediate(
    comparison: Results,
    *,
    method: str = "sign",
    reference: str = "bp",
    rate: str = "bp_scaled_live",
    direction: str = "sign_norm",
    fixed: str = "bp_scaled",
) -> Mediation:
    """Decomposes the effect of a method on steps.

    Args:
        comparison: a comparison with the methods below.
        method: the method that changes rate and direction.
        reference: the method that changes neither.
        rate: the control that changes only the rate.
        direction: the control that changes only the direction.
        fixed: the control whose factor is fixed at the start; it may be absent.
    """
    try:
        return _mediate(comparison, [method, reference, rate, direction], fixed)
    except NotTestable as reason:
        return Mediation(testable=False, note=str(reason))


def tabulate(mediation: Mediation) -> pd.DataFrame:
    """One row per effect; no rows if it is not testable."""
    columns = [field.name for field in dataclasses.fields(Effect)]
    return pd.DataFrame(map(vars, mediation.effects), columns=columns)


def _mediate(comparison, core, fixed):
    if (optimizer := comparison.protocol["optimizer"]) != "sgd":
        raise NotTestable(f"the optimizer is {optimizer}, and the decomposition is for SGD")
    if len(comparison.seeds) < 2:
        raise NotTestable("there is one seed; at least 2 are needed for an interval")
    methods = core + [fixed] * (fixed in comparison.methods)
    rate, logs, flags, notes = comparison.log_steps_at(methods)
    many = [method for method, of in zip(methods, flags, strict=True) if statistics.too_many(of)]
    if set(many) - {fixed}:
        raise NotTestable(f"more than a tenth of a method's runs are censored: {joined(*notes)}")
    effects = [_effect(contrast, logs[:4], flags[:4]) for contrast in _CONTRASTS]
    if many:
        flags = flags[:4]
        notes.append(f"so {fixed} has no effects here")
    elif fixed in methods:
        check = [0, 1, 4, 3]
        fixed_first = [(_FIXED, *c[1:]) for c in _CONTRASTS if c[0] == "rate first"]
        effects += [_effect(contrast, logs[check], flags[check]) for contrast in fixed_first]
    if flags.any():
        notes.append("effects with censored runs are bounds, without shares")
    elif math.isnan(effects[0].share_low):
        notes.append("the total effect is not significant: shares have no interval")
    column = f"effective_learning_rate/{comparison.hidden[0]}"
    effective = {
        method: [comparison.measured(column, method, rate, end=e).mean() for e in (False, True)]
        for method in methods
    }
    return Mediation(True, joined(*notes), rate, tuple(effects), effective)


def _effect(contrast, logs, flags):
    """One effect; censored runs, whose steps may be larger, leave one or both sides open."""
    order, path, term, weights = contrast
    lost = flags.any(axis=1)
    above, below = (bool(np.any(lost & (np.multiply(s, weights) > 0))) for s in (1, -1))
    part = weights @ logs
    mean = dataclasses.replace(statistics.student(part), has_low=not below, has_high=not above)
    ratio, *ends = mean.judge_ratio()[:3]
    share = statistics.fieller(part, logs[0] - logs[1])
    shares = [share.estimate, *share.interval]
    if above or below or lost[:2].any():
        shares = [math.nan] * 3
    ratio = math.nan if above and below else ratio
    return Effect(order, path, term, ratio, *ends, *shares)
