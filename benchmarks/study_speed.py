"""How many trainings per second does the study do, method by method?

    python -m benchmarks.study_speed [--data-dir DIR] [--rounds 5] [--quick] [--out ...]

The data are digits, and also MNIST (2 epochs) if there is a directory with its files. Each round
compares all methods at 8 rates with 2 seeds, in a new random order, like the study: on all devices,
including evaluations and angles. The table gives medians over rounds. Methods with the same program
share its compilation, which is timed in the first round and does not count as training.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import random
import statistics
import time

import jax
from matplotlib.figure import Figure

from benchmarks import common
from soap_jax import data, study
from soap_jax.study import preset


def measure(config, dataset, rounds):
    """Times all methods; returns one row per method."""
    rows = {method: {"runs_per_s": []} for method in config.methods}
    for k in range(rounds):
        events = {method: [] for method in config.methods}

        def note(method, done, *_, events=events):
            events[method].append((time.perf_counter(), done))

        order = random.sample(config.methods, len(config.methods)) if k else config.methods
        made = preset.comparison_arguments(dataclasses.replace(config, methods=order), dataset)
        result = study.compare(**made, on_progress=note)
        for method, ((begin, _), (compiled, _), *_, (end, num)) in events.items():
            rows[method].setdefault("compile_s", compiled - begin)
            rows[method]["runs_per_s"].append(num / (end - compiled))
    steps = result.protocol["steps"]
    for row in rows.values():
        speeds = row["runs_per_s"]
        row["runs_per_s"] = statistics.median(speeds)
        row["runs_per_s_range"] = [min(speeds), max(speeds)]
        row["steps_per_run"] = steps
        row["ms_per_run_step"] = 1e3 / (row["runs_per_s"] * steps)
    return rows


def draw(rows) -> Figure:
    """Bars of trainings per second, a panel per data set, with the range over rounds."""
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    figure = Figure(figsize=(1.5 + 3.5 * len(datasets), 3.2), layout="constrained")
    axes = figure.subplots(1, len(datasets), sharey=True, squeeze=False)[0]
    for ax, dataset in zip(axes, datasets, strict=True):
        chosen = [row for row in rows if row["dataset"] == dataset]
        methods, speeds = zip(*((row["method"], row["runs_per_s"]) for row in chosen), strict=True)
        errors = [
            [abs(row["runs_per_s"] - row["runs_per_s_range"][end]) for row in chosen]
            for end in (0, 1)
        ]
        ax.barh(methods, speeds, xerr=errors, color="#b9c6d6", ecolor="#1f5a99")
        ax.set_title(dataset, fontsize=10)
        ax.set_xlabel("trainings per second")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    return figure


def main():
    """Runs the benchmark, prints the table, writes JSON, table and figure."""
    parser = common.arguments(__doc__, rounds=5)
    parser.add_argument("--data-dir", type=pathlib.Path, help="MNIST's published files")
    args = parser.parse_args()
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))

    whole = preset.StudyConfig(seeds=2, periods=(1,))
    quick = dataclasses.replace(whole, epochs=2, methods=("bp", "sign"))
    configs = [quick if args.quick else whole]
    if args.data_dir:
        configs.append(dataclasses.replace(whole, dataset="mnist", epochs=2))
    rounds = 1 if args.quick else args.rounds
    rows = []
    for config in configs:
        data_dir = args.data_dir if config.dataset == "mnist" else None
        dataset = data.load(config.dataset, data_dir=data_dir)
        for method, row in measure(config, dataset, rounds).items():
            rows.append({"dataset": config.dataset, "method": method, **row})
    columns = {
        "data": "dataset",
        "method": "method",
        "compile s": lambda row: f"{row['compile_s']:.1f}",
        "trainings/s": lambda row: f"{row['runs_per_s']:.2f}",
        "ms per run and step": lambda row: f"{row['ms_per_run_step']:.3f}",
    }
    common.publish("study_speed", args.out, rows, columns, figure=draw(rows), rounds=rounds)


if __name__ == "__main__":
    main()
