"""One method over the grid: paired, reproducible, and what the library itself would do."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from soap_jax.study.config import StudyConfig

import soap_jax
from soap_jax import data, metrics, models, training
from soap_jax.study import config, experiment, measurements, methods

CONFIG = StudyConfig(
    learning_rates=(0.1, 0.5),
    seeds=2,
    epochs=2,
    hidden=(7,),
    evaluations=3,
    batch_size=50,
    periods=(1,),
    inputs="unit",
)
UNIT = experiment.Scaling(0.0, 16.0)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def setup(*args):
    """`experiment.setup`, its step and measurements compiled as a run compiles them."""
    made = experiment.setup(*args)
    return made._replace(step=jax.jit(made.step), measure=jax.jit(made.measure))


def train(config, method, dataset):
    """The record with leading axes `(periods, learning_rates, seeds)`."""
    parts = [record for _, record in experiment.train_method(config, method, dataset)]
    shape = (len(config.periods_of(method)), len(config.learning_rates), config.seeds)
    return jax.tree.map(lambda *x: np.concatenate(x).reshape(*shape, *x[0].shape[1:]), *parts)


@pytest.fixture(scope="module")
def records(digits):
    """At the smallest period: leading axes `(learning_rates, seeds)`."""
    return {
        method: jax.tree.map(lambda leaf: leaf[0], train(CONFIG, method, digits))
        for method in config.DEFAULT_METHODS
    }


def test_methods_start_alike_and_then_differ(records):
    first = {method: record.train_loss[..., 0] for method, record in records.items()}
    assert all((losses == first["bp"]).all() for losses in first.values())  # init and order
    last = [record.train_loss[0, 0, -1] for record in records.values()]
    assert len(set(map(float, last))) == len(records) == 8


def test_initial_feedback_is_the_same_for_every_rule_that_keeps_it(records):
    ratio = "norm_ratio/Dense_1"
    fa, preserve = (records[m].evaluations[ratio][..., 0] for m in ("fa", "sign_preserve"))
    np.testing.assert_allclose(fa, preserve, rtol=1e-6)  # abs(B0) kept, so its norm
    assert len(np.unique(fa.round(4))) == CONFIG.seeds  # one B0 a seed, whatever the rate


def test_seeds_and_rates_differ(records):
    losses = records["fa"].train_loss
    assert losses.shape == (2, 2, experiment.evaluation_steps(CONFIG, 1151)[-1])
    assert len(np.unique(losses[:, :, -1])) == 4


def test_a_run_alone_is_bit_identical_to_its_place_in_the_study(digits, records):
    run = experiment.make_run(CONFIG, "sign", 10, experiment.scaling_of(CONFIG, digits))
    args = (jnp.int32(1), jnp.float32(0.5), jnp.int32(1), experiment.split(digits))
    alone = jax.jit(run)(*args)
    np.testing.assert_array_equal(alone.train_loss, records["sign"].train_loss[1, 1])
    assert alone.test_accuracy == records["sign"].test_accuracy[1, 1]


def test_a_run_is_what_a_loop_by_hand_does(digits, records):
    """The sign rule at T = 1, written with plain Flax and the raw signs in the backward pass."""
    arrays = experiment.split(digits)
    init_key, _, order_key = jax.random.split(jax.random.key(0), 3)
    model = models.MLP((7, 10), feedback=False)
    params = model.init(init_key, jnp.zeros((1, 64)))["params"]
    steps_per_epoch = len(arrays.train.labels) // 50
    orders = [
        training.epoch_order(key, len(arrays.train.labels), 50)
        for key in jax.random.split(order_key, 2)
    ]

    @jax.jit
    def step(params, batch):
        x = arrays.train.images[batch].reshape(50, 64) / jnp.float32(16)
        labels = jnp.asarray(arrays.train.labels)[batch]
        below, above = params["Dense_0"], params["Dense_1"]
        hidden = jnp.tanh(x @ below["kernel"] + below["bias"][None])
        logits = hidden @ above["kernel"] + above["bias"][None]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        error = (jax.nn.softmax(logits) - jax.nn.one_hot(labels, 10)) / 50
        hidden_bar = (error @ jnp.sign(above["kernel"]).T) * (1 - hidden**2)
        gradient = {
            "Dense_0": {"kernel": x.T @ hidden_bar, "bias": hidden_bar.sum(0)},
            "Dense_1": {"kernel": hidden.T @ error, "bias": error.sum(0)},
        }
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient), loss

    arrays = jax.tree.map(jnp.asarray, arrays)
    losses = []
    for i in range(2 * steps_per_epoch)[: experiment.evaluation_steps(CONFIG, 1151)[-1]]:
        params, loss = step(params, orders[i // steps_per_epoch][i % steps_per_epoch])
        losses.append(loss)
    # 44 steps in float32, in another order of operations
    np.testing.assert_allclose(records["sign"].train_loss[1, 0], losses, rtol=1e-4)


def test_evaluations_hold_angles_where_there_is_feedback(records):
    plain = {"validation_loss", "validation_accuracy", "effective_learning_rate/Dense_0"}
    assert set(records["bp"].evaluations) == plain
    names = ("gradient_angle/Dense_0", "error_angle/Dense_0", "weight_angle/Dense_1")
    assert set(records["sign"].evaluations) == plain | {*names, "norm_ratio/Dense_1"}
    for name in names:
        angles = records["sign"].evaluations[name]
        assert angles.shape == (2, 2, CONFIG.evaluations + 1)
        assert ((angles > 5) & (angles < 80)).all()


def test_the_error_angle_is_that_of_metrics(digits):
    """At the start, from the network's own output: the mean of `metrics.cotangent_angle`."""
    arrays = experiment.split(digits)
    of_method = setup(CONFIG, "fa", 10, UNIT)
    state, _ = of_method.init(0, 0.1, 0, arrays.train.images)
    row = of_method.measure(state, 0.1, jax.tree.map(jnp.asarray, arrays.validation))
    images, labels = (leaf[: measurements.PROBE_SIZE] for leaf in arrays.validation)
    logits = of_method.apply_fn(state.params, state.feedback.feedback, images)
    error = jax.nn.softmax(logits) - jax.nn.one_hot(labels, 10)
    kernels = (state.params["Dense_1"]["kernel"], state.feedback.feedback["Dense_1"]["kernel"])
    at_output = metrics.cotangent_angle(error, *kernels).mean()
    # the derivative of tanh, which differs from unit to unit, comes between
    np.testing.assert_allclose(row["error_angle/Dense_0"], at_output, atol=2)


def test_effective_learning_rates_are_what_each_method_makes_of_the_rate(records):
    column = "effective_learning_rate/Dense_0"
    rates = np.array(CONFIG.learning_rates)[:, None, None]
    factor = {method: record.evaluations[column] / rates for method, record in records.items()}
    assert (abs(factor["bp"] - 1) < 1e-6).all() and (factor["frozen"] == 0).all()
    scaled, live = factor["bp_scaled"], factor["bp_scaled_live"]
    np.testing.assert_allclose(scaled, scaled[..., :1].repeat(scaled.shape[-1], -1), rtol=1e-5)
    np.testing.assert_allclose(live[..., 0], scaled[..., 0], rtol=1e-5)
    sign = records["sign"].evaluations
    expected = sign["norm_ratio/Dense_1"] * np.cos(np.radians(sign["weight_angle/Dense_1"]))
    np.testing.assert_allclose(factor["sign"], expected, rtol=1e-4)
    np.testing.assert_allclose(scaled[..., 0], sign["norm_ratio/Dense_1"][..., 0], rtol=1e-5)


def test_frozen_trains_the_output_layer_alone(digits):
    arrays = jax.tree.map(jnp.asarray, experiment.split(digits))
    of_method = setup(CONFIG, "frozen", 10, UNIT)
    state, _ = of_method.init(0, 0.1, 0, arrays.train.images)
    after, _ = of_method.step(state, 0.1, jax.tree.map(lambda leaf: leaf[:9], arrays.train))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), state.params, after.params)
    assert same == {
        "Dense_0": {"kernel": True, "bias": True},
        "Dense_1": {"kernel": False, "bias": False},
    }


@pytest.mark.parametrize("method", ["bp_scaled", "bp_scaled_live"])
def test_scaled_backprop_multiplies_hidden_gradients_by_the_signs_amplification(digits, method):
    deep = StudyConfig(hidden=(7, 6), learning_rates=(0.1,), seeds=1)
    arrays = jax.tree.map(jnp.asarray, experiment.split(digits))
    batch = jax.tree.map(lambda leaf: leaf[:9], arrays.train)
    moved = {}
    for name in ("bp", method):
        of_method = setup(deep, name, 10, UNIT)
        state, _ = of_method.init(0, 0.1, 0, arrays.train.images)
        after, _ = of_method.step(state, 0.1, batch)
        moved[name] = jax.tree.map(jnp.subtract, after.params, state.params)
    ratio = {
        layer: np.sqrt(kernel.size) / np.linalg.norm(kernel)
        for layer, kernel in ((k, np.asarray(v["kernel"])) for k, v in state.params.items())
    }
    factors = {"Dense_0": ratio["Dense_1"] * ratio["Dense_2"], "Dense_1": ratio["Dense_2"]}
    for layer in state.params:
        factor = factors.get(layer, 1.0)
        expected = jax.tree.map(lambda g, f=factor: f * g, moved["bp"][layer])
        # differences of parameters keep about four digits of an update
        chex.assert_trees_all_close(moved[method][layer], expected, rtol=2e-3, atol=1e-6)


def test_periods_are_runs_of_their_own_for_methods_that_sync(digits):
    several = dataclasses.replace(CONFIG, periods=(1, 5), learning_rates=(0.5,))
    assert [p.period for p in experiment.points_of(several, "sign")] == [1, 1, 5, 5]
    assert [p.period for p in experiment.points_of(several, "bp")] == [0, 0]
    losses = train(several, "sign", digits).train_loss
    assert (losses[0, 0, 0, :2] == losses[1, 0, 0, :2]).all()  # both synced at step 0
    assert losses[0, 0, 0, -1] != losses[1, 0, 0, -1]


def test_runs_that_are_done_are_not_done_again(digits):
    points = experiment.points_of(CONFIG, "fa")
    parts = experiment.train_method(CONFIG, "fa", digits, done=points[1:])
    assert [point for part, _ in parts for point in part] == points[:1]


def test_the_original_init_differs_for_methods_without_feedback_only(digits):
    images = experiment.split(digits).train.images
    kernels = {}
    for init in config.INITS:
        for method in ("bp", "fa"):
            changed = dataclasses.replace(CONFIG, init=init)
            of_method = setup(changed, method, 10, UNIT)
            kernels[init, method] = of_method.init(0, 0.1, 0, images)[0].params["Dense_0"]
    matched = kernels["matched", "bp"]
    chex.assert_trees_all_equal(matched, kernels["matched", "fa"], kernels["soap", "fa"])
    torch = kernels["soap", "bp"]
    assert float(abs(torch["kernel"]).max()) <= 1 / 8  # 64 inputs
    np.testing.assert_allclose(torch["kernel"].std(), 1 / 8 / np.sqrt(3), rtol=0.1)
    assert 0 < float(abs(torch["bias"]).max()) <= 1 / 8
    assert not matched["bias"].any()


@pytest.mark.parametrize("optimizer", config.OPTIMIZERS)
def test_optimisers_are_those_of_optax(digits, optimizer):
    by_name = {"sgd": optax.sgd(0.1), "momentum": optax.sgd(0.1, 0.9), "adam": optax.adam(0.1)}
    params = {"Dense_0": {"kernel": jnp.ones((2, 2))}}
    ours, theirs = methods.optimizer_of("bp", 0.1, optimizer=optimizer), by_name[optimizer]
    updates = []
    for chosen in (ours, theirs):
        state = chosen.init(params)
        for scale in (1.0, -3.0):
            gradient = jax.tree.map(lambda leaf, s=scale: s * leaf, params)
            update, state = chosen.update(gradient, state, params)
        updates.append(update)
    chex.assert_trees_all_equal(*updates)


def test_feedback_is_looked_at_as_the_next_step_uses_it(records):
    """Signs of the present weights: concordant at once, so the angle is far below FA's."""
    at_start = records["sign"].evaluations["weight_angle/Dense_1"][..., 0]
    assert (at_start < 45).all()


def test_standard_inputs_have_mean_0_and_variance_1_over_the_training_examples(digits):
    mean, std = experiment.scaling_of(StudyConfig(), digits)
    inputs = (experiment.split(digits).train.images - mean) / std
    np.testing.assert_allclose([inputs.mean(), inputs.std()], [0, 1], atol=1e-9)
    assert experiment.scaling_of(CONFIG, digits) == UNIT


def test_validation_is_held_out_of_training(digits):
    arrays = experiment.split(digits)
    total = len(arrays.train.labels) + len(arrays.validation.labels)
    assert total == len(digits.train.labels)
    assert len(arrays.validation.labels) == len(digits.train.labels) // 5
    assert arrays.test is digits.test


def test_more_evaluations_than_steps_are_refused():
    with pytest.raises(ValueError, match="2 steps, fewer than 20 evaluations"):
        experiment.evaluation_steps(StudyConfig(epochs=1, batch_size=64), 128)


def test_deeper_networks_have_feedback_in_every_layer_but_the_first(digits):
    deep = StudyConfig(
        learning_rates=(0.1,), seeds=1, epochs=1, hidden=(5, 6), evaluations=1, methods=("fa",)
    )
    record = train(deep, "fa", digits)
    assert {name for name in record.evaluations if "angle" in name} == {
        "weight_angle/Dense_1",
        "weight_angle/Dense_2",
        "error_angle/Dense_0",
        "error_angle/Dense_1",
        "gradient_angle/Dense_0",
        "gradient_angle/Dense_1",
    }


def test_plain_flax_is_the_reference():
    """Method bp has no feedback at all: not a feedback layer told to be exact."""
    plain = models.MLP((7, 10), feedback=False).init(jax.random.key(0), jnp.zeros((1, 64)))
    assert set(plain) == {"params"}
    assert isinstance(soap_jax.Fixed(), soap_jax.Rule)


NEW = tuple(config.METHODS)[11:]
WITHOUT_A_TWIN = {"sdfa", "drtp", "activity_propagation"}


def start(method, digits, num=9, **changes):
    """A method's setup, its initial state, and the first examples as a batch."""
    arrays = jax.tree.map(jnp.asarray, experiment.split(digits))
    options = {"hidden": (7, 6), "batch_size": num, "methods": (method,), "weight_decay": 0.0}
    of_method = setup(StudyConfig(**options | changes), method, 10, UNIT)
    state, _ = of_method.init(3, 0.5, 1, arrays.train.images)
    return of_method, state, jax.tree.map(lambda leaf: leaf[:num], arrays.train)


def kernels(tree):
    return {name: layer["kernel"] for name, layer in tree.items() if layer["kernel"] is not None}


@pytest.mark.parametrize("method", NEW)
def test_every_method_starts_from_the_same_weights(digits, method):
    state = start(method, digits)[1]
    chex.assert_trees_all_equal(state.params, start("fa", digits)[1].params)
    weights = training.feedback_weights(state.feedback)
    same_b0 = methods.of(method).rule is not None
    assert (weights is None) == (method == "activity_propagation")
    if same_b0:
        chex.assert_trees_all_equal(weights, start("fa", digits)[1].feedback.feedback)
    elif weights is not None:
        assert sorted(map(jnp.shape, jax.tree.leaves(weights))) == [(10, 6), (10, 7)]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_kolen_pollack_brings_feedback_nearer_to_weights_at_the_rate_of_the_decay(
    digits, optimizer
):
    """W - B shrinks by 1 - learning_rate * weight_decay at every update, for any optimiser."""
    of_method, state, batch = start("kp", digits, optimizer=optimizer, weight_decay=0.1)

    def apart(state):
        weights = kernels(state.feedback.feedback)
        return {k: np.asarray(kernels(state.params)[k] - b) for k, b in weights.items()}

    before = apart(state)
    for _ in range(3):
        state, _ = of_method.step(state, 0.05, batch)
    expected = {name: 0.995**3 * difference for name, difference in before.items()}
    assert set(expected) == {"Dense_1", "Dense_2"}
    chex.assert_trees_all_close(apart(state), expected, atol=1e-6)


def test_local_losses_teach_feedback_at_a_rate_of_their_own(digits):
    """Symmetric alignment: B moves towards W by `FEEDBACK_RATE`, whatever the learning rate."""
    of_method, state, batch = start("symmetric_alignment", digits, weight_decay=0.1)
    fast, slow = (of_method.step(state, rate, batch)[0] for rate in (0.5, 0.001))
    chex.assert_trees_all_equal(fast.feedback.feedback, slow.feedback.feedback)
    assert (fast.params["Dense_2"]["kernel"] != slow.params["Dense_2"]["kernel"]).any()
    for name, b in kernels(state.feedback.feedback).items():
        expected = b + methods.FEEDBACK_RATE * (kernels(state.params)[name] - b)
        found = fast.feedback.feedback[name]["kernel"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_dfa_with_one_hidden_layer_is_fa_with_the_same_feedback(digits):
    """Its step, and all that is measured of both."""
    fa, state, batch = start("fa", digits, hidden=(7,))
    dfa, direct, _ = start("dfa", digits, hidden=(7,))
    projection = direct.feedback["DirectFeedback_0"]["projection"]["Dense_0"]
    feedback = {"Dense_0": {"kernel": None, "bias": None}}
    feedback["Dense_1"] = {"kernel": projection.T, "bias": None}
    state = state._replace(feedback=dataclasses.replace(state.feedback, feedback=feedback))
    rows = fa.measure(state, 0.5, batch), dfa.measure(direct, 0.5, batch)
    shared = set(rows[1])
    assert set(rows[0]) - shared == {"weight_angle/Dense_1", "norm_ratio/Dense_1"}
    chex.assert_trees_all_close({k: rows[0][k] for k in shared}, rows[1], rtol=1e-4)
    after, direct_after = fa.step(state, 0.5, batch)[0], dfa.step(direct, 0.5, batch)[0]
    chex.assert_trees_all_close(after.params, direct_after.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(direct_after.feedback, direct.feedback)  # projections stay


def test_the_effective_rate_of_dfa_is_the_projections_share_along_the_path(digits):
    dfa, state, batch = start("dfa", digits)
    row = dfa.measure(state, 0.5, batch)
    _, w1, w2 = (np.asarray(kernel) for kernel in kernels(state.params).values())
    projections = state.feedback["DirectFeedback_0"]["projection"]
    for name, path in (("Dense_0", w1 @ w2), ("Dense_1", w2)):
        expected = 0.5 * (np.asarray(projections[name]).T * path).sum() / (path**2).sum()
        found = row[f"effective_learning_rate/{name}"]
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_drtp_sends_the_target(digits):
    """The hidden layer's gradient by hand: `xᵀ (t P / n * (1 - h²))`."""
    drtp, state, batch = start("drtp", digits, hidden=(7,))
    after, _ = drtp.step(state, 0.5, batch)
    chex.assert_trees_all_equal(after.feedback, state.feedback)
    x = np.asarray(batch.images.reshape(9, 64), float) / 16
    hidden = np.tanh(x @ np.asarray(state.params["Dense_0"]["kernel"]))
    (projection,) = jax.tree.leaves(state.feedback)
    error = np.eye(10)[np.asarray(batch.labels)] @ np.asarray(projection) / 9 * (1 - hidden**2)
    moved = after.params["Dense_0"]["kernel"] - state.params["Dense_0"]["kernel"]
    np.testing.assert_allclose(moved, -0.5 * x.T @ error, rtol=1e-3, atol=1e-6)


def test_activity_propagation_follows_its_gradient_after_the_warm_up(digits):
    of_method, state, batch = start("activity_propagation", digits)
    by_backprop, _ = start("bp", digits)[0].step(state, 0.5, batch)
    warm = state._replace(step=jnp.int32(methods.WARMUP))
    first, later = (of_method.step(begin, 0.5, batch)[0] for begin in (state, warm))
    chex.assert_trees_all_close(first.params, by_backprop.params, rtol=1e-6, atol=1e-8)
    moved, moved_later = (
        jnp.linalg.norm(after.params["Dense_0"]["kernel"] - state.params["Dense_0"]["kernel"])
        for after in (first, later)
    )
    assert 0 < moved_later < moved
    row = of_method.measure(warm, 0.5, batch)
    assert row["gradient_angle/Dense_0"] > 1
    # how much of the true gradient there is in a step, measured
    along = moved_later / moved * np.cos(np.radians(row["gradient_angle/Dense_0"]))
    found = row["effective_learning_rate/Dense_0"]
    np.testing.assert_allclose(found, 0.5 * along, rtol=2e-2)


def columns_of(method):
    """What a study of two hidden layers measures of a method."""
    found = {"validation_loss", "validation_accuracy"}
    names = {"effective_learning_rate": "01"}
    if methods.of(method).has_feedback or method == "activity_propagation":
        names["gradient_angle"] = "01"
    if methods.of(method).has_feedback:
        names["error_angle"] = "01"
    if methods.of(method).rule is not None:
        names |= {"weight_angle": "12", "norm_ratio": "12"}
    return found | {f"{name}/Dense_{i}" for name, layers in names.items() for i in layers}


@pytest.mark.slow
@pytest.mark.parametrize("method", NEW)
def test_every_method_trains_and_is_measured(digits, method):
    """Better than its untrained self, in the sweep and in one vmapped program, as accelerators."""
    options = {"hidden": (16, 16), "epochs": 8, "methods": (method,), "inputs": "standard"}
    made = dataclasses.replace(CONFIG, learning_rates=(0.05, 0.2), weight_decay=None, **options)
    record = jax.tree.map(lambda leaf: leaf[0], train(made, method, digits))
    assert set(record.evaluations) == columns_of(method)
    for name, column in record.evaluations.items():
        assert np.isfinite(column).all(), name
    loss = record.evaluations["validation_loss"].mean(1)
    assert (loss[:, -1] < 0.8 * loss[:, 0]).any()
    run = experiment.make_run(made, method, 10, experiment.scaling_of(made, digits))
    args = (jnp.arange(2), jnp.float32(0.05), jnp.int32(1), experiment.split(digits))
    together = jax.jit(jax.vmap(run, (0, None, None, None)))(*args)
    # rounding grows while training
    np.testing.assert_allclose(together.train_loss[:, :5], record.train_loss[0, :, :5], rtol=1e-3)


@pytest.mark.slow
def test_learnt_feedback_turns_towards_the_weights_farther_than_fa_turns_weights_to_it(digits):
    made = StudyConfig(
        methods=("fa", "kp", *NEW[2:5]), learning_rates=(0.1,), seeds=2, hidden=(64,), epochs=10
    )
    angle = {}
    for method in (*made.methods, "weight_mirror"):
        evaluations = train(made, method, digits).evaluations
        angle[method] = evaluations["weight_angle/Dense_1"][..., -1].mean()
    assert all(angle[method] < angle["fa"] - 3 for method in angle if method != "fa"), angle
