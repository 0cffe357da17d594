"""Trains what a study's directory still lacks, on the devices of one process or of many.

Under `jax.distributed` every process calls `train`. The first one alone has the directory: it tells
the others which runs are done, and writes what all of them give.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

import soap_jax
from soap_jax import data, sweeps
from soap_jax.study import circumstances, directory, experiment
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
    _check_alike(config)
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


def _check_alike(config: StudyConfig) -> None:
    """Raises ValueError, in every process, if they were not all started alike."""
    versions = soap_jax.__version__, jax.__version__
    known = repr((config, versions, circumstances.settings())).encode()
    try:
        digest = np.frombuffer(hashlib.sha256(known).digest(), np.uint8)
        multihost_utils.assert_equal(digest)
    except AssertionError:
        raise ValueError(
            "the processes of this study were started with different options, different versions "
            "of soap_jax or jax, or different settings of JAX or XLA; expected the same everywhere."
        ) from None


def first_process_says(answer: bool = False) -> bool:
    """What the first process answers, in every process."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(answer)))


def _same_everywhere(points: list[sweeps.Point], done: list[sweeps.Point]) -> set[sweeps.Point]:
    """What the first process knows to be done, in every process."""
    known = set(done)
    mask = multihost_utils.broadcast_one_to_all(np.array([point in known for point in points]))
    return {point for point, is_done in zip(points, mask, strict=True) if is_done}
