"""Analysis of a backward pass: which of its values depend on one unit per element.

The input is a cotangent with one element per unit. A value that depends on it is *local* if each of
its elements depends on only one unit: the unit `i % number`, where i is the index along one axis.
So an axis of several gates, one after the other, is local too. Any other value that depends on the
cotangent is *mixed*, with the first equation that combined several units. A product with zeros
(such as feedback of zeros) does not depend on the cotangent.

The rules are sound but incomplete: a value labelled local is local, but an unknown equation makes
its outputs mixed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jax.extend import core, source_info_util

from soap_jax.transform import labels as lb
from soap_jax.transform import values as vals


@dataclasses.dataclass(frozen=True)
class Local:
    """Each element depends on one unit: the index along `axis` modulo `number`."""

    axis: int
    number: int


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Elements depend on several units; this primitive, at this line, combined them."""

    primitive: str
    line: str

    def __str__(self):
        """The place: "dot_general at model.py:12:4 (cell)"."""
        return f"{self.primitive} at {self.line}"


Label = Local | Mixed | Literal["free", "zero"]
"""The dependence of a value on the cotangent; "free" means none, "zero" an array of zeros."""

_ELEMENTWISE = (
    *("add", "add_any", "complex", "conj", "convert_element_type", "copy", "copy_p", "div", "imag"),
    *("mul", "name", "neg", "pcast", "pvary", "real", "reduce_precision"),
    *("select_n", "sub"),
)
_PRODUCTS = ("conv_general_dilated", "dot_general", "mul")
_CALLS = {
    **dict.fromkeys(("checkpoint", "jit", "pjit", "remat2"), "jaxpr"),
    **dict.fromkeys(
        ("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr"
    ),
}
_MOVES = (
    *("broadcast_in_dim", "concatenate", "dynamic_update_slice", "pad", "reduce_sum", "reshape"),
    *("rev", "slice", "split", "squeeze", "stack", "tile", "transpose", "unstack"),
)

_LINEAR = {"div": slice(1), "dynamic_update_slice": slice(2), "select_n": slice(1, None)}
"""By primitive, the operands in which it is linear, if these are not all operands."""


def depends(label: Label) -> bool:
    """Whether a value depends on the cotangent."""
    return isinstance(label, Local | Mixed)


def read(closed: core.ClosedJaxpr, labels: Sequence[Label], line: str = "") -> list[Label]:
    """Computes the labels of a program's outputs from the labels of its inputs.

    Args:
        closed: the program, a backward pass.
        labels: one label per input; `Local(0, units)` for the cotangent.
        line: the line of the program, for equations without a line of their own.
    """
    env = dict(zip(closed.jaxpr.invars, labels, strict=True))
    for eqn in closed.jaxpr.eqns:
        found = [_of(atom, env) for atom in eqn.invars]
        env.update(zip(eqn.outvars, _equation(eqn, found, line), strict=True))
    return [_of(atom, env) for atom in closed.jaxpr.outvars]


def _of(atom, env) -> Label:
    if isinstance(atom, core.Literal):
        number = not jnp.ndim(atom.val) and vals.inexact(atom.val)
        return "zero" if number and atom.val == 0 else "free"
    return env.get(atom, "free")


def _equation(eqn, labels, line) -> list[Label]:
    name, line = eqn.primitive.name, source_info_util.summarize(eqn.source_info) or line
    here = Mixed(name, line)
    if name in _CALLS:
        body = eqn.params[_CALLS[name]]
        closed = body if isinstance(body, core.ClosedJaxpr) else core.ClosedJaxpr(body, ())
        return read(closed, labels, line)
    if name in _PRODUCTS and "zero" in labels:
        label: Label = "zero"
    elif name in lb.LAYOUTS and set(_floats(eqn, labels)) == {"zero"}:
        label = "zero"
    elif name == "optimization_barrier":
        return list(labels)
    elif name in _ELEMENTWISE or name in _MOVES:
        label = _joined(eqn, labels, here)
    elif name == "dot_general" and any(map(depends, labels)):
        label = _product(eqn, labels) or here
    else:
        label = here if any(map(depends, labels)) else "free"
    return [label] * len(eqn.outvars)


def _floats(eqn, labels) -> list[Label]:
    """The labels of the operands that are not indices."""
    pairs = zip(eqn.invars, labels, strict=True)
    return [label for operand, label in pairs if lb.is_float(operand.aval)]


def _joined(eqn, labels, here) -> Label:
    """The label of an equation that moves or combines the elements of its operands in place."""
    name = eqn.primitive.name
    mine = range(len(labels))[_LINEAR.get(name, slice(None))]
    if any(depends(label) for k, label in enumerate(labels) if k not in mine):
        return here
    if name == "mul" and all(map(depends, labels)):
        return here
    found = set()
    for label, operand in [(labels[k], eqn.invars[k]) for k in mine]:
        if isinstance(label, Local):
            axis = _moved(eqn, operand.aval.shape, label)
            label = here if axis is None else Local(axis, label.number)
        if isinstance(label, Mixed):
            return label
        found.add(label)
    if len(found) == 1:
        return found.pop()
    found -= {"free", "zero"}
    return here if len(found) > 1 else found.pop() if found else "free"


def _moved(eqn, shape, label) -> int | None:
    """The axis to which an equation moves the units, or None if it changes their order."""
    name, params, axis, number = eqn.primitive.name, eqn.params, label.axis, label.number
    out = eqn.outvars[0].aval.shape
    if name in _ELEMENTWISE or name in ("dynamic_update_slice", "tile"):
        kept = len(shape) == len(out) and (shape[axis] == out[axis] or name == "tile")
        return axis if kept else None
    if name == "broadcast_in_dim":
        moved = params["broadcast_dimensions"][axis]
        return moved if out[moved] == shape[axis] else None
    if name == "transpose":
        return params["permutation"].index(axis)
    if name in ("squeeze", "reduce_sum"):
        gone = params["dimensions" if name == "squeeze" else "axes"]
        return None if axis in gone else axis - sum(g < axis for g in gone)
    if name == "reshape":
        if params["dimensions"] is not None:
            return None
        same = [
            b for b in range(len(out))
            if math.prod(out[b + 1 :]) == math.prod(shape[axis + 1 :]) and out[b] % number == 0
        ]  # fmt: skip
        return same[-1] if same and 0 not in out else None
    if name == "rev":
        return None if axis in params["dimensions"] else axis
    if name == "slice":
        strides = params["strides"] or [1] * len(shape)
        starts, ends = params["start_indices"][axis], params["limit_indices"][axis]
        return axis if strides[axis] == 1 and starts % number == ends % number == 0 else None
    if name == "pad":
        low, high, inner = params["padding_config"][axis]
        return axis if low % number == high % number == inner == 0 else None
    if name in ("stack", "unstack"):
        new = params["axis"]
        return (
            axis + (new <= axis)
            if name == "stack"
            else None
            if new == axis
            else axis - (new < axis)
        )
    sizes = [v.aval.shape[axis] for v in (eqn.outvars if name == "split" else eqn.invars)]
    return axis if all(size % number == 0 for size in sizes) else None  # concatenate, split


def _product(eqn, labels) -> Local | Mixed | None:
    """The label of a matrix product: local if it does not sum over units, or None."""
    mixed = next((label for label in labels if isinstance(label, Mixed)), None)
    if mixed or all(map(depends, labels)):
        return mixed
    k = 0 if depends(labels[0]) else 1
    axis, number = labels[k].axis, labels[k].number
    contracted, batch = eqn.params["dimension_numbers"]
    if axis in contracted[k]:
        return None
    if axis in batch[k]:
        return Local(batch[k].index(axis), number)
    free = [
        [i for i in range(len(v.aval.shape)) if i not in (*contracted[j], *batch[j])]
        for j, v in enumerate(eqn.invars)
    ]
    return Local(len(batch[0]) + (len(free[0]) if k else 0) + free[k].index(axis), number)
