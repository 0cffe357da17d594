"""Learning in time without going back in time: RFLO, for a recurrent cell of your own.

Fifty tanh units without input learn to draw three sines (Murray 2019). You write one step of the
cell and one step of the loss. `temporal.value_and_grad` runs them only forward in time. Traces
store the effect of each weight on its unit, and are multiplied by the current error, which random
feedback sends back. Memory does not grow with time. What to see: RFLO learns about as well as
backpropagation through time. Its recurrent weights matter: with only the readout, the loss is
several times as large.

    python examples/rflo.py
"""

import jax
import jax.numpy as jnp
import numpy as np

from soap_jax import temporal

UNITS, TIME, TAU, RATE = 50, 100, 10.0, 0.015
PHASE = 2 * np.pi * np.arange(TIME) / TIME
TARGETS = jnp.asarray(sum(np.sin(k * PHASE) / k for k in (1, 2, 4)), jnp.float32)[:, None, None]
H0 = jnp.full((1, UNITS), 0.1)  # a batch of one


def cell(params, h, x):
    """One step of one example; an LSTM of Flax or a spiking neuron would do as well."""
    return h + (jnp.tanh(h @ params["recurrent"]) - h) / TAU


def loss(params, h, target):
    """One step of a batch's loss, readout included."""
    return jnp.mean((h @ params["readout"] - target) ** 2) / TIME


def whole(params):
    """The loss of all steps, for backpropagation through time."""
    _, hs = jax.lax.scan(lambda h, _: (cell(params, h, None),) * 2, H0, None, TIME)
    return jnp.mean((hs @ params["readout"] - TARGETS) ** 2)


def main(trials=2000, seed=0):
    """Trains by each method; returns the losses by method."""
    keys = jax.random.split(jax.random.key(seed), 3)
    w, out, b = map(jax.random.normal, keys, [(UNITS, UNITS), (UNITS, 1), (UNITS, 1)])
    start, losses = {"recurrent": 1.5 * w / UNITS**0.5, "readout": 0.01 * out}, {}
    rflo, backprop = temporal.value_and_grad(cell, loss), jax.value_and_grad(whole)
    sequence = {"readout": b}, H0, None, TARGETS  # no error passes the recurrent kernel
    for name, rate in {"RFLO": RATE, "backprop": RATE, "readout only": 0.0}.items():

        def trial(params, _, name=name, rates={"recurrent": rate, "readout": RATE}):  # noqa: B006
            value, grads = rflo(params, *sequence) if name == "RFLO" else backprop(params)
            return jax.tree.map(lambda w, g, r: w - r * g, params, grads, rates), value

        losses[name] = jax.jit(jax.lax.scan, static_argnums=(0, 3))(trial, start, None, trials)[1]
        print(f"{name:12}", *(f"{losses[name][i]:8.4f}" for i in (0, trials // 10, trials - 1)))
    return losses


if __name__ == "__main__":
    main()
