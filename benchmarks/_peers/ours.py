"""Worker: soap_jax, by layers of `soap_jax.linen`, in two loops.

"soap_jax, step" calls a jitted, donated step from Python with rows of NumPy arrays, as
`examples/linen_loop.py` does. "soap_jax, scan" is `soap_jax.training.train_epoch`: data lie on the
device, and the epoch is one program that draws its order and scans over the batches.
"""

import os
from typing import NamedTuple

import jax
import numpy as np
import optax
import protocol

import soap_jax
from soap_jax import models, training

RULES = {
    "FA": soap_jax.Fixed(),
    "uSF": soap_jax.SignSync(period=1, magnitude="unit"),
    "frSF": soap_jax.SignSync(period=1, magnitude="preserve"),
    "brSF": soap_jax.SignSync(period=1, magnitude="redraw"),
}
METHODS = ("bp", *RULES, "DFA")


def network(method, features):
    """A method's `apply_fn`, and its initial params and feedback."""
    x = np.zeros((1, 784), np.float32)
    if method == "DFA":
        model = models.DirectMLP(features)
        variables = model.init(jax.random.key(0), x)
        feedback, collection = variables["projection"], "projection"
    else:
        model = models.MLP(features, feedback=method != "bp")
        variables = model.init(jax.random.key(0), x)
        feedback, collection = None, "feedback"
    if method in RULES:
        feedback = soap_jax.init_feedback(
            jax.random.key(1), variables["params"], RULES[method], feedback=variables["feedback"]
        )

    def apply_fn(params, weights, x):
        extra = {} if weights is None else {collection: weights}
        return model.apply({"params": params} | extra, x)

    return apply_fn, variables["params"], feedback


class Data(NamedTuple):
    """The same examples and labels, here and on the device."""

    here: tuple[np.ndarray, np.ndarray]
    there: tuple[jax.Array, jax.Array]


class Trainer:
    """As `protocol.Trainer` says, with its steps called one by one."""

    def __init__(self, method, widths, batch_size):
        optimizer = optax.sgd(protocol.RATE)
        apply_fn, params, feedback = network(method, tuple(widths[1:]))
        self.step = training.make_train_step(apply_fn, optimizer)
        self.jitted = jax.jit(self.step, donate_argnums=0)
        self.state = training.init_train_state(params, optimizer, feedback=feedback)
        self.batch_size = batch_size
        self.rng = np.random.default_rng(1)

    def train(self, data, epochs):
        """Goes over all of `data` so many times."""
        x, labels = data.here
        for _ in range(epochs):
            for rows in self.rng.permutation(len(x)).reshape(-1, self.batch_size):
                self.state, _ = self.jitted(self.state, (x[rows], labels[rows]))
        jax.block_until_ready(self.state)

    def weights(self):
        """The parameters and feedback as they are."""
        params = jax.device_get(self.state.params)
        feedback = jax.device_get(training.feedback_weights(self.state.feedback))
        layers = [params[f"Dense_{i}"] for i in range(len(params))]
        return protocol.Weights(
            [layer["kernel"] for layer in layers],
            [layer["bias"] for layer in layers],
            jax.tree.leaves(feedback),
        )


class ScanTrainer(Trainer):
    """With each epoch as one scan."""

    def train(self, data, epochs):
        """Goes over all of `data` so many times."""
        for _ in range(epochs):
            key = jax.random.key(self.rng.integers(2**31))
            self.state, _ = training.train_epoch(
                self.step, self.state, data.there, key, batch_size=self.batch_size
            )
        jax.block_until_ready(self.state)


LOOPS = {"soap_jax, step": Trainer, "soap_jax, scan": ScanTrainer}


def make(system, method, widths, batch_size):
    """As `protocol.serve` says."""
    return LOOPS[system](method, widths, batch_size)


def load(x, labels):
    """Data here and on the device."""
    here = x, labels.astype(np.int32)
    return Data(here, jax.device_put(here))


if __name__ == "__main__":
    if jax.default_backend() != "cpu":  # as PyTorch's products are by default
        jax.config.update("jax_default_matmul_precision", "float32")
    protocol.serve(
        {
            "threads": len(os.sched_getaffinity(0)),
            "platform": jax.default_backend(),
            "offers": [(system, method) for system in LOOPS for method in METHODS],
        },
        load,
        make,
    )
