"""The directory that holds one model, while it is trained and after; see `single`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
from typing import Any

import pandas as pd

from soap_jax import data, grids
from soap_jax.study import circumstances, experiment, files, methods, results
from soap_jax.study.single_config import TrainConfig

FORMAT = 1
"""Of train.json and the checkpoints; it grows when older ones cannot be read any more."""

Row = dict[str, float]
"""One row of the curves, by column."""


class TrainDir:
    """The directory that holds one model, while it is trained and after.

    Args:
        path: where.
        config: the training that it is to hold; by default that which it holds.

    Attributes:
        path: where.
        config: the training's configuration.
        facts: what train.json says, None if training has not begun.

    Raises:
        ValueError: if it holds another configuration's model, or, without `config`, none. More
            epochs than before are no other configuration.
    """

    def __init__(self, path: str | os.PathLike[str], config: TrainConfig | None = None):
        self.path = pathlib.Path(path)
        self.facts = self._read_facts()
        if self.facts is None:
            if config is None:
                raise ValueError(
                    f"{self.path} holds no model: train.json is not there. Name the directory that "
                    "was given to soap-jax train as --out."
                )
            if self.kept():
                raise ValueError(
                    f"{self.path} holds checkpoints, but not the train.json that says of what. "
                    "Name another directory with --out, or delete this one."
                )
            self.config = config
        else:
            self.config = config or self._config()
            self._check_same()

    @property
    def finished(self) -> bool:
        """Whether it is trained for all epochs."""
        result = (self.facts or {}).get("result")
        return result is not None and result["epochs"] == self.config.epochs

    def kept(self) -> list[int]:
        """The epochs that have a checkpoint."""
        found = (self.path / "checkpoints").glob("*")
        return sorted(int(step.name) for step in found if step.name.isdecimal())

    def begin(self, dataset: data.Dataset) -> None:
        """Notes under which circumstances training begins or goes on.

        Raises:
            ValueError: if it went on with other data or under other settings of JAX or XLA, if the
                batch size is more than all examples, or if there are too many steps.
        """
        facts = provenance(self.config, dataset)
        num_train = facts["examples"]["train"]
        if self.config.batch_size > num_train:
            raise ValueError(
                f"batch_size is {self.config.batch_size}; expected 1 to {num_train}, the number of "
                "training examples."
            )
        steps = self.config.epochs * (num_train // self.config.batch_size)
        if steps > grids.MOST:
            raise ValueError(
                f"{self.config.epochs} epochs are {steps} steps; expected at most {grids.MOST}. "
                "Ask for fewer epochs."
            )
        before = self.facts
        if before is not None:
            fixed = ("data_source", "examples", "network", "settings")
            ours = json.loads(json.dumps({name: facts[name] for name in fixed}))
            differ = circumstances.differences(before, ours)
            if differ:
                raise ValueError(
                    f"{self.path} was trained under other circumstances ({'; '.join(differ)}). Go "
                    "on under those, name another directory with --out, or delete this one."
                )
            extended = self.config.epochs > before["config"]["epochs"]
            if extended and not facts["settings"]["jax_threefry_partitionable"]:
                raise ValueError(
                    "jax_threefry_partitionable is off, so the order of examples depends on the "
                    "number of epochs and training cannot be extended. Name another directory with "
                    "--out."
                )
            now = {name: facts[name] for name in ("versions", "device")}
            resumed = before.get("resumed", [])
            if now != {name: (resumed or [before])[-1][name] for name in now}:
                resumed = [*resumed, {"after_epoch": max(self.kept(), default=0), **now}]
            facts |= {name: before[name] for name in now} | {"resumed": resumed}
        self._write_facts(facts)

    def finish(self, **result: Any) -> None:
        """Notes what came of it; numbers that are not finite are left empty."""
        assert self.facts is not None
        finite = {k: v if math.isfinite(v) else None for k, v in result.items()}
        self._write_facts(self.facts | {"result": finite})

    def write_curves(self, rows: list[Row]) -> None:
        """Writes the curves as they are by now."""
        table = pd.DataFrame(rows)
        text = table.to_csv(index=False, na_rep="nan")
        files.write_atomically(
            self.path / "curves.parquet", lambda file: table.to_parquet(file, index=False)
        )
        files.write_atomically(self.path / "curves.csv", lambda file: file.write(text.encode()))

    def read_curves(self) -> pd.DataFrame:
        """Reads the curves.

        Raises:
            ValueError: if they cannot be read.
        """
        file = self.path / "curves.parquet"
        try:
            return pd.read_parquet(file)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{file} cannot be read ({error}). The same soap-jax train command with more "
                "--epochs writes it again."
            ) from error

    def _write_facts(self, facts):
        text = json.dumps(facts, indent=2) + "\n"
        files.write_atomically(self.path / "train.json", lambda file: file.write(text.encode()))
        self.facts = json.loads(text)

    def _read_facts(self) -> dict[str, Any] | None:
        file = self.path / "train.json"
        if not file.exists():
            return None
        try:
            facts = json.loads(file.read_text())
            found, version = facts["format"], facts["versions"]["soap_jax"]
            if not isinstance(facts["config"], dict):
                raise TypeError("its config is no object")
            facts["config"].setdefault("weight_decay", 0.0)  # older trainings do not say so
            older = facts.pop("random", {})
            facts.setdefault("settings", {f"jax_{name}": older[name] for name in older})
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{file} is not the description of a training ({error}). Name another directory "
                "with --out, or delete this one."
            ) from error
        if found != FORMAT:
            raise ValueError(
                f"{self.path} holds a model in format {found}, made by soap_jax {version}; this "
                f"version reads format {FORMAT}. Use that version, or train again into another "
                "directory."
            )
        return facts

    def _config(self) -> TrainConfig:
        assert self.facts is not None
        try:
            return TrainConfig(**self.facts["config"])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path} holds a model with a configuration that this version does not know "
                f"({error})."
            ) from error

    def _check_same(self):
        assert self.facts is not None
        ours = json.loads(json.dumps(dataclasses.asdict(self.config)))
        theirs = self.facts["config"]
        differ = [name for name in ours if ours[name] != theirs.get(name)]
        if differ == ["epochs"] and ours["epochs"] > theirs["epochs"]:
            return
        if differ:
            changes = "; ".join(f"{n}: {theirs.get(n)} there, {ours[n]} now" for n in differ)
            raise ValueError(
                f"{self.path} holds another configuration's model ({changes}). Only --epochs may "
                "grow. Name another directory with --out, or delete this one."
            )


def provenance(config: TrainConfig, dataset: data.Dataset) -> dict[str, Any]:
    """What a model must say of itself to be trained again, or further."""
    facts = results.provenance(config.as_study(), dataset)
    orbax = {"orbax-checkpoint": importlib.metadata.version("orbax-checkpoint")}
    return {
        "format": FORMAT,
        "config": dataclasses.asdict(config),
        "rule": methods.describe(config.method, config.period),
        "network": {
            "image_shape": list(dataset.train.images.shape[1:]),
            "num_classes": dataset.num_classes,
            "input_mean_and_std": [*experiment.scaling_of(config.as_study(), dataset)],
        },
        "data_source": facts["data_source"],
        "examples": facts["examples"],
        "settings": facts["settings"],
        "versions": facts["versions"] | orbax,
        "device": facts["device"],
        "resumed": [],
        "result": None,
    }
