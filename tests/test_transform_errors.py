"""The errors of layers are the gradients by what one adds to their outputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from soap_jax import direct, explain, init_feedback, linen, metrics, models, ops, with_feedback
from soap_jax.transform import gradient_and_errors, layer_errors

BATCH = 7
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class MLP(nn.Module):
    dense: type = nn.Dense

    @nn.compact
    def __call__(self, x):
        for features in (6, 5):
            x = nn.tanh(self.dense(features)(x))
        return nn.Dense(3)(x)


def mean_loss(model):
    def loss(params, x):
        y = model.apply({"params": params}, x)
        return jnp.mean(jnp.sum(jnp.sin(y).reshape(len(x), -1), 1))

    return loss


def drawn(model, *shape):
    x = jax.random.normal(jax.random.key(0), (BATCH, *shape))
    return x, model.init(jax.random.key(1), x)["params"]


def feedback_of(loss, params, *args):
    where = explain(loss, params, *args)
    return init_feedback(jax.random.key(2), params, where=where).feedback


@pytest.mark.parametrize("aligned", [False, True])
def test_errors_are_gradients_of_examples_by_biases(aligned):
    loss = mean_loss(MLP())
    x, params = drawn(MLP(), 4)
    feedback = feedback_of(loss, params, x) if aligned else None
    gradient, errors = jax.jit(gradient_and_errors(loss))(params, feedback, x)

    def of_example(biases, row):
        both = {k: {"kernel": params[k]["kernel"], "bias": b} for k, b in biases.items()}
        return with_feedback(loss)(both, feedback, row[None])

    biases = {name: layer["bias"] for name, layer in params.items()}
    of_examples = jax.vmap(jax.grad(of_example), (None, 0))(biases, x)
    assert list(errors) == [f"Dense_{k}/kernel" for k in range(3)]
    for name, of_layer in of_examples.items():
        np.testing.assert_allclose(errors[f"{name}/kernel"] * BATCH, of_layer, **CLOSE)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **CLOSE),
        gradient,
        jax.grad(with_feedback(loss))(params, feedback, x),
    )


def weights(**shapes):
    keys = jax.random.split(jax.random.key(3), len(shapes))
    return {
        k: jax.random.normal(key, shape)
        for key, (k, shape) in zip(keys, shapes.items(), strict=True)
    }


def check(model, params, shapes, *args, axes=None):
    """Compares errors with gradients by shifts, for random feedback of all but the first kernel."""
    names = list(params)
    feedback = {k: None if k == names[0] else w[::-1] for k, w in params.items()}
    zeros = [jnp.zeros(shape) for shape in shapes]  # which the model itself adds
    expected = jax.grad(with_feedback(model), argnums=2)(params, feedback, zeros, *args)

    def loss(params, *args):
        return model(params, zeros, *args)

    errors = jax.jit(layer_errors(loss))(params, feedback, *args)
    assert list(errors) == names
    for name, shift in zip(names, expected, strict=True):
        moved = shift if axes is None else jnp.transpose(shift, axes)
        np.testing.assert_allclose(errors[name], moved, **CLOSE)
    return errors


X = jax.random.normal(jax.random.key(4), (BATCH, 4))


def test_inside_jit_and_remat():
    @jax.jit
    def hidden(w, x, shift):
        return jnp.tanh(x @ w + shift)

    @jax.checkpoint
    def more(w, x, shift):
        return hidden(w.astype(jnp.float32), x, shift)

    def model(params, shifts, x):
        h = more(params["b"], hidden(params["a"], x, shifts[0]), shifts[1])
        return jnp.sum(jnp.sin(h @ params["c"] + shifts[2]))

    shapes = [(BATCH, 5), (BATCH, 6), (BATCH, 3)]
    check(model, weights(a=(4, 5), b=(5, 6), c=(6, 3)), shapes, X)


def test_over_time_errors_are_stacked():
    def model(params, shifts, xs):
        def step(h, inputs):
            x, shift_a, shift_b = inputs
            h = jnp.tanh(x @ params["a"] + shift_a + h @ params["b"] + shift_b)
            return h, h

        h, _ = lax.scan(step, jnp.zeros((BATCH, 5)), (xs, shifts[0], shifts[1]))
        return jnp.sum(jnp.sin(h @ params["c"] + shifts[2]))

    xs = jax.random.normal(jax.random.key(5), (3, BATCH, 4))
    shapes = [(3, BATCH, 5), (3, BATCH, 5), (BATCH, 2)]
    errors = check(model, weights(a=(4, 5), b=(5, 5), c=(5, 2)), shapes, xs)
    assert metrics.angles_by_example(errors["a"], errors["b"], BATCH).shape == (BATCH,)


def test_over_layers_errors_are_stacked():
    def model(params, shifts, x):
        def layer(h, inputs):
            w, shift = inputs
            return jnp.tanh(h @ w + shift), None

        h, _ = lax.scan(layer, x @ params["a"] + shifts[0], (params["b"], shifts[1]))
        return jnp.sum(jnp.sin(h))

    check(model, weights(a=(4, 5), b=(3, 5, 5)), [(BATCH, 5), (3, BATCH, 5)], X)


def test_examples_come_first_and_kernels_axes_last():
    def model(params, shifts, x):
        h = jnp.tanh(params["a"] @ x.T + shifts[0])
        return jnp.sum(jnp.sin(params["b"] @ h + shifts[1]))

    shapes = [(5, BATCH), (3, BATCH)]
    check(model, weights(a=(5, 4), b=(3, 5)), shapes, X, axes=(1, 0))


def test_of_convolutions():
    model = models.ConvNet((4, 6), feedback=False)
    loss = mean_loss(model)
    x, params = drawn(model, 8, 8, 3)
    feedback = feedback_of(loss, params, x)
    gradient, errors = jax.jit(gradient_and_errors(loss))(params, feedback, x)
    kernels = [row.path for row in explain(loss, params, x) if len(row.shape) > 1]
    assert list(errors) == ["/".join(path) for path in kernels]
    for name, layer in gradient.items():  # a bias is added to the product
        error = errors[f"{name}/kernel"]
        assert len(error) == BATCH
        summed = error.sum(tuple(range(error.ndim - 1)))
        np.testing.assert_allclose(summed, layer["bias"], **CLOSE)


def test_of_layers_with_feedback_of_their_own():
    model = MLP(dense=linen.FeedbackDense)
    x = X
    variables = model.init({"params": jax.random.key(0), "feedback": jax.random.key(1)}, x)

    def loss(params, feedback, x):
        return jnp.sum(jnp.sin(model.apply({"params": params, "feedback": feedback}, x)))

    gradient, errors = gradient_and_errors(loss)(
        variables["params"], None, variables["feedback"], x
    )
    for name, layer in gradient.items():
        np.testing.assert_allclose(errors[f"{name}/kernel"].sum(0), layer["bias"], **CLOSE)


def test_what_is_left_out_and_what_is_shared():
    def loss(params, ids, x):
        table = params["table"]
        rows = table[ids]  # no product
        normed = params["normed"] / jnp.linalg.norm(params["normed"])
        joined = jnp.concatenate([params["gate"], params["other"]], 1)
        h = jnp.tanh(rows @ normed) @ joined
        penalty = jnp.sum(params["unused"] ** 2) + jnp.sum(params["gain"] ** 2)
        return jnp.sum(jnp.sin(h @ table.T)) + penalty, h

    params = weights(table=(9, 4), normed=(4, 5), gate=(5, 3), other=(5, 1), unused=(2, 2),
                     gain=(4,))  # fmt: skip
    params["steps"] = jnp.zeros((2, 2), int)
    errors = layer_errors(loss, has_aux=True)(params, None, jnp.arange(BATCH), X)
    assert list(errors) == ["normed", "gate", "other", "table"]
    assert errors["table"].shape == (BATCH, 9)
    np.testing.assert_array_equal(errors["gate"], errors["other"])


def test_direct_feedback_has_errors_of_its_own():
    projection = jax.random.normal(jax.random.key(6), (3, 5))

    def loss(params, projection, x):
        h = jnp.tanh(x @ params["a"])
        y = direct.direct_feedback(ops.detach(h) @ params["b"], [h], [projection])
        return jnp.sum(jnp.sin(y))

    params = weights(a=(4, 5), b=(5, 3))
    errors = layer_errors(loss)(params, None, projection, X)
    h = jnp.tanh(X @ params["a"])
    y_bar = jnp.cos(h @ params["b"])
    np.testing.assert_allclose(errors["b"], y_bar, **CLOSE)
    np.testing.assert_allclose(errors["a"], (y_bar @ projection) * (1 - h**2), **CLOSE)


def test_errors_cost_no_more_products_than_the_gradient():
    loss = mean_loss(MLP())
    x, params = drawn(MLP(), 4)
    feedback = feedback_of(loss, params, x)

    def products(function):
        text = jax.jit(function).lower(params, feedback, x).compile().as_text()
        return text.count(" dot(")

    # forward 3, the activations' cotangents 2, the kernels' gradients 3
    assert products(layer_errors(loss)) == 5
    assert products(gradient_and_errors(loss)) == products(jax.grad(with_feedback(loss))) == 8


def test_angles_by_example_need_an_axis_of_examples():
    a, b = jax.random.normal(jax.random.key(7), (2, 5, BATCH, 3))
    expected = [metrics.angle(a[:, k], b[:, k]) for k in range(BATCH)]
    np.testing.assert_allclose(metrics.angles_by_example(a, b, BATCH), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics.angles_by_example(a, b, 4), metrics.angle(a, b))
