"""Direct feedback in a transformer: between blocks, or through attention as well?

    soap-jax study studies/transformer.py

Two blocks read the text of Python's help, character by character. "dfa" cuts the residual stream
between blocks and uses backpropagation inside each block. "dfa_layers" sends the output's error to
every layer, including queries, keys and values.
"""

import math

import optax

from soap_jax import study
from soap_jax.tasks import Taps, Transformer, char_lm

model = Transformer()
task = char_lm(model=model)
layers = study.Method(
    direct="exact", taps=Taps(model.layers, "logits"), label="DFA, every layer", color="#A03070"
)
methods = {name: name for name in ("bp", "fa", "sign_norm", "dfa", "frozen")} | {
    "dfa_layers": layers
}
optimizer = optax.adam
learning_rates, seeds, steps, evaluations = (0.001, 0.003, 0.01, 0.03), 4, 800, 4
smaller = {"learning_rates": (0.01,), "seeds": 1, "steps": 10, "evaluations": 1}

GAIN = {"over": "frozen", "metric": "test_loss"}
claims = [
    study.Share("sign_norm", within=(0.8, math.inf), **GAIN),
    study.Share("dfa", within=(0.5, math.inf), **GAIN),
    study.Difference("dfa_layers", "dfa", metric="test_loss", within=(0.0, math.inf)),
    study.Share("fa", within=(0.5, math.inf), **GAIN),
]
