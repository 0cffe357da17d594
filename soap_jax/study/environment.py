"""Versions, devices and settings that influence results, and the differences of two records.

A study and a single training both record them. Resuming under different ones is refused: with
another random generator the remaining runs would start from other weights, and with another
precision they would round differently. (`jax_numpy_dtype_promotion` is not recorded, since all
dtypes here are explicit.)
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax

import soap_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")

_JAX_SETTINGS = (
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
    "jax_default_matmul_precision",
    "jax_enable_x64",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_optimization_level",
    "jax_exec_time_optimization_effort",
)
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
_HARMLESS_FLAGS = ("--xla_dump_", "--xla_force_host_platform_device_count")


def settings() -> dict[str, Any]:
    """The current settings, by the names that JAX and XLA give them.

    Example:
        >>> settings()["jax_default_prng_impl"]
        'threefry2x32'
    """
    known = {name: getattr(jax.config, name, None) for name in _JAX_SETTINGS}
    plain = (bool, int, float, str, type(None))
    return {
        name: value if isinstance(value, plain) else str(value) for name, value in known.items()
    } | {name: _flags(os.environ.get(name, "")) for name in _VARIABLES}


def provenance() -> dict[str, Any]:
    """The versions, device and settings that results are computed with."""
    devices = jax.devices()
    return {
        "versions": {"soap_jax": soap_jax.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": {
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "count": len(devices),
            "processes": jax.process_count(),
            "machine": platform.machine(),
            "processor": _processor(),
        },
        "settings": settings(),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The entries of `now` whose values differ from `before`, as text with both values.

    Settings that an older version did not record are not compared.

    Example:
        >>> differences({"versions": {"jax": "1"}}, {"versions": {"jax": "2"}})
        ['versions.jax: was 1, is now 2']
    """
    found = []
    for name, value in now.items():
        old = before.get(name)
        if name == "settings":
            old = old or {}
            value = {key: value.get(key) for key in old}
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = {**dict.fromkeys(old), **value}
            found += [f"{name}.{said}" for said in differences(old, value)]
        elif old != value:
            found.append(f"{name}: was {_value_text(old)}, is now {_value_text(value)}")
    return found


def refuse_changes(path: pathlib.Path, what: str, changes: list[str]) -> None:
    """Raises ValueError if there are changes between a directory's content and the request.

    Args:
        path: the directory.
        what: the content of the directory, such as "runs".
        changes: from `differences`.
    """
    if changes:
        raise ValueError(
            f"{path} holds {what} with other settings ({'; '.join(changes)}); expected the "
            "same. Repeat the original call, name another directory as out, or delete this one."
        )


def _flags(text: str) -> str:
    """Sorted flags: the last of each name, without flags that do not influence results."""
    flags = {flag.partition("=")[0]: flag for flag in text.split()}
    return " ".join(sorted(f for f in flags.values() if not f.startswith(_HARMLESS_FLAGS)))


def _value_text(value) -> str:
    return "not set" if value in (None, "") else str(value)


def _processor() -> str:
    """The model of the CPU, if the system reports it."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
