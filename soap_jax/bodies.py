"""Equations that hold jaxprs of their own, made again around rewritten ones.

Each is called by the public function that made it (`jax.jit`, `jax.lax.scan`, ...), whose body
hands arrays and their twins to `soap_jax.walk`. So structure is kept: a scan
stays one scan, and what is scanned over has its twins scanned over beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import lax
from jax.extend import core

from soap_jax import twins as tw


def _body(walk, closed: core.ClosedJaxpr, values: Sequence[tw.Value]):
    """Makes a jaxpr a function of arrays and twins; a list then tells what is known of outputs."""
    known = [value.known for value in values]
    known_outs: list[tw.Value] = []

    def f(arrays, twins):
        outs = walk.run(closed, tw.join(known, arrays, twins))
        known_outs[:] = [out.known for out in outs]
        return tw.split(outs)

    return f, known_outs


def _jit(walk, eqn, values):
    f, known = _body(walk, eqn.params["jaxpr"], values)
    shardings = eqn.params["in_shardings"], eqn.params["out_shardings"]

    def constrain(arrays, shardings):
        return [
            lax.with_sharding_constraint(array, sharding)
            if array is not None and isinstance(sharding, jax.sharding.Sharding)
            else array
            for array, sharding in zip(arrays, shardings, strict=True)
        ]

    def constrained(arrays, twins):
        arrays, twins = f(constrain(arrays, shardings[0]), constrain(twins, shardings[0]))
        return constrain(arrays, shardings[1]), constrain(twins, shardings[1])

    constrained.__name__ = eqn.params["name"]
    return tw.join(known, *jax.jit(constrained, inline=eqn.params["inline"])(*tw.split(values)))


def _remat(walk, eqn, values):
    f, known = _body(walk, _close(eqn.params["jaxpr"]), values)
    f = jax.checkpoint(f, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    arrays, twins = f(*tw.split(values))
    return tw.join(known, arrays, twins)


def _scan(walk, eqn, values):
    closed, n, m = (eqn.params[name] for name in ("jaxpr", "num_consts", "num_carry"))
    consts, init, xs = values[:n], values[n : n + m], values[n + m :]
    names = "length", "reverse", "unroll", "_split_transpose"
    options = {name: eqn.params[name] for name in names if name in eqn.params}

    def loop(carried):
        f, known = _body(walk, closed, [*consts, *carried, *xs])
        const_arrays, const_twins = tw.split(consts)
        _, carried_twins = tw.split(carried)

        def body(carry, x):
            x_arrays, x_twins = x
            arrays = [*const_arrays, *carry, *x_arrays]
            arrays, twins = f(arrays, [*const_twins, *carried_twins, *x_twins])
            return arrays[:m], (arrays[m:], twins[m:])

        carry, (ys, twins) = lax.scan(body, [v.array for v in init], tw.split(xs), **options)
        return [*carry, *ys], [*[None] * m, *twins], known

    return _carry(walk, eqn, values, init, loop)


def _while(walk, eqn, values):
    names = "cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts"
    cond, body, n, m = (eqn.params[name] for name in names)
    cond_consts, body_consts, init = values[:n], values[n : n + m], values[n + m :]

    def loop(carried):
        f, _ = _body(walk, cond, [*cond_consts, *carried])
        g, known = _body(walk, body, [*body_consts, *carried])
        _, twins = tw.split(carried)

        def call(f, consts, carry):
            const_arrays, const_twins = tw.split(consts)
            return f([*const_arrays, *carry], [*const_twins, *twins])[0]

        arrays = lax.while_loop(
            lambda carry: call(f, cond_consts, carry)[0],
            lambda carry: call(g, body_consts, carry),
            [value.array for value in init],
        )
        return arrays, [None] * len(init), known

    return _carry(walk, eqn, values, init, loop)


def _carry(walk, eqn, values, init, loop):
    """Runs a loop; the kernels that it carries keep their twins if it hands them on as they are.

    What is handed on and what derives from a kernel, one knows only after a pass. So the loop is
    made again until nothing new is found, which nearly always is at once.
    """
    (anything,) = tw.derived([None], values)

    def changed(value, out):
        """What is known of a value that the loop carries and changes."""
        found = [v for v in (value, out) if v.held]
        if found:
            paths = tw.paths(found)
            lost = found[-1].kernel.lost or walk.used(eqn, values, paths, "which changes it")
            return anything._replace(kernel=tw.Kernel(paths, lost=lost))
        if value.array is not None and tw.is_float(value):
            return anything
        return value._replace(data=value.data or out.data, params=value.params or out.params)

    carried = [
        v._replace(kernel=v.kernel._replace(slot=i)) if v.kernel else changed(v, v)
        for i, v in enumerate(init)
    ]
    while True:
        arrays, twins, known = loop(carried)
        new = [
            v if _slot(v) is not None and _slot(v) == _slot(out) else changed(v, out)
            for v, out in zip(carried, known, strict=False)
        ]
        if [v.known for v in new] == [v.known for v in carried]:
            break
        carried = new
    ends = [v if _slot(out) is not None else out for v, out in zip(init, carried, strict=True)]
    known = [*(v.known for v in ends), *known[len(init) :]]
    return tw.join(known, arrays, [*(v.twin for v in ends), *twins[len(init) :]])


def _slot(value):
    return value.kernel.slot if value.kernel else None


def _cond(walk, eqn, values):
    if eqn.params.get("branches_platforms"):
        return walk.lose(eqn, values)
    bodies = [_body(walk, branch, values[1:]) for branch in eqn.params["branches"]]
    branches = [lambda arrays, twins, f=f: f(arrays, twins)[0] for f, _ in bodies]
    arrays = lax.switch(values[0].array, branches, *tw.split(values[1:]))
    return _returned(walk, eqn, values, arrays, [known for _, known in bodies])


def _shard_map(walk, eqn, values):
    f, known = _body(walk, _close(eqn.params["jaxpr"]), values)
    specs = list(eqn.params["in_specs"])
    arrays, all_twins = tw.split(values)
    twins = {i: twin for i, twin in enumerate(all_twins) if twin is not None}
    axes = eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes"))  # JAX 0.10, 0.8
    mapped = jax.shard_map(
        lambda arrays, twins: f(arrays, [twins.get(i) for i in range(len(arrays))])[0],
        mesh=eqn.params["mesh"],
        in_specs=(specs, {i: specs[i] for i in twins}),
        out_specs=list(eqn.params["out_specs"]),
        axis_names=axes,
        check_vma=eqn.params["check_vma"],
    )
    return _returned(walk, eqn, values, mapped(arrays, twins), [known])


def _returned(walk, eqn, values, arrays, alternatives):
    """The outputs of an equation that hands out no twins."""
    outs = tw.derived(arrays, values)
    for i, known in enumerate(zip(*alternatives, strict=True)):
        found = [value for value in known if value.held]
        if found:
            lost = found[-1].kernel.lost or walk.used(
                eqn, values, tw.paths(found), "which returns it"
            )
            outs[i] = outs[i]._replace(kernel=tw.Kernel(tw.paths(found), lost=lost))
    return outs


def _close(jaxpr):
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


BODIES = {
    **{"jit": _jit, "remat2": _remat, "scan": _scan, "while": _while, "cond": _cond},
    "shard_map": _shard_map,
}
