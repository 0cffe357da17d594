"""Moskovitz et al.: FA fails on convolutional networks, sign rules do not.

    SOAP_JAX_DATA_DIR=DIR soap-jax study studies/conv_cifar10.py

The paper's architecture 1, Adam, batches of 128, on the files of CIFAR-10 in DIR/cifar10. A step is
slow on a CPU (`python -m benchmarks.convolutions`), so training is short. Compare the gaps with the
paper's gaps, not the accuracies.
"""

import math
import os
import pathlib

import optax

from soap_jax import study
from soap_jax.tasks import moskovitz_conv, read

task = moskovitz_conv(read(pathlib.Path(os.environ.get("SOAP_JAX_DATA_DIR", "data")) / "cifar10"))
methods = ["bp", "fa", "sign_norm", "sign_glorot", "frozen"]
optimizer = optax.adam
learning_rates, seeds, steps, batch_size = (0.0005, 0.001), 3, 200, 128
evaluations, eval_batch_size = 2, 500
select, maximise = "validation_accuracy", True
smaller = {"learning_rates": (0.001,), "seeds": 1, "steps": 2, "evaluations": 1}

AT = {"metric": "test_accuracy", "at": 0.001}
claims = [
    study.Difference("sign_norm", "bp", within=(-0.02, 0.02), **AT),
    study.Difference("sign_glorot", "bp", within=(-0.02, 0.02), **AT),
    study.Difference("fa", "bp", within=(-math.inf, -0.02), **AT),
    study.Difference("fa", "frozen", within=(0.0, math.inf), **AT),
]
