"""Kolen-Pollack learning: the difference of kernel and feedback, update by update."""

import functools
import itertools
import re

import chex
import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import soap_jax
from soap_jax import kolen_pollack, metrics, optimizers, trees

SIZES = (6, 9, 7, 3)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((20, 6)), jnp.float32)
LABELS = jnp.argmax(X @ jnp.asarray(RNG.standard_normal((6, 3)), jnp.float32), 1)

# Models: `(params, feedback)` and `gradient(params, feedback)`, which is by both.


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def plain_loss(params, x):
    h = x
    for i in range(3):
        layer = params[f"Dense_{i}"]
        h = h @ layer["kernel"] + layer["bias"][None]
        h = jnp.tanh(h) if i < 2 else h
    return cross_entropy(h)


def make_weights(seed):
    rng = np.random.default_rng(seed)
    return {
        f"Dense_{i}": {
            "kernel": jnp.asarray(rng.standard_normal((a, b)) / np.sqrt(a), jnp.float32),
            "bias": jnp.asarray(rng.standard_normal(b), jnp.float32),
        }
        for i, (a, b) in enumerate(itertools.pairwise(SIZES))
    }


def plain():
    drawn = make_weights(2)
    feedback = {"Dense_0": None} | {i: drawn[i] | {"bias": None} for i in ("Dense_1", "Dense_2")}
    gradient = jax.grad(soap_jax.with_feedback(plain_loss, feedback_bar="kernel"), argnums=(0, 1))
    return (make_weights(1), feedback), lambda params, feedback: gradient(params, feedback, X)


def linen():
    dense = functools.partial(soap_jax.linen.FeedbackDense, feedback_bar="kernel")
    model = nn.Sequential([nn.Dense(9), nn.tanh, dense(7), nn.tanh, dense(3)])
    variables = model.init(jax.random.key(0), X)

    def loss(params, feedback):
        return cross_entropy(model.apply({"params": params, "feedback": feedback}, X))

    return (variables["params"], variables["feedback"]), jax.grad(loss, argnums=(0, 1))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        linear = functools.partial(soap_jax.nnx.FeedbackLinear, feedback_bar="kernel", rngs=rngs)
        self.below, self.middle, self.top = nnx.Linear(6, 9, rngs=rngs), linear(9, 7), linear(7, 3)

    def __call__(self, x):
        return self.top(jnp.tanh(self.middle(jnp.tanh(self.below(x)))))


def in_nnx():
    graph, params, feedback = nnx.split(NnxModel(nnx.Rngs(0)), nnx.Param, soap_jax.nnx.Feedback)

    def loss(params, feedback):
        return cross_entropy(nnx.merge(graph, params, feedback)(X))

    return (params, feedback), jax.grad(loss, argnums=(0, 1))


MODELS = {"with_feedback": plain, "linen": linen, "nnx": in_nnx}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def gaps(params, feedback):
    """`|W - B|`, layer by layer."""
    return jnp.stack([jnp.linalg.norm(w - b) for w, b in trees.pairs(params, feedback).values()])


def run(model, optimizer, num_steps):
    """The pair after some updates, and the gaps before and after each, `(num_steps + 1, 2)`."""
    learnt, gradient = model()

    def body(carry, _):
        learnt, state = carry
        updates, state = optimizer.update(gradient(*learnt), state, learnt)
        learnt = optax.apply_updates(learnt, updates)
        return (learnt, state), gaps(*learnt)

    def scan(learnt):
        (after, _), rows = jax.lax.scan(body, (learnt, optimizer.init(learnt)), length=num_steps)
        return after, jnp.concatenate([gaps(*learnt)[None], rows])

    after, rows = jax.jit(scan)(learnt)
    return after, np.asarray(rows, np.float64)


def update_once(optimizer, updates, learnt):
    """The update that an optimiser makes first."""
    return jax.jit(
        lambda updates, learnt: optimizer.update(updates, optimizer.init(learnt), learnt)
    )(updates, learnt)[0]


def assert_contracts(rows, factor):
    """Every gap is `factor` times the one before, but for the rounding of weights of size 1."""
    expected = rows[0] * factor ** np.arange(len(rows))[:, None]
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5)


# An ordinary optimiser over the pair, given the kernels' gradients


@every_model
def test_under_sgd_with_decay_the_difference_shrinks_by_rate_times_decay_at_every_update(model):
    optimizer = optax.chain(optax.add_decayed_weights(0.02), optax.sgd(0.5))
    before = metrics.weight_angle(*model()[0])
    (params, feedback), rows = run(model, optimizer, 500)
    assert_contracts(rows, 1 - 0.5 * 0.02)
    # exp(-0.5 * 0.02 * 500) = 0.007 of the difference are left.
    assert all(float(angle) > 60 for angle in jax.tree.leaves(before))
    angles = jax.tree.leaves(metrics.weight_angle(params, feedback))
    assert len(angles) == 2 and max(map(float, angles)) < 5


def test_with_momentum_the_difference_decays_as_under_sgd_with_momentum():
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
    _, rows = run(plain, optimizer, 20)
    gap, velocity, expected = rows[0], 0, [rows[0]]
    for _ in range(20):
        velocity = 0.9 * velocity + 0.1 * gap
        gap = gap - 0.1 * velocity
        expected.append(gap)
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5)


CLIP = optax.clip_by_global_norm(0.1)
CONTRACTING = {  # by what at each update
    "AdamW": (optax.adamw(0.01, weight_decay=1.0), 0.99),
    "a clip over the pair": (
        optax.chain(CLIP, optax.add_decayed_weights(0.1), optax.sgd(0.1)),
        0.99,
    ),
}


@pytest.mark.parametrize("name", CONTRACTING)
def test_pipelines_under_which_feedback_becomes_its_kernel(name):
    optimizer, factor = CONTRACTING[name]
    assert_contracts(run(plain, optimizer, 30)[1], factor)


def test_decay_that_passes_through_adam_does_not_contract_alike():
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.01))
    _, rows = run(plain, optimizer, 10)
    assert np.ptp(rows[1:] / rows[:-1]) > 1e-3  # from step to step, and layer to layer


def test_a_clip_of_the_params_alone_breaks_it():
    """`optax.masked` leaves feedback its own, unclipped gradient."""
    optimizer = optax.chain(
        optax.masked(CLIP, (True, False)), optax.add_decayed_weights(0.1), optax.sgd(0.1)
    )
    rows = run(plain, optimizer, 30)[1]
    assert np.all(rows[-1] > 1.005 * rows[0] * 0.99**30)


def test_a_clip_over_the_pair_is_not_the_params_own():
    """Kernels with feedback count twice in its norm, so that params move less."""
    learnt, gradient = plain()
    of_both = jax.jit(gradient)(*learnt)
    clipped, own = update_once(CLIP, of_both, learnt)[0], update_once(CLIP, of_both[0], learnt[0])
    pieces = (of_both[0], of_both[1], clipped, own)
    norms = [np.linalg.norm(jax.flatten_util.ravel_pytree(tree)[0]) for tree in pieces]
    assert norms[0] > 0.1 and norms[3] == pytest.approx(0.1, rel=1e-5)
    shared = norms[0] / np.hypot(*norms[:2])
    assert norms[2] == pytest.approx(0.1 * shared, rel=1e-5) and shared < 0.95


# kolen_pollack


def params_alone(model, optimizer, decay, num_steps):
    """The run of the params by hand: the optimiser's update, and decay where there is feedback."""
    (params, feedback), gradient = model()
    start, kernels = feedback, trees.by_kernel(params, feedback)

    @jax.jit
    def step(params, feedback, state):
        change, state = optimizer.update(gradient(params, feedback)[0], state, params)

        def moved(keys, leaf, change):
            factor = 1 - decay if trees.path_of(keys) in kernels else 1
            return factor * leaf + change

        return jax.tree_util.tree_map_with_path(moved, params, change), state

    # Of feedback one needs to know no more than that its gap shrinks.
    start_gap = trees.map_pairs(lambda path, w, b: w - b, params, start)
    state = optimizer.init(params)
    for i in range(num_steps):
        feedback = trees.map_pairs(
            lambda path, w, gap, i=i: w - (1 - decay) ** i * gap, params, start_gap
        )
        params, state = step(params, feedback, state)
    return params


ADAM, NESTEROV = optax.chain(CLIP, optax.adam(0.01)), optax.sgd(0.1, momentum=0.9, nesterov=True)


@pytest.mark.parametrize(
    ("model", "inner"),
    [(plain, ADAM), (linen, NESTEROV), (in_nnx, ADAM)],
    ids=["with_feedback, clipped Adam", "linen, Nesterov", "nnx, clipped Adam"],
)
def test_kolen_pollack_is_the_optimizer_of_the_params_and_decay(model, inner):
    (params, _), rows = run(model, kolen_pollack(inner, decay=0.02), 8)
    assert_contracts(rows, 0.98)
    expected = params_alone(model, inner, 0.02, 8)
    # Feedback by its gap in place of its own sum of updates: other roundings, eight times over.
    chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-5)


def test_only_kernels_that_have_feedback_decay():
    (params, feedback), _ = plain()
    optimizer = kolen_pollack(optax.sgd(1.0), decay=0.25)
    zeros = jax.tree.map(jnp.zeros_like, params)
    learnt = (params, feedback)
    change, of_feedback = update_once(optimizer, (zeros, None), learnt)
    for i in range(3):
        expected = 0.25 * params[f"Dense_{i}"]["kernel"] * (i > 0)
        chex.assert_trees_all_close(change[f"Dense_{i}"]["kernel"], -expected)
        chex.assert_trees_all_equal(change[f"Dense_{i}"]["bias"], zeros[f"Dense_{i}"]["bias"])
    assert jax.tree.structure(of_feedback) == jax.tree.structure(feedback)
    chex.assert_trees_all_close(of_feedback, jax.tree.map(lambda b: -0.25 * b, feedback))


def test_feedbacks_own_gradient_is_not_looked_at():
    learnt, gradient = plain()
    optimizer = kolen_pollack(optax.adam(0.1), decay=0.1)
    of_params, of_feedback = jax.jit(gradient)(*learnt)
    expected = update_once(optimizer, (of_params, of_feedback), learnt)
    for anything in (None, jax.tree.map(lambda b: b * jnp.nan, of_feedback)):
        actual = update_once(optimizer, (of_params, anything), learnt)
        chex.assert_trees_all_equal(actual, expected)


def test_moments_are_kept_for_the_params_alone():
    learnt, _ = plain()
    moments = jax.eval_shape(kolen_pollack(optax.adam(0.1), decay=0.1).init, learnt).inner[0].mu
    assert jax.tree.structure(moments) == jax.tree.structure(learnt[0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_params_and_feedback_keep_their_dtypes(dtype):
    learnt, _ = plain()
    learnt = jax.tree.map(lambda leaf: leaf.astype(dtype), learnt)
    optimizer = kolen_pollack(optax.adamw(0.1), decay=jnp.float32(0.1))

    def step(learnt):
        updates, _ = optimizer.update((learnt[0], None), optimizer.init(learnt), learnt)
        return optax.apply_updates(learnt, updates)

    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(step, learnt), learnt)


def test_decay_may_be_traced_and_is_a_hyperparameter_like_others():
    learnt, gradient = plain()
    of_both = jax.jit(gradient)(*learnt)

    def updates(decay, learnt):
        optimizer = kolen_pollack(optax.sgd(0.1), decay=decay)
        return optimizer.update(of_both, optimizer.init(learnt), learnt)[0]

    decays = jnp.array([0.125, 0.5])
    together = jax.jit(jax.vmap(updates, (0, None)))(decays, learnt)
    injected = optax.inject_hyperparams(kolen_pollack, static_args="optimizer")
    for i, decay in enumerate((0.125, 0.5)):
        alone = jax.jit(updates, static_argnums=0)(decay, learnt)
        one = jax.tree.map(lambda leaf: leaf[i], together)  # noqa: B023
        chex.assert_trees_all_close(one, alone, rtol=1e-5, atol=1e-7)
        named = update_once(injected(optimizer=optax.sgd(0.1), decay=decay), of_both, learnt)
        chex.assert_trees_all_close(named, alone, rtol=1e-5, atol=1e-7)


def test_updates_have_the_shardings_of_what_they_update(mesh):
    kernel = jax.device_put(jnp.ones((8, 4)), jax.NamedSharding(mesh, P("data", None)))
    learnt = ({"kernel": kernel, "bias": jnp.ones(4)}, {"kernel": 2 * kernel, "bias": None})
    optimizer = kolen_pollack(optax.adam(0.1), decay=0.1)

    @jax.jit
    def step(learnt):
        return optimizer.update((learnt[0], None), optimizer.init(learnt), learnt)[0]

    assert jax.tree.map(jax.typeof, step(learnt)) == jax.tree.map(jax.typeof, learnt)


def test_it_takes_the_matrix_products_of_backprop():
    learnt, gradient = plain()
    optimizer = optax.sgd(0.1)

    def products(step, *args):
        return len(re.findall(r" dot\(", jax.jit(step).lower(*args).compile().as_text()))

    def step(learnt, optimizer):
        return optimizer.update(gradient(*learnt), optimizer.init(learnt), learnt)[0]

    def backprop(params):
        return optimizer.update(jax.grad(plain_loss)(params, X), optimizer.init(params))[0]

    # Three forward, three for the kernels, two for the hidden layers' errors.
    assert products(backprop, learnt[0]) == 8
    for one in (optimizer, kolen_pollack(optimizer, decay=0.1)):
        assert products(functools.partial(step, optimizer=one), learnt) == 8


# Errors


@pytest.mark.parametrize("decay", [0, 1, -0.1, 1.5, float("nan"), jnp.float32(0)])
def test_a_decay_out_of_range_raises(decay):
    with pytest.raises(ValueError, match=r"decay is .*; expected a number in \(0, 1\)"):
        optimizers.kolen_pollack(optax.sgd(0.1), decay=decay)


def test_what_is_not_a_pair_raises():
    (params, feedback), _ = plain()
    optimizer = kolen_pollack(optax.sgd(0.1), decay=0.1)
    state = optimizer.init((params, feedback))
    message = r"kolen_pollack was given a {}; expected the pair \(params, feedback\)"
    with pytest.raises(ValueError, match=message.format("dict")):
        optimizer.init(params)
    with pytest.raises(ValueError, match=message.format("dict")):
        optimizer.update(params, state, (params, feedback))
    with pytest.raises(ValueError, match=message.format("NoneType")):
        optimizer.update((params, None), state)
    with pytest.raises(ValueError, match=message.format("tuple")):
        optimizer.init((params, feedback, None))


def test_feedback_of_integers_raises():
    params, signs = {"kernel": jnp.ones((3, 2))}, {"kernel": jnp.ones((3, 2), jnp.int8)}
    with pytest.raises(ValueError, match=r"\['kernel'\] has dtype int8; expected a floating-point"):
        kolen_pollack(optax.sgd(0.1), decay=0.5).init((params, signs))


def test_a_pair_that_does_not_fit_raises():
    (params, feedback), _ = plain()
    with pytest.raises(ValueError, match="has no kernel"):
        kolen_pollack(optax.sgd(0.1), decay=0.1).init((feedback, params))


def test_decay_may_follow_a_schedule():
    (params, feedback), _ = plain()
    optimizer = kolen_pollack(optax.sgd(0.1), decay=lambda count: 0.5 / (1 + count))
    apart = [1.0]
    learnt, state = (params, feedback), optimizer.init((params, feedback))

    def distance(learnt):
        pairs = trees.pairs(*learnt).values()
        return float(sum(jnp.sum((w - b) ** 2) for w, b in pairs)) ** 0.5

    begin = distance(learnt)
    for _ in range(3):
        updates, state = optimizer.update((params, None), state, learnt)
        learnt = optax.apply_updates(learnt, updates)
        apart.append(distance(learnt) / begin)
    np.testing.assert_allclose(apart, [1, 1 / 2, 1 / 2 * 3 / 4, 1 / 2 * 3 / 4 * 5 / 6], rtol=1e-5)


def test_what_else_an_optimiser_takes_is_handed_on():
    learnt, _ = plain()
    reduced = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))
    optimizer = kolen_pollack(reduced, decay=0.1)
    state = optimizer.init(learnt)
    for _ in range(3):
        _, state = optimizer.update((learnt[0], None), state, learnt, value=jnp.float32(1.0))
    assert float(optax.tree_utils.tree_get(state, "scale")) < 1


@pytest.mark.parametrize("optimizer", [None, 0.1, optax.sgd])
def test_what_is_no_optimiser_raises(optimizer):
    with pytest.raises(ValueError, match=r"optimizer is a .*; expected an Optax optimiser"):
        kolen_pollack(optimizer, decay=0.5)


@pytest.mark.parametrize("decay", [float("nan"), "0.5", None, 1j, np.ones(2)], ids=str)
def test_a_decay_that_is_no_share_raises(decay):
    with pytest.raises(ValueError, match=r"decay is .*; expected a number in \(0, 1\)"):
        kolen_pollack(optax.sgd(0.1), decay=decay)
