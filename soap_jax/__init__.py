"""Feedback alignment for JAX and Flax.

The package has the public names below and the modules `ops`, `direct`, `activity`, `rules`,
`factors`, `local`, `optimizers`, `initializers`, `perturbation`, `trees`, `linen`, `nnx`,
`metrics`, `recording`, `models`, `data`, `training`, `convolutions`, `transform`, `sweeps`,
`tasks`, `temporal` and `study`. Each loads on first use, so `import soap_jax` and
`soap-jax --help` are fast.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from soap_jax import (
        activity,
        convolutions,
        data,
        direct,
        factors,
        initializers,
        linen,
        local,
        metrics,
        models,
        nnx,
        ops,
        optimizers,
        perturbation,
        recording,
        rules,
        study,
        sweeps,
        tasks,
        temporal,
        training,
        transform,
        trees,
    )
    from soap_jax.direct import direct_feedback, direct_target
    from soap_jax.feedback import FeedbackState, feedback_of, init_feedback, sync_feedback
    from soap_jax.optimizers import kolen_pollack
    from soap_jax.recording import record_alignment
    from soap_jax.rules import Fixed, Rule, SignSync, Transport, WeightMirror
    from soap_jax.transform import (
        Explanation,
        explain,
        init_projections,
        with_direct_feedback,
        with_feedback,
    )

__version__ = "0.1.0"

_NAMES = {  # public name: its module; the other public names are modules
    "Explanation": "transform",
    "FeedbackState": "feedback",
    "direct_feedback": "direct",
    "direct_target": "direct",
    "explain": "transform",
    "feedback_of": "feedback",
    "init_feedback": "feedback",
    "init_projections": "transform",
    "sync_feedback": "feedback",
    "Fixed": "rules",
    "Rule": "rules",
    "SignSync": "rules",
    "Transport": "rules",
    "WeightMirror": "rules",
    "kolen_pollack": "optimizers",
    "record_alignment": "recording",
    "with_direct_feedback": "transform",
    "with_feedback": "transform",
}
__all__ = [
    "Explanation",
    "FeedbackState",
    "Fixed",
    "Rule",
    "SignSync",
    "Transport",
    "WeightMirror",
    "activity",
    "convolutions",
    "data",
    "direct",
    "direct_feedback",
    "direct_target",
    "explain",
    "factors",
    "feedback_of",
    "init_feedback",
    "init_projections",
    "initializers",
    "kolen_pollack",
    "linen",
    "local",
    "metrics",
    "models",
    "nnx",
    "ops",
    "optimizers",
    "perturbation",
    "record_alignment",
    "recording",
    "rules",
    "study",
    "sweeps",
    "sync_feedback",
    "tasks",
    "temporal",
    "training",
    "transform",
    "trees",
    "with_direct_feedback",
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
