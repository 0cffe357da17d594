"""What does feedback in fewer bits save, and what does it cost?

    python -m benchmarks.precision [--rounds 12] [--quick] [--out benchmarks/results]

This times a jitted, donated SGD step of a tanh MLP with float32 params, by backprop and with signs
as feedback. Feedback is synced at every update (T=1), at every tenth update (T=10), or never
(fixed). It is stored as

    float32, bfloat16, int8, int2    by `init_feedback(dtype=...)`

or, in prototypes of a dense layer,

    bits                      as words of 32 signs, which the sync packs
    int8 and bits, blocks     the product takes an eighth of the rows at a time, so there is no
                              float32 matrix of all rows
    bfloat16, error too       the product also rounds the error; it sums in float32
    bfloat16, error in three  the error as a sum of three numbers, as exact as in float32

Products are in float32, or all operands are cast to bfloat16 and summed in float32.

`ms` is per step. Ratios are within a round, to backprop and to float32 feedback under the same rule
and products; medians over rounds, with quartiles. `feedback` is the bytes that are stored between
steps. `peak` is of the compiled step: arguments, temporaries, and results that replace no argument.
`off` is the largest difference of any param from training with float32 feedback, after ten steps,
as a share of the largest change in these steps.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import soap_jax
from benchmarks import common, packed
from soap_jax import ops, training

DEEP, SMALL = (784, 1024, 1024, 1024, 10), (784, 256, 10)
CASES = [(DEEP, 64), (DEEP, 512), (SMALL, 64), (SMALL, 512)]
QUICK = [((16, 64, 10), 8)]
GLOROT = jax.nn.initializers.glorot_normal()
RULES = {
    "T=1": soap_jax.SignSync(magnitude="unit"),
    "T=10": soap_jax.SignSync(period=10, magnitude="unit"),
    "fixed": soap_jax.Fixed(),
}
DTYPES = ("float32", "bfloat16", "int8")
STEPS, LEARNING_RATE = 10, 1e-4  # signs multiply the rate of hidden layers by hundreds


class Method(NamedTuple):
    """A rule, the storage of feedback, and the dtype of products."""

    rule: str
    stored: str = "-"
    products: str = "float32"


METHODS = [Method("bp")]
METHODS += [Method("T=1", stored) for stored in (*DTYPES, "bits")]
METHODS += [Method("T=10", stored) for stored in (*DTYPES, "int2", *packed.PROTOTYPES)]
METHODS += [Method("fixed", stored) for stored in (*DTYPES, "int2", "bits")]
METHODS += [Method("bp", products="bfloat16")]
METHODS += [Method("T=10", stored, "bfloat16") for stored in DTYPES]


def make_step(method, widths):
    """One method's step, and its state before the first update."""
    dense = functools.partial(ops.feedback_dense, preferred_element_type=jnp.float32)
    dtype, x_bar = packed.PROTOTYPES.get(method.stored, (method.stored, None))
    with_feedback = dense if x_bar is None else functools.partial(packed.dense, x_bar)

    def apply_fn(params, feedback, x):
        for i, layer in enumerate(params):
            stored = feedback[i]["kernel"] if feedback else None
            product = dense if stored is None else with_feedback
            y = product(x.astype(method.products), layer["kernel"].astype(method.products), stored)
            x = jnp.tanh(y + layer["bias"]) if i < len(params) - 1 else y + layer["bias"]
        return x

    params, feedback = make_params(widths), None
    step = training.make_train_step(apply_fn, optax.sgd(LEARNING_RATE))
    if method.rule != "bp":
        key, rule = jax.random.key(0), RULES[method.rule]
        signs = soap_jax.init_feedback(
            key, params, where="[1-9]/kernel", initializer=GLOROT, dtype="int8"
        ).feedback
        feedback = soap_jax.init_feedback(
            key, params, rule, feedback=signs, dtype="int8" if dtype == "bits" else dtype
        )
        if dtype == "bits":
            weights = training.feedback_weights(feedback)
            feedback, step = jax.tree.map(packed.pack, weights), packing(step, rule)
    return step, training.init_train_state(params, optax.sgd(LEARNING_RATE), feedback=feedback)


def packing(step, rule):
    """A step that first packs the kernels' signs, if the rule says so."""

    def sync(state):
        words = [packed.pack(layer["kernel"]) for layer in state.params[1:]]
        return [state.feedback[0], *({"bias": None, "kernel": each} for each in words)]

    def packed_step(state, batch):
        due = state.step % rule.period == 0
        feedback = lax.cond(due, sync, lambda state: state.feedback, state)
        return step(state._replace(feedback=feedback), batch)

    return step if rule == soap_jax.Fixed() else packed_step


def make_params(widths):
    """Kernels and biases, in a list."""
    rng = np.random.default_rng(0)

    def layer(a, b):
        kernel = (2 / (a + b)) ** 0.5 * rng.standard_normal((a, b), np.float32)
        return {"bias": jnp.zeros(b), "kernel": jnp.asarray(kernel)}

    return list(itertools.starmap(layer, itertools.pairwise(widths)))


def make_runner(method, widths, batch):
    """A function that does `n` steps and waits; the step's bytes; params after ten steps."""
    step, state = make_step(method, widths)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    stats = compiled.memory_analysis()
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    kept = jax.jit(lambda b: b).lower(training.feedback_weights(state.feedback)).compile()
    row = {
        "feedback": kept.memory_analysis().argument_size_in_bytes,  # `nbytes` takes int2 for int8
        "peak": stats.argument_size_in_bytes + stats.temp_size_in_bytes + results,
    }

    def run(n):
        nonlocal state
        for _ in range(n):
            state, _ = compiled(state, batch)
        jax.block_until_ready(state)

    run(STEPS)
    return run, row, jax.device_get(state.params)


def measure(methods, widths, batch_size, rounds, seconds):
    """The rows of one network and batch size."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((batch_size, widths[0]), np.float32)
    batch = jax.device_put((x, rng.integers(0, widths[-1], batch_size, np.int32)))
    made = {method: make_runner(method, widths, batch) for method in methods}
    runners = {method: run for method, (run, _, _) in made.items()}
    times = common.interleave_blocks(runners, rounds, seconds, methods[0])
    network = f"{'-'.join(map(str, widths))}, batch {batch_size}"
    for method, (_, row, params) in made.items():
        bp, plain = Method("bp", "-", method.products), method._replace(stored="float32")
        plain = bp if method == bp else plain
        to_bp, to_float32 = (common.summary(times, other)[method] for other in (bp, plain))
        yield {
            "case": network,
            **method._asdict(),
            "label": ", ".join(
                [*method[:2], *["bfloat16 products"] * (method.products == "bfloat16")]
            ),
            **to_float32,
            "to_bp": to_bp,
            **row,
            "off": largest(params, made[plain][2]) / largest(make_params(widths), made[plain][2]),
        }


def largest(params, others):
    """The largest difference of two trees."""
    return max(
        jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, others))
    )


def megabytes(key):
    """A column of bytes."""
    return lambda row: f"{row[key] / 1e6:.3g}"


COLUMNS = {
    "network": "case",
    "products": "products",
    "rule": "rule",
    "stored": "stored",
    "ms": common.show_ms,
    "to bp": lambda row: common.show_ratio(row["to_bp"]),
    "to float32 feedback": common.show_ratio,
    "feedback, MB": megabytes("feedback"),
    "peak, MB": megabytes("peak"),
    "off": lambda row: f"{row['off']:.1g}",
}


def main():
    """Runs the benchmark, prints the table, writes JSON and the figure."""
    args = common.arguments(__doc__, rounds=12).parse_args()
    cases, rounds, seconds = (QUICK, 3, 0.01) if args.quick else (CASES, args.rounds, 0.1)
    methods = [m for m in METHODS if m.rule in ("bp", "T=10")] if args.quick else METHODS
    rows = [row for case in cases for row in measure(methods, *case, rounds, seconds)]
    drawn = [row for row in rows if row["stored"] not in ("-", "float32")]
    figure = common.dot_plot(
        drawn, panel="case", label="label", xlabel="step / step with float32 feedback"
    )
    common.publish("precision", args.out, rows, COLUMNS, figure=figure, rounds=rounds)


if __name__ == "__main__":
    main()
