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
    }


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method is 'dfa'; expected one of bp, fa"):
        methods.rule_of("dfa", 1)
