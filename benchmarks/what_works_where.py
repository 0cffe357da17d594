"""What works where: every method on every task, as a table and a figure.

    python -m benchmarks.what_works_where results/depth/1 results/depth/8 ... [--out DIR]
        [--page studies/README.md]

It reads finished studies, one per directory, and the results of the seven claims that `keep_study`
saved. Without a study, it reads the rows that an earlier call saved in DIR, and makes the tables
and the figure again. It trains nothing. For each method except the reference:

    gap      its test metric (the training loss of a task without test data) minus backprop's,
             each at its own best rate, with a 95 % interval by a paired t-test over seeds. The
             rates are fixed; the claims of studies choose them again in every resample, which is
             more careful and needs ten seeds
    share    its share of backprop's gain over frozen hidden layers, by Fieller's method; none
             if backprop may gain nothing. If one of the three best rates lies at the edge of
             the grid, a better rate may lie beyond (claims do not test this share)
    angle    of the final error to the true error, at the first and the last kernel before the
             readout in order of use (the query of the first attention, a recurrent net's input
             gate), at the method's best rate, as a mean over seeds
    rate     the effective learning rate at the first kernel divided by the rate, in the same runs
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import common
from soap_jax import study
from soap_jax.study import statistics
from soap_jax.study.statistics import Estimate


def rows_of(path: pathlib.Path) -> list[dict[str, Any]]:
    """A row for each method of a study."""
    found = study.load(path)
    metric = found.metrics[0]
    reference = found.reference or "bp"
    rows = []
    for method in found.methods:
        best = found.best_rate(method)
        row: dict[str, Any] = {
            "task": found.record["title"],
            "method": method,
            "label": found.label(method),
            "color": found.methods[method]["color"],
            "metric": metric,
            "best_rate": best,
            "at_edge": found.at_edge(best),
            "runs": int(found.grid(method).values.size),
            "diverged": int(found.rows("runs", method)["diverged"].sum()),
        }
        values = found.rows("runs", method, best)[metric].to_numpy(float)
        row["value"] = float(values.mean()) if len(values) else math.nan
        row |= final(found, method, best)
        if method != reference:
            row["gap"] = list(gap(found, method, reference, metric))
            row["share"], row["share_at_edge"] = share(found, method, reference, metric)
        rows.append(row)
    return rows


def gap(found: study.Comparison, method, reference, metric) -> tuple[float, float, float]:
    """The difference in the metric at best rates, with its interval."""
    values = []
    for name in (method, reference):
        rate = found.best_rate(name)
        if math.isnan(rate):
            return (math.nan,) * 3
        values.append(found.grid(name, metric=metric).values[found.rates.index(rate)])
    mean = statistics.student(values[0] - values[1])
    return mean.estimate, *mean.interval


def share(found: study.Comparison, method, reference, metric) -> tuple[list[float], bool]:
    """The share of the gain with its interval, or NaN, and whether a rate is at an edge."""
    names = (method, reference, "frozen")
    if method == "frozen" or "frozen" not in found.methods:
        return [math.nan] * 3, False
    rates = [found.best_rate(name) for name in names]
    edge = any(map(found.at_edge, rates))
    if any(map(math.isnan, rates)):
        return [math.nan] * 3, edge
    mine, theirs, control = (
        found.grid(name, metric=metric).values[found.rates.index(rate)]
        for name, rate in zip(names, rates, strict=True)
    )
    sign = found.improvement_sign(metric) or np.sign(np.mean(theirs - control))
    gain = statistics.student(sign * (theirs - control))
    if not gain.interval[0] > 0:
        return [math.nan] * 3, edge
    result = statistics.fieller(mine - control, theirs - control)
    return [result.estimate, *result.interval], edge


def final(found: study.Comparison, method, rate) -> dict[str, float]:
    """Angles of errors and the effective rate at the end of runs."""

    def mean(name, kernel):
        column = f"{name}/{kernel}"
        if column not in found.evaluations or math.isnan(rate):
            return math.nan
        values = found.measured(column, method, rate, end=True)
        return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan

    first, last = found.hidden[0], found.hidden[-1]
    return {
        "angle_first": mean("error_angle", first),
        "angle_last": mean("error_angle", last),
        "effective_rate": mean("effective_learning_rate", first) / rate,
        "rank_first": mean("effective_rank", first),
        "rank_last": mean("effective_rank", last),
    }


LEAST, MOST = -50, 130
"""The range of shares in the figure, in percent; a triangle marks a share below it."""
CLAIMS = [common.OUT / name for name in ("mnist", "fashion_mnist", "claims_small_conv")]
"""The kept studies of the seven claims."""
COLUMNS = {"fa": "FA", "dfa": "DFA", "sign_norm": "signs, norm kept", "frozen": "frozen"}
"""The methods of the page's table; the long table has the others."""


def read(saved: pathlib.Path) -> list[dict[str, Any]]:
    """The rows that an earlier call saved."""

    def numbers(value):
        if isinstance(value, list):
            return [numbers(child) for child in value]
        return math.nan if value is None else value

    rows = json.loads(saved.read_text())["results"]
    return [{k: v if k == "color" else numbers(v) for k, v in row.items()} for row in rows]


def matrix(rows) -> str:
    """A line for each task: gap to backprop with its interval, then the share of the gain.

    A star marks a result at a best rate at the edge of the grid.
    """
    lines = [["task", "backprop", *COLUMNS.values()], ["---"] * (2 + len(COLUMNS))]
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = {row["method"]: row for row in rows if row["task"] == task}
        scale, unit = (100.0, " %") if mine["bp"]["metric"].endswith("accuracy") else (1.0, "")
        cells = [task, f"{scale * mine['bp']['value']:.3g}{unit}" + "*" * mine["bp"]["at_edge"]]
        for name in COLUMNS:
            if name not in mine:
                cells.append("")
                continue
            share = mine[name].get("share", [math.nan])[0]
            more = f"; {100 * share:.0f}\u00a0%".replace("-", "−") if math.isfinite(share) else ""
            more += "*" * mine[name]["at_edge"]
            none = math.isnan(mine[name]["best_rate"])
            cells.append("diverged" if none else in_words("gap", scale, mine[name]) + more)
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def claims(kept: Sequence[pathlib.Path]) -> str:
    """The seven claims, a line each: verdicts and estimates of several saved studies."""
    found = {path.name: json.loads((path / "summary.json").read_text())["claims"] for path in kept}
    parts = next(iter(found.values()))
    lines = [["claim", *found], ["---"] * (1 + len(found))]
    for key, statement in dict.fromkeys((part["claim"], part["statement"]) for part in parts):
        cells = [f"{key}. {statement}"]
        for of_study in found.values():
            mine = [part for part in of_study if part["claim"] == key]
            numbers = map(estimate, mine)
            said = ", ".join(str(number) for number in numbers if not math.isnan(number.value))
            cells.append(f"**{mine[0]['verdict']}** {said}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def estimate(part) -> Estimate:
    """A test's estimate from JSON, where an open end is null."""
    if part["estimate"] is None or part["low"] is part["high"] is None:
        return Estimate(math.nan if part["estimate"] is None else part["estimate"], *[math.nan] * 2)
    low, high = (
        float(edge if part[end] is None else part[end])
        for end, edge in (("low", -math.inf), ("high", math.inf))
    )
    return Estimate(part["estimate"], low, high)


def into_page(page: pathlib.Path, name: str, table: str) -> None:
    """Writes a table into a page, between its marks."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}")


def figure(rows):
    """The share of backprop's gain: a line for each task, a dot for each method."""
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    shown = [row for row in rows if row["method"] not in ("bp", "frozen")]
    methods = {row["label"]: row["color"] for row in shown}
    if len(set(methods.values())) < len(methods):
        raise ValueError(f"methods are {methods}; expected a colour of its own for each.")
    fig, ax = plt.subplots(figsize=(5.2, 1.6 + 0.48 * len(tasks)), layout="constrained")
    for label, color in methods.items():
        mine = [r for r in shown if r["label"] == label and np.isfinite(r["share"][0])]
        y = [height(r, rows) for r in mine]
        x, low, high = (100 * np.array([r["share"][k] for r in mine], float) for k in range(3))
        low, high = np.maximum(low, LEAST), np.minimum(high, MOST)
        beyond = [(LEAST, at) for value, at in zip(x, y, strict=True) if value < LEAST]
        ax.plot(*zip(*beyond, strict=True), "<", color=color) if beyond else None
        ax.errorbar(
            x, y, xerr=[np.maximum(x - low, 0), np.maximum(high - x, 0)], fmt="o", ms=4.5, lw=1.5,
            color=color, label=label,
        )  # fmt: skip
    for edge in (0, 100):
        ax.axvline(edge, color="0.6", lw=1, zorder=0)
    for between in range(1, len(tasks)):
        ax.axhline(between - 0.5, color="0.9", lw=1, zorder=0)
    ax.set(xlim=(LEAST, MOST), ylim=(len(tasks) - 0.5, -0.5), xticks=range(-50, 101, 50))
    ax.set_yticks(range(len(tasks)), [task.replace("_", " ") for task in tasks])
    ax.tick_params(left=False)
    ax.set_xlabel("share of backprop's gain, in %, with 95 % interval")
    fig.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return fig


def height(row, rows) -> float:
    """The place of a method's dot in the figure: around the line of its task."""
    tasks = list(dict.fromkeys(one["task"] for one in rows))
    of_task = [r for r in rows if r["task"] == row["task"] and r["method"] not in ("bp", "frozen")]
    middle = (len(of_task) - 1) / 2
    return tasks.index(row["task"]) + 0.18 * (of_task.index(row) - middle)


def in_words(name: str, scale: float, row: Mapping) -> str:
    """A number with its interval."""
    if name not in row or not math.isfinite(row[name][0]):
        return "–"
    return str(Estimate(*(scale * number for number in row[name])))


def main():
    """Reads, prints the table, writes JSON, table and figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("studies", nargs="*", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=common.OUT)
    parser.add_argument("--page", type=pathlib.Path, help="a page to write the short tables into")
    parser.add_argument("--claims", nargs="+", type=pathlib.Path, default=CLAIMS)
    args = parser.parse_args()
    saved = args.out / "what_works_where.json"
    rows = [row for path in args.studies for row in rows_of(path)] or read(saved)

    def percent(row):
        return 100.0 if row["metric"].endswith("accuracy") else 1.0

    def best_rate(row):
        none = math.isnan(row["best_rate"])
        return "diverged" if none else f"{row['best_rate']:g}" + " (edge)" * row["at_edge"]

    def result(row):
        unit = " %" * row["metric"].endswith("accuracy")
        return f"{percent(row) * row['value']:.4g}{unit}" if math.isfinite(row["value"]) else "–"

    def number(name, row):
        return f"{row[name]:.3g}" if math.isfinite(row[name]) else "–"

    columns = {
        "task": "task",
        "method": "label",
        "best rate": best_rate,
        "result": result,
        "gap to backprop": lambda r: in_words("gap", percent(r), r),
        "share of the gain, in %": functools.partial(in_words, "share", 100.0),
        "error angle, first": functools.partial(number, "angle_first"),
        "last": functools.partial(number, "angle_last"),
        "effective rate": functools.partial(number, "effective_rate"),
    }
    if any(math.isfinite(row["rank_first"]) for row in rows):
        columns |= {"effective rank": functools.partial(number, "rank_first")}
    if args.studies:
        common.write("what_works_where", args.out, rows)
    common.show("what_works_where", args.out, rows, columns, figure=figure(rows))
    if args.page is not None:
        into_page(args.page, "table", matrix(rows))
        into_page(args.page, "claims", claims(args.claims))


if __name__ == "__main__":
    main()
