"""`with_feedback` never sends an error through kernels in silence, and refuses nothing needlessly.

Random programs, and a table of those that people write, are built for JAX and evaluated by a NumPy
tape that knows the definition (`oracle.py`). Where the transform gives gradients they are the
tape's: at random feedback, at none (zeros), at the kernels, and at other kernels with the same
feedback. Where the tape refuses, the transform raises ValueError.
"""

import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import linear_functions
import numpy as np
import oracle
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from soap_jax import with_feedback

TIGHT, LOOSE = (
    1e-5,
    0.06,
)  # of the largest gradient; casts to float32; bfloat16 rounds in another order
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


@jax.custom_vjp
def own_dot(x, w):
    return x @ w


own_dot.defvjp(
    lambda x, w: (x @ w, (x, w.T)),
    lambda res, y_bar: (y_bar @ res[1], res[0].T @ y_bar),
)


@jax.custom_vjp
def fused(x, w):
    return jnp.tanh(x @ w)


def fused_bwd(res, y_bar):
    x, y, w_t = res
    z_bar = y_bar * (1 - y**2)
    return z_bar @ w_t, x.T @ z_bar


fused.defvjp(lambda x, w: (lambda y: (y, (x, y, w.T)))(fused(x, w)), fused_bwd)


@jax.custom_jvp
def own_jvp(x):
    return jnp.where(x > 0, x, 0.1 * x)


own_jvp.defjvps(lambda x_dot, y, x: jnp.where(x > 0, x_dot, 0.1 * x_dot))

CALLS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "checkpoint name": lambda f: lambda *ins: checkpoint_name(f(*ins), "kept"),
}


def conv(x, w):
    """With two taps: the kernel, and the kernel upside down."""
    taps = jnp.stack([w, w[::-1]])
    return lax.conv_general_dilated(
        x[None], taps, (1,), ((0, 1),), dimension_numbers=("NWC", "WIO", "NWC")
    )[0]


class Jax:
    """The backend that builds a program of JAX's own functions."""

    add, sub, mul = map(staticmethod, (jnp.add, jnp.subtract, jnp.multiply))
    div = staticmethod(jnp.divide)
    own_derivative_dot, fused, own_jvp = map(staticmethod, (own_dot, fused, own_jvp))
    stop = staticmethod(lax.stop_gradient)

    def const(self, val):
        return jnp.asarray(val)

    def unary(self, v, name):
        return {
            "tanh": jnp.tanh,
            "sin": jnp.sin,
            "relu": jax.nn.relu,
            "square": jnp.square,
            "exp": jnp.exp,
            "sqrt": jnp.sqrt,
        }[name](v)

    def positive(self, v):
        return (v > 0).astype(v.dtype)

    def where(self, mask, a, b):
        return jnp.where(mask > 0, a, b)

    def sum(self, v):
        return jnp.sum(v)

    def layout(self, w, name):
        return oracle.LAYOUTS[name](jnp, w, 0.5)

    def join(self, w, v, name):
        return oracle.JOINS[name](jnp, w, v)

    def rows(self, w):
        return w[: oracle.ROWS]

    def row(self, w):
        return w[:1]

    def one_of(self, s, i):
        return s[i]

    def under(self, call, w, name):
        f = functools.partial(self.layout, name=name)
        if call == "vmap":  # over a stack of one
            return jax.vmap(f)(w[None])[0]
        return CALLS[call](f)(w)

    def basis(self, w):
        return oracle.BASIS @ w

    def scale(self, w, c):
        return c * w

    def constant_factor(self, w):
        return w * oracle.BASIS

    def quotient(self, w):
        return w / 1.7

    def centred(self, w):
        return w - w.mean(0, keepdims=True)

    def cast(self, w, dtype):
        return w.astype(dtype).astype(w.dtype)

    def masked(self, w, mask):
        return w * mask

    def ordered(self, w, d):
        return w[:, jnp.argsort(d)]

    def cut(self, w, d):
        return lax.dynamic_slice_in_dim(jnp.concatenate([w, w]), jnp.argmax(d), oracle.N)

    def chosen(self, s, d):
        return s[jnp.argmax(d) % oracle.STACK]

    def lookup(self, w, ids):
        return w[ids]

    def experts(self, x, s, ids):
        return jnp.einsum("bi,bio->bo", x, s[ids])

    def dot(self, x, w, form="right"):
        return {
            "right": jnp.dot,
            "einsum": lambda x, w: jnp.einsum("bi,oi->bo", x, w),
            "left": lambda x, w: (w.T @ x.T).T,
            "conv": conv,
            "general": lambda x, w: lax.dot_general(x, w.T, (((1,), (1,)), ((), ()))),
        }[form](x, w)

    def low_precision_dot(self, x, w):
        low = jnp.bfloat16
        return (x.astype(low) @ w.astype(low)).astype(x.dtype)

    def gram(self, w):
        return w.T @ w

    def product(self, w, v):
        return w @ v

    def gate(self, v):
        return jax.nn.leaky_relu(v, 0.1)

    def gated_by(self, a, w):
        return jnp.where(w > 0, a, 0.0)

    def proper_use(self, z, w):
        return jnp.sum(z @ w)

    def sum_of_squares(self, w):
        return jnp.sum(w**2)

    def norm(self, w):
        return jnp.linalg.norm(w)

    def norm_row(self, w):
        return jnp.linalg.norm(w).reshape(1, 1)

    def orthogonality(self, w):
        return jnp.sum((w.T @ w - jnp.eye(oracle.N)) ** 2)

    def normalised(self, w):
        return w / jnp.linalg.norm(w)

    def softmax(self, a):
        return jax.nn.softmax(a, axis=1)

    def layer_norm(self, a, scale):
        return jax.nn.standardize(a, axis=1, epsilon=0.1) * scale

    def attention(self, q, k, v):
        return jax.nn.softmax(q @ k.T, axis=1) @ v

    def beside(self, a, w):
        return jnp.concatenate([a[:1], w[:1]])

    def call(self, kind, f, *ins):
        return CALLS[kind](f)(*ins)

    def cond(self, f, g, d, *ins):
        return lax.cond(d[0] > 0, f, g, *ins)

    def scan_over(self, how, f, h, s, *ins):
        options = {"reverse": {"reverse": True}, "unroll": {"unroll": 2}}.get(how, {})
        return lax.scan(lambda h, w: (f(h, w, *ins), None), h, s, **options)[0]

    def scan_constant(self, how, f, h, *ins):
        if how == "fori":
            return lax.fori_loop(0, 2, lambda _, h: f(h, *ins), h)
        return lax.scan(lambda h, _: (f(h, *ins), None), h, length=2)[0]

    def scan_carry(self, f, g, h, w, *ins):
        def body(carry, _):
            h, w = carry
            return (f(h, w, *ins), g(w)), None

        return lax.scan(body, (h, w), length=2)[0][0]

    def scan_rows(self, f, a, *ins):
        def body(h, row):
            h = f(h, row[None], *ins)
            return h, h[0]

        return lax.scan(body, jnp.zeros_like(a[:1]), a)[1]

    def map_layout(self, w):
        return lax.map(lambda row: row[::-1], w)

    def vmap(self, f, a, *ins):
        return jax.vmap(lambda row: f(row[None], *ins)[0])(a)

    def vmap_both(self, f, s):
        return jax.vmap(f)(s)

    def halved(self, d):
        return lax.while_loop(lambda d: jnp.max(jnp.abs(d)) >= 1, lambda d: d / 2, d)


# Evaluation of traced programs, equation by equation, which compiles each op once for all programs


def evaluate(jaxpr, consts, *args):
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(v):
        return v.val if isinstance(v, core.Literal) else env[v]

    for eqn in jaxpr.eqns:
        outs = evaluate_equation(eqn, [read(v) for v in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def evaluate_equation(eqn, ins):
    name, params = eqn.primitive.name, eqn.params
    if name in ("jit", "closed_call", "custom_jvp_call", "custom_vjp_call"):
        body = params["jaxpr" if name == "jit" else "call_jaxpr"]
        return evaluate(body.jaxpr, body.consts, *ins)
    if name in ("checkpoint", "remat2"):
        return evaluate(params["jaxpr"], (), *ins)
    if name == "cond":
        branch = params["branches"][int(ins[0])]
        return evaluate(branch.jaxpr, branch.consts, *ins[1:])
    if name == "scan":
        return evaluate_scan(params, ins)
    bind_params = eqn.primitive.get_bind_params(params)
    subfuns, bind_params = bind_params if isinstance(bind_params, tuple) else ((), bind_params)
    out = eqn.primitive.bind(*subfuns, *ins, **bind_params)
    return out if eqn.primitive.multiple_results else [out]


def evaluate_scan(params, ins):
    body = params["jaxpr"]
    if "ft_in" in params:  # since JAX 0.11
        n, m, _ = map(len, params["ft_in"].unpack())
    else:
        n, m = params["num_consts"], params["num_carry"]
    consts, carry, xs = ins[:n], ins[n : n + m], [np.asarray(x) for x in ins[n + m :]]
    steps = range(params["length"])
    ys = {}
    for i in reversed(steps) if params["reverse"] else steps:
        out = evaluate(body.jaxpr, body.consts, *consts, *carry, *(x[i] for x in xs))
        carry, ys[i] = out[:m], out[m:]
    return [*carry, *(np.stack([np.asarray(ys[i][k]) for i in steps]) for k in range(len(ys[0])))]


BACKEND = Jax()


class Case(NamedTuple):
    """A program: `build(backend, values by name) -> a number`."""

    build: object
    with_feedback: tuple
    by_x: bool
    text: str = ""


def random_case(seed, wild):
    program, names, by_x = oracle.generate(seed, wild)

    def build(backend, values):
        return oracle.run(backend, program, *(values[name] for name in program.inputs))

    return Case(build, names, by_x, f"seed {seed}, feedback at {names}, {oracle.show(program)}")


def relative_error(actual, expected):
    return max(
        float(np.max(np.abs(np.asarray(actual[k]) - expected[k]), initial=0))
        / (1e-3 + float(np.max(np.abs(expected[k]), initial=0)))
        for k in expected
    )


def gradients(loss, params, args, by_x):
    """A function that evaluates a traced gradient; whatever tracing raises, it raises here."""
    flat, treedef = jax.tree.flatten((params, *args))
    shapes = None

    def f(*flat):
        params, *rest = jax.tree.unflatten(treedef, flat)
        by = (params, rest[-1]["x"]) if by_x else (params, None)

        def of(params, x):
            *others, named = rest
            return loss(params, *others, named if x is None else {**named, "x": x})

        value, (params_bar, x_bar) = jax.value_and_grad(of, (0, 1))(*by)
        return value, {**params_bar, "x": x_bar} if by_x else params_bar

    with jax.numpy_rank_promotion("allow"):  # the tape broadcasts as NumPy does
        traced, shapes = jax.make_jaxpr(f, return_shape=True)(*flat)

    def at(params, *args):
        outs = evaluate(traced.jaxpr, traced.consts, *jax.tree.leaves((params, *args)))
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    return at


@functools.cache
def points():
    """Kernels, other kernels, and feedback of both."""
    names = tuple(oracle.KERNELS)
    params, feedback, args = oracle.draw(1, names)
    others, _, _ = oracle.draw(2, names)
    return params, others, feedback, args


def finite(grads):
    return all(np.max(np.abs(g), initial=0) < 1e4 for g in grads.values())  # not where NaN


def check_tape(case):
    """The tape's exact backpropagation is JAX's own, whatever the transform does."""
    params, _, feedback, args = points()
    feedback = {k: feedback[k] for k in case.with_feedback}
    plain = oracle.judge(case.build, params, feedback, args, case.by_x, plain=True)
    equal = oracle.judge(case.build, params, {k: params[k] for k in feedback}, args, case.by_x)
    if not finite(plain.grads):
        return
    loss = lambda params, args: case.build(BACKEND, {**params, **args})  # noqa: E731
    value, exact = gradients(loss, params, [args], case.by_x)(params, args)
    tight = LOOSE if plain.loose else TIGHT
    assert np.allclose(value, plain.value, rtol=tight, atol=tight), case.text
    assert relative_error(exact, plain.grads) < tight, case.text
    assert equal.refused or relative_error(equal.grads, plain.grads) < 1e-9, case.text


def check(case, report):
    """Compares one program with the definition; returns what happened."""
    params, others, feedback, args = points()
    feedback = {k: feedback[k] for k in case.with_feedback}
    judged = functools.partial(oracle.judge, case.build, args=args, by_x=case.by_x)
    verdict = judged(params, feedback)
    plain = judged(params, feedback, plain=True)
    if not finite(plain.grads):
        return "not finite"
    tight = LOOSE if verdict.loose else TIGHT

    def loss(params, args):
        return case.build(BACKEND, {**params, **args})

    loss_fa = with_feedback(loss)
    try:
        at = gradients(loss_fa, params, [feedback, args], case.by_x)
    except ValueError as error:
        if verdict.refused:
            return "refused rightly"
        report(f"refused: {error}", case)
        return (
            "refused, room left" if verdict.may_refuse or verdict.either else "refused needlessly"
        )

    def compare(what, params, feedback, expected, murky=frozenset()):
        _, actual = at(params, feedback, args)
        expected = {k: g for k, g in expected.items() if k not in murky}
        if expected and not relative_error(actual, expected) < tight:
            worst = {k: relative_error({k: actual[k]}, {k: expected[k]}) for k in expected}
            report(f"differs {what}: {worst}", case)
            return False
        return True

    if verdict.refused and not verdict.either:
        report("not refused", case)
        return "LEAK: not refused"
    equal = {k: params[k] for k in feedback}
    if not compare("from backprop at equal feedback", params, equal, plain.grads):
        return "WRONG at equality"
    if verdict.either:
        return "accepted, room left"
    zeros = {k: 0 * b for k, b in feedback.items()}
    good = compare("at random feedback", params, feedback, verdict.grads, verdict.murky)
    other = judged(others, feedback)
    good &= compare("at other kernels", others, feedback, other.grads, other.murky)
    if not verdict.no_zero:
        none = judged(params, zeros)
        good &= compare("at zero feedback", params, zeros, none.grads, none.murky)
    return "accepted" if good else "LEAK: other gradients"


def survey(cases):
    """Checks programs. Returns how often what happened, and notes of what should be looked at.

    With `SHOW_REFUSED=50` in the environment, prints the first 50 that were refused though the
    definition does not demand it.
    """
    counts, notes = {}, []
    with enable_x64(True):
        for case in cases:
            what = check(case, lambda note, case: notes.append(f"{note}\n{case.text}"))
            counts[what] = counts.get(what, 0) + 1
    print(counts)
    for note in notes[: int(os.environ.get("SHOW_REFUSED", 0))]:
        print("\n" + note)
    bad = [what for what in counts if what.isupper() or what.split()[0] in ("LEAK:", "WRONG")]
    assert not bad, (counts, *notes[:3])
    return counts, notes


# Random programs

CORE, WILD, SLOW, CHUNK = 80, 60, 3000, 20  # numbers of programs; of them in one test


@pytest.mark.parametrize("wild", [False, True], ids=["layers", "changed kernels"])
def test_the_tape_is_backprop_where_nothing_is_replaced(wild):
    with enable_x64(True):
        for seed in range(4):
            check_tape(random_case(seed, wild))


@pytest.mark.parametrize("start", range(0, CORE, CHUNK))
def test_random_programs_get_the_pseudo_gradients_of_the_definition(start):
    counts, notes = survey(random_case(seed, False) for seed in range(start, start + CHUNK))
    assert "refused needlessly" not in counts, notes[:3]


@pytest.mark.parametrize("start", range(0, WILD, CHUNK))
def test_random_programs_that_change_kernels_are_refused_or_as_defined(start):
    survey(random_case(seed, True) for seed in range(start, start + CHUNK))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(10_000, 10_000 + SLOW, SLOW // 20))
def test_thousands_of_random_programs_leak_nothing(start):
    cases = [random_case(seed, seed % 2 == 1) for seed in range(start, start + SLOW // 20)]
    with enable_x64(True):
        for case in cases:
            check_tape(case)
    survey(cases)


# Programs that people write: `(backend, values, activation) -> activation`


def layer(m, h, w):
    return m.unary(m.dot(h, w), "tanh")


def over(f, how="plain", before=None):
    """A scan over the stacked kernels, perhaps laid out before."""

    def build(m, v, h):
        s = v["s"] if before is None else m.vmap_both(lambda w: before(m, v, w), v["s"])
        return m.scan_over(how, lambda h, w: layer(m, h, f(m, v, w)), h, s)

    return build


def constant(f, how="scan_constant"):
    return lambda m, v, h: m.scan_constant(how, lambda h: layer(m, h, f(m, v, v["a"])), h)


def outside(f, how="scan_constant"):
    """Laid out before the loop."""

    def build(m, v, h):
        w = f(m, v, v["a"])
        return m.scan_constant(how, lambda h: layer(m, h, w), h)

    return build


def carried(f):
    return lambda m, v, h: m.scan_carry(
        lambda h, w: layer(m, h, w), lambda w: f(m, v, w), h, v["a"]
    )


def once(f):
    return lambda m, v, h: m.dot(h, f(m, v, v["a"]))


def in_call(kind, f):
    return lambda m, v, h: m.call(kind, lambda h, w: layer(m, h, f(m, v, w)), h, v["a"])


def chosen_by_cond(f):
    return lambda m, v, h: layer(
        m, h, m.cond(lambda w: f(m, v, w), lambda w: m.scale(w, 0.5), v["d"], v["a"])
    )


def in_branches(f):
    return lambda m, v, h: m.cond(
        lambda h, w: layer(m, h, f(m, v, w)), lambda h, w: m.dot(h, w), v["d"], h, v["a"]
    )


def per_example(f):
    return lambda m, v, h: m.vmap(lambda row, w: layer(m, row, f(m, v, w)), h, v["a"])


def recurrent(f):
    return lambda m, v, h: m.scan_rows(
        lambda h, row, w, u: m.unary(m.add(m.dot(h, f(m, v, w)), m.dot(row, u)), "tanh"),
        h,
        v["a"],
        v["b"],
    )


def elementwise(f):
    return lambda m, v, h: m.mul(h, m.rows(f(m, v, v["a"])))


def elementwise_carried(f):
    return lambda m, v, h: m.scan_constant(
        "scan_constant", lambda h: m.add(m.mul(h, m.rows(f(m, v, v["a"]))), h), h
    )


LAYOUTS = {name: functools.partial(lambda name, m, v, w: m.layout(w, name), name)
           for name in oracle.LAYOUTS} | {
    "itself": lambda m, v, w: w,
    "scaled": lambda m, v, w: m.scale(w, -0.7),
    "constant factor": lambda m, v, w: m.constant_factor(w),
    "quotient": lambda m, v, w: m.quotient(w),
    "constant's product": lambda m, v, w: m.basis(w),
    "cast": lambda m, v, w: m.cast(w, "float32"),
    "bfloat16": lambda m, v, w: m.cast(w, "bfloat16"),
    "mask as an argument": lambda m, v, w: m.masked(w, v["mask"]),
    "selected by an argument": lambda m, v, w: m.where(v["mask"], w, m.layout(w, "flip")),
    "gather by data": lambda m, v, w: m.ordered(w, v["d"]),
    "slice by data": lambda m, v, w: m.cut(w, v["d"]),
    "map": lambda m, v, w: m.map_layout(w),
    "jit": lambda m, v, w: m.under("jit", w, "transpose"),
    "remat": lambda m, v, w: m.under("remat", w, "transpose"),
    "vmap": lambda m, v, w: m.under("vmap", w, "transpose"),
    "cond": lambda m, v, w: m.cond(
        lambda w: m.layout(w, "transpose"), lambda w: m.scale(w, 2.0), v["d"], w
    ),
    "with another": lambda m, v, w: m.join(w, v["b"], "rows of both"),
    "stopped": lambda m, v, w: m.stop(w),
    "order by a while loop": lambda m, v, w: m.ordered(w, m.halved(v["d"])),
}  # fmt: skip
BROKEN = {
    "tanh": lambda m, v, w: m.unary(w, "tanh"),
    "relu": lambda m, v, w: m.unary(w, "relu"),
    "leaky relu": lambda m, v, w: m.gate(w),
    "own derivative": lambda m, v, w: m.own_jvp(w),
    "softmax": lambda m, v, w: m.softmax(w),
    "normalised": lambda m, v, w: m.normalised(w),
    "centred": lambda m, v, w: m.centred(w),
    "gram": lambda m, v, w: m.gram(w),
    "sum of kernels": lambda m, v, w: m.add(w, v["b"]),
    "symmetric": lambda m, v, w: m.add(w, m.layout(w, "transpose")),
    "product of kernels": lambda m, v, w: m.product(w, v["b"]),
    "product with a param": lambda m, v, w: m.product(w, v["p"]),
    "scaled by a param": lambda m, v, w: m.mul(w, v["p"]),
    "plus a param": lambda m, v, w: m.add(w, v["p"]),
    "plus data": lambda m, v, w: m.add(w, v["mask"]),
    "masked by itself": lambda m, v, w: m.mul(w, m.positive(w)),
    "masked by another": lambda m, v, w: m.where(m.positive(v["b"]), w, m.scale(w, 2.0)),
    "its mask": lambda m, v, w: m.positive(w),
    "square": lambda m, v, w: m.unary(w, "square"),
    "stopped": lambda m, v, w: m.stop(m.unary(w, "tanh")),
}
WAYS = {
    "once": once,
    "jit": functools.partial(in_call, "jit"),
    "remat": functools.partial(in_call, "remat"),
    "scanned over": over,
    "scanned over in reverse": functools.partial(over, how="reverse"),
    "scanned over, before": lambda f: over(LAYOUTS["itself"], before=f),
    "a scan's constant": constant,
    "before a scan": outside,
    "a fori's constant": functools.partial(constant, how="fori"),
    "a scan's carry": carried,
    "a branch": in_branches,
    "returned by cond": chosen_by_cond,
    "under vmap": per_example,
    "recurrent": recurrent,
    "elementwise": elementwise,
    "elementwise in a scan": elementwise_carried,
}
OTHER = {
    **{
        f"product: {form}": functools.partial(lambda form, m, v, h: m.dot(h, v["a"], form), form)
        for form in ("right", "left", "einsum", "conv", "general")
    },
    "a bias": lambda m, v, h: m.add(layer(m, h, v["a"]), v["r"]),
    "residual": lambda m, v, h: m.dot(m.add(h, layer(m, h, v["a"])), v["b"]),
    "layer norm": lambda m, v, h: m.dot(m.layer_norm(layer(m, h, v["a"]), v["r"]), v["b"]),
    "layer norm's scale": lambda m, v, h: m.layer_norm(h, m.row(v["a"])),
    "attention": lambda m, v, h: m.attention(m.dot(h, v["a"]), m.dot(h, v["b"]), m.dot(h, v["c"])),
    "shared": lambda m, v, h: layer(m, layer(m, h, v["a"]), v["a"]),
    "tied": lambda m, v, h: m.dot(layer(m, h, v["a"]), m.layout(v["a"], "transpose")),
    "tied embedding": lambda m, v, h: m.dot(
        layer(m, m.add(h, m.lookup(v["a"], v["ids"])), v["b"]), v["a"], "einsum"
    ),
    "embedding": lambda m, v, h: m.add(layer(m, m.lookup(v["a"], v["ids"]), v["b"]), h),
    "embedding without feedback": lambda m, v, h: m.add(
        layer(m, m.lookup(v["p"], v["ids"]), v["b"]), h
    ),
    "experts": lambda m, v, h: m.experts(layer(m, h, v["a"]), v["s"], v["ids"]),
    "an expert by data": lambda m, v, h: m.dot(h, m.chosen(v["s"], v["d"])),
    "mixed precision": lambda m, v, h: m.low_precision_dot(m.low_precision_dot(h, v["a"]), v["b"]),
    "own derivative that saves w.T": lambda m, v, h: m.own_derivative_dot(h, v["a"]),
    "fused layer that saves w.T": lambda m, v, h: m.fused(m.fused(h, v["a"]), v["b"]),
    "the same in a scan": lambda m, v, h: m.scan_over("plain", m.fused, h, v["s"]),
    "the same in a scan, the kernel constant": lambda m, v, h: m.scan_constant(
        "scan_constant", lambda h: m.fused(h, m.layout(v["a"], "roll")), h
    ),
    "the same under remat": lambda m, v, h: m.call("remat", m.fused, h, v["a"]),
    "the same under vmap": lambda m, v, h: m.vmap(m.fused, h, v["a"]),
    "the same in a branch": lambda m, v, h: m.cond(
        m.fused, lambda h, w: m.own_derivative_dot(h, w), v["d"], h, v["a"]
    ),
    "own derivative": lambda m, v, h: m.dot(m.own_jvp(m.dot(h, v["a"])), v["b"]),
    "sum with an activation": lambda m, v, h: m.dot(m.add(h, m.rows(v["a"])), v["a"]),
    "sum with an activation in a scan": lambda m, v, h: m.scan_constant(
        "scan_constant", lambda h: m.add(m.dot(h, v["a"]), m.rows(v["a"])), h
    ),
    "kernel over activation": lambda m, v, h: m.div(m.rows(v["a"]), m.unary(h, "exp")),
    "scale by a norm": lambda m, v, h: m.mul(m.dot(h, v["b"]), m.stop(m.norm_row(v["a"]))),
}
JOINED = {  # with another kernel, or with a param, and then laid out further
    "two, scaled": lambda m, v, w: m.scale(m.join(w, v["b"], "rows of both"), 0.5),
    "two, a constant's product": lambda m, v, w: m.basis(m.join(w, v["b"], "select of both")),
    "two, masked": lambda m, v, w: m.masked(m.join(w, v["b"], "select of both"), v["mask"]),
    "a param, scaled": lambda m, v, w: m.scale(m.join(w, v["p"], "rows of both"), 0.5),
    "a param, transposed": lambda m, v, w: m.layout(
        m.join(w, v["p"], "columns of both"), "transpose"
    ),
    "after a mask": lambda m, v, w: m.join(m.masked(w, v["mask"]), v["b"], "rows of both"),
    "after a gather by data": lambda m, v, w: m.join(
        m.ordered(w, v["d"]), v["b"], "one of a stack"
    ),
    "selected after a slice by data": lambda m, v, w: m.where(v["mask"], m.cut(w, v["d"]), v["b"]),
    "after a cond": lambda m, v, w: m.join(
        m.cond(lambda w: w, lambda w: m.layout(w, "flip"), v["d"], w), v["b"], "columns of both"
    ),
}
HIDDEN = {  # changed kernels where the same kernel, or rows of it, hide them
    "tanh(w) in a sum, before w": lambda m, v, h: m.dot(
        m.add(h, m.unary(m.rows(v["a"]), "tanh")), v["a"]
    ),
    "tanh(w) in a sum, before w elementwise": lambda m, v, h: m.mul(
        m.add(h, m.unary(m.rows(v["a"]), "tanh")), m.rows(v["a"])
    ),
    "tanh(w) in a sum, in a scan": lambda m, v, h: m.scan_constant(
        "scan_constant",
        lambda h: m.dot(m.add(h, m.unary(m.rows(v["a"]), "tanh")), v["a"]),
        h,
    ),
    "tanh(w) in a sum, before another": lambda m, v, h: m.dot(
        m.add(h, m.unary(m.rows(v["a"]), "tanh")), v["b"]
    ),
    "a gate in a sum, scaled by another that is stopped": lambda m, v, h: m.experts(
        m.mul(m.add(m.gate(m.rows(v["a"])), h), m.stop(m.rows(v["b"]))), v["s"], v["ids"]
    ),
    "tanh(w) in a sum, scaled by another that is stopped": lambda m, v, h: m.mul(
        m.add(h, m.unary(m.rows(v["a"]), "tanh")), m.stop(m.rows(v["b"]))
    ),
    "looked-up rows, and tanh(w)": lambda m, v, h: m.dot(
        m.lookup(v["a"], v["ids"]), m.unary(v["a"], "tanh")
    ),
    "an activation and rows, and tanh(w)": lambda m, v, h: m.dot(
        m.add(h, m.lookup(v["a"], v["ids"])), m.unary(v["a"], "tanh")
    ),
    "tanh of rows by data": lambda m, v, h: m.mul(
        h, m.unary(m.rows(m.ordered(v["a"], v["d"])), "tanh")
    ),
    "the kernel's own product, after an activation": lambda m, v, h: m.dot(
        m.dot(h, v["a"]), m.product(v["a"], v["a"])
    ),
    "tanh of a concatenation": lambda m, v, h: m.unary(m.beside(h, v["a"]), "tanh"),
    "square of a concatenation": lambda m, v, h: m.unary(m.beside(h, v["a"]), "square"),
}
WITHIN = {  # as HIDDEN, but where the definition goes through feedback
    "looked-up rows, and the kernel": lambda m, v, h: m.add(
        h, m.dot(m.lookup(v["a"], v["ids"]), v["a"])
    ),
    "an activation and rows, and the kernel": lambda m, v, h: m.dot(
        m.add(h, m.lookup(v["a"], v["ids"])), v["a"]
    ),
    "a square, in a sum": lambda m, v, h: m.dot(
        m.add(h, m.unary(m.rows(v["a"]), "square")), v["a"]
    ),
    "multiplied by its norm": lambda m, v, h: m.mul(h, m.norm_row(v["a"])),
}
OWN = {  # terms of the loss, of kernels alone
    "squares": lambda m, v: m.sum_of_squares(v["a"]),
    "norm": lambda m, v: m.norm(v["a"]),
    "orthogonality": lambda m, v: m.orthogonality(v["a"]),
    "squares of a constant's product": lambda m, v: m.sum_of_squares(m.basis(v["a"])),
    "squares, masked": lambda m, v: m.sum_of_squares(m.masked(v["a"], v["mask"])),
    "squares, laid out": lambda m, v: m.sum_of_squares(m.layout(v["a"], "roll")),
    "tanh": lambda m, v: m.sum(m.unary(v["a"], "tanh")),
    "squares of two": lambda m, v: m.add(m.sum_of_squares(v["a"]), m.sum_of_squares(v["b"])),
    "norm of two": lambda m, v: m.unary(
        m.add(m.sum_of_squares(v["a"]), m.sum_of_squares(v["b"])), "sqrt"
    ),
    "softmax": lambda m, v: m.sum_of_squares(m.softmax(v["a"])),
    "normalised": lambda m, v: m.sum(m.unary(m.normalised(v["a"]), "sin")),
    "squares of sums": lambda m, v: m.sum_of_squares(m.centred(v["a"])),
}

OWN_OF_SEVERAL = {  # as penalties of a flattened tree of params
    "squares of two kernels": lambda m, v: m.sum_of_squares(m.join(v["a"], v["b"], "rows of both")),
    "squares of a kernel and a param": lambda m, v: m.sum_of_squares(
        m.join(v["a"], v["p"], "rows of both")
    ),
    "sines of two kernels": lambda m, v: m.sum(
        m.unary(m.join(v["a"], v["b"], "select of both"), "sin")
    ),
    "norm of two kernels": lambda m, v: m.norm(m.join(v["a"], v["b"], "rows of both")),
    "norm of a kernel and a param": lambda m, v: m.norm(m.join(v["p"], v["a"], "rows of both")),
}


def model(middle, *, first=False, own=None):
    """A loss: `middle` between a first layer and the sum of sines, and proper uses of kernels."""

    def build(m, v):
        z = m.unary(m.dot(v["x"], v["p"]), "tanh")
        loss = m.sum(m.unary(middle(m, v, v["x"] if first else z), "sin"))
        if own is not None:
            loss = m.add(loss, own(m, v))
        for name in oracle.KERNELS:
            loss = m.add(loss, m.proper_use(z, v[name]))
        return loss

    return build


def case(middle, *, by_x=True, names=tuple(oracle.KERNELS), **options):
    return Case(model(middle, **options), names, by_x)


def a_share_of(cases, way):
    """Every way and every layout comes once, and a fifth of their pairs; all of them are slow."""
    offset = list(WAYS).index(way)
    return {k: f for i, (k, f) in enumerate(cases.items()) if (i + offset) % 5 == 0}


def assert_all(what, cases):
    with enable_x64(True):
        for name, case in cases.items():
            notes = []
            happened = check(case, lambda note, case, notes=notes: notes.append(note))
            assert happened in what, (name, happened, notes)


def assert_layouts_accepted(way, layouts):
    assert_all(["accepted"], {k: case(WAYS[way](f)) for k, f in layouts.items()})


def assert_broken_refused(way, broken):
    assert_all(["refused rightly"], {k: case(WAYS[way](f)) for k, f in broken.items()})


@pytest.mark.parametrize("way", WAYS)
def test_kernels_in_any_layout_get_the_pseudo_gradients_of_the_definition(way):
    assert_layouts_accepted(way, a_share_of(LAYOUTS, way))


@pytest.mark.parametrize("way", WAYS)
def test_kernels_changed_otherwise_are_refused(way):
    assert_broken_refused(way, a_share_of(BROKEN, way))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_layout_in_every_way(way):
    assert_layouts_accepted(way, LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_change_in_every_way(way):
    assert_broken_refused(way, BROKEN)


def test_layers_that_people_write_get_the_pseudo_gradients_of_the_definition():
    assert_all(["accepted"], {k: case(middle) for k, middle in OTHER.items()})


def test_kernels_joined_and_laid_out_further_get_their_feedback():
    assert_layouts_accepted("once", JOINED)
    assert_layouts_accepted("a scan's constant", JOINED)


def test_changed_kernels_do_not_hide_behind_themselves():
    assert_all(["refused rightly"], {k: case(middle) for k, middle in HIDDEN.items()})
    allowed = ["accepted", "refused, room left"]
    assert_all(allowed, {k: case(middle) for k, middle in WITHIN.items()})


def test_terms_of_kernels_alone_are_exact():
    middle = OTHER["shared"]
    assert_all(["accepted"], {k: case(middle, own=own) for k, own in OWN.items()})


def test_penalties_of_several_kernels_in_one_array_are_exact_or_refused():
    allowed = ["accepted", "refused, room left"]
    assert_all(allowed, {k: case(OTHER["shared"], own=own) for k, own in OWN_OF_SEVERAL.items()})


def test_kernels_changed_in_a_first_layer_are_refused_or_get_feedback():
    """An activation multiplies their tangents, though `x` is not differentiated."""
    allowed = ["accepted", "refused rightly", "refused, room left", "refused needlessly"]
    cases = {k: case(once(f), first=True, by_x=False) for k, f in BROKEN.items()}
    assert_all(allowed, cases)


def test_one_kernel_with_feedback_beside_others_without():
    cases = {k: case(m, names=("a",)) for k, m in OTHER.items()}
    assert_all(["accepted"], cases)


# Functions that are linear in x


def linear_points():
    rng = np.random.RandomState(3)
    x, w, other, b = (
        rng.uniform(0.3, 1.1, shape) * rng.choice([-1, 1], shape)
        for shape in ((3, 4), (4, 4), (4, 4), (4, 4))
    )
    return x, w, other, b


def x_bars(f, by_params):
    """`(w, b) -> x_bar`, and at plain backprop `w -> x_bar`; x is data, or a param."""

    def loss(params, args):
        x = params["x"] if by_params else args["x"]
        y = f(x, params["w"])
        weights = np.cos(np.arange(y.size)).reshape(y.shape)
        return jnp.sum(y * weights) + jnp.sum(x @ params["w"])  # a proper use beside

    def of(fun):
        def at(*trees, x):
            w = {"w": trees[0]}
            if by_params:
                by_x = lambda x: fun({**w, "x": x}, *trees[1:], {})  # noqa: E731
            else:
                by_x = lambda x: fun(w, *trees[1:], {"x": x})  # noqa: E731
            return jax.grad(by_x)(x)

        return at

    return of(lambda params, args: loss(params, args)), of(
        lambda params, b, args: with_feedback(loss)(params, {"w": b}, args)
    )


def check_linear(f, by_params):
    x, w, other, b = linear_points()
    plain, ours = x_bars(f, by_params)
    with jax.numpy_rank_promotion("allow"):
        try:
            traced = jax.make_jaxpr(lambda w, b, x: ours(w, b, x=x))(w, b, x)
        except ValueError:
            return "refused", None
        expected = jax.make_jaxpr(lambda w, x: plain(w, x=x))(w, x)
    at = functools.partial(evaluate, traced.jaxpr, traced.consts)
    exact = functools.partial(evaluate, expected.jaxpr, expected.consts)
    (first,), (second,), (equal,), (none,) = (
        at(w, b, x),
        at(other, b, x),
        at(b, b, x),
        at(w, 0 * b, x),
    )
    (backprop,), (zero,) = exact(b, x), exact(0 * b, x)
    errors = {
        "another kernel": relative_error({"x": second}, {"x": first}),
        "backprop at equality": relative_error({"x": equal}, {"x": backprop}),
        "backprop through feedback": relative_error({"x": first}, {"x": backprop}),
    }
    if np.all(np.isfinite(zero)):
        errors["no feedback"] = relative_error({"x": none}, {"x": zero})
    wrong = {k: e for k, e in errors.items() if not e < TIGHT}
    return ("LEAK", wrong) if wrong else ("through feedback", None)


def assert_no_error_depends_on_kernels(functions, by_params):
    """Returns the names of those that were refused."""
    with enable_x64(True):
        happened = {name: check_linear(f, by_params) for name, f in functions.items()}
    leaks = {name: what for name, what in happened.items() if what[0] == "LEAK"}
    assert not leaks
    return [name for name, what in happened.items() if what[0] == "refused"]


def test_the_error_of_a_linear_function_goes_through_feedback():
    assert not assert_no_error_depends_on_kernels(linear_functions.THROUGH, by_params=False)


def test_the_error_of_a_linear_function_does_not_depend_on_its_kernel():
    assert_no_error_depends_on_kernels(linear_functions.HIDDEN, by_params=False)


@pytest.mark.slow
@pytest.mark.parametrize("group", ["THROUGH", "HIDDEN"])
def test_the_same_by_a_param_without_feedback(group):
    assert_no_error_depends_on_kernels(getattr(linear_functions, group), by_params=True)
