"""The notebooks run, small, and show what their text says."""

import pathlib
import re
import time

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
NOTEBOOKS = pathlib.Path(__file__).parents[1] / "examples" / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.py"))
SMALL = {
    "artefact": "SEEDS, EPOCHS, RATES = 2, 20, (0.05, 0.2, 0.5)",
    "direct_attention": "EPOCHS, SEEDS = 6, 1",
    "flax_cnn": "EPOCHS = 1",
    "from_scratch": "EPOCHS, SEEDS = 6, 1",
    "in_time": "EPOCHS, SEEDS = 6, 1",
    "own_rule": "SEEDS, EPOCHS, RATES = 2, 20, (0.2, 0.5)",
}
CELL = re.compile(r'(?<=# %% tags=\["parameters"\]\n).*(?=\n)')


@pytest.fixture(scope="module")
def run():
    """Runs a notebook with small parameters, once; returns its names."""
    known = {}

    def run(name):
        if name not in known:
            text, count = CELL.subn(SMALL[name], (NOTEBOOKS / f"{name}.py").read_text())
            assert count == 1
            known[name] = {"__name__": "notebook"}
            start = time.monotonic()
            exec(compile(text, f"{name}.py", "exec"), known[name])
            assert time.monotonic() - start < 120  # half of it on a free machine
            matplotlib.pyplot.close("all")
        return known[name]

    return run


def test_every_notebook_is_tested_and_on_the_site():
    assert sorted(SMALL) == NAMES
    config = (NOTEBOOKS.parents[1] / "mkdocs.yml").read_text()
    assert sorted(re.findall(r"notebooks/(\w+)\.md", config)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_links_are_relative_and_lead_somewhere(name):
    text = (NOTEBOOKS / f"{name}.py").read_text().replace("\n# ", " ")
    links = re.findall(r"\]\(([^()\s#]+)[^()\s]*\)", text)
    assert links
    assert [link for link in links if not (NOTEBOOKS / link).exists()] == []


def test_feedback_alignment_by_hand_is_that_of_the_library_and_aligns(run):
    names = run("from_scratch")
    assert names["by_hand"] > 0.85
    assert names["difference"] < 1e-6
    curves = names["curves"].mean(0)
    assert np.all(abs(curves[0] - 90) < 15)
    assert np.all(curves[-1] < curves[0] - 10)


def test_the_cnn_learns_by_every_rule(run):
    last = {name: curve[-1] for name, curve in run("flax_cnn")["curves"].items()}
    assert len(last) == 4 and min(last.values()) > 0.5


def test_scaled_backprop_is_as_fast_as_raw_signs(run):
    result = run("artefact")["result"]
    assert result.ratio("sign", "bp").value < 0.6
    assert 0.85 < result.ratio("sign", "bp_scaled_live").value < 1.15
    assert result.ratio("sign_norm", "bp").value > 1


def test_traces_alone_learn_and_their_memory_does_not_grow(run):
    names = run("in_time")
    last = {name: curve[:, -1].mean() for name, curve in names["curves"].items()}
    assert last["BPTT"] > last["RFLO"] > last["readout only"]
    assert names["temporary_bytes"](names["rflo"], 80) == names["temporary_bytes"](
        names["rflo"], 800
    )


def test_a_rule_of_ones_own_is_judged(run):
    names = run("own_rule")
    result = names["result"]
    assert list(result.summary().method) == ["bp", "fa", "signs", "flip", "frozen"]
    assert len(result.judge()) == 2
    assert result.ratio("flip", "fa").value < 1


def test_no_fixed_projection_matches_errors_that_pass_attention(run):
    names = run("direct_attention")
    best = names["found"][..., 0].mean(1)
    assert best[0] < 25 and np.all(best[1:] > 35)  # after few epochs attention is not sharp yet
    assert np.all(names["found"][..., 1] > names["found"][..., 0])
