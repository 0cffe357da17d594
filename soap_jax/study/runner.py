"""Trains what a study's directory still lacks, on the devices of one process or of many.

Under `jax.distributed` every process calls `train`. The first one alone has the directory: it tells
the others which runs are done, and writes what all of them give.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from jax.experimental import multihost_utils

from soap_jax import data, sweeps
from soap_jax.study import directory, experiment
from soap_jax.study.config import StudyConfig


def train(
    config: StudyConfig,
    dataset: data.Dataset,
    into: directory.ResultsDir | None,
    *,
    on_progress: Callable[[str, int | None, int], None] = lambda method, done, total: None,
) -> None:
    """Trains every run that is not done yet; each part is kept as soon as it is there.

    Args:
        config: the study's configuration.
        dataset: the data.
        into: where results go; None in every process but the first.
        on_progress: called as `(method, done, in all)`; before compilation with None done.
    """
    for method in config.methods:
        points = experiment.points_of(config, method)
        done = _same_everywhere(points, into.done(method) if into else [])
        on_progress(method, None, len(points))
        parts = experiment.train_method(
            config,
            method,
            dataset,
            done=done,
            on_progress=functools.partial(on_progress, method),
        )
        for part, record in parts:
            if into:
                into.add(method, part, record)


def first_process_says(answer: bool = False) -> bool:
    """What the first process answers, in every process."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(answer)))


def _same_everywhere(points: list[sweeps.Point], done: list[sweeps.Point]) -> set[sweeps.Point]:
    """What the first process knows to be done, in every process."""
    known = set(done)
    mask = multihost_utils.broadcast_one_to_all(np.array([point in known for point in points]))
    return {point for point, is_done in zip(points, mask, strict=True) if is_done}
