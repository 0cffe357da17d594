"""The directory that holds a comparison, while it runs and afterwards.

    study.json         the record: protocol, methods, claims, versions, device, duration
    runs               one row per run                      (.parquet and .csv)
    evaluations        one row per run and evaluation       (.parquet and .csv)
    losses             one row per run: every batch's loss  (.parquet)
    progress.json      while runs are missing: the later content of study.json
    parts/             while runs are missing: the new runs, several in each file
    params/            on request: each run's final params            (.npz)

Every file is written under a temporary name and then renamed, so that it is complete or absent. A
comparison that was stopped in any way resumes with the missing runs. Methods and seeds can be added
later; the rest of what runs depend on must not change.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd

import soap_jax
from soap_jax import trees
from soap_jax.study import environment, files, statistics

FORMAT = 3
"""The version of tables and files; it increases when older results can no longer be read."""
KEYS = ["method", "learning_rate", "seed", "period"]
"""The columns that identify a run; the period is 0 for methods without one."""
TABLES = ("runs", "evaluations", "losses")
DIVERGENCE_FACTOR = 2.0
"""The ratio of final to first training loss above which a run counts as diverged."""
UNCHANGEABLE = ("protocol", "versions", "device", "settings")
"""The parts of the record that must be the same for all runs of a comparison."""

Tables = dict[str, pd.DataFrame]


class Run(NamedTuple):
    """The identity of a run, in the order of `KEYS`."""

    method: str
    learning_rate: float
    seed: int
    period: int


class Store:
    """The directory that holds one comparison's results; lock it with `files.locked`.

    Args:
        path: the directory.

    Attributes:
        path: the directory.
        record: the record of the comparison in it; empty if there is none.
        finished: whether study.json exists and no newer runs are in progress.

    Raises:
        ValueError: if the directory holds something else, or a comparison of another format.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        found = (read_record(self.path / f"{name}.json", FORMAT) for name in ("progress", "study"))
        self.record: dict[str, Any] = next(filter(None, found), {})

    @property
    def finished(self) -> bool:
        """Whether all runs are in the tables."""
        return (self.path / "study.json").exists() and not (self.path / "progress.json").exists()

    def begin(self, record: Mapping[str, Any], runs: Collection[Run]) -> None:
        """Writes the record of the runs to come, unless all of them are stored already.

        Args:
            record: the record of the comparison.
            runs: all runs that the comparison asks for.

        Raises:
            ValueError: if stored runs had other settings, or their claims had other bounds; or if
                stored and new runs together would not be every method with every seed.
        """
        try:
            plain = json.dumps(record, default=lambda value: value.tolist())
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"the record cannot be stored as JSON ({error}); expected strings, numbers, "
                "lists and dicts."
            ) from error
        now: dict[str, Any] = json.loads(plain)
        before, there = self.record, self.done()
        if there and not before:
            raise ValueError(
                f"{self.path} holds runs, but not progress.json, the record of their settings. "
                "Name another directory as out, or delete this one."
            )
        if there:
            were, are = ({part: of[part] for part in UNCHANGEABLE} for of in (before, now))
            changes = environment.differences(_comparable(were), _comparable(are))
            for name, method in now["methods"].items():
                was = before["methods"].get(name, method)
                changes += [
                    f"the method {name}, {said}"
                    for said in environment.differences(
                        {"trains by": was["description"]}, {"trains by": method["description"]}
                    )
                ]
                if not changes and was.get("program") != method.get("program"):
                    changes.append(
                        f"the code of {name}: that of the task, the optimizer or the method"
                    )
            if now["claims"] and before["claims"] not in ([], now["claims"]):
                changes.append("the claims, whose bounds were written down before the first run")
            environment.refuse_changes(self.path, "runs", changes)
            now["methods"] = before["methods"] | now["methods"]
            now["seeds"] = sorted({*before["seeds"], *now["seeds"]})
            now["claims"] = before["claims"]  # later claims are exploratory
            mine = expected_runs(now)
            if foreign := there - mine:
                raise ValueError(
                    f"{self.path} holds {min(foreign)}, which is not a run of this comparison. "
                    "Delete its file in parts/; missing runs are then trained again."
                )
            if missing := mine - there.union(runs):
                raise ValueError(
                    f"{self.path} would lack {min(missing)} and {len(missing) - 1} other runs; "
                    "expected every method with every seed. Ask for all methods when you add "
                    "seeds, and for all seeds when you add methods."
                )
            if self.finished and mine == there:
                return
            now["seconds_before"] = before.get("seconds", 0) + before.get("seconds_before", 0)
        self.record = now
        files.write_json(self.path / "progress.json", now)

    def add(self, runs: Sequence[Run], results: Mapping[str, Any]) -> None:
        """Stores some runs: the results of `loops.scanned`, with a leading axis over runs."""
        flat = trees.named({name: part for name, part in results.items() if name != "params"})
        for i, run in enumerate(runs if "params" in results else ()):
            params = trees.named(results["params"])
            own: Any = {f"params/{name}": _storable(leaf[i]) for name, leaf in params.items()}
            files.write_atomically(self.params(run), functools.partial(np.savez, **own))
        facts = json.dumps([[list(run) for run in runs], sorted(flat)])
        name = hashlib.sha256(facts.encode()).hexdigest()[:16]
        path = self.path / "parts" / f"{runs[0].method}-{name}.npz"
        files.write_atomically(path, lambda file: np.savez(file, facts=np.array(facts), **flat))

    def params(self, run: Run) -> pathlib.Path:
        """The file with a run's final params, keyed by their paths."""
        return self.path / "params" / f"{'-'.join(map(str, run))}.npz"

    def done(self) -> set[Run]:
        """The stored runs, in the tables or in parts."""
        found = [run for runs, _ in self._parts() for run in runs]
        if (self.path / "study.json").exists():
            found += _runs(self._table("runs"))
        return set(found)

    def finish(self, complete: Callable[[Tables], tuple[Tables, dict[str, Any]]]) -> None:
        """Merges all parts into the tables, then writes study.json, which marks them as finished.

        Args:
            complete: `tables -> (tables, entries)`, which completes the tables and returns
                additional entries of the record.
        """
        pieces = [tidy(runs, results, self.record) for runs, results in self._parts()]
        if (self.path / "study.json").exists():
            pieces.append({name: self._table(name) for name in TABLES})
        order = {method: i for i, method in enumerate(self.record["methods"])}
        joined = {}
        for name in TABLES:
            table = pd.concat([piece[name] for piece in pieces], ignore_index=True)
            # If a process was killed here, some runs are in a table and in a part.
            joined[name] = table.drop_duplicates([*KEYS, *table.columns.intersection(["step"])])
        tables, facts = complete(joined)
        for name, table in tables.items():
            by = ["method", "period", "learning_rate", "seed"]
            by += table.columns.intersection(["step"]).tolist()
            table = table.sort_values(
                by, key=lambda column: column.map(order) if column.name == "method" else column
            ).reset_index(drop=True)
            write_table(self.path / name, table)
        self.record |= facts
        files.write_json(self.path / "study.json", self.record)
        shutil.rmtree(self.path / "parts", ignore_errors=True)
        (self.path / "progress.json").unlink(missing_ok=True)

    def read(self) -> Tables:
        """Reads the tables.

        Raises:
            ValueError: if runs are missing, a table cannot be read, or it holds other runs.
        """
        if not self.record:
            raise ValueError(
                f"{self.path} holds no comparison: there is neither study.json nor progress.json. "
                "Name the directory that was given as out."
            )
        if not self.finished:
            raise ValueError(
                f"{self.path} holds {len(self.done())} runs: the comparison is not finished. "
                "Repeat the same command or call to resume it."
            )
        tables, mine = {name: self._table(name) for name in TABLES}, expected_runs(self.record)
        for name, each in zip(
            TABLES, (1, self.record["protocol"]["evaluations"] + 1, 1), strict=True
        ):
            found = tables[name].groupby(KEYS).size().to_dict()
            if wrong := dict.fromkeys(mine, each).items() ^ found.items():
                raise ValueError(
                    f"{self.path / name}.parquet holds {len(found)} runs; expected "
                    f"{len(mine)} as in the record, with {each} rows each: every method at every "
                    f"period, learning rate and seed (see {Run(*min(wrong)[0])}). Run the "
                    "comparison again, into another directory."
                )
        return tables

    def _table(self, name):
        file = self.path / f"{name}.parquet"
        try:
            table = pd.read_parquet(file, page_checksum_verification=True)
            missing = [column for column in KEYS if column not in table]
            if missing:
                raise ValueError(f"it lacks the columns {', '.join(missing)}")
        except Exception as error:  # PyArrow raises errors of many types
            raise ValueError(
                f"{file} cannot be read ({error}). Run the comparison again, into another "
                "directory."
            ) from error
        return table

    def _parts(self) -> Iterator[tuple[list[Run], dict[str, Any]]]:
        for file in sorted((self.path / "parts").glob("*.npz")):
            try:
                with file.open("rb") as opened, np.load(opened) as arrays:
                    flat = dict(arrays)
                names, columns = json.loads(str(flat.pop("facts")))
                if sorted(flat) != columns:
                    raise ValueError(f"expected the arrays {', '.join(columns)}")
                runs = [Run(*run) for run in names]
                results: dict[str, Any] = {"evaluations": {}, "test": {}}
                for name, leaf in flat.items():
                    part, _, column = name.partition("/")
                    if column:
                        results[part][column] = leaf
                    else:
                        results[part] = leaf
                if {len(runs)} != {len(leaf) for leaf in jax.tree.leaves(results)}:
                    raise ValueError("its arrays differ in length")
            except Exception as error:  # NumPy raises errors of many types
                raise ValueError(
                    f"{file} is damaged ({error!r}). Delete it; its runs are then trained again."
                ) from error
            yield runs, results


def read_record(
    file: pathlib.Path,
    version: int,
    what: str = "a comparison",
    check: Callable[[dict[str, Any]], Any] = dict,
) -> dict[str, Any] | None:
    """Reads a record; None if it is not there.

    Args:
        file: a file that `files.write_json` wrote.
        version: the format that it must have.
        what: the kind of record, for error messages.
        check: a function that raises if its argument is not a valid record.

    Raises:
        ValueError: if the file is not a valid record, or has another format.
    """
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text())
        found, made_by = record.get("format", 1), record["versions"]["soap_jax"]
        if found == version:
            check(record)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is not the record of {what} ({error!r}). Name another directory as out, or "
            "delete this one."
        ) from error
    if found != version:
        raise ValueError(
            f"{file.parent} holds {what} of format {found}, made by soap_jax {made_by}; this is "
            f"soap_jax {soap_jax.__version__}, which reads format {version}. Use that version, or "
            "run it again into another directory."
        )
    return record


def write_table(path: pathlib.Path, table: pd.DataFrame) -> None:
    """Writes a table as Parquet, and as CSV except for the losses."""
    content = table.to_parquet(None, index=False, write_page_checksum=True)
    files.write_atomically(path.with_suffix(".parquet"), lambda file: file.write(content))
    if path.name != "losses":  # each row holds a list of all steps
        files.write_text(path.with_suffix(".csv"), table.to_csv(index=False))


def _storable(leaf) -> np.ndarray:
    """An array that NumPy can store: bfloat16 and similar types become float32."""
    return np.asarray(leaf, np.float32) if leaf.dtype.kind == "V" else leaf


def _runs(table) -> list[Run]:
    """The runs in a table."""
    return [Run(*row) for row in table[KEYS].itertuples(index=False, name=None)]


def _comparable(record):
    """A record without entries that do not influence results.

    On CPU results are the same for any number of devices from two on.
    """
    device = record["device"]
    if device.get("platform") != "cpu":
        return record
    rest = {name: value for name, value in device.items() if name not in ("count", "processes")}
    several = "several" if device.get("count") != 1 else 1  # XLA compiles differently for one
    return record | {"device": rest | {"count": several}}


def expected_runs(record: Mapping[str, Any]) -> set[Run]:
    """The runs of every method with every seed, at every learning rate and period."""
    return {
        Run(name, rate, seed, period)
        for name, method in record["methods"].items()
        for rate in (*record["protocol"]["learning_rates"], *record["extended"])
        for seed in record["seeds"]
        for period in method["periods"]
    }


def tidy(runs: Sequence[Run], results: Mapping[str, Any], record: Mapping[str, Any]) -> Tables:
    """Turns the results of some runs into rows of the three tables.

    A run is `diverged` if some loss was not finite (its values are NaN from the next evaluation
    on), or if its final smoothed training loss is above `DIVERGENCE_FACTOR` times its first loss.

    Args:
        runs: the runs.
        results: the results of `loops.scanned`, with a leading axis over runs.
        record: the record of the comparison.
    """
    losses, evaluations = (
        np.asarray(results["train_loss"], np.float32),
        record["protocol"]["evaluations"],
    )
    num, steps = losses.shape
    every = steps // evaluations
    whole = np.isfinite(losses).reshape(num, evaluations, every).all(axis=2)
    alive = np.logical_and.accumulate(np.insert(whole, 0, True, axis=1), axis=1)  # when measured
    losses = np.where(np.repeat(alive[:, :-1], every, axis=1), losses, np.float32("nan"))
    smooth = statistics.smooth(losses, record["window"])
    names = pd.DataFrame(runs, columns=KEYS)
    columns = sorted(results["evaluations"], key=lambda name: "/" in name)  # measures come last
    lost = np.float64("nan")  # a float64, so that all columns become float64
    measured = {k: np.where(alive, results["evaluations"][k], lost) for k in columns}
    final = {name: values[:, -1] for name, values in measured.items() if "/" not in name}
    final |= {f"test_{k}": np.where(alive[:, -1], v, lost) for k, v in results["test"].items()}
    finite = np.isfinite(losses).all(axis=1)
    for name in ("validation_loss", "test_loss"):
        finite &= np.isfinite(final.get(name, 0.0))
    with np.errstate(invalid="ignore"):
        diverged = ~(finite & (smooth[:, -1] <= DIVERGENCE_FACTOR * losses[:, 0]))
    target = record["protocol"]["target_loss"]
    table = names.assign(
        steps=steps,
        diverged=diverged,
        steps_to_target=np.nan if target is None else statistics.steps_to_loss(smooth, target, 1),
        train_loss=smooth[:, -1],
        **final,
    )
    at = np.arange(evaluations + 1) * every
    before = np.insert(smooth, 0, np.nan, axis=1)
    rows = (
        names.loc[names.index.repeat(len(at))]
        .reset_index(drop=True)
        .assign(
            step=np.tile(at, num),
            train_loss=before[:, at].reshape(-1),
            **{name: values.reshape(-1) for name, values in measured.items()},
        )
    )
    return {"runs": table, "evaluations": rows, "losses": names.assign(train_loss=list(losses))}
