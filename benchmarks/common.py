"""Shared code of the benchmarks: interleaved timing, and results with their versions and device.

A benchmark times methods side by side, and makes one row of plain values per case and method. It
passes its rows to `publish`, which prints a table and writes `NAME.json` (rows, versions, device),
`NAME.md` (the table) and `NAME.png` (the figure).
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUT = pathlib.Path("benchmarks/results")


def arguments(doc: str, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark: `--rounds`, `--quick` and `--out`."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="by default %(default)s")
    parser.add_argument("--quick", action="store_true", help="small and short, to see it run")
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help="by default %(default)s")
    return parser


def interleave(runners: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Times every runner once per round, in a new random order: `{name: seconds by round}`."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name in random.sample(list(runners), len(runners)):
            begin = time.perf_counter()
            runners[name]()
            times[name].append(time.perf_counter() - begin)
    return times


def interleave_blocks(
    runners: Mapping[str, Callable[[int], object]], rounds: int, seconds: float, reference: str
) -> dict[str, list[float]]:
    """Times blocks of `n` steps, of about so many seconds: `{name: seconds per step by round}`."""
    begin = time.perf_counter()
    runners[reference](10)
    n = max(3, round(seconds / ((time.perf_counter() - begin) / 10)))
    blocks = {name: functools.partial(run, n) for name, run in runners.items()}
    times = interleave(blocks, rounds)
    return {name: [spent / n for spent in values] for name, values in times.items()}


def ratio(times: Mapping[str, list[float]], name: str, reference: str) -> tuple[float, list[float]]:
    """The median of the ratio within a round, and its quartiles."""
    pairs = zip(times[name], times[reference], strict=True)
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    return middle, [low, high]


def summary(times: Mapping[str, list[float]], reference: str) -> dict[str, dict]:
    """Per name: median `ms`, and `ratio` to the reference within a round, with `quartiles`."""
    rows = {}
    for name, values in times.items():
        middle, quartiles = ratio(times, name, reference)
        ms = 1e3 * statistics.median(values)
        rows[name] = {"ms": ms, "ratio": middle, "quartiles": quartiles}
    return rows


def show_ms(row: Mapping) -> str:
    """A time as in a table, with three digits."""
    ms = row["ms"]
    return f"{ms:.0f}" if ms >= 100 else f"{ms:#.3g}"


def show_ratio(row: Mapping) -> str:
    """A ratio as in a table: the median and its quartiles."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(row["ratio"], *row["quartiles"])


def facts() -> dict:
    """Versions and device, as every result states them."""
    packages = ("soap_jax", "jax", "jaxlib", "flax", "optax")
    return {
        "device": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}",
        "platform": jax.default_backend(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }


def markdown(rows: Iterable[Mapping], columns: Mapping[str, str | Callable[[Mapping], str]]) -> str:
    """A table: for each column its head, and a key or a function of the row."""
    lines = [list(columns), ["---"] * len(columns)]
    for row in rows:
        lines.append([str(c(row) if callable(c) else row[c]) for c in columns.values()])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def publish(
    name: str,
    out: pathlib.Path,
    rows: Sequence[Mapping],
    columns: Mapping[str, str | Callable[[Mapping], str]],
    *,
    figure: Figure | None = None,
    **more,
) -> None:
    """Prints the table; writes it, the rows with versions and device as JSON, and the figure."""
    show(name, out, rows, columns, figure=figure)
    write(name, out, rows, **more)


def show(
    name: str,
    out: pathlib.Path,
    rows: Sequence[Mapping],
    columns: Mapping[str, str | Callable[[Mapping], str]],
    *,
    figure: Figure | None = None,
) -> None:
    """Prints the table; writes it and the figure."""
    table = markdown(rows, columns)
    print(f"\n{table}")
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(table)
    if figure is not None:
        figure.savefig(out / f"{name}.png", dpi=130, metadata={"Software": None})


def write(name: str, out: pathlib.Path, results: Sequence[Mapping], **more) -> None:
    """Writes results as JSON, with versions and device; numbers that are not finite are null."""
    report = {"benchmark": name, **more, **facts(), "results": results}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(finite(report), indent=1, allow_nan=False) + "\n")
    print(f"Written to {path}.")


def finite(value):
    """A tree of JSON in which None replaces numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dot_plot(
    rows: Sequence[Mapping],
    *,
    panel: str,
    label: str,
    xlabel: str,
    lines: Sequence[float] = (1.0,),
    columns: int = 2,
) -> Figure:
    """Draws ratios with their quartiles: a panel per value of one key, a dot per value of another.

    Args:
        rows: with `ratio` and `quartiles`.
        panel: the key whose values make the panels.
        label: the key whose values label the dots.
        xlabel: what the ratio is.
        lines: where to draw vertical lines.
        columns: panels side by side.
    """
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(row[panel] for row in rows))
    labels = list(dict.fromkeys(row[label] for row in rows))
    columns = min(columns, len(panels))
    depth = -(-len(panels) // columns)
    size = (1.5 + 4 * columns, 0.9 + (0.6 + 0.24 * len(labels)) * depth)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(depth, columns, sharey=True, squeeze=False).flatten()
    for ax, title in zip(axes, panels, strict=False):
        for line in lines:
            ax.axvline(line, color="0.8", lw=1, zorder=0)
        for row in rows:
            if row[panel] == title:
                y = labels.index(row[label])
                ax.plot(row["quartiles"], [y, y], color="#1f5a99", lw=1.5)
                ax.plot(row["ratio"], y, "o", color="#1f5a99", ms=5)
        ax.set_title(title, fontsize=10)
        ax.set_yticks(range(len(labels)), labels)
        ax.set_ylim(len(labels) - 0.5, -0.5)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    figure.supxlabel(xlabel, fontsize=10)
    return figure
