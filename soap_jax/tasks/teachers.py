"""Classification with labels from a random network, with any number of classes."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from soap_jax import grids, models, training
from soap_jax.tasks.task import Taps, Task, accuracy

HELD_OUT = 2048
"""The number of validation examples, and of test examples."""
STREAM = 2**30 - 1
"""A number folded into the teacher's key, so that no student has the teacher's initial weights."""


def teacher(
    classes: int, *, features: int = 32, depth: int = 3, width: int = 64, seed: int = 0
) -> Task:
    """Makes the task of learning the classes of a random ReLU network, the teacher.

    Teacher and student have the same architecture: `features` inputs, `depth` hidden layers of
    `width` ReLUs, and `classes` outputs. The student starts from other weights. Inputs x are
    standard normal, new in every batch. The label is the index of the largest output of the
    teacher, after each output is normalised to mean 0 and variance 1 over inputs:

        label = argmaxⱼ (tⱼ(x) - mean tⱼ) / std tⱼ

    so that few classes are rare. The error has one entry per class, so the task shows how direct
    feedback depends on the size of the output.

    Args:
        classes: number of classes, at least 2.
        features: number of inputs.
        depth: number of hidden layers of both networks.
        width: width of each hidden layer.
        seed: seed of the teacher and of validation and test examples.

    Returns:
        The task. A function makes its batches of 64 examples, so give the study `steps`, not
        `epochs`.

    Raises:
        ValueError: if a number is out of range.

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
