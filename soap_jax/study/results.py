"""A study's results as tidy tables, and where they came from."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import pathlib
import platform
from typing import Any

import jax
import numpy as np
import pandas as pd

import soap_jax
from soap_jax import data, sweeps
from soap_jax.study import circumstances, experiment, methods
from soap_jax.study.config import StudyConfig

FORMAT = 2
"""Of the tables and files; it grows when older results cannot be read any more."""

WINDOW = 11
"""Batches in the moving average of the training loss, centred so that it does not lag."""

DIVERGED = 2.0
"""A run whose training loss ends above so many times its first one counts as diverged."""

KEYS = ["method", "period", "learning_rate", "seed"]
"""The columns that name a run; the period is 0 where feedback is never synced."""

RUN_COLUMNS = [
    *KEYS,
    "steps",
    "diverged",
    "steps_to_target",
    "train_loss",
    "validation_loss",
    "validation_accuracy",
    "test_loss",
    "test_accuracy",
]
EVALUATION_COLUMNS = [*KEYS, "step", "train_loss", "validation_loss", "validation_accuracy"]
"""These, and the angles, norm ratios and learning rates by layer, such as `error_angle/Dense_0`."""


LOSS_COLUMNS = [*KEYS, "train_loss"]
"""One row per run: all its losses, each that of a batch before its update."""

COLUMNS = {"runs": RUN_COLUMNS, "evaluations": EVALUATION_COLUMNS, "losses": LOSS_COLUMNS}

Tables = dict[str, pd.DataFrame]
"""By the names in `COLUMNS`."""


def tidy(
    config: StudyConfig,
    method: str,
    points: list[sweeps.Point],
    record: experiment.Record,
    marks: np.ndarray,
) -> Tables:
    """Turns the record of some runs of one method into rows.

    The training loss is a moving average over `WINDOW` batches, centred on each (fewer at the
    ends); `steps_to_target` is the number of batches seen when it first falls to the target, and
    empty where it never does. A run is `diverged` if any loss was not finite (it keeps its row, and
    from there on it is NaN) or if the training loss ends above `DIVERGED` times its first value.

    Args:
        config: the study's configuration.
        method: the method's name.
        points: the runs.
        record: theirs, with a leading axis `(runs,)`.
        marks: the steps of the evaluations.

    Returns:
        The tables "runs", "evaluations" and "losses".
    """
    evaluations, runs = [], []
    for i, point in enumerate(points):
        one = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i], float), record)
        smooth = moving_average(one.train_loss)
        names = {
            "method": method,
            "period": point.period,
            "learning_rate": point.learning_rate,
            "seed": point.seed,
        }
        train_loss = np.append(np.nan, smooth)[marks]
        rows = {**names, "step": marks, "train_loss": train_loss, **one.evaluations}
        evaluations.append(pd.DataFrame(rows))
        final = one.evaluations["validation_loss"][-1]
        finite = np.isfinite([*one.train_loss, final, one.test_loss]).all()
        runs.append(
            names
            | {
                "steps": int(marks[-1]),
                "diverged": not (finite and smooth[-1] <= DIVERGED * one.train_loss[0]),
                "steps_to_target": steps_to(smooth, config.target_loss),
                "train_loss": smooth[-1],
                "validation_loss": final,
                "validation_accuracy": one.evaluations["validation_accuracy"][-1],
                "test_loss": float(one.test_loss),
                "test_accuracy": float(one.test_accuracy),
            }
        )
    return {
        "runs": pd.DataFrame(runs, columns=RUN_COLUMNS).astype({"diverged": bool}),
        "evaluations": pd.concat(evaluations, ignore_index=True),
        "losses": pd.DataFrame(runs)[KEYS].assign(
            train_loss=list(np.asarray(record.train_loss, np.float32))
        ),
    }


def moving_average(losses: np.ndarray) -> np.ndarray:
    """A centred mean over `WINDOW` batches, fewer at the ends; NaN from the first break on.

    Example:
        >>> moving_average(np.array([1.0, 3.0, np.inf, 1.0])).tolist()
        [2.0, 2.0, nan, nan]
    """
    unbroken = np.logical_and.accumulate(np.isfinite(losses))
    kept = pd.Series(np.where(unbroken, losses, np.nan))
    mean = kept.rolling(WINDOW, center=True, min_periods=1).mean()
    return mean.where(unbroken).to_numpy()


def steps_to(smooth: np.ndarray, target: float) -> float:
    """The number of batches after which a loss is first at the target; NaN if it never is.

    Example:
        >>> steps_to(np.array([2.0, 0.4, 0.6]), 0.5), steps_to(np.array([2.0]), 0.5)
        (2.0, nan)
    """
    reached = np.flatnonzero(smooth <= target)
    return float(reached[0] + 1) if reached.size else np.nan


def at_target(tables: Tables, target: float) -> Tables:
    """The same tables with steps counted to another loss."""
    smooth = tables["losses"].set_index(KEYS)["train_loss"].map(moving_average)
    steps = smooth.map(lambda losses: steps_to(losses, target)).rename("steps_to_target")
    runs = tables["runs"].drop(columns="steps_to_target").join(steps, on=KEYS)
    return tables | {"runs": runs[RUN_COLUMNS]}


def provenance(config: StudyConfig, dataset: data.Dataset) -> dict[str, Any]:
    """What a result must say of itself to be repeated."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    devices = jax.devices()
    train, validation, test = (len(part.labels) for part in experiment.split(dataset))
    return {
        "format": FORMAT,
        "config": dataclasses.asdict(config),
        "rules": {m: methods.describe(m, config.periods_of(m)[0]) for m in config.methods},
        "loss_window": WINDOW,
        "data_source": dataset.source,
        "examples": {"train": train, "validation": validation, "test": test},
        "versions": {"soap_jax": soap_jax.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "device": {
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "count": len(devices),
            "processes": jax.process_count(),
            "machine": platform.machine(),
            "processor": _processor(),
        },
        "settings": circumstances.settings(),
    }


def _processor() -> str:
    """The model of the CPU, as far as the system tells."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
