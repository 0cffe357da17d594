"""`with_feedback`: any function of params, made to use feedback; here plain JAX functions.

Models are written once, against `product` and `lay`. With arrays for params they are plain JAX, to
be transformed; with `Pair`s of kernel and feedback they are the reference, made of feedback ops
with feedback laid out by hand.
"""

import functools
import re
from typing import NamedTuple

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax
from jax.experimental import xla_metadata
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from soap_jax import init_feedback, ops, with_feedback

F32, BF16 = jnp.float32, jnp.bfloat16
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # the same products, summed in another order


jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiles sooner; for the outermost function only."""


class Pair(NamedTuple):
    """A kernel and its feedback, in the place of an array of params."""

    kernel: jax.Array
    feedback: jax.Array


def product(x, w, op=jnp.dot):
    return ops.feedback_op(op)(x, *w) if isinstance(w, Pair) else op(x, w)


def lay(f, *ws):
    """f of kernels, and of feedback where it is explicit."""
    return jax.tree.map(f, *ws)


def draw(*shape, seed=0):
    """By NumPy, which compiles nothing; scaled so that sums of products are about one."""
    values = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return jnp.asarray(values / np.sqrt(shape[0] if shape else 1), F32)


def like(tree, seed):
    leaves, treedef = jax.tree.flatten(tree)
    new = [draw(*leaf.shape, seed=seed + i) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, new)


def loss_of(model):
    """The sum of a nonlinear function of a model's output, so that cotangents differ."""

    def loss(params, *args, **kwargs):
        return jnp.sum(jnp.sin(model(params, *args, **kwargs).astype(F32)))

    return loss


def fa(loss, by=(0, 2), **options):
    """`(params, feedback, x) -> loss and its gradients by params and x`, by the transform."""
    return jit(jax.value_and_grad(with_feedback(loss, **options), by))


def backprop(loss, by=(0, 1)):
    return jit(jax.value_and_grad(loss, by))


def reference(loss):
    """As `fa`, of a model that is evaluated on pairs."""

    @jit
    def f(params, feedback, *args):
        pairs = jax.tree.map(Pair, params, feedback)
        value, (bars, x_bar) = jax.value_and_grad(loss, (0, 1))(pairs, *args)
        bars = jax.tree.map(lambda bar: bar.kernel, bars, is_leaf=lambda bar: type(bar) is Pair)
        return value, (bars, x_bar)

    return f


def assert_close(actual, expected, **tolerances):
    """Also of the same structure, shapes and dtypes."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, **(tolerances or CLOSE))


def assert_backprop_at_equality_and_reference_elsewhere(loss, params, x, feedback=None):
    feedback = like(params, seed=50) if feedback is None else feedback
    f = fa(loss)
    actual = f(params, feedback, x)
    assert_close(f(params, params, x), backprop(loss)(params, x))
    assert_close(actual, reference(loss)(params, feedback, x))
    return actual


def differ(a, b):
    return not np.allclose(a, b, rtol=1e-3, atol=1e-3)


# Kernels on their way to a product: the cotangent of a model that is linear in x


def conv(x, w, **options):
    return lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), **options
    )


def swapped_conv(x, w):
    """The kernel as the convolution's lhs."""
    return lax.conv_general_dilated(
        w, x, (1,), ((2, 2),), dimension_numbers=("NWC", "OWI", "NWC"), precision="highest"
    )


def to_heads(x, w):
    return jnp.einsum("bi,iho->bho", x, w.reshape(3, 2, 4))


def halves(w):
    a, b = jnp.split(w, 2, axis=1)
    return jnp.concatenate([b, -a], axis=1)


MASK = np.arange(24).reshape(3, 8) % 3 > 0
FACTOR = np.linspace(-1, 2, 24, dtype=np.float32).reshape(3, 8)

LAYOUTS = {  # of a kernel (3, 8)
    "as it is": lambda w: w,
    "reshape": lambda w: w.reshape(2, 2, 6).reshape(3, 8),
    "transpose": lambda w: w.T.reshape(3, 8),
    "swapped axes": lambda w: jnp.swapaxes(w.reshape(3, 2, 4), 1, 2).reshape(3, 8),
    "slice": lambda w: w[:, 1:7:2],
    "slice backwards": lambda w: w[:, ::-2],
    "squeeze": lambda w: jnp.squeeze(w[None, ..., None], (0, 3)),
    "cast there and back": lambda w: w.astype(BF16).astype(F32),
    "broadcast": lambda w: jnp.broadcast_to(w[:, :1], (3, 8)),
    "concatenate": lambda w: jnp.concatenate([w[:, 3:], w[:, :3], jnp.ones((3, 2))], axis=1),
    "block": lambda w: jnp.block([[w[:2], jnp.zeros((2, 1))], [jnp.ones((1, 3)), w[2:, :6]]]),
    "split": halves,
    "pad": lambda w: jnp.pad(w, ((0, 0), (1, 2)), constant_values=0.5),
    "roll": lambda w: jnp.roll(w, 3, axis=1),
    "select": lambda w: jnp.where(MASK, w, 0.5),
    "select of two": lambda w: jnp.where(MASK, w, w[::-1]),
    "lower triangle": jnp.tril,
    "rev": lambda w: lax.rev(w, (0, 1)),
    "flip": lambda w: jnp.flip(w, axis=1),
    "negation": lambda w: -w,
    "scalar factor": lambda w: 0.3 * w,
    "constant factor": lambda w: w * FACTOR,
    "quotient": lambda w: w / 7,
    "static rows": lambda w: jnp.stack([w[2], w[0], w[2]]),
    "permuted rows": lambda w: w[np.array([2, 0, 1])],
    "repeated columns": lambda w: jnp.repeat(w, 2, axis=1),
    "tile": lambda w: jnp.tile(w, (1, 2)),
    "unstack": lambda w: jnp.stack(jnp.unstack(w)[::-1]),
    "moveaxis under vmap": lambda w: jax.vmap(lambda row: row[::-1], 1, 1)(w),
    "product with a constant": lambda w: FACTOR[:, :3] @ w,
    "product with a constant on the right": lambda w: w @ FACTOR.T[:, :2],
    "cumulated sums": lambda w: jnp.cumsum(w, axis=1),
    "sums along an axis": lambda w: jnp.broadcast_to(w.sum(1, keepdims=True), (3, 8)),
    "jit": jax.jit(lambda w: w[:, ::-1]),
    "checkpoint": jax.checkpoint(lambda w: w[:, ::-1]),
    "map": lambda w: lax.map(lambda row: row[::-1], w),
    "scaled in a loop": lambda w: lax.fori_loop(0, 2, lambda _, w: 0.9 * w[:, ::-1], w),
}


def assert_cotangent_is_the_transpose_at_feedback(model, params, feedback, x):
    """For a model bilinear in params and x: the identity that defines feedback."""

    @jit
    def pull_back(params, feedback, x):
        y, vjp = jax.vjp(lambda params, x: with_feedback(model)(params, feedback, x), params, x)
        y_bar = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        return y, *vjp(y_bar)

    @jit
    def expected(params, feedback, x):
        y, vjp = jax.vjp(lambda params: model(params, x), params)
        y_bar = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        (x_bar,) = jax.linear_transpose(lambda x: model(feedback, x), x)(y_bar)
        return y, *vjp(y_bar), x_bar

    random = pull_back(params, feedback, x)
    assert_close(random, expected(params, feedback, x))
    assert_close(pull_back(params, params, x), expected(params, params, x))
    assert differ(random[-1], pull_back(params, params, x)[-1])


@pytest.mark.parametrize("name", LAYOUTS)
def test_error_goes_through_feedback_in_the_kernels_layout(name):
    layout = LAYOUTS[name]
    w, b, x = draw(3, 8), draw(3, 8, seed=1), draw(5, 3)
    assert_cotangent_is_the_transpose_at_feedback(
        lambda params, x: x @ layout(params["w"]), {"w": w}, {"w": b}, x
    )


PRODUCTS = {
    "right": ((5, 3), (3, 8), jnp.dot),
    "left": ((3, 5), (8, 3), lambda x, w: w @ x),
    "a vector": ((3,), (3, 8), jnp.dot),
    "inner": ((5, 8), (3, 8), jnp.inner),
    "tensordot": ((5, 2, 4), (4, 3, 2), lambda x, w: jnp.tensordot(x, w, ((1, 2), (2, 0)))),
    "einsum to heads": ((5, 3), (3, 8), to_heads),
    "einsum from the left": ((2, 5, 3), (4, 3), lambda x, w: jnp.einsum("oi,bti->bto", w, x)),
    "batched": ((3, 5, 2), (3, 2, 7), jnp.matmul),
    "of a scalar axis": ((5, 1), (1, 3), jnp.matmul),
    "preferred type": (
        (5, 3),
        (3, 8),
        functools.partial(jnp.matmul, preferred_element_type=jnp.float32, precision="highest"),
    ),
    "conv": ((2, 7, 3), (3, 3, 4), conv),
    "conv, dilated and grouped": (
        (2, 7, 4),
        (3, 2, 6),
        functools.partial(conv, rhs_dilation=(2,), lhs_dilation=(1,), feature_group_count=2),
    ),
    "conv, kernel on the left": ((2, 4, 3), (4, 9, 3), swapped_conv),
    "convolve": ((9,), (4,), jnp.convolve),
    "conv transpose": (
        (2, 5, 3),
        (3, 3, 4),
        lambda x, w: lax.conv_transpose(
            x, w, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
    ),
    "elementwise": ((5, 3), (5, 3), jnp.multiply),
    "elementwise, by a row": ((5, 3), (1, 3), jnp.multiply),
    "elementwise, by an element": ((5, 3), (2, 2), lambda x, w: x * w[0, 1]),
    "under vmap": ((5, 3), (3, 8), lambda x, w: jax.vmap(lambda x: x @ w)(x)),
    "under vmap of both": ((4, 3), (4, 3, 5), lambda x, w: jax.vmap(jnp.dot)(x, w)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_error_goes_through_feedback_in_every_product(name):
    x_shape, w_shape, op = PRODUCTS[name]
    w, b, x = draw(*w_shape), draw(*w_shape, seed=1), draw(*x_shape)
    assert_cotangent_is_the_transpose_at_feedback(
        lambda params, x: op(x, params["w"]), {"w": w}, {"w": b}, x
    )


def test_two_kernels_concatenated_have_their_feedback_concatenated():
    params = {"a": draw(3, 2), "b": draw(3, 5)}

    def model(params, x):
        return x @ jnp.concatenate([params["b"], params["a"]], axis=1)

    x, feedback = draw(4, 3), like(params, 3)
    assert_cotangent_is_the_transpose_at_feedback(model, params, feedback, x)
    half = {"a": feedback["a"], "b": params["b"]}  # its own feedback: exact
    (_, (_, expected)), (_, (_, actual)) = (
        fa(loss_of(model))(params, b, x) for b in (half, {"a": feedback["a"]})
    )
    assert_close(actual, expected)


@pytest.mark.parametrize("by", ["dynamic_slice", "index", "expert", "cond", "switch"])
def test_a_traced_index_chooses_kernel_and_feedback(by):
    def model(params, x, i):
        w = params["w"]
        if by == "dynamic_slice":
            return x @ lax.dynamic_slice(w, (i, 0, 1), (1, 3, 4))[0]
        if by == "index":
            return x @ w[i]
        if by == "cond":
            return x @ lax.cond(i > 0, lambda w: w[0], lambda w: -w[1], w)
        if by == "switch":
            return x @ lax.switch(i, [lambda i=i: w[i] for i in range(3)])
        return jnp.einsum("bi,bio->bo", x, w[jnp.stack([i, 0, i, 1, 2])])

    params, x = {"w": draw(4, 3, 6)}, draw(5, 3)
    feedback = like(params, 3)
    for i in (0, 2):
        at = functools.partial(model, i=jnp.int32(i))
        assert_cotangent_is_the_transpose_at_feedback(at, params, feedback, x)


def test_feedback_is_dropped_and_scaled_as_its_kernel_is():
    def model(params, x, key, mask, rate):
        keep = jax.random.bernoulli(key, 0.7, params["w"].shape)
        return x @ (params["w"] * mask * keep / rate)

    params, x = {"w": draw(3, 8)}, draw(5, 3)
    args = jax.random.key(3), jnp.asarray(MASK), jnp.float32(0.7)

    def at(params, x):
        return model(params, x, *args)

    assert_cotangent_is_the_transpose_at_feedback(at, params, like(params, 3), x)

    def loss(params, feedback, x, *args):
        return jnp.sum(jnp.sin(with_feedback(model)(params, feedback, x, *args)))

    actual = jax.jit(jax.grad(loss, (0, 2)))(params, like(params, 3), x, *args)
    assert_close(actual, fa(loss_of(at))(params, like(params, 3), x)[1])


# Models


def mlp(params, x):
    for name in ("u", "w", "v"):
        x = jnp.tanh(product(x, params[name]))
    return x


MLP = {"u": draw(3, 5), "w": draw(5, 5), "v": draw(5, 2)}


def shared(params, x):
    """A kernel used three times, once transposed."""
    w = params["w"]
    h = jnp.tanh(product(x, w))
    h = h + jnp.tanh(product(h, lay(jnp.transpose, w)))
    return product(h, lay(lambda w: w[:, :2], w))


def tied(params, x, ids=(2, 0, 1, 2)):
    """Rows of a kernel that scale the input; and the kernel as the last layer."""
    e = params["e"]
    scaled = product(x, lay(lambda e: e[jnp.array(ids)], e), jnp.multiply)
    return product(jnp.tanh(product(scaled, params["w"])), lay(jnp.transpose, e))


def experts(params, x, ids=(2, 0, 0, 3)):
    chosen = lay(lambda w: w[jnp.array(ids)], params["experts"])
    h = jnp.tanh(product(x, params["w"]))
    return product(h, chosen, lambda h, w: jnp.einsum("bi,bio->bo", h, w))


def hypercube(params, x):
    """A constant's product with a kernel is used as a kernel."""
    basis = np.linspace(0, 1, 30, dtype=np.float32).reshape(6, 5)
    return product(jnp.tanh(product(x, params["u"])), lay(lambda v: (basis @ v)[:5], params["v"]))


def attention(params, x):
    q, k, v = (product(x, params[name]) for name in ("q", "k", "v"))
    return jax.nn.softmax(q @ k.T) @ v


def linear_reconstruction(params, x):
    """An autoencoder with tied weights."""
    w = params["w"]
    return product(jnp.tanh(product(x, w)), lay(jnp.transpose, w)) - x


def gradient_inside(params, x):
    """A function with a derivative in it."""
    return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ params["w"]) ** 3))(x)


MODELS = {
    "mlp": (mlp, MLP, (4, 3)),
    "a shared kernel": (shared, {"w": draw(5, 5)}, (4, 5)),
    "a kernel's rows as scales": (tied, {"e": draw(6, 5), "w": draw(5, 5)}, (4, 5)),
    "experts": (experts, {"experts": draw(4, 5, 2), "w": draw(3, 5)}, (4, 3)),
    "a constant's product": (hypercube, {"u": draw(3, 5), "v": draw(5, 2)}, (4, 3)),
    "attention": (attention, {"q": draw(5, 3), "k": draw(5, 3), "v": draw(5, 2)}, (4, 5)),
    "autoencoder": (linear_reconstruction, {"w": draw(5, 3)}, (4, 5)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_equal_backprop_at_equal_feedback_and_feedback_ops_elsewhere(name):
    model, params, shape = MODELS[name]
    value, (_, x_bar) = assert_backprop_at_equality_and_reference_elsewhere(
        loss_of(model), params, draw(*shape)
    )
    expected, (_, exact) = backprop(loss_of(model))(params, draw(*shape))
    assert_close(value, expected)
    assert differ(x_bar, exact)


def test_a_model_with_a_derivative_in_it_equals_backprop_at_equal_feedback():
    loss, params, x = loss_of(gradient_inside), {"w": draw(5, 3)}, draw(4, 5)
    assert_close(fa(loss)(params, params, x), backprop(loss)(params, x))
    assert differ(fa(loss)(params, like(params, 3), x)[1][1], backprop(loss)(params, x)[1][1])


# Structure


@jax.custom_jvp
def own_jvp(x):
    return jnp.maximum(x, 0)


own_jvp.defjvps(lambda x_dot, y, x: jnp.where(x > 0, x_dot, 0.1 * x_dot))


@jax.custom_vjp
def own_vjp(x):
    return jnp.maximum(x, 0)


own_vjp.defvjp(lambda x: (own_vjp(x), x), lambda x, y_bar: (jnp.where(x > 0, 3, 0.1) * y_bar,))


def layer(x, w):
    return jnp.tanh(product(x, w))


def sandwich(middle):
    """`middle(x, params)` between two layers."""
    return lambda params, x: product(middle(layer(x, params["u"]), params), params["v"])


def repeat(body, length=3):
    """A loop over `body(h, w)` with the kernel as a constant."""
    return lambda h, p: lax.scan(lambda h, _: (body(h, p["w"]), None), h, length=length)[0]


def over_layers(body, **options):
    """A loop over stacked kernels."""

    def middle(h, p):
        return lax.scan(lambda h, w: (body(h, w), None), h, p["ws"], **options)[0]

    return middle


def scaled(h, w):
    return jnp.tanh(product(h, lay(lambda w: w[:1], w), jnp.multiply))


def carried_and_scaled(h, p):
    def body(carry, _):
        w, h = carry
        return (lay(lambda w: 0.9 * w.T, w), layer(h, w)), None

    (w, h), _ = lax.scan(body, (p["w"], h), length=3)
    return layer(h, w)


def chosen(h, p):
    """A branch returns a kernel, another a part of it."""

    def padded(w):
        return jnp.pad(w[1:], ((1, 0), (0, 0)))

    return layer(
        h, lax.cond(h[0, 0] > 0, lambda w: lay(jnp.transpose, w), lambda w: lay(padded, w), p["w"])
    )


def by_platform(h, p):
    return lax.platform_dependent(h, p["w"], cpu=layer, default=layer)


def carried(h, p):
    def body(carry, _):
        w, h = carry
        return (w, layer(h, w)), jnp.sum(h)

    (w, h), sums = lax.scan(body, (p["w"], h), length=3)
    return layer(h, w) * jnp.mean(sums)


def fori(h, p):
    return lax.fori_loop(0, 3, lambda i, h: layer(h, lay(lambda w: w[i], p["ws"])), h)


def cond(h, p):
    left, right = (lay(lambda w, i=i: w[i], p["ws"]) for i in (0, 1))
    return lax.cond(h[0, 0] > 0, lambda h: layer(h, left), lambda h: h - layer(h, right), h)


def cond_of_operands(h, p):
    return lax.cond(h[0, 0] > 0, layer, lambda h, w: h - layer(layer(h, w), w), h, p["w"])


def switch(h, p):
    branches = [lambda h, w, i=i: layer(h, lay(lambda w: w[i], w)) for i in range(3)]
    return lax.switch(jnp.argmax(h[0]) % 3, branches, h, p["ws"])


def jitted_layouts(h, p):
    """Kernels are handed out of one jitted function and into another."""
    w, x = jax.jit(lambda w, h: (lay(lambda w: w.T[::-1], w), 2 * h))(p["w"], h)
    return jax.jit(layer)(x, w)


def scanned_layouts(h, p):
    """Kernels are laid out in a scan, which hands them out."""
    _, ws = lax.scan(lambda c, w: (c, lay(lambda w: w[::-1].T, w)), 0, p["ws"])
    return over_layers(layer)(h, {"ws": ws})


def nested(h, p):
    @jax.checkpoint
    def block(h, w):
        inner = jax.jit(lambda h: lax.cond(h[0, 0] > 0, lambda h: layer(h, w), jnp.sin, h))
        return lax.scan(lambda h, _: (own_jvp(inner(h)), None), h, length=2)[0]

    return lax.scan(lambda h, w: (block(h, w), None), h, p["ws"])[0]


def one_device():
    return jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def shard_mapped(h, p):
    f = jax.shard_map(layer, mesh=one_device(), in_specs=(P("data"), P()), out_specs=P("data"))
    return f(h, p["w"])


def placed(h, p):
    """A jitted function that says where its arguments lie."""
    whole = NamedSharding(one_device(), P())
    return jax.jit(layer, in_shardings=(whole, whole), out_shardings=whole)(h, p["w"])


POLICY = jax.checkpoint_policies.dots_saveable
STRUCTURES = {
    "jit": lambda h, p: jax.jit(layer)(h, p["w"]),
    "jit, closed over": lambda h, p: jax.jit(lambda h: layer(h, p["w"]))(h),
    "jit, inlined": lambda h, p: jax.jit(layer, inline=True)(h, p["w"]),
    "jit with shardings": placed,
    "jit that returns kernels": jitted_layouts,
    "scan": repeat(layer),
    "scan over kernels": over_layers(layer),
    "scan over kernels, reverse": over_layers(layer, reverse=True),
    "scan over kernels, unrolled": over_layers(layer, unroll=2),
    "scan that carries a kernel": carried,
    "scan that carries and scales a kernel": carried_and_scaled,
    "scan that returns kernels": scanned_layouts,
    "scan that scales": repeat(scaled),
    "scan over scales": over_layers(scaled),
    "scan in scan": over_layers(lambda h, w: repeat(layer, 2)(h, {"w": w})),
    "fori_loop": fori,
    "cond": cond,
    "cond of operands": cond_of_operands,
    "cond that returns kernels": chosen,
    "switch": switch,
    "a choice by platform": by_platform,
    "checkpoint": lambda h, p: jax.checkpoint(layer)(h, p["w"]),
    "checkpoint by operand": repeat(jax.checkpoint(layer, prevent_cse=(True, False))),
    "checkpoint with a policy": repeat(jax.checkpoint(layer, policy=POLICY)),
    "checkpointed scan over kernels": over_layers(jax.checkpoint(layer, prevent_cse=False)),
    "custom_jvp": lambda h, p: own_jvp(product(h, p["w"])),
    "custom_vjp": lambda h, p: own_vjp(product(h, p["w"])),
    "relu, gelu and softmax": lambda h, p: jax.nn.softmax(
        jax.nn.gelu(jax.nn.relu(layer(h, p["w"])))
    ),
    "vmap": lambda h, p: jax.vmap(layer, (0, None))(h, p["w"]),
    "shard_map": shard_mapped,
    "nested": nested,
}
STACKED = MLP | {"ws": draw(3, 5, 5)}


def params_of(name):
    """Only what the structure uses: feedback that nothing uses is an error."""
    used = ("u", "v", "ws")
    try:
        jax.eval_shape(STRUCTURES[name], jnp.ones((4, 5)), {"ws": STACKED["ws"]})
    except KeyError:
        used = ("u", "v", "w")
    return {key: STACKED[key] for key in used}


every_structure = pytest.mark.parametrize("name", STRUCTURES)


@every_structure
def test_structures_equal_backprop_at_equal_feedback_and_feedback_ops_elsewhere(name):
    loss = loss_of(sandwich(STRUCTURES[name]))
    assert_backprop_at_equality_and_reference_elsewhere(loss, params_of(name), draw(4, 3))


def jaxprs_in(tree):
    for leaf in jax.tree.leaves(tree, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
        if hasattr(leaf, "eqns"):
            yield leaf


def equations(jaxpr, name):
    """Those of a primitive, in all the jaxprs of a jaxpr."""
    found = []
    for eqn in jaxpr.eqns:
        found += [eqn] * (eqn.primitive.name == name)
        for inner in jaxprs_in(eqn.params):
            found += equations(inner, name)
    return found


KEPT = {  # the params of an equation that are its user's choice
    "jit": (jax.jit(layer), ("name", "inline")),
    "remat2": (
        jax.checkpoint(
            layer,
            prevent_cse=False,
            policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        ),
        ("prevent_cse", "policy"),
    ),
    "scan": (
        lambda h, w: lax.scan(lambda h, w: (layer(h, w), None), h, w[None], reverse=True, unroll=2)[
            0
        ],
        ("length", "reverse", "unroll"),
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_equations_keep_their_options(name):
    fun, kept = KEPT[name]
    params, h = {"w": draw(5, 5)}, draw(4, 5)

    def model(params, h):
        return fun(h, params["w"])

    def loss(params, h):
        return jnp.sum(model(params, h))

    def options(fun, *args):
        found = equations(jax.make_jaxpr(fun)(*args), name)
        return [[eqn.params[k] for k in kept] for eqn in found]

    forward = options(model, params, h)
    assert options(with_feedback(model), params, params, h) == forward != []
    backward = options(jax.grad(loss, (0, 1)), params, h)
    assert options(jax.grad(with_feedback(loss), (0, 2)), params, params, h) == backward


def test_names_and_metadata_reach_the_compiler():
    def model(params, x):
        with jax.named_scope("block"), xla_metadata.set_xla_metadata(marked="yes"):
            return jnp.tanh(x @ params["w"])

    params = {"w": draw(3, 5)}
    lowered = jax.jit(with_feedback(model)).lower(params, params, draw(4, 3))
    text = lowered.as_text(debug_info=True)
    assert "block/dot_general" in text and "block/tanh" in text
    assert text.count('marked = "yes"') == 2


MIXED = ("block", "concatenate", "pad", "select")  # with values that are no kernel's


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in MIXED])
def test_an_error_meets_nothing_but_feedback(name):
    """Feedback of zeros stops it."""
    params, x = {"w": draw(3, 8)}, draw(4, 3)
    zero = {"w": jnp.zeros((3, 8))}

    def loss(params, x):
        return jnp.sum(jnp.sin(x @ LAYOUTS[name](params["w"])))

    assert not np.any(jax.jit(jax.grad(with_feedback(loss), 2))(params, zero, x))
    assert np.any(jax.jit(jax.grad(loss, 1))(params, x))


def count(jaxpr, name):
    return len(equations(jaxpr, name))


def test_count_looks_into_jaxprs():
    jaxpr = jax.make_jaxpr(sandwich(STRUCTURES["nested"]))(params_of("nested"), jnp.ones((4, 3)))
    found = {name: count(jaxpr, name) for name in ("dot_general", "scan", "cond", "tanh")}
    assert found == {"dot_general": 3, "scan": 2, "cond": 1, "tanh": 2}


@every_structure
@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_as_many_products_and_loops_as_backprop(name):
    loss, params = loss_of(sandwich(STRUCTURES[name])), params_of(name)
    ours = jax.make_jaxpr(jax.grad(with_feedback(loss), (0, 2)))(params, params, draw(4, 3))
    theirs = jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, draw(4, 3))
    for primitive in ("dot_general", "scan", "cond", "while"):
        assert count(ours, primitive) == count(theirs, primitive), primitive


@pytest.mark.parametrize("name", ["scan over kernels", "cond", "checkpoint with a policy"])
def test_compiles_to_as_many_products_as_backprop(name):
    loss, params = loss_of(sandwich(STRUCTURES[name])), params_of(name)

    def products(f, *args):
        text = f.lower(*args).compile().as_text()
        return len(re.findall(r" (?:dot|custom-call)\(", text))

    ours = products(fa(loss), params, like(params, 3), draw(4, 3))
    assert ours == products(backprop(loss), params, draw(4, 3)) > 0


def own_products():
    """`(x, w) -> x @ w`, with rules that double the cotangent of x."""

    @jax.custom_vjp
    def by_vjp(x, w):
        return x @ w

    by_vjp.defvjp(
        lambda x, w: (x @ w, (x, w)), lambda xw, y_bar: (2 * y_bar @ xw[1].T, xw[0].T @ y_bar)
    )

    @jax.custom_jvp
    def by_jvp(x, w):
        return x @ w

    @by_jvp.defjvp
    def _(primals, tangents):
        (x, w), (x_dot, w_dot) = primals, tangents
        return x @ w, 2 * x_dot @ w + x @ w_dot

    return {"custom_vjp": by_vjp, "custom_jvp": by_jvp, "jit of custom_vjp": jax.jit(by_vjp)}


OWN_PRODUCTS = own_products()


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", OWN_PRODUCTS)
def test_a_product_with_its_own_derivative_keeps_it_at_feedback(name, swapped):
    params, x = (
        {"w": draw(3, 5) if not swapped else draw(4, 3)},
        draw(4, 3) if not swapped else draw(3, 5),
    )
    op = OWN_PRODUCTS[name]

    def model(params, x):
        return op(params["w"], x) if swapped else op(x, params["w"])

    @jax.jit
    def pull_back(feedback):
        y, vjp = jax.vjp(lambda params, x: with_feedback(model)(params, feedback, x), params, x)
        return vjp(jnp.cos(y))

    @jax.jit
    def expected(feedback):
        y, vjp = jax.vjp(model, params, x)
        _, vjp_at_feedback = jax.vjp(model, feedback, x)
        return vjp(jnp.cos(y))[0], vjp_at_feedback(jnp.cos(y))[1]

    for feedback in (params, like(params, 3)):
        assert_close(pull_back(feedback), expected(feedback))
    b = feedback["w"]
    y_bar = jnp.cos(x @ params["w"] if not swapped else params["w"] @ x)
    if not swapped:
        assert_close(pull_back(feedback)[1], 2 * y_bar @ b.T)


def test_a_while_loop_has_its_value_and_passes_where_it_is_not_differentiated():
    def loop(params, x):
        def more(carry):
            return (carry[1] < 3) & (jnp.sum(carry[0] @ params["w"]) < 1e6)

        def body(carry):
            return jnp.tanh(carry[0] @ params["w"]), carry[1] + 1

        return lax.while_loop(more, body, (x, 0))[0]

    def model(params, x):
        h = jnp.tanh(x @ params["w"])
        return h * jnp.sum(lax.stop_gradient(loop(params, h)))

    params, x = {"w": draw(5, 5)}, draw(4, 5)
    value = jax.jit(with_feedback(loop))(params, like(params, 3), x)
    assert_close(value, jax.jit(loop)(params, x))
    assert_close(fa(loss_of(model))(params, params, x), backprop(loss_of(model))(params, x))


def test_a_while_loop_hands_on_a_kernel_that_it_does_not_change():
    def model(params, x):
        def body(carry):
            w, h, i = carry
            return w, jnp.tanh(h @ w), i + 1

        w, h, _ = lax.while_loop(lambda c: c[2] < 3, body, (params["w"], x, 0))
        return (x + lax.stop_gradient(h)) @ lax.stop_gradient(w)

    params, x = {"w": draw(5, 5)}, draw(4, 5)
    loss = jax.jit(jax.grad(with_feedback(loss_of(model)), 2))
    assert_close(loss(params, params, x), jax.jit(jax.grad(loss_of(model), 1))(params, x))
    assert differ(loss(params, like(params, 3), x), loss(params, params, x))


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_a_kernel_that_a_wrapped_body_hands_on_is_carried_unchanged(wrap):
    def model(params, x):
        body = wrap(lambda carry, _: ((carry[0], layer(carry[1], carry[0])), None))
        return lax.scan(body, (params["w"], x), length=3)[0][1]

    assert_backprop_at_equality_and_reference_elsewhere(
        loss_of(model), {"w": draw(5, 5)}, draw(4, 5)
    )


# Several devices


def test_shard_map_over_the_batch_equals_the_whole(auto_mesh):
    def whole(params, x):
        return product(layer(x, params["w"]), params["v"])

    def mapped(params, x):
        specs = (P(), P("data"))
        return jax.shard_map(whole, mesh=auto_mesh, in_specs=specs, out_specs=P("data"))(params, x)

    params, x = {"w": draw(3, 5), "v": draw(5, 2)}, draw(8, 3)
    feedback = like(params, 3)
    assert_close(fa(loss_of(mapped))(params, feedback, x), fa(loss_of(whole))(params, feedback, x))
    assert_close(fa(loss_of(mapped))(params, params, x), backprop(loss_of(mapped))(params, x))


def test_shard_map_gathers_kernel_and_feedback_that_lie_in_parts(auto_mesh):
    @functools.partial(
        jax.shard_map, mesh=auto_mesh, in_specs=(P(None, "data"), P("data")), out_specs=P("data")
    )
    def mapped(w, x):
        return jnp.tanh(x @ lax.all_gather(w, "data", axis=1, tiled=True))

    params, x = {"w": draw(3, 8)}, draw(8, 3)
    feedback = like(params, 3)
    assert_close(
        fa(loss_of(lambda p, x: mapped(p["w"], x)))(params, feedback, x),
        fa(loss_of(lambda p, x: jnp.tanh(x @ p["w"])))(params, feedback, x),
    )


def varying(x):
    if hasattr(lax, "pcast"):
        return lax.pcast(x, "data", to="varying")
    return lax.pvary(x, "data")  # before JAX 0.9


def test_inside_shard_map_gradients_are_those_of_the_whole(auto_mesh):
    params, x = MLP, draw(8, 3)
    feedback = like(params, 3)
    loss = with_feedback(loss_of(mlp))

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=auto_mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P("data"))
    )
    def gradients(params, feedback, x):
        local = jax.tree.map(varying, params)
        params_bar, x_bar = jax.grad(loss, (0, 2))(local, feedback, x)
        return jax.tree.map(lambda g: lax.psum(g, "data"), params_bar), x_bar

    assert_close(gradients(params, feedback, x), fa(loss_of(mlp))(params, feedback, x)[1])


def test_what_is_returned_beside_a_loss_may_be_sharded(mesh):
    params = jax.device_put(MLP, NamedSharding(mesh, P()))
    x = jax.device_put(draw(8, 3), NamedSharding(mesh, P("data")))

    def loss(params, x):
        h = mlp(params, x)
        return (h**2).sum(), h

    grads, h = jax.jit(jax.grad(with_feedback(loss), has_aux=True))(params, None, x)
    assert h.sharding.spec[0] == "data"
    expected = jax.jit(jax.grad(lambda params: loss(params, draw(8, 3))[0]))(MLP)
    assert_close(jax.device_get(grads), jax.device_get(expected))


def test_explicit_sharding_changes_nothing(mesh):
    params, x = MLP, draw(8, 3)
    feedback = like(params, 3)
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, P()))
    x_sharded = jax.device_put(x, NamedSharding(mesh, P("data")))

    def model(params, x):
        h = jax.sharding.reshard(jnp.tanh(x @ params["u"]), P("data", None))
        return mlp({"u": params["w"], "w": params["w"], "v": params["v"]}, h)

    value, (params_bar, x_bar) = fa(loss_of(model))(put(params), put(feedback), x_sharded)
    assert x_bar.sharding.spec == P("data", None) or x_bar.sharding.spec == P("data")

    def alone(params, x):
        h = jnp.tanh(product(x, params["u"]))
        return mlp({"u": params["w"], "w": params["w"], "v": params["v"]}, h)

    expected = reference(loss_of(alone))
    with jax.set_mesh(one_device()):
        host = jax.device_get((params, feedback, x))
        expected = jax.device_get(expected(*host))
    assert_close(jax.device_get((value, (params_bar, x_bar))), expected)


# Where the transformed function is used


def test_value_and_auxiliary_outputs_are_the_functions_own():
    def loss(params, x):
        y = mlp(params, x)
        return jnp.sum(y**2), {"y": y, "n": x.shape[0], "name": "mlp", "none": None}

    f = jax.value_and_grad(with_feedback(loss), has_aux=True)
    (value, aux), _ = f(MLP, like(MLP, 3), draw(4, 3))
    expected, aux_expected = loss(MLP, draw(4, 3))
    assert aux.pop("name") == aux_expected.pop("name") == "mlp"
    assert aux["none"] is None and int(aux["n"]) == 4
    chex.assert_trees_all_close((value, aux), (expected, aux_expected), **CLOSE)


def test_vmap_equals_a_python_loop():
    grad = jax.grad(with_feedback(loss_of(mlp)), (0, 2))
    members = [(like(MLP, i), like(MLP, 10 + i), draw(4, 3, seed=i)) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    alone = [jax.jit(grad)(*member) for member in members]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    assert_close(jax.jit(jax.vmap(grad))(*stacked), expected)


def test_vmap_over_feedback_alone_and_over_examples_alone():
    grad = jax.jit(jax.grad(with_feedback(loss_of(mlp)), (0, 2)))
    feedbacks, x = [like(MLP, i) for i in (3, 30)], draw(4, 3)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *feedbacks)
    together = jax.vmap(grad, (None, 0, None))(MLP, stacked, x)
    for i, feedback in enumerate(feedbacks):
        assert_close(jax.tree.map(lambda g, i=i: g[i], together), grad(MLP, feedback, x))
    each, x_bar = jax.vmap(grad, (None, None, 0))(MLP, feedbacks[0], x)
    expected = grad(MLP, feedbacks[0], x)
    assert_close((jax.tree.map(lambda g: g.sum(0), each), x_bar), expected)


def test_collectives_over_a_vmapped_axis_are_kept():
    def loss(params, x):
        h = x @ params["w"]
        h = h - lax.pmean(h, "batch")
        return jnp.sum(jnp.sin(h) @ params["v"])

    def centred(params, x):
        h = product(x, params["w"])
        return jnp.sum(product(jnp.sin(h - h.mean(0, keepdims=True)), params["v"]))

    params, x = {"w": draw(3, 5), "v": draw(5, 2)}, draw(4, 3)

    def total(params, feedback, x):
        each = jax.vmap(with_feedback(loss), (None, None, 0), axis_name="batch")
        return jnp.sum(each(params, feedback, x))

    feedback = like(params, 3)
    actual = jax.jit(jax.value_and_grad(total, (0, 2)))(params, feedback, x)
    assert_close(actual, reference(centred)(params, feedback, x))


def test_steps_inside_a_scan_equal_a_python_loop():
    grad = jax.grad(with_feedback(loss_of(mlp)))
    feedback, xs = like(MLP, 3), draw(3, 4, 3)

    def step(params, x):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grad(params, feedback, x)), None

    expected = MLP
    for x in xs:
        expected, _ = jax.jit(step)(expected, x)
    assert_close(jax.jit(lambda p: lax.scan(step, p, xs)[0])(MLP), expected)


def test_inputs_of_a_larger_function_get_pseudo_gradients():
    params, feedback, x, scale = {"w": draw(3, 5)}, {"w": draw(3, 5, seed=1)}, draw(4, 3), draw(3)

    @jax.jit
    def outer(scale, x):
        h = jnp.sin(x * scale[None])
        return jnp.sum(with_feedback(lambda p, h: h @ p["w"])(params, feedback, h) ** 2)

    scale_bar, x_bar = jax.grad(outer, (0, 1))(scale, x)
    y_bar = 2 * (jnp.sin(x * scale[None]) @ params["w"])
    inner_bar = (y_bar @ feedback["w"].T) * jnp.cos(x * scale[None])
    assert_close(x_bar, inner_bar * scale[None])
    assert_close(scale_bar, jnp.sum(inner_bar * x, 0))


def test_new_feedback_does_not_retrace():
    traces = []

    @jax.jit
    def grad(params, feedback, x):
        traces.append(1)
        return jax.grad(with_feedback(loss_of(mlp)))(params, feedback, x)

    x = draw(4, 3)
    results = [grad(MLP, like(MLP, seed), x) for seed in (3, 30)]
    assert len(traces) == grad._cache_size() == 1
    assert differ(results[0]["u"], results[1]["u"])
    assert_close(results[0]["v"], results[1]["v"])


def test_derivative_by_a_learning_rate_is_that_of_the_pseudo_gradients_step():
    feedback, x = like(MLP, 3), draw(4, 3)
    loss = loss_of(mlp)
    g = jax.grad(with_feedback(loss))(MLP, feedback, x)

    def after(rate, last):
        stepped = jax.tree.map(
            lambda p, g: p - rate * g, MLP, jax.grad(with_feedback(loss))(MLP, feedback, x)
        )
        return last(stepped)

    def exact(params):
        return loss(params, x)

    def pseudo(params):
        return with_feedback(loss)(params, feedback, x)

    stepped = jax.tree.map(lambda p, g: p - 0.3 * g, MLP, g)
    for last in (exact, pseudo):
        meta = jax.jit(jax.grad(after), static_argnums=1)(0.3, last)
        inner = jax.tree.map(lambda a, b: -jnp.vdot(a, b), jax.grad(last)(stepped), g)
        assert_close(meta, sum(jax.tree.leaves(inner)), rtol=1e-4)


def test_derivative_of_a_pseudo_gradient_by_an_unrolled_start_is_finite_differences():
    """Two steps: the second's pseudo-gradient depends on the first's rate."""
    feedback, x = like(MLP, 3), draw(4, 3)

    def after(rate):
        params = MLP
        for _ in range(2):
            g = jax.grad(with_feedback(loss_of(mlp)))(params, feedback, x)
            params = jax.tree.map(lambda p, g: p - rate * g, params, g)
        return params["v"][0, 0]

    with jax.enable_x64(True):
        meta = jax.jit(jax.grad(after))(0.3)
        difference = (jax.jit(after)(0.31) - jax.jit(after)(0.29)) / 0.02
    # The difference is of second order in 0.01; the params are float32.
    assert np.isclose(meta, difference, rtol=1e-2, atol=1e-3)


def test_forward_mode_raises():
    def f(x):
        return with_feedback(mlp)(MLP, MLP, x)

    with pytest.raises(TypeError, match=r"forward-mode|jvp"):
        jax.jvp(f, (draw(4, 3),), (draw(4, 3),))


# Arguments


def test_static_arguments_and_outputs_pass_as_they_are():
    def fun(params, x, activation, *, name, none=None, times=2, rate):
        assert isinstance(name, str) and none is None and isinstance(times, int)
        h = activation(x @ params["w"])
        for _ in range(times):
            h = rate * h
        return h, name, none, activation, times

    params, x = {"w": draw(3, 5)}, draw(4, 3)
    f = with_feedback(fun)
    y, name, none, activation, times = f(params, params, x, jnp.tanh, name="net", rate=0.5)
    assert (name, none, activation, int(times)) == ("net", None, jnp.tanh, 2)
    assert_close(y, jnp.tanh(x @ params["w"]) / 4, rtol=1e-5)


def test_name_and_module_are_the_functions_own():
    f = with_feedback(mlp)
    assert (f.__name__, f.__module__) == ("mlp", mlp.__module__)


def test_integer_and_key_arguments_are_not_differentiated():
    def model(params, x, ids, key):
        noise = jax.random.normal(key, x.shape)
        return (x + noise)[ids] @ params["w"] + jax.nn.one_hot(ids, 3) @ params["w"]

    params, x = {"w": draw(3, 5)}, draw(4, 3)
    ids, key = jnp.array([3, 0, 0]), jax.random.key(1)
    feedback = like(params, 3)
    actual = jit(jax.grad(with_feedback(loss_of(model)), (0, 2)))(params, feedback, x, ids, key)
    y_bar = jnp.cos(model(params, x, ids, key))
    expected = jnp.zeros_like(x).at[ids].add(y_bar @ feedback["w"].T)
    assert_close(actual[1], expected)
    assert_close(actual[0], jax.grad(loss_of(model))(params, x, ids, key))


@pytest.mark.parametrize(
    "empty", [{}, None, {"u": None, "w": None, "v": None}, {"w": None}], ids=str
)
def test_no_feedback_is_exact_backprop(empty):
    assert_close(fa(loss_of(mlp))(MLP, empty, draw(4, 3)), backprop(loss_of(mlp))(MLP, draw(4, 3)))


@pytest.mark.parametrize("name", MLP)
def test_a_missing_leaf_is_backprop_through_that_kernel(name):
    feedback, x = like(MLP, 3), draw(4, 3)
    expected = reference(loss_of(mlp))(MLP, feedback | {name: MLP[name]}, x)
    for without in ({k: b for k, b in feedback.items() if k != name}, feedback | {name: None}):
        assert_close(fa(loss_of(mlp))(MLP, without, x), expected)


def test_numpy_params_and_python_scalars():
    params = jax.tree.map(np.asarray, MLP) | {"gain": 0.5, "steps": 2}

    def model(params, x):
        assert isinstance(params["steps"], int)
        return params["gain"] * mlp(params, x)

    x = draw(4, 3)
    y = with_feedback(model)(params, {"w": params["w"]}, np.asarray(x))
    assert_close(y, 0.5 * mlp(MLP, x))
    gain_bar = jax.grad(
        lambda gain: with_feedback(loss_of(model))(params | {"gain": gain}, {"w": params["w"]}, x)
    )(0.5)
    assert_close(gain_bar, jnp.sum(jnp.cos(y) * mlp(MLP, x)))


def test_params_may_be_one_array():
    w, b, x = draw(3, 5), draw(3, 5, seed=1), draw(4, 3)
    _, (w_bar, x_bar) = fa(loss_of(lambda w, x: x @ w))(w, b, x)
    y_bar = jnp.cos(x @ w)
    assert_close((w_bar, x_bar), (x.T @ y_bar, y_bar @ b.T))


def test_feedback_called_as_in_nnx_lies_beside_its_kernel():
    params = {"layer": {"kernel": draw(3, 5), "bias": draw(5)}, "out": [{"kernel": draw(5, 2)}]}

    def model(params, x):
        h = jnp.tanh(x @ params["layer"]["kernel"] + params["layer"]["bias"][None])
        return h @ params["out"][0]["kernel"]

    b, c = draw(3, 5, seed=1), draw(5, 2, seed=1)
    results = [
        fa(loss_of(model))(params, feedback, draw(4, 3))
        for feedback in (
            {"layer": {"kernel": b}, "out": [{"kernel": c}]},
            {"layer": {"feedback": b}, "out": [{"feedback": c}]},
            {"layer": {"feedback": b}, "out": [{"kernel": c}]},
        )
    ]
    for result in results[1:]:
        assert_close(result, results[0])
    assert differ(results[0][1][1], backprop(loss_of(model))(params, draw(4, 3))[1][1])


@pytest.mark.parametrize("dtype", [jnp.int8, BF16, jnp.float16])
def test_feedback_of_another_dtype_is_cast_to_its_kernels(dtype):
    feedback = jax.tree.map(lambda b: jnp.sign(b).astype(dtype), like(MLP, 3))
    actual = fa(loss_of(mlp))(MLP, feedback, draw(4, 3))
    cast = jax.tree.map(lambda b: b.astype(F32), feedback)
    assert_close(actual, reference(loss_of(mlp))(MLP, cast, draw(4, 3)))


@pytest.mark.parametrize("dtype", [jnp.int8, BF16])
def test_feedback_stored_in_fewer_bits_is_laid_out_as_its_values(dtype):
    def model(params, x):  # the lookup first, so that its rows are not taken for activations
        rows = lax.dynamic_slice(params["w"], (jnp.int32(jnp.sum(x) > 0), 0), (2, 8))
        products = [x @ layout(params["w"]) for layout in LAYOUTS.values()]
        half = x.astype(BF16) @ params["w"].astype(BF16)
        return sum(jnp.sum(jnp.sin(y.astype(F32))) for y in (x[:, :2] @ rows, half, *products))

    stored = {"w": jnp.sign(draw(3, 8, seed=1)).astype(dtype)}
    values = {"w": stored["w"].astype(F32)}
    f, params, x = fa(model), {"w": draw(3, 8)}, draw(5, 3)
    chex.assert_trees_all_equal(f(params, stored, x), f(params, values, x))


@pytest.mark.parametrize("dtype", [jnp.int8, BF16])
def test_feedback_of_a_scanned_stack_is_cast_layer_by_layer(dtype):
    def loss(params, x):
        return jnp.sum(lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0])

    params = {"w": draw(7, 3, 3)}
    stored = {"w": jnp.sign(draw(7, 3, 3, seed=1)).astype(dtype)}
    program = jax.make_jaxpr(jax.grad(with_feedback(loss)))(params, stored, draw(4, 3))
    made = [var.aval for eqn in program.eqns for var in eqn.outvars]
    stacks = [aval for aval in made if (aval.shape, aval.dtype) == ((7, 3, 3), F32)]
    assert len(stacks) == 1  # the gradient by kernels; no copy of feedback


def test_gradient_by_feedback_is_zero_or_float0():
    by_feedback = jax.jit(jax.grad(with_feedback(loss_of(mlp)), 1, allow_int=True))
    for bar in jax.tree.leaves(by_feedback(MLP, like(MLP, 3), draw(4, 3))):
        assert bar.dtype == F32 and not np.any(bar)
    signs = jax.tree.map(lambda b: jnp.sign(b).astype(jnp.int8), like(MLP, 3))
    for bar in jax.tree.leaves(by_feedback(MLP, signs, draw(4, 3))):
        assert bar.dtype == jax.dtypes.float0


@pytest.mark.parametrize("params_dtype, x_dtype", [(BF16, BF16), (F32, BF16), (BF16, F32)])
def test_equal_feedback_gives_backprop_in_low_precision(params_dtype, x_dtype):
    params = jax.tree.map(lambda p: p.astype(params_dtype), MLP)

    def model(params, x):
        return mlp(jax.tree.map(lambda p: p.astype(BF16), params), x.astype(BF16))

    x = draw(4, 3).astype(x_dtype)
    actual = fa(loss_of(model))(params, params, x)
    # One rounding of bfloat16 apart: the compiler may keep float32 longer in one.
    assert_close(actual, backprop(loss_of(model))(params, x), rtol=2**-6, atol=2**-6)


def penalised(params, x, rate=0.1):
    squares = sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
    return loss_of(mlp)(params, x) / 3 + rate * squares / 2 + 0.1 * jnp.vdot(*[params["w"]] * 2)


@pytest.mark.parametrize("rate", ["constant", "traced"])
def test_penalties_of_weights_are_exact(rate):
    x, feedback = draw(4, 3), like(MLP, 3)
    args = () if rate == "constant" else (jnp.float32(0.1),)
    actual = jax.jit(jax.grad(with_feedback(penalised)))(MLP, feedback, x, *args)
    of_loss = fa(loss_of(mlp))(MLP, feedback, x)[1][0]
    expected = jax.tree.map(lambda g, w: g / 3 + 0.1 * w, of_loss, MLP)
    expected["w"] += 0.2 * MLP["w"]
    assert_close(actual, expected)


def global_norm(params, x):
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(w)) for w in jax.tree.leaves(params)))
    w = params["w"]
    orthogonal = jnp.sum((w.T @ w - jnp.eye(5)) ** 2)
    _, singular, _ = jnp.linalg.svd(w)
    return loss_of(mlp)(params, x) + jnp.maximum(norm, 1) + orthogonal + jnp.max(singular)


def test_other_functions_of_weights_alone_are_exact():
    x, feedback = draw(4, 3), like(MLP, 3)
    actual = jax.jit(jax.grad(with_feedback(global_norm)))(MLP, feedback, x)
    of_loss = fa(loss_of(mlp))(MLP, feedback, x)[1][0]
    exact, exact_of_loss = (jax.jit(jax.grad(f))(MLP, x) for f in (global_norm, loss_of(mlp)))
    expected = jax.tree.map(lambda a, b, c: a + b - c, of_loss, exact, exact_of_loss)
    assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # sums and differences of larger ones


def test_gradients_by_kernels_and_feedback_that_are_laid_out_in_a_scan():
    def model(params, x):
        return x @ lax.map(lambda row: row[::-1], params["w"])

    params, feedback, x = {"w": draw(3, 8)}, {"w": draw(3, 8, seed=1)}, draw(5, 3)
    params_bar, feedback_bar, x_bar = fa(loss_of(model), by=(0, 1, 2))(params, feedback, x)[1]
    assert not np.any(feedback_bar["w"])
    assert_close((params_bar, x_bar), fa(loss_of(model))(params, feedback, x)[1])


# feedback_bar


def several_uses(params, x):
    """Shared, scanned over, stacked from two, concatenated, masked, on the left of a product."""
    a, w = params["a"], params["w"]
    h = jnp.tanh(product(x, lay(lambda a, w: jnp.concatenate([a, w[:3] / 2], 1), a, w)))
    h = jnp.tanh(h[:, :5])
    h = over_layers(layer)(h, {"ws": lay(lambda w: jnp.where(MASK[:1, :5], w, 0.0)[None], w)})
    h = jax.checkpoint(layer)(h, lay(jnp.transpose, w))
    return product(h.T, w, lambda x, w: w[:2] @ x)


USES = {"a": draw(3, 2), "w": draw(5, 5)}


def test_feedback_bar_kernel_makes_the_gradient_by_feedback_the_kernels():
    f = jax.jit(jax.grad(with_feedback(loss_of(several_uses), feedback_bar="kernel"), (0, 1, 2)))
    feedback, x = like(USES, 3), draw(4, 3)
    params_bar, feedback_bar, x_bar = f(USES, feedback, x)
    assert_close(feedback_bar, params_bar)
    expected = reference(loss_of(several_uses))(USES, feedback, x)[1]
    assert_close((params_bar, x_bar), expected)


def test_feedback_bar_kernel_leaves_the_gradients_of_params_without_feedback():
    def model(params, x):
        h = jnp.tanh(x @ jnp.concatenate([params["w"], params["v"]], axis=1))
        return h @ jnp.pad(params["w"], ((0, 5), (0, 0)), constant_values=params["gain"])

    params = {"w": draw(3, 5), "v": draw(3, 3), "gain": jnp.float32(0.5)}
    feedback, x = {"w": draw(3, 5, seed=1)}, draw(4, 3)
    plain, kernel = (
        fa(loss_of(model), feedback_bar=bar)(params, feedback, x) for bar in (None, "kernel")
    )
    assert_close(kernel, plain)


def test_feedback_bar_has_feedbacks_dtype():
    f = jax.grad(with_feedback(loss_of(mlp), feedback_bar="kernel"), 1, allow_int=True)
    feedback = jax.tree.map(lambda b: b.astype(BF16), like(MLP, 3))
    bars = jax.jit(f)(MLP, feedback, draw(4, 3))
    chex.assert_trees_all_equal_shapes_and_dtypes(bars, feedback)
    signs = jax.tree.map(lambda b: b.astype(jnp.int8), feedback)
    assert {b.dtype for b in jax.tree.leaves(f(MLP, signs, draw(4, 3)))} == {jax.dtypes.float0}


def test_feedback_bar_may_be_a_function_of_the_products_operands():
    def oja(op, x, kernel, feedback, y_bar):
        return x.T @ op(x, kernel) + y_bar.sum() * kernel - feedback

    params, feedback, x = {"w": draw(5, 3)}, {"w": draw(5, 3, seed=1)}, draw(4, 3)

    def model(params, x):
        return x @ params["w"].T

    f = jax.jit(jax.grad(with_feedback(loss_of(model), feedback_bar=oja), 1))
    y = model(params, x)
    w, b = params["w"].T, feedback["w"].T
    expected = (x.T @ y + jnp.sum(jnp.cos(y)) * w - b).T
    assert_close(f(params, feedback, x)["w"], expected)


def test_an_unknown_feedback_bar_raises():
    with pytest.raises(ValueError, match="feedback_bar is 'kernels'"):
        with_feedback(mlp, feedback_bar="kernels")(MLP, MLP, draw(4, 3))


# What is no feedback


SQUARE = {"w": draw(3, 3), "v": draw(3, 3, seed=1)}
LOST = {
    "not used": (lambda p, x: x @ p["v"], "not used"),
    "a bias": (lambda p, x: x @ p["v"] + p["w"][:1], "add at .*test_transform.py"),
    "a table that constants look up": (
        lambda p, x: x @ p["v"] + p["w"][jnp.array([0, 2, 1, 1])],
        "add at .*test_transform.py",
    ),
    "only through tanh": (lambda p, x: x @ jnp.tanh(p["w"]), "tanh at .*test_transform.py"),
    "only a penalty": (
        lambda p, x: x @ p["v"] + jnp.sum(p["w"] ** 2),
        "(integer_pow|square) at .*test_transform.py",
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_feedback_that_serves_no_product_raises_when_traced(name):
    model, place = LOST[name]
    f = functools.partial(with_feedback(model), SQUARE, x=draw(4, 3))
    with pytest.raises(ValueError, match=place) as error:
        jax.eval_shape(f, {"w": SQUARE["w"]})
    assert "['w']" in str(error.value) and "None at its path" in str(error.value)
    assert_close(f({"w": None}), model(SQUARE, draw(4, 3)))


def test_feedback_of_the_wrong_shape_raises():
    with pytest.raises(ValueError, match=re.escape("['w'] has shape (3, 5); expected (5, 5)")):
        with_feedback(mlp)(MLP, {"w": draw(3, 5)}, draw(4, 3))


def test_a_state_in_place_of_its_feedback_raises():
    state = init_feedback(jax.random.key(0), MLP, where=list(MLP))
    with pytest.raises(ValueError, match=r"pass its tree, `state\.feedback`"):
        with_feedback(mlp)(MLP, state, draw(4, 3))


def test_feedback_left_out_of_the_call_raises():
    with pytest.raises(ValueError, match=r"expected a tree that mirrors params.*left out"):
        with_feedback(mlp)(MLP, draw(4, 3))


def test_an_nnx_module_raises():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"NNX module Linear.*nnx\.split\(model"):
        with_feedback(lambda model, x: model(x))(model, {}, draw(4, 3))


def test_feedback_at_an_unknown_path_raises():
    with pytest.raises(ValueError, match=re.escape("['x'] has no kernel")):
        with_feedback(mlp)(MLP, {"x": draw(3, 5)}, draw(4, 3))


def test_feedback_for_an_integer_kernel_raises():
    with pytest.raises(ValueError, match="int32"):
        with_feedback(mlp)(MLP | {"w": jnp.ones((5, 5), jnp.int32)}, {"w": draw(5, 5)}, draw(4, 3))


METRICS = {
    "jit": lambda f: jax.jit(f),
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda x, w: lax.scan(lambda h, _: f(h, w), x, length=2),
    "cond": lambda f: lambda x, w: lax.cond(x[0, 0] > 0, f, lambda x, w: f(-x, w), x, w),
}


@pytest.mark.parametrize("wrap", METRICS)
def test_metrics_of_kernels_and_activations_pass_beside_an_error(wrap):
    """They are computed in the same jaxpr as the layer, and not differentiated."""

    def model(params, x):
        layer_and_metric = METRICS[wrap](lambda x, w: (jnp.sin(x @ w), x * w[:1] + x @ jnp.tanh(w)))
        h, metric = layer_and_metric(x, params["w"])
        return jnp.sum(h**3), metric

    params, x = {"w": SQUARE["w"]}, draw(4, 3)
    feedback = like(params, 3)
    ours = jax.jit(jax.grad(with_feedback(model), (0, 2), has_aux=True))
    theirs = jax.jit(jax.grad(model, (0, 1), has_aux=True))
    assert_close(ours(params, params, x), theirs(params, x))
    assert differ(ours(params, feedback, x)[0][1], theirs(params, x)[0][1])


# Random programs


SIZE = 4
KERNELS = ("a", "b", "c")
BASIS = np.linspace(-1, 1, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)


def rotated(*ws):
    return jnp.concatenate([w[i::2] for i, w in enumerate([*ws, *ws][:2])])


SQUARE_LAYOUTS = {  # of square kernels
    "identity": lambda w: w,
    "transpose": jnp.transpose,
    "rev": lambda w: w[::-1],
    "reshape": lambda w: w.reshape(-1, 2).T.reshape(w.shape),
    "factor": lambda w: -0.7 * w,
    "mask": lambda w: jnp.where(BASIS > 0.4, 0.0, w),
    "scaled": lambda w: w * BASIS / 2,
    "padded": lambda w: jnp.pad(w[1:], ((0, 1), (0, 0))),
    "rows": lambda w: w[np.array([1, 3, 0, 0])],
    "jit": jax.jit(lambda w: w.T[:, ::-1]),
}
OPS = {
    "right": jnp.dot,
    "left": lambda x, w: (w @ x.T).T,
    "conv": lambda x, w: conv(x[None], w[None])[0],
    "einsum": lambda x, w: jnp.einsum("bi,oi->bo", x, w, preferred_element_type=F32),
}
NONLINEARITIES = {"tanh": jnp.tanh, "relu": jax.nn.relu, "sin": jnp.sin, "own": own_jvp}

products = st.tuples(
    st.just("product"),
    st.sampled_from(list(OPS)),
    st.sampled_from(KERNELS),
    st.lists(st.sampled_from(list(SQUARE_LAYOUTS)), max_size=2),
)
joined = st.tuples(st.just("joined"), st.sampled_from(KERNELS), st.sampled_from(KERNELS))
pointwise = st.tuples(st.just("pointwise"), st.sampled_from(list(NONLINEARITIES)))
residual = st.tuples(st.just("residual"), st.integers(0, 5))
steps = products | joined | pointwise | residual
blocks = st.tuples(
    st.sampled_from(["jit", "checkpoint", "scan", "scan over", "cond"]),
    st.lists(steps, min_size=1, max_size=3),
)
programs = st.lists(steps | steps | blocks, min_size=1, max_size=6)


def interpret(program, params, x):
    past = [x]
    for kind, *how in program:
        h = past[-1]
        if kind == "product":
            op, name, layouts = how
            w = params[name]
            for layout in layouts:
                w = lay(SQUARE_LAYOUTS[layout], w)
            h = product(h, w, OPS[op])
        elif kind == "joined":
            h = product(h, lay(rotated, *(params[name] for name in how)))
        elif kind == "pointwise":
            h = NONLINEARITIES[how[0]](h)
        elif kind == "residual":
            h = 0.6 * h + 0.4 * past[how[0] % len(past)]
        else:
            h = block(kind, functools.partial(interpret, how[0]), params, h)
        past.append(h)
    return past[-1]


def block(kind, f, params, h):
    if kind == "jit":
        return jax.jit(f)(params, h)
    if kind == "checkpoint":
        return jax.checkpoint(f)(params, h)
    if kind == "scan":
        return lax.scan(lambda h, _: (f(params, h), None), h, length=2)[0]
    if kind == "scan over":
        stacked = lay(lambda w: jnp.concatenate([w[None], w.T[None]]), params)
        return lax.scan(lambda h, params: (f(params, h), None), h, stacked)[0]
    return lax.cond(h[0, 0] > 0, f, lambda params, h: jnp.sin(f(params, -h)), params, h)


def names_in(program):
    for kind, *how in program:
        if kind in ("product", "joined"):
            yield from (name for name in how if name in KERNELS)
        elif kind not in ("pointwise", "residual"):
            yield from names_in(how[0])


@hypothesis.settings(max_examples=20)
@hypothesis.given(programs)
def test_random_programs_equal_backprop_and_feedback_ops(program):
    params = {
        name: draw(SIZE, SIZE, seed=i) for i, name in enumerate(sorted(set(names_in(program))))
    }
    x, loss = draw(3, SIZE), loss_of(functools.partial(interpret, program))

    @jit
    def three_ways(params, feedback, x):
        f = fa(loss).__wrapped__
        return (
            (f(params, params, x), backprop(loss).__wrapped__(params, x)),
            (f(params, feedback, x), reference(loss).__wrapped__(params, feedback, x)),
        )

    for actual, expected in three_ways(params, like(params, 3), x):
        assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # sums grow with depth
