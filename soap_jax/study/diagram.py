"""The causal diagram of a method, with the numbers of the mediation analysis on its arrows.

    method ──> effective learning rate of the hidden layers ──> steps to the target loss
       └─────> direction of the error that reaches them ──────────────┘

The layout is fixed and narrow enough for a phone: arrows are vertical, and the numbers of each
arrow are on its outer side.
"""

from __future__ import annotations

import html
import math
from typing import NamedTuple

import numpy as np

from soap_jax.study import figures, mediation
from soap_jax.study.results import Results
from soap_jax.study.statistics import Estimate, format_number

WIDTH, HEIGHT = 380, 430
LINE = 17
"""The distance between lines of text."""
BOXES = ((40, 8, 300, 56), (6, 156, 180, 56), (194, 156, 180, 56), (40, 366, 300, 56))
"""The left, top, width and height of each box."""
ARROWS = ((166, 64, 156, -1), (214, 64, 156, 1), (166, 212, 366, -1), (214, 212, 366, 1))
"""The x, start, end and side of the text (-1: left) of each arrow."""


class Diagram(NamedTuple):
    """The causal diagram.

    Attributes:
        title: the title.
        svg: the drawing, in the colour of the surrounding text.
        caption: the caption, which explains the numbers.
    """

    title: str
    svg: str
    caption: str


def make_diagram(comparison: Results, effects: mediation.Mediation) -> Diagram | None:
    """Draws the two paths of raw sign sync's effect on speed, with the factor along each.

    Args:
        comparison: the results.
        effects: the mediation.

    Returns:
        The diagram; None if the effect cannot be decomposed.
    """
    if not effects.testable:
        return None
    total, *paths = map(effects.effect, ("total", "rate", "direction"))
    method, reference, control = list(effects.effective_rates)[:3]
    start = {name: rates[0] for name, rates in effects.effective_rates.items()}
    amplified, size = (format_number(start[m] / start[reference]) for m in (method, control))
    first = f"error_angle/{comparison.hidden[0]}"
    turned = comparison.measured(first, method, effects.learning_rate, end=False).mean()
    name = comparison.label(method)
    target = format_number(comparison.target_loss)
    boxes = (
        (f"*{name}*", f"in place of {comparison.label(reference)}"),
        ("effective learning rate", "of the hidden layers"),
        ("direction of the error", "that reaches them"),
        (f"steps to loss {target}", f"*total effect {_factor(total)}*"),
    )
    words = (
        (f"× {amplified}", f"(its size: × {size})", "at the start"),
        (f"{turned:.0f}° off", "at the start") if math.isfinite(turned) else (),
        *map(_on_arrow, paths),
    )
    orders = [
        f"{order}: {_factor(effects.effect('rate', order))} through the rate, "
        f"{_factor(effects.effect('direction', order))} through the direction"
        for order in ("rate first", "direction first")
    ]
    caption = (
        f"Factors on the steps to loss {target} at learning rate {effects.learning_rate:g} (below "
        "1 is faster), with 95 % intervals over paired seeds. The product of the factors along the "
        "two paths is the total effect. The width of an arrow is its share of the total effect on "
        "the log scale. Backprop with amplified hidden gradients changes only the rate; sign sync "
        "with the norm kept changes only the direction. Numbers are averages over the two orders "
        f"in which rate and direction can be changed ({'; '.join(orders)})."
    )
    if effects.note:
        caption += f" Note: {effects.note}."
    title = f"How {name} acts on the steps to the target"
    widths = [
        1.5,
        1.5,
        *(1.5 + 3.5 * np.nan_to_num(np.clip(effect.share, 0, 1)) for effect in paths),
    ]
    alt = f"{title}. Total effect {_factor(total)}. " + ". ".join(
        f"Through the {effect.path}: {', '.join(_on_arrow(effect))}" for effect in paths
    )
    svg = _draw(title, alt.replace("*", ""), boxes, words, widths)
    return Diagram(title, svg, caption)


def _draw(title, said, boxes, words, widths) -> str:
    parts = []
    for (x, start, end, side), lines, width in zip(ARROWS, words, widths, strict=True):
        base, half = end - 9 - 1.5 * width, 3.5 + 1.1 * width
        head = f"{x},{end} {x - half:g},{base:g} {x + half:g},{base:g}"
        parts.append(
            f'<path d="M{x},{start}V{base:g}" stroke="currentColor" stroke-width="{width:.2f}"/>'
            f'<polygon points="{head}" fill="currentColor"/>'
        )
        middle = (start + base) / 2
        parts += _text_lines(x + 14 * side, middle, "end" if side < 0 else "start", lines)
    for (x, y, width, height), lines in zip(BOXES, boxes, strict=True):
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{figures.GREY}" '
            'fill-opacity="0.12" stroke="currentColor"/>'
        )
        parts += _text_lines(x + width / 2, y + height / 2, "middle", lines)
    return (
        f'<svg class="diagram" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" font-family="sans-serif" font-size="13"><title>{html.escape(title)}</title>'
        f"<desc>{html.escape(said)}</desc>{''.join(parts)}</svg>"
    )


def _text_lines(x, middle, anchor, lines):
    """Lines of text, centred at a height; lines between asterisks are bold."""
    first = middle + 4.5 - LINE * (len(lines) - 1) / 2
    for i, line in enumerate(lines):
        weight = ' font-weight="bold"' * line.startswith("*")
        yield (
            f'<text x="{x:g}" y="{first + LINE * i:g}" text-anchor="{anchor}" fill="currentColor"'
            f"{weight}>{html.escape(line.strip('*'))}</text>"
        )


def _factor(effect) -> str:
    return f"× {Estimate(effect.ratio, effect.low, effect.high)}"


def _on_arrow(effect) -> tuple[str, ...]:
    factor, _, interval = str(Estimate(effect.ratio, effect.low, effect.high)).partition(" ")
    lines = (f"*× {factor}*", interval or "no interval")
    if math.isnan(effect.share):
        return lines
    return (
        *lines,
        f"{format_number(round(100 * effect.share))} % of the total",
        "(on the log scale)",
    )
