"""Layers for direct feedback: Linen's and NNX's are the ops, and equal to each other."""

import functools

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import meta

from soap_jax import direct, init_feedback, linen, ops, rules, sync_feedback
from soap_jax import nnx as soap_nnx
from soap_jax.ops import detach

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6), np.float32))
TARGETS = jnp.asarray(np.eye(3, dtype=np.float32)[[0, 2, 1, 2]])
he = jax.nn.initializers.he_normal()


def close(actual, expected, tolerance=1e-6):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


def equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


class LinenDFA(nn.Module):
    """Two hidden layers, the second of them below a feedback layer."""

    fields: tuple = ()

    @nn.compact
    def __call__(self, x):
        h1 = nn.tanh(nn.Dense(7, name="first")(x))
        h2 = nn.tanh(nn.Dense(5, name="second")(detach(h1)))
        h2 = nn.tanh(linen.FeedbackDense(5, name="third")(h2))
        output = nn.Dense(3, name="head")(detach(h2))
        return linen.DirectFeedback(**dict(self.fields), name="direct")(output, {"a": h1, "b": h2})


class NNXDFA(nnx.Module):
    """The same."""

    def __init__(self, rngs, **fields):
        self.first = nnx.Linear(6, 7, rngs=rngs)
        self.direct = soap_nnx.DirectFeedback(3, {"a": 7, "b": (5,)}, **fields, rngs=rngs)
        self.second = nnx.Linear(7, 5, rngs=rngs)
        self.third = soap_nnx.FeedbackLinear(5, 5, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        h1 = nnx.tanh(self.first(x))
        h2 = nnx.tanh(self.third(nnx.tanh(self.second(detach(h1)))))
        return self.direct(self.head(detach(h2)), {"a": h1, "b": h2})


def ops_dfa(variables, x, **kwargs):
    """The same by `soap_jax.direct` alone, of Linen's variables."""
    params, feedback = variables["params"], variables["feedback"]["third"]["kernel"]
    projections = variables["projection"]["direct"]["projection"]

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"][None]

    h1 = jnp.tanh(dense("first", x))
    h2 = jnp.tanh(dense("second", detach(h1)))
    third = ops.feedback_dense(h2, params["third"]["kernel"], feedback)
    h2 = jnp.tanh(third + params["third"]["bias"][None])
    hidden = {"a": h1, "b": h2}
    return direct.direct_feedback(dense("head", detach(h2)), hidden, projections, **kwargs)


def grads_of(f, params):
    """Value and gradients of a loss of three logits."""
    return jax.jit(jax.value_and_grad(lambda params: jnp.sum(jnp.sin(f(params) - TARGETS))))(params)


def with_params(variables):
    return lambda params: {**variables, "params": params}


def moved_to_nnx(variables, **fields):
    """An NNX model with Linen's variables."""
    model = NNXDFA(nnx.Rngs(0), **fields)
    for name, layer in variables["params"].items():
        getattr(model, name).kernel = nnx.Param(layer["kernel"])
        getattr(model, name).bias = nnx.Param(layer["bias"])
    model.third.feedback = soap_nnx.Feedback(variables["feedback"]["third"]["kernel"])
    projection = variables["projection"]["direct"]["projection"]
    model.direct.projection = soap_nnx.Projection(projection)
    return model


# The same computation


@pytest.mark.parametrize("error", ["exact", "sign"])
def test_linen_nnx_and_the_op_agree(error):
    model = LinenDFA((("error", error),))
    variables = jax.jit(model.init)(KEY, X)
    assert set(variables) == {"params", "feedback", "projection"}
    put = with_params(variables)
    expected = grads_of(lambda p: ops_dfa(put(p), X, error=error), variables["params"])
    close(grads_of(lambda p: model.apply(put(p), X), variables["params"]), expected)

    graph, params, others = nnx.split(moved_to_nnx(variables, error=error), nnx.Param, ...)
    value, grads = grads_of(lambda p: nnx.merge(graph, p, others)(X), params)
    close(value, expected[0])
    close(nnx.to_pure_dict(grads), expected[1])


def stored_or_not(**fields):
    return {"stored": False, "projection_init": he} | fields, {"projection_init": he} | fields


def test_keys_in_linen_draw_what_would_be_stored_to_the_bit():
    models = [LinenDFA(tuple(fields.items())) for fields in stored_or_not()]
    by_keys, by_arrays = (jax.jit(model.init)(KEY, X) for model in models)
    equal(by_keys["params"], by_arrays["params"])
    keys = by_keys["projection"]["direct"]["projection"]
    assert jax.tree.map(jnp.shape, keys) == {"a": (), "b": ()}
    assert all(jnp.issubdtype(key.dtype, jax.dtypes.prng_key) for key in jax.tree.leaves(keys))
    actual, expected = (
        grads_of(lambda p, m=m, v=v: m.apply(with_params(v)(p), X), v["params"])
        for m, v in zip(models, (by_keys, by_arrays), strict=True)
    )
    equal(actual, expected)


def test_keys_in_nnx_draw_what_would_be_stored_to_the_bit():
    results = []
    for fields in stored_or_not():
        graph, params, others = nnx.split(NNXDFA(nnx.Rngs(0), **fields), nnx.Param, ...)
        results.append(grads_of(lambda p: nnx.merge(graph, p, others)(X), params))  # noqa: B023
    equal(*results)


@pytest.mark.parametrize("stored", [True, False])
def test_drtp_in_linen_and_nnx_is_the_op(stored):
    layer = linen.DirectTarget(projection_init=he, stored=stored)
    variables = layer.init(KEY, X, TARGETS)
    projection = variables["projection"]["projection"]
    nnx_layer = soap_nnx.DirectTarget(3, 6, projection_init=he, stored=stored, rngs=nnx.Rngs(0))
    nnx_layer.projection = soap_nnx.Projection(projection)
    op, one, other = (
        jax.grad(lambda x, f=f: jnp.sum(f(x, TARGETS)))(X)
        for f in (
            lambda x, t: direct.direct_target(x, t, projection, initializer=he),
            functools.partial(layer.apply, variables),
            nnx_layer,
        )
    )
    equal(one, op)
    equal(other, op)
    if stored:
        close(op, TARGETS @ projection / 4)


@pytest.mark.parametrize("rows", [None, 2])
def test_rows_divide_signs_and_targets(rows):
    output, hidden, projection = TARGETS, jnp.ones((4, 5)), jnp.ones((3, 5))
    variables = {"projection": {"projection": projection}}
    nnx_layers = [
        soap_nnx.DirectFeedback(3, 5, error="sign", rows=rows, rngs=nnx.Rngs(0)),
        soap_nnx.DirectTarget(3, 5, rows=rows, rngs=nnx.Rngs(0)),
    ]
    for layer in nnx_layers:
        layer.projection = soap_nnx.Projection(projection)
    dfa, drtp = linen.DirectFeedback(error="sign", rows=rows), linen.DirectTarget(rows=rows)
    for f in (functools.partial(dfa.apply, variables), nnx_layers[0]):
        bar = jax.grad(lambda hidden, f=f: jnp.sum(f(output, hidden)))(hidden)
        equal(bar, jnp.full((4, 5), 3 / (rows or 4)))
    for f in (functools.partial(drtp.apply, variables), nnx_layers[1]):
        bar = jax.grad(lambda hidden, f=f: jnp.sum(f(hidden, TARGETS)))(hidden)
        equal(bar, jnp.full((4, 5), 1 / (rows or 4)))


HIDDEN = jnp.ones((4, 5, 7))  # with an axis of time


@pytest.mark.parametrize(
    "features, hidden, shapes",
    [
        (7, HIDDEN, (3, 7)),
        ((5, 7), HIDDEN, (3, 5, 7)),
        ([7, 7], [HIDDEN, HIDDEN], [(3, 7), (3, 7)]),  # Flax makes (7, 7) of [7, 7]
        ({"a": [7], "b": (5, 7)}, {"a": [HIDDEN], "b": HIDDEN}, {"a": [(3, 7)], "b": (3, 5, 7)}),
        (flax.core.freeze({"a": 7}), {"a": HIDDEN}, {"a": (3, 7)}),
        ((2, 7), jnp.stack([HIDDEN, HIDDEN]), (2, 3, 7)),
    ],
)
def test_features_in_linen_share_a_projection_over_time(features, hidden, shapes):
    fields = {"stacked": shapes == (2, 3, 7)}
    layer = linen.DirectFeedback(features=features, **fields)
    variables = layer.init(KEY, TARGETS, hidden)
    projection = variables["projection"]["projection"]
    assert jax.tree.map(jnp.shape, projection) == shapes
    bars, expected = (
        jax.grad(lambda hidden, f=f: jnp.sum(f(TARGETS, hidden)))(hidden)
        for f in (
            functools.partial(layer.apply, variables),
            lambda output, hidden: direct.direct_feedback(output, hidden, projection, **fields),
        )
    )
    equal(bars, expected)


@pytest.mark.parametrize("stored", [True, False])
def test_stacked_projections_are_one_for_every_block(stored):
    output, hidden = jnp.ones((4, 3)), jnp.ones((2, 4, 5, 7))
    layer = linen.DirectFeedback(stacked=True, stored=stored)
    variables = layer.init(KEY, output, hidden)
    projection = variables["projection"]["projection"]
    assert projection.shape == ((2, 3, 5, 7) if stored else (2,))
    nnx_layer = soap_nnx.DirectFeedback(3, (2, 5, 7), stacked=True, stored=stored, rngs=nnx.Rngs(0))
    assert nnx_layer.projection.get_value().shape == projection.shape
    nnx_layer.projection = soap_nnx.Projection(projection)
    bars = [
        jax.grad(lambda hidden, f=f: jnp.sum(f(output, hidden)))(hidden)
        for f in (functools.partial(layer.apply, variables), nnx_layer)
    ]
    equal(*bars)
    if stored:
        expected = jnp.broadcast_to(projection.sum(1)[:, None], hidden.shape)
        close(bars[0], expected)


# Variables and keys


class LinenDRTP(nn.Module):
    use: bool = True

    @nn.compact
    def __call__(self, x, targets):
        for i in range(2):
            x = nn.tanh(nn.Dense(7, name=f"Dense_{i}")(x))
            x = linen.DirectTarget()(x, targets) if self.use else x
        return nn.Dense(3, name="Dense_2")(x)


def test_linen_kernels_are_those_of_the_plain_model():
    plain = LinenDRTP(use=False).init(KEY, X, TARGETS)
    variables = LinenDRTP().init({"params": KEY, "feedback": jax.random.key(1)}, X, TARGETS)
    for model_variables in (variables, LinenDRTP().init(KEY, X, TARGETS)):
        equal(model_variables["params"], plain["params"])
    a, b = (layer["projection"] for layer in variables["projection"].values())
    assert a.shape == b.shape and not np.any(a == b)
    others = LinenDRTP().init({"params": KEY, "feedback": jax.random.key(2)}, X, TARGETS)
    assert not np.any(a == others["projection"]["DirectTarget_0"]["projection"])


@pytest.mark.parametrize("seeds", [{"default": 0}, {"params": 0, "feedback": 1}, {"params": 0}])
def test_nnx_kernels_are_those_of_the_plain_model(seeds):
    rngs, plain = nnx.Rngs(**seeds), nnx.Rngs(**seeds)
    targets = []
    for _ in range(2):
        # Without a draw of a kernel between them, and with one.
        targets += [soap_nnx.DirectTarget(3, 7, rngs=rngs) for _ in range(2)]
        equal(nnx.Linear(6, 7, rngs=rngs).kernel[...], nnx.Linear(6, 7, rngs=plain).kernel[...])
    drawn = [target.projection[...] for target in targets]
    for i, one in enumerate(drawn):
        assert not any(np.any(one == other) for other in drawn[:i])


def test_raw_and_frozen_variables_serve_as_well():
    variables = LinenDFA().init(jax.random.PRNGKey(0), X)
    equal(variables, LinenDFA().init(KEY, X))
    frozen = flax.core.freeze(variables)
    equal(LinenDFA().apply(frozen, X), LinenDFA().apply(variables, X))


def test_init_is_abstract_and_apply_changes_nothing():
    variables = jax.eval_shape(LinenDFA((("stored", False),)).init, KEY, X)
    assert variables["projection"]["direct"]["projection"]["a"].shape == ()
    variables = LinenDFA().init(KEY, X)
    _, changed = LinenDFA().apply(variables, X, mutable=["projection"])
    equal(changed, {"projection": variables["projection"]})


def test_a_mixed_linen_model_syncs_the_feedback_that_has_kernels():
    variables = LinenDFA().init(KEY, X)
    params = variables["params"]
    state = init_feedback(
        KEY, params, rules.SignSync(magnitude="unit"), feedback=variables["feedback"]
    )
    synced = sync_feedback(params, state, 0).feedback
    equal(synced["third"]["kernel"], np.sign(params["third"]["kernel"]))
    LinenDFA().apply({**variables, "feedback": synced}, X)
    with pytest.raises(ValueError, match="has no kernel"):  # projections are not feedback
        init_feedback(KEY, params, feedback=variables["projection"])


def test_a_mixed_nnx_model_syncs_the_feedback_that_has_kernels():
    model = NNXDFA(nnx.Rngs(0))
    params, feedback = nnx.state(model, nnx.Param), nnx.state(model, soap_nnx.Feedback)
    projection = nnx.state(model, soap_nnx.Projection)
    state = init_feedback(KEY, params, rules.SignSync(magnitude="unit"), feedback=feedback)
    nnx.update(model, sync_feedback(params, state, 0).feedback)
    equal(model.third.feedback[...], np.sign(model.third.kernel[...]))
    equal(nnx.state(model, soap_nnx.Projection), projection)
    with pytest.raises(ValueError, match="has no kernel"):
        init_feedback(KEY, params, feedback=projection)


@pytest.mark.parametrize("stored", [True, False])
def test_a_train_step_of_an_nnx_model_leaves_projections_alone(stored):
    model = NNXDFA(nnx.Rngs(0), stored=stored)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    before = nnx.state(model, soap_nnx.Projection)
    keys_of = functools.partial(jax.tree.map, lambda p: p if stored else jax.random.key_data(p))
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - TARGETS) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < losses[0] / 2 and len(traces) == 1
    equal(keys_of(nnx.state(model, soap_nnx.Projection)), keys_of(before))


@pytest.mark.parametrize("stored", [True, False])
def test_models_are_vmapped_over_seeds(stored):
    model = LinenDFA((("stored", stored),))
    keys = jax.random.split(KEY, 2)
    many = jax.jit(jax.vmap(lambda key: model.init(key, X)))(keys)

    def gradient(variables):
        f = lambda params: jnp.sum(jnp.sin(model.apply({**variables, "params": params}, X)))  # noqa: E731
        return jax.grad(f)(variables["params"])

    together = jax.jit(jax.vmap(gradient))(many)
    for i in range(2):
        alone = jax.jit(gradient)(model.init(keys[i], X))
        close(jax.tree.map(lambda leaf: leaf[i], together), alone, 1e-5)  # noqa: B023

    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "feedback": 0, "projection": 0}
            splits = {"params": True, "feedback": True}
            members = nn.vmap(
                LinenDFA, variable_axes=axes, split_rngs=splits, in_axes=None, axis_size=2
            )
            return members((("stored", stored),), name="members")(x)

    variables = Ensemble().init(KEY, X)
    assert Ensemble().apply(variables, X).shape == (2, 4, 3)


# Stacks


class Block(nn.Module):
    width: int = 6

    @nn.compact
    def __call__(self, x):
        return x + nn.tanh(nn.Dense(self.width)(nn.LayerNorm()(x)))


def looped(apply, x, length):
    activations = []
    for i in range(length):
        x = apply(i, detach(x))
        activations.append(x)
    return jnp.stack(activations)


def stack_loss(run, x):
    return lambda params: jnp.sum(jnp.sin(run(params, x)))


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("block", [Block(), nn.Sequential([nn.Dense(6), nn.tanh])])
def test_a_linen_stack_is_a_loop_of_blocks_with_their_own_keys(block, parallel):
    stack = linen.DirectStack(block, 3, parallel=parallel)
    params = jax.jit(stack.init)(KEY, X)["params"]
    leaves = jax.tree.leaves_with_path(params["blocks"])
    for _, leaf in leaves:
        assert leaf.shape[0] == 3
    kernel = next(leaf for path, leaf in leaves if "kernel" in str(path))
    assert not np.any(kernel[0] == kernel[1])
    one = jax.tree.map(jnp.shape, block.init(KEY, X)["params"])
    assert jax.tree.map(lambda leaf: leaf.shape[1:], params["blocks"]) == one

    def loop(params, x):
        return looped(
            lambda i, x: block.apply(
                {"params": jax.tree.map(lambda leaf: leaf[i], params["blocks"])}, x
            ),
            x,
            3,
        )

    def run(params, x):
        return stack.apply({"params": params}, x)

    actual, expected = (jax.jit(jax.grad(stack_loss(f, X)))(params) for f in (run, loop))
    close(run(params, X), loop(params, X), 1e-5)
    close(actual, expected, 1e-5)


@pytest.mark.parametrize("parallel", [True, False])
def test_an_nnx_stack_is_a_loop_of_blocks_drawn_one_after_the_other(parallel):
    def make(rngs):
        return nnx.Sequential(nnx.LayerNorm(6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs), nnx.tanh)

    stack = soap_nnx.DirectStack(make, 3, parallel=parallel, rngs=nnx.Rngs(0))
    rngs = nnx.Rngs(0)
    blocks = [make(rngs) for _ in range(3)]
    graph, params = nnx.split(stack)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(params))

    def loop(states, x):
        graph, _ = nnx.split(blocks[0])
        return looped(lambda i, x: nnx.merge(graph, states[i])(x), x, 3)

    def run(params, x):
        return nnx.merge(graph, params)(x)

    states = [nnx.state(block) for block in blocks]
    close(run(params, X), loop(states, X), 1e-5)
    actual = nnx.to_pure_dict(jax.jit(jax.grad(stack_loss(run, X)))(params))["block"]
    expected = map(nnx.to_pure_dict, jax.jit(jax.grad(stack_loss(loop, X)))(states))
    close(actual, jax.tree.map(lambda *leaves: np.stack(leaves), *expected), 1e-5)


class LinenStackModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        h0 = nn.tanh(nn.Dense(6, name="stem")(x))
        activations = linen.DirectStack(Block(), 3, name="stack")(detach(h0))
        output = nn.Dense(3, name="head")(detach(activations[-1]))
        output = linen.DirectFeedback()(output, [h0])
        return linen.DirectFeedback(stacked=True)(output, activations)


class NNXStackModel(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(6, 6, rngs=rngs)
        self.direct_stem = soap_nnx.DirectFeedback(3, [6], rngs=rngs)
        make = lambda rngs: nnx.Sequential(nnx.Linear(6, 6, rngs=rngs), nnx.tanh)  # noqa: E731
        self.stack = soap_nnx.DirectStack(make, 3, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)
        self.direct = soap_nnx.DirectFeedback(3, (3, 6), stacked=True, rngs=rngs)

    def __call__(self, x):
        h0 = nnx.tanh(self.stem(x))
        activations = self.stack(detach(h0))
        output = self.direct_stem(self.head(detach(activations[-1])), [h0])
        return self.direct(output, activations)


def test_stacks_learn_inside_models():
    variables = LinenStackModel().init(KEY, X)
    assert set(variables["params"]) == {"stem", "stack", "head"}
    linen_params, projection = variables["params"], variables["projection"]

    @jax.jit
    @jax.value_and_grad
    def linen_loss(params):
        output = LinenStackModel().apply({"params": params, "projection": projection}, X)
        return jnp.mean((output - TARGETS) ** 2)

    graph, nnx_params, others = nnx.split(NNXStackModel(nnx.Rngs(0)), nnx.Param, ...)

    @jax.jit
    @jax.value_and_grad
    def nnx_loss(params):
        return jnp.mean((nnx.merge(graph, params, others)(X) - TARGETS) ** 2)

    for loss, start in ((linen_loss, linen_params), (nnx_loss, nnx_params)):
        params = start
        first, grads = loss(params)
        assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
        for _ in range(30):
            _, grads = loss(params)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        assert float(loss(params)[0]) < float(first) / 2


def test_boxes_of_a_stacks_params_name_the_axis_of_blocks():
    kernel_init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    stack = linen.DirectStack(nn.Dense(6, kernel_init=kernel_init), 3)
    variables = stack.init(KEY, X)
    box = variables["params"]["blocks"]["kernel"]
    assert isinstance(box, nn.Partitioned) and box.names == (None, None, "model")
    assert stack.apply(variables, X).shape == stack.apply(meta.unbox(variables), X).shape


# Errors


def test_no_collection_of_projections_raises():
    variables = LinenDFA().init(KEY, X)
    message = r"DirectFeedback at direct found no projection.*\n.*'projection': projection"
    for projection in ({}, {"projection": {}}, {"projection": {"direct": {"projection": None}}}):
        others = {name: variables[name] for name in ("params", "feedback")}
        with pytest.raises(ValueError, match=message):
            LinenDFA().apply(others | projection, X)
    with pytest.raises(ValueError, match="DirectTarget at the top found no projection"):
        linen.DirectTarget().apply({}, X, TARGETS)
    with pytest.raises(ValueError, match="found no projection"):
        linen.DirectTarget().init(KEY, X, TARGETS, mutable=["params"])


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(6)(x))


@pytest.mark.parametrize(
    "block, message",
    [
        (nn.BatchNorm(use_running_average=False), r"has the collections \['batch_stats'\]"),
        (linen.FeedbackDense(6), r"has the collections \['feedback'\]"),
        (Noisy(), "draws random numbers"),
    ],
)
def test_a_linen_block_with_more_than_params_raises(block, message):
    with pytest.raises(ValueError, match=message + "; expected params only"):
        linen.DirectStack(block, 3).init(KEY, X)


@pytest.mark.parametrize(
    "make, kinds",
    [
        (lambda rngs: nnx.BatchNorm(6, rngs=rngs), "BatchStat"),
        (lambda rngs: nnx.Dropout(0.5, rngs=rngs), "RngCount, RngKey"),
        (lambda rngs: soap_nnx.FeedbackLinear(6, 6, rngs=rngs), "Feedback"),
    ],
)
def test_an_nnx_block_with_more_than_params_raises(make, kinds):
    with pytest.raises(ValueError, match=f"variables of the type {kinds}; expected nnx.Param only"):
        soap_nnx.DirectStack(make, 3, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "block, length, message",
    [
        (nn.Dense, 3, r"block is a class; expected a module instance, such as nn.Dense\(64\)"),
        (nn.tanh, 3, "block is a .*; expected a module instance"),
        (12, Block(), r"length is a Block; expected an integer, as in DirectStack\(block,"),
        (nn.Dropout(0.5, deterministic=True), 3, "a Dropout, has no params; expected params only"),
    ],
)
def test_what_is_no_linen_block_raises(block, length, message):
    with pytest.raises(ValueError, match=message):
        linen.DirectStack(block, length).init(KEY, X)


def nothing(rngs):
    return nnx.Sequential(nnx.tanh)


@pytest.mark.parametrize(
    "make, length, message",
    [
        (nnx.Linear(6, 6, rngs=nnx.Rngs(0)), 3, "make_block is a Linear; expected a function of"),
        (12, nothing, "make_block is a int; expected a function of rngs"),
        (nothing, 3.0, r"length is a float; expected an integer, as in DirectStack\(make_block,"),
        (nothing, 3, "has no nnx.Param; expected a block with parameters"),
    ],
)
def test_what_makes_no_nnx_block_raises(make, length, message):
    with pytest.raises(ValueError, match=message):
        soap_nnx.DirectStack(make, length, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"features": [7, 7]}, r"features are \(7, 7\); expected .* structure, .*\(4, 5, 7\)"),
        ({"features": {"a": 7.0}}, "features are .*a: 7.0.*; expected a tree of the activations'"),
        ({"features": {"a": 7}, "stored": False}, "with stored=False; expected stored=True"),
        ({"features": {"a": 6}}, r"the projection at \['a'\] has shape \(3, 6\)"),
    ],
)
def test_features_that_do_not_fit_raise(fields, message):
    with pytest.raises(ValueError, match="(?s)" + message):
        linen.DirectFeedback(**fields).init(KEY, TARGETS, {"a": HIDDEN})


def test_a_stack_of_no_blocks_raises():
    with pytest.raises(ValueError, match="length is 0; expected 1 or more"):
        linen.DirectStack(Block(), 0).init(KEY, X)
    with pytest.raises(ValueError, match="length is 0; expected 1 or more"):
        soap_nnx.DirectStack(lambda rngs: nnx.Linear(6, 6, rngs=rngs), 0, rngs=nnx.Rngs(0))


def test_a_block_whose_output_is_unlike_its_input_raises():
    with pytest.raises(ValueError, match=r"block maps float32\[4, 6\] to float32\[4, 5\]"):
        linen.DirectStack(nn.Dense(5), 2).init(KEY, X)
    with pytest.raises(ValueError, match=r"block maps float32\[4, 6\] to float32\[4, 5\]"):
        soap_nnx.DirectStack(lambda rngs: nnx.Linear(6, 5, rngs=rngs), 2, rngs=nnx.Rngs(0))(X)


def test_keys_in_nnx_serve_their_own_features_only():
    output, hidden = jnp.ones((4, 3)), jnp.ones((4, 5, 7))
    shared = soap_nnx.DirectFeedback(3, 7, rngs=nnx.Rngs(0))
    shared(output, hidden)  # the same at all times
    drawn = soap_nnx.DirectFeedback(3, 7, stored=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"features are \(7,\), but .* they are \(5, 7\)"):
        drawn(output, hidden)
    soap_nnx.DirectFeedback(3, (5, 7), stored=False, rngs=nnx.Rngs(0))(output, hidden)
    with pytest.raises(ValueError, match="expected one projection for each activation"):
        drawn(output, (hidden, hidden))
