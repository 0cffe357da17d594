"""Does direct feedback lose its use as the output grows?

    soap-jax study studies/output_size.py

A student learns the 2 to 1,000 classes of a random teacher network. DFA sends an error with one
entry per class to every layer, through one random matrix.
"""

import math

import optax

from soap_jax import study
from soap_jax.tasks import teacher

tasks = {str(classes): teacher(classes) for classes in (2, 10, 100, 1000)}
methods = ["bp", "fa", "dfa", "sign_norm", "frozen"]
optimizer = optax.adamw
learning_rates, seeds, steps, evaluations = (0.0003, 0.001, 0.003, 0.01, 0.03), 6, 1000, 10
smaller = {"seeds": 2, "steps": 40}

GAIN = {"over": "frozen", "metric": "test_loss"}
claims = [
    study.Claim(
        "DFA",
        "DFA has four fifths of backprop's gain",
        (study.Share("dfa", within=(0.8, math.inf), **GAIN),),
    ),
    study.Claim(
        "FA",
        "FA has four fifths of backprop's gain",
        (study.Share("fa", within=(0.8, math.inf), **GAIN),),
    ),
    study.Claim(
        "DFA < FA",
        "DFA ends at a higher loss than FA",
        (study.Difference("dfa", "fa", metric="test_loss", within=(0.0, math.inf)),),
    ),
]
