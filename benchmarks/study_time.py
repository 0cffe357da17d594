"""How long does the whole default study take, beside another version's, and a second time?

    python -m benchmarks.study_time [--against CHECKOUT] [--rounds 3] [--quick] [--out ...]

It measures the seconds of `soap-jax study` from the start of its process to its end, including the
report. No program is compiled before. Every round runs each version once, in a new random order.
CHECKOUT is a directory with the `soap_jax` of the other version. A third runner is this version,
with its programs compiled by an earlier run. Shown are medians over rounds, and the ratio to the
other version within a round, with quartiles.
"""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys
import tempfile

from benchmarks import common

COMMAND = [sys.executable, "-c", "from soap_jax.cli import main; main()"]
WHERE = [sys.executable, "-c", "import soap_jax; print(soap_jax.__file__)"]
QUICK = ["--methods=bp,fa", "--seeds=2", "--learning-rates=0.05,0.1", "--period=1", "--epochs=2"]


def run(checkout: pathlib.Path, options: list[str], cache: str | None = None):
    """Runs the study of a checkout in a new directory, with a new cache or a given one."""
    with tempfile.TemporaryDirectory() as scratch:
        rest = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        env = rest | {"PYTHONPATH": str(checkout), "XDG_CACHE_HOME": cache or f"{scratch}/cache"}
        keywords = {"cwd": scratch, "env": env, "check": True, "stdout": subprocess.PIPE}
        found = subprocess.run(WHERE, **keywords, text=True).stdout.strip()
        if pathlib.Path(found).parents[1] != checkout:
            raise SystemExit(f"{checkout} has no soap_jax: {found} is imported.")
        subprocess.run([*COMMAND, "study", "--out=results", *options], **keywords)


def main():
    """Runs the benchmark, prints the table, writes JSON and table."""
    parser = common.arguments(__doc__, rounds=3)
    parser.add_argument("--against", type=pathlib.Path, help="another version's checkout")
    args = parser.parse_args()
    options, rounds = (QUICK, 2) if args.quick else ([], args.rounds)
    here = pathlib.Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as kept:
        run(here, options, kept)  # fills the cache, and Python's bytecode cache
        runners = {"this version": functools.partial(run, here, options)}
        if args.against:
            other = args.against.resolve()
            run(other, QUICK)
            runners["the other"] = functools.partial(run, other, options)
        runners["this version, a second time"] = functools.partial(run, here, options, kept)
        times = common.interleave(runners, rounds)
    reference = "the other" if args.against else "this version"
    rows = [
        {"version": name, "seconds": times[name], **row}
        for name, row in common.summary(times, reference).items()
    ]
    columns = {"version": "version", "seconds": lambda row: f"{row['ms'] / 1e3:.1f}"}
    columns[f"ratio to {reference} [quartiles]"] = common.show_ratio
    common.publish("study_time", args.out, rows, columns, rounds=rounds)


if __name__ == "__main__":
    main()
