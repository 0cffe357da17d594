"""Plotly draws what the charts say; that it works in a browser is tested with the report."""

import math

import pytest
from made_up import make_findings, make_study

from soap_jax.study import charts, claims, config, plots, views


@pytest.fixture(scope="module")
def shown():
    made = make_study(seeds=2, methods=("bp", "frozen"), learning_rates=(0.05, 0.1))
    return views.describe(*made, make_findings())


def test_every_style_has_a_name_in_plotly():
    for style in [*charts.STYLES.values(), *charts.VERDICTS.values()]:
        assert style.marker in plots.MARKERS and style.line in plots.DASHES


def test_the_library_comes_only_when_asked_for(shown):
    alone = plots.to_html(shown["accuracy"], with_library=False)
    assert "plotly.js v" not in alone and 'id="plot-accuracy"' in alone
    assert "plotly.js v" in plots.to_html(shown["accuracy"], with_library=True)


def test_all_that_shows_a_method_is_switched_together(shown):
    figure = plots._curves(shown["steps_to_loss"])
    groups = [trace.legendgroup for trace in figure.data]
    assert groups.count("frozen") == 2  # a line and what is not reached: one point has no band
    assert groups.count("bp") == 2  # a line and a band
    in_legend = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert in_legend == [config.METHODS["bp"], config.METHODS["frozen"]]


def test_hovering_tells_estimate_and_note(shown):
    lines = [trace for trace in plots._curves(shown["steps_to_loss"]).data if trace.hovertext]
    assert "at 0.05 (2 of 2 runs reach loss 0.5)" in lines[0].hovertext[0]
    assert "not reached" in lines[-1].hovertext[0]


def test_an_interval_without_end_reaches_the_edge():
    words = {"name": "n", "title": "T", "x_label": "x", "caption": "c", "nothing": "none"}
    row = charts.Row("late", claims.UNDECIDED, 2.0, 1.5, math.inf, (-math.inf, 3.0), "a bound")
    styles = {claims.UNDECIDED: ("undecided", charts.VERDICTS[claims.UNDECIDED])}
    chart = charts.Intervals(rows=[row], styles=styles, x_log=True, **words)
    bar, point = plots._intervals(chart).data
    left, right = chart.extent
    assert tuple(bar.x[:2]) == pytest.approx((left, 3.0))
    assert point.x[0] + point.error_x.array[0] == pytest.approx(right)
    assert point.x[0] - point.error_x.arrayminus[0] == pytest.approx(1.5)


def test_words_of_others_are_escaped(shown):
    words = {"name": "n", "title": "T", "x_label": "x", "caption": "c", "nothing": "none"}
    row = charts.Row("<i>a</i>", "s", 1.0, 0.5, 2.0, note="</script><script>alert(1)")
    chart = charts.Intervals(rows=[row], styles={"s": ("s", charts.STYLES["bp"])}, **words)
    page = plots.to_html(chart, with_library=False)
    assert "<i>" not in page and "<script>alert" not in page
