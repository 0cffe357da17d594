"""The rules behind the methods that a study compares."""

from __future__ import annotations

from jax.typing import ArrayLike

from soap_jax import rules
from soap_jax.study import config


def rule_of(method: str, period: ArrayLike) -> rules.Rule | None:
    """The rule behind a method's name; None for backpropagation.

    Raises:
        ValueError: for an unknown method.

    Example:
        >>> rule_of("sign_preserve", 10)
        SignSync(period=10, magnitude='preserve')
    """
    match method:
        case "bp":
            return None
        case "fa":
            return rules.Fixed()
        case "sign":
            return rules.SignSync(period=period, magnitude="unit")
        case "sign_preserve":
            return rules.SignSync(period=period, magnitude="preserve")
    raise ValueError(f"method is {method!r}; expected one of {', '.join(config.METHODS)}.")
