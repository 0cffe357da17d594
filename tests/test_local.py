"""Local losses: closed forms, fixed points, layers, and a network that aligns itself."""

import dataclasses
import functools
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import soap_jax
from soap_jax import metrics, ops
from soap_jax.local import ActivationAlignment, InformationAlignment, SymmetricAlignment

F32 = jnp.float32
LOSSES = {
    "symmetric": SymmetricAlignment(self_weight=0.7, decay=0.3),
    "activation": ActivationAlignment(amp=0.7, sparse=0.3),
    "information": InformationAlignment(amp=0.7, decay=0.3, null=0.2),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), F32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def feedback_bar(layer, loss, x, kernel, feedback):
    """What a local loss makes of feedback's cotangent, whatever is done with y."""

    def f(feedback):
        return jnp.sum(jnp.sin(layer(x, kernel, feedback, feedback_bar=loss)))

    return jax.grad(f)(feedback)


dense = functools.partial(feedback_bar, ops.feedback_dense)


def as_float64(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


# Closed forms, by hand


def closed_form(loss, x, w, b):
    """The gradient for a dense layer, as the docstrings say it, in float64."""
    x, w, b = as_float64(x, w, b)
    x = x.reshape(-1, x.shape[-1])
    n, y = len(x), x @ w
    match loss:
        case SymmetricAlignment():
            return loss.decay * b - loss.self_weight * w
        case ActivationAlignment():
            return x.T @ (loss.sparse * x @ b - loss.amp * y) / n
        case InformationAlignment():
            return loss.decay * b + (loss.null * b @ y.T @ y - loss.amp * x.T @ y) / n


@pytest.mark.parametrize("batch", [(6,), (2, 3), ()], ids=str)
@every_loss
def test_the_gradient_of_a_dense_layer_is_the_closed_form(loss, batch):
    x, w, b = draw(0, *batch, 5), draw(1, 5, 3), draw(2, 5, 3)
    np.testing.assert_allclose(dense(loss, x, w, b), closed_form(loss, x, w, b), 1e-5, 1e-5)


def numpy_conv(x, kernel):
    """A 3 x 2 convolution of strides (2, 1) without padding, one tap at a time."""
    height, width = (x.shape[1] - 3) // 2 + 1, x.shape[2] - 1
    return sum(
        x[:, i : i + 2 * height - 1 : 2, j : j + width] @ kernel[i, j]
        for i in range(3)
        for j in range(2)
    )


OPS = {  # the layer, the op in NumPy, and the shapes of x and kernel; uses of an entry per example
    "conv": (
        functools.partial(ops.feedback_conv, strides=(2, 1), padding="VALID"),
        numpy_conv,
        (2, 5, 4, 2),
        (3, 2, 2, 3),
        2 * 3,
    ),
    "einsum": (
        functools.partial(ops.feedback_einsum, "bti,iho->btho"),
        functools.partial(np.einsum, "bti,iho->btho"),
        (2, 4, 3),
        (3, 2, 5),
        4,
    ),
}
every_op = pytest.mark.parametrize("name", OPS)


def by_definition(loss, op, x, w, b, uses):
    """The gradient from the loss's own words, with `op` as a tensor: y = T x W, per example."""
    x, w, b = as_float64(x, w, b)
    basis_x = np.eye(x[0].size).reshape(-1, *x.shape[1:])
    basis_w = np.eye(w.size).reshape(-1, *w.shape)
    tensor = np.stack([op(basis_x, e).reshape(len(basis_x), -1) for e in basis_w], -1)  # x, y, w
    y = op(x, w).reshape(len(x), -1)
    n = len(x) * uses
    forward = np.einsum("xyw,nx->nyw", tensor, x.reshape(len(x), -1))  # op(x, ·) = forward · W
    back = np.einsum("xyw,ny->nxw", tensor, y)  # opᵀ(y; ·) = back · B
    amp = -np.einsum("nyw,ny->w", forward, y) / n
    null = np.einsum("nxw,nxv,v->w", back, back, b.ravel()) / n
    sparse = np.einsum("nyw,nyv,v->w", forward, forward, b.ravel()) / n
    if isinstance(loss, ActivationAlignment):
        return (loss.amp * amp + loss.sparse * sparse).reshape(b.shape)
    return loss.decay * b + (loss.amp * amp + loss.null * null).reshape(b.shape)


@every_op
@pytest.mark.parametrize("loss", ["activation", "information"])
def test_the_gradient_of_any_op_is_the_definitions(loss, name):
    layer, op, *shapes, uses = OPS[name]
    x, w, b = draw(0, *shapes[0]), draw(1, *shapes[1]), draw(2, *shapes[1])
    actual = feedback_bar(layer, LOSSES[loss], x, w, b)
    expected = by_definition(LOSSES[loss], op, x, w, b, uses)
    np.testing.assert_allclose(actual, expected, 1e-5, 1e-5)


CONVOLUTIONS = {  # of windows 3 x 3, without padding: options, and the kernel's shape
    "plain": ({}, (3, 3, 2, 4)),
    "strided": ({"strides": 2}, (3, 3, 2, 4)),
    "depthwise": ({"feature_group_count": 2}, (3, 3, 1, 4)),
    "dilated": ({"kernel_dilation": 2}, (3, 3, 2, 4)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_white_noise_through_a_convolution_aligns_feedback_at_the_kernels_own_size(name):
    options, shape = CONVOLUTIONS[name]
    layer = functools.partial(ops.feedback_conv, padding="VALID", **options)
    x, w = draw(0, 256, 20, 20, 2), draw(1, *shape)
    gradient = feedback_bar(layer, InformationAlignment(null=0.0), x, w, jnp.zeros(shape))
    np.testing.assert_allclose(-gradient, w, atol=0.1)  # amp's part, minus W; noise of 1 / √n


def test_an_op_without_a_matrix_product_counts_like_a_dense_layer():
    def op(x, kernel):
        return jnp.sum(x[:, :, None] * kernel[None], axis=1)

    layer = ops.feedback_op(op, feedback_bar=LOSSES["information"])
    x, w, b = draw(0, 6, 5), draw(1, 5, 3), draw(2, 5, 3)
    actual = jax.grad(lambda b: layer(x, w, b).sum())(b)
    np.testing.assert_allclose(actual, dense(LOSSES["information"], x, w, b), 1e-5, 1e-5)


@every_op
def test_symmetric_alignment_does_not_look_at_the_op(name):
    layer, _, *shapes, _ = OPS[name]
    x, w, b = draw(0, *shapes[0]), draw(1, *shapes[1]), draw(2, *shapes[1])
    actual = feedback_bar(layer, LOSSES["symmetric"], x, w, b)
    np.testing.assert_allclose(actual, 0.3 * b - 0.7 * w, 1e-6, 1e-6)


@pytest.mark.parametrize("name", ["dense", *OPS])
@every_loss
def test_a_batch_given_three_times_over_has_the_same_gradient(loss, name):
    case = {"dense": (ops.feedback_dense, None, (2, 5), (5, 3), 1)} | OPS
    layer, _, *shapes, _ = case[name]
    x, w, b = draw(0, *shapes[0]), draw(1, *shapes[1]), draw(2, *shapes[1])
    once, thrice = (
        feedback_bar(layer, loss, data, w, b)
        for data in (x, jnp.tile(x, (3,) + (1,) * (x.ndim - 1)))
    )
    np.testing.assert_allclose(thrice, once, 1e-5, 1e-6)


# Where feedback settles


def descend(loss, x, w, b, *, rate, steps):
    def body(b, _):
        return b - rate * dense(loss, x, w, b), None

    return jax.jit(lambda b: lax.scan(body, b, length=steps)[0])(b)


def test_symmetric_alignment_settles_at_a_multiple_of_the_kernel():
    x, w, b = draw(0, 6, 5), draw(1, 5, 3), draw(2, 5, 3)
    settled = descend(SymmetricAlignment(self_weight=0.5, decay=0.25), x, w, b, rate=1, steps=60)
    np.testing.assert_allclose(settled, 2 * w, 1e-5, 1e-6)


def test_activation_alignment_settles_where_the_batch_cannot_tell_feedback_from_the_kernel():
    x, w, b = draw(0, 3, 5), draw(1, 5, 3), draw(2, 5, 3)  # three examples, five inputs
    settled = descend(ActivationAlignment(amp=2.0), x, w, b, rate=0.2, steps=500)
    np.testing.assert_allclose(x @ settled, 2 * x @ w, 1e-4, 1e-4)
    # Where x does not vary B stays as it was drawn.
    unseen = np.eye(5) - np.linalg.pinv(x) @ x
    np.testing.assert_allclose(unseen @ settled, unseen @ b, 1e-4, 1e-4)


def test_information_alignment_settles_where_linear_algebra_says():
    x, w, b = draw(0, 9, 5), draw(1, 5, 3), draw(2, 5, 3)
    loss = LOSSES["information"]
    x64, w64 = as_float64(x, w)
    covariance = x64.T @ x64 / 9
    bound = loss.decay * np.eye(3) + loss.null * w64.T @ covariance @ w64
    expected = loss.amp * covariance @ w64 @ np.linalg.inv(bound)
    np.testing.assert_allclose(closed_form(loss, x, w, expected), 0, atol=1e-12)
    settled = descend(loss, x, w, b, rate=0.3, steps=300)
    np.testing.assert_allclose(settled, expected, 1e-5, 1e-5)


def test_information_alignment_of_white_activities_has_the_kernels_directions():
    """With xᵀx = n and without "null", B = amp / decay · W."""
    x = jnp.asarray(np.sqrt(8) * np.linalg.qr(draw(0, 8, 5))[0], F32)
    w, b = draw(1, 5, 3), draw(2, 5, 3)
    loss = InformationAlignment(amp=1.5, decay=0.5, null=0.0)
    np.testing.assert_allclose(descend(loss, x, w, b, rate=1, steps=60), 3 * w, 1e-5, 1e-5)


# Nothing else changes


@every_loss
def test_no_other_cotangent_knows_of_a_local_loss(loss):
    args = draw(0, 6, 5), draw(1, 5, 3), draw(2, 5, 3)

    @functools.partial(jax.jit, static_argnums=0)
    def pull_back(loss, *args):
        y, vjp = jax.vjp(functools.partial(ops.feedback_dense, feedback_bar=loss), *args)
        return y, *vjp(jnp.cos(y))

    *with_loss, feedback_bar = pull_back(loss, *args)
    *without, zeros = pull_back(None, *args)
    chex.assert_trees_all_equal(with_loss, without)
    assert np.any(feedback_bar) and not np.any(zeros)


def network(params, x):
    for i in range(3):
        x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"][None]
        x = jnp.tanh(x) if i < 2 else x
    return x


def make_params(*widths):
    rng = np.random.default_rng(1)
    return {
        f"Dense_{i}": {
            "kernel": jnp.asarray(rng.standard_normal((a, b)) / np.sqrt(a), F32),
            "bias": jnp.asarray(rng.standard_normal(b), F32),
        }
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    }


def linen_gradient(loss, x, params, feedback):
    layer = functools.partial(soap_jax.linen.FeedbackDense, feedback_bar=loss)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.Dense(7, name="Dense_0")(x))
            x = jnp.tanh(layer(6, name="Dense_1")(x))
            return layer(3, name="Dense_2")(x)

    def f(params, feedback):
        return jnp.sum(jnp.sin(Model().apply({"params": params, "feedback": feedback}, x)))

    return jax.grad(f, argnums=(0, 1))(params, feedback)


def nnx_gradient(loss, x, params, feedback):
    class Model(nnx.Module):
        def __init__(self, rngs):
            layer = functools.partial(soap_jax.nnx.FeedbackLinear, feedback_bar=loss, rngs=rngs)
            self.Dense_0, self.Dense_1 = nnx.Linear(5, 7, rngs=rngs), layer(7, 6)
            self.Dense_2 = layer(6, 3)

        def __call__(self, x):
            return self.Dense_2(jnp.tanh(self.Dense_1(jnp.tanh(self.Dense_0(x)))))

    graph, *_ = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), nnx.Param, ...)
    named = {name: {"feedback": feedback[name]["kernel"]} for name in ("Dense_1", "Dense_2")}

    def f(params, named):
        model = nnx.merge(graph, nnx.State(params), nnx.State(named))
        return jnp.sum(jnp.sin(model(x)))

    params_bar, bar = jax.grad(f, argnums=(0, 1))(params, named)
    return params_bar, {name: {"kernel": bar[name]["feedback"]} for name in named}


def with_feedback_gradient(loss, x, params, feedback):
    def f(params, x):
        return jnp.sum(jnp.sin(network(params, x)))

    f = soap_jax.with_feedback(f, feedback_bar=loss)
    return jax.grad(f, argnums=(0, 1))(params, feedback, x)


@pytest.mark.parametrize("gradient", [linen_gradient, nnx_gradient, with_feedback_gradient])
def test_layers_with_biases_take_a_local_loss_and_params_never_notice(gradient):
    x, params, loss = draw(0, 9, 5), make_params(5, 7, 6, 3), LOSSES["information"]
    feedback = {
        f"Dense_{i}": {"kernel": draw(i, *shape)} for i, shape in ((1, (7, 6)), (2, (6, 3)))
    }
    gradient = jax.jit(gradient, static_argnums=0)
    params_bar, bar = gradient(loss, x, params, feedback)
    h1 = jnp.tanh(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
    h2 = jnp.tanh(h1 @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"][None])
    for name, h in (("Dense_1", h1), ("Dense_2", h2)):
        expected = closed_form(loss, h, params[name]["kernel"], feedback[name]["kernel"])
        np.testing.assert_allclose(bar[name]["kernel"], expected, 1e-5, 1e-5)
    without, zeros = gradient(None, x, params, feedback)
    chex.assert_trees_all_equal(params_bar, without)
    assert not any(map(np.any, jax.tree.leaves(zeros)))


def test_a_loss_of_ones_own_is_a_class_of_five_lines():
    @dataclasses.dataclass(frozen=True)
    class Predict(ops.LocalLoss):
        weight: float

        def loss(self, op, x, kernel, feedback):
            return self.weight * jnp.sum((op(x, feedback) - op(x, kernel)) ** 2) / 2

    x, w, b = draw(0, 6, 5), draw(1, 5, 3), draw(2, 5, 3)
    np.testing.assert_allclose(dense(Predict(0.5), x, w, b), 0.5 * x.T @ (x @ (b - w)), 1e-5, 1e-5)


# Transformations and dtypes


@every_loss
def test_half_precision_gives_the_closed_form_but_for_its_rounding(loss):
    x, w, b = (a.astype(jnp.bfloat16) for a in (draw(0, 6, 5), draw(1, 5, 3), draw(2, 5, 3)))
    actual = dense(loss, x, w, b)
    assert actual.dtype == jnp.bfloat16
    expected = closed_form(loss, *(a.astype(F32) for a in (x, w, b)))
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, atol=0.04 * np.abs(expected).max()
    )


@pytest.mark.parametrize("dtypes", [(jnp.bfloat16, F32, F32), (F32, F32, jnp.bfloat16)], ids=str)
@every_loss
def test_the_gradient_has_feedbacks_dtype(loss, dtypes):
    shapes = ((6, 5), (5, 3), (5, 3))
    args = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]
    assert jax.eval_shape(functools.partial(dense, loss), *args).dtype == dtypes[2]


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32])
@every_loss
def test_flax_layers_take_integer_inputs(loss, dtype):
    x = jnp.arange(30).reshape(6, 5).astype(dtype)
    layer = soap_jax.linen.FeedbackDense(3, feedback_bar=loss)
    w, b, bias = draw(1, 5, 3), draw(2, 5, 3), jnp.ones(3)

    @jax.jit
    @jax.grad
    def gradient(b):
        variables = {"params": {"kernel": w, "bias": bias}, "feedback": {"kernel": b}}
        return jnp.sum(layer.apply(variables, x))

    expected = closed_form(loss, x, w, b)
    np.testing.assert_allclose(gradient(b), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_integer_feedback_learns_nothing():
    x, w = draw(0, 6, 5), draw(1, 5, 3)
    _, vjp = jax.vjp(
        lambda b: ops.feedback_dense(x, w, b, feedback_bar=LOSSES["information"]),
        jnp.sign(w).astype(jnp.int8),
    )
    assert vjp(jnp.ones((6, 3)))[0].dtype == jax.dtypes.float0


@every_loss
def test_vmap_over_layers_equals_a_python_loop(loss):
    stacks = draw(0, 4, 6, 5), draw(1, 4, 5, 3), draw(2, 4, 5, 3)
    together = jax.vmap(functools.partial(dense, loss))(*stacks)
    alone = [dense(loss, *arrays) for arrays in zip(*stacks, strict=True)]
    np.testing.assert_allclose(together, alone, 1e-5, 1e-6)


@pytest.mark.parametrize("loss", [LOSSES["activation"], LOSSES["information"]])
def test_vmap_over_examples_makes_each_a_batch_of_one_whose_gradients_add_up(loss):
    x, w, b = draw(0, 6, 5), draw(1, 5, 3), draw(2, 5, 3)

    @jax.jit
    @jax.grad
    def per_example(b):
        layer = functools.partial(ops.feedback_dense, feedback_bar=loss)
        return jnp.sum(jax.vmap(layer, (0, None, None))(x, w, b))

    np.testing.assert_allclose(per_example(b), 6 * dense(loss, x, w, b), 1e-5, 1e-5)


SHARDED = {"dense": (ops.feedback_dense, None, (8, 5), (5, 3))} | {
    name: (layer, op, (4, *x[1:]), w) for name, (layer, op, x, w, _) in OPS.items()
}


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("loss", ["activation", "information"])
def test_a_batch_spread_over_an_explicit_mesh_changes_nothing(mesh, loss, name):
    layer, _, *shapes = SHARDED[name]
    args = [np.asarray(draw(i, *shapes[min(i, 1)])) for i in range(3)]
    alone = feedback_bar(layer, LOSSES[loss], *args)
    split = [
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip(args, (P("data"), P(), P()), strict=True)
    ]
    together = feedback_bar(layer, LOSSES[loss], *split)
    assert jax.typeof(together) == jax.typeof(split[2])
    np.testing.assert_allclose(jax.device_get(together), jax.device_get(alone), 1e-5, 1e-5)


# A training


def test_information_alignment_aligns_feedback_while_the_network_learns():
    x = draw(0, 256, 20)
    labels = jnp.argmax(x @ draw(1, 20, 5), 1)
    params = make_params(20, 30, 25, 5)
    where = ["Dense_1/kernel", "Dense_2/kernel"]
    feedback = soap_jax.init_feedback(jax.random.key(0), params, where=where).feedback

    def loss(params, x, labels):
        return optax.softmax_cross_entropy_with_integer_labels(network(params, x), labels).mean()

    aligned = InformationAlignment(amp=1.0, decay=0.5, null=0.1)
    loss_fa = soap_jax.with_feedback(loss, feedback_bar=aligned)
    parts = {"params": optax.adam(3e-3), "feedback": optax.sgd(0.05)}
    optimizer = optax.partition(parts, ("params", "feedback"))

    def body(carry, _):
        learnt, opt_state = carry
        value, gradient = jax.value_and_grad(loss_fa, argnums=(0, 1))(*learnt, x, labels)
        updates, opt_state = optimizer.update(gradient, opt_state, learnt)
        return (optax.apply_updates(learnt, updates), opt_state), value

    @jax.jit
    def train(learnt):
        (learnt, _), losses = lax.scan(body, (learnt, optimizer.init(learnt)), length=300)
        return metrics.weight_angle(*learnt), losses

    before = [float(angle) for angle in jax.tree.leaves(metrics.weight_angle(params, feedback))]
    after, losses = train((params, feedback))
    after = [float(angle) for angle in jax.tree.leaves(after)]
    assert all(80 < angle < 100 for angle in before)
    assert all(angle < 50 for angle in after)  # 42 and 36
    assert losses[-1] < 0.1 * losses[0]


# As values, and errors


@every_loss
def test_losses_are_values(loss):
    assert loss == dataclasses.replace(loss) and hash(loss) == hash(dataclasses.replace(loss))
    assert sum(loss == other for other in LOSSES.values()) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.decay = 2


def test_equal_losses_do_not_retrace():
    before = feedback_bar._cache_size()
    for _ in range(3):
        dense(InformationAlignment(amp=0.123), draw(0, 6, 5), draw(1, 5, 3), draw(2, 5, 3))
    assert feedback_bar._cache_size() == before + 1


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), "a", None])
@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (kind, field.name)
        for kind in (SymmetricAlignment, ActivationAlignment, InformationAlignment)
        for field in dataclasses.fields(kind)
    ],
)
def test_a_weight_out_of_range_raises(loss, name, weight):
    message = rf"{loss.__name__}: {name} is {weight!r}; expected a number of at least 0"
    with pytest.raises(ValueError, match=message):
        loss(**{name: weight})


def test_a_loss_without_a_formula_says_so():
    class Empty(ops.LocalLoss):
        pass

    with pytest.raises(NotImplementedError, match="Empty must define `loss`"):
        jax.eval_shape(functools.partial(dense, Empty()), *(jnp.ones((2, 2)),) * 3)
