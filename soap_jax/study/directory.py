"""The directory that holds a study, while it runs and after.

    study.json         configuration, versions, device, data source, duration: once all is done
    runs               one row per run                      (.parquet and .csv)
    evaluations        one row per run and evaluation       (.parquet and .csv)
    losses             one row per run: every batch's loss  (.parquet)
    progress.json      until then: what study.json will say
    parts/             until then: the runs that are done, some in each file

Everything is written under another name first and then renamed, so a file is whole or absent. A
study that is stopped, however it is, goes on with the runs that are not in `parts`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

import soap_jax
from soap_jax import sweeps
from soap_jax.study import circumstances, experiment, files, results
from soap_jax.study.config import StudyConfig


class ResultsDir:
    """The directory that holds one study's results.

    Args:
        path: where.
        config: the study that it is to hold; by default that which it holds.

    Attributes:
        path: where.
        config: the study's configuration.
        facts: the study's provenance; empty if it has not begun.

    Raises:
        ValueError: if it holds another configuration's results, or those of another format, or,
            without `config`, none.
    """

    def __init__(self, path: str | os.PathLike[str], config: StudyConfig | None = None):
        self.path = pathlib.Path(path)
        self.facts: dict[str, Any] = (
            self._read_facts("study.json") or self._read_facts("progress.json") or {}
        )
        if config is None and not self.facts:
            raise ValueError(
                f"{self.path} holds no study: neither study.json nor progress.json is there. Name "
                "the directory that was given to soap-jax study as --out."
            )
        if config is None:
            self.config = self._config()
        else:
            self.config = config
            if self.facts and (self.finished or self._part_files()):  # else nothing can be mixed
                self._check_same(config)

    @property
    def finished(self) -> bool:
        """Whether all results are there."""
        return (self.path / "study.json").exists()

    def begin(self, facts: dict[str, Any]) -> None:
        """Notes under which circumstances the runs to come are done.

        Raises:
            ValueError: if runs are there that were done under others.
        """
        before = self._read_facts("progress.json")
        parts = self._part_files()
        if parts and before is None:
            raise ValueError(
                f"{self.path} holds runs, but not progress.json, which says how they were done. "
                "Name another directory with --out, or delete this one."
            )
        foreign = [part for part in parts if part.name.split("-")[0] not in self.config.methods]
        if foreign:
            raise ValueError(f"{foreign[0]} is of no method of this study. Move it elsewhere.")
        if before is None or not parts:
            self._write_json("progress.json", facts)
            self.facts = facts
            return
        facts = json.loads(json.dumps(facts))
        differ = circumstances.differences(_comparable(before), _comparable(facts))
        if differ:
            raise ValueError(
                f"{self.path} holds runs that were done under other circumstances "
                f"({'; '.join(differ)}). Go on under those, name another directory with --out, or "
                "delete this one."
            )

    def add(self, method: str, points: list[sweeps.Point], record: experiment.Record) -> None:
        """Keeps some runs of a method."""
        arrays: dict[str, Any] = {"points": np.array(points, float)}
        arrays |= {f"evaluations/{name}": leaf for name, leaf in record.evaluations.items()}
        arrays |= {k: getattr(record, k) for k in ("train_loss", "test_loss", "test_accuracy")}
        first = points[0]
        name = f"{method}-{first.period}-{first.learning_rate!r}-{first.seed}.npz"
        files.write_atomically(self.path / "parts" / name, lambda file: np.savez(file, **arrays))

    def done(self, method: str) -> list[sweeps.Point]:
        """The runs of a method that are kept in parts."""
        return [point for points, _ in self._parts(method) for point in points]

    def finish(self, **facts: Any) -> results.Tables:
        """Makes tables of all parts, writes them, then the facts that make them results.

        Args:
            **facts: what else `study.json` shall say.
        """
        num_train = self.facts["examples"]["train"]
        marks = experiment.evaluation_steps(self.config, num_train)
        pieces = [
            results.tidy(self.config, method, points, record, marks)
            for method in self.config.methods
            for points, record in self._parts(method)
        ]
        tables = {}
        for name in results.COLUMNS:
            table = pd.concat([piece[name] for piece in pieces], ignore_index=True)
            order = {method: i for i, method in enumerate(self.config.methods)}
            by = [*results.KEYS, *(["step"] if "step" in table else [])]
            tables[name] = table.sort_values(
                by, key=lambda column: column.map(order) if column.name == "method" else column
            ).reset_index(drop=True)
        self._check_runs(tables)
        for name, table in tables.items():
            self._write(
                f"{name}.parquet", table.to_parquet(None, index=False, write_page_checksum=True)
            )
            if name != "losses":  # a row is as long as a run
                self._write(f"{name}.csv", table.to_csv(index=False).encode())
        self.facts = self.facts | facts
        self._write_json("study.json", self.facts)
        self._forget_progress()
        return tables

    def read(self) -> results.Tables:
        """Reads the tables of a finished study.

        Raises:
            ValueError: if it is not finished, or a table is not as this version writes it.
        """
        if not self.finished:
            total = sum(len(experiment.points_of(self.config, m)) for m in self.config.methods)
            done = sum(len(self.done(method)) for method in self.config.methods)
            raise ValueError(
                f"{self.path} holds {done} of {total} runs: the study is not finished. The same "
                "soap-jax study command goes on where it stopped."
            )
        tables = {}
        for name, columns in results.COLUMNS.items():
            file = self.path / f"{name}.parquet"
            try:
                tables[name] = pd.read_parquet(file, page_checksum_verification=True)
            except Exception as error:  # PyArrow, too, raises what not
                raise ValueError(
                    f"{file} cannot be read ({error}). Run the study again, into another directory."
                ) from error
            missing = [column for column in columns if column not in tables[name]]
            if missing:
                raise ValueError(
                    f"{file} lacks the columns {', '.join(missing)}; expected at least "
                    f"{', '.join(columns)}. Run the study again, into another directory."
                )
        self._check_runs(tables)
        with contextlib.suppress(OSError):  # it may be read only
            self._forget_progress()  # what a process killed at the end of `finish` left
        return tables

    def _write(self, name, content):
        files.write_atomically(self.path / name, lambda file: file.write(content))

    def _part_files(self):
        return sorted((self.path / "parts").glob("*.npz"))

    def _forget_progress(self):
        shutil.rmtree(self.path / "parts", ignore_errors=True)
        (self.path / "progress.json").unlink(missing_ok=True)

    def _write_json(self, name, facts):
        files.write_text(self.path / name, json.dumps(facts, indent=2) + "\n")

    def _parts(self, method) -> Iterator[tuple[list[sweeps.Point], experiment.Record]]:
        missing = set(experiment.points_of(self.config, method))
        for file in sorted((self.path / "parts").glob(f"{method}-*.npz")):
            try:
                points, record = _read_part(file)
            except Exception as error:  # NumPy raises what not
                raise ValueError(
                    f"{file} is damaged ({error!r}). Delete it, and its runs are done again."
                ) from error
            for point in points:
                if point not in missing:
                    raise ValueError(
                        f"{file} holds {point}, which is no run of this study or is in another "
                        "part too. Delete it, and what is missing then is done again."
                    )
                missing.remove(point)
            yield points, record

    def _read_facts(self, name) -> dict[str, Any] | None:
        file = self.path / name
        if not file.exists():
            return None
        try:
            facts = json.loads(file.read_text())
            found, made_by = facts.get("format", 1), facts["versions"]["soap_jax"]
            if not isinstance(facts["config"], dict):
                raise TypeError("its config is no object")
            facts["config"].setdefault("weight_decay", 0.0)  # older studies do not say so
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is not the description of a study ({error}). Name another directory with "
                "--out, or delete this one."
            ) from error
        if found != results.FORMAT:
            raise ValueError(
                f"{self.path} holds results of format {found}, made by soap_jax "
                f"{made_by}; this is soap_jax {soap_jax.__version__}, which reads "
                f"format {results.FORMAT}. Use that version, or run the study again into another "
                "directory."
            )
        return facts

    def _config(self) -> StudyConfig:
        try:
            return StudyConfig(**self.facts["config"])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path} holds a study with a configuration that this version does not know "
                f"({error})."
            ) from error

    def _check_same(self, config):
        ours = json.loads(json.dumps(dataclasses.asdict(config)))
        theirs = self.facts["config"]
        differ = [n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)]
        if differ:
            changes = "; ".join(f"{n}: {theirs.get(n)} there, {ours.get(n)} now" for n in differ)
            raise ValueError(
                f"{self.path} holds another configuration's results ({changes}). Name another "
                "directory with --out, or delete this one."
            )

    def _check_runs(self, tables):
        expected = {
            (method, point.period, point.learning_rate, point.seed)
            for method in self.config.methods
            for point in experiment.points_of(self.config, method)
        }
        for name, table in tables.items():
            rows = self.config.evaluations + 1 if name == "evaluations" else 1
            found = table.groupby(results.KEYS).size().to_dict()
            problems = {
                "missing": expected - found.keys(),
                "of another configuration": found.keys() - expected,
                f"not there {rows} times": {run for run in found if found[run] != rows},
            }
            said = [f"{len(r)} {what}, such as {min(r)}" for what, r in problems.items() if r]
            if said:
                raise ValueError(
                    f"{self.path}: {name} are not exactly those of the configuration: "
                    f"{'; '.join(said)}. Run the study again, into another directory."
                )


def _read_part(file) -> tuple[list[sweeps.Point], experiment.Record]:
    with file.open("rb") as opened, np.load(opened) as arrays:
        leaves = dict(arrays)
    points = [sweeps.Point(int(s), float(r), int(t)) for s, r, t in leaves.pop("points")]
    evaluations = {
        name.removeprefix("evaluations/"): leaves.pop(name)
        for name in list(leaves)
        if name.startswith("evaluations/")
    }
    if {len(leaf) for leaf in [*leaves.values(), *evaluations.values()]} != {len(points)}:
        raise ValueError("its arrays are not of one length")
    return points, experiment.Record(evaluations=evaluations, **leaves)


def _comparable(facts):
    """Facts without what does not bear on results: CPU runs are alike on two devices or more."""
    device = facts.get("device")
    if isinstance(device, dict) and device.get("platform") == "cpu":
        rest = {k: v for k, v in device.items() if k not in ("count", "processes")}
        several = "several" if device.get("count") != 1 else 1  # XLA compiles otherwise for one
        return facts | {"device": rest | {"count": several}}
    return facts
