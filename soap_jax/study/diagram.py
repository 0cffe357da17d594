"""The causal diagram of raw sign sync, with the mediation's numbers on its arrows.

    raw sign sync ──> effective learning rate of the hidden layers ──> steps to the target loss
          └─────────> direction of the error that reaches them ─────────────┘

It is laid out once, on a plane narrow enough for a phone, and drawn from that for papers and pages.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from soap_jax.study import charts, mediation, summary, views
from soap_jax.study.config import StudyConfig

LINE = 18.0
"""From one line of words to the next."""


class Box(NamedTuple):
    """A box.

    Attributes:
        x: of its centre.
        y: of its centre, downwards.
        width: its width.
        lines: its words; what stands between asterisks is strong.
    """

    x: float
    y: float
    width: float
    lines: tuple[str, ...]

    @property
    def height(self) -> float:
        """Room for every line."""
        return 18 + LINE * len(self.lines)


class Arrow(NamedTuple):
    """An arrow.

    Attributes:
        start: where it starts, `(x, y)`.
        end: where it points to.
        label: where the first of its lines stands.
        lines: what is known of it.
        width: its width.
    """

    start: tuple[float, float]
    end: tuple[float, float]
    label: tuple[float, float]
    lines: tuple[str, ...]
    width: float

    @property
    def head(self) -> tuple[tuple[float, float], ...]:
        """The corners of its head: the tip, a side, the base, where the line ends, a side."""
        along = np.subtract(self.end, self.start)
        along = along / np.hypot(*along)
        across = np.array([-along[1], along[0]])
        base = np.subtract(self.end, (9 + 1.5 * self.width) * along)
        half = (3.5 + 1.1 * self.width) * across
        corners = self.end, base + half, base, base - half
        return tuple((round(float(x), 2), round(float(y), 2)) for x, y in corners)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagram:
    """The causal diagram.

    Attributes:
        title: a few words.
        boxes: what there is.
        arrows: what acts on what.
        caption: what is seen, and how the numbers are made.
        alt: the diagram in words.
        empty: in place of the diagram where there are no numbers, else empty.
        name: of its file.
        size: of the plane, `(width, height)`.
    """

    title: str
    boxes: tuple[Box, ...] = ()
    arrows: tuple[Arrow, ...] = ()
    caption: str = ""
    alt: str = ""
    empty: str = ""
    name: str = "mediation"
    size: tuple[float, float] = (360, 402)


def describe(config: StudyConfig, tables: views.Tables, effects: mediation.Mediation) -> Diagram:
    """What raw sign sync changes, and how much of its effect on speed goes through what.

    Args:
        config: the study's configuration.
        tables: the tidy tables "runs" and "evaluations".
        effects: the mediation.
    """
    title = "How raw sign sync acts on the steps to the target"
    if not effects.testable:
        return Diagram(title=title, empty=f"The effect cannot be taken apart: {effects.note}.")
    total, of_rate, of_direction = map(effects.effect, ("total", "rate", "direction"))
    rates = {rate.method: rate for rate in effects.effective_rates}
    amplified = charts.number(rates["sign"].start / rates["bp"].start)
    size = charts.number(rates["bp_scaled_live"].start / rates["bp"].start)
    turned = _angle_at_start(summary.base(config, tables["evaluations"]), effects.learning_rate)
    target = f"{config.target_loss:g}"
    boxes = (
        Box(180, 37, 190, ("*raw sign sync*", "in place of backprop")),
        Box(84, 190, 162, ("effective learning rate", "of the hidden layers")),
        Box(276, 190, 162, ("direction of the error", "that reaches them")),
        Box(180, 354, 250, (f"steps to loss {target}", f"*in all {_factor(total)}*")),
    )
    arrows = (
        Arrow(
            (140, 64), (94, 163), (58, 104), (f"× {amplified} (size × {size})", "at the start"), 1.5
        ),
        Arrow((220, 64), (266, 163), (302, 104), turned, 1.5),
        Arrow((94, 217), (140, 327), (54, 256), _on_arrow(of_rate), _width(of_rate)),
        Arrow((266, 217), (220, 327), (306, 256), _on_arrow(of_direction), _width(of_direction)),
    )
    orders = [
        f"{order}: {_factor(effects.effect('rate', order))} through the rate, "
        f"{_factor(effects.effect('direction', order))} through the direction"
        for order in ("rate first", "direction first")
    ]
    caption = (
        f"Factors on the steps to loss {target} at learning rate {effects.learning_rate:g} (below "
        "1 is faster), with 95 % intervals over paired seeds. The factors along the two paths "
        "multiply to the whole; arrows are as wide as their shares of it. Backprop with its hidden "
        "gradients amplified changes the rate alone, sign sync that keeps the norm the direction "
        "alone. Numbers are averages over which of the two is changed first "
        f"({'; '.join(orders)})."
    )
    if effects.note:
        caption += f" Note: {effects.note}."
    alt = (
        f"{title}: in all {_factor(total)}; through the effective learning rate of the hidden "
        f"layers {', '.join(_on_arrow(of_rate))}; through the direction of the error "
        f"{', '.join(_on_arrow(of_direction))}."
    )
    alt = alt.replace("*", "")
    return Diagram(title=title, boxes=boxes, arrows=arrows, caption=caption, alt=alt)


def _angle_at_start(evaluations, rate) -> tuple[str, ...]:
    """How far raw signs turn the error that reaches the first hidden layer."""
    column = "error_angle/Dense_0"
    rows = evaluations[
        (evaluations["method"] == "sign")
        & (evaluations["learning_rate"] == rate)
        & (evaluations["step"] == evaluations["step"].min())
    ]
    if column not in rows or rows[column].isna().any():
        return ()
    return (f"{rows[column].mean():.0f}° off", "at the start")


def _factor(effect) -> str:
    return f"× {charts.estimate(effect.ratio, effect.low, effect.high)}"


def _on_arrow(effect) -> tuple[str, ...]:
    factor, _, interval = _factor(effect).removeprefix("× ").partition(" ")
    lines = (f"*× {factor}*", interval or "no interval")
    if math.isnan(effect.share):
        return lines
    return (*lines, f"{charts.number(round(100 * effect.share))} % of it")


def _width(effect) -> float:
    """As the share, from the width of an arrow that has none."""
    return 1.5 + 3.5 * (0 if math.isnan(effect.share) else float(np.clip(effect.share, 0, 1)))
