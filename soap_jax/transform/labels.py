"""Labels of values: weights, activation or tangent, and their params; rules for one equation.

A value is *weights* if it is computed from kernels with feedback and from no activation. If only
the layout of the kernels was changed, it also has a form with feedback: the same layout of their
feedback. This module has the rules for one equation; `soap_jax.transform.reader` applies them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from soap_jax import ops

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")
"""Product primitives, where the result of weights and data is an activation."""

LAYOUTS = (
    *("all_gather", "all_gather_invariant", "all_to_all", "broadcast_in_dim", "conj", "copy"),
    *("convert_element_type", "copy_p", "cumsum", "device_put", "dynamic_slice", "expand_dims"),
    *("fft", "gather", "imag", "name", "neg", "optimization_barrier", "pcast", "ppermute", "psum"),
    *("psum_invariant", "pvary", "real", "reduce_precision", "reduce_sum", "reshape", "reshard"),
    *("rev", "sharding_constraint", "slice", "split", "squeeze", "stop_gradient", "tile"),
    *("transpose", "unstack"),
)
"""Linear primitives of one array, with indices as other operands, which change the layout only."""

JOINS = (
    *("complex", "concatenate", "dynamic_update_slice", "pad", "scatter", "select_n", "stack"),
)
"""Primitives that combine the elements of several arrays in one layout."""

ELEMENTWISE = ("mul", "div")
"""Elementwise products: weights times an activation is an activation, times a mask weights."""

SUMS = ("add", "add_any", "sub")

LOOKUPS = ("gather", "dynamic_slice")

REDUCTIONS = (
    "argmax",
    "argmin",
    "dot_general",
    "reduce_max",
    "reduce_min",
    "reduce_prod",
    "reduce_sum",
    "svd",
)
"""Primitives that compute each output element from all elements along some axes."""

PARTS = ("dynamic_slice", "gather", "slice", "split", "unstack")
"""Layout primitives that take a part, so that the result is no longer a whole kernel."""

MOVES = (
    *(*PARTS, "broadcast_in_dim", "copy", "copy_p", "device_put", "expand_dims", "name"),
    *("optimization_barrier", "pcast", "pvary", "reshape", "reshard", "rev", "sharding_constraint"),
    *("squeeze", "stop_gradient", "tile", "transpose"),
)
"""Layout primitives without arithmetic, which keep the dtype in which feedback is stored."""


class Broken(NamedTuple):
    """The reason why weights have no form with feedback.

    Attributes:
        problem: the operation on them, as a phrase for messages.
        primitive: the primitive of that operation.
        line: its file, line and function.
        others: the numbers of the params that were mixed in.
        rows: whether rows were looked up afterwards.
    """

    problem: str
    primitive: str
    line: str
    others: frozenset[int] = frozenset()
    rows: bool = False

    def __str__(self):
        """The place: "tanh at model.py:12:4 (loss)"."""
        return f"{self.primitive} at {self.line}"


Status = Broken | Literal["laid out", "looked up"]
"""The status of a kernel: "laid out", only its layout was changed; "looked up", rows of it were
looked up by an integer argument, as in an embedding; or broken."""


class Label(NamedTuple):
    """The properties of a value that are known without computing it.

    Attributes:
        kernels: by number of the kernel: for weights, the status of each kernel; for a tangent, the
            kernels that multiplied their own tangent. A tangent with kernels has two forms: one
            with the kernels, for terms of these kernels alone, and one with their feedback.
        data: whether it depends on an argument other than params.
        params: the params from which it is computed; empty for an activation.
        active: whether it has a tangent.
        floats: whether it depends on params or on an argument that is not an integer.
        number: whether it is a single number, or a broadcast number.
        whole: whether each element depends on all of a kernel.
        tangent: whether it is a tangent.
        owners: for a tangent that no activation multiplies, the params of which it is a linear
            function; None for other tangents, through which errors pass.
        mixed: for a tangent with owners, whether it was multiplied by weights with data mixed in.
        rows: for a tangent, whether rows were looked up by an integer argument.
        used: for weights, the dtypes in which they were first used in arithmetic; empty if they
            were only cast and moved.
        layer: whether a layer with feedback of its own has just named it.
        ways: for a tangent, pairs of a param that an error reaches through it, and whether it does
            so by direct feedback; only known if nothing is computed.
        refused: for a tangent through which no error may pass, the reason.
    """

    kernels: Mapping[int, Status] = {}
    data: bool = False
    params: frozenset[int] = frozenset()
    active: bool = False
    floats: bool = False
    number: bool = False
    whole: bool = False
    tangent: bool = False
    owners: frozenset[int] | None = None
    mixed: bool = False
    rows: bool = False
    used: frozenset[np.dtype] = frozenset()
    layer: bool = False
    ways: frozenset[tuple[int, bool]] = frozenset()
    refused: str | None = None

    @property
    def activation(self) -> bool:
        """Whether it is computed from data and has a tangent, and is not masked params."""
        return self.from_data and self.active

    @property
    def from_data(self) -> bool:
        """Whether it is computed from data, and is not masked params."""
        return self.data and not self.params

    @property
    def two_forms(self) -> bool:
        """Whether it has a form with feedback."""
        return bool(self.kernels) and not any(
            isinstance(status, Broken) for status in self.kernels.values()
        )


def worst(statuses: Iterable[Status]) -> Status:
    """The status of a value that is computed from values of several statuses."""
    found = list(statuses)
    for status in found:
        if isinstance(status, Broken):
            return status
    return "looked up" if "looked up" in found else "laid out"


def merged(labels: Sequence[Label]) -> dict[int, Status]:
    """The kernels of several labels, each with its worst status."""
    leaves = dict.fromkeys(leaf for label in labels for leaf in label.kernels)
    return {i: worst(lab.kernels[i] for lab in labels if i in lab.kernels) for i in leaves}


def derived(labels: Sequence[Label]) -> Label:
    """The label of any value computed from values with these labels."""
    apart = any(label.activation for label in labels)
    return Label(
        data=any(label.data for label in labels),
        params=frozenset() if apart else frozenset().union(*(label.params for label in labels)),
        active=any(label.active for label in labels),
        floats=any(label.floats for label in labels),
    )


def computed(eqn: core.JaxprEqn, labels: Sequence[Label]) -> Label:
    """Like `derived`, for the result of an equation, which may be an activation."""
    out, name = derived(labels), kind(eqn)
    met = name in PRODUCTS and any(
        a.data and (b.data or b.params)
        for k, a in enumerate(labels)
        for b in (*labels[:k], *labels[k + 1 :])
    )
    if met or (name in LOOKUPS and _by_integers(labels)):
        return out._replace(params=frozenset())
    return out


def used(eqn: core.JaxprEqn, labels: Sequence[Label]) -> frozenset[np.dtype]:
    """The dtypes in which weights are used in arithmetic, in an equation or before."""
    moved = eqn.primitive.name in (*MOVES, "convert_element_type")
    found: frozenset[np.dtype] = frozenset()
    for var, label in zip(eqn.invars, labels, strict=True):
        aval: Any = var.aval
        if label.kernels:
            found |= label.used or (frozenset() if moved else {np.dtype(aval.dtype)})
    return found


def kind(eqn: core.JaxprEqn) -> str:
    """The primitive's name; "mul" for a `dot_general` without contracted axes."""
    name = eqn.primitive.name
    if name == "dot_general" and not eqn.params["dimension_numbers"][0][0]:
        return "mul"
    return name


def join(a: Label, b: Label, broken: Broken) -> Label:
    """The label of a value that is one of two: a loop's carry, or the result of `cond`.

    Args:
        a: one label.
        b: the other label.
        broken: the status of weights that may also be something else.
    """
    if a == b:
        return a
    kernels = merged([a, b])
    for mine, other in ((a, b), (b, a)):
        for i in mine.kernels.keys() - other.kernels.keys():
            if other.activation and looked_up(mine.kernels[i]):
                del kernels[i]
            elif other.from_data and not mine.tangent:
                kernels[i] = worst([mine.kernels[i], broken])
    tangent = a.tangent or b.tangent
    return derived([a, b])._replace(
        kernels=kernels,
        number=a.number and b.number,
        whole=a.whole and b.whole,
        tangent=tangent,
        owners=owned([label for label in (a, b) if label.tangent]),
        mixed=a.mixed or b.mixed,
        rows=a.rows or b.rows,
        ways=a.ways | b.ways,
        used=a.used | b.used,
        refused=a.refused or b.refused,
    )


def plain(eqn: core.JaxprEqn, out: Label, labels: Sequence[Label], var) -> Label:
    """The label of an output of an equation without kernels and tangents."""
    return out._replace(
        active=out.active and eqn.primitive.name != "stop_gradient" and is_float(var.aval),
        number=_number(eqn, labels, var),
    )


def same_kind(a: Label, b: Label) -> Label:
    """A carry's label `a`, also a tangent or dependent on data if its next label `b` is."""
    return a._replace(
        data=a.data or b.data,
        params=frozenset() if a.activation or b.activation else a.params | b.params,
        active=a.active or b.active,
        floats=a.floats or b.floats,
        number=a.number and b.number,
        tangent=a.tangent or b.tangent,
        owners=a.owners if a.tangent else frozenset(),  # initial zeros, which any param may own
        mixed=a.mixed or b.mixed,
        ways=a.ways | b.ways,
    )


def owned(tangents: Sequence[Label]) -> frozenset[int] | None:
    """The params of which these tangents are linear functions; None if one has no owners."""
    owners: frozenset[int] = frozenset()
    for label in tangents:
        if label.owners is None:
            return None
        owners |= label.owners
    return owners


def all_ways(tangents: Iterable[Label]) -> frozenset[tuple[int, bool]]:
    """The ways of a value that is computed from these tangents."""
    return frozenset().union(*(label.ways for label in tangents))


class Met(NamedTuple):
    """A note: a kernel is in a product with an activation."""

    leaf: int


class Number(NamedTuple):
    """A note: a single number is computed from a whole kernel."""

    leaf: int


def primal(eqn: core.JaxprEqn, labels: Sequence[Label], line: str) -> tuple[list[Label], list]:
    """Computes the labels of an equation's outputs in the forward pass.

    Args:
        eqn: the equation.
        labels: the labels of its operands, none of them a tangent.
        line: its line.

    Returns:
        The labels of its outputs, and the notes, `Met` and `Number`.
    """
    name = eqn.primitive.name
    out = computed(eqn, labels)._replace(layer=name == "name" and eqn.params["name"] == ops.MARK)
    notes: list[Met | Number] = []
    kernels: dict[int, Status] = {}
    for i in merged(labels):
        status, met = _status(i, eqn, labels, line)
        if met:
            notes.append(Met(i))
        if status is not None:
            kernels[i] = status
    whole = bool(kernels) and _whole(eqn, labels)
    in_dtypes = used(eqn, labels)
    outs = []
    for var in eqn.outvars:
        mine = {} if not is_float(var.aval) and not _broken(kernels) else kernels
        label = plain(eqn, out, labels, var)._replace(kernels=mine, whole=whole)
        label = label._replace(used=in_dtypes if mine else frozenset())
        if whole and _reduces(eqn, var) and is_float(var.aval):
            notes += map(Number, kernels)
            label = label._replace(kernels={})
        outs.append(label)
    return outs, notes


def _status(i: int, eqn, labels, line) -> tuple[Status | None, bool]:
    """The status of one kernel after an equation, as if no other param had feedback.

    Returns:
        The status, or None if the result is an activation; and whether the kernel is in a product
        with another value here.
    """
    name = kind(eqn)
    mine = [k for k, label in enumerate(labels) if i in label.kernels]
    others = [label for label in labels if i not in label.kernels]
    status = worst(labels[k].kernels[i] for k in mine)
    broken = status if isinstance(status, Broken) else None
    params = frozenset().union(*(label.params for label in others))
    alone = len(mine) == 1

    def lost(problem):
        if looked_up(status):
            return None
        return broken or Broken(problem, eqn.primitive.name, line, params)

    if name in (*PRODUCTS, *ELEMENTWISE):
        made = _activation(others) if name in ELEMENTWISE else any(lab.data for lab in others)
        met = alone and not broken and (made or (bool(params) and status != "looked up"))
        if alone and made:
            return None, met
        if not alone or params:
            return lost("where other weights multiply it"), met
        divided = name == "div" and mine == [1]
        return lost("where something is divided by it") if divided else status, False
    if name in SUMS:
        if alone and _activation(others):
            return None, False
        return lost("where it is added to something else"), False
    moved = all(is_float(eqn.invars[k].aval) for k in mine)
    if name in JOINS and moved:
        floats = [
            is_float(v.aval) and i not in lab.kernels
            for v, lab in zip(eqn.invars, labels, strict=True)
        ]
        apart = any(lab.from_data and is_a for lab, is_a in zip(labels, floats, strict=True))
        return lost("where it is joined with data") if apart else status, False
    if name in LAYOUTS and moved:
        if not all(is_float(var.aval) for var in eqn.outvars):
            return lost("which casts it to integers"), False
        if name in LOOKUPS and _by_integers(labels):
            return broken._replace(rows=True) if broken else "looked up", False
        return status, False
    return lost("which changes more than its layout"), False


def _activation(labels) -> bool:
    return any(label.activation and not label.number for label in labels)


def looked_up(status: Status) -> bool:
    """Whether these are rows that were looked up by an integer argument."""
    return status.rows if isinstance(status, Broken) else status == "looked up"


def _by_integers(labels) -> bool:
    """Whether the indices (all operands but the first) depend on integer arguments only."""
    index = derived(labels[1:])
    return index.data and not index.floats


def is_float(aval) -> bool:
    """Whether values of this type can have a tangent."""
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def _broken(kernels) -> bool:
    return any(isinstance(status, Broken) for status in kernels.values())


def _whole(eqn, labels) -> bool:
    """Whether an output is a whole kernel, so that its reduction depends on all of the kernel."""
    name = eqn.primitive.name
    same = any(var.aval.shape == eqn.outvars[0].aval.shape for var in eqn.invars)
    if name in (*PARTS, *JOINS) or not (same or name in (*LAYOUTS, *REDUCTIONS)):
        return False
    return all(label.whole if label.kernels or label.tangent else label.number for label in labels)


def _reduces(eqn, var) -> bool:
    return (
        eqn.primitive.name in REDUCTIONS
        and _size(var) == 1
        and any(_size(v) > 1 for v in eqn.invars)
    )


def _size(var) -> int:
    return math.prod(getattr(var.aval, "shape", ()))


def _number(eqn, labels, var) -> bool:
    moves = ("broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "pvary", "copy")
    return not var.aval.ndim or (eqn.primitive.name in moves and labels[0].number)


_JOINED = (
    "an error is joined with values that are no errors, in {} at {}, so that its way through "
    "weights cannot be found. Keep errors in arrays of their own in this custom backward pass, or "
    "give the weights that it uses no feedback (None at their paths)."
)


class Step(NamedTuple):
    """The evaluation of an equation with tangents.

    Attributes:
        label: the label of its outputs.
        exact: positions of operands that are not replaced by their form with feedback.
        decided: whether only the form with feedback is computed from here.
        served: kernels whose feedback multiplies an error here.
        broken: by kernel, broken weights that would multiply an error here.
    """

    label: Label
    exact: frozenset[int] = frozenset()
    decided: bool = True
    served: tuple[int, ...] = ()
    broken: Mapping[int, Broken] = {}


def tangent(eqn: core.JaxprEqn, labels: Sequence[Label], line: str = "") -> Step:
    """Finds how an equation with tangents, which is linear in them, is evaluated.

    Coefficients that are weights are replaced by their form with feedback, except if the tangent is
    the kernel's own. Then both forms are computed, until an activation multiplies them. If data are
    mixed into the weights, they multiply their own tangent as an activation does, once: after that
    it is an error.

    Args:
        eqn: the equation.
        labels: the labels of its operands.
        line: its line.
    """
    name = kind(eqn)
    tangents = [label for label in labels if label.tangent]
    owners = owned(tangents)
    rows = any(label.rows for label in tangents)
    mixed = any(label.mixed for label in tangents)
    numbers = not any(getattr(v.aval, "ndim", 0) for v in (*eqn.invars, *eqn.outvars))
    exact: set[int] = set()
    mine: list[Label] = []
    foreign: list[Label] = []
    activation = met = False
    several = Broken("where one term contains several params", name, line)
    for k, label in enumerate(labels):
        if label.tangent or name in SUMS:  # a term added to a tangent is a tangent or zeros
            continue
        if owners and _rows(label):  # an embedding's rows multiply a param's tangent
            exact.add(k)
            activation = True
        elif owners and not rows and set(label.kernels) == owners:
            if not label.data or not _broken(label.kernels):
                (foreign if mixed else mine).append(label)
            elif (mixed and name in PRODUCTS) or any(dot.kernels for dot in tangents):
                foreign.append(label)
            else:
                met = True
        elif label.kernels:
            both = owners if owners and not rows else ()
            kernels = {i: several if i in both else s for i, s in label.kernels.items()}
            foreign.append(label._replace(kernels=kernels))
        elif not numbers and (label.activation or (label.data and name in PRODUCTS)):
            activation = True
    out = Label(
        tangent=True,
        data=any(label.data for label in labels),
        whole=_whole(eqn, labels),
        mixed=mixed or met,
        ways=all_ways(tangents),
        used=used(eqn, labels),
        refused=next((label.refused for label in tangents if label.refused), None),
    )
    if name in JOINS and any(
        is_float(var.aval) and not label.tangent and (label.data or label.params)
        for var, label in zip(eqn.invars, labels, strict=True)
    ):  # in a backward pass that a user wrote
        out = out._replace(refused=out.refused or _JOINED.format(name, line))
    if not (activation or foreign):
        kernels = merged([*tangents, *mine])
        if out.whole and all(_reduces(eqn, var) for var in eqn.outvars):
            # A single number of one kernel is exact.
            kernels = {i: status for i, status in kernels.items() if {i} != owners}
        if name in LOOKUPS and owners and _by_integers(labels):
            return Step(out._replace(owners=owners, rows=True), decided=False)
        return Step(out._replace(owners=owners, rows=rows, kernels=kernels), decided=False)
    passed = merged([*tangents, *mine, *foreign])
    return Step(
        out,
        exact=frozenset(exact),
        served=tuple(i for i, status in passed.items() if not isinstance(status, Broken)),
        broken={i: status for i, status in passed.items() if isinstance(status, Broken)},
    )


def _rows(label) -> bool:
    return bool(label.kernels) and all(map(looked_up, label.kernels.values()))
