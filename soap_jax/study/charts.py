"""The figures of a comparison, from its tables and the verdicts on its claims."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from soap_jax.study import claims, drawing, figures, statistics
from soap_jax.study.drawing import Style
from soap_jax.study.figures import Figure
from soap_jax.study.results import Results
from soap_jax.study.statistics import format_number

PALETTE = ("#707070", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#B87A00", "#2F93C9", "#8E6FC4")
"""The colours of methods that define none: those of Okabe and Ito, some of them darker."""
STAR = "M0,-1L.29,-.4L.95,-.31L.48,.15L.59,.81L0,.5L-.59,.81L-.48,.15L-.95,-.31L-.29,-.4Z"
CROSS = "M-1,-.6L-.6,-1L0,-.4L.6,-1L1,-.6L.4,0L1,.6L.6,1L0,.4L-.6,1L-1,.6L-.4,0Z"
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", CROSS, STAR)
DASHES = ([1, 0], [6, 2], [6, 2, 1, 2], [1, 2])
"""The dash patterns of lines; methods with the same shape differ in their dashes."""
VERDICT_STYLES: dict[str, Style] = {
    claims.HOLDS: ("#009E73", "circle", [1, 0]),
    claims.FAILS: ("#D55E00", CROSS, [1, 0]),
    claims.UNDECIDED: ("#8A8A8A", "diamond", [1, 0]),
    claims.NOT_TESTABLE: ("#707070", "cross", [1, 0]),  # some of its tests may still have estimates
}
RANGE_NOTE = "Lines are means over seeds; bands reach from the lowest seed to the highest."
INTERVAL_COLUMNS = ["label", "style", "x", "low", "high", "bound_low", "bound_high", "note"]
"""The columns of estimates with intervals."""


def all_figures(comparison: Results, findings: Sequence[claims.Finding]) -> list[Figure]:
    """All figures of a comparison except the causal diagram.

    Args:
        comparison: the results.
        findings: the verdicts on its claims.
    """
    by_layer = [error_angles(comparison)] if len(comparison.hidden) > 1 else []
    return [
        *(loss_curves(comparison), steps_to_loss(comparison), angles(comparison), *by_layer),
        *(effective_learning_rate(comparison), claim_ratios(findings), final_metric(comparison)),
    ]


def loss_curves(comparison: Results) -> Figure:
    """Training loss against steps at the rate that all methods share, with the seeds' range."""
    rate, why = _rate_for_curves(comparison)
    return _curves(
        comparison,
        _over_training(comparison, "train_loss", dict.fromkeys(comparison.methods, rate)),
        name="loss_curves",
        title=f"Loss at learning rate {rate:g}",
        x="parameter updates",
        y="training loss (moving average)",
        caption=f"Training loss during training at learning rate {rate:g}, {why}. {RANGE_NOTE} The "
        f"dotted line is the target loss, {format_number(comparison.target_loss)}.",
        empty="Every run diverged before its loss was measured.",
        y_log=True,
        line=comparison.target_loss,
    )


def steps_to_loss(comparison: Results) -> Figure:
    """Steps to the target loss against the learning rate: geometric mean and t interval."""
    target, points = format_number(comparison.target_loss), []
    for method, name in display_names(comparison).items():
        grid = comparison.grid(method)
        for rate, *of in zip(comparison.rates, *grid[:3], strict=True):
            values, late, diverged = of
            mean = list(statistics.student(values).judge_ratio()[:3])
            note = f"{(~late).sum()} of {late.size} runs reach loss {target}"
            note += f", {diverged.sum()} diverged" * bool(diverged.any())
            mean = [math.nan] * 3 if late.any() else mean
            points.append((name, rate, *mean, note))
    budget = float(comparison.runs["steps"].max())
    return _curves(
        comparison,
        points,
        name="steps_to_loss",
        title=f"Steps to loss {target} at every learning rate",
        x="learning rate",
        y="parameter updates (fewer is better)",
        caption=f"Parameter updates until the training loss first reaches {target}. Lines are "
        "geometric means over seeds; bands are their 95 % t intervals on the log scale. A hollow "
        "marker above the dotted line means that at this rate some run of the method diverged or "
        f"did not reach the loss within {budget:,.0f} updates.",
        empty=f"No method reaches loss {target} with every seed at any learning rate.",
        x_log=True,
        y_log=True,
        ticks=comparison.rates,
        budget=budget,
    )


def angles(comparison: Results) -> Figure:
    """Angle between the first kernel's gradient and the true one, at each method's best rate."""
    first = comparison.hidden[0] if comparison.hidden else ""
    return _curves(
        comparison,
        _over_training(comparison, f"gradient_angle/{first}", _inexact(comparison)),
        name="angles",
        title="Angle to the true gradient, first kernel",
        x="parameter updates",
        y="angle to the true gradient (degrees)",
        caption=f"Angle between a method's gradient of {first} and the true gradient, during "
        "training at the method's best learning rate. At 90 degrees (dotted) the two are "
        "orthogonal. Methods that follow the true gradient, such as backprop, have no curve. "
        + RANGE_NOTE,
        empty="No angles: each method follows the true gradient or diverged at every rate.",
        degrees=True,
        line=90.0,
    )


def error_angles(comparison: Results) -> Figure:
    """Angle between the error at each hidden layer and the true error, after training."""
    points = []
    for method, rate in _inexact(comparison).items():
        for i, kernel in enumerate(comparison.hidden):
            values = comparison.measured(f"error_angle/{kernel}", method, rate, end=True)
            if len(values) and np.isfinite(values).all():
                points.append((display_names(comparison)[method], i + 1, *_range(values), kernel))
    return _curves(
        comparison,
        points,
        name="error_angles",
        title="Error at the end of training, by layer",
        x="hidden layer (1 is nearest to the input)",
        y="angle to the true error (degrees)",
        caption="Angle between the error that feedback sends to a hidden layer and the true error "
        "there, at the end of training, at each method's best learning rate. " + RANGE_NOTE,
        empty="No method here has errors that can be compared with the true ones.",
        degrees=True,
        ticks=range(1, len(comparison.hidden) + 1),
        line=90.0,
    )


def effective_learning_rate(comparison: Results) -> Figure:
    """Effective learning rate of the first kernel along the true gradient, at the shared rate."""
    rate, why = _rate_for_curves(comparison)
    first = comparison.hidden[0] if comparison.hidden else ""
    rates = dict.fromkeys(comparison.methods, rate)
    return _curves(
        comparison,
        _over_training(comparison, f"effective_learning_rate/{first}", rates),
        name="effective_learning_rate",
        title=f"Effective learning rate of the first kernel at rate {rate:g}",
        x="parameter updates",
        y="effective learning rate",
        caption=f"Effective learning rate of {first} along the true gradient, at learning rate "
        f"{rate:g} (dotted), {why}. It is the learning rate times the projection of the method's "
        "gradient onto the true gradient, relative to the norm of the true gradient. "
        f"{RANGE_NOTE} The logarithmic axis cannot show values of zero and below, which occur for "
        "frozen kernels and for gradients that are orthogonal to the true one.",
        empty="No effective learning rate was measured at this rate.",
        y_log=True,
        line=rate,
        decades=3,
    )


def claim_ratios(findings: Sequence[claims.Finding]) -> Figure:
    """The ratios in claims, with their intervals and the bounds that were fixed before."""
    rows = [
        (
            f"{finding.key}. {part.label}",
            f"claim {finding.verdict}",
            *(part.estimate, part.low, part.high, *part.within, part.note),
        )
        for finding in findings
        for part in finding.parts
        if part.measure == "ratio" and part.testable and math.isfinite(part.estimate)
    ]
    return drawing.intervals(
        pd.DataFrame(rows, columns=INTERVAL_COLUMNS),
        {f"claim {verdict}": style for verdict, style in VERDICT_STYLES.items()},
        name="claims",
        title="The claims' ratios against their bounds",
        x="ratio (1: no difference)",
        caption="The ratios in the claims, with 95 % intervals from paired seeds on the log "
        "scale. Grey bars are the bounds of the claims, fixed before any run. Colour and marker "
        "show the verdict on the whole claim, which can depend on several ratios and is corrected "
        "for the number of claims. A point without an interval, or with an interval up to the "
        "edge, has an open interval, mostly because some run never reached the loss.",
        empty="No claim could be tested by a ratio in this study.",
        log=True,
        line=1.0,
    )


def final_metric(comparison: Results) -> Figure:
    """The first metric at each method's best rate: every seed, mean and t interval."""
    column = comparison.metrics[0]
    words, unit = column.replace("_", " "), 100 if "accuracy" in column else 1
    rows, dots = [], {}
    for method, name in display_names(comparison).items():
        rate = comparison.best_rate(method)
        values = unit * comparison.rows("runs", method, rate)[column].to_numpy(float)
        if len(values) and np.isfinite(values).all():
            mean, note = statistics.student(values), f"learning rate {rate:g}, {len(values)} seeds"
            rows.append((name, name, mean.estimate, *mean.interval, math.nan, math.nan, note))
            dots[name] = values.tolist()
    return drawing.intervals(
        pd.DataFrame(rows, columns=INTERVAL_COLUMNS),
        method_styles(comparison),
        name="final_metric",
        title=f"{words.capitalize()} at each method's best learning rate",
        x=words + " (%)" * (unit == 100),
        caption=f"{words.capitalize()} at the end of training, each method at its best learning "
        f"rate by {comparison.record['protocol']['select'].replace('_', ' ')}. Small dots are "
        "single seeds; large markers are their means with 95 % t intervals.",
        empty="Every method has diverged runs at every learning rate.",
        dots=dots,
    )


def training_curves(curves: pd.DataFrame, title: str) -> str:
    """The curves of one training as SVG; lines are interrupted where numbers are not finite."""
    angles = [
        name for name in map(str, curves) if name.startswith(("gradient_angle/", "weight_angle/"))
    ]

    def panel(y, columns, **options):
        rows = curves.replace([np.inf, -np.inf], np.nan).melt("epoch", columns, "method", "y")
        rows["method"] = rows["method"].str.replace("_", " ").str.removesuffix("/kernel")
        rows = rows.rename(columns={"epoch": "x"}).assign(low=rows["y"], high=rows["y"], note="")
        words = {"name": y.split()[0], "title": title, "caption": "", "empty": ""}
        styles = assign_styles(dict.fromkeys(rows["method"]))
        return drawing.curves(rows, styles, x="epoch", y=y, **words, **options)

    panels = [
        panel("loss", ["train_loss", "validation_loss"], y_log=True),
        panel("accuracy", ["validation_accuracy"]),
        panel("angle to the true one (degrees)", angles, degrees=True),
    ]
    return figures.side_by_side(panels, resolve="independent")


def display_names(comparison: Results) -> dict[str, str]:
    """The display name of each method: its label, with its key if several labels are equal."""
    labels = {method: record["label"] for method, record in comparison.methods.items()}
    several = [label for label in labels.values() if list(labels.values()).count(label) > 1]
    return {m: f"{label} ({m})" if label in several else label for m, label in labels.items()}


def method_styles(comparison: Results) -> dict[str, Style]:
    """The styles of methods, by their display names."""
    given = [record["color"] for record in comparison.methods.values()]
    return assign_styles(dict(zip(display_names(comparison).values(), given, strict=True)))


def assign_styles(colors: Mapping[str, str | None]) -> dict[str, Style]:
    """A style for each name, with the given colours or unused ones of the palette."""
    given = colors.values()
    spare = itertools.cycle([color for color in PALETTE if color not in given] or PALETTE)
    dashes = (of for of in itertools.cycle(DASHES) for _ in SHAPES)
    forms = zip(colors.items(), itertools.cycle(SHAPES), dashes, strict=False)
    return {name: (color or next(spare), shape, dash) for (name, color), shape, dash in forms}


def _curves(comparison: Results, points: list[tuple], **options: Any) -> Figure:
    rows = pd.DataFrame(points, columns=["method", "x", "y", "low", "high", "note"])
    return drawing.curves(rows, method_styles(comparison), **options)


def _over_training(comparison: Results, column: str, rates: Mapping[str, float]) -> list[tuple]:
    """Mean and range over seeds of a column of evaluations, up to the first missing value."""
    points = []
    for method, rate in rates.items():
        rows = comparison.rows("evaluations", method, rate)
        if column in rows:
            by_step = rows.pivot(index="step", columns="seed", values=column).dropna()
            name = display_names(comparison)[method]
            note = f"{by_step.shape[1]} seeds at rate {rate:g}"
            points += [(name, step, *_range(of), note) for step, *of in by_step.itertuples()]
    return points


def _range(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    return float(np.mean(values)), min(values), max(values)


def _inexact(comparison: Results) -> dict[str, float]:
    """The best rate of each method that does not follow the true gradient."""
    return {
        method: comparison.best_rate(method)
        for method, record in comparison.methods.items()
        if not record["exact"]
    }


def _rate_for_curves(comparison: Results) -> tuple[float, str]:
    """The shared rate, or else the best rate of the reference, and a text that explains it."""
    leader = comparison.reference or next(iter(comparison.methods))
    who = comparison.label(leader) if comparison.reference else "every method"
    if math.isfinite(comparison.shared_rate):
        return comparison.shared_rate, (
            f"the smallest at which every run of {who} reaches loss "
            f"{format_number(comparison.target_loss)} within half the steps"
        )
    best = comparison.best_rate(leader)
    if math.isfinite(best):
        return best, f"the best of {comparison.label(leader)}"
    return comparison.rates[0], "the smallest of the grid"
