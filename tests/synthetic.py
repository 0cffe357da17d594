"""Comparisons that never ran, with known truths."""

import numpy as np
import pandas as pd
from made_up import make_record

from soap_jax.study.comparison import Comparison
from soap_jax.study.store import TABLES

ANGLES = {"sign_norm": 37.1, "sign_preserve": 50.5, "sign": 37.1, "fa": 90.0}
"""Initial angles of feedback to weights, degrees."""
AMPLIFICATION = {"sign": 9.2, "bp_scaled": 9.2, "bp_scaled_live": 9.2, "frozen": 0.0}
"""Effective learning rates of the hidden layers, over the learning rate."""
TRUTH = {"fa": 2.0, "sign": 0.4, "bp_scaled": 0.41, "bp_scaled_live": 0.4, "sign_preserve": 1.25}
TRUTH |= {"sign_norm": 1.05, "frozen": 3.0}
"""Steps over backprop's at the shared rate, as in the pilot of the design."""
TUNED = {"sign_preserve": 1.02, "sign_norm": 1.01, "bp_scaled": 0.8, "bp_scaled_live": 0.8}
TUNED |= {"fa": 1.1, "sign": 0.8, "frozen": 2.0}
"""The same at the best rate of each."""


def make_study(
    truth=TRUTH,
    *,
    tuned=TUNED,
    noise=0.05,
    seed=0,
    error_angles=(40.0,),
    angle_noise=3.0,
    accuracy_noise=0.003,
    rates=(0.01, 0.1, 1.0),
    **changes,
):
    """A comparison whose middle rate is the best; steps are lognormal, paired by seed.

    Args:
        truth: steps over backprop's, by method or by (method, period), at all rates but the best.
        tuned: the same at the best rate.
        noise: standard deviation of each run's log steps.
        seed: of the generator.
        error_angles: final ones of FA, from the first hidden layer to the last.
        angle_noise: their standard deviation.
        accuracy_noise: standard deviation of validation accuracies; the best rate leads by 0.1.
        rates: learning rates.
        **changes: of `made_up.make_record`.
    """
    changes = {"periods": (1, 10, 100), **changes}
    record = make_record(rates=rates, hidden=len(error_angles), **changes)
    record["protocol"]["steps"] = 5000
    rng = np.random.default_rng(seed)
    best, seeds = len(rates) // 2, len(record["seeds"])
    shape = len(rates), seeds
    shared = rng.normal(0, 0.2, seeds)  # what pairing removes
    runs, evaluations = [], []
    for method, of in record["methods"].items():
        for period in of["periods"]:
            factor = np.full(shape, truth.get((method, period), truth.get(method, 1.0)))
            factor[best] = tuned.get(method, 1.0)
            base = 200.0 / np.sqrt(np.asarray(rates) / rates[0])[:, None]
            accuracy = 0.8 + 0.1 * (np.arange(len(rates)) == best)[:, None]
            keys = {
                "method": method,
                "learning_rate": np.repeat(rates, seeds),
                "seed": np.tile(np.arange(seeds), len(rates)),
                "period": period,
            }
            accuracy = accuracy + rng.normal(0, accuracy_noise, shape)
            results = {
                "steps_to_target": base * factor * np.exp(shared + rng.normal(0, noise, shape)),
                "validation_loss": 1 - accuracy,
                "validation_accuracy": accuracy,
                "test_accuracy": accuracy,
            }
            results = {name: np.ravel(values) for name, values in results.items()}
            runs.append(pd.DataFrame({**keys, "steps": 5000, "diverged": False, **results}))
            rate = keys["learning_rate"] * AMPLIFICATION.get(method, 1.0)
            for step in (0, 5000):
                row = {"step": step, "train_loss": 0.4, "validation_loss": 0.4}
                for i, angle in enumerate(error_angles):
                    own = ANGLES.get(method, 0.0)
                    row[f"weight_angle/Dense_{i + 1}/kernel"] = own
                    norm = AMPLIFICATION.get(method, 1.0) / np.cos(np.radians(own))
                    row[f"norm_ratio/Dense_{i + 1}/kernel"] = norm
                    final = angle + rng.normal(0, angle_noise, len(rate))
                    row[f"error_angle/Dense_{i}/kernel"] = final if method == "fa" else np.nan
                    effective = rate * (1 + step / 5000)
                    row[f"effective_learning_rate/Dense_{i}/kernel"] = effective
                evaluations.append(pd.DataFrame(keys | row))
    tables = {
        "runs": pd.concat(runs, ignore_index=True),
        "evaluations": pd.concat(evaluations, ignore_index=True),
    }
    losses = tables["runs"][["method", "learning_rate", "seed", "period"]]
    return Comparison(record, tables | {"losses": losses.assign(train_loss=[[]] * len(losses))})


def at(study, method, rate, *, period=None, seeds=slice(None)):
    """Labels of the runs of a method at a rate, by seed."""
    return study.rows("runs", method, rate, period).index[seeds]


def again(study, **tables):
    """The comparison after its tables were changed."""
    return Comparison(study.record, {name: getattr(study, name) for name in TABLES} | tables)


def censor(study, method, rate, *, never=0, diverged=0):
    """Makes the first runs of a method diverge, and the next never arrive."""
    rows = at(study, method, rate, seeds=slice(diverged + never))
    study.record["protocol"]["steps"] = 900
    study.runs.loc[rows[:diverged], "diverged"] = True
    study.runs.loc[rows[diverged:], "steps_to_target"] = np.nan
    return again(study)
