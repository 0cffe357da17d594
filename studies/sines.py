"""Does RFLO learn recurrent weights without going back in time?

    soap-jax study studies/sines.py

Fifty tanh units draw a sum of three sines. "frozen" learns only the readout.
"""

import jax

from soap_jax import study, temporal
from soap_jax.tasks import sines
from soap_jax.tasks.sequences import UNITS, sine_cell, sine_loss

step = temporal.value_and_grad(sine_cell, sine_loss)


def rflo_gradient(params, feedback, batch, key, step_number, learning_rate):  # noqa: D103
    start, targets = batch
    return step(params, feedback, start, None, targets.swapaxes(0, 1))


def rflo_feedback(key, params, batch):  # noqa: D103 (no error passes the recurrent kernel)
    return {"recurrent": None, "readout": jax.random.normal(key, (UNITS, 1))}


task = sines()
rflo = study.Method(
    gradient=rflo_gradient, init_feedback=rflo_feedback, label="RFLO", color="#4682B4"
)
methods = {"bp": "bp", "rflo": rflo, "frozen": "frozen"}
learning_rates, seeds, steps = (0.006, 0.012, 0.025, 0.05, 0.1, 0.2), 10, 2000
batch_size, evaluations = 1, 10
smaller = {"seeds": 2, "steps": 40}

claims = [
    study.Ratio("rflo", "frozen", at="best", within=(0.0, 0.8)),
    study.Ratio("rflo", "bp", at="best", within=(0.8, 2.0)),
]
