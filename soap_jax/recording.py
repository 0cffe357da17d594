"""Metrics in a scanned training loop, once every `period` steps.

    def body(state, batch):
        state, loss = step(state, batch)
        row = record_alignment(METRICS, state.params, state.feedback, state.step, period=100)
        return state, (loss, row)

    state, (losses, rows) = jax.lax.scan(body, state, batches)
    curves = recorded(rows)            # only the measured steps

Between these steps nothing is computed, since it is a `lax.cond`. Record after the training step:
arrays that a `cond` reads before the step cannot be updated in place. (Under `vmap` both branches
of a `cond` are computed; measure between scans there.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from soap_jax import rules, trees
from soap_jax.feedback import FeedbackState, sync_feedback

Metric = Callable[[chex.ArrayTree, chex.ArrayTree], chex.ArrayTree]
"""A function `(params, feedback) -> scalar`, or tree of scalars."""


class Row(NamedTuple):
    """The measurements at one step, or with leading axes at many steps.

    Attributes:
        step: int32, the number of completed updates; -1 if nothing was measured.
        values: float scalars by metric and path, such as "weight_angle/Dense_1/kernel", as in
            loggers and the tables of `soap_jax.study`; NaN if nothing was measured.
    """

    step: jax.Array
    values: dict[str, jax.Array]


def record_alignment(
    metrics: Mapping[str, Metric],
    params: chex.ArrayTree,
    feedback: FeedbackState | chex.ArrayTree,
    step: ArrayLike,
    *,
    period: int,
) -> Row:
    """Computes metrics if `step % period == 0`; at other steps it computes nothing.

    Args:
        metrics: functions by name, such as `{"weight_angle": soap_jax.metrics.weight_angle}`. Bind
            other arguments, such as a batch: `functools.partial(soap_jax.metrics.gradient_angle,
            gradient)`; see also the example of `soap_jax.metrics.effective_rank`.
        params: as in `soap_jax.trees.map_pairs`.
        feedback: as in `soap_jax.trees.map_pairs`, or any other argument of the metrics. A
            `FeedbackState` is first synced with `step`, so metrics get the feedback that the next
            training step will use.
        step: integer scalar, the number of completed updates.
        period: the number of steps from one measurement to the next.

    Returns:
        A `Row`, of the same structure at every step.

    Raises:
        ValueError: if there are no metrics, or the period is not an integer of at least 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from soap_jax import metrics
        >>> params, feedback = {"w": jnp.eye(2)}, {"w": 3 * jnp.eye(2)}
        >>> def body(carry, step):
        ...     chosen = {"norm_ratio": metrics.norm_ratio}
        ...     return carry, record_alignment(chosen, params, feedback, step, period=2)
        >>> _, rows = jax.lax.scan(body, None, jnp.arange(5))
        >>> rows.step, rows.values["norm_ratio/w"]
        (Array([ 0, -1,  2, -1,  4], dtype=int32), Array([ 3., nan,  3., nan,  3.], dtype=float32))
        >>> recorded(rows).values["norm_ratio/w"]
        array([3., 3., 3.], dtype=float32)
    """
    if not (isinstance(metrics, Mapping) and metrics and all(map(callable, metrics.values()))):
        raise ValueError(
            f"metrics is {metrics!r}; expected functions of (params, feedback) by name, such as "
            "{'weight_angle': soap_jax.metrics.weight_angle}."
        )
    rules.check_period("record_alignment", period)

    def measure():
        weights = feedback
        if isinstance(feedback, FeedbackState):
            weights = sync_feedback(params, feedback, step).feedback
        measured = trees.named({name: of(params, weights) for name, of in metrics.items()})
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, _inexact(leaf)), measured)

    def skip():
        return jax.tree.map(
            lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), jax.eval_shape(measure)
        )

    due = jnp.asarray(step) % period == 0
    row_step = jnp.where(due, jnp.asarray(step, jnp.int32), -1)
    return Row(row_step, lax.cond(due, measure, skip))


def recorded(rows: Row) -> Row:
    """Selects the steps at which metrics were measured; call it outside `jit`.

    Args:
        rows: the stacked rows of a scan, with a leading axis `(steps,)`.

    Returns:
        A `Row` of NumPy arrays `(measured steps,)`.
    """
    rows = jax.device_get(rows)
    due = np.asarray(rows.step) >= 0
    return jax.tree.map(lambda leaf: leaf[due], rows)


def _inexact(leaf):
    dtype = jnp.result_type(leaf)
    return np.promote_types(dtype, np.float32) if jnp.issubdtype(dtype, jnp.inexact) else np.float32
