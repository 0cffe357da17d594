"""Two ways to do a training: as one function, all on the device, or step by step from Python.

On CPU XLA runs the gradients of convolutions ten times slower inside a loop
(https://github.com/jax-ml/jax/issues/12868), so trainings with some go step by step there, many
runs as a batch. Both give the same numbers to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from soap_jax import sweeps
from soap_jax.study.trial import State, Trial


def segment(trial: Trial) -> Callable[..., tuple[State, jax.Array]]:
    """`(state, plan, learning_rate, index, data, k) -> (state, losses)`, up to the k-th mark."""
    every = trial.steps // trial.marks

    def train(state, plan, learning_rate, index, data, k):
        def one(state, i):
            return trial.step(state, plan, learning_rate, index, data, i)

        state, losses = lax.scan(one, state, (k - 1) * every + jnp.arange(every))
        return state, losses.astype(jnp.float32)

    return train


def stepwise_segment(trial: Trial) -> Callable[..., tuple[State, list[jax.Array]]]:
    """The same step by step from Python, by a compiled `trial.step`."""
    every = trial.steps // trial.marks

    def train(state, plan, learning_rate, index, data, k):
        losses = []
        for i in range((k - 1) * every, k * every):
            state, loss = trial.step(state, plan, learning_rate, index, data, jnp.int32(i))
            losses.append(loss)
        return state, losses

    return train


def scanned(trial: Trial) -> Callable[..., dict[str, Any]]:
    """A whole training as one function, for `soap_jax.sweeps`.

    A run whose loss is not finite goes no further than to the next measurement; `store.tidy` leaves
    out what follows.

    Returns:
        `(seed, learning_rate, period, index, data) -> results`: `train_loss` `(steps,)`, each
        batch's before its update; `evaluations`, by column `(evaluations + 1,)`; `test`, by metric;
        `params`, if kept.
    """

    def run(seed, learning_rate, period, index, data):
        state, plan = trial.init(seed, learning_rate, period, index, data)
        every = trial.steps // trial.marks

        def train(state, k):
            return segment(trial)(state, plan, learning_rate, index, data, k)

        def wait(state, k):
            return state, jnp.where(k > 0, jnp.nan, jnp.zeros(every, jnp.float32))

        def until(carry, k):  # the first only measures: so XLA compiles measuring once
            state, alive = carry
            state, losses = lax.cond((k > 0) & alive, train, wait, state, k)
            alive &= jnp.isfinite(losses).all()
            row = trial.measure(state, plan, learning_rate, index, data)
            return (state, alive), (losses, row)

        marks = jnp.arange(trial.marks + 1, dtype=jnp.int32)
        (state, _), (losses, rows) = lax.scan(until, (state, jnp.array(True)), marks)
        results = {"train_loss": losses[1:].reshape(-1), "evaluations": rows}
        results["test"] = trial.test(state, data)
        return results | ({"params": state.train.params} if trial.keep_params else {})

    return run


def batched(trial: Trial) -> Trial:
    """The same training of many runs at once, compiled once for all methods that share it."""
    return trial._replace(
        init=jax.jit(jax.vmap(trial.init, (0, 0, None, None, None))),
        step=jax.jit(jax.vmap(trial.step, (0, 0, 0, None, None, None)), donate_argnums=0),
        measure=jax.jit(jax.vmap(trial.measure, (0, 0, 0, None, None))),
        test=jax.jit(jax.vmap(trial.test, (0, None))),
    )


def stepwise(
    of_method: Trial,
    points: Sequence[sweeps.Point],
    *,
    args: tuple,
    done: Sequence[int] = (),
    chunk_size: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[sweeps.Part]:
    """As `soap_jax.sweeps.iterate` of `scanned`, step by step from Python, runs as a batch.

    Args:
        of_method: the training, from `batched`.
        points: the runs.
        args: the method's index and the data.
        done: runs not to do again.
        chunk_size: at most so many runs at once; by default 10.
        on_progress: as there.

    Yields:
        As there.
    """
    index, data = args
    init, _, measure, test = of_method[:4]
    train, marks = stepwise_segment(of_method), of_method.marks
    finished, known = len(done), set(done)
    if on_progress:
        on_progress(finished, len(points))
    for indices in sweeps.calls_of(points, 1, chunk_size or 10)[0]:
        mine = [i for i in indices if i not in known]
        if not mine:
            continue
        seeds = jnp.array([points[i].seed for i in indices], jnp.int32)
        rates = jnp.array([points[i].learning_rate for i in indices], jnp.float32)
        state, plan = init(seeds, rates, jnp.int32(points[indices[0]].period), index, data)
        rows, losses = [measure(state, plan, rates, index, data)], []
        for k in range(1, marks + 1):
            state, part = train(state, plan, rates, index, data, k)
            losses += part
            rows.append(measure(state, plan, rates, index, data))
        results = {
            "train_loss": np.stack(losses, axis=1).astype(np.float32),
            "evaluations": jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *rows),
            "test": jax.device_get(test(state, data)),
        }
        if of_method.keep_params:
            results["params"] = jax.device_get(state.train.params)
        keep = np.array([k for k, i in enumerate(indices) if i not in known])
        finished += len(mine)
        if on_progress:
            on_progress(finished, len(points))
        yield sweeps.Part(mine, jax.tree.map(lambda leaf, keep=keep: leaf[keep], results))


def convolves(jaxpr: core.ClosedJaxpr) -> bool:
    """Whether there is a convolution in a jaxpr, however deep."""
    names = {eqn.primitive.name for part in every_jaxpr(jaxpr) for eqn in part.eqns}
    return "conv_general_dilated" in names


def every_jaxpr(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> Iterator[core.Jaxpr | core.ClosedJaxpr]:
    """A jaxpr, and those of its loops and branches."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        for part in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(part):
                yield from every_jaxpr(part)


def _is_jaxpr(value) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)
