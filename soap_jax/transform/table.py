"""The text of an explanation: a table of params, a summary, and notes on problems."""

from __future__ import annotations

import collections
import io
import re
import textwrap
import typing
from collections.abc import Iterator, Sequence

import jax

if typing.TYPE_CHECKING:
    from soap_jax.transform.explanation import Explanation, Row

SCALES = "scales activations elementwise; to give it feedback, name it in `where`"
"""The problem of a param that only scales activations."""

NO_DATA = (
    "The function has no array argument besides its params. Arrays that it closes over are "
    "constants, not data: pass the batch as an argument, and call `explain` again."
)
"""The note on a function that probably closes over its batch."""


def render(explanation: Explanation) -> str:
    """Returns the text of an explanation."""
    groups = _groups(explanation)
    direct = any(row.gradient in ("direct", "mixed") for row in explanation)
    shown = [*_grid(groups, direct=direct), ""] if groups else []
    width = max(88, len(shown[0]) if shown else 0)
    summary, notes = _summary(explanation, direct=direct), [] if direct else _notes(groups)
    if not explanation.has_data and any(row.effect == "backprop" for row in explanation):
        notes = [NO_DATA]
    for line in [*summary, *notes]:
        shown += textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(shown)


def _groups(explanation: Explanation) -> list[tuple[str, list[Row]]]:
    """Rows that share a line, since their paths differ only by numbers, with a glob for them."""
    groups: dict[tuple, list[Row]] = {}
    for row in explanation:
        if row.effect != "not needed":
            glob = re.sub(r"\d+", "*", "/".join(row.path))
            key = (glob, row.gradient, row.effect, row.shape, row.stored, row.used)
            groups.setdefault(key, []).append(row)
    return [
        (glob if len(rows) > 1 else "/".join(rows[0].path), rows)
        for (glob, *_), rows in groups.items()
    ]


def _label(glob: str, rows: Sequence[Row]) -> str:
    return f"{glob} ({len(rows)} times)" if len(rows) > 1 else glob


def _grid(groups: Sequence[tuple[str, list[Row]]], *, direct: bool) -> Iterator[str]:
    """The lines of the table; with direct feedback it has a column for gradients."""
    from rich import box, console, filesize, table, text  # imported here, since it is slow

    grid = table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("param", *["gradient"] * direct, "effect", "used in", "operands"):
        grid.add_column(column, no_wrap=True)
    grid.add_column("feedback", justify="right", no_wrap=True)
    for glob, rows in groups:
        row = rows[0]
        places = [use for use in row.uses if not use.problem] or list(row.uses)
        name = places[0].primitive if places else "-"
        operands = " · ".join(map(_shape, places[0].operands)) if places else "-"
        if len(places) > 1:
            name = f"{name} and {len(places) - 1} more"
        total = sum(row.nbytes for row in rows)
        narrow = f" {row.stored}" if row.stored != row.dtype else ""
        stored = [f"{filesize.decimal(total)}{narrow}"] if total else []
        if row.used not in (row.dtype, row.stored) and row.effect.endswith("feedback"):
            stored.append(f"used as {row.used}")
        effect = [*[row.gradient] * direct, row.effect]
        cells = _label(glob, rows), *effect, name, operands, ", ".join(stored) or "-"
        grid.add_row(*map(text.Text, cells))
    file = io.StringIO()
    console.Console(file=file, width=200, color_system=None).print(grid)
    return (line.rstrip() for line in file.getvalue().splitlines() if line.strip())


def _summary(explanation: Explanation, *, direct: bool) -> list[str]:
    """How many params have which effect and, if not all are exact, which gradient."""
    from rich import filesize

    effects = [row.effect for row in explanation]
    counts = ", ".join(f"{effects.count(effect)} {effect}" for effect in dict.fromkeys(effects))
    nbytes = filesize.decimal(sum(row.nbytes for row in explanation))
    number = f"{len(explanation)} param{'s' if len(explanation) != 1 else ''}"
    lines = [f"{number}: {counts or 'none'}; {nbytes} of feedback."]
    unneeded = collections.Counter(
        f"{row.path[-1] if row.path else 'params'} ({row.uses[-1].primitive})"
        for row in explanation
        if row.effect == "not needed"
    )
    if unneeded:
        kinds = ", ".join(f"{times} {kind}" for kind, times in unneeded.items())
        lines.append(f"Not needed, since no error passes through them: {kinds}.")
    if direct:
        return [
            *_gradients(explanation),
            f"With `with_feedback` in addition: {lines[0]}",
            *lines[1:],
        ]
    return lines + _gradients(explanation)


def _notes(groups: Sequence[tuple[str, list[Row]]]) -> list[str]:
    """The problems of each line, at most two."""
    notes = []
    for glob, rows in groups:
        label = _label(glob, rows)
        problems = [
            f"{label} {SCALES}: where=[explanation, {glob!r}]."
            if use.problem == SCALES
            else f"{label}: {use}, {use.problem}."
            for use in rows[0].uses
            if use.problem
        ]
        notes += list(dict.fromkeys(problems))[:2]
    return notes


def _gradients(explanation: Explanation) -> list[str]:
    """Lines about gradients that are not exact, or none if all are exact."""
    found: dict[str, list[str]] = {}
    for row in explanation:
        found.setdefault(row.gradient, []).append("/".join(row.path))
    if set(found) <= {"exact"}:
        return []
    counts = [f"{len(found[g])} {g}" for g in ("direct", "mixed", "exact", "none") if g in found]
    lines = [f"Gradients: {', '.join(counts)}."]
    if "mixed" in found:
        lines.append(f"Direct feedback and an error around it reach {', '.join(found['mixed'])}.")
    if "none" in found:
        lines.append(f"No error reaches {', '.join(found['none'])}.")
    return lines


def _shape(operand: jax.ShapeDtypeStruct) -> str:
    return "×".join(map(str, operand.shape)) or "scalar"
