"""Saves the small parts of a finished study: conclusions, figures and the report's text.

    python -m benchmarks.keep_study results/mnist benchmarks/results/mnist [--figures overview]

Writes `summary.json` (provenance, the table of methods, claims, mediation, and what was measured at
the end of runs, as means over seeds), `report.txt` and the PNG figures.
"""

from __future__ import annotations

import argparse
import html.parser
import json
import pathlib
import re
import shutil

import pandas as pd

TABLES = ("summary", "claims", "mediation")


class Words(html.parser.HTMLParser):
    """Collects the text of a page: one line per paragraph, heading, list item and table row."""

    LINES = ("p", "li", "h1", "h2", "h3", "h4", "tr", "summary", "figcaption", "dt", "dd", "pre")
    SILENT = ("script", "style", "svg", "head", "noscript", "nav")

    def __init__(self):
        super().__init__()
        self.text, self.silent = "", 0

    def handle_starttag(self, tag, attrs):
        """Begins a line, or silence."""
        self.silent += tag in self.SILENT
        if tag in self.LINES:
            self.text += "\n\n" if tag.startswith("h") else "\n"
        elif tag in ("td", "th"):
            self.text += " | "

    def handle_endtag(self, tag):
        """Ends silence."""
        self.silent -= tag in self.SILENT

    def handle_data(self, data):
        """Collects words."""
        if not self.silent:
            self.text += re.sub(r"\s+", " ", data)

    def result(self):
        """The words, without blank lines in a row."""
        lines = [line.strip().removeprefix("| ") for line in self.text.splitlines()]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def final(study):
    """The last evaluation of each method, period and learning rate, a mean over seeds."""
    rows = pd.read_parquet(study / "evaluations.parquet")
    rows = rows[rows.step == rows.step.max()]
    by = ["method", "period", "learning_rate"]
    return rows.drop(columns=["seed", "step"]).groupby(by, sort=False).mean().reset_index()


def main():
    """Copies and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--figures", nargs="+", help="which; by default all")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    facts = json.loads((args.study / "study.json").read_text())
    files = {name: args.study / f"{name}.csv" for name in TABLES}  # not all are there
    tables = {name: pd.read_csv(file) for name, file in files.items() if file.exists()}
    kept = {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
    kept["final"] = json.loads(final(args.study).to_json(orient="records"))
    (args.out / "summary.json").write_text(json.dumps({"study": facts, **kept}, indent=1) + "\n")
    words = Words()
    words.feed((args.study / "report.html").read_text())
    (args.out / "report.txt").write_text(words.result())
    for figure in sorted((args.study / "figures").glob("*.png")):
        if args.figures is None or figure.stem in args.figures:
            shutil.copy(figure, args.out)
    print(f"Written to {args.out}.")


if __name__ == "__main__":
    main()
