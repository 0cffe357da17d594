"""Figures are drawn from the tidy tables, whatever is missing in them."""

import matplotlib.image
import numpy as np
import pytest

from soap_jax import data
from soap_jax.study import experiment, figures, results
from soap_jax.study.config import StudyConfig


@pytest.fixture(scope="module")
def config():
    return StudyConfig(
        learning_rates=(0.1, 0.5),
        seeds=2,
        epochs=2,
        hidden=(7,),
        evaluations=4,
        methods=("bp", "sign"),
        target_loss=2.0,
    )


@pytest.fixture(scope="module")
def tables(config):
    digits = data.load("digits")
    marks = experiment.evaluation_steps(config, 1151)
    parts = [
        results.tidy(config, method, experiment.train_method(config, method, digits), marks)
        for method in config.methods
    ]
    return {name: _concat([part[name] for part in parts]) for name in results.TABLES}


def _concat(parts):
    import pandas as pd

    return pd.concat(parts, ignore_index=True)


def test_every_figure_is_a_png_and_a_pdf_with_something_on_it(config, tables, tmp_path):
    paths = figures.draw_all(config, tables, tmp_path)
    assert [path.name for path in paths] == [
        "overview.png",
        "loss_curves.png",
        "steps_to_loss.png",
        "angles.png",
    ]
    for path in paths:
        pixels = matplotlib.image.imread(path)
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_figures_do_not_change_from_one_drawing_to_the_next(config, tables, tmp_path):
    for name in ("a", "b"):
        figures.draw_all(config, tables, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_runs_that_never_reach_the_target_or_diverge_leave_the_rest_drawn(config, tables, tmp_path):
    broken = {name: table.copy() for name, table in tables.items()}
    sign = broken["runs"]["method"] == "sign"
    broken["runs"].loc[sign, "diverged"] = True
    broken["runs"]["steps_to_target"] = np.nan
    paths = figures.draw_all(config, broken, tmp_path)
    assert all(path.exists() for path in paths)
