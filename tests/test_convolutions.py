"""Convolutions as matrix products: equal to JAX's, wherever they stand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import soap_jax
from soap_jax import convolutions, linen, ops, sweeps, tasks, training
from soap_jax.study import METHODS, loops, trial


def close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), a, b)


def written(fun, *args):
    """What `fun` is lowered to for CPU."""
    return jax.jit(fun).lower(*args).as_text()


@st.composite
def cases(draw):
    """Operands and parameters of `lax.conv_general_dilated`."""
    rank = draw(st.integers(1, 3))
    groups, batch_groups = draw(st.sampled_from([(1, 1), (1, 1), (3, 1), (1, 2)]))
    numbers = [draw(st.permutations(range(rank + 2))) for _ in range(3)]

    def each(low, high):
        return [draw(st.integers(low, high)) for _ in range(rank)]

    def array(spec, shape):
        lengths = [length for _, length in sorted(zip(spec, shape, strict=True))]
        return jnp.asarray(np.random.default_rng(0).normal(size=lengths), jnp.float32)

    per_group = draw(st.integers(1, 3))
    out = groups * batch_groups * draw(st.integers(1, 3))
    x = array(numbers[0], [2 * batch_groups, groups * per_group, *each(5, 8)])
    kernel = array(numbers[1], [out, per_group, *each(1, 3)])
    params = {
        "window_strides": each(1, 3),
        "padding": [(draw(st.integers(-1, 3)), draw(st.integers(-1, 3))) for _ in range(rank)],
        "lhs_dilation": each(1, 2),
        "rhs_dilation": each(1, 2),
        "dimension_numbers": lax.ConvDimensionNumbers(*map(tuple, numbers)),
        "feature_group_count": groups,
        "batch_group_count": batch_groups,
    }
    return x, kernel, params


@settings(max_examples=25, deadline=None)
@given(cases())
def test_every_convolution_and_its_gradients_are_equal(case):
    x, kernel, params = case

    def f(x, kernel):
        return lax.conv_general_dilated(x, kernel, **params)

    y = jax.eval_shape(f, x, kernel)
    if 0 in y.shape:
        return
    y_bar = jnp.asarray(np.random.default_rng(1).normal(size=y.shape), jnp.float32)

    def all_three(x, kernel, y_bar):
        y, back = jax.vjp(f, x, kernel)
        return y, *back(y_bar)

    products = convolutions.as_products(all_three)
    close(jax.jit(products)(x, kernel, y_bar), jax.jit(all_three)(x, kernel, y_bar))
    assert "stablehlo.convolution" not in written(products, x, kernel, y_bar)


X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 9, 7, 2)), jnp.float32)
LABELS = jnp.arange(8) % 3


class Net(nn.Module):
    """A strided convolution, an unpadded one and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(linen.FeedbackConv(4, (3, 3), strides=2)(x))
        x = nn.relu(linen.FeedbackConv(5, (2, 3), padding="VALID")(x))
        return linen.FeedbackDense(3)(x.reshape(len(x), -1))


def start(optimizer=None):
    """A state and a step of feedback alignment."""
    optimizer = optimizer or optax.sgd(0.1, momentum=0.9)
    model = Net()
    variables = model.init(jax.random.key(0), X)
    feedback = soap_jax.init_feedback(
        jax.random.key(1),
        variables["params"],
        soap_jax.SignSync(),
        feedback=variables["feedback"],
    )

    def apply_fn(params, feedback, x):
        return model.apply({"params": params, "feedback": feedback}, x)

    step = training.make_train_step(apply_fn, optimizer)
    params = jax.tree.map(jnp.array, variables["params"])
    return step, training.init_train_state(params, optimizer, feedback=feedback)


def test_a_scanned_epoch_equals_steps_called_from_python():
    step, state = start()
    order = training.epoch_order(jax.random.key(2), 8, 4)
    called, jitted, losses = state, jax.jit(step), []
    for indices in order:
        called, loss = jitted(called, (X[indices], LABELS[indices]))
        losses.append(loss)
    scanned = training.scan_batches(step, state, (X, LABELS), order)
    close((called.params, jnp.stack(losses)), (scanned[0].params, scanned[1]))
    trained = training.train_epoch(step, state, (X, LABELS), jax.random.key(2), batch_size=4)
    close(trained[0].params, called.params)


def test_an_epoch_has_no_convolution_on_cpu():
    step, state = start()
    args = step, state, (X, LABELS), jax.random.key(2)
    text = training.train_epoch.lower(*args, batch_size=4).as_text()
    assert "stablehlo.convolution" not in text


def test_elsewhere_convolutions_stay():
    step, state = start()
    traced = jax.jit(convolutions.as_products(step)).trace(state, (X, LABELS))
    plain = jax.jit(step).trace(state, (X, LABELS))
    texts = [t.lower(lowering_platforms=("cuda",)).as_text() for t in (traced, plain)]
    assert len({text.count("stablehlo.convolution(") for text in texts}) == 1
    assert "stablehlo.convolution(" in texts[0]


def test_an_epoch_is_traced_once():
    step, state = start()
    traces = []

    def counted(state, batch):
        traces.append(None)
        return step(state, batch)

    for _ in range(3):
        state, _ = training.train_epoch(
            counted, state, (X, LABELS), jax.random.key(2), batch_size=4
        )
    assert len(traces) == 1


def test_programs_without_convolutions_stay_as_they_are():
    def f(x):
        return jax.nn.relu(x @ x.T).sum()

    x = jnp.ones((3, 4))
    assert not convolutions.convolves(jax.make_jaxpr(f)(x))
    assert str(jax.make_jaxpr(convolutions.as_products(f))(x)) == str(jax.make_jaxpr(f)(x))


def conv(x, w):
    return lax.conv(x, w, (1, 1), "SAME")


IMAGES, KERNEL = jnp.ones((1, 2, 4, 4)), jnp.full((2, 2, 3, 3), 0.1)


def twice(x, w):
    return lax.scan(lambda x, _: (conv(x, w), 0), x, length=2)[0]


def chosen(x, w):
    return lax.cond(x.sum() > 0, conv, lambda x, w: x, x, w)


own = jax.custom_vjp(conv)
own.defvjp(lambda x, w: (conv(x, w), ()), lambda _, y_bar: (y_bar, None))


def until(x, w):
    return lax.while_loop(lambda x: x.sum() < 99, lambda x: conv(x, w), x)


@pytest.mark.parametrize("f", [twice, chosen, until, jax.jit(conv), jax.checkpoint(conv), own])
def test_loops_branches_and_calls_have_products(f):
    assert convolutions.convolves(jax.make_jaxpr(f)(IMAGES, KERNEL))
    products = convolutions.as_products(f)
    close(products(IMAGES, KERNEL), f(IMAGES, KERNEL))
    assert "stablehlo.convolution" not in written(products, IMAGES, KERNEL)


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit, lambda f: f])
def test_unlike_blocks_are_not_taken_for_one_another(wrap):
    """Each block has a program of its own, which lives as long as it is looked for."""

    def block(i):
        return wrap(lambda x, w: jnp.tanh(lax.conv(x, w, (1, 1), "SAME")) / (i + 1) + x / (i + 2))

    def loss(w, x):
        for i in range(6):
            x = block(i)(x, w)
        return (x**2).mean()

    x = jax.random.normal(jax.random.key(0), (3, 2, 5, 5))
    w = jax.random.normal(jax.random.key(1), (2, 2, 3, 3))
    close(convolutions.as_products(loss)(w, x), loss(w, x))
    both = jax.value_and_grad(loss)
    close(convolutions.as_products(both)(w, x), both(w, x))


def test_a_derivative_of_its_own_is_kept():
    def layer(x, w):
        return ops.feedback_op(conv)(x, w, 2 * w)

    def gradient(f):
        return jax.jit(jax.grad(lambda x, w: f(x, w).sum()))(IMAGES, KERNEL)

    close(gradient(convolutions.as_products(layer)), gradient(layer))


def test_a_second_application_changes_nothing():
    once = convolutions.as_products(conv)
    texts = [written(f, IMAGES, KERNEL) for f in (once, convolutions.as_products(once))]
    assert texts[0].count("dot_general") == texts[1].count("dot_general") == 1


def test_what_needs_too_many_copies_stays():
    x, w = jnp.ones((1, 1, 2000)), jnp.ones((1, 1, 1000))

    def long(x, w):
        return lax.conv(x, w, (1,), "VALID")

    assert "stablehlo.convolution" in written(convolutions.as_products(long), x, w)


def train(seed, learning_rate, period, data):
    """A run of a sweep."""
    del period
    step, state = start(optax.sgd(1.0))
    params = jax.tree.map(lambda p: p * (1 + 0.1 * seed), state.params)

    def slower(state, batch):
        new, loss = step(state, batch)
        params = jax.tree.map(lambda a, b: a + learning_rate * (b - a), state.params, new.params)
        return new._replace(params=params), loss

    order = training.epoch_order(jax.random.key(seed), 8, 4)
    return training.scan_batches(slower, state._replace(params=params), data, order)[1]


def test_a_sweep_gives_a_run_the_same_bits_in_any_chunks_and_after_an_interruption():
    points = sweeps.grid(seeds=[0, 1, 2], learning_rates=[0.1, 0.2])

    def losses(**keywords):
        parts = sweeps.iterate(train, points, args=((X, LABELS),), **keywords)
        return {i: row for part in parts for i, row in zip(*part, strict=True)}

    whole = losses()
    for other in (losses(chunk_size=2), losses(done=[0, 3])):
        for i, row in other.items():
            np.testing.assert_array_equal(row, whole[i])
    for i in (1, 5):
        alone = train(points[i].seed, points[i].learning_rate, 1, (X, LABELS))
        np.testing.assert_allclose(whole[i], alone, rtol=1e-4)  # the order of sums


def test_a_sweep_has_no_convolution_on_cpu():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("runs",))
    num = len(jax.devices())
    scalars = jnp.zeros(2 * num, jnp.int32), jnp.zeros(2 * num), jnp.ones(num, jnp.int32)
    args = train, mesh, True, *scalars, jnp.int32(1), (X, LABELS)
    assert "stablehlo.convolution" not in sweeps._program.lower(*args).as_text()


def test_a_study_of_a_convolutional_network_is_the_plain_scan_to_rounding():
    task = tasks.small_conv(channels=(2, 3))
    batch = jax.tree.map(lambda leaf: leaf[:8], task.train)
    layers = trial.layers_of(task, task.init(jax.random.key(0)), None, batch)
    sizes = {"batch_size": 8, "steps": 6, "evaluations": 2}
    of_method = trial.make(task, (METHODS["fa"],), layers, optimizer=optax.adam, **sizes)
    run, data = loops.scanned(of_method), trial.data_of(task)
    args = jnp.int32(0), data
    plain = jax.jit(run)(jnp.int32(3), jnp.float32(0.01), jnp.int32(1), *args)
    swept = sweeps.sweep(run, seeds=[3], learning_rates=[0.01], args=args)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b[0, 0, 0], rtol=1e-3, atol=1e-3), plain, swept
    )
