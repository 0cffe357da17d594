# %% [markdown]
# # A fair comparison of your own rule
#
# Does feedback need every sign of W at every step? `FlipSigns` corrects a few signs at each step.
# It stands beside the library's methods: same learning rates, same seeds (initial weights,
# feedback and order of examples), intervals, and claims with bounds that are written down first.

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
    """Gives a share of the feedback weights, drawn anew at every sync, the signs of W."""

    share: float = 0.01

    def __call__(self, kernel, feedback, key):
        chosen = jax.random.bernoulli(key, self.share, kernel.shape)
        return jnp.where(chosen, jnp.copysign(feedback, kernel), feedback)


# %% [markdown]
# ## The task
#
# A task is how the model starts, its loss and its data. It knows nothing of feedback. Validation
# data choose the learning rates; test data are looked at once.

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
# A ratio is of steps to a target loss, paired by seed. Below 1 is faster. Claims are stored
# before the first run; a verdict on other bounds would be marked exploratory.

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
    "frozen": "frozen",  # only the last layer learns: what any method must beat
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
columns = ["method", "best_rate", "test_accuracy", "ratio", "ratio_low", "ratio_high"]
print(result.summary()[columns].round(3).to_string(index=False))

# %%
for finding in result.judge():
    print(finding.verdict, "|", finding.statement)

# %% [markdown]
# ## What to read
#
# - `best_rate` is chosen on validation data, for each method by itself, and the test accuracy is
#   read there.
# - `ratio` is each method's steps divided by backprop's, at one learning rate that all methods
#   share.
# - A ratio between 0 and inf is a bound: some run never reached the target.
# - `frozen` shows how much the hidden layers matter for this task.
#
# `result.report("report.html")` writes all of it to one page that works offline, with figures and
# how to repeat it. With `out="results/flip"` the runs are kept, an interrupted comparison goes
# on, and methods can be added later.
#
# From the command line the same is `soap-jax study my_task.py`: [comparisons and
# studies](../../docs/guides/compare.md).
