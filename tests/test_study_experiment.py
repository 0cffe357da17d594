"""One method over the grid: paired, reproducible, and what the library itself would do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import soap_jax
from soap_jax import data, models, training
from soap_jax.study import experiment
from soap_jax.study.config import StudyConfig

CONFIG = StudyConfig(
    learning_rates=(0.1, 0.5), seeds=2, epochs=2, hidden=(7,), evaluations=3, batch_size=50
)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def records(digits):
    return {
        method: experiment.train_method(CONFIG, method, digits)
        for method in ("bp", "fa", "sign", "sign_preserve")
    }


def test_methods_start_alike_and_then_differ(records):
    first = {method: record.train_loss[..., 0] for method, record in records.items()}
    assert all((losses == first["bp"]).all() for losses in first.values())  # init and order
    last = [record.train_loss[0, 0, -1] for record in records.values()]
    assert len(set(map(float, last))) == len(records)


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
    run = experiment.make_run(CONFIG, "sign", digits.num_classes, digits.max_value)
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
    assert set(records["bp"].evaluations) == {"validation_loss", "validation_accuracy"}
    angles = records["sign"].evaluations["gradient_angle/Dense_0"]
    assert angles.shape == (2, 2, CONFIG.evaluations + 1)
    assert ((angles > 5) & (angles < 80)).all()
    np.testing.assert_allclose(records["fa"].evaluations["gradient_angle/Dense_1"], 0, atol=0.1)


def test_feedback_is_looked_at_as_the_next_step_uses_it(records):
    """Signs of the present weights: concordant at once, so the angle is far below FA's."""
    at_start = records["sign"].evaluations["weight_angle/Dense_1"][..., 0]
    assert (at_start < 45).all()


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
    config = StudyConfig(
        learning_rates=(0.1,), seeds=1, epochs=1, hidden=(5, 6), evaluations=1, methods=("fa",)
    )
    record = experiment.train_method(config, "fa", digits)
    assert {name for name in record.evaluations if name.startswith("weight_angle")} == {
        "weight_angle/Dense_1",
        "weight_angle/Dense_2",
    }


def test_plain_flax_is_the_reference():
    """Method bp has no feedback at all: not a feedback layer told to be exact."""
    plain = models.MLP((7, 10), feedback=False).init(jax.random.key(0), jnp.zeros((1, 64)))
    assert set(plain) == {"params"}
    assert isinstance(soap_jax.Fixed(), soap_jax.Rule)
