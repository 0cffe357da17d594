"""Tidy tables of studies that never ran, with known truths."""

import numpy as np
import pandas as pd

from soap_jax.study.config import PERIODIC, StudyConfig

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
    **config,
):
    """A study whose middle learning rate is the best; steps are lognormal, paired by seed.

    Args:
        truth: steps over backprop's, by method or by (method, period), at all rates but the best.
        tuned: the same at the best rate.
        noise: standard deviation of each run's log steps.
        seed: of the generator.
        error_angles: final ones of FA, from the first hidden layer to the last.
        angle_noise: their standard deviation.
        accuracy_noise: standard deviation of validation accuracies; the best rate leads by 0.1.
        rates: learning rates.
        **config: the rest of the configuration.

    Returns:
        `(config, tables)`.
    """
    config = StudyConfig(
        learning_rates=rates, hidden=(256,) * len(error_angles), **{"seeds": 10, **config}
    )
    rng = np.random.default_rng(seed)
    best = len(rates) // 2
    shape = len(rates), config.seeds
    shared = rng.normal(0, 0.2, config.seeds)  # what pairing removes
    runs, evaluations = [], []
    for method in config.methods:
        for period in config.periods if method in PERIODIC else (0,):
            factor = np.full(shape, truth.get((method, period), truth.get(method, 1.0)))
            factor[best] = tuned.get(method, 1.0)
            base = 200.0 / np.sqrt(np.asarray(config.learning_rates) / rates[0])[:, None]
            accuracy = 0.8 + 0.1 * (np.arange(len(rates)) == best)[:, None]
            keys = {
                "method": method,
                "period": period,
                "learning_rate": np.repeat(config.learning_rates, config.seeds),
                "seed": np.tile(np.arange(config.seeds), len(rates)),
            }
            accuracy = accuracy + rng.normal(0, accuracy_noise, shape)
            results = {
                "steps": 5000,
                "diverged": False,
                "steps_to_target": base * factor * np.exp(shared + rng.normal(0, noise, shape)),
                "validation_loss": 1 - accuracy,
                "validation_accuracy": accuracy,
                "test_accuracy": accuracy,
            }
            runs.append(
                pd.DataFrame(
                    keys
                    | {k: np.ravel(v) for k, v in results.items()}
                    | {"steps": 5000, "diverged": False}
                )
            )
            rate = keys["learning_rate"] * AMPLIFICATION.get(method, 1.0)
            for step in (0, 5000):
                row = {"step": step, "train_loss": 0.4, "validation_loss": 0.4}
                for i, angle in enumerate(error_angles):
                    row[f"weight_angle/Dense_{i + 1}"] = ANGLES.get(method, np.nan)
                    final = angle + rng.normal(0, angle_noise, len(rate))
                    row[f"error_angle/Dense_{i}"] = final if method == "fa" else np.nan
                    row[f"effective_learning_rate/Dense_{i}"] = rate * (1 + step / 5000)
                evaluations.append(pd.DataFrame(keys | row))
    return config, {
        "runs": pd.concat(runs, ignore_index=True),
        "evaluations": pd.concat(evaluations, ignore_index=True),
    }


def at(tables, method, rate, *, period=None, seeds=slice(None)):
    """Labels of the runs of a method at a rate, by seed."""
    runs = tables["runs"]
    chosen = (runs["method"] == method) & (runs["learning_rate"] == rate)
    chosen &= runs["period"] == (runs.loc[chosen, "period"].min() if period is None else period)
    return runs.index[chosen][seeds]
