"""Many trainings as one compiled program: seeds x learning rates x sync periods.

A run is any pure function `(seed, learning_rate, period, *args) -> results`. `sweep` compiles it
once and spreads the runs over all devices. On accelerators a device does a chunk of runs at once
(`vmap`); on CPU it does them one after the other (`lax.map`), which is faster there and
bit-identical to a run alone, whatever the number of devices. Give JAX one CPU device per core
before its first use:

    jax.config.update("jax_num_cpu_devices", os.cpu_count())
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from soap_jax import grids

Run = Callable[..., chex.ArrayTree]
"""`(seed, learning_rate, period, *args) -> results`: int32, float32, int32 scalars and what
`sweep` was given as `args`, to a tree of arrays."""


def sweep(
    run: Run,
    *,
    seeds: Sequence[int],
    learning_rates: Sequence[float],
    periods: Sequence[int] = (1,),
    args: tuple[chex.ArrayTree, ...] = (),
    chunk_size: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> chex.ArrayTree:
    """Runs every combination of period, learning rate and seed.

    Args:
        run: `(seed, learning_rate, period, *args) -> results`, traced once.
        seeds: integers.
        learning_rates: positive numbers.
        periods: integers of at least 1.
        args: arrays that all runs share, such as the data; one copy per device.
        chunk_size: at most so many runs per device in one call of the program: on accelerators
            the number that trains at once, which memory bounds. By default 4 on CPU, elsewhere 64.
        on_progress: called as `(runs done, runs in all)` after compilation and after each call.
        devices: by default all local devices.

    Returns:
        The results as NumPy arrays with leading axes `(periods, learning_rates, seeds)`.

    Raises:
        ValueError: if a grid is empty or has a value out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> def run(seed, learning_rate, period):
        ...     return {"value": seed + learning_rate * period}
        >>> sweep(run, seeds=[1, 2], learning_rates=[0.5], periods=[2, 4])["value"].tolist()
        [[[2.0, 3.0]], [[3.0, 4.0]]]
    """
    grids.check(seeds=seeds, learning_rates=learning_rates, periods=periods)
    devices = jax.local_devices() if devices is None else devices
    if not devices:
        raise ValueError("devices is empty; expected at least one.")
    on_cpu = devices[0].platform == "cpu"
    per_period = len(learning_rates) * len(seeds)
    if chunk_size is None:
        chunk_size = 4 if on_cpu else 64
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected at least 1.")
    calls = math.ceil(per_period / (len(devices) * chunk_size))
    chunk = len(devices) * math.ceil(per_period / (len(devices) * calls))  # calls of equal size

    rates, seeds_ = np.meshgrid(
        np.asarray(learning_rates, np.float32), np.asarray(seeds, np.int32), indexing="ij"
    )
    filled = np.resize(np.arange(per_period), math.ceil(per_period / chunk) * chunk)
    chunks = filled.reshape(-1, chunk)  # the last is filled up with runs done before
    mesh = Mesh(np.asarray(devices), ("runs",))
    args = jax.device_put(args, NamedSharding(mesh, PartitionSpec()))
    program = _compile(run, mesh, chunk, args, one_by_one=on_cpu)
    total = per_period * len(periods)
    if on_progress:
        on_progress(0, total)
    results = []
    for i, period in enumerate(periods):
        parts = []
        for j, indices in enumerate(chunks):
            out = program(seeds_.flat[indices], rates.flat[indices], np.int32(period), *args)
            parts.append(jax.device_get(out))
            if on_progress:
                on_progress(i * per_period + min((j + 1) * chunk, per_period), total)
        results.append(jax.tree.map(lambda *leaves: np.concatenate(leaves)[:per_period], *parts))

    def stack(*leaves):
        shape = (len(periods), len(learning_rates), len(seeds))
        return np.stack(leaves).reshape(*shape, *leaves[0].shape[1:])

    return jax.tree.map(stack, *results)


def _compile(run, mesh, chunk, args, *, one_by_one):
    """The program that does one chunk of runs, its axis spread over the devices."""

    def share(seeds, rates, period, *args):
        def one(each):
            return run(*each, period, *args)

        if one_by_one:
            return lax.map(one, (seeds, rates))
        return jax.vmap(one)((seeds, rates))

    runs = PartitionSpec("runs")
    program = jax.shard_map(
        share,
        mesh=mesh,
        in_specs=(runs, runs, PartitionSpec(), *(PartitionSpec() for _ in args)),
        out_specs=runs,
        check_vma=False,  # runs never talk to one another
    )
    types = (
        jax.ShapeDtypeStruct((chunk,), jnp.int32),
        jax.ShapeDtypeStruct((chunk,), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    return jax.jit(program).lower(*types, *args).compile()
