"""Reference networks: paired with plain Flax models, and exact at feedback equal to kernels."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soap_jax import direct, models, ops, trees

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, 5, 2), np.float32))
MODELS = {
    "mlp": functools.partial(models.MLP, (7, 5, 3)),
    "convnet": functools.partial(models.ConvNet, (3, 4), 3),
}
LOWER = {"mlp": ("Dense_0", "Dense_1"), "convnet": ("Conv_0", "Conv_1")}
TOP = {"mlp": "Dense_2", "convnet": "Dense_0"}
each_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def jitted_init(model):
    return jax.jit(model.init)


def init(model, params_key=KEY, feedback_key=KEY):
    return jitted_init(model)({"params": params_key, "feedback": feedback_key}, X)


def gradient(model, params, feedback):
    @jax.jit
    def f(params, feedback):
        def loss(params):
            return jnp.sum(jnp.sin(model.apply({"params": params, "feedback": feedback}, X)))

        return jax.grad(loss)(params)

    return f(params, feedback)


@each_model
def test_a_model_without_feedback_has_the_same_kernels_and_outputs_to_the_bit(name):
    with_feedback, plain = MODELS[name](), MODELS[name](feedback=False)
    variables, plain_variables = init(with_feedback), init(plain)
    assert set(plain_variables) == {"params"}
    jax.tree.map(np.testing.assert_array_equal, variables["params"], plain_variables["params"])
    y, y_plain = (
        jax.jit(with_feedback.apply)(variables, X),
        jax.jit(plain.apply)(plain_variables, X),
    )
    np.testing.assert_array_equal(y, y_plain)


class PlainMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        init = nn.initializers.glorot_normal()
        x = nn.tanh(nn.Dense(7, kernel_init=init)(x))
        x = nn.tanh(nn.Dense(5, kernel_init=init)(x))
        return nn.Dense(3, kernel_init=init)(x)


class PlainConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.initializers.glorot_normal()
        x = nn.tanh(nn.Conv(3, (3, 3), strides=2, kernel_init=init)(x))
        x = nn.tanh(nn.Conv(4, (3, 3), strides=2, kernel_init=init)(x))
        return nn.Dense(3, kernel_init=init)(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize(("name", "plain"), [("mlp", PlainMLP()), ("convnet", PlainConvNet())])
def test_a_model_is_the_one_that_flax_alone_would_build(name, plain):
    model, expected = MODELS[name](), init(plain)
    variables = init(model)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], expected["params"])
    y, y_plain = jax.jit(model.apply)(variables, X), jax.jit(plain.apply)(expected, X)
    np.testing.assert_array_equal(y, y_plain)


@each_model
def test_every_layer_but_the_first_has_feedback_of_its_kernels_shape(name):
    variables = jax.eval_shape(MODELS[name]().init, KEY, X)
    kernels = jax.tree.map(jnp.shape, variables["params"])
    expected = {
        layer: {"kernel": shapes["kernel"]}
        for layer, shapes in kernels.items()
        if layer != LOWER[name][0]
    }
    assert jax.tree.map(jnp.shape, variables["feedback"]) == expected
    assert len(expected) == 2


@each_model
def test_feedback_equal_to_kernels_gives_the_plain_models_gradient(name):
    model, plain = MODELS[name](), MODELS[name](feedback=False)
    variables = init(model)
    params = variables["params"]
    got = gradient(model, params, trees.at_kernels(params, variables["feedback"]))
    expected = gradient(plain, params, {})
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6), got, expected)


@each_model
def test_random_feedback_changes_the_gradient_of_every_layer_below_the_top(name):
    model, plain = MODELS[name](), MODELS[name](feedback=False)
    variables = init(model)
    got = gradient(model, variables["params"], variables["feedback"])
    expected = gradient(plain, variables["params"], {})
    np.testing.assert_allclose(got[TOP[name]]["kernel"], expected[TOP[name]]["kernel"], rtol=1e-5)
    for layer in LOWER[name]:
        difference = jnp.linalg.norm(got[layer]["kernel"] - expected[layer]["kernel"])
        assert float(difference) > 0.1 * float(jnp.linalg.norm(expected[layer]["kernel"])), layer


@each_model
def test_feedback_has_its_own_stream_of_keys(name):
    model = MODELS[name]()
    a, b = (init(model, feedback_key=jax.random.key(i)) for i in (1, 2))
    jax.tree.map(np.testing.assert_array_equal, a["params"], b["params"])
    for one, other in zip(*map(jax.tree.leaves, (a["feedback"], b["feedback"])), strict=True):
        assert not jnp.any(one == other)


def test_mlp_flattens_every_axis_but_the_batch():
    model = MODELS["mlp"]()
    variables = init(model)
    flat = X.reshape(4, -1)
    np.testing.assert_array_equal(model.apply(variables, X), model.apply(variables, flat))
    assert variables["params"]["Dense_0"]["kernel"].shape == (60, 7)


def test_mlp_of_one_layer_is_linear_and_has_no_feedback():
    model = models.MLP((3,))
    variables = init(model)
    assert set(variables) == {"params"}
    layer = variables["params"]["Dense_0"]
    expected = X.reshape(4, -1) @ layer["kernel"] + layer["bias"][None]
    np.testing.assert_allclose(model.apply(variables, X), expected, rtol=1e-5, atol=1e-6)


@each_model
def test_the_activation_comes_between_layers_and_not_after_the_last(name):
    # A dead activation leaves the last bias, which an activation after it would make zero.
    model, variables = MODELS[name](activation=jnp.zeros_like), init(MODELS[name]())
    variables["params"][TOP[name]]["bias"] = jnp.array([1.0, -2.0, 3.0])
    expected = np.tile(np.array([1.0, -2.0, 3.0]), (4, 1))
    np.testing.assert_array_equal(model.apply(variables, X), expected)


def test_convnet_halves_height_and_width_at_every_convolution():
    variables = jax.eval_shape(models.ConvNet((3, 4, 2), classes=5).init, KEY, X)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert [shapes[f"Conv_{i}"]["kernel"] for i in range(3)] == [
        (3, 3, 2, 3),
        (3, 3, 3, 4),
        (3, 3, 4, 2),
    ]
    assert shapes["Dense_0"]["kernel"] == (1 * 1 * 2, 5)  # 6 x 5, 3 x 3, 2 x 2, 1 x 1


def test_convnet_without_convolutions_is_linear_and_has_no_feedback():
    model = models.ConvNet((), classes=3)
    assert set(jax.eval_shape(model.init, KEY, X)) == {"params"}


def test_kernel_init_sets_every_kernel():
    for name in MODELS:
        model = MODELS[name](kernel_init=nn.initializers.constant(0.25), feedback=False)
        params = init(model)["params"]
        for layer in params.values():
            assert jnp.all(layer["kernel"] == 0.25)


def test_mlp_taps_every_hidden_activation_and_goes_on_with_what_comes_back():
    model = MODELS["mlp"]()
    variables, tapped = init(model), {}

    def tap(name, h):
        tapped[name] = h
        return 2 * h

    y = model.apply(variables, X, tap)
    params = variables["params"]

    def dense(i, x):
        return x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"][None]

    h0 = jnp.tanh(dense(0, X.reshape(4, -1)))
    h1 = jnp.tanh(dense(1, 2 * h0))
    assert list(tapped) == ["hidden_0", "hidden_1"]
    np.testing.assert_allclose(tapped["hidden_0"], h0, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tapped["hidden_1"], h1, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y, dense(2, 2 * h1), rtol=1e-5, atol=1e-5)


# Direct feedback

TARGETS = jnp.asarray(np.eye(3, dtype=np.float32)[[0, 2, 1, 2]])
each_error = pytest.mark.parametrize("error", ["exact", "sign", "target"])


def direct_mlp(**fields):
    return models.DirectMLP((7, 5, 3), **fields)


@each_error
def test_a_direct_mlp_has_the_kernels_and_outputs_of_the_mlp(error):
    model = direct_mlp(error=error)
    variables, plain = init(model), init(MODELS["mlp"]())
    assert set(variables) == {"params", "projection"}
    jax.tree.map(np.testing.assert_array_equal, variables["params"], plain["params"])
    y = jax.jit(MODELS["mlp"]().apply)(plain, X)
    np.testing.assert_array_equal(jax.jit(model.apply)(variables, X), y)
    np.testing.assert_array_equal(jax.jit(model.apply)(variables, X, TARGETS), y)
    with_target = model.init({"params": KEY, "feedback": KEY}, X, TARGETS)
    jax.tree.map(np.testing.assert_array_equal, variables, with_target)


@each_error
def test_a_direct_mlp_learns_by_the_ops_of_direct_feedback(error):
    model = direct_mlp(error=error)
    variables = init(model)

    def loss(params):
        y = model.apply({**variables, "params": params}, X, TARGETS)
        return jnp.sum(jnp.sin(y))

    def expected_loss(params):
        x, hidden = X.reshape(4, -1), []
        for i in range(2):
            x = jnp.tanh(x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"][None])
            if error == "target":
                drawn = variables["projection"][f"DirectTarget_{i}"]["projection"]
                x = direct.direct_target(x, TARGETS, drawn)
            else:
                hidden.append(x)
                x = ops.detach(x)
        y = x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"][None]
        if error != "target":
            drawn = variables["projection"]["DirectFeedback_0"]["projection"]
            drawn = [drawn["Dense_0"], drawn["Dense_1"]]
            y = direct.direct_feedback(y, hidden, drawn, error=error)
        return jnp.sum(jnp.sin(y))

    got, expected = (jax.jit(jax.grad(f))(variables["params"]) for f in (loss, expected_loss))
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6), got, expected)


def test_a_direct_mlp_is_not_differentiated_without_its_target():
    model = direct_mlp(error="target")
    variables = init(model)

    def loss(params):
        return jnp.sum(model.apply({**variables, "params": params}, X))

    with pytest.raises(ValueError, match=r"called without a target.*jax.nn.one_hot"):
        jax.grad(loss)(variables["params"])


def test_a_direct_mlp_of_one_layer_has_no_projections():
    assert set(jax.eval_shape(models.DirectMLP((3,)).init, KEY, X)) == {"params"}


def test_projection_init_sets_every_projection():
    for error in ("exact", "target"):
        variables = init(direct_mlp(error=error, projection_init=nn.initializers.ones))
        shapes = sorted(leaf.shape for leaf in jax.tree.leaves(variables["projection"]))
        assert shapes == [(3, 5), (3, 7)]
        assert all(jnp.all(leaf == 1) for leaf in jax.tree.leaves(variables["projection"]))


def test_an_unknown_error_raises():
    with pytest.raises(ValueError, match="error is 'signs'; expected 'exact', 'sign' or 'target'"):
        init(direct_mlp(error="signs"))


def test_a_projection_of_targets_does_not_learn():
    model = models.DirectMLP((4, 3), error="target", projection_bar="kernel")
    with pytest.raises(ValueError, match="is 'kernel', with a target; expected None"):
        model.init(jax.random.key(0), jnp.ones((1, 5)))
