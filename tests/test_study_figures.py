"""Figures for papers are drawn, whatever is missing in them."""

import matplotlib.image
import numpy as np
import pytest
from made_up import BAD_CASES, UNKNOWN, break_everything, make_findings, make_mediation, make_study
from matplotlib import figure

from soap_jax.study import charts, diagram, figures, views


@pytest.fixture(scope="module")
def study():
    return make_study(seeds=3, learning_rates=(0.02, 0.05, 0.1, 0.2, 2.0))


@pytest.fixture(scope="module")
def drawn(study, tmp_path_factory):
    """The paths of every figure."""
    directory = tmp_path_factory.mktemp("figures")
    return figures.draw_all(*study, make_findings(), make_mediation(), directory)


def test_every_figure_is_a_png_and_a_pdf_with_something_on_it(drawn):
    assert [path.stem for path in drawn] == [
        "overview",
        "loss_curves",
        "steps_to_loss",
        "angles",
        "effective_learning_rate",
        "claims",
        "accuracy",
        "mediation",
    ]
    for path in drawn:
        pixels = np.round(255 * matplotlib.image.imread(path)).astype(int)
        assert len(np.unique(pixels @ 256 ** np.arange(pixels.shape[-1]))) > 50  # colours
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_figures_do_not_change_from_one_drawing_to_the_next(study, drawn, tmp_path):
    figures.draw_all(*study, make_findings(), make_mediation(), tmp_path)
    for path in drawn[0].parent.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def draw(shown):
    """Draws figures for nobody to see."""
    for chart in shown.values():
        canvas = figure.Figure(layout="constrained")
        figures.draw(canvas.subplots(), chart)
        canvas.draw_without_rendering()


@pytest.mark.parametrize("changes", BAD_CASES.values(), ids=BAD_CASES)
def test_small_studies_are_drawn(changes):
    draw(views.describe(*make_study(**{"seeds": 2, **changes}), []))


def test_a_study_of_which_nothing_is_left_is_drawn_in_words(study):
    made, tables = study
    shown = views.describe(made, break_everything(tables), [])
    assert all(chart.empty for chart in shown.values())
    draw(shown)
    canvas = figure.Figure()
    figures.draw_diagram(canvas.subplots(), diagram.describe(made, tables, UNKNOWN))
    canvas.draw_without_rendering()


def test_a_label_with_dollars_is_no_formula():
    words = {"name": "n", "title": "T", "x_label": "x", "caption": "c", "nothing": "none"}
    row = charts.Row("from $1 to $\\nope{2", "s", 1, 0.5, 2)
    styles = {"s": ("style", charts.STYLES["bp"])}
    draw({"n": charts.Intervals(rows=[row], styles=styles, **words)})
