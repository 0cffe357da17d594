"""What does it cost to record alignment every few steps of a scanned training loop?

    python -m benchmarks.recording [--rounds 30] [--quick] [--out benchmarks/results]

A 784-256-10 and a 784-1024-1024-1024-10 network have sign sync at every 100th step, batch 64, and
500 steps as one scan. `soap_jax.record_alignment` is called after each step, for weights (angles
and norm ratios), and also for gradients (the angle between the pseudo-gradient and the true
gradient on the batch, which needs both). Ratios are to "never", within a round. Shown are medians
over rounds, with quartiles.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import soap_jax
from benchmarks import common
from soap_jax import metrics, models, training

NETWORKS = {"784-256-10": (256, 10), "784-1024-1024-1024-10": (1024, 1024, 1024, 10)}
RECORDED = {  # period, and whether gradients are measured
    "never": (None, False),
    "weights, every 100 steps": (100, False),
    "weights, every 10 steps": (10, False),
    "weights and gradients, every 100 steps": (100, True),
}
BATCH_SIZE = 64


def make_runner(features, period, of_gradients, steps):
    """Compiles one scan of training; returns a function that runs it and waits."""
    model = models.MLP(features)
    rng = np.random.default_rng(0)
    data = (
        jnp.asarray(rng.standard_normal((4096, 784), np.float32)),
        jnp.asarray(rng.integers(0, 10, 4096, np.int32)),
    )
    variables = model.init(jax.random.key(0), data[0][:1])
    rule = soap_jax.SignSync(period=100, magnitude="norm")
    feedback = soap_jax.init_feedback(
        jax.random.key(1), variables["params"], rule, feedback=variables["feedback"]
    )

    def apply_fn(params, weights, x):
        return model.apply({"params": params, "feedback": weights}, x)

    optimizer = optax.sgd(0.01)
    train_step = training.make_train_step(apply_fn, optimizer)

    def step(state, batch):
        state, loss = train_step(state, batch)
        if period is None:
            return state, loss

        def gradient(params, weights):
            x, labels = batch
            return jax.grad(
                lambda params: training.cross_entropy(apply_fn(params, weights, x), labels)
            )(params)

        chosen = {"weight_angle": metrics.weight_angle, "norm_ratio": metrics.norm_ratio}
        if of_gradients:
            chosen["gradient_angle"] = functools.partial(metrics.gradient_angle, gradient)
        row = soap_jax.record_alignment(
            chosen, state.params, state.feedback, state.step, period=period
        )
        return state, (loss, row)

    order = training.epoch_order(jax.random.key(2), 4096, BATCH_SIZE)
    order = jnp.tile(order, (-(-steps // len(order)), 1))[:steps]

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state):
        return training.scan_batches(step, state, data, order)

    state = training.init_train_state(variables["params"], optimizer, feedback=feedback)

    def run():
        nonlocal state
        state, out = train(state)
        jax.block_until_ready((state, out))

    run()  # compile and warm up
    return run


def main():
    """Runs the benchmark, prints the table, writes JSON, table and figure."""
    args = common.arguments(__doc__, rounds=30).parse_args()
    networks = dict(list(NETWORKS.items())[:1]) if args.quick else NETWORKS
    rounds, steps = (5, 20) if args.quick else (args.rounds, 500)

    rows = []
    for network, features in networks.items():
        runners = {name: make_runner(features, *how, steps) for name, how in RECORDED.items()}
        times = common.interleave(runners, rounds)
        per_step = {name: [spent / steps for spent in values] for name, values in times.items()}
        for name, row in common.summary(per_step, "never").items():
            rows.append({"network": network, "recorded": name, **row})
    columns = {
        "network": "network",
        "recorded": "recorded",
        "ms/step": common.show_ms,
        "ratio to never [quartiles]": common.show_ratio,
    }
    figure = common.dot_plot(
        rows, panel="network", label="recorded", xlabel="time of a step, of one that never records"
    )
    more = {"rounds": rounds, "steps": steps, "batch": BATCH_SIZE}
    common.publish("recording", args.out, rows, columns, figure=figure, **more)


if __name__ == "__main__":
    main()
