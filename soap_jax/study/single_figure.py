"""The figure of one model's training: loss, accuracy and angles against epochs."""

from __future__ import annotations

import pathlib

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from soap_jax.study import files
from soap_jax.study.config import METHODS
from soap_jax.study.single_config import TrainConfig

# Okabe and Ito's palette, which colour-blind readers can tell apart; line styles differ as well
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
PAPER = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}


def draw(config: TrainConfig, curves: pd.DataFrame, directory: pathlib.Path) -> list[pathlib.Path]:
    """Draws `curves.png` and `curves.pdf`; lines break where numbers are not finite.

    Args:
        config: the training's configuration.
        curves: its curves, one row per epoch.
        directory: where to.

    Returns:
        The paths.
    """
    curves = curves.replace([np.inf, -np.inf], np.nan)
    panels = [_loss, _accuracy]
    if any(str(name).startswith("gradient_angle/") for name in curves):
        panels.append(_angles)
    paths = []
    with mpl.rc_context(PAPER):  # type: ignore[arg-type]
        figure = Figure(figsize=(3.7 * len(panels), 3.4), layout="constrained")
        figure.suptitle(
            f"{config.dataset}, {METHODS[config.method]}, rate {config.learning_rate:g}, "
            f"seed {config.seed}"
        )
        for ax, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
            panel(ax, curves)
            ax.set_xlabel("epoch")
            ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            ax.legend(fontsize=8)
        for suffix, metadata in ((".png", None), (".pdf", {"CreationDate": None})):
            path = directory / f"curves{suffix}"

            def write(file, suffix=suffix, metadata=metadata):
                figure.savefig(file, format=suffix[1:], metadata=metadata)

            files.write_atomically(path, write)
            paths.append(path)
    return paths


def _loss(ax: Axes, curves: pd.DataFrame):
    ax.plot(curves["epoch"], curves["train_loss"], color=COLORS[0], label="training, mean of epoch")
    ax.plot(curves["epoch"], curves["validation_loss"], "--", color=COLORS[1], label="validation")
    losses = curves[["train_loss", "validation_loss"]].to_numpy()
    if (losses > 0).any():
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.set_title("Loss")


def _accuracy(ax: Axes, curves: pd.DataFrame):
    accuracy = 100 * curves["validation_accuracy"]
    ax.plot(curves["epoch"], accuracy, "--", color=COLORS[1], label="validation")
    ax.set_title("Accuracy (%)")


def _angles(ax: Axes, curves: pd.DataFrame):
    """Pseudo-gradient to true gradient, and feedback to kernel; layers count from the input."""
    shown = {"gradient_angle": ("-", "gradient"), "weight_angle": (":", "weights")}
    for kind, (line, what) in shown.items():
        for name in curves:
            prefix, _, layer = str(name).partition("/Dense_")
            if prefix == kind:
                color = COLORS[int(layer) % len(COLORS)]
                label = f"{what}, layer {int(layer) + 1}"
                ax.plot(curves["epoch"], curves[name], line, color=color, label=label)
    ax.axhline(90, color="#999999", linewidth=0.8, linestyle=":")
    ax.set_ylim(0, 100)
    ax.set_yticks(range(0, 91, 15))
    ax.set_title("Angle to the true one (degrees)")
