"""What is measured of a model in training: its quality, and its gradient beside the true one.

    validation_loss, validation_accuracy
    effective_learning_rate/LAYER   of hidden layers, along the true gradient
    gradient_angle/LAYER            of hidden layers' kernels; of methods with another gradient
    error_angle/LAYER               of hidden layers' errors, example by example; with feedback
    weight_angle/LAYER              of feedback weights to their kernels
    norm_ratio/LAYER                of feedback weights to their kernels

The true gradient is that of the plain network, `Network.true_loss`.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from soap_jax import metrics, training
from soap_jax.feedback import FeedbackState, sync_feedback
from soap_jax.study import methods
from soap_jax.study.config import StudyConfig
from soap_jax.study.networks import Network

PROBE_SIZE = 256
"""Validation examples on which the angles and sizes of gradients are measured."""


def measure(
    config: StudyConfig,
    method: str,
    network: Network,
    state: training.TrainState,
    learning_rate: ArrayLike,
    validation: training.Batch,
) -> dict[str, jax.Array]:
    """One row of measurements of a model in training.

    Args:
        config: the study's configuration.
        method: the method's name.
        network: what it computes.
        state: as it is.
        learning_rate: that of the run.
        validation: the validation examples.

    Returns:
        Scalars by column, such as `gradient_angle/Dense_0`.
    """
    of_method = methods.of(method)
    if isinstance(state.feedback, FeedbackState):  # as the next step will use it
        synced = sync_feedback(state.params, state.feedback, state.step)
        state = state._replace(feedback=synced)
    params, weights = state.params, training.feedback_weights(state.feedback)
    loss, accuracy = training.evaluate(network.apply_fn, params, weights, validation)
    row = {"validation_loss": loss, "validation_accuracy": accuracy}
    *hidden, _ = methods.layers(params)
    factors = _rate_factors(method, state)
    if of_method.has_feedback or of_method.propagates_activity:
        # The size of activity propagation's gradient depends on that of the batch.
        num = config.batch_size if of_method.propagates_activity else PROBE_SIZE
        probe = jax.tree.map(lambda leaf: leaf[:num], validation)
        gradient = network.value_and_grad(learning_rate)
        _, pseudo = gradient(params, weights, probe, step=state.step)
        pseudo = pseudo[0] if of_method.learns_feedback else pseudo
        true = jax.grad(network.true_loss)(params, weights, probe)
        for name in hidden:
            a, b = pseudo[name]["kernel"], true[name]["kernel"]
            row[f"gradient_angle/{name}"] = metrics.angle(a, b)
            factors.setdefault(name, _share(a, b))
    if of_method.has_feedback:
        errors = (_errors(of, params, weights, probe) for of in (network.loss, network.true_loss))
        of_examples = metrics.error_angle(*errors)
        # NaN of those without an error
        row |= {f"error_angle/{name}": jnp.nanmean(of_examples[name]) for name in hidden}
    if of_method.rule is not None:
        row |= _columns("weight_angle", metrics.weight_angle(params, weights))
        row |= _columns("norm_ratio", metrics.norm_ratio(params, weights))
    return row | {f"effective_learning_rate/{k}": learning_rate * factors[k] for k in hidden}


def _errors(loss, params, weights, probe):
    """Gradients of each example's loss by the biases, which are the errors of the layers."""
    kernels = {name: layer["kernel"] for name, layer in params.items()}
    biases = {name: layer["bias"] for name, layer in params.items()}

    def of_example(biases, example):
        both = {k: {"kernel": kernels[k], "bias": bias} for k, bias in biases.items()}
        return loss(both, weights, jax.tree.map(lambda leaf: leaf[None], example))

    return jax.vmap(jax.grad(of_example), (None, 0))(biases, probe)


def _rate_factors(method, state) -> methods.Factors:
    """By how much a method multiplies the learning rate of each layer, as far as weights tell.

    With feedback B the product over the layers above of `<B, W> / <W, W>`, by direct feedback the
    same of the path: `<Pᵀ, W> / <W, W>` with W the product of the kernels above. What sDFA and DRTP
    send is not of an error's size, and activity propagation has no weights to send it through:
    their factors are measured, as `<pseudo, true> / <true, true>` of a layer's gradient.
    """
    of_method, names = methods.of(method), methods.layers(state.params)
    if of_method.error in ("sign", "target") or of_method.propagates_activity:
        return {}
    if of_method.error is not None:
        return _path_factors(state.params, state.feedback["DirectFeedback_0"]["projection"])
    if state.feedback is None:
        if of_method.factors is not None and of_method.live:
            return of_method.factors(state.params)
        kept = optax.tree_utils.tree_get(state.opt_state, "layer_factors")
        return dict.fromkeys(names, jnp.ones((), jnp.float32)) if kept is None else kept
    along = metrics.effective_learning_rate(1.0, state.params, state.feedback.feedback)
    factor, factors = jnp.ones((), jnp.float32), {}
    for name in reversed(names):
        factors[name] = factor
        if along[name]["kernel"] is not None:
            factor = factor * along[name]["kernel"]
    return factors


def _path_factors(params, projections) -> methods.Factors:
    """`<Pᵀ, W> / <W, W>` of each projection and the product of the kernels above it."""
    *hidden, output = methods.layers(params)
    path, factors = params[output]["kernel"], {output: jnp.ones((), jnp.float32)}
    for name in reversed(hidden):
        factors[name] = _share(projections[name].T, path)
        path = jnp.matmul(params[name]["kernel"], path, precision=lax.Precision.HIGHEST)
    return factors


def _share(a, b):
    """How much of `b` there is in `a`: its length along it, relative to that of `b`."""
    return jnp.sum(a * b) / jnp.sum(b * b)


def _columns(name: str, tree: chex.ArrayTree) -> dict[str, jax.Array]:
    """Scalars of kernels as columns such as `weight_angle/Dense_1`."""
    return {
        f"{name}/{layer}": leaves["kernel"]
        for layer, leaves in tree.items()
        if leaves["kernel"] is not None
    }
