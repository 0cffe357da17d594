"""A study's results as tidy tables, and the directory that holds them.

    study.json         configuration, versions, device, data source, duration
    evaluations.csv    one row per run and evaluation
    runs.csv           one row per run
    summary.csv        one row per method
    figures/           PNG and PDF

Everything is written under another name first and then renamed, so a file is whole or absent.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import tempfile
from collections.abc import Callable
from typing import IO, Any

import jax
import numpy as np
import pandas as pd

import soap_jax
from soap_jax import data
from soap_jax.study import methods
from soap_jax.study.config import StudyConfig
from soap_jax.study.experiment import Record, split

WINDOW = 11
"""Batches in the moving average of the training loss, centred so that it does not lag."""

TABLES = ("evaluations", "runs")


def tidy(
    config: StudyConfig, method: str, record: Record, marks: np.ndarray
) -> dict[str, pd.DataFrame]:
    """Turns the record of one method into rows.

    The training loss is a moving average over `WINDOW` batches, centred on each (fewer at the
    ends); `steps_to_target` is the number of batches seen when it first falls to the target, and
    empty where it never does. A run is `diverged` if any loss was not finite: it keeps its row, and
    from there on it is NaN.

    Args:
        config: the study's configuration.
        method: the method's name.
        record: leading axes `(learning_rates, seeds)`.
        marks: the steps of the evaluations.

    Returns:
        The tables "evaluations" and "runs".
    """
    evaluations, runs = [], []
    for i, rate in enumerate(config.learning_rates):
        for seed in range(config.seeds):
            one = jax.tree.map(lambda leaf, i=i, seed=seed: leaf[i, seed], record)
            losses = pd.Series(one.train_loss, dtype="float64")
            unbroken = np.logical_and.accumulate(np.isfinite(losses))
            average = losses.where(unbroken).rolling(WINDOW, center=True, min_periods=1).mean()
            smooth = average.where(unbroken).to_numpy()
            reached = np.flatnonzero(smooth <= config.target_loss)
            names = {"method": method, "learning_rate": rate, "seed": seed, "period": config.period}
            train_loss = np.append(np.nan, smooth)[marks]
            rows = {**names, "step": marks, "train_loss": train_loss, **one.evaluations}
            evaluations.append(pd.DataFrame(rows))
            final = one.evaluations["validation_loss"][-1]
            finite = unbroken.all() and np.isfinite([final, one.test_loss]).all()
            runs.append(
                names
                | {
                    "steps": int(marks[-1]),
                    "diverged": not bool(finite),
                    "steps_to_target": float(reached[0] + 1) if reached.size else np.nan,
                    "train_loss": smooth[-1],
                    "validation_loss": final,
                    "validation_accuracy": one.evaluations["validation_accuracy"][-1],
                    "test_loss": one.test_loss,
                    "test_accuracy": one.test_accuracy,
                }
            )
    return {"evaluations": pd.concat(evaluations, ignore_index=True), "runs": pd.DataFrame(runs)}


def provenance(config: StudyConfig, dataset: data.Dataset) -> dict[str, Any]:
    """What a result must say of itself to be repeated."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    devices = jax.local_devices()
    train, validation, test = (len(part.labels) for part in split(dataset))
    return {
        "config": dataclasses.asdict(config),
        "rules": {m: repr(methods.rule_of(m, config.period)) for m in config.methods},
        "optimizer": "sgd",
        "loss_window": WINDOW,
        "data_source": dataset.source,
        "examples": {"train": train, "validation": validation, "test": test},
        "versions": {"soap_jax": soap_jax.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "device": {
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "count": len(devices),
            "machine": platform.machine(),
            "processor": _processor(),
        },
    }


def _processor() -> str:
    """The model of the CPU, as far as the system tells."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


class ResultsDir:
    """The directory that holds one study's results.

    Args:
        path: where; made if it is not there.
        config: the study that it is to hold.

    Raises:
        ValueError: if it holds another configuration's results, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], config: StudyConfig):
        self.path = pathlib.Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise ValueError(
                f"cannot write results to {self.path}: {error.strerror}. Name another directory "
                "with --out."
            ) from error
        self.facts = self._read_facts()
        if self.facts:
            self._check_same(config)

    @property
    def finished(self) -> bool:
        """Whether all results are there."""
        return self.facts is not None and all(self._table(name).exists() for name in TABLES)

    def read(self) -> dict[str, pd.DataFrame]:
        """Reads the tidy tables."""
        return {name: pd.read_csv(self._table(name)) for name in TABLES}

    def write(self, tables: dict[str, pd.DataFrame], facts: dict[str, Any]) -> None:
        """Writes the tidy tables, then the facts that make them results."""
        for name, table in tables.items():
            self.write_table(name, table)
        text = json.dumps(facts, indent=2) + "\n"
        write_atomically(self.path / "study.json", lambda file: file.write(text.encode()))
        self.facts = facts

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Writes one table as `name.csv`."""
        text = table.to_csv(index=False)
        write_atomically(self._table(name), lambda file: file.write(text.encode()))

    def _table(self, name):
        return self.path / f"{name}.csv"

    def _read_facts(self):
        file = self.path / "study.json"
        if not file.exists():
            return None
        try:
            facts = json.loads(file.read_text())
            return {"config": facts["config"], **facts}
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{file} is not the description of a study ({error}). Name another directory with "
                "--out, or delete this one."
            ) from error

    def _check_same(self, config):
        ours = json.loads(json.dumps(dataclasses.asdict(config)))
        theirs = self.facts.get("config", {})
        differ = [name for name in ours if ours[name] != theirs.get(name)]
        if differ:
            changes = "; ".join(f"{n}: {theirs.get(n)} there, {ours[n]} now" for n in differ)
            raise ValueError(
                f"{self.path} holds another configuration's results ({changes}). Name another "
                "directory with --out, or delete this one."
            )


def write_atomically(path: pathlib.Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Calls `write(file)` on a file beside `path`, then renames it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
