"""Feedback alignment for JAX and Flax.

The public names below, and the modules `ops`, `rules`, `trees`, `linen`, `nnx`, `metrics`,
`models`, `data`, `training` and `sweeps`. Everything loads on first use, so that
`import soap_jax` and `soap-jax --help` are quick.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from soap_jax import data, linen, metrics, models, nnx, ops, rules, sweeps, training, trees
    from soap_jax.explanation import Explanation, explain
    from soap_jax.feedback import FeedbackState, init_feedback, sync_feedback
    from soap_jax.rules import Fixed, Rule, SignSync, Transport
    from soap_jax.transform import with_feedback

__version__ = "0.1.0"

_NAMES = {  # and the modules they come from; the other public names are modules
    "Explanation": "explanation",
    "FeedbackState": "feedback",
    "explain": "explanation",
    "init_feedback": "feedback",
    "sync_feedback": "feedback",
    "Fixed": "rules",
    "Rule": "rules",
    "SignSync": "rules",
    "Transport": "rules",
    "with_feedback": "transform",
}
__all__ = [
    "Explanation",
    "FeedbackState",
    "Fixed",
    "Rule",
    "SignSync",
    "Transport",
    "data",
    "explain",
    "init_feedback",
    "linen",
    "metrics",
    "models",
    "nnx",
    "ops",
    "rules",
    "sweeps",
    "sync_feedback",
    "training",
    "trees",
    "with_feedback",
]


def __getattr__(name: str):
    if name in _NAMES:
        return getattr(importlib.import_module(f"soap_jax.{_NAMES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"soap_jax.{name}")
    raise AttributeError(f"module 'soap_jax' has no attribute {name!r}")


def __dir__():
    return __all__
