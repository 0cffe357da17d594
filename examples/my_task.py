"""A task of your own for the command line: `soap-jax study examples/my_task.py --quick`."""

import flax.linen as nn
import numpy as np
import optax

from soap_jax import data, study

model = nn.Sequential([nn.Dense(64), nn.LayerNorm(), nn.gelu, nn.Dense(32), nn.gelu, nn.Dense(10)])
digits = data.load("digits")
x, x_test = (part.images.reshape(-1, 64) / np.float32(16) for part in (digits.train, digits.test))
y, y_test = digits.train.labels, digits.test.labels


def loss(params, batch):  # noqa: D103
    logits = model.apply({"params": params}, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


task = study.Task(
    init=lambda key: model.init(key, x[:1])["params"],
    loss=loss,
    metrics={"accuracy": lambda p, b: (model.apply({"params": p}, b[0]).argmax(-1) == b[1]).mean()},
    **{"train": (x[300:], y[300:]), "validation": (x[:300], y[:300]), "test": (x_test, y_test)},
)
