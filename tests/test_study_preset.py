"""Configurations refuse what cannot be run; the methods of the preset are what they were."""

import dataclasses
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import soap_jax
from soap_jax import data
from soap_jax.study import METHODS, preset, trial
from soap_jax.study.preset import StudyConfig, TrainConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "minst"}, "dataset: 'minst' is unknown; expected digits, .*mean 'mnist'"),
        ({"methods": ("bp", "pepita")}, "methods: 'pepita' is unknown; expected bp, fa"),
        ({"methods": ()}, "methods is empty"),
        ({"methods": ("fa", "fa")}, "each once"),
        ({"model": "cnn"}, "model: 'cnn' is unknown; expected mlp, conv"),
        ({"activation": "step"}, "activation: 'step' is unknown; expected tanh"),
        ({"optimizer": "lion"}, "optimizer: 'lion' is unknown; expected sgd"),
        ({"inputs": "raw"}, "inputs: 'raw' is unknown; expected standard, unit"),
        ({"init": "torch"}, "init: 'torch' is unknown; expected matched, soap"),
        ({"learning_rates": ()}, "learning_rates is empty"),
        ({"learning_rates": (0.1, -0.1)}, "learning_rates has -0.1 at index 1; expected positive"),
        ({"learning_rates": (0.1, float("nan"))}, "learning_rates has nan at index 1"),
        ({"learning_rates": (0.1, 0.1)}, "twice"),
        ({"seeds": 0}, "seeds is 0; expected at least 1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"periods": (0, 1)}, "periods has 0 at index 0"),
        ({"periods": ()}, "periods is empty"),
        ({"memory_limit": 0.0}, "memory_limit is 0.0; expected a positive"),
        ({"evaluations": 0}, "evaluations is 0"),
        ({"hidden": ()}, "feedback has no effect"),
        ({"hidden": (256, 0)}, "hidden is"),
        ({"channels": (0,)}, "channels is"),
        ({"target_loss": 0.0}, "target_loss is 0.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; expected a number of at least 0"),
    ],
)
def test_a_value_out_of_range_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        StudyConfig(**change)


def test_configurations_are_compared_by_content():
    assert StudyConfig(learning_rates=[0.3, 0.1]) == StudyConfig(learning_rates=(0.1, 0.3))
    assert hash(StudyConfig()) == hash(StudyConfig())


def test_weights_decay_by_default_if_kolen_pollack_is_among_the_methods():
    assert StudyConfig().weight_decay == 0
    assert StudyConfig(methods=("bp", "kp")).weight_decay == 1e-3
    assert StudyConfig(methods=("bp", "kp"), weight_decay=0).weight_decay == 0
    assert TrainConfig(method="kp").weight_decay == 1e-3
    assert TrainConfig(method="bp", weight_decay=0.1).as_study().weight_decay == 0.1


def test_importing_the_command_line_loads_nothing_heavy():
    heavy = "{'jax', 'numpy', 'pandas', 'altair', 'scipy', 'flax'}"
    code = f"import sys, soap_jax.cli; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stdout + done.stderr


HUGE = 10**12


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": HUGE},
        {"seeds": 100_000},  # times methods, rates and periods
        {"epochs": HUGE},
        {"batch_size": HUGE},
        {"evaluations": HUGE},
        {"chunk_size": HUGE},
        {"hidden": (HUGE,)},
        {"hidden": (10**6, 10**6)},
        {"hidden": (10**4000,)},
        {"periods": (1, HUGE)},
        {"learning_rates": (0.1, 1e39)},
        {"weight_decay": 1e39},
        {"target_loss": float("inf")},
    ],
    ids=lambda change: f"{change}"[:40],
)
def test_a_number_too_large_is_refused_before_anything_is_made_of_it(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"^{name} .*; expected") as caught:
        StudyConfig(**change)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", ["epochs", "period", "checkpoint_every", "keep", "seed"])
def test_a_number_too_large_for_a_single_training_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}s? .*{HUGE}.*; expected"):
        TrainConfig(**{name: HUGE})


def test_a_large_study_is_allowed():
    assert StudyConfig(seeds=1000, epochs=1000, hidden=(10_000, 10_000)).seeds == 1000


def test_every_field_is_explained_and_every_method_named():
    for kind in (preset.Protocol, preset.Network, StudyConfig, TrainConfig):
        own = set(kind.__annotations__) - {"epochs", "periods", "target_loss", "hidden"}
        assert all(f"        {name}: " in kind.__doc__ for name in own), kind
    words = re.findall(r"\w+", StudyConfig.__doc__)
    assert all(name in words for name in METHODS)


def test_a_smaller_study_is_within_the_whole_one():
    whole = StudyConfig()
    small = whole.smaller()
    assert set(small.learning_rates) < set(whole.learning_rates)
    assert (small.seeds, small.steps, small.periods) == (3, 300, (1,))
    assert small.smaller() == small
    assert small.arguments()["epochs"] is None and whole.arguments()["steps"] is None


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def of(digits, name, **options):
    """The task, the method, its params and a batch."""
    arguments = preset.comparison_arguments(StudyConfig(methods=(name,), **options), digits)
    task, method = arguments["task"], arguments["methods"][name]
    return task, method, task.init(jax.random.key(0)), jax.tree.map(lambda x: x[:64], task.train)


@pytest.mark.parametrize("inputs", ["standard", "unit"])
def test_inputs_are_scaled_over_what_is_trained_on(inputs, digits):
    task, _, params, (x, labels) = of(digits, "bp", inputs=inputs, hidden=(5,))
    train = task.train.images
    mean, std = (train.mean(), train.std()) if inputs == "standard" else (0.0, 16.0)
    h = (x.reshape(64, -1).astype(float) - mean) / std
    h = np.tanh(h @ params["Dense_0"]["kernel"])
    logits = h @ params["Dense_1"]["kernel"]  # biases are zero
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    np.testing.assert_allclose(task.loss(params, (x, labels)), loss, rtol=1e-5)
    accuracy = task.metrics["accuracy"]
    assert accuracy(params, (x, labels)) == (logits.argmax(-1) == labels).mean()
    broken = jax.tree.map(lambda leaf: leaf.at[..., 0].set(jnp.inf), params)
    assert jnp.isnan(accuracy(broken, (x, labels)))


@pytest.mark.parametrize("name", ["dfa", "dkp", "sdfa", "drtp"])
def test_direct_feedback_has_the_network_of_the_others_and_another_gradient(name, digits):
    task, method, params, batch = of(digits, name, hidden=(7, 5))
    args = None, batch, jax.random.key(0)
    loss_dfa = trial.direct_feedback_loss(task, method)
    projections = soap_jax.init_projections(jax.random.key(1), loss_dfa, params, *args)
    (loss, _), found = jax.value_and_grad(loss_dfa, has_aux=True)(params, projections, *args)
    expected, true = jax.value_and_grad(task.loss)(params, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for layer, same in (("Dense_0", False), ("Dense_1", False), ("Dense_2", True)):
        close = np.allclose(found[layer]["kernel"], true[layer]["kernel"], atol=1e-6)
        assert close == same, layer


def test_activity_propagation_begins_as_backprop(digits):
    task, method, params, batch = of(digits, "activity_propagation", hidden=(7,))
    _, true = jax.value_and_grad(task.loss)(params, batch)

    def gradient(step):
        return method.gradient(params, None, batch, None, jnp.int32(step), 0.1)[1]

    first, exact = gradient(4)["Dense_0"]["kernel"], true["Dense_0"]["kernel"]
    np.testing.assert_allclose(first, exact, rtol=1e-4, atol=1e-7)
    assert not np.allclose(gradient(5)["Dense_0"]["kernel"], true["Dense_0"]["kernel"], atol=1e-6)


def test_the_original_starts_are_torchs_for_methods_without_feedback(digits):
    for name, torch in (("bp", True), ("frozen", True), ("fa", False), ("dfa", False)):
        _, method, params, _ = of(digits, name, init="soap")
        assert (method.init is not None) == torch
    drawn = preset.init_as_torch(jax.random.key(0), params)
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, params)
    for layer in drawn.values():
        bound = layer["kernel"].shape[0] ** -0.5
        for leaf in layer.values():
            assert 0.6 * bound < jnp.abs(leaf).max() <= bound


@pytest.mark.parametrize("optimizer", preset.CHOICES["optimizer"])
def test_weights_decay_beside_the_optimisers_update(optimizer):
    """w <- w + Δw - learning_rate * weight_decay * w."""
    params = {"kernel": jnp.full((2, 2), 3.0)}

    def update(weight_decay):
        config = StudyConfig(optimizer=optimizer, weight_decay=weight_decay)
        chosen = preset.optimizer(config)(jnp.float32(0.5))
        return chosen.update(params, chosen.init(params), params)[0]["kernel"]

    np.testing.assert_allclose(update(0.1) - update(0.0), -0.15, rtol=1e-5)


def test_a_conv_net_needs_images_and_names_its_activations(digits):
    task, _, params, batch = of(digits, "dfa", model="conv", channels=(3, 4))
    assert task.taps.names == ("hidden_0", "hidden_1")
    assert params["Conv_1"]["kernel"].shape == (3, 3, 3, 4) and jnp.isfinite(
        task.loss(params, batch)
    )
    with pytest.raises(
        ValueError, match=r"'activity_propagation' needs a gradient .* which model='conv' does not"
    ):
        StudyConfig(methods=("bp", "activity_propagation"), model="conv")
    flat = [split._replace(images=split.images.reshape(-1, 64)) for split in digits[1:3]]
    with pytest.raises(ValueError, match=r"model is 'conv', but examples have the shape \(64,\)"):
        of(digits._replace(train=flat[0], test=flat[1]), "fa", model="conv")


def test_rflo_is_for_tasks_of_ones_own():
    for make in (lambda: StudyConfig(methods=("bp", "rflo")), lambda: TrainConfig(method="rflo")):
        with pytest.raises(
            ValueError, match=r"the method 'rflo' needs one step .* which model='mlp' does not"
        ):
            make()


def test_feedback_that_learns_by_its_kernels_gradient_decays_by_default():
    for name in ("kp", "pfa", "ldfa", "dkp"):
        assert StudyConfig(methods=("bp", name)).weight_decay == 1e-3
    assert StudyConfig(methods=("bp", "fa", "dfa")).weight_decay == 0


def test_methods_are_described_without_the_usual_initialiser(digits):
    said = {name: of(digits, name)[1].describe() for name in ("bp", "fa", "pfa", "ldfa")}
    assert said["bp"] == "backprop" and said["fa"] == "Fixed()"
    assert "initializer=product(10, orthogonal=False)" in said["pfa"]
    assert "initializer=_low_rank" in said["ldfa"]


def test_a_configuration_is_stored_as_json():
    config = StudyConfig(hidden=(3,))
    assert StudyConfig(**dataclasses.asdict(config)) == config
