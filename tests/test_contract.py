"""What every method keeps to: one battery, run on all of them.

A method is how feedback starts, how a gradient is taken, and which optimiser takes it. Add yours to
`METHODS`; a rule alone is `of_rule(YourRule())`.
"""

import functools
import importlib.util
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import soap_jax
from soap_jax import (
    activity,
    direct,
    initializers,
    linen,
    local,
    metrics,
    models,
    ops,
    optimizers,
    rules,
    training,
)
from soap_jax import nnx as soap_nnx

MAGNITUDES = ("unit", "glorot", "preserve", "norm", "redraw", "kernel")
WIDTHS = (16, 16, 10)
ABOVE_FIRST = ["Dense_1/kernel", "Dense_2/kernel"]


class Method(NamedTuple):
    """One method on one small network.

    Attributes:
        init: `key -> (params, feedback)`.
        value_and_grad: as in `training.make_gradient_step`.
        logits: `(params, x) -> logits`.
        wrap: makes the method's optimiser of an ordinary one.
        learns: whether the optimiser learns feedback.
        widths: of the network's layers.
        rate: the learning rate at which it trains.
        gain: how much more accurate it must become than with frozen hidden layers.
        angle: below which the angle of feedback to kernels must have fallen; None if it need not.
    """

    init: Callable
    value_and_grad: Callable
    logits: Callable
    wrap: Callable = lambda optimizer: optimizer
    learns: bool = False
    widths: tuple[int, ...] = WIDTHS
    rate: float = 0.2
    gain: float = 0.05
    angle: float | None = None


def plain(widths=WIDTHS):
    return models.MLP(widths, feedback=False)


def loss(params, x, labels):
    return training.cross_entropy(plain().apply({"params": params}, x), labels)


def dense(layer, x, feedback=None):
    return ops.feedback_dense(x, layer["kernel"], feedback) + layer["bias"][None]


def of_loss(fun, init_feedback=lambda key, params: None, *, widths=WIDTHS, **more):
    """A method whose gradient is that of `fun(params, weights, x, labels)`."""
    model = plain(widths)

    def init(key):
        init_key, feedback_key = jax.random.split(key)
        params = model.init({"params": init_key}, jnp.ones((1, 64)))["params"]
        return params, init_feedback(feedback_key, params)

    argnums = (0, 1) if more.get("learns") else 0

    def value_and_grad(params, weights, batch, step):
        del step
        return jax.value_and_grad(fun, argnums)(params, weights, *batch)

    def logits(params, x):
        return model.apply({"params": params}, x)

    return Method(init, value_and_grad, logits, widths=widths, **more)


def of_rule(rule, *, feedback_bar=None, initializer="matched", **more):
    """A method that sends errors through kernels' feedback, which a rule syncs."""

    def init_feedback(key, params):
        return soap_jax.init_feedback(key, params, rule, where=ABOVE_FIRST, initializer=initializer)

    return of_loss(soap_jax.with_feedback(loss, feedback_bar=feedback_bar), init_feedback, **more)


def of_projections(error="exact", draw=direct.draw_projection, *, widths=WIDTHS, **more):
    """Direct feedback, written as a plain function."""
    *hidden_widths, out = widths

    def fun(params, projections, x, labels):
        hidden = []
        *below, last = (params[f"Dense_{i}"] for i in range(len(widths)))
        for i, layer in enumerate(below):
            if error == "target":
                targets = jax.nn.one_hot(labels, out)
                x = direct.direct_target(jnp.tanh(dense(layer, x)), targets, projections[i])
            else:
                hidden.append(jnp.tanh(dense(layer, ops.detach(x))))
                x = hidden[-1]
        if error == "target":
            return training.cross_entropy(dense(last, x), labels)
        output = dense(last, ops.detach(x))
        output = direct.direct_feedback(output, hidden, projections, error=error)
        return training.cross_entropy(output, labels)

    def init_feedback(key, params):
        keys = jax.random.split(key, len(hidden_widths))
        return [draw(key, out, width) for key, width in zip(keys, hidden_widths, strict=True)]

    return of_loss(fun, init_feedback, widths=widths, **more)


def of_names(widths=WIDTHS, projection_bar=None, **more):
    """Direct feedback to the hidden layers of a function that names them."""
    taps = [f"h{i}" for i in range(len(widths) - 1)]

    def fun(params, x, labels):
        for i, tap in enumerate(taps):
            x = checkpoint_name(jnp.tanh(dense(params[f"Dense_{i}"], x)), tap)
        logits = checkpoint_name(dense(params[f"Dense_{len(taps)}"], x), "logits")
        return training.cross_entropy(logits, labels)

    by_names = soap_jax.with_direct_feedback(fun, taps, "logits", projection_bar=projection_bar)

    def init_feedback(key, params):
        batch = jnp.ones((1, 64)), jnp.zeros(1, jnp.int32)
        return soap_jax.init_projections(key, by_names, params, *batch)

    return of_loss(by_names, init_feedback, widths=widths, **more)


def of_linen(model, collection="feedback"):
    """A Linen model with feedback or projections of its own."""

    def init(key):
        init_key, feedback_key = jax.random.split(key)
        variables = model.init({"params": init_key, "feedback": feedback_key}, jnp.ones((1, 64)))
        weights = variables[collection]
        if collection == "feedback":
            weights = soap_jax.init_feedback(key, variables["params"], feedback=weights)
        return variables["params"], weights

    def value_and_grad(params, weights, batch, step):
        del step
        x, labels = batch

        def loss(params):
            logits = model.apply({"params": params, collection: weights}, x)
            return training.cross_entropy(logits, labels)

        return jax.value_and_grad(loss)(params)

    def logits(params, x):
        like = jax.eval_shape(lambda: init(jax.random.key(0))[1])
        weights = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        weights = training.feedback_weights(weights)
        return model.apply({"params": params, collection: weights}, x)

    return Method(init, value_and_grad, logits)


def of_nnx(make, kind):
    """An NNX model with feedback or projections of its own; `kind` is their type."""
    graph, _, like = nnx.split(make(nnx.Rngs(0)), nnx.Param, kind)

    def init(key):
        _, params, weights = nnx.split(make(nnx.Rngs(params=key, feedback=key)), nnx.Param, kind)
        if kind is soap_nnx.Feedback:
            weights = soap_jax.init_feedback(key, params, feedback=weights)
        return params, weights

    def value_and_grad(params, weights, batch, step):
        del step
        x, labels = batch

        def loss(params):
            return training.cross_entropy(nnx.merge(graph, params, weights)(x), labels)

        return jax.value_and_grad(loss)(params)

    def logits(params, x):
        return nnx.merge(graph, params, like)(x)

    return Method(init, value_and_grad, logits)


def of_activity(through=None):
    """Activity propagation, with backprop or feedback alignment below it."""

    def loss(tap, params, weights, x, labels):
        x = tap("0", jnp.tanh(dense(params["Dense_0"], x)))
        for i in (1, 2):
            layer = params[f"Dense_{i}"]
            feedback = weights and weights[f"Dense_{i}"]["kernel"]
            x = dense(layer, x, feedback)
            x = x if i == 2 else tap("1", jnp.tanh(x))
        return training.cross_entropy(x, labels)

    grad_fn = activity.value_and_grad(loss, learning_rate=100.0, bias=0.1, warmup=2)
    below = of_loss(None) if through is None else of_rule(through)

    def value_and_grad(params, weights, batch, step):
        return grad_fn(params, weights, *batch, step=step)

    return below._replace(value_and_grad=value_and_grad)


def of_kolen_pollack(wrap, feedback_bar="kernel"):
    return of_rule(rules.Fixed(), feedback_bar=feedback_bar, wrap=wrap, learns=True, angle=30.0)


def of_learned(initializer, angle=45.0):
    def wrap(optimizer):
        return optimizers.hold_fixed(optax.chain(optax.add_decayed_weights(1e-2), optimizer))

    more = {"feedback_bar": "kernel", "initializer": initializer, "learns": True, "wrap": wrap}
    return of_rule(rules.Fixed(), angle=angle, **more)


def of_local(loss, angle):
    def wrap(optimizer):
        parts = {"params": optimizer, "feedback": optax.sgd(0.05)}
        return optax.partition(parts, ("params", "feedback"))

    return of_rule(rules.Fixed(), feedback_bar=loss, wrap=wrap, learns=True, angle=angle)


def template():
    """The rule of examples/new_rule.py."""
    path = pathlib.Path(__file__).parents[1] / "examples" / "new_rule.py"
    spec = importlib.util.spec_from_file_location("new_rule", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RULE


class Conv(nn.Module):
    """Two convolutions, in the layers of `soap_jax.linen`."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), 8, 8, 1)
        x = nn.tanh(nn.Conv(6, (3, 3), strides=2)(x))
        x = nn.tanh(linen.FeedbackConv(8, (3, 3), strides=2)(x))
        return linen.FeedbackDense(10)(x.reshape(len(x), -1))


class DirectConv(nn.Module):
    """Two convolutions with direct feedback, one projection through all of space."""

    @nn.compact
    def __call__(self, x):
        h1 = nn.tanh(nn.Conv(6, (3, 3), strides=2)(x.reshape(len(x), 8, 8, 1)))
        h2 = nn.tanh(nn.Conv(8, (3, 3), strides=2)(ops.detach(h1)))
        output = nn.Dense(10)(ops.detach(h2).reshape(len(x), -1))
        return linen.DirectFeedback()(output, {"h1": h1, "h2": h2})


class DirectStack(nn.Module):
    """A first layer, a stack of blocks, all with direct feedback."""

    parallel: bool

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(16)(x))
        block = nn.Sequential([nn.Dense(16), nn.tanh])
        stack = linen.DirectStack(block, 3, parallel=self.parallel)(ops.detach(x))
        output = nn.Dense(10)(ops.detach(stack[-1]))
        output = linen.DirectFeedback(stacked=True)(output, stack)
        return linen.DirectFeedback()(output, x)


class FeedbackNNX(nnx.Module):
    """Feedback layers of `soap_jax.nnx`."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 16, rngs=rngs)
        self.second = soap_nnx.FeedbackLinear(16, 10, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


class DirectNNX(nnx.Module):
    """Direct feedback by the layer of `soap_jax.nnx`."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 16, rngs=rngs)
        self.second = nnx.Linear(16, 16, rngs=rngs)
        self.third = nnx.Linear(16, 10, rngs=rngs)
        self.direct = soap_nnx.DirectFeedback(10, [16, 16], rngs=rngs)

    def __call__(self, x):
        h1 = jnp.tanh(self.first(x))
        h2 = jnp.tanh(self.second(ops.detach(h1)))
        return self.direct(self.third(ops.detach(h2)), [h1, h2])


def seed_in_place(key, out, features):
    return key


def drawn(initializer):
    return functools.partial(direct.draw_projection, initializer=initializer)


METHODS = {
    "backprop": of_loss(lambda params, weights, x, labels: loss(params, x, labels)),
    "FA": of_rule(rules.Fixed()),
    "FA, sparse": of_rule(rules.Fixed(), initializer=initializers.sparse(0.5, axis=-1)),
    **{f"sign, {m}": of_rule(rules.SignSync(period=2, magnitude=m)) for m in MAGNITUDES},
    "transport": of_rule(rules.Transport(period=3, rate=0.5), angle=5.0),
    "weight mirror": of_rule(rules.WeightMirror(), angle=10.0),
    "template": of_rule(template(), angle=40.0),
    "two rules": of_rule({"Dense_1/*": rules.SignSync(magnitude="norm"), "*": rules.Fixed()}),
    "KP": of_kolen_pollack(lambda sgd: optax.chain(optax.add_decayed_weights(1e-2), sgd)),
    "kolen_pollack": of_kolen_pollack(
        lambda optimizer: optimizers.kolen_pollack(optimizer, decay=1e-3), feedback_bar=None
    ),
    "PFA": of_learned(initializers.product(8)),
    "PFA, orthogonal": of_learned(initializers.product(orthogonal=True)),
    "LDFA": of_learned(initializers.low_rank(9, as_factors=True), angle=60.0),
    "symmetric alignment": of_local(local.SymmetricAlignment(), 5.0),
    "activation alignment": of_local(local.ActivationAlignment(), 10.0),
    "information alignment": of_local(local.InformationAlignment(), 50.0),
    "DFA": of_projections(),
    "DFA, by names": of_names(),
    "direct Kolen-Pollack": of_names(
        projection_bar="kernel",
        wrap=lambda sgd: optax.chain(optax.add_decayed_weights(1e-2), sgd),
        learns=True,
    ),
    "DFA, from seeds": of_projections(draw=seed_in_place),
    "DFA, sparse": of_projections(draw=drawn(initializers.sparse(0.1, axis=-2))),
    "DFA, low rank": of_projections(draw=drawn(initializers.low_rank(4))),
    # Nine signs of ten are alike, which drives hidden units into saturation: wide and shallow.
    "sDFA": of_projections("sign", widths=(24, 10), rate=0.5, gain=0.01),
    "DRTP": of_projections("target", widths=(32, 10), rate=0.5),
    "activity propagation": of_activity(),
    "activity propagation, FA": of_activity(rules.Fixed()),
    "Linen, convolutions": of_linen(Conv()),
    "Linen, DFA of convolutions": of_linen(DirectConv(), "projection"),
    "Linen, stack": of_linen(DirectStack(parallel=False), "projection"),
    "Linen, parallel stack": of_linen(DirectStack(parallel=True), "projection"),
    "NNX": of_nnx(FeedbackNNX, soap_nnx.Feedback),
    "NNX, DFA": of_nnx(DirectNNX, soap_nnx.Projection),
}
every_method = pytest.mark.parametrize("name", METHODS)


@functools.cache
def digits():
    sklearn = pytest.importorskip("sklearn.datasets", reason="the digits come with scikit-learn")
    bunch = sklearn.load_digits()
    x, labels = (bunch.data / 8 - 1).astype(np.float32), bunch.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(x))
    return x[order], labels[order]


def batches(num, size=16):
    rng = np.random.default_rng(1)
    return [
        (rng.standard_normal((size, 64), np.float32), rng.integers(0, 10, size, np.int32))
        for _ in range(num)
    ]


def start(method, optimizer, seed=0):
    params, feedback = method.init(jax.random.key(seed))
    return training.init_train_state(
        params, optimizer, feedback=feedback, learn_feedback=method.learns
    )


def make_step(method, optimizer):
    return training.make_gradient_step(
        method.value_and_grad, optimizer, learn_feedback=method.learns
    )


def types(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.asarray(leaf).dtype), tree)


def close(a, b, tolerance=1e-5):
    """Equal to rounding; PRNG keys by their bits."""
    a, b = jax.tree.map(_bits, (a, b))
    chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)


def _bits(leaf):
    is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


@every_method
def test_a_step_keeps_structure_repeats_itself_and_composes_with_optax(name):
    """Also: compiled once for all steps; the value is the network's; params are the optimiser's."""
    method = METHODS[name]
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=1e-2))
    optimizer = method.wrap(clipped)
    traced = []

    @jax.jit
    def step(state, batch):
        traced.append(None)
        return make_step(method, optimizer)(state, batch)

    first, second, third = batches(3)

    begin = start(method, optimizer)
    state, value = step(begin, first)
    expected = training.cross_entropy(method.logits(begin.params, first[0]), first[1])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    state = step(state, second)[0]
    assert jax.tree.structure(state) == jax.tree.structure(begin)
    assert types(state) == types(begin)
    assert int(state.step) == 2

    again = jax.tree.map(lambda leaf: leaf.copy(), state)
    close(step(again, third), step(state, third), tolerance=0)
    assert len(traced) == 1


@every_method
def test_training_beats_frozen_hidden_layers_and_aligns_what_it_should(name):
    method = METHODS[name]
    accuracy, state = train(method, method.wrap(optax.sgd(method.rate)))
    assert accuracy > frozen_accuracy(method.widths, method.rate) + method.gain
    if method.angle is not None:
        angles = metrics.weight_angle(state.params, state.feedback.feedback)
        assert max(map(float, jax.tree.leaves(angles))) < method.angle


QUICK = {"FA", "sign, redraw", "weight mirror", "kolen_pollack", "information alignment", "DFA"}
QUICK |= {"DRTP", "activity propagation", "Linen, parallel stack", "NNX, DFA"}


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_runs_may_be_mapped_and_batches_sharded(name, explicit_mesh):
    method, optimizer = METHODS[name], METHODS[name].wrap(optax.sgd(0.1))
    step = make_step(method, optimizer)
    batch = batches(1)[0]
    states = [start(method, optimizer, seed) for seed in range(2)]
    alone = [jax.jit(step)(state, batch) for state in states]

    def stack(*trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    together = jax.jit(jax.vmap(step, in_axes=(0, None)))(stack(*states), batch)
    close(together, stack(*alone))

    with jax.set_mesh(explicit_mesh):
        shards = jax.device_put(batch, NamedSharding(explicit_mesh, P("data")))
        everywhere = jax.device_put(states[0], NamedSharding(explicit_mesh, P()))
        close(jax.jit(step)(everywhere, shards), alone[0])


@functools.cache
def frozen_accuracy(widths, rate):
    """The accuracy of a network of which only the output layer learns."""
    names = [f"Dense_{i}" for i in range(len(widths))]
    labels = {name: "frozen" for name in names} | {names[-1]: "learns"}
    optimizer = optax.partition({"learns": optax.sgd(rate), "frozen": optax.set_to_zero()}, labels)
    model = plain(widths)

    def loss(params, weights, x, labels):
        return training.cross_entropy(model.apply({"params": params}, x), labels)

    return train(of_loss(loss, widths=widths), optimizer)[0]


def train(method, optimizer, epochs=12):
    """Test accuracy on digits after one compiled, scanned training, and the state."""
    x, labels = digits()
    data, test = (x[:1500], labels[:1500]), (x[1500:], labels[1500:])
    step = make_step(method, optimizer)
    keys = jax.random.split(jax.random.key(0), epochs)
    order = jax.vmap(lambda key: training.epoch_order(key, 1500, 16))(keys).reshape(-1, 16)

    @jax.jit
    def run(state):
        state, losses = training.scan_batches(step, state, data, order)
        hits = jnp.argmax(method.logits(state.params, test[0]), -1) == test[1]
        return jnp.mean(hits), losses, state

    accuracy, losses, state = run(start(method, optimizer))
    assert np.isfinite(losses).all()
    return float(accuracy), state
