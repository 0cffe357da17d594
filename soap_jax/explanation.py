"""`explain`: which kernels feedback serves, found out before a run.

The function is walked twice, without any arithmetic. The first walk finds the params that meet
data in a product: the kernels, whatever their names. The second gives each of them feedback and
takes the gradient, with an observer on every operand that a kernel meets: whether a cotangent
arrives there is what JAX's own differentiation says, not a guess.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

from soap_jax import ops, trees, walk
from soap_jax import twins as tw
from soap_jax.twins import Use

Effect = Literal["feedback", "own feedback", "backprop", "no effect", "error"]


@dataclasses.dataclass(frozen=True)
class Row:
    """What feedback does for one kernel.

    Attributes:
        path: the kernel's path in params.
        effect: "feedback": the error goes back through it; "own feedback": through that of a layer
            of `soap_jax.linen`, `soap_jax.nnx` or an op of `soap_jax.ops`; "backprop": through the
            kernel itself; "no effect": no error is sent back here, since nobody asks for it (a
            first layer); "error": `with_feedback` refuses this feedback.
        uses: the products and, for "error" and "backprop", what stands in the way.
        shape: of the kernel, and of its feedback.
        dtype: of the kernel.
        nbytes: of the feedback, if there is any to be stored.
    """

    path: trees.Path
    effect: Effect
    uses: tuple[Use, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found: a table to print, and a `where` for `init_feedback`.

    Attributes:
        rows: one for each kernel.
        others: the other floating-point leaves (biases, scales, tables), whose gradients are exact,
            by path, with the primitive that uses them first, or "unused".

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from soap_jax import explain, init_feedback
        >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2)), "c": jnp.ones(2)}
        >>> def loss(params, x):
        ...     return (jnp.tanh(x @ params["a"]) @ params["b"]).sum() + params["c"].sum()
        >>> explanation = explain(loss, params, jnp.ones((5, 3)))
        >>> [(row.path, row.effect) for row in explanation]
        [(('a',), 'no effect'), (('b',), 'feedback')]
        >>> state = init_feedback(jax.random.key(0), params, where=explanation)
        >>> jax.tree.map(jnp.shape, state.feedback)
        {'a': None, 'b': (4, 2), 'c': None}
    """

    rows: tuple[Row, ...]
    others: Mapping[trees.Path, str]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, path: str) -> Row:
        """The row of a kernel, by its path as it is printed, "Dense_1/kernel"."""
        rows = {"/".join(row.path): row for row in self.rows}
        if path not in rows:
            raise KeyError(
                f"{path!r} is none of the kernels: {', '.join(rows) or 'there are none'}"
            )
        return rows[path]

    def __call__(self, path: str, leaf: jax.Array) -> bool:
        """Whether feedback serves the kernel at the path: a predicate for `init_feedback`."""
        return any("/".join(row.path) == path and row.effect == "feedback" for row in self.rows)

    def __str__(self) -> str:
        return _table(self)


def explain(
    fun: Callable,
    params: chex.ArrayTree,
    *args,
    feedback: chex.ArrayTree | None = None,
    has_aux: bool = False,
    **kwargs,
) -> Explanation:
    """Says for every kernel of a function how its error is sent back under `with_feedback`.

    Its `effect` is

        "feedback"      the error goes back through its feedback
        "own feedback"  the same, of a layer of `soap_jax` that has feedback of its own
        "backprop"      the error goes back through the kernel itself; the uses say why
        "no effect"     no error is sent back here: a first layer, whose input is data
        "error"         `with_feedback` refuses the feedback that it has

    Nothing is computed: `fun` is traced with the types of its arguments, and so is its gradient by
    `params`, with a cotangent for every output, or with `has_aux` for the first alone.

    Args:
        fun: `(params, *args, **kwargs) -> outputs`, as for `with_feedback`.
        params: its params; like `args`, arrays or `jax.ShapeDtypeStruct`s.
        *args: its other arguments.
        feedback: the feedback tree of which to ask. Without one: what feedback for all kernels
            would do.
        has_aux: whether `fun` returns `(outputs, aux)`, as in `jax.grad`.
        **kwargs: its keyword arguments.

    Returns:
        The explanation. Print it; or hand it to `init_feedback` as `where`, so that just the
        kernels whose effect is "feedback" get any.

    Raises:
        ValueError: if feedback does not fit `params`.
    """
    given = None if feedback is None else trees.by_kernel(params, feedback)
    leaves = {
        trees.path_of(keys): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(params)
        if _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    }

    found = walk.Walk(lambda x, use: x, lookup=True)
    _trace(
        lambda *a, **k: found(fun, a[0], _twins(a[0], leaves), *a[1:], **k), params, args, kwargs
    )
    kernels = {path for use in found.uses if not use.problem for path in use.paths}
    kernels |= set(given or ())
    apart = {  # weights that meet no activation in a product: matrices, other than biases, tables
        path: use._replace(problem="which is exact, as in backprop")
        for path, use in found.activations.items()
        if len(leaves[path].shape) > 1 and use.primitive not in ("add", "add_any", "sub", "gather")
    }
    named = (path for path in leaves if path[-1:] and path[-1] in trees.KERNEL_NAMES)
    kernels |= {path for path in named if len(leaves[path].shape) > 1}

    flows: set[Use] = set()

    def observe(x, use):
        return tw.on_cotangent(x, lambda: flows.add(use))

    second = walk.Walk(observe)

    def gradient(params, *args, **kwargs):
        inexact, rebuild = _inexact(params)

        def outputs(inexact):
            params = rebuild(inexact)
            out = second(fun, params, _twins(params, kernels), *args, **kwargs)
            return _inexact(out[0] if has_aux else out)[0]

        out, vjp = jax.vjp(outputs, inexact)
        return vjp([jnp.ones_like(x) for x in out])

    _trace(gradient, params, args, kwargs)
    rows = tuple(
        _row(path, leaf, [use for use in second.uses if path in use.paths], flows, given)
        if path in kernels
        else Row(path, "backprop", (apart[path],), tuple(leaf.shape), leaf.dtype, 0)
        for path, leaf in leaves.items()
        if path in kernels or path in apart
    )
    others = {
        path: found.activations[path].primitive if path in found.activations else "unused"
        for path in leaves
        if path not in kernels and path not in apart
    }
    return Explanation(rows, others)


def _row(path, leaf, uses, flows, given):
    """Draws the conclusion for one kernel."""
    products = [use for use in uses if not use.problem]
    obstacles = [use for use in uses if use.problem and (use in flows or not products)]
    asked = given is None or path in given
    effect: Effect
    if own := [use for use in products if use.primitive == ops.SCOPE]:
        products = own
        effect = "own feedback" if not flows.isdisjoint(own) else "no effect"
        if given and asked:
            effect = "error"
    elif obstacles or not products:
        effect = "error" if given and asked else "backprop" if uses else "no effect"
    elif not flows.isdisjoint(products):
        effect = "feedback" if asked else "backprop"
    else:
        effect = "no effect"
    stored = effect == "feedback" if given is None else asked
    dtype = leaf.dtype if given is None or not asked else given[path].dtype
    nbytes = math.prod(leaf.shape) * dtype.itemsize if stored else 0
    uses = tuple(dict.fromkeys([*products, *obstacles]))
    return Row(path, effect, uses, tuple(leaf.shape), leaf.dtype, nbytes)


def _twins(params, paths):
    """Kernels as their own feedback, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {trees.path_of(keys): leaf for keys, leaf in leaves if trees.path_of(keys) in paths}


def _is_array(leaf) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _inexact(tree):
    """The leaves that have a gradient, and a function that puts others in their places."""
    leaves, structure = jax.tree.flatten(tree)
    mine = [_is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def rebuild(new):
        new = iter(new)
        out = [next(new) if m else x for m, x in zip(mine, leaves, strict=True)]
        return jax.tree.unflatten(structure, out)

    return [leaf for m, leaf in zip(mine, leaves, strict=True) if m], rebuild


def _trace(fun, params, args, kwargs):
    """Traces `fun` with the arrays among its arguments; the others stay what they are."""
    leaves, structure = jax.tree.flatten((params, args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if _is_array(leaf)}

    def traced(arrays):
        given = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        params, args, kwargs = jax.tree.unflatten(structure, given)
        fun(params, *args, **kwargs)

    jax.eval_shape(traced, arrays)


def _short(path):
    """The last name of a path, or all of it where that is an index."""
    return "/".join(path) if path[-1].isdecimal() else path[-1]


def _shape(operand: jax.ShapeDtypeStruct) -> str:
    return "×".join(map(str, operand.shape)) or "scalar"


def _table(explanation: Explanation) -> str:
    from rich import box, console, filesize, table, text  # here, since importing it takes a while

    grid = table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("kernel", "effect", "product", "operands"):
        grid.add_column(column, no_wrap=True)
    grid.add_column("feedback", justify="right", no_wrap=True)
    notes = []
    for row in explanation:
        path = "/".join(row.path)
        products = [use for use in row.uses if not use.problem]
        names = [f"{use.primitive}" for use in products[:1]]
        operands = [" · ".join(map(_shape, use.operands)) for use in products[:1]]
        if len(products) > 1:
            operands.append(f"and {len(products) - 1} more")
        stored = filesize.decimal(row.nbytes) if row.nbytes else "-"
        cells = path, row.effect, *("\n".join(lines) or "-" for lines in (names, operands)), stored
        grid.add_row(*map(text.Text, cells))
        notes += [f"{path}: {use}, {use.problem}." for use in row.uses if use.problem]
    file = io.StringIO()
    printer = console.Console(file=file, width=200, color_system=None)
    printer.print(grid)
    effects = [row.effect for row in explanation]
    counts = ", ".join(f"{effects.count(effect)} {effect}" for effect in dict.fromkeys(effects))
    stored = filesize.decimal(sum(row.nbytes for row in explanation))
    number = f"{len(explanation)} kernel{'s' if len(explanation) != 1 else ''}"
    lines = [f"{number}: {counts or 'none'}; {stored} of feedback."]
    others = explanation.others.items()
    kinds = collections.Counter(f"{_short(keys)} ({primitive})" for keys, primitive in others)
    if kinds:
        kinds_text = ", ".join(f"{times} {kind}" for kind, times in kinds.items())
        lines.append(f"No kernels, exact gradients: {kinds_text}.")
    shown = [line.rstrip() for line in file.getvalue().splitlines() if line.strip()]
    shown.append("")
    for line in [*lines, *notes]:
        shown += textwrap.wrap(line, max(80, len(shown[0])), break_long_words=False)
    return "\n".join(shown)
