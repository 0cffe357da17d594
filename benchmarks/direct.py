"""What does a step of direct feedback alignment cost, relative to backprop, by depth and width?

    python -m benchmarks.direct [--rounds 15] [--quick] [--out benchmarks/results]

The network is a stack of equal tanh layers of one width, between a first and an output layer. It is
trained by SGD in jitted, donated steps. Backprop runs the stack in two ways, as a scan and as a
Python loop (unrolled). DFA runs it in three ways:

    unrolled    a Python loop
    scan        `soap_jax.direct.scan_blocks(parallel=False)`: forward and backward as scans
    parallel    `parallel=True`: forward as a scan, backward as one batched computation

Ratios are within a round, to the faster of the two forms of backprop. Shown are medians over
rounds, with quartiles. `limit` is the share of backprop's arithmetic that DFA needs.
"""

from __future__ import annotations

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from soap_jax import direct
from soap_jax.ops import detach

INPUTS, CLASSES = 784, 10
NETWORKS = {  # depth x width, batch
    "32 x 256, batch 128": (32, 256, 128),
    "8 x 1024, batch 128": (8, 1024, 128),
    "8 x 2048, batch 128": (8, 2048, 128),
    "8 x 4096, batch 128": (8, 4096, 128),
}
QUICK = {"8 x 64, batch 16": (8, 64, 16)}
REFERENCES = ("bp, unrolled", "bp, scan")


def block(layer, x):
    """One layer of the stack."""
    return jnp.tanh(x @ layer["kernel"] + layer["bias"])


def by_loop(stack, x, cut):
    """The activations after every block, as a list; `cut` goes between blocks."""
    activations = []
    for i in range(len(stack["bias"])):
        x = block(jax.tree.map(lambda leaf, i=i: leaf[i], stack), cut(x))
        activations.append(x)
    return activations


def make_losses(projections):
    """Losses `(params, x, labels) -> loss` by name; their gradients are the methods."""

    def of(run, params, x, labels, *, feedback):
        first = block(params["first"], x)
        last, join = run(params["stack"], first)
        output = (detach(last) if feedback else last) @ params["output"]
        if feedback:
            output = direct.direct_feedback(join(output), first, projections["first"])
        return optax.softmax_cross_entropy_with_integer_labels(output, labels).mean()

    def bp_unrolled(stack, x):
        return by_loop(stack, x, lambda x: x)[-1], None

    def bp_scan(stack, x):
        return jax.lax.scan(lambda x, layer: (block(layer, x), None), x, stack)[0], None

    def dfa_unrolled(stack, x):
        activations = by_loop(stack, x, detach)
        return activations[-1], lambda output: direct.direct_feedback(
            output, activations, list(projections["stack"])
        )

    def dfa_scan(stack, x, *, parallel):
        activations = direct.scan_blocks(block, stack, x, parallel=parallel)
        return activations[-1], lambda output: direct.direct_feedback(
            output, activations, projections["stack"], stacked=True
        )

    runs = {
        "bp, unrolled": (bp_unrolled, False),
        "bp, scan": (bp_scan, False),
        "dfa, unrolled": (dfa_unrolled, True),
        "dfa, scan": (functools.partial(dfa_scan, parallel=False), True),
        "dfa, parallel": (functools.partial(dfa_scan, parallel=True), True),
    }
    return {
        name: functools.partial(of, run, feedback=feedback)
        for name, (run, feedback) in runs.items()
    }


def make_runners(depth, width, batch_size):
    """One function per method that does `n` steps and waits."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        scale = (2 / (shape[-2] + shape[-1])) ** 0.5
        return jnp.asarray(scale * rng.standard_normal(shape, np.float32))

    params = {
        "first": {"kernel": normal(INPUTS, width), "bias": jnp.zeros(width)},
        "stack": {"kernel": normal(depth, width, width), "bias": jnp.zeros((depth, width))},
        "output": normal(width, CLASSES),
    }
    projections = {"first": normal(CLASSES, width), "stack": normal(depth, CLASSES, width)}
    batch = (
        jnp.asarray(rng.standard_normal((batch_size, INPUTS), np.float32)),
        jnp.asarray(rng.integers(0, CLASSES, batch_size, np.int32)),
    )

    def make_runner(loss):
        @functools.partial(jax.jit, donate_argnums=0)
        def step(params, batch):
            gradient = jax.grad(loss)(params, *batch)
            return jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)

        own = jax.tree.map(jnp.array, params)  # donated

        def run(n):
            nonlocal own
            for _ in range(n):
                own = step(own, batch)
            jax.block_until_ready(own)

        run(3)  # compile and warm up
        return run

    return {name: make_runner(loss) for name, loss in make_losses(projections).items()}


def limit(depth, width):
    """Multiplications of a DFA step over those of a backprop step."""
    products = depth * width**2 + width * CLASSES  # with cotangents of their inputs
    both = 2 * (INPUTS * width + products)  # forward and the kernels' gradients
    projected = (depth + 1) * width * CLASSES
    return (both + projected) / (both + products)


def main():
    """Runs the benchmark, prints the table, writes JSON, table and figure."""
    args = common.arguments(__doc__, rounds=15).parse_args()
    networks, rounds, seconds = (QUICK, 5, 0.02) if args.quick else (NETWORKS, args.rounds, 0.5)

    rows = []
    for network, (depth, width, batch_size) in networks.items():
        runners = make_runners(depth, width, batch_size)
        times = common.interleave_blocks(runners, rounds, seconds, "bp, scan")
        faster = min(REFERENCES, key=lambda name: statistics.median(times[name]))
        for method, row in common.summary(times, faster).items():
            where = {"network": network, "limit": limit(depth, width), "method": method}
            rows.append(where | {"bp": faster} | row)
        print(f"{network}: done", flush=True)
    columns = {
        "network": "network",
        "limit": lambda row: f"{row['limit']:.2f}",
        "method": "method",
        "ms/step": common.show_ms,
        "ratio to the faster bp [quartiles]": common.show_ratio,
    }
    figure = common.dot_plot(
        rows, panel="network", label="method", xlabel="time of a step, of the faster backprop's"
    )
    common.publish("direct", args.out, rows, columns, figure=figure, rounds=rounds)


if __name__ == "__main__":
    main()
