"""The class of figures, their common style, and the files that are written.

Text and axes have the colour of the surrounding text, so that a page can be light or dark.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import vl_convert
from altair import LayerChart

from soap_jax.study import files

GREY = "#8a8a8a"  # visible on white and on black
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

PANELS = ("loss_curves", "steps_to_loss", "angles")
"""The names of the figures in the overview."""
CONVERTERS: dict[str, Callable[[str], bytes]] = {
    ".svg": str.encode,
    ".png": functools.partial(vl_convert.svg_to_png, scale=2),
    ".pdf": vl_convert.svg_to_pdf,
}
"""The converters from SVG to the content of a file, by file suffix."""
Cells = tuple[list[str], list[list[str]]]
"""The header and the rows of a table."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure.

    Attributes:
        name: the name of its files, without suffix.
        title: the title.
        caption: the caption, which explains the content, bands and intervals.
        alt: a description of the figure for people who cannot see it.
        chart: the chart; None if there are no data.
        table: the data of the figure.
        empty: the text that replaces the figure if there are no data.
    """

    name: str
    title: str
    caption: str
    alt: str
    chart: LayerChart | None
    table: Cells
    empty: str

    @functools.cached_property
    def spec(self) -> dict[str, Any]:
        """The figure in Vega-Lite; empty if there are no data."""
        if self.chart is None:
            return {}
        chart = self.chart.properties(title=self.title, description=self.alt)
        return chart.to_dict(validate=False) | {"config": CONFIG}


def save(figures: Sequence[Figure], directory: pathlib.Path) -> None:
    """Writes each figure as SVG, PNG and PDF, and an overview of those in `PANELS`."""
    for figure in figures:
        save_svg(_svg(figure.spec), directory / figure.name)
    overview = [figure for figure in figures if figure.name in PANELS]
    save_svg(side_by_side(overview), directory / "overview")


def side_by_side(figures: Sequence[Figure], resolve: str = "shared") -> str:
    """Figures side by side as SVG, with a "shared" legend or "independent" ones."""
    specs = [figure.spec for figure in figures if figure.chart]
    panels = [{k: v for k, v in spec.items() if k not in ("$schema", "config")} for spec in specs]
    resolved = {"scale": dict.fromkeys(("color", "shape", "strokeDash"), resolve)}
    config = CONFIG | {"legend": CONFIG["legend"] | {"columns": 4}}
    return _svg({"hconcat": panels, "config": config, "resolve": resolved} if panels else {})


def _svg(spec):
    return vl_convert.vegalite_to_svg(spec | {"background": "white"}) if spec else ""


def save_svg(svg: str, stem: pathlib.Path) -> None:
    """Writes a drawing as SVG, PNG and PDF; if it is empty, deletes these files."""
    for suffix, convert in CONVERTERS.items():
        path = stem.with_suffix(suffix)
        if svg:
            content = convert(svg)
            files.write_atomically(path, operator.methodcaller("write", content))
        else:
            path.unlink(missing_ok=True)
