"""What do the steps compile to on a GPU and on TPUs that need not be there?

    pip install -e ".[dev]" "jax[tpu]" "jax[cuda12]"    # libtpu 0.7 GB, the CUDA wheels 4.4 GB
    python -m benchmarks.accelerators --target h100 v5e:2x2 v5e:16x16 [--quick] [--out DIR]

Compiles the train steps of `benchmarks.methods` for devices that are not there, and reports the
contents of the compiled programs. `benchmarks.compiled` defines the terms. Nothing is timed. Times
are predictions: a roofline with the numbers of `benchmarks.targets`. Targets are "h100", "h100:8"
(GPUs of one machine) and slices of TPU v5e. A target with one device compiles the cases for one
device. A small slice also compiles meshes of all its chips. A large slice compiles larger networks
on meshes of all its chips. On 2 CPU cores, a target takes 5 to 15 minutes.

    one         one device data        data-parallel: the batch split over all devices fsdp
    the batch and every kernel, feedback included, split over all devices tensor      the batch
    split over one axis of a mesh, kernels over the other one: every second layer by its outputs,
    the layers between by their inputs explicit    as "data", on an explicit mesh epoch       20
    steps as one scan, `training.train_epoch`; numbers are per step sweep       4 runs of the study
    at once, as in `soap_jax.sweeps` on a device, including measurements; numbers are per step of
    all runs placed      a stack of layers, each on its own chips: see `benchmarks.placement`

The period of a rule is an array in its state. Periods with the same program share a row. "At a
sync" is for a step that syncs feedback. All other numbers are for a step that does not.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from benchmarks import common, compiled, jobs, methods, placement, targets

RULES = tuple(methods.RULES)
SMALL, LARGE, CONV = "784-256-10", "784-1024-1024-1024-10", "conv 32-64"
TRANSFORMER, BLOCKS = "transformer, 2 blocks of 128", "transformer, 8 blocks of 2048"
FLOAT32, BFLOAT16 = ("float32",), ("bfloat16",)
EVERY = ("bp", "fa", *RULES, "kp", "dfa")
SPLIT = ("bp", "fa", *RULES, "dfa")
THROUGH = ("bp", *(f"{name}, with_feedback" for name in ("fa", *RULES)), "dfa")
OUT = common.OUT / "accelerators"
MB = 1e6


@dataclasses.dataclass(frozen=True)
class Case:
    """A network in one layout, by several methods.

    Attributes:
        network: of `methods.NETWORKS`.
        batch: examples per step, on all devices.
        names: of methods; of those that sync, without their period.
        dtypes: in which layers compute.
        layout: over devices.
        form: a step, or an epoch of them.
    """

    network: str
    batch: int
    names: tuple[str, ...]
    dtypes: tuple[str, ...] = FLOAT32
    layout: jobs.Layout = "one"
    form: str = "step"


ALONE = (
    Case(SMALL, 64, EVERY, FLOAT32 + BFLOAT16),
    Case(LARGE, 512, (*EVERY, "dfa, scan", "dfa, parallel"), FLOAT32 + BFLOAT16),
    Case(CONV, 64, (*EVERY, "fa, with_feedback"), FLOAT32 + BFLOAT16),
    Case(TRANSFORMER, 16, THROUGH, FLOAT32 + BFLOAT16),
    Case("8 x 8192", 4096, (*SPLIT, "dfa, parallel"), BFLOAT16),
    Case(LARGE, 512, ("bp", "fa", "sign", "sign_norm", "sign_redraw", "dfa"), form="epoch"),
)
MESHES = (
    *(Case(LARGE, 512, SPLIT, layout=layout) for layout in ("data", "fsdp", "tensor")),
    *(Case(TRANSFORMER, 16, THROUGH, layout=layout) for layout in ("data", "fsdp", "tensor")),
    Case(LARGE, 512, ("bp", "fa", *RULES), layout="explicit"),
)
FEW = ("bp", "fa, with_feedback", "sign, with_feedback", "dfa")
LARGE_MESHES = (
    *(Case("8 x 4096", 16384, SPLIT, BFLOAT16, layout) for layout in ("data", "fsdp", "tensor")),
    *(Case(BLOCKS, 256, FEW, BFLOAT16, layout) for layout in ("data", "fsdp", "tensor")),
    Case("8 x 4096", 16384, ("bp", "fa", "sign"), BFLOAT16, "explicit"),
)
QUICK = (Case(LARGE, 512, ("bp", "fa", "sign")),)


def jobs_of(
    target: targets.Target, *, quick: bool = False
) -> Iterator[tuple[dict, dict[int | None, Callable[[], jobs.Job]]]]:
    """What is compiled for a target: the row's labels, and by period how to make it."""
    num = len(target.devices)
    large = num > 16
    cases = QUICK if quick else LARGE_MESHES if large else (*ALONE, *(MESHES if num > 1 else ()))
    for case in cases:
        for dtype in case.dtypes:
            for name in case.names:
                base, comma, suffix = name.partition(", with_feedback")
                periods = methods.PERIODS if base in methods.RULES else (None,)
                named = {t: name if t is None else f"{base}, T={t}{comma}{suffix}" for t in periods}
                args = case.network, case.batch, dtype, case.layout, target
                epoch = case.form == "epoch"
                where = {"network": case.network, "batch": case.batch, "dtype": dtype}
                yield (
                    where | {"layout": case.layout, "form": case.form, "method": name},
                    {
                        t: functools.partial(jobs.training_job, full, *args, epoch=epoch)
                        for t, full in named.items()
                    },
                )
    if quick:
        return
    if large:
        for name in placement.METHODS:
            where = {"network": placement.NETWORK, "batch": placement.BATCH, "dtype": "bfloat16"}
            where |= {"layout": "placed", "form": "step", "method": name}
            yield where, {None: functools.partial(placement.job, name, target)}
    else:
        where = {"network": "64-256-10", "batch": 64, "dtype": "float32", "layout": "one"}
        where |= {"form": "sweep", "method": "default study, 64 runs"}
        yield where, {None: functools.partial(jobs.sweep_job, target)}


def rows_of(
    where: dict, made: dict[int | None, Callable[[], jobs.Job]], target: targets.Target
) -> list[dict[str, Any]]:
    """A row per program: periods that have the same one share it."""
    programs: dict[str, tuple[jobs.Job, jax.stages.Lowered, list[int | None]]] = {}
    for period, make in made.items():
        one = make()
        lowered = one.lower(target)
        programs.setdefault(lowered.as_text(), (one, lowered, []))[2].append(period)
    rows = []
    for one, lowered, periods in programs.values():
        begin = time.perf_counter()
        row = facts_of(one, target, target.finish(lowered))
        quiet, sync = row["predicted_ms"], row["sync_predicted_ms"]
        means = {f"T={t}": ((t - 1) * quiet + sync) / t for t in periods if t is not None}
        seconds = round(time.perf_counter() - begin, 1)
        rows.append(where | row | {"predicted_mean_ms": means, "compile_seconds": seconds})
    return rows


def facts_of(one: jobs.Job, target: targets.Target, program: jax.stages.Compiled) -> dict[str, Any]:
    """Every fact as a plain value: operations of a step without and with a sync, and memory."""
    found = compiled.facts(program, one.kernels)
    row: dict[str, Any] = {}
    for prefix, work in (("", found.quiet), ("sync_", found.sync)):
        kinds = sorted(work.by_kind().items())
        values: dict[str, float] = {
            "launches": work.launches,
            "host_reads": work.decisions if target.platform == "cuda" else 0,
            "flops": work.flops,
            "bytes": work.nbytes,
            "sent_bytes": work.sent,
            "predicted_ms": 1e3 * target.predict(work),
        }
        row |= {
            f"{prefix}products": work.products,
            f"{prefix}copies": work.copies,
            f"{prefix}casts": work.casts,
            f"{prefix}collectives": {kind: num / one.steps for kind, (num, _) in kinds},
            **{f"{prefix}{name}": value / one.steps for name, value in values.items()},
        }
    names = "conditionals", "dynamic_loops", "arguments", "temporaries", "peak", "aliased"
    row |= {name: getattr(found, name) for name in names}
    return row | {"state": one.state, "xla_flops_and_bytes": list(found.reported.values())}


def columns(target: targets.Target) -> dict[str, str | Callable[[dict], str]]:
    """The table's columns: a step without a sync, then one at a sync where it differs."""

    def at(name, show=lambda value: f"{value:.4g}"):
        def cell(row):
            quiet, sync = show(row[name]), show(row[f"sync_{name}"])
            return quiet if quiet == sync else f"{quiet} ({sync})"

        return cell

    def control(row):
        return f"{row['conditionals']} + {row['dynamic_loops']}"

    def collectives(kinds):
        return ", ".join(f"{num:g} {kind}" for kind, num in kinds.items()) or "-"

    def predicted(row):
        means = [f"{value:.3g}" for value in row["predicted_mean_ms"].values()]
        return " / ".join(means) or f"{row['predicted_ms']:.3g}"

    def method(row):
        periods = [mean.removeprefix("T=") for mean in row["predicted_mean_ms"]]
        return row["method"] + (f", T={', '.join(periods)}" if periods else "")

    shared: dict[str, str | Callable[[dict], str]] = {
        "network, batch": lambda row: f"{row['network']}, {row['batch']}",
        "dtype": "dtype",
        "layout": lambda row: row["layout"] if row["form"] == "step" else row["form"],
        "method": method,
        "products": at("products"),
        "launches": at("launches"),
        "copies": at("copies"),
        "casts": at("casts"),
        "conditionals + loops": control,
    }
    if target.platform == "cuda":
        shared["host reads"] = at("host_reads")
    if len(target.devices) > 1:
        shared["collectives"] = at("collectives", collectives)
        shared["sent, MB"] = at("sent_bytes", lambda value: f"{value / MB:.4g}")
    return shared | {
        "GFLOP": at("flops", lambda value: f"{value / 1e9:.4g}"),
        "moved, MB": at("bytes", lambda value: f"{value / MB:.4g}"),
        "temporaries, MB": lambda row: f"{row['temporaries'] / MB:.4g}",
        "peak, MB": lambda row: f"{row['peak'] / MB:.4g}",
        "predicted, ms": predicted,
    }


def run(target: targets.Target, *, quick: bool) -> list[dict[str, Any]]:
    """Compiles everything for a target, and prints its progress."""
    rows: list[dict[str, Any]] = []
    begin = time.perf_counter()
    todo = list(jobs_of(target, quick=quick))
    for i, (where, made) in enumerate(todo, 1):
        rows += rows_of(where, made, target)
        passed = time.perf_counter() - begin
        said = ", ".join(str(value) for value in where.values())
        print(f"{target.name} {i}/{len(todo)}, {passed:.0f} s: {said}", flush=True)
    return rows


def main() -> int:
    """Compiles for the targets; prints and writes a table and all facts for each target."""
    parser = common.arguments(__doc__, rounds=1)  # there are no rounds
    parser.set_defaults(out=OUT)
    parser.add_argument("--target", nargs="+", required=True, help="such as h100 v5e:2x2")
    args = parser.parse_args()
    try:
        found = [targets.find(name) for name in args.target]
    except (ValueError, targets.MissingPlugin) as error:
        print(error, file=sys.stderr)
        return 2
    jax.config.update("jax_enable_compilation_cache", False)  # no device, no loaded program
    for target in found:
        rows = run(target, quick=args.quick)
        common.publish(
            target.name.replace(":", "_"),
            args.out,
            rows,
            columns(target),
            target=target.name,
            devices=len(target.devices),
            compiler={name: importlib.metadata.version(name) for name in target.plugins},
            figures=dataclasses.asdict(target.figures),
            prediction=targets.__doc__.partition("A predicted time")[2].strip(),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
