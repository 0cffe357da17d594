"""A whole training as one function that runs on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from soap_jax.study.trial import State, Trial


def segment(trial: Trial) -> Callable[..., tuple[State, jax.Array]]:
    """The function that trains from evaluation k - 1 to evaluation k.

    Returns:
        `(state, plan, learning_rate, index, data, k) -> (state, losses)`.
    """
    every = trial.steps // trial.evaluations

    def train(state, plan, learning_rate, index, data, k):
        def one(state, i):
            return trial.step(state, plan, learning_rate, index, data, i)

        state, losses = lax.scan(one, state, (k - 1) * every + jnp.arange(every))
        return state, losses.astype(jnp.float32)

    return train


def scanned(trial: Trial) -> Callable[..., dict[str, Any]]:
    """A whole training as one function, for `soap_jax.sweeps`.

    A run whose loss is not finite stops at the next evaluation; `store.tidy` sets its later values
    to NaN.

    Returns:
        `(seed, learning_rate, period, index, data) -> results`: `train_loss` `(steps,)`,
        the loss of each batch before its update; `evaluations`, a `(evaluations + 1,)` array for
        each column; `test`, a scalar for each metric; and `params`, if they are kept.
    """

    def run(seed, learning_rate, period, index, data):
        state, plan = trial.init(seed, learning_rate, period, index, data)
        every = trial.steps // trial.evaluations

        def train(state, k):
            return segment(trial)(state, plan, learning_rate, index, data, k)

        def wait(state, k):
            return state, jnp.where(k > 0, jnp.nan, jnp.zeros(every, jnp.float32))

        def until(carry, k):  # k = 0 only measures, so that XLA compiles the measurement once
            state, alive = carry
            state, losses = lax.cond((k > 0) & alive, train, wait, state, k)
            alive &= jnp.isfinite(losses).all()
            row = trial.measure(state, plan, learning_rate, index, data)
            return (state, alive), (losses, row)

        evaluations = jnp.arange(trial.evaluations + 1, dtype=jnp.int32)
        (state, _), (losses, rows) = lax.scan(until, (state, jnp.array(True)), evaluations)
        results = {"train_loss": losses[1:].reshape(-1), "evaluations": rows}
        results["test"] = trial.test(state, data)
        return results | ({"params": state.train.params} if trial.keep_params else {})

    return run


def every_jaxpr(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> Iterator[core.Jaxpr | core.ClosedJaxpr]:
    """A jaxpr, and the jaxprs inside its equations, such as loops and branches."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        for part in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(part):
                yield from every_jaxpr(part)


def _is_jaxpr(value) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)
