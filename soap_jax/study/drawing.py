"""Two types of figures in Altair: curves of several methods, and a list of estimates."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from soap_jax.study.figures import Figure
from soap_jax.study.statistics import Estimate, format_number

WRAP = 48
"""The most characters in a line, so that it fits on a phone."""
Style = tuple[str, str, list[int]]
"""The colour, shape and dash pattern of a method or a verdict."""


def curves(
    rows: pd.DataFrame,
    styles: Mapping[str, Style],
    *,
    x: str,
    y: str,
    x_log: bool = False,
    y_log: bool = False,
    degrees: bool = False,
    ticks: Sequence[float] = (),
    line: float = math.nan,
    budget: float = math.inf,
    decades: float = math.inf,
    **texts: str,
) -> Figure:
    """A figure with a curve and a band for each method.

    Args:
        rows: points in drawing order: `method`, `x`, `y` with its band from `low` to `high` (NaN if
            there is no mean), and a `note` for the tooltip.
        styles: the styles of methods.
        x: the title of the horizontal axis.
        y: the title of the vertical axis.
        x_log: whether the horizontal axis is logarithmic.
        y_log: whether the vertical axis is logarithmic; values of zero and below are left out.
        degrees: whether the vertical axis shows angles.
        ticks: the positions of labels on the horizontal axis.
        line: a value for comparison, drawn as a horizontal line.
        budget: a value above which hollow markers show the means that are NaN.
        decades: the number of decades that a logarithmic axis shows below the largest value.
        **texts: `name`, `title`, `caption` and `empty` of `Figure`.
    """
    rows, seen = _with_value(rows, "y"), rows[rows["y"].notna()]
    said = [
        f"{name} from {format_number(of['y'].iloc[0])} at {format_number(of['x'].iloc[0])} to "
        f"{format_number(of['y'].iloc[-1])} at {format_number(of['x'].iloc[-1])}"
        for name, of in seen.groupby("method", sort=False)
    ]
    shown = list(rows["method"].unique())
    cells = rows.assign(value=rows["value"].where(rows["y"].notna(), rows["note"]))
    cells = cells.pivot(index="x", columns="method", values="value")[shown].fillna("–")
    figure = Figure(
        **texts,
        alt=f"{texts['title']}. Line chart of {y} against {x}: {'; '.join(said)}.",
        chart=None,
        table=([x, *shown], [[format_number(row[0]), *row[1:]] for row in cells.itertuples()]),
    )
    ends = seen[["y", "low", "high"]].to_numpy(float)
    if not (ends > (0 if y_log else -math.inf)).any():
        return figure
    bottom, top = (0.0, 100.0) if degrees else _domain([*ends.flat, line], y_log)
    bottom = max(bottom, float(np.nanmax(ends)) / 10**decades)
    y_ticks = list(range(0, 91, 15)) if degrees else _one_two_five(bottom, top) if y_log else []
    lost = list(rows[rows["y"].isna()]["method"].unique()) if math.isfinite(budget) else []
    heights = {name: budget * 1.13 ** (i + 1) for i, name in enumerate(lost)}
    if heights:
        y_ticks, top = [tick for tick in y_ticks if tick <= budget], 1.7 * max(heights.values())
    rows = rows.assign(
        y=rows["y"].where(rows["y"] >= bottom),
        low=rows["low"].clip(lower=bottom),
        high=rows["high"].clip(lower=bottom, upper=top),
        lost=rows["method"].map(heights).where(rows["y"].isna()),
    )
    color, shape, dash = _style_channels("method", shown, styles)
    x_axis = _channel(alt.X, "x", x, x_log, _domain(list(rows["x"]), x_log), ticks)
    low, middle, above = (
        _channel(alt.Y, field, y, y_log, (bottom, top), y_ticks) for field in ("low", "y", "lost")
    )
    tooltip = _tooltip(method="method", x=x, value=y, note="of")
    picked = alt.selection_point(  # a unique name, since figures can be side by side
        name=f"picked_{figure.name}", fields=["method"], bind="legend", toggle="true"
    )
    base = _chart(rows).transform_filter(picked).encode(x=x_axis, color=color)
    points = base.mark_point(filled=True).encode(y=middle, shape=shape, tooltip=tooltip)
    layers = [
        base.mark_area(opacity=0.14).encode(y=low, y2="high:Q"),
        base.mark_line().encode(y=middle, strokeDash=dash),
        points.add_params(picked),
        *(
            _chart([{}]).mark_rule(strokeDash=[2, 3]).encode(y=alt.datum(value))
            for value in (line, budget)
            if bottom <= value <= top
        ),
    ]
    if heights:
        hollow = base.mark_point(size=45).encode(y=above, shape=shape, tooltip=tooltip)
        label = _text_layer([{"text": "not reached:"}])
        layers += [hollow, label.encode(y=alt.datum(1.35 * max(heights.values())))]
    chart = alt.LayerChart(layer=layers, width=330, height=300)
    return dataclasses.replace(figure, chart=chart)


def intervals(
    rows: pd.DataFrame,
    styles: Mapping[str, Style],
    *,
    x: str,
    log: bool = False,
    line: float = math.nan,
    dots: Mapping[str, Sequence[float]] | None = None,
    **texts: str,
) -> Figure:
    """A figure with a row for each estimate: its label, its interval and its bound.

    Args:
        rows: rows from top to bottom: `label`, `style` (a name), the estimate `x` with its interval
            from `low` to `high`, the bound from `bound_low` to `bound_high` (NaN: none), a `note`.
        styles: the styles by name; the legend shows these names.
        x: the title of the axis.
        log: whether the axis is logarithmic.
        line: a value for comparison, drawn across every row.
        dots: single values to show below the intervals, by style name; the legend is then hidden.
        **texts: `name`, `title`, `caption` and `empty` of `Figure`.
    """
    rows, dots = _with_value(rows, "x"), dots or {}
    cells = rows[["label", "value", "note"]].to_numpy().tolist()
    said = "; ".join(f"{label}: {value}" for label, value, _ in cells)
    figure = Figure(
        **texts,
        alt=f"{texts['title']}. Horizontal axis: {x}. {said}.",
        chart=None,
        table=(["", f"{x} [95 % interval]", "note"], cells),
    )
    if not cells:
        return figure
    ends = rows[["x", "low", "high", "bound_low", "bound_high"]].to_numpy(float)
    left, right = _domain([*ends.flat, *(dot for of in dots.values() for dot in of), line], log)
    wrapped = [textwrap.wrap(label, WRAP) for label in rows["label"]]
    places = np.cumsum([15 * len(of) + 32 for of in wrapped]) - 22
    labels = [
        {"y": y - 10 - 15 * (len(of) - i), "text": part}
        for y, of in zip(places.tolist(), wrapped, strict=True)
        for i, part in enumerate(of)
    ]
    values = [
        {"y": y + 9, "style": style, "x": value}
        for y, style in zip(places.tolist(), rows["style"], strict=True)
        for value in dots.get(style, ())
    ]
    height = float(places[-1]) + 22
    rows[["low", "high", "bound_low", "bound_high"]] = ends[:, 1:].clip(left, right)
    rows = rows.assign(y=places, top=places - 10, bottom=places + 10)
    color, shape, _ = _style_channels("style", list(rows["style"].unique()), styles)
    if dots:
        color.legend = shape.legend = None
    ticks = _one_two_five(left, right) if log else ()
    at, low, bound_low = (
        _channel(alt.X, field, x, log, (left, right), ticks, grid=False)
        for field in ("x", "low", "bound_low")
    )
    y, top = (
        alt.Y(f"{field}:Q", scale=alt.Scale(domain=[height, 0]), axis=None)
        for field in ("y", "top")
    )
    base = _chart(rows).encode(y=y)
    across = base.mark_rule(strokeDash=[2, 3]).encode(x=alt.datum(line), y=top, y2="bottom:Q")
    mean = base.mark_point(filled=True, size=90).encode(x=at, color=color, shape=shape)
    layers = [
        base.mark_rule(strokeWidth=14, opacity=0.3).encode(x=bound_low, x2="bound_high:Q"),
        base.mark_rule(strokeWidth=2.5).encode(x=low, x2="high:Q", color=color),
        _chart(values).mark_circle(size=20, opacity=0.6).encode(x=at, y=y, color=color),
        mean.encode(tooltip=_tooltip(label="of", value=x, note="note")),
        _text_layer(labels).encode(y=y),
        *([across] if math.isfinite(line) else []),
    ]
    chart = alt.LayerChart(layer=layers, width=400, height=height)
    return dataclasses.replace(figure, chart=chart)


def _with_value(rows: pd.DataFrame, mean: str) -> pd.DataFrame:
    """Rows with their estimates as text."""
    numbers = rows[[mean, "low", "high"]].itertuples(index=False)
    return rows.assign(value=[str(Estimate(*of)) for of in numbers])


def _chart(rows: pd.DataFrame | list[dict[str, Any]]) -> alt.Chart:
    """A chart of rows, in which NaN becomes null."""
    values: Any = rows
    if isinstance(rows, pd.DataFrame):
        values = rows.astype(object).where(rows.notna(), None).to_dict("records")
    return alt.Chart(alt.Data(values=values))


def _text_layer(rows: list[dict[str, Any]]) -> alt.Chart:
    """A layer of text at the left edge."""
    chart = _chart(rows).mark_text(align="left", baseline="top", fontSize=11)
    return chart.encode(x=alt.value(2), text="text:N")


def _tooltip(**titles: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(f, type="nominal", title=title) for f, title in titles.items()]


def _style_channels(field: str, shown: Sequence[str], styles: Mapping[str, Style]) -> list[Any]:
    """The channels of colour, shape and dashes; equal domains give them a common legend."""
    scales = (alt.Scale(domain=list(shown), range=[styles[m][i] for m in shown]) for i in range(3))
    channels = (alt.Color, alt.Shape, alt.StrokeDash)
    return [
        channel(f"{field}:N", title=None, scale=scale)
        for channel, scale in zip(channels, scales, strict=True)
    ]


def _channel(
    channel: Any,
    field: str,
    title: str,
    log: bool,
    domain: tuple[float, float],
    ticks: Sequence[float],
    *,
    grid: bool = True,
) -> Any:
    """A position channel; if there are `ticks`, its axis has plain numbers there."""
    scale = alt.Scale(type="log" if log else "linear", domain=list(domain), nice=False)
    some: Any = {"values": list(ticks), "format": ".6~g"} if len(ticks) else {}
    axis = alt.Axis(labelOverlap=True, grid=grid, **some)
    return channel(f"{field}:Q", title=title, scale=scale, axis=axis)


def _domain(values: Sequence[float], log: bool) -> tuple[float, float]:
    """The domain of an axis that shows all values, with a margin."""
    shown = np.array(values, float)
    shown = shown[np.isfinite(shown) & ((shown > 0) | (not log))]
    low, high = float(shown.min()), float(shown.max())
    if log:
        return low / 1.15, high * 1.15
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def _one_two_five(low: float, high: float) -> list[float]:
    """The numbers 1, 2, 5, 10, ... between two values; equally spaced ones if those are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5))
    found = [step for step in steps if low <= step <= high]
    if len(found) > 2:
        return found
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
