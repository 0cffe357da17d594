"""Devices that are not there: how to compile for them, and how long a step may take on them.

    target = find("v5e:2x2")                    # or "h100", "h100:8"
    compiled = target.compile(step, state, batch, donate_argnums=0)

Arguments are `jax.ShapeDtypeStruct`s with shardings on `target.devices`, so no arrays are made. It
needs the target's plugin, but no device: `pip install "jax[tpu]"` (0.7 GB),
`pip install "jax[cuda12]"` (4.4 GB). Both can be installed together.

A predicted time is a roofline, never a measurement:

    max(Σ max(FLOPs / peak, bytes / bandwidth), bytes in all / bandwidth)
        + launches × launch + decisions × decision + bytes sent / link

The sum is over the operations that are launched. It assumes that nothing overlaps except the
fetches of TPUs, that every product runs at the peak of its operands' dtype, and that all other
computation is free.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils, topologies

from benchmarks import compiled

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA asks of a GPU, as it would find it."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """The peak performance of a device, and its assumed latencies.

    Attributes:
        flops: per second, by the dtype of a product's operands.
        bandwidth: bytes per second of its main memory.
        memory: bytes of it.
        link: bytes per second that it sends over each of its links.
        launch: seconds until an operation begins.
        decision: seconds for which it is idle while the host waits for a value.
        source: of the figures.
    """

    flops: dict[str, float]
    bandwidth: float
    memory: float
    link: float
    launch: float
    decision: float
    source: str


FIGURES = {
    "h100": Figures(
        flops={"bf16": 989e12, "f16": 989e12, "f32": 495e12},
        bandwidth=3.35e12,
        memory=80e9,
        link=450e9,
        launch=1e-6,
        decision=10e-6,
        source="NVIDIA's data sheet of the H100 SXM: dense products of bfloat16 at 989 TFLOP/s, of "
        "float32 as TF32 at 495, which is JAX's default; 3.35 TB/s; NVLink 450 GB/s each way. "
        "Latencies are round numbers: 1 µs a launch, 10 µs a decision.",
    ),
    "v5e": Figures(
        flops={"bf16": 197e12, "f32": 197e12},
        bandwidth=819e9,
        memory=16e9,
        link=50e9,
        launch=0.5e-6,
        decision=0.5e-6,
        source="Google's documentation of the TPU v5e: 197 TFLOP/s of bfloat16, in one pass of "
        "which JAX's default multiplies float32 too; 819 GB/s; 1,600 Gbit/s between chips, as 50 "
        "GB/s over each of 4 links. Latencies are round numbers: 0.5 µs an operation or decision, "
        "both on the chip.",
    ),
}


_PLUGINS = {"cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin"), "tpu": ("libtpu",)}

_NO_TPU = {  # otherwise libtpu looks for a TPU, complains, and locks it
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class MissingPlugin(Exception):
    """A target's plugin is not installed; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A device, or several, that are not there.

    Attributes:
        name: such as "h100" or "v5e:2x2".
        platform: "cuda" or "tpu".
        devices: for meshes and shardings.
        links: over how many links a device sends at once.
    """

    name: str
    platform: str
    devices: Sequence[jax.Device]
    links: int

    @property
    def plugins(self) -> list[str]:
        """The packages that compile for it."""
        return [name for name in _PLUGINS[self.platform] if importlib.util.find_spec(name)]

    @property
    def figures(self) -> Figures:
        """The peak performance of one of the devices."""
        return FIGURES[self.name.split(":")[0]]

    def lower(self, fun: Callable, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Lowers a function, jitted here (by `kwargs`) or before, for shapes as arguments."""
        jitted = fun if hasattr(fun, "trace") else jax.jit(fun, **kwargs)
        return jitted.trace(*args).lower(lowering_platforms=(self.platform,))

    def finish(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Compiles a lowered function with XLA's defaults, independent of XLA_FLAGS."""
        options: dict[str, Any] = {
            "xla_backend_optimization_level": 3,
            "xla_llvm_disable_expensive_passes": False,
        }
        if self.platform == "cuda":
            options["xla_gpu_autotune_level"] = 0  # there is no device to tune on
        return lowered.compile(options)

    def compile(self, fun: Callable, *args: Any, **kwargs: Any) -> jax.stages.Compiled:
        """`lower`, and `finish`."""
        return self.finish(self.lower(fun, *args, **kwargs))

    def predict(self, work: compiled.Work) -> float:
        """The seconds that this work may take; a prediction, see the module."""
        figures = self.figures

        def seconds(kernel):
            peak = figures.flops.get(kernel.dtype, figures.flops["f32"])
            return kernel.times * max(kernel.flops / peak, kernel.nbytes / figures.bandwidth)

        computed = max(sum(map(seconds, work.kernels)), work.nbytes / figures.bandwidth)
        waited = work.launches * figures.launch + work.decisions * figures.decision
        return computed + waited + work.sent / (figures.link * self.links)


def missing(name: str) -> str | None:
    """What to install for a target, or None if it is there.

    Raises:
        ValueError: if there is no such target.
    """
    found = re.fullmatch(r"h100(:[1-9]\d*)?|v5e:\d+x\d+", name)
    if not found:
        raise ValueError(
            f"target is {name!r}; expected 'h100', 'h100:8' (of one machine) or a slice of TPU v5e "
            "such as 'v5e:2x2' or 'v5e:16x16'."
        )
    platform, extra = ("cuda", "cuda12") if name.startswith("h100") else ("tpu", "tpu")
    if any(map(importlib.util.find_spec, _PLUGINS[platform])):
        return None
    return f'{name} needs its plugin, but no device: pip install "jax[{extra}]"'


@functools.cache
def find(name: str) -> Target:
    """A target by its name.

    Raises:
        ValueError: if there is no such target.
        MissingPlugin: if its plugin is not installed.
    """
    if message := missing(name):
        raise MissingPlugin(message)
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")  # otherwise JAX looks for the devices
    if name.startswith("h100"):
        num = int(name.partition(":")[2] or 1)
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", target_config=H100, topology=f"1x1x{num}"
        )
        return Target(name, "cuda", topology.devices, links=1)
    for variable, value in _NO_TPU.items():
        os.environ.setdefault(variable, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    sides = map(int, name.partition(":")[2].split("x"))
    # A side of 16 is closed to a ring. Elsewhere the chips at the ends have one link on it.
    return Target(name, "tpu", topology.devices, sum(1 + (side >= 16) for side in sides))


def grid(target: Target, **axes: int) -> jax.sharding.Mesh:
    """A mesh over all devices of a target, with these axes."""
    devices = mesh_utils.create_device_mesh(
        tuple(axes.values()), target.devices, allow_split_physical_axes=True
    )
    return jax.sharding.Mesh(devices, tuple(axes))
