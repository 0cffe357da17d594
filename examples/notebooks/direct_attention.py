# %% [markdown]
# # Direct feedback, and why attention breaks it
#
# Direct feedback alignment (Nøkland 2016) sends the output's error e straight to a hidden layer, as
# e · P with one fixed random P. This can work if one fixed matrix describes the path from the layer
# to the output well. For attention there is no such matrix: its weights choose another path for
# every example. Here we measure the cost.

# %%
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name
from matplotlib import pyplot as plt

import soap_jax
from soap_jax import metrics
from soap_jax.transform import layer_errors

# %% tags=["parameters"]
EPOCHS, SEEDS = 20, 2

# %% [markdown]
# ## A task that needs attention
#
# The network gets several digits at once, and the place of one of them. Its task is to classify
# this digit. It encodes every digit, attends to the given place, and classifies the result. With
# one digit, there is nothing to choose.
#
# The model names its hidden values with JAX's `checkpoint_name`. `with_direct_feedback` needs
# nothing else.

# %%
UNITS, ITEMS = 64, (1, 2, 4, 8)
digits = soap_jax.data.load("digits")
(images, labels), (test_images, test_labels) = (
    (jnp.asarray(part.images.reshape(-1, 64) / np.float32(16)), jnp.asarray(part.labels))
    for part in (digits.train, digits.test)
)


def model(params, x, asked):
    """`x` is `(batch, items, 64)`, `asked` the place of one item, `(batch,)`."""
    h = checkpoint_name(jnp.tanh(x @ params["encoder"]), "items")
    scores = (params["places"][asked] @ params["query"]) @ params["places"].T
    found = jnp.einsum("bt,btf->bf", jax.nn.softmax(scores), h)
    found = checkpoint_name(jnp.tanh(found @ params["value"]), "found")
    return checkpoint_name(found @ params["readout"], "logits")


def loss(params, x, asked, y):
    logits = model(params, x, asked)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


loss_dfa = soap_jax.with_direct_feedback(loss, ("items", "found"), "logits")


def init(key, items):
    """Params and projections: one projection for all items, since they share an encoder."""
    keys = jax.random.split(key, 6)
    draw = jax.nn.initializers.glorot_normal()
    shapes = {"encoder": (64, UNITS), "query": (16, 16), "value": (UNITS, UNITS)}
    params = {k: draw(key, s) for key, (k, s) in zip(keys[:3], shapes.items(), strict=True)}
    params |= {"readout": draw(keys[3], (UNITS, 10))}
    params |= {"places": jax.random.normal(jax.random.key(0), (8, 16))[:items]}
    projections = {"items": draw(keys[4], (10, UNITS)), "found": draw(keys[5], (10, UNITS))}
    return params, projections


def batches(key, images, labels, items, size, number):
    """Random digits, and the place of one of them."""
    k1, k2 = jax.random.split(key)
    rows = jax.random.randint(k1, (number, size, items), 0, len(labels))
    asked = jax.random.randint(k2, (number, size), 0, items)
    chosen = jnp.take_along_axis(rows, asked[..., None], -1)[..., 0]
    return rows, asked, labels[chosen]


# %% [markdown]
# ## Training
#
# We train with backprop, with direct feedback, and with a control: a projection of zeros, so that
# the encoder does not change.

# %%
optimizer = optax.adam(3e-3)


@functools.partial(jax.jit, static_argnames=("direct", "items"))
def train(direct, items, seed, gain):
    """The encoder's projection is multiplied by `gain`: 0 freezes the encoder."""
    params, projections = init(jax.random.key(seed), items)
    projections = projections | {"items": gain * projections["items"]}
    sent = projections if direct else None  # None is backprop

    def step(carry, batch):
        params, opt_state = carry
        rows, asked, y = batch
        grads = jax.grad(loss_dfa)(params, sent, images[rows], asked, y)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    data = batches(jax.random.key(100 + seed), images, labels, items, 64, EPOCHS * 22)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), data)
    rows, asked, y = batches(jax.random.key(7), test_images, test_labels, items, 2000, 1)
    right = model(params, test_images[rows[0]], asked[0]).argmax(-1) == y[0]
    return params, projections, right.mean()


METHODS = {"backprop": (False, 0.0), "DFA": (True, 1.0), "encoder frozen": (True, 0.0)}
runs = {
    (method, n, seed): train(direct, n, seed, gain)
    for method, (direct, gain) in METHODS.items()
    for n in ITEMS
    for seed in range(SEEDS)
}
accuracy = {
    method: np.array([[runs[method, n, s][2] for s in range(SEEDS)] for n in ITEMS])
    for method in METHODS
}
print("items         ", *(f"{n:6}" for n in ITEMS))
for method, values in accuracy.items():
    print(f"{method:15}", *(f"{value:6.1%}" for value in values.mean(1)))

# %% [markdown]
# ## How good could any fixed projection be?
#
# We take the errors that backprop sends to the encoded digits in the trained network, and fit the
# best projection to them by least squares. The angle of its errors to the true errors is a limit
# for every fixed projection. For comparison, we show the angle of the random projection that DFA
# used.

# %%
errors = jax.jit(layer_errors(loss_dfa))


def angles(items, seed):
    """Angles of the best projection (network by backprop) and of DFA's own (DFA's network)."""
    rows, asked, y = batches(jax.random.key(8), images, labels, items, 2000, 1)
    batch = images[rows[0]], asked[0], y[0]
    params, _, _ = runs["backprop", items, seed]
    true = errors(params, None, None, *batch)["encoder"].reshape(-1, UNITS)
    output = jax.nn.softmax(model(params, *batch[:2])) - jax.nn.one_hot(batch[2], 10)
    sent = jnp.repeat(output / len(output), items, axis=0)  # the same to every item
    best = sent @ jnp.linalg.lstsq(sent, true)[0]
    params, projections, _ = runs["DFA", items, seed]
    pseudo, exact = (errors(params, None, p, *batch)["encoder"] for p in (projections, None))
    return float(metrics.angle(best, true)), float(metrics.angle(pseudo, exact))


found = np.array([[angles(n, seed) for seed in range(SEEDS)] for n in ITEMS])
limit = np.degrees(np.arccos(1 / np.sqrt(ITEMS)))
print("items            ", *(f"{n:4}" for n in ITEMS))
for name, values in {
    "1/√items": limit, "best projection": found[..., 0].mean(1), "DFA": found[..., 1].mean(1)
}.items():  # fmt: skip
    print(f"{name:17}", *(f"{value:3.0f}°" for value in values))

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
for (method, values), color in zip(
    accuracy.items(), ("#000000", "#0072B2", "#999999"), strict=True
):
    left.plot(ITEMS, 100 * values.mean(1), "o-", color=color, label=method)
left.set(xlabel="items to attend to", ylabel="test accuracy, %")
left.legend(frameon=False)
for values, color, name in (
    (found[..., 1].mean(1), "#0072B2", "DFA's projection"),
    (found[..., 0].mean(1), "#D55E00", "best projection"),
):
    right.plot(ITEMS, values, "o-", color=color, label=name)
right.plot(ITEMS, limit, ":", color="gray", label="arccos(1/√items)")
right.set(xlabel="items to attend to", ylabel="angle to the true error, degrees", ylim=(0, 95))
_ = right.legend(frameon=False)

# %% [markdown]
# ## Why
#
# The true error reaches only the digit at the given place. A fixed projection sends the same error
# to all digits. Suppose that one of n digits gets a correct error, and the other n - 1 get an error
# of the same size that should be zero. Then the angle is arccos(1/√n). The best projection stays
# near this limit, so learning projections does not help. DFA's random projection is even worse.
#
# With one digit, DFA trains the encoder: it is better than the frozen encoder. With four or eight
# digits, it is worse, although attention and the layers above it still learn.
#
# ## What to do
#
# - Cut between blocks, not through attention. Inside a block, the backward pass is exact, as in
#   [the guide](../../docs/guides/direct.md).
# - Use `with_feedback` for attention's own kernels. Attention's products of two activations stay
#   exact, so the error follows the attention weights. [The transformer example](../transformer.py)
#   does this.
# - Compare with a frozen control, as we do here. High accuracy alone does not show that the layers
#   attention learn.
