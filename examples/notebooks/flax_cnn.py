# %% [markdown]
# # Your Flax CNN by feedback alignment, in ten minutes
#
# A conv net with batch norm and dropout, written for backprop, learns by feedback alignment. The
# model does not change.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import soap_jax
from soap_jax import Fixed, SignSync

# %% tags=["parameters"]
EPOCHS = 8

# %% [markdown]
# ## The model and its loss
#
# Batch norm has running statistics, and dropout draws random masks. The loss returns its value and
# the new statistics, as in any Flax program.


# %%
class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for features, stride in ((16, 1), (32, 2)):
            x = nn.Conv(features, (3, 3), strides=stride, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10)(nn.Dropout(0.1, deterministic=not train)(x))


digits = soap_jax.data.load("digits")
(x, labels), (x_test, labels_test) = (
    (part.images.astype(np.float32) / 16, part.labels) for part in (digits.train, digits.test)
)
model, optimizer = CNN(), optax.sgd(0.05, momentum=0.9)
variables = model.init(jax.random.key(0), x[:1], train=False)


def loss(params, batch_stats, key, x, labels):
    logits, new = model.apply(
        {"params": params, "batch_stats": batch_stats},
        x,
        train=True,
        mutable="batch_stats",
        rngs={"dropout": key},
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), new["batch_stats"]


# %% [markdown]
# ## What will feedback do?
#
# `explain` reads the loss without running it. `has_aux=True` says that the loss returns a pair,
# as in `jax.grad`.

# %%
key = jax.random.key(1)
explanation = soap_jax.explain(
    loss, variables["params"], variables["batch_stats"], key, x[:64], labels[:64], has_aux=True
)
print(explanation)

# %% [markdown]
# Every kernel but the first gets feedback. Batch norm's scales stay with backprop unless you name
# them in `where`.
#
# ## Two lines changed, and one for a rule
#
# The two lines are `with_feedback` and `init_feedback`. A rule that changes feedback needs
# `sync_feedback` at the start of each step; with `Fixed()` it does nothing. Layers can have
# different rules.

# %%
loss_fa = soap_jax.with_feedback(loss)


@jax.jit
def train_step(params, state, batch_stats, opt_state, step, key, x, labels):
    if state is not None:  # None is backprop
        state = soap_jax.sync_feedback(params, state, step)
    feedback = None if state is None else state.feedback
    grads, batch_stats = jax.grad(loss_fa, has_aux=True)(
        params, feedback, batch_stats, key, x, labels
    )
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), state, batch_stats, opt_state


@jax.jit
def accuracy(params, batch_stats):
    logits = model.apply({"params": params, "batch_stats": batch_stats}, x_test, train=False)
    return jnp.mean(logits.argmax(-1) == labels_test)


def train(rule):
    params, batch_stats = variables["params"], variables["batch_stats"]
    state = rule and soap_jax.init_feedback(jax.random.key(2), params, rule, where=explanation)
    opt_state, step, curve = optimizer.init(params), 0, []
    for epoch in range(EPOCHS):
        order = np.random.default_rng(epoch).permutation(len(x))
        for rows in order[: len(x) // 64 * 64].reshape(-1, 64):
            drop = jax.random.fold_in(jax.random.key(3), step)
            params, state, batch_stats, opt_state = train_step(
                params, state, batch_stats, opt_state, step, drop, x[rows], labels[rows]
            )
            step += 1
        curve.append(float(accuracy(params, batch_stats)))
    return curve


signs = SignSync(magnitude="norm")  # the signs of W at every step; B keeps its size
rules = {
    "backprop": None,
    "FA": Fixed(),
    "signs in the dense layers": {"Dense_*": signs, "*": Fixed()},
    "signs everywhere": signs,
}
curves = {name: train(rule) for name, rule in rules.items()}

# %%
from matplotlib import pyplot as plt

figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
for (name, curve), color in zip(
    curves.items(), ("#000000", "#D55E00", "#E69F00", "#0072B2"), strict=True
):
    ax.plot(range(1, EPOCHS + 1), np.array(curve) * 100, color=color, label=name)
ax.set(xlabel="epochs", ylabel="test accuracy, %")
ax.legend(frameon=False)
for name, curve in curves.items():
    print(f"{name:26} {curve[-1]:.1%}")

# %% [markdown]
# One seed shows a direction, not an effect. [A fair comparison](own_rule.py) needs several seeds,
# several learning rates and intervals.
#
# For conv nets on CPU, call a jitted step from Python, as here: XLA runs the gradients of
# convolutions ten times slower inside a loop. On accelerators, a scanned epoch is equally good.
#
# Next: [which gradients are
# exact](../../docs/guides/any-model.md#which-gradients-are-exact-and-which-are-pseudo), [the
# rules](../../docs/guides/rules.md), [checkpoints](../../docs/guides/checkpoints.md).
