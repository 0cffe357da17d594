"""Trains one method over a study's grid of learning rates and seeds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from soap_jax import data, grids, sweeps, training
from soap_jax.feedback import glorot_normal, init_feedback
from soap_jax.study import measurements, methods, networks
from soap_jax.study.config import StudyConfig
from soap_jax.study.networks import Scaling


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
    """What is kept of a run, or with a leading axis `(runs,)` of many.

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


def scaling_of(config: StudyConfig, dataset: data.Dataset) -> Scaling:
    """The scaling of a data set's pixels, one for all of them, from the training examples."""
    if config.inputs == "unit":
        return Scaling(0.0, float(dataset.max_value))
    images = split(dataset).train.images
    return Scaling(float(images.mean()), float(images.std()))


def evaluation_steps(config: StudyConfig, num_train: int) -> np.ndarray:
    """The numbers of completed updates at which a run is evaluated, `(evaluations + 1,)`.

    Runs train for the last of them: the steps of all epochs, less a remainder.

    Raises:
        ValueError: if there are fewer steps than evaluations, or too many to be drawn at the start.
    """
    if config.epochs * num_train > grids.MOST:
        raise ValueError(
            f"{config.epochs} epochs of {num_train} examples are {config.epochs * num_train} "
            f"examples to be put in order; expected at most {grids.MOST}. Ask for fewer epochs."
        )
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
    done: Collection[sweeps.Point] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[list[sweeps.Point], Record]]:
    """Trains `method` at every learning rate and period with every seed.

    Args:
        config: the study's configuration.
        method: a name in `config.METHODS`.
        dataset: the data.
        done: runs not to do again.
        on_progress: as in `soap_jax.sweeps.sweep`.

    Yields:
        Runs as they are done, some at a time, and their record with a leading axis `(runs,)`.
    """
    arrays = split(dataset)
    run = make_run(config, method, dataset.num_classes, scaling_of(config, dataset))
    points = points_of(config, method)
    parts = sweeps.iterate(
        run,
        points,
        args=(arrays,),
        done=[i for i, point in enumerate(points) if point in done],
        chunk_size=config.chunk_size,
        memory_limit=config.memory_limit and config.memory_limit * 2**30,
        on_progress=on_progress,
    )
    for part in parts:
        yield [points[i] for i in part.indices], part.results


def points_of(config: StudyConfig, method: str) -> list[sweeps.Point]:
    """All runs of a method; the period is 0 if it never syncs."""
    points = sweeps.grid(seeds=range(config.seeds), learning_rates=config.learning_rates)
    return [point._replace(period=t) for t in config.periods_of(method) for point in points]


class Setup(NamedTuple):
    """What a method trains with.

    Attributes:
        apply_fn: as in `soap_jax.training.make_train_step`.
        init: `(seed, learning_rate, period, images) -> (state, order_key)`.
        step: `(state, learning_rate, batch) -> (state, loss)`.
        measure: `(state, learning_rate, validation) -> row of evaluations`.
    """

    apply_fn: training.ApplyFn
    init: Callable[..., tuple[training.TrainState, chex.PRNGKey]]
    step: Callable[..., tuple[training.TrainState, jax.Array]]
    measure: Callable[..., dict[str, jax.Array]]


def setup(config: StudyConfig, method: str, num_classes: int, scaling: Scaling) -> Setup:
    """Makes the pure functions that a run of `method` consists of.

    Initial weights, initial feedback and the order of examples come from streams of their own,
    so that runs of different methods with one seed are paired.
    """
    of_method = methods.of(method)
    network = networks.make(config, of_method, num_classes, scaling)
    learn_feedback = of_method.learns_feedback

    def optimizer(learning_rate):
        return methods.optimizer_of(
            method,
            learning_rate,
            optimizer=config.optimizer,
            weight_decay=config.weight_decay or 0.0,
        )

    def init(seed, learning_rate, period, images):
        init_key, feedback_key, order_key = jax.random.split(jax.random.key(seed), 3)
        images = images[:1].astype(jnp.float32)
        params = network.plain.init({"params": init_key}, images)["params"]
        if config.init == "soap" and not of_method.has_feedback:
            params = methods.init_as_torch(init_key, params)
        weights = None
        if of_method.error is not None:
            keys = {"params": init_key, "feedback": feedback_key}
            weights = network.direct.init(keys, images)["projection"]
        rule = methods.rule_of(method, period)
        if rule is not None:
            above_first = [f"{name}/kernel" for name in methods.layers(params)[1:]]
            weights = init_feedback(
                feedback_key, params, rule, where=above_first, initializer=glorot_normal
            )
        state = training.init_train_state(
            params, optimizer(learning_rate), feedback=weights, learn_feedback=learn_feedback
        )
        return state, order_key

    def step(state, learning_rate, batch):
        gradient = network.value_and_grad(learning_rate)
        return training.make_gradient_step(
            gradient, optimizer(learning_rate), learn_feedback=learn_feedback
        )(state, batch)

    def measure(state, learning_rate, validation):
        return measurements.measure(config, method, network, state, learning_rate, validation)

    return Setup(network.apply_fn, init, step, measure)


def make_run(config: StudyConfig, method: str, num_classes: int, scaling: Scaling) -> sweeps.Run:
    """Makes the pure function `(seed, learning_rate, period, arrays) -> Record` of one training."""
    of_method = setup(config, method, num_classes, scaling)

    def run(seed, learning_rate, period, arrays: Arrays) -> Record:
        state, order_key = of_method.init(seed, learning_rate, period, arrays.train.images)
        num = len(arrays.train.labels)
        marks = evaluation_steps(config, num)
        order = jax.vmap(lambda key: training.epoch_order(key, num, config.batch_size))(
            jax.random.split(order_key, config.epochs)
        )
        order = order.reshape(-1, config.batch_size)[: marks[-1]]
        order = order.reshape(config.evaluations, -1, config.batch_size)

        def step(state, batch):
            return of_method.step(state, learning_rate, batch)

        def train(state, i):
            return training.scan_batches(step, state, arrays.train, order[i - 1])

        def wait(state, i):
            return state, jnp.zeros(order.shape[1], jnp.float32)

        def segment(state, i):  # the first only measures: so XLA compiles measuring once
            state, losses = lax.cond(i > 0, train, wait, state, i)
            return state, (losses, of_method.measure(state, learning_rate, arrays.validation))

        segments = jnp.arange(config.evaluations + 1, dtype=jnp.int32)
        state, (losses, evaluations) = lax.scan(segment, state, segments)
        weights = training.feedback_weights(state.feedback)
        test = training.evaluate(of_method.apply_fn, state.params, weights, arrays.test)
        return Record(
            train_loss=losses[1:].reshape(-1),
            evaluations=evaluations,
            test_loss=test.loss,
            test_accuracy=test.accuracy,
        )

    return run
