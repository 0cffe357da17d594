"""The directory that holds a comparison, while it runs and after.

    study.json         the record: protocol, methods, claims, versions, device, duration
    runs               one row per run                      (.parquet and .csv)
    evaluations        one row per run and evaluation       (.parquet and .csv)
    losses             one row per run: every batch's loss  (.parquet)
    progress.json      while runs are missing: what study.json will say
    parts/             while runs are missing: those that are done since, some in each file
    params/            if asked for: each run's final params                  (.npz)

Everything is written under another name first and then renamed, so a file is whole or absent. A
comparison that is stopped, however it is, goes on with the runs that are missing. Methods and seeds
may be added later; what else a run depends on may not change.
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
from soap_jax.study import circumstances, files, statistics

FORMAT = 3
"""The version of tables and files; it grows when older results cannot be read any more."""
KEYS = ["method", "learning_rate", "seed", "period"]
"""The columns that name a run; the period is 0 where none says how often feedback changes."""
TABLES = ("runs", "evaluations", "losses")
DIVERGED = 2.0
"""A run whose training loss ends above so many times its first one counts as diverged."""
SAME = ("protocol", "versions", "device", "settings")
"""What may not change between runs of one comparison."""

Tables = dict[str, pd.DataFrame]


class Run(NamedTuple):
    """What names a run, in the order of `KEYS`."""

    method: str
    learning_rate: float
    seed: int
    period: int


class Store:
    """The directory that holds one comparison's results; hold it with `files.locked`.

    Args:
        path: where.

    Attributes:
        path: where.
        record: what is known of what is there; empty if nothing is.
        finished: whether study.json is there and nothing newer is under way.

    Raises:
        ValueError: if what is there is no comparison, or one of another format.
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
        """Notes how the runs to come are done, beside those that are there, if any are missing.

        Args:
            record: of the comparison.
            runs: all that it asks for.

        Raises:
            ValueError: if runs are there that were done otherwise, or whose claims had other
                bounds, or if these and those would not be every method with every seed.
        """
        try:
            plain = json.dumps(record, default=lambda value: value.tolist())
        except (AttributeError, TypeError) as error:
            raise ValueError(f"the record is not what JSON can hold: {error}.") from error
        now: dict[str, Any] = json.loads(plain)
        before, there = self.record, self.done()
        if there and not before:
            raise ValueError(
                f"{self.path} holds runs, but not progress.json, which says how they were done. "
                "Name another directory as out, or delete this one."
            )
        if there:
            were, are = ({part: of[part] for part in SAME} for of in (before, now))
            differ = circumstances.differences(_comparable(were), _comparable(are))
            for name, method in now["methods"].items():
                was = before["methods"].get(name, method)
                differ += [
                    f"the method {name}, {said}"
                    for said in circumstances.differences(
                        {"trains by": was["description"]}, {"trains by": method["description"]}
                    )
                ]
                if not differ and was.get("program") != method.get("program"):
                    differ.append(f"the code of {name}: the task's, the optimizer's or its own")
            if now["claims"] and before["claims"] not in ([], now["claims"]):
                differ.append("the claims, whose bounds were written down before the first run")
            circumstances.refuse(self.path, "runs that were", differ)
            now["methods"] = before["methods"] | now["methods"]
            now["seeds"] = sorted({*before["seeds"], *now["seeds"]})
            now["claims"] = before["claims"]  # what is claimed after the first run is exploratory
            mine = expected(now)
            if foreign := there - mine:
                raise ValueError(
                    f"{self.path} holds {min(foreign)}, which is no run of this comparison. Delete "
                    "the part of it, and what is missing then is done again."
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
        """Keeps some runs: what `loops.scanned` gave, with a leading axis of the runs."""
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
        """The file with a run's final params, by their paths."""
        return self.path / "params" / f"{'-'.join(map(str, run))}.npz"

    def done(self) -> set[Run]:
        """The runs that are there, in the tables or in parts."""
        found = [run for runs, _ in self._parts() for run in runs]
        if (self.path / "study.json").exists():
            found += _runs(self._table("runs"))
        return set(found)

    def finish(self, complete: Callable[[Tables], tuple[Tables, dict[str, Any]]]) -> None:
        """Puts all parts into the tables, then writes the record, which makes them results.

        Args:
            complete: from the tables to the same, completed, and to what else the record shall say.
        """
        pieces = [tidy(runs, results, self.record) for runs, results in self._parts()]
        if (self.path / "study.json").exists():
            pieces.append({name: self._table(name) for name in TABLES})
        order = {method: i for i, method in enumerate(self.record["methods"])}
        joined = {}
        for name in TABLES:
            table = pd.concat([piece[name] for piece in pieces], ignore_index=True)
            # A process that was killed here has left what is in a table in its part, too.
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
            ValueError: if runs are missing, or a table cannot be read or is of other runs.
        """
        if not self.record:
            raise ValueError(
                f"{self.path} holds no comparison: neither study.json nor progress.json is there. "
                "Name the directory that was given as out."
            )
        if not self.finished:
            raise ValueError(
                f"{self.path} holds {len(self.done())} runs: the comparison is not finished. The "
                "same command or call goes on where it stopped."
            )
        tables, mine = {name: self._table(name) for name in TABLES}, expected(self.record)
        for name, each in zip(
            TABLES, (1, self.record["protocol"]["evaluations"] + 1, 1), strict=True
        ):
            found = tables[name].groupby(KEYS).size().to_dict()
            if wrong := dict.fromkeys(mine, each).items() ^ found.items():
                raise ValueError(
                    f"{self.path / name}.parquet holds {len(found)} runs; expected the record's "
                    f"{len(mine)}, each {each} times: every method at every period, learning rate "
                    f"and seed (see {Run(*min(wrong)[0])}). Run the comparison again, into another "
                    "directory."
                )
        return tables

    def _table(self, name):
        file = self.path / f"{name}.parquet"
        try:
            table = pd.read_parquet(file, page_checksum_verification=True)
            missing = [column for column in KEYS if column not in table]
            if missing:
                raise ValueError(f"it lacks the columns {', '.join(missing)}")
        except Exception as error:  # PyArrow, too, raises what not
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
                    raise ValueError(f"it has not {', '.join(columns)}")
                runs = [Run(*run) for run in names]
                results: dict[str, Any] = {"evaluations": {}, "test": {}}
                for name, leaf in flat.items():
                    part, _, column = name.partition("/")
                    if column:
                        results[part][column] = leaf
                    else:
                        results[part] = leaf
                if {len(runs)} != {len(leaf) for leaf in jax.tree.leaves(results)}:
                    raise ValueError("its arrays are not of one length")
            except Exception as error:  # NumPy raises what not
                raise ValueError(
                    f"{file} is damaged ({error!r}). Delete it, and its runs are done again."
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
        file: as `files.write_json` wrote it.
        version: the format that it must have.
        what: it records.
        check: raises for what is none.

    Raises:
        ValueError: if it is no such record, or has another format.
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
    """Writes a table as Parquet, and as CSV unless its rows hold lists."""
    content = table.to_parquet(None, index=False, write_page_checksum=True)
    files.write_atomically(path.with_suffix(".parquet"), lambda file: file.write(content))
    if path.name != "losses":  # a row is as long as a run
        files.write_text(path.with_suffix(".csv"), table.to_csv(index=False))


def _storable(leaf) -> np.ndarray:
    """An array of a type that NumPy's files know: bfloat16 and the like as float32."""
    return np.asarray(leaf, np.float32) if leaf.dtype.kind == "V" else leaf


def _runs(table) -> list[Run]:
    """The runs of a table of them."""
    return [Run(*row) for row in table[KEYS].itertuples(index=False, name=None)]


def _comparable(record):
    """A record without what does not bear on results: CPU runs are alike on two devices or more."""
    device = record["device"]
    if device.get("platform") != "cpu":
        return record
    rest = {name: value for name, value in device.items() if name not in ("count", "processes")}
    several = "several" if device.get("count") != 1 else 1  # XLA compiles otherwise for one
    return record | {"device": rest | {"count": several}}


def expected(record: Mapping[str, Any]) -> set[Run]:
    """Every method with every seed, at every learning rate and period."""
    return {
        Run(name, rate, seed, period)
        for name, method in record["methods"].items()
        for rate in (*record["protocol"]["learning_rates"], *record["extended"])
        for seed in record["seeds"]
        for period in method["periods"]
    }


def tidy(runs: Sequence[Run], results: Mapping[str, Any], record: Mapping[str, Any]) -> Tables:
    """Turns the results of some runs into rows of the three tables.

    A run is `diverged` if any loss was not finite (from the next measurement on all is NaN) or if
    its smoothed training loss ends above `DIVERGED` times its first value.

    Args:
        runs: which.
        results: as `loops.scanned` gives them, with a leading axis of the runs.
        record: of the comparison.
    """
    losses, marks = np.asarray(results["train_loss"], np.float32), record["protocol"]["evaluations"]
    num, steps = losses.shape
    every = steps // marks
    whole = np.isfinite(losses).reshape(num, marks, every).all(axis=2)
    alive = np.logical_and.accumulate(np.insert(whole, 0, True, axis=1), axis=1)  # when measured
    losses = np.where(np.repeat(alive[:, :-1], every, axis=1), losses, np.float32("nan"))
    smooth = statistics.smooth(losses, record["window"])
    names = pd.DataFrame(runs, columns=KEYS)
    columns = sorted(results["evaluations"], key=lambda name: "/" in name)  # measures come last
    lost = np.float64("nan")  # makes float64 of all
    measured = {k: np.where(alive, results["evaluations"][k], lost) for k in columns}
    final = {name: values[:, -1] for name, values in measured.items() if "/" not in name}
    final |= {f"test_{k}": np.where(alive[:, -1], v, lost) for k, v in results["test"].items()}
    finite = np.isfinite(losses).all(axis=1)
    for name in ("validation_loss", "test_loss"):
        finite &= np.isfinite(final.get(name, 0.0))
    with np.errstate(invalid="ignore"):
        diverged = ~(finite & (smooth[:, -1] <= DIVERGED * losses[:, 0]))
    target = record["protocol"]["target_loss"]
    table = names.assign(
        steps=steps,
        diverged=diverged,
        steps_to_target=np.nan if target is None else statistics.steps_to_loss(smooth, target, 1),
        train_loss=smooth[:, -1],
        **final,
    )
    at = np.arange(marks + 1) * every
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
