"""Two kinds of figures in Altair: curves of several methods, and estimates one below the other.

Words and axes have the colour of the text around them, so that a page may be light or dark.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import vl_convert

from soap_jax.study import files
from soap_jax.study.statistics import Estimate, number

WRAP = 48
"""Characters in a line that a phone has room for."""
GREY = "#8a8a8a"  # seen on white and on black
INK = {"labelColor": "currentColor", "titleColor": "currentColor", "titleFontWeight": "normal"}
AXIS = {"domainColor": GREY, "tickColor": GREY, "gridColor": GREY, "gridOpacity": 0.25}
LEGEND = {"orient": "bottom", "columns": 2, "labelLimit": 300, "symbolSize": 60, "symbolOpacity": 1}
CONFIG: dict[str, Any] = {
    "font": "sans-serif",
    "background": None,
    "view": {"stroke": None},
    "axis": INK | AXIS,
    "legend": INK | LEGEND,
    "title": {"color": "currentColor", "anchor": "start"},
    "text": {"color": "currentColor"},
    "rule": {"color": GREY},
    "point": {"opacity": 1},
}

Cells = tuple[list[str], list[list[str]]]
"""The head of a table, and its rows."""
Mark = tuple[str, str, list[int]]
"""Colour, shape and dashes."""


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

    @functools.cached_property
    def spec(self) -> dict[str, Any]:
        """The figure in Vega-Lite; empty where there is nothing to see."""
        if self.chart is None:
            return {}
        chart = self.chart.properties(title=self.title, description=self.alt)
        return chart.to_dict(validate=False) | {"config": CONFIG}


class Point(NamedTuple):
    """A point of a curve with its band; NaN where there is no mean, and `note` says why."""

    x: float
    y: Estimate
    note: str


class Row(NamedTuple):
    """An estimate, the name of its mark, what it is made of, and the bound to hold it against."""

    label: str
    mark: str
    x: Estimate
    note: str
    dots: Sequence[float] = ()
    within: tuple[float, float] = (math.nan, math.nan)


def save(spec: Mapping[str, Any], stem: pathlib.Path) -> None:
    """Writes a figure as SVG, PNG and PDF; none of them is left where it is empty."""
    save_svg(vl_convert.vegalite_to_svg({**spec, "background": "white"}) if spec else "", stem)


def save_svg(svg: str, stem: pathlib.Path) -> None:
    """Writes a drawing as SVG, PNG and PDF; none of them is left where it is empty."""
    for suffix in (".svg", ".png", ".pdf"):
        path = stem.with_suffix(suffix)
        if not svg:
            path.unlink(missing_ok=True)
        elif suffix == ".svg":
            files.write_text(path, svg)
        else:
            to_bytes = vl_convert.svg_to_pdf if suffix == ".pdf" else vl_convert.svg_to_png
            content = to_bytes(svg, scale=1 if suffix == ".pdf" else 2)
            files.write_atomically(path, lambda file, content=content: file.write(content))


def curves(
    lines: Mapping[str, Sequence[Point]],
    marks: Mapping[str, Mark],
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
    """A line with its band for each method.

    Args:
        lines: points from left to right, by what the method is called.
        marks: how methods are drawn.
        x: what the horizontal axis shows.
        y: what the vertical axis shows.
        empty: what to say if there is nothing to see.
        x_log: whether the horizontal axis is logarithmic; values below zero are left out.
        y_log: whether the vertical axis is.
        degrees: whether the vertical axis shows angles.
        ticks: where the horizontal axis has labels.
        line: a value to compare with, drawn across.
        budget: above it, a hollow marker stands for each mean that is NaN.
        decades: how far down a logarithmic axis reaches.
        words: name, title and caption.
    """
    lines = {name: of for name, of in lines.items() if of}
    points = [(name, point) for name, of in lines.items() for point in of]
    seen = {name: [p for p in of if not math.isnan(p.y.value)] for name, of in lines.items()}
    said = [
        f"{name} from {number(of[0].y.value)} at {number(of[0].x)} to {number(of[-1].y.value)} at "
        f"{number(of[-1].x)}"
        for name, of in seen.items()
        if of
    ]
    cells = {point.x: dict.fromkeys(lines, "–") for _, point in points}
    for name, point in points:
        cells[point.x][name] = point.note if math.isnan(point.y.value) else str(point.y)
    figure = Figure(
        **words,
        alt=f"{words['title']}. Line chart of {y} against {x}: {'; '.join(said)}.",
        chart=None,
        table=([x, *lines], [[number(at), *row.values()] for at, row in sorted(cells.items())]),
        empty=empty,
    )
    ends = [end for _, p in points for end in (p.y.value, p.y.low, p.y.high)]
    if not said or (y_log and not any(end > 0 for end in ends)):
        return figure
    lost = [name for name in lines if len(seen[name]) < len(lines[name])]
    lost = lost if math.isfinite(budget) else []
    heights = {name: budget * 1.13 ** (i + 1) for i, name in enumerate(lost)}
    bottom, top = (0.0, 100.0) if degrees else _domain([*ends, line], y_log)
    bottom = max(bottom, np.nanmax(ends) / 10**decades)
    y_ticks = list(range(0, 91, 15)) if degrees else _one_two_five(bottom, top) if y_log else []
    if lost:
        y_ticks, top = [tick for tick in y_ticks if tick <= budget], 1.7 * max(heights.values())
    rows = [
        {
            "method": name,
            "x": point.x,
            "y": point.y.value if point.y.value >= bottom else None,
            "low": _finite(max(point.y.low, bottom)),
            "high": _finite(max(point.y.high, bottom)),
            "lost": heights.get(name) if math.isnan(point.y.value) else None,
            "value": "not reached" if math.isnan(point.y.value) else str(point.y),
            "note": point.note,
        }
        for name, point in points
    ]
    color, shape, dash = _looks("method", lines, marks)
    x_axis = _channel(alt.X, "x", x, x_log, _domain([p.x for _, p in points], x_log), ticks)
    low, middle, above = (
        _channel(alt.Y, field, y, y_log, (bottom, top), y_ticks) for field in ("low", "y", "lost")
    )
    tooltip = _tooltip(method="method", x=x, value=y, note="of")
    picked = alt.selection_point(  # with a name of its own, since figures may stand side by side
        name=f"picked_{figure.name}", fields=["method"], bind="legend", toggle="true"
    )
    base = _chart(rows).transform_filter(picked).encode(x=x_axis, color=color)
    layers: list[alt.Chart] = [
        base.mark_area(opacity=0.14).encode(y=low, y2="high:Q"),
        base.mark_line().encode(y=middle, strokeDash=dash),
        base.mark_point(filled=True).encode(y=middle, shape=shape, tooltip=tooltip),
        *(
            _chart([{}]).mark_rule(strokeDash=[2, 3]).encode(y=alt.datum(value))
            for value in (line, budget)
            if bottom <= value <= top
        ),
    ]
    layers[2] = layers[2].add_params(picked)
    if lost:
        hollow = base.mark_point(size=45).encode(y=above, shape=shape, tooltip=tooltip)
        label = _words([{"text": "not reached:"}])
        layers += [hollow, label.encode(y=alt.datum(1.35 * max(heights.values())))]
    return dataclasses.replace(figure, chart=alt.layer(*layers).properties(width=330, height=300))


def intervals(
    rows: Sequence[Row],
    marks: Mapping[str, Mark],
    *,
    x: str,
    empty: str,
    log: bool = False,
    line: float = math.nan,
    **words: str,
) -> Figure:
    """A row for each estimate: its label, and below it the interval on the bar of its bound.

    Args:
        rows: from top to bottom.
        marks: how they are drawn, by their marks' names, which stand in the legend.
        x: what the axis shows.
        empty: what to say if there is nothing to see.
        log: whether the axis is logarithmic.
        line: a value to compare with, drawn across every row.
        words: name, title and caption.
    """
    said = "; ".join(f"{row.label}: {row.x}" for row in rows)
    figure = Figure(
        **words,
        alt=f"{words['title']}. Horizontal axis: {x}. {said}.",
        chart=None,
        table=(["", f"{x} [95 % interval]", "note"], [[r.label, str(r.x), r.note] for r in rows]),
        empty=empty,
    )
    if not rows:
        return figure
    ends = [e for r in rows for e in (r.x.value, r.x.low, r.x.high, *r.within, *r.dots)]
    left, right = _domain([*ends, line], log)
    place, labels, dots = 0, [], []
    drawn: list[dict[str, Any]] = []
    for row in rows:
        for part in textwrap.wrap(row.label, WRAP):
            labels.append({"y": place, "text": part})
            place += 15
        place += 10
        dots += [{"mark": row.mark, "x": dot, "y": place + 9} for dot in row.dots]
        drawn.append(
            {
                "label": row.label,
                "mark": row.mark,
                "value": str(row.x),
                "note": row.note,
                "x": row.x.value,
                "y": place,
                "top": place - 10,
                "bottom": place + 10,
                "low": _finite(max(row.x.low, left)),
                "high": _finite(min(row.x.high, right)),
                "from": _finite(max(row.within[0], left)),
                "to": _finite(min(row.within[1], right)),
            }
        )
        place += 22
    color, shape, _ = _looks("mark", dict.fromkeys(row.mark for row in rows), marks)
    if all(row.mark == row.label for row in rows):
        color.legend = shape.legend = None
    at, low, bound = (
        _channel(alt.X, field, x, log, (left, right), _one_two_five(left, right) if log else ())
        for field in ("x", "low", "from")
    )
    y, top = (
        alt.Y(f"{field}:Q", scale=alt.Scale(domain=[place, 0]), axis=None) for field in ("y", "top")
    )
    base = _chart(drawn).encode(y=y)
    across = base.mark_rule(strokeDash=[2, 3]).encode(x=alt.datum(line), y=top, y2="bottom:Q")
    tooltip = _tooltip(label="of", value=x, note="note")
    layers: list[alt.Chart] = [
        base.mark_rule(strokeWidth=14, opacity=0.3).encode(x=bound, x2="to:Q"),
        base.mark_rule(strokeWidth=2.5).encode(x=low, x2="high:Q", color=color),
        _chart(dots).mark_circle(size=20, opacity=0.6).encode(x=at, y=y, color=color),
        base.mark_point(filled=True, size=90).encode(
            x=at, color=color, shape=shape, tooltip=tooltip
        ),
        _words(labels).encode(y=y),
        *([across] if math.isfinite(line) else []),
    ]
    return dataclasses.replace(figure, chart=alt.layer(*layers).properties(width=400, height=place))


def _chart(rows: list[dict[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.Data(values=rows))


def _words(rows: list[dict[str, Any]]) -> alt.Chart:
    """Words at the left edge."""
    chart = _chart(rows).mark_text(align="left", baseline="top", fontSize=11)
    return chart.encode(x=alt.value(2), text="text:N")


def _tooltip(**titles: str) -> list[alt.Tooltip]:
    types = {"x": "Q"}
    return [alt.Tooltip(f"{f}:{types.get(f, 'N')}", title=title) for f, title in titles.items()]


def _looks(field: str, shown: Mapping[str, Any], marks: Mapping[str, Mark]) -> list[Any]:
    """Colour, shape and dashes; they have one legend since their domains are equal."""
    return [
        channel(
            f"{field}:N",
            title=None,
            scale=alt.Scale(domain=list(shown), range=[marks[name][i] for name in shown]),
        )
        for i, channel in enumerate((alt.Color, alt.Shape, alt.StrokeDash))
    ]


def _channel(
    channel: Any,
    field: str,
    title: str,
    log: bool,
    domain: tuple[float, float],
    ticks: Sequence[float],
) -> Any:
    """A position; with plain numbers at `ticks`, if there are any."""
    scale = alt.Scale(type="log" if log else "linear", domain=list(domain), nice=False)
    some = {"values": list(ticks), "format": ".6~g"} if len(ticks) else {}
    axis = alt.Axis(labelOverlap=True, **some)
    return channel(f"{field}:Q", title=title, scale=scale, axis=axis)


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


def _finite(value: float) -> float | None:
    """A number as JSON has it; None where there is none."""
    return value if math.isfinite(value) else None
