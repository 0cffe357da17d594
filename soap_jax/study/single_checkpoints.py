"""Checkpoints of one model in training, with Orbax: written in the background, checked when read.

    checkpoints/EPOCH/state          the `TrainState`, feedback and its key included
    checkpoints/EPOCH/progress       the rule of feedback, and the curves until then
    checkpoints/EPOCH/sha256.json    checksums of the files of both

Orbax names a checkpoint by its epoch once it is whole, so what a killed process left is not read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence

import jax
import orbax.checkpoint as ocp

from soap_jax import training
from soap_jax.study import files, methods
from soap_jax.study.single_directory import Row, TrainDir

SEAL = "sha256.json"
"""The file in a checkpoint that has the checksums of the others."""


@contextlib.contextmanager
def opened(into: TrainDir, *, read_only: bool = False) -> Iterator[Checkpoints]:
    """Opens a directory's checkpoints; in the end all that are begun are written."""
    with _quiet():
        with errors_say_what_is_kept(into):
            manager = ocp.CheckpointManager(
                (into.path / "checkpoints").absolute(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=into.config.keep, read_only=read_only, create=not read_only
                ),
            )
        checkpoints = Checkpoints(into, manager)
        try:
            yield checkpoints
        finally:
            with errors_say_what_is_kept(into):
                checkpoints.seal()
                manager.close()


@contextlib.contextmanager
def errors_say_what_is_kept(into: TrainDir) -> Iterator[None]:
    """Turns what cannot be written into a ValueError that says which checkpoint there is."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # TensorStore's are ValueErrors
        why = str(error).split("\n")[0].rsplit(": ", 1)[-1].split(" [os_error")[0]
        kept = into.kept()
        raise ValueError(
            f"cannot write to {into.path}: {why}. "
            + (f"The checkpoint of epoch {kept[-1]} is kept" if kept else "No checkpoint is kept")
            + "; once that is mended, the same command goes on from there."
        ) from error


class Checkpoints:
    """Orbax's checkpoints of one training: written while training goes on, checked when read."""

    def __init__(self, into: TrainDir, manager: ocp.CheckpointManager):
        self.into, self.manager = into, manager
        self.rule = methods.describe(into.config.method, 1)  # all that is not among the arrays
        self.unsealed: int | None = None

    def save(self, epoch: int, state: training.TrainState, rows: Sequence[Row]) -> None:
        """Begins to write; an error may show at the next call."""
        self.seal()
        curves = {name: [row[name] for row in rows] for name in rows[0]}
        self.manager.save(
            epoch,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                progress=ocp.args.JsonSave({"epoch": epoch, "rule": self.rule, "curves": curves}),
            ),
        )
        self.unsealed = epoch

    def seal(self) -> None:
        """Waits for what is being written, and notes its checksums: Orbax itself has none."""
        epoch, self.unsealed = self.unsealed, None
        self.manager.wait_until_finished()
        if epoch is not None:
            step = self._path(epoch)
            text = json.dumps(_checksums(step), indent=2)
            files.write_atomically(step / SEAL, lambda file: file.write(text.encode()))

    def restore(
        self, epoch: int, like: training.TrainState
    ) -> tuple[training.TrainState, list[Row]]:
        """Reads the state, onto the first device, and the curves until then.

        Args:
            epoch: the checkpoint's.
            like: a state of the same structure, arrays or only their shapes.

        Raises:
            ValueError: if it cannot be read, or is of another rule.
        """
        step = self._path(epoch)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like
        )
        try:
            seal = step / SEAL  # absent if the process was killed just before it was written
            if seal.exists() and json.loads(seal.read_bytes()) != _checksums(step):
                raise ValueError("files have other checksums than when they were written")
            kept = self.manager.restore(
                epoch,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like), progress=ocp.args.JsonRestore()
                ),
            )
            state, rule, curves = kept.state, kept.progress["rule"], kept.progress["curves"]
            values = zip(*curves.values(), strict=True)
            rows = [dict(zip(curves, row, strict=True)) for row in values]
            if len(rows) != epoch + 1:
                raise ValueError(f"its curves have {len(rows)} rows")
        except Exception as error:  # of any kind: that depends on what is damaged
            others = [one for one in self.into.kept() if one < epoch]
            then = f"that of epoch {others[-1]}" if others else "the start"
            raise ValueError(
                f"the checkpoint {step} cannot be read: it is damaged, or other versions than "
                f"those in {self.into.path / 'train.json'} wrote it. Delete it, and training goes "
                f"on from {then}."
            ) from error
        if rule != self.rule:
            raise ValueError(
                f"the checkpoint {step} was trained by {rule}; here {self.into.config.method} is "
                f"{self.rule}. Use the version that wrote it."
            )
        return state, rows

    def _path(self, epoch):
        return self.into.path / "checkpoints" / str(epoch)


@contextlib.contextmanager
def _quiet():
    """Keeps Orbax's log, and what it leaves when it fails, off the screen: errors say it all."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def without_late_reads_and_writes(unraisable):
        if "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = without_late_reads_and_writes
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


def _checksums(step) -> dict[str, str]:
    """Of every file of a checkpoint but the seal, by its path."""
    found = sorted(file for file in step.rglob("*") if file.is_file())
    return {
        file.relative_to(step).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in found
        if file != step / SEAL and file.suffix != ".tmp"
    }
