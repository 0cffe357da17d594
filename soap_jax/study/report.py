"""The report of a study: one HTML page that works offline, and asks nothing of any network.

The page is `templates/report.html.jinja`, which this module fills in: verdicts first, then figures,
the causal diagram, the methods and how to repeat it all.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import markupsafe
import pandas as pd

from soap_jax.study import charts, claims, diagram, mediation, plots, statistics, summary, views
from soap_jax.study.config import METHODS, StudyConfig


class Verdict(NamedTuple):
    """How a verdict is shown, beside its word.

    Attributes:
        symbol: before the word.
        tone: class in the style sheet.
        one: what one claim does.
        many: what several do.
    """

    symbol: str
    tone: str
    one: str
    many: str


VERDICTS = {
    claims.HOLDS: Verdict("✓", "holds", "holds", "hold"),
    claims.FAILS: Verdict("✗", "fails", "fails", "fail"),
    claims.UNDECIDED: Verdict("?", "undecided", "is undecided", "are undecided"),
    claims.NOT_TESTABLE: Verdict("–", "untested", "is not testable here", "are not testable here"),
}

Cells = tuple[list[str], list[list[str]]]
"""The head of a table, and its rows."""


def render(
    config: StudyConfig,
    facts: Mapping[str, Any],
    tables: views.Tables,
    findings: Sequence[claims.Finding],
    effects: mediation.Mediation,
) -> str:
    """Renders the report.

    Args:
        config: the study's configuration.
        facts: what study.json says of it; what is missing is left out.
        tables: the tidy tables "runs" and "evaluations".
        findings: the claims' verdicts.
        effects: the mediation.

    Returns:
        An HTML page that needs no other file.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("soap_jax.study"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "p_value": p_value,
        "measured": _measured,
        "bound": bound,
        "place": _place,
        "tests": _tests,
    }
    return environment.get_template("report.html.jinja").render(
        title=f"Feedback alignment against backprop: {config.dataset}",
        setting=_setting(config, facts),
        config=config,
        findings=findings,
        summary=summarise(config, findings),
        own_target=_own_target(config, facts),
        verdicts=VERDICTS,
        figures=_figures(views.describe(config, tables, findings)),
        diagram=diagram.describe(config, tables, effects),
        line_height=diagram.LINE,
        effects=_effects(effects),
        methods=_methods(tables["runs"]),
        methods_note=_methods_note(config, tables["runs"]),
        details=_details(config, facts),
        command=command(config),
        version=_get(facts, "versions", "soap_jax"),
    )


def _own_target(config, facts):
    """The target loss that the study was made for, if the report is for another one."""
    own = facts.get("config", {}).get("target_loss", config.target_loss)
    return own if own != config.target_loss else None


def summarise(config: StudyConfig, findings: Sequence[claims.Finding]) -> str:
    """One sentence about all verdicts, and no more than they say."""
    study = f"On {config.dataset}, over {_count(config.seeds, 'seed')}"
    if not findings:
        return f"{study}, no claim was looked at."
    said = []
    for verdict, shown in VERDICTS.items():
        keys = [finding.key for finding in findings if finding.verdict == verdict]
        if keys:
            does = shown.one if len(keys) == 1 else shown.many
            said.append(f"{len(keys)} {does} ({', '.join(keys)})")
    sentence = f"{study}, of {_count(len(findings), 'claim')} {_join(said)}"
    verdicts = {finding.key: finding.verdict for finding in findings}
    if verdicts.get("2") == claims.HOLDS and "3" in verdicts:
        explained = "by more than the amplified learning rate of its hidden layers explains"
        sentence += ": raw sign sync is faster at the shared learning rate, " + {
            claims.HOLDS: f"but not {explained} (within 10 %)",
            claims.FAILS: "and claim 3, that the amplified learning rate explains it, fails",
        }.get(verdicts["3"], f"and whether {explained} is open")
    return sentence + "."


def command(config: StudyConfig) -> str:
    """The command that repeats a study: its options, as far as they are not the defaults.

    Example:
        >>> command(StudyConfig(dataset="mnist", epochs=2, hidden=(64, 32)))
        'soap-jax study --dataset mnist --epochs 2 --hidden 64,32'
    """
    words = ["soap-jax", "study"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default: dict[str, Any] = {field.name: field.default}
        if dataclasses.replace(config, **default) != config:
            many = isinstance(value, tuple)
            words += [option(field.name)]
            words += [",".join(map(_plain, value)) if many else _plain(value)]
    return shlex.join(words)


def option(field: str) -> str:
    """The option of `soap-jax study` that sets a field of its configuration.

    Example:
        >>> option("learning_rates")
        '--learning-rates'
    """
    return "--" + {"periods": "period"}.get(field, field.replace("_", "-"))


def bound(part: claims.Part) -> str:
    """A test's bound in words; a ratio has none below where that is zero."""
    low, high = part.within
    open_below = math.isinf(low) or (part.measure == "ratio" and low == 0)
    if math.isinf(high):
        return "none" if open_below else f"above {charts.number(low)}"
    if open_below:
        return f"below {charts.number(high)}"
    return f"{charts.number(low)} to {charts.number(high)}"


def p_value(value: float) -> str:
    """A p-value for people.

    Example:
        >>> p_value(0.00002), p_value(0.0314)
        ('p < 0.001', 'p = 0.031')
    """
    if math.isnan(value):
        return "no p"
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def _measured(part: claims.Part) -> str:
    """A test's estimate and interval."""
    unit = {"degrees": "°", "trend": " (rank correlation)"}.get(part.measure, "")
    return charts.estimate(part.estimate, part.low, part.high, unit)


def _place(part: claims.Part) -> str:
    """Where a test's truth lies, if that is clear before the correction for many claims."""
    if part.p_holds < statistics.ALPHA:
        return "inside"
    return "outside" if part.p_fails < statistics.ALPHA else "not clear of"


def _tests(finding: claims.Finding) -> Cells:
    columns = ["test", "estimate [95 % interval]", "bound", "p inside", "p outside", "censored"]
    rows = []
    for part in finding.parts:
        said = [part.label, "not testable", bound(part), "–", "–", "–", part.note]
        if part.testable:
            said[1] = _measured(part)
            said[3:5] = charts.number(part.p_holds), charts.number(part.p_fails)
            said[5] = f"{part.censored} of {part.runs}"
        rows.append(said)
    return [*columns, "note"], rows


def _plain(value) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _count(number, noun) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _join(parts) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


class _Figure(NamedTuple):
    """A figure as the page shows it: drawn, in words and as a table."""

    chart: charts.Chart
    plot: markupsafe.Markup
    height: int | None
    cells: Cells


def _figures(shown: Mapping[str, charts.Chart]) -> list[_Figure]:
    found, loaded = [], False
    for chart in shown.values():
        plot = "" if chart.empty else plots.to_html(chart, with_library=not loaded)
        loaded = loaded or bool(plot)
        cells = _points(chart) if isinstance(chart, charts.Curves) else _rows(chart)
        found.append(_Figure(chart, markupsafe.Markup(plot), plots.height(chart), cells))
    return found


def _points(chart: charts.Curves) -> Cells:
    cells = {
        (method, point.x): point.note
        if math.isnan(point.mean)
        else charts.estimate(point.mean, point.low, point.high)
        for method, points in chart.lines.items()
        for point in points
    }
    rows = [
        [charts.number(x), *(cells.get((method, x), "–") for method in chart.lines)]
        for x in sorted({x for _, x in cells})
    ]
    return [chart.x_label, *(METHODS[method] for method in chart.lines)], rows


def _rows(chart: charts.Intervals) -> Cells:
    rows = [
        [row.label, charts.estimate(row.mean, row.low, row.high), row.note] for row in chart.rows
    ]
    return ["", f"{chart.x_label} [95 % interval]", "note"], rows


def _methods(runs: pd.DataFrame) -> Cells:
    """The table of methods, in words."""
    columns = ["method", "period", "best rate", "test accuracy (%)", "steps", "ratio to backprop"]
    columns += ["fewest steps", "diverged"]
    rows = []
    for row in summary.summarise(runs).to_dict("records"):
        accuracy, ratio = (
            [scale * row[name + end] for end in ("", "_low", "_high")]
            for name, scale in (("test_accuracy", 100), ("ratio_to_bp", 1))
        )
        steps = charts.number(row["steps_to_target"])
        at_least = "> " if row["censored"] and steps != "–" else ""
        said = charts.estimate(*ratio)
        if row["method"] == "bp" and steps != "–":
            said = "1"
        fewest = charts.number(row["fewest_steps"])
        rows.append(
            [
                METHODS[row["method"]],
                str(row["period"] or "–"),
                charts.number(row["best_rate"]) + "*" * bool(row["best_rate_at_edge"]),
                charts.estimate(*accuracy),
                at_least + steps,
                said if said == "–" else at_least + said,
                fewest if fewest == "–" else f"{fewest} at {charts.number(row['fastest_rate'])}",
                f"{row['diverged']} of {row['runs']}",
            ]
        )
    return columns, rows


def _methods_note(config: StudyConfig, runs: pd.DataFrame) -> str:
    """What the numbers in the table of methods are."""
    shared = summary.shared_rate(summary.base(config, runs))
    everyone = METHODS["bp"] if "bp" in config.methods else "all methods"
    target = f"{config.target_loss:g}"
    if math.isnan(shared):
        steps = f"At no rate does every run of {everyone} reach loss {target}: no steps to compare."
    else:
        steps = (
            f"Steps are those to loss {target} at learning rate {shared:g}, the smallest at which "
            f"every run of {everyone} gets there; > marks bounds, where some run did not."
        )
    return (
        "The best rate is chosen on validation data, test accuracy is read at it. An asterisk "
        "marks a best rate at the edge of the grid: a better one may lie beyond. "
        f"{steps} The fewest steps are those at the fastest rate where every run gets there. Means "
        "over seeds (of steps: geometric) with 95 % intervals."
    )


def _effects(effects: mediation.Mediation) -> Cells:
    columns = ["order", "path", "factor on steps [95 %]", "share of the whole [95 %]", "term"]
    rows = []
    for effect in effects.effects:
        factor = charts.estimate(effect.ratio, effect.low, effect.high)
        share, low, high = (100 * e for e in (effect.share, effect.share_low, effect.share_high))
        share_of_it = charts.estimate(share, low, high, " %")
        rows.append([effect.order, effect.path, factor, share_of_it, effect.term])
    return columns, rows


def _setting(config: StudyConfig, facts: Mapping[str, Any]) -> str:
    """What was trained, in a line."""
    train = _get(facts, "examples", "train")
    examples = f"{charts.number(train)} training examples, " if isinstance(train, int) else ""
    hidden, rates = " × ".join(map(str, config.hidden)), config.learning_rates
    decay = f"weight decay {config.weight_decay:g}, " if config.weight_decay else ""
    return (
        f"{examples}{_count(len(config.hidden), 'hidden layer')} ({hidden} units, "
        f"{config.activation}), {config.optimizer.replace('sgd', 'SGD')}, {decay}batch "
        f"{config.batch_size}, {_count(config.epochs, 'epoch')}; "
        f"{_count(len(config.methods), 'method')}, {_count(len(rates), 'learning rate')} from "
        f"{rates[0]:g} to {rates[-1]:g}, {_count(config.seeds, 'paired seed')}."
    )


def _get(facts, name, key):
    inner = facts.get(name)
    return inner.get(key) if isinstance(inner, Mapping) else None


def _details(config: StudyConfig, facts: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Configuration and circumstances, as lists of terms."""
    chosen = {
        field.name.replace("_", " "): _said(getattr(config, field.name))
        for field in dataclasses.fields(config)
    }
    lists = {"Configuration": chosen}
    known = {
        key.replace("_", " "): _said(facts[key])
        for key in (
            "data_source",
            "examples",
            "device",
            "versions",
            "settings",
            "loss_window",
            "seconds",
        )
        if key in facts
    }
    rules = facts.get("rules")
    if isinstance(rules, Mapping):
        lists["Rules of feedback"] = {
            METHODS.get(str(name), str(name)): "none" if rule in (None, "None") else str(rule)
            for name, rule in rules.items()
        }
    lists["Circumstances"] = known
    return {title: terms for title, terms in lists.items() if terms}


def _said(value) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_said(item)}" for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return ", ".join(_said(item) for item in value)
    return "default" if value is None else _plain(value)
