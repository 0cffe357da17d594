"""What does a feedback-alignment step cost beside a backprop step of the same Flax model?

    python -m benchmarks.step_time [--rounds 60] [--quick] [--out benchmarks/results]

Within one process, each round times every method once, in an order drawn anew, so that whatever
else the machine does falls on all alike. A timing is a block of steps of the jitted, donated train
step, called from Python and waited for. The table gives medians over rounds, and medians of the
ratio to backprop within a round with their quartiles.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics

import jax
import numpy as np
import optax

import soap_jax
from benchmarks import common
from soap_jax import models, training

METHODS = {
    "bp": None,
    "fa": soap_jax.Fixed(),
    "sign, T=1": soap_jax.SignSync(period=1),
    "sign_preserve, T=1": soap_jax.SignSync(period=1, magnitude="preserve"),
    "sign, T=100": soap_jax.SignSync(period=100),
}
NETWORKS = {"784-256-10": (256, 10), "784-1024-1024-1024-10": (1024, 1024, 1024, 10)}
BATCH_SIZES = (64, 512)


def make_runner(rule, features, batch_size):
    """Compiles one method's train step; returns a function that does `n` steps and waits."""
    model = models.MLP(features, feedback=rule is not None)
    rng = np.random.default_rng(0)
    batch = jax.device_put(
        (
            rng.standard_normal((batch_size, 784), np.float32),
            rng.integers(0, features[-1], batch_size, np.int32),
        )
    )
    variables = model.init(jax.random.key(0), batch[0])
    feedback = None
    if rule is not None:
        feedback = soap_jax.init_feedback(
            jax.random.key(1), variables["params"], rule, feedback=variables["feedback"]
        )

    def apply_fn(params, weights, x):
        return model.apply({"params": params} | ({"feedback": weights} if weights else {}), x)

    optimizer = optax.sgd(0.01)
    step = jax.jit(training.make_train_step(apply_fn, optimizer), donate_argnums=0)
    state = training.init_train_state(variables["params"], optimizer, feedback=feedback)

    def run(n):
        nonlocal state
        for _ in range(n):
            state, loss = step(state, batch)
        jax.block_until_ready((state.params, loss))

    return run


def measure(features, batch_size, rounds, seconds_per_block):
    """Times all methods; returns `{method: [seconds per step, one a round]}`."""
    runners = {name: make_runner(rule, features, batch_size) for name, rule in METHODS.items()}
    for run in runners.values():
        run(5)  # compile and warm up
    return common.interleave_blocks(runners, rounds, seconds_per_block, "bp")


def summarise(times):
    """Median milliseconds per method, and the ratio to backprop within a round."""
    rows = {}
    for name, values in times.items():
        middle, quartiles = common.ratio(times, name, "bp")
        rows[name] = {
            "ms": 1e3 * statistics.median(values),
            "ratio_to_bp": middle,
            "ratio_quartiles": quartiles,
        }
    return rows


def main():
    """Runs the benchmark, prints the table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--quick", action="store_true", help="few short rounds, to see it run")
    parser.add_argument("--out", type=pathlib.Path, default=common.OUT)
    args = parser.parse_args()
    rounds, seconds = (5, 0.02) if args.quick else (args.rounds, 0.25)

    results = []
    print(f"| {'network':<22} | batch | {'method':<18} | ms/step | ratio to bp [quartiles] |")
    print(f"| {'-' * 22} | ----- | {'-' * 18} | ------- | ----------------------- |")
    for network, features in NETWORKS.items():
        for batch_size in BATCH_SIZES:
            rows = summarise(measure(features, batch_size, rounds, seconds))
            for method, row in rows.items():
                low, high = row["ratio_quartiles"]
                print(
                    f"| {network:<22} | {batch_size:>5} | {method:<18} | {row['ms']:>7.3f} "
                    f"| {row['ratio_to_bp']:.3f} [{low:.3f}, {high:.3f}]    |"
                )
                results.append({"network": network, "batch": batch_size, "method": method, **row})
    common.write("step_time", args.out, results, rounds=rounds, dtype="float32")


if __name__ == "__main__":
    main()
