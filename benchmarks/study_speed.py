"""How many trainings per second does the study do, method by method, and what does memory cost?

    python -m benchmarks.study_speed [--data-dir DIR] [--rounds 5] [--quick] [--out ...]

Digits, and with a directory of MNIST's files MNIST too (2 epochs). Every method is compiled first;
then each round takes one part of every method's runs, in an order drawn anew, as the study does
them: on all devices, evaluations and angles included. The table gives medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import statistics
import time

import jax

from benchmarks import common
from soap_jax import data
from soap_jax.study import experiment
from soap_jax.study.config import StudyConfig


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


def main():
    """Runs the benchmark, prints the table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=pathlib.Path, help="MNIST's published files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of two methods on digits")
    parser.add_argument("--out", type=pathlib.Path, default=common.OUT)
    args = parser.parse_args()
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))

    quick = StudyConfig(epochs=2, methods=("bp", "sign"))
    configs = [quick if args.quick else StudyConfig()]
    if args.data_dir:
        configs.append(StudyConfig(dataset="mnist", epochs=2))
    rounds = 1 if args.quick else args.rounds
    results = []
    print("| data   | method         | compile s | trainings/s | ms per run and step |")
    print("| ------ | -------------- | --------- | ----------- | ------------------- |")
    for config in configs:
        data_dir = args.data_dir if config.dataset == "mnist" else None
        dataset = data.load(config.dataset, data_dir=data_dir)
        for method, row in measure(config, dataset, rounds).items():
            print(
                f"| {config.dataset:<6} | {method:<14} | {row['compile_s']:>9.1f} "
                f"| {row['runs_per_s']:>11.2f} | {row['ms_per_run_step']:>19.3f} |"
            )
            results.append({"dataset": config.dataset, "method": method, **row})
    common.write("study_speed", args.out, results, rounds=rounds)


if __name__ == "__main__":
    main()
