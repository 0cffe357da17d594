"""What the compiled programs hold, of which speed is made and which needs no clock.

As many matrix products as backprop, no copy of feedback, buffers taken over from the state before,
one trace, and in an epoch's scan neither a callback nor a pass over the data.
"""

import collections
import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_contract import METHODS, batches, make_step, of_loss, start

import soap_jax
from soap_jax import models, training

SGD = optax.sgd(0.1)
BACKPROPS = ("FA", "sign, unit", "sign, glorot", "sign, preserve", "sign, norm", "sign, redraw",
             "sign, kernel", "transport", "template", "two rules", "FA, sparse", "KP")  # fmt: skip
FAST = ("backprop", "FA", "sign, unit", "KP", "DFA")
NUM_BATCHES, BATCH = 5, 16


def each(names):
    """Parametrises by method; those that are alike to compile are slow tests."""
    marked = [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names
    ]
    return pytest.mark.parametrize("name", marked)


def lower_step(name):
    method = METHODS[name]
    optimizer = method.wrap(SGD)
    step = jax.jit(make_step(method, optimizer), donate_argnums=0)
    return step.lower(start(method, optimizer), batches(1, BATCH)[0])


def lower_epoch(name):
    method = METHODS[name]
    optimizer = method.wrap(SGD)
    x, labels = zip(*batches(NUM_BATCHES, BATCH), strict=True)
    data = np.concatenate(x), np.concatenate(labels)
    state = start(method, optimizer)
    step = make_step(method, optimizer)
    return training.train_epoch.lower(step, state, data, jax.random.key(0), batch_size=BATCH)


@functools.cache
def texts(name):
    """The step as written and as compiled."""
    lowered = lower_step(name)
    return lowered.as_text(), lowered.compile().as_text()


@functools.cache
def compiled_epoch(name):
    return lower_epoch(name).compile()


def products(text):
    return len(re.findall(r"stablehlo\.dot_general|stablehlo\.convolution| (?:dot|convolution)\(",
                          text))  # fmt: skip


def copies(text):
    """Shapes that are copied, as often as they are: `["f32[16,10]", ...]`."""
    return sorted(re.findall(r"= (\w+\[[\d,]*\])\S* copy\(", text))


def copies_of_kernels(text):
    return [shape for shape in copies(text) if shape.count(",") >= 1]


# Matrix products


@each(BACKPROPS)
def test_a_step_takes_the_matrix_products_of_backprop(name):
    written, compiled = texts("backprop")
    # forward 3, the kernels' gradients 3, the activations' cotangents 2
    assert products(written) == products(compiled) == 8
    written, compiled = texts(name)
    assert products(compiled) == 8
    assert products(written) == 8


def test_mirrored_weights_take_two_more_for_each_kernel():
    assert [products(text) for text in texts("weight mirror")] == [12, 12]


@pytest.mark.parametrize("name", ["DFA", "DFA, by names"])
def test_direct_feedback_takes_its_projections_in_place_of_the_chain(name):
    # forward 3, the kernels' gradients 3, projections 2, of 10 columns each
    assert [products(text) for text in texts(name)] == [8, 8]


def test_direct_feedback_by_names_compiles_to_what_one_writes_by_hand():
    """The operations of both steps, each as often."""

    def operations(text):
        return collections.Counter(re.findall(r"= \S+ ([\w-]+)\(", text))

    assert operations(texts("DFA, by names")[1]) == operations(texts("DFA")[1])


class Attention(nn.Module):
    """One block of a transformer, of Flax's own layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12, name="embed")(x)
        h = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm()(x))
        h = nn.Dense(12, name="down")(nn.gelu(nn.Dense(20, name="up")(x + h)))
        return nn.Dense(10, name="head")(h.mean(1))


TRANSFORMED = {
    "convolutions": (models.ConvNet((4, 6), feedback=False), (2, 8, 8, 3)),
    "transformer": (Attention(), (2, 5, 7)),
}


@pytest.mark.parametrize(
    "name", ["convolutions", pytest.param("transformer", marks=pytest.mark.slow)]
)
def test_a_transformed_model_takes_the_matrix_products_of_backprop(name):
    model, shape = TRANSFORMED[name]
    x, labels = jnp.ones(shape), jnp.zeros(shape[0], jnp.int32)
    params = model.init(jax.random.key(0), x)["params"]

    def loss(params, x):
        return training.cross_entropy(model.apply({"params": params}, x), labels)

    where = soap_jax.explain(loss, params, x)
    state = soap_jax.init_feedback(
        jax.random.key(1),
        params,
        soap_jax.SignSync(magnitude="unit"),
        where=where,
        initializer="matched",
    )

    def gradient(params, state, x):
        state = soap_jax.sync_feedback(params, state, 0)
        return jax.grad(soap_jax.with_feedback(loss))(params, state.feedback, x), state

    plain = jax.jit(jax.grad(loss)).lower(params, x)
    synced = jax.jit(gradient).lower(params, state, x)
    assert products(synced.as_text()) == products(plain.as_text()) >= 8
    assert products(synced.compile().as_text()) == products(plain.compile().as_text()) >= 8


# Copies


@pytest.mark.parametrize("name", ["FA", "FA, sparse"])
def test_fixed_feedback_and_its_kernels_are_never_copied(name):
    assert copies_of_kernels(texts(name)[1]) == []
    assert copies_of_kernels(compiled_epoch(name).as_text()) == []


@each(BACKPROPS)
def test_nothing_is_copied_that_backprop_does_not_copy(name):
    """XLA copies a kernel that is read after its update may begin: backprop's, for its error."""
    for own, reference in (
        (texts(name)[1], texts("backprop")[1]),
        (compiled_epoch(name).as_text(), compiled_epoch("backprop").as_text()),
    ):
        left = copies_of_kernels(reference)
        for shape in copies_of_kernels(own):
            assert shape in left, shape
            left.remove(shape)


# Donation


def state_bytes(state):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@each(METHODS)
def test_a_donated_step_takes_over_every_buffer_of_its_state(name):
    method = METHODS[name]
    state = start(method, method.wrap(SGD))
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", texts(name)[1]).group(1)
    donated = {int(i) for i in re.findall(r"\((\d+), \{\}", aliases)}
    leaves = jax.tree.leaves(state)
    assert donated == set(range(len(leaves)))
    assert {int(i) for i in re.findall(r"\{(\d+)\}:", aliases)} == donated  # each to its own place


@each(BACKPROPS)
def test_an_epoch_takes_over_the_state(name):
    method = METHODS[name]
    state = start(method, method.wrap(SGD))
    assert compiled_epoch(name).memory_analysis().alias_size_in_bytes == state_bytes(state)


# Scans


@each(METHODS)
def test_an_epoch_calls_nothing_on_the_host(name):
    text = lower_epoch(name).as_text()
    assert "stablehlo.while" in text
    assert not re.search("callback|infeed|outfeed|stablehlo.send|stablehlo.recv", text)


def test_an_epoch_leaves_its_data_as_they_are_stored():
    """Bytes stay bytes: batches are taken out of them, and made floats, one by one."""
    model = models.MLP((9, 10), feedback=False)
    num, size = 1000, 20

    def apply_fn(params, feedback, x):
        return model.apply({"params": params}, x.astype(jnp.float32) / 255)

    params = model.init(jax.random.key(0), jnp.ones((1, 64)))["params"]
    data = jnp.zeros((num, 64), jnp.uint8), jnp.zeros(num, jnp.int32)
    state = training.init_train_state(params, SGD)
    step = training.make_train_step(apply_fn, SGD)
    args = step, state, data, jax.random.key(0)
    compiled = training.train_epoch.lower(*args, batch_size=size).compile()
    assert not re.search(rf"f32\[{num},64\]", compiled.as_text())
    assert f"u8[{num},64]" not in copies(compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < num * 64


@each(["backprop", "FA", "sign, unit", "sign, redraw", "KP", "DFA"])
def test_epochs_trace_once(name):
    """Whatever the step, the key, the data, and the period."""
    method = METHODS[name]
    traces = 0

    def counted(*args, **kwargs):
        nonlocal traces
        traces += 1
        return method.value_and_grad(*args, **kwargs)

    optimizer = method.wrap(SGD)
    step = make_step(method._replace(value_and_grad=counted), optimizer)
    state = start(method, optimizer)
    for seed in range(3):
        x, labels = batches(1, 4 * BATCH)[0]
        data = jnp.asarray(x + seed), jnp.asarray(labels)
        state, _ = training.train_epoch(step, state, data, jax.random.key(seed), batch_size=BATCH)
        if hasattr(state.feedback, "period"):
            new = jax.tree.map(lambda period: period + 3, state.feedback.period)
            state = state._replace(feedback=dataclasses.replace(state.feedback, period=new))
    assert traces == 1


def test_a_loop_without_donation_would_copy():
    """The check of copies can fail: undonated, XLA must write the state elsewhere."""
    method = METHODS["FA"]
    step = jax.jit(make_step(method, SGD))
    compiled = step.lower(start(method, SGD), batches(1, BATCH)[0]).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == 0
    assert {"f32[16,16]", "f32[16,10]"} <= set(copies(compiled.as_text()))


def test_the_check_of_callbacks_can_fail():
    def apply_fn(params, weights, x, labels):
        jax.debug.callback(lambda: None)
        return x.sum() * jax.tree.leaves(params)[0].sum()

    METHODS["calls back"] = of_loss(apply_fn)
    try:
        assert "callback" in lower_epoch("calls back").as_text()
    finally:
        del METHODS["calls back"]


def test_layers_and_transform_compile_to_the_same_products_copies_and_memory():
    by_layers = models.MLP((16, 16, 10))
    plain = models.MLP((16, 16, 10), feedback=False)
    x, labels = batches(1, BATCH)[0]
    variables = by_layers.init(jax.random.key(0), x)
    feedback = soap_jax.init_feedback(
        jax.random.key(1), variables["params"], feedback=variables["feedback"]
    )

    def apply_layers(params, weights, x):
        return by_layers.apply({"params": params, "feedback": weights}, x)

    transformed = soap_jax.with_feedback(lambda params, x: plain.apply({"params": params}, x))
    found = []
    for apply_fn in (apply_layers, transformed):
        step = jax.jit(training.make_train_step(apply_fn, SGD), donate_argnums=0)
        state = training.init_train_state(variables["params"], SGD, feedback=feedback)
        compiled = step.lower(state, (x, labels)).compile()
        text = compiled.as_text()
        found.append((products(text), copies(text), compiled.memory_analysis().temp_size_in_bytes))
    assert found[0] == found[1]
