"""What `benchmarks.accelerators` compiles: steps, epochs and sweeps, as shapes with shardings.

    one = training_job("sign, T=10", "8 x 4096", 16384, "bfloat16", "fsdp", target)
    compiled = target.finish(one.lower(target))

No arrays are made: models are traced only by their shapes. Feedback is sharded like its kernel, and
small arrays are on every device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from benchmarks import methods, targets
from soap_jax import training

Layout = Literal["one", "data", "fsdp", "tensor", "explicit"]

STEPS = 20
RUNS = 64


@dataclasses.dataclass(frozen=True)
class Job:
    """A function to compile, and what is needed to count its facts.

    Attributes:
        fun: jitted, or to be.
        args: shapes with shardings.
        options: of `jax.jit`.
        kernels: shapes of kernels, whole and on one device.
        steps: that one call makes.
        state: bytes per device of what is donated.
        mesh: to be the current one, if it is explicit.
    """

    fun: Callable
    args: tuple
    options: dict[str, Any]
    kernels: frozenset[tuple[int, ...]]
    steps: int = 1
    state: int = 0
    mesh: jax.sharding.Mesh | None = None

    def lower(self, target: targets.Target) -> jax.stages.Lowered:
        """Traces and lowers it."""
        with jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext():
            return target.lower(self.fun, *self.args, **self.options)


def training_job(
    name: str,
    network: str,
    batch_size: int,
    dtype: str,
    layout: Layout,
    target: targets.Target,
    *,
    epoch: bool = False,
) -> Job:
    """A train step of `benchmarks.methods`, or an epoch of `STEPS` of them.

    Args:
        name: of `methods.METHODS`.
        network: of `methods.NETWORKS`.
        batch_size: examples per step, on all devices.
        dtype: in which layers compute.
        layout: over devices, see `benchmarks.accelerators`.
        target: whose devices they are.
        epoch: whether it is an epoch, as one scan.
    """
    made = methods.sketch(name, network, batch_size, dtype=jnp.dtype(dtype))
    state, batch, mesh = spread(layout, target, made.state, made.batch)
    options: dict[str, Any] = {"donate_argnums": 0}
    rest = {"kernels": _kernels(state), "state": shard_bytes(state)}
    if epoch:
        data = jax.tree.map(
            lambda leaf: leaf.update(shape=(STEPS * leaf.shape[0], *leaf.shape[1:])), batch
        )
        key = jax.eval_shape(jax.random.key, 0).update(sharding=batch[0].sharding)

        def fun(state, data, key):
            return training.train_epoch(made.step, state, data, key, batch_size=batch_size)

        return Job(fun, (state, data, key), options, steps=STEPS, **rest)
    if layout == "explicit":
        rest["mesh"] = mesh
    elif mesh is not None:  # in an explicit mesh, types have the sharding
        replicated = NamedSharding(mesh, PartitionSpec())
        options["out_shardings"] = jax.tree.map(lambda leaf: leaf.sharding, state), replicated
    return Job(made.step, (state, batch), options, **rest)


def sweep_job(target: targets.Target) -> Job:
    """The study on data as large as digits, `RUNS` runs at once: one device's part of a sweep."""
    from soap_jax import data, models, tasks
    from soap_jax.study import loops, trial
    from soap_jax.study import methods as registry

    def part(num):
        return data.Split(np.zeros((num, 8, 8, 1), np.uint8), np.arange(num, dtype=np.int32) % 10)

    digits = data.Dataset("digits", part(1438), part(359), 10, 16, "made up")
    model = models.MLP((256, 10), feedback=False)
    task = tasks.classification(model, digits, scale=tasks.Scaling(8.0, 4.0))
    params = jax.eval_shape(task.init, jax.random.key(0))
    batch = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[:64], task.train))
    layers = trial.layers_of(task, params, None, batch)
    ways = {trial.shared_key(one): one for one in registry.METHODS.values() if not one.needs}
    members = tuple(one for key, one in ways.items() if key is not None)
    steps = 20 * (task.examples["train"] // 64)
    of_method = trial.make(
        task, members, layers, optimizer=optax.sgd, batch_size=64, steps=steps, evaluations=20
    )
    alone = SingleDeviceSharding(target.devices[0])

    def shape(dtype, *axes):
        return jax.ShapeDtypeStruct(axes, dtype, sharding=alone)

    arrays = jax.tree.map(lambda leaf: shape(leaf.dtype, *leaf.shape), trial.data_of(task))
    fun = jax.vmap(loops.scanned(of_method), (0, 0, None, None, None))
    scalar = shape(jnp.int32)
    args = shape(jnp.int32, RUNS), shape(jnp.float32, RUNS), scalar, scalar, arrays
    kernels = {(RUNS, *leaf.shape) for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    return Job(fun, args, {}, frozenset(kernels), steps=steps)


# Shardings


def mesh_of(layout: Layout, target: targets.Target) -> jax.sharding.Mesh | None:
    """The mesh of a layout over all devices of a target; None for one device."""
    num = len(target.devices)
    if layout == "one":
        return None
    if layout == "tensor":
        data = 2 ** (num.bit_length() // 2)
        return targets.grid(target, data=data, model=num // data)
    mesh = targets.grid(target, data=num)
    return mesh.update(axis_types=(AxisType.Explicit,)) if layout == "explicit" else mesh


def spread(
    layout: Layout, target: targets.Target, state: Any, batch: Any
) -> tuple[Any, Any, jax.sharding.Mesh | None]:
    """Gives shapes their shardings; also the mesh."""
    mesh = mesh_of(layout, target)
    if mesh is None:
        alone = SingleDeviceSharding(target.devices[0])
        return *jax.tree.map(lambda leaf: leaf.update(sharding=alone), (state, batch)), None

    def of_state(path, leaf):
        axis, name = None, "model" if layout == "tensor" else "data"
        if layout == "fsdp" and leaf.ndim > 1:
            fitting = [n if n % mesh.size == 0 else 0 for n in leaf.shape]
            axis = fitting.index(max(fitting)) if any(fitting) else None
        elif layout == "tensor":
            axis = _model_axis([key.key for key in path if hasattr(key, "key")], leaf.ndim)
        if axis is None or leaf.shape[axis] % mesh.shape[name]:
            spec = PartitionSpec()
        else:
            spec = PartitionSpec(*axis * [None], name)
        return leaf.update(sharding=NamedSharding(mesh, spec))

    split = NamedSharding(mesh, PartitionSpec("data"))
    state = jax.tree_util.tree_map_with_path(of_state, state)
    return state, jax.tree.map(lambda leaf: leaf.update(sharding=split), batch), mesh


def _model_axis(names, ndim) -> int | None:
    """Which axis of a layer's kernel or bias is split over "model", by the layer's name."""
    if len(names) < 2 or names[-1] not in ("kernel", "bias"):
        return None
    layer, kind = names[-2:]
    number = int(layer.removeprefix("Dense_")) if layer.startswith("Dense_") else None
    if layer in ("query", "key", "value"):
        return ndim - 2  # the heads
    if layer == "up" or (number is not None and number % 2 == 0):
        return ndim - 1
    if kind == "kernel" and (layer in ("out", "down") or number is not None):
        return 0
    return None


def shard_bytes(tree: Any) -> int:
    """The bytes of a tree of shapes on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.dtype.itemsize * math.prod(_shard(leaf)) for leaf in leaves)


def _kernels(state):
    leaves = jax.tree.leaves((state.params, training.feedback_weights(state.feedback)))
    kernels = [leaf for leaf in leaves if leaf.ndim > 1]
    return frozenset(leaf.shape for leaf in kernels) | frozenset(map(_shard, kernels))


def _shard(leaf):
    return leaf.sharding.shard_shape(leaf.shape)
