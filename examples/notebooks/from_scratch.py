# %% [markdown]
# # Feedback alignment from scratch, then with the library
#
# Backpropagation sends the error of a layer y = x · W back as y_bar · Wᵀ. Feedback alignment
# (Lillicrap et al. 2016) sends it back as y_bar · Bᵀ, with a fixed random B. First we write this by
# hand, in 60 lines of plain JAX. Then two lines of `soap_jax` do the same for a function that was
# written for backprop.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot as plt

import soap_jax
from soap_jax import metrics

# %% tags=["parameters"]
EPOCHS, SEEDS = 20, 5

# %% [markdown]
# ## By hand
#
# The forward pass is a matrix product. The backward pass computes the kernel's gradient as usual.
# It uses B in place of W to send the error to the layer below.


# %%
@jax.custom_vjp
def dense(x, w, b):
    """x · w; the error goes back through b."""
    return x @ w


def dense_fwd(x, w, b):
    return x @ w, (x, b)


def dense_bwd(residuals, y_bar):
    x, b = residuals
    return y_bar @ b.T, x.T @ y_bar, None  # for x, w and b


dense.defvjp(dense_fwd, dense_bwd)


def loss_by_hand(params, feedback, x, labels):
    h = jnp.tanh(x @ params["w1"])  # the gradient by the input is not computed: no B here
    logits = dense(h, params["w2"], feedback["w2"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def init(key):
    k1, k2, k3 = jax.random.split(key, 3)
    draw = jax.nn.initializers.glorot_normal()
    params = {"w1": draw(k1, (64, 64)), "w2": draw(k2, (64, 10))}
    return params, {"w2": draw(k3, (64, 10))}


digits = soap_jax.data.load("digits")
(x, labels), (x_test, labels_test) = (
    (jnp.asarray(part.images.reshape(-1, 64) / np.float32(16)), jnp.asarray(part.labels))
    for part in (digits.train, digits.test)
)


@jax.jit
def epoch(params, feedback, key):
    def step(params, rows):
        grads = jax.grad(loss_by_hand)(params, feedback, x[rows], labels[rows])
        return jax.tree.map(lambda w, g: w - 0.2 * g, params, grads), None

    order = jax.random.permutation(key, len(x))[: len(x) // 32 * 32].reshape(-1, 32)
    return jax.lax.scan(step, params, order)[0]


params, feedback = init(jax.random.key(0))
for key in jax.random.split(jax.random.key(1), EPOCHS):
    params = epoch(params, feedback, key)
by_hand = float(
    jnp.mean((jnp.tanh(x_test @ params["w1"]) @ params["w2"]).argmax(-1) == labels_test)
)
print(f"test accuracy {by_hand:.1%}")

# %% [markdown]
# The network learns, although B does not depend on W.
#
# ## With the library
#
# The loss below is written for backprop. `with_feedback` gives it a feedback argument.


# %%
def loss(params, x, labels):
    logits = jnp.tanh(x @ params["w1"]) @ params["w2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


print(soap_jax.explain(loss, params, x, labels))
loss_fa = soap_jax.with_feedback(loss)

ours = jax.grad(loss_fa)(params, feedback, x, labels)
hand = jax.grad(loss_by_hand)(params, feedback, x, labels)
difference = max(float(jnp.abs(ours[name] - hand[name]).max()) for name in params)
print(f"largest difference of the gradients: {difference:.1e}")

# %% [markdown]
# Both gradients agree. `w1` needs no feedback, since no error goes back further than its output.
#
# ## Why it works: W aligns with B
#
# We train again and measure two angles after every epoch: between B and W, and between the
# pseudo-gradient and the true gradient.


# %%
@jax.jit
def angles(params, feedback):
    def gradient(params, feedback):
        return jax.grad(loss_fa)(params, feedback, x, labels)

    weights = metrics.weight_angle(params, feedback)["w2"]
    return weights, metrics.gradient_angle(gradient, params, feedback)["w1"]


curves = np.zeros((SEEDS, EPOCHS + 1, 2))
for seed in range(SEEDS):
    params, feedback = init(jax.random.key(seed))
    curves[seed, 0] = angles(params, feedback)
    for i, key in enumerate(jax.random.split(jax.random.key(100 + seed), EPOCHS)):
        params = epoch(params, feedback, key)
        curves[seed, i + 1] = angles(params, feedback)

figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
for i, (name, color) in enumerate({"B to W": "#0072B2", "gradient of w1": "#D55E00"}.items()):
    ax.plot(curves[:, :, i].mean(0), color=color, label=name)
    ax.fill_between(
        range(EPOCHS + 1), curves[:, :, i].min(0), curves[:, :, i].max(0), color=color, alpha=0.2
    )
ax.axhline(90, color="gray", lw=0.8)
ax.set(xlabel="epochs", ylabel="angle in degrees", ylim=(0, 100))
_ = ax.legend(frameon=False)

# %% [markdown]
# Both angles start near 90°. An error at this angle is no better than a random error. Then W turns
# towards B, and the pseudo-gradient turns towards the true gradient. Bands show the range over
# seeds.
#
# Next: [your Flax CNN](flax_cnn.py), [the guide to any model](../../docs/guides/any-model.md).
