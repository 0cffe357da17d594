"""Ours against plain PyTorch: one step from the same numbers, three where feedback changes."""

import itertools
import math
import warnings

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from soap_jax import activity, direct, feedback, linen, models, ops, rules, transform

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PyTorch warns of when loaded is not ours to mend
    import torch_reference
    from torch_reference import torch

pytestmark = pytest.mark.filterwarnings("ignore:::torch")

WIDTHS = (12, 9, 7, 5)
BATCH, STEPS = 6, 3
RATE = 0.5
TOLERANCE = 1e-5  # of the largest entry: float32 rounds at 1e-7, some tens of times per step

NAMES = ("Dense_0", "Dense_1", "Dense_2")
SHAPES = dict(zip(NAMES, itertools.pairwise(WIDTHS), strict=True))


def draw(seed, *shape):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


X, LABELS = draw(0, BATCH, WIDTHS[0]), np.array([0, 3, 1, 4, 2, 3])
ONE_HOT = jax.nn.one_hot(LABELS, WIDTHS[-1])
PARAMS = {
    name: {"kernel": draw(1, *shape) / 2, "bias": draw(2, shape[1]) / 2}
    for name, shape in SHAPES.items()
}
FEEDBACK = {name: {"kernel": draw(3, *SHAPES[name]) / 2} for name in NAMES[1:]}
PROJECTIONS = [draw(4, WIDTHS[-1], width) for width in WIDTHS[1:-1]]
IN_TORCH = torch.tensor(X), torch.tensor(LABELS)

each_route = pytest.mark.parametrize("route", ["layers", "transform"])
each_activation = pytest.mark.parametrize("activation", ["tanh", "relu"])


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("float32"):  # accelerators round more by default
        yield


def tensor(array):
    return torch.tensor(np.asarray(array).T)  # torch's weights are (out, in)


def layers_of(params):
    return [(tensor(params[name]["kernel"]), tensor(params[name]["bias"])) for name in NAMES]


def weights_of(feedback):
    return [tensor(feedback[name]["kernel"]) for name in NAMES[1:]]


def assert_agree(ours, theirs):
    """Compares two trees of tensors, each with an error relative to its largest entry."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert our.shape == their.shape
        size = their.abs().max()
        assert size > 0
        assert (our - their).abs().max() <= TOLERANCE * size


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"][None]


class FeedbackMLP(nn.Module):
    """`models.MLP`, with a choice of feedback_bar."""

    activation: str
    feedback_bar: ops.FeedbackBar = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTHS[1])(x)
        for name, width in zip(NAMES[1:], WIDTHS[2:], strict=True):
            x = getattr(jax.nn, self.activation)(x)
            x = linen.FeedbackDense(width, name=name, feedback_bar=self.feedback_bar)(x)
        return x


def make_loss(route, activation, **options):
    """`(params, feedback) -> loss`: of layers with feedback, or of plain ones, transformed."""
    if route == "layers":
        model = FeedbackMLP(activation, **options)
        return lambda params, feedback: cross_entropy(
            model.apply({"params": params, "feedback": feedback}, X)
        )
    plain = models.MLP(WIDTHS[1:], getattr(jax.nn, activation), feedback=False)
    loss = transform.with_feedback(
        lambda params, x: cross_entropy(plain.apply({"params": params}, x)), **options
    )
    return lambda params, feedback: loss(params, feedback, X)


@each_route
@each_activation
def test_fa_equals_torch(activation, route):
    ours = jax.jit(jax.grad(make_loss(route, activation)))(PARAMS, FEEDBACK)
    theirs = torch_reference.fa_gradients(
        layers_of(PARAMS), weights_of(FEEDBACK), *IN_TORCH, getattr(torch, activation)
    )
    assert_agree(layers_of(ours), theirs)


# What the magnitudes are, in torch: of a weight, of B0, and of the B that was drawn at this step.
MAGNITUDES = {
    "unit": lambda weight, first, now: 1.0,
    "glorot": lambda weight, first, now: math.sqrt(2 / sum(weight.shape)),
    "preserve": lambda weight, first, now: first.abs(),
    "redraw": lambda weight, first, now: now.abs(),
}


@pytest.mark.parametrize("magnitude", MAGNITUDES, ids=["usf", "usf_glorot", "frsf", "brsf"])
def test_sign_symmetry_equals_torch_over_three_steps(magnitude):
    @jax.jit
    def step(params, state, i):
        state = feedback.sync_feedback(params, state, i)
        grads = jax.grad(make_loss("layers", "tanh"))(params, state.feedback)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        return params, state, grads

    rule = rules.SignSync(magnitude=magnitude)
    params = PARAMS
    state = feedback.init_feedback(jax.random.key(0), params, rule, feedback=FEEDBACK)
    layers, first = layers_of(PARAMS), weights_of(FEEDBACK)
    seen = []
    for i in range(STEPS):
        params, state, ours = step(params, state, i)
        now = weights_of(state.feedback)
        seen.append(now)
        signed = [
            torch_reference.sign_feedback(weight, MAGNITUDES[magnitude](weight, b0, b))
            for (weight, _), b0, b in zip(layers[1:], first, now, strict=True)
        ]
        assert_agree(now, signed)
        theirs = torch_reference.fa_gradients(layers, signed, *IN_TORCH, torch.tanh)
        assert_agree(layers_of(ours), theirs)
        layers = torch_reference.sgd(layers, theirs, RATE)
    assert_agree(layers_of(params), layers)
    ends = list(zip(seen[0], seen[-1], strict=True))
    assert any((b0.sign() != b.sign()).any() for b0, b in ends)  # else one sync would have done
    assert all(torch.equal(b0.abs(), b.abs()) == (magnitude != "redraw") for b0, b in ends)


@each_route
def test_kolen_pollack_equals_torch_over_three_steps(route):
    decay = 0.1
    optimiser = optax.chain(optax.add_decayed_weights(decay), optax.sgd(RATE))
    loss = make_loss(route, "tanh", feedback_bar="kernel")

    @jax.jit
    def step(pair, state):
        grads = jax.grad(loss, argnums=(0, 1))(*pair)
        updates, state = optimiser.update(grads, state, pair)
        return optax.apply_updates(pair, updates), state

    pair = PARAMS, FEEDBACK
    state = optimiser.init(pair)
    theirs = layers_of(PARAMS), weights_of(FEEDBACK)
    for _ in range(STEPS):
        pair, state = step(pair, state)
        theirs = torch_reference.kolen_pollack_step(
            *theirs, *IN_TORCH, torch.tanh, rate=RATE, decay=decay
        )
        assert_agree((layers_of(pair[0]), weights_of(pair[1])), theirs)


@pytest.mark.parametrize("error", ["exact", "sign"], ids=["dfa", "sdfa"])
@each_activation
def test_direct_feedback_equals_torch(activation, error):
    def loss(params):
        hidden, a = [], X
        for name in NAMES[:-1]:
            hidden.append(getattr(jax.nn, activation)(dense(params[name], a)))
            a = ops.detach(hidden[-1])
        logits = dense(params[NAMES[-1]], a)
        return cross_entropy(direct.direct_feedback(logits, hidden, PROJECTIONS, error=error))

    theirs = torch_reference.dfa_gradients(
        layers_of(PARAMS),
        [torch.tensor(p) for p in PROJECTIONS],
        *IN_TORCH,
        getattr(torch, activation),
        sign=error == "sign",
    )
    assert_agree(layers_of(jax.jit(jax.grad(loss))(PARAMS)), theirs)


@each_activation
def test_direct_target_equals_torch(activation):
    def loss(params):
        a = X
        for name, projection in zip(NAMES[:-1], PROJECTIONS, strict=True):
            a = getattr(jax.nn, activation)(dense(params[name], a))
            a = direct.direct_target(a, ONE_HOT, projection)
        return cross_entropy(dense(params[NAMES[-1]], a))

    theirs = torch_reference.drtp_gradients(
        layers_of(PARAMS),
        [torch.tensor(p) for p in PROJECTIONS],
        *IN_TORCH,
        getattr(torch, activation),
    )
    assert_agree(layers_of(jax.jit(jax.grad(loss))(PARAMS)), theirs)


def linear_in_torch(logits, labels):
    return -logits.gather(1, labels[:, None]).mean()


# The linear loss has the same derivative at the last activation in both passes: d = 0 there.
LOSSES = {
    "curved": (cross_entropy, torch_reference.cross_entropy),
    "linear": (lambda logits: -(logits * ONE_HOT).sum(1).mean(), linear_in_torch),
}


@pytest.mark.parametrize("curvature", LOSSES)
@each_activation
def test_activity_propagation_equals_torch(activation, curvature):
    our_loss, their_loss = LOSSES[curvature]
    # With a smaller rate d, the difference of two near gradients, is float32's rounding.
    rate, bias = 20.0, 0.01

    def loss(tap, params):
        a = X
        for name in NAMES[:-1]:
            a = tap(name, getattr(jax.nn, activation)(dense(params[name], a)))
        return our_loss(dense(params[NAMES[-1]], a))

    step = jax.jit(activity.value_and_grad(loss, learning_rate=rate, bias=bias))
    _, ours = step(PARAMS, step=0)
    theirs = torch_reference.activity_gradients(
        layers_of(PARAMS),
        *IN_TORCH,
        getattr(torch, activation),
        rate=rate,
        bias=bias,
        loss=their_loss,
    )
    assert_agree(layers_of(ours), theirs)
