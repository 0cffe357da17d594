"""What the README shows works as it stands there, on GitHub and on a package index."""

import pathlib
import re
import tomllib

import jax
import markdown_blocks as blocks
import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = blocks.python(README)


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_the_explanation_is_the_one_shown(capsys):
    names = {}
    exec(PYTHON[0].code, names)
    assert capsys.readouterr().out == PYTHON[0].shown
    assert jax.tree.structure(names["grads"]) == jax.tree.structure(names["params"])


def test_the_comparison_is_the_one_shown(capsys):
    exec(PYTHON[1].code, {})
    blocks.assert_close(capsys.readouterr().out, PYTHON[1].shown)


def test_every_python_block_is_tested_above():
    assert len(PYTHON) == 2


@pytest.mark.parametrize("name", ["study", "tests", "docs"])
def test_the_commands_stand_where_they_are_looked_for(name):
    found = re.findall(rf"^<!-- command: {name} -->\n```sh\n(.+)\n```$", README, re.MULTILINE)
    assert len(found) == 1
    assert found[0].startswith("python3 -m venv .venv && .venv/bin/pip install -q -e '.[")


def test_links_and_images_work_on_a_package_index():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    repository = project["project"]["urls"]["Repository"]
    text = README
    for rule in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    links = blocks.links(text)
    assert len(links) > 20
    assert not [link for link in links if not link.startswith("https://")]
    ours = {link.removeprefix(repository) for link in links if link.startswith(repository)}
    kinds = {pathlib.PurePosixPath(path).suffix == ".png": path.split("/")[1] for path in ours}
    assert kinds == {True: "raw", False: "blob"}
    paths = {path.split("/main/")[1].split("#")[0] for path in ours}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
