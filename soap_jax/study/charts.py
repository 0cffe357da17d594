"""The figures of a comparison, each defined once in Altair: for the page and for papers.

A figure is either curves, one for each method, or estimates with intervals, one below the other.
Words and axes have the colour of the text around them, so that a page may be light or dark.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import vl_convert

from soap_jax.study import claims, files, statistics
from soap_jax.study.comparison import Comparison
from soap_jax.study.statistics import Estimate, number

PALETTE = ("#707070", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#B87A00", "#2F93C9", "#8E6FC4")
"""Colours by place, for methods that have none: Okabe and Ito's, some of them darkened."""
STAR = "M0,-1L.29,-.4L.95,-.31L.48,.15L.59,.81L0,.5L-.59,.81L-.48,.15L-.95,-.31L-.29,-.4Z"
CROSS = "M-1,-.6L-.6,-1L0,-.4L.6,-1L1,-.6L.4,0L1,.6L.6,1L0,.4L-.6,1L-1,.6L-.4,0Z"
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", CROSS, STAR)
DASHES = ([1, 0], [6, 2], [6, 2, 1, 2], [1, 2])
"""Shapes and dashes by place: methods of one shape differ in their dashes."""
VERDICTS = {
    claims.HOLDS: ("#009E73", "circle"),
    claims.FAILS: ("#D55E00", CROSS),
    claims.UNDECIDED: ("#8A8A8A", "diamond"),
    claims.NOT_TESTABLE: ("#707070", "cross"),  # though one of its tests was possible
}
PANELS = ("loss_curves", "steps_to_loss", "angles")
"""What is side by side in the overview."""
WRAP = 48
"""Characters in a line that a phone has room for."""
GREY = "#8a8a8a"  # seen on white and on black
INK = {"labelColor": "currentColor", "titleColor": "currentColor", "titleFontWeight": "normal"}
AXIS = {"domainColor": GREY, "tickColor": GREY, "gridColor": GREY, "gridOpacity": 0.25}
CONFIG: dict[str, Any] = {
    "font": "sans-serif",
    "background": None,
    "view": {"stroke": None},
    "axis": INK | AXIS,
    "legend": INK | {"orient": "bottom", "columns": 2, "labelLimit": 300, "symbolSize": 60},
    "title": {"color": "currentColor", "anchor": "start"},
    "text": {"color": "currentColor"},
    "rule": {"color": GREY},
}

Cells = tuple[list[str], list[list[str]]]
"""The head of a table, and its rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure.

    Attributes:
        name: of its files.
        title: a few words.
        caption: what is seen, and how bands and intervals are made.
        alt: the figure in words, for those who cannot see it.
        chart: the figure, or None where there is nothing to see.
        table: its numbers.
        empty: what to say where there is nothing to see.
    """

    name: str
    title: str
    caption: str
    alt: str
    chart: alt.LayerChart | None
    table: Cells
    empty: str


class Point(NamedTuple):
    """A point of a curve with its band; NaN where there is no mean, and `note` says why."""

    x: float
    y: Estimate
    note: str


class Row(NamedTuple):
    """An estimate, the key of its style, what it is made of, and the bound to hold it against."""

    label: str
    style: str
    x: Estimate
    note: str
    dots: Sequence[float] = ()
    within: tuple[float, float] = (math.nan, math.nan)


def describe(comparison: Comparison, findings: Sequence[claims.Finding]) -> list[Figure]:
    """Every figure of a comparison but the causal diagram.

    Args:
        comparison: what was trained.
        findings: the verdicts on its claims.
    """
    figures = [loss_curves(comparison), steps_to_loss(comparison), angles(comparison)]
    if len(comparison.hidden) > 1:
        figures.append(error_angles(comparison))
    return [
        *figures,
        effective_learning_rate(comparison),
        claim_ratios(findings),
        final_metric(comparison),
    ]


def save(figures: Sequence[Figure], directory: pathlib.Path) -> None:
    """Writes each figure as SVG, PNG and PDF, and the first ones side by side as an overview."""
    specs = {figure.name: spec(figure) for figure in figures}
    panels = [specs[name] for name in PANELS if specs.get(name)]
    legend = {"legend": CONFIG["legend"] | {"columns": 4}}
    specs["overview"] = panels and {"hconcat": panels, "config": CONFIG | legend}
    for name, drawn in specs.items():
        svg = vl_convert.vegalite_to_svg(drawn | {"background": "white"}) if drawn else None
        save_svg(svg, directory / name)


def save_svg(svg: str | None, stem: pathlib.Path) -> None:
    """Writes a drawing as SVG, PNG and PDF; none of them is left where there is no drawing."""
    convert = {
        ".svg": str.encode,
        ".png": lambda svg: vl_convert.svg_to_png(svg, scale=2),
        ".pdf": vl_convert.svg_to_pdf,
    }
    for suffix, converted in convert.items():
        path = stem.with_suffix(suffix)
        if svg is None:
            path.unlink(missing_ok=True)
        else:
            content = converted(svg)
            files.write_atomically(path, lambda file, content=content: file.write(content))


def spec(figure: Figure) -> dict[str, Any]:
    """A figure in Vega-Lite, with its title; empty where there is nothing to see."""
    if figure.chart is None:
        return {}
    return figure.chart.properties(title=figure.title, description=figure.alt).to_dict()


def loss_curves(comparison: Comparison) -> Figure:
    """Training loss against steps at the rate that all methods share, with the seeds' range."""
    rate, why = _rate_for_curves(comparison)
    return _curves(
        comparison,
        _over_training(comparison, "train_loss", dict.fromkeys(comparison.methods, rate)),
        name="loss_curves",
        title=f"Loss at learning rate {rate:g}",
        x="parameter updates",
        y="training loss (moving average)",
        caption=f"Training loss while training at learning rate {rate:g}, {why}. Lines are means "
        "over seeds, bands reach from the lowest seed to the highest. The dotted line is the "
        f"target, loss {comparison.target_loss:.3g}.",
        empty="Every run broke off before its loss was measured.",
        y_log=True,
        line=comparison.target_loss,
    )


def steps_to_loss(comparison: Comparison) -> Figure:
    """Steps to the target loss against the learning rate: geometric mean and t interval."""
    target, lines = f"{comparison.target_loss:.3g}", {}
    for method in comparison.methods:
        grid, points = comparison.grid(method), []
        for i, rate in enumerate(comparison.rates):
            runs, late, diverged = (
                grid.censored.shape[1],
                *(int(flags[i].sum()) for flags in (grid.censored, grid.diverged)),
            )
            note = f"{runs - late} of {runs} runs reach loss {target}"
            note += f", {diverged} diverged" * (diverged > 0)
            steps = Estimate(math.nan, math.nan, math.nan)
            if not late:
                steps = Estimate(*statistics.student(grid.values[i]).judge_ratio()[:3])
            points.append(Point(rate, steps, note))
        lines[method] = points
    budget = float(comparison.runs["steps"].max())
    return _curves(
        comparison,
        lines,
        name="steps_to_loss",
        title=f"Steps to loss {target} at every learning rate",
        x="learning rate",
        y="parameter updates (fewer is better)",
        caption=f"Parameter updates until the training loss first falls to {target}: geometric "
        "means over seeds, and bands of their 95 % t intervals on the log scale. Hollow markers "
        "above the dotted line: at this rate some run of the method had not got there at the end, "
        f"after {budget:,.0f} updates, or diverged.",
        empty=f"No method reaches loss {target} with every seed at any learning rate.",
        x_log=True,
        y_log=True,
        ticks=comparison.rates,
        budget=budget,
    )


def angles(comparison: Comparison) -> Figure:
    """Angle of the first kernel's gradient to the true one, at each method's best rate."""
    first = comparison.hidden[0] if comparison.hidden else ""
    return _curves(
        comparison,
        _over_training(comparison, f"gradient_angle/{first}", _inexact(comparison)),
        name="angles",
        title="First kernel, each method at its best rate",
        x="parameter updates",
        y="angle to the true gradient (degrees)",
        caption=f"Angle between a method's gradient of {first} and the true gradient, while "
        "training at the method's best learning rate. At 90 degrees (dotted) the two have nothing "
        "in common; methods that follow the true gradient, backprop among them, have no curve. "
        "Lines are means over seeds, bands reach from the lowest seed to the highest.",
        empty="No method here has a gradient other than the true one.",
        degrees=True,
        line=90.0,
    )


def error_angles(comparison: Comparison) -> Figure:
    """Angle of the error that arrives at each hidden layer to the true one, after training."""
    lines: dict[str, list[Point]] = {}
    for method, rate in _inexact(comparison).items():
        for i, kernel in enumerate(comparison.hidden):
            values = comparison.measured(f"error_angle/{kernel}", method, rate, end=True)
            if len(values) and np.isfinite(values).all():
                lines.setdefault(method, []).append(Point(i + 1, _range(values), kernel))
    return _curves(
        comparison,
        lines,
        name="error_angles",
        title="Error at the end of training, by layer",
        x="hidden layer (1 is nearest to the input)",
        y="angle to the true error (degrees)",
        caption="Angle between the error that arrives at a hidden layer through feedback and the "
        "true error there, at the end of training at each method's best learning rate. Means over "
        "seeds, bands reach from the lowest seed to the highest.",
        empty="No method here has feedback weights whose errors could be compared.",
        degrees=True,
        ticks=range(1, len(comparison.hidden) + 1),
        line=90.0,
    )


def effective_learning_rate(comparison: Comparison) -> Figure:
    """Rate at which the first kernel learns along the true gradient, at the shared rate."""
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
        caption=f"How fast {first} learns along the true gradient at learning rate {rate:g} "
        f"(dotted), {why}: the rate times the length of the method's gradient along the true one, "
        "relative to that. Lines are means over seeds, bands reach from the lowest seed to the "
        "highest. Values of zero and below (frozen kernels, feedback at a right angle) have no "
        "place on a logarithmic axis.",
        empty="No effective learning rate was measured at this rate.",
        y_log=True,
        line=rate,
        decades=3,
    )


def claim_ratios(findings: Sequence[claims.Finding]) -> Figure:
    """The ratios behind the claims, with intervals and the bounds written beforehand."""
    rows = [
        Row(
            f"{finding.key}. {part.label}",
            f"claim {finding.verdict}",
            Estimate(part.estimate, part.low, part.high),
            part.note,
            within=part.within,
        )
        for finding in findings
        for part in finding.parts
        if part.measure == "ratio" and part.testable and math.isfinite(part.estimate)
    ]
    return _intervals(
        rows,
        {f"claim {verdict}": style for verdict, style in VERDICTS.items()},
        name="claims",
        title="The claims' ratios against their bounds",
        x="ratio (1: no difference)",
        caption="Ratios that the claims are judged by: estimates with 95 % intervals, paired by "
        "seed on the log scale. Grey bars are bounds, written down before any run. Colour and "
        "marker tell the verdict of the whole claim, which may rest on several ratios and is "
        "corrected for their number. A point without interval, or with one that reaches the edge, "
        "is a bound, since some run never got there.",
        empty="No claim could be tested by a ratio in this study.",
        log=True,
        line=1.0,
    )


def final_metric(comparison: Comparison) -> Figure:
    """The metric that counts, at each method's best rate: every seed, mean and t interval."""
    column = comparison.metrics[0]
    words, unit = column.replace("_", " "), 100 if "accuracy" in column else 1
    rows = []
    for method in comparison.methods:
        rate = comparison.best_rate(method)
        values = unit * comparison.rows("runs", method, rate)[column].to_numpy(float)
        if len(values) and np.isfinite(values).all():
            mean = statistics.student(values)
            found = Estimate(mean.estimate, *mean.interval)
            note = f"learning rate {rate:g}, {len(values)} seeds"
            rows.append(Row(names(comparison)[method], method, found, note, values.tolist()))
    return _intervals(
        rows,
        {method: style[:2] for method, style in styles(comparison).items()},
        name="final_metric",
        title=f"{words.capitalize()} at each method's best learning rate",
        x=words + " (%)" * (unit == 100),
        caption=f"{words.capitalize()} at the end of training, each method at its best learning "
        f"rate by {comparison.record['protocol']['select'].replace('_', ' ')}. Small dots are "
        "seeds, large markers their means with 95 % t intervals.",
        empty="No method has a learning rate at which no run diverged.",
    )


def names(comparison: Comparison) -> dict[str, str]:
    """What each method is called: its label, and its key too where labels are alike."""
    labels = {method: record["label"] for method, record in comparison.methods.items()}
    several = [label for label in labels.values() if list(labels.values()).count(label) > 1]
    return {m: f"{label} ({m})" if label in several else label for m, label in labels.items()}


def styles(comparison: Comparison) -> dict[str, tuple[str, str, list[int]]]:
    """Colour, shape and dashes of each method."""
    return {
        method: (
            record["color"] or PALETTE[i % len(PALETTE)],
            SHAPES[i % len(SHAPES)],
            DASHES[i // len(SHAPES) % len(DASHES)],
        )
        for i, (method, record) in enumerate(comparison.methods.items())
    }


def _curves(
    comparison: Comparison,
    lines: Mapping[str, Sequence[Point]],
    *,
    x: str,
    y: str,
    empty: str,
    x_log: bool = False,
    y_log: bool = False,
    degrees: bool = False,
    ticks: Sequence[float] = (),
    line: float = math.nan,
    budget: float = math.inf,
    decades: float = math.inf,
    **words: str,
) -> Figure:
    """A line with its band for each method, and a marker above `budget` for a mean that is NaN."""
    called = names(comparison)
    lines = {method: points for method, points in lines.items() if points}
    points = [(method, point) for method in lines for point in lines[method]]
    seen = {m: [p for p in lines[m] if not math.isnan(p.y.value)] for m in lines}
    said = [
        f"{called[m]} from {number(ps[0].y.value)} at {number(ps[0].x)} to "
        f"{number(ps[-1].y.value)} at {number(ps[-1].x)}"
        for m, ps in seen.items()
        if ps
    ]
    cells = {point.x: dict.fromkeys(lines, "–") for _, point in points}
    for method, point in points:
        cells[point.x][method] = point.note if math.isnan(point.y.value) else str(point.y)
    figure = Figure(
        **words,
        alt=f"{words['title']}. Line chart of {y} against {x}: {'; '.join(said)}.",
        chart=None,
        table=(
            [x, *(called[method] for method in lines)],
            [[number(at), *row.values()] for at, row in sorted(cells.items())],
        ),
        empty=empty,
    )
    if not said:
        return figure
    lost = [m for m in lines if len(seen[m]) < len(lines[m])] if math.isfinite(budget) else []
    heights = {method: budget * 1.13 ** (i + 1) for i, method in enumerate(lost)}
    ends = [end for _, p in points for end in (p.y.value, p.y.low, p.y.high)]
    bottom, top = (0.0, 100.0) if degrees else _domain([*ends, line], y_log)
    bottom = max(bottom, np.nanmax(ends) / 10**decades)
    y_ticks = list(range(0, 91, 15)) if degrees else _one_two_five(bottom, top) if y_log else []
    if lost:
        y_ticks = [tick for tick in y_ticks if tick <= budget]
        top = 1.7 * max(heights.values())
    rows = [
        {
            "method": called[method],
            "x": point.x,
            "y": _finite(point.y.value if point.y.value >= bottom else math.nan),
            "low": _finite(max(point.y.low, bottom)),
            "high": _finite(max(point.y.high, bottom)),
            "lost": heights.get(method) if math.isnan(point.y.value) else None,
            "value": "not reached" if math.isnan(point.y.value) else str(point.y),
            "note": point.note,
        }
        for method, point in points
    ]
    marks = [styles(comparison)[method] for method in lines]
    color, shape, dash = (
        channel(
            "method:N",
            title=None,
            scale=alt.Scale(domain=[called[m] for m in lines], range=[mark[i] for mark in marks]),
        )
        for i, channel in enumerate((alt.Color, alt.Shape, alt.StrokeDash))
    )
    x_domain = _domain([point.x for _, point in points], x_log)
    x_axis = alt.X("x:Q", title=x, scale=_scale(x_log, x_domain), axis=_axis(ticks))
    scaled = {"title": y, "scale": _scale(y_log, (bottom, top)), "axis": _axis(y_ticks)}
    tooltip = [
        alt.Tooltip("method:N"),
        alt.Tooltip("x:Q", title=x),
        alt.Tooltip("value:N", title=y),
        alt.Tooltip("note:N", title="of"),
    ]
    picked = alt.selection_point(  # a name of its own, since figures may stand side by side
        name=f"picked_{figure.name}", fields=["method"], bind="legend", toggle="true"
    )
    base = alt.Chart(alt.Data(values=rows)).transform_filter(picked).encode(x=x_axis, color=color)
    layers: list[Any] = [
        base.mark_area(opacity=0.14, clip=True).encode(y=alt.Y("low:Q", **scaled), y2="high:Q"),
        base.mark_line(clip=True).encode(y=alt.Y("y:Q", **scaled), strokeDash=dash),
        base.mark_point(filled=True, clip=True)
        .encode(y=alt.Y("y:Q", **scaled), shape=shape, tooltip=tooltip)
        .add_params(picked),
        *(_rule(y=value) for value in (line, budget) if bottom <= value <= top),
    ]
    if lost:
        open_marks = base.mark_point(size=45).encode(y=alt.Y("lost:Q", **scaled))
        above = {"y": alt.datum(1.3 * max(heights.values()))}
        layers.append(open_marks.encode(shape=shape, tooltip=tooltip))
        layers.append(_text(["not reached:"]).encode(**above))
    return dataclasses.replace(figure, chart=alt.layer(*layers).properties(width=330, height=300))


def _intervals(
    rows: Sequence[Row],
    marks: Mapping[str, tuple[str, str]],
    *,
    x: str,
    empty: str,
    log: bool = False,
    line: float = math.nan,
    **words: str,
) -> Figure:
    """A row for each estimate: its label, and below it the interval on the bar of its bound."""
    figure = Figure(
        **words,
        alt=f"{words['title']}. Horizontal axis: {x}. "
        + "; ".join(f"{row.label}: {row.x}" for row in rows)
        + ".",
        chart=None,
        table=(["", f"{x} [95 % interval]", "note"], [[r.label, str(r.x), r.note] for r in rows]),
        empty=empty,
    )
    if not rows:
        return figure
    within = [end for row in rows for end in row.within]
    ends = [end for row in rows for end in (row.x.value, row.x.low, row.x.high, *row.dots)]
    left, right = _domain([*ends, *within, line], log)
    place, drawn, labels, dots = 0, [], [], []
    for row in rows:
        for words_of_line in textwrap.wrap(row.label, WRAP):
            labels.append({"y": place, "text": words_of_line})
            place += 15
        place += 10
        drawn.append(
            {
                "y": place,
                "style": row.style,
                "x": row.x.value,
                "low": _finite(max(row.x.low, left)),
                "high": _finite(min(row.x.high, right)),
                "within_low": _finite(max(row.within[0], left)),
                "within_high": _finite(min(row.within[1], right)),
                "label": row.label,
                "value": str(row.x),
                "note": row.note,
            }
        )
        dots += [{"y": place, "style": row.style, "x": dot} for dot in row.dots]
        place += 20
    used = [key for key in marks if any(row.style == key for row in rows)]
    has_legend = any(row.style != row.label for row in rows) and not dots
    color, shape = (
        channel(
            "style:N",
            title=None,
            legend=alt.Undefined if has_legend else None,
            scale=alt.Scale(domain=used, range=[marks[key][i] for key in used]),
        )
        for i, channel in enumerate((alt.Color, alt.Shape))
    )
    x_ticks = _one_two_five(left, right) if log else []
    scaled = {"title": x, "scale": _scale(log, (left, right)), "axis": _axis(x_ticks)}
    y = alt.Y("y:Q", scale=alt.Scale(domain=[place, 0], nice=False), axis=None)
    tooltip = [
        alt.Tooltip("label:N", title="of"),
        alt.Tooltip("value:N", title=x),
        alt.Tooltip("note:N", title="note"),
    ]
    base = alt.Chart(alt.Data(values=drawn)).encode(y=y)
    bars = base.mark_rule(strokeWidth=14, opacity=0.3)
    layers = [
        bars.encode(x=alt.X("within_low:Q", **scaled), x2="within_high:Q"),
        *([_rule(x=line)] if line == line else []),
        base.mark_rule(strokeWidth=2.5).encode(
            x=alt.X("low:Q", **scaled), x2="high:Q", color=color
        ),
        alt.Chart(alt.Data(values=dots))
        .mark_circle(size=20, opacity=0.45)
        .encode(x=alt.X("x:Q", **scaled), y=y, color=color),
        base.mark_point(filled=True, size=90, opacity=1).encode(
            x=alt.X("x:Q", **scaled), color=color, shape=shape, tooltip=tooltip
        ),
        _text(labels).encode(y=y),
    ]
    return dataclasses.replace(figure, chart=alt.layer(*layers).properties(width=400, height=place))


def _text(rows: list[Any]) -> alt.Chart:
    """Words at the left edge."""
    rows = [row if isinstance(row, dict) else {"text": row} for row in rows]
    chart = alt.Chart(alt.Data(values=rows)).mark_text(align="left", baseline="top", fontSize=11)
    return chart.encode(x=alt.value(2), text="text:N")


def _rule(**at: float) -> alt.Chart:
    """A dotted line across."""
    chart = alt.Chart(alt.Data(values=[{}])).mark_rule(strokeDash=[2, 3])
    return chart.encode(**{axis: alt.datum(value) for axis, value in at.items()})


def _scale(log: bool, domain: tuple[float, float]) -> alt.Scale:
    return alt.Scale(type="log" if log else "linear", domain=list(domain), nice=False, zero=False)


def _axis(ticks: Sequence[float]) -> Any:
    """Labels at `ticks`, if there are any; plain numbers without powers of ten."""
    plain = {"format": "~r" if len(ticks) else "~g", "labelOverlap": True}
    return alt.Axis(values=list(ticks), **plain) if len(ticks) else alt.Axis(labelOverlap=True)


def _domain(values: Sequence[float], log: bool) -> tuple[float, float]:
    """The part of an axis that shows all values, with a margin."""
    shown = np.array(values, float)
    shown = shown[np.isfinite(shown) & ((shown > 0) | (not log))]
    low, high = float(shown.min()), float(shown.max())
    if log:
        return low / 1.15, high * 1.15
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def _one_two_five(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... as far as they lie between two values."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5))
    return [step for step in steps if low <= step <= high]


def _over_training(
    comparison: Comparison, column: str, rates: Mapping[str, float]
) -> dict[str, list[Point]]:
    """A column of evaluations against steps: mean and range over seeds; ends where one broke."""
    lines = {}
    for method, rate in rates.items():
        rows = comparison.rows("evaluations", method, rate)
        if column in rows:
            by_step = rows.pivot(index="step", columns="seed", values=column).dropna()
            note = f"{by_step.shape[1]} seeds at rate {rate:g}"
            values = zip(by_step.index, by_step.to_numpy(float), strict=True)
            lines[method] = [Point(float(step), _range(of), note) for step, of in values]
    return lines


def _range(values: np.ndarray) -> Estimate:
    return Estimate(*(float(of(values)) for of in (np.mean, np.min, np.max)))


def _inexact(comparison: Comparison) -> dict[str, float]:
    """The best rate of each method that does not follow the true gradient."""
    return {
        method: comparison.best_rate(method)
        for method, record in comparison.methods.items()
        if not record["exact"]
    }


def _rate_for_curves(comparison: Comparison) -> tuple[float, str]:
    """The shared rate, or where there is none the reference's best."""
    who = comparison.label(comparison.reference) if comparison.reference else "every method"
    if math.isfinite(comparison.shared_rate):
        return comparison.shared_rate, (
            f"the smallest at which every run of {who} reaches loss {comparison.target_loss:.3g} "
            "within half the steps"
        )
    best = comparison.best_rate(comparison.reference or next(iter(comparison.methods)))
    if math.isfinite(best):
        return best, "the best of " + who
    return comparison.rates[0], "the smallest"


def _finite(value: float) -> float | None:
    """A number as JSON has it; None where there is none."""
    return value if math.isfinite(value) else None
