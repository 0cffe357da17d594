"""Does RFLO learn a sum of three sines as well as backpropagation through time?

    python -m benchmarks.temporal [--seeds 20] [--quick] [--out benchmarks/results]

This is the example of Murray's public notebook (murray-lab/rflo-learning, RFLO_Example.ipynb).
There, each method was run once, from a random state that was not saved. 50 tanh units with a time
constant of 10 steps and no input learn the output sin φ + sin(2φ)/2 + sin(4φ)/4 over one period of
100 steps. They start at 0.1. Recurrent weights are normal with deviation 1.5/√50, the readout is
uniform within 0.1/√50, and feedback is normal with deviation 1. The loss is half the mean square
error. Training is plain gradient descent, with one update per trial, at rate 0.03 for recurrent and
readout weights, for 10,000 trials. Seeds are paired: all methods have the same initial weights. The
methods are

    bptt                        backpropagation through time
    bptt, as large              the same, with the rate of the recurrent weights multiplied by
                                the ratio of feedback's size to the readout's
    late bptt                   as in the notebook: the error of a step goes back from the step
                                before, and the last error counts twice
    rflo                        by random feedback
    rflo, symmetric             by feedback equal to the readout
    rflo, symmetric, as large   by the readout's direction with random feedback's size
    readout                     recurrent weights are not trained

Losses are of the last trial. Their means over seeds are geometric, and the interval of the ratio is
from a t-test on its logarithm.
"""

from __future__ import annotations

import argparse
import functools
import math
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import common
from soap_jax import temporal

UNITS, TIME, TAU, RATE, TRIALS = 50, 100, 10.0, 0.03, 10_000
PRINTED = {"late bptt": 2.316e-4, "rflo": 1.519e-4}  # by the notebook, one run each
PHASE = 2 * np.pi * np.arange(1, TIME) / TIME  # at step 0 output and target are zero
TARGETS = jnp.asarray(sum(np.sin(k * PHASE) / k for k in (1, 2, 4)), jnp.float32)[:, None, None]
H0 = jnp.full((1, UNITS), 0.1)


def cell(params, h, x):
    """Leaky tanh units without input."""
    del x
    return h + (jnp.tanh(h @ params["w"]) - h) / TAU


def loss(params, h, target):
    """This step's part of half the mean square error."""
    return jnp.sum((h @ params["out"] - target) ** 2) / (2 * TIME)


def init(key):
    """Params and feedback."""
    keys = jax.random.split(key, 3)
    scale = UNITS**-0.5
    w = 1.5 * scale * jax.random.normal(keys[0], (UNITS, UNITS))
    out = 0.1 * scale * jax.random.uniform(keys[1], (UNITS, 1), minval=-1, maxval=1)
    return {"w": w, "out": out}, {"out": jax.random.normal(keys[2], (UNITS, 1))}


def of_trial(params):
    """The loss of a trial, and its outputs."""

    def body(h, target):
        h = cell(params, h, None)
        return h, (loss(params, h, target), h @ params["out"])

    losses, outputs = lax.scan(body, H0, TARGETS)[1]
    return losses.sum(), outputs


def bptt(params, feedback):
    """Backpropagation through time."""
    del feedback
    (value, _), grads = jax.value_and_grad(of_trial, has_aux=True)(params)
    return value, grads


def late_bptt(params, feedback):
    """The notebook's."""
    value, grads = bptt(params, feedback)

    def early(w):
        outputs = of_trial(params | {"w": w})[1]
        errors = lax.stop_gradient(outputs - TARGETS) / TIME
        return jnp.sum(outputs * jnp.concatenate([errors[1:], errors[-1:]]))

    return value, grads | {"w": jax.grad(early)(params["w"])}


def readout(params, feedback):
    """The readout alone."""
    value, grads = bptt(params, feedback)
    return value, grads | {"w": jnp.zeros_like(grads["w"])}


def rflo(params, feedback):
    """Random feedback, eligibility traces."""
    return temporal.value_and_grad(cell, loss)(params, feedback, H0, None, TARGETS)


def size_of(feedback, params):
    """The ratio of feedback's size to the readout's."""
    return jnp.linalg.norm(feedback["out"]) / jnp.linalg.norm(params["out"])


def as_large(params, feedback):
    """Feedback along the readout, and as large as the random one."""
    return rflo(params, {"out": size_of(feedback, params) * params["out"]})


def faster(params, feedback):
    """Backpropagation through time, with the recurrent rate that this feedback would give."""
    value, grads = bptt(params, feedback)
    return value, grads | {"w": size_of(feedback, params) * grads["w"]}


METHODS = {
    "bptt": bptt,
    "bptt, as large": faster,
    "late bptt": late_bptt,
    "rflo": rflo,
    "rflo, symmetric": lambda params, feedback: rflo(params, None),
    "rflo, symmetric, as large": as_large,
    "readout": readout,
}


@functools.partial(jax.jit, static_argnames=("method", "trials"))
def train(keys, *, method, trials):
    """The losses of each trial, `(seeds, trials)`, and feedback's size to the last readout's."""

    def run(key):
        params, feedback = init(key)

        def step(params, _):
            value, grads = METHODS[method](params, feedback)
            return jax.tree.map(lambda w, g: w - RATE * g, params, grads), value

        last, losses = lax.scan(step, params, None, trials)
        return losses, size_of(feedback, last)

    return jax.vmap(run)(keys)


def ratio(losses, reference):
    """The geometric mean of ratios over paired seeds, with its 95 % interval."""
    from scipy import stats

    logs = np.log(losses) - np.log(reference)
    half = stats.t.ppf(0.975, len(logs) - 1) * np.std(logs, ddof=1) / math.sqrt(len(logs))
    return [math.exp(np.mean(logs) + sign * half) for sign in (0, -1, 1)]


def main():
    """Trains by each method; prints the table, writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=20, help="at least 2")
    parser.add_argument("--quick", action="store_true", help="few seeds and trials")
    parser.add_argument("--out", type=pathlib.Path, default=common.OUT)
    args = parser.parse_args()
    seeds, trials = (3, 50) if args.quick else (args.seeds, TRIALS)
    if seeds < 2:
        parser.error("--seeds must be at least 2, to tell how much losses scatter.")
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    rows = []
    for method in METHODS:
        found, size = train(keys, method=method, trials=trials)
        found = np.asarray(found, np.float64)
        last = found[:, -1]
        reference = rows[0]["losses"] if rows else last
        printed = PRINTED.get(method)
        rows.append(
            {
                "method": method,
                "loss": statistics.geometric_mean(last),
                "ratio": ratio(last, reference),
                "losses": last.tolist(),
                "feedback_to_readout": statistics.geometric_mean(map(float, size)),
                "mean_curve": found.mean(0)[:: max(1, trials // 100)].tolist(),
                "printed": printed,
                "below_printed": None if printed is None else int(np.sum(last <= printed)),
            }
        )
        print(f"{method}: {rows[-1]['loss']:.2e}", flush=True)
    columns = {
        "method": "method",
        "final loss": lambda row: f"{row['loss']:.2e}",
        "of seeds, smallest to largest": lambda row: (
            f"{min(row['losses']):.1e} to {max(row['losses']):.1e}"
        ),
        "ratio to BPTT": lambda row: "{:.2f} [{:.2f}, {:.2f}]".format(*row["ratio"]),
        "notebook's run": lambda row: f"{row['printed']:.2e}" if row["printed"] else "-",
        "seeds below it": lambda row: (
            f"{row['below_printed']} of {len(row['losses'])}" if row["printed"] else "-"
        ),
    }
    settings = {"units": UNITS, "steps": TIME, "tau": TAU, "rate": RATE, "trials": trials}
    common.publish("temporal", args.out, rows, columns, seeds=seeds, **settings)


if __name__ == "__main__":
    main()
