"""Training on the device: a training step, a scanned epoch, an evaluation.

    step = make_train_step(apply_fn, optimizer)
    state = init_train_state(params, optimizer, feedback=init_feedback(key, params, rule))
    state, losses = train_epoch(step, state, (images, labels), key, batch_size=64)

An `apply_fn` is any function `(params, feedback, x) -> outputs`, from any library. For a Linen
model:

    def apply_fn(params, feedback, x):
        return model.apply({"params": params, "feedback": feedback}, x)

All functions are pure. `train_epoch` and `evaluate` are compiled once for each `step` or
`apply_fn`, so create these only once, outside the loop. If you `jit` a step yourself, donate the
state (`jax.jit(step, donate_argnums=0)`); otherwise feedback is copied at every step. `sweep`,
which runs many trainings as one program, is explained in `soap_jax.sweeps`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from soap_jax import convolutions, grids, rules
from soap_jax.activity import ValueAndGrad as ValueAndGrad
from soap_jax.feedback import FeedbackState, sync_feedback, sync_feedback_unless
from soap_jax.sweeps import sweep as sweep

ApplyFn = Callable[[chex.ArrayTree, chex.ArrayTree | None, jax.Array], jax.Array]
"""A function `(params, feedback, x) -> outputs`."""

LossFn = Callable[[jax.Array, jax.Array], jax.Array]
"""A function `(outputs, targets) -> loss`, a scalar."""

Batch = tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]
"""A pair `(x, targets)`, with examples along the first axis of both."""


class TrainState(NamedTuple):
    """The state of training between steps.

    Attributes:
        params: the parameters.
        feedback: a `FeedbackState`, which is synced; or feedback weights or projections, which are
            not; None for exact backpropagation.
        opt_state: the optimiser's state, over `params`, or over `(params, feedback weights)` if the
            optimiser updates feedback.
        step: int32 scalar, the number of completed parameter updates; `make_train_step` defines
            which calls complete an update.
    """

    params: chex.ArrayTree
    feedback: FeedbackState | chex.ArrayTree | None
    opt_state: optax.OptState
    step: jax.Array


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]
"""A function `(state, batch) -> (state, loss)`."""


class Evaluation(NamedTuple):
    """A model's loss and accuracy on a data set.

    Attributes:
        loss: scalar, the mean loss.
        accuracy: scalar, the share of examples whose largest output is at the label; NaN if any
            output is not finite.
    """

    loss: jax.Array
    accuracy: jax.Array


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the mean softmax cross-entropy.

    Args:
        logits: `(batch, classes)`.
        labels: `(batch,)`, integers.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(cross_entropy(jnp.zeros((4, 10)), jnp.arange(4))), 4)
        2.3026
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def init_train_state(
    params: chex.ArrayTree,
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    *,
    feedback: FeedbackState | chex.ArrayTree | None = None,
    learn_feedback: bool = False,
) -> TrainState:
    """Makes the state before the first update.

    Args:
        params: the parameters.
        optimizer: an Optax optimiser, or `optax.MultiSteps` around one.
        feedback: from `init_feedback`, or a tree of projections; None for exact backpropagation.
        learn_feedback: as in `make_train_step`.

    Returns:
        The state, at step 0.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> int(init_train_state({"w": jnp.ones(2)}, optax.sgd(0.1)).step)
        0
    """
    learnt = (params, feedback_weights(feedback)) if learn_feedback else params
    opt_state = _without_aliases(optimizer.init(learnt), params)
    return TrainState(params, feedback, opt_state, jnp.zeros((), jnp.int32))


def feedback_weights(feedback: FeedbackState | chex.ArrayTree | None) -> chex.ArrayTree | None:
    """Returns the feedback argument of an `apply_fn`: a state's feedback tree, or given weights.

    Example:
        >>> feedback_weights({"projection": 1}), feedback_weights(None)
        ({'projection': 1}, None)
    """
    return feedback.feedback if isinstance(feedback, FeedbackState) else feedback


def make_train_step(
    apply_fn: ApplyFn,
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    *,
    loss_fn: LossFn = cross_entropy,
    learn_feedback: bool = False,
) -> TrainStep:
    """Makes a training step: syncs feedback, computes the gradient, updates the parameters.

    Feedback is synced first, with the number of completed updates, so learning starts with synced
    feedback. A call completes an update unless the optimiser's state shows that the update was held
    back:

    -   by `optax.MultiSteps`, between two updates, or if its `should_skip_update_fn` skips one;
    -   by `optax.apply_every`, between two updates;
    -   by `optax.apply_if_finite`, if the gradient is not finite. (After too many of these it
        applies such an update. Its state does not show this, so this call does not count either.)

    After such a call `step` is unchanged, and the next call does not sync again. Every other call
    counts, even if no parameter changed. So a call counts if `optax.conditionally_mask` or your own
    wrapper sets the update to zero, since their states do not show this. It also counts if
    `apply_if_finite` or `apply_every` is used inside `optax.masked` or `optax.partition`, on a part
    of the parameters only.

    The optimiser gets Optax's extra arguments: `value`, the loss; `grad`; and `value_fn`, the loss
    as a function of the learned values, for this batch and feedback. The gradient of `value_fn` is
    the training gradient, with feedback a pseudo-gradient.

    Args:
        apply_fn: `(params, feedback, x) -> outputs`; feedback is `state.feedback.feedback`, or None
            if the state has no feedback.
        optimizer: the optimiser with which the state was made.
        loss_fn: `(outputs, targets) -> loss`.
        learn_feedback: whether the optimiser also updates feedback, for Kolen-Pollack learning and
            the losses of `soap_jax.local`. The optimiser is then over the pair `(params, feedback
            weights)`, and `feedback_bar` of the layers or of `with_feedback` sets the gradient by
            feedback (zeros by default).

    Returns:
        A pure function `(state, batch) -> (state, loss)`, with the loss before the update. Jit it
        with `donate_argnums=0`, or scan it.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from soap_jax import ops
        >>> def apply_fn(params, feedback, x):
        ...     return ops.feedback_dense(x, params["w"], feedback and feedback["w"])
        >>> optimizer = optax.sgd(0.1)
        >>> step = jax.jit(make_train_step(apply_fn, optimizer), donate_argnums=0)
        >>> state = init_train_state({"w": jnp.zeros((3, 2))}, optimizer)
        >>> state, loss = step(state, (jnp.ones((4, 3)), jnp.array([0, 1, 1, 1])))
        >>> round(float(loss), 4), int(state.step)
        (0.6931, 1)
    """

    def loss_of(params, weights, batch):
        x, targets = batch
        return loss_fn(apply_fn(params, weights, x), targets)

    def value_and_grad(params, weights, batch, *, step):
        del step
        argnums = (0, 1) if learn_feedback else 0
        return jax.value_and_grad(loss_of, argnums)(params, weights, batch)

    return make_gradient_step(value_and_grad, optimizer, learn_feedback=learn_feedback)


def make_gradient_step(
    value_and_grad: ValueAndGrad,
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    *,
    learn_feedback: bool = False,
    has_aux: bool = False,
) -> TrainStep:
    """Makes a training step from any function that returns a loss and a gradient.

    It is for losses that need more than outputs and targets, such as
    `soap_jax.direct.direct_target`, and for gradients that `jax.grad` does not compute, such as
    those of `soap_jax.activity`.

    Args:
        value_and_grad: `(params, feedback weights, batch, step=step) -> (loss, gradient)`, with
            `step` the number of completed updates. The gradient is by params, or with
            `learn_feedback` by `(params, feedback weights)`.
        optimizer: as in `make_train_step`.
        learn_feedback: as in `make_train_step`.
        has_aux: whether `value_and_grad` returns `((loss, aux), gradient)`, as in `jax.grad`.

    Returns:
        As `make_train_step`; with `has_aux`, a function `(state, batch) -> (state, (loss, aux))`.

    Raises:
        ValueError: when the step is traced, if `learn_feedback` is True and there is no feedback.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> def value_and_grad(params, feedback, batch, *, step):
        ...     return params, 1.0  # whatever the batch
        >>> optimizer = optax.sgd(0.25)
        >>> step = make_gradient_step(value_and_grad, optimizer)
        >>> state, loss = step(init_train_state(jnp.array(1.0), optimizer), None)
        >>> float(state.params)
        0.75
    """
    optimizer_update = _with_extra_args(optimizer)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        feedback = state.feedback
        if isinstance(feedback, FeedbackState):
            feedback = _sync(state.params, feedback, state)
            batch = _after_sync(batch, feedback)
        weights = feedback_weights(feedback)
        if learn_feedback and weights is None:
            raise ValueError(
                "learn_feedback is True and the state has no feedback; expected "
                "init_train_state(..., feedback=init_feedback(...), learn_feedback=True)."
            )
        learnt = (state.params, weights) if learn_feedback else state.params
        if learn_feedback:
            _check_learns_feedback(optimizer, state.opt_state, learnt)

        def gradient_at(learnt):
            params, feedback_ = learnt if learn_feedback else (learnt, weights)
            return value_and_grad(params, feedback_, batch, step=state.step)

        value, gradient = gradient_at(learnt)
        loss = value[0] if has_aux else value
        updates, opt_state = optimizer_update(
            gradient,
            state.opt_state,
            learnt,
            value=loss,
            grad=gradient,
            value_fn=_value_fn(gradient_at, has_aux),
        )
        learnt = optax.apply_updates(learnt, updates)
        params, weights = learnt if learn_feedback else (learnt, weights)
        if learn_feedback and isinstance(feedback, FeedbackState):
            feedback = dataclasses.replace(feedback, feedback=weights)
        elif learn_feedback:
            feedback = weights
        completed = _completed_updates(state.opt_state, opt_state)
        return TrainState(params, feedback, opt_state, state.step + completed), value

    return step


@functools.partial(jax.jit, static_argnames=("step", "batch_size"), donate_argnames=("state",))
def train_epoch(
    step: TrainStep,
    state: TrainState,
    data: Batch,
    key: chex.PRNGKey,
    *,
    batch_size: int,
) -> tuple[TrainState, jax.Array]:
    """Trains on every example once, in a random order, as one scan.

    Data stay on the device in their dtype, with one copy per device (replicated on an explicit
    mesh). A last, incomplete batch is left out.

    On CPU convolutions are computed as matrix products, which are fast in a loop; see
    `soap_jax.convolutions`.

    Args:
        step: a training step from `make_train_step`.
        state: the state before the epoch; it is donated, so use only the returned state afterwards.
        data: `(x, targets)`, or any tree of arrays with examples along their first axis.
        key: a PRNG key for the order.
        batch_size: number of examples per step.

    Returns:
        The state after the epoch, and the loss of each step, `(examples // batch_size,)`.

    Raises:
        ValueError: if the batch size is not an integer between 1 and the number of examples, or if
            the arrays differ in their number of examples.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> count = lambda state, batch: (state + batch[0].size, batch[1].sum())
        >>> data = (jnp.ones(10), jnp.ones(10))
        >>> total, losses = train_epoch(count, 0, data, jax.random.key(0), batch_size=3)
        >>> int(total), losses
        (9, Array([3., 3., 3.], dtype=float32))
    """
    order = epoch_order(key, num_examples(data), batch_size)
    return scan_batches(step, state, data, order)


def num_examples(data: chex.ArrayTree, name: str = "data") -> int:
    """Returns the number of examples, the length of the first axis of every array.

    Args:
        data: a tree of arrays, such as `(x, targets)`.
        name: the name of the data, for the message.

    Raises:
        ValueError: if the arrays differ in it, or there are no examples.

    Example:
        >>> import jax.numpy as jnp
        >>> num_examples((jnp.ones((12, 3)), jnp.arange(12)))
        12
    """
    lengths = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(data):
        at = jax.tree_util.keystr(keys) or "the array"
        if not getattr(leaf, "shape", ()):
            said = jax.typeof(leaf) if isinstance(leaf, jax.Array) else repr(leaf)
            raise ValueError(
                f"{name} has {said} at {at}; expected arrays with examples as their first axis."
            )
        lengths[at] = leaf.shape[0]
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        said = ", ".join(f"{length} at {at}" for at, length in lengths.items()) or "none"
        raise ValueError(f"{name} has examples: {said}; expected the same number, at least 1.")
    return next(iter(lengths.values()))


def epoch_order(key: chex.PRNGKey, num_examples: int, batch_size: int) -> jax.Array:
    """Draws the batches of an epoch, as indices `(num_examples // batch_size, batch_size)`.

    Raises:
        ValueError: if the batch size is not an integer between 1 and the number of examples.

    Example:
        >>> import jax
        >>> epoch_order(jax.random.key(0), 10, 3).shape
        (3, 3)
    """
    grids.check_count("batch_size", batch_size)
    if batch_size > num_examples:
        raise ValueError(
            f"batch_size is {batch_size}; expected at most {num_examples}, the number of examples."
        )
    steps = num_examples // batch_size
    order = jax.random.permutation(key, np.arange(num_examples, dtype=np.int32))
    return order[: steps * batch_size].reshape(steps, batch_size)


def scan_batches(
    step: TrainStep, state: TrainState, data: Batch, order: jax.Array
) -> tuple[TrainState, jax.Array]:
    """Scans `step` over the batches of `data` with the indices `order`.

    On CPU convolutions are computed as matrix products, as in `train_epoch`.

    Args:
        step: as in `train_epoch`.
        state: the state before the first step.
        data: as in `train_epoch`.
        order: `(steps, batch_size)`, indices of examples, as from `epoch_order`.

    Returns:
        The state after the last step, and the loss of each step, `(steps,)`.

    Raises:
        ValueError: if the arrays differ in their number of examples.

    Example:
        >>> import jax.numpy as jnp
        >>> first = lambda state, batch: (state, batch[0][0])
        >>> scan_batches(first, 0, (jnp.arange(9), jnp.arange(9)), jnp.array([[5, 1], [7, 2]]))[1]
        Array([5, 7], dtype=int32)
    """
    num_examples(data)
    data = jax.tree.map(jnp.asarray, data)
    step = convolutions.as_products(step)

    def body(state, indices):
        return step(state, jax.tree.map(lambda leaf: leaf[indices], data))

    return lax.scan(body, state, order)


@functools.partial(jax.jit, static_argnames=("apply_fn", "loss_fn", "batch_size"))
def evaluate(
    apply_fn: ApplyFn,
    params: chex.ArrayTree,
    feedback: FeedbackState | chex.ArrayTree | None,
    data: Batch,
    *,
    loss_fn: LossFn = cross_entropy,
    batch_size: int = 1000,
) -> Evaluation:
    """Computes the mean loss and the accuracy over a data set, batch by batch.

    Args:
        apply_fn: as in `make_train_step`.
        params: the parameters.
        feedback: a feedback tree or state, or None; the forward pass does not depend on its values.
        data: `(x, labels)`.
        loss_fn: `(outputs, labels) -> loss`, a mean over examples.
        batch_size: the largest number of examples in one batch.

    Returns:
        An `Evaluation`.

    Raises:
        ValueError: if the batch size is not an integer of at least 1, or if the arrays differ in
            their number of examples.

    Example:
        >>> import jax.numpy as jnp
        >>> data = (jnp.eye(3), jnp.array([0, 1, 1]))
        >>> round(float(evaluate(lambda p, b, x: x, None, None, data).accuracy), 3)
        0.667
    """
    grids.check_count("batch_size", batch_size)
    num = num_examples(data)
    feedback = feedback_weights(feedback)

    def one(example):
        x, label = jax.tree.map(lambda leaf: leaf[None], example)
        outputs = apply_fn(params, feedback, x)
        hit = (jnp.argmax(outputs, -1)[0] == label[0]).astype(jnp.float32)
        return loss_fn(outputs, label), jnp.where(jnp.isfinite(outputs).all(), hit, jnp.nan)

    losses, hits = lax.map(one, data, batch_size=min(batch_size, num))
    return Evaluation(losses.mean(), hits.mean())


def _without_aliases(opt_state, params):
    """Copies arrays that occur twice in the optimiser's state or in params, for donation."""
    seen = {id(leaf) for leaf in jax.tree.leaves(params)}

    def own(leaf):
        if id(leaf) in seen and isinstance(leaf, jax.Array):
            return jnp.copy(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, opt_state)


def _check_learns_feedback(optimizer, opt_state, learnt):
    """Raises ValueError unless the optimiser's state is over `(params, feedback)`."""
    expected = jax.tree.structure(jax.eval_shape(optimizer.init, learnt))
    if expected != jax.tree.structure(opt_state):  # type: ignore[operator]
        raise ValueError(
            "the optimiser's state is not over (params, feedback), as learn_feedback=True needs; "
            "expected init_train_state(..., learn_feedback=True), or optimizer.init((params, "
            "feedback))."
        )


def _with_extra_args(optimizer):
    """Returns the optimiser's `update`, which accepts Optax's extra arguments."""
    if isinstance(optimizer, optax.MultiSteps):  # not a GradientTransformation, but passes them on
        return optimizer.update
    return optax.with_extra_args_support(optimizer).update


def _value_fn(value_and_grad, has_aux):
    """Returns the loss as a function whose gradient is the one that `value_and_grad` returns.

    To differentiate `value_and_grad(x)[0]` would be wrong: it would differentiate the forward
    passes of functions with custom derivatives, so errors would be multiplied by kernels.
    """

    def loss_and_grad(x):
        value, gradient = value_and_grad(x)
        return (value[0] if has_aux else value), gradient

    @jax.custom_vjp
    def value(x):
        return loss_and_grad(x)[0]

    def value_bwd(gradient, value_bar):
        def scaled(leaf):
            return jnp.asarray(value_bar, leaf.dtype) * leaf

        return (jax.tree.map(scaled, gradient),)

    value.defvjp(loss_and_grad, value_bwd)
    return lambda x: value(x)  # Optax reads the names of its arguments


def _sync(params, feedback, state):
    """Syncs feedback, unless the update of the last call was held back, after its sync."""
    held_back = [_held_back(wrapper) for wrapper in _wrappers(state.opt_state)]
    if not held_back:
        return sync_feedback(params, feedback, state.step)
    any_held_back = functools.reduce(jnp.logical_or, held_back)
    return sync_feedback_unless(any_held_back, params, feedback, state.step)


def _after_sync(batch, feedback):
    """Returns the batch; on GPU it depends on the synced feedback, so the sync comes first.

    If the forward pass comes before the sync, XLA for GPU may keep the errors of all layers until
    the end of the backward pass, since the sync and the update both use the params' memory.
    """
    if isinstance(feedback.rule, rules.Fixed):
        return batch
    leaves, structure = jax.tree.flatten(batch)
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)}

    def wait(arrays, feedback):
        return lax.optimization_barrier((arrays, feedback))[0]

    arrays = lax.platform_dependent(
        arrays, feedback, cuda=wait, rocm=wait, default=lambda arrays, feedback: arrays
    )
    return jax.tree.unflatten(structure, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])


def _held_back(wrapper) -> jax.Array:
    """Whether the update of the last call was held back, according to a wrapper's state."""
    if isinstance(wrapper, optax.ApplyIfFiniteState):
        return jnp.logical_not(wrapper.last_finite)
    if isinstance(wrapper, optax.ApplyEvery):
        return wrapper.count != 0
    skipped = wrapper.skip_state
    said = skipped.get("should_skip", False) if isinstance(skipped, dict) else False
    return jnp.logical_or(wrapper.mini_step != 0, said)


def _completed_updates(before, after) -> jax.Array | int:
    """Returns 1, or 0 if a wrapper held back the update between two states of the optimiser."""
    completed: jax.Array | int = 1
    for old, new in zip(_wrappers(before), _wrappers(after), strict=True):
        if isinstance(new, optax.MultiStepsState):  # its count covers all kinds of skipped updates
            now = new.gradient_step != old.gradient_step
        else:
            now = jnp.logical_not(_held_back(new))
        completed = completed * now.astype(jnp.int32)
    return completed


_WRAPPERS = (optax.MultiStepsState, optax.ApplyIfFiniteState, optax.ApplyEvery)


def _wrappers(opt_state) -> list:
    """The states of wrappers that hold back updates, outermost first."""
    found = list(_find_wrappers(opt_state))
    num = sum(isinstance(state, optax.MultiStepsState) for state in found)
    if num > 1:
        raise ValueError(
            f"the optimiser's state has {num} states of optax.MultiSteps; expected at most "
            "one, since feedback is synced by the number of its updates."
        )
    return found


def _find_wrappers(node, in_part=False):
    stop = (*_WRAPPERS, optax.MaskedState)
    for state in jax.tree.leaves(node, is_leaf=lambda inner: isinstance(inner, stop)):
        if not isinstance(state, stop):
            continue
        if isinstance(state, optax.MultiStepsState if in_part else _WRAPPERS):
            yield state
        yield from _find_wrappers(tuple(state), in_part or isinstance(state, optax.MaskedState))
