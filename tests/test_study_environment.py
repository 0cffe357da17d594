"""What bears on results is noted, and named with both values where it differs."""

import contextlib
import dataclasses

import jax
import numpy as np
import pandas as pd
import pytest

from soap_jax import data, study
from soap_jax.study import environment, preset

CONFIG = preset.StudyConfig(
    learning_rates=(0.1,), seeds=1, epochs=1, hidden=(5,), evaluations=1, periods=(1,)
)


@contextlib.contextmanager
def setting(name, value):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_default_prng_impl", "rbg"),
        ("jax_threefry_partitionable", False),
        ("jax_default_matmul_precision", "bfloat16"),
        ("jax_enable_x64", True),
    ],
)
def test_a_setting_that_bears_on_results_is_named_with_both_values(name, value):
    before = {"settings": environment.settings()}
    with setting(name, value):
        now = {"settings": environment.settings()}
    (said,) = environment.differences(before, now)
    old = before["settings"][name]
    assert said == f"settings.{name}: was {'not set' if old is None else old}, is now {value}"


def test_flags_differ_where_they_change_arithmetic_alone(monkeypatch):
    def flags(text):
        monkeypatch.setenv("XLA_FLAGS", text)
        return environment.settings()["XLA_FLAGS"]

    plain = flags("--xla_a=1 --xla_b=2")
    assert plain == flags(" --xla_b=2  --xla_a=0 --xla_a=1")  # the last one counts
    assert plain == flags(f"{plain} --xla_dump_to=here --xla_force_host_platform_device_count=8")
    assert plain != flags("--xla_a=1 --xla_b=3")


def test_what_an_older_version_did_not_note_is_not_compared():
    now = {"settings": environment.settings()}
    assert environment.differences({}, now) == []
    older = {"settings": {"jax_default_prng_impl": "rbg"}}
    assert len(environment.differences(older, now)) == 1


# Every dtype in a study is explicit


SLOW = ("bp_scaled_live", "sign", "kp", "activity_propagation", "frozen", "bp")


@pytest.mark.parametrize(
    "method",
    ["drtp", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_wide_numbers_and_strict_promotion_change_no_bit_of_a_run(method):
    config = dataclasses.replace(CONFIG, methods=(method,))
    arguments = preset.comparison_arguments(config, data.load("digits"))

    def train():
        result = study.compare(**arguments)
        assert {losses.dtype for losses in result.losses["train_loss"]} == {np.dtype(np.float32)}
        return result

    expected = train()
    for name, value in (("jax_enable_x64", True), ("jax_numpy_dtype_promotion", "strict")):
        with setting(name, value):
            found = train()
        for table in ("runs", "evaluations", "losses"):
            pd.testing.assert_frame_equal(
                getattr(found, table), getattr(expected, table), check_exact=True
            )
