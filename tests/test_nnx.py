"""NNX layers: Flax's own layers, but for the way back to their input; and equal to Linen's."""

import functools
import inspect
import math
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from soap_jax import init_feedback, linen, rules, sync_feedback, trees
from soap_jax import nnx as soap_nnx


def noise(key, shape, dtype=jnp.float32):
    """An initialiser: another array for every key, but unlike Flax's compiled in no time."""
    return _noise(key, tuple(shape), dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _noise(key, shape, dtype):
    scale = jax.random.key_data(key)[0].astype(jnp.float32) / 2.0**24
    return jnp.sin(scale * jnp.arange(1.0, 1 + math.prod(shape))).reshape(shape).astype(dtype)


mask = np.tril(np.ones((3, 2, 4), np.float32))  # (window, in, out)


class Case(NamedTuple):
    """One of Flax's NNX layers with its arguments, its input's shape, and its twin in Linen."""

    layer: str
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    kwargs: dict[str, Any]
    linen: dict[str, Any]

    def ours(self, rngs=None, **changes):
        layer = getattr(soap_nnx, "Feedback" + self.layer)
        own = {"feedback_init": noise} | changes
        return layer(*self.args, **self._draws | own, rngs=rngs or nnx.Rngs(1))

    def flax(self, rngs=None, **changes):
        layer = getattr(nnx, self.layer)
        return layer(*self.args, **self._draws | changes, rngs=rngs or nnx.Rngs(1))

    @property
    def _draws(self):
        return {"kernel_init": noise, "bias_init": noise} | self.kwargs

    def in_linen(self):
        name = self.layer.replace("Linear", "Dense")
        fields = {key: value for key, value in self.kwargs.items() if key != "batch_axis"}
        return getattr(linen, "Feedback" + name)(**fields | self.linen)


def linear(shape, out, **kwargs):
    return Case("Linear", (shape[-1], out), shape, kwargs, {"features": out})


def general(shape, ins, out, *, linen=None, **kwargs):
    linen = {"features": out} | (linen or {})
    return Case("LinearGeneral", (ins, out), shape, kwargs, linen)


def einsum(shape, spec, kernel_shape, bias_shape=None):
    fields = {"shape": kernel_shape, "einsum_str": spec, "use_bias": bias_shape is not None}
    return Case("Einsum", (spec, kernel_shape, bias_shape), shape, {}, fields)


def conv(shape, out, window, **kwargs):
    fields = {"features": out, "kernel_size": window}
    return Case("Conv", (shape[-1], out, window), shape, kwargs, fields)


def conv_transpose(shape, out, window, **kwargs):
    return conv(shape, out, window, **kwargs)._replace(layer="ConvTranspose")


CASES = {
    "linear": linear((4, 3), 5),
    "linear_without_bias": linear((2, 4, 3), 5, use_bias=False),
    "general": general((4, 3), 3, (2, 5)),
    "general_two_axes": general((4, 3, 6), (3, 6), (2, 5), axis=(-2, -1)),
    "general_batch_axis": general((4, 2, 3), 3, 5, batch_axis={0: 4}, linen={"batch_dims": (0,)}),
    "einsum": einsum((2, 5, 3), "bti,iho->btho", (3, 4, 7), (4, 7)),
    "einsum_without_bias": einsum((2, 5, 3), "bti,tio->bto", (5, 3, 4)),
    "conv_1d_causal": conv((2, 7, 3), 4, (3,), padding="CAUSAL", kernel_dilation=2),
    "conv_2d": conv((2, 6, 5, 3), 4, (3, 2)),
    "conv_3d": conv((2, 4, 5, 3, 2), 3, (2, 3, 1)),
    "conv_strided": conv((2, 7, 6, 3), 4, (3, 2), strides=(2, 3), padding="VALID"),
    "conv_groups": conv((2, 5, 6, 6), 9, (3, 2), feature_group_count=3),
    "conv_dilated": conv(
        (2, 6, 7, 3), 4, (3, 2), kernel_dilation=(2, 1), input_dilation=(1, 2), padding=2
    ),
    "conv_circular": conv((2, 6, 5, 3), 4, (3, 2), strides=2, padding="CIRCULAR"),
    "conv_masked_by_jax_array": conv((2, 7, 2), 4, (3,), mask=jnp.asarray(mask)),
    "conv_unbatched": conv((6, 5, 3), 4, (3, 2)),
    "transpose_strided": conv_transpose((2, 4, 3, 3), 5, (3, 2), strides=(2, 3)),
    "transpose_kernel": conv_transpose(
        (2, 4, 3, 3), 5, (3, 2), strides=(2, 1), transpose_kernel=True
    ),
    "transpose_circular": conv_transpose((2, 5, 3), 4, (4,), strides=(2,), padding="CIRCULAR"),
    "transpose_masked_by_jax_array": conv_transpose((2, 5, 2), 4, (3,), mask=jnp.asarray(mask)),
    "transpose_unbatched": conv_transpose((5, 3), 4, (3,)),
}
ONE_OF_EACH = ("linear", "general_two_axes", "einsum", "conv_2d", "transpose_strided")

each_case = pytest.mark.parametrize("name", CASES)
one_of_each = pytest.mark.parametrize("name", ONE_OF_EACH)


def draw(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def equal(a, b):
    """Bit-identical leaves, dtypes included."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def close(a, b, tolerance=1e-5):
    """Leaves equal to float32 rounding, dtypes included."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=tolerance, atol=tolerance
        )


def differ(a, b):
    return np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max() > 1e-2


def params_of(model):
    return nnx.state(model, nnx.Param)


def feedback_of(model):
    return nnx.state(model, soap_nnx.Feedback)


def filled(state, leaf):
    """The state of one layer's feedback with another value."""
    return jax.tree.map(lambda _: leaf, state)


def pull_back(model):
    """A jitted `(params, feedback, x, y_bar) -> (y, (params_bar, feedback_bar, x_bar))`."""
    graph, _, _, rest = nnx.split(model, nnx.Param, soap_nnx.Feedback, ...)

    @jax.jit
    def f(params, feedback, x, y_bar):
        def apply(params, feedback, x):
            return nnx.merge(graph, params, feedback, rest)(x)

        y, vjp = jax.vjp(apply, params, feedback, x)
        return y, vjp(y_bar)

    return f


class Measured(NamedTuple):
    """What the battery below needs to know of one case; two programs serve all its tests."""

    params: Any
    feedback: Any
    x: jax.Array
    y_bar: jax.Array
    exact: Any  # what `pull_back` returns for Flax's layer
    at_feedback: Any  # for Flax's layer with kernel := feedback
    ours: Any  # for ours with random feedback
    at_kernel: Any  # with feedback := kernel
    at_none: Any  # with None in place of feedback
    learned: Any  # with feedback_bar="kernel"


@functools.cache
def measure(name):
    one = CASES[name]
    x, model, flax_model = draw(0, one.shape), one.ours(), one.flax()
    y_bar = draw(2, jax.eval_shape(flax_model, x).shape)
    swapped = one.flax()
    swapped.kernel[...] = model.feedback[...]
    flax, ours, learned = map(pull_back, (flax_model, model, one.ours(feedback_bar="kernel")))

    @jax.jit
    def ours_in_every_way(params, feedback, x, y_bar):
        others = (feedback, filled(feedback, params["kernel"][...]), filled(feedback, None))
        in_place = (ours(params, other, x, y_bar) for other in others)
        return *in_place, learned(params, feedback, x, y_bar)

    params, feedback, nothing = params_of(model), feedback_of(model), feedback_of(flax_model)
    return Measured(
        params,
        feedback,
        x,
        y_bar,
        flax(params_of(flax_model), nothing, x, y_bar),
        flax(params_of(swapped), nothing, x, y_bar),
        *ours_in_every_way(params, feedback, x, y_bar),
    )


# The battery, run over every layer.


@each_case
def test_same_rngs_give_flax_params(name):
    one = CASES[name]
    seeds = (
        {"default": 1},
        {"params": 1},
        {"params": 1, "feedback": 2},
        {"default": 1, "feedback": 3},
    )
    kernels = []
    for streams in seeds:
        ours, flax = one.ours(nnx.Rngs(**streams)), one.flax(nnx.Rngs(**streams))
        equal(params_of(ours), params_of(flax))
        assert ours.feedback.shape == ours.kernel.shape
        assert differ(ours.feedback[...], ours.kernel[...])
        kernels.append(ours.feedback[...])
    equal(kernels[0], kernels[1])  # the stream is the same, under another name
    assert differ(kernels[0], kernels[2])
    assert differ(kernels[2], kernels[3])  # it follows the stream "feedback"


@each_case
def test_forward_pass_is_bit_identical_to_flax(name):
    measured = measure(name)
    for y, _ in (measured.ours, measured.at_kernel, measured.at_none, measured.learned):
        equal(y, measured.exact[0])
    equal(CASES[name].ours()(measured.x), CASES[name].flax()(measured.x))


@each_case
def test_equal_feedback_gives_flax_gradients(name):
    measured = measure(name)
    params_bar, _, x_bar = measured.at_kernel[1]
    close(params_bar, measured.exact[1][0])
    close(x_bar, measured.exact[1][2])


@each_case
def test_none_in_place_of_feedback_gives_flax_gradients(name):
    measured = measure(name)
    params_bar, _, x_bar = measured.at_none[1]
    close(params_bar, measured.exact[1][0])
    close(x_bar, measured.exact[1][2])


@each_case
def test_feedback_changes_only_the_cotangent_of_the_input(name):
    measured = measure(name)
    params_bar, _, x_bar = measured.ours[1]
    close(params_bar, measured.exact[1][0])
    assert differ(x_bar, measured.exact[1][2])
    close(x_bar, measured.at_feedback[1][2])  # Flax's layer, with its kernel set to the feedback


@each_case
def test_feedback_has_no_gradient_by_default(name):
    measured = measure(name)
    _, feedback_bar, _ = measured.ours[1]
    equal(feedback_bar, jax.tree.map(jnp.zeros_like, measured.feedback))


@each_case
def test_feedback_bar_kernel_is_the_gradient_of_the_kernel(name):
    measured = measure(name)
    params_bar, feedback_bar, x_bar = measured.learned[1]
    close(feedback_bar["feedback"][...], measured.exact[1][0]["kernel"][...])
    close(params_bar, measured.exact[1][0])
    close(x_bar, measured.at_feedback[1][2])


@each_case
def test_linen_layer_with_the_same_weights_is_equal(name):
    measured, layer = measure(name), CASES[name].in_linen()
    params = {key: leaf[...] for key, leaf in measured.params.items()}
    feedback = {"kernel": measured.feedback["feedback"][...]}

    @jax.jit
    def run(params, feedback, x):
        def apply(params, x):
            return layer.apply({"params": params, "feedback": feedback}, x)

        y, vjp = jax.vjp(apply, params, x)
        return y, vjp(measured.y_bar)

    y, (params_bar, x_bar) = run(params, feedback, measured.x)
    close(y, measured.ours[0])
    close(params_bar, {key: leaf[...] for key, leaf in measured.ours[1][0].items()})
    close(x_bar, measured.ours[1][2])


@one_of_each
def test_feedback_bar_may_be_a_function_of_the_activities(name):
    def feedback_bar(op, x, kernel, feedback, y_bar):
        return 3 * feedback - kernel + x.sum() * (op(x, kernel) * y_bar).sum()

    measured = measure(name)
    f = pull_back(CASES[name].ours(feedback_bar=feedback_bar))
    y, (params_bar, got, x_bar) = f(measured.params, measured.feedback, measured.x, measured.y_bar)
    kernel, feedback = measured.params["kernel"][...], measured.feedback["feedback"][...]
    product = np.asarray(y)
    if "bias" in measured.params:
        product = product - np.asarray(measured.params["bias"][...])
    expected = feedback_bar(lambda *_: product, measured.x, kernel, feedback, measured.y_bar)
    close(got["feedback"][...], expected, 1e-4)  # sums over the batch, in another order
    close(params_bar, measured.exact[1][0])
    close(x_bar, measured.at_feedback[1][2])


# Dtypes and precision.


def agrees_with_flax(name, tolerance, *, x=None, y_bar=None, **changes):
    """Our layer and Flax's under the same changes; returns ours' output and gradients."""
    measured, one = measure(name), CASES[name]
    x, y_bar = measured.x if x is None else x, measured.y_bar if y_bar is None else y_bar
    ours, flax, swapped = one.ours(**changes), one.flax(**changes), one.flax(**changes)
    swapped.kernel[...] = ours.feedback[...]
    run, nothing = pull_back(flax), feedback_of(flax)
    try:
        exact_y, (exact_params_bar, _, _) = run(params_of(flax), nothing, x, y_bar)
    except TypeError:
        pytest.skip("this JAX cannot differentiate Flax's own layer")
    _, (_, _, exact_x_bar) = run(params_of(swapped), nothing, x, y_bar)
    y, (params_bar, feedback_bar, x_bar) = pull_back(ours)(
        params_of(ours), feedback_of(ours), x, y_bar
    )
    equal(y, exact_y)
    close(params_bar, exact_params_bar, tolerance)
    close(x_bar, exact_x_bar, tolerance)
    return y, (params_bar, feedback_bar, x_bar)


@one_of_each
def test_bfloat16_computation_with_float32_params_agrees_with_flax(name):
    y_bar = measure(name).y_bar.astype(jnp.bfloat16)
    # one rounding of bfloat16 (2^-8) on values of a few units
    y, bars = agrees_with_flax(name, 2e-2, y_bar=y_bar, dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(bars)} == {jnp.dtype("float32")}


@one_of_each
def test_preferred_element_type_agrees_with_flax(name):
    y, _ = agrees_with_flax(name, 2e-2, dtype=jnp.bfloat16, preferred_element_type=jnp.float32)
    assert y.dtype == jnp.float32


@one_of_each
def test_float64_is_kept_throughout(name):
    before = jax.config.jax_enable_x64
    x, y_bar = measure(name).x, measure(name).y_bar
    jax.config.update("jax_enable_x64", True)
    try:
        x, y_bar = x.astype(jnp.float64), y_bar.astype(jnp.float64)
        y, bars = agrees_with_flax(name, 1e-13, x=x, y_bar=y_bar, param_dtype=jnp.float64)
    finally:
        jax.config.update("jax_enable_x64", before)
    assert {leaf.dtype for leaf in jax.tree.leaves((y, bars))} == {jnp.dtype("float64")}


@one_of_each
def test_feedback_has_the_dtype_of_the_params(name):
    layer = CASES[name].ours(param_dtype=jnp.bfloat16)
    assert layer.feedback.dtype == layer.kernel.dtype == jnp.bfloat16


@one_of_each
@pytest.mark.parametrize("dtype", [jnp.bfloat16, "int8"])
def test_feedback_dtype_says_how_feedback_is_stored_and_changes_no_draw(name, dtype):
    expected, layer = CASES[name].ours(), CASES[name].ours(feedback_dtype=dtype)
    equal(params_of(layer), params_of(expected))
    drawn = expected.feedback[...]
    values = jnp.sign(drawn) if dtype == "int8" else drawn
    equal(layer.feedback[...], values.astype(dtype))
    assert layer.feedback.get_metadata() == expected.feedback.get_metadata()


def test_a_dtype_in_which_no_feedback_can_be_stored_raises():
    with pytest.raises(ValueError, match="feedback_dtype is 'text'; expected a floating-point"):
        soap_nnx.FeedbackLinear(3, 2, feedback_dtype="text", rngs=nnx.Rngs(0))


@one_of_each
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("stored", [jnp.int8, jnp.bfloat16])
def test_feedback_stored_in_fewer_bits_gives_the_bits_of_its_values(name, dtype, stored):
    model = CASES[name].ours(dtype=dtype)
    params, feedback = params_of(model), feedback_of(model)
    state = init_feedback(jax.random.key(0), params, feedback=feedback, dtype=stored)
    values = jax.tree.map(lambda b: b.astype(jnp.float32), state.feedback)
    x, y_bar = measure(name).x, measure(name).y_bar.astype(dtype or jnp.float32)

    @nnx.jit
    def params_bar_and_x_bar(model, x):
        def product(model, x):
            return jnp.sum(model(x) * y_bar)

        return nnx.grad(product, argnums=(0, 1))(model, x)

    bars = []
    for leaves in (state.feedback, values):
        nnx.update(model, leaves)
        assert isinstance(model.feedback, soap_nnx.Feedback)
        assert model.feedback.dtype == jax.tree.leaves(leaves)[0].dtype
        bars.append(params_bar_and_x_bar(model, x))
    equal(*bars)
    assert differ(bars[0][1], 0)


@one_of_each
def test_precision_reaches_every_product(name):
    measured, layer = measure(name), CASES[name].ours(precision="highest")
    args = measured.params, measured.feedback, measured.x, measured.y_bar
    text = pull_back(layer).lower(*args).as_text()
    products = [
        line
        for line in text.splitlines()
        if re.search(r"stablehlo\.(dot_general|convolution)", line)
    ]
    assert len(products) == 3  # forward, kernel's cotangent, input's cotangent
    assert all(line.count("HIGHEST") == 2 for line in products)


@one_of_each
def test_integer_inputs_work_as_in_flax(name):
    measured, one = measure(name), CASES[name]
    x = jnp.round(3 * measured.x).astype(jnp.int32)

    def grads(layer):
        graph, params, rest = nnx.split(layer, nnx.Param, ...)

        def loss(params):
            return (nnx.merge(graph, params, rest)(x) * measured.y_bar).sum()

        return jax.jit(jax.value_and_grad(loss))(params)

    close(grads(one.ours()), grads(one.flax()))


# Flax's API.


LAYERS = sorted({one.layer for one in CASES.values()})


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_every_argument_of_flax_is_taken_and_kept(name, how):
    one = CASES[name]
    flax_layer = getattr(nnx, one.layer)
    parameters = dict(list(inspect.signature(flax_layer.__init__).parameters.items())[1:])
    names = list(parameters)
    draws = {"kernel_init": noise, "bias_init": noise}
    given = dict(zip(names, one.args, strict=False)) | one.kwargs | draws
    for key, parameter in parameters.items():  # the defaults, said aloud
        if parameter.default is not inspect.Parameter.empty:
            given.setdefault(key, parameter.default)
    positional = [
        given.pop(key)
        for key, parameter in parameters.items()
        if how == "positional" and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    ours = getattr(soap_nnx, "Feedback" + one.layer)(
        *positional, **given, feedback_init=noise, rngs=nnx.Rngs(1)
    )
    flax = one.flax()
    equal(params_of(ours), params_of(flax))
    for key, value in vars(flax).items():
        if not key.startswith("_") and not isinstance(value, nnx.Variable):
            assert getattr(ours, key) == value, key


@pytest.mark.parametrize("layer", LAYERS)
def test_misspelt_arguments_raise(layer):
    one = next(one for one in CASES.values() if one.layer == layer)
    with pytest.raises(TypeError, match="kernel_initialiser"):
        one.ours(kernel_initialiser=noise)


def test_einsum_takes_its_string_when_called():
    layer = CASES["einsum"].ours()
    x = draw(0, (2, 5, 3))

    def x_bar(*args, **kwargs):
        return jax.grad(lambda x: jnp.sin(layer(x, *args, **kwargs)).sum())(x)

    swapped = "bti,iho->tbho"
    close(x_bar(swapped), x_bar())
    close(x_bar(einsum_str=swapped), x_bar())
    assert layer(x, einsum_str=swapped).shape == (5, 2, 4, 7)


@pytest.mark.parametrize("name", ["linear", "general", "einsum", "conv_2d"])
def test_out_sharding_is_passed_on(name, mesh):
    one = CASES[name]
    x = draw(0, one.shape)
    spec = jax.sharding.PartitionSpec()
    ours, flax = one.ours(), one.flax()
    if "out_sharding" not in inspect.signature(flax.__call__).parameters:
        pytest.skip("this Flax has no out_sharding")
    flax.kernel[...] = ours.feedback[...]

    def x_bar(layer):
        return jax.jit(jax.grad(lambda x: layer(x, out_sharding=spec).sum()))(x)

    close(x_bar(ours), x_bar(flax))


def test_inputs_may_be_given_by_keyword():
    layer, x = CASES["linear"].ours(), draw(0, (4, 3))
    equal(layer(inputs=x), layer(x))


def test_feedback_init_draws_the_feedback_only():
    layer = CASES["general"].ours(feedback_init=nnx.initializers.constant(7.0))
    equal(layer.feedback[...], jnp.full((3, 2, 5), 7.0))
    equal(params_of(layer), params_of(CASES["general"].flax()))


def test_feedback_is_drawn_as_linen_draws_it_over_the_flattened_axes():
    layer = soap_nnx.FeedbackLinearGeneral(
        (3, 6),
        (20, 50),
        axis=(-2, -1),
        feedback_init=nnx.initializers.glorot_normal(),
        rngs=nnx.Rngs(0, feedback=1),
    )
    glorot = math.sqrt(2 / (3 * 6 + 20 * 50))
    np.testing.assert_allclose(layer.feedback[...].std(), glorot, rtol=0.05)  # 18,000 draws


def test_subclasses_of_the_layers_work():
    class Mine(soap_nnx.FeedbackLinear):
        """A user's own."""

    x, y_bar = draw(0, (4, 3)), draw(1, (4, 5))
    mine, ours = (cls(3, 5, rngs=nnx.Rngs(0)) for cls in (Mine, soap_nnx.FeedbackLinear))
    args = params_of(ours), feedback_of(ours), x, y_bar
    equal(nnx.state(mine), nnx.state(ours))
    equal(pull_back(mine)(*args), pull_back(ours)(*args))


def test_wrong_shape_raises():
    layer = CASES["linear"].ours()
    layer.feedback = soap_nnx.Feedback(jnp.ones((5, 3)))
    with pytest.raises(ValueError, match=r"has shape \(5, 3\); expected \(3, 5\)"):
        layer(jnp.ones((4, 3)))


def test_forward_mode_raises():
    layer, x = CASES["linear"].ours(), jnp.ones((4, 3))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(layer, (x,), (x,))


# Models.


class Net(nnx.Module):
    """A three-layer model of our layers or Flax's."""

    def __init__(self, own, rngs):
        dense = soap_nnx.FeedbackLinear if own else nnx.Linear
        self.hidden = nnx.Linear(3, 7, rngs=rngs)
        self.layers = nnx.List([dense(7, 5, rngs=rngs), dense(5, 4, rngs=rngs)])

    def __call__(self, x):
        x = jnp.tanh(self.hidden(x))
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def loss(model, x, targets):
    return ((model(x) - targets) ** 2).mean()


X, TARGETS = draw(0, (6, 3)), draw(1, (6, 4))


def with_kernels_as_feedback(model):
    for layer in model.layers:
        layer.feedback[...] = layer.kernel[...]
    return model


@pytest.mark.parametrize("streams", [{"default": 0}, {"params": 0}, {"params": 0, "feedback": 1}])
def test_model_draws_the_params_of_the_model_of_flax_layers(streams):
    ours, flax = Net(True, nnx.Rngs(**streams)), Net(False, nnx.Rngs(**streams))
    equal(params_of(ours), params_of(flax))
    equal(ours(X), flax(X))
    first, second = (layer.feedback[...].ravel()[:9] for layer in ours.layers)
    assert differ(first, second)  # every layer has a draw of its own


@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_model_with_equal_feedback_has_flax_gradients(jit):
    ours, flax = with_kernels_as_feedback(Net(True, nnx.Rngs(0))), Net(False, nnx.Rngs(0))
    grads = jit(nnx.grad(loss))(ours, X, TARGETS)
    exact = jit(nnx.grad(loss))(flax, X, TARGETS)
    close(grads, exact)
    pseudo = jit(nnx.grad(loss))(Net(True, nnx.Rngs(0)), X, TARGETS)
    close(pseudo["layers"][1], exact["layers"][1])
    assert differ(pseudo["hidden"]["kernel"][...], exact["hidden"]["kernel"][...])


def test_sequential_model_works():
    rngs, flax_rngs = nnx.Rngs(0), nnx.Rngs(0)
    ours = nnx.Sequential(
        nnx.Linear(3, 5, rngs=rngs), jnp.tanh, soap_nnx.FeedbackLinear(5, 2, rngs=rngs)
    )
    flax = nnx.Sequential(
        nnx.Linear(3, 5, rngs=flax_rngs), jnp.tanh, nnx.Linear(5, 2, rngs=flax_rngs)
    )
    equal(ours(X), flax(X))


def test_feedback_is_no_param_and_has_no_gradient_unless_asked():
    model = CASES["linear"].ours()
    assert not isinstance(model.feedback, nnx.Param)
    assert set(params_of(model)) == {"kernel", "bias"}
    assert set(feedback_of(model)) == {"feedback"}

    def total(model):
        return model(X).sum()

    both = nnx.DiffState(0, (nnx.Param, soap_nnx.Feedback))
    assert set(nnx.grad(total)(model)) == {"kernel", "bias"}
    assert not nnx.grad(total, argnums=both)(model)["feedback"][...].any()
    asked = nnx.grad(total, argnums=both)(CASES["linear"].ours(feedback_bar="kernel"))
    equal(asked["feedback"][...], asked["kernel"][...])
    assert asked["kernel"][...].any()


def test_split_merge_and_clone_keep_feedback():
    model = Net(True, nnx.Rngs(0))
    graph, params, feedback = nnx.split(model, nnx.Param, soap_nnx.Feedback)
    again, copy = nnx.merge(graph, params, feedback), nnx.clone(model)
    for other in (again, copy):
        equal(nnx.state(other), nnx.state(model))
        equal(nnx.grad(loss)(other, X, TARGETS), nnx.grad(loss)(model, X, TARGETS))
    copy.layers[0].feedback[...] = jnp.zeros((7, 5))
    assert model.layers[0].feedback[...].any()


def test_eval_shape_gives_the_shapes_of_the_model():
    shapes = nnx.eval_shape(lambda: Net(True, nnx.Rngs(0)))
    model = Net(True, nnx.Rngs(0))
    assert isinstance(shapes.layers[0].feedback.get_value(), jax.ShapeDtypeStruct)
    assert [leaf.shape for leaf in jax.tree.leaves(nnx.state(shapes))] == [
        leaf.shape for leaf in jax.tree.leaves(nnx.state(model))
    ]


def test_layers_that_flax_makes_can_be_replaced():
    """Of attention and of a GRU's cell, as the module's docstring shows."""
    rngs, x = nnx.Rngs(0), draw(0, (2, 5, 6))
    attention = nnx.MultiHeadAttention(2, in_features=6, decode=False, rngs=rngs)
    exact = nnx.clone(attention)
    for name in ("query", "key", "value"):
        layer = soap_nnx.FeedbackLinearGeneral(6, (2, 3), rngs=rngs)
        layer.kernel, layer.bias = getattr(attention, name).kernel, getattr(attention, name).bias
        setattr(attention, name, layer)

    @functools.partial(nnx.grad, argnums=(0, 1))
    def grads(model, x):
        return jnp.sin(model(x)).sum()

    equal(attention(x), exact(x))
    assert differ(grads(attention, x)[1], grads(exact, x)[1])
    for name in ("query", "key", "value"):
        getattr(attention, name).feedback[...] = getattr(attention, name).kernel[...]
    close(grads(attention, x), grads(exact, x))
    assert set(feedback_of(attention)) == {"query", "key", "value"}

    rnn = nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs))
    exact = nnx.clone(rnn)
    rnn.cell.dense_h = soap_nnx.FeedbackLinear(4, 12, use_bias=False, rngs=rngs)
    rnn.cell.dense_h.kernel = exact.cell.dense_h.kernel
    x = draw(1, (2, 5, 3))
    equal(rnn(x), exact(x))
    pseudo, true = grads(rnn, x)[0]["cell"], grads(exact, x)[0]["cell"]
    assert differ(pseudo["dense_i"]["kernel"][...], true["dense_i"]["kernel"][...])
    rnn.cell.dense_h.feedback[...] = rnn.cell.dense_h.kernel[...]
    close(grads(rnn, x), grads(exact, x))


def test_layers_set_to_none_backpropagate():
    ours, flax = Net(True, nnx.Rngs(0)), Net(False, nnx.Rngs(0))
    nnx.update(ours, filled(feedback_of(ours), None))
    assert ours.layers[0].feedback.get_value() is None
    close(nnx.jit(nnx.grad(loss))(ours, X, TARGETS), nnx.grad(loss)(flax, X, TARGETS))


# Transforms.


def stack_of(layer, streams):
    @nnx.split_rngs(splits=5)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return layer(3, 3, kernel_init=noise, bias_init=noise, rngs=rngs)

    return make(nnx.Rngs(**streams))


def of_member(state, i):
    return jax.tree.map(lambda leaf: leaf[i], state)


def through_stack(stack, x, *, remat=False):
    def one(layer, x):
        return jnp.tanh(layer(x))

    one = nnx.remat(one) if remat else one
    return nnx.scan(one, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(stack, x)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("streams", [{"default": 0}, {"params": 0, "feedback": 1}])
def test_scanned_stack_equals_a_loop_over_its_layers(streams, remat):
    stack = stack_of(soap_nnx.FeedbackLinear, streams)
    equal(params_of(stack), params_of(stack_of(nnx.Linear, streams)))
    assert stack.feedback.shape == (5, 3, 3)
    assert differ(stack.feedback[0], stack.feedback[1])
    graph, _ = nnx.split(soap_nnx.FeedbackLinear(3, 3, rngs=nnx.Rngs(0)))

    def loop(stack, x):
        state = nnx.state(stack)
        for i in range(5):
            x = jnp.tanh(nnx.merge(graph, of_member(state, i))(x))
        return x

    def grads(through):
        def total(stack, x):
            return jnp.sin(through(stack, x)).sum()

        return nnx.jit(nnx.grad(total, argnums=(0, 1)))(stack, X)

    close(grads(functools.partial(through_stack, remat=remat)), grads(loop))


def test_scanned_stack_with_equal_feedback_has_flax_gradients():
    stack = stack_of(soap_nnx.FeedbackLinear, {"default": 0})
    flax = stack_of(nnx.Linear, {"default": 0})

    @nnx.jit
    @functools.partial(nnx.grad, argnums=(0, 1))
    def grads(stack, x):
        return jnp.sin(through_stack(stack, x)).sum()

    exact, exact_x_bar = grads(flax, X)
    _, x_bar = grads(stack, X)
    assert differ(x_bar, exact_x_bar)
    stack.feedback[...] = stack.kernel[...]
    close(grads(stack, X), (exact, exact_x_bar))


@pytest.mark.parametrize("name", ["linear", "conv_masked_by_jax_array"])
def test_remat_changes_nothing(name):
    layer, x = CASES[name].ours(), measure(name).x

    def total(layer, x):
        return jnp.sin(layer(x)).sum()

    grads = nnx.jit(nnx.grad(total, argnums=(0, 1)))
    close(nnx.jit(nnx.grad(nnx.remat(total), argnums=(0, 1)))(layer, x), grads(layer, x))


def test_vmapped_layers_equal_a_loop_over_members():
    stack = stack_of(soap_nnx.FeedbackLinear, {"default": 0})
    graph, _ = nnx.split(soap_nnx.FeedbackLinear(3, 3, rngs=nnx.Rngs(0)))

    def total(layer, x):
        return jnp.sin(layer(x)).sum()

    grads = nnx.grad(total, argnums=(0, 1))
    many = nnx.jit(nnx.vmap(grads, in_axes=(0, None)))(stack, X)
    for i in range(5):
        one = nnx.merge(graph, of_member(nnx.state(stack), i))
        close(of_member(many, i), grads(one, X))


# Training.


def test_optimizer_trains_and_leaves_feedback_alone():
    model = Net(True, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)
    traces = 0

    @nnx.jit
    def step(model, optimizer):
        nonlocal traces
        traces += 1
        value, grads = nnx.value_and_grad(loss)(model, X, TARGETS)
        optimizer.update(model, grads)
        return value

    before = jax.tree.map(jnp.copy, nnx.state(model))
    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert traces == 1
    after = nnx.state(model)
    for old, new in zip(before["layers"].values(), after["layers"].values(), strict=True):
        equal(old["feedback"], new["feedback"])
        assert (old["kernel"][...] != new["kernel"][...]).any()


def test_weight_decay_does_not_shrink_feedback():
    model = Net(True, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3, weight_decay=500.0), wrt=nnx.Param)
    feedback, kernel = jax.tree.map(jnp.copy, feedback_of(model)), model.layers[0].kernel[...]
    optimizer.update(model, nnx.grad(loss)(model, X, TARGETS))
    equal(feedback_of(model), feedback)
    assert jnp.linalg.norm(model.layers[0].kernel[...]) < 0.6 * jnp.linalg.norm(kernel)


def test_synced_feedback_goes_back_into_the_model_under_jit():
    model = Net(True, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)
    rule = rules.SignSync(period=2, magnitude="unit")
    state = init_feedback(jax.random.key(0), params_of(model), rule, feedback=feedback_of(model))
    equal(state.feedback, feedback_of(model))

    @nnx.jit
    def step(model, optimizer, state, number):
        state = sync_feedback(params_of(model), state, number)
        nnx.update(model, state.feedback)
        optimizer.update(model, nnx.grad(loss)(model, X, TARGETS))
        return state

    for number in range(4):
        kernels = [layer.kernel[...] for layer in model.layers]
        before = [layer.feedback[...] for layer in model.layers]
        state = step(model, optimizer, state, number)
        expected = [jnp.sign(kernel) for kernel in kernels] if number % 2 == 0 else before
        equal([layer.feedback[...] for layer in model.layers], expected)
        equal(state.feedback, feedback_of(model))
        assert all(
            differ(layer.kernel[...], kernel)
            for layer, kernel in zip(model.layers, kernels, strict=True)
        )


@pytest.mark.parametrize(
    "name", ["general_two_axes", "general_batch_axis", "einsum", "conv_groups"]
)
def test_sync_keeps_the_layouts(name):
    layer = CASES[name].ours()
    state = init_feedback(
        jax.random.key(0),
        params_of(layer),
        rules.SignSync(magnitude="unit"),
        feedback=feedback_of(layer),
    )
    nnx.update(layer, sync_feedback(params_of(layer), state, 0).feedback)
    equal(layer.feedback[...], jnp.sign(layer.kernel[...]))
    layer(measure(name).x)


# Sharding and other metadata


LAYERS = {  # arguments, and the axes of the kernel
    "FeedbackLinear": ((4, 8), 2),
    "FeedbackLinearGeneral": ((4, (2, 8)), None),
    "FeedbackEinsum": (("bi,io->bo", (4, 8)), 2),
    "FeedbackConv": ((4, 8, (3,)), 3),
    "FeedbackConvTranspose": ((4, 8, (3,)), 3),
}


@pytest.fixture
def auto(auto_mesh):
    with jax.set_mesh(auto_mesh):
        yield


@pytest.mark.parametrize("own_init", [False, True])
@pytest.mark.parametrize("by", ["init", "metadata"])
@pytest.mark.parametrize("name", LAYERS)
def test_feedback_has_its_kernels_partition_spec(name, by, own_init, auto):
    args, rank = LAYERS[name]
    names = (*[None] * ((rank or 3) - 1), "data")
    init = nnx.initializers.lecun_normal()
    if by == "init" and rank is not None:  # LinearGeneral draws a flat kernel
        more = {"kernel_init": nnx.with_partitioning(init, names)}
    else:
        more = {"kernel_metadata": {"out_sharding": names, "tag": "ours"}}
    if own_init:
        more["feedback_init"] = init
    if (
        "kernel_metadata" in more
        and "kernel_metadata"
        not in inspect.signature(getattr(nnx, name.removeprefix("Feedback")).__init__).parameters
    ):
        pytest.skip("this Flax has no kernel_metadata")
    layer = getattr(soap_nnx, name)(*args, rngs=nnx.Rngs(0), **more)
    specs = nnx.get_partition_spec(nnx.state(layer))
    assert specs["feedback"].get_value() == specs["kernel"].get_value()
    if "kernel_init" in more:  # of metadata older versions of Flax read other names
        assert specs["kernel"].get_value() == P(*names)
    assert layer.feedback[...].sharding == layer.kernel[...].sharding
    assert layer.feedback.get_metadata() == layer.kernel.get_metadata()
    state = init_feedback(
        jax.random.key(0), params_of(layer), rules.SignSync(), feedback=feedback_of(layer)
    )
    nnx.update(layer, sync_feedback(params_of(layer), state, 0).feedback)
    assert layer.feedback.get_metadata() == layer.kernel.get_metadata()
    assert layer.feedback[...].sharding == layer.kernel[...].sharding


def test_feedback_init_may_bring_a_sharding_of_its_own(auto):
    init = nnx.initializers.lecun_normal()
    layer = soap_nnx.FeedbackLinear(
        4,
        8,
        rngs=nnx.Rngs(0),
        kernel_init=nnx.with_partitioning(init, (None, "data")),
        feedback_init=nnx.with_partitioning(init, ("data", None)),
    )
    specs = nnx.get_partition_spec(nnx.state(layer))
    assert specs["kernel"].get_value() == P(None, "data")
    assert specs["feedback"].get_value() == P("data", None)


def test_the_recipe_for_sharded_models_shards_feedback_like_its_kernel(auto):
    @nnx.jit
    def create():
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "data"))
        layer = soap_nnx.FeedbackLinear(8, 8, rngs=nnx.Rngs(0), kernel_init=init)
        state = nnx.state(layer)
        nnx.update(layer, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
        return layer

    layer = create()
    assert layer.feedback[...].sharding.spec == layer.kernel[...].sharding.spec == P(None, "data")


# Bridges between Linen and NNX


X_BRIDGE = np.cos(np.arange(12, dtype=np.float32)).reshape(4, 3)


def x_bar_by_hand(y, feedback):
    return 2 * np.asarray(y) @ np.asarray(feedback).T


def test_linens_layer_works_within_nnx():
    linen_layer = linen.FeedbackDense(2, feedback_name="feedback")
    rngs = nnx.Rngs(params=0, feedback=1)
    layer = nnx.bridge.ToNNX(linen_layer, rngs=rngs).lazy_init(X_BRIDGE)
    assert isinstance(layer.feedback, soap_nnx.Feedback)
    x_bar = nnx.grad(lambda layer, x: jnp.sum(layer(x) ** 2), argnums=1)(layer, X_BRIDGE)
    close(x_bar, x_bar_by_hand(layer(X_BRIDGE), layer.feedback[...]))
    params, feedback = params_of(layer), feedback_of(layer)
    state = init_feedback(jax.random.key(0), params, rules.Transport(), feedback=feedback)
    nnx.update(layer, sync_feedback(params, state, 0).feedback)
    equal(layer.feedback[...], layer.kernel[...])
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(layer, nnx.grad(lambda layer: jnp.sum(layer(X_BRIDGE) ** 2))(layer))
    assert differ(layer.feedback[...], layer.kernel[...])


def test_a_linen_model_within_nnx_keeps_boxes_and_pairs(auto):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "data"))
    model = nn.Sequential(
        [nn.Dense(8), linen.FeedbackDense(4, kernel_init=init, feedback_name="feedback")]
    )
    wrapped = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(X_BRIDGE)
    specs = nnx.get_partition_spec(nnx.state(wrapped))["layers_1"]
    assert specs["feedback"].get_value() == specs["kernel"].get_value() == P(None, "data")
    pairs = trees.by_kernel(params_of(wrapped), feedback_of(wrapped))
    assert list(pairs) == [("layers_1", "kernel")]


@pytest.mark.parametrize("shard", [False, True])
def test_our_layer_works_within_linen(shard, auto):
    init = nnx.initializers.lecun_normal()
    more = {"kernel_init": nnx.with_partitioning(init, (None, "data"))} if shard else {}
    model = nnx.bridge.ToLinen(soap_nnx.FeedbackLinear, args=(3, 4), kwargs=more)
    variables = model.init(jax.random.key(0), X_BRIDGE)
    params, feedback = variables["params"], variables["feedback"]
    spec = nn.get_partition_spec(variables)
    assert spec["feedback"]["feedback"] == spec["params"]["kernel"]
    assert spec["params"]["kernel"] == (P(None, "data") if shard else P())

    @jax.jit
    def x_bar_and_y(params, feedback, x):
        def apply(x):
            return model.apply({"params": params, "feedback": feedback}, x)

        return jax.grad(lambda x: jnp.sum(apply(x) ** 2))(x), apply(x)

    state = init_feedback(jax.random.key(1), params, rules.SignSync(), feedback=feedback)
    state = sync_feedback(params, state, 0)
    x_bar, y = x_bar_and_y(params, state.feedback, X_BRIDGE)
    (leaf,) = jax.tree.leaves(state.feedback)
    close(x_bar, x_bar_by_hand(y, leaf))


def test_attention_with_linens_hook_works_within_nnx():
    hook = functools.partial(linen.FeedbackDotGeneral, feedback_name="feedback")
    model = nn.MultiHeadDotProductAttention(1, qkv_dot_general_cls=hook)
    layer = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(X_BRIDGE)
    pairs = trees.by_kernel(params_of(layer), feedback_of(layer))
    assert {path[0] for path in pairs} == {"query", "key", "value"}


def test_direct_feedback_works_through_both_bridges():
    output, hidden = jnp.ones((4, 3)), jnp.ones((4, 7))
    module = nnx.bridge.ToNNX(linen.DirectFeedback(), rngs=nnx.Rngs(0))
    module = module.lazy_init(output, hidden)
    assert isinstance(module.projection, soap_nnx.Projection)
    model = nnx.bridge.ToLinen(soap_nnx.DirectFeedback, args=(3, 7))
    variables = model.init(jax.random.key(0), output, hidden)
    bar = nnx.grad(lambda m, hidden: m(output, hidden).sum(), argnums=1)(module, hidden)
    close(bar, jnp.ones((4, 3)) @ module.projection[...])
    bar = jax.grad(lambda hidden: model.apply(variables, output, hidden).sum())(hidden)
    close(bar, jnp.ones((4, 3)) @ variables["projection"]["projection"])


@pytest.mark.parametrize("rngs", [0, None, jax.random.key(0)], ids=["0", "None", "key"])
def test_what_are_no_streams_of_keys_raises(rngs):
    with pytest.raises(ValueError, match=r"(?s)rngs is .*; expected an nnx.Rngs, such as"):
        soap_nnx.FeedbackLinear(3, 2, rngs=rngs)
    with pytest.raises(ValueError, match=r"expected an nnx\.Rngs"):
        soap_nnx.DirectFeedback(3, 2, rngs=rngs)
