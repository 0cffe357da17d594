"""The causal diagram has the mediation's numbers on its arrows, and nothing runs into them."""

import dataclasses
import itertools
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from made_up import UNKNOWN, comparison, make_mediation

from soap_jax.study import diagram

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def study():
    return comparison(("bp", "sign"), seeds=2, rates=(0.05, 0.1))


@pytest.fixture(scope="module")
def causes(study):
    return diagram.make_diagram(study, make_mediation())


def parse(causes):
    return ElementTree.fromstring(causes.svg)


def words(causes):
    return [text.text for text in parse(causes).iter(f"{SVG}text")]


def test_the_causal_diagram_says_how_much_goes_where(causes):
    said = words(causes)
    assert said[-2:] == ["steps to loss 0.5", "total effect × 0.230 [0.220, 0.240]"]
    assert {"× 9.2", "(its size: × 11.5)", "× 0.225", "[0.215, 0.235]"} <= set(said)
    assert any(re.fullmatch(r"\d+° off", line) for line in said)
    i = said.index("101 % of the total")
    assert said[i + 1] == "(on the log scale)"
    assert "rate first: × 0.241 [0.230, 0.252] through the rate" in causes.caption
    widths = [float(p.get("stroke-width")) for p in parse(causes).iter(f"{SVG}path")]
    assert widths == [1.5, 1.5, 5, 1.5]
    assert "*" not in causes.svg


def test_a_bound_is_open_on_its_side_and_has_no_share(study):
    effects = make_mediation()
    cut = {"share": np.nan, "share_low": np.nan, "share_high": np.nan, "high": np.inf}
    effects = dataclasses.replace(
        effects, effects=tuple(dataclasses.replace(e, **cut) for e in effects.effects)
    )
    said = words(diagram.make_diagram(study, effects))
    assert "[0.215, ∞)" in said and not any("%" in line for line in said)


def test_without_numbers_there_is_no_diagram(study):
    assert diagram.make_diagram(study, UNKNOWN) is None


def test_words_in_it_are_escaped(study):
    study.methods["sign"]["label"] = "<b>&"
    try:
        assert "<b>&" in words(diagram.make_diagram(study, make_mediation()))
    finally:
        study.methods["sign"]["label"] = "sign sync, raw"


def boxes(root):
    """Left, top, right and bottom of each text, in a wide font."""
    for text in root.iter(f"{SVG}text"):
        x, y = float(text.get("x")), float(text.get("y"))
        width = 13 * 0.62 * len(text.text)
        left = x - width * {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor")]
        yield text.text, (left, y - 12, left + width, y + 4)


def obstacles(root):
    """The same of each arrow's line and head."""
    for path in root.iter(f"{SVG}path"):
        x, top, bottom = map(float, re.fullmatch(r"M(.+),(.+)V(.+)", path.get("d")).groups())
        half = float(path.get("stroke-width")) / 2
        yield x - half, top, x + half, bottom
    for head in root.iter(f"{SVG}polygon"):
        x, y = np.array([c.split(",") for c in head.get("points").split()], float).T
        yield x.min(), y.min(), x.max(), y.max()


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("share", [1.08, -0.08, 0.333333])
def test_no_label_is_clipped_or_struck_through(study, share):
    effects = make_mediation()
    numbers = {"ratio": 0.0123456, "low": 0.0112345, "high": 0.0134567, "share": share}
    effects = dataclasses.replace(
        effects, effects=tuple(dataclasses.replace(e, **numbers) for e in effects.effects)
    )
    root = parse(diagram.make_diagram(study, effects))
    _, _, width, height = map(float, root.get("viewBox").split())
    labels, arrows = list(boxes(root)), list(obstacles(root))
    assert len(arrows) == 8 and len(labels) >= 16
    for said, box in labels:
        assert box[0] >= 0 and box[2] <= width and box[1] >= 0 and box[3] <= height, said
        assert not any(overlap(box, arrow) for arrow in arrows), said
    for (one, a), (other, b) in itertools.combinations(labels, 2):
        assert not overlap(a, b), (one, other)


def test_arrows_end_on_the_boxes_they_point_to(causes):
    root = parse(causes)
    tops = {float(box.get("y")) for box in root.iter(f"{SVG}rect")}
    for head in root.iter(f"{SVG}polygon"):
        assert float(head.get("points").split()[0].split(",")[1]) in tops
