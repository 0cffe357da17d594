"""What the tidy results say: one row per method and period, with 95 % intervals over seeds.

The learning rate of a method is chosen on validation data; accuracy is then read on test data.
Steps to the target loss are compared at one rate that all methods share, pairing the seeds.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from soap_jax.study.config import StudyConfig

CONFIDENCE = 0.95


def base(config: StudyConfig, table: pd.DataFrame) -> pd.DataFrame:
    """The rows at each method's base period: the smallest, or 0 where feedback is never synced.

    Args:
        config: the study's configuration.
        table: any with a column "period".
    """
    return table[table["period"].isin([0, min(config.periods)])]


def mean_interval(values: ArrayLike) -> tuple[float, float, float]:
    """Mean and its Student t interval, `(mean, low, high)`; NaN bounds for fewer than two values.

    Example:
        >>> mean, low, high = mean_interval([1.0, 2.0, 3.0])
        >>> round(mean, 3), round(low, 3), round(high, 3)
        (2.0, -0.484, 4.484)
    """
    sample = np.asarray(values, float)
    mean = float(sample.mean())
    if sample.size < 2:
        return mean, np.nan, np.nan
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, sample.size - 1) * stats.sem(sample))
    return mean, mean - half, mean + half


def ratio_interval(values: ArrayLike, reference: ArrayLike) -> tuple[float, float, float]:
    """Geometric mean of paired ratios and its t interval on the log scale, `(ratio, low, high)`.

    Example:
        >>> ratio, low, high = ratio_interval([20.0, 40.0, 80.0], [10.0, 20.0, 40.0])
        >>> round(ratio, 3), round(low, 3), round(high, 3)
        (2.0, 2.0, 2.0)
    """
    logs = np.log(np.asarray(values, float)) - np.log(np.asarray(reference, float))
    mean, low, high = np.exp(mean_interval(logs)).tolist()
    return mean, low, high


def best_rate(runs: pd.DataFrame) -> float:
    """The learning rate with the highest mean validation accuracy, of one method's runs.

    Ties go to the lower mean validation loss. A rate at which any run diverged is not chosen; NaN
    if that leaves none.
    """
    by_rate = runs.groupby("learning_rate")
    means = by_rate[["validation_accuracy", "validation_loss"]].mean()
    means["validation_accuracy"] = means["validation_accuracy"].round(6)  # float32: ties are ties
    means = means[~by_rate["diverged"].any()]
    if means.empty:
        return np.nan
    order = means.sort_values(["validation_accuracy", "validation_loss"], ascending=[False, True])
    return float(order.index[0])


def shared_rate(runs: pd.DataFrame) -> float:
    """The smallest learning rate at which every run of backprop reaches the target loss.

    NaN if there is none. At so small a rate the steps measure the speed of learning rather than its
    stability. Without backprop among the methods it is the smallest for all of them, each at its
    smallest period.
    """
    if (runs["method"] == "bp").any():
        runs = runs[runs["method"] == "bp"]
    runs = runs[runs["period"] == runs.groupby("method")["period"].transform("min")]
    arrived = runs["steps_to_target"].notna() & ~runs["diverged"]
    reached = arrived.groupby(runs["learning_rate"]).all()
    return float(min(reached[reached].index, default=np.nan))


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per method and period.

    Args:
        runs: the tidy table "runs".

    Returns:
        A table with the columns `method`, `period`, `best_rate`, `best_rate_at_edge` (the best may
        lie beyond the grid), `test_accuracy` at it with `_low` and `_high`, `shared_rate`,
        `steps_to_target` there (geometric mean), `ratio_to_bp` of those steps with `_low` and
        `_high`, `censored` (how many of the runs there diverge or never reach the target: they
        count as if they did at their last step, and both numbers are lower bounds, without
        interval), `fewest_steps` (the smallest geometric mean at any rate where every run gets
        there) at `fastest_rate`, `diverged` and `runs`.
    """
    rates = sorted(runs["learning_rate"].unique())
    shared = shared_rate(runs)
    arrived = runs["steps_to_target"].where(~runs["diverged"])
    runs = runs.assign(arrived=arrived, known=arrived.fillna(runs["steps"]))
    at_shared = runs[runs["learning_rate"] == shared].set_index("seed").sort_index()
    reference = at_shared.loc[at_shared["method"] == "bp", "known"]
    rows = []
    for (method, period), of_method in runs.groupby(["method", "period"], sort=False):
        best = best_rate(of_method)
        accuracy = of_method.loc[of_method["learning_rate"] == best, "test_accuracy"]
        row = {
            "method": method,
            "period": period,
            "best_rate": best,
            "best_rate_at_edge": len(rates) > 1 and best in (rates[0], rates[-1]),
            **_named("test_accuracy", mean_interval(accuracy) if accuracy.size else _NOTHING),
            "shared_rate": shared,
            "steps_to_target": np.nan,
            **_named("ratio_to_bp", _NOTHING),
            "censored": 0,
            **_fastest(of_method),
            "diverged": int(of_method["diverged"].sum()),
            "runs": len(of_method),
        }
        here = at_shared[(at_shared["method"] == method) & (at_shared["period"] == period)]
        if len(here):
            row["censored"] = int(here["arrived"].isna().sum())
            row["steps_to_target"] = float(stats.gmean(here["known"]))
            if len(reference) and method != "bp":
                ratio, low, high = ratio_interval(here["known"], reference)
                interval = (ratio, np.nan, np.nan) if row["censored"] else (ratio, low, high)
                row |= _named("ratio_to_bp", interval)
        rows.append(row)
    return pd.DataFrame(rows)


_NOTHING = (np.nan, np.nan, np.nan)


def _fastest(runs):
    """The rate with the fewest steps among those where every run arrives."""
    by_rate = runs.groupby("learning_rate")
    means = by_rate["known"].apply(stats.gmean)[by_rate["arrived"].count() == by_rate.size()]
    if means.empty:
        return {"fewest_steps": np.nan, "fastest_rate": np.nan}
    return {"fewest_steps": float(means.min()), "fastest_rate": float(means.idxmin())}


def _named(name, interval):
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))
