"""Feedback of any dtype, with no implicit promotion, and in double precision."""

import contextlib
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import soap_jax.linen
import soap_jax.nnx
from soap_jax import (  # fmt: skip
    direct,
    dtypes,
    init_feedback,
    initializers,
    local,
    metrics,
    ops,
    optimizers,
    rules,
    sync_feedback,
)

KEY = jax.random.key(0)
KERNEL = np.array([[1.0, -2.0], [3.0, 4.0], [-5.0, 6.0]], np.float32)
PARAMS = {"out": {"kernel": KERNEL, "bias": np.ones(2, np.float32)}}
X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)

SIGNS = ("int2", "int4", "int8", "int16", "int32")
FLOATS = ("float4_e2m1fn", "float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32")
STORED = (*SIGNS, *FLOATS)
REFUSED = ("float8_e8m0fnu", "float6_e2m3fn", "uint8", "uint4", "bool_", "complex64")
WHOLE = (
    rules.Fixed(),
    rules.SignSync(magnitude="unit"),
    rules.SignSync(magnitude="preserve"),
)
RULES = (
    *WHOLE,
    rules.SignSync(magnitude="norm"),
    rules.SignSync(magnitude="glorot"),
    rules.SignSync(magnitude="redraw"),
    rules.Transport(),
    rules.Transport(rate=0.5),
    rules.Transport(rate=np.float64(0.5)),
    rules.WeightMirror(),
)
LOSSES = (
    local.SymmetricAlignment(decay=np.float64(0.5)),
    local.ActivationAlignment(),
    local.InformationAlignment(),
)


def strict():
    return jax.numpy_dtype_promotion("strict")


def double():
    return jax.enable_x64(True)


@contextlib.contextmanager
def strict_and_double():
    with strict(), double():
        yield


MODES = [strict, double, strict_and_double]
every_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
every_dtype = pytest.mark.parametrize("stored", STORED)
some_dtypes_and_modes = pytest.mark.parametrize(
    ("stored", "mode"),
    [
        ("int2", strict),
        ("int4", strict_and_double),
        ("float8_e4m3fn", strict),
        ("bfloat16", strict),
        ("bfloat16", strict_and_double),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)


def serves(rule, stored):
    return stored not in SIGNS or rule in WHOLE


def stored_as(stored, kernel=KERNEL):
    """Feedback that every dtype here holds exactly."""
    return jnp.asarray(np.sign(kernel)[::-1].copy()).astype(stored)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def allclose(a, b, rtol=1e-6):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol), a, b)


def in_float32(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), tree)


# What `dtypes` says


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        (("int2", "bfloat16"), "float32"),
        (("float8_e4m3fn",), "float32"),
        (("float16", "float32"), "float32"),
        (("bfloat16", "float64"), "float64"),
        (("int8", "complex64"), "complex64"),
        (("float64", "complex64"), "complex128"),
    ],
)
@pytest.mark.parametrize("context", [contextlib.nullcontext, strict])
def test_arithmetic_is_in_float32_or_wider(arrays, expected, context):
    with double(), context():
        arrays = [jnp.ones(2).astype(dtype) for dtype in arrays]
        assert dtypes.wide(*arrays) == expected
        assert {x.dtype.name for x in dtypes.widen(*arrays)} == {expected}


# Every dtype that `init_feedback` takes


@every_dtype
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("context", [strict, strict_and_double])
def test_rules_sync_feedback_of_every_dtype_as_its_values_in_float32(rule, stored, context):
    params = {"out": {"kernel": KERNEL}}
    with context():
        feedback = {"out": {"kernel": stored_as(stored)}}
        if not serves(rule, stored):
            with pytest.raises(ValueError, match=f"whose feedback is stored as {stored}"):
                init_feedback(KEY, params, rule, feedback=feedback)
            return
        synced, expected = (
            sync_feedback(params, init_feedback(KEY, params, rule, feedback=tree), 0).feedback
            for tree in (feedback, {"out": {"kernel": stored_as("float32")}})
        )
        assert synced["out"]["kernel"].dtype == stored
        equal(synced, jax.tree.map(lambda leaf: leaf.astype(stored), expected))


@some_dtypes_and_modes
def test_feedback_of_every_dtype_is_drawn(stored, mode):
    for initializer in ("matched", jax.nn.initializers.ones):
        with mode():
            state = init_feedback(KEY, PARAMS, initializer=initializer, dtype=stored)
        assert state.feedback["out"]["kernel"].dtype == stored


@pytest.mark.parametrize("stored", REFUSED)
def test_a_dtype_that_cannot_serve_is_refused(stored):
    with pytest.raises(ValueError, match=rf"dtype is .*{stored.rstrip('_')}.*; expected a float"):
        init_feedback(KEY, PARAMS, dtype=getattr(jnp, stored))


@some_dtypes_and_modes
def test_metrics_of_every_dtype_are_those_of_its_values(stored, mode):
    def measure(params, feedback):
        return [
            metrics.weight_angle(params, feedback),
            metrics.norm_ratio(params, feedback),
            metrics.sign_concordance(params, feedback),
            metrics.effective_learning_rate(np.float64(0.5), params, feedback),
            metrics.cotangent_angle(X @ KERNEL, KERNEL, feedback["out"]["kernel"]),
            metrics.descent_condition(X @ KERNEL, KERNEL, feedback["out"]["kernel"]),
            metrics.path_angle([KERNEL], [feedback["out"]["kernel"]]),
            metrics.angle({"a": KERNEL, "b": X}, {"a": feedback["out"]["kernel"], "b": X}),
        ]

    with mode():
        feedback = {"out": {"kernel": stored_as(stored)}}
        equal(measure(PARAMS, feedback), measure(PARAMS, in_float32(feedback)))
        if stored != "bfloat16":
            return
        # Kernels in another dtype than feedback's.
        half = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(jnp.bfloat16), PARAMS)
        allclose(measure(half, feedback), measure(PARAMS, feedback))
        if mode is not strict:
            wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), PARAMS)
            allclose(measure(wide, feedback), measure(PARAMS, feedback), 1e-5)


OPS = {
    "dense": (ops.feedback_dense, (4, 3), (3, 2)),
    "einsum": (functools.partial(ops.feedback_einsum, "bi,io->bo"), (4, 3), (3, 2)),
    "conv": (ops.feedback_conv, (2, 6, 3), (3, 3, 2)),
    "conv_transpose": (ops.feedback_conv_transpose, (2, 6, 3), (3, 3, 2)),
}


@some_dtypes_and_modes
@pytest.mark.parametrize("name", OPS)
def test_ops_take_feedback_of_every_dtype(name, stored, mode):
    op, x_shape, kernel_shape = OPS[name]
    x, kernel = (
        np.cos(np.arange(np.prod(s), dtype=np.float32)).reshape(s) for s in (x_shape, kernel_shape)
    )
    bars = [None, "kernel", *LOSSES, lambda op, x, kernel, feedback, y_bar: y_bar.sum() * kernel]
    for bar in bars if stored == "bfloat16" and name == "dense" else bars[:1]:
        with mode():

            def f(x, kernel, feedback, bar=bar):
                return jnp.sum(jnp.square(op(x, kernel, feedback, feedback_bar=bar)))

            allow = jax.grad(f, argnums=(0, 1, 2), allow_int=True)
            feedback = stored_as(stored, kernel)
            *got, feedback_bar = jax.jit(allow)(x, kernel, feedback)
            *expected, _ = jax.jit(allow)(x, kernel, feedback.astype(jnp.float32))
        equal(got, expected)
        assert got[0].dtype == got[1].dtype == jnp.float32
        if stored in FLOATS:
            assert feedback_bar.dtype == stored
            assert (float(jnp.abs(feedback_bar).max()) > 0) == (bar is not None)


@some_dtypes_and_modes
def test_layers_take_feedback_of_every_dtype(stored, mode):
    dtype = jnp.bfloat16 if stored == "bfloat16" else None
    mask = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], np.float32)[None]
    x = X[None].repeat(2, 0)
    for bar in (None, LOSSES[-1]) if mode is strict else (None,):
        with mode():
            layers = [
                soap_jax.linen.FeedbackDense(2, dtype=dtype, feedback_bar=bar),
                soap_jax.linen.FeedbackConv(2, (1,), mask=mask, dtype=dtype, feedback_bar=bar),
            ]
            for layer in layers:
                variables = layer.init(KEY, x)
                feedback = jax.tree.map(lambda leaf: leaf.astype(stored), variables["feedback"])

                def loss(params, feedback, x, layer=layer):
                    y = layer.apply({"params": params, "feedback": feedback}, x)
                    return jnp.sum(y.astype(jnp.float32))

                grad = jax.jit(jax.grad(loss, argnums=(0, 2)))
                got = grad(variables["params"], feedback, x)
                equal(got, grad(variables["params"], in_float32(feedback), x))
                assert float(jnp.abs(got[1]).sum()) > 0 or stored in SIGNS
            rngs = nnx.Rngs(0)
            for layer in (
                soap_jax.nnx.FeedbackLinear(3, 2, dtype=dtype, feedback_bar=bar, rngs=rngs),
                soap_jax.nnx.FeedbackConv(
                    3, 2, 1, mask=jnp.asarray(mask), dtype=dtype, feedback_bar=bar, rngs=rngs
                ),
            ):
                feedback = stored_as(stored, np.asarray(layer.kernel[...]))
                bars = []
                for leaf in (feedback, feedback.astype(jnp.float32)):
                    layer.feedback = soap_jax.nnx.Feedback(leaf)
                    bars.append(
                        jax.grad(lambda x, layer=layer: layer(x).sum().astype(jnp.float32))(x)
                    )
                equal(*bars)


@some_dtypes_and_modes
def test_projections_may_have_every_dtype(stored, mode):
    def loss(hidden, projection, error, dtype):
        output = ops.detach(hidden) @ jnp.ones((3, 2)).astype(dtype)
        return direct.direct_feedback(output, hidden, projection, error=error).sum()

    def of_target(hidden, projection, targets):
        return direct.direct_target(hidden, targets, projection, rows=np.float64(4)).sum()

    with mode():
        projection = stored_as(stored).T
        for error in ("exact", "sign"):
            for dtype in (jnp.float32, jnp.bfloat16):
                hidden = jnp.asarray(X).astype(dtype)
                got = jax.grad(loss)(hidden, projection, error, dtype)
                equal(got, jax.grad(loss)(hidden, in_float32(projection), error, dtype))
        target = jax.nn.one_hot(jnp.arange(4) % 2, 2, dtype=jnp.float32)
        equal(
            jax.grad(of_target)(jnp.asarray(X), projection, target),
            jax.grad(of_target)(jnp.asarray(X), in_float32(projection), target),
        )


@pytest.mark.parametrize("stored", FLOATS[1:])
@pytest.mark.parametrize("mode", MODES[:2])
def test_kolen_pollack_takes_feedback_of_every_floating_dtype(stored, mode):
    with mode():
        # Optax's own Adam promotes implicitly.
        for inner in (optax.sgd(0.1, momentum=0.9), *([] if mode is strict else [optax.adam(0.1)])):
            for decay in (0.5, optax.constant_schedule(0.5)):
                optimizer = optimizers.kolen_pollack(inner, decay=decay)
                params = jax.tree.map(jnp.asarray, PARAMS)
                learnt = params, {"out": {"kernel": stored_as(stored)}}
                state = optimizer.init(learnt)
                updates, _ = optimizer.update((params, None), state, learnt)
                _, feedback = optax.apply_updates(learnt, updates)
                update = updates[0]["out"]["kernel"] + 0.5 * KERNEL  # without the decay
                expected = update - 0.5 * stored_as("float32")
                got = updates[1]["out"]["kernel"]
                assert got.dtype == stored
                rounding = float(jnp.finfo(stored).eps) * np.abs(expected) + 1e-6
                assert np.all(np.abs(in_float32(got) - expected) <= rounding)
                assert feedback["out"]["kernel"].dtype == stored


@every_mode
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn])
def test_initialisers_give_the_dtype_that_is_asked_for(mode, dtype):
    with mode():
        made = [
            initializers.sparse(0.5, axis=-1),
            initializers.low_rank(1),
            initializers.scaled(np.float64(2.0)),
        ]
        if dtype != jnp.float8_e4m3fn:  # JAX draws none of 8 bits
            for init in made:
                assert init(KEY, (4, 3), dtype).dtype == dtype
        kernel = {"kernel": jnp.asarray(KERNEL).astype(dtype)}
        assert init_feedback(KEY, kernel).feedback["kernel"].dtype == dtype


# Stored in the dtype in which it is used


RULES_BY_LAYER = {
    "layer0/*": rules.Fixed(),
    "layer1/*": rules.SignSync(period=2, magnitude="unit"),
    "layer2/*": rules.SignSync(period=2, magnitude="glorot"),
    "layer3/*": rules.SignSync(period=2, magnitude="preserve"),
    "layer4/*": rules.SignSync(period=2, magnitude="redraw"),
    "layer5/*": rules.Transport(period=2),
}
HALF = jnp.bfloat16


class LinenNet(nn.Module):
    """Computes in bfloat16 with float32 params; the first layer needs no feedback."""

    layer: Any

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(9, dtype=HALF, name="first")(x))
        for i in range(len(RULES_BY_LAYER)):
            x = nn.tanh(self.layer(9, dtype=HALF, name=f"layer{i}")(x))
        return x


class NNXNet(nnx.Module):
    """The same."""

    def __init__(self, feedback_dtype, rngs):
        self.first = nnx.Linear(3, 9, dtype=HALF, rngs=rngs)
        for i in range(len(RULES_BY_LAYER)):
            layer = soap_jax.nnx.FeedbackLinear(
                9, 9, dtype=HALF, feedback_dtype=feedback_dtype, rngs=rngs
            )
            setattr(self, f"layer{i}", layer)

    def __call__(self, x):
        x = nn.tanh(self.first(x))
        for i in range(len(RULES_BY_LAYER)):
            x = nn.tanh(getattr(self, f"layer{i}")(x))
        return x


def linen_layers(stored):
    layer = functools.partial(soap_jax.linen.FeedbackDense, feedback_dtype=stored)
    variables = LinenNet(layer).init(KEY, X)

    def apply(params, feedback, x):
        return LinenNet(layer).apply({"params": params, "feedback": feedback}, x)

    return apply, variables["params"], {"feedback": variables["feedback"]}


def nnx_layers(stored):
    graph, params, feedback = nnx.split(
        NNXNet(stored, nnx.Rngs(0)), nnx.Param, soap_jax.nnx.Feedback
    )
    return lambda *states: nnx.merge(graph, *states[:2])(states[2]), params, {"feedback": feedback}


def transformed(stored):
    params = LinenNet(nn.Dense).init(KEY, X)["params"]

    def apply(params, x):
        return LinenNet(nn.Dense).apply({"params": params}, x)

    more = {"where": soap_jax.explain(apply, params, X), "dtype": stored and "used"}
    return soap_jax.with_feedback(apply), params, more


@pytest.mark.parametrize("mode", [contextlib.nullcontext, strict_and_double])
@pytest.mark.parametrize("make", [linen_layers, nnx_layers, transformed])
def test_feedback_stored_as_it_is_used_trains_bit_for_bit_as_in_its_kernels_dtype(make, mode):
    targets = np.sin(np.arange(36, dtype=np.float32)).reshape(4, 9)
    trained = []
    for stored in (None, HALF):
        with mode():
            apply, params, more = make(stored)
            state = init_feedback(KEY, params, RULES_BY_LAYER, **more)
            leaves = jax.tree.leaves(state.feedback)
            assert {leaf.dtype.name for leaf in leaves} == {"bfloat16" if stored else "float32"}

            @jax.jit
            def step(params, state, number, apply=apply):
                state = sync_feedback(params, state, number)

                def loss(params):
                    y = apply(params, state.feedback, X).astype(jnp.float32)
                    return jnp.mean(jnp.square(y - targets))

                grads = jax.grad(loss)(params)
                return jax.tree.map(lambda p, g: p - jnp.float32(0.5) * g, params, grads), state

            first = params
            for number in range(5):
                params, state = step(params, state, number)
        assert all(map(np.any, jax.tree.leaves(jax.tree.map(jnp.subtract, params, first))))
        trained.append(params)
    equal(*trained)


# Types of what is returned


@every_mode
def test_matched_feedback_of_a_float32_kernel_is_the_same_in_every_mode(mode):
    expected = init_feedback(KEY, PARAMS).feedback
    with mode():
        equal(init_feedback(KEY, PARAMS).feedback, expected)


@every_mode
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64])
def test_a_step_may_have_every_integer_dtype(mode, dtype):
    rule = rules.SignSync(period=100, magnitude="unit")
    with mode():
        state = init_feedback(KEY, PARAMS, rule)
        for sync in (sync_feedback, jax.jit(sync_feedback)):
            synced = sync(PARAMS, state, jnp.asarray(np.array(100, dtype)))
            equal(synced.feedback["out"]["kernel"], np.sign(KERNEL))
            equal(sync(PARAMS, state, jnp.asarray(np.array(90, dtype))).feedback, state.feedback)


def test_ops_promote_activities_as_flax_does_and_so_not_under_strict_promotion():
    x, feedback = jnp.asarray(X).astype(jnp.bfloat16), stored_as("bfloat16")
    assert ops.feedback_dense(x, KERNEL, feedback).dtype == jnp.float32
    with (
        strict(),
        pytest.raises(jax.dtypes.TypePromotionError, match="promotion"),
    ):
        ops.feedback_dense(x, jnp.asarray(KERNEL), feedback)
