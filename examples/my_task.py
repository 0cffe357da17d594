"""A task of your own for the command line: `soap-jax study examples/my_task.py`."""

import flax.linen as nn
import numpy as np
import optax

from soap_jax import SignSync, data, study

model = nn.Sequential([nn.Dense(64), nn.LayerNorm(), nn.gelu, nn.Dense(32), nn.gelu, nn.Dense(10)])
digits = data.load("digits")  # your data: any tree of arrays
x, x_test = (part.images.reshape(-1, 64) / np.float32(16) for part in (digits.train, digits.test))
y, y_test = digits.train.labels, digits.test.labels


def loss(params, batch):  # noqa: D103 (your loss: the mean over the batch)
    logits = model.apply({"params": params}, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


task = study.Task(
    init=lambda key: model.init(key, x[:1])["params"],  # your model: any params, any library
    loss=loss,
    metrics={"accuracy": lambda p, b: (model.apply({"params": p}, b[0]).argmax(-1) == b[1]).mean()},
    **{"train": (x[300:], y[300:]), "validation": (x[:300], y[:300]), "test": (x_test, y_test)},
)
signs = study.Method(rule=SignSync(period=20), label="signs, every 20 updates")
methods = {"bp": "bp", "fa": "fa", "signs": signs, "frozen": "frozen"}
claims = [study.Ratio("fa", "bp", within=(1, 2)), study.Ratio("signs", "fa", within=(0, 0.9))]
learning_rates, epochs, optimizer = (0.001, 0.003, 0.01, 0.03), 20, optax.adam
