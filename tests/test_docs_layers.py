"""The table of docs/methods.md says truly which methods train which layers."""

import math
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import soap_jax
from soap_jax import data, initializers, metrics, rules, tasks, temporal, trees
from soap_jax.study import METHODS, trial
from soap_jax.study.methods import check_fits, resolve

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "methods.md").read_text()
SECTION = PAGE.split("## Which layers")[1].split("\n## ")[0]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in SECTION.splitlines()
    if line.startswith("| `")
]
CELLS = {name: cells for names, *cells in ROWS for name in re.findall(r"`(\w+)`", names)}
KINDS = ("dense layers", "convolutions", "attention", "recurrent cells")
TINY = {"optimizer": optax.sgd, "batch_size": 4, "steps": 1, "evaluations": 1}


def make_task(kind, directory):
    if kind == "dense layers":
        return tasks.mlp(2, 8)
    if kind == "convolutions":
        return tasks.small_conv(data.load("digits"), channels=(2, 3))
    if kind == "recurrent cells":
        return tasks.delayed_cue(4, units=4, batch_size=4)
    text = directory / "text.txt"
    text.write_text("the cat sat on the mat. " * 200)
    return tasks.char_lm(text, model=tasks.Transformer(1, 8, 2, 16), batch_size=4)


def trace(task, name):
    """Traces one step of a method, without compiling it."""
    method = resolve([name])[name]
    check_fits(task, name, method)
    params, arrays = task.init(jax.random.key(0)), trial.data_of(task)
    batch = task.train(jax.random.key(0)) if task.generated else arrays["train"]
    made = trial.make(task, (method,), trial.layers_of(task, params, None, batch), **TINY)

    def step(arrays):
        state, plan = made.init(0, 0.1, 1, 0, arrays)
        return made.step(state, plan, 0.1, 0, arrays, 0)

    return jax.eval_shape(step, arrays)


def test_the_table_has_every_method_of_the_registry_once():
    assert SECTION.count("| method in a study | " + " | ".join(KINDS) + " |") == 1
    names = [name for names, *_ in ROWS for name in re.findall(r"`(\w+)`", names)]
    assert sorted(names) == sorted(METHODS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_every_method_is_built_or_refused_as_the_table_says(kind, tmp_path):
    task = make_task(kind, tmp_path)
    untapped = tasks.Task(task.init, task.loss, task.train)
    for name, cells in CELLS.items():
        said = cells[KINDS.index(kind)]
        if said in ("taps", "own gradient", "no"):
            with pytest.raises(ValueError, match="which a task does not provide"):
                trace(task, name)
            continue
        assert said in ("yes", "named values"), f"{name}, {kind}: {said}"
        state, loss = trace(task, name)
        assert loss.shape == () and state.train.params
        if said == "named values":
            with pytest.raises(ValueError, match="the task names none"):
                trace(untapped, name)


@pytest.mark.parametrize("shape", [(288, 64), (3, 3, 32, 64)], ids=["dense", "convolution"])
def test_weight_mirror_aligns_a_convolution_as_a_dense_layer(shape):
    params = {"layer": {"kernel": 0.05 * jax.random.normal(jax.random.key(0), shape)}}
    rule = rules.WeightMirror()
    state = soap_jax.init_feedback(jax.random.key(1), params, rule, where="layer/*")
    steps = jnp.arange(500)
    state, _ = jax.lax.scan(lambda s, i: (soap_jax.sync_feedback(params, s, i), None), state, steps)
    (angle,) = trees.named(metrics.weight_angle(params, state.feedback)).values()
    expected = math.degrees(math.atan(math.sqrt(0.01 * 288 / (2 * 64))))
    assert abs(float(angle) - expected) < 0.5


def test_glorots_size_counts_heads_as_a_window():
    key = jax.random.key(0)
    matrix, heads = (
        rules.SignSync(magnitude="glorot")(jnp.ones(shape), jnp.ones(shape), key).max()
        for shape in ((64, 64), (64, 4, 16))
    )
    assert "3.2 times, with 64 inputs and 4 heads of 16" in " ".join(SECTION.split())
    assert round(float(matrix / heads), 1) == 3.2


@pytest.mark.parametrize("cell", [nn.OptimizedLSTMCell(6), nn.GRUCell(6), nn.ConvLSTMCell(3, (3,))])
def test_rflo_takes_cells_of_units_and_refuses_feature_maps(cell):
    features = (5, 2) if isinstance(cell, nn.ConvLSTMCell) else (2,)
    key = jax.random.key(0)
    one = cell.initialize_carry(key, features)
    params = {"cell": cell.init(key, one, jnp.ones(features))["params"]}
    start = jax.tree.map(lambda leaf: jnp.zeros((4, *leaf.shape)), one)
    output = jax.tree.leaves(one)[-1].shape
    params["out"] = jax.random.normal(key, (output[-1], 2))
    grad_fn = temporal.value_and_grad(
        lambda params, h, x: cell.apply({"params": params["cell"]}, h, x),
        lambda params, h, target: jnp.mean((h @ params["out"] - target) ** 2),
    )
    xs = jax.random.normal(key, (3, 4, *features))
    args = params, {"out": -params["out"]}, start, xs, jnp.ones((3, 4, *output[:-1], 2))
    if isinstance(cell, nn.ConvLSTMCell):
        with pytest.raises(ValueError, match=r"expected \(batch, units\)"):
            grad_fn(*args)
        return
    _, grads = jax.eval_shape(grad_fn, *args)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


def test_weight_matching_refuses_convolutions():
    with pytest.raises(ValueError, match="expected matrices"):
        initializers.match_projections([jnp.ones((3, 3, 2, 4)), jnp.ones((4, 10))])
