"""Metrics within a scanned training loop, every so many steps.

    def body(state, batch):
        state, loss = step(state, batch)
        row = record_alignment(METRICS, state.params, state.feedback, state.step, period=100)
        return state, (loss, row)

    state, (losses, rows) = jax.lax.scan(body, state, batches)
    curves = recorded(rows)            # of the steps that were measured alone

Between those steps nothing is computed: it is a `lax.cond`. Record after the step: what a `cond`
reads before it cannot be updated in place. (Under `vmap` a `cond` computes both sides; there
measure outside, between scans.)
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
"""`(params, feedback) -> scalar, or tree of scalars`."""


class Row(NamedTuple):
    """What was measured at one step, or with leading axes at many.

    Attributes:
        step: int32, the number of completed updates; -1 where nothing was measured.
        values: float scalars by metric and path, such as "weight_angle/Dense_1/kernel", as loggers
            and the tables of `soap_jax.study` have them; NaN where nothing was measured.
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
    """Measures where `step % period == 0`, and computes nothing elsewhere.

    Args:
        metrics: by name, such as `{"weight_angle": soap_jax.metrics.weight_angle}`; bind what else
            a metric needs, such as a batch: `functools.partial(soap_jax.metrics.gradient_angle,
            gradient)`, or as `soap_jax.metrics.effective_rank` shows.
        params: as in `soap_jax.trees.map_pairs`.
        feedback: as there, or whatever the metrics take. A `FeedbackState` is synced first, with
            `step`, so that metrics see the feedback that the next training step will use.
        step: integer scalar, the number of completed updates.
        period: steps from one row to the next.

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
    """Keeps the steps at which something was measured; call it outside `jit`.

    Args:
        rows: what a scan stacked, with a leading axis `(steps,)`.

    Returns:
        The same with NumPy arrays `(measured steps,)`.
    """
    rows = jax.device_get(rows)
    due = np.asarray(rows.step) >= 0
    return jax.tree.map(lambda leaf: leaf[due], rows)


def _inexact(leaf):
    dtype = jnp.result_type(leaf)
    return np.promote_types(dtype, np.float32) if jnp.issubdtype(dtype, jnp.inexact) else np.float32
