"""Traces a function to the programs that `soap_jax.transform.reader` analyses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from soap_jax import trees
from soap_jax.transform import labels as lb
from soap_jax.transform import values as vals


class Traced(NamedTuple):
    """A traced function.

    Attributes:
        closed: its jaxpr.
        operands: its operands: the tracers that it closes over, then the arrays among its params
            and arguments.
        paths: by operand, the path of a param, or None.
        num_hoisted: the number of tracers that it closes over.
        rebuild: a function from the jaxpr's outputs to the function's outputs.
        first: by output, whether it belongs to the first of the function's outputs.
    """

    closed: core.ClosedJaxpr
    operands: list[Any]
    paths: list[trees.Path | None]
    num_hoisted: int
    rebuild: Callable[[Sequence[Any]], Any]
    first: list[bool]

    @property
    def num_outputs(self) -> int:
        """The number of the jaxpr's outputs."""
        return len(self.closed.out_avals)

    def evaluate(self, operands: Sequence[Any]) -> list[Any]:
        """Computes the jaxpr's outputs."""
        hoisted = iter(operands[: self.num_hoisted])
        consts = [next(hoisted) if _is_tracer(c) else c for c in self.closed.consts]
        closed = core.ClosedJaxpr(self.closed.jaxpr, consts)
        return core.jaxpr_as_fun(closed)(*operands[self.num_hoisted :])

    def derivative(self, active: Sequence[bool], operands: Sequence[Any]) -> core.ClosedJaxpr:
        """Returns the program of `jax.jvp`, with operands and active operands' tangents as inputs.

        Its outputs are the function's outputs, then the tangents of the floating-point outputs.
        """

        def jvp(operands, tangents):
            def f(differentiated):
                mine = iter(differentiated)
                return self.evaluate(
                    [next(mine) if a else x for a, x in zip(active, operands, strict=True)]
                )

            primals = [x for a, x in zip(active, operands, strict=True) if a]
            outs, dots = jax.jvp(f, (primals,), (tangents,))
            return outs, [d for out, d in zip(outs, dots, strict=True) if vals.inexact(out)]

        return jax.make_jaxpr(jvp)(
            operands, [x for a, x in zip(active, operands, strict=True) if a]
        )

    def inputs(self, arrays, beside, active) -> list[vals.Value]:
        """Returns the program's operands, with `beside` as their feedback.

        A value that the function closes over is a constant, unless it is active.
        """
        return [
            vals.Value(
                lb.Label(
                    kernels={} if feedback is None else {i: "laid out"},
                    data=path is None and (i >= self.num_hoisted or mine),
                    params=frozenset() if path is None else frozenset({i}),
                    active=mine and vals.inexact(x),
                    floats=not jnp.issubdtype(jnp.result_type(x), jnp.integer),
                    number=not jnp.ndim(x),
                    whole=feedback is not None,
                ),
                x,
                feedback,
            )
            for i, (x, feedback, path, mine) in enumerate(
                zip(arrays, beside, self.paths, active, strict=True)
            )
        ]

    def tangent(self, i: int, dot: Any = None) -> vals.Value:
        """Returns an operand's tangent."""
        is_param = self.paths[i] is not None
        owners = frozenset({i}) if is_param else None
        label = lb.Label(tangent=True, owners=owners, data=not is_param, whole=True)
        if dot is None and is_param:
            label = label._replace(ways=frozenset({(i, False)}))
        return vals.Value(label, dot)


def trace(fun: Callable, params: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Traced:
    """Traces `fun(params, *args, **kwargs)`; arguments that are not arrays do not change."""
    _refuse_modules(params, *args, *kwargs.values())
    keyed, tree = jax.tree_util.tree_flatten_with_path((params, args, kwargs))
    arrays = {i: leaf for i, (_, leaf) in enumerate(keyed) if is_array(leaf)}
    out_tree, static, first = None, [], []

    def flat(arrays):
        nonlocal out_tree, static, first
        leaves = [arrays.get(i, leaf) for i, (_, leaf) in enumerate(keyed)]
        params, args, kwargs = jax.tree.unflatten(tree, leaves)
        returned = fun(params, *args, **kwargs)
        out, out_tree = jax.tree.flatten(returned)
        number = len(jax.tree.leaves(returned[0])) if isinstance(returned, tuple) else len(out)
        static = [None if is_array(x) else (x,) for x in out]
        first = [i < number for i, x in enumerate(out) if is_array(x)]
        return [x for x in out if is_array(x)]

    closed = jax.make_jaxpr(flat)(arrays)
    hoisted = [const for const in closed.consts if _is_tracer(const)]

    def rebuild(outs):
        left = iter(outs)
        return jax.tree.unflatten(out_tree, [next(left) if x is None else x[0] for x in static])

    keys = [keyed[i][0] for i in arrays]
    paths = [trees.path_of(key[1:]) if key[0].idx == 0 else None for key in keys]
    return Traced(
        closed,
        [*hoisted, *arrays.values()],
        [*[None] * len(hoisted), *paths],
        len(hoisted),
        rebuild,
        first,
    )


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, which is traced."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _is_tracer(x) -> bool:
    return isinstance(x, jax.core.Tracer)


def _refuse_modules(*args):
    """Raises ValueError for NNX modules: a trace would lose updates of their variables."""
    for arg in args:
        for base in type(arg).__mro__:
            if base.__name__ == "Module" and base.__module__.startswith("flax.nnx"):
                raise ValueError(
                    f"an argument is the NNX module {type(arg).__name__}; expected arrays, since "
                    "updates of its variables would be lost. Split it with graphdef, params, rest "
                    "= nnx.split(model, nnx.Param, ...); merge it inside the function with "
                    "nnx.merge(graphdef, params, rest); and return the updated state, such as "
                    "nnx.state(model, nnx.BatchStat)."
                )
