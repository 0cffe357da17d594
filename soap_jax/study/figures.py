"""The figures of a study, each from the tidy tables alone."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from soap_jax.study import results, summary
from soap_jax.study.config import METHODS, StudyConfig

# Okabe and Ito's palette, which colour-blind readers can tell apart, and a marker each.
STYLES: dict[str, Any] = {
    "bp": {"color": "#000000", "marker": "o"},
    "fa": {"color": "#D55E00", "marker": "s"},
    "sign": {"color": "#0072B2", "marker": "^"},
    "sign_preserve": {"color": "#009E73", "marker": "D"},
}
PAPER: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}

Tables = dict[str, pd.DataFrame]


def draw_all(config: StudyConfig, tables: Tables, directory: pathlib.Path) -> list[pathlib.Path]:
    """Draws every figure as PNG and PDF.

    Args:
        config: the study's configuration.
        tables: the tidy tables "evaluations" and "runs".
        directory: where to; made if it is not there.

    Returns:
        The paths of the PNG files; the first shows all panels side by side.
    """
    panels: dict[str, Callable[[Axes], None]] = {
        "loss_curves": lambda ax: loss_curves(ax, config, tables),
        "steps_to_loss": lambda ax: steps_to_loss(ax, config, tables["runs"]),
        "angles": lambda ax: angles(ax, config, tables),
    }
    with mpl.rc_context(PAPER):
        overview = Figure(figsize=(11, 3.6), layout="constrained")
        for ax, draw in zip(overview.subplots(1, len(panels)), panels.values(), strict=True):
            draw(ax)
        _legend(overview, columns=len(config.methods))
        paths = [_save(overview, directory / "overview")]
        for name, draw in panels.items():
            figure = Figure(figsize=(4.4, 3.9), layout="constrained")
            draw(figure.subplots())
            _legend(figure, columns=2)
            paths.append(_save(figure, directory / name))
    return paths


def loss_curves(ax: Axes, config: StudyConfig, tables: Tables) -> None:
    """Training loss against steps at the rate that all methods share, with the seeds' range."""
    rate = _rate_for_curves(tables["runs"])
    for style, rows in _by_method(config, tables["evaluations"], {m: rate for m in config.methods}):
        _curve(ax, rows, "train_loss", **style)
    ax.axhline(config.target_loss, color="#999999", linewidth=0.8, linestyle=":")
    ax.set_yscale("log")
    ax.set_xlabel("parameter updates")
    ax.set_ylabel("training loss (moving average)")
    ax.set_title(f"Loss at learning rate {rate:g}")
    _plain_numbers(ax.yaxis)


def steps_to_loss(ax: Axes, config: StudyConfig, runs: pd.DataFrame) -> None:
    """Steps to the target loss against the learning rate: geometric mean and t interval.

    A rate at which some run of a method does not reach the target has no point, and no line to it.
    """
    for method in config.methods:
        rows = []
        for rate, of_rate in runs[runs["method"] == method].groupby("learning_rate"):
            interval = summary.mean_interval(np.log(of_rate["steps_to_target"]))
            rows.append((rate, *np.exp(interval)))  # NaN where some run has no steps
        rates, mean, low, high = np.transpose(rows)
        if np.isfinite(mean).any():
            ax.plot(rates, mean, label=METHODS[method], **STYLES[method])
            ax.fill_between(rates, low, high, color=STYLES[method]["color"], alpha=0.15, lw=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("learning rate")
    ax.set_ylabel("parameter updates (fewer is better)")
    ax.set_title(f"Steps to loss {config.target_loss:g} at every learning rate")
    _plain_numbers(ax.xaxis)
    _plain_numbers(ax.yaxis)


def angles(ax: Axes, config: StudyConfig, tables: Tables) -> None:
    """Angle of the pseudo-gradient to the true one below the output, at each method's best rate."""
    column = "gradient_angle/Dense_0"
    best = {method: summary.best_rate(rows) for method, rows in tables["runs"].groupby("method")}
    for style, rows in _by_method(config, tables["evaluations"], best):
        if column in rows and rows[column].notna().any():
            _curve(ax, rows, column, **style)
    ax.axhline(90, color="#999999", linewidth=0.8, linestyle=":")
    ax.set_ylim(0, 100)
    ax.set_yticks(range(0, 91, 15))
    ax.set_xlabel("parameter updates")
    ax.set_ylabel("angle to the true gradient (degrees)")
    ax.set_title("First layer, each method at its best rate")


def _by_method(config, evaluations, rates) -> Iterator[tuple[dict, pd.DataFrame]]:
    """The style and the rows of each method at its rate."""
    for method in config.methods:
        chosen = (evaluations["method"] == method) & (evaluations["learning_rate"] == rates[method])
        yield {"label": METHODS[method], **STYLES[method]}, evaluations[chosen]


def _curve(ax, rows, column, *, label, color, marker):
    """Mean over seeds against steps, and a band between the extreme seeds; ends where one broke."""
    by_step = rows.pivot(index="step", columns="seed", values=column).dropna()
    mean, low, high = by_step.mean(axis=1), by_step.min(axis=1), by_step.max(axis=1)
    ax.plot(mean.index, mean, label=label, color=color, marker=marker, markevery=0.2)
    ax.fill_between(mean.index, low, high, color=color, alpha=0.15, lw=0)


def _plain_numbers(axis):
    """Labels a logarithmic axis 1, 2, 5, 10, ... instead of with powers."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def _legend(figure, *, columns):
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _rate_for_curves(runs):
    """The shared rate, or where there is none the one at which most runs reach the target."""
    shared = summary.shared_rate(runs)
    if np.isfinite(shared):
        return shared
    return float(runs.groupby("learning_rate")["steps_to_target"].count().idxmax())


def _save(figure, stem):
    for suffix in (".pdf", ".png"):
        metadata = {"CreationDate": None} if suffix == ".pdf" else None

        def write(file, suffix=suffix, metadata=metadata):
            figure.savefig(file, format=suffix[1:], metadata=metadata)

        results.write_atomically(stem.with_suffix(suffix), write)
    return stem.with_suffix(".png")
