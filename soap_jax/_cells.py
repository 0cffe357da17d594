"""Analysis of a recurrent cell: its recurrent kernels, and its dependences between units.

One step `(params, state, x) -> state` is traced, with its backward pass, but not executed.
`soap_jax.transform` finds the kernels through which an error of the state passes. With these
kernels cut, its module `units` finds whether the step is elementwise in the units, and on which
unit each entry of a param acts. `soap_jax.temporal` uses the result for its traces.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from soap_jax import trees
from soap_jax.transform import explanation, tracing, units, with_feedback
from soap_jax.transform import values as vals


class State:
    """The names of a state's leaves, and which of them are floating point."""

    def __init__(self, state):
        leaves, self.tree = jax.tree.flatten(state)
        self.names = list(trees.named(state))
        self.floats = [vals.inexact(leaf) for leaf in leaves]

    def split(self, state) -> tuple[dict[str, Any], list[Any]]:
        """Returns the floating-point leaves by name, and a list of the others."""
        leaves = list(zip(self.names, self.floats, jax.tree.leaves(state), strict=True))
        rest = [leaf for _, is_float, leaf in leaves if not is_float]
        return {name: leaf for name, is_float, leaf in leaves if is_float}, rest

    def join(self, floats, rest):
        """Puts the results of `split` together again."""
        left = iter(rest)
        pairs = zip(self.names, self.floats, strict=True)
        leaves = [floats[name] if is_float else next(left) for name, is_float in pairs]
        return jax.tree.unflatten(self.tree, leaves)


def called(cell, params, state, x):
    """Calls the cell; returns its new state and output, or raises if the state's type changes."""
    out = cell(params, state, x)
    tree: Any = jax.tree.structure(state)
    if jax.tree.structure(out) == tree:
        new, output = out, out
    elif isinstance(out, tuple) and len(out) == 2 and jax.tree.structure(out[0]) == tree:
        new, output = out
    else:
        raise ValueError(
            f"the cell returned {jax.tree.structure(out)}; expected a state of the same structure "
            f"as its input state, {tree}, or a pair (state, output)."
        )
    for (keys, old), leaf in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(new), strict=True
    ):
        types = [f"{jnp.result_type(a)}{list(jnp.shape(a))}" for a in (old, leaf)]
        if types[0] != types[1]:
            raise ValueError(
                f"the cell's state {_shown(keys)} was {types[0]} before the step and is "
                f"{types[1]} after it; expected the same shape and dtype, for one example."
            )
    return new, output


def _shown(keys) -> str:
    return "".join(f"[{name!r}]" for name in trees.path_of(keys)) or "(one array)"


def _types(tree, axes=0):
    """The types of a tree's arrays, without their first axes and without shardings."""

    def one(x):
        dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
        return jax.ShapeDtypeStruct(jnp.shape(x)[axes:], dtype)

    return jax.tree.map(one, tree)


def _check_state(state):
    keyed = jax.tree_util.tree_leaves_with_path(state)
    sizes = {jnp.shape(leaf)[:1] for _, leaf in keyed}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"the state has leaves of shapes {[jnp.shape(leaf) for _, leaf in keyed]}; expected "
            "(batch, units), with the same batch size in all of them."
        )
    for keys, leaf in keyed:
        if vals.inexact(leaf) and jnp.ndim(leaf) != 2:
            raise ValueError(
                f"the state {_shown(keys)} has shape {jnp.shape(leaf)}; expected (batch, "
                "units). Keep a state with more axes flat, and reshape it inside the cell."
            )
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise ValueError(
                f"the state {_shown(keys)} is complex; expected two real states, its real and "
                "imaginary parts (combine them in the cell with jax.lax.complex)."
            )


# Params by name and path


def _differentiated(params) -> dict[str, Any]:
    named = trees.named(params).items()
    return {p: leaf for p, leaf in named if tracing.is_array(leaf) and vals.inexact(leaf)}


def replaced(params, leaves):
    """Returns params with the leaves in `leaves` replaced, by name."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: leaves.get("/".join(trees.path_of(keys)), leaf), params
    )


def placed(params, feedback):
    """Puts feedback by path into a tree like params."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: feedback.get(trees.path_of(keys)), params
    )


def zeros(params, paths):
    """Makes feedback of zeros, by path."""
    keyed = jax.tree_util.tree_leaves_with_path(params)
    found = {trees.path_of(keys): leaf for keys, leaf in keyed}
    return {path: jnp.zeros_like(found[path]) for path in sorted(paths)}


# The analysis


class Plan(NamedTuple):
    """The result of the analysis of a cell's step.

    Attributes:
        number: the number of units, by floating-point state variable.
        jacobian: pairs of state variables (new, old) whose D is not zero.
        direct: by state variable, the params whose M is not zero.
        axes: by state variable with traces, the params of its traces, with their axis of units.
        cut: the kernels that are cut in the traces, through which no error passes.
        recurrent: the kernels that are cut in the learning signal too.
    """

    number: dict[str, int]
    jacobian: frozenset[tuple[str, str]]
    direct: dict[str, frozenset[str]]
    axes: dict[str, dict[str, int]]
    cut: frozenset[trees.Path]
    recurrent: frozenset[trees.Path]


def read(cell, where, params, state, x) -> Plan:
    """Analyses the cell's program: finds its recurrent kernels, D and M."""
    _check_state(state)
    state, x = _types((state, x), 1)  # of one example
    passed, lost = _passed(cell, params, state, x)
    recurrent = frozenset(trees.select(params, where)) if where is not None else passed
    cut = passed | recurrent
    layout = State(state)
    floats, rest = layout.split(state)
    mine = _differentiated(params)

    def step(params, floats, rest, x):
        new, output = called(cell, params, layout.join(floats, rest), x)
        return layout.split(new)[0], [o for o in jax.tree.leaves(output) if vals.inexact(o)]

    def forward(mine, beside, floats, rest, x):
        beside = placed(params, beside)
        return with_feedback(step)(replaced(params, mine), beside, floats, rest, x)

    program = _Backward(forward, mine, zeros(params, cut), floats, rest, x)
    number = {q: leaf.shape[0] for q, leaf in floats.items()}
    jacobian, direct = set(), {}
    for q in floats:
        one_hot = {r: units.Local(0, number[q]) if r == q else "zero" for r in floats}
        direct[q], old = program.read("zero", (one_hot, "zero"))
        for r, label in old.items():
            if not units.depends(label):
                continue
            if label != units.Local(0, number[q]) or number[r] != number[q]:
                raise ValueError(_not_elementwise(q, r, label, lost))
            jacobian.add((q, r))
    seen = {path: "zero" if path in recurrent else "free" for path in cut}
    _, old = program.read(seen, ("zero", units.Mixed("the cell's output", "")))
    carried = {r for _, r in jacobian} | {r for r, label in old.items() if units.depends(label)}
    axes: dict[str, dict[str, int]] = {q: {} for q in floats if q in carried}
    for q in axes:
        for name, label in direct[q].items():
            if isinstance(label, units.Mixed):
                raise ValueError(_not_local(name, q, label))
            if isinstance(label, units.Local):
                axes[q][name] = label.axis
    for _ in axes:
        for q, r in jacobian:
            for name, axis in axes[r].items():
                if q in axes and axes[q].setdefault(name, axis) != axis:
                    raise ValueError(_not_local(name, q, None))
    return Plan(
        number,
        frozenset(jacobian),
        {q: frozenset(n for n in axes[q] if units.depends(direct[q][n])) for q in axes},
        axes,
        cut,
        recurrent,
    )


class _Backward:
    """The program of a function's vjp by its first and third argument, to analyse with labels."""

    def __init__(self, fun, *args):
        def backward(args, bars):
            params, beside, floats, *others = args
            _, vjp = jax.vjp(lambda p, f: fun(p, beside, f, *others), params, floats)
            return vjp(bars)

        args = _types(args)
        self.args = args, jax.eval_shape(fun, *args)
        self.closed, out = jax.make_jaxpr(backward, return_shape=True)(*self.args)
        self.out = jax.tree.structure(out)

    def read(self, beside, bars):
        """Returns the labels of params and floats, given labels of `beside` and the cotangents."""
        others = ["free"] * (len(self.args[0]) - 2)
        labels = jax.tree.broadcast((("free", beside, *others), bars), self.args)
        return jax.tree.unflatten(self.out, units.read(self.closed, jax.tree.leaves(labels)))


def _passed(cell, params, state, x) -> tuple[frozenset[trees.Path], str]:
    """The kernels through which an error of the state passes in a product; and a broken use."""

    def step(params, state, x):
        return called(cell, params, state, x)[0]

    traced = tracing.trace(step, params, (state, x), {})
    first = traced.num_hoisted + sum(path is not None for path in traced.paths)
    of_state = range(first, first + len(jax.tree.leaves(state)))
    active = [i in of_state for i in range(len(traced.paths))]
    kernels = [
        i for i in range(traced.num_hoisted, first) if vals.inexact(traced.operands[i])
    ]  # treat every floating-point param as if it had feedback
    found = explanation.read(traced, kernels, active)
    passed, lost = set(), []
    for i in kernels:
        path, note = traced.paths[i] or (), found.note(i)
        if any(use.primitive not in explanation.ELEMENTWISE for use in note.served):
            passed.add(path)
        lost += [f"{trees.show(path)} in {use}, {use.problem}" for use in note.broken]
    return frozenset(passed), "; ".join(lost[:1])


def check_wired(plan, signal, params, feedback, floats, others):
    """Raises ValueError if a param has no learning signal only because kernels are cut."""
    if not plan.recurrent:
        return

    def forward(mine, beside, floats, *others):
        beside = placed(params, beside)
        return signal(replaced(params, mine), beside, floats, *others)[0]

    mine = _differentiated(params)
    beside = feedback | zeros(params, plan.recurrent)
    program = _Backward(forward, mine, beside, floats, *others)
    bar = units.Mixed("the loss", "")
    whole, _ = program.read("free", bar)
    cut = {path: "zero" if path in plan.recurrent else "free" for path in beside}
    present, old = program.read(cut, bar)
    reached = {p for p, label in present.items() if units.depends(label)}
    reached |= {p for q, axes in plan.axes.items() if units.depends(old[q]) for p in axes}
    silent = [p for p, label in whole.items() if units.depends(label) and p not in reached]
    if silent:
        kernels = ", ".join(sorted(map(trees.show, plan.recurrent)))
        raise ValueError(
            f"the param {silent[0]!r} gets no learning signal: within one step its error would "
            f"have to pass through a recurrent kernel, one of {kernels}. If one of them is not "
            "recurrent, but leads from one layer to the next, select the recurrent kernels with "
            "`where`. If the param should not learn, use jax.lax.stop_gradient."
        )


def _not_elementwise(new, old, label, lost) -> str:
    where = f"{label}" if isinstance(label, units.Mixed) else "a change of layout"
    return (
        f"the cell's state {new!r} does not depend on {old!r} unit by unit: {where} combines "
        "several units, so a trace of each param's size is not enough. Expected recurrent kernels "
        "that are params and go directly into a product"
        + (f" (not so: {lost})" if lost else "")
        + "; and no op across units, such as a norm of the state."
    )


def _not_local(name, variable, label) -> str:
    where = f" (combined by {label})" if label else ""
    return (
        f"an entry of the param {name!r} acts on several units of the state {variable!r}{where}, "
        "so a trace of the param's size is not enough. Expected one unit for each entry, along one "
        "axis of length units, or of several gates one after the other. Give each unit its own "
        "entry; move the param out of the cell (such as an encoder of the input); or stop its "
        "gradient in the cell (jax.lax.stop_gradient)."
    )
