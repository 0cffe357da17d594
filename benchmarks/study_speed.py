"""How many trainings per second does the study do, method by method?

    python -m benchmarks.study_speed [--data-dir DIR] [--rounds 5] [--quick] [--out ...]

Digits, and with a directory of MNIST's files MNIST too (2 epochs). Every method is compiled first;
then each round takes one part of every method's runs, in an order drawn anew, as the study does
them: on all devices, evaluations and angles included. The table gives medians over rounds.
"""

from __future__ import annotations

import os
import pathlib
import random
import statistics
import time

import jax
from matplotlib.figure import Figure
from soap_jax.study.config import StudyConfig

from benchmarks import common
from soap_jax import data
from soap_jax.study import experiment


def measure(config, dataset, rounds):
    """Times parts of all methods; returns one row per method."""
    parts, rows = {}, {}
    for method in config.methods:
        begin = time.perf_counter()
        compiled = []

        def note(done, total, begin=begin, compiled=compiled):
            compiled.append(time.perf_counter() - begin)

        parts[method] = experiment.train_method(config, method, dataset, on_progress=note)
        next(parts[method])  # compiles, and warms up
        rows[method] = {"compile_s": compiled[0], "runs_per_s": []}
    for _ in range(rounds):
        for method in random.sample(config.methods, len(config.methods)):
            begin = time.perf_counter()
            points, _ = next(parts[method])
            rows[method]["runs_per_s"].append(len(points) / (time.perf_counter() - begin))
    num_train = len(experiment.split(dataset).train.labels)
    steps = int(experiment.evaluation_steps(config, num_train)[-1])
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

    quick = StudyConfig(epochs=2, methods=("bp", "sign"))
    configs = [quick if args.quick else StudyConfig()]
    if args.data_dir:
        configs.append(StudyConfig(dataset="mnist", epochs=2))
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
