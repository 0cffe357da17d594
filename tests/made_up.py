"""A study that never ran, with curves that look like real ones, and what was found in it."""

import numpy as np
import pandas as pd

from soap_jax.study import claims, config, mediation

SPEEDS = {
    "bp": (1.0, 1.0),
    "fa": (0.55, 0.5),
    "sign": (4.3, 9.2),
    "sign_preserve": (0.8, 0.65),
    "sign_norm": (0.9, 0.8),
    "bp_scaled": (4.5, 11.5),
    "bp_scaled_live": (4.1, 9.5),
    "frozen": (0.2, 0.0),
}
"""How fast each method of the made-up study learns, and how far its hidden rate is amplified."""


def make_study(**changes):
    """A made-up study with every method: its configuration and its tables."""
    made = config.StudyConfig(**{"epochs": 20, "periods": (1, 10), **changes})
    marks = np.arange(made.evaluations + 1) * (340 // made.evaluations)
    runs, evaluations = [], []
    for method in made.methods:
        speed, amplification = SPEEDS[method]
        for period in made.periods_of(method):
            for rate in made.learning_rates:
                for seed in range(made.seeds):
                    draw = np.random.default_rng(seed)  # alike for all methods: runs are paired
                    noise = np.exp(0.04 * draw.normal())
                    own = np.random.default_rng([seed, *method.encode()])
                    noise *= np.exp(0.01 * own.normal())
                    stable = 1 / (1 + (rate * max(amplification, 1) / 1.5) ** 2)
                    pace = 0.2 * speed * rate * stable * noise
                    diverged = rate * amplification > 18
                    steps = np.ceil(np.log(2.3 / made.target_loss) / pace)
                    loss = 0.02 + 2.28 * np.exp(-pace * np.maximum(marks - 0.5, 0))
                    loss = np.where(diverged & (marks > 100), np.nan, loss)
                    names = {"method": method, "period": period, "learning_rate": rate}
                    names["seed"] = seed
                    accuracy = 0.97 - 0.1 * loss[-1] - 0.02 * own.random()
                    runs.append(
                        names
                        | {
                            "steps": int(marks[-1]),
                            "diverged": diverged,
                            "steps_to_target": np.nan if diverged or steps > marks[-1] else steps,
                            "train_loss": loss[-1],
                            "validation_loss": loss[-1] * 1.1,
                            "validation_accuracy": accuracy,
                            "test_loss": loss[-1] * 1.2,
                            "test_accuracy": accuracy - 0.01,
                        }
                    )
                    table = pd.DataFrame({**names, "step": marks})
                    table["train_loss"] = np.append(np.nan, loss[1:])
                    table["validation_loss"] = loss * 1.1
                    table["validation_accuracy"] = 0.97 - 0.1 * loss
                    angle = {"fa": 55 + 35 * np.exp(-marks / 60), "sign_preserve": 50.5}
                    angle = angle.get(method, 37.1) + own.normal() + 0 * marks
                    has_feedback = method == "fa" or method in config.PERIODIC
                    for layer in range(len(made.hidden) + 1):
                        value = angle - 4 * layer if has_feedback else np.nan
                        table[f"gradient_angle/Dense_{layer}"] = value
                    for layer in range(len(made.hidden)):
                        value = angle - 4 * layer if has_feedback else np.nan
                        table[f"error_angle/Dense_{layer}"] = value
                        effective = rate * amplification * np.exp(-marks / 2000)
                        if method == "fa":
                            effective = rate * np.cos(np.radians(angle))
                        table[f"effective_learning_rate/Dense_{layer}"] = effective
                    evaluations.append(table)
    tables = {"runs": pd.DataFrame(runs), "evaluations": pd.concat(evaluations, ignore_index=True)}
    return made, tables


def make_part(label, estimate, low, high, within, **changes):
    """One test within a claim, made up."""
    usual = {"measure": "ratio", "p_holds": 0.001, "p_fails": 1.0, "censored": 0, "runs": 20}
    usual |= {"note": "", "testable": True}
    return claims.Part(
        label=label, estimate=estimate, low=low, high=high, within=within, **usual | changes
    )


def make_findings():
    """A finding with each verdict, made up."""
    nan, inf = np.nan, np.inf
    at = "steps to loss 0.5 at rate 0.05"
    fa = make_part(f"FA, fixed feedback / backprop, {at}", 1.84, 1.8, 1.88, (1.5, 3))
    sign = make_part(f"sign sync, raw / backprop, {at}", 0.23, 0.22, 0.25, (0, 0.8))
    live = make_part(f"sign sync, raw / backprop, scaled live, {at}", 0.95, 0.93, 0.97, (0.9, inf))
    norm = make_part(f"sign sync, norm kept / backprop, {at}", 1.1, 1.07, 1.13, (0.9, inf))
    late = make_part(f"sign sync, |B0| kept / backprop, {at}", 1.4, nan, nan, (0.95, inf))
    late = late.__class__(**vars(late) | {"note": "a lower bound", "censored": 3})
    trend = make_part("steps follow the initial angle", 0.98, nan, nan, (0, inf), measure="trend")
    period = make_part("sign sync, raw, period 10 / 1", 1.3, 1.25, 1.35, (1 / 1.1, 1.1))
    angle = make_part("FA, error angle", 61.0, 58.0, 64.0, (-inf, 75), measure="degrees")
    none = make_part("first / last", nan, nan, nan, (0, 1), testable=False, note="one hidden layer")
    keys = ("key", "statement", "verdict", "why", "p", "parts")
    rows = [
        ("1", "FA needs about twice backprop's steps.", claims.HOLDS, "1.84 lies in.", 1e-5, (fa,)),
        ("2", "Raw sign sync needs far fewer.", claims.HOLDS, "0.23 is below.", 1e-6, (sign,)),
        ("3", "Its gain is the hidden rate.", claims.HOLDS, "0.95 is above.", 0.002, (live, norm)),
        ("4", "|B0| loses the gain.", claims.UNDECIDED, "Censored.", 0.2, (late, trend)),
        ("6", "The period hardly matters.", claims.FAILS, "1.3 is above.", 0.001, (period,)),
        ("7", "Alignment emerges.", claims.HOLDS, "61 is below 75.", 0.01, (angle,)),
        ("7b", "Most near the output.", claims.NOT_TESTABLE, "One hidden layer.", nan, (none,)),
    ]
    return [claims.Finding(**dict(zip(keys, row, strict=True))) for row in rows]


def make_mediation():
    """The effect of raw sign sync, taken apart: nearly all through the rate; made up."""
    numbers = {
        ("total", "total"): (0.23, 0.22, 0.24, 1.0, 1.0, 1.0),
        ("rate first", "rate"): (0.241, 0.23, 0.252, 0.968, 0.95, 0.98),
        ("rate first", "direction"): (0.954, 0.93, 0.97, 0.032, 0.02, 0.05),
        ("direction first", "rate"): (0.21, 0.2, 0.22, 1.06, 1.04, 1.08),
        ("direction first", "direction"): (1.1, 1.07, 1.13, -0.06, -0.08, -0.04),
        ("average", "rate"): (0.225, 0.215, 0.235, 1.015, 0.99, 1.03),
        ("average", "direction"): (1.02, 1.0, 1.05, -0.015, -0.03, 0.01),
    }
    return mediation.Mediation(
        testable=True,
        learning_rate=0.05,
        effects=tuple(
            mediation.Effect(
                order=order,
                path=path,
                term="effect",
                **dict(zip(EFFECT_NUMBERS, found, strict=True)),
            )
            for (order, path), found in numbers.items()
        ),
        effective_rates=(
            mediation.EffectiveRate("bp", 0.05, 0.05),
            mediation.EffectiveRate("sign", 0.46, 0.39),
            mediation.EffectiveRate("bp_scaled_live", 0.575, 0.49),
        ),
    )


EFFECT_NUMBERS = ("ratio", "low", "high", "share", "share_low", "share_high")
UNKNOWN = mediation.Mediation(testable=False, note="sign_norm is not in the study")


BAD_CASES = {
    "one seed": {"seeds": 1},
    "one rate": {"learning_rates": (0.1,)},
    "only backprop": {"methods": ("bp",)},
    "no backprop": {"methods": ("fa", "sign")},
    "a target that nobody reaches": {"target_loss": 1e-9},
}


def break_everything(tables):
    """The same tables after every run diverged at once."""
    broken = {name: table.copy() for name, table in tables.items()}
    keys = ["method", "period", "learning_rate", "seed", "step", "steps"]
    for table in broken.values():
        measured = [name for name in table if name not in keys and table[name].dtype == float]
        table[measured] = np.nan
    broken["runs"]["diverged"] = True
    return broken


def luminance(color):
    """Relative luminance as WCAG defines it, of "#rrggbb"."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    """Contrast ratio as WCAG defines it, from 1 to 21."""
    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)
