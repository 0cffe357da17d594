"""What does a step of each method cost, relative to a backprop step of the same Flax model?

    python -m benchmarks.step_time [--rounds 15] [--quick] [--out benchmarks/results]

Each method trains by SGD in two ways: a jitted, donated step called from Python (`call`), and
epochs as one scan over data on the device, shuffled inside (`epoch`, `training.train_epoch`).
Within one process, each round times every method once, in a new random order, so that other work on
the machine affects all methods equally. Shown are medians over rounds, and medians of ratios to
backprop within a round, with quartiles. "bp, again" is backprop compiled and allocated a second
time: the difference between its ratio and 1 is the limit of the benchmark's resolution. For short
steps, the main cause is the place of the buffers in memory, so there every method runs in two
instances, timed together. Methods "per example" are written for one example and batched by `vmap`;
their ratios are to backprop written in the same way.
"""

from __future__ import annotations

import dataclasses
import functools

import jax

from benchmarks import common, methods
from soap_jax import training

MLP = ("bp", "bp, again", "fa", "fa, with_feedback", "sign, T=1", "sign, T=10", "sign, T=100",
       "sign_preserve, T=1", "sign_norm, T=1", "sign_redraw, T=1", "weight_mirror, T=1",
       "kp", "dfa", "bp, per example", "fa, per example")  # fmt: skip
OTHER = ("bp", "bp, again", "fa", "fa, with_feedback", "sign, T=1", "sign, T=10",
         "sign_preserve, T=1", "sign_redraw, T=1", "dfa")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A network at a batch size.

    Attributes:
        network: of `methods.NETWORKS`.
        batch: examples per step.
        names: of methods.
        steps: of an epoch, and of a block of calls.
        instances: of each method.
    """

    network: str
    batch: int
    names: tuple[str, ...]
    steps: int
    instances: int = 1


CASES = (
    Case("784-256-10", 64, MLP, 50, 2),
    Case("784-256-10", 512, MLP, 20),
    Case("784-1024-1024-1024-10", 64, MLP, 20),
    Case("784-1024-1024-1024-10", 512, MLP, 6),
    Case("conv 32-64", 64, OTHER, 20),
    Case("transformer, 2 blocks of 128", 16, OTHER, 6),
)
QUICK = (
    Case("784-256-10", 64, ("bp", "fa", "sign, T=1", "dfa"), 10),
    Case("conv 32-64", 2, ("bp", "fa, with_feedback"), 2),
)


def reference(name: str) -> str:
    """The reference of a method."""
    return "bp, per example" if name.endswith("per example") else "bp"


def make_call(case: Case, name: str):
    """A function that calls the jitted step from Python for an epoch, and waits."""
    step, state, batch = methods.make(name.removesuffix(", again"), case.network, case.batch)
    step = jax.jit(step, donate_argnums=0)

    def run():
        nonlocal state
        for _ in range(case.steps):
            state, loss = step(state, batch)
        jax.block_until_ready((state, loss))

    return run


def make_epoch(case: Case, name: str):
    """A function that trains an epoch as one scan, and waits."""
    step, state, _ = methods.make(name.removesuffix(", again"), case.network, case.batch)
    data = methods.random_batch(methods.NETWORKS[case.network].shape, case.steps * case.batch)
    epoch = functools.partial(training.train_epoch, step, batch_size=case.batch)

    def run():
        nonlocal state
        state, losses = epoch(state, data, jax.random.key(0))
        jax.block_until_ready((state, losses))

    return run


def measure(case: Case, make, rounds: int):
    """Times all methods: `{method: seconds per step, by round}`."""

    def make_runner(name):
        instances = [make(case, name) for _ in range(case.instances)]

        def run():
            for instance in instances:
                instance()

        run()  # compile
        run()  # warm up
        return run

    times = common.interleave({name: make_runner(name) for name in case.names}, rounds)
    steps = case.steps * case.instances
    return {name: [spent / steps for spent in values] for name, values in times.items()}


def main():
    """Runs the benchmark, prints the table, writes JSON, table and figure."""
    args = common.arguments(__doc__, rounds=15).parse_args()
    cases, rounds = (QUICK, 3) if args.quick else (CASES, args.rounds)
    rows = []
    for case in cases:
        loops = {}
        for loop, make in {"call": make_call, "epoch": make_epoch}.items():
            times = measure(case, make, rounds)
            loops[loop] = {to: common.summary(times, to) for to in map(reference, case.names)}
        for name in case.names:
            row = {"network": case.network, "batch": case.batch, "method": name}
            rows.append(row | {loop: by[reference(name)][name] for loop, by in loops.items()})
        print(f"{case.network}, batch {case.batch}: done", flush=True)

    columns = {"network": "network", "batch": "batch", "method": "method"}
    for loop in ("call", "epoch"):
        columns[f"{loop}, ms"] = lambda row, loop=loop: common.show_ms(row[loop])
        columns[f"{loop}, of backprop's"] = lambda row, loop=loop: common.show_ratio(row[loop])
    dots = [
        row[loop] | {"panel": f"{row['network']}, batch {row['batch']}, {loop}"} | row
        for row in rows
        for loop in ("call", "epoch")
    ]
    figure = common.dot_plot(
        dots, panel="panel", label="method", xlabel="time of a step, of backprop's"
    )
    common.publish("step_time", args.out, rows, columns, figure=figure, rounds=rounds)


if __name__ == "__main__":
    main()
