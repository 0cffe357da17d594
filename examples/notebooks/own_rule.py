# %% [markdown]
# # A fair comparison of your own rule
#
# Does feedback need every sign of W at every step? `FlipSigns` corrects a few signs at each step.
# We compare it with the library's methods: with the same learning rates, the same seeds (initial
# weights, feedback and order of examples), intervals, and claims with bounds that are written down
# first.

# %%
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

import soap_jax
from soap_jax import study

# %% tags=["parameters"]
SEEDS, EPOCHS, RATES = 5, 20, (0.1, 0.2, 0.5, 1.0, 2.0)

# %% [markdown]
# ## The rule
#
# A rule is a frozen class with one pure function. `key` differs from layer to layer and step to
# step.


# %%
@dataclasses.dataclass(frozen=True, kw_only=True)
class FlipSigns(soap_jax.Rule):
    """Gives the signs of W to a share of the feedback weights, drawn anew at every sync."""

    share: float = 0.01

    def __call__(self, kernel, feedback, key):
        chosen = jax.random.bernoulli(key, self.share, kernel.shape)
        return jnp.where(chosen, jnp.copysign(feedback, kernel), feedback)


# %% [markdown]
# ## The task
#
# A task consists of the model's initialisation, its loss and its data. It does not mention
# feedback. Learning rates are chosen on validation data. Test data are used only once.

# %%
digits = soap_jax.data.load("digits")
x, x_test = (
    part.images.reshape(-1, 64).astype(np.float32) / 16 for part in (digits.train, digits.test)
)
y, y_test = digits.train.labels, digits.test.labels


def init(key):
    keys = jax.random.split(key, 3)
    draw = jax.nn.initializers.glorot_normal()
    shapes = {"w1": (64, 64), "w2": (64, 64), "w3": (64, 10)}
    return {name: draw(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def logits(params, x):
    return jnp.tanh(jnp.tanh(x @ params["w1"]) @ params["w2"]) @ params["w3"]


def loss(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(
        logits(params, batch[0]), batch[1]
    ).mean()


def accuracy(params, batch):
    return jnp.mean(logits(params, batch[0]).argmax(-1) == batch[1])


task = study.Task(
    init=init,
    loss=loss,
    metrics={"accuracy": accuracy},
    train=(x[300:], y[300:]),
    validation=(x[:300], y[:300]),
    test=(x_test, y_test),
)

# %% [markdown]
# ## The claims, first
#
# A ratio compares the steps to a target loss, paired by seed. A ratio below 1 means faster. Claims
# are stored before the first run. A verdict on other bounds would be marked exploratory.

# %%
claims = [
    study.Ratio("flip", "fa", within=(0, 0.95)),  # faster than fixed feedback
    study.Ratio("flip", "signs", within=(0.8, 1.25)),  # and about as fast as all signs at once
]
methods = {
    "bp": "bp",
    "fa": "fa",
    "signs": "sign_preserve",  # all signs of W at every step
    "flip": study.Method(rule=FlipSigns(), label="a hundredth of the signs"),
    "frozen": "frozen",  # only the last layer learns: every method must beat this
}
result = study.compare(
    task,
    methods,
    learning_rates=RATES,
    seeds=SEEDS,
    epochs=EPOCHS,
    batch_size=64,
    select="validation_accuracy",
    maximise=True,
    claims=claims,
)
print(result)

# %%
print(*result.judge(), sep="\n")

# %% [markdown]
# ## What to read
#
# - The best rate is chosen for each method on validation data. The test accuracy is that at this
#   rate.
# - The ratio is the number of steps of a method divided by backprop's, at one learning rate for all
#   methods. `>` marks a lower bound: at least one run never reached the target.
# - `frozen` shows how much the hidden layers matter for this task.
#
# `result.report("report.html")` writes all results to one page that works offline, with figures and
# instructions to repeat the comparison. With `out="results/flip"` the runs are saved. Then an
# interrupted comparison can continue, and methods can be added later.
#
# The command `soap-jax study my_task.py` does the same: see [comparisons and
# studies](../../docs/guides/compare.md).
