"""What the command line shows of a study: tables for a terminal, and the words below them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from rich import box
from rich.table import Table

from soap_jax.study import claims
from soap_jax.study.config import METHODS, StudyConfig


def summary_table(config: StudyConfig, summary: pd.DataFrame) -> Table:
    """The table of methods.

    Args:
        config: the study's configuration.
        summary: from `soap_jax.study.summary.summarise`, at base periods.
    """
    table = _table(f"{config.dataset}, {config.seeds} seeds, 95 % intervals")
    table.add_column("method", no_wrap=True)
    target = f"{config.target_loss:g}"
    titles = ("best\nrate", "test\naccuracy %", f"steps\nto {target}", "ratio\nto bp")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    if summary["diverged"].any():
        table.add_column("diverged", justify="right", no_wrap=True)
    for _, row in summary.iterrows():
        cells = [METHODS[row["method"]], _rate(row), _accuracy(row), _steps(row), _ratio(row)]
        if summary["diverged"].any():
            cells.append(f"{row['diverged']} of {row['runs']}")
        table.add_row(*cells)
    return table


def summary_notes(config: StudyConfig, summary: pd.DataFrame) -> str:
    """What the numbers in the table of methods are."""
    shared, target = summary["shared_rate"].iloc[0], f"{config.target_loss:g}"
    reference = METHODS["bp"] if "bp" in config.methods else "all methods"
    if math.isnan(shared):
        notes = [
            f"At no learning rate does every run of {reference} reach loss {target}: no steps to "
            "compare."
        ]
    else:
        notes = [
            "Accuracy at each method's best rate, chosen on validation data. Steps at rate "
            f"{shared:g}, the smallest at which every run of {reference} gets there."
        ]
    if (summary["period"] > 0).any():
        notes.append(f"Signs synced every {_updates(min(config.periods))}.")
    if summary["best_rate_at_edge"].any():
        notes.append("* at the edge of the grid: the best rate may lie beyond it.")
    return " ".join(notes)


def claims_table(findings: Sequence[claims.Finding]) -> Table:
    """The verdicts, claim by claim, with what each of its tests found and the bound for it."""
    table = _table("Claims, with 95 % intervals and the bounds written down beforehand")
    table.add_column("")
    table.add_column("claim")
    table.add_column("verdict")
    table.add_column("found", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    for finding in findings:
        found = [_found(part) for part in finding.parts]
        bounds = [_bound(part) if part.testable else "" for part in finding.parts]
        cells = (finding.key, finding.statement, finding.verdict)
        table.add_row(*cells, "\n".join(found), "\n".join(bounds), end_section=True)
    return table


def claims_notes(findings: Sequence[claims.Finding]) -> str:
    """What the numbers in the table of claims are."""
    notes = ["Ratios are of steps to the target loss; report.html says which."]
    if any(part.censored for finding in findings for part in finding.parts):
        notes.append("In brackets: some of the runs never get there.")
    return " ".join(notes)


def _found(part):
    if not part.testable or math.isnan(part.estimate):
        return "-"
    unit = "°" if part.measure == "degrees" else ""
    value = f"{part.estimate:.1f}{unit}" if unit else f"{part.estimate:.2f}"
    if part.measure == "trend":
        return f"trend {value}"
    if part.censored:
        return f"({value})"
    digits = 1 if unit else 2
    has_interval = math.isfinite(part.low) and math.isfinite(part.high)
    return f"{value} [{part.low:.{digits}f}, {part.high:.{digits}f}]" if has_interval else value


def _bound(part):
    low, high = part.within
    if high == math.inf:
        return f"above {low:.2g}"
    if low in (0, -math.inf):
        return f"below {high:.3g}"
    return f"{low:.2g} to {high:.3g}"


def _table(title):
    return Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _updates(period):
    return "update" if period == 1 else f"{period} updates"


def _rate(row):
    value = row["best_rate"]
    return "-" if math.isnan(value) else f"{value:g}" + "*" * bool(row["best_rate_at_edge"])


def _accuracy(row):
    mean, high = 100 * row["test_accuracy"], 100 * row["test_accuracy_high"]
    if math.isnan(mean):
        return "-"
    return f"{mean:.1f}" if math.isnan(high) else f"{mean:.1f} ± {high - mean:.1f}"


def _steps(row):
    value = row["steps_to_target"]
    return "-" if math.isnan(value) else "> " * bool(row["censored"]) + f"{value:.0f}"


def _ratio(row):
    value, low, high = (row["ratio_to_bp" + end] for end in ("", "_low", "_high"))
    if math.isnan(value):
        return "1" if row["method"] == "bp" and not math.isnan(row["shared_rate"]) else "-"
    if row["censored"]:
        return f"> {value:.2f}"
    return f"{value:.2f}" if math.isnan(low) else f"{value:.2f} [{low:.2f}, {high:.2f}]"
