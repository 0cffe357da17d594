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
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import altair as alt
import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pandas as pd
import vl_convert
from jax import lax

from soap_jax import data, grids, tasks, training
from soap_jax.study import (
    circumstances,
    figures,
    files,
    preset,
    store,
    trial,
)
from soap_jax.study.methods import METHODS
from soap_jax.study.preset import TrainConfig

FORMAT = 2
"""Of train.json and the checkpoints; it grows when older ones cannot be read any more."""

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
    path, (task, of_method) = pathlib.Path(path), _trial(config, dataset)
    grids.check_count("epochs", config.epochs, most=grids.MOST // of_method.steps)
    facts = _begin(path, config, dataset)
    arrays = jax.device_put(trial.data_of(task))
    rate = np.float32(config.learning_rate)
    state, plan = jax.jit(of_method.init)(*_start(config), arrays)
    measure = jax.jit(of_method.measure)

    def row_of(epoch, train_loss):
        found = measure(state, plan, rate, 0, arrays)
        row = {"epoch": epoch, "step": int(state.train.step), "train_loss": train_loss}
        first = {name: found[name] for name in ("validation_loss", "validation_accuracy")}
        return row | {name: float(value) for name, value in (first | found).items()}

    train_epoch = _epoch(config, of_method)
    with _manager(path, config) as manager:
        if kept(path):
            state, rows = _restore(path, manager, kept(path)[-1], state, facts["feedback"])
        else:
            rows = [row_of(0, math.nan)]
        on_epoch(rows[-1])
        order_key = jax.random.split(jax.random.key(config.seed), 3)[2]
        keys = jax.random.split(order_key, config.epochs)
        for epoch in range(len(rows), config.epochs + 1):
            order = training.epoch_order(keys[epoch - 1], task.examples["train"], config.batch_size)
            state, losses = train_epoch(state, plan._replace(order=order), rate, arrays)
            rows.append(row_of(epoch, float(np.asarray(losses, float).mean())))
            on_epoch(rows[-1])
            if epoch % config.checkpoint_every == 0 or epoch == config.epochs:
                with _writing(path):
                    _write_curves(path, rows)
                    _save(manager, epoch, state, rows, facts["feedback"])
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
    _write_facts(path, facts)
    _draw(path, config, pd.DataFrame(rows))
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
    if not found or (epoch is not None and epoch not in found):
        there = f"only of the epochs {', '.join(map(str, found))}" if found else "none at all"
        of = "" if epoch is None else f" of epoch {epoch}"
        raise ValueError(f"{path} has no checkpoint{of}; it has {there}.")
    config, network = TrainConfig(**facts["config"]), facts["network"]
    num = 2 * config.batch_size  # only shapes count
    like = data.Split(np.zeros((num, *network["image_shape"]), np.uint8), np.zeros(num, np.int32))
    dataset = data.Dataset("", like, like, network["num_classes"], 255, "")
    scale = tasks.Scaling(*network["scaling"])
    task, of_method = _trial(config, dataset, scale)
    state, _ = jax.eval_shape(of_method.init, *_start(config), trial.data_of(task))
    with _manager(path, config, read_only=True) as manager:
        step = found[-1] if epoch is None else epoch
        state, rows = _restore(path, manager, step, state, facts["feedback"])
    model = preset.network(config, dataset)

    def apply_fn(params, feedback, images):
        del feedback
        return model.apply({"params": params}, scale(images))

    train = state.train
    exact = METHODS[config.method].exact
    weights = None if exact else training.feedback_weights(train.feedback)
    return Trained(config, len(rows) - 1, apply_fn, train.params, weights, train)


def read(path: pathlib.Path, config: TrainConfig | None = None) -> dict[str, Any] | None:
    """What train.json says; None if training has not begun.

    Args:
        path: the directory.
        config: the training that it is to hold, if it holds any.

    Raises:
        ValueError: if it holds another one. More epochs than before are none.
    """
    file = path / "train.json"
    if not file.exists():
        if kept(path):
            raise ValueError(
                f"{path} holds checkpoints, but not the train.json that says of what. Name another "
                "directory with --out, or delete this one."
            )
        return None
    try:
        facts = json.loads(file.read_text())
        found, version = facts["format"], facts["versions"]["soap_jax"]
        if found == FORMAT:
            TrainConfig(**facts["config"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{file} is not the description of a training ({error}). Name another directory with "
            "--out, or delete this one."
        ) from error
    if found != FORMAT:
        raise ValueError(
            f"{path} holds a model in format {found}, made by soap_jax {version}; this version "
            f"reads format {FORMAT}. Use that version, or train again into another directory."
        )
    if config is not None:
        ours, theirs = json.loads(json.dumps(dataclasses.asdict(config))), facts["config"]
        if ours["epochs"] > theirs["epochs"]:
            theirs = theirs | {"epochs": ours["epochs"]}
        if differ := circumstances.differences(theirs, ours):
            raise ValueError(
                f"{path} holds another configuration's model ({'; '.join(differ)}). Only --epochs "
                "may grow. Name another directory with --out, or delete this one."
            )
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
        "config": dataclasses.asdict(config),
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
    facts["versions"]["orbax-checkpoint"] = importlib.metadata.version("orbax-checkpoint")
    facts = json.loads(json.dumps(facts))
    if before is not None:
        fixed = ("data_source", "network", "settings")
        differ = circumstances.differences(before, {name: facts[name] for name in fixed})
        if differ:
            raise ValueError(
                f"{path} was trained under other circumstances ({'; '.join(differ)}). Go on under "
                "those, name another directory with --out, or delete this one."
            )
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
    _write_facts(path, facts)
    return facts


def _trial(config, dataset, scale=None) -> tuple[tasks.Task, trial.Trial]:
    """The task, and the functions of one epoch's training."""
    arguments = preset.comparison_arguments(config.as_study(), dataset, scale=scale)
    task = arguments["task"]
    num, size = task.examples["train"], config.batch_size
    jax.eval_shape(lambda key: training.epoch_order(key, num, size), jax.random.key(0))  # raises
    batch = jax.tree.map(lambda leaf: leaf[:size], task.train)
    layers = trial.layers_of(task, task.init(jax.random.key(0)), None, batch)
    of_method = trial.make(
        task,
        (arguments["methods"][config.method],),
        layers,
        optimizer=arguments["optimizer"],
        batch_size=size,
        steps=num // size,
        evaluations=1,
    )
    return task, of_method


def _start(config):
    """Seed, learning rate, period and index, as a study hands them to its runs."""
    (period,) = METHODS[config.method].periods((config.period,))
    return np.int32(config.seed), np.float32(config.learning_rate), np.int32(period), 0


def _epoch(config, of_method) -> Callable[..., tuple[trial.State, jax.Array]]:
    """`(state, plan, learning_rate, arrays) -> (state, losses)`; the state is donated."""
    one = jax.jit(of_method.step, donate_argnums=0)

    def stepwise(state, plan, rate, arrays):
        losses = []
        for i in range(of_method.steps):
            state, loss = one(state, plan, rate, 0, arrays, i)
            losses.append(loss)
        return state, losses

    def scanned(state, plan, rate, arrays):
        def step(state, i):
            return of_method.step(state, plan, rate, 0, arrays, i)

        return lax.scan(step, state, jnp.arange(of_method.steps))

    if config.model == "conv" and jax.default_backend() == "cpu":  # see `compare`
        return stepwise
    return jax.jit(scanned, donate_argnums=0)


@contextlib.contextmanager
def _manager(path, config, read_only=False) -> Iterator[ocp.CheckpointManager]:
    """Orbax's manager, which writes while training goes on; silent, since errors say it all."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=config.keep, read_only=read_only, create=not read_only
    )
    try:
        with _writing(path):
            manager = ocp.CheckpointManager((path / "checkpoints").absolute(), options=options)
        try:
            yield manager
        finally:
            with _writing(path):
                manager.close()
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _writing(path):
    """Turns what cannot be written into a ValueError that says which checkpoint there is."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # TensorStore's are ValueErrors
        why = str(error).split("\n")[0].rsplit(": ", 1)[-1].split(" [os_error")[0]
        found = kept(path)
        raise ValueError(
            f"cannot write to {path}: {why}. "
            + (f"The checkpoint of epoch {found[-1]} is kept" if found else "No checkpoint is kept")
            + "; once that is mended, the same command goes on from there."
        ) from error


def _save(manager, epoch, state, rows, feedback):
    curves = {name: [row[name] for row in rows] for name in rows[0]}
    progress = {"feedback": feedback, "curves": curves, "sha256": _checksum(state, curves)}
    arguments = {"state": ocp.args.StandardSave(state), "progress": ocp.args.JsonSave(progress)}
    manager.save(epoch, args=ocp.args.Composite(**arguments))


def _restore(path, manager, epoch, like, feedback) -> tuple[trial.State, list[Row]]:
    """The state, onto the first device, and the curves until then."""
    step = path / "checkpoints" / str(epoch)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
    arguments = {"state": ocp.args.StandardRestore(like), "progress": ocp.args.JsonRestore()}
    try:
        found = manager.restore(epoch, args=ocp.args.Composite(**arguments))
        state, curves, trained_by = (
            found.state,
            found.progress["curves"],
            found.progress["feedback"],
        )
        if found.progress["sha256"] != _checksum(state, curves):  # Orbax itself has none
            raise ValueError("its content has another checksum than when it was written")
    except Exception as error:  # of any kind: that depends on what is damaged
        others = [one for one in kept(path) if one < epoch]
        then = f"that of epoch {others[-1]}" if others else "the start"
        raise ValueError(
            f"the checkpoint {step} cannot be read: it is damaged, or other versions than those in "
            f"{path / 'train.json'} wrote it. Delete it, and training goes on from {then}."
        ) from error
    if trained_by != feedback:
        raise ValueError(
            f"the checkpoint {step} was trained by {trained_by}; here the method is {feedback}. "
            "Use the version that wrote it."
        )
    rows = [dict(zip(curves, row, strict=True)) for row in zip(*curves.values(), strict=True)]
    return state, rows


def _checksum(state, curves) -> str:
    found = hashlib.sha256(json.dumps(curves).encode())
    for leaf in jax.tree.leaves(state):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def _write_curves(path, rows):
    table = pd.DataFrame(rows)
    content = table.to_parquet(None, index=False)
    files.write_atomically(path / "curves.parquet", lambda file: file.write(content))
    files.write_text(path / "curves.csv", table.to_csv(index=False, na_rep="nan"))


def _write_facts(path, facts):
    files.write_text(path / "train.json", json.dumps(facts, indent=2) + "\n")


def _draw(path, config, curves):
    """Draws the curves as SVG, PNG and PDF; lines break where numbers are not finite."""
    curves = curves.replace([np.inf, -np.inf], np.nan)
    angles = [name for name in curves if name.startswith(("gradient_angle/", "weight_angle/"))]

    def panel(title, columns, kind="linear"):
        rows = curves.melt("epoch", columns, "curve", "value")
        rows["curve"] = rows["curve"].str.replace("_", " ").str.removesuffix("/kernel")
        kind = kind if (rows["value"].dropna() > 0).all() else "linear"
        scale = alt.Scale(type=kind, zero=False, nice=False)
        values = rows.astype(object).where(rows.notna(), None).to_dict("records")
        looks = (alt.Color, alt.StrokeDash)
        return (
            alt.Chart(alt.Data(values=values), title=title)
            .mark_line(point=True)
            .encode(
                alt.X("epoch:Q", axis=alt.Axis(tickMinStep=1)),
                alt.Y("value:Q", title=None, scale=scale),
                *(look("curve:N", title=None) for look in looks),
            )
        )

    whole = alt.hconcat(
        panel("Loss", ["train_loss", "validation_loss"], "log"),
        panel("Accuracy", ["validation_accuracy"]),
        panel("Angle to the true one (degrees)", angles),
        title=f"{METHODS[config.method].label}, rate {config.learning_rate:g}, seed {config.seed}",
    ).resolve_scale(color="independent", strokeDash="independent")
    spec = whole.to_dict() | {"config": figures.CONFIG, "background": "white"}
    figures.save_svg(vl_convert.vegalite_to_svg(spec), path / "curves")
