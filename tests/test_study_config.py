"""The configuration of a study refuses what it cannot run."""

import subprocess
import sys

import pytest

from soap_jax.study.config import StudyConfig
from soap_jax.study.single_config import TrainConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "minst"}, "dataset: 'minst' is unknown; expected digits, .*mean 'mnist'"),
        ({"methods": ("bp", "pepita")}, "methods: 'pepita' is unknown; expected bp, fa"),
        ({"methods": ()}, "methods is empty"),
        ({"methods": ("fa", "fa")}, "different ones"),
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
        ({"batch_size": 0}, "batch_size is 0"),
        ({"periods": (0, 1)}, "periods has 0 at index 0"),
        ({"periods": ()}, "periods is empty"),
        ({"memory_limit": 0.0}, "memory_limit is 0.0; expected a positive"),
        ({"evaluations": 0}, "evaluations is 0"),
        ({"hidden": ()}, "nothing for feedback to do"),
        ({"hidden": (256, 0)}, "hidden is"),
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
    heavy = "{'jax', 'numpy', 'pandas', 'matplotlib', 'scipy', 'flax'}"
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
    with pytest.raises(ValueError, match=f"^{name} is {HUGE}; expected"):
        TrainConfig(**{name: HUGE})


def test_a_large_study_is_allowed():
    assert StudyConfig(seeds=1000, epochs=1000, hidden=(10_000, 10_000)).seeds == 1000
