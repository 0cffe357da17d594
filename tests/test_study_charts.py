"""Charts say in words and numbers what they show."""

import numpy as np
import pytest
from made_up import contrast

from soap_jax.study import charts, config

NAN, INF = np.nan, np.inf


def test_every_method_has_a_style_of_its_own_that_is_seen_on_white_and_on_black():
    assert charts.STYLES.keys() == config.METHODS.keys()
    styles = list(charts.STYLES.values())
    for attribute in ("color", "marker"):
        assert len({getattr(style, attribute) for style in styles}) == len(styles)
    for style in [*styles, *charts.VERDICTS.values()]:
        assert contrast(style.color, "#ffffff") >= 3
        assert contrast(style.color, "#14181d") >= 3


def make_curves(**changes):
    """Two methods, one of which never arrives at the first of its points."""
    points = [charts.Point(1, 100, 90, 120), charts.Point(2, 20, 10, 30)]
    lines = {"bp": points, "fa": [charts.Point(1, NAN, NAN, NAN, "late"), points[1]]}
    words = {"name": "n", "title": "T", "x_label": "x", "y_label": "y", "caption": "c"}
    return charts.Curves(**words | {"nothing": "none", "lines": lines, "y_log": True} | changes)


def test_curves_are_told_in_words():
    assert make_curves().alt == (
        "T. Line chart of y against x: backprop from 100 at 1 to 20 at 2; "
        "FA, fixed feedback from 20 at 2 to 20 at 2."
    )


def test_points_that_are_missing_stand_above_the_budget():
    assert make_curves().missing == {}
    chart = make_curves(budget=150)
    [(point, height)] = chart.missing["fa"]
    assert point.x == 1 and height > 150 and "bp" not in chart.missing
    assert chart.y_ticks == [10, 20, 50, 100]  # none above the budget, where steps have no meaning


def test_curves_without_a_point_are_empty():
    assert make_curves().empty == ""
    assert make_curves(lines={"fa": [charts.Point(1, NAN, NAN, NAN)]}).empty == "none"
    assert make_curves(lines={}).empty == "none"


def make_intervals(*rows, **changes):
    words = {"name": "n", "title": "T", "x_label": "x", "caption": "c", "nothing": "none"}
    return charts.Intervals(**words | {"rows": rows, "styles": {}, "x_log": True} | changes)


def test_the_extent_of_intervals_holds_every_finite_end():
    rows = charts.Row("a", "s", 2, 1.5, INF, (-INF, 4)), charts.Row("b", "s", 0.5, NAN, NAN)
    left, right = make_intervals(*rows).extent
    assert left < 0.5 < 4 < right and left > 0.3 and right < 6
    assert make_intervals(*rows, line=10).extent[1] > 10
    left, right = make_intervals(charts.Row("a", "s", 5, NAN, NAN), x_log=False).extent
    assert left < 5 < right


def test_intervals_are_told_in_words():
    chart = make_intervals(charts.Row("a", "s", 2, 1.5, INF), charts.Row("b", "s", 0.5, NAN, NAN))
    assert chart.alt == "T. Horizontal axis: x. a: 2.00 [1.50, ∞); b: 0.500."
    assert make_intervals().empty == "none"


def test_numbers_are_for_people():
    said = [charts.number(v) for v in (0.000123, 1.0, -12.345, 123.4, 12345, np.nan, np.inf)]
    assert said == ["0.000123", "1", "−12.3", "123", "12,345", "–", "∞"]
    assert charts.estimate(0.23, 0.2, 0.251) == "0.230 [0.200, 0.251]"
    assert charts.estimate(0.23, 0, 0.251) == "0.230 (0, 0.251]"
    assert charts.estimate(61, 58.2, 64, "°") == "61.0° [58.2, 64.0]"
    assert charts.estimate(2, 0, np.inf) == charts.estimate(2, np.nan, np.nan) == "2.00"


@pytest.mark.parametrize(
    ("values", "ticks"),
    [([0.3, 7], [0.2, 0.5, 1, 2, 5, 10]), ([1, 1], [1]), ([90, 110], [50, 100, 200]), ([], [])],
)
def test_ticks_surround_the_values(values, ticks):
    assert charts.one_two_five(np.array(values, float)) == ticks
