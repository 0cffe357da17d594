"""Linen layers: Flax's own layers, but for the way back to their input."""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec

from soap_jax import init_feedback, linen, metrics, rules, sync_feedback


def noise(key, shape, dtype=jnp.float32):
    """An initialiser: another array for every key, but unlike Flax's compiled in no time."""
    return _noise(key, tuple(shape), dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _noise(key, shape, dtype):
    scale = jax.random.key_data(key)[0].astype(jnp.float32) / 2.0**24
    return jnp.sin(scale * jnp.arange(1.0, 1 + math.prod(shape))).reshape(shape).astype(dtype)


mask = np.tril(np.ones((3, 2, 4), np.float32))  # (window, in, out)


class Case(NamedTuple):
    """One of Flax's layers, its arguments, and the shape of its input."""

    layer: str
    shape: tuple[int, ...]
    fields: dict[str, Any]

    def ours(self, **changes):
        layer = getattr(linen, "Feedback" + self.layer)
        return layer(**self.fields | {"feedback_init": noise} | changes)

    def flax(self, **changes):
        return getattr(nn, self.layer)(**self.fields | changes)


def case(layer, shape, /, **fields):
    draws = dict.fromkeys(("kernel_init", "bias_init"), noise)
    return Case(layer, shape, draws | fields)


CASES = {
    "dense": case("Dense", (4, 3), features=5),
    "dense_unbatched": case("Dense", (3,), features=5),
    "dense_without_bias": case("Dense", (4, 3), features=5, use_bias=False),
    "general": case("DenseGeneral", (4, 3), features=(2, 5)),
    "general_two_axes": case("DenseGeneral", (4, 3, 6), features=(2, 5), axis=(-2, -1)),
    "general_middle_axis": case("DenseGeneral", (4, 3, 6), features=5, axis=1),
    "general_batch_dims": case("DenseGeneral", (4, 2, 3), features=5, batch_dims=(0,)),
    "einsum": case("Einsum", (2, 5, 3), shape=(3, 4, 7), einsum_str="bti,iho->btho"),
    "einsum_ellipsis": case("Einsum", (2, 5, 3), shape=(3, 7), einsum_str="...i,io->...o"),
    "einsum_batched": case("Einsum", (2, 5, 3), shape=(5, 3, 4), einsum_str="bti,tio->bto"),
    "conv_1d_causal": case(
        "Conv", (2, 7, 3), features=4, kernel_size=(3,), padding="CAUSAL", kernel_dilation=2
    ),
    "conv_2d": case("Conv", (2, 6, 5, 3), features=4, kernel_size=(3, 2)),
    "conv_3d": case("Conv", (2, 4, 5, 3, 2), features=3, kernel_size=(2, 3, 1)),
    "conv_strided": case(
        "Conv", (2, 7, 6, 3), features=4, kernel_size=(3, 2), strides=(2, 3), padding="VALID"
    ),
    "conv_groups": case(
        "Conv", (2, 5, 6, 6), features=9, kernel_size=(3, 2), feature_group_count=3
    ),
    "conv_dilated": case(
        "Conv",
        (2, 6, 7, 3),
        features=4,
        kernel_size=(3, 2),
        kernel_dilation=(2, 1),
        input_dilation=(1, 2),
        padding=2,
    ),
    "conv_circular": case(
        "Conv", (2, 6, 5, 3), features=4, kernel_size=(3, 2), strides=2, padding="CIRCULAR"
    ),
    "conv_reflect": case("Conv", (2, 6, 3), features=4, kernel_size=(3,), padding="REFLECT"),
    "conv_masked": case("Conv", (2, 7, 2), features=4, kernel_size=(3,), mask=mask),
    "conv_unbatched": case("Conv", (6, 5, 3), features=4, kernel_size=(3, 2)),
    "conv_two_batch_axes": case("Conv", (2, 3, 6, 3), features=4, kernel_size=(3,)),
    "transpose_strided": case(
        "ConvTranspose", (2, 4, 3, 3), features=5, kernel_size=(3, 2), strides=(2, 3)
    ),
    "transpose_kernel": case(
        "ConvTranspose",
        (2, 4, 3, 3),
        features=5,
        kernel_size=(3, 2),
        strides=(2, 1),
        transpose_kernel=True,
    ),
    "transpose_dilated": case(
        "ConvTranspose",
        (2, 5, 3),
        features=4,
        kernel_size=(3,),
        kernel_dilation=(2,),
        padding="VALID",
    ),
    "transpose_circular": case(
        "ConvTranspose", (2, 5, 3), features=4, kernel_size=(4,), strides=(2,), padding="CIRCULAR"
    ),
    "transpose_masked": case("ConvTranspose", (2, 5, 2), features=4, kernel_size=(3,), mask=mask),
    "transpose_unbatched": case("ConvTranspose", (5, 3), features=4, kernel_size=(3,)),
}
ONE_OF_EACH = ("dense", "general_two_axes", "einsum", "conv_2d", "transpose_strided")

each_case = pytest.mark.parametrize("name", CASES)
one_of_each = pytest.mark.parametrize("name", ONE_OF_EACH)


def draw(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def equal(a, b):
    """Bit-identical trees, dtypes included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def close(a, b, tolerance=1e-5):
    """Trees equal to float32 rounding, dtypes included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=tolerance, atol=tolerance
        )


def differ(a, b):
    return np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max() > 1e-2


def pull_back(model):
    """A jitted `(params, feedback, x, y_bar) -> (y, (params_bar, feedback_bar, x_bar))`."""

    @jax.jit
    def f(params, feedback, x, y_bar):
        def apply(params, feedback, x):
            return model.apply({"params": params, "feedback": feedback}, x)

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
    x = draw(0, one.shape)
    variables = one.ours().init(jax.random.key(1), x)
    params, feedback = variables["params"], variables["feedback"]
    y_bar = draw(2, jax.eval_shape(one.flax().apply, {"params": params}, x).shape)
    flax, ours, learned = map(pull_back, (one.flax(), one.ours(), one.ours(feedback_bar="kernel")))

    @jax.jit
    def ours_in_every_way(params, feedback, x, y_bar):
        others = (feedback, {"kernel": params["kernel"]}, {"kernel": None})
        in_place = (ours(params, other, x, y_bar) for other in others)
        return *in_place, learned(params, feedback, x, y_bar)

    return Measured(
        params,
        feedback,
        x,
        y_bar,
        flax(params, feedback, x, y_bar),
        flax(params | feedback, feedback, x, y_bar),
        *ours_in_every_way(params, feedback, x, y_bar),
    )


# The battery, run over every layer.


@each_case
def test_same_key_gives_flax_params(name):
    one, key = CASES[name], jax.random.key(1)
    x, init = draw(0, one.shape), one.ours().init
    flax, fallback, only_params = one.flax().init(key, x), init(key, x), init({"params": key}, x)
    two, three = (init({"params": key, "feedback": jax.random.key(seed)}, x) for seed in (2, 3))
    for variables in (fallback, only_params, two, three):
        equal(variables["params"], flax["params"])
    equal(fallback, only_params)
    assert jax.tree.map(jnp.shape, two["feedback"]) == {"kernel": flax["params"]["kernel"].shape}
    kernels = [v["feedback"]["kernel"] for v in (two, three, fallback)]
    assert differ(kernels[0], kernels[1])  # it follows the stream "feedback"
    assert differ(kernels[2], kernels[0])
    assert all(differ(kernel, flax["params"]["kernel"]) for kernel in kernels)


@each_case
def test_forward_pass_is_bit_identical_to_flax(name):
    measured, one = measure(name), CASES[name]
    for y, _ in (measured.ours, measured.at_kernel, measured.at_none, measured.learned):
        equal(y, measured.exact[0])
    variables = {"params": measured.params, "feedback": measured.feedback}
    outside_jit = one.ours().apply(variables, measured.x)
    equal(outside_jit, one.flax().apply({"params": measured.params}, measured.x))


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
    close(feedback_bar, {"kernel": measured.exact[1][0]["kernel"]})
    close(params_bar, measured.exact[1][0])
    close(x_bar, measured.at_feedback[1][2])


@one_of_each
def test_feedback_bar_may_be_a_function_of_the_activities(name):
    def feedback_bar(op, x, kernel, feedback, y_bar):
        return 3 * feedback - kernel + x.sum() * (op(x, kernel) * y_bar).sum()

    measured = measure(name)
    f = pull_back(CASES[name].ours(feedback_bar=feedback_bar))
    y, (params_bar, got, x_bar) = f(measured.params, measured.feedback, measured.x, measured.y_bar)
    kernel, feedback = measured.params["kernel"], measured.feedback["kernel"]
    product = np.asarray(y) - np.asarray(measured.params.get("bias", 0))
    expected = feedback_bar(lambda *_: product, measured.x, kernel, feedback, measured.y_bar)
    close(got, {"kernel": expected}, 1e-4)  # sums over the batch, in another order
    close(params_bar, measured.exact[1][0])
    close(x_bar, measured.at_feedback[1][2])


# Dtypes and precision.


@one_of_each
def test_bfloat16_computation_with_float32_params_agrees_with_flax(name):
    measured, one = measure(name), CASES[name]
    y_bar = measured.y_bar.astype(jnp.bfloat16)
    ours, flax = pull_back(one.ours(dtype=jnp.bfloat16)), pull_back(one.flax(dtype=jnp.bfloat16))
    params, feedback, x = measured.params, measured.feedback, measured.x
    y, (params_bar, feedback_bar, x_bar) = ours(params, feedback, x, y_bar)
    exact_y, (exact_params_bar, _, _) = flax(params, feedback, x, y_bar)
    _, (_, _, exact_x_bar) = flax(params | feedback, feedback, x, y_bar)
    assert y.dtype == jnp.bfloat16
    equal(y, exact_y)
    equal(jax.tree.map(jnp.zeros_like, feedback), feedback_bar)
    # one rounding of bfloat16 (2^-8) on values of a few units
    close(params_bar, exact_params_bar, 2e-2)
    close(x_bar, exact_x_bar, 2e-2)
    assert x_bar.dtype == params_bar["kernel"].dtype == jnp.float32


@one_of_each
def test_feedback_has_the_dtype_of_the_params(name):
    x = jnp.ones(CASES[name].shape, jnp.bfloat16)
    variables = jax.eval_shape(
        CASES[name].ours(param_dtype=jnp.bfloat16).init, jax.random.key(0), x
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("bfloat16")}


@one_of_each
def test_feedback_of_another_float_dtype_works(name):
    measured = measure(name)
    feedback = jax.tree.map(lambda b: b.astype(jnp.bfloat16), measured.feedback)
    rounded = jax.tree.map(lambda b: b.astype(jnp.float32), feedback)
    f = pull_back(CASES[name].ours())
    y, (params_bar, feedback_bar, x_bar) = f(measured.params, feedback, measured.x, measured.y_bar)
    _, (_, _, expected) = f(measured.params, rounded, measured.x, measured.y_bar)
    assert feedback_bar["kernel"].dtype == jnp.bfloat16
    close(x_bar, expected)
    close(params_bar, measured.exact[1][0])
    equal(y, measured.exact[0])


@one_of_each
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("stored", [jnp.int8, jnp.bfloat16])
def test_feedback_stored_in_fewer_bits_gives_the_bits_of_its_values(name, dtype, stored):
    measured = measure(name)
    params, x, y_bar = measured.params, measured.x, measured.y_bar.astype(dtype or jnp.float32)
    state = init_feedback(jax.random.key(0), params, feedback=measured.feedback, dtype=stored)
    values = jax.tree.map(lambda b: b.astype(jnp.float32), state.feedback)

    @jax.jit
    def x_and_params_bar(params, feedback, x, y_bar):
        model = CASES[name].ours(dtype=dtype)

        def apply(params, x):
            return model.apply({"params": params, "feedback": feedback}, x)

        return jax.vjp(apply, params, x)[1](y_bar)

    got, expected = (x_and_params_bar(params, b, x, y_bar) for b in (state.feedback, values))
    equal(got, expected)
    assert differ(got[1], 0)


@one_of_each
@pytest.mark.parametrize("dtype", [jnp.bfloat16, "int8"])
def test_feedback_dtype_says_how_feedback_is_stored_and_changes_no_draw(name, dtype):
    x = draw(0, CASES[name].shape)
    plain, stored = (CASES[name].ours(**more) for more in ({}, {"feedback_dtype": dtype}))
    expected, variables = plain.init(jax.random.key(1), x), stored.init(jax.random.key(1), x)
    equal(variables["params"], expected["params"])
    kernel = expected["feedback"]["kernel"]
    values = jnp.sign(kernel) if dtype == "int8" else kernel
    equal(variables["feedback"]["kernel"], values.astype(dtype))


def test_feedback_dtype_keeps_the_box():
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    layer = linen.FeedbackDense(5, kernel_init=boxed, feedback_dtype=jnp.bfloat16)
    feedback = layer.init(jax.random.key(0), draw(0, (4, 3)))["feedback"]["kernel"]
    assert feedback.names == (None, "model") and feedback.unbox().dtype == jnp.bfloat16


@pytest.fixture
def x64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@one_of_each
def test_float64_is_kept_throughout(name, x64):
    one = CASES[name]
    x = draw(0, one.shape, jnp.float64)
    variables = one.ours(param_dtype=jnp.float64).init(jax.random.key(1), x)
    params, feedback = variables["params"], variables["feedback"]
    assert feedback["kernel"].dtype == jnp.float64
    y_bar = draw(2, jax.eval_shape(one.flax().apply, {"params": params}, x).shape, jnp.float64)
    y, (params_bar, _, x_bar) = pull_back(one.ours())(params, feedback, x, y_bar)
    flax = pull_back(one.flax())
    exact_y, (exact_params_bar, _, _) = flax(params, feedback, x, y_bar)
    _, (_, _, exact_x_bar) = flax(params | feedback, feedback, x, y_bar)
    equal(y, exact_y)
    close(params_bar, exact_params_bar, 1e-13)
    close(x_bar, exact_x_bar, 1e-13)


@one_of_each
def test_precision_reaches_every_product(name):
    measured = measure(name)
    f = pull_back(CASES[name].ours(precision="highest"))
    text = f.lower(measured.params, measured.feedback, measured.x, measured.y_bar).as_text()
    products = [
        line
        for line in text.splitlines()
        if re.search(r"stablehlo\.(dot_general|convolution)", line)
    ]
    assert len(products) == 3  # forward, kernel's cotangent, input's cotangent
    assert all(line.count("HIGHEST") == 2 for line in products)


@pytest.mark.parametrize("name", ["einsum", "transpose_strided"])  # where Flax has it
def test_preferred_element_type_agrees_with_flax(name):
    measured, one = measure(name), CASES[name]
    types = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}
    args = measured.params, measured.feedback, measured.x, measured.y_bar
    try:
        exact_y, (exact_params_bar, _, _) = pull_back(one.flax(**types))(*args)
    except TypeError:
        pytest.skip("this JAX cannot differentiate Flax's own layer")
    y, (params_bar, _, x_bar) = pull_back(one.ours(**types))(*args)
    swapped = measured.params | measured.feedback, *args[1:]
    _, (_, _, exact_x_bar) = pull_back(one.flax(**types))(*swapped)
    assert y.dtype == jnp.float32
    equal(y, exact_y)
    close(params_bar, exact_params_bar, 2e-2)  # one rounding of bfloat16
    close(x_bar, exact_x_bar, 2e-2)


@one_of_each
def test_integer_inputs_work_as_in_flax(name):
    measured, one = measure(name), CASES[name]
    x = jnp.round(3 * measured.x).astype(jnp.int32)

    def grads(layer, feedback):
        def loss(params, x):
            y = layer.apply({"params": params, "feedback": feedback}, x)
            return (y * measured.y_bar).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), allow_int=True))(measured.params, x)

    y, (params_bar, x_bar) = grads(one.ours(), measured.feedback)
    exact_y, (exact_params_bar, _) = grads(one.flax(), measured.feedback)
    assert x_bar.dtype == jax.dtypes.float0
    close(y, exact_y)
    close(params_bar, exact_params_bar)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
def test_feedback_bar_kernel_does_not_need_a_float_input(dtype):
    measured, layer = measure("dense"), CASES["dense"].ours(feedback_bar="kernel")
    x = jnp.arange(12, dtype=dtype).reshape(4, 3)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def grads(params, feedback):
        y = layer.apply({"params": params, "feedback": feedback}, x)
        return (y * measured.y_bar).sum()

    params_bar, feedback_bar = grads(measured.params, measured.feedback)
    equal(feedback_bar["kernel"], params_bar["kernel"])


# Flax's API.


@pytest.mark.parametrize("layer", sorted({one.layer for one in CASES.values()}))
def test_fields_are_those_of_flax_in_order_and_four_more(layer):
    def fields(cls):
        return [
            (f.name, f.default, f.default_factory, f.kw_only)
            for f in dataclasses.fields(cls)
            if f.name not in ("parent", "name")
        ]

    flax, ours = fields(getattr(nn, layer)), fields(getattr(linen, "Feedback" + layer))
    assert ours[: len(flax)] == flax
    more = ["feedback_init", "feedback_bar", "feedback_name", "feedback_dtype"]
    assert [name for name, *_ in ours[len(flax) :]] == more


def test_positional_arguments_are_those_of_flax():
    assert linen.FeedbackDense(5, False).use_bias is False
    assert linen.FeedbackDenseGeneral((2, 5), 1).axis == 1
    assert linen.FeedbackEinsum((3, 2), "bi,io->bo").einsum_str == "bi,io->bo"
    assert linen.FeedbackConv(4, (3,), 2, "VALID").padding == "VALID"
    assert linen.FeedbackConvTranspose(4, (3,), (2,)).strides == (2,)


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_einsum_takes_its_string_when_called(how):
    x, spec = draw(0, (4, 3)), "bi,io->bo"
    args, kwargs = ((spec,), {}) if how == "positional" else ((), {"einsum_str": spec})
    at_call, in_field = linen.FeedbackEinsum((3, 2)), linen.FeedbackEinsum((3, 2), spec)
    variables = in_field.init(jax.random.key(0), x)
    equal(at_call.init(jax.random.key(0), x, *args, **kwargs), variables)

    def x_bar(layer, *args, **kwargs):
        return jax.grad(lambda x: layer.apply(variables, x, *args, **kwargs).sum())(x)

    equal(x_bar(at_call, *args, **kwargs), x_bar(in_field))


def test_inputs_may_be_given_by_keyword():
    x, layer = draw(0, (4, 3)), linen.FeedbackDense(2)
    variables = layer.init(jax.random.key(0), x)
    equal(layer.apply(variables, inputs=x), layer.apply(variables, x))


def test_feedback_init_draws_the_feedback_only():
    layer = linen.FeedbackDenseGeneral((2, 5), feedback_init=nn.initializers.constant(7.0))
    variables = layer.init(jax.random.key(0), jnp.ones((4, 3)))
    equal(variables["feedback"]["kernel"], jnp.full((3, 2, 5), 7.0))
    assert not (variables["params"]["kernel"] == 7.0).any()


def test_subclasses_of_the_layers_work():
    class Mine(linen.FeedbackDense):
        """A user's own."""

    x = draw(0, (4, 3))
    variables = linen.FeedbackDense(5).init(jax.random.key(0), x)
    equal(Mine(5).init(jax.random.key(0), x), variables)
    args = variables["params"], variables["feedback"], x, draw(1, (4, 5))
    equal(pull_back(Mine(5))(*args), pull_back(linen.FeedbackDense(5))(*args))


def test_table_of_the_model_lists_feedback_and_no_helper_layers():
    model = nn.Sequential([nn.Dense(5), linen.FeedbackDense(2)])
    table = model.tabulate(
        jax.random.key(0), jnp.ones((4, 3)), console_kwargs={"width": 200, "color_system": None}
    )
    assert re.search(r"layers_1 .* FeedbackDense ", table)
    assert len(re.findall("Dense ", table)) == 2
    assert "Total Parameters: 42" in table  # 3 * 5 + 5 + 5 * 2 + 2, and 5 * 2 of feedback


# Models.


class Net(nn.Module):
    """Every layer once, ours or Flax's, under the same names."""

    own: bool

    @nn.compact
    def __call__(self, x):  # (batch, 6, 5, 2)
        layers = linen if self.own else nn
        prefix, own = ("Feedback", {"feedback_init": noise}) if self.own else ("", {})
        layer = {
            name: functools.partial(
                getattr(layers, prefix + name), kernel_init=noise, bias_init=noise, **own
            )
            for name in ("Conv", "ConvTranspose", "Einsum", "DenseGeneral", "Dense")
        }
        x = jnp.tanh(layer["Conv"](3, (3, 2), strides=2, name="conv")(x))
        x = jnp.tanh(layer["ConvTranspose"](4, (2, 3), name="up")(x))
        x = nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x)
        x = jnp.tanh(layer["Einsum"]((3, 4, 5), "bhwi,wio->bho", name="mix")(x))
        x = jnp.tanh(nn.Dense(6, kernel_init=noise, name="plain")(x))
        x = jnp.tanh(layer["DenseGeneral"]((2, 3), (-2, -1), name="general")(x))
        return layer["Dense"](4, name="out")(x)


class Setup(nn.Module):
    """A model in the style of `setup`."""

    own: bool

    def setup(self):
        dense = linen.FeedbackDense if self.own else nn.Dense
        self.hidden = nn.Dense(7, bias_init=nn.initializers.normal(1.0))
        self.layers = [
            dense(5, bias_init=nn.initializers.normal(1.0)),
            dense(4, bias_init=nn.initializers.normal(1.0)),
        ]

    def __call__(self, x):
        x = jnp.tanh(self.hidden(x))
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


MODELS = {"compact": (Net, (2, 6, 5, 2)), "setup": (Setup, (4, 3))}


@pytest.mark.parametrize("style", MODELS)
def test_model_draws_the_params_of_the_model_of_flax_layers(style):
    model, shape = MODELS[style]
    x, key = draw(0, shape), jax.random.key(1)

    without = {"params": key, "dropout": jax.random.key(3)}
    init = model(own=True).init_with_output
    y, flax = model(own=False).init_with_output(without, x)
    y_fallback, fallback = init(without, x)
    y_stream, stream = init(without | {"feedback": jax.random.key(2)}, x)
    equal(fallback["params"], flax["params"])
    equal(stream["params"], flax["params"])
    equal((y_fallback, y_stream), (y, y))
    ours = jax.tree.leaves(stream["feedback"])
    others = jax.tree.leaves(fallback["feedback"])
    assert all(differ(a, b) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("style", MODELS)
def test_model_with_equal_feedback_has_flax_gradients(style):
    model, shape = MODELS[style]
    x = draw(0, shape)
    variables = model(own=True).init(jax.random.key(1), x)
    params, feedback = variables["params"], variables["feedback"]
    at_kernels = {
        name: {"kernel": params[name]["kernel"]} for name in feedback
    }  # the same structure
    ours, flax = pull_back(model(own=True)), pull_back(model(own=False))
    y_bar = draw(2, jax.eval_shape(model(own=False).apply, {"params": params}, x).shape)
    y, (exact, _, exact_x_bar) = flax(params, feedback, x, y_bar)
    y_own, (grads, _, x_bar) = ours(params, at_kernels, x, y_bar)
    equal(y_own, y)
    close(grads, exact)
    close(x_bar, exact_x_bar)
    _, (pseudo, _, _) = ours(params, feedback, x, y_bar)
    last = "out" if style == "compact" else "layers_1"
    first = "conv" if style == "compact" else "hidden"
    close(pseudo[last], exact[last])
    assert differ(pseudo[first]["kernel"], exact[first]["kernel"])


def test_sequential_model_works():
    x = draw(0, (4, 3))
    ours = nn.Sequential([nn.Dense(5), jnp.tanh, linen.FeedbackDense(2)])
    flax = nn.Sequential([nn.Dense(5), jnp.tanh, nn.Dense(2)])
    variables = ours.init(jax.random.key(0), x)
    equal(variables["params"], flax.init(jax.random.key(0), x)["params"])
    assert jax.tree.map(jnp.shape, variables["feedback"]) == {"layers_2": {"kernel": (5, 2)}}
    equal(ours.apply(variables, x), flax.apply({"params": variables["params"]}, x))


def test_shared_layer_has_one_feedback_and_adds_up_its_gradients():
    class Twice(nn.Module):
        shared: bool

        def setup(self):
            self.a = linen.FeedbackDense(3, kernel_init=noise, feedback_init=noise)
            self.b = self.a if self.shared else linen.FeedbackDense(3)

        def __call__(self, x):
            return self.b(jnp.tanh(self.a(x)))

    x, y_bar = draw(0, (4, 3)), draw(1, (4, 3))
    variables = Twice(shared=True).init(jax.random.key(0), x)
    params, feedback = variables["params"], variables["feedback"]
    assert jax.tree.map(jnp.shape, feedback) == {"a": {"kernel": (3, 3)}}
    _, (shared, _, x_bar) = pull_back(Twice(shared=True))(params, feedback, x, y_bar)
    both = {"a": params["a"], "b": params["a"]}, {"a": feedback["a"], "b": feedback["a"]}
    _, (apart, _, x_bar_apart) = pull_back(Twice(shared=False))(*both, x, y_bar)
    close(shared["a"], jax.tree.map(jnp.add, apart["a"], apart["b"]))
    close(x_bar, x_bar_apart)


def test_lazy_init_gives_the_shapes_of_init():
    x = jnp.ones((2, 6, 5, 2))
    shapes = jax.eval_shape(Net(own=True).init, jax.random.key(0), x)
    variables = Net(own=True).init(jax.random.key(0), x)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), variables
    )


def test_apply_only_reads_feedback():
    x, layer = draw(0, (4, 3)), linen.FeedbackDense(2)
    variables = layer.init(jax.random.key(0), x)
    y = layer.apply(variables, x)
    assert isinstance(y, jax.Array)  # not (y, updates): nothing needs to be mutable
    same_y, updates = layer.apply(variables, x, mutable=["feedback", "batch_stats"])
    equal(same_y, y)
    equal(updates["feedback"], variables["feedback"])


def test_bound_module_works():
    x, layer = draw(0, (4, 3)), linen.FeedbackDense(2)
    variables = layer.init(jax.random.key(0), x)
    equal(layer.bind(variables)(x), layer.apply(variables, x))


def test_captured_intermediates_are_those_of_flax():
    x = draw(0, (4, 3))
    variables = linen.FeedbackDense(2).init(jax.random.key(0), x)
    capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
    _, ours = linen.FeedbackDense(2).apply(variables, x, **capture)
    _, flax = nn.Dense(2).apply({"params": variables["params"]}, x, **capture)
    equal(ours["intermediates"], flax["intermediates"])


# Lifted transforms.


Dense = functools.partial(linen.FeedbackDense, feedback_init=noise)


class Block(nn.Module):
    """One layer of a stack; `layer` is ours or Flax's."""

    layer: Any = Dense

    @nn.compact
    def __call__(self, h, _=None):
        h = jnp.tanh(self.layer(h.shape[-1], kernel_init=noise, bias_init=noise, name="dense")(h))
        return h, None


class Stack(nn.Module):
    """Five blocks under `nn.scan`."""

    layer: Any = Dense
    axes: tuple[str, ...] = ("params", "feedback")
    remat: bool = False

    @nn.compact
    def __call__(self, h):
        scanned = nn.scan(
            nn.remat(Block) if self.remat else Block,
            variable_axes=dict.fromkeys(self.axes, 0),
            split_rngs={"params": True, "feedback": True},
            length=5,
        )
        return scanned(self.layer, name="blocks")(h, None)[0]


class Ensemble(nn.Module):
    """A block per member, under `nn.vmap`; with `shared`, the same block for all."""

    layer: Any = Dense
    shared: bool = False

    @nn.compact
    def __call__(self, h):
        axis = None if self.shared else 0
        mapped = nn.vmap(
            Block,
            in_axes=0,
            out_axes=0,
            variable_axes={"params": axis, "feedback": axis},
            split_rngs={"params": not self.shared, "feedback": not self.shared},
        )
        return mapped(self.layer, name="blocks")(h)[0]


class Lifted(nn.Module):
    """A block under `nn.jit` or `nn.remat`, or as it is."""

    lift: Any
    layer: Any = Dense

    @nn.compact
    def __call__(self, h):
        block = Block if self.lift is None else self.lift(Block)
        return block(self.layer, name="block")(h)[0]


def of_member(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree["blocks"])


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_stack_equals_a_loop_over_its_layers(remat):
    x, y_bar = draw(0, (4, 3)), draw(1, (4, 3))
    variables = Stack(remat=remat).init(
        {"params": jax.random.key(0), "feedback": jax.random.key(1)}, x
    )
    params, feedback = variables["params"], variables["feedback"]
    assert feedback["blocks"]["dense"]["kernel"].shape == (5, 3, 3)
    assert differ(
        of_member(feedback, 0)["dense"]["kernel"], of_member(feedback, 1)["dense"]["kernel"]
    )
    equal(params, Stack(nn.Dense).init(jax.random.key(0), x)["params"])

    class Loop(nn.Module):
        @nn.compact
        def __call__(self, h):
            for i in range(5):
                h, _ = Block(name=str(i))(h)
            return h

    loop = [{str(i): of_member(tree, i) for i in range(5)} for tree in (params, feedback)]
    y, (grads, _, x_bar) = pull_back(Stack(remat=remat))(params, feedback, x, y_bar)
    y_loop, (grads_loop, _, x_bar_loop) = pull_back(Loop())(*loop, x, y_bar)
    close((y, x_bar), (y_loop, x_bar_loop))
    close({str(i): of_member(grads, i) for i in range(5)}, grads_loop)
    _, (exact, _, _) = pull_back(Stack(nn.Dense))(params, feedback, x, y_bar)
    assert differ(of_member(grads, 0)["dense"]["kernel"], of_member(exact, 0)["dense"]["kernel"])


def test_scanned_stack_with_equal_feedback_or_none_gives_backprop():
    x, y_bar = draw(0, (4, 3)), draw(1, (4, 3))
    params = Stack().init(jax.random.key(0), x)["params"]
    exact = pull_back(Stack(nn.Dense))(params, {}, x, y_bar)
    for leaf in (params["blocks"]["dense"]["kernel"], None):
        feedback = {"blocks": {"dense": {"kernel": leaf}}}
        y, (grads, _, x_bar) = pull_back(Stack())(params, feedback, x, y_bar)
        close((y, grads, x_bar), (exact[0], exact[1][0], exact[1][2]))


def test_vmapped_layers_equal_a_loop_over_members():
    x, y_bar = draw(0, (2, 4, 3)), draw(1, (2, 4, 3))
    variables = Ensemble().init({"params": jax.random.key(0), "feedback": jax.random.key(1)}, x)
    params, feedback = variables["params"], variables["feedback"]
    equal(params, Ensemble(nn.Dense).init(jax.random.key(0), x)["params"])
    y, (grads, _, x_bar) = pull_back(Ensemble())(params, feedback, x, y_bar)
    for i in range(2):
        one = pull_back(Lifted(None))(
            {"block": of_member(params, i)}, {"block": of_member(feedback, i)}, x[i], y_bar[i]
        )
        close(one[0], y[i])
        close(one[1][0]["block"], of_member(grads, i))
        close(one[1][2], x_bar[i])


def test_layer_shared_by_vmapped_members_is_the_layer_over_a_batch():
    x, y_bar = draw(0, (2, 4, 3)), draw(1, (2, 4, 3))
    variables = Ensemble(shared=True).init(jax.random.key(0), x)
    params, feedback = variables["params"], variables["feedback"]
    assert feedback["blocks"]["dense"]["kernel"].shape == (3, 3)
    y, (grads, _, x_bar) = pull_back(Ensemble(shared=True))(params, feedback, x, y_bar)
    one = {"block": params["blocks"]}, {"block": feedback["blocks"]}
    y_one, (grads_one, _, x_bar_one) = pull_back(Lifted(None))(*one, x, y_bar)
    close((y, x_bar), (y_one, x_bar_one))
    close(grads["blocks"], grads_one["block"])


def test_int8_feedback_of_a_rematerialised_stack_gives_the_bits_of_its_values():
    model, x = Stack(remat=True), draw(0, (4, 3))
    variables = model.init(jax.random.key(0), x)
    signs = jax.tree.map(lambda b: jnp.sign(b).astype(jnp.int8), variables["feedback"])

    def loss(params, feedback):
        return jnp.sum(jnp.sin(model.apply({"params": params, "feedback": feedback}, x)))

    gradient = jax.jit(jax.grad(loss))
    values = jax.tree.map(lambda b: b.astype(jnp.float32), signs)
    equal(gradient(variables["params"], signs), gradient(variables["params"], values))


@pytest.mark.parametrize("lift", [nn.jit, nn.remat], ids=["jit", "remat"])
def test_lifted_layers_equal_unlifted_ones(lift):
    x, y_bar = draw(0, (4, 3)), draw(1, (4, 3))
    variables = Lifted(lift).init(jax.random.key(0), x)
    equal(variables["params"], Lifted(lift, nn.Dense).init(jax.random.key(0), x)["params"])
    args = variables["params"], variables["feedback"], x, y_bar
    close(pull_back(Lifted(lift))(*args), pull_back(Lifted(None))(*args))


class Masked(nn.Module):
    """A convolution whose mask is traced wherever the layer is."""

    own: bool

    @nn.compact
    def __call__(self, h, _=None):
        conv = linen.FeedbackConv if self.own else nn.Conv
        traced_mask = jnp.tril(jnp.ones((3, 2, 2)))
        return jnp.tanh(conv(2, 3, mask=traced_mask, kernel_init=noise, name="conv")(h)), None


class LiftedMask(nn.Module):
    """`Masked` under a lifted transform."""

    own: bool
    lift: Any

    @nn.compact
    def __call__(self, h):
        return self.lift(Masked)(self.own, name="block")(h, None)[0]


scanned = functools.partial(
    nn.scan,
    variable_axes={"params": 0, "feedback": 0},
    split_rngs={"params": True, "feedback": True},
    length=2,
)


@pytest.mark.parametrize("lift", [nn.remat, scanned], ids=["remat", "scan"])
def test_mask_made_inside_a_lifted_layer_works(lift):
    x = draw(0, (2, 5, 2))
    params = LiftedMask(True, lift).init(jax.random.key(0), x)["params"]
    feedback = {"block": {"conv": {"kernel": params["block"]["conv"]["kernel"]}}}
    y, (grads, _, x_bar) = pull_back(LiftedMask(True, lift))(params, feedback, x, x)
    exact_y, (exact, _, exact_x_bar) = pull_back(LiftedMask(False, lift))(params, feedback, x, x)
    close((y, grads, x_bar), (exact_y, exact, exact_x_bar))


def test_plain_vmap_over_models_equals_a_loop():
    x, y_bar, layer = (
        draw(0, (4, 3)),
        draw(1, (4, 5)),
        linen.FeedbackDense(5, kernel_init=noise, feedback_init=noise),
    )
    keys = jax.random.split(jax.random.key(0), 3)
    variables = jax.vmap(layer.init, in_axes=(0, None))(keys, x)
    f = pull_back(layer)
    many = jax.vmap(f, in_axes=(0, 0, None, None))(
        variables["params"], variables["feedback"], x, y_bar
    )
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
        close(
            jax.tree.map(lambda leaf, i=i: leaf[i], many),
            f(one["params"], one["feedback"], x, y_bar),
        )


@pytest.mark.parametrize(
    ("names", "expected"), [(None, (None, "model")), (("model", None), ("model", None))], ids=str
)
@pytest.mark.parametrize("own_init", [False, True])
def test_partitioned_kernels_and_their_feedback_keep_their_boxes(own_init, names, expected):
    init = nn.initializers.lecun_normal()
    boxed = nn.with_partitioning(init, (None, "model"))
    own = init if names is None else nn.with_partitioning(init, names)
    extra = {"feedback_init": own} if own_init or names else {}
    ours, flax = linen.FeedbackDense(5, kernel_init=boxed, **extra), nn.Dense(5, kernel_init=boxed)
    x, y_bar = draw(0, (4, 3)), draw(1, (4, 5))
    variables = ours.init(jax.random.key(0), x)
    params, feedback = variables["params"], variables["feedback"]
    equal(params, flax.init(jax.random.key(0), x)["params"])
    assert feedback["kernel"].names == expected
    y, (grads, _, x_bar) = pull_back(ours)(params, feedback, x, y_bar)
    exact_y, (exact, _, _) = pull_back(flax)(params, feedback, x, y_bar)
    equal(y, exact_y)
    assert isinstance(grads["kernel"], meta.Partitioned)
    close(grads, exact)
    close(x_bar, y_bar @ meta.unbox(feedback["kernel"]).T)
    synced = sync_feedback(
        params,
        init_feedback(
            jax.random.key(2), params, rules.SignSync(magnitude="unit"), feedback=feedback
        ),
        0,
    ).feedback
    equal(meta.unbox(synced["kernel"]), jnp.sign(meta.unbox(params["kernel"])))
    assert jax.tree.structure(synced) == jax.tree.structure(feedback)


# Errors, and what is no error.


@pytest.mark.parametrize(
    "model, shape, path",
    [
        (linen.FeedbackDense(2), (4, 3), "the top"),
        (Setup(own=True), (4, 3), "layers_0"),
        (Lifted(None), (4, 3), "block/dense"),
        (Lifted(nn.remat), (4, 3), "block/dense"),
        (Stack(), (4, 3), "blocks/dense"),
        (Ensemble(), (2, 4, 3), "blocks/dense"),
    ],
    ids=["alone", "setup", "compact", "remat", "scan", "vmap"],
)
def test_missing_collection_names_the_layer_and_shows_the_fix(model, shape, path):
    x = jnp.ones(shape)
    params = model.init(jax.random.key(0), x)["params"]
    with pytest.raises(ValueError) as error:
        model.apply({"params": params}, x)
    message = str(error.value)
    assert f"FeedbackDense at {path} found no collection 'feedback'" in message
    assert "model.apply({'params': params, 'feedback': feedback}, x)" in message


def test_scan_without_the_axis_of_feedback_names_the_layer_and_shows_the_fix():
    x = jnp.ones((4, 3))
    variables = Stack().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"FeedbackDense at blocks/dense") as error:
        Stack(axes=("params",)).apply(variables, x)
    assert "variable_axes={'params': 0, 'feedback': 0}" in str(error.value)


def test_scan_without_the_axis_of_feedback_is_explained_at_init_too():
    with pytest.raises(ValueError, match=r"variable_axes=\{'params': 0, 'feedback': 0\}"):
        Stack(axes=("params",)).init(jax.random.key(0), jnp.ones((4, 3)))


@pytest.mark.parametrize("absent", [{}, {"layers_0": {}}, {"layers_0": {"kernel": None}}])
def test_layer_without_feedback_in_the_collection_backpropagates(absent):
    class Mixed(nn.Module):
        """As `Setup`, but with Flax's own layer in the middle."""

        def setup(self):
            self.hidden = nn.Dense(7, bias_init=nn.initializers.normal(1.0))
            self.layers = [
                nn.Dense(5, bias_init=nn.initializers.normal(1.0)),
                linen.FeedbackDense(4, bias_init=nn.initializers.normal(1.0)),
            ]

        __call__ = Setup.__call__

    x, y_bar = draw(0, (3, 2)), draw(1, (3, 4))
    variables = Setup(own=True).init(jax.random.key(0), x)
    params, last = variables["params"], {"layers_1": variables["feedback"]["layers_1"]}
    _, (grads, _, x_bar) = pull_back(Setup(own=True))(params, last | absent, x, y_bar)
    _, (expected, _, expected_x_bar) = pull_back(Mixed())(params, last, x, y_bar)
    close((grads, x_bar), (expected, expected_x_bar))


def test_wrong_shape_names_the_path():
    x = jnp.ones((4, 3))
    variables = Setup(own=True).init(jax.random.key(0), x)
    feedback = variables["feedback"] | {"layers_1": {"kernel": jnp.ones((4, 5))}}
    with pytest.raises(ValueError) as error:
        Setup(own=True).apply({"params": variables["params"], "feedback": feedback}, x)
    assert str(error.value).startswith(
        "feedback at ['layers_1']['kernel'] has shape (4, 5); expected (5, 4)"
    )


def test_unknown_feedback_bar_raises():
    layer = linen.FeedbackDense(2, feedback_bar="feedback")
    x = jnp.ones((4, 3))
    variables = linen.FeedbackDense(2).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="feedback_bar is 'feedback'; expected None, 'kernel'"):
        layer.apply(variables, x)


def test_a_dtype_in_which_no_feedback_can_be_stored_raises():
    layer = linen.FeedbackDense(2, feedback_dtype=jnp.uint8)
    with pytest.raises(ValueError, match=r"feedback_dtype is .*uint8.*; expected a floating-point"):
        layer.init(jax.random.key(0), jnp.ones((4, 3)))


def test_forward_mode_raises():
    x, layer = jnp.ones((4, 3)), linen.FeedbackDense(2)
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: layer.apply(variables, x), (x,), (x,))


# The hook, for layers that Flax makes itself.


HOOK = linen.FeedbackDotGeneral
BOXED = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))


@pytest.mark.parametrize(
    "fields",
    [{}, {"dtype": jnp.bfloat16}, {"kernel_init": BOXED}, {"use_bias": False}],
    ids=["plain", "bfloat16", "boxed", "without bias"],
)
@pytest.mark.parametrize("name", ["dense", "general_two_axes", "general_batch_dims"])
def test_flax_layer_with_the_hook_is_ours(name, fields):
    one = CASES[name]
    own = {"feedback_init": noise, "feedback_bar": "kernel", "feedback_dtype": jnp.bfloat16}
    ours = one.ours(**own | fields)
    hooked = one.flax(dot_general_cls=functools.partial(HOOK, **own), **fields)
    x = draw(0, one.shape)
    variables = ours.init(jax.random.key(1), x)
    equal(hooked.init(jax.random.key(1), x), variables)
    y_bar = draw(2, jax.eval_shape(hooked.apply, variables, x).shape, fields.get("dtype"))
    args = variables["params"], variables["feedback"], x, y_bar
    equal(pull_back(hooked)(*args), pull_back(ours)(*args))


def test_the_hook_may_be_an_instance():
    x = draw(0, (4, 3))
    variables = linen.FeedbackDense(5).init(jax.random.key(0), x)
    hooked = nn.Dense(5, dot_general=HOOK())
    equal(hooked.init(jax.random.key(0), x), variables)
    args = variables["params"], variables["feedback"], x, draw(1, (4, 5))
    equal(pull_back(hooked)(*args), pull_back(linen.FeedbackDense(5))(*args))


attention = functools.partial(nn.MultiHeadDotProductAttention, 2, kernel_init=noise)
hooked_attention = functools.partial(
    attention,
    qkv_dot_general_cls=functools.partial(HOOK, feedback_init=noise),
    out_dot_general_cls=functools.partial(HOOK, feedback_init=noise),
)


class AttentionBlock(nn.Module):
    """One layer of a stack."""

    layer: Any

    @nn.compact
    def __call__(self, h, _=None):
        return jnp.tanh(h + self.layer(name="attention")(h)), None


class AttentionStack(nn.Module):
    """Three layers of attention, scanned and rematerialised, or in a loop."""

    layer: Any = hooked_attention
    loop: bool = False

    @nn.compact
    def __call__(self, h):
        if self.loop:
            for i in range(3):
                h, _ = AttentionBlock(self.layer, name=str(i))(h)
            return h
        block = scanned(nn.remat(AttentionBlock), length=3)
        return block(self.layer, name="blocks")(h, None)[0]


def test_attention_with_the_hook_has_feedback_for_its_four_projections():
    x, y_bar = draw(0, (2, 5, 6)), draw(1, (2, 5, 6))
    variables = hooked_attention().init(jax.random.key(0), x)
    params, feedback = variables["params"], variables["feedback"]
    equal(params, attention().init(jax.random.key(0), x)["params"])
    kernels = {name: {"kernel": layer["kernel"]} for name, layer in params.items()}
    assert jax.tree.map(jnp.shape, feedback) == jax.tree.map(jnp.shape, kernels)
    ours, flax = pull_back(hooked_attention()), pull_back(attention())
    y, (exact, _, exact_x_bar) = flax(params, feedback, x, y_bar)
    for exactly in (kernels, jax.tree.map(lambda _: None, kernels)):
        y_own, (grads, _, x_bar) = ours(params, exactly, x, y_bar)
        equal(y_own, y)
        close((grads, x_bar), (exact, exact_x_bar))
    _, (pseudo, _, x_bar) = ours(params, feedback, x, y_bar)
    close(pseudo["out"], exact["out"])
    assert differ(pseudo["query"]["kernel"], exact["query"]["kernel"])
    assert differ(x_bar, exact_x_bar)


def test_scanned_attention_with_the_hook_equals_a_loop():
    x, y_bar = draw(0, (2, 5, 6)), draw(1, (2, 5, 6))
    variables = AttentionStack().init(
        {"params": jax.random.key(0), "feedback": jax.random.key(1)}, x
    )
    params, feedback = variables["params"], variables["feedback"]
    loop = [{str(i): of_member(tree, i) for i in range(3)} for tree in (params, feedback)]
    y, (grads, _, x_bar) = pull_back(AttentionStack())(params, feedback, x, y_bar)
    y_loop, (grads_loop, _, x_bar_loop) = pull_back(AttentionStack(loop=True))(*loop, x, y_bar)
    close((y, x_bar), (y_loop, x_bar_loop))
    close({str(i): of_member(grads, i) for i in range(3)}, grads_loop)
    message = "FeedbackDotGeneral at blocks/attention/query found no collection 'feedback'"
    with pytest.raises(ValueError, match=message):
        AttentionStack().apply({"params": params}, x)


def test_the_hook_leaves_intermediates_and_tables_as_flax_has_them():
    x = draw(0, (2, 5, 6))
    variables = hooked_attention().init(jax.random.key(0), x)
    capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
    _, ours = hooked_attention().apply(variables, x, **capture)
    _, flax = attention().apply({"params": variables["params"]}, x, **capture)
    equal(ours["intermediates"], flax["intermediates"])
    table = hooked_attention().tabulate(jax.random.key(0), x, console_kwargs={"width": 200})
    assert "FeedbackDotGeneral" not in table


def test_the_hook_outside_of_a_flax_layer_raises():
    class Mine(nn.Module):
        """A layer whose param has another name."""

        dot_general_cls: Any = None

        @nn.compact
        def __call__(self, x):
            w = self.param("w", noise, (3, 2))
            return self.dot_general_cls()(x, w, (((1,), (0,)), ((), ())))

    x = jnp.ones((4, 3))
    message = r"FeedbackDotGeneral was called within {}; expected a Flax layer with a param"
    with pytest.raises(ValueError, match=message.format("Mine")):
        Mine(HOOK).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=message.format("NoneType")):
        HOOK()(x, x.T, (((1,), (0,)), ((), ())))
    layer = linen.FeedbackDense(2, dot_general_cls=HOOK)  # it has feedback of its own
    with pytest.raises(ValueError, match=message.format("FeedbackDense")):
        layer.init(jax.random.key(0), x)


# Training steps of a 3-layer MLP.


class MLP(nn.Module):
    """`Dense_0` is Flax's in any case: the gradient by the input is not computed."""

    own: bool = True

    @nn.compact
    def __call__(self, x):
        dense = Dense if self.own else nn.Dense
        x = jnp.tanh(nn.Dense(16, kernel_init=noise, name="Dense_0")(x))
        x = jnp.tanh(dense(12, kernel_init=noise, name="Dense_1")(x))
        return dense(5, kernel_init=noise, name="Dense_2")(x)


optimizer = optax.sgd(0.1, momentum=0.9)


def train_step(model):
    """`(params, opt_state, state, step, x, labels) -> the same, after one update`."""

    def step(params, opt_state, state, number, x, labels):
        if model.own:
            state = sync_feedback(params, state, number)

        def loss(params):
            logits = model.apply({"params": params, "feedback": state.feedback}, x)
            return optax.softmax_cross_entropy(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, state, value

    return step


def start(rule):
    x = draw(0, (8, 9))
    labels = jax.nn.one_hot(jnp.arange(8) % 5, 5)
    variables = MLP().init({"params": jax.random.key(0), "feedback": jax.random.key(1)}, x)
    params = variables["params"]
    state = init_feedback(jax.random.key(2), params, rule, feedback=variables["feedback"])
    return params, optimizer.init(params), state, x, labels


def products(step, *args):
    """How many matrix products the compiled step holds."""
    text = jax.jit(step).lower(*args).compile().as_text()
    return len(re.findall(r"\bdot\(|custom-call\(.*matmul", text))


def test_feedback_alignment_costs_the_matrix_products_of_backprop():
    params, opt_state, state, x, labels = start(rules.Fixed())
    args = params, opt_state, state, 0, x, labels
    # forward 3, the kernels' gradients 3, the activations' cotangents 2
    assert products(train_step(MLP(own=False)), *args) == 8
    assert products(train_step(MLP(own=True)), *args) == 8


def test_step_lowers_for_every_platform():
    params, opt_state, state, x, labels = start(rules.SignSync(period=2, magnitude="norm"))
    traced = jax.jit(train_step(MLP())).trace(params, opt_state, state, 0, x, labels)
    for platform in ("cpu", "cuda", "tpu"):
        lowered = traced.lower(lowering_platforms=(platform,))
        assert lowered.as_text().count("stablehlo.dot_general") == 8, platform


def test_steps_do_not_retrace():
    traces = 0
    one_step = train_step(MLP())

    @jax.jit
    def step(*args):
        nonlocal traces
        traces += 1
        return one_step(*args)

    params, opt_state, state, x, labels = start(rules.SignSync(period=2, magnitude="preserve"))
    losses = []
    for number in range(4):
        params, opt_state, state, loss = step(params, opt_state, state, number, x, labels)
        losses.append(float(loss))
    assert traces == 1
    assert losses[-1] < losses[0]
    *_, other = start(rules.SignSync(period=3, magnitude="preserve"))[:3]
    step(params, opt_state, other, 4, x, labels)  # nor does another period
    assert traces == 1


def test_explicitly_sharded_batch_gives_the_unsharded_run():
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices: XLA_FLAGS=--xla_force_host_platform_device_count=4")
    step = jax.jit(train_step(MLP()))
    params, opt_state, state, x, labels = start(rules.SignSync(period=2, magnitude="norm"))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    with jax.set_mesh(mesh):
        sharded = jax.device_put((params, opt_state, state), whole)
        sharded_batch = jax.device_put((x, labels), split)
        for number in range(3):
            *sharded, sharded_loss = step(*sharded, number, *sharded_batch)
    plain = params, opt_state, state
    for number in range(3):
        *plain, loss = step(*plain, number, x, labels)
    close(sharded[0], plain[0])
    close(sharded[2].feedback, plain[2].feedback)
    close(sharded_loss, loss)
    assert differ(plain[2].feedback["Dense_1"]["kernel"], state.feedback["Dense_1"]["kernel"])
    for leaf in jax.tree.leaves((sharded[0], sharded[2].feedback)):
        assert leaf.sharding.is_equivalent_to(whole, leaf.ndim)


@pytest.mark.parametrize("init", [nn.initializers.lecun_normal(), nn.initializers.he_uniform()])
def test_feedback_starts_as_large_as_its_kernel(init):
    """Otherwise the layers below would start with another learning rate than under backprop."""
    layer = linen.FeedbackDense(90, kernel_init=init)
    variables = layer.init(jax.random.key(0), jnp.ones((1, 70)))
    ratio = metrics.norm_ratio(variables["params"], variables["feedback"])
    np.testing.assert_allclose(ratio["kernel"], 1, rtol=0.05)  # 6300 draws
