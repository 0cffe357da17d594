"""Reading of equations that contain jaxprs: calls, loops, branches and custom derivatives.

First the labels of their outputs are computed from their bodies, without arrays; the body of a loop
is read until its labels do not change. If kernels with feedback are involved, the equation is then
rebuilt with the JAX function that made it (`jax.jit`, `jax.lax.scan`, ...). Its body is read with
arrays and their forms with feedback. So the structure is kept: a scan stays one scan, which also
scans over the feedback of its kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.interpreters import partial_eval

from soap_jax import ops
from soap_jax.transform import labels as lb
from soap_jax.transform import values as vals
from soap_jax.transform.values import Value


class Nested(NamedTuple):
    """The functions that read one kind of equation with jaxprs.

    Attributes:
        labels: `(reader, eqn, labels) -> labels`, the labels of its outputs.
        make: `(reader, eqn, values, labels) -> values`, which rebuilds the equation; None if it is
            never rebuilt.
    """

    labels: Callable[..., list[lb.Label]]
    make: Callable[..., list[Value]] | None = None


def read(reader, eqn: core.JaxprEqn, values: Sequence[Value]) -> list[Value]:
    """Reads an equation with jaxprs; returns the values of its outputs."""
    body = NESTED[eqn.primitive.name]
    labels = [value.label for value in values]
    if reader.abstract:
        return [Value(label) for label in body.labels(reader, eqn, labels)]
    with reader.only_labels():
        outs = body.labels(reader, eqn, labels)
    tangent = any(label.tangent for label in labels)
    returned = any(label.two_forms for label in outs)
    if tangent and eqn.primitive.name == "while":
        values = [_no_tangent(value) for value in values]
    if body.make and any(label.kernels for label in labels) and (tangent or returned):
        return body.make(reader, eqn, values, outs)
    body.labels(reader, eqn, labels)  # with notes
    arrays = vals.bind(eqn, [value.array for value in values])
    beside = [None] * len(arrays)
    if returned:
        beside = vals.bind_wide(eqn, [value.with_feedback for value in values])
    return [
        Value(label, array, feedback if label.two_forms else None)
        for label, array, feedback in zip(outs, arrays, beside, strict=True)
    ]


def _inner(reader, closed, labels):
    """Returns a jaxpr as a function of arrays and their forms with feedback."""

    def f(arrays, beside):
        return reader.run(closed, list(map(Value, labels, arrays, beside)))

    return f


def _split(values, labels=None):
    """Splits values into arrays and forms with feedback, where `labels` have two forms."""
    labels = [value.label for value in values] if labels is None else labels
    beside = [
        v.with_feedback if lab.two_forms else None for v, lab in zip(values, labels, strict=True)
    ]
    return [value.array for value in values], beside


def _wide(values):
    """Casts forms with feedback to their arrays' dtypes, as loops and branches need."""
    return [
        v if v.feedback is None else v._replace(feedback=v.feedback.astype(v.array.dtype))
        for v in values
    ]


def close(jaxpr) -> core.ClosedJaxpr:
    """Returns the closed jaxpr of an equation's jaxpr, which may be closed already."""
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def _called(name):
    return lambda reader, eqn, labels: reader.labels(close(eqn.params[name]), labels)


# jit and calls


def constrain(arrays, shardings):
    """Constrains arrays to a call's shardings, if it has any."""
    return [
        lax.with_sharding_constraint(array, sharding)
        if array is not None and isinstance(sharding, jax.sharding.Sharding)
        else array
        for array, sharding in zip(arrays, shardings or [None] * len(arrays), strict=True)
    ]


def _jit(reader, eqn, values, outs):
    f = _inner(reader, eqn.params["jaxpr"], [value.label for value in values])
    shardings = eqn.params["in_shardings"], eqn.params["out_shardings"]

    def constrained(arrays, beside):
        found = f(constrain(arrays, shardings[0]), constrain(beside, shardings[0]))
        arrays, beside = _split(found)
        return constrain(arrays, shardings[1]), constrain(beside, shardings[1])

    constrained.__name__ = eqn.params["name"]
    made = jax.jit(constrained, inline=eqn.params["inline"])(*_split(values))
    return list(map(Value, outs, *made))


def _call(reader, eqn, values, outs):
    name = "call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"
    return reader.run(close(eqn.params[name]), values)


def _remat(reader, eqn, values, outs):
    f = _inner(reader, close(eqn.params["jaxpr"]), [value.label for value in values])
    cse: Any = eqn.params["prevent_cse"]  # one bool, or one per operand
    if not isinstance(cse, bool):
        cse = (list(cse), list(cse))
    g = jax.checkpoint(
        lambda *forms: _split(f(*forms)), prevent_cse=cse, policy=eqn.params["policy"]
    )
    return list(map(Value, outs, *g(*_split(values))))


def _shard_map(reader, eqn, values, outs):
    f = _inner(reader, close(eqn.params["jaxpr"]), [value.label for value in values])
    in_specs, out_specs = (list(eqn.params[name]) for name in ("in_specs", "out_specs"))
    arrays, beside = _split(values)
    present = {i: feedback for i, feedback in enumerate(beside) if feedback is not None}

    def g(arrays, beside):
        arrays, beside = _split(f(arrays, [beside.get(i) for i in range(len(arrays))]))
        return arrays, {i: feedback for i, feedback in enumerate(beside) if feedback is not None}

    wanted = [i for i, label in enumerate(outs) if label.two_forms]
    arrays, found = jax.shard_map(
        g,
        mesh=eqn.params["mesh"],
        in_specs=(in_specs, {i: in_specs[i] for i in present}),
        out_specs=(out_specs, {i: out_specs[i] for i in wanted}),
        axis_names=eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes")),
        check_vma=eqn.params["check_vma"],
    )(arrays, present)
    return [
        Value(lab, x, found.get(i)) for i, (lab, x) in enumerate(zip(outs, arrays, strict=True))
    ]


# Loops


def _fixed(reader, eqn, init, body):
    """The labels of a loop's carry, joined until they do not change.

    First the properties of `same_kind` are joined, such as dependence on data. They are needed for
    the others: a kernel's product with a constant is weights, but with data an activation.
    """
    changed = lb.Broken("which changes it", eqn.primitive.name, reader.line_of(eqn))
    carry = list(init)
    with reader.only_labels():
        for joined in (lb.same_kind, functools.partial(lb.join, broken=changed)):
            while True:
                new = [joined(a, b) for a, b in zip(carry, body(carry), strict=False)]
                if new == carry:
                    break
                carry = new
    return carry


def scan_parts(eqn, values):
    """Splits a scan's operands, or their labels, into constants, carry and scanned operands."""
    if "ft_in" in eqn.params:  # since JAX 0.11
        n, m, _ = map(len, eqn.params["ft_in"].unpack())
    else:
        n, m = eqn.params["num_consts"], eqn.params["num_carry"]
    return values[:n], values[n : n + m], values[n + m :]


def scan_options(eqn):
    """The options of a scan for `lax.scan`."""
    names = "length", "reverse", "unroll", "_split_transpose"
    return {name: eqn.params[name] for name in names if name in eqn.params}


def scan_body(reader, eqn, labels):
    """The labels of the operands of a scan's body, after they do not change any more."""
    consts, init, xs = scan_parts(eqn, labels)
    rows = [
        label._replace(whole=False, number=not var.aval.ndim)
        for label, var in zip(
            xs, eqn.params["jaxpr"].jaxpr.invars[-len(xs) :] if xs else (), strict=True
        )
    ]

    def body(carry):
        return reader.labels(eqn.params["jaxpr"], [*consts, *carry, *rows])

    return [*consts, *_fixed(reader, eqn, init, body), *rows]


def _scan_labels(reader, eqn, labels):
    inner = scan_body(reader, eqn, labels)
    _, carry, _ = scan_parts(eqn, inner)
    outs = reader.labels(eqn.params["jaxpr"], inner)
    return [*carry, *(label._replace(whole=False) for label in outs[len(carry) :])]


def _scan(reader, eqn, values, outs):
    labels = scan_body(reader, eqn, [value.label for value in values])
    consts, init, xs = scan_parts(eqn, values)
    _, carried, rows = scan_parts(eqn, labels)
    f = _inner(reader, eqn.params["jaxpr"], labels)
    m = len(init)

    def scan(consts, start, rows):
        def body(carry, x):
            pairs = [[*c, *h, *row] for c, h, row in zip(consts, carry, x, strict=True)]
            found = f(*pairs)
            return _split(_wide(found[:m]), carried), _split(found[m:])

        return lax.scan(body, start, rows, **scan_options(eqn))

    operands = _split(consts), _split(_wide(init), carried), _split(xs, rows)
    if "linear" in eqn.params:  # older JAX
        tangent = [_tangents(part) for part in (consts, carried, rows)]
        scan = _with_linear(scan, tangent)
    (arrays, beside), (ys, y_beside) = scan(*operands)
    return list(map(Value, outs, [*arrays, *ys], [*beside, *y_beside]))


_ONLY_FORWARDS = (
    "an error would be sent back through a lax.while_loop, which JAX cannot differentiate in "
    "reverse mode. Use lax.scan or lax.fori_loop with a fixed number of iterations."
)


def _no_tangent(value):
    """Zeros in place of a tangent that enters a while loop, whose outputs are refused anyway."""
    return Value(value.label, jnp.zeros_like(value.array)) if value.label.tangent else value


def _tangents(values):
    """Whether each array, and each form with feedback, is a tangent."""
    labels = [value.label if isinstance(value, Value) else value for value in values]
    return [label.tangent for label in labels], [
        label.tangent if label.two_forms else None for label in labels
    ]


def _with_linear(scan, tangent):
    """Returns the scan with its parameter `linear` set, which older JAX needs to transpose it."""

    def flagged(*operands):
        leaves = jax.tree.leaves(operands)
        closed, out = jax.make_jaxpr(scan, return_shape=True)(*operands)
        env = dict(zip(closed.jaxpr.invars, leaves, strict=True))
        env |= dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        linear = {
            v for v, t in zip(closed.jaxpr.invars, jax.tree.leaves(tangent), strict=True) if t
        }

        def read(atom):
            return atom.val if isinstance(atom, core.Literal) else env[atom]

        for eqn in closed.jaxpr.eqns:
            mine = tuple(not isinstance(v, core.Literal) and v in linear for v in eqn.invars)
            if eqn.primitive.name == "scan":
                eqn = eqn.replace(params=eqn.params | {"linear": mine})
            env |= zip(eqn.outvars, vals.bind(eqn, list(map(read, eqn.invars))), strict=True)
            linear |= set(eqn.outvars) if any(mine) else set()
        return jax.tree.unflatten(jax.tree.structure(out), map(read, closed.jaxpr.outvars))

    return flagged


def _while_parts(eqn, values):
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    return values[:n], values[n : n + m], values[n + m :]


def _while_labels(reader, eqn, labels):
    cond_consts, body_consts, init = _while_parts(eqn, labels)

    def body(carry):
        return reader.labels(eqn.params["body_jaxpr"], [*body_consts, *carry])

    carry = [
        label._replace(refused=_ONLY_FORWARDS) if label.tangent else label
        for label in _fixed(reader, eqn, init, body)
    ]
    body(carry)
    (go_on,) = reader.labels(eqn.params["cond_jaxpr"], [*cond_consts, *carry])
    return _chosen(reader, eqn, go_on, carry)


def _while(reader, eqn, values, outs):
    cond_consts, body_consts, init = _while_parts(eqn, values)
    carried = _while_labels(reader, eqn, [value.label for value in values])
    labels = [value.label for value in body_consts]
    f = _inner(reader, eqn.params["body_jaxpr"], [*labels, *carried])
    const_arrays, const_beside = _split(body_consts)
    cond = core.jaxpr_as_fun(eqn.params["cond_jaxpr"])
    cond_arrays = [value.array for value in cond_consts]

    def body(carry):
        arrays, beside = carry
        return _split(_wide(f([*const_arrays, *arrays], [*const_beside, *beside])), carried)

    start = _split(_wide(init), carried)
    made = lax.while_loop(lambda carry: cond(*cond_arrays, *carry[0])[0], body, start)
    return list(map(Value, outs, *made))


# Branches


def _chosen(reader, eqn, by, labels):
    """The labels of outputs of a branch or loop that is controlled by a value with label `by`."""
    problem = lb.Broken("which it controls", eqn.primitive.name, reader.line_of(eqn))
    found = []
    for label in labels:
        if by.kernels and label.tangent:
            step = lb.Step(label, broken=dict.fromkeys(by.kernels, problem))
            refused = reader.refuse(eqn, step)
            label = label._replace(refused=label.refused or refused)
        elif by.kernels:
            label = label._replace(kernels={**label.kernels, **dict.fromkeys(by.kernels, problem)})
        found.append(label._replace(data=label.data or by.data, floats=label.floats or by.floats))
    return found


def _cond_labels(reader, eqn, labels):
    index, *operands = labels
    either = lb.Broken("which returns it or something else", "cond", reader.line_of(eqn))
    outs: list[lb.Label] = []
    for branch in eqn.params["branches"]:
        found = reader.labels(branch, operands)
        outs = [lb.join(a, b, either) for a, b in zip(outs, found, strict=True)] if outs else found
    return _chosen(reader, eqn, index, outs)


def _cond(reader, eqn, values, outs):
    labels = [value.label for value in values[1:]]
    bodies = [_inner(reader, branch, labels) for branch in eqn.params["branches"]]
    branches = [lambda *forms, f=f: _split(_wide(f(*forms)), outs) for f in bodies]
    if eqn.params.get("branches_platforms"):
        arrays, beside = _split(values[1:])
        leaves, tree = jax.tree.flatten((arrays, beside))
        closed = [
            jax.make_jaxpr(lambda *leaves, f=f: f(*jax.tree.unflatten(tree, leaves)))(*leaves)
            for f in branches
        ]
        params = eqn.params | {"branches": tuple(closed)}
        flat = eqn.primitive.bind(values[0].array, *leaves, **params)
        structure = jax.tree.structure(jax.eval_shape(branches[0], arrays, beside))
        return list(map(Value, outs, *jax.tree.unflatten(structure, flat)))
    made = lax.switch(values[0].array, branches, *_split(values[1:]))
    return list(map(Value, outs, *made))


# Custom derivatives


def _backward(reader, eqn):
    """The backward pass of a `jax.custom_vjp` function, `(residuals, cotangents) -> cotangents`.

    It is traced only once, since it may be long.
    """
    if id(eqn) not in reader.backward:
        reader.backward[id(eqn)] = eqn, _traced_backward(eqn)  # the equation keeps its id
    return reader.backward[id(eqn)][1]


def _traced_backward(eqn):
    n = eqn.params["num_res"]
    residuals, tangents, outs = (
        [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]
        for variables in (eqn.invars[:n], eqn.invars[n:], eqn.outvars)
    )

    def f(residuals, cotangents):
        known = [  # it may branch on literal flags among its residuals
            v.val if isinstance(v, core.Literal) else x
            for v, x in zip(eqn.invars[:n], residuals, strict=True)
        ]

        def linear(*tangents):
            return vals.bind(eqn, [*known, *tangents])

        return list(jax.linear_transpose(linear, *tangents)(cotangents))

    closed = jax.make_jaxpr(f)(residuals, outs)
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals), instantiate=True)
    return closed.replace(jaxpr=live)


def _custom_lin_labels(reader, eqn, labels):
    n = eqn.params["num_res"]
    residuals, tangents = labels[:n], labels[n:]
    owners = lb.owned(tangents)
    made_of = lb.merged(residuals)
    problem = lb.Broken("which has a custom derivative", "custom_vjp", reader.line_of(eqn))
    data = any(label.data for label in residuals)
    if owners and len(owners) == 1 and set(made_of) <= owners and not data:
        kernels = dict.fromkeys([*made_of, *lb.merged(tangents)], problem)
        label = lb.Label(tangent=True, owners=owners, kernels=kernels)
    else:
        label = lb.Label(tangent=True, data=True)
        forms = lb.Step(label, broken={
            i: s for i, s in lb.merged(tangents).items() if isinstance(s, lb.Broken)
        })  # fmt: skip
        refused = next((t.refused for t in tangents if t.refused), None)
        if forms.broken:
            found = reader.refuse(eqn, forms)
            refused = refused or found
        if made_of:
            error = lb.Label(tangent=True, data=True)
            errors = [error] * len(eqn.outvars)
            back = reader.labels(_backward(reader, eqn), [*residuals, *errors])
            found = next((out.refused for out in back if out.refused), None)
            if found:  # also noted, for `explain`
                reader.refuse(eqn, lb.Step(label, broken=dict.fromkeys(made_of, problem)))
            refused = refused or found
        label = label._replace(refused=refused)
        for dot in tangents:  # a layer's operands are y, x, kernel and feedback; check x's tangent
            for leaf in (dot.owners or frozenset()) & reader.notes.keys():
                by_layer = not reader.quiet and not any(eqn.params["in_zeros"][1:2])
                reader.note(leaf).served_by_layer |= by_layer
    ways = lb.all_ways(tangents)
    if ops.DIRECT in str(eqn.source_info.name_stack):  # all but the output get direct feedback
        output = [] if eqn.params["in_zeros"][0] else tangents[:1]
        ways = lb.all_ways(output) | {(i, True) for i, _ in lb.all_ways(tangents[len(output) :])}
    return [label._replace(ways=ways)] * len(eqn.outvars)


def _custom_lin(reader, eqn, values, outs):
    n = eqn.params["num_res"]
    residuals, tangents = values[:n], values[n:]
    if not any(value.label.kernels for value in residuals) or outs[0].owners is not None:
        with reader.only_labels(quiet=False):
            _custom_lin_labels(reader, eqn, [value.label for value in values])
        operands = [v.array if outs[0].owners is not None else v.with_feedback for v in values]
        return list(map(Value, outs, vals.bind(eqn, [*operands])))
    closed = _backward(reader, eqn)
    error = lb.Label(tangent=True, data=True)
    labels = [*(value.label for value in residuals), *[error] * len(outs)]

    def transpose(forms, cotangents):
        arrays, beside = forms
        values = map(Value, labels, [*arrays, *cotangents], [*beside, *[None] * len(outs)])
        return [value.array for value in reader.run(closed, list(values))]

    made = vals.linear(
        transpose,
        _split(_wide(residuals)),
        [value.with_feedback for value in tangents],
        [var.aval for var in eqn.outvars],
    )
    return list(map(Value, outs, made))


NESTED = {
    "jit": Nested(_called("jaxpr"), _jit),
    "pjit": Nested(_called("jaxpr"), _jit),
    "closed_call": Nested(_called("call_jaxpr"), _call),
    "core_call": Nested(_called("call_jaxpr"), _call),
    "custom_jvp_call": Nested(_called("call_jaxpr")),
    "custom_vjp_call": Nested(_called("call_jaxpr")),
    "remat2": Nested(_called("jaxpr"), _remat),
    "checkpoint": Nested(_called("jaxpr"), _remat),
    "shard_map": Nested(_called("jaxpr"), _shard_map),
    "scan": Nested(_scan_labels, _scan),
    "while": Nested(_while_labels, _while),
    "cond": Nested(_cond_labels, _cond),
    "custom_lin": Nested(_custom_lin_labels, _custom_lin),
}
