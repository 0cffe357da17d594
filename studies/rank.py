"""Do Muon or normalisation raise the effective rank of FA's errors, and its accuracy?

    SOAP_JAX_DATA_DIR=DIR soap-jax study studies/rank.py

MNIST, four hidden layers of 128 ReLUs, one epoch. Activations are standardised before each ReLU or
not, and the optimiser is Adam, or Muon for the kernels. This study has no claims.
"""

import os
import pathlib

import jax
import optax
from optax import contrib

from soap_jax import Fixed, study
from soap_jax.tasks import mlp, read


def standardised(x):  # noqa: D103 (normalisation over units, without params)
    return jax.nn.relu(jax.nn.standardize(x))


def muon(base, learning_rate):  # noqa: D103 (in place of the task's optimiser)
    return contrib.muon(learning_rate)


mnist = read(pathlib.Path(os.environ.get("SOAP_JAX_DATA_DIR", "data")) / "mnist")
tasks = {
    "plain": mlp(4, 128, dataset=mnist, activation=jax.nn.relu),
    "standardised": mlp(4, 128, dataset=mnist, activation=standardised),
}
methods = {
    "bp": "bp",
    "fa": "fa",
    "bp_muon": study.Method(optimizer=muon, label="backprop, Muon", color="#009E73"),
    "fa_muon": study.Method(rule=Fixed(), optimizer=muon, label="FA, Muon", color="#E69F00"),
    "frozen": "frozen",
}
optimizer = optax.adam
learning_rates, seeds, epochs = (0.0003, 0.001, 0.003, 0.01, 0.03), 4, 1
measures, evaluations = ("effective_rank",), 2
select, maximise = "validation_accuracy", True
smaller = {"seeds": 2, "steps": 40}
