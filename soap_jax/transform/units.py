"""Which units a backward pass keeps apart, read off its program.

A cotangent of one element a unit goes in. A value that is made of it is *local* if each of its
elements depends on one unit alone, namely on unit `i % number`, with i its index along one axis.
So the axis of several gates, one after the other, is local, too. Whatever else meets several units
in one element is *mixed*, and the first equation that does so is remembered. What is multiplied by
zeros (such as feedback of zeros) depends on nothing.

The rules are sound and incomplete: what is called local is; an equation that is not known mixes.
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
    """Each element depends on the unit that its index along `axis`, modulo `number`, says."""

    axis: int
    number: int


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Elements depend on several units since this primitive, at this line."""

    primitive: str
    line: str

    def __str__(self):
        """The place: "dot_general at model.py:12:4 (cell)"."""
        return f"{self.primitive} at {self.line}"


Label = Local | Mixed | Literal["free", "zero"]
"""How a value depends on the cotangent; "free": not at all, and "zero": it is zeros."""

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
"""The operands that an equation is linear in, where it is not all of them."""


def depends(label: Label) -> bool:
    """Whether a value depends on the cotangent."""
    return isinstance(label, Local | Mixed)


def read(closed: core.ClosedJaxpr, labels: Sequence[Label], line: str = "") -> list[Label]:
    """The labels of a program's outputs, by those of its inputs.

    Args:
        closed: the program, a backward pass.
        labels: by input: `Local(0, units)` for the cotangent.
        line: where the program stands, for equations that have no line of their own.
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
    """The labels of operands that are no indices."""
    pairs = zip(eqn.invars, labels, strict=True)
    return [label for operand, label in pairs if lb.is_float(operand.aval)]


def _joined(eqn, labels, here) -> Label:
    """Of an equation that only moves and joins its operands, element by element."""
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
    """The axis to which an equation moves the units, or None if it does not keep them in order."""
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
    """Of a matrix product: local where the units are not summed over."""
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
