"""A study that never ran, with curves that look like real ones, and what was found in it."""

import numpy as np
import pandas as pd

from soap_jax.study import claims, contrasts, mediation, preset_claims
from soap_jax.study.comparison import Comparison
from soap_jax.study.store import TABLES

METHODS = {
    "bp": ("backprop", "#707070", "the reference"),
    "fa": ("FA, fixed feedback", "#D55E00", "fixed random feedback"),
    "sign": ("sign sync, raw", "#0072B2", "the naive sign sync: direction and scale"),
    "sign_preserve": ("sign sync, |B0| kept", "#009E73", "no scale, another direction"),
    "sign_norm": ("sign sync, norm kept", "#CC79A7", "direction alone"),
    "bp_scaled": ("backprop, scaled", "#B87A00", "the scale of sign sync alone, at the start"),
    "bp_scaled_live": ("backprop, scaled live", "#2F93C9", "that scale, as the weights grow"),
    "frozen": ("hidden layers frozen", "#8A8A8A", "hidden layers untrained: to be beaten"),
}
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
ANGLES = {"fa": 90.0, "sign": 37.1, "sign_preserve": 50.5, "sign_norm": 37.1}
"""Of feedback to weights at the start."""
RATES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)


def make_record(
    methods=tuple(METHODS),
    *,
    rates=RATES,
    seeds=10,
    periods=(1, 10),
    hidden=1,
    target_loss=0.5,
    optimizer="sgd",
    metric="accuracy",
    init=None,
    **changes,
):
    """What was run, with `hidden` + 1 kernels; `metric` None: there are losses alone.

    `init` is that of the methods without feedback."""
    select = f"validation_{metric}" if metric else "validation_loss"
    protocol = {"learning_rates": list(rates), "periods": list(periods), "steps": 340}
    protocol |= {"batch_size": 64, "evaluations": 20, "optimizer": optimizer, "select": select}
    protocol |= {"maximise": metric is not None, "target_loss": target_loss, "task": {}}
    described = {}
    for name in methods:
        label, color, isolates = METHODS.get(name, (name, None, ""))
        described[name] = {"label": label, "color": color, "reference": "bp", "paper": ""}
        described[name] |= {"isolates": isolates, "description": "", "exact": name not in ANGLES}
        described[name]["init"] = init if name not in ANGLES else None
        described[name]["periods"] = list(periods) if name.startswith("sign") else [0]
    return {
        "format": 3,
        "title": "digits",
        "protocol": protocol,
        "seeds": list(range(seeds)),
        "methods": described,
        "kernels": [f"Dense_{k}/kernel" for k in range(hidden + 1)],
        "extended": [],
        "examples": {"train": 1151, "validation": 287, "test": 359},
        "window": 11,
        "claims": [claim.to_dict() for claim in preset_claims.CLAIMS],
        "config": None,
        "command": "soap-jax study",
        "data_source": "made up",
        "loops": {},
        "versions": {"soap_jax": "0.2.0", "jax": "0.10.2"},
        "device": {"kind": "cpu", "platform": "cpu", "count": 2},
        "settings": {},
        "seconds": 41.2,
    } | changes


def comparison(*args, **changes):
    """A made-up study; arguments as in `make_record`."""
    record = make_record(*args, **changes)
    protocol, kernels = record["protocol"], record["kernels"]
    target = protocol["target_loss"]
    marks, batches = np.arange(21) * 17, np.arange(340)
    runs, evaluations, losses = [], [], []
    for method, period, rate, seed in (
        (method, period, rate, seed)
        for method, of in record["methods"].items()
        for period in of["periods"]
        for rate in protocol["learning_rates"]
        for seed in record["seeds"]
    ):
        speed, amplification = SPEEDS.get(method, (0.7, 1.0))
        draw = np.random.default_rng(seed)  # alike for all methods: runs are paired
        own = np.random.default_rng([seed, *method.encode()])
        noise = np.exp(0.04 * draw.normal() + 0.01 * own.normal())
        stable = 1 / (1 + (rate * max(amplification, 1) / 1.5) ** 2)
        pace = 0.2 * speed * rate * stable * noise
        diverged = rate * amplification > 18
        curve = 0.02 + 2.28 * np.exp(-pace * batches)
        curve = np.where(diverged & (batches > 100), np.nan, curve)
        steps = (
            np.nan
            if target is None or not (curve <= target).any()
            else (curve <= target).argmax() + 1
        )
        loss = np.append(curve, curve[-1])[marks]
        keys = {"method": method, "learning_rate": rate, "seed": seed, "period": period}
        losses.append({**keys, "train_loss": curve.astype(np.float32)})
        accuracy = 0.97 - 0.1 * loss - 0.02 * own.random()
        run = {**keys, "steps": 340, "diverged": diverged}
        run["steps_to_target"] = np.nan if diverged else steps
        table = {**keys, "step": marks, "train_loss": np.append(np.nan, loss[1:])}
        run |= {"train_loss": loss[-1], "validation_loss": loss[-1] * 1.1}
        table["validation_loss"] = loss * 1.1
        if protocol["maximise"]:
            metric = protocol["select"]
            table[metric] = accuracy
            run[metric] = accuracy[-1]
            run[metric.replace("validation", "test")] = accuracy[-1] - 0.01
        run["test_loss"] = loss[-1] * 1.2
        runs.append(run)
        inexact = method in ANGLES
        error = {"fa": 55 + 35 * np.exp(-marks / 60), "sign_preserve": 50.5}.get(method, 37.1)
        error = error * inexact + own.normal() * inexact + 0 * marks
        for depth, path in enumerate(kernels):
            if depth < len(kernels) - 1:
                table[f"gradient_angle/{path}"] = error - 4 * depth * inexact
                table[f"error_angle/{path}"] = error - 4 * depth * inexact
                effective = rate * amplification * np.exp(-marks / 2000)
                effective = rate * np.cos(np.radians(error)) if method == "fa" else effective
                table[f"effective_learning_rate/{path}"] = effective
            if depth:
                table[f"weight_angle/{path}"] = ANGLES.get(method, 0.0) + 0.0 * marks
                table[f"norm_ratio/{path}"] = 11.5 if method == "sign" else 1.0
        evaluations.append(pd.DataFrame(table))
    tables = pd.DataFrame(runs), pd.concat(evaluations, ignore_index=True), pd.DataFrame(losses)
    return Comparison(record, dict(zip(TABLES, tables, strict=True)))


def make_part(label, estimate, low, high, within, **changes):
    """One test within a claim, made up."""
    usual = {"measure": "ratio", "p_holds": 0.001, "p_fails": 1.0, "censored": 0, "runs": 20}
    usual |= {"note": "", "testable": True}
    return contrasts.Part(
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
    return [claims.Finding(family=6, **dict(zip(keys, row, strict=True))) for row in rows]


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
        effective_rates={
            "sign": (0.46, 0.39),
            "bp": (0.05, 0.05),
            "bp_scaled_live": (0.575, 0.49),
        },
    )


EFFECT_NUMBERS = ("ratio", "low", "high", "share", "share_low", "share_high")
UNKNOWN = mediation.Mediation(testable=False, note="sign_norm is not in the study")


BAD_CASES = {
    "one seed": {"seeds": 1},
    "one rate": {"rates": (0.1,)},
    "only backprop": {"methods": ("bp",)},
    "no backprop": {"methods": ("fa", "sign")},
    "no metric": {"metric": None},
    "an unknown method": {"methods": ("bp", "mine")},
    "a target that nobody reaches": {"target_loss": 1e-9},
}


def break_everything(made):
    """The same study after every run diverged at once."""
    tables = {}
    for name in TABLES:
        table = tables[name] = getattr(made, name).copy()
        known = ["learning_rate", "seed", "period", "step", "steps"]
        table[[n for n in table if n not in known and table[n].dtype == float]] = np.nan
    tables["runs"]["diverged"] = True
    tables["losses"]["train_loss"] = [np.full(340, np.nan, np.float32)] * len(tables["losses"])
    return Comparison(made.record, tables)


def luminance(color):
    """Relative luminance as WCAG defines it, of "#rrggbb"."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    """Contrast ratio as WCAG defines it, from 1 to 21."""
    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)
