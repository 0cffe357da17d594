"""Trains one model by one method, for those who want a model rather than a study.

    train.json          configuration, versions, device, data source; once trained, the result
    curves              one row per epoch            (.parquet, .csv, .svg, .png, .pdf)
    checkpoints/EPOCH   Orbax: the state of training, the curves up to it, and their checksum

Start, feedback, order of examples and measurements are those of one run of a study. A training that
is stopped, however it is, goes on from its last checkpoint, and ends as if it had never stopped:
on CPU bit for bit. What was trained is there for use in Python:

    trained = single.load("results/train/digits-sign_preserve")
    logits = trained.apply_fn(trained.params, trained.feedback, images)     # images as stored
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pandas as pd

from soap_jax import convolutions, data, tasks, training
from soap_jax.study import charts, circumstances, figures, files, loops, preset, store, trial
from soap_jax.study.methods import METHODS
from soap_jax.study.preset import TrainConfig

FORMAT = 2
"""The version of train.json and the checkpoints; it grows when older ones cannot be read."""

Row = dict[str, float]
"""One row of the curves, by column."""


class Trained(NamedTuple):
    """A model that was trained.

    Attributes:
        config: how.
        epoch: for how long.
        apply_fn: `(params, feedback, images) -> logits`, of images as they are stored.
        params: the parameters.
        feedback: feedback weights or projections, which the forward pass does not use; None for
            methods that follow the true gradient.
        state: the whole state of training, to go on with.
    """

    config: TrainConfig
    epoch: int
    apply_fn: training.ApplyFn
    params: chex.ArrayTree
    feedback: chex.ArrayTree | None
    state: training.TrainState


def train(
    path: str | os.PathLike[str],
    config: TrainConfig,
    dataset: data.Dataset,
    *,
    on_epoch: Callable[[Row], None] = lambda row: None,
) -> dict[str, Any]:
    """Trains until all epochs are done, from the last checkpoint if there is one.

    Args:
        path: the directory for all of it; hold it with `soap_jax.study.files.locked`.
        config: the training.
        dataset: the data.
        on_epoch: called with the last row of the curves, first with that training starts from.

    Returns:
        What train.json says.

    Raises:
        ValueError: if the directory holds another training, or the batch size is more than all
            examples; or if the last checkpoint cannot be read, or one cannot be written.
    """
    path, (task, of_method, start) = pathlib.Path(path), _trial(config, dataset)
    facts = _begin(path, config, dataset)
    arrays = jax.device_put(trial.data_of(task))
    _, rate, _, index = start
    state, plan = jax.jit(of_method.init)(*start, arrays)
    measure = jax.jit(of_method.measure)
    segment = convolutions.as_products(loops.segment(of_method))
    train_epoch = jax.jit(segment, donate_argnums=0)

    def row_of(epoch, train_loss):
        found = measure(state, plan, rate, index, arrays)
        row = {"epoch": epoch, "step": int(state.train.step), "train_loss": train_loss}
        first = {name: found[name] for name in ("validation_loss", "validation_accuracy")}
        return row | {name: float(value) for name, value in (first | found).items()}

    with _manager(path, max_to_keep=config.keep) as manager:
        if kept(path):
            state, rows = _restore(path, manager, kept(path)[-1], state)
        else:
            rows = [row_of(0, math.nan)]
        on_epoch(rows[-1])
        for epoch in range(len(rows), config.epochs + 1):
            state, losses = train_epoch(state, plan, rate, index, arrays, epoch)
            rows.append(row_of(epoch, float(np.asarray(losses, float).mean())))
            on_epoch(rows[-1])
            if epoch % config.checkpoint_every == 0 or epoch == config.epochs:
                store.write_table(path / "curves", pd.DataFrame(rows))
                _save(path, manager, epoch, state, rows)
    found = jax.jit(of_method.test)(state, arrays)
    ends = [row[name] for row in rows for name in ("train_loss", "validation_loss")][1:]
    limit = store.DIVERGED * rows[0]["validation_loss"]
    result = {
        "epochs": config.epochs,
        "steps": rows[-1]["step"],
        "diverged": not (all(map(math.isfinite, ends)) and rows[-1]["train_loss"] <= limit),
        **{f"test_{name}": float(value) for name, value in found.items()},
    }
    facts["result"] = {k: v if math.isfinite(v) else None for k, v in result.items()}
    files.write_json(path / "train.json", facts)
    said = f"{METHODS[config.method].label}, rate {config.learning_rate:g}, seed {config.seed}"
    figures.save_svg(charts.training(pd.DataFrame(rows), said), path / "curves")
    return facts


def load(path: str | os.PathLike[str], *, epoch: int | None = None) -> Trained:
    """Loads what `soap-jax train` trained, from its last checkpoint.

    Args:
        path: what was given to it as `--out`.
        epoch: that of an earlier checkpoint.

    Returns:
        The model, its feedback and its configuration, on the first device.

    Raises:
        ValueError: if there is no such model, or its checkpoint cannot be read.
    """
    path = pathlib.Path(path)
    facts = read(path)
    if facts is None:
        raise ValueError(
            f"{path} holds no model: train.json is not there. Name the directory that was given to "
            "soap-jax train as --out."
        )
    found = kept(path)
    epoch = max(found, default=0) if epoch is None else epoch
    if epoch not in found:
        there = f"only of the epochs {', '.join(map(str, found))}" if found else "none at all"
        raise ValueError(f"{path} has no checkpoint of epoch {epoch}; it has {there}.")
    config, network = TrainConfig(**facts["config"]), facts["network"]
    num = 2 * config.batch_size  # only shapes count
    like = data.Split(np.zeros((num, *network["image_shape"]), np.uint8), np.zeros(num, np.int32))
    dataset = data.Dataset("", like, like, network["num_classes"], 255, "")
    scale = tasks.Scaling(*network["scaling"])
    task, of_method, start = _trial(config, dataset, scale)
    state, _ = jax.eval_shape(of_method.init, *start, trial.data_of(task))
    with _manager(path, read_only=True, create=False) as manager:
        train = _restore(path, manager, epoch, state)[0].train
    model = preset.network(config, dataset)

    def apply_fn(params, feedback, images):
        del feedback
        return model.apply({"params": params}, scale(images))

    exact = METHODS[config.method].exact
    weights = None if exact else training.feedback_weights(train.feedback)
    return Trained(config, epoch, apply_fn, train.params, weights, train)


def read(path: pathlib.Path, config: TrainConfig | None = None) -> dict[str, Any] | None:
    """What train.json says; None if training has not begun.

    Args:
        path: the directory.
        config: the training that it is to hold, if it holds any.

    Raises:
        ValueError: if it holds another one. More epochs than before are none.
    """
    facts = store.read_record(
        path / "train.json",
        FORMAT,
        "a training",
        check=lambda facts: TrainConfig(**facts["config"]),
    )
    if facts is None and kept(path):
        raise ValueError(
            f"{path} holds checkpoints, but not the train.json that says of what. Name another "
            "directory with --out, or delete this one."
        )
    if facts is not None and config is not None:
        ours, theirs = json.loads(json.dumps(vars(config))), facts["config"]
        ours["epochs"] = min(ours["epochs"], theirs["epochs"])  # these alone may grow
        differ = circumstances.differences(theirs, ours)
        circumstances.refuse(path, "a model that was", differ)
    return facts


def kept(path: pathlib.Path) -> list[int]:
    """The epochs that have a checkpoint."""
    found = (path / "checkpoints").glob("*")
    return sorted(int(step.name) for step in found if step.name.isdecimal())


def _begin(path, config, dataset) -> dict[str, Any]:
    """Notes under which circumstances training begins or goes on."""
    before = read(path, config)
    facts = {
        "format": FORMAT,
        "config": vars(config),
        "feedback": METHODS[config.method].describe(),
        "network": {
            "image_shape": dataset.train.images.shape[1:],
            "num_classes": dataset.num_classes,
            "scaling": tasks.scaling(dataset, config.inputs),
        },
        "data_source": dataset.source,
        **circumstances.provenance(),
        "resumed": [],
        "result": None,
    }
    facts["versions"]["orbax-checkpoint"] = ocp.__version__
    facts = json.loads(json.dumps(facts))
    if before is not None:
        fixed = ("data_source", "feedback", "network", "settings")
        differ = circumstances.differences(before, {name: facts[name] for name in fixed})
        circumstances.refuse(path, "a model that was", differ)
        longer = config.epochs > before["config"]["epochs"]
        if longer and not facts["settings"]["jax_threefry_partitionable"]:
            raise ValueError(
                "jax_threefry_partitionable is off, so the order of examples depends on the number "
                "of epochs and training cannot be extended. Name another directory with --out."
            )
        now = {name: facts[name] for name in ("versions", "device")}
        last = {name: (before["resumed"] or [before])[-1][name] for name in now}
        more = [{"after_epoch": max(kept(path), default=0), **now}] if now != last else []
        facts |= {name: before[name] for name in now} | {"resumed": before["resumed"] + more}
    files.write_json(path / "train.json", facts)
    return facts


def _trial(config, dataset, scale=None) -> tuple[tasks.Task, trial.Trial, tuple]:
    """The task, the functions of its training, and what they start from, as in a study.

    Epochs lie between measurements; the start is seed, learning rate, period and index.
    """
    arguments = preset.comparison_arguments(config.as_study(), dataset, scale=scale)
    task = arguments["task"]
    size = config.batch_size
    batch = jax.tree.map(lambda leaf: leaf[:size], task.train)
    of_method = trial.make(
        task,
        (arguments["methods"][config.method],),
        trial.layers_of(task, task.init(jax.random.key(0)), None, batch),
        optimizer=arguments["optimizer"],
        batch_size=size,
        steps=trial.steps_of(task, None, config.epochs, size),
        evaluations=config.epochs,
    )
    (period,) = METHODS[config.method].periods((config.period,))
    start = np.int32(config.seed), np.float32(config.learning_rate), np.int32(period), 0
    return task, of_method, start


@contextlib.contextmanager
def _manager(path, **options) -> Iterator[ocp.CheckpointManager]:
    """Orbax's manager; silent, since errors say it all."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **options)
    try:
        with ocp.CheckpointManager((path / "checkpoints").absolute(), options=options) as manager:
            yield manager
    finally:
        logger.setLevel(level)


def _save(path, manager, epoch, state, rows):
    """Raises ValueError, which says what checkpoint there is, if this one cannot be written."""
    curves = pd.DataFrame(rows).to_dict("list")
    progress = {"curves": curves, "sha256": _checksum(state, curves)}
    arguments = {"state": ocp.args.StandardSave(state), "progress": ocp.args.JsonSave(progress)}
    try:
        manager.save(epoch, args=ocp.args.Composite(**arguments))
    except (OSError, ValueError, RuntimeError) as error:  # TensorStore's are ValueErrors
        why = str(error).split("\n")[0].rsplit(": ", 1)[-1].split(" [os_error")[0]
        found = kept(path)
        raise ValueError(
            f"cannot write to {path}: {why}. "
            + (f"The checkpoint of epoch {found[-1]} is kept" if found else "No checkpoint is kept")
            + "; once that is mended, the same command goes on from there."
        ) from error


def _restore(path, manager, epoch, like) -> tuple[trial.State, list[Row]]:
    """The state, onto the first device, and the curves until then."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
    arguments = {"state": ocp.args.StandardRestore(like), "progress": ocp.args.JsonRestore()}
    try:
        found = manager.restore(epoch, args=ocp.args.Composite(**arguments))
        state, progress = found.state, found.progress
        if progress["sha256"] != _checksum(state, progress["curves"]):  # Orbax itself has none
            raise ValueError("its content has another checksum than when it was written")
    except Exception as error:  # of any kind: that depends on what is damaged
        others = [one for one in kept(path) if one < epoch]
        then = f"that of epoch {others[-1]}" if others else "the start"
        raise ValueError(
            f"the checkpoint {path / 'checkpoints' / str(epoch)} cannot be read: it is damaged, or "
            f"other versions than those in {path / 'train.json'} wrote it. Delete it, and training "
            f"goes on from {then}."
        ) from error
    return state, pd.DataFrame(progress["curves"]).to_dict("records")  # type: ignore[return-value]


def _checksum(state, curves) -> str:
    found = hashlib.sha256(json.dumps(curves).encode())
    for leaf in jax.tree.leaves(state):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()
