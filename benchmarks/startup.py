"""What does it cost to import, to trace and to compile?

    python -m benchmarks.startup [--rounds 10] [--quick] [--out benchmarks/results]

Two tables. `startup` has the milliseconds of a fresh Python process, from its start to its end, and
their ratio to a process that imports JAX. `import soap_jax` loads nothing until a name is used. A
first round does not count: after it, files are in the machine's memory, and Python's bytecode is
compiled.

`compile` has the milliseconds to trace, to lower (to StableHLO) and to compile one donated train
step at batch 64 with empty caches of JAX, as in a fresh process, and ratios to backprop. Shown are
medians over rounds with a new random order in each, and of ratios within a round, with quartiles.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
from matplotlib.figure import Figure

from benchmarks import common, methods

IMPORTS = {  # the others are compared with the first
    "import jax": "import jax",
    "python -c pass": "pass",
    "import jax, flax, optax": "import jax, flax, optax",
    "import soap_jax": "import soap_jax",
    "soap_jax.init_feedback, with_feedback": (
        "import soap_jax; soap_jax.init_feedback, soap_jax.with_feedback"
    ),
    "soap_jax.linen, training": "import soap_jax; soap_jax.linen, soap_jax.training",
    "soap_jax.nnx, training": "import soap_jax; soap_jax.nnx, soap_jax.training",
}
COMMANDS = (("--version",), ("--help",), ("study", "--help"))
NETWORKS = ("784-256-10", "784-1024-1024-1024-10")
METHODS = ("bp", "fa", "fa, with_feedback", "sign, T=1", "sign_redraw, T=1", "dfa", "dfa, by names")
BATCH_SIZE = 64
STAGES = ("trace", "lower", "compile")


def processes(*, quick: bool) -> dict[str, list[str]]:
    """Command lines by name; those of `soap-jax` only if it is installed."""
    chosen = list(IMPORTS.items())[: 4 if quick else None]
    commands = {name: [sys.executable, "-c", code] for name, code in chosen}
    soap = shutil.which("soap-jax", path=pathlib.Path(sys.executable).parent)
    for words in COMMANDS if soap else ():
        commands[" ".join(("soap-jax", *words))] = [soap, *words]
    return commands


def measure_processes(commands: dict[str, list[str]], rounds: int) -> list[dict]:
    """Times whole processes."""
    runners = {
        name: functools.partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
        for name, command in commands.items()
    }
    common.interleave(runners, 1)  # warms up
    rows = common.summary(common.interleave(runners, rounds), next(iter(IMPORTS)))
    return [{"process": name, **row} for name, row in rows.items()]


def stages(step, *args) -> dict[str, float]:
    """Seconds to trace, to lower and to compile a step from nothing."""
    jax.clear_caches()
    stamps = [time.perf_counter()]
    traced = jax.jit(step, donate_argnums=0).trace(*args)
    stamps.append(time.perf_counter())
    lowered = traced.lower()
    stamps.append(time.perf_counter())
    lowered.compile()
    stamps.append(time.perf_counter())
    spent = (then - now for now, then in itertools.pairwise(stamps))
    return dict(zip(STAGES, spent, strict=True))


def measure_stages(network: str, names: Sequence[str], rounds: int) -> list[dict]:
    """Times the stages of methods, including backprop."""
    made = {name: methods.make(name, network, BATCH_SIZE) for name in names}
    stages(*made["bp"])  # warms up
    times: dict[str, dict[str, list[float]]] = {stage: {m: [] for m in names} for stage in STAGES}
    for _ in range(rounds):
        for name in random.sample(names, len(names)):
            for stage, seconds in stages(*made[name]).items():
                times[stage][name].append(seconds)
    by_stage = {stage: common.summary(of, "bp") for stage, of in times.items()}
    return [
        {"network": network, "method": name, **{stage: by_stage[stage][name] for stage in STAGES}}
        for name in names
    ]


def plot(rows) -> Figure:
    """Milliseconds by stage: a panel per network, a bar per method."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    size = (2 + 3.4 * len(networks), 1.3 + 0.3 * len(rows) / len(networks))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(networks), sharey=True, sharex=True, squeeze=False)[0]
    for ax, network in zip(axes, networks, strict=True):
        mine = [row for row in rows if row["network"] == network]
        left = [0.0] * len(mine)
        for stage, color in zip(STAGES, ("C0", "C1", "0.75"), strict=True):
            widths = [row[stage]["ms"] for row in mine]
            ax.barh(range(len(mine)), widths, left=left, color=color, label=stage)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        ax.set_title(network, fontsize=10)
        ax.set_yticks(range(len(mine)), [row["method"] for row in mine])
        ax.set_ylim(len(mine) - 0.5, -0.5)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("milliseconds", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(STAGES), frameon=False)
    return figure


def main():
    """Runs both benchmarks, prints their tables, writes them, their rows and a figure."""
    args = common.arguments(__doc__, rounds=10).parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    rounds, networks, names = args.rounds, NETWORKS, METHODS
    if args.quick:
        rounds, networks, names = 2, NETWORKS[:1], METHODS[:3]

    rows = measure_processes(processes(quick=args.quick), rounds)
    columns = {"process": "process", "ms": common.show_ms}
    columns["ratio to import jax [quartiles]"] = common.show_ratio
    common.publish("startup", args.out, rows, columns, rounds=rounds)

    rows = [row for network in networks for row in measure_stages(network, names, rounds)]
    columns = {"network": "network", "method": "method"}
    for stage in STAGES:
        columns[f"{stage}, ms"] = lambda row, stage=stage: common.show_ms(row[stage])
        columns[f"{stage}, ratio"] = lambda row, stage=stage: common.show_ratio(row[stage])
    common.publish("compile", args.out, rows, columns, figure=plot(rows), rounds=rounds)


if __name__ == "__main__":
    main()
