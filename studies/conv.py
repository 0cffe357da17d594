"""How far behind backprop are FA, DFA and the sign rules on a convolutional network?

    SOAP_JAX_DATA_DIR=DIR soap-jax study studies/conv.py

MNIST at 14 x 14 pixels, two convolutions and a dense layer, one epoch of Adam.
"""

import math
import os
import pathlib

import optax

from soap_jax import study
from soap_jax.tasks import read, small_conv

task = small_conv(read(pathlib.Path(os.environ.get("SOAP_JAX_DATA_DIR", "data")) / "mnist"))
methods = ["bp", "fa", "dfa", "sign_norm", "sign_glorot", "frozen"]
optimizer = optax.adam
learning_rates, seeds, epochs, evaluations = (0.001, 0.003, 0.01, 0.03), 5, 1, 5
select, maximise = "validation_accuracy", True
smaller = {"seeds": 2, "steps": 20}

ACCURACY = {"metric": "test_accuracy"}
claims = [
    study.Difference("sign_norm", "bp", within=(-0.02, 0.02), **ACCURACY),
    study.Difference("sign_glorot", "bp", within=(-0.02, 0.02), **ACCURACY),
    study.Difference("fa", "bp", within=(-math.inf, -0.02), **ACCURACY),
    study.Share("fa", over="frozen", within=(0.5, math.inf), **ACCURACY),
]
