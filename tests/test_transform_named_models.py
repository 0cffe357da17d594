"""Direct feedback by names for models of Linen, NNX, Equinox and Haiku, in a few lines each."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from soap_jax import (
    direct_feedback,
    explain,
    init_feedback,
    init_projections,
    with_direct_feedback,
    with_feedback,
)
from soap_jax.ops import detach

KEY = jax.random.key(0)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def gradients(explanation):
    return {"/".join(row.path): row.gradient for row in explanation}


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class ConvNet(nn.Module):
    """Two blocks with batch norm; by hand if it is to return its activations."""

    by_hand: bool = False

    @nn.compact
    def __call__(self, x):
        hidden = []
        for i, width in enumerate((5, 7)):
            x = nn.Conv(width, (3, 3), strides=2)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
            if self.by_hand:
                hidden.append(x)
                x = detach(x)
            else:
                x = checkpoint_name(x, f"block{i}")
        logits = nn.Dense(4)(x.reshape(len(x), -1))
        return (logits, hidden) if self.by_hand else checkpoint_name(logits, "logits")


def test_linen_with_batch_norm_and_its_state():
    x, labels = draw(0, 6, 8, 8, 3), jnp.arange(6) % 4
    variables = ConvNet().init(KEY, x)
    params, stats = variables["params"], variables["batch_stats"]

    def loss(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        logits, changed = ConvNet().apply(variables, x, mutable=["batch_stats"])
        return cross_entropy(logits, labels), (logits, changed)

    def by_hand(params, projections, stats, x):
        variables = {"params": params, "batch_stats": stats}
        (logits, hidden), changed = ConvNet(True).apply(variables, x, mutable=["batch_stats"])
        logits = direct_feedback(logits, hidden, list(projections.values()))
        return cross_entropy(logits, labels), (logits, changed)

    loss_dfa = with_direct_feedback(loss, ("block0", "block1"), "logits")
    projections = init_projections(KEY, loss_dfa, params, stats, x)
    assert {tap: p.shape for tap, p in projections.items()} == {
        "block0": (4, 4, 4, 5),
        "block1": (4, 2, 2, 7),
    }
    actual, expected = (
        jax.jit(jax.value_and_grad(f, has_aux=True))(params, projections, stats, x)
        for f in (loss_dfa, by_hand)
    )
    chex.assert_trees_all_equal(actual, expected)
    found = gradients(explain(loss_dfa, params, projections, stats, x, has_aux=True))
    assert {p for p, gradient in found.items() if gradient == "exact"} == {
        "Dense_0/kernel",
        "Dense_0/bias",
    }
    assert set(found.values()) == {"direct", "exact"}


class Block(nn.Module):
    """A transformer's block, of Flax's own layers."""

    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return checkpoint_name(x, "block"), None


class Transformer(nn.Module):
    """Embedding, three blocks as a scan with remat, and a head."""

    @nn.compact
    def __call__(self, tokens):
        x = checkpoint_name(nn.Embed(11, 8)(tokens), "embed")
        stack = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = stack(name="blocks")(x, None)
        return checkpoint_name(nn.Dense(11)(nn.LayerNorm()(x)), "logits")


def test_a_transformer_whose_blocks_are_cut_and_attention_inside_is_exact():
    tokens = jax.random.randint(KEY, (4, 9), 0, 11)
    params = Transformer().init(KEY, tokens)["params"]

    def loss(params, tokens):
        logits = Transformer().apply({"params": params}, tokens)
        return cross_entropy(logits[:, :-1], tokens[:, 1:])

    loss_dfa = with_direct_feedback(loss, ("embed", "block"), "logits", stacked="blocks")
    projections = init_projections(KEY, loss_dfa, params, tokens)
    assert projections["block"].shape == (3, 11, 8) and projections["embed"].shape == (11, 8)

    actual = jax.jit(jax.grad(loss_dfa))(params, projections, tokens)
    backprop = jax.jit(jax.grad(loss))(params, tokens)
    for name in ("Dense_0", "LayerNorm_0"):
        chex.assert_trees_all_close(actual[name], backprop[name], rtol=1e-4, atol=1e-6)
    found = explain(loss_dfa, params, projections, tokens)
    assert gradients(found)["blocks/MultiHeadDotProductAttention_0/query/kernel"] == "direct"
    assert gradients(found)["Embed_0/embedding"] == "direct"
    # Inside a block errors pass its kernels, and may pass feedback in their place.
    served = {"/".join(row.path) for row in found if row.effect == "feedback"}
    assert {"blocks/Dense_0/kernel", "blocks/MultiHeadDotProductAttention_0/key/kernel"} <= served
    feedback = init_feedback(KEY, params, where=found, initializer="matched").feedback
    mirrored = jax.tree.map(
        lambda b, w: None if b is None else w, feedback, params, is_leaf=lambda b: b is None
    )
    both = jax.jit(jax.grad(with_feedback(loss_dfa)))(params, mirrored, projections, tokens)
    chex.assert_trees_all_close(both, actual, rtol=1e-4, atol=1e-6)


class Cell(nn.LSTMCell):
    """An LSTM's cell that names what it carries."""

    def __call__(self, carry, x):
        (c, h), _ = super().__call__(carry, x)
        c, h = checkpoint_name(c, "c"), checkpoint_name(h, "h")
        return (c, h), h


class LSTM(nn.Module):
    """Reads out every step, or the last."""

    every: bool

    @nn.compact
    def __call__(self, xs):
        h = nn.RNN(Cell(6))(xs)
        return checkpoint_name(nn.Dense(2)(h if self.every else h[:, -1]), "y")


def test_an_lstms_errors_do_not_go_back_in_time():
    """An error at step 3 reaches the input of step 3 alone; by backprop all before, too."""
    xs = draw(0, 3, 7, 4)
    params = LSTM(True).init(KEY, xs)["params"]

    def loss(params, xs):
        return jnp.mean(LSTM(True).apply({"params": params}, xs)[:, 3] ** 2)

    loss_dfa = with_direct_feedback(loss, ("c", "h"), "y", stacked=1)
    projections = init_projections(KEY, loss_dfa, params, xs)
    assert jax.tree.map(jnp.shape, projections) == {"c": (2, 6), "h": (2, 6)}
    by_inputs = jax.jit(jax.grad(loss_dfa, argnums=2))
    for p, steps in ((projections, [3]), (None, [0, 1, 2, 3])):
        reached = np.any(by_inputs(params, p, xs) != 0, (0, 2))
        assert list(np.flatnonzero(reached)) == steps
    found = gradients(explain(loss_dfa, params, projections, xs))
    assert {g for path, g in found.items() if path.startswith("Cell")} == {"direct"}


def test_an_lstm_that_is_read_out_at_the_end_gets_the_error_at_all_steps():
    xs = draw(0, 3, 7, 4)
    params = LSTM(False).init(KEY, xs)["params"]

    def loss(params, xs):
        return jnp.mean(LSTM(False).apply({"params": params}, xs) ** 2)

    loss_dfa = with_direct_feedback(loss, ("c", "h"), "y", stacked="time")
    projections = init_projections(KEY, loss_dfa, params, xs)
    assert jax.tree.map(jnp.shape, projections) == {"c": (2, 6), "h": (2, 6)}
    xs_bar = jax.jit(jax.grad(loss_dfa, argnums=2))(params, projections, xs)
    assert np.all(np.any(xs_bar != 0, (0, 2)))


def test_an_lstms_steps_by_hand():
    """The cut of c and h, unrolled: the same gradient."""
    xs = draw(0, 3, 5, 4)
    params = LSTM(True).init(KEY, xs)["params"]
    cell = nn.LSTMCell(6)

    def by_names(params, projections):
        loss = with_direct_feedback(
            lambda params: jnp.mean(LSTM(True).apply({"params": params}, xs) ** 2),
            ("c", "h"), "y", stacked=1,
        )  # fmt: skip
        return loss(params, projections)

    def by_hand(params, projections):
        c = h = jnp.zeros((3, 6))
        ys = []
        for t in range(5):
            (c, h), _ = cell.apply({"params": params["Cell_0"]}, (detach(c), detach(h)), xs[:, t])
            y = nn.Dense(2).apply({"params": params["Dense_0"]}, detach(h))
            ys.append(direct_feedback(y, {"c": c, "h": h}, projections))
        return jnp.mean(jnp.stack(ys) ** 2)

    projections = {"c": draw(1, 2, 6), "h": draw(2, 2, 6)}
    actual, expected = (jax.jit(jax.grad(f))(params, projections) for f in (by_names, by_hand))
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)


def of_two_layers(first, norm, last, x):
    h = checkpoint_name(jax.nn.relu(norm(first(x))), "h")
    return checkpoint_name(last(h), "z")


def assert_a_layer_and_a_head(loss_dfa, params, *args, direct, exact):
    """The gradient as projections change, and what `explain` says of it."""
    projections = init_projections(KEY, loss_dfa, params, *args)
    assert projections["h"].shape == (2, 8)
    step = jax.jit(jax.grad(loss_dfa, has_aux=True))
    one, _ = step(params, projections, *args)
    two, _ = step(params, {"h": 2 * projections["h"]}, *args)
    times = jax.tree.map(lambda a, b: round(float(jnp.sum(b) / jnp.sum(a)), 4), one, two)
    found = gradients(explain(loss_dfa, params, projections, *args, has_aux=True))
    assert sum(gradient == "direct" for gradient in found.values()) == direct
    assert sum(gradient == "exact" for gradient in found.values()) == exact
    assert sorted(jax.tree.leaves(times)) == [1.0] * exact + [2.0] * direct


def test_nnx_with_batch_norm():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
            self.norm = nnx.BatchNorm(8, use_scale=False, rngs=rngs)

        def __call__(self, x):
            return of_two_layers(self.first, self.norm, self.last, x)

    graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, rest, x):
        net = nnx.merge(graphdef, params, rest)
        return jnp.mean((net(x) - 1) ** 2), nnx.state(net, nnx.BatchStat)

    loss_dfa = with_direct_feedback(loss, "h", "z")
    projections = init_projections(KEY, loss_dfa, params, rest, draw(0, 5, 4))
    found = gradients(explain(loss_dfa, params, projections, rest, draw(0, 5, 4), has_aux=True))
    assert found["norm/bias"] == found["first/kernel"] == "direct"
    assert found["last/kernel"] == found["last/bias"] == "exact"
    step = jax.jit(jax.grad(loss_dfa, has_aux=True))
    _, stats = step(params, projections, rest, draw(0, 5, 4))
    assert np.any(stats["norm"]["mean"][...] != rest["norm"]["mean"][...])


def test_equinox_under_its_jit_and_vmap():
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        first: eqx.nn.Linear
        last: eqx.nn.Linear

        def __call__(self, x):
            return of_two_layers(self.first, lambda h: h, self.last, x)

    net = Net(eqx.nn.Linear(4, 8, key=KEY), eqx.nn.Linear(8, 2, key=jax.random.key(1)))
    params, static = eqx.partition(net, eqx.is_inexact_array)

    @eqx.filter_jit
    def outputs(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    def loss(params, x):
        return jnp.mean((outputs(params, x) - 1) ** 2), None

    loss_dfa = with_direct_feedback(loss, "h", "z")
    assert_a_layer_and_a_head(loss_dfa, params, draw(0, 5, 4), direct=2, exact=2)


def test_haiku_with_its_remat():
    hk = pytest.importorskip("haiku")

    @hk.without_apply_rng
    @hk.transform
    def net(x):
        return of_two_layers(hk.remat(hk.Linear(8)), lambda h: h, hk.Linear(2), x)

    def loss(params, x):
        return jnp.mean((net.apply(params, x) - 1) ** 2), None

    params = net.init(KEY, draw(0, 5, 4))
    loss_dfa = with_direct_feedback(loss, "h", "z")
    assert_a_layer_and_a_head(loss_dfa, params, draw(0, 5, 4), direct=2, exact=2)
