"""Trains one method over a study's grid of learning rates and seeds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from soap_jax import data, feedback, metrics, models, sweeps, training, trees
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


class Scaling(NamedTuple):
    """How pixels become inputs: `(pixel - mean) / std`."""

    mean: float
    std: float


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
    features = (*config.hidden, num_classes)
    has_feedback = methods.rule_of(method, 1) is not None
    model = models.MLP(features, activation=getattr(nn, config.activation), feedback=has_feedback)
    above_first = [f"Dense_{i}/kernel" for i in range(1, len(features))]

    def apply_fn(params, weights, x):
        variables = {"params": params} | ({} if weights is None else {"feedback": weights})
        return model.apply(variables, (x.astype(jnp.float32) - scaling.mean) / scaling.std)

    def optimizer(learning_rate):
        return methods.optimizer_of(method, learning_rate, optimizer=config.optimizer)

    def init(seed, learning_rate, period, images):
        init_key, feedback_key, order_key = jax.random.split(jax.random.key(seed), 3)
        params = model.init({"params": init_key}, images[:1].astype(jnp.float32))["params"]
        if config.init == "soap" and not has_feedback:
            params = methods.init_as_torch(init_key, params)
        rule, weights = methods.rule_of(method, period), None
        if rule is not None:
            weights = feedback.init_feedback(feedback_key, params, rule, where=above_first)
        state = training.init_train_state(params, optimizer(learning_rate), feedback=weights)
        return state, order_key

    def step(state, learning_rate, batch):
        return training.make_train_step(apply_fn, optimizer(learning_rate))(state, batch)

    def measure(state, learning_rate, validation):
        return _measure(apply_fn, method, state, learning_rate, validation)

    return Setup(apply_fn, init, step, measure)


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
            return state, jnp.zeros(order.shape[1])

        def segment(state, i):  # the first only measures: so XLA compiles measuring once
            state, losses = lax.cond(i > 0, train, wait, state, i)
            return state, (losses, of_method.measure(state, learning_rate, arrays.validation))

        segments = jnp.arange(config.evaluations + 1)
        state, (losses, evaluations) = lax.scan(segment, state, segments)
        test = training.evaluate(of_method.apply_fn, state.params, _feedback_of(state), arrays.test)
        return Record(
            train_loss=losses[1:].reshape(-1),
            evaluations=evaluations,
            test_loss=test.loss,
            test_accuracy=test.accuracy,
        )

    return run


def _measure(apply_fn, method, state, learning_rate, validation) -> dict[str, jax.Array]:
    """One row of measurements of a model in training."""
    if state.feedback is not None:  # as the next step will use it
        synced = feedback.sync_feedback(state.params, state.feedback, state.step)
        state = state._replace(feedback=synced)
    params, weights = state.params, _feedback_of(state)
    loss, accuracy = training.evaluate(apply_fn, params, weights, validation)
    row = {"validation_loss": loss, "validation_accuracy": accuracy}
    *hidden, _ = methods.layers(params)
    factors = _rate_factors(method, state)
    row |= {f"effective_learning_rate/{name}": learning_rate * factors[name] for name in hidden}
    if weights is None:
        return row

    probe = jax.tree.map(lambda leaf: leaf[:PROBE_SIZE], validation)
    row |= _columns("weight_angle", metrics.weight_angle(params, weights))
    row |= _columns("norm_ratio", metrics.norm_ratio(params, weights))
    pseudo, true = (
        _gradients(apply_fn, params, tree, probe)
        for tree in (weights, trees.at_kernels(params, weights))
    )
    for name in hidden:
        row[f"gradient_angle/{name}"] = metrics.angle(pseudo[0][name], true[0][name])
        of_examples = jax.vmap(metrics.angle)(pseudo[1][name], true[1][name])
        row[f"error_angle/{name}"] = jnp.nanmean(of_examples)  # NaN of those without an error
    return row


def _gradients(apply_fn, params, weights, probe):
    """Gradients of the kernels, and of each example's loss by the biases: the errors."""

    def loss(kernels, biases, x, labels):
        both = jax.tree.map(lambda kernel, bias: {"kernel": kernel, "bias": bias}, kernels, biases)
        return training.cross_entropy(apply_fn(both, weights, x), labels)

    def errors(example):
        x, label = jax.tree.map(lambda leaf: leaf[None], example)
        return jax.grad(loss, argnums=1)(kernels, biases, x, label)

    kernels = {name: layer["kernel"] for name, layer in params.items()}
    biases = {name: layer["bias"] for name, layer in params.items()}
    return jax.grad(loss)(kernels, biases, *probe), jax.vmap(errors)(probe)


def _rate_factors(method, state) -> methods.Factors:
    """By how much a method multiplies the learning rate of each layer."""
    names = methods.layers(state.params)
    if state.feedback is None:
        if method == "bp_scaled_live":
            return methods.amplification(state.params)
        kept = optax.tree_utils.tree_get(state.opt_state, "layer_factors")
        return dict.fromkeys(names, jnp.ones(())) if kept is None else kept
    along = metrics.effective_learning_rate(1.0, state.params, state.feedback.feedback)
    factor, factors = jnp.ones(()), {}
    for name in reversed(names):
        factors[name] = factor
        if along[name]["kernel"] is not None:
            factor = factor * along[name]["kernel"]
    return factors


def _columns(name: str, tree: chex.ArrayTree) -> dict[str, jax.Array]:
    """Scalars of kernels as columns such as `weight_angle/Dense_1`."""
    return {
        f"{name}/{layer}": leaves["kernel"]
        for layer, leaves in tree.items()
        if leaves["kernel"] is not None
    }


def _feedback_of(state):
    return None if state.feedback is None else state.feedback.feedback
