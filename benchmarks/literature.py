"""Do BP, FA, DFA, uSF and PFA reach the test accuracies on MNIST that the literature reports?

    python -m benchmarks.literature --data-dir DIR [--seeds 5] [--quick] [--out benchmarks/results]

A 784-512-512-10 network of ReLUs, as the repository of product feedback alignment configures it
(jil095/product_feedback_alignment, exp_configs/mnist_ffn2_sgd): all 60,000 training images, pixels
shifted by 0.1307 and scaled by 0.3081, Glorot's uniform initialiser for kernels, feedback and
projections, zero biases, cross-entropy, batches of 64, momentum SGD (rate 0.01, momentum 0.9,
weight decay 1e-4), 40 epochs, the rate halved after 20 and after 30. uSF's signs have Glorot's
standard deviation. Learned feedback (PFA with ten backward neurons for each unit of the output, or
orthogonal; LDFA of rank 10) decays like its kernels, with the values of PFA's configuration: 0.03
in the first epoch and 9e-5 after it. The accuracy is of the last epoch; nothing is chosen on the
test set. Seeds are paired: same kernels, same order of examples. Results are written when runs
finish, and the command continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import statistics

import jax

jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)

import flax.linen as nn  # noqa: E402 (the number of devices comes first)
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

import soap_jax  # noqa: E402
from benchmarks import common  # noqa: E402
from soap_jax import (  # noqa: E402
    data,
    direct,
    initializers,
    metrics,
    models,
    ops,
    optimizers,
    sweeps,
    training,
)

REPORTED = {"bp": 98.4, "fa": 98.2, "dfa": 98.15, "usf": 98.25, "pfa": 98.39}
RULES = {"fa": soap_jax.Fixed(), "usf": soap_jax.SignSync(magnitude="glorot")}
WIDTHS = (512, 512, 10)
RUNS = pathlib.Path("results/literature.json")
EPOCHS, BATCH_SIZE, RATE, MOMENTUM, DECAY = 40, 64, 0.01, 0.9, 1e-4
FIRST_DECAY, LATER_DECAY = 0.03, 9e-5
glorot_uniform = nn.initializers.glorot_uniform()
LEARNED = {
    "pfa": initializers.product(10),
    "pfa orthogonal": initializers.product(orthogonal=True),
    "ldfa": initializers.low_rank(10, glorot_uniform, as_factors=True),
}
METHODS = ("bp", "fa", "dfa", "usf", *LEARNED)


def inputs_of(images):
    """Pixels from 0 to 255 as inputs."""
    return (images.astype(jnp.float32) / 255 - 0.1307) / 0.3081


def logits_by_dfa(params, projections, x):
    """The network's logits; errors go directly to each hidden layer."""
    x, hidden = x.reshape(len(x), -1), []
    for i in range(len(WIDTHS) - 1):
        layer = params[f"Dense_{i}"]
        hidden.append(nn.relu(ops.detach(x) @ layer["kernel"] + layer["bias"]))
        x = hidden[-1]
    layer = params[f"Dense_{len(WIDTHS) - 1}"]
    logits = ops.detach(x) @ layer["kernel"] + layer["bias"]
    return logits if projections is None else direct.direct_feedback(logits, hidden, projections)


def logits_by_learned(params, feedback, x):
    """The network's logits; errors go through feedback, which gets its kernel's gradient."""
    x = x.reshape(len(x), -1)
    for i in range(len(WIDTHS)):
        layer, own = params[f"Dense_{i}"], feedback[f"Dense_{i}"] if feedback and i else None
        product = ops.feedback_dense(
            x, layer["kernel"], own and own["kernel"], feedback_bar="kernel"
        )
        x = product + layer["bias"]
        x = nn.relu(x) if i + 1 < len(WIDTHS) else x
    return x


def make_run(method, epochs):
    """A training as the pure function `(seed, rate, period, train, test) -> results`.

    The results are accuracy, loss, and the angles of feedback to the two kernels that have it.
    """
    model = models.MLP(
        WIDTHS, activation=nn.relu, feedback=method in RULES, kernel_init=glorot_uniform
    )

    def run(seed, rate, period, train, test):
        del period
        init_key, feedback_key, order_key = jax.random.split(jax.random.key(seed), 3)
        params = model.init({"params": init_key}, train.images[:1])["params"]
        steps = len(train.labels) // BATCH_SIZE
        halved = {epochs // 2 * steps: 0.5, epochs * 3 // 4 * steps: 0.5}
        learns = method in LEARNED
        decay = optax.piecewise_constant_schedule(FIRST_DECAY, {steps: LATER_DECAY / FIRST_DECAY})
        optimizer = optax.chain(
            optax.add_decayed_weights(decay if learns else DECAY),
            optax.sgd(optax.piecewise_constant_schedule(rate, halved), MOMENTUM),
        )
        if learns:
            optimizer = optimizers.hold_fixed(optimizer)
        feedback, projections = None, None
        if method in RULES or learns:
            feedback = soap_jax.init_feedback(
                feedback_key,
                params,
                RULES.get(method, soap_jax.Fixed()),
                where=["Dense_1/kernel", "Dense_2/kernel"],
                initializer=LEARNED.get(method, glorot_uniform),
            )
        if method == "dfa":
            projections = [
                direct.draw_projection(key, WIDTHS[-1], width, initializer=glorot_uniform)
                for key, width in zip(jax.random.split(feedback_key), WIDTHS[:-1], strict=True)
            ]

        def apply_fn(params, weights, images):
            x = inputs_of(images)
            if method == "dfa":
                return logits_by_dfa(params, projections, x)
            if learns:
                return logits_by_learned(params, weights, x)
            return model.apply({"params": params} | ({"feedback": weights} if weights else {}), x)

        step = training.make_train_step(apply_fn, optimizer, learn_feedback=learns)
        state = training.init_train_state(
            params, optimizer, feedback=feedback, learn_feedback=learns
        )

        def epoch(state, key):
            order = training.epoch_order(key, len(train.labels), BATCH_SIZE)
            state, losses = training.scan_batches(step, state, train, order)
            return state, losses.mean()

        state, losses = jax.lax.scan(epoch, state, jax.random.split(order_key, epochs))
        tested = training.evaluate(apply_fn, state.params, _weights(state), test)
        angles = jnp.full(2, jnp.nan)
        if feedback is not None:
            found = metrics.weight_angle(state.params, _weights(state))
            angles = jnp.stack([found[f"Dense_{i}"]["kernel"] for i in (1, 2)])
        return 100 * tested.accuracy, losses[-1], angles

    return run


def _weights(state):
    return training.feedback_weights(state.feedback)


def measure(method, dataset, seeds, epochs, keep):
    """Trains the seeds not yet in `keep`, a pair at a time; `{seed: (accuracy, loss, *angles)}`."""
    done = keep.read().get(method, {})
    points = sweeps.grid(seeds=range(seeds), learning_rates=[RATE])
    have = [i for i, point in enumerate(points) if str(point.seed) in done]
    parts = sweeps.iterate(
        make_run(method, epochs),
        points,
        args=(dataset.train, dataset.test),
        done=have,
        chunk_size=1,
    )
    for part in parts:
        for i, *found, angles in zip(part.indices, *part.results, strict=True):
            done[str(points[i].seed)] = [*map(float, found), *map(float, angles)]
        keep.write(keep.read() | {method: done})
        print(f"  {method}: {len(done)} of {seeds} seeds", flush=True)
    return {int(seed): result for seed, result in done.items() if int(seed) < seeds}


class Keep:
    """Results of finished runs, in a file that is complete or absent."""

    def __init__(self, path):
        self.path = path

    def read(self):
        """`{method: {seed: [accuracy, loss, angle, angle]}}`."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def write(self, runs):
        """Replaces the file at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(runs))
        os.replace(unfinished, self.path)


def main():
    """Runs the benchmark, prints the table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", help="with the published files of MNIST")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--quick", action="store_true", help="digits, 4 epochs: to see it run")
    parser.add_argument("--out", type=pathlib.Path, default=common.OUT)
    parser.add_argument("--runs", type=pathlib.Path, default=RUNS)
    args = parser.parse_args()
    name, epochs = ("digits", 4) if args.quick else ("mnist", EPOCHS)
    dataset = data.load(name, data_dir=None if args.quick else args.data_dir)
    keep = Keep(args.out / "literature_runs.json" if args.quick else args.runs)

    results = []
    for method in args.methods.split(","):
        found = list(measure(method, dataset, args.seeds, epochs, keep).values())
        accuracies, losses, *angles = map(list, zip(*found, strict=True))
        results.append(
            {
                "method": method,
                "accuracy": statistics.mean(accuracies),
                "deviation": statistics.stdev(accuracies),
                "reported": None if args.quick else REPORTED.get(method),
                "accuracies": accuracies,
                "train_loss": statistics.mean(losses),
                "angles": [None if math.isnan(of[0]) else statistics.mean(of) for of in angles],
            }
        )
    columns = {
        "method": "method",
        f"test accuracy %, {args.seeds} seeds": "{accuracy:.2f} ± {deviation:.2f}".format_map,
        "reported": lambda row: row["reported"] or "-",
        "difference": lambda row: (
            f"{row['accuracy'] - row['reported']:+.2f}" if row["reported"] else "-"
        ),
        "angles of feedback to its kernels": lambda row: (
            ", ".join(f"{angle:.0f}°" for angle in row["angles"] if angle is not None) or "-"
        ),
    }
    print(f"\n{common.markdown(results, columns)}")
    common.write(
        "literature", args.out, results, dataset=dataset.source, epochs=epochs, seeds=args.seeds
    )


if __name__ == "__main__":
    main()
