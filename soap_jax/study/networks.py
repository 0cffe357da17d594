"""The network of a study as each method computes it: its output, its loss and its gradient.

One plain network for all: methods with feedback weights differentiate it through
`soap_jax.with_feedback`, activity propagation taps it, and direct feedback has a twin of it, with
the same parameters, in which errors go another way. So its own gradient is the true one for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from soap_jax import activity, models, training, with_feedback
from soap_jax.study import methods
from soap_jax.study.config import StudyConfig


class Scaling(NamedTuple):
    """How pixels become inputs: `(pixel - mean) / std`."""

    mean: float
    std: float


class Network(NamedTuple):
    """What a method computes; losses are `(params, feedback weights, batch) -> loss`.

    Attributes:
        plain: the network without feedback.
        direct: the network by direct feedback.
        apply_fn: as in `soap_jax.training.make_train_step`.
        loss: whose gradient is the method's.
        true_loss: whose gradient is backprop's; it does not use feedback.
        value_and_grad: `learning_rate -> value_and_grad`, for `training.make_gradient_step`.
    """

    plain: models.MLP
    direct: models.DirectMLP
    apply_fn: training.ApplyFn
    loss: Callable[..., jax.Array]
    true_loss: Callable[..., jax.Array]
    value_and_grad: Callable[..., training.ValueAndGrad]


def make(
    config: StudyConfig, method: methods.Method, num_classes: int, scaling: Scaling
) -> Network:
    """Makes the network that a method trains, as pure functions.

    Args:
        config: the study's configuration.
        method: what the method trains with.
        num_classes: the size of the output.
        scaling: of the pixels.
    """
    features, activation = (*config.hidden, num_classes), getattr(nn, config.activation)
    plain = models.MLP(features, activation=activation, feedback=False)
    direct = models.DirectMLP(features, activation=activation, error=method.error or "exact")

    def inputs(x):
        return (x.astype(jnp.float32) - scaling.mean) / scaling.std

    def backprop(params, x, *tap):
        return plain.apply({"params": params}, inputs(x), *tap)

    by_feedback = with_feedback(backprop, feedback_bar=method.feedback_bar)

    def apply_fn(params, weights, x, target=None):
        if method.error is None:
            return by_feedback(params, weights, x)
        return direct.apply({"params": params, "projection": weights}, inputs(x), target)

    def loss(params, weights, batch):
        x, labels = batch
        target = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
        return training.cross_entropy(apply_fn(params, weights, x, target), labels)

    def true_loss(params, weights, batch, *tap):
        del weights
        x, labels = batch
        return training.cross_entropy(backprop(params, x, *tap), labels)

    def value_and_grad(learning_rate):
        if method.propagates_activity:
            propagate = activity.value_and_grad(
                lambda tap, params, batch: true_loss(params, None, batch, tap),
                learning_rate=learning_rate,
                warmup=methods.WARMUP,
            )
            return lambda params, weights, batch, *, step: propagate(params, batch, step=step)
        argnums = (0, 1) if method.learns_feedback else 0
        gradient = jax.value_and_grad(loss, argnums)
        return lambda params, weights, batch, *, step: gradient(params, weights, batch)

    return Network(plain, direct, apply_fn, loss, true_loss, value_and_grad)
