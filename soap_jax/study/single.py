"""Trains one model with one method, to get a model rather than a comparison.

    train.json          configuration, versions, device, data source; after training, the result
    curves              one row per epoch            (.parquet, .csv, .svg, .png, .pdf)
    checkpoints/EPOCH   Orbax: the state of training, the curves so far, and a checksum of both

Initial weights, feedback, order of examples and measurements are the same as in one run of a study.
A training that was stopped in any way resumes from its last checkpoint. Its results are then the
same as without the stop; on CPU they are equal bit for bit. A trained model is used from Python:

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
from soap_jax.study import charts, environment, figures, files, loops, preset, store, trial
from soap_jax.study.methods import METHODS
from soap_jax.study.preset import TrainConfig

FORMAT = 2
"""The version of train.json and the checkpoints; it increases when older ones cannot be read."""

Row = dict[str, float]
"""One row of the curves, by column."""


class Trained(NamedTuple):
    """A trained model.

    Attributes:
        config: the configuration of the training.
        epoch: the number of epochs that it was trained for.
        apply_fn: `(params, feedback, images) -> logits`, for images as they are stored.
        params: the parameters.
        feedback: feedback weights or projections, which the forward pass does not use; None for
            methods that follow the true gradient.
        state: the whole state of training.
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
    """Trains a model for the configured epochs, from the last checkpoint if there is one.

    Args:
        path: the directory for the results; lock it with `soap_jax.study.files.locked`.
        config: the configuration of the training.
        dataset: the data.
        on_epoch: called with the last row of the curves, at the start and after every epoch.

    Returns:
        The content of train.json.

    Raises:
        ValueError: if the directory holds another training, the batch size is larger than the
            number of examples, the last checkpoint cannot be read, or one cannot be written.
    """
    path, (task, functions, start) = pathlib.Path(path), _trial(config, dataset)
    record = _begin(path, config, dataset)
    arrays = jax.device_put(trial.data_of(task))
    _, rate, _, index = start
    state, plan = jax.jit(functions.init)(*start, arrays)
    measure = jax.jit(functions.measure)
    segment = convolutions.as_products(loops.segment(functions))
    train_epoch = jax.jit(segment, donate_argnums=0)

    def row_of(epoch, train_loss):
        found = measure(state, plan, rate, index, arrays)
        row = {"epoch": epoch, "step": int(state.train.step), "train_loss": train_loss}
        first = {name: found[name] for name in ("validation_loss", "validation_accuracy")}
        return row | {name: float(value) for name, value in (first | found).items()}

    with _manager(path, max_to_keep=config.keep) as manager:
        if checkpoint_epochs(path):
            state, rows = _restore(path, manager, checkpoint_epochs(path)[-1], state)
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
    found = jax.jit(functions.test)(state, arrays)
    ends = [row[name] for row in rows for name in ("train_loss", "validation_loss")][1:]
    limit = store.DIVERGENCE_FACTOR * rows[0]["validation_loss"]
    result = {
        "epochs": config.epochs,
        "steps": rows[-1]["step"],
        "diverged": not (all(map(math.isfinite, ends)) and rows[-1]["train_loss"] <= limit),
        **{f"test_{name}": float(value) for name, value in found.items()},
    }
    record["result"] = {k: v if math.isfinite(v) else None for k, v in result.items()}
    files.write_json(path / "train.json", record)
    said = f"{METHODS[config.method].label}, rate {config.learning_rate:g}, seed {config.seed}"
    figures.save_svg(charts.training_curves(pd.DataFrame(rows), said), path / "curves")
    return record


def load(path: str | os.PathLike[str], *, epoch: int | None = None) -> Trained:
    """Loads a model that `soap-jax train` trained, from its last checkpoint.

    Args:
        path: the directory that was given to it as `--out`.
        epoch: the epoch of an earlier checkpoint to load instead.

    Returns:
        The model, its feedback and its configuration, on the first device.

    Raises:
        ValueError: if there is no such model, or its checkpoint cannot be read.
    """
    path = pathlib.Path(path)
    record = read_record(path)
    if record is None:
        raise ValueError(
            f"{path} holds no model: there is no train.json. Name the directory that was given to "
            "soap-jax train as --out."
        )
    found = checkpoint_epochs(path)
    epoch = max(found, default=0) if epoch is None else epoch
    if epoch not in found:
        known = f"those of epochs {', '.join(map(str, found))}" if found else "none"
        raise ValueError(f"{path} has no checkpoint of epoch {epoch}; it has {known}.")
    config, network = TrainConfig(**record["config"]), record["network"]
    num = 2 * config.batch_size  # only shapes count
    like = data.Split(np.zeros((num, *network["image_shape"]), np.uint8), np.zeros(num, np.int32))
    dataset = data.Dataset("", like, like, network["num_classes"], 255, "")
    scale = tasks.Scaling(*network["scaling"])
    task, functions, start = _trial(config, dataset, scale)
    state, _ = jax.eval_shape(functions.init, *start, trial.data_of(task))
    with _manager(path, read_only=True, create=False) as manager:
        train = _restore(path, manager, epoch, state)[0].train
    model = preset.network(config, dataset)

    def apply_fn(params, feedback, images):
        del feedback
        return model.apply({"params": params}, scale(images))

    exact = METHODS[config.method].exact
    weights = None if exact else training.feedback_weights(train.feedback)
    return Trained(config, epoch, apply_fn, train.params, weights, train)


def read_record(path: pathlib.Path, config: TrainConfig | None = None) -> dict[str, Any] | None:
    """The content of train.json; None if there is no training in the directory.

    Args:
        path: the directory.
        config: the expected configuration; by default any.

    Raises:
        ValueError: if the training has another configuration. Only `config.epochs` may differ: it
            may be larger than before.
    """
    record = store.read_record(
        path / "train.json",
        FORMAT,
        "a training",
        check=lambda record: TrainConfig(**record["config"]),
    )
    if record is None and checkpoint_epochs(path):
        raise ValueError(
            f"{path} holds checkpoints, but not train.json, their record. Name another "
            "directory with --out, or delete this one."
        )
    if record is not None and config is not None:
        ours, theirs = json.loads(json.dumps(vars(config))), record["config"]
        ours["epochs"] = min(
            ours["epochs"], theirs["epochs"]
        )  # only this may be larger than before
        changes = environment.differences(theirs, ours)
        environment.refuse_changes(path, "a model", changes)
    return record


def checkpoint_epochs(path: pathlib.Path) -> list[int]:
    """The epochs that have a checkpoint."""
    found = (path / "checkpoints").glob("*")
    return sorted(int(step.name) for step in found if step.name.isdecimal())


def _begin(path, config, dataset) -> dict[str, Any]:
    """Writes the configuration, versions and devices with which training starts or resumes."""
    before = read_record(path, config)
    record = {
        "format": FORMAT,
        "config": vars(config),
        "feedback": METHODS[config.method].describe(),
        "network": {
            "image_shape": dataset.train.images.shape[1:],
            "num_classes": dataset.num_classes,
            "scaling": tasks.scaling(dataset, config.inputs),
        },
        "data_source": dataset.source,
        **environment.provenance(),
        "resumed": [],
        "result": None,
    }
    record["versions"]["orbax-checkpoint"] = ocp.__version__
    record = json.loads(json.dumps(record))
    if before is not None:
        fixed = ("data_source", "feedback", "network", "settings")
        changes = environment.differences(before, {name: record[name] for name in fixed})
        environment.refuse_changes(path, "a model", changes)
        longer = config.epochs > before["config"]["epochs"]
        if longer and not record["settings"]["jax_threefry_partitionable"]:
            raise ValueError(
                "jax_threefry_partitionable is off: the order of examples then depends on the "
                "number of epochs, so training cannot be extended. Name another directory with "
                "--out."
            )
        now = {name: record[name] for name in ("versions", "device")}
        last = {name: (before["resumed"] or [before])[-1][name] for name in now}
        more = (
            [{"after_epoch": max(checkpoint_epochs(path), default=0), **now}] if now != last else []
        )
        record |= {name: before[name] for name in now} | {"resumed": before["resumed"] + more}
    files.write_json(path / "train.json", record)
    return record


def _trial(config, dataset, scale=None) -> tuple[tasks.Task, trial.Trial, tuple]:
    """The task, the functions of its training, and the arguments of their `init`, as in a study.

    There is one evaluation per epoch. The arguments are seed, learning rate, period and index.
    """
    arguments = preset.comparison_arguments(config.as_study(), dataset, scale=scale)
    task = arguments["task"]
    size = config.batch_size
    batch = jax.tree.map(lambda leaf: leaf[:size], task.train)
    functions = trial.make(
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
    return task, functions, start


@contextlib.contextmanager
def _manager(path, **options) -> Iterator[ocp.CheckpointManager]:
    """Orbax's manager without its log, since errors contain the same information."""
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
    """Saves a checkpoint; if it cannot be written, the ValueError names the last one."""
    curves = pd.DataFrame(rows).to_dict("list")
    progress = {"curves": curves, "sha256": _checksum(state, curves)}
    arguments = {"state": ocp.args.StandardSave(state), "progress": ocp.args.JsonSave(progress)}
    try:
        manager.save(epoch, args=ocp.args.Composite(**arguments))
    except (OSError, ValueError, RuntimeError) as error:  # TensorStore raises ValueErrors
        why = str(error).split("\n")[0].rsplit(": ", 1)[-1].split(" [os_error")[0]
        found = checkpoint_epochs(path)
        raise ValueError(
            f"cannot write to {path}: {why}. "
            + (f"The checkpoint of epoch {found[-1]} is kept" if found else "No checkpoint is kept")
            + ". Fix the cause, then repeat the same command to resume."
        ) from error


def _restore(path, manager, epoch, like) -> tuple[trial.State, list[Row]]:
    """The state, on the first device, and the curves up to its epoch."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
    arguments = {"state": ocp.args.StandardRestore(like), "progress": ocp.args.JsonRestore()}
    try:
        found = manager.restore(epoch, args=ocp.args.Composite(**arguments))
        state, progress = found.state, found.progress
        if progress["sha256"] != _checksum(state, progress["curves"]):  # Orbax has no checksum
            raise ValueError("its checksum differs from the one when it was written")
    except Exception as error:  # the type depends on the damaged part
        others = [one for one in checkpoint_epochs(path) if one < epoch]
        then = f"the checkpoint of epoch {others[-1]}" if others else "the start"
        raise ValueError(
            f"the checkpoint {path / 'checkpoints' / str(epoch)} cannot be read: it is damaged, or "
            f"written by other versions than those in {path / 'train.json'}. Delete it; training "
            f"then resumes from {then}."
        ) from error
    return state, pd.DataFrame(progress["curves"]).to_dict("records")  # type: ignore[return-value]


def _checksum(state, curves) -> str:
    found = hashlib.sha256(json.dumps(curves).encode())
    for leaf in jax.tree.leaves(state):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()
