# %% [markdown]
# # Learning in time without going back in time
#
# Backpropagation through time (BPTT) stores every step and sends the error back through all of
# them. RFLO (Murray 2019) and e-prop (Bellec et al. 2020) do not store the steps. They compute one
# trace per weight forward in time, and multiply it by the current error. Here a recurrent net reads
# the eight rows of a digit, one after the other.

# %%
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot as plt

import soap_jax
from soap_jax import metrics, temporal

# %% tags=["parameters"]
EPOCHS, SEEDS = 15, 3

# %%
UNITS, TAU = 64, 2.0
digits = soap_jax.data.load("digits")


def sequences(part):
    """Rows over time, `(8, n, 8)`, and labels `(n,)`."""
    rows = part.images[..., 0].transpose(1, 0, 2) / np.float32(16)
    return jnp.asarray(rows), jnp.asarray(part.labels)


(x, labels), (x_test, labels_test) = sequences(digits.train), sequences(digits.test)
COUNTS = jnp.arange(8) == 7  # only the last row counts for the loss


# %% [markdown]
# ## One step of the cell, one step of the loss
#
# `cell` is for one example, and `loss` is for a batch at one time step. The target of a step has
# the labels and a flag for whether the step counts.


# %%
def cell(params, h, x):
    return h + (jnp.tanh(h @ params["recurrent"] + x @ params["in"]) - h) / TAU


def loss(params, h, target):
    labels, counts = target
    logits = h @ params["out"]
    return counts * optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


rflo = temporal.value_and_grad(cell, loss)


def whole(params, h, xs, targets):
    """The loss of all steps, for BPTT."""

    def step(h, inputs):
        h = jax.vmap(cell, (None, 0, 0))(params, h, inputs[0])
        return h, loss(params, h, inputs[1])

    return jax.lax.scan(step, h, (xs, targets))[1].sum()


def bptt(params, feedback, *sequence):
    return jax.value_and_grad(whole)(params, *sequence)


def init(key):
    keys = jax.random.split(key, 4)
    draw = jax.nn.initializers.glorot_normal()
    shapes = {"in": (8, UNITS), "recurrent": (UNITS, UNITS), "out": (UNITS, 10)}
    params = {name: draw(k, s) for k, (name, s) in zip(keys, shapes.items(), strict=False)}
    return params, {"out": draw(keys[3], (UNITS, 10))}


# %% [markdown]
# ## How good is the gradient?
#
# With `{}` in place of feedback, the current error goes back through the readout itself. The
# remaining angle to BPTT comes from the paths that the traces leave out: the paths through the
# recurrent weights.

# %%
params, feedback = init(jax.random.key(0))
sequence = jnp.zeros((len(labels), UNITS)), x, (jnp.tile(labels, (8, 1)), COUNTS)
_, true = bptt(params, None, *sequence)
for name, b in {"exact readout": {}, "random feedback": feedback}.items():
    _, grads = rflo(params, b, *sequence)
    angles = {k: float(metrics.angle(grads[k], true[k])) for k in ("in", "recurrent", "out")}
    print(f"{name:16}", {k: f"{angle:.0f}°" for k, angle in angles.items()})

# %% [markdown]
# The gradient of the readout is exact. With random feedback, the other angles start near 90°, as
# for feedback alignment in any network. They fall while the readout aligns.
#
# ## Training

# %%
optimizer = optax.adam(3e-3)
STATE, TEST_STATE = (jnp.zeros((len(of), UNITS)) for of in (labels, labels_test))


def train(gradient, frozen, seed):
    """Test accuracy after every epoch."""
    params, feedback = init(jax.random.key(seed))

    def step(carry, rows):
        params, opt_state = carry
        batch = STATE[: len(rows)], x[:, rows], (jnp.tile(labels[rows], (8, 1)), COUNTS)
        _, grads = gradient(params, feedback, *batch)
        if frozen:
            grads = {k: g if k == "out" else jnp.zeros_like(g) for k, g in grads.items()}
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    def epoch(carry, key):
        order = jax.random.permutation(key, len(labels))[: len(labels) // 32 * 32]
        carry, _ = jax.lax.scan(step, carry, order.reshape(-1, 32))
        h, _ = jax.lax.scan(
            lambda h, row: (jax.vmap(cell, (None, 0, 0))(carry[0], h, row), None),
            TEST_STATE,
            x_test,
        )
        return carry, jnp.mean((h @ carry[0]["out"]).argmax(-1) == labels_test)

    keys = jax.random.split(jax.random.key(100 + seed), EPOCHS)
    return jax.lax.scan(epoch, (params, optimizer.init(params)), keys)[1]


methods = {"BPTT": (bptt, False), "RFLO": (rflo, False), "readout only": (bptt, True)}
curves = {
    name: np.array([run(seed) for seed in range(SEEDS)])
    for name, how in methods.items()
    for run in [jax.jit(functools.partial(train, *how))]
}
figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
for (name, curve), color in zip(curves.items(), ("#000000", "#009E73", "#999999"), strict=True):
    epochs = range(1, EPOCHS + 1)
    ax.plot(epochs, 100 * curve.mean(0), color=color, label=name)
    ax.fill_between(epochs, 100 * curve.min(0), 100 * curve.max(0), color=color, alpha=0.2)
    print(f"{name:13} {curve[:, -1].mean():.1%}")
ax.set(xlabel="epochs", ylabel="test accuracy, %")
_ = ax.legend(frameon=False)

# %% [markdown]
# ## Memory
#
# BPTT stores the activations of every step until the end. RFLO stores one trace per weight, for any
# length. The compiled programs show this:


# %%
def temporary_bytes(gradient, length):
    inputs = jnp.zeros((length, 32, 8)), (jnp.zeros((length, 32), int), jnp.ones(length, bool))
    compiled = jax.jit(gradient).lower(params, feedback, jnp.zeros((32, UNITS)), *inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes


for length in (8, 80, 800):
    sizes = {n: temporary_bytes(g, length) / 2**20 for n, g in (("BPTT", bptt), ("RFLO", rflo))}
    print(f"{length:4} steps:", {name: f"{size:.2f} MiB" for name, size in sizes.items()})

# %% [markdown]
# For short sequences, the traces take more memory than the stored activations. But they do not grow
# with the length.
#
# Next: [the guide](../../docs/guides/time-local.md), [a net that draws three sines](../rflo.py),
# and `soap_jax.temporal.online` for single steps.
