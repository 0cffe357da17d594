"""The benchmarks' results: where they come from, and what the README says of them."""

import ast
import importlib
import json
import pathlib
import sys

import pytest

from soap_jax import study, tasks

ROOT = pathlib.Path(__file__).parents[1] / "benchmarks"
RESULTS = ROOT / "results"


def suite():
    """The names in `benchmarks/__main__.py`, read without importing what it needs."""
    for node in ast.parse((ROOT / "__main__.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "SUITE":
            return ast.literal_eval(node.value)
    raise AssertionError("benchmarks/__main__.py has no SUITE")


def tables():
    return sorted(path.stem for path in RESULTS.glob("*.md"))


@pytest.mark.parametrize("name", suite())
def test_every_benchmark_asks_a_question_that_the_readme_lists(name):
    question = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text())).split("\n")[0]
    readme = (ROOT / "README.md").read_text()
    assert question.endswith("?")
    assert f"| {question} | `python -m benchmarks.{name}" in readme
    assert f"(results/{name}.json)" in readme


@pytest.mark.parametrize("name", suite())
def test_every_result_says_where_it_comes_from(name):
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert result["benchmark"] == name
    assert result["device"] and result["cores"] >= 1 and result["results"]
    assert {"soap_jax", "jax", "jaxlib", "flax", "optax"} <= set(result["versions"])


@pytest.mark.parametrize("name", tables())
def test_the_readme_has_the_tables_as_they_were_written(name):
    """All of a table, or the file's link where it is long."""
    readme = (ROOT / "README.md").read_text()
    assert (RESULTS / f"{name}.md").read_text() in readme or f"(results/{name}.md)" in readme


@pytest.mark.parametrize("readme, prefix", [("", ""), ("..", "benchmarks/")], ids=["own", "root"])
def test_what_is_shown_exists(readme, prefix):
    text = (ROOT / readme / "README.md").read_text()
    shown = [part.split(")")[0] for part in text.split(f"]({prefix}results/")[1:]]
    assert shown
    assert [name for name in shown if not (RESULTS / name).exists()] == []


def test_every_result_is_json_that_others_read():
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    for path in RESULTS.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=refuse)


def test_the_results_of_a_study_are_kept_and_tabulated(tmp_path, monkeypatch):
    options = {"learning_rates": (0.03, 0.1), "seeds": 2, "steps": 16, "evaluations": 1}
    claims = [study.Ratio("fa", within=(1, 2), at=0.1)]
    out, kept = tmp_path / "tiny", tmp_path / "kept"
    task = tasks.mlp(1, 8)
    found = study.compare(
        task, ["bp", "fa", "frozen"], batch_size=8, claims=claims, out=out, **options
    )
    found.report(out)

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        importlib.import_module(f"benchmarks.{name}").main()

    call("keep_study", out, kept)
    assert "Verdicts" in (kept / "report.txt").read_text()
    call("what_works_where", out, "--out", tmp_path, "--claims", kept)
    rows = importlib.import_module("benchmarks.what_works_where").read(
        tmp_path / "what_works_where.json"
    )
    table = (tmp_path / "what_works_where.md").read_text()
    assert [row["method"] for row in rows] == ["bp", "fa", "frozen"]
    assert len(table.splitlines()) == 2 + 3
    call("what_works_where", "--out", tmp_path, "--claims", kept)  # from what was saved
    assert (tmp_path / "what_works_where.md").read_text() == table
