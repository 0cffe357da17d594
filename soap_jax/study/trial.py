"""One training of a task with a method, as pure functions for its start, steps and measurements.

Methods that differ only in their rule share one program. A traced index selects the rule that syncs
feedback. Backprop is one of these methods: its feedback is W.

    validation_loss, validation_METRIC
    gradient_angle/PATH             angle between a kernel's pseudo-gradient and true gradient
    error_angle/PATH                the same for the errors at its output, mean over examples
    effective_learning_rate/PATH    rate × <pseudo, true> / <true, true> of its gradients
    effective_rank/PATH             effective rank of these errors, if requested
    weight_angle/PATH               angle between feedback and its kernel
    norm_ratio/PATH                 norm of feedback over the norm of its kernel

The measures of gradients and errors exist for every kernel but the last, whose gradient is exact.
Errors are not measured for kernels where the transform cannot follow them, nor for methods whose
update is not the gradient of a loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from soap_jax import feedback as fb
from soap_jax import grids, metrics, rules, training, trees
from soap_jax.study import methods
from soap_jax.study.methods import Method
from soap_jax.tasks import Task
from soap_jax.transform import (
    explain,
    gradient_and_errors,
    init_projections,
    with_direct_feedback,
    with_feedback,
)

PROBE_SIZE = 256
"""Examples on which gradients are compared."""
MEASURES = ("effective_rank",)
"""The measures that are computed only on request."""
LOSS_STREAM, STATE_STREAM, EVALUATION_KEY, BATCH_STREAM = range(2**30, 2**30 + 4)
"""Numbers folded into a seed's key, for streams other than params, feedback and order."""
DIRECTION_STREAM = 2**30 + 4
"""The number folded into a step's key, for the random draws of a gradient estimator."""

Optimizer = Callable[[Any], optax.GradientTransformation]
"""`learning_rate -> optimiser`."""


class Layers(NamedTuple):
    """The roles of a task's params, from `soap_jax.explain`.

    Attributes:
        kernels: paths of the kernels that errors pass through, and of the first layer's, in order
            of use.
        feedback_kernels: paths of the kernels that can have feedback.
        backprop_kernels: paths of the kernels that errors pass through by exact backprop, since
            they cannot have feedback.
        last: paths of the last kernel and of the params that are first used after it.
    """

    kernels: tuple[str, ...]
    feedback_kernels: tuple[str, ...]
    backprop_kernels: tuple[str, ...]
    last: frozenset[trees.Path]


class State(NamedTuple):
    """The state of a training: its `TrainState`, and the model's own state."""

    train: training.TrainState
    model: chex.ArrayTree


class Plan(NamedTuple):
    """The parts of a training that stay the same.

    Attributes:
        order: `(steps, batch_size)` int32, the examples of each batch; None if a function generates
            the batches.
        key: the random key of the loss and of generated batches.
    """

    order: jax.Array | None
    key: chex.PRNGKey


class Trial(NamedTuple):
    """The pure functions of a training; `data` is what `data_of` returns.

    Attributes:
        init: `(seed, learning_rate, period, index, data) -> (state, plan)`.
        step: `(state, plan, learning_rate, index, data, i) -> (state, loss)`.
        measure: `(state, plan, learning_rate, index, data) -> scalars by column`.
        test: `(state, data) -> scalars by metric`.
        steps: the number of steps.
        evaluations: the number of evaluations, equally spaced, not counting the one at the start.
        keep_params: whether the final params are among the results.
    """

    init: Callable[..., tuple[State, Plan]]
    step: Callable[..., tuple[State, jax.Array]]
    measure: Callable[..., dict[str, jax.Array]]
    test: Callable[..., dict[str, jax.Array]]
    steps: int
    evaluations: int
    keep_params: bool


def data_of(task: Task) -> dict[str, chex.ArrayTree]:
    """The task's arrays, by part."""
    return {part: jax.tree.map(jnp.asarray, getattr(task, part)) for part in task.examples}


def batch_of(task: Task, data, plan: Plan, i) -> chex.ArrayTree:
    """The i-th batch of a training."""
    if task.generated:
        return task.train(jax.random.fold_in(jax.random.fold_in(plan.key, BATCH_STREAM), i))
    return jax.tree.map(lambda leaf: leaf[plan.order[i]], data["train"])  # type: ignore[index]


def generated_batch_size(task: Task) -> int:
    """The number of examples in a batch that the task generates; 1 if that is unknown."""
    try:
        leaves = jax.tree.leaves(jax.eval_shape(task.train, jax.random.key(0)))
    except Exception:  # `checks` raises the error that explains it
        return 1
    return leaves[0].shape[0] if leaves and leaves[0].shape else 1


def loss_of(task: Task) -> Callable[..., tuple[jax.Array, chex.ArrayTree]]:
    """The task's loss as `(params, state, batch, key) -> (loss, state)`, with or without state."""
    if task.init_state is not None:
        return task.loss  # type: ignore[return-value]
    return lambda params, state, batch, key: (task.loss(params, batch), state)


def direct_feedback_loss(task: Task, method: Method) -> Callable[..., Any]:
    """The task's loss with direct feedback: `(params, projections, state, batch, key) -> ...`."""
    taps: Any = method.taps or task.taps
    bar: Any = method.feedback_bar
    initializer: Any = method.initializer
    initializer = fb.glorot_normal if initializer == "matched" else initializer

    def target(params, state, batch, key):
        return taps.target(batch)

    return with_direct_feedback(
        loss_of(task),
        taps.names,
        None if method.direct == "target" else taps.output,
        target=target if method.direct == "target" else None,
        error="sign" if method.direct == "sign" else "exact",
        stacked=taps.stacked,
        initializer=initializer,
        projection_bar=bar,
    )


def steps_of(task: Task, steps: int | None, epochs: int | None, batch_size: int) -> int:
    """The steps of a run; raises ValueError for numbers that do not fit the task."""
    if (steps is None) == (epochs is None):
        raise ValueError(f"steps is {steps} and epochs is {epochs}; expected one of the two.")
    grids.check_count("batch_size", batch_size)
    if task.generated:
        if steps is None:
            raise ValueError("epochs is given, but train is a function; expected steps.")
    elif batch_size > (num := task.examples["train"]):
        raise ValueError(
            f"batch_size is {batch_size}; expected at most {num}, the number of training examples."
        )
    elif epochs is not None:
        grids.check_count("epochs", epochs, most=grids.MOST // num)
        return epochs * (num // batch_size)
    grids.check_count("steps", steps)  # type: ignore[arg-type]
    return steps  # type: ignore[return-value]


def evaluations_of(steps: int, evaluations: int) -> int:
    """The most evaluations, up to those asked for, that drop at most a tenth of the steps.

    A run trains for a multiple of its evaluations, `steps - steps % evaluations`.

    Example:
        >>> evaluations_of(40, 20), evaluations_of(39, 20)
        (20, 19)
    """
    asked = range(min(evaluations, steps), 0, -1)
    return next(number for number in asked if 10 * (steps % number) <= steps)


def layers_of(task: Task, params, state, batch) -> Layers:
    """Reads the roles of the params from `soap_jax.explain`.

    Raises:
        ValueError: if there is no kernel that can have feedback.
    """
    rows = explain(loss_of(task), params, state, batch, jax.random.key(0), has_aux=True)
    kinds = ("feedback", "no effect", "backprop")
    kernels = [row.path for row in rows if len(row.shape) > 1 and row.effect in kinds]
    feedback_kernels = ["/".join(row.path) for row in rows if row.effect == "feedback"]
    if not feedback_kernels:
        raise ValueError(
            "the task has no kernel for feedback: no backpropagated error is multiplied by a "
            "kernel. Expected at least two layers, and a batch that is an argument of the loss. "
            f"This is what soap_jax.explain finds:\n{rows}"
        )
    backprop_kernels = [
        "/".join(row.path) for row in rows if len(row.shape) > 1 and row.effect == "backprop"
    ]
    paths = [row.path for row in rows]
    last = frozenset(paths[paths.index(kernels[-1]) :])
    return Layers(
        tuple(map("/".join, kernels)), tuple(feedback_kernels), tuple(backprop_kernels), last
    )


def shared_key(method: Method) -> tuple | None:
    """The key of a method among those that share a program; None if it needs its own."""
    if method.has_own_gradient or method.feedback_bar or method.init_feedback or method.optimizer:
        return None
    rule: Any = method.feedback_rule
    if type(rule) not in (rules.Fixed, rules.SignSync, rules.Transport, methods.Scaled):
        return None
    return rules.at_every_step(rule), method.last_only


def make(
    task: Task,
    members: tuple[Method, ...],
    layers: Layers,
    *,
    optimizer: Optimizer,
    batch_size: int,
    steps: int,
    evaluations: int,
    eval_batch_size: int | None = None,
    measures: Sequence[str] = (),
    keep_params: bool = False,
) -> Trial:
    """Makes the functions of a training with one of the methods `members`, chosen by an index.

    Initial params, feedback and the order of examples come from separate random streams, so that
    runs of different methods with the same seed are paired.

    Args:
        task: the task.
        members: one method, or several that differ only in rule, scale and `last_only`.
        layers: from `layers_of`.
        optimizer: `learning_rate -> optimiser`.
        batch_size: examples per step.
        steps: the number of updates.
        evaluations: the number of evaluations after the start; divides `steps`.
        eval_batch_size: the most examples in one batch of an evaluation; by default all.
        measures: additional measures, of `MEASURES`.
        keep_params: as in `Trial`.
    """
    method = members[0]
    learns = method.feedback_bar is not None
    task_loss = loss_of(task)
    feedback_loss: Any = with_feedback(task_loss, feedback_bar=method.feedback_bar)
    if method.direct is not None:
        feedback_loss = direct_feedback_loss(task, method)

    def method_loss(params, weights, state, batch, key):
        if method.loss is None:
            return feedback_loss(params, weights, state, batch, key)
        if task.init_state is None:
            return method.loss(params, weights, batch), state
        return method.loss(params, weights, state, batch, key)

    def value_and_grad(params, weights, state, batch, key, step, learning_rate):
        if method.estimator is not None:
            grad_fn = method.estimator(task_loss, has_aux=True)
            draw = jax.random.fold_in(key, DIRECTION_STREAM)
            return grad_fn(params, state, batch, key, key=draw)
        if method.gradient is None:
            argnums = (0, 1) if learns else 0
            gradient = jax.value_and_grad(method_loss, argnums, has_aux=True)
            return gradient(params, weights, state, batch, key)
        if task.init_state is None:
            loss, gradients = method.gradient(params, weights, batch, key, step, learning_rate)
            return (loss, state), gradients
        return method.gradient(params, weights, state, batch, key, step, learning_rate)

    def optimizer_at(learning_rate, index):
        chosen = optimizer(learning_rate)
        if method.optimizer is not None:
            chosen = method.optimizer(chosen, learning_rate)
        if not any(member.last_only for member in members):
            return chosen
        if isinstance(chosen, optax.MultiSteps):
            chosen = chosen.gradient_transformation()
        share = _share_of_hidden(members, index)

        def only(updates, params):
            del params
            of_params, *of_feedback = updates if learns else (updates,)
            kept = jax.tree_util.tree_map_with_path(
                lambda keys, u: u if trees.path_of(keys) in layers.last else u * share, of_params
            )
            return (kept, *of_feedback) if learns else kept

        return optax.chain(chosen, optax.stateless(only))

    def with_index(train, index):
        """The training's state with the method's index in the memory of the rule."""
        feedback = train.feedback
        if len(members) == 1 or not isinstance(feedback, fb.FeedbackState):
            return train
        memory = {name: own | {"index": index} for name, own in feedback.memory.items()}
        return train._replace(feedback=dataclasses.replace(feedback, memory=memory))

    def init_weights(key, params, batch, period, index):
        made = method.init_feedback and method.init_feedback(key, params, batch)
        if made is not None and method.rule is None:
            return made
        if method.direct is not None:
            model = task.init_state and jax.eval_shape(task.init_state, key)
            return init_projections(key, feedback_loss, params, model, batch, key)
        if method.has_own_gradient and method.rule is None:
            return None
        rule = method.feedback_rule
        if len(members) > 1:
            each: Any = (member.feedback_rule for member in members)
            rule = methods.AnyOf(members=tuple(map(rules.at_every_step, each)))
        where = (
            _only(layers.feedback_kernels)
            if method.where is None and made is None
            else method.where
        )
        state = fb.init_feedback(
            key, params, rule, where=where, initializer=method.initializer, feedback=made
        )
        if isinstance(rule, Mapping):
            return state
        fixed = jnp.array([isinstance(member.feedback_rule, rules.Fixed) for member in members])[
            index
        ]
        return dataclasses.replace(state, period=jnp.where(fixed, 0, jnp.maximum(period, 1)))

    def init(seed, learning_rate, period, index, data):
        key = jax.random.key(seed)
        init_key, feedback_key, order_key = jax.random.split(key, 3)
        params = task.init(init_key)
        if method.init is not None:
            params = method.init(init_key, params)
        model = task.init_state and task.init_state(jax.random.fold_in(key, STATE_STREAM))
        order = None
        if not task.generated:
            order = _order(order_key, task.examples["train"], batch_size, steps)
        plan = Plan(order, jax.random.fold_in(key, LOSS_STREAM))
        weights = init_weights(feedback_key, params, batch_of(task, data, plan, 0), period, index)
        chosen = optimizer_at(learning_rate, index)
        train = training.init_train_state(params, chosen, feedback=weights, learn_feedback=learns)
        return State(train, model), plan

    def step(state, plan, learning_rate, index, data, i):
        key = jax.random.fold_in(plan.key, i)

        def gradient(params, weights, batch, *, step):
            return value_and_grad(params, weights, state.model, batch, key, step, learning_rate)

        gradient_step = training.make_gradient_step(
            gradient, optimizer_at(learning_rate, index), learn_feedback=learns, has_aux=True
        )
        train = with_index(state.train, index)
        train, (loss, model) = gradient_step(train, batch_of(task, data, plan, i))
        return State(train, model), loss

    def measure(state, plan, learning_rate, index, data):
        key = jax.random.key(EVALUATION_KEY)
        train = with_index(state.train, index)
        params, feedback = train.params, train.feedback
        if isinstance(feedback, fb.FeedbackState):
            feedback = fb.sync_feedback(params, feedback, train.step)
        weights = training.feedback_weights(feedback)
        row: dict[str, jax.Array] = {}
        if "validation" in data:
            found = evaluate(task, params, state.model, data["validation"], eval_batch_size)
            row |= {f"validation_{name}": value for name, value in found.items()}
        probe = data.get("validation", data.get("train"))
        probe = task.train(plan.key) if probe is None else probe
        of_no_loss = method.gradient is not None or method.estimator is not None
        size = batch_size if of_no_loss else PROBE_SIZE
        probe = jax.tree.map(lambda leaf: leaf[:size], probe)
        args = state.model, probe, key
        true, true_errors = gradient_and_errors(task_loss, has_aux=True)(params, None, *args)
        if of_no_loss:
            pseudo = value_and_grad(params, weights, *args, train.step, learning_rate)[1]
            errors: dict[str, jax.Array] = {}
        elif method.loss is not None or method.direct is not None:
            of_params = gradient_and_errors(
                lambda params, *args: method_loss(params, weights, *args), has_aux=True
            )
            pseudo, errors = of_params(params, None, *args)
        else:
            pseudo, errors = gradient_and_errors(task_loss, has_aux=True)(params, weights, *args)
        num = jax.tree.leaves(probe)[0].shape[0]
        pseudo, true = map(trees.named, (pseudo, true))
        share = _share_of_hidden(members, index)
        for name in layers.kernels[:-1]:
            a, b = pseudo[name], true[name]
            row[f"gradient_angle/{name}"] = metrics.angle(a, b)
            along = share * jnp.sum(a * b) / jnp.sum(b * b)
            row[f"effective_learning_rate/{name}"] = learning_rate * along
            if name in errors and name in true_errors:
                angles = metrics.angles_by_example(errors[name], true_errors[name], num)
                row[f"error_angle/{name}"] = jnp.nanmean(
                    angles
                )  # NaN for examples without an error
            if name in errors and "effective_rank" in measures:
                rank = metrics.effective_rank(errors[name], batch_size=num)
                row[f"effective_rank/{name}"] = rank
        if not method.has_own_gradient:
            for metric in (metrics.weight_angle, metrics.norm_ratio):
                found = trees.named(metric(params, weights))
                row |= {f"{metric.__name__}/{name}": value for name, value in found.items()}
        return row

    def test(state, data):
        if "test" not in data:
            return {}
        return evaluate(task, state.train.params, state.model, data["test"], eval_batch_size)

    return Trial(init, step, measure, test, steps, evaluations, keep_params)


def evaluate(task: Task, params, state, data, batch_size: int | None = None):
    """The loss and the metrics of a model on examples, by name; batches are weighted by size.

    Args:
        task: the task with the loss and the metrics.
        params: the model's params.
        state: the model's state; None if the task has none.
        data: the examples.
        batch_size: the most examples in one batch; by default all.
    """

    def one(batch):
        key = jax.random.key(EVALUATION_KEY)
        args = (params, batch) if task.init_state is None else (params, state, batch)
        found = {name: metric(*args) for name, metric in task.metrics.items()}
        if "loss" not in found:
            found = {"loss": loss_of(task)(params, state, batch, key)[0], **found}
        return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}

    num = jax.tree.leaves(data)[0].shape[0]
    size = min(batch_size or num, num)
    whole = num // size
    if whole == 1 and size == num:
        return one(data)
    batches = jax.tree.map(lambda x: x[: whole * size].reshape(whole, size, *x.shape[1:]), data)
    total = jax.tree.map(lambda values: size * values.sum(), lax.map(one, batches))
    if rest := num - whole * size:
        last = one(jax.tree.map(lambda leaf: leaf[-rest:], data))
        total = jax.tree.map(lambda a, b: a + rest * b, total, last)
    return jax.tree.map(lambda value: value / num, total)


def _order(key, num, batch_size, steps):
    epochs = -(-steps // (num // batch_size))
    keys = jax.random.split(key, epochs)
    order = jax.vmap(lambda key: training.epoch_order(key, num, batch_size))(keys)
    return order.reshape(-1, batch_size)[:steps]


def _share_of_hidden(members, index):
    """The factor on the updates of hidden layers: 0 if only the last kernel learns, else 1."""
    return jnp.array([float(not member.last_only) for member in members], jnp.float32)[index]


def _only(names):
    return lambda path, leaf: path in names
