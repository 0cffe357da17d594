"""Trains one method over a study's grid of learning rates and seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from soap_jax import data, feedback, metrics, models, sweeps, training
from soap_jax.study import methods
from soap_jax.study.config import StudyConfig

PROBE_SIZE = 256
"""Validation examples on which the angle of the pseudo-gradient is measured."""


class Arrays(NamedTuple):
    """A data set in three parts, each of uint8 images and int32 labels.

    Attributes:
        train: what is trained on.
        validation: held out of the training set, to choose learning rates by.
        test: looked at once, at the end of a run.
    """

    train: data.Split
    validation: data.Split
    test: data.Split


class Record(NamedTuple):
    """What is kept of a run, or with leading axes `(learning_rates, seeds)` of many.

    Attributes:
        train_loss: `(steps,)` loss of each batch before its update.
        evaluations: `(evaluations + 1,)` each, by name, before training and in equal distances;
            see `evaluation_steps`.
        test_loss: scalar, at the end.
        test_accuracy: scalar, at the end.
    """

    train_loss: jax.Array
    evaluations: dict[str, jax.Array]
    test_loss: jax.Array
    test_accuracy: jax.Array


def split(dataset: data.Dataset) -> Arrays:
    """Splits a data set; a fifth of the training examples, at most 5000, are for validation."""
    num = min(len(dataset.train.labels) // 5, 5000)
    train, validation = data.split_validation(dataset.train, num)
    return Arrays(train, validation, dataset.test)


def evaluation_steps(config: StudyConfig, num_train: int) -> np.ndarray:
    """The numbers of completed updates at which a run is evaluated, `(evaluations + 1,)`.

    Runs train for the last of them: the steps of all epochs, less a remainder.

    Raises:
        ValueError: if there are fewer steps than evaluations.
    """
    steps = config.epochs * (num_train // config.batch_size)
    if steps < config.evaluations:
        raise ValueError(
            f"{config.epochs} epochs of {num_train} examples in batches of {config.batch_size} "
            f"are {steps} steps, fewer than {config.evaluations} evaluations. Ask for at most "
            f"{steps} evaluations, or for more epochs."
        )
    return np.arange(config.evaluations + 1) * (steps // config.evaluations)


def train_method(
    config: StudyConfig,
    method: str,
    dataset: data.Dataset,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Record:
    """Trains `method` at every learning rate with every seed.

    Args:
        config: the study's configuration.
        method: a name in `config.METHODS`.
        dataset: the data.
        on_progress: as in `soap_jax.sweeps.sweep`.

    Returns:
        A record of NumPy arrays with leading axes `(learning_rates, seeds)`.
    """
    arrays = split(dataset)
    run = make_run(config, method, dataset.num_classes, dataset.max_value)
    record = sweeps.sweep(
        run,
        seeds=range(config.seeds),
        learning_rates=config.learning_rates,
        periods=[config.period],
        args=(arrays,),
        chunk_size=config.chunk_size,
        on_progress=on_progress,
    )
    return jax.tree.map(lambda leaf: leaf[0], record)


def make_run(config: StudyConfig, method: str, num_classes: int, max_value: int) -> sweeps.Run:
    """Makes the pure function `(seed, learning_rate, period, arrays) -> Record` of one training.

    Initial weights, initial feedback and the order of examples come from streams of their own,
    so that runs of different methods with one seed are paired.
    """
    activation = getattr(nn, config.activation)
    features = (*config.hidden, num_classes)
    model = models.MLP(features, activation=activation, feedback=method != "bp")
    above_first = [f"Dense_{i}/kernel" for i in range(1, len(features))]

    def apply_fn(params, weights, x):
        variables = {"params": params} | ({} if weights is None else {"feedback": weights})
        return model.apply(variables, x.astype(jnp.float32) / max_value)

    def run(seed, learning_rate, period, arrays: Arrays) -> Record:
        init_key, feedback_key, order_key = jax.random.split(jax.random.key(seed), 3)
        images, labels = arrays.train
        params = model.init({"params": init_key}, images[:1].astype(jnp.float32))["params"]
        rule = methods.rule_of(method, period)
        feedback_state = None
        if rule is not None:
            feedback_state = feedback.init_feedback(feedback_key, params, rule, where=above_first)
        optimizer = optax.sgd(learning_rate)
        step = training.make_train_step(apply_fn, optimizer)
        state = training.init_train_state(params, optimizer, feedback=feedback_state)

        marks = evaluation_steps(config, len(labels))
        order = jax.vmap(lambda key: training.epoch_order(key, len(labels), config.batch_size))(
            jax.random.split(order_key, config.epochs)
        )
        order = order.reshape(-1, config.batch_size)[: marks[-1]]
        order = order.reshape(config.evaluations, -1, config.batch_size)

        def segment(state, batches):
            state, losses = training.scan_batches(step, state, arrays.train, batches)
            return state, (losses, _evaluate(apply_fn, state, arrays.validation))

        before = _evaluate(apply_fn, state, arrays.validation)
        state, (losses, after) = lax.scan(segment, state, order)
        test = training.evaluate(apply_fn, state.params, _feedback_of(state), arrays.test)
        return Record(
            train_loss=losses.reshape(-1),
            evaluations=jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), before, after),
            test_loss=test.loss,
            test_accuracy=test.accuracy,
        )

    return run


def _evaluate(apply_fn, state, validation) -> dict[str, jax.Array]:
    """One row of measurements of a model in training."""
    if state.feedback is not None:  # as the next step will use it
        synced = feedback.sync_feedback(state.params, state.feedback, state.step)
        state = state._replace(feedback=synced)
    loss, accuracy = training.evaluate(apply_fn, state.params, _feedback_of(state), validation)
    row = {"validation_loss": loss, "validation_accuracy": accuracy}
    if state.feedback is None:
        return row

    probe = jax.tree.map(lambda leaf: leaf[:PROBE_SIZE], validation)

    def gradient(params, weights):
        def loss(params):
            return training.cross_entropy(apply_fn(params, weights, probe[0]), probe[1])

        return jax.grad(loss)(params)

    pair = (state.params, state.feedback.feedback)
    row |= _columns("weight_angle", metrics.weight_angle(*pair))
    row |= _columns("norm_ratio", metrics.norm_ratio(*pair))
    row |= _columns("gradient_angle", metrics.gradient_angle(gradient, *pair))
    return row


def _columns(name: str, tree: chex.ArrayTree) -> dict[str, jax.Array]:
    """Scalars of kernels as columns such as `weight_angle/Dense_1`."""
    return {
        f"{name}/{layer}": leaves["kernel"]
        for layer, leaves in tree.items()
        if leaves["kernel"] is not None
    }


def _feedback_of(state):
    return None if state.feedback is None else state.feedback.feedback
