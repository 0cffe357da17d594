"""Is soap_jax as fast as other implementations of feedback alignment, and as plain PyTorch?

    python -m benchmarks.peers [--rounds 10] [--quick] [--python .venv-peers/bin/python]
                               [--out benchmarks/results]

The peers have their own environment; `benchmarks/peers.txt` says how to make it. Missing peers are
skipped, with the reason below the table.

Each time is of a training step: it picks the rows of a batch in a new random order from data in
memory, runs the network forward and backward in float32 with cross-entropy, and does an update by
SGD. The loss is not read. All networks have tanh and train on the same random data. Methods are BP;
FA; uSF, the signs of W (BioTorch scales them, which is the only difference); frSF, signs with the
magnitudes of the first draw; brSF, signs with magnitudes drawn at every step; and DFA. Systems:

    PyTorch           modules and `torch.optim.SGD`; FA and uSF by an `autograd.Function` with the
                      formula, as one would write it without a library.
    BioTorch          its layers after a plain first one, in PyTorch's loop
    soap_jax, step    a jitted, donated step, called from Python
    soap_jax, scan    `soap_jax.training.train_epoch`: data on the device, the epoch one program

Columns: median milliseconds per step for each system; the fastest peer of the row; the ratios of
our two loops to this peer; and the ratio of our FA methods to our backprop, both by scan. Ratios
are medians of ratios within a round, with quartiles.

Each system has a process with one thread per core, which waits at a pipe while others run. Each
round times every system and method once, in a new random order. A block has the same number of
steps for all. Before it, there are three steps to warm up, and a pause in which the OpenMP threads
of the last process stop spinning (this took 6 ms with libgomp). Before timing, the update of every
network is compared with the method's formula in NumPy, and its loss must go down.

OpenMP's threads wait for one another, so other work on the machine slows PyTorch most: keep it
idle.
"""

from __future__ import annotations

import os
import pathlib
import random
import statistics
import sys
import time
from typing import Any, NamedTuple

from benchmarks import common
from benchmarks._peers import chart, link

NETWORKS = {"784-256-10": [784, 256, 10], "784-1024-1024-1024-10": [784, 1024, 1024, 1024, 10]}
BATCH_SIZES = (64, 512)
METHODS: tuple[str, ...] = ("bp", "FA", "uSF", "frSF", "brSF", "DFA")
OURS = STEP, SCAN = "soap_jax, step", "soap_jax, scan"
PEERS = {"PyTorch": "plain_torch.py", "BioTorch": "bio_torch.py"}
CANNOT_RUN = {
    "bioflax": "not on PyPI, and its repository is no package (no setup.py or pyproject.toml)"
}
OWN_BP = {"PyTorch": "PyTorch", "BioTorch": "PyTorch", STEP: STEP, SCAN: SCAN}
PAUSE = 0.1  # seconds
MOST_EXAMPLES = 60_000  # of a data set, as in MNIST
COLOURS = {"PyTorch": "#d1642d", "BioTorch": "#8a5a9e", STEP: "#7fb0de", SCAN: "#1f5a99"}


def start_workers(python):
    """Starts a worker per system; returns them, and the reasons for missing ones."""
    workers = {"soap_jax": link.Worker(sys.executable, "ours.py")}
    skipped = dict(CANNOT_RUN)
    for system, file in PEERS.items():
        if not python.exists():
            skipped[system] = (
                "no environment of the peers (benchmarks/peers.txt says how to make it)"
            )
            continue
        try:
            platform = workers["soap_jax"].facts["platform"]
            workers[system] = link.Worker(str(python), file, platform)
        except link.Failed as reason:
            skipped[system] = str(reason)
    return workers, skipped


def block_size(worker, widths, batch_size, seconds):
    """The steps of an epoch and the epochs of a block, so that our BP takes a given time."""
    worker.ask(do="load", widths=widths, batch=batch_size, steps=1)
    worker.ask(do="make", system=STEP, method="bp")
    trials = 20
    step = worker.ask(do="run", system=STEP, method="bp", epochs=trials)["seconds"] / trials
    steps = min(max(8, round(seconds / step)), MOST_EXAMPLES // batch_size)
    return steps, max(1, round(seconds / (step * steps)))


class Measured(NamedTuple):
    """The results of `measure` for one network and batch size, by `name(system, method)`.

    Attributes:
        times: seconds per step, one a round.
        errors: how far an update was from the formula, of the largest entry.
        failed: what could not be timed, and why.
        steps: in a block.
    """

    times: dict[str, list[float]]
    errors: dict[str, float]
    failed: dict[str, str]
    steps: int


def name(system, method):
    """The key for the timings of a method of a system."""
    return f"{system}, {method}"


def measure(workers, widths, batch_size, methods, rounds, seconds):
    """Times all systems and methods."""
    steps, epochs = block_size(workers["soap_jax"], widths, batch_size, seconds)
    measured = Measured({}, {}, {}, steps * epochs)
    runners = []
    for worker in workers.values():
        worker.ask(do="load", widths=widths, batch=batch_size, steps=steps)
        for system, method in worker.facts["offers"]:
            if method in methods:
                key, what = name(system, method), {"system": system, "method": method}
                try:
                    measured.errors[key] = worker.ask(do="make", **what)["error"]
                except link.Failed as reason:
                    measured.failed[key] = str(reason)
                    continue
                measured.times[key] = []
                runners.append((key, what, worker))

    last = None
    for _ in range(rounds):
        for key, what, worker in random.sample(runners, len(runners)):
            if worker is not last:
                time.sleep(PAUSE)
            spent = worker.ask(do="run", epochs=epochs, **what)["seconds"]
            measured.times[key].append(spent / measured.steps)
            last = worker
    return measured


def compare(measured, method):
    """One method's row: each system's milliseconds, and ratios to the fastest peer and its BP."""
    times = measured.times
    systems = [system for system in COLOURS if name(system, method) in times]
    peers = [system for system in systems if system in PEERS]
    fastest = min(peers, key=lambda p: statistics.median(times[name(p, method)]), default=None)
    cells = {}
    for system in systems:
        key = name(system, method)
        low, middle, high = (1e3 * t for t in statistics.quantiles(times[key], n=4))
        cell = {"ms": middle, "ms_quartiles": [low, high], "update_error": measured.errors[key]}
        references = {"fastest_peer": name(fastest, method), "own_bp": name(OWN_BP[system], "bp")}
        for what, reference in references.items():
            if reference in times:
                ratio, quartiles = common.ratio(times, key, reference)
                cell[f"to_{what}"] = {"ratio": ratio, "quartiles": quartiles}
        cells[system] = cell
    return {"method": method, "fastest_peer": fastest, "systems": cells}


def show(system, what):
    """A column: one system's milliseconds, or its ratio."""

    def cell(row):
        values = row["systems"].get(system, {})
        if what not in values:
            return "-"
        return common.show_ms(values) if what == "ms" else common.show_ratio(values[what])

    return cell


def main():
    """Runs the benchmark."""
    parser = common.arguments(__doc__, rounds=10)
    default = pathlib.Path(".venv-peers/bin/python")
    parser.add_argument("--python", type=pathlib.Path, default=default, help="of the peers")
    args = parser.parse_args()
    cases = [(network, batch) for network in NETWORKS for batch in BATCH_SIZES]
    methods, rounds, seconds = METHODS, args.rounds, 0.2
    if args.quick:
        cases, methods, rounds, seconds = cases[:1], METHODS[:3], 3, 0.02

    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"The machine is busy (load {load:.1f}), which slows the peers down most.")
    workers, skipped = start_workers(args.python)
    rows = []
    for network, batch in cases:
        widths = NETWORKS[network]
        measured = measure(workers, widths, batch, methods, rounds, seconds)
        print(f"{network}, batch {batch}: {rounds} rounds of {measured.steps} steps", flush=True)
        case = {"network": network, "batch": batch, "steps_in_block": measured.steps}
        rows += [case | compare(measured, method) for method in methods]
        for key, reason in measured.failed.items():
            skipped[f"{key}, {network}, batch {batch}"] = reason
    for worker in workers.values():
        worker.close()

    columns: dict[str, Any] = {key: key for key in ("network", "batch", "method")}
    columns |= {f"{system}, ms": show(system, "ms") for system in COLOURS}
    columns["fastest peer"] = lambda row: row["fastest_peer"] or "-"
    columns |= {f"{system[10:]} / fastest peer": show(system, "to_fastest_peer") for system in OURS}
    columns["scan / its bp"] = show(SCAN, "to_own_bp")
    common.publish(
        "peers",
        args.out,
        rows,
        columns,
        figure=chart.plot(rows, COLOURS),
        rounds=rounds,
        dtype="float32",
        threads={system: worker.facts["threads"] for system, worker in workers.items()},
        peer_versions={
            k: v for w in workers.values() for k, v in w.facts.get("versions", {}).items()
        },
        load_before=load,
        skipped=skipped,
    )
    with (args.out / "peers.md").open("a") as table:
        for line in (f"Skipped: {what}: {reason}." for what, reason in skipped.items()):
            print(line)
            table.write(f"\n{line}\n")


if __name__ == "__main__":
    main()
