"""A task: a model's initial params, its loss, data and metrics, without a learning method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from soap_jax import training

Data: TypeAlias = chex.ArrayTree
"""A tree of arrays, all with examples as their first axis."""


class Taps(NamedTuple):
    """The names of values that get direct feedback, and of the error or target that is sent.

    The loss names a value with `jax.ad_checkpoint.checkpoint_name(h, "h")`; see
    `soap_jax.with_direct_feedback`.

    Attributes:
        names: the names of the values.
        output: the name of the value whose error is sent, such as the logits.
        target: `batch -> targets`, such as one-hot labels, which DRTP sends; None if there are
            none.
        stacked: for values inside a scan, as in `with_direct_feedback`.
    """

    names: tuple[str, ...]
    output: str
    target: Callable[[Any], jax.Array] | None = None
    stacked: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A task, with everything that training needs except the learning method.

    With `init_state` the model has a state, such as the statistics of batch normalisation, and its
    loss may draw random numbers, as for dropout. The functions then have more arguments:

        loss      (params, state, batch, key) -> (scalar, state)
        metrics   (params, state, batch) -> scalar

    Functions must be pure. Values that a loss closes over are constants: the batch is an argument.

    Attributes:
        init: `key -> params`, any pytree of any library.
        loss: `(params, batch) -> scalar`, the mean over the batch.
        train: the training examples; or a function `key -> batch` that makes them on the device.
        validation: validation examples, with which learning rates are chosen; or None.
        test: test examples, which are used once, at the end of a run; or None.
        metrics: functions by name, `(params, batch) -> scalar`, the mean over the batch. A metric
            named "loss" replaces the loss in evaluations. Otherwise the loss of a model with a
            state is evaluated with a fixed key, and the state that it returns is dropped.
        init_state: `key -> state`; None for a model without a state.
        taps: the named values of the loss for direct feedback (DFA, sDFA, DRTP); or None.

    Raises:
        ValueError: if `init`, `loss`, `init_state` or a metric is not a function, if a metric's
            name cannot name a column, or if the arrays of a part differ in length or are empty.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jnp.linspace(-1.0, 1.0, 8)[:, None]
        >>> task = Task(
        ...     init=lambda key: {"kernel": jax.random.normal(key, (1, 1))},
        ...     loss=lambda params, batch: jnp.mean((batch[0] @ params["kernel"] - batch[1]) ** 2),
        ...     train=(x, 2 * x),
        ... )
        >>> task.examples
        {'train': 8}
    """

    init: Callable[[chex.PRNGKey], chex.ArrayTree]
    loss: Callable[..., jax.Array]
    train: Data | Callable[[chex.PRNGKey], chex.ArrayTree]
    validation: Data | None = None
    test: Data | None = None
    metrics: Mapping[str, Callable[..., jax.Array]] = dataclasses.field(default_factory=dict)
    init_state: Callable[[chex.PRNGKey], chex.ArrayTree] | None = None
    taps: Taps | None = None

    def __post_init__(self):
        for name in ("init", "loss", "init_state"):
            value = getattr(self, name)
            if not callable(value) and (value is not None or name != "init_state"):
                raise ValueError(f"{name} is {value!r}; expected a function.")
        metrics = self.metrics
        if not (isinstance(metrics, Mapping) and all(map(callable, metrics.values()))):
            raise ValueError(
                f"metrics is {metrics!r}; expected functions by name, such as "
                "{'accuracy': accuracy}."
            )
        for name in metrics:
            if not (isinstance(name, str) and name and "/" not in name):
                raise ValueError(f"a metric is named {name!r}; expected a word without '/'.")
        for name in ("train", "validation", "test"):
            part = getattr(self, name)
            if not callable(part) if name == "train" else part is not None:
                object.__setattr__(self, name, jax.tree.map(_as_array, part))
                _check_data(name, getattr(self, name))

    @property
    def generated(self) -> bool:
        """Whether a function makes the training examples."""
        return callable(self.train)

    @property
    def examples(self) -> dict[str, int]:
        """The number of examples of each part that consists of arrays."""
        parts = {name: getattr(self, name) for name in ("train", "validation", "test")}
        return {
            name: training.num_examples(part, name)
            for name, part in parts.items()
            if part is not None and not callable(part)
        }


def _as_array(leaf):
    """Converts array-like leaves, such as pandas tables, to arrays in native byte order."""
    if isinstance(leaf, jax.Array) or not getattr(leaf, "shape", ()):
        return leaf
    array = np.asanyarray(leaf)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _check_data(name, part):
    training.num_examples(part, name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(part):
        keys = jax.tree_util.keystr(path) or "the array"
        kinds = (np.number, np.bool_, jax.dtypes.prng_key)
        if isinstance(leaf, np.ma.MaskedArray) or not any(
            jnp.issubdtype(leaf.dtype, kind) for kind in kinds
        ):
            raise ValueError(
                f"{name} has {type(leaf).__name__} of {leaf.dtype} at {keys}; expected numbers."
            )
        held: Any = jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True)
        whole = held != leaf.dtype and np.issubdtype(held, np.integer)
        if whole and np.any(leaf != np.asarray(leaf).astype(held)):
            raise ValueError(
                f"{name} has integers that are too large for {held} at {keys}; expected integers "
                f"within {held}, JAX's widest integer dtype in this configuration."
            )


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the share of examples whose largest logit is at the label; NaN if not finite."""
    hits = jnp.argmax(logits, -1) == labels
    return jnp.where(jnp.isfinite(logits).all(), hits.mean(), jnp.nan)
