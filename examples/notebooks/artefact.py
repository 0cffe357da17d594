# %% [markdown]
# # How a learning rate is mistaken for a better method
#
# With only the signs of the weights, sign(W), as feedback, a network seems to learn several times
# faster than with backprop. This notebook shows that backprop does the same if its hidden layer's
# learning rate is multiplied by the same factor.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot as plt

import soap_jax
from soap_jax import metrics, study

# %% tags=["parameters"]
SEEDS, EPOCHS, RATES = 5, 20, (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

# %%
digits = soap_jax.data.load("digits")
x, y = digits.train.images.reshape(-1, 64).astype(np.float32) / 16, digits.train.labels


def init(key):
    k1, k2 = jax.random.split(key)
    draw = jax.nn.initializers.glorot_normal()
    return {"w1": draw(k1, (64, 256)), "w2": draw(k2, (256, 10))}


def loss(params, batch):
    logits = jnp.tanh(batch[0] @ params["w1"]) @ params["w2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


# %% [markdown]
# ## The size of raw signs
#
# Entries of W are small, and entries of sign(W) are ±1. So the error that reaches the hidden layer
# is larger. This multiplies the learning rate of `w1`, but not that of `w2`.

# %%
params = init(jax.random.key(0))
signs = {"w2": jnp.sign(params["w2"])}
print("norm of sign(W) / norm of W:", float(metrics.norm_ratio(params, signs)["w2"]))
print("angle of sign(W) to W:      ", float(metrics.weight_angle(params, signs)["w2"]))
print("effective rate of w1:       ", metrics.effective_learning_rate(0.1, params, signs)["w2"])

# %% [markdown]
# ## Backprop, signs, and two controls
#
# - `sign` is B = sign(W).
# - `sign_norm` has the same signs, scaled to the size that feedback had at the start.
# - `bp_scaled_live` is backprop with W scaled to the size of sign(W) in the backward pass: the size
#   of raw signs, without their direction.

# %%
task = study.Task(init=init, loss=loss, train=(x[300:], y[300:]), validation=(x[:300], y[:300]))
methods = ["bp", "fa", "sign", "sign_norm", "bp_scaled_live"]
result = study.compare(
    task, methods, learning_rates=RATES, seeds=SEEDS, epochs=EPOCHS, batch_size=64
)
print(result)
print("sign / bp_scaled_live:", result.ratio("sign", "bp_scaled_live"))

# %% [markdown]
# At the shared learning rate, raw signs need far fewer steps than backprop. Scaled backprop needs
# as few steps as raw signs. Signs of the right size gain nothing.
#
# ## All learning rates

# %%
COLORS = dict(zip(methods, ("#000000", "#D55E00", "#0072B2", "#CC79A7", "#56B4E9"), strict=True))
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
rate = RATES[1]
for method in methods:
    rows = result.evaluations.query("method == @method and learning_rate == @rate")
    curve = rows.groupby("step")["validation_loss"].mean()
    left.plot(curve.index, curve, color=COLORS[method], label=result.label(method))
    steps = result.runs.query("method == @method").groupby("learning_rate")["steps_to_target"]
    reached = steps.mean()[steps.count() == SEEDS]  # rates at which every run reaches the target
    right.loglog(reached.index, reached, "o-", color=COLORS[method])
left.set(xlabel="steps", ylabel=f"validation loss at rate {rate}", ylim=(0, 2.4))
right.set(xlabel="learning rate", ylabel=f"steps to loss {result.target_loss:.2f}")
_ = left.legend(frameon=False, fontsize=8)

# %% [markdown]
# Left: at one small learning rate, raw signs look like a better method. Right: over all rates, the
# gain only moves the curve to smaller rates. A comparison at one learning rate mistakes this for an
# effect of the feedback. Tuning one global rate for each method does not solve this, since signs
# change only the rate of the hidden layer.
#
# The remedy is a grid of learning rates, paired seeds, and controls such as `sign_norm` and
# `bp_scaled_live`. See [compare your own rule](own_rule.py), [the study on
# MNIST](../../docs/guides/compare.md#on-mnist).
