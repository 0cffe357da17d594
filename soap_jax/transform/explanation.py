"""`explain`: the effect of feedback on every param, without running the function.

The program that `with_feedback` evaluates is analysed without computing anything, as if every param
had feedback. The explanation consists of the reader's notes: where an error is multiplied by a
param's feedback, and where it would be multiplied by weights that have none. Both functions use the
same reader, so they agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from soap_jax import dtypes, trees
from soap_jax.transform import labels as lb
from soap_jax.transform import reader, table, tracing
from soap_jax.transform import values as vals
from soap_jax.transform.reader import Use

Effect = Literal["feedback", "own feedback", "backprop", "not needed", "no effect", "error"]

Gradient = Literal["exact", "direct", "mixed", "none"]


@dataclasses.dataclass(frozen=True)
class Row:
    """The effect of feedback on one param.

    Attributes:
        path: the param's path in params.
        effect: one of the effects that `explain` lists.
        uses: the places where it is used with this effect; for "error" and "backprop", also the
            problem there.
        shape: the shape of the param, and of its feedback.
        dtype: the dtype of the param.
        stored: the dtype in which feedback is stored.
        used: the dtype in which feedback is used: the dtype of the operand in the product, or
            earlier if it is masked or scaled before; of several, the widest.
        nbytes: the size of the feedback that is stored, or 0.
        gradient: how errors reach the param, whatever its feedback: "exact", as in JAX's gradient
            of `fun`; "direct", by direct feedback; "mixed", by both; or "none".
    """

    path: trees.Path
    effect: Effect
    uses: tuple[Use, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    stored: np.dtype
    used: np.dtype
    nbytes: int
    gradient: Gradient


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The result of `explain`: a table to print, and a `where` for `init_feedback`.

    Attributes:
        rows: one row for each floating-point param, in order of first use.
        has_data: whether the function has an array argument besides its params.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from soap_jax import explain, init_feedback
        >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2)), "c": jnp.ones(2)}
        >>> def loss(params, x):
        ...     return (jnp.tanh(x @ params["a"]) @ params["b"]).sum() + params["c"].sum()
        >>> explanation = explain(loss, params, jnp.ones((5, 3)))
        >>> [(row.path, row.effect) for row in explanation]
        [(('a',), 'no effect'), (('b',), 'feedback'), (('c',), 'not needed')]
        >>> state = init_feedback(jax.random.key(0), params, where=explanation)
        >>> jax.tree.map(jnp.shape, state.feedback)
        {'a': None, 'b': (4, 2), 'c': None}
    """

    rows: tuple[Row, ...]
    has_data: bool = True

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, path: str) -> Row:
        """Returns the row of a param, by its path as printed, such as "Dense_1/kernel"."""
        rows = {"/".join(row.path): row for row in self.rows}
        if path not in rows:
            raise KeyError(
                f"{path!r} is not a param; expected one of: {', '.join(rows) or '(no params)'}"
            )
        return rows[path]

    def __call__(self, path: str, leaf: jax.Array) -> bool:
        """Whether the effect at the path is "feedback": a predicate for `init_feedback`."""
        return any("/".join(row.path) == path and row.effect == "feedback" for row in self.rows)

    def __str__(self) -> str:
        return table.render(self)


def explain(
    fun: Callable,
    params: chex.ArrayTree,
    *args,
    feedback: chex.ArrayTree | None = None,
    has_aux: bool = False,
    **kwargs,
) -> Explanation:
    """Finds the effect of feedback on every param of a function under `with_feedback`.

    The `effect` of a param is one of

        "feedback"      the error is multiplied by its feedback
        "own feedback"  the same, for a `soap_jax` layer with feedback of its own
        "backprop"      the error is multiplied by the param itself; the uses say why
        "not needed"    it multiplies no error: a bias, a table, a penalty, a norm used as a number
        "no effect"     no error passes through it: a first layer, whose input is data
        "error"         `with_feedback` refuses its feedback

    For functions with direct feedback (`with_direct_feedback`, `direct_feedback`, or layers that
    use it), the `gradient` of a param is one of

        "direct"        by direct feedback
        "mixed"         by direct feedback, and by an error on a path around it
        "exact"         as in JAX's gradient of the function
        "none"          no error reaches the param: it does not learn

    A param that only scales activations elementwise (in a normalisation or a gate) is "backprop",
    unless you name it in `where`; then `with_feedback` gives it feedback.

    Nothing is computed. `fun` and its gradient by `params` are traced with the types of the
    arguments, with a cotangent for every output, or for the first output only with `has_aux`.

    Args:
        fun: `(params, *args, **kwargs) -> outputs`, as for `with_feedback`.
        params: the params of `fun`; like `args`, arrays or `jax.ShapeDtypeStruct`s.
        *args: the other arguments of `fun`.
        feedback: the feedback tree to explain. By default every param is explained as if it had
            feedback.
        has_aux: whether `fun` returns `(outputs, aux)`, as in `jax.grad`.
        **kwargs: the keyword arguments of `fun`.

    Returns:
        The explanation. Print it, or pass it to `init_feedback` as `where`, so that only kernels
        with the effect "feedback" get feedback.

    Raises:
        ValueError: if feedback does not fit `params`.
    """
    given = {} if feedback is None else trees.by_kernel(params, feedback)
    traced = tracing.trace(fun, params, args, kwargs)
    inexact = [vals.inexact(x) for x in traced.operands]
    leaves = [i for i, path in enumerate(traced.paths) if path is not None and inexact[i]]
    active = [path is not None for path in traced.paths]
    found = read(traced, leaves, active, has_aux=has_aux)
    if feedback is None:
        rows = {i: _row(found.note(i)) for i in leaves}
    else:
        mine = [i for i in leaves if traced.paths[i] in given]
        asked = read(traced, mine, active, has_aux=has_aux)
        rows = {i: _given(asked.note(i)) if i in mine else _kept(found.note(i)) for i in leaves}
    order = {i: None for i in [*(i for i in found.notes if found.notes[i].first), *leaves]}
    return Explanation(
        tuple(
            _finished(
                traced.operands[i],
                traced.paths[i],
                *rows[i],
                found.note(i).used,
                given,
                feedback is None,
                _gradient(i, found.ways),
            )
            for i in order
        ),
        has_data=any(path is None for path in traced.paths[traced.num_hoisted :]),
    )


def read(
    traced: tracing.Traced, kernels: Sequence[int], active: Sequence[bool], *, has_aux: bool = False
) -> reader.Reader:
    """Analyses the derivative of the live outputs by the active operands.

    Args:
        traced: the function.
        kernels: the operands that are kernels with feedback.
        active: by operand, whether to differentiate by it; integers are never active.
        has_aux: whether only the first of the function's outputs is live.
    """
    active = [mine and vals.inexact(x) for mine, x in zip(active, traced.operands, strict=True)]
    beside = [x if i in kernels else None for i, x in enumerate(traced.operands)]
    inputs = traced.inputs(traced.operands, beside, active)
    inputs += [traced.tangent(i) for i, mine in enumerate(active) if mine]
    program = traced.derivative(active, traced.operands)
    dots = [
        first or not has_aux
        for first, aval in zip(traced.first, traced.closed.out_avals, strict=True)
        if jnp.issubdtype(aval.dtype, jnp.inexact)
    ]
    used = [True] * traced.num_outputs + dots
    live, _ = partial_eval.dce_jaxpr(program.jaxpr, used, instantiate=True)
    found, marks = (reader.Reader(traced.paths, abstract=True) for _ in range(2))
    outs = found.run(program.replace(jaxpr=live), inputs)
    found.ways = lb.all_ways(out.label for out in outs)
    marks.run(traced.closed, inputs[traced.num_hoisted : len(traced.operands)])
    for i in kernels:  # layers mark kernels in the function only, not in its derivative
        found.note(i).layer = marks.note(i).layer
    return found


ELEMENTWISE = ("div", "mul")

Found = tuple[Effect, Sequence[Use]]


def _row(notes: reader.Notes) -> Found:
    """The effect that feedback would have on a leaf."""
    if notes.layer:
        return ("own feedback" if notes.served_by_layer else "no effect"), [notes.layer]
    if notes.broken:
        return "backprop", [*notes.served, *notes.broken]
    if notes.served and all(use.primitive in ELEMENTWISE for use in notes.served):
        return "backprop", [use._replace(problem=table.SCALES) for use in notes.served]
    if notes.served:
        return "feedback", [*notes.served]
    if notes.met or not notes.first:
        return "no effect", [*notes.met]
    return "not needed", [*notes.numbers, *([notes.last] if notes.last else [])]


def _given(notes: reader.Notes) -> Found:
    """The effect of feedback on a leaf that has feedback."""
    if notes.layer:
        problem = "where its layer has feedback of its own"
        return "error", [notes.layer._replace(problem=problem)]
    if notes.broken:
        return "error", [*notes.served, *notes.broken]
    if notes.served:
        return "feedback", [*notes.served]
    if notes.met:
        return "no effect", [*notes.met]
    problem = "where it is in no product with an activation that could use its feedback"
    return "error", [notes.first._replace(problem=problem)] if notes.first else []


def _kept(notes: reader.Notes) -> Found:
    """The effect for a leaf without feedback."""
    effect, uses = _row(notes)
    return ("backprop" if effect == "feedback" else effect), uses


def _gradient(i: int, ways: frozenset[tuple[int, bool]]) -> Gradient:
    """How errors reach a leaf."""
    if (i, True) in ways:
        return "mixed" if (i, False) in ways else "direct"
    return "exact" if (i, False) in ways else "none"


def _finished(leaf, path, effect, uses, used, given, open_question, gradient) -> Row:
    is_stored = effect == "feedback" if open_question else path in given
    stored = np.dtype(given[path].dtype if path in given else leaf.dtype)
    nbytes = leaf.size * vals.bits(stored) // 8 if is_stored else 0
    uses = tuple(dict.fromkeys(uses))
    one, *others = used or [leaf.dtype]
    used = dtypes.wide(one, *others) if others else np.dtype(one)
    shape = tuple(leaf.shape)
    return Row(path, effect, uses, shape, leaf.dtype, stored, used, nbytes, gradient)
