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
import numpy as np
import oracle
import pytest
from jax import lax
from jax.extend import core

from soap_jax import with_feedback

TIGHT, LOOSE = 1e-5, 0.06  # of the largest gradient; casts to float32; bfloat16 rounds in another order
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
    "checkpoint name": lambda f: (
        lambda *ins: jax.ad_checkpoint.checkpoint_name(f(*ins), "kept")
    ),
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
    if name in ("jit", "pjit", "closed_call", "core_call"):
        return evaluate(params["jaxpr"].jaxpr, params["jaxpr"].consts, *ins)
    if name in ("custom_jvp_call", "custom_vjp_call"):
        return evaluate(params["call_jaxpr"].jaxpr, params["call_jaxpr"].consts, *ins)
    if name in ("checkpoint", "remat", "remat2"):
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
    n, m, body = params["num_consts"], params["num_carry"], params["jaxpr"]
    consts, carry, xs = ins[:n], ins[n : n + m], [np.asarray(x) for x in ins[n + m :]]
    steps = range(params["length"])
    ys = {}
    for i in reversed(steps) if params["reverse"] else steps:
        out = evaluate(body.jaxpr, body.consts, *consts, *carry, *(x[i] for x in xs))
        carry, ys[i] = out[:m], out[m:]
    return [*carry, *(np.stack([np.asarray(ys[i][k]) for i in steps]) for k in range(len(ys[0])))]


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


def check(case, report):
    """Compares one program with the definition; returns what happened."""
    params, others, feedback, args = points()
    feedback = {k: feedback[k] for k in case.with_feedback}
    judged = functools.partial(oracle.judge, case.build, args=args, by_x=case.by_x)
    verdict = judged(params, feedback)
    plain = judged(params, feedback, plain=True)
    if not all(np.all(np.isfinite(g)) and np.max(np.abs(g)) < 1e4 for g in plain.grads.values()):
        return "not finite"
    tight = LOOSE if verdict.loose else TIGHT

    def loss(params, args):
        return case.build(Jax(), {**params, **args})

    def loss_fa(params, feedback, args):
        return with_feedback(lambda params, args: loss(params, args))(params, feedback, args)

    value, exact = gradients(loss, params, [args], case.by_x)(params, args)
    # The tape itself, before anything else.
    assert np.allclose(value, plain.value, rtol=tight, atol=tight), case.text
    assert relative_error(exact, plain.grads) < tight, ("the tape is wrong", case.text)

    try:
        at = gradients(loss_fa, params, [feedback, args], case.by_x)
    except ValueError as error:
        if verdict.refused:
            return "refused rightly"
        report(f"refused: {error}", case)
        return "refused, room left" if verdict.may_refuse or verdict.either else "refused needlessly"

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
    if not compare("from backprop at equal feedback", params, equal, exact):
        return "WRONG at equality"
    if verdict.either:
        return "accepted, room left"
    zeros = {k: 0 * b for k, b in feedback.items()}
    good = compare("at random feedback", params, feedback, verdict.grads, verdict.murky)
    other = judged(others, feedback)
    good &= compare("at other kernels", others, feedback, other.grads, other.murky)
    if not verdict.no_zero:
        with np.errstate(all="ignore"):
            none = judged(params, zeros)
        good &= compare("at zero feedback", params, zeros, none.grads, none.murky)
    return "accepted" if good else "LEAK: other gradients"


def survey(cases, sample=0):
    """Checks programs; prints counts, and the first refused needlessly. Returns the counts."""
    counts, texts = {}, []
    with enable_x64(True):
        for case in cases:
            notes = []
            what = check(case, lambda note, case, notes=notes: notes.append((note, case.text)))
            counts[what] = counts.get(what, 0) + 1
            if notes and what not in ("accepted", "refused rightly"):
                texts += [f"{what}\n{note}\n{text}" for note, text in notes]
    print(counts)
    for text in texts[:sample]:
        print("\n" + text)
    return counts, texts
