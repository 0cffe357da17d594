"""What the command line shows of a study: tables with the words below them, and progress."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import pandas as pd
from rich import box, progress
from rich.console import Console
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


class StudyProgress:
    """A bar for the method in training, a line for each that is done."""

    def __init__(self, console: Console):
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("runs"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.method: str | None = None

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *exception):
        if exception[0] is None:
            self._close()
        self.bar.stop()

    def show(self, method: str, done: int | None, total: int):
        """As `on_progress` of `soap_jax.study.runner.train`."""
        if method != self.method:
            self._close()
            self.method, self.num_new, self.begin = method, 0, time.perf_counter()
            self.compiled = 0.0
            self.task = self.bar.add_task(f"{METHODS[method]}: compiling", total=None)
        if done is None:
            return
        if not self.compiled:
            self.compiled, self.before = time.perf_counter() - self.begin, done
            self.bar.reset(self.task, description=METHODS[method])
        self.num_new = done - self.before
        self.bar.update(self.task, completed=done, total=total)

    def _close(self):
        if self.method is None:
            return
        self.bar.remove_task(self.task)
        if self.num_new:
            seconds = time.perf_counter() - self.begin - self.compiled
            self.bar.console.print(
                f"  {METHODS[self.method]:<23} {self.num_new:>4} runs in {seconds:.1f} s, "
                f"compiled in {self.compiled:.1f} s"
            )


class EpochProgress:
    """A bar for the epochs, and about ten lines of the curves."""

    def __init__(self, console: Console, epochs: int):
        self.bar = progress.Progress(
            progress.TextColumn("  training"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("epochs"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.epochs, self.every = epochs, math.ceil(epochs / 10)
        self.task: progress.TaskID | None = None

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *error):
        self.bar.stop()

    def show(self, row: dict[str, float]):
        """As `on_epoch` of `soap_jax.study.single.train`."""
        epoch, angle = int(row["epoch"]), row.get("gradient_angle/Dense_0")
        first = self.task is None
        if self.task is None:
            self.task = self.bar.add_task("", total=self.epochs, completed=epoch)
            self.bar.console.print(
                "\n  epoch   training loss   validation loss   accuracy %"
                + ("   gradient angle" if angle is not None else "")
            )
        self.bar.update(self.task, completed=epoch)
        if first or epoch % self.every == 0 or epoch == self.epochs:
            loss = f"{row['train_loss']:.4f}" if epoch else "-"
            self.bar.console.print(
                f"  {epoch:>5}   {loss:>13}   {row['validation_loss']:>15.4f}   "
                f"{100 * row['validation_accuracy']:>10.1f}"
                + (f"   {angle:>13.1f}°" if angle is not None else "")
            )
