"""The results of a comparison of methods: tables, the record, and estimates from them.

A method's learning rate is chosen on validation data, or on the training loss if there are none;
its metrics are then those of the test data. Steps to the target loss are compared seed by seed, at
one rate that all methods share or with each method at its own best rate.
"""

from __future__ import annotations

import collections
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd

from soap_jax.study import statistics, store
from soap_jax.study.statistics import Estimate, Runs
from soap_jax.study.store import KEYS, TABLES

ORDER = ["learning_rate", "seed", "step"]
Periods = tuple[int | None, int | None]
"""The periods of the two methods of a pair; None is a method's smallest."""


class NotTestable(ValueError):
    """The reason, as text, why a comparison cannot answer a question."""


class PairedDifference(NamedTuple):
    """The difference between two methods, over paired seeds.

    Attributes:
        mean: the mean of the log ratios of steps, or of the differences in a metric.
        rates: the learning rates of both methods.
        censored: for each method `(seeds,)` bool, the runs whose values are only bounds.
        note: remarks on censored runs and on rates at the edge of the grid, or "".
    """

    mean: statistics.Mean
    rates: tuple[float, float]
    censored: tuple[np.ndarray, np.ndarray]
    note: str


def backprop_note(record: Mapping[str, Any]) -> str:
    """A sentence on kernels that methods with feedback train by backprop, or ""."""
    names = record.get("backprop_kernels", ())  # older records lack both entries
    if not names or not any(method.get("has_feedback") for method in record["methods"].values()):
        return ""
    return (
        f"Errors pass through {', '.join(names)} by exact backprop, also in methods with feedback: "
        "soap_jax.explain says why."
    )


class Results:
    """The tables and the record of a comparison, with estimates from them.

    Args:
        record: the record of the comparison, the content of study.json.
        tables: the tables "runs", "evaluations" and "losses".
        path: the directory of the results, if there is one.
        target_loss: a loss to which steps are counted, instead of the study's target loss.

    Attributes:
        runs: a table with a row for each run.
        evaluations: a table with a row for each evaluation of each run; measures are columns
            NAME/PATH.
        losses: a table with a row for each run, which has the loss of every batch in a list.
        target_loss: the loss to which steps are counted. If none was given, it is the smallest
            smoothed training loss that every seed of the reference reaches, at its best rate,
            within an eighth of the steps; NaN if that is not below 0.9 of the loss at the start.
        shared_rate: the smallest rate at which every run of the reference reaches the target within
            half the steps. At a small rate the steps measure how fast a method learns, rather than
            how stable it is. If there is no reference, the condition is on the runs of all methods.
            NaN if there is no such rate.
        why: the reason why there is no target loss or shared rate, or "".
        exploratory: whether `target_loss` differs from the study's own target loss.
    """

    def __init__(
        self,
        record: Mapping[str, Any],
        tables: Mapping[str, pd.DataFrame],
        path: pathlib.Path | None = None,
        *,
        target_loss: float | None = None,
    ):
        self.record, self.path = dict(record), path and path.absolute()
        self.protocol: dict[str, Any] = self.record["protocol"]
        self.methods: dict[str, dict[str, Any]] = self.record["methods"]
        self.kernels: list[str] = list(self.record["kernels"])
        self.hidden = self.kernels[:-1]
        self.extended: list[float] = self.record["extended"]
        self.rates = tuple(sorted([*self.protocol["learning_rates"], *self.extended]))
        self.seeds: tuple[int, ...] = tuple(self.record["seeds"])
        self.runs, self.evaluations, self.losses = (
            tables[name].sort_values([c for c in ORDER if c in tables[name]], kind="stable")
            for name in TABLES
        )
        named = collections.Counter(method["reference"] for method in self.methods.values())
        most = named.most_common(1)[0][0]
        self.reference: str | None = most if most in self.methods else None
        self.why = ""
        own = self.protocol["target_loss"]
        own = self._target() if own is None else own
        self.target_loss: float = own if target_loss is None else target_loss
        self.exploratory = target_loss is not None and target_loss != own
        if self.exploratory or self.protocol["target_loss"] is None:
            losses = _loss_array(self.losses)
            steps = statistics.steps_to_loss(losses, self.target_loss, self.record["window"])
            counted = self.losses[KEYS].assign(steps_to_target=steps)
            self.runs = self.runs.drop(columns="steps_to_target").merge(counted, on=KEYS)
        self.shared_rate = self._shared()

    def at_target(self, loss: float) -> Self:
        """The same runs with steps counted to another loss; findings on them are exploratory.

        Raises:
            ValueError: if the loss is not a positive number.
        """
        if not 0 < loss < math.inf:
            raise ValueError(f"target_loss is {loss}; expected a positive number.")
        tables = {name: getattr(self, name) for name in TABLES}
        return type(self)(self.record, tables, self.path, target_loss=loss)

    # The study

    def label(self, method: str) -> str:
        """A method's name in tables and figures; its key if it is not among the methods."""
        return self.methods.get(method, {}).get("label", method)

    @functools.cached_property
    def metrics(self) -> list[str]:
        """The columns of final results: of test data, else validation data, else the training loss.

        The metric that chose the learning rates comes first.
        """
        columns = [
            name for name in map(str, self.runs) if name.startswith(("test_", "validation_"))
        ]
        tests = [name for name in columns if name.startswith("test_")]
        chosen = self.protocol["select"].split("_", 1)[1]
        found = tests or columns or ["train_loss"]
        return sorted(found, key=lambda name: not name.endswith(f"_{chosen}"))

    def improvement_sign(self, metric: str) -> int:
        """1 if a larger value of a metric is better, -1 if a smaller one, 0 if unknown."""
        if metric.split("_", 1)[-1] == self.protocol["select"].split("_", 1)[-1]:
            return 1 if self.protocol["maximise"] else -1
        return -1 if metric.endswith("_loss") else 0

    def different_starts(self, *methods: str) -> str:
        """A note if methods start from different params, or ""."""
        starts = {self.methods.get(method, {}).get("init") or None for method in methods}
        return "the methods start from different weights" if len(starts) > 1 else ""

    def at_smallest_periods(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows of a table with each method's smallest period."""
        smallest = {method: min(of["periods"]) for method, of in self.methods.items()}
        return table[table["period"] == table["method"].map(smallest)]

    def rows(
        self, table: str, method: str, rate: float | None = None, period: int | None = None
    ) -> pd.DataFrame:
        """The rows of a method, sorted by learning rate, seed and step.

        Args:
            table: "runs", "evaluations" or "losses".
            method: the method's name.
            rate: the learning rate; None for all rates.
            period: the period; by default the method's smallest.

        Raises:
            NotTestable: if the method, or its period, is not in the study.
        """
        if method not in self.methods:
            raise NotTestable(f"{method} is not in the study")
        periods = self.methods[method]["periods"]
        period = min(periods) if period is None else period
        if period not in periods:
            raise NotTestable(f"{method} with period {period} is not in the study")
        rows = getattr(self, table)
        chosen = (rows["method"] == method) & (rows["period"] == period)
        return rows[chosen if rate is None else chosen & (rows["learning_rate"] == rate)]

    def measured(self, column: str, method: str, rate: float, *, end: bool) -> np.ndarray:
        """A column of "evaluations" at the start or end of training, `(seeds,)`; NaN if absent."""
        rows = self.rows("evaluations", method, rate)
        rows = rows.drop_duplicates("seed", keep="last" if end else "first").set_index("seed")
        return rows.reindex(index=self.seeds, columns=[column])[column].to_numpy(float)

    def grid(self, method: str, period: int | None = None, metric: str | None = None) -> Runs:
        """The runs of a method as arrays over learning rates and seeds.

        Args:
            method: the method's name.
            period: the period; by default its smallest.
            metric: the column of "runs" to take; by default the logarithm of steps to the target
                loss.
        """
        rows = self.rows("runs", method, None, period)
        if metric and metric not in rows:
            known = ", ".join(map(str, rows))
            raise NotTestable(f"metric is {metric!r}; expected a column of runs: {known}.")
        data = "validation_loss" if "validation_loss" in rows else "train_loss"
        columns = metric or "steps_to_target", "diverged", self.protocol["select"], data
        shape = len(self.rates), len(self.seeds)
        values, diverged, score, loss = (rows[c].to_numpy(float).reshape(shape) for c in columns)
        censored = (diverged > 0) | np.isnan(values)
        if metric is None:
            values = np.log(np.where(censored, self.protocol["steps"], values))
        score = score if self.protocol["maximise"] else -score
        return Runs(values, censored, diverged > 0, score, loss)

    def log_steps_at(
        self, methods: Sequence[str], at: str | float = "shared"
    ) -> tuple[float, np.ndarray, np.ndarray, list[str]]:
        """The log steps of several methods at one learning rate.

        Returns:
            The rate, log steps `(methods, seeds)`, censored `(methods, seeds)` bool, and notes.

        Raises:
            NotTestable: if there is no such method or rate, or the methods start from different
                params.
        """
        grids = [self.grid(method) for method in methods]
        if starts := self.different_starts(*methods):
            raise NotTestable(starts)
        rate = self.rate(methods[0], at)
        i = self.rates.index(rate)
        logs, flags = (
            np.stack([of[i] for of in part]) for part in list(zip(*grids, strict=True))[:2]
        )
        return rate, logs, flags, [self.censored_note(method, rate) for method in methods]

    # Learning rates

    def rate(self, method: str, at: str | float, period: int | None = None) -> float:
        """The learning rate for `at`: "shared", "best" or a rate.

        Raises:
            NotTestable: if there is no such rate.
        """
        if at == "shared":
            if math.isnan(self.shared_rate):
                raise NotTestable(self.why)
            return self.shared_rate
        if at == "best":
            if math.isnan(best := self.best_rate(method, period)):
                raise NotTestable(f"some run of {method} diverged at every rate")
            return best
        if at not in self.rates:
            rates = ", ".join(f"{rate:g}" for rate in self.rates)
            raise NotTestable(f'at is {at!r}; expected "shared", "best" or one of {rates}.')
        return float(at)

    def best_rate(self, method: str, period: int | None = None) -> float:
        """The rate with the best mean score; NaN if some run diverged at every rate."""
        tuned = self.grid(method, period, self.protocol["select"]).best_rate_index
        return math.nan if tuned is None else self.rates[tuned]

    def at_edge(self, rate: float) -> bool:
        """Whether a rate is the first or last of the grid, so that a better one may lie outside."""
        return len(self.rates) > 1 and rate in (self.rates[0], self.rates[-1])

    # Estimates

    def ratio(
        self, a: str, b: str, *, at: str | float = "shared", periods: Periods = (None, None)
    ) -> Estimate:
        """Steps to the target loss of one method over those of another, seed by seed.

        Args:
            a: the numerator.
            b: the denominator.
            at: "shared", the rate that all methods share; "best", each method's own best rate; or
                a rate.
            periods: the periods of both methods; None is the smallest.

        Returns:
            The geometric mean of the ratios with its interval. Its note reports censored runs and
            rates at the edge of the grid.

        Raises:
            NotTestable: if there is no such method or rate.
        """
        found = self.paired_difference(a, b, at=at, periods=periods)
        return Estimate(*found.mean.judge_ratio()[:3], found.note)

    def paired_difference(
        self,
        a: str,
        b: str,
        *,
        at: str | float = "shared",
        periods: Periods = (None, None),
        metric: str | None = None,
    ) -> PairedDifference:
        """The log ratios of steps behind `ratio`; with a metric, the differences in it."""
        pairs = list(zip((a, b), periods, strict=True))
        runs, reference_runs = (self.grid(method, period, metric) for method, period in pairs)
        rates = [self.rate(method, at, period) for method, period in pairs]
        i, j = map(self.rates.index, rates)
        if at == "best":
            mean = statistics.bootstrap_t(runs, reference_runs)
        else:
            mean = statistics.student(runs.values[i] - reference_runs.values[j])
        censored = runs.censored[i], reference_runs.censored[j]
        if metric and np.any(censored):
            raise NotTestable(f"{metric} of {a} or {b} is not known for every seed")
        mean = statistics.censor(mean, *censored)
        places = dict.fromkeys((*pair, rate) for pair, rate in zip(pairs, rates, strict=True))
        missing = [self.censored_note(method, rate, period) for method, period, rate in places]
        edges = [
            f"the best rate of {method}, {rate:g}, lies at the edge of the grid"
            for method, _, rate in places
            if at == "best" and self.at_edge(rate)
        ]
        note = joined(_open_ends(mean, censored, joined(*missing)), *edges)
        return PairedDifference(mean, (rates[0], rates[1]), censored, note)

    def censored_note(self, method: str, rate: float, period: int | None = None) -> str:
        """The number of censored runs of a method at a rate, as text; "" if there are none."""
        runs = self.rows("runs", method, rate, period)
        diverged = int(runs["diverged"].sum())
        censored = int((runs["diverged"] | runs["steps_to_target"].isna()).sum())
        what = "never reached the target" if censored > diverged else "diverged"
        also = f" ({diverged} of them diverged)" if 0 < diverged < censored else ""
        return f"{censored} of {len(runs)} runs of {method} {what}{also}" if censored else ""

    def summary(self) -> pd.DataFrame:
        """One row per method and period.

        The columns are:

        - `method` and `period`;
        - `best_rate` and `best_rate_at_edge` (a better rate may lie outside the grid);
        - each of `metrics` at the best rate, with `_low` and `_high`;
        - `shared_rate`, and `steps_to_target` at it (geometric mean);
        - `ratio`, of these steps to those of the method's reference, with `_low` and `_high`. They
          are 0 and inf on the sides that censored runs leave open;
        - `censored`, the number of the method's runs at the shared rate that diverged or never
          reached the target. They count with all their steps, and make the ratio a bound;
        - `fewest_steps`, the smallest geometric mean at any rate where every run reaches the
          target, and `fastest_rate`, this rate;
        - `diverged` and `runs`, the numbers of diverged runs and of all runs.
        """
        rows: list[dict[str, Any]] = []
        for method, period in ((m, p) for m, of in self.methods.items() for p in of["periods"]):
            best, runs = self.best_rate(method, period), self.grid(method, period)
            row = {"method": method, "period": period, "best_rate": best}
            row["best_rate_at_edge"] = self.at_edge(best)
            at_best = self.rows("runs", method, best, period)
            for metric in self.metrics:
                mean = statistics.student(at_best[metric])
                row |= _with_ends(metric, mean.estimate, *mean.interval)
            row |= {"shared_rate": self.shared_rate, "steps_to_target": math.nan}
            row |= _with_ends("ratio", *[math.nan] * 3) | {"censored": 0}
            means = np.exp(runs.values.mean(axis=1))
            if not math.isnan(self.shared_rate):
                here = self.rates.index(self.shared_rate)
                row["steps_to_target"] = float(means[here])
                row["censored"] = int(runs.censored[here].sum())
                reference = self.methods[method]["reference"]
                if reference in self.methods and reference != method:
                    found = self.ratio(method, reference, periods=(period, None))
                    row |= _with_ends("ratio", found.value, found.low, found.high)
            fastest = np.where(runs.censored.any(axis=1), np.inf, means).argmin()
            arrived = not runs.censored[fastest].any()
            row["fewest_steps"] = float(means[fastest]) if arrived else math.nan
            row["fastest_rate"] = self.rates[fastest] if arrived else math.nan
            rows.append(row | {"diverged": int(runs.diverged.sum()), "runs": runs.diverged.size})
        return pd.DataFrame(rows)

    def params(
        self, method: str, rate: float, seed: int, period: int | None = None
    ) -> dict[str, np.ndarray]:
        """A run's final params by their paths, stored by `compare(keep_params=True)`."""
        period = min(self.methods[method]["periods"]) if period is None else period
        if self.path is None:
            raise ValueError(
                "the comparison has no directory with params; expected compare(..., out=..., "
                "keep_params=True)."
            )
        run = store.Run(method, rate, seed, period)
        with np.load(store.Store(self.path).params(run)) as arrays:
            return {name.removeprefix("params/"): leaf for name, leaf in arrays.items()}

    # Private

    def _reference_methods(self):
        """The methods that set the target loss and the shared rate."""
        return [self.reference] if self.reference else list(self.methods)

    def _target(self):
        own = [rate not in self.extended for rate in self.rates]
        reached, starts = [], []
        for method in self._reference_methods():
            runs = Runs(*(of[own] for of in self.grid(method, metric=self.protocol["select"])))
            if runs.best_rate_index is None:
                self.why = f"some run of {method} diverged at every rate"
                return math.nan
            rate = np.array(self.rates)[own][runs.best_rate_index]
            losses = _loss_array(self.rows("losses", method, rate))
            early = statistics.smooth(losses, self.record["window"])
            reached.append(early[:, : max(1, self.protocol["steps"] // 8)].min(axis=1).max())
            starts.append(losses[:, 0].mean())
        if max(reached) < 0.9 * min(starts):
            return float(max(reached))
        self.why = (
            "the reference does not reach 0.9 of its initial loss within an eighth of the steps "
            "with every seed: train longer"
        )
        return math.nan

    def _shared(self):
        rows = self.at_smallest_periods(self.runs)
        rows = rows[rows["method"].isin(self._reference_methods())]
        rows = rows[~rows["learning_rate"].isin(self.extended)]
        arrived = ~rows["diverged"] & (2 * rows["steps_to_target"] <= self.protocol["steps"])
        reached = arrived.groupby(rows["learning_rate"]).all()
        if reached.any():
            return float(reached.idxmax())
        who = self.label(self.reference) if self.reference else "every method"
        self.why = self.why or (
            f"at no rate of the grid do all runs of {who} reach loss "
            f"{statistics.format_number(self.target_loss)} within half the steps: train longer, or "
            "use a wider grid of rates"
        )
        return math.nan


def joined(*notes: str) -> str:
    """Notes in one line, without empty ones."""
    return "; ".join(filter(None, notes))


def _open_ends(mean, censored, missing):
    """A note on why an interval is open, since runs are censored or seeds too few; "" if it is not.

    `missing` is the note on censored runs at the rates themselves.
    """
    if not np.isinf(mean.interval).any():
        return ""
    bound = "a lower bound" if mean.has_low else "an upper bound"
    bound = bound if mean.has_low or mean.has_high else "neither a lower nor an upper bound"
    if any(map(statistics.too_many, censored)):
        bound = "more than a tenth of a method's runs are censored, so there is no conclusion"
    elif not missing and mean.too_few:
        return "too few seeds for an interval at best rates: use more"
    return f"{bound}: {missing or 'there are censored runs at rates that the bootstrap chose'}"


def _loss_array(losses):
    """The losses as an array `(runs, steps)`."""
    return np.array(losses["train_loss"].tolist(), float)


def _with_ends(name, *numbers):
    return dict(zip((name, f"{name}_low", f"{name}_high"), numbers, strict=True))
