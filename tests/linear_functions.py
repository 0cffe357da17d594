"""Functions `f(x, w)` that are linear (or affine) in `x` (3, 4), for `w` (4, 4).

With feedback B fixed, the cotangent of `x` of such a function must not depend on `w`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

V = np.array([1.0, -0.5, 0.3, 2.0])
MASK = np.arange(16).reshape(4, 4) % 3 > 0
ORDER = np.array([2, 0, 3, 1])
IDS = jnp.array([0, 2, 1])


def conv(x, w, **options):
    """x as a sequence with features, w as two taps."""
    taps = jnp.stack([w, w[::-1]])
    return lax.conv_general_dilated(
        x[None], taps, (1,), ((0, 1),), dimension_numbers=("NWC", "WIO", "NWC"), **options
    )[0]


def looped(body, length=2, **options):
    """`h = body(h, w)`, the kernel a constant of the loop."""

    def f(x, w):
        return lax.scan(lambda h, _: (body(h, w), None), x, None, length=length, **options)[0]

    return f


def fori(body):
    return lambda x, w: lax.fori_loop(0, 2, lambda i, h: body(h, w), x)


def over(body, lay=lambda w: w, **options):
    """`h = body(h, w_i)`, scanned over kernels stacked and laid out."""

    def f(x, w):
        stack = lay(jnp.stack([w, w.T]))
        return lax.scan(lambda h, w: (body(h, w), None), x, stack, **options)[0]

    return f


def carried(change):
    """The kernel is carried, and changed at every step."""

    def f(x, w):
        return lax.scan(lambda c, _: ((c[0] @ c[1], change(c[1])), None), (x, w), length=2)[0][0]

    return f


def rnn(body):
    """`h = body(h, x_t, w)` over the rows of x, all states."""

    def f(x, w):
        def step(h, row):
            h = body(h, row, w)
            return h, h

        return lax.scan(step, jnp.zeros(4, x.dtype), x)[1]

    return f


def cond(yes, no):
    return lambda x, w: lax.cond(V[0] > 0, yes, no, x, w)


def cond_of(yes, no):
    """By a traced predicate, of weights."""
    return lambda x, w: x @ lax.cond(jnp.sum(lax.stop_gradient(x)) > 0, yes, no, w)


@jax.custom_vjp
def saves_transposed(x, w):
    return x @ w


saves_transposed.defvjp(lambda x, w: (x @ w, (x, w.T)), lambda res, g: (g @ res[1], res[0].T @ g))


@jax.custom_vjp
def saves_tanh(x, w):
    return x @ w


saves_tanh.defvjp(
    lambda x, w: (x @ w, (x, jnp.tanh(w))), lambda res, g: (g @ res[1].T, res[0].T @ g)
)


@jax.custom_vjp
def saves_product(x, w):
    return x @ w @ w


saves_product.defvjp(
    lambda x, w: (x @ w @ w, (x, w)),
    lambda res, g: (g @ (res[1] @ res[1]).T, (res[0] @ res[1]).T @ g + res[0].T @ (g @ res[1].T)),
)


@jax.custom_vjp
def saves_sign(x, w):
    return x * w[:3]


saves_sign.defvjp(
    lambda x, w: (x * w[:3], (x, jnp.sign(w))),
    lambda res, g: (g * res[1][:3], jnp.zeros((4, 4), g.dtype).at[:3].set(res[0] * g)),
)


@jax.custom_jvp
def own_jvp_dot(x, w):
    return x @ w


@own_jvp_dot.defjvp
def _own_jvp_dot(primals, tangents):
    (x, w), (x_dot, w_dot) = primals, tangents
    return x @ w, x_dot @ w + x @ w_dot


@jax.custom_jvp
def own_jvp_tanh(x, w):
    return x @ jnp.tanh(w)


@own_jvp_tanh.defjvp
def _own_jvp_tanh(primals, tangents):
    (x, w), (x_dot, w_dot) = primals, tangents
    return own_jvp_tanh(x, w), x_dot @ jnp.tanh(w) + x @ ((1 - jnp.tanh(w) ** 2) * w_dot)


@jax.custom_jvp
def own_jvp_of_weights(w):
    return 0.5 * w


own_jvp_of_weights.defjvps(lambda w_dot, y, w: w_dot)


def solve_triangular(x, w):
    lower = jnp.tril(w, -1) + 2 * jnp.eye(4)
    return jax.scipy.linalg.solve_triangular(lower, x.T, lower=True).T


def linear_solve(x, w):
    return jnp.linalg.solve(w + 5 * jnp.eye(4), x.T).T


THROUGH = {  # what must pass through feedback
    "x @ w": lambda x, w: x @ w,
    "w @ x.T": lambda x, w: (w @ x.T).T,
    "x @ w.T": lambda x, w: x @ w.T,
    "einsum": lambda x, w: jnp.einsum("bi,oi->bo", x, w),
    "einsum over heads": lambda x, w: jnp.einsum("bi,iho->bho", x, w.reshape(4, 2, 2)),
    "dot_general": lambda x, w: lax.dot_general(x, w, (((1,), (1,)), ((), ()))),
    "tensordot": lambda x, w: jnp.tensordot(x.reshape(3, 2, 2), w.reshape(2, 2, 4), 2),
    "batched matmul": lambda x, w: jnp.matmul(x.reshape(3, 2, 1, 2)[:2], w.reshape(2, 1, 2, 4)),
    "inner": lambda x, w: jnp.inner(x, w),
    "vdot": lambda x, w: jnp.vdot(x, w[:3]),
    "kron": lambda x, w: jnp.kron(x, w),
    "outer": lambda x, w: jnp.outer(x, w),
    "conv": conv,
    "conv, dilated": lambda x, w: conv(x, w, rhs_dilation=(2,)),
    "conv, kernel on the left": lambda x, w: lax.conv_general_dilated(
        w[None, :, :], x.T[None], (1,), ((2, 2),), dimension_numbers=("NWC", "WIO", "NWC")
    ),
    "convolve": lambda x, w: jnp.convolve(x[0], w[1]),
    "twice": lambda x, w: (x @ w) @ w,
    "there and back": lambda x, w: (x @ w) @ w.T,
    "x * w": lambda x, w: x * w[:3],
    "w * x * c": lambda x, w: 3.0 * (w[:3] * x),
    "a row, elementwise": lambda x, w: x * w[:1],
    "a row for all": lambda x, w: x * w[0][None],
    "one element": lambda x, w: x * w[0, 0],
    "x @ diag(w[0])": lambda x, w: x @ jnp.diag(w[0]),
    "diag of w": lambda x, w: x * jnp.diagonal(w)[None],
    "weighted sum": lambda x, w: jnp.sum(x * w[:3]),
    "dot of vectors": lambda x, w: x[0] @ w[0],
    "mask": lambda x, w: x @ (w * MASK),
    "where": lambda x, w: x @ jnp.where(MASK, w, 0),
    "where of two layouts": lambda x, w: x @ jnp.where(MASK, w, w.T),
    "tril": lambda x, w: x @ jnp.tril(w),
    "scaled": lambda x, w: x @ (2 * w / 3),
    "negated": lambda x, w: -x @ -w,
    "constant's product": lambda x, w: x @ (V[:, None] * np.eye(4) @ w),
    "sum with constants": lambda x, w: x @ (w @ V),
    "sum over an axis": lambda x, w: x * w.sum(0, keepdims=True),
    "mean over an axis": lambda x, w: x * w.mean(0, keepdims=True),
    "reshape": lambda x, w: x @ w.reshape(2, 8).T.reshape(4, 4),
    "slices": lambda x, w: jnp.concatenate([x @ w[:, :2], x @ w[:, 2:]], axis=1),
    "split and concatenated": lambda x, w: x @ jnp.concatenate(jnp.split(w, 2), 1).reshape(4, 4),
    "stacked": lambda x, w: jnp.einsum("bi,lio->lbo", x, jnp.stack([w, w.T])),
    "roll": lambda x, w: x @ jnp.roll(w, 1, 0),
    "flip": lambda x, w: x @ w[::-1, ::-1],
    "pad": lambda x, w: x @ jnp.pad(w, ((0, 0), (1, 1))),
    "repeat": lambda x, w: x @ jnp.repeat(w, 2, 1),
    "tile": lambda x, w: x @ jnp.tile(w, (1, 2)),
    "broadcast": lambda x, w: x @ jnp.broadcast_to(w[:1], (4, 4)),
    "constant rows": lambda x, w: x @ w[ORDER],
    "constant columns": lambda x, w: x @ w[:, ORDER],
    "take": lambda x, w: x @ jnp.take(w, ORDER, axis=1),
    "columns by data": lambda x, w: x @ w[:, jnp.argsort(lax.stop_gradient(x[0]))],
    "slice by data": lambda x, w: x @ lax.dynamic_slice(w, (0, jnp.argmax(x[0]) % 2), (4, 2)),
    "experts": lambda x, w: jnp.einsum("bi,bio->bo", x, jnp.stack([w, w.T, 2 * w])[IDS]),
    "cast": lambda x, w: x @ w.astype(jnp.float32).astype(w.dtype),
    "complex": lambda x, w: jnp.real(x @ lax.complex(w[:, :2], w[:, 2:])),
    "stopped": lambda x, w: x @ lax.stop_gradient(w),
    "under jit": lambda x, w: jax.jit(lambda x, w: x @ w.T)(x, w),
    "under remat": lambda x, w: jax.checkpoint(lambda x, w: x @ w.T @ w)(x, w),
    "under vmap": lambda x, w: jax.vmap(lambda row: row @ w.T)(x),
    "under vmap of both": lambda x, w: jax.vmap(jnp.multiply)(x, w[:3]),
    "under nested vmap": lambda x, w: jax.vmap(lambda x: jax.vmap(lambda c: x @ c)(w))(x),
    "mapped": lambda x, w: lax.map(lambda row: row @ w.T, x),
    "under grad": lambda x, w: jax.grad(lambda z: jnp.sum((z @ w) ** 2 / 2))(x),
    "under vjp": lambda x, w: jax.vjp(lambda z: z @ w, jnp.zeros((3, 4), x.dtype))[1](x)[0],
    "under jvp": lambda x, w: jax.jvp(lambda z: z @ w, (jnp.ones((3, 4), x.dtype),), (x,))[1],
    "own vjp that saves w.T": saves_transposed,
    "own jvp": own_jvp_dot,
    "own vjp in a scan": looped(saves_transposed),
    "own vjp under vmap": lambda x, w: jax.vmap(lambda r: saves_transposed(r[None], w)[0])(x),
    "own vjp under remat": jax.checkpoint(saves_transposed),
    "scan": looped(lambda h, w: h @ w),
    "scan of a transposed": looped(lambda h, w: h @ w.T),
    "scan of a cast": looped(lambda h, w: h @ w.astype(jnp.float32).astype(h.dtype)),
    "scan elementwise": looped(lambda h, w: h * w[:3]),
    "scan elementwise, once": looped(lambda h, w: h * w[:3], length=1),
    "scan, affine": looped(lambda h, w: h @ w + w[:3]),
    "scan, plus": looped(lambda h, w: 0.5 * h + w[:3]),
    "scan, both": looped(lambda h, w: h * w[:3] + h @ w),
    "scan, unrolled": looped(lambda h, w: h @ w, unroll=2),
    "scan in reverse": over(lambda h, w: h @ w, reverse=True),
    "fori": fori(lambda h, w: h @ w.T),
    "fori elementwise": fori(lambda h, w: h * w[:3]),
    "over a stack": over(lambda h, w: h @ w),
    "over a stack, transposed within": over(lambda h, w: h @ w.T),
    "over a stack, transposed before": over(lambda h, w: h @ w, lambda s: jnp.swapaxes(s, 1, 2)),
    "over a stack, elementwise": over(lambda h, w: h * w[:3]),
    "over a stack, reshaped within": over(lambda h, w: h @ w.reshape(-1).reshape(4, 4)),
    "over a stack, sliced by step": lambda x, w: lax.fori_loop(
        0, 2, lambda i, h: h @ jnp.stack([w, w.T])[i], x
    ),
    "over rows": lambda x, w: lax.scan(lambda h, row: (h * row, None), x[0], w)[0],
    "carried": carried(lambda w: w),
    "carried and transposed": carried(lambda w: w.T),
    "carried and scaled": carried(lambda w: 0.9 * w),
    "rnn": rnn(lambda h, row, w: h @ w + row),
    "rnn, both": rnn(lambda h, row, w: h @ w + row @ w.T),
    "rnn elementwise": rnn(lambda h, row, w: h * w[0] + row),
    "rnn, nested": rnn(lambda h, row, w: looped(lambda h, w: h @ w)(h[None], w)[0] + row),
    "rnn under remat": rnn(jax.checkpoint(lambda h, row, w: h @ w + row)),
    "rnn's input gate": rnn(lambda h, row, w: h + w[0] * row),
    "while over data": lambda x, w: x @ (w * lax.while_loop(lambda i: i < 3, lambda i: i + 1, 0)),
    "cond": cond(lambda x, w: x @ w, lambda x, w: x @ w.T),
    "cond that returns weights": cond_of(lambda w: w, lambda w: 2 * w.T),
    "cond in a scan": lambda x, w: lax.fori_loop(
        0, 2, lambda i, h: lax.cond(i > 0, lambda h: h @ w, lambda h: h @ w.T, h), x
    ),
    "switch of weights": lambda x, w: (
        x @ lax.switch(jnp.argmax(x[0]) % 3, [lambda w: w, jnp.transpose, lambda w: w[::-1]], w)
    ),
    "(x + w) @ w": lambda x, w: (x + w[:3]) @ w,
    "(x + w) * w": lambda x, w: (x + w[:3]) * w[:3],
    "(x @ w + w) * w": lambda x, w: (x @ w + w[:3]) * w[:3],
    "sum of uses": lambda x, w: x @ w + x * w[:3] + x @ w.T,
    "linear parts": lambda x, w: jnp.cumsum(x @ w, 0)[::-1] - jnp.fft.fft(x @ w.T).real,
    "sorted": lambda x, w: x @ w + 0 * jnp.sort(lax.stop_gradient(x) @ w, 0),
    "a metric beside": lambda x, w: x @ w + lax.stop_gradient(jnp.sum(x @ jnp.tanh(w))),
    "scatter": lambda x, w: jnp.zeros((4, 4), x.dtype).at[ORDER[:3]].add(x @ w),
    "dynamic update": lambda x, w: (
        x @ lax.dynamic_update_slice(w, jnp.zeros((1, 4), w.dtype), (1, 0))
    ),
}
HIDDEN = {  # what may be refused, and must not leak
    "tanh": lambda x, w: x @ jnp.tanh(w),
    "relu": lambda x, w: x @ jax.nn.relu(w),
    "leaky relu": lambda x, w: x @ jax.nn.leaky_relu(w),
    "gelu": lambda x, w: x @ jax.nn.gelu(w),
    "abs": lambda x, w: x @ jnp.abs(w),
    "sign": lambda x, w: x @ jnp.sign(w),
    "square": lambda x, w: x @ w**2,
    "w * w": lambda x, w: x @ (w * w),
    "exp": lambda x, w: x @ jnp.exp(w),
    "power": lambda x, w: x @ jnp.abs(w) ** 1.5,
    "rounded": lambda x, w: x @ jnp.round(w),
    "as integers": lambda x, w: x @ (8 * w).astype(jnp.int8).astype(x.dtype),
    "straight through": lambda x, w: x @ (w + lax.stop_gradient(jnp.sign(w) - w)),
    "clipped": lambda x, w: x @ jnp.clip(w, -0.5, 0.5),
    "softmax": lambda x, w: x @ jax.nn.softmax(w, axis=0),
    "rows normalised": lambda x, w: x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True)),
    "standardised": lambda x, w: x @ jax.nn.standardize(w, axis=0),
    "centred": lambda x, w: x @ (w - w.mean(0, keepdims=True)),
    "w + 1": lambda x, w: x @ (w + 1),
    "w + w.T": lambda x, w: x @ (w + w.T),
    "w @ w": lambda x, w: x @ (w @ w),
    "w.T @ w": lambda x, w: x @ (w.T @ w),
    "w @ tanh(w)": lambda x, w: x @ w @ jnp.tanh(w),
    "matrix power": lambda x, w: x @ jnp.linalg.matrix_power(w, 3),
    "inverse": lambda x, w: x @ jnp.linalg.inv(w),
    "pseudo-inverse": lambda x, w: x @ jnp.linalg.pinv(w),
    "solve": linear_solve,
    "triangular solve": solve_triangular,
    "qr": lambda x, w: x @ jnp.linalg.qr(w)[0],
    "svd": lambda x, w: x @ jnp.linalg.svd(w)[0],
    "eigenvectors": lambda x, w: x @ jnp.linalg.eigh(w + w.T)[1],
    "cholesky": lambda x, w: x @ jnp.linalg.cholesky(w @ w.T + jnp.eye(4)),
    "matrix exponential": lambda x, w: x @ jax.scipy.linalg.expm(w),
    "cumsum": lambda x, w: x @ jnp.cumsum(w, 0),
    "cumprod": lambda x, w: x @ jnp.cumprod(w, 0),
    "sorted columns": lambda x, w: x @ jnp.sort(w, 0),
    "order by w": lambda x, w: x[:, jnp.argsort(w[0])],
    "order of w by w": lambda x, w: x @ w[:, jnp.argsort(w[0])],
    "slice by w": lambda x, w: lax.dynamic_slice(x, (0, jnp.argmax(w[0])), (3, 1)),
    "top k": lambda x, w: x @ lax.top_k(w, 4)[0],
    "maximum over an axis": lambda x, w: x * w.max(0, keepdims=True),
    "norm over an axis": lambda x, w: x * jnp.linalg.norm(w, axis=0)[None],
    "fft of w": lambda x, w: (x @ jnp.fft.fft(w)).real,
    "fft on both sides": lambda x, w: jnp.fft.ifft(jnp.fft.fft(x) * jnp.fft.fft(w)[:3]).real,
    "where(w > 0, x, 0)": lambda x, w: jnp.where(w[:3] > 0, x, 0.0),
    "x * (w > 0)": lambda x, w: x * (w[:3] > 0),
    "x @ where(w > 0, w, w / 10)": lambda x, w: x @ jnp.where(w > 0, w, 0.1 * w),
    "x @ (w * (w > 0))": lambda x, w: x @ (w * (w > 0)),
    "x @ (w * sign)": lambda x, w: x @ (w * jnp.where(w > 0, 1.0, -1.0)),
    "by the mask of another": lambda x, w: x @ jnp.where(w.T > 0, w, 0),
    "select by w": lambda x, w: lax.select_n((w[:3] > 0).astype(jnp.int32), x, 2 * x),
    "cond by w": lambda x, w: lax.cond(w[0, 0] > 0, lambda x: x, lambda x: 2 * x, x),
    "switch by w": lambda x, w: lax.switch(
        jnp.argmax(w[0]), [lambda x: x, lambda x: -x, lambda x: 2 * x, lambda x: x / 3], x
    ),
    "steps by w": lambda x, w: (
        lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1]), (0, w))[1][:3] * x
    ),
    "x / w": lambda x, w: x / w[:3],
    "x / (3 + w)": lambda x, w: x / (3 + w[:3]),
    "x @ (1 / w)": lambda x, w: x @ (1 / w),
    "x * tanh(w)": lambda x, w: x * jnp.tanh(w[:3]),
    "x * tanh(w[0, 0])": lambda x, w: x * jnp.tanh(w[0, 0]),
    "scan, h * tanh(w)": looped(lambda h, w: h * jnp.tanh(w[:3])),
    "scan, h @ tanh(w)": looped(lambda h, w: h @ jnp.tanh(w)),
    "scan, h / w": looped(lambda h, w: h / w[:3]),
    "scan, h @ (w @ w)": looped(lambda h, w: h @ (w @ w)),
    "scan, h @ centred": looped(lambda h, w: h @ (w - w.mean(0, keepdims=True))),
    "scan, where(w > 0, h, 0)": looped(lambda h, w: jnp.where(w[:3] > 0, h, 0.0)),
    "fori, h * tanh(w)": fori(lambda h, w: h * jnp.tanh(w[:3])),
    "over a stack, tanh within": over(lambda h, w: h @ jnp.tanh(w)),
    "over a stack, tanh before": over(lambda h, w: h @ w, jnp.tanh),
    "over a stack, squares": over(lambda h, w: h @ w**2),
    "carried through tanh": carried(jnp.tanh),
    "carried products": carried(lambda w: w @ w),
    "carried, plus": carried(lambda w: w + 1),
    "rnn, tanh(w)": rnn(lambda h, row, w: h @ jnp.tanh(w) + row),
    "rnn, h * tanh(w)": rnn(lambda h, row, w: h * jnp.tanh(w[0]) + row),
    "accumulated weights": lambda x, w: (
        x @ lax.fori_loop(0, 2, lambda i, a: a + w, jnp.zeros((4, 4), w.dtype))
    ),
    "scan that makes weights": lambda x, w: (
        x @ lax.scan(lambda c, row: (c, jnp.tanh(row)), 0.0, w)[1]
    ),
    "cond of broken": cond_of(jnp.tanh, lambda w: w),
    "cond with a broken branch": cond(lambda x, w: x @ w, lambda x, w: x @ jnp.tanh(w)),
    "a broken branch": cond(lambda x, w: x @ jnp.tanh(w), lambda x, w: x @ w),
    "remat of tanh": lambda x, w: jax.checkpoint(lambda x, w: x @ jnp.tanh(w))(x, w),
    "jit of tanh": lambda x, w: x @ jax.jit(jnp.tanh)(w),
    "vmap of tanh": lambda x, w: x @ jax.vmap(jnp.tanh)(w),
    "vmap over gram": lambda x, w: jax.vmap(lambda row: row @ (w.T @ w))(x),
    "map of tanh": lambda x, w: x @ lax.map(jnp.tanh, w),
    "own vjp that saves tanh(w)": saves_tanh,
    "own vjp that multiplies w by w": saves_product,
    "own vjp that saves sign(w)": saves_sign,
    "own vjp that saves tanh(w), in a scan": looped(saves_tanh),
    "own vjp that saves tanh(w), under remat": jax.checkpoint(saves_tanh),
    "own jvp with tanh": own_jvp_tanh,
    "own jvp of weights": lambda x, w: x @ own_jvp_of_weights(w),
    "concatenate(x, w) * w": lambda x, w: jnp.concatenate([x, w[:1]]) * w,
    "where(m, x, w) * w": lambda x, w: jnp.where(MASK[:3], x, w[:3]) * w[:3],
    "where(m, x, w) @ w": lambda x, w: jnp.where(MASK[:3], x, w[:3]) @ w,
    "where(m, x, w) @ tanh(w)": lambda x, w: jnp.where(MASK[:3], x, w[:3]) @ jnp.tanh(w),
    "taken from a concatenation": lambda x, w: (lambda c: c[:3] @ c[3:])(jnp.concatenate([x, w])),
    "taken from a concatenation, elementwise": lambda x, w: (lambda c: c[:3] * c[3:6])(
        jnp.concatenate([x, w])
    ),
    "taken from a select": lambda x, w: (lambda c: c[0] * c[1])(
        jnp.where(np.array([[True], [False]]), jnp.stack([x[0], x[0]]), w[:2])
    ),
    "taken from an update": lambda x, w: (lambda c: c[:3] @ c[3:])(
        jnp.zeros((7, 4), x.dtype).at[:3].set(x).at[3:].set(w)
    ),
    "taken from a carry": lambda x, w: (lambda c: c[0] * c[1])(
        lax.fori_loop(0, 1, lambda i, c: c.at[0].set(x[0]), w)
    ),
    "taken from a scan's outputs": lambda x, w: (lambda c: c[0] * c[1])(
        lax.scan(lambda c, i: (c, jnp.where(i > 0, c[0], c[1])), (x[0], w[0]), jnp.arange(2))[1]
    ),
    "taken from a cond": lambda x, w: (lambda c: c * w[:3])(
        lax.cond(jnp.sum(lax.stop_gradient(x)) > 9, lambda: w[:3], lambda: x)
    ),
    "data's gather of tanh(w)": lambda x, w: x @ jnp.tanh(w)[:, jnp.argsort(x[0])],
    "tanh of data's gather": lambda x, w: x @ jnp.tanh(w[:, jnp.argsort(lax.stop_gradient(x[0]))]),
    "tanh of data's slice": lambda x, w: (
        x * jnp.tanh(lax.dynamic_slice(w, (jnp.argmax(x[0]) % 2, 0), (3, 4)))
    ),
    "square of data's gather": lambda x, w: x @ w[:, jnp.argsort(x[0])] ** 2,
    "tanh of data's element": lambda x, w: x * jnp.tanh(w[jnp.argmax(x[0]), 0]),
    "(x + w) @ tanh(w)": lambda x, w: (x + w[:3]) @ jnp.tanh(w),
    "(x + tanh(w)) @ w": lambda x, w: (x + jnp.tanh(w[:3])) @ w,
    "x @ (w @ w) + x @ w": lambda x, w: x @ (w @ w) + x @ w,
    "hidden in a concatenation": lambda x, w: x @ jnp.concatenate([jnp.tanh(w[:1]), w[1:]]),
    "hidden in a select": lambda x, w: x @ jnp.where(MASK, w, jnp.tanh(w)),
    "hidden in an update": lambda x, w: x @ w.at[0].set(jnp.tanh(w[0])),
    "hidden in a sum": lambda x, w: x @ w.at[0].add(w[1]),
    "hidden in a product": lambda x, w: x @ w.at[0].multiply(w[1]),
    "hidden in a gather": lambda x, w: x @ jnp.tanh(w)[ORDER],
    "hidden in complex": lambda x, w: jnp.real(x @ lax.complex(jnp.tanh(w), w)),
    "absolute of complex": lambda x, w: x @ jnp.abs(lax.complex(w, w.T)),
    "hidden in bits": lambda x, w: (
        x @ lax.bitcast_convert_type(lax.bitcast_convert_type(w, jnp.int64), w.dtype)
    ),
    "hidden under grad": lambda x, w: x @ jax.grad(lambda w: jnp.sum(jnp.sin(w)))(w),
    "hidden under jvp": lambda x, w: jax.jvp(lambda w: x @ jnp.tanh(w), (w,), (w,))[1],
    "hessian": lambda x, w: jax.jvp(
        jax.grad(lambda z: jnp.sum((z @ w) ** 2)), (jnp.ones((3, 4), x.dtype),), (x,)
    )[1],
    "hidden in a determinant": lambda x, w: x @ (w * jnp.linalg.det(w[:2, :2])),
    "hidden in one_hot": lambda x, w: x @ jax.nn.one_hot(jnp.argmax(w, 1), 4, dtype=x.dtype),
    "hidden in scatter": lambda x, w: jnp.zeros((3, 4), x.dtype).at[:, jnp.argsort(w[0])].add(x),
    "hidden in segments": lambda x, w: jax.ops.segment_sum(x.T, jnp.argsort(w[0]), 4),
    "reduce precision": lambda x, w: x @ lax.reduce_precision(w, 5, 7),
    "maximum with w, twice": lambda x, w: x @ jnp.maximum(w, w.T),
    "outer product of w": lambda x, w: x @ jnp.outer(w[0], w[1]),
    "low rank": lambda x, w: x @ (w[:, :1] @ w[:1]),
    "householder": lambda x, w: x - 2 * (x @ w[0])[:, None] * w[0][None],
    "cross": lambda x, w: jnp.cross(x[:, :3], w[:3, :3]),
    "polynomial": lambda x, w: x @ (w + w @ w + w @ w @ w),
    "associative scan": lambda x, w: x @ lax.associative_scan(jnp.matmul, jnp.stack([w, w]))[1],
    "associative scan over x": lambda x, w: lax.associative_scan(
        lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]), (jnp.broadcast_to(w[:1], (3, 4)), x)
    )[1],
    "sinh": lambda x, w: x @ jnp.sinh(w),
}
