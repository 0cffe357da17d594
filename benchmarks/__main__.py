"""Runs the benchmarks of speed and memory one after the other, each in its own process.

    python -m benchmarks [NAME ...] [--quick] [--out benchmarks/results]

The first line of its docstring is the question of each benchmark. `benchmarks/README.md` explains
the results. With `--quick`, all benchmarks take about two minutes, and their numbers mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import subprocess
import sys

from benchmarks import common

SUITE = (
    "step_time",
    "transform",
    "direct",
    "recording",
    "sweeps",
    "study_speed",
    "precision",
    "memory",
    "startup",
    "limits",
    "convolutions",
    "peers",
)


def main() -> int:
    """Runs the benchmarks; returns how many failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SUITE)}")
    parser.add_argument("--quick", action="store_true", help="small and short, to see them run")
    parser.add_argument("--out", type=pathlib.Path, default=common.OUT)
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in SUITE]:
        parser.error(f"no benchmark is called {', '.join(unknown)}; expected {', '.join(SUITE)}")
    failed = []
    for name in args.names or SUITE:
        question = importlib.import_module(f"benchmarks.{name}").__doc__.split("\n")[0]
        print(f"\n=== {name}: {question}\n", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(args.out)]
        if subprocess.run(command + ["--quick"] * args.quick).returncode:
            failed.append(name)
    if failed:
        print(f"\nFailed: {', '.join(failed)}.", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
