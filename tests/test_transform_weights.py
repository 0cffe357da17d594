"""No error passes weights in silence: it passes their feedback, or `with_feedback` refuses.

For a function that is affine in x the rule is an equation. Its gradient by x is made of weights
alone; so with feedback B it is the plain gradient at w = B, whatever w is.
"""

import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax

from soap_jax import ops, with_feedback

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # long sums, in another order
N = 4


def draw(*shape, seed=0):
    """By NumPy, which compiles nothing; scaled so that sums of products are about one."""
    values = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return jnp.asarray(values / np.sqrt(shape[0]), jnp.float32)


X, W, V, B = (draw(N, N, seed=seed) for seed in range(4))
BASIS = np.linspace(-1, 2, N * N, dtype=np.float32).reshape(N, N)
MASK = BASIS > 0.3


def loss_of(model):
    """A linear loss; and a proper product beside it, so that feedback of w always serves."""

    def loss(params, x):
        y = model(x, params["w"])
        y_bar = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        return jnp.sum(y * y_bar) + jnp.sum((x @ params["w"]) * BASIS)

    return loss


def times(body, length=2):
    """A loop that carries x."""
    return lambda x, w: lax.scan(lambda h, _: (body(h, w), None), x, length=length)[0]


def fori(body):
    """A loop that counts."""
    return lambda x, w: lax.fori_loop(0, 2, lambda i, h: body(i, h, w), x)


def over(body, start=lambda x: x[0], **options):
    """A loop over a kernel's rows; what it carries and what it returns."""

    def model(x, w):
        h, hs = lax.scan(lambda h, row: (body(h, row), h), start(x), w, **options)
        return jnp.concatenate([h[None], hs])

    return model


def changed(body, start=lambda w: w):
    """A product with what a loop makes of a kernel."""
    return lambda x, w: x @ lax.fori_loop(0, 2, lambda _, v: body(v, w), start(w))


def while_changed(body, more=lambda v, i, w: i < 2):
    def model(x, w):
        def go_on(carry):
            return more(*carry, w)

        return x @ lax.while_loop(go_on, lambda c: (body(c[0]), c[1] + 1), (w, 0))[0]

    return model


def swapping(x, w):
    """Activation and kernel change places in every round."""
    return lax.fori_loop(0, 3, lambda _, carry: carry[::-1], (x, w))[0] @ w


def carried_with_its_kernel(body):
    def model(x, w):
        return lax.fori_loop(0, 2, lambda _, c: (body(c[0]), c[1] @ c[0]), (w, x))[1]

    return model


def ones(_):
    return jnp.ones((N, N))


@jax.custom_vjp
def fused(x, w):
    """A product whose derivative is its own."""
    return x @ w


fused.defvjp(lambda x, w: (x @ w, (x, w)), lambda xw, y_bar: (2 * y_bar @ xw[1].T, xw[0].T @ y_bar))


@jax.custom_vjp
def fused_norm(x, w):
    """One that saves a normalised kernel."""
    return x @ (w / jnp.abs(w))


fused_norm.defvjp(
    lambda x, w: (x @ (w / jnp.abs(w)), (x, w / jnp.abs(w))),
    lambda xw, y_bar: (y_bar @ xw[1].T, xw[0].T @ y_bar),
)


@jax.custom_jvp
def prelu(w):
    return jnp.maximum(w, 0.1 * w)


prelu.defjvps(lambda w_dot, y, w: jnp.where(w > 0, w_dot, 0.1 * w_dot))


def solved(x, w):
    def by(w):
        return lambda matvec, b: jnp.linalg.solve(w, b)

    return lax.custom_linear_solve(lambda v: w @ v, x, by(w), by(w.T))


def by_platform(of_kernel):
    def product(x, w):
        return x @ of_kernel(w)

    return lambda x, w: lax.platform_dependent(x, w, cpu=product, default=product)


THROUGH = {  # (x, w) -> y, affine in x: every w in its derivative by x is replaced by feedback
    # elementwise
    "a scale": lambda x, w: x * w,
    "a scale of every row": lambda x, w: x * w[:1],
    "two scales": lambda x, w: x * w.T * w,
    "a scale by one element": lambda x, w: x * w[0, 0],
    "a quotient": lambda x, w: x / w,
    "a quotient by one element": lambda x, w: x / w[0, 0],
    "a scale by sums along an axis": lambda x, w: x * w.sum(0, keepdims=True),
    "an activation scaled, plus itself": lambda x, w: x + w * x,
    "scales under vmap": lambda x, w: jax.vmap(lambda x, w: x * w)(x, w),
    "a convolution by the Fourier transform": lambda x, w: jnp.fft.irfft(
        jnp.fft.rfft(x) * jnp.fft.rfft(w), N
    ),
    "kron": jnp.kron,
    "cross": lambda x, w: jnp.cross(x[:, :3], w[:, :3]),
    # loops
    "a scan that scales": times(lambda h, w: h * w),
    "a scan of one round that scales": times(lambda h, w: h * w, 1),
    "a scan that divides": times(lambda h, w: h / w),
    "a scan that multiplies and adds": times(lambda h, w: h @ w + w),
    "a scan that only adds": times(lambda h, w: h / 2 + w),
    "a scan over rows that scales": over(lambda h, row: h * row),
    "a scan over rows that adds, reversed": over(lambda h, row: h + row, reverse=True),
    "a scan over data that scales": lambda x, w: lax.scan(
        lambda h, u: (h * w[0] + u, h), jnp.zeros(N), x
    )[1],
    "a scan over data that sums what it scales": lambda x, w: lax.scan(
        lambda h, u: (h + w[0] * u, None), jnp.zeros(N), x
    )[0],
    "a counted loop that scales by rows": fori(lambda i, h, w: h * w[i][None]),
    "map": lambda x, w: lax.map(lambda row: row @ w, x),
    "a kernel that a loop scales": changed(lambda v, w: 0.9 * v.T),
    "a kernel that a loop puts in the place of ones": changed(lambda v, w: w, ones),
    "a kernel that a loop scales beside its product": carried_with_its_kernel(lambda w: 0.9 * w),
    "a kernel that a while loop scales": while_changed(lambda v: 0.9 * v.T),
    "a kernel that a loop returns row by row": lambda x, w: x @ lax.map(lambda row: row[::-1], w),
    "a kernel that a loop swaps with x": swapping,
    # sums
    "a sum with weights, times them": lambda x, w: (x + w) @ w,
    "a difference to weights, scaled by them": lambda x, w: (x - w[:1]) * w,
    "a product plus weights, times them": lambda x, w: (x @ w + w) * w,
    "a sum with a function of weights": lambda x, w: (x + jnp.tanh(w)) @ w,
    "a product with a kernel and with its transpose": lambda x, w: x @ w + x @ w.T,
    "products in a row": lambda x, w: jnp.einsum("ij,jk,kl->il", x, w, w),
    "both sides": lambda x, w: w @ x @ w,
    # joins
    "joined with weights, scaled by them": lambda x, w: (
        jnp.concatenate([x, w]) * jnp.concatenate([w, w[::-1]])
    ),
    "stacked with weights, scaled by them": lambda x, w: jnp.stack([x, w]) * w[None],
    "chosen instead of weights, scaled by them": lambda x, w: jnp.where(MASK, x, w) * w,
    "padded with an element, scaled": lambda x, w: (
        lax.pad(x, w[0, 0], ((0, 1, 0), (0, 0, 0))) * jnp.pad(w, ((0, 1), (0, 0)))
    ),
    "overwritten by weights, times them": lambda x, w: (
        lax.dynamic_update_slice(x, w[:1], (1, 0)).at[0].set(w[0]) @ w
    ),
    "weights joined with constants": lambda x, w: x @ jnp.concatenate([w[:2], BASIS[:2]]),
    "weights written into constants": lambda x, w: x @ jnp.asarray(BASIS).at[0].set(w[0]),
    # masks
    "weights or constants": lambda x, w: x @ jnp.where(MASK, w, 1.0),
    "weights dropped": lambda x, w: (
        x @ (w * jax.random.bernoulli(jax.random.key(0), 0.5, w.shape) / 0.5)
    ),
    "weights chosen by cond": lambda x, w: (
        x @ lax.cond(jnp.sum(BASIS) > 0, lambda w: w, lambda w: -w.T, w)
    ),
    "weights or constants chosen by cond": lambda x, w: (
        x @ lax.cond(jnp.sum(BASIS) > 0, lambda: w, lambda: jnp.ones((N, N)))
    ),
    "x or weights chosen by cond": lambda x, w: (
        lax.cond(jnp.sum(BASIS) > 0, lambda: x, lambda: w) * w
    ),
    # complex numbers
    "a complex kernel of two halves": lambda x, w: jnp.real(x @ lax.complex(w, w.T)),
    # functions
    "jit": jax.jit(lambda x, w: (x + w) @ w),
    "checkpoint": jax.checkpoint(lambda x, w: (x @ w) * w),
    "checkpoint in a loop": times(jax.checkpoint(lambda h, w: (h + w) * w, prevent_cse=False)),
    "a derivative": lambda x, w: jax.grad(lambda y: jnp.sum((y @ w) * x))(w),
    "a product of derivatives": lambda x, w: jax.jvp(lambda y: y @ w, (w,), (x,))[1],
    "a linear solve": solved,
    "a choice by platform": by_platform(jnp.transpose),
}


def by_both(model):
    """A jitted (w, b) -> the gradient by x with feedback b, and the plain one at w = b."""
    loss = loss_of(model)

    @jax.jit
    def f(w, b):
        ours = jax.grad(with_feedback(loss), 2)({"w": w}, {"w": b}, X)
        return ours, jax.grad(loss, 1)({"w": b}, X)

    return f


@pytest.mark.parametrize("name", THROUGH)
def test_the_gradient_by_x_is_the_plain_one_at_feedback(name):
    f = by_both(THROUGH[name])
    for w, b in ((W, B), (V, B), (W, W), (W, jnp.zeros_like(W))):
        ours, plain = f(w, b)
        np.testing.assert_allclose(ours, plain, **CLOSE)


REFUSED = {  # (x, w) -> y, the primitive at which it fails
    "tanh": (lambda x, w: x @ jnp.tanh(w), "tanh"),
    "tanh of a part": (lambda x, w: x @ jnp.concatenate([jnp.tanh(w[:1]), w[1:]]), "tanh"),
    "tanh of a constant's product": (lambda x, w: x @ jnp.tanh(BASIS @ w), "tanh"),
    "tanh of rows that constants choose": (lambda x, w: x @ jnp.tanh(w[np.arange(N)]), "tanh"),
    "tanh of rows that data choose": (
        lambda x, w: x @ jnp.tanh(w[jnp.round(x[0]).astype(int)]),
        "tanh",
    ),
    "tanh of one element": (lambda x, w: x * jnp.tanh(w[0, 0]), "tanh"),
    "tanh under stop_gradient": (lambda x, w: x @ jnp.tanh(lax.stop_gradient(w)), "tanh"),
    "tanh under jit": (lambda x, w: x @ jax.jit(jnp.tanh)(w), "tanh"),
    "tanh under checkpoint": (jax.checkpoint(lambda x, w: x @ jnp.tanh(w)), "tanh"),
    "tanh in a choice by platform": (by_platform(jnp.tanh), "tanh"),
    "tanh in a derivative": (lambda x, w: jax.vjp(lambda y: y @ jnp.tanh(w), x)[1](x)[0], "tanh"),
    "a derivative at weights": (
        lambda x, w: jax.jvp(lambda y: jnp.sin(y) @ BASIS, (w,), (x,))[1],
        "cos",
    ),
    "a square": (lambda x, w: jnp.convolve(x[0], w[0] ** 2), "integer_pow|square"),
    "softmax": (lambda x, w: x @ jax.nn.softmax(w), "reduce_max|sub|exp|div"),
    "cumulated products": (lambda x, w: x @ jnp.cumprod(w, 1), "cumprod"),
    "qr": (lambda x, w: x @ jnp.linalg.qr(w)[0], "geqrf|qr|householder_product"),
    "solve": (lambda x, w: jnp.linalg.solve(w, x), "lu"),
    "sort": (lambda x, w: x @ jnp.sort(w, 0), "sort"),
    "a complex exponential": (lambda x, w: jnp.real(x @ jnp.exp(1j * w)), "exp"),
    "a power": (lambda x, w: jnp.exp(x) ** w, "pow|sub"),
    # loops
    "a scan that scales by tanh": (times(lambda h, w: h * jnp.tanh(w)), "tanh"),
    "a scan that multiplies by tanh": (times(lambda h, w: h @ jnp.tanh(w)), "tanh"),
    "a scan that multiplies by a product": (times(lambda h, w: h @ (w @ w)), "dot_general"),
    "a scan that multiplies by a sum": (times(lambda h, w: h @ (w + 1)), "add"),
    "a counted loop that scales by tanh": (fori(lambda i, h, w: h * jnp.tanh(w[i])[None]), "tanh"),
    "map by tanh": (lambda x, w: lax.map(lambda row: row @ jnp.tanh(w), x), "tanh"),
    "tanh in a map": (lambda x, w: x @ lax.map(jnp.tanh, w), "tanh"),
    "tanh, scanned over": (lambda x, w: lax.map(lambda row: x @ row, jnp.tanh(w)), "tanh"),
    "a kernel that a loop squares": (changed(lambda v, w: v * v), "mul"),
    "a kernel that a loop multiplies by another": (changed(lambda v, w: v @ w), "dot_general"),
    "a kernel that a loop cumulates": (changed(lambda v, w: v + w, jnp.zeros_like), "add"),
    "ones that a loop multiplies by weights": (changed(lambda v, w: v * w, ones), "mul"),
    "a kernel that a loop squares beside its product": (
        carried_with_its_kernel(lambda w: w * w),
        "mul",
    ),
    "a kernel that a while loop changes": (while_changed(jnp.tanh), "tanh|while"),
    "a number of rounds made of weights": (
        while_changed(lambda v: 0.9 * v, lambda v, i, w: i < jnp.argmax(w[0])),
        "while",
    ),
    "cumulated products by an associative scan": (
        lambda x, w: lax.associative_scan(jnp.multiply, w) * x,
        "mul",
    ),
    # sums
    "weights plus constants": (lambda x, w: x @ (w + 1), "add"),
    "weights plus constants, elementwise": (lambda x, w: (1 + w) * x, "add"),
    "a quotient by weights plus constants": (lambda x, w: x / (3 + w), "add"),
    "weights plus themselves": (lambda x, w: x @ (w - w.T), "sub"),
    "centred weights": (lambda x, w: x @ (w - w.mean(0, keepdims=True)), "sub"),
    "standardised weights": (
        lambda x, w: x @ (w / (w.std(0, keepdims=True) + 1e-3)),
        "sub|div",
    ),
    "a sum with weights, times tanh": (lambda x, w: (x + w) @ jnp.tanh(w), "tanh"),
    "a straight-through estimator": (
        lambda x, w: x @ (w + lax.stop_gradient(jnp.sign(w) - w)),
        "add|sub|sign",
    ),
    "weights added to constants": (
        lambda x, w: x @ jnp.asarray(BASIS).at[0].add(w[0]),
        "scatter-add",
    ),
    "a complex kernel by a sum": (lambda x, w: jnp.real(x @ (w + 1j * w)), "add"),
    # joins
    "joined with weights, times tanh": (
        lambda x, w: jnp.concatenate([x, w]) @ jnp.tanh(w),
        "tanh",
    ),
    "weights joined with a function of them": (
        lambda x, w: x @ jnp.concatenate([w[:2], jnp.tanh(w[2:])]),
        "tanh",
    ),
    # products of weights
    "a product of weights": (lambda x, w: x @ (w @ w), "dot_general"),
    "weights multiplied": (lambda x, w: x @ (w * w), "mul"),
    "a scale by norms of rows": (
        lambda x, w: x * jnp.linalg.norm(w, axis=1)[:, None],
        "mul|square|integer_pow|reduce_sum|sqrt",
    ),
    # masks
    "x where weights are positive": (lambda x, w: jnp.where(w > 0, x, 0.0), "gt"),
    "x times a mask of weights": (lambda x, w: x * (w > 0), "gt"),
    "weights times their own mask": (lambda x, w: x @ (w * (w > 0)), "gt"),
    "weights or a tenth of them": (lambda x, w: x @ jnp.where(w > 0, w, 0.1 * w), "gt"),
    "signs by comparison": (lambda x, w: x @ jnp.where(w > 0, 1.0, -1.0), "gt"),
    "relu": (lambda x, w: x @ jax.nn.relu(w), "max|custom_jvp_call"),
    "leaky_relu": (lambda x, w: x @ jax.nn.leaky_relu(w), "ge"),
    "a rectifier with its own derivative": (lambda x, w: x @ prelu(w), "max|custom_jvp_call"),
    "sign": (lambda x, w: x @ jnp.sign(w), "sign"),
    "round": (lambda x, w: x @ jnp.round(w), "round"),
    "casts to integers": (
        lambda x, w: x @ (3 * w).astype(jnp.int8).astype(jnp.float32),
        "convert_element_type",
    ),
    "the largest": (lambda x, w: jnp.maximum(x, w), "eq|max|gt|ge"),
    "rows that weights choose": (lambda x, w: x @ w[jnp.argmax(w, 0)], "argmax"),
    "rows of x that weights choose": (lambda x, w: x[jnp.argsort(w[0])], "sort"),
    "one-hot weights": (lambda x, w: x @ jax.nn.one_hot(jnp.argmax(w, 1), N), "argmax"),
    "a branch that weights choose": (
        lambda x, w: lax.cond(w[0, 0] > 0, lambda x: x, lambda x: 2 * x, x),
        "gt|cond",
    ),
    "weights that weights choose": (
        lambda x, w: x @ lax.cond(w[0, 0] > 0, lambda w: w, lambda w: 2 * w, w),
        "gt|cond",
    ),
    "weights or a function of them chosen by cond": (
        lambda x, w: x @ lax.cond(jnp.sum(BASIS) > 0, lambda: w, lambda: jnp.tanh(w)),
        "tanh|cond",
    ),
    # functions with their own derivatives
    "a fused product with tanh": (lambda x, w: fused(x, jnp.tanh(w)), "tanh"),
    "a fused product that saves normalised weights": (fused_norm, "abs|div"),
}


def assert_told(error, primitive, paths=("w",)):
    message = str(error.value)
    assert any(f"['{path}']" in message for path in paths), message
    place = rf"\b(?:{primitive}) at \S*test_transform_weights\.py:\d+"
    assert re.search(place, message), message
    assert "None at its path" in message


@pytest.mark.parametrize("name", REFUSED)
def test_an_error_through_weights_themselves_raises(name):
    model, primitive = REFUSED[name]
    grad = jax.grad(with_feedback(loss_of(model)), 2)
    with pytest.raises(ValueError, match="itself, not through its feedback") as error:
        jax.eval_shape(grad, {"w": W}, {"w": B}, X)
    assert_told(error, primitive)
    auxiliary = with_feedback(lambda p, x: (jnp.sum(x @ p["w"]), model(x, p["w"])))
    by = 2 if "while" in primitive else (0, 2)
    jax.eval_shape(jax.grad(auxiliary, by, has_aux=True), {"w": W}, {"w": B}, X)
    stopped = with_feedback(loss_of(lambda x, w: lax.stop_gradient(model(x, w))))
    jax.eval_shape(jax.grad(stopped, (0, 2)), {"w": W}, {"w": B}, X)


# Random functions that are affine in x


def of(name, *ranges):
    return st.tuples(st.just(name), *(st.integers(0, 9) for _ in range(ranges[0])))


steps = st.one_of(
    *(of(name, 2) for name in ("product", "scale", "add", "join", "mask", "update")),
    *(of(name, 1) for name in ("tanh", "transpose", "factor", "cumsum", "positive", "rows")),
    *(of(name, 2) for name in ("scan", "over", "carry", "cond")),
)


def affine(program):
    """Of a stack of values, some made of x, some of weights alone, the last one.

    Two activations only meet in sums and joins, and no activation goes through tanh, so that it is
    affine in x.
    """

    def model(x, w):
        values = [(x, True), (w, False)]

        def pick(i, weights=False):
            some = [v for v in values if not (weights and v[1])]
            return some[-1 - i % len(some)]

        for name, i, *more in program:
            a, of_x = pick(i, name in ("tanh", "positive", "carry"))
            b, b_of_x = pick(more[0], of_x and name in ("product", "scale", "over")) if more else (
                a, False
            )  # fmt: skip
            if name in ("scan", "cond", "carry"):
                b, b_of_x = pick(more[0], True)
            y = MEET[name](a, b)
            values.append((y, of_x or b_of_x))
        return sum((v for v, of_x in values if of_x), start=jnp.zeros((N, N)))

    return model


MEET = {
    "product": lambda a, b: a @ b,
    "scale": lambda a, b: a * b,
    "add": lambda a, b: a - 0.5 * b,
    "join": lambda a, b: jnp.concatenate([a[1:3], b[::2]]),
    "mask": lambda a, b: jnp.where(MASK, a, b),
    "update": lambda a, b: a.at[1].set(b[0]),
    "tanh": lambda a, _: jnp.tanh(a),
    "transpose": lambda a, _: a.T,
    "factor": lambda a, _: BASIS * a,
    "cumsum": lambda a, _: jnp.cumsum(a, 0),
    "positive": lambda a, _: jnp.where(a > 0, a, 0.3),
    "rows": lambda a, _: a[jnp.array([1, 3, 0, 0])],
    "scan": lambda a, b: lax.scan(lambda h, _: (h @ b / 2, None), a, length=2)[0],
    "over": lambda a, b: lax.scan(lambda h, row: (h * row, h), a[0], b)[1],
    "carry": lambda a, b: lax.scan(lambda h, _: (b, h.T), a, length=N)[1][1],
    "cond": lambda a, b: lax.cond(jnp.sum(BASIS) > 0, lambda a, b: a * b, lambda a, b: a, a, b),
}


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.lists(steps, min_size=2, max_size=7))
def test_random_functions_go_through_feedback_or_are_refused(program):
    f = by_both(affine(program))
    try:
        ours, plain = f(W, B)
    except ValueError as error:
        assert "itself, not through its feedback" in str(error)
        hypothesis.event("refused")
        return
    hypothesis.event("through feedback")
    np.testing.assert_allclose(ours, plain, **CLOSE)
    np.testing.assert_allclose(f(V, B)[0], plain, **CLOSE)


# A kernel's own term: what its gradient by itself is, where x is data


OWN = {  # (x, w) -> y, nonlinear in w
    "a scale by tanh": lambda x, w: x * jnp.tanh(w),
    "a scale by softmax": lambda x, w: x * jax.nn.softmax(w),
    "a quotient": lambda x, w: x / (3 + w),
    "a power": lambda x, w: jnp.exp(x) ** w,
    "the largest": jnp.maximum,
    "x where weights are positive": lambda x, w: jnp.where(w > 0, x, 0.0) * w,
    "a sum with tanh": lambda x, w: x + jnp.tanh(w),
    "the sum of squares": lambda x, w: x + jnp.sum(w**2),
    "orthogonality": lambda x, w: (w.T @ w - jnp.eye(N)) ** 2,
    "singular values": lambda x, w: jnp.linalg.svd(w)[1],
    "a loss of weights, scaled by data": lambda x, w: jnp.sum(w**2) * x,
    "what a probe sees of them": lambda x, w: (w @ BASIS) ** 2,
}


@pytest.mark.parametrize("name", OWN)
def test_a_kernels_own_term_is_exact_where_no_activation_multiplies_it(name):
    loss = loss_of(OWN[name])
    exact = jax.jit(jax.grad(loss))({"w": W}, X)
    ours = jax.jit(jax.grad(with_feedback(loss)))({"w": W}, {"w": B}, X)
    np.testing.assert_allclose(ours["w"], exact["w"], **CLOSE)


@pytest.mark.parametrize(
    "model, primitive",
    [
        (lambda x, w: x @ jnp.tanh(w), "tanh"),
        (lambda x, w: x @ (w.T @ w), "dot_general"),
        (lambda x, w: x @ (w * w), "mul"),
        (lambda x, w: x @ (w + 1), "add"),
        (lambda x, w: x @ jax.nn.relu(w), "gt|max|custom_jvp_call"),
        (lambda x, w: x @ (w / jnp.max(jnp.abs(w))), "ge|sign|div|max"),
        (lambda x, w: lax.map(lambda row: row @ jnp.tanh(w), x), "tanh"),
        (lambda x, w: x @ w[jnp.argmax(w, 0)], "argmax"),
        (lambda x, w: jnp.linalg.solve(w, x), "lu"),
        (lambda x, w: lax.cond(w[0, 0] > 0, jnp.sin, jnp.cos, x @ w), "gt|cond"),
        (lambda x, w: fused(x, jnp.tanh(w)), "tanh"),
    ],
)
def test_a_kernels_own_term_that_data_multiply_raises_when_differentiated(model, primitive):
    f = with_feedback(loss_of(model))
    jax.eval_shape(f, {"w": W}, {"w": B}, X)
    with pytest.raises(ValueError, match="itself, not through its feedback") as error:
        jax.eval_shape(jax.grad(f), {"w": W}, {"w": B}, X)
    assert_told(error, primitive)


# Numbers made of a whole kernel


NUMBERS = {
    "the norm": jnp.linalg.norm,
    "a safe norm": lambda w: jnp.sqrt(jnp.sum(jnp.square(w)) + 1e-3),
    "a clipped norm": lambda w: jnp.maximum(jnp.linalg.norm(w), 1.0),
    "the sum of squares": lambda w: jnp.vdot(w, w),
    "the mean": jnp.mean,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_kernel_scaled_by_a_number_made_of_it_is_refused(name):
    """It is a normalised kernel; the number alone is exact where it scales activations."""
    number = NUMBERS[name]

    def normalised(params, x):
        return jnp.sum(jnp.sin(x @ (params["w"] / number(params["w"])))) + jnp.sum(x @ params["w"])

    with pytest.raises(ValueError, match="where other weights multiply it"):
        jax.eval_shape(jax.grad(with_feedback(normalised), (0, 2)), {"w": W}, {"w": B}, X)

    def scaled(params, x):
        return jnp.sum(jnp.sin(x / number(params["w"]))) + jnp.sum(x @ params["w"])

    x_bar = jax.jit(jax.grad(with_feedback(scaled), 2))({"w": W}, {"w": B}, X)
    exact = jax.jit(jax.grad(scaled, 1))({"w": B}, X) - jnp.cos(X / number(B)) / number(B)
    exact += jnp.cos(X / number(W)) / number(W)
    np.testing.assert_allclose(x_bar, exact, **CLOSE)


@pytest.mark.parametrize("name", NUMBERS)
def test_an_activation_scaled_by_a_number_made_of_a_kernel_is_exact(name):
    loss = loss_of(lambda x, w: jnp.sin(x * NUMBERS[name](w)))
    beside = loss_of(lambda x, w: jnp.zeros_like(x))

    def ours(loss):
        return jax.jit(jax.grad(with_feedback(loss), (0, 2)))({"w": W}, {"w": B}, X)

    def exact(loss):
        return jax.jit(jax.grad(loss, (0, 1)))({"w": W}, X)

    a, b, c, d = (jax.tree.leaves(f(g)) for f in (ours, exact) for g in (loss, beside))
    for i in range(2):
        np.testing.assert_allclose(a[i] - b[i], c[i] - d[i], **CLOSE)


# Activations of which weights are a part


def tied(params, ids, dot):
    """Rows of w that integers choose; and w as the last layer."""
    return dot(jnp.tanh(jnp.tanh(params["w"][ids] + 1) @ params["v"]))


def tied_in_a_loop(params, ids, dot):
    """Tokens come one by one; `w[token]` is a dynamic_slice."""
    w, v = params["w"], params["v"]
    return dot(lax.scan(lambda h, i: (jnp.tanh(h @ v + w[i]), None), jnp.zeros(N), ids)[0])


def normalised_rows(params, ids, dot):
    return dot(jnp.tanh(jnp.tanh(params["w"])[ids] @ params["v"]))


def weighted_tasks(params, ids, dot):
    """A penalised loss, weighted by a param."""
    task = jnp.sum(jnp.tanh(dot(ids[None] * params["v"][:1])))
    return (task + jnp.sum(params["w"] ** 2)) * jnp.exp(-params["v"][0, 0])


@pytest.mark.parametrize("model", [tied, tied_in_a_loop, normalised_rows, weighted_tasks])
def test_rows_that_integers_choose_and_penalties_are_no_weights(model):
    """So their gradient is exact, but for the feedback of the last layer."""
    params, ids = {"w": W, "v": V}, jnp.array([0, 2, 1, 2])

    def loss(params, ids):
        return jnp.sum(jnp.sin(model(params, ids, lambda h: h @ params["w"].T)))

    def by_hand(params, b):
        last = ops.feedback_op(jnp.dot)
        return jnp.sum(jnp.sin(model(params, ids, lambda h: last(h, params["w"].T, b.T))))

    ours, expected = jax.jit(jax.grad(with_feedback(loss))), jax.jit(jax.grad(by_hand))
    for b in (B, W, jnp.zeros_like(W)):
        bars = ours(params, {"w": b}, ids), expected(params, b)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), *bars)


# Two kernels


TWO = {  # (x, w, v) -> y, what of it has feedback, the primitive at which it fails
    "a product": (lambda x, w, v: x @ (w @ v), "wv", "dot_general"),
    "a product, feedback for the first": (lambda x, w, v: x @ (w @ v), "w", "dot_general"),
    "a product, feedback for the last": (lambda x, w, v: x @ (v @ w), "w", "dot_general"),
    "a product, scaled and laid out": (lambda x, w, v: (2 * (v @ w).T) @ x, "w", "dot_general"),
    "multiplied": (lambda x, w, v: x @ (w * v), "wv", "mul"),
    "multiplied, feedback for one": (lambda x, w, v: x @ (w * v), "w", "mul"),
    "a sum": (lambda x, w, v: x @ (w + v), "wv", "add"),
    "a sum, feedback for one": (lambda x, w, v: x @ (w + v), "w", "add"),
    "a complex sum": (lambda x, w, v: jnp.real(x @ (w + 1j * v)), "wv", "add"),
    "a low-rank update": (lambda x, w, v: x @ (w + v[:, :2] @ v[:2]), "w", "add"),
    "the same, feedback for its factor": (
        lambda x, w, v: x @ (v + v[:, :2] @ w[:2]),
        "w",
        "add|dot_general",
    ),
    "the same of the identity": (lambda x, w, v: x @ (jnp.eye(N) + w @ v), "w", "dot_general|add"),
    "a kernel scaled by an activation": (lambda x, w, v: v @ (w * x[0, 0]), "w", "mul"),
}


def loss_of_two(name):
    def loss(params, x, z):
        w, v = params["w"], params["v"]
        return jnp.sum(jnp.sin(TWO[name][0](x, w, v))) + jnp.sum(jnp.tanh(jnp.tanh(z @ w) @ v))

    return loss


def feedback_of_two(name):
    return {key: draw(N, N, seed=7 + i) for i, key in enumerate(TWO[name][1])}


@pytest.mark.parametrize("name", TWO)
def test_an_error_through_two_kernels_combined_raises(name):
    grad = jax.grad(with_feedback(loss_of_two(name)), 2)
    with pytest.raises(ValueError, match="itself, not through its feedback") as error:
        jax.eval_shape(grad, {"w": W, "v": V}, feedback_of_two(name), X, X)
    assert_told(error, TWO[name][2], TWO[name][1])


@pytest.mark.parametrize("by", ["w", "v"])
@pytest.mark.parametrize("name", ["a product", "multiplied"])
def test_an_error_from_one_kernel_to_another_raises(name, by):
    def loss(kernel, x):
        f = with_feedback(loss_of_two(name))
        return f({"w": W, "v": V} | {by: kernel}, feedback_of_two(name), x, x)

    with pytest.raises(ValueError, match="itself, not through its feedback") as error:
        jax.eval_shape(jax.grad(loss), {"w": W, "v": V}[by], X)
    assert_told(error, TWO[name][2], TWO[name][1])


# Constants


def test_what_a_function_closes_over_is_no_batch():
    def loss(params):
        return jnp.sum(jnp.tanh(X @ params["w"]) @ params["v"])

    params, feedback = {"w": W, "v": V}, {"w": B}
    with pytest.raises(ValueError, match=r"would do nothing.*pass the batch as an argument"):
        jax.eval_shape(with_feedback(loss), params, feedback)
    with pytest.raises(ValueError, match=r"itself.*batch that the function closes over"):
        both = with_feedback(lambda p, x: loss(p) + jnp.sum(jnp.sin(x @ p["v"]) @ p["w"]))
        jax.eval_shape(jax.grad(both), params, {"w": B, "v": B}, X)


def test_what_a_function_closes_over_is_a_batch_where_one_differentiates_by_it():
    @jax.jit
    @jax.grad
    def closed_over(x):
        f = with_feedback(lambda p: jnp.sum((jnp.sin(x) @ p["w"]) ** 2))
        return f({"w": W}, {"w": B})

    y_bar = 2 * (jnp.sin(X) @ W)
    np.testing.assert_allclose(closed_over(X), (y_bar @ B.T) * jnp.cos(X), **CLOSE)
