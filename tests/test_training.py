"""Training: the step against NumPy and Optax by hand, the epoch, checkpoints, many devices."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from soap_jax import (
    Fixed,
    SignSync,
    Transport,
    init_feedback,
    kolen_pollack,
    models,
    ops,
    training,
    trees,
)
from soap_jax.training import TrainState

SIZES = (4, 7, 5, 3)
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
SGD = optax.sgd(0.5)


def make_data(num_examples, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_examples, SIZES[0]), np.float32)
    return jnp.asarray(x), jnp.asarray(rng.integers(0, SIZES[-1], num_examples), jnp.int32)


def make_weights(seed):
    rng = np.random.default_rng(seed)
    kernels = [rng.standard_normal(shape, np.float32) for shape in itertools.pairwise(SIZES)]
    return {f"layer_{i}": {"kernel": jnp.asarray(w)} for i, w in enumerate(kernels)}


def apply_fn(params, feedback, x):
    for i in range(3):
        kernel = params[f"layer_{i}"]["kernel"]
        b = None if feedback is None or i == 0 else feedback[f"layer_{i}"]["kernel"]
        x = ops.feedback_dense(x, kernel, b)
        x = jnp.tanh(x) if i < 2 else x
    return x


def make_state(optimizer, rule=None, *, period=None):
    """A fresh state; its buffers are its own, so that a step may take them over."""
    if rule is None:
        return training.init_train_state(make_weights(1), optimizer)
    drawn = make_weights(2) | {"layer_0": None}
    feedback = init_feedback(jax.random.key(3), make_weights(1), rule, feedback=drawn)
    if period is not None:
        feedback = dataclasses.replace(feedback, period=jnp.int32(period))
    return training.init_train_state(make_weights(1), optimizer, feedback=feedback)


@functools.cache
def jit_step(optimizer, apply_fn=apply_fn, **options):
    return jax.jit(training.make_train_step(apply_fn, optimizer, **options), donate_argnums=0)


def run(step, state, num_steps, *, batch_size=6):
    losses = []
    for i in range(num_steps):
        state, loss = step(state, make_data(batch_size, seed=i))
        losses.append(loss)
    return state, jnp.stack(losses)


def values(tree):
    """The leaves as NumPy arrays, keys as their data."""

    def value(leaf):
        typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if typed else leaf)

    return jax.tree.map(value, tree)


def assert_bits_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, values(a), values(b))


def assert_close(a, b, **tolerance):
    tolerance = ROUNDING | tolerance
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), values(a), values(b))


# A step


def numpy_step(w, b, batch, learning_rate):
    """One step of feedback alignment with SGD, by hand: the loss, and new weights."""
    x, labels = (np.asarray(leaf) for leaf in batch)
    h1 = np.tanh(x @ w[0])
    h2 = np.tanh(h1 @ w[1])
    p = np.exp(h2 @ w[2])
    p /= p.sum(1, keepdims=True)
    loss = -np.log(p[np.arange(len(x)), labels]).mean()
    e = (p - np.eye(SIZES[-1])[labels]) / len(x)
    d2 = e @ b[2].T * (1 - h2**2)
    d1 = d2 @ b[1].T * (1 - h1**2)
    return loss, [w[0] - learning_rate * x.T @ d1, w[1] - learning_rate * h1.T @ d2,
                  w[2] - learning_rate * h2.T @ e]  # fmt: skip


def as_list(weights):
    leaves = [weights[f"layer_{i}"] for i in range(3)]
    return [leaf and np.asarray(leaf["kernel"], np.float64) for leaf in leaves]


RULES = {  # what the rule does, by hand
    Fixed(): lambda w, b: b,
    SignSync(magnitude="unit"): lambda w, b: np.sign(w),
    SignSync(magnitude="preserve"): lambda w, b: np.copysign(b, w),
    Transport(): lambda w, b: w,
    Transport(rate=0.5): lambda w, b: (w + b) / 2,
}
each_rule = pytest.mark.parametrize("rule", RULES, ids=repr)


@each_rule
def test_a_run_is_the_one_by_hand_that_syncs_before_each_gradient_for_every_period(rule):
    step = jit_step(SGD)
    for period in (1, 2, 3, 10):
        state, losses = run(step, make_state(SGD, rule, period=period), 7)
        w, b, expected_losses = as_list(make_weights(1)), as_list(make_weights(2)), []
        for i in range(7):
            if i % period == 0:
                b = [None, *(RULES[rule](w[j], b[j]) for j in (1, 2))]
            loss, w = numpy_step(w, b, make_data(6, seed=i), 0.5)
            expected_losses.append(loss)
        # float32 against float64 over seven steps.
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
        for got, expected in zip(as_list(state.params), w, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        for got, expected in zip(as_list(state.feedback.feedback)[1:], b[1:], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        assert int(state.step) == 7


def test_step_0_is_synced_so_that_the_first_gradient_meets_synced_feedback():
    state, _ = run(jit_step(SGD), make_state(SGD, SignSync(period=1000, magnitude="unit")), 1)
    signs = jax.tree.map(jnp.sign, make_weights(1)) | {"layer_0": None}
    assert_bits_equal(state.feedback.feedback, signs)


def test_the_loss_is_that_before_the_update():
    batch = make_data(6)
    state, loss = jit_step(SGD)(make_state(SGD, Fixed()), batch)
    before = training.cross_entropy(apply_fn(make_weights(1), None, batch[0]), batch[1])
    after = training.cross_entropy(apply_fn(state.params, None, batch[0]), batch[1])
    np.testing.assert_allclose(loss, before, rtol=1e-6)
    assert float(after) < float(before)


def optax_loop(optimizer, num_steps):
    """Backpropagation as Optax's own documentation writes it."""

    def loss_of(params, x, labels):
        for i in range(3):
            x = x @ params[f"layer_{i}"]["kernel"]
            x = jnp.tanh(x) if i < 2 else x
        return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()

    @jax.jit
    def update(params, opt_state, batch):
        gradient = jax.grad(loss_of)(params, *batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = make_weights(1)
    opt_state = optimizer.init(params)
    for i in range(num_steps):
        params, opt_state = update(params, opt_state, make_data(6, seed=i))
    return params, opt_state


@pytest.mark.parametrize("rule", [None, Transport()], ids=repr)
def test_without_feedback_or_with_the_kernels_as_feedback_a_run_is_plain_backpropagation(rule):
    optimizer = optax.adamw(0.01)
    state, _ = run(jit_step(optimizer), make_state(optimizer, rule), 5)
    params, opt_state = optax_loop(optimizer, 5)
    assert_close(state.params, params)
    assert_close(state.opt_state, opt_state)
    assert (state.feedback is None) == (rule is None)


def test_loss_fn_is_what_is_minimised():
    def squares(outputs, labels):
        return jnp.mean((outputs - jax.nn.one_hot(labels, SIZES[-1])) ** 2)

    batch = make_data(6)
    state, loss = jit_step(SGD, loss_fn=squares)(make_state(SGD), batch)
    expected, gradient = jax.value_and_grad(
        lambda params: squares(apply_fn(params, None, batch[0]), batch[1])
    )(make_weights(1))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert_close(state.params, jax.tree.map(lambda w, g: w - 0.5 * g, make_weights(1), gradient))


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "adamw_on_a_schedule": lambda: optax.adamw(optax.linear_schedule(0.1, 0.0, 9)),
    "multi_steps": lambda: optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "rule",
    [None, SignSync(magnitude="redraw"), {"layer_1/*": SignSync(magnitude="unit"), "*": Fixed()}],
    ids=repr,
)
def test_a_step_keeps_the_states_structure_and_types(optimizer, rule):
    optimizer = OPTIMIZERS[optimizer]()
    step, state = training.make_train_step(apply_fn, optimizer), make_state(optimizer, rule)
    after, loss = jax.eval_shape(step, state, make_data(6))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for a, b in zip(*map(jax.tree.leaves, (after, state)), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, jax.typeof(b).weak_type)
    assert loss.shape == ()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_is_traced_once_whatever_the_step_and_period(optimizer):
    traces = 0

    def counted(params, feedback, x):
        nonlocal traces
        traces += 1
        return apply_fn(params, feedback, x)

    optimizer = OPTIMIZERS[optimizer]()
    step = jax.jit(training.make_train_step(counted, optimizer), donate_argnums=0)
    for period in (1, 3):
        run(step, make_state(optimizer, SignSync(period=period, magnitude="unit")), 4)
    assert traces == 1


@pytest.mark.parametrize("rule", [None, SignSync(magnitude="unit")], ids=repr)
def test_a_step_is_compiled_once(rule):
    step = jax.jit(training.make_train_step(apply_fn, SGD))
    run(step, make_state(SGD, rule), 3)
    assert step._cache_size() == 1


def test_weight_decay_never_changes_feedback():
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    state, _ = run(jit_step(optimizer), make_state(optimizer, Fixed()), 3)
    assert_bits_equal(state.feedback.feedback, make_weights(2) | {"layer_0": None})
    moments = state.opt_state[0].mu
    assert jax.tree.structure(moments) == jax.tree.structure(state.params)


@pytest.mark.parametrize("rule", [Fixed(), SignSync(magnitude="unit"), Transport()], ids=repr)
def test_a_donated_state_is_taken_over_buffer_by_buffer(rule):
    optimizer = optax.adam(0.1)
    state, batch = make_state(optimizer, rule), make_data(6)
    step = jit_step(optimizer)
    compiled = step.lower(state, batch).compile()
    large = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.feedback.feedback)))
    assert compiled.memory_analysis().alias_size_in_bytes >= large
    state_2, _ = step(state, batch)
    buffers = jax.tree.leaves((state.params, state.feedback.feedback, state.opt_state))
    assert all(leaf.is_deleted() for leaf in buffers)
    step(state_2, batch)  # a rule that copies the kernel must not hand out one buffer twice


def lower(rule, optimizer, platform=None):
    step, state = training.make_train_step(apply_fn, optimizer), make_state(optimizer, rule)
    options = {} if platform is None else {"lowering_platforms": (platform,)}
    return jax.jit(step).trace(state, make_data(6)).lower(**options)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_step_lowers_for_every_platform(platform):
    rule = {"layer_1/*": SignSync(magnitude="redraw"), "*": Transport(rate=0.5)}
    lowered = lower(rule, optax.MultiSteps(optax.adamw(0.1), 2), platform)
    assert "dot_general" in lowered.as_text()


@pytest.mark.parametrize("rule", [Fixed(), SignSync(magnitude="norm"), Transport()], ids=repr)
def test_a_feedback_step_has_the_matrix_products_of_backpropagation(rule):
    @functools.cache
    def count(rule):
        lowered = lower(rule, SGD)
        compiled = len(re.findall(r"= \S+ dot\(", lowered.compile().as_text()))
        return lowered.as_text().count("stablehlo.dot_general"), compiled

    # Three forward, three for the kernels, two for the hidden layers' errors.
    assert count(rule) == count(None)
    assert count(rule)[0] == 8


# Steps of another gradient


def fa_value_and_grad(params, feedback, batch, step):
    del step

    def loss(params):
        return training.cross_entropy(apply_fn(params, feedback, batch[0]), batch[1])

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("rule", [None, SignSync(period=2, magnitude="unit")], ids=repr)
def test_a_gradient_step_with_the_losss_gradient_is_the_train_step(rule):
    optimizer = optax.adam(0.05)
    step = jax.jit(training.make_gradient_step(fa_value_and_grad, optimizer), donate_argnums=0)
    got = run(step, make_state(optimizer, rule), 5)
    expected = run(jit_step(optimizer), make_state(optimizer, rule), 5)
    assert_close(got, expected)


def see_all(params, feedback, batch, step):
    """A gradient by which one sees what it was given."""
    return jnp.float32(0), jax.tree.map(lambda w, b: w - b * batch - step, params, feedback)


def test_a_gradient_step_hands_over_synced_weights_the_batch_and_the_step():
    params = {"kernel": jnp.array([[2.0, -3.0]])}
    optimizer = optax.sgd(1.0)
    feedback = init_feedback(jax.random.key(0), params, SignSync(period=2, magnitude="unit"))
    state = training.init_train_state(params, optimizer, feedback=feedback)
    step = jax.jit(training.make_gradient_step(see_all, optimizer))
    # w - (w - 5 sign(w) - step), from step 0 and 1; the signs are those of the first sync.
    state, _ = step(state, 5.0)
    np.testing.assert_array_equal(state.params["kernel"], [[5.0, -5.0]])
    state, _ = step(state, -5.0)
    np.testing.assert_array_equal(state.params["kernel"], [[-4.0, 6.0]])
    np.testing.assert_array_equal(state.feedback.feedback["kernel"], [[1.0, -1.0]])
    state, _ = step(state, 1.0)
    np.testing.assert_array_equal(state.feedback.feedback["kernel"], [[-1.0, 1.0]])


def test_a_plain_tree_of_projections_is_handed_over_and_left_alone():
    def value_and_grad(params, projections, batch, step):
        assert isinstance(projections, dict)
        return jnp.float32(0), jnp.sum(projections["hidden"]) * params

    projections = {"hidden": jnp.arange(6.0).reshape(2, 3), "key": jax.random.key(1)}
    optimizer = optax.sgd(0.5)
    state = training.init_train_state(jnp.float32(1), optimizer, feedback=projections)
    state, _ = jax.jit(training.make_gradient_step(value_and_grad, optimizer))(state, None)
    assert_bits_equal(state.feedback, projections)
    assert float(state.params) == 1 - 0.5 * 15


def test_feedback_weights_are_a_states_tree_or_what_is_given():
    state = make_state(SGD, SignSync(magnitude="unit"))
    assert training.feedback_weights(state.feedback) is state.feedback.feedback
    assert training.feedback_weights(state.params) is state.params
    assert training.feedback_weights(None) is None


# Feedback that the optimiser learns


def apply_kp(params, feedback, x):
    """`apply_fn`, its feedback's gradient the kernels'."""
    for i in range(3):
        kernel = params[f"layer_{i}"]["kernel"]
        b = None if i == 0 else feedback[f"layer_{i}"]["kernel"]
        x = ops.feedback_dense(x, kernel, b, feedback_bar="kernel")
        x = jnp.tanh(x) if i < 2 else x
    return x


LEARNERS = {
    "SGD with decay": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5)),
    "kolen_pollack": kolen_pollack(optax.adam(0.05), decay=0.05),
}
each_learner = pytest.mark.parametrize("optimizer", LEARNERS.values(), ids=LEARNERS)


def make_learner(optimizer, rule=Fixed()):  # noqa: B008 (immutable)
    drawn = make_weights(2) | {"layer_0": None}
    feedback = drawn if rule is None else make_state(SGD, rule).feedback
    return training.init_train_state(
        make_weights(1), optimizer, feedback=feedback, learn_feedback=True
    )


@functools.cache
def learn(optimizer):
    return jit_step(optimizer, apply_fn=apply_kp, learn_feedback=True)


def by_hand(optimizer, num_steps):
    """The five lines that `soap_jax.optimizers` gives, in a loop."""

    def loss(params, feedback, batch):
        return training.cross_entropy(apply_kp(params, feedback, batch[0]), batch[1])

    @jax.jit
    def step(params, feedback, opt_state, batch):
        grads = jax.grad(loss, argnums=(0, 1))(params, feedback, batch)
        updates, opt_state = optimizer.update(grads, opt_state, (params, feedback))
        params, feedback = optax.apply_updates((params, feedback), updates)
        return params, feedback, opt_state

    params, feedback = make_weights(1), make_weights(2) | {"layer_0": None}
    opt_state = optimizer.init((params, feedback))
    for i in range(num_steps):
        params, feedback, opt_state = step(params, feedback, opt_state, make_data(6, seed=i))
    return params, feedback, opt_state


@pytest.mark.parametrize("rule", [Fixed(), None], ids=["state", "plain tree"])
@each_learner
def test_learning_feedback_is_the_optimizer_over_the_pair(optimizer, rule):
    state, losses = run(learn(optimizer), make_learner(optimizer, rule), 5)
    params, feedback, opt_state = by_hand(optimizer, 5)
    assert_close(state.params, params)
    assert_close(training.feedback_weights(state.feedback), feedback)
    assert_close(state.opt_state, opt_state)
    assert jax.tree.structure(state) == jax.tree.structure(make_learner(optimizer, rule))
    assert losses.shape == (5,) and int(state.step) == 5


def gaps(state):
    feedback = training.feedback_weights(state.feedback)
    return [
        float(np.linalg.norm(w - b))
        for w, b in trees.pairs(values(state.params), values(feedback)).values()
    ]


@each_learner
def test_a_scanned_epoch_learns_feedback(optimizer):
    step = training.make_train_step(apply_kp, optimizer, learn_feedback=True)
    before, data = gaps(make_learner(optimizer)), make_data(42)
    state, _ = training.train_epoch(
        step, make_learner(optimizer), data, jax.random.key(0), batch_size=4
    )
    np.testing.assert_allclose(gaps(state), np.array(before) * 0.95**10, rtol=1e-5)


@each_learner
def test_multi_steps_learns_feedback_at_real_updates_alone(optimizer):
    expected, _ = run(learn(optimizer), make_learner(optimizer), 2)
    several = optax.MultiSteps(optimizer, 3)
    step, state = learn(several), make_learner(several)
    before = gaps(state)
    for update in range(2):
        for i, batch in enumerate(micro_batches(update, 3)):
            state, _ = step(state, batch)
            completed = update + (i == 2)
            assert int(state.step) == completed
            np.testing.assert_allclose(gaps(state), np.array(before) * 0.95**completed, rtol=1e-5)
    # The mean of means is summed in another order, twice over; Adam divides by what it finds.
    assert_close(state.params, expected.params, rtol=1e-3, atol=1e-4)
    assert_close(state.feedback, expected.feedback, rtol=1e-3, atol=1e-4)


def test_a_rule_syncs_what_the_optimizer_learns():
    optimizer = LEARNERS["SGD with decay"]
    state, _ = run(learn(optimizer), make_learner(optimizer, Transport(period=100)), 3)
    # Equal at step 0, and from then on by the same updates.
    np.testing.assert_allclose(gaps(state), 0, atol=1e-6)


def test_feedback_whose_layers_give_it_no_gradient_only_decays():
    optimizer = LEARNERS["SGD with decay"]
    state, _ = run(jit_step(optimizer, learn_feedback=True), make_learner(optimizer), 3)
    expected = jax.tree.map(lambda b: 0.95**3 * b, make_weights(2) | {"layer_0": None})
    assert_close(state.feedback.feedback, expected)


@pytest.mark.parametrize("rule", [Fixed(), None], ids=["state", "plain tree"])
def test_a_donated_state_with_learnt_feedback_is_taken_over(rule):
    optimizer = LEARNERS["kolen_pollack"]
    state, batch = make_learner(optimizer, rule), make_data(6)
    after, _ = learn(optimizer)(state, batch)  # a buffer that is not used would be a warning
    weights = training.feedback_weights(state.feedback)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, weights)))
    learn(optimizer)(after, batch)


def test_learning_feedback_that_is_not_there_raises():
    state = training.init_train_state(make_weights(1), SGD, learn_feedback=True)
    step = training.make_train_step(apply_fn, SGD, learn_feedback=True)
    with pytest.raises(ValueError, match="learn_feedback is True and the state has no feedback"):
        step(state, make_data(6))


# An epoch


def look(state, batch):
    return state + 1, batch


EPOCHS = pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (12, 4), (7, 7), (5, 1), (9, 5)])


@EPOCHS
def test_an_epoch_visits_every_example_at_most_once_and_drops_the_incomplete_batch(n, batch_size):
    data = (jnp.arange(n), 100 + jnp.arange(n))
    count, (x, y) = training.train_epoch(look, 0, data, jax.random.key(0), batch_size=batch_size)
    assert int(count) == n // batch_size
    assert x.shape == (n // batch_size, batch_size)
    assert len(set(x.ravel().tolist())) == x.size and set(x.ravel().tolist()) <= set(range(n))
    np.testing.assert_array_equal(y, x + 100)
    order = training.epoch_order(jax.random.key(0), n, batch_size)
    np.testing.assert_array_equal(x, order)


def test_the_order_of_an_epoch_is_given_by_its_key():
    a, b, c = (training.epoch_order(jax.random.key(seed), 32, 4) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not jnp.array_equal(a, c)
    assert not jnp.array_equal(a.ravel(), jnp.arange(32))


def test_an_epoch_leaves_examples_in_the_dtype_they_are_stored_in():
    data = (jnp.arange(24, dtype=jnp.uint8).reshape(6, 2, 2), jnp.arange(6, dtype=jnp.int8))
    _, (x, y) = training.train_epoch(look, 0, data, jax.random.key(0), batch_size=2)
    assert (x.dtype, x.shape, y.dtype) == (jnp.uint8, (3, 2, 2, 2), jnp.int8)


def test_an_epoch_is_a_loop_of_steps():
    optimizer, rule = optax.sgd(0.5, momentum=0.9), Transport(period=2, rate=0.5)
    step, data, key = jit_step(optimizer), make_data(20), jax.random.key(5)
    epoch = jax.jit(
        lambda state, key: training.train_epoch(
            training.make_train_step(apply_fn, optimizer), state, data, key, batch_size=6
        ),
        donate_argnums=0,
    )
    state, losses = epoch(make_state(optimizer, rule), key)
    expected, expected_losses = make_state(optimizer, rule), []
    x, labels = values(data)
    for indices in np.asarray(training.epoch_order(key, 20, 6)):
        expected, loss = step(expected, (x[indices], labels[indices]))
        expected_losses.append(loss)
    assert losses.shape == (3,) and int(state.step) == 3
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert_close(state, expected)


def test_scan_batches_takes_the_batches_that_the_order_names():
    data = (jnp.arange(9) * 10, jnp.arange(9))
    order = jnp.array([[5, 1], [1, 1], [8, 0]])
    count, (x, y) = training.scan_batches(look, 0, data, order)
    assert int(count) == 3
    np.testing.assert_array_equal(y, order)
    np.testing.assert_array_equal(x, order * 10)


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [
        (0, "at least 1"),
        (-1, "at least 1"),
        (11, "at most 10, the number of examples"),
        (4.0, "an integer"),
        (True, "an integer"),
        (None, "an integer"),
    ],
)
def test_a_batch_size_out_of_range_raises(batch_size, expected):
    message = f"batch_size is {batch_size}; expected {expected}"
    with pytest.raises(ValueError, match=message):
        training.epoch_order(jax.random.key(0), 10, batch_size)
    data = (jnp.arange(10), jnp.arange(10))
    with pytest.raises(ValueError, match=message):
        training.train_epoch(look, 0, data, jax.random.key(0), batch_size=batch_size)


# Evaluation


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            (jnp.arange(12), jnp.arange(6)),
            r"data has examples: 12 at \[0\], 6 at \[1\]; expected the",
        ),
        (
            (jnp.arange(6), jnp.arange(12)),
            r"data has examples: 6 at \[0\], 12 at \[1\]; expected the",
        ),
        (
            (jnp.arange(6), {"a": np.arange(6), "b": np.arange(5)}),
            r"5 at \[1\]\['b'\]; expected the",
        ),
        ((jnp.zeros((0, 2)), jnp.zeros(0)), r"0 at \[0\], 0 at \[1\]; expected .* at least 1"),
        ((jnp.arange(6), jnp.float32(0)), r"data has float32\[\] at \[1\]; expected arrays with"),
        ((), "data has examples: none; expected"),
    ],
)
def test_arrays_of_data_have_the_same_number_of_examples(data, message, jit):
    def of_batch(params, feedback, x):
        return x[:, None]

    for run in (
        lambda data: training.train_epoch(look, 0, data, jax.random.key(0), batch_size=2),
        lambda data: training.scan_batches(look, 0, data, jnp.array([[0, 1], [2, 3]])),
        lambda data: training.evaluate(of_batch, None, None, data, batch_size=2),
    ):
        with pytest.raises(ValueError, match=message):
            (jax.jit(run) if jit else run)(data)


def test_an_epoch_takes_any_tree_of_data():
    data = {"x": jnp.arange(6), "more": [jnp.arange(6), jnp.arange(6) + 1]}
    _, got = training.train_epoch(look, 0, data, jax.random.key(0), batch_size=2)
    np.testing.assert_array_equal(got["more"][1], got["x"] + 1)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 13, 1000])
def test_evaluate_gives_the_numbers_of_the_whole_data_set_at_once(batch_size):
    params, data = make_weights(1), make_data(13)
    got = jax.jit(
        lambda params, data: training.evaluate(apply_fn, params, None, data, batch_size=batch_size)
    )(params, data)
    outputs = np.asarray(apply_fn(params, None, data[0]))
    labels = np.asarray(data[1])
    log_p = outputs - np.log(np.exp(outputs).sum(1, keepdims=True))
    accuracy = np.mean(outputs.argmax(1) == labels)
    assert 0 < accuracy < 1
    np.testing.assert_allclose(got.loss, -log_p[np.arange(13), labels].mean(), rtol=1e-5)
    np.testing.assert_allclose(got.accuracy, accuracy, rtol=1e-6)


def test_evaluate_takes_feedback_another_loss_and_stored_bytes():
    def squares(outputs, labels):
        return jnp.mean((outputs - jax.nn.one_hot(labels, SIZES[-1])) ** 2)

    def scaled(params, feedback, x):
        return apply_fn(params, feedback, x.astype(jnp.float32) / 255)

    x = np.random.default_rng(0).integers(0, 256, (5, SIZES[0]), np.uint8)
    params, feedback = make_weights(1), make_weights(2)
    data = (jnp.asarray(x), make_data(5)[1])
    evaluate = functools.partial(training.evaluate, scaled, loss_fn=squares, batch_size=2)
    got = jax.jit(evaluate)(params, feedback, data)
    outputs = apply_fn(params, None, x / np.float32(255))
    np.testing.assert_allclose(got.loss, squares(outputs, data[1]), rtol=1e-5)
    np.testing.assert_allclose(got.accuracy, jnp.mean(outputs.argmax(1) == data[1]), rtol=1e-6)


def test_evaluate_does_not_depend_on_feedback():
    params, data = make_weights(1), make_data(5)
    evaluate = jax.jit(functools.partial(training.evaluate, apply_fn))
    given = None, make_weights(2), init_feedback(jax.random.key(0), params)
    none, weights, state = (evaluate(params, feedback, data) for feedback in given)
    assert_bits_equal(none, weights)
    assert_bits_equal(none, state)


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    got = training.cross_entropy(logits, jnp.array([1, 2]))
    np.testing.assert_allclose(got, -(np.log(0.25) + np.log(0.8)) / 2, rtol=1e-6)


# Several batches per update


def micro_batches(update, k):
    x, labels = values(make_data(6, seed=update))
    return [(x[i::k], labels[i::k]) for i in range(k)]


@pytest.mark.parametrize(("period", "as_transformation"), [(1, False), (2, True)])
def test_multi_steps_is_the_run_with_big_batches_and_syncs_once_per_update(
    period, as_transformation
):
    # A step half way to W: a second sync at the same update would show.
    inner, rule, k = optax.sgd(0.5, momentum=0.9), Transport(period=period, rate=0.5), 3
    expected, _ = run(jit_step(inner), make_state(inner, rule), 4)
    optimizer = optax.MultiSteps(inner, k)
    if as_transformation:
        optimizer = optimizer.gradient_transformation()
    step, state = jit_step(optimizer), make_state(optimizer, rule)
    for update in range(4):
        for i, batch in enumerate(micro_batches(update, k)):
            before = values((state.params, state.feedback))
            assert int(state.step) == update
            state, _ = step(state, batch)
            if i > 0:
                assert_bits_equal(before[1], state.feedback)
            elif update % period == 0:
                with pytest.raises(AssertionError):
                    assert_bits_equal(before[1], state.feedback)
            if i < k - 1:
                assert_bits_equal(before[0], state.params)
    assert int(state.step) == 4
    # The mean of means is summed in another order, four times over.
    assert_close(state.params, expected.params, rtol=1e-4, atol=1e-5)
    assert_close(state.feedback, expected.feedback, rtol=1e-4, atol=1e-5)


def test_multi_steps_inside_a_chain_counts_real_updates():
    multi_steps = optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation()
    optimizer = optax.chain(optax.clip(1e9), multi_steps)
    state, _ = run(jit_step(optimizer), make_state(optimizer, Transport(rate=0.5)), 3)
    assert int(state.step) == 1


# Optax's extra arguments


def by_polyak():
    return optax.polyak_sgd(max_learning_rate=0.5)


NEED_THE_LOSS = {
    "reduce_on_plateau": lambda: optax.chain(SGD, optax.contrib.reduce_on_plateau(patience=1)),
    "polyak_sgd": by_polyak,
    "multi_steps": lambda: optax.MultiSteps(by_polyak(), 2),
    "apply_if_finite": lambda: optax.apply_if_finite(by_polyak(), 3),
    "momo": lambda: optax.contrib.momo(),
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5, store_grad=True)
    ),
    "lbfgs": lambda: optax.lbfgs(memory_size=3),
}
"""Optimisers of which `update` takes more than gradient, state and parameters."""


@pytest.mark.parametrize("rule", [None, SignSync(magnitude="preserve")], ids=repr)
@pytest.mark.parametrize("name", NEED_THE_LOSS)
def test_optimisers_that_need_the_loss_get_it(name, rule):
    optimizer = NEED_THE_LOSS[name]()
    step, state, batch = jit_step(optimizer), make_state(optimizer, rule), make_data(6)
    losses = []
    for _ in range(12):
        state, loss = step(state, batch)
        losses.append(float(loss))
    assert losses[-1] < losses[0]


class Seen(NamedTuple):
    value: jax.Array
    grad: Any
    of_value_fn: Any


def keep():
    """An optimiser that keeps what it is given in its state, and changes nothing."""

    def init(params):
        return Seen(jnp.zeros(()), *[jax.tree.map(jnp.zeros_like, params)] * 2)

    def update(updates, state, params, *, value, grad, value_fn):
        again, of_value_fn = jax.value_and_grad(value_fn)(params)
        seen = Seen(value + again - value_fn(params), grad, of_value_fn)
        return jax.tree.map(jnp.zeros_like, updates), seen

    return optax.GradientTransformationExtraArgs(init, update)


@pytest.mark.parametrize("wrap", ["train step", "gradient step", "under vmap"])
def test_the_gradient_of_value_fn_is_the_pseudo_gradient(wrap):
    optimizer, batch = keep(), make_data(6)
    state = make_state(optimizer, Fixed())
    expected = fa_value_and_grad(state.params, state.feedback.feedback, batch, 0)
    step = training.make_train_step(apply_fn, optimizer)
    if wrap == "gradient step":
        step = training.make_gradient_step(fa_value_and_grad, optimizer)
    if wrap == "under vmap":
        several = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (state, batch))
        seen = jax.tree.map(lambda leaf: leaf[1], jax.jit(jax.vmap(step))(*several)[0].opt_state)
    else:
        seen = jax.jit(step)(state, batch)[0].opt_state
    assert_close(seen.value, expected[0])
    for gradient in (seen.grad, seen.of_value_fn):
        assert_close(gradient, expected[1])
    exact = fa_value_and_grad(state.params, None, batch, 0)[1]["layer_0"]["kernel"]
    assert np.abs(exact - expected[1]["layer_0"]["kernel"]).max() > 0.01  # they would differ


def test_the_extra_arguments_are_about_params_and_feedback_where_both_are_learnt():
    params, feedback = make_weights(1), make_weights(2) | {"layer_0": None}

    def value_and_grad(params, weights, batch, *, step):
        value, gradient = fa_value_and_grad(params, weights, batch, step)
        return value, (gradient, jax.tree.map(jnp.ones_like, weights))

    batch = make_data(6)
    _, expected = value_and_grad(params, feedback, batch, step=0)

    def seen_by(optimizer):
        state = training.init_train_state(params, optimizer, feedback=feedback, learn_feedback=True)
        step = training.make_gradient_step(value_and_grad, optimizer, learn_feedback=True)
        return jax.jit(step)(state, batch)[0].opt_state

    pair, alone = seen_by(keep()), seen_by(kolen_pollack(keep(), decay=0.1)).inner
    for gradient, of_params in zip(pair[1:], alone[1:], strict=True):
        assert_close(gradient, expected)
        assert_close(of_params, expected[0])


# Updates that the optimiser holds back

BROKEN = (jnp.full((6, SIZES[0]), jnp.nan), jnp.zeros(6, jnp.int32))
HELD_BACK = {
    "apply_if_finite": (lambda: optax.apply_if_finite(SGD, 5), BROKEN),
    "apply_if_finite in a chain": (
        lambda: optax.chain(optax.clip(1e9), optax.apply_if_finite(SGD, 5)),
        BROKEN,
    ),
    "multi_steps, skip_not_finite": (
        lambda: optax.MultiSteps(SGD, 1, should_skip_update_fn=optax.skip_not_finite),
        BROKEN,
    ),
    "apply_every": (lambda: optax.chain(SGD, optax.apply_every(2)), None),
}


@pytest.mark.parametrize("name", HELD_BACK)
def test_an_update_that_is_held_back_is_no_step_and_no_second_sync(name):
    make_optimizer, broken = HELD_BACK[name]
    optimizer, rule = make_optimizer(), Transport(rate=0.5)  # half way: a second sync would show
    step, state = jit_step(optimizer), make_state(optimizer, rule)
    for update in range(3):
        before = values(state.params)
        state, _ = step(state, make_data(6) if broken is None else broken)
        assert_bits_equal(state.params, before)
        assert int(state.step) == update
        synced = values(state.feedback)
        state, _ = step(state, make_data(6, seed=update))
        assert_bits_equal(state.feedback, synced)
        assert int(state.step) == update + 1
    with pytest.raises(AssertionError):
        assert_bits_equal(state.params, before)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.0),
        optax.chain(SGD, optax.set_to_zero()),
        optax.apply_if_finite(optax.sgd(0.0), 5),
        optax.MultiSteps(optax.sgd(0.0), 1),
        optax.conditionally_mask(SGD, lambda step: step > 5),
    ],
)
def test_an_update_of_zero_that_nobody_held_back_is_a_step(optimizer):
    state, _ = run(jit_step(optimizer), make_state(optimizer, SignSync()), 2)
    assert int(state.step) == 2
    assert_bits_equal(state.params, make_weights(1))


def test_what_holds_a_part_of_the_parameters_back_leaves_the_count_alone():
    parts = {"first": optax.chain(SGD, optax.apply_every(3)), "rest": SGD}
    labels = {f"layer_{i}": "rest" if i else "first" for i in range(3)}
    optimizer = optax.partition(parts, labels)
    state, _ = run(jit_step(optimizer), make_state(optimizer, SignSync()), 2)
    assert int(state.step) == 2
    assert_bits_equal(state.params["layer_0"], make_weights(1)["layer_0"])


# Checkpoints


def save_training(path: Path, state: TrainState) -> None:
    """Saves a train state with Orbax: parameters, feedback, its periods and key, and the step.

    Orbax stores arrays. The rule is static and not among them, so it goes into a file beside.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
    (path / "rule.txt").write_text(repr(state.feedback.rule))


def restore_training(path: Path, make_state: Callable[[], TrainState]) -> TrainState:
    """Restores what `save_training` saved into the structure of `make_state()`, which never runs.

    Raises:
        ValueError: if the state was saved under another rule; Orbax alone would not notice.
    """
    like = jax.eval_shape(make_state)
    rule = (path / "rule.txt").read_text()
    if rule != repr(like.feedback.rule):
        raise ValueError(f"the checkpoint's rule is {rule}; this state's is {like.feedback.rule}.")
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path / "state", like)


def test_a_restored_run_goes_on_bit_for_bit_as_if_it_had_never_stopped(tmp_path):
    redraw = SignSync(period=2, magnitude="redraw")
    rule = {"layer_1/*": redraw, "*": Transport(period=3, rate=0.5)}
    optimizer, data = optax.adam(0.05), make_data(20)
    step = training.make_train_step(apply_fn, optimizer)

    @jax.jit
    def epoch(state, i):
        key = jax.random.fold_in(jax.random.key(7), i)
        return training.train_epoch(step, state, data, key, batch_size=6)

    half, _ = epoch(make_state(optimizer, rule), 0)
    save_training(tmp_path, half)
    expected, expected_losses = epoch(half, 1)

    restored = restore_training(tmp_path, lambda: make_state(optimizer, rule))
    assert jax.tree.structure(restored) == jax.tree.structure(half)
    assert restored.feedback.key == half.feedback.key
    assert_bits_equal(restored, half)
    state, losses = epoch(restored, 1)
    assert_bits_equal(state, expected)
    np.testing.assert_array_equal(losses, expected_losses)
    # The key is worth saving: with another the run would differ.
    other = dataclasses.replace(restored.feedback, key_data=jnp.array([0, 99], jnp.uint32))
    assert not jnp.array_equal(epoch(restored._replace(feedback=other), 1)[1], expected_losses)


def test_a_checkpoint_restored_under_another_rule_raises_and_would_pass_unnoticed(tmp_path):
    optimizer = optax.sgd(0.1)
    state = make_state(optimizer, SignSync(period=5, magnitude="unit"))
    save_training(tmp_path, state)

    def other():
        return make_state(optimizer, SignSync(period=7, magnitude="preserve"))

    with pytest.raises(ValueError, match=r"rule is SignSync\(period=1, magnitude='unit'\)"):
        restore_training(tmp_path, other)
    with ocp.StandardCheckpointer() as checkpointer:
        unnoticed = checkpointer.restore(tmp_path / "state", jax.eval_shape(other))
    assert unnoticed.feedback.rule == SignSync(magnitude="preserve")
    assert int(unnoticed.feedback.period) == 5  # the period is a leaf: the saved one counts


# Many devices


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize(
    ("rule", "axis_type"),
    [
        (None, jax.sharding.AxisType.Explicit),
        (SignSync(period=2, magnitude="redraw"), jax.sharding.AxisType.Explicit),
        (SignSync(magnitude="norm"), jax.sharding.AxisType.Auto),
    ],
    ids=repr,
)
def test_a_step_on_a_batch_shared_by_four_devices_is_that_of_one(rule, axis_type):
    model, optimizer = models.MLP((7, 3), feedback=rule is not None), optax.sgd(0.5)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, SIZES[0])))
    # No Adam: softmax's errors sum to 0, so where signs of feedback agree the gradient is 0 but for
    # rounding, which Adam makes a full step.

    def apply_fn(params, feedback, x):
        return model.apply({"params": params, "feedback": feedback or {}}, x)

    feedback = rule and init_feedback(
        jax.random.key(1), variables["params"], rule, feedback=variables["feedback"]
    )
    start = training.init_train_state(variables["params"], optimizer, feedback=feedback)
    step, batches = training.make_train_step(apply_fn, optimizer), [make_data(8, i) for i in (1, 2)]

    def two_steps(state, batches):
        for batch in batches:
            state, loss = step(state, batch)
        return state, loss

    expected, expected_loss = jax.jit(two_steps)(start, batches)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    replicated, shared = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    with jax.set_mesh(mesh):
        args = jax.device_put(start, replicated), jax.device_put(batches, shared)
        state, loss = jax.jit(two_steps)(*args)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert_close(state, expected)
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 4


# Whole trainings


@pytest.mark.parametrize("rule", [Fixed(), SignSync(period=10, magnitude="unit")], ids=repr)
def test_feedback_alignment_learns(rule):
    optimizer = optax.sgd(0.3)
    x, _ = make_data(64)
    labels = jnp.argmax(x[:, :3], 1)
    step = training.make_train_step(apply_fn, optimizer)

    @jax.jit
    def train(state):
        def epoch(state, key):
            return training.train_epoch(step, state, (x, labels), key, batch_size=8)

        state, _ = lax.scan(epoch, state, jax.random.split(jax.random.key(0), 20))
        return training.evaluate(apply_fn, state.params, None, (x, labels))

    assert float(train(make_state(optimizer, rule)).accuracy) > 0.9


def test_runs_under_vmap_are_each_run_alone():
    step = training.make_train_step(apply_fn, optax.sgd(0.5))
    x, labels = make_data(12)

    def final(scale, key):
        state = make_state(optax.sgd(0.5), SignSync(period=2, magnitude="norm"))
        return training.train_epoch(step, state, (scale * x, labels), key, batch_size=3)[0]

    scales, keys = jnp.array([0.5, 1.0, 2.0]), jax.random.split(jax.random.key(0), 3)
    together, alone = jax.jit(jax.vmap(final))(scales, keys), jax.jit(final)
    for i in range(3):
        one = jax.tree.map(lambda leaf: leaf[i], together)  # noqa: B023
        assert_close(one, alone(scales[i], keys[i]), atol=1e-5)


def test_epochs_and_evaluations_outside_jit_compile_once_and_take_numpy_data():
    traces = []

    def counted(params, feedback, x):
        traces.append(x)
        return apply_fn(params, feedback, x)

    optimizer = optax.sgd(0.1)
    step = training.make_train_step(counted, optimizer)
    state = make_state(optimizer, SignSync(period=2, magnitude="unit"))
    data = jax.device_get(make_data(20))
    for i in range(3):
        state, _ = training.train_epoch(step, state, data, jax.random.key(i), batch_size=6)
        training.evaluate(counted, state.params, state.feedback.feedback, data)
        if i == 0:
            first = len(traces)
    assert len(traces) == first
    assert int(state.step) == 9


def test_the_accuracy_of_a_model_that_broke_is_nan():
    data = (jnp.full((3, 2), jnp.nan), jnp.array([0, 0, 1]))
    got = training.evaluate(lambda params, feedback, x: x, None, None, data)
    assert jnp.isnan(got.accuracy) and jnp.isnan(got.loss)


def test_two_clocks_are_refused():
    parts = {"a": optax.MultiSteps(optax.sgd(0.1), 2), "b": optax.MultiSteps(optax.sgd(0.1), 3)}
    optimizer = optax.chain(*(part.gradient_transformation() for part in parts.values()))
    with pytest.raises(ValueError, match=r"2 states of optax\.MultiSteps"):
        jit_step(optimizer)(make_state(optimizer, SignSync(magnitude="unit")), make_data(6))


def test_an_optimisers_state_without_feedback_raises_where_feedback_is_learnt():
    params = {"w": jnp.ones((3, 2))}
    feedback = init_feedback(jax.random.key(0), params)

    def apply_fn(params, weights, x):
        return ops.feedback_dense(x, params["w"], weights["w"], feedback_bar="kernel")

    optimizer = optax.sgd(0.1, momentum=0.9)
    step = training.make_train_step(apply_fn, optimizer, learn_feedback=True)
    state = training.init_train_state(params, optimizer, feedback=feedback)
    with pytest.raises(ValueError, match=r"expected init_train_state\(..., learn_feedback=True\)"):
        step(state, (jnp.ones((4, 3)), jnp.zeros(4, int)))
