"""The report of a comparison: one HTML page that works offline and makes no network requests.

This module fills in the template `templates/report.html.jinja`: verdicts first, then figures, the
causal diagram, the methods, and how to reproduce the study.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import pandas as pd
import vl_convert

from soap_jax.study import charts, claims, diagram, figures, files, mediation, terminal
from soap_jax.study.results import Results
from soap_jax.study.statistics import format_number

VERDICTS = {  # symbol, class in the style sheet, verb for one claim, verb for several
    claims.HOLDS: ("✓", "holds", "holds", "hold"),
    claims.FAILS: ("✗", "fails", "fails", "fail"),
    claims.UNDECIDED: ("?", "undecided", "is undecided", "are undecided"),
    claims.NOT_TESTABLE: ("–", "untested", "is not testable here", "are not testable here"),
}


def write(
    comparison: Results, findings: Sequence[claims.Finding], path: str | os.PathLike[str]
) -> None:
    """Writes report.html, figures/, and CSV tables of the summary, the claims and the mediation.

    Tables without rows are not written.

    Args:
        comparison: the results.
        findings: the verdicts on its claims.
        path: a directory, created if it does not exist; or a file NAME.html, for only the page.
    """
    path = pathlib.Path(path)
    if path.suffix == ".html":
        files.write_text(path, render(comparison, findings))
        return
    effects = mediation.mediate(comparison)
    shown = charts.all_figures(comparison, findings)
    figures.save(shown, path / "figures")
    causes = diagram.make_diagram(comparison, effects)
    figures.save_svg(causes.svg if causes else "", path / "figures" / "mediation")
    tables = {
        "summary": comparison.summary(),
        "claims": claims.tabulate(findings) if findings else None,
        "mediation": mediation.tabulate(effects) if effects.testable else None,
    }
    for name, table in tables.items():
        if table is None:
            (path / f"{name}.csv").unlink(missing_ok=True)
        else:
            files.write_text(path / f"{name}.csv", table.to_csv(index=False))
    files.write_text(path / "report.html", _page(comparison, findings, shown, effects))


def render(comparison: Results, findings: Sequence[claims.Finding]) -> str:
    """The report as an HTML page that needs no other file.

    Args:
        comparison: the results.
        findings: the verdicts on its claims.
    """
    shown = charts.all_figures(comparison, findings)
    return _page(comparison, findings, shown, mediation.mediate(comparison))


def _page(comparison, findings, shown, effects):
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("soap_jax.study"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    specs = {figure.name: figure.spec for figure in shown if figure.chart}
    for name, spec in specs.items():  # the page shows titles as headings
        specs[name] = {key: value for key, value in spec.items() if key != "title"}
    longest = max(map(len, [*charts.display_names(comparison).values(), *charts.VERDICT_STYLES]))
    data = json.dumps({"specs": specs, "longest": longest}).replace("<", r"\u003c")
    versions = comparison.record.get("versions", {})
    return environment.get_template("report.html.jinja").render(
        title=f"Feedback alignment compared: {comparison.record['title']}",
        setting=_setting(comparison),
        summary=summarise(comparison, findings),
        glossary=_glossary(comparison),
        findings=findings,
        verdicts=VERDICTS,
        format_part=claims.format_part,
        tests=lambda finding: _cells(claims.tabulate([finding]).loc[:, "label":"note"]),
        figures=shown,
        specs=data,
        vega=vega() if specs else "",
        diagram=diagram.make_diagram(comparison, effects),
        effects=_cells(mediation.tabulate(effects)),
        methods=terminal.summary_cells(comparison, full=True),
        methods_note=terminal.summary_notes(comparison, full=True),
        command=comparison.record.get("command"),
        details=_details(comparison),
        version=versions.get("soap_jax", ""),
    )


@functools.cache
def vega() -> str:
    """The JavaScript library that draws the figures of a page."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace(
        "</script", r"<\/script"
    )


def summarise(comparison: Results, findings: Sequence[claims.Finding]) -> str:
    """One sentence that counts the verdicts."""
    study = f"On {comparison.record['title']}, over {_count(len(comparison.seeds), 'seed')}"
    if not findings:
        return f"{study}: no claim was tested."
    said = []
    for verdict, (_, _, one, many) in VERDICTS.items():
        keys = [finding.key for finding in findings if finding.verdict == verdict]
        if keys:
            named = f"claim{'s' * (len(keys) > 1)} {', '.join(keys)}"
            said.append(f"{len(keys)} {one if len(keys) == 1 else many} ({named})")
    *most, last = said
    listed = f"{', '.join(most)} and {last}" if most else last
    return f"{study}: of {_count(len(findings), 'claim')}, {listed}."


def _glossary(comparison):
    """The property that each method isolates, and the method's paper."""
    said = {}
    for method, label in charts.display_names(comparison).items():
        record = comparison.methods[method]
        paper = f" ({record['paper']})" if record["paper"] else ""
        said[label] = (record["isolates"] or record["description"]) + paper
    return said


def _cells(table: pd.DataFrame) -> figures.Cells:
    """A table as text."""
    rows = table.to_numpy(object).tolist()
    said = [[format_number(v) if isinstance(v, float) else str(v) for v in row] for row in rows]
    return [str(column).replace("_", " ") for column in table], said


def _setting(comparison: Results) -> str:
    """The task, the protocol and the grid, in one line."""
    protocol, rates = comparison.record["protocol"], comparison.rates
    examples = comparison.record.get("examples", {}).get("train")
    seen = [f"{format_number(examples)} training examples"] if examples else []
    seen += [_count(len(comparison.kernels), "kernel"), protocol["optimizer"]]
    seen += [f"batch {protocol['batch_size']}", f"{protocol['steps']:,} steps"]
    return (
        f"{', '.join(seen)}; {_count(len(comparison.methods), 'method')}, "
        f"{_count(len(rates), 'learning rate')} from {rates[0]:g} to {rates[-1]:g}, "
        f"{_count(len(comparison.seeds), 'paired seed')}."
    )


def _count(number, noun):
    return f"{number} {noun}" + "s" * (number != 1)


def _details(comparison: Results) -> dict[str, dict[str, str]]:
    """Configuration, data and environment, as lists of terms."""
    record = comparison.record
    protocol = {key: value for key, value in record["protocol"].items() if key != "task"}
    known = ("data_source", "examples", "kernels", "loops", "versions", "device", "settings")
    lists = {
        "Configuration": record.get("config") or protocol,
        "Feedback rules": {m["label"]: m["description"] for m in comparison.methods.values()},
        "Data and environment": {
            key: record[key] for key in (*known, "seconds") if record.get(key)
        },
    }
    return {
        title: {term.replace("_", " "): _plain_text(value) for term, value in terms.items()}
        for title, terms in lists.items()
        if terms
    }


def _plain_text(value: Any) -> str:
    """A value as text, without the brackets and quotes of Python."""
    if isinstance(value, str):
        return value
    if value in ([], None):
        return "default" if value is None else "none"
    return re.sub(r"[{}\[\]()'\"]", "", str(value))
