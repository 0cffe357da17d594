"""How close is a step of feedback alignment to what the device can do?

    python -m benchmarks.limits [--rounds 20] [--quick] [--out benchmarks/results]

Two limits, both measured here: the operations per second of the fastest square matrix product, and
the bytes per second of a pass `x + 1` in place. The first table has FA train steps of MLPs:

    GFLOP       2 per multiplication, of the step's matrix products alone
    ceiling     the best square product's operations per second, in the same rounds
    products    these products by themselves, one after the other, in one program
    step        the jitted, donated train step, called from Python
    of ceiling  the step's operations per second, of the best product's: model FLOP utilisation

The second table has the cost of a sync alone, for the feedback of the large network: the bytes that
it must read and write, the time for them by the bandwidth, and the measured time. On GPU, there is
also a deep network of 8 layers of 8192 units in bfloat16, at batch 4096.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import soap_jax
from benchmarks import common
from soap_jax import models, training


class Case(NamedTuple):
    """An MLP's widths, inputs and outputs included, its batch, and the dtype of its products."""

    widths: tuple[int, ...]
    batch: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """The widths as text."""
        hidden = self.widths[1:-1]
        middle = f"{len(hidden)}x{hidden[0]}" if len(hidden) > 3 else "-".join(map(str, hidden))
        return f"{self.widths[0]}-{middle}-{self.widths[-1]}"


SMALL, LARGE = (784, 256, 10), (784, 1024, 1024, 1024, 10)
CASES = [Case(SMALL, 64), Case(SMALL, 512), Case(LARGE, 64), Case(LARGE, 512)]
ON_GPU = [Case((8192,) * 9, 4096, "bfloat16")]
QUICK = [Case((32, 16, 10), 8)]
SYNCS = {  # arrays of the kernels' size that a sync reads and writes
    "unit": 2,  # reads W, writes B
    "preserve": 3,  # reads W and B, writes B
    "norm": 3,
    "redraw": 2,
}


def shapes(case: Case) -> list[tuple[int, int, int]]:
    """The products of a step as (rows, inner, columns): forward, and two of the three backward."""
    b, layers = case.batch, list(itertools.pairwise(case.widths))
    forward = [(b, i, o) for i, o in layers]
    kernel_bars = [(i, b, o) for i, o in layers]
    x_bars = [(b, o, i) for i, o in layers[1:]]  # not the inputs'
    return forward + kernel_bars + x_bars


def flops(case: Case) -> float:
    """Operations of a step's matrix products."""
    return float(sum(2 * m * k * n for m, k, n in shapes(case)))


def normal(shape, dtype="float32"):
    """Standard normal numbers on the device."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32), dtype)


def repeat(program, *args, number: int = 1):
    """A function that runs a compiled program several times, and waits."""

    def run():
        for _ in range(number):
            out = program(*args)
        jax.block_until_ready(out)

    run()
    run()
    return run


def make_products(case: Case):
    """Only the matrix products of the step."""
    pairs = [(normal((m, k), case.dtype), normal((k, n), case.dtype)) for m, k, n in shapes(case)]
    return repeat(jax.jit(lambda pairs: [a @ b for a, b in pairs]), pairs, number=10)


def make_step(case: Case):
    """The train step of feedback alignment."""
    model = models.MLP(case.widths[1:])
    x, labels = normal((case.batch, case.widths[0])), jnp.zeros(case.batch, jnp.int32)
    variables = model.init(jax.random.key(0), x[:1])
    params, feedback = jax.tree.map(
        lambda leaf: leaf.astype(case.dtype), (variables["params"], variables["feedback"])
    )
    x = x.astype(case.dtype)

    def apply_fn(params, feedback, x):
        return model.apply({"params": params, "feedback": feedback}, x).astype(jnp.float32)

    optimizer = optax.sgd(0.01)
    feedback = soap_jax.init_feedback(jax.random.key(1), params, feedback=feedback)
    state = training.init_train_state(params, optimizer, feedback=feedback)
    step = jax.jit(training.make_train_step(apply_fn, optimizer), donate_argnums=0)

    def run():
        nonlocal state
        for _ in range(10):
            state, loss = step(state, (x, labels))
        jax.block_until_ready((state, loss))

    run()
    run()
    return run


def make_sync(magnitude: str, widths: tuple[int, ...]):
    """A donated sync of a network's feedback, and the bytes of that feedback."""
    layers = itertools.pairwise(widths[1:])
    params = {f"layer_{i}": {"kernel": normal(shape)} for i, shape in enumerate(layers)}
    rule = soap_jax.SignSync(magnitude=magnitude)
    state = soap_jax.init_feedback(
        jax.random.key(0), params, rule, initializer=jax.nn.initializers.glorot_normal()
    )
    sync = jax.jit(soap_jax.sync_feedback, donate_argnums=1)

    def run():
        nonlocal state
        for _ in range(10):
            state = sync(params, state, 0)
        jax.block_until_ready(state)

    run()
    run()
    return run, sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def make_square(size: int, dtype: str):
    """A square matrix product."""
    return repeat(jax.jit(jnp.matmul), normal((size, size), dtype), normal((size, size), dtype))


def make_pass(num_bytes: int):
    """`x + 1` over an array of the given number of bytes, in place."""
    x = jnp.zeros(num_bytes // 4)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run():
        nonlocal x
        for _ in range(10):
            x = add(x)
        x.block_until_ready()

    run()
    run()
    return run


def draw(rows) -> Figure:
    """Bars of the share of the ceiling: the products by themselves, and the step."""
    figure = Figure(figsize=(7, 0.8 + 0.6 * len(rows)), layout="constrained")
    ax = figure.subplots()
    for i, row in enumerate(rows):
        ax.barh(i - 0.18, row["products_of_ceiling"], 0.34, color="#b9c6d6", zorder=2)
        ax.barh(i + 0.18, row["of_ceiling"], 0.34, color="#1f5a99", zorder=2)
    ax.set_yticks(range(len(rows)), [f"{row['network']}, batch {row['batch']}" for row in rows])
    ax.invert_yaxis()
    ax.axvline(1, color="0.8")
    ax.set_xlabel("operations per second, of the best matrix product's")
    ax.legend(["ceiling", "its products alone", "FA step"], frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def main():
    """Runs the benchmark, prints the tables, writes JSON, tables and figure."""
    args = common.arguments(__doc__, rounds=20).parse_args()
    cases, sizes, rounds = CASES, (1024, 2048), args.rounds
    if jax.default_backend() == "gpu":
        cases, sizes = CASES + ON_GPU, (4096, 8192, 16384)
    if args.quick:
        cases, sizes, rounds = QUICK, (256,), 3

    rows = []
    for case in cases:
        squares = {size: make_square(size, case.dtype) for size in sizes}
        runners = {"products": make_products(case), "step": make_step(case)} | squares
        seconds = {
            name: statistics.median(times)
            for name, times in common.interleave(runners, rounds).items()
        }
        best = max(2 * size**3 / seconds[size] for size in sizes)
        products, step = seconds["products"] / 10, seconds["step"] / 10
        row = {"network": case.name, "batch": case.batch, "dtype": case.dtype}
        row |= {"gflop": flops(case) / 1e9, "ceiling_gflops": best / 1e9}
        row |= {"products_ms": 1e3 * products, "ms": 1e3 * step}
        row["products_of_ceiling"] = flops(case) / products / best
        rows.append(row | {"of_ceiling": flops(case) / step / best})

    widths = (QUICK if args.quick else CASES)[-1].widths
    runners = {magnitude: make_sync(magnitude, widths) for magnitude in SYNCS}
    sizes_of = {name: size for name, (_, size) in runners.items()}
    passes = {"pass": make_pass(sizes_of["unit"])}
    times = common.interleave(passes | {name: run for name, (run, _) in runners.items()}, rounds)
    speed = 2 * sizes_of["unit"] / (statistics.median(times["pass"]) / 10)
    sync_rows = []
    for name, size in sizes_of.items():
        moved = SYNCS[name] * size
        row = {"magnitude": name, "ms": 1e3 * statistics.median(times[name]) / 10}
        sync_rows.append(row | {"megabytes": moved / 1e6, "floor_ms": 1e3 * moved / speed})

    print(f"A pass over {sizes_of['unit'] / 1e6:.1f} MB moves {speed / 1e9:.1f} GB/s.")
    publish = functools.partial(common.publish, out=args.out, rounds=rounds)
    publish(
        "limits",
        rows=rows,
        columns={
            "network": "network",
            "batch": "batch",
            "dtype": "dtype",
            "GFLOP": lambda row: f"{row['gflop']:.3g}",
            "ceiling, GFLOP/s": lambda row: f"{row['ceiling_gflops']:.0f}",
            "products, ms": lambda row: f"{row['products_ms']:#.3g}",
            "step, ms": common.show_ms,
            "products, of ceiling": lambda row: f"{row['products_of_ceiling']:.2f}",
            "step, of ceiling": lambda row: f"{row['of_ceiling']:.2f}",
        },
        figure=draw(rows),
    )
    publish(
        "limits_sync",
        rows=sync_rows,
        columns={
            "SignSync(magnitude=...)": "magnitude",
            "MB read and written": lambda row: f"{row['megabytes']:.1f}",
            "floor, ms": lambda row: f"{row['floor_ms']:.3f}",
            "sync, ms": lambda row: f"{row['ms']:.3f}",
        },
        gigabytes_per_second=speed / 1e9,
    )


if __name__ == "__main__":
    main()
