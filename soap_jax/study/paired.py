"""A study's tidy tables, checked against its configuration, as arrays over paired seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, NoReturn

import numpy as np
import pandas as pd

from soap_jax.study import results, summary
from soap_jax.study.config import StudyConfig

KEYS = results.KEYS
RESULTS = ["steps", "diverged", "steps_to_target", "validation_loss", "validation_accuracy"]


class NotTestable(Exception):
    """Says in words why a study cannot test something."""


class Runs(NamedTuple):
    """The runs of one method at one period, over the grid of learning rates and the seeds.

    Attributes:
        name: the method.
        steps: `(rates, seeds)` to the target loss; of a censored run, those it trained for.
        censored: `(rates, seeds)` bool: never reached the target, or diverged.
        diverged: `(rates, seeds)` bool.
        accuracy: `(rates, seeds)` on validation data, at the end.
        loss: `(rates, seeds)` on validation data, at the end.
        tuned: index of the rate with the best validation accuracy (`summary.best_rate`); None if
            some run diverged at each.
    """

    name: str
    steps: np.ndarray
    censored: np.ndarray
    diverged: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray
    tuned: int | None


class Study:
    """Tidy tables, checked against their configuration and read as arrays over seeds.

    Args:
        config: the study's configuration.
        tables: the tables "runs" and "evaluations".

    Raises:
        ValueError: if a table lacks a column, holds a row twice, or has other runs than the
            configuration.
    """

    def __init__(self, config: StudyConfig, tables: Mapping[str, pd.DataFrame]):
        self.config = config
        expected = pd.MultiIndex.from_tuples(
            [
                (method, period, rate, seed)
                for method in config.methods
                for period in self.config.periods_of(method)
                for rate in config.learning_rates
                for seed in range(config.seeds)
            ],
            names=KEYS,
        )
        _check("runs", tables["runs"], RESULTS, KEYS, expected)
        _check("evaluations", tables["evaluations"], ["step"], [*KEYS, "step"], expected)
        self._tables = {
            name: dict(list(tables[name].sort_values(KEYS).groupby(KEYS[:2])))
            for name in ("runs", "evaluations")
        }

    def require(self) -> None:
        """Raises `NotTestable` for a study that no claim is about."""
        if self.config.optimizer != "sgd":
            raise NotTestable(
                f"the optimizer is {self.config.optimizer}: the claims are about SGD, since others "
                "change what a scale does (Adam cancels it)"
            )
        if self.config.seeds < 2:
            raise NotTestable("one seed has no spread: at least 2 are needed")

    def runs(self, method: str, period: int | None = None) -> Runs:
        """The runs of a method at a period, by default the smallest."""
        rows = self._rows("runs", method, period)
        shape = len(self.config.learning_rates), self.config.seeds
        grid = {name: rows[name].to_numpy(float).reshape(shape) for name in RESULTS}
        diverged = grid["diverged"] > 0
        censored = diverged | np.isnan(grid["steps_to_target"])
        best = summary.best_rate(rows)
        return Runs(
            name=method,
            steps=np.where(censored, grid["steps"], grid["steps_to_target"]),
            censored=censored,
            diverged=diverged,
            accuracy=grid["validation_accuracy"],
            loss=grid["validation_loss"],
            tuned=None if np.isnan(best) else self.config.learning_rates.index(best),
        )

    def shared_rate(self) -> int:
        """Index of the smallest rate at which every run of backprop reaches the target."""
        rate = summary.shared_rate(self._rows("runs", "bp", None))
        if np.isnan(rate):
            raise NotTestable(
                f"backprop reaches loss {self.config.target_loss:g} with every seed at no rate of "
                "the grid: train longer, or widen the rates"
            )
        return self.config.learning_rates.index(rate)

    def tuned_rate(self, runs: Runs, *, inside: bool = False) -> int:
        """Index of the rate at which a method's validation accuracy is best.

        Args:
            runs: the method's.
            inside: whether it must lie inside the grid.
        """
        last = len(self.config.learning_rates) - 1
        if runs.tuned is None:
            raise NotTestable(f"some run of {runs.name} diverged at every rate")
        if inside and runs.tuned in (0, last):
            rate = self.config.learning_rates[runs.tuned]
            raise NotTestable(
                f"the best rate of {runs.name}, {rate:g}, lies at the edge of the grid: a better "
                "one may lie beyond, so widen the learning rates"
                if last
                else "one learning rate leaves none to choose: more are needed"
            )
        return runs.tuned

    def measured(self, quantity: str, method: str, rate: int, *, end: bool) -> np.ndarray:
        """A column of "evaluations" before training or at its end, `(seeds,)`."""
        rows = self._rows("evaluations", method, None)
        if quantity not in rows:
            _lacks("evaluations", [quantity], rows)
        rows = rows[rows["learning_rate"] == self.config.learning_rates[rate]]
        step = rows["step"].max() if end else rows["step"].min()
        return rows.loc[rows["step"] == step, quantity].to_numpy(float)

    def _rows(self, table, method, period):
        if method not in self.config.methods:
            raise NotTestable(f"{method} is not in the study")
        period = min(self.config.periods_of(method)) if period is None else period
        if period not in self.config.periods_of(method):
            raise NotTestable(f"{method} with period {period} is not in the study")
        return self._tables[table][method, period]


def _check(name, table, columns, keys, expected):
    missing = [column for column in (*KEYS, *columns) if column not in table]
    if missing:
        _lacks(name, missing, table)
    twice = table[table.duplicated(keys)]
    if len(twice):
        row = ", ".join(f"{key} {value}" for key, value in twice.iloc[0][keys].items())
        raise ValueError(
            f'the table "{name}" holds more than one row for {row}; expected one. Results of '
            "several studies may have been mixed: run the study again into a new directory."
        )
    found = pd.MultiIndex.from_frame(table[KEYS].drop_duplicates())
    for said, runs in (
        ("lacks", expected.difference(found)),
        ("holds besides", found.difference(expected)),
    ):
        if len(runs):
            first = ", ".join(f"{k} {v}" for k, v in zip(KEYS, runs[0], strict=True))
            raise ValueError(
                f'the table "{name}" {said} {len(runs)} runs (the first: {first}); expected the '
                f"configuration's {len(expected)}, every method at every period, learning rate and "
                "seed. Finish the study (the same command continues it), or run it again into a "
                "new directory."
            )
    rows = table.groupby(KEYS).size()
    if rows.min() < rows.max():
        first = ", ".join(f"{k} {v}" for k, v in zip(KEYS, rows.idxmin(), strict=True))
        raise ValueError(
            f'the table "{name}" holds {rows.min()} rows for {first}; expected {rows.max()}, as '
            "for other runs. Run the study again into a new directory."
        )


def _lacks(name, columns, table) -> NoReturn:
    raise ValueError(
        f'the table "{name}" lacks the columns {", ".join(columns)}; it has '
        f"{', '.join(map(str, table.columns))}. If another version of soap_jax wrote it, run the "
        "study again into a new directory."
    )
