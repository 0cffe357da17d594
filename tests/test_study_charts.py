"""Each figure shows what the tables and the findings hold, for any task and method."""

import itertools
import json
import math

import numpy as np
import pytest
from made_up import (
    BAD_CASES,
    break_everything,
    comparison,
    contrast,
    make_findings,
    make_part,
    make_record,
)

from soap_jax.study import charts, claims, drawing, figures, methods
from soap_jax.study.comparison import Comparison
from soap_jax.study.store import TABLES

RATES = (0.02, 0.05, 0.1, 0.2, 2.0)
NAMES = ["loss_curves", "steps_to_loss", "angles", "effective_learning_rate", "claims"]
NAMES += ["final_metric"]


@pytest.fixture(scope="module")
def study():
    return comparison(seeds=3, rates=RATES)


@pytest.fixture(scope="module")
def shown(study):
    return by_name(study, make_findings())


def by_name(made, findings=()):
    return {figure.name: figure for figure in charts.all_figures(made, findings)}


def rows(figure, field):
    """The rows behind the marks that have a field."""
    for layer in figure.spec["layer"]:
        data = layer["data"]
        values = data["values"] if "values" in data else figure.spec["datasets"][data["name"]]
        if any(field in row for row in values):
            return values
    return []


def at(figure, method, x):
    [row] = [row for row in rows(figure, "method") if (row["method"], row["x"]) == (method, x)]
    return row


def changed(made, where, **values):
    """The study with other results in some of its runs."""
    runs = made.runs.copy()
    for name, value in values.items():
        runs.loc[where(runs), name] = value
    tables = {name: getattr(made, name) for name in TABLES}
    return Comparison(made.record, tables | {"runs": runs})


def one_run(runs):
    return (runs["method"] == "bp") & (runs["learning_rate"] == 0.2) & (runs["seed"] == 1)


def test_every_figure_is_valid_vega_lite(shown):
    assert list(shown) == NAMES
    for figure in shown.values():
        figure.chart.to_dict(validate=True)
        json.dumps(figure.spec, allow_nan=False)


def test_steps_are_geometric_means_over_seeds_with_t_intervals(study, shown):
    point = at(shown["steps_to_loss"], "backprop", 0.1)
    steps = study.rows("runs", "bp", 0.1)["steps_to_target"]
    assert point["y"] == pytest.approx(np.exp(np.log(steps).mean()))
    half = 4.302653 * np.log(steps).std(ddof=1) / 3**0.5  # t(0.975, 2) from a table
    assert point["high"] / point["y"] == pytest.approx(np.exp(half), rel=1e-5)


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"steps_to_target": np.nan}, "2 of 3 runs reach loss 0.5"),
        ({"diverged": True}, "2 of 3 runs reach loss 0.5, 1 diverged"),
    ],
)
def test_a_rate_that_some_run_never_reaches_has_a_hollow_marker_above_the_budget(
    study, values, note
):
    figure = by_name(changed(study, one_run, **values))["steps_to_loss"]
    point = at(figure, "backprop", 0.2)
    assert point["y"] is None and point["note"] == note and point["lost"] > 340
    kept = at(figure, "backprop", 0.1)
    assert kept["lost"] is None and kept["y"] < 340
    head, cells = figure.table
    assert head[:2] == ["learning rate", "backprop"] and note in [row[1] for row in cells]


def test_methods_that_miss_the_target_stand_on_heights_of_their_own(shown):
    lost = {(r["method"], r["lost"]) for r in rows(shown["steps_to_loss"], "lost") if r["lost"]}
    assert len(lost) == len({height for _, height in lost}) > 1


def test_lines_are_means_over_seeds_and_bands_their_range(study, shown):
    point = at(shown["loss_curves"], "FA, fixed feedback", 170)
    rate = study.shared_rate
    values = study.rows("evaluations", "fa", rate).query("step == 170")["train_loss"]
    assert (point["y"], point["low"]) == pytest.approx((values.mean(), values.min()))
    assert point["high"] == pytest.approx(values.max())
    assert f"at learning rate {rate:g}" in shown["loss_curves"].caption


def test_methods_that_follow_the_true_gradient_have_no_angle(study, shown):
    seen = {row["method"] for row in rows(shown["angles"], "method")}
    inexact = [m for m, record in study.methods.items() if not record["exact"]]
    assert seen == {study.label(method) for method in inexact}


def test_error_angles_are_shown_by_layer_where_there_are_several(shown):
    assert "error_angles" not in shown
    figure = by_name(comparison(seeds=2, hidden=3))["error_angles"]
    assert [row[0] for row in figure.table[1]] == ["1", "2", "3"]
    assert at(figure, "sign sync, raw", 2)["note"] == "Dense_1/kernel"


def test_nothing_below_zero_is_on_a_logarithmic_axis(study):
    zero = changed(study, lambda runs: runs["method"] == "bp")
    column = "effective_learning_rate/Dense_0/kernel"
    table = zero.evaluations
    table.loc[table["method"] == "fa", column] = -0.001
    figure = by_name(zero)["effective_learning_rate"]
    assert at(figure, "FA, fixed feedback", 17)["y"] is None
    for row in rows(figure, "method"):
        assert row["low"] > 0 and (row["y"] is None or row["y"] > 0)


def test_claims_stand_one_below_the_other_and_no_label_on_an_interval(shown):
    estimates, labels = rows(shown["claims"], "low"), rows(shown["claims"], "text")
    assert [row["x"] for row in estimates] == [1.84, 0.23, 0.95, 1.1, 1.4, 1.3]
    places = [row["y"] for row in estimates]
    assert all(b - a >= 40 for a, b in itertools.pairwise(places))
    for label in labels:  # drawn from its top down, 15 pixels high
        assert len(label["text"]) <= 48
        assert all(label["y"] + 15 <= y - 8 or label["y"] >= y + 8 for y in places)
    assert {row["style"] for row in estimates} == {"claim holds", "claim undecided", "claim fails"}


def test_an_open_bound_reaches_to_the_edge(shown):
    domain = shown["claims"].spec["layer"][0]["encoding"]["x"]["scale"]["domain"]
    first, second, third = rows(shown["claims"], "bound_low")[:3]
    assert (first["bound_low"], first["bound_high"]) == (1.5, 3)
    assert second["bound_low"] == domain[0] and third["bound_high"] == domain[1]


def test_the_final_metric_shows_every_seed_with_mean_and_interval(study, shown):
    figure = shown["final_metric"]
    assert figure.title.startswith("Test accuracy") and "%" in figure.table[0][1]
    values = 100 * study.rows("runs", "fa", study.best_rate("fa"))["test_accuracy"]
    dots = [r["x"] for r in figure_dots(figure) if r["style"] == "FA, fixed feedback"]
    assert dots == pytest.approx(values.tolist())
    assert estimate_of(figure, "FA, fixed feedback") == pytest.approx(values.mean())


def figure_dots(figure):
    [layer] = [layer for layer in figure.spec["layer"] if layer["mark"]["type"] == "circle"]
    data = layer["data"]
    return data["values"] if "values" in data else figure.spec["datasets"][data["name"]]


def estimate_of(figure, label):
    [row] = [row for row in rows(figure, "low") if row["label"] == label]
    return row["x"]


def test_a_task_without_metrics_shows_its_loss():
    figure = by_name(comparison(seeds=2, metric=None))["final_metric"]
    assert figure.title == "Test loss at each method's best learning rate"


def test_figures_are_told_in_words(shown):
    for figure in shown.values():
        assert len(figure.alt) > 100 and "nan" not in figure.alt
    assert "1. FA, fixed feedback / backprop" in shown["claims"].alt
    assert "1.84 [1.80, 1.88]" in shown["claims"].alt


@pytest.mark.parametrize("changes", BAD_CASES.values(), ids=BAD_CASES)
def test_small_studies_are_drawn(changes, tmp_path):
    shown = charts.all_figures(comparison(**{"seeds": 2, **changes}), [])
    for figure in shown:
        assert figure.chart or figure.empty
        json.dumps(figure.spec, allow_nan=False)
    figures.save([f for f in shown if f.name in ("angles", "steps_to_loss")], tmp_path)


def test_a_single_kernel_has_no_angles():
    shown = by_name(comparison(seeds=2, hidden=0))
    assert shown["angles"].chart is None and shown["effective_learning_rate"].chart is None


def test_where_nothing_is_left_words_say_so_and_no_old_file_is_left(study, tmp_path):
    figures.save(charts.all_figures(study, []), tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    assert {f"overview{suffix}" for suffix in (".svg", ".png", ".pdf")} <= before
    broken = charts.all_figures(break_everything(study), [])
    assert not any(figure.chart for figure in broken)
    assert any(figure.empty.startswith("No angles: ") for figure in broken)
    figures.save(broken, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_figure_is_an_svg_a_png_and_a_pdf(shown, tmp_path):
    figures.save(list(shown.values()), tmp_path)
    for name in [*NAMES, "overview"]:
        svg = (tmp_path / f"{name}.svg").read_text()
        assert svg.startswith("<svg") and "NaN" not in svg
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "overview.svg").read_text().count(">Steps to loss 0.5") == 1


# How methods are drawn


def test_colours_are_seen_on_white_and_on_black():
    colors = [method.color for method in methods.METHODS.values()]
    assert len(set(colors)) == len(colors) and None not in colors
    verdicts = [color for color, _, _ in charts.VERDICT_STYLES.values()]
    for color in (*colors, *charts.PALETTE, *verdicts, figures.GREY):
        assert contrast(color, "#ffffff") >= 3 and contrast(color, "#14181d") >= 3


def test_methods_of_ones_own_have_a_style_each():
    made = comparison(tuple(f"mine{i}" for i in range(20)), seeds=2, rates=(0.1,))
    styles = charts.method_styles(made)
    assert len({json.dumps(style) for style in styles.values()}) == 20
    assert len({json.dumps(style[1:]) for style in styles.values()}) == 20  # without colours too


def test_methods_with_one_label_are_told_apart():
    record = make_record(("bp", "fa", "sign"), seeds=2)
    record["methods"]["sign"]["label"] = record["methods"]["fa"]["label"]
    made = comparison(("bp", "fa", "sign"), seeds=2)
    twins = Comparison(record, {name: getattr(made, name) for name in TABLES})
    assert list(charts.display_names(twins).values())[1:] == [
        "FA, fixed feedback (fa)",
        "FA, fixed feedback (sign)",
    ]


def test_one_legend_tells_colour_shape_and_dashes(shown):
    for figure in shown.values():
        domains = {
            json.dumps(channel["scale"]["domain"])
            for layer in figure.spec["layer"]
            for name, channel in layer["encoding"].items()
            if name in ("color", "shape", "strokeDash")
        }
        assert len(domains) == 1


def test_an_estimate_without_interval_is_a_point():
    part = make_part("a / b", 2.0, math.nan, math.nan, (0.5, math.inf))
    finding = claims.Finding(
        key="1", statement="s", verdict=claims.HOLDS, why="w", p=0.01, family=1, parts=(part,)
    )
    figure = charts.claim_ratios([finding])
    [row] = rows(figure, "bound_low")
    assert row["x"] == 2 and row["low"] is None and row["high"] is None
    assert figure.table[1] == [["1. a / b", "2.00", ""]]


def test_a_short_logarithmic_axis_still_has_labels():
    assert drawing._one_two_five(0.4, 30) == [0.5, 1, 2, 5, 10, 20]
    assert len(drawing._one_two_five(0.7, 1.4)) > 4
