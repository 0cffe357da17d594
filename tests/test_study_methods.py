"""Names of methods and the rules behind them."""

import pytest

import soap_jax
from soap_jax.study import config, methods


def test_every_method_has_a_title_and_a_rule():
    assert all(config.METHODS.values())
    rules = {name: methods.rule_of(name, 10) for name in config.METHODS}
    assert rules == {
        "bp": None,
        "fa": soap_jax.Fixed(),
        "sign": soap_jax.SignSync(period=10, magnitude="unit"),
        "sign_preserve": soap_jax.SignSync(period=10, magnitude="preserve"),
        "sign_norm": soap_jax.SignSync(period=10, magnitude="norm"),
        "bp_scaled": None,
        "bp_scaled_live": None,
        "frozen": None,
        "sign_glorot": soap_jax.SignSync(period=10, magnitude="glorot"),
        "sign_redraw": soap_jax.SignSync(period=10, magnitude="redraw"),
        "transport": soap_jax.Transport(period=10, rate=1.0),
    }


def test_methods_that_sync_are_those_with_a_period():
    periodic = {name for name in config.METHODS if "period=10" in repr(methods.rule_of(name, 10))}
    assert periodic == config.PERIODIC


def test_layers_are_in_the_order_of_the_network():
    assert methods.layers({f"Dense_{i}": {} for i in (10, 2, 0)}) == [
        "Dense_0",
        "Dense_2",
        "Dense_10",
    ]


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(ValueError, match="optimizer is 'lion'; expected one of sgd, momentum"):
        methods.optimizer_of("bp", 0.1, optimizer="lion")
    with pytest.raises(ValueError, match="method is 'dfa'; expected one of bp, fa"):
        methods.optimizer_of("dfa", 0.1)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method is 'dfa'; expected one of bp, fa"):
        methods.rule_of("dfa", 1)
