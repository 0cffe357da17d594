"""What does `with_feedback` cost, relative to feedback layers, in steps and in tracing?

    python -m benchmarks.transform [--rounds 30] [--quick] [--out benchmarks/results]

Each network exists twice, with the same params and feedback: with the layers of `soap_jax.linen`,
and with Flax's own layers through `soap_jax.with_feedback`. The table gives the milliseconds of a
jitted, donated SGD step of both, and their ratio. It also gives the milliseconds to trace a step of
the plain network by backprop and through the transform, and their ratio. Shown are medians over
rounds, of ratios within a round.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import numpy as np
import optax

import soap_jax
from benchmarks import common
from soap_jax import linen, models


class TransformerBlock(nn.Module):
    """Self-attention and a dense net, `(batch, time, width) -> (batch, time, width)`."""

    feedback: bool = True
    heads: int = 4

    @nn.compact
    def __call__(self, x):
        """Returns the activations."""
        general = linen.FeedbackDenseGeneral if self.feedback else nn.DenseGeneral
        dense = linen.FeedbackDense if self.feedback else nn.Dense
        width = x.shape[-1]
        h = nn.LayerNorm()(x)
        split = self.heads, width // self.heads
        q, k, v = (general(split, name=name)(h) for name in ("query", "key", "value"))
        x = x + general(width, axis=(-2, -1), name="out")(nn.dot_product_attention(q, k, v))
        h = nn.gelu(dense(4 * width, name="up")(nn.LayerNorm()(x)))
        return x + dense(width, name="down")(h)


class Transformer(nn.Module):
    """Blocks between an embedding and a head: `(batch, time, inputs) -> (batch, 10)`."""

    feedback: bool = True
    blocks: int = 2
    width: int = 128
    heads: int = 4

    @nn.compact
    def __call__(self, x):
        """Returns the logits."""
        x = nn.Dense(self.width, name="embed")(x)
        for i in range(self.blocks):
            x = TransformerBlock(self.feedback, self.heads, name=f"block_{i}")(x)
        dense = linen.FeedbackDense if self.feedback else nn.Dense
        return dense(10, name="head")(x.mean(1))


def _mlp(*features):
    return lambda feedback: models.MLP(features, feedback=feedback)


NETWORKS = {  # a network with or without feedback layers, and the shape of its batch
    "784-256-10, batch 64": (_mlp(256, 10), (64, 784)),
    "784-1024-1024-1024-10, batch 64": (_mlp(1024, 1024, 1024, 10), (64, 784)),
    "784-1024-1024-1024-10, batch 512": (_mlp(1024, 1024, 1024, 10), (512, 784)),
    "conv 32-64, batch 64": (lambda feedback: models.ConvNet(feedback=feedback), (64, 28, 28, 1)),
    "transformer, 2 blocks of 128": (Transformer, (16, 64, 32)),
}


def make_steps(make_network, shape):
    """Train steps `(params, feedback, batch) -> (params, feedback)`, and their arguments."""
    by_hand, plain = make_network(True), make_network(False)
    rng = np.random.default_rng(0)
    batch = rng.standard_normal(shape, np.float32), rng.integers(0, 10, shape[0], np.int32)
    variables = by_hand.init(jax.random.key(0), batch[0])

    def cross_entropy(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def loss(params, batch):
        return cross_entropy(plain.apply({"params": params}, batch[0]), batch[1])

    def loss_by_hand(params, feedback, batch):
        variables = {"params": params, "feedback": feedback}
        return cross_entropy(by_hand.apply(variables, batch[0]), batch[1])

    def step(loss_fa, params, feedback, batch):
        grads = jax.grad(loss_fa)(params, feedback, batch)
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), feedback

    losses = {
        "bp": lambda params, feedback, batch: loss(params, batch),
        "by hand": loss_by_hand,
        "with_feedback": soap_jax.with_feedback(loss),
    }
    steps = {name: functools.partial(step, loss_fa) for name, loss_fa in losses.items()}
    return steps, (variables["params"], variables["feedback"], batch)


def measure_steps(steps, args, rounds, seconds_per_block):
    """Times blocks of steps; returns `{name: seconds per step, by round}`."""

    def make_runner(step):
        step = jax.jit(step, donate_argnums=(0, 1))
        params, feedback, batch = jax.tree.map(jax.numpy.array, args)  # of its own: donated

        def run(n):
            nonlocal params, feedback
            for _ in range(n):
                params, feedback = step(params, feedback, batch)
            jax.block_until_ready(params)

        run(5)  # compile and warm up
        return run

    runners = {name: make_runner(step) for name, step in steps.items()}
    return common.interleave_blocks(runners, rounds, seconds_per_block, "bp")


def measure_traces(steps, args, rounds):
    """Times only tracing, from the start each time; returns `{name: seconds, by round}`."""

    def make_runner(step):  # a function that JAX has not seen has no trace in its cache
        return lambda: jax.jit(lambda *args: step(*args)).trace(*args)

    runners = {name: make_runner(step) for name, step in steps.items()}
    common.interleave(runners, 2)  # warm up
    return common.interleave(runners, rounds)


def main():
    """Runs the benchmark, prints the table, writes JSON, table and figure."""
    args = common.arguments(__doc__, rounds=30).parse_args()
    rounds, seconds = (3, 0.02) if args.quick else (args.rounds, 0.25)

    rows = []
    networks = list(NETWORKS.items())
    for network, (make_network, shape) in networks[:: len(networks) - 1 if args.quick else 1]:
        steps, step_args = make_steps(make_network, shape)
        by_hand = common.summary(measure_steps(steps, step_args, rounds, seconds), "by hand")
        traces = common.summary(measure_traces(steps, step_args, rounds), "bp")
        rows.append({"network": network, "step": by_hand, "trace": traces})
        print(f"{network}: done", flush=True)

    def cell(what, method, show):
        return lambda row: show(row[what][method])

    columns = {
        "network": "network",
        "step by hand, ms": cell("step", "by hand", common.show_ms),
        "with_feedback": cell("step", "with_feedback", common.show_ms),
        "of by hand": cell("step", "with_feedback", common.show_ratio),
        "trace bp, ms": cell("trace", "bp", common.show_ms),
        "with_feedback, ms": cell("trace", "with_feedback", common.show_ms),
        "of bp": cell("trace", "with_feedback", common.show_ratio),
    }
    titles = {"step": "step, of layers by hand", "trace": "trace, of backprop"}
    dots = [
        row[what]["with_feedback"] | {"panel": title, "network": row["network"]}
        for what, title in titles.items()
        for row in rows
    ]
    figure = common.dot_plot(dots, panel="panel", label="network", xlabel="time of with_feedback")
    common.publish("transform", args.out, rows, columns, figure=figure, rounds=rounds)


if __name__ == "__main__":
    main()
