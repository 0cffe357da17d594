"""Tasks with sequences: remembering a cue, and generating a sum of sines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from soap_jax import grids, training
from soap_jax.tasks.task import Taps, Task, accuracy

HELD_OUT = 512
"""The number of validation sequences, and of test sequences."""


class NamedLSTMCell(nn.OptimizedLSTMCell):
    """Flax's LSTM cell, with its carry named "c" and "h"."""

    def __call__(self, carry, inputs):
        """Returns `((c, h), h)`."""
        (c, h), _ = super().__call__(carry, inputs)
        c, h = checkpoint_name(c, "c"), checkpoint_name(h, "h")
        return (c, h), h


class LSTMReader(nn.Module):
    """An LSTM with an output at the last step: `(batch, time, features) -> (batch, classes)`.

    Attributes:
        units: number of units of the LSTM.
        classes: size of the output.
    """

    units: int = 32
    classes: int = 2

    @nn.compact
    def __call__(self, xs: jax.Array) -> jax.Array:
        """Returns the logits, named "logits"."""
        hs: Any = nn.RNN(NamedLSTMCell(self.units, name="cell"))(xs)
        h = hs[:, -1]
        return checkpoint_name(nn.Dense(self.classes, name="readout")(h), "logits")


def delayed_cue(
    length: int = 64,
    *,
    cues: Sequence[int] = (0,),
    units: int = 32,
    noise: float = 0.1,
    forget_bias: float = 1.0,
    batch_size: int = 32,
) -> Task:
    """Makes the task of an LSTM that must remember a cue until the last step.

    The input is a cue of +1 or -1 at step 0, then normal noise, and a signal at step `length` that
    asks for the answer. With one cue the answer is the cue. With several cues the answer is their
    parity (whether the number of +1 is odd). The error at one cue then depends on the other cues,
    so one error for all steps is not enough.

    Direct feedback goes to the LSTM's carry, c and h, at every step. All steps get the same
    projected error of the output, and no error goes back through time.

    Args:
        length: the last step, at which the answer is asked for.
        cues: the steps of the cues.
        units: number of units of the LSTM.
        noise: standard deviation of the input's noise.
        forget_bias: initial bias of the forget gates; Flax's default is 0.
        batch_size: number of sequences in a batch.

    Returns:
        The task. A function makes its batches, `((batch, length + 1, 2), (batch,))`, so give the
        study `steps`, not `epochs`.

    Raises:
        ValueError: if a number is out of range.

    References:
        Sepp Hochreiter, Jürgen Schmidhuber. Long short-term memory. Neural Computation, 1997.
            https://doi.org/10.1162/neco.1997.9.8.1735
    """
    for name, count in (("length", length), ("units", units), ("batch_size", batch_size)):
        grids.check_count(name, count)
    if not cues or len(set(cues)) < len(cues) or not all(0 <= step < length for step in cues):
        raise ValueError(f"cues is {cues!r}; expected different steps from 0 to {length - 1}.")
    model = LSTMReader(units)

    def examples(key, size=batch_size):
        cue_key, noise_key = jax.random.split(key)
        shown = jax.random.bernoulli(cue_key, 0.5, (size, len(cues)))
        xs = noise * jax.random.normal(noise_key, (size, length + 1, 2))
        xs = xs.at[:, jnp.array(cues), 0].set(2.0 * shown - 1)
        return xs.at[:, -1, 1].set(1.0), shown.sum(1, dtype=jnp.int32) % 2

    def init(key):
        params = model.init(key, jnp.zeros((1, 2, 2)))["params"]
        params["cell"]["hf"]["bias"] += forget_bias
        return params

    def logits(params, batch):
        return model.apply({"params": params}, batch[0])

    validation, test = map(jax.random.key, (0, 1))
    return Task(
        init=init,
        loss=lambda params, batch: training.cross_entropy(logits(params, batch), batch[1]),
        train=examples,
        validation=examples(validation, HELD_OUT),
        test=examples(test, HELD_OUT),
        metrics={"accuracy": lambda params, batch: accuracy(logits(params, batch), batch[1])},
        taps=Taps(("c", "h"), "logits", lambda b: jax.nn.one_hot(b[1], 2), stacked="time"),
    )


UNITS, TIME, TAU = 50, 100, 10.0
"""The number of tanh units of `sines`, its number of steps, and the time constant of a unit."""


def sines() -> Task:
    """Makes the task of leaky tanh units that learn a sum of three sines, without input.

        h ← h + (tanh(W h) - h) / 10,    y = V h,    target = Σₖ sin(k φ) / k,  k = 1, 2, 4

    The loss is the mean squared error over 100 steps. The initial state of the 50 units is 0.1, and
    W is drawn with gain 1.5. There is one example, the initial state `(batch, 50)` and the target
    `(batch, 100, 1)`: use `batch_size=1`. For time-local learning give `sine_cell` and `sine_loss`
    to `soap_jax.temporal`.

    References:
        James Murray. Local online learning in recurrent networks with random feedback. eLife, 2019.
            https://doi.org/10.7554/eLife.43299
    """
    phase = 2 * np.pi * np.arange(TIME) / TIME
    target = np.stack([np.sin(k * phase) / k for k in (1, 2, 4)], -1).sum(-1, keepdims=True)

    def init(key):
        recurrent, readout = jax.random.split(key)
        return {
            "recurrent": 1.5 * jax.random.normal(recurrent, (UNITS, UNITS)) / UNITS**0.5,
            "readout": 0.01 * jax.random.normal(readout, (UNITS, 1)),
        }

    def loss(params, batch):
        start, targets = batch
        _, hs = jax.lax.scan(lambda h, _: (sine_cell(params, h, None),) * 2, start, None, TIME)
        return jnp.mean((hs @ params["readout"] - jnp.moveaxis(targets, 0, 1)) ** 2)

    return Task(
        init, loss, train=(np.full((1, UNITS), 0.1, np.float32), target[None].astype(np.float32))
    )


def sine_cell(params, h: jax.Array, x: None) -> jax.Array:
    """Computes one step of the units of `sines`."""
    return h + (jnp.tanh(h @ params["recurrent"]) - h) / TAU


def sine_loss(params, h: jax.Array, target: jax.Array) -> jax.Array:
    """Computes the loss of `sines` at one step; the sum over steps is the loss."""
    return jnp.mean((h @ params["readout"] - target) ** 2) / TIME
