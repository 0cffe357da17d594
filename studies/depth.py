"""How do alignment and accuracy fall with depth?

    SOAP_JAX_DATA_DIR=DIR soap-jax study studies/depth.py

MNIST, networks with 1 to 8 hidden layers of 128 tanh units, one epoch of SGD.
"""

import math
import os
import pathlib

from soap_jax import study
from soap_jax.tasks import mlp, read

mnist = read(pathlib.Path(os.environ.get("SOAP_JAX_DATA_DIR", "data")) / "mnist")
tasks = {str(depth): mlp(depth, 128, dataset=mnist) for depth in (1, 2, 4, 8)}
methods = ["bp", "fa", "dfa", "sign_norm", "frozen"]
learning_rates, seeds, epochs, evaluations = (0.02, 0.05, 0.1, 0.2, 0.4), 4, 1, 5
select, maximise = "validation_accuracy", True
smaller = {"seeds": 2, "steps": 40}

claims = [
    study.Ratio("fa", "bp", within=(1.5, 3.0), matched=False),
    study.Difference("fa", "bp", metric="test_accuracy", within=(-0.02, math.inf)),
    study.Difference("dfa", "bp", metric="test_accuracy", within=(-0.02, math.inf)),
    study.Difference("sign_norm", "bp", metric="test_accuracy", within=(-0.02, math.inf)),
]
