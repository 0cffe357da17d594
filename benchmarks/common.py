"""What the benchmarks share: interleaved timing, and results that say where they come from."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import pathlib
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping

import jax

OUT = pathlib.Path("benchmarks/results")


def interleave(runners: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Times every runner once a round, in an order drawn anew: `{name: seconds by round}`."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name in random.sample(list(runners), len(runners)):
            begin = time.perf_counter()
            runners[name]()
            times[name].append(time.perf_counter() - begin)
    return times


def interleave_blocks(
    runners: Mapping[str, Callable[[int], object]], rounds: int, seconds: float, reference: str
) -> dict[str, list[float]]:
    """Times blocks of `n` steps, of about so many seconds: `{name: seconds per step by round}`."""
    begin = time.perf_counter()
    runners[reference](10)
    n = max(3, round(seconds / ((time.perf_counter() - begin) / 10)))
    blocks = {name: functools.partial(run, n) for name, run in runners.items()}
    times = interleave(blocks, rounds)
    return {name: [spent / n for spent in values] for name, values in times.items()}


def ratio(times: Mapping[str, list[float]], name: str, reference: str) -> tuple[float, list[float]]:
    """The median of the ratio within a round, and its quartiles."""
    pairs = zip(times[name], times[reference], strict=True)
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    return middle, [low, high]


def write(name: str, out: pathlib.Path, results: list[dict], **facts) -> None:
    """Writes results as JSON, with versions and device."""
    report = {
        "benchmark": name,
        **facts,
        "device": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}",
        "platform": jax.default_backend(),
        "machine": platform.machine(),
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("soap_jax", "jax", "jaxlib", "flax", "optax")
        },
        "results": results,
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nWritten to {path}.")
