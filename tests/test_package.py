"""The package as a whole: what it loads, what it offers, and who imports whom."""

import ast
import importlib
import json
import pathlib
import subprocess
import sys
import tomllib

import pytest

import soap_jax
from soap_jax import study

ROOT = pathlib.Path(soap_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
HEAVY = {"altair", "matplotlib", "pandas", "scipy", "sklearn", "tensorflow", "tensorflow_datasets"}


def module_name(file):
    """`soap_jax/study/charts.py` is `soap_jax.study.charts`."""
    return ".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): ast.parse(file.read_text()) for file in FILES}


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes_of(node):
    """Every node below, functions' bodies included, but for what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            yield child
            yield from nodes_of(child)


def imports_of(name):
    """The modules that one of ours imports: ours by their full names, others' by the top's."""
    is_package = (ROOT.parent / pathlib.Path(*name.split("."), "__init__.py")).exists()
    found = set()
    for node in nodes_of(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")[: len(name.split(".")) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            below = {f"{base}.{alias.name}" for alias in node.names}
            found |= (below & MODULES.keys()) or {base}
    return {n if n.split(".")[0] == "soap_jax" else n.split(".")[0] for n in found} - {name}


IMPORTS = {name: imports_of(name) for name in MODULES}


def everything_below(name):
    """What importing a module may load: its imports, and theirs, as far as they are ours."""
    seen, queue = set(), [name]
    while queue:
        for found in IMPORTS.get(queue.pop(), set()) - seen:
            seen.add(found)
            queue.append(found)
    return seen


PARTS = ("training", "data", "linen", "nnx", "tasks", "study", "study.methods", "study.preset")


def test_importing_loads_nothing_heavy():
    names = ["soap_jax", *(f"soap_jax.{part}" for part in PARTS)]
    script = f"""
import importlib, json, sys
loaded = {{}}
for name in {[name for name in names if name in MODULES]!r}:
    importlib.import_module(name)
    loaded[name] = [heavy for heavy in {sorted(HEAVY)!r} if heavy in sys.modules]
print(json.dumps(loaded))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = json.loads(ran.stdout)
    assert set(loaded) >= {"soap_jax", "soap_jax.linen", "soap_jax.nnx"}
    assert not any(loaded.values()), loaded


PUBLIC = [(package, name) for package in (soap_jax, study) for name in package.__all__]


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=lambda x: getattr(x, "__name__", x))
def test_public_names_resolve(package, name):
    value = getattr(package, name)
    if f"{package.__name__}.{name}" in MODULES:
        assert value is importlib.import_module(f"{package.__name__}.{name}")
    assert value.__doc__


@pytest.mark.parametrize("package", [soap_jax, study], ids=["soap_jax", "study"])
def test_public_names_are_listed_once_and_others_are_unknown(package):
    assert len(set(package.__all__)) == len(package.__all__)
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match=f"'{package.__name__}' has no attribute 'no_such"):
        package.no_such_name  # noqa: B018


def test_the_study_and_its_tasks_are_public():
    assert {"study", "tasks"} <= set(soap_jax.__all__)
    assert {"Task", "Method", "METHODS", "compare", "Comparison", "load"} <= set(study.__all__)


CORE = ["ops", "trees", "rules", "feedback", "transform", "training", "activity", "direct"]
CORE += ["initializers", "local", "metrics", "optimizers", "perturbation", "recording", "temporal"]


def test_version_stands_in_one_place():
    with (ROOT.parent / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    assert "version" in project["project"]["dynamic"]
    path = project["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{soap_jax.__version__}"' in (ROOT.parent / path).read_text()
    assert f"version: {soap_jax.__version__}\n" in (ROOT.parent / "CITATION.cff").read_text()


@pytest.mark.parametrize("name", CORE)
def test_core_knows_no_layers_of_flax(name):
    below = everything_below(f"soap_jax.{name}") | {f"soap_jax.{name}"}
    assert below - {f"soap_jax.{name}"}
    assert not below & {"soap_jax.linen", "soap_jax.nnx", "soap_jax.models"}
    ours = {module for module in below if "flax" in IMPORTS.get(module, ())}
    assert ours <= {"soap_jax.feedback"}  # whose states Flax can serialise


def test_of_flax_a_state_needs_the_serialisation_alone():
    tree = MODULES["soap_jax.feedback"]
    lines = [ast.unparse(node) for node in nodes_of(tree) if isinstance(node, ast.ImportFrom)]
    assert [line for line in lines if "flax" in line] == ["from flax import serialization"]


def test_the_transform_knows_no_rules_but_for_the_type_of_their_state():
    for part in ("labels", "values", "tracing", "nested", "reader"):
        assert not everything_below(f"soap_jax.transform.{part}") & {
            "soap_jax.rules", "soap_jax.feedback"
        }  # fmt: skip


def test_ops_knows_nothing_of_rules_or_states():
    assert not everything_below("soap_jax.ops") & {"soap_jax.rules", "soap_jax.feedback"}


def test_linen_and_nnx_never_import_each_other():
    assert "soap_jax.nnx" not in everything_below("soap_jax.linen")
    assert "soap_jax.linen" not in everything_below("soap_jax.nnx")


def test_nothing_imports_the_command_line():
    importers = [name for name, found in IMPORTS.items() if "soap_jax.cli" in found]
    assert not [name for name in importers if not name.endswith("__main__")]


def test_only_the_command_line_imports_the_study():
    def is_study(name):
        return name.startswith("soap_jax.study")

    importers = {name for name, found in IMPORTS.items() if any(map(is_study, found))}
    assert not {n for n in importers if not is_study(n)} - {"soap_jax.cli", "soap_jax.__main__"}


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downwards_only(name):
    assert name not in everything_below(name)


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name):
    def without(node, path):
        if not ast.get_docstring(node):
            yield path
        for child in node.body:
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            if isinstance(child, kinds) and not child.name.startswith("_"):
                if isinstance(child, ast.ClassDef):
                    yield from without(child, f"{path}.{child.name}")
                elif not ast.get_docstring(child):
                    yield f"{path}.{child.name}"

    assert list(without(MODULES[name], name)) == []


@pytest.mark.parametrize("name", MODULES)
def test_only_the_command_line_prints(name):
    calls = [node for node in nodes_of(MODULES[name]) if isinstance(node, ast.Call)]
    prints = [call.lineno for call in calls if ast.unparse(call.func) == "print"]
    assert not prints or name in ("soap_jax.cli", "soap_jax.__main__")
