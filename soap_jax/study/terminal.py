"""The output of a comparison in a terminal: tables with notes, and a progress bar."""

from __future__ import annotations

import io
import math
import textwrap
import time
from collections.abc import Mapping, Sequence

from rich import box, progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from soap_jax.study import claims, results, statistics
from soap_jax.study.results import Results
from soap_jax.study.statistics import Estimate, format_number


def as_text(table: Table) -> str:
    """A table as plain text, 80 characters wide."""
    console = Console(file=io.StringIO(), width=80, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")


def summary_table(comparison: Results) -> Table:
    """The table of methods, each at its smallest period."""
    title = f"{comparison.record['title']}, {len(comparison.seeds)} seeds, 95 % intervals"
    columns, rows = summary_cells(comparison, full=False)
    table = _table(title, summary_notes(comparison, full=False))
    for i, column in enumerate(columns):
        head = "\n".join(textwrap.wrap(column, 8, break_long_words=False))
        table.add_column(head, justify="right" if i else "left", no_wrap=i > 0)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def summary_cells(comparison: Results, *, full: bool) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table of methods, as text.

    Args:
        comparison: the results.
        full: whether to show every period and metric, and the fewest steps at any rate.
    """
    table = comparison.summary()
    several, diverged = (table[column].to_numpy().any() for column in ("period", "diverged"))
    rows = []
    for row in (table if full else comparison.at_smallest_periods(table)).to_dict("records"):
        bound, steps, fewest = "> " * bool(row["censored"]), row["steps_to_target"], "–"
        cells = {"method": comparison.label(row["method"])}
        if full and several:
            cells["period"] = str(row["period"] or "–")
        cells["best rate"] = format_number(row["best_rate"]) + "*" * bool(row["best_rate_at_edge"])
        for metric in comparison.metrics if full else comparison.metrics[:1]:
            scale, unit = (100, " %") if "accuracy" in metric else (1, "")
            found = _estimate(row, metric, scale)
            half = found.high - found.value
            short = statistics.format_like(found.value, found.value)
            if math.isfinite(half):
                short += f" ± {statistics.format_like(half, found.value)}"
            cells[metric.replace("_", " ") + unit] = str(found) if full else short
        known = not math.isnan(steps)
        cells[f"steps to {format_number(comparison.target_loss)}"] = bound * known + format_number(
            steps
        )
        ratio = _estimate(row, "ratio")
        is_reference = comparison.methods[row["method"]]["reference"] == row["method"]
        cells["ratio"] = "1" if is_reference and known else str(ratio)
        if not math.isnan(ratio.value):
            cells["ratio"] = bound + cells["ratio"]
        if full:
            if not math.isnan(row["fewest_steps"]):
                fewest = (
                    f"{format_number(row['fewest_steps'])} at {format_number(row['fastest_rate'])}"
                )
            cells["fewest steps"] = fewest
        if full or diverged:
            cells["diverged"] = f"{row['diverged']} of {row['runs']}"
        rows.append(cells)
    return list(rows[0]), [list(cells.values()) for cells in rows]


def summary_notes(comparison: Results, *, full: bool) -> str:
    """The notes that explain the numbers in the table of methods."""
    select = comparison.record["protocol"]["select"].replace("_", " ")
    shared, target = comparison.shared_rate, format_number(comparison.target_loss)
    who = comparison.label(comparison.reference) if comparison.reference else "every method"
    table = comparison.summary()
    notes = [f"The best rate is chosen by {select}; metrics are those at the best rate."]
    if math.isnan(shared):
        notes.append(f"No steps to compare: {comparison.why}.")
    else:
        notes.append(
            f"Steps to loss {target} are counted at rate {shared:g}, the smallest at which every "
            f"run of {who} reaches this loss within half the steps; ratios are to each method's "
            "reference."
        )
        if table["censored"].any():
            notes.append("> marks a bound: some run never reached the loss.")
    synced: dict[int, list[str]] = {}
    for name, method in comparison.methods.items():
        synced.setdefault(min(method["periods"]), []).append(comparison.label(name))
    synced.pop(0, None)
    if not full and synced:
        updates = [
            (f"{period} updates" if period > 1 else "update")
            + f" ({', '.join(labels)})" * (len(synced) > 1)
            for period, labels in sorted(synced.items())
        ]
        notes.append(f"Feedback is synced every {', every '.join(updates)}.")
    if full:
        notes.append("Fewest steps: at the fastest rate where every run reaches the loss.")
        notes.append("Values are means over seeds (geometric for steps) with 95 % intervals.")
    if note := results.backprop_note(comparison.record):
        notes.append(note)
    if table["best_rate_at_edge"].any():
        notes.append("* at the edge of the grid: a better rate may lie outside.")
    return " ".join(notes)


def claims_table(findings: Sequence[claims.Finding]) -> Table:
    """The table of verdicts: for each claim, the estimates of its tests and their bounds."""
    family = max((finding.family for finding in findings), default=0)
    notes = [
        f"p is the p-value of the verdict, after Holm's correction for {family} "
        f"claim{'s' * (family > 1)}."
    ] * (family > 0)
    open_ones = claims.UNDECIDED, claims.NOT_TESTABLE
    notes += [f"{f.key}: {f.why}" for f in findings if f.verdict in open_ones]
    if any(finding.exploratory for finding in findings):
        notes.append(
            "Exploratory: the claim, its bounds or the target were chosen after the study started."
        )
    table = _table("Claims, with 95 % intervals and bounds", "\n".join(notes))
    for column in ("", "claim", "verdict"):
        table.add_column(column)
    for column in ("found", "bound"):
        table.add_column(column, no_wrap=True)
    for finding in findings:
        verdict = finding.verdict + "\nexploratory" * finding.exploratory
        if not math.isnan(finding.p):
            verdict += f"\n{statistics.format_p_value(finding.p)}"
        said = [claims.format_part(part) for part in finding.parts]
        found = "\n".join(words.estimate.removeprefix("rank ") for words in said)
        cells = finding.key, finding.statement, verdict, found, "\n".join(w.bound for w in said)
        table.add_row(*map(Text, cells), end_section=True)
    return table


def _estimate(row, name, scale=1.0):
    return Estimate(*(scale * row[name + end] for end in ("", "_low", "_high")))


def _table(title, caption):
    return Table(
        title=title,
        caption=Text(f"\n{caption}\n"),
        caption_style="",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )


class Progress:
    """A progress bar over the runs of all methods, and a line for each finished method.

    Args:
        console: the console to print to.
        labels: the labels of methods, by key.
    """

    def __init__(self, console: Console, labels: Mapping[str, str]):
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("runs, time left"),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            speed_estimate_period=math.inf,  # compilation is included
        )
        self.labels = labels
        self.task: progress.TaskID | None = None
        self.method: str | None = None
        self.first: int | None = None

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *exception):
        if exception[0] is None:
            self._close()
        self.bar.stop()

    def show(self, method: str, done: int | None, total: int, done_all: int, total_all: int):
        """Shows progress, as `on_progress` of `compare`; `done` is None during compilation."""
        if method != self.method:
            self._close()
            self.method, self.begin, self.first = method, time.perf_counter(), None
        label = self.labels.get(method, method)
        said = f"{label}: compiling" if done is None else label
        if self.task is None:
            self.task = self.bar.add_task(said, total=total_all, completed=done_all)
        self.bar.update(self.task, description=said, completed=done_all)
        if self.first is None:
            self.first = done
        self.new = 0 if done is None or self.first is None else done - self.first

    def _close(self):
        if self.method is not None and self.new:
            seconds, label = time.perf_counter() - self.begin, self.labels[self.method]
            self.bar.console.print(f"  {label:<23} {self.new:>4} runs in {seconds:.1f} s")
