"""Pseudo-gradients by their definition: random programs, and a NumPy tape that evaluates them.

The definition: backwards, no error passes a factor that is made of kernels with feedback and of no
activation, unless that factor is their feedback. So the tape carries for every value what it is
made of (`Value.made`), and backwards decides factor by factor (`Tape.factor`): exact, through
feedback, or refused. A kernel's own term, such as L2, stays exact until an activation multiplies
it. Where the definition leaves room the tape says so (`Verdict`) instead of choosing.

A program is data: equations that name methods of a backend. `Tape` is one backend; the other, JAX
itself, is in `test_no_silent_backprop.py`. Nothing here knows JAX or the library.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

N, ROWS, STACK = 3, 2, 2  # kernels are (N, N) or (STACK, N, N); activations are (ROWS, N)
BASIS = np.linspace(-1.2, 1.1, N * N).reshape(N, N)
TRIANGLE = np.tril(np.ones((N, N))) > 0
FLOAT_ARGS = ("x", "d", "mask")  # of a program, beside the integers `ids`


# What a value is made of
CONST = "constant"
DATA = "data"  # of arguments, without a tangent
ACT = "activation"  # of arguments, with a tangent; or a product of weights with arguments
PARAM = "param"  # of params that have no feedback
WEIGHTS = "weights"  # a layout of kernels with feedback: `Value.feedback` is the same of feedback
BROKEN = "broken"  # of kernels in any other way
NUMBER = "number"  # a single number, of whole kernels
ROWS_OF = "looked up"  # rows of a kernel, by an integer argument
MIXED = "mixed"  # weights beside activations in one array
OF_KERNELS = (WEIGHTS, BROKEN, NUMBER)


class Refused(Exception):
    """An error would pass a factor that is made of kernels and is not their feedback."""


class Value:
    """A value on the tape.

    Attributes:
        val: its array.
        made: what it is made of.
        feedback: the same derivation of feedback, where `made` is a layout.
        kernels: names of the kernels with feedback that it is made of.
        param: whether params without feedback are in it as well.
        tangent: whether it depends differentiably on what is differentiated.
        whole: whether it is made of every element of its kernels.
        muddled: a param combined elementwise with data: with weights, the definition leaves room.
        parents: pairs `(value, pull)`; `pull(kind, bar) -> (kind, bar)` for that parent.
    """

    def __init__(self, val, made, *, feedback=None, kernels=(), param=False, tangent=False, **more):
        self.val, self.made, self.feedback = np.asarray(val), made, feedback
        self.kernels, self.param, self.tangent = frozenset(kernels), param, tangent
        self.whole = more.get("whole", True)
        self.muddled = more.get("muddled", False)
        self.parents = []
        self.bars = {}

    @property
    def shape(self):
        return self.val.shape


def unbroadcast(bar, shape):
    bar = bar.sum(axis=tuple(range(bar.ndim - len(shape))))
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and bar.shape[i] != 1)
    return bar.sum(axis=axes, keepdims=True)


def to_bfloat16(x):
    """Rounded to nearest even, through float32."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def side_by_side(*made):
    """Of values that stand in one array: concatenated, selected, the two results of a cond."""
    made = set(made) - {CONST}
    if not made:
        return CONST
    if len(made) == 1:
        return made.pop()
    if MIXED in made or (made & {*OF_KERNELS} and made & {ACT, ROWS_OF}):
        return MIXED
    if made & {ACT, ROWS_OF} or made <= {DATA, PARAM}:
        return ACT
    return WEIGHTS if made <= {WEIGHTS, PARAM} else BROKEN


LAYOUTS = {  # of an (N, N) kernel; c is a constant
    "transpose": lambda xp, w, c: w.T,
    "reversed rows": lambda xp, w, c: w[::-1],
    "flip": lambda xp, w, c: xp.flip(w, axis=1),
    "roll": lambda xp, w, c: xp.roll(w, 1, axis=1),
    "reshape": lambda xp, w, c: xp.swapaxes(w.reshape(N, 1, N), 0, 2).reshape(N, N),
    "pad": lambda xp, w, c: xp.pad(w[1:], ((0, 1), (0, 0)), constant_values=c),
    "concatenate": lambda xp, w, c: xp.concatenate([w[:, 1:], w[:, :1]], axis=1),
    "beside a constant": lambda xp, w, c: xp.concatenate([w[1:], xp.full((1, N), c)]),
    "constant rows": lambda xp, w, c: w[np.array([2, 0, 0])],
    "squeeze": lambda xp, w, c: xp.squeeze(w[None, ..., None], (0, 3)),
    "broadcast": lambda xp, w, c: xp.broadcast_to(w[:1], (N, N)),
    "select": lambda xp, w, c: xp.where(TRIANGLE, w, c),
    "stack": lambda xp, w, c: xp.stack([w[2], w[0], w[1]]),
    "repeat": lambda xp, w, c: xp.repeat(w, 2, axis=1)[:, 1:-2],
}
JOINS = {  # of two (N, N) kernels
    "rows of both": lambda xp, w, v: xp.concatenate([w[:1], v[1:]]),
    "select of both": lambda xp, w, v: xp.where(TRIANGLE, w, v),
    "one of a stack": lambda xp, w, v: xp.stack([w, v])[1],
    "columns of both": lambda xp, w, v: xp.stack([w[:, 0], v[:, 1], w[:, 2]], axis=1),
}
UNARY = {
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "sin": (np.sin, np.cos),
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0) * 1.0),
    "square": (np.square, lambda x: 2 * x),
    "exp": (np.exp, np.exp),
    "rsqrt": (lambda x: x**-0.5, lambda x: -0.5 * x**-1.5),
    "sqrt": (np.sqrt, lambda x: 0.5 * x**-0.5),
    "reciprocal": (lambda x: 1 / x, lambda x: -(x**-2.0)),
    "leaky": (lambda x: np.where(x > 0, x, 0.1 * x), lambda x: np.where(x > 0, 1, 0.1)),
}


class Tape:
    """Evaluates programs with NumPy, and their pseudo-gradients by definition.

    Args:
        plain: exact backpropagation, whatever the factors are made of.

    Attributes:
        may_refuse: the definition leaves room to refuse what was pulled back.
        either: it leaves room for anything.
        no_zero: feedback was a divisor.
        loose: bfloat16 rounds the result.
    """

    def __init__(self, plain=False):
        self.plain, self.values = plain, []
        self.may_refuse = self.either = self.no_zero = self.loose = False

    # Values

    def new(self, val, made, parents=(), **more):
        parents = [(v, pull) for v, pull in parents if v.tangent]
        value = Value(val, made, tangent=bool(parents), **more)
        if value.made == ACT and not value.tangent:
            value.made = DATA
        if value.made in (WEIGHTS, ROWS_OF):
            assert value.feedback is not None and value.feedback.shape == value.shape
        value.parents = parents
        self.values.append(value)
        return value

    def const(self, val):
        return self.new(val, CONST)

    def leaf(self, val, made, **more):
        value = self.new(val, made, **more)
        value.tangent = made not in (CONST, DATA)
        return value

    def derived(self, val, made, ins, parents, feedback=None, **more):
        kernels = frozenset().union(*(v.kernels for v in ins))
        if made in (ACT, DATA):
            kernels = frozenset()
        param = any(v.param or v.made == PARAM for v in ins)
        of_data = made == PARAM and any(v.made == DATA for v in ins)
        muddled = of_data or any(v.muddled for v in ins if made not in (ACT, DATA))
        if muddled and any(v.made in OF_KERNELS for v in ins):
            self.either = True
        more.setdefault("whole", all(v.whole for v in ins))
        return self.new(
            val,
            made,
            parents,
            feedback=feedback if made in (WEIGHTS, ROWS_OF) else None,
            kernels=kernels,
            param=param,
            muddled=muddled,
            **more,
        )

    # The factor rule

    def own(self, factor, operand):
        """Whether the operand's tangent is that of the kernel that the factor is made of."""
        if operand.made not in OF_KERNELS:
            return "no"
        if len(operand.kernels) == 1 and not operand.param:
            return "own" if factor.kernels == operand.kernels else "no"
        return "perhaps" if factor.kernels & operand.kernels else "no"

    def factor(self, factor, operand, kind, *, product=False, elementwise=False):
        """The factor's array that an error of this kind passes to the operand; and its kind then.

        Kinds of errors: "pure", no activation has multiplied it; "touched", one has; "unsure", only
        another kernel's feedback has; "murky", the definition leaves room for its value.
        """
        made = factor.made
        touched = kind if kind == "murky" else "touched"
        if self.plain or made in (CONST, PARAM):
            return factor.val, kind
        if made == DATA:
            return factor.val, touched if product else kind
        if (
            made == ACT and operand.made == NUMBER
        ):  # its gradient may be a kernel's own term, or not
            self.may_refuse = True
            return factor.val, "murky"
        if made == ACT:
            return factor.val, touched
        if made == NUMBER:
            if factor.whole:
                return factor.val, kind
            self.may_refuse = True
            return factor.val, "murky"
        if made == MIXED:
            if operand.made not in OF_KERNELS:
                raise Refused(made)
            self.may_refuse = True
            return factor.val, "murky"
        if made == ROWS_OF:
            if operand.made == ACT:
                return factor.feedback, touched
            if operand.made in (WEIGHTS, BROKEN, PARAM):
                return factor.val, touched
            self.may_refuse = True
            return factor.val, "murky"
        own = self.own(factor, operand)
        if own == "perhaps" and kind == "pure" and elementwise:  # several kernels in one penalty
            self.may_refuse = True
            return factor.val, kind
        if made == WEIGHTS:
            if factor.shape == ():  # a sum over a whole kernel: layout, or a number
                self.may_refuse = True
                return factor.val, "murky"
            if own == "no":
                self.may_refuse |= operand.made in OF_KERNELS
                return factor.feedback, "unsure" if kind == "pure" else kind
            if own == "own" and kind == "pure":
                return factor.val, kind
            self.may_refuse = True
            if own == "own" and kind == "touched":
                return factor.feedback, kind
            return factor.val, "murky"
        assert made == BROKEN
        if own == "no" or kind == "touched":
            raise Refused(made)
        if own == "own" and kind == "pure":
            return factor.val, kind
        self.may_refuse = True
        return factor.val, "murky"

    def backward(self, loss, seed=1.0):
        loss.bars = {"pure": np.full(loss.shape, seed)}
        for value in reversed(self.values):
            for kind, bar in value.bars.items():
                if value.made == NUMBER and kind == "touched":
                    kind = "murky"  # its own derivative may be exact, or pass feedback
                for parent, pull in value.parents:
                    new, parent_bar = pull(kind, bar)
                    assert parent_bar.shape == parent.shape, (parent_bar.shape, parent.shape)
                    parent.bars[new] = parent.bars.get(new, 0) + parent_bar

    # Primitives

    def rearrange(self, f, *ins):
        """A layout op: `f(*indices) -> (indices, constant)`, the constant for indices < 0."""
        sizes = np.cumsum([0, *(v.val.size for v in ins)])
        indices = [
            start + np.arange(v.val.size).reshape(v.shape)
            for start, v in zip(sizes[:-1], ins, strict=True)
        ]
        index, constant = f(*indices)

        def lay(arrays):
            flat = np.concatenate([np.ravel(a) for a in arrays])
            return np.where(index >= 0, flat[np.maximum(index, 0)], constant)

        def pull_to(i):
            def pull(kind, bar):
                flat = np.zeros(sizes[-1])
                np.add.at(flat, index[index >= 0], bar[index >= 0])
                return kind, flat[sizes[i] : sizes[i + 1]].reshape(ins[i].shape)

            return pull

        made = side_by_side(*(v.made for v in ins))
        feedback = None
        if made in (WEIGHTS, ROWS_OF):
            feedback = lay([v.val if v.feedback is None else v.feedback for v in ins])
        whole = len(np.unique(index[index >= 0])) == sizes[-1]
        return self.derived(
            lay([v.val for v in ins]),
            made,
            ins,
            [(v, pull_to(i)) for i, v in enumerate(ins)],
            feedback,
            whole=whole and all(v.whole for v in ins),
        )

    def add(self, a, b, sign=1):
        made = {a.made, b.made} - {CONST}
        if not made:
            out = CONST
        elif made & {ACT, ROWS_OF}:
            out = ACT
        elif MIXED in made:
            out = MIXED
        elif made & {WEIGHTS, BROKEN}:
            out = BROKEN
        elif NUMBER in made:
            out = NUMBER
        else:
            out = PARAM if PARAM in made else DATA

        def pull(v, s):
            return v, lambda kind, bar: (kind, unbroadcast(s * bar, v.shape))

        return self.derived(a.val + sign * b.val, out, (a, b), [pull(a, 1), pull(b, sign)])

    def sub(self, a, b):
        return self.add(a, b, -1)

    def mul(self, a, b):
        pair = {a.made, b.made}
        made = pair - {CONST, DATA}
        feedback = None
        if not made:
            out = DATA if DATA in pair else CONST
        elif ACT in made or (ROWS_OF in made and (made != {ROWS_OF} or CONST not in pair)):
            out = ACT
            if ROWS_OF in made and (made & {*OF_KERNELS, PARAM} or made == {ROWS_OF}):
                self.either = True
        elif MIXED in made:
            out = MIXED
        elif len(made) == 1 and pair != made and made != {BROKEN}:
            out = made.pop()  # by a constant or data
        elif made <= {NUMBER, PARAM} and NUMBER in made:
            out = NUMBER
        else:
            out = PARAM if made == {PARAM} else BROKEN
        if out in (WEIGHTS, ROWS_OF):
            feedback = functools.reduce(
                np.multiply, [v.val if v.feedback is None else v.feedback for v in (a, b)]
            )

        def pull_to(v, other):
            def pull(kind, bar):
                array, kind = self.factor(other, v, kind)
                return kind, unbroadcast(bar * array, v.shape)

            return v, pull

        return self.derived(a.val * b.val, out, (a, b), [pull_to(a, b), pull_to(b, a)], feedback)

    def div(self, a, b):
        if b.made != WEIGHTS or self.plain:
            return self.mul(a, self.unary(b, "reciprocal"))
        self.no_zero = True
        inverse = self.unary(b, "reciprocal")
        inverse.made, inverse.feedback = WEIGHTS, 1 / b.feedback  # div(error, weights)
        out = self.mul(a, inverse)
        if a.made == ACT:
            self.may_refuse = True

            def murky(pull):
                return lambda kind, bar: ("murky", pull(kind, bar)[1])

            inverse.parents = [
                (v, murky(lambda k, bar: (k, -bar * b.val**-2.0))) for v, _ in inverse.parents
            ]
        else:
            self.either = True
        return out

    def einsum(self, spec, a, b):
        ins, out_spec = spec.split("->")
        spec_a, spec_b = ins.split(",")
        made = {a.made, b.made}
        feedback = None
        if made <= {CONST, DATA}:
            out = DATA if DATA in made else CONST
        elif made & {ACT, DATA} or (ROWS_OF in made and CONST not in made):
            out = ACT
        elif ROWS_OF in made:
            raise NotImplementedError("looked-up rows, contracted with a constant")
        elif MIXED in made:
            out = MIXED
        elif CONST in made:
            (out,) = made - {CONST}
        else:
            out = PARAM if made == {PARAM} else BROKEN
        if out == WEIGHTS:
            feedback = np.einsum(
                spec, *(v.val if v.feedback is None else v.feedback for v in (a, b))
            )

        def pull_to(v, other, mine, its):
            missing = set(mine) - set(its) - set(out_spec)
            assert not missing, "sum by a product with ones"

            def pull(kind, bar):
                array, kind = self.factor(other, v, kind, product=True)
                return kind, np.einsum(f"{out_spec},{its}->{mine}", bar, array)

            return v, pull

        parents = [pull_to(a, b, spec_a, spec_b), pull_to(b, a, spec_b, spec_a)]
        val = np.einsum(spec, a.val, b.val)
        whole = a.whole and b.whole
        return self.derived(val, out, (a, b), parents, feedback, whole=whole)

    def unary(self, v, name):
        f, df = UNARY[name]
        made = {WEIGHTS: BROKEN, ROWS_OF: ACT}.get(v.made, v.made)
        coefficient = Value(df(v.val), made, kernels=v.kernels, param=v.param, whole=v.whole)
        if name == "square" and v.made == WEIGHTS:  # 2 w is a layout of w
            coefficient.made, coefficient.feedback = WEIGHTS, df(v.feedback)

        def pull(kind, bar):
            array, kind = self.factor(coefficient, v, kind, elementwise=True)
            return kind, bar * array

        return self.derived(f(v.val), made, (v,), [(v, pull)])

    def positive(self, v):
        """`v > 0`, a mask."""
        made = {ACT: DATA, WEIGHTS: BROKEN, ROWS_OF: DATA}.get(v.made, v.made)
        return self.derived((v.val > 0) * 1.0, made, (v,), [])

    def where(self, mask, a, b):
        made = side_by_side(a.made, b.made)
        if mask.made == BROKEN and made != ACT:
            made = MIXED if made == MIXED else BROKEN
        feedback = None
        if made in (WEIGHTS, ROWS_OF):
            feedback = np.where(
                mask.val > 0, *(v.val if v.feedback is None else v.feedback for v in (a, b))
            )

        def pull_to(v, on):
            def pull(kind, bar):
                _, kind = self.factor(mask, v, kind)
                return kind, unbroadcast(bar * ((mask.val > 0) == on), v.shape)

            return v, pull

        return self.derived(
            np.where(mask.val > 0, a.val, b.val),
            made,
            (mask, a, b),
            [pull_to(a, True), pull_to(b, False)],
            feedback,
        )

    def sum(self, v, axis=None):
        """Over one axis, which stays with size 1; or over all."""
        letters = "abcd"[: v.val.ndim]
        if axis is None:
            out = self.einsum(f"{letters},{letters}->", v, self.const(np.ones(v.shape)))
            if out.made == BROKEN:
                out.made = NUMBER
            return out
        ones = self.const(np.ones((v.shape[axis], 1)))
        spec = f"{letters},{letters[axis]}z->{letters.replace(letters[axis], 'z')}"
        return self.einsum(spec, v, ones)

    def stop(self, v):
        return self.derived(v.val, v.made, (v,), [], v.feedback)

    def weaken(self, v, made):
        """The value as a loop's carry, which must be one thing in all iterations."""
        if made == v.made:
            return v
        feedback = v.val if made == WEIGHTS else None
        out = self.derived(v.val, made, (v,), [(v, lambda *bar: bar)], feedback)
        out.made, out.tangent, out.feedback = made, True, feedback
        return out

    # What programs are made of

    def layout(self, w, name):
        f = LAYOUTS[name]
        return self.rearrange(lambda i: (f(np, i, -1), 0.5), w)

    def join(self, w, v, name):
        return self.rearrange(lambda i, j: (JOINS[name](np, i, j), 0), w, v)

    def slices(self, v, *where):
        return self.rearrange(lambda i: (i[where], 0), v)

    def rows(self, w):
        return self.slices(w, slice(0, ROWS))

    def row(self, w):
        return self.slices(w, slice(0, 1))

    def one_of(self, s, i):
        return self.slices(s, i)

    def under(self, call, w, name):
        del call
        return self.layout(w, name)

    def basis(self, w):
        return self.einsum("ij,jk->ik", self.const(BASIS), w)

    def scale(self, w, c):
        return self.mul(w, self.const(np.full((1,) * w.val.ndim, c)))

    def constant_factor(self, w):
        return self.mul(w, self.const(BASIS))

    def quotient(self, w):
        return self.mul(w, self.const(np.full((1, 1), 1 / 1.7)))

    def centred(self, w):
        """Minus the mean of its rows: a sum of layouts of one kernel."""
        return self.sub(w, self.scale(self.sum(w, 0), 1 / N))

    def cast(self, w, dtype):
        if dtype == "bfloat16":
            self.loose = True
        to = to_bfloat16 if dtype == "bfloat16" else lambda a: np.float64(np.float32(a))
        pull = lambda kind, bar: (kind, to(bar))  # noqa: E731
        feedback = None if w.feedback is None else to(w.feedback)
        return self.derived(to(w.val), w.made, (w,), [(w, pull)], feedback)

    def masked(self, w, mask):
        return self.mul(w, mask)

    def ordered(self, w, d):
        """Columns in an order that float data decides."""
        order = np.argsort(d.val)
        return self.rearrange(lambda i: (i[:, order], 0), w)

    def cut(self, w, d):
        """A slice that starts where float data decides."""
        start = int(np.argmax(d.val))
        return self.rearrange(lambda i: (np.concatenate([i, i])[start : start + N], 0), w)

    def chosen(self, s, d):
        return self.slices(s, int(np.argmax(d.val)) % STACK)

    def lookup(self, w, ids):
        out = self.rearrange(lambda i: (i[ids.val], 0), w)
        out.made = {WEIGHTS: ROWS_OF, PARAM: ACT}.get(out.made, out.made)
        return out

    def experts(self, x, s, ids):
        return self.einsum("bi,bio->bo", x, self.lookup(s, ids))

    def dot(self, x, w, form="right"):
        if form == "conv":
            taps = self.rearrange(
                lambda i: (np.stack([i, np.pad(i[1:], ((0, 1), (0, 0)), constant_values=-1)]), 0), x
            )
            both = self.rearrange(lambda i: (np.stack([i, i[::-1]]), 0), w)
            return self.einsum("kbi,kio->bo", taps, both)
        return self.einsum("bi,oi->bo" if form == "einsum" else "bi,io->bo", x, w)

    def own_derivative_dot(self, x, w):
        return self.dot(x, w)

    def fused(self, x, w):
        return self.unary(self.dot(x, w), "tanh")

    def low_precision_dot(self, x, w):
        return self.cast(self.dot(self.cast(x, "bfloat16"), self.cast(w, "bfloat16")), "bfloat16")

    def gram(self, w):
        return self.einsum("ji,jk->ik", w, w)

    def product(self, w, v):
        return self.einsum("ij,jk->ik", w, v)

    def own_jvp(self, v):
        return self.unary(v, "leaky")

    def gate(self, v):
        """`v` where positive, else a tenth, by a comparison."""
        return self.where(self.positive(v), v, self.scale(v, 0.1))

    def gated_by(self, a, w):
        """The activation where the kernel is positive."""
        return self.where(self.positive(w), a, self.const(np.zeros(a.shape)))

    def proper_use(self, z, w):
        spec = "bi,lio->lbo" if w.val.ndim == 3 else "bi,io->bo"
        return self.sum(self.einsum(spec, z, w))

    def sum_of_squares(self, w):
        return self.sum(self.unary(w, "square"))

    def norm(self, w):
        return self.unary(self.sum_of_squares(w), "sqrt")

    def norm_row(self, w):
        return self.rearrange(lambda i: (i.reshape(1, 1), 0), self.norm(w))

    def orthogonality(self, w):
        return self.sum_of_squares(self.sub(self.gram(w), self.const(np.eye(N))))

    def normalised(self, w):
        return self.div(w, self.norm(w))

    def softmax(self, a):
        e = self.unary(a, "exp")
        return self.div(e, self.sum(e, 1))

    def layer_norm(self, a, scale):
        centred = self.sub(a, self.scale(self.sum(a, 1), 1 / N))
        variance = self.scale(self.sum(self.unary(centred, "square"), 1), 1 / N)
        eps = self.const(np.full((1, 1), 0.1))
        rsqrt = self.unary(self.add(variance, eps), "rsqrt")
        return self.mul(self.mul(centred, rsqrt), scale)

    def attention(self, q, k, v):
        return self.dot(self.softmax(self.einsum("ai,bi->ab", q, k)), v)

    def beside(self, a, w):
        """An activation's row and a kernel's in one array."""
        return self.rearrange(lambda i, j: (np.concatenate([i[:1], j[:1]]), 0), a, w)

    # Blocks

    def call(self, kind, f, *ins):
        del kind
        return f(*ins)

    def cond(self, f, g, d, *ins):
        mask = self.positive(self.slices(d, slice(0, 1)))
        yes, no = f(*ins), g(*ins)
        return self.where(self.new(mask.val.reshape((1,) * yes.val.ndim), mask.made), yes, no)

    def loop(self, f, carry, steps):
        """`f(carry, step) -> carry, y`."""
        made = [v.made for v in carry]
        while True:
            before, now, ys = list(made), list(carry), []
            for step in steps:
                now = [self.weaken(v, m) for v, m in zip(now, made, strict=True)]
                now, y = f(now, step)
                ys.append(y)
                made = [side_by_side(m, v.made) for m, v in zip(made, now, strict=True)]
            if made == before:
                return now, ys

    def scan_over(self, how, f, h, s, *ins):
        steps = range(STACK)[::-1] if how == "reverse" else range(STACK)
        (h,), _ = self.loop(
            lambda carry, i: ([f(*carry, self.one_of(s, i), *ins)], None), [h], list(steps)
        )
        return h

    def scan_constant(self, how, f, h, *ins):
        del how
        (h,), _ = self.loop(lambda carry, i: ([f(*carry, *ins)], None), [h], [0, 1])
        return h

    def scan_carry(self, f, g, h, w, *ins):
        """The kernel is carried beside the activation: `h = f(h, w)`, `w = g(w)`."""
        (h, w), _ = self.loop(
            lambda carry, i: ([f(*carry, *ins), g(carry[1])], None), [h, w], [0, 1]
        )
        return h

    def scan_rows(self, f, a, *ins):
        """A recurrent net over the rows of `a`."""
        _, ys = self.loop(
            lambda carry, i: (lambda h: ([h], h))(f(*carry, self.slices(a, slice(i, i + 1)), *ins)),
            [self.const(np.zeros((1, N)))],
            list(range(ROWS)),
        )
        return self.rearrange(lambda *i: (np.concatenate(i), 0), *ys)

    def map_layout(self, w):
        return self.layout(w, "flip")

    def vmap(self, f, a, *ins):
        rows = [f(self.slices(a, slice(i, i + 1)), *ins) for i in range(ROWS)]
        return self.rearrange(lambda *i: (np.concatenate(i), 0), *rows)

    def vmap_both(self, f, s):
        """Over the stack; `f` of one kernel."""
        parts = [f(self.one_of(s, i)) for i in range(STACK)]
        return self.rearrange(lambda *i: (np.stack(i), 0), *parts)

    def halved(self, d):
        """By a while loop: until its largest element is below one."""
        val = d.val
        while np.abs(val).max() >= 1:
            val = val / 2
        assert d.made == DATA
        return self.new(val, DATA)


class Eqn(NamedTuple):
    """`out = op(*static, *blocks, *ins)`."""

    out: str
    op: str
    ins: tuple[str, ...]
    static: tuple = ()
    blocks: tuple[Program, ...] = ()
    after: tuple = ()  # static arguments that come last


class Program(NamedTuple):
    """A block: a function of named inputs."""

    inputs: tuple[str, ...]
    eqns: tuple[Eqn, ...]
    out: str


def run(backend, program, *values):
    """Evaluates a program with a backend's methods."""
    env = dict(zip(program.inputs, values, strict=True))
    for eqn in program.eqns:
        blocks = [functools.partial(run, backend, block) for block in eqn.blocks]
        op = getattr(backend, eqn.op)
        env[eqn.out] = op(*eqn.static, *blocks, *(env[i] for i in eqn.ins), *eqn.after)
    return env[program.out]


def show(program, indent=""):
    """A program, as lines."""
    lines = [f"{indent}({', '.join(program.inputs)}):"]
    for eqn in program.eqns:
        ins = ", ".join([*map(repr, eqn.static), *eqn.ins, *map(repr, eqn.after)])
        lines.append(f"{indent}  {eqn.out} = {eqn.op}({ins})")
        lines += [show(block, indent + "    ") for block in eqn.blocks]
    return "\n".join([*lines, f"{indent}  return {program.out}"])


# Random programs

KERNELS = {"a": (N, N), "b": (N, N), "c": (N, N), "s": (STACK, N, N)}
PARAMS = {**KERNELS, "p": (N, N), "r": (1, N)}  # p and r never have feedback
ARGS = ("x", "d", "mask", "ids")
INPUTS = (*PARAMS, *ARGS)


class Generator:
    """Makes a block of equations. Names are typed by pools: acts, weights, stacks."""

    def __init__(self, rng, wild, depth=0, prefix="v"):
        self.rng, self.wild, self.depth, self.prefix = rng, wild, depth, prefix
        self.eqns: list[Eqn] = []
        self.row_vectors, self.d = False, "d"

    def pick(self, options):
        return options[self.rng.randint(len(options))]

    def emit(self, op, *ins, static=(), blocks=(), after=()):
        out = f"{self.prefix}{len(self.eqns)}"
        self.eqns.append(Eqn(out, op, ins, static, tuple(blocks), after))
        return out

    def weight(self, budget=2):
        """A kernel, laid out a few times; if wild, perhaps broken on the way."""
        w = self.pick(self.weights)
        if self.stacks and self.rng.rand() < 0.15:
            s = self.pick(self.stacks)
            w = (
                self.emit("one_of", s, after=(self.rng.randint(STACK),))
                if not self.data or self.rng.rand() < 0.5
                else self.emit("chosen", s, self.d)
            )
        for _ in range(self.rng.randint(budget + 1)):
            w = self.lay(w)
        if self.wild and self.rng.rand() < 0.12:
            w = self.spoil(w)
            if self.rng.rand() < 0.3:
                w = self.lay(w)
        return w

    def lay(self, w):
        kind = self.rng.randint(14)
        if kind < 3:
            return self.emit("layout", w, after=(self.pick(list(LAYOUTS)),))
        if kind == 3:
            return self.emit("join", w, self.pick(self.weights), after=(self.pick(list(JOINS)),))
        if kind == 4:
            call = self.pick(["jit", "remat", "vmap", "checkpoint name"])
            return self.emit("under", w, static=(call,), after=(self.pick(list(LAYOUTS)),))
        if kind == 5:
            return self.emit("scale", w, after=(-0.7,))
        if kind == 6:
            return self.emit(self.pick(["constant_factor", "quotient", "basis"]), w)
        if kind == 7:
            return self.emit("cast", w, after=(self.pick(["float32", "float32", "bfloat16"]),))
        if kind == 8:
            return self.emit("map_layout", w)
        if kind == 9 and self.depth < 2:
            blocks = [self.weights_block(("w",)) for _ in range(2)]
            if self.data:
                return self.emit("cond", self.d, w, blocks=blocks)
            return self.emit("call", w, static=("jit",), blocks=blocks[:1])
        if self.data:
            if kind == 10:
                return self.emit("masked", w, "mask")
            if kind == 11:
                return self.emit("where", "mask", w, self.pick(self.weights))
            if kind == 12:
                return self.emit("ordered", w, self.d)
            if kind == 13:
                return self.emit("cut", w, self.d)
        return self.emit("layout", w, after=(self.pick(list(LAYOUTS)),))

    def spoil(self, w):
        v = self.pick(self.weights)
        kind = self.rng.randint(14)
        if kind < 2:
            return self.emit("unary", w, after=(self.pick(["tanh", "relu", "square"]),))
        if kind == 2:
            return self.emit(self.pick(["add", "sub", "mul", "product"]), w, v)
        if kind == 3:
            return self.emit("gram", w)
        if kind == 4:
            return self.emit("gate", w)
        if kind == 5:
            return self.emit("normalised", w)
        if kind == 6:
            return self.emit("centred", w)
        if kind == 7:
            return self.emit("add", w, self.emit("layout", w, after=("transpose",)))
        if kind == 8:
            return self.emit("softmax", w)
        if kind == 9:
            return self.emit("own_jvp", w)
        if kind == 10 and "p" in self.weights_plain:
            return self.emit(self.pick(["mul", "product", "add"]), w, "p")
        if kind == 11 and self.data:
            return self.emit("add", w, "mask")
        if kind == 12:
            return self.emit(
                "call",
                w,
                static=(self.pick(["jit", "remat"]),),
                blocks=[Program(("w",), (Eqn("t", "unary", ("w",), after=("tanh",)),), "t")],
            )
        return self.emit("mul", w, self.emit("positive", w))

    def weights_block(self, inputs):
        inner = Generator(self.rng, self.wild, self.depth + 1, self.prefix + "k")
        inner.weights, inner.stacks, inner.data = list(inputs), [], False
        inner.weights_plain = []
        out = inner.lay(inputs[0])
        if self.wild and self.rng.rand() < 0.1:
            out = inner.spoil(out)
        return Program(inputs, tuple(inner.eqns), out)

    def step(self, h, acts):
        """One layer or op on the activation `h`; `acts` are earlier ones of its shape."""
        kind = self.rng.randint(22)
        if kind < 5:
            return self.dot(h)
        if kind < 8:
            return self.emit("unary", h, after=(self.pick(["tanh", "sin", "relu"]),))
        if kind == 8:
            return self.emit("add", h, self.pick(acts))
        if kind == 9:
            return self.emit("mul", h, self.pick(acts))
        if kind == 10:
            return self.emit("own_jvp", h)
        if kind == 11:
            return self.emit("softmax", h)
        if kind == 12 and self.full:
            return self.emit("layer_norm", h, "r")
        if kind == 13 and self.full:
            return self.emit("add", h, "r")
        if kind == 14:
            w = self.emit("row" if self.row_vectors else "rows", self.weight(1))
            op = "add" if self.rng.rand() < 0.4 else "mul"
            return self.emit(op, *((h, w) if self.rng.rand() < 0.5 else (w, h)))
        if kind == 15 and not self.row_vectors:
            return self.emit("attention", h, self.dot(h), self.dot(self.pick(acts)))
        if kind == 16:
            return self.emit(self.pick(["own_derivative_dot", "fused"]), h, self.weight())
        if kind == 17 and self.full:
            return self.looked_up(h)
        if kind == 18:
            return self.emit("low_precision_dot", h, self.weight(1))
        if kind == 19 and self.wild:
            return self.wild_step(h)
        if self.depth < 2:
            return self.block(h)
        return self.dot(h)

    def dot(self, h):
        form = self.pick(["right", "einsum", "left", "conv", "general"])
        return self.emit("dot", h, self.weight(), after=(form,))

    def looked_up(self, h):
        kind = self.rng.randint(3)
        if kind == 0 and self.stacks:
            return self.emit("experts", h, self.pick(self.stacks), "ids")
        rows = self.emit("lookup", self.pick(self.weights), "ids")
        if kind == 1:
            return self.emit("mul", h, rows)
        return self.emit("add", h, self.emit("dot", rows, self.weight(1)))

    def wild_step(self, h):
        kind = self.rng.randint(7)
        w = self.weight(1)
        part = self.emit("row" if self.row_vectors else "rows", w)
        if kind == 0:
            return self.emit("gated_by", h, part)
        if kind == 1:
            return self.emit("mul", h, self.emit("unary", part, after=("tanh",)))
        if kind == 2:
            return self.emit("div", h, part)
        if kind == 3:
            return self.emit("mul", h, self.emit("norm_row", w))
        if kind == 4 and not self.row_vectors:
            return self.emit("beside", h, w)
        if kind == 5:
            return self.emit("mul", h, self.emit("stop", part))
        return self.emit("add", h, self.emit("unary", part, after=("tanh",)))

    def block(self, h):
        kind = self.pick(
            ["jit", "remat", "scan_over", "scan_over", "scan_constant", "scan_carry", "cond"]
            if self.rng.rand() < 0.6
            else ["fori", "scan_rows", "vmap", "custom_vjp"]
        )
        names = [self.pick(self.weights) for _ in range(1 + self.rng.randint(2))]
        inner = ("h", *(f"w{i}" for i in range(len(names))))
        if self.data:
            names, inner = [*names, self.d, "mask"], (*inner, "d", "mask")
        if kind in ("jit", "remat"):
            return self.emit("call", h, *names, static=(kind,), blocks=[self.acts_block(inner)])
        if kind == "custom_vjp":
            return self.emit("own_derivative_dot", h, self.weight())
        if kind == "scan_over" and self.stacks:
            how = self.pick(["plain", "reverse", "unroll"])
            block = self.acts_block((inner[0], "wi", *inner[1:]))
            return self.emit("scan_over", h, self.stack(), *names, static=(how,), blocks=[block])
        if kind in ("scan_constant", "fori"):
            block = self.acts_block(inner)
            return self.emit("scan_constant", h, *names, static=(kind,), blocks=[block])
        if kind == "scan_carry":
            data = (self.d, "mask") if self.data else ()
            inner = ("h", "w0", *(("d", "mask") if data else ()))
            blocks = [self.acts_block(inner), self.weights_block(("w",))]
            return self.emit("scan_carry", h, self.weight(1), *data, blocks=blocks)
        if kind == "cond" and self.data:
            blocks = [self.acts_block(inner) for _ in range(2)]
            return self.emit("cond", self.d, h, *names, blocks=blocks)
        if kind == "scan_rows" and not self.row_vectors:
            block = self.acts_block(("h", "row", *inner[1:]), rows=True)
            return self.emit("scan_rows", h, *names, blocks=[block])
        if kind == "vmap" and not self.row_vectors:
            block = self.acts_block(inner, rows=True)
            return self.emit("vmap", h, *names, blocks=[block])
        return self.emit("call", h, *names, static=("jit",), blocks=[self.acts_block(inner)])

    def stack(self):
        s = self.pick(self.stacks)
        if self.rng.rand() < 0.4:
            return self.emit("vmap_both", s, blocks=[self.weights_block(("w",))])
        return s

    def acts_block(self, inputs, rows=False):
        inner = Generator(self.rng, self.wild, self.depth + 1, self.prefix + "k")
        inner.row_vectors = rows or self.row_vectors
        acts = [i for i in inputs if i in ("h", "row")]
        inner.weights = [i for i in inputs if i.startswith("w")]
        inner.stacks, inner.data, inner.full, inner.weights_plain = [], "d" in inputs, False, []
        h = acts[0]
        if len(acts) == 2:
            h = inner.emit("add", inner.dot(h), inner.dot(acts[1]))
        for _ in range(1 + self.rng.randint(2)):
            h = inner.step(h, acts)
        h = inner.emit("unary", h, after=("tanh",))
        return Program(inputs, tuple(inner.eqns), h)


def generate(seed, wild=False):
    """A random program: `INPUTS -> a number`, and the names of its kernels with feedback."""
    rng = np.random.RandomState(seed)
    gen = Generator(rng, wild)
    gen.data = gen.full = True
    gen.weights, gen.stacks, gen.weights_plain = ["a", "b", "c"], ["s"], ["p"]
    with_feedback = [k for k in KERNELS if rng.rand() < 0.8] or ["a"]
    h = "x"
    if rng.rand() < 0.6:
        h = gen.emit("unary", gen.emit("dot", "x", "p", after=("right",)), after=("tanh",))
    if rng.rand() < 0.1:
        gen.d = gen.emit("halved", "d")
    acts = [h]
    for _ in range(1 + rng.randint(4)):
        acts.append(gen.step(acts[-1], acts))
    loss = gen.emit("sum", gen.emit("unary", acts[-1], after=("sin",)))
    own = ["sum_of_squares", "norm", "orthogonality"]
    if rng.rand() < 0.4:
        term = gen.emit(gen.pick(own), gen.pick(gen.weights))
        if wild and rng.rand() < 0.2:
            loss = gen.emit("mul", loss, term)
        else:
            loss = gen.emit("add", loss, term)
    if wild and rng.rand() < 0.15:
        term = gen.emit(
            "sum_of_squares", gen.emit("product", *(gen.pick(gen.weights) for _ in "ab"))
        )
        loss = gen.emit("add", loss, term)
    z = gen.emit("unary", gen.emit("dot", "x", "p", after=("right",)), after=("tanh",))
    for name in with_feedback:  # a proper use of each, so that no feedback is without effect
        loss = gen.emit("add", loss, gen.emit("proper_use", z, name))
    return Program(INPUTS, tuple(gen.eqns), loss), tuple(with_feedback), bool(rng.rand() < 0.5)


def draw(seed, with_feedback):
    """Params, feedback and arguments: entries of kernels stay away from zero."""
    rng = np.random.RandomState(seed)

    def away(shape):
        return rng.uniform(0.3, 1.1, shape) * rng.choice([-1, 1], shape)

    params = {name: away(shape) for name, shape in PARAMS.items()}
    feedback = {name: away(PARAMS[name]) for name in with_feedback}
    args = {
        "x": rng.standard_normal((ROWS, N)),
        "d": rng.standard_normal(N),
        "mask": (rng.rand(N, N) < 0.7) * 1.0,
        "ids": rng.randint(0, STACK, ROWS),
    }
    return params, feedback, args


class Verdict(NamedTuple):
    """What the definition says: loss and gradients, or that the program must be refused."""

    value: Any
    grads: dict[str, np.ndarray]
    refused: bool
    may_refuse: bool
    murky: frozenset[str]
    either: bool
    no_zero: bool
    loose: bool


def judge(program, params, feedback, args, by_x, plain=False, seed=1.0):
    """The verdict on one program at one point.

    Args:
        program: a `Program`, or a function of a backend and a dict of values.
        params: arrays by name.
        feedback: arrays by name, for some of them.
        args: arrays by name.
        by_x: whether `x` is differentiated by.
        plain: judge nothing; exact backpropagation.
        seed: the loss's own cotangent.
    """
    with np.errstate(all="ignore"):
        return _judge(program, params, feedback, args, by_x, plain, seed)


def _judge(program, params, feedback, args, by_x, plain, seed):
    tape = Tape(plain)
    leaves = {}
    for name, val in params.items():
        if name in feedback:
            more = {"feedback": np.asarray(feedback[name]), "kernels": {name}}
            leaves[name] = tape.leaf(val, WEIGHTS, **more)
        else:
            leaves[name] = tape.leaf(val, PARAM, param=True)
    for name, val in args.items():
        leaves[name] = tape.leaf(val, ACT if by_x and name == "x" else DATA)
    if by_x:
        leaves["x"].made, leaves["x"].tangent = ACT, True
    if callable(program):
        loss = program(tape, leaves)
    else:
        loss = run(tape, program, *(leaves[name] for name in program.inputs))
    refused = False
    try:
        tape.backward(loss, seed)
    except Refused:
        refused = True
    names = [*params, "x"] if by_x else list(params)
    grads = {n: sum(leaves[n].bars.values(), np.zeros(leaves[n].shape)) for n in names}
    murky = frozenset(n for n in names if "murky" in leaves[n].bars)
    flags = tape.may_refuse, murky, tape.either, tape.no_zero, tape.loose
    return Verdict(loss.val, grads, refused, *flags)
