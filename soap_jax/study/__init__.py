"""A fair comparison of learning methods, which separates effects from artefacts.

    result = study.compare(task, ["bp", "fa", "sign_norm"], learning_rates=(0.1,), steps=1000)
    result.summary(), result.ratio("fa", "bp"), result.report("report.html")

`compare` trains any task (any model, data and loss) with any methods, over the same learning rates
and paired seeds. The command `soap-jax study` runs one preset of it.
"""

import importlib

_HOMES = {
    "Task": "soap_jax.tasks",
    "METHODS": "soap_jax.study.methods",
    "Method": "soap_jax.study.methods",
    "compare": "soap_jax.study.protocol",
    "Comparison": "soap_jax.study.comparison",
    "load": "soap_jax.study.comparison",
    "Claim": "soap_jax.study.claims",
    "Difference": "soap_jax.study.contrasts",
    "Ratio": "soap_jax.study.contrasts",
    "Share": "soap_jax.study.contrasts",
    "Test": "soap_jax.study.contrasts",
    "Trend": "soap_jax.study.contrasts",
    "judge": "soap_jax.study.claims",
}
__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted({*globals(), *__all__})
