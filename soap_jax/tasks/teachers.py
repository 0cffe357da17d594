"""Labels by a random network, with any number of classes."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from soap_jax import grids, models, training
from soap_jax.tasks.task import Taps, Task, accuracy

HELD_OUT = 2048
"""Examples for validation, and as many for testing."""
STREAM = 2**30 - 1
"""Folded into the teacher's key: else a student of the same seed would start as the teacher."""


def teacher(
    classes: int, *, features: int = 32, depth: int = 3, width: int = 64, seed: int = 0
) -> Task:
    """Tell apart the classes of a random network of ReLUs.

    Teacher and student have the same shape, `features`, then `depth` layers of `width` ReLUs, then
    `classes`; the student starts from other weights. Inputs x are standard normal, fresh ones in
    every batch, and the label is the largest of the teacher's outputs, each made of mean 0 and
    variance 1 over inputs:

        label = argmaxⱼ (tⱼ(x) - mean tⱼ) / std tⱼ

    so that few classes are rare. The error has one entry for each class, so the task shows what
    direct feedback loses as the output grows.

    Args:
        classes: at least 2.
        features: of an input.
        depth: hidden layers of both networks.
        width: of each.
        seed: of the teacher and of held-out examples.

    Returns:
        The task; batches are made by a function, 64 examples each: pass `steps`, not `epochs`.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> teacher(5).examples
        {'validation': 2048, 'test': 2048}
    """
    for name, count in (("features", features), ("depth", depth), ("width", width)):
        grids.check_count(name, count)
    if classes < 2:
        raise ValueError(f"classes is {classes}; expected at least 2.")
    model = models.MLP((width,) * depth + (classes,), activation=nn.relu, feedback=False)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), STREAM), 4)
    params = model.init(keys[0], jnp.ones((1, features)))["params"]
    outputs = jax.jit(lambda x: model.apply({"params": params}, x))
    seen = outputs(jax.random.normal(keys[1], (HELD_OUT, features)))
    mean, std = seen.mean(0, keepdims=True), seen.std(0, keepdims=True)

    def examples(key, size=64):
        x = jax.random.normal(key, (size, features))
        return x, jnp.argmax((outputs(x) - mean) / std, -1).astype(jnp.int32)

    def logits(params, x):
        return model.apply({"params": params}, x)

    return Task(
        init=lambda key: model.init(key, jnp.ones((1, features)))["params"],
        loss=lambda params, batch: training.cross_entropy(logits(params, batch[0]), batch[1]),
        train=examples,
        validation=examples(keys[2], HELD_OUT),
        test=examples(keys[3], HELD_OUT),
        metrics={"accuracy": lambda params, batch: accuracy(logits(params, batch[0]), batch[1])},
        taps=Taps(model.hidden, "logits", lambda batch: jax.nn.one_hot(batch[1], classes)),
    )
