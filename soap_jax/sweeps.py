"""Sweeps: many trainings as one compiled program, over seeds, learning rates and sync periods.

A run is any pure function `(seed, learning_rate, period, *args) -> results`. `sweep` compiles it
once and distributes the runs over all devices. On accelerators a device computes a chunk of runs at
once (`vmap`). On CPU it computes them one after the other, which is faster there. The results of a
run on CPU are then bit-identical for any other runs in the sweep, any chunk size and any number of
devices from two on. (For one device XLA compiles another program, which may round differently.) On
CPU convolutions are computed as matrix products, which are fast in a loop
(`soap_jax.convolutions`); they may round differently than in a direct call of `run`. Before the
first use of JAX, configure one CPU device per core:

    jax.config.update("jax_num_cpu_devices", os.cpu_count())

If `jax.distributed` is initialised, every process must make the same call. The runs are distributed
over the devices of all processes, and every process gets all results.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from soap_jax import convolutions, grids

__all__ = [
    "Point",
    "Run",
    "grid",
    "sweep",
]

Run = Callable[..., chex.ArrayTree]
"""A function `(seed, learning_rate, period, *args) -> results` of int32, float32 and int32 scalars
and the `args` of `sweep`; the results are a tree of arrays."""


class Point(NamedTuple):
    """One run of a sweep."""

    seed: int
    learning_rate: float
    period: int


class Part(NamedTuple):
    """The results of one call of the program.

    Attributes:
        indices: the indices of its points, in order.
        results: their results as NumPy arrays with a leading axis `(len(indices),)`.
    """

    indices: list[int]
    results: chex.ArrayTree


def sweep(
    run: Run,
    *,
    seeds: int | Sequence[int],
    learning_rates: Sequence[float],
    periods: Sequence[int] = (1,),
    args: tuple[chex.ArrayTree, ...] = (),
    chunk_size: int | None = None,
    memory_limit: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> chex.ArrayTree:
    """Runs every combination of period, learning rate and seed.

    Args:
        run: `(seed, learning_rate, period, *args) -> results`, hashable like any function. It is
            traced only once, also for several sweeps (more often with a memory limit), so it must
            not read variables that change. JAX keeps it in memory, with its closure, until
            `jax.clear_caches()`: pass data as `args`.
        seeds: the number of seeds, counted from 0; or the seeds themselves.
        learning_rates: positive numbers.
        periods: integers of at least 1.
        args: arrays that all runs share, such as the data; one copy per device.
        chunk_size: the largest number of runs per device in one call of the program, on
            accelerators the number of runs at once. By default 4 on CPU and 256 elsewhere.
        memory_limit: the largest number of bytes per device for the program's arguments, results
            and temporaries, as counted by the compiler. If needed, chunks become smaller. By
            default four fifths of an accelerator's memory, and no limit on CPU.
        on_progress: called as `on_progress(finished runs, all runs)` after compilation and after
            each call.
        devices: by default all devices.

    Returns:
        The results as NumPy arrays with leading axes `(periods, learning_rates, seeds)`.

    Raises:
        ValueError: if a grid is empty or has a value out of range, or the memory limit is too low
            for one run.

    Example:
        >>> import jax.numpy as jnp
        >>> def run(seed, learning_rate, period):
        ...     return {"value": seed + learning_rate * period}
        >>> sweep(run, seeds=[1, 2], learning_rates=[0.5], periods=[2, 4])["value"].tolist()
        [[[2.0, 3.0]], [[3.0, 4.0]]]
    """
    seeds = grids.as_seeds(seeds)
    points = grid(seeds=seeds, learning_rates=learning_rates, periods=periods)
    parts = iterate(
        run,
        points,
        args=args,
        chunk_size=chunk_size,
        memory_limit=memory_limit,
        on_progress=on_progress,
        devices=devices,
    )
    results = [part.results for part in parts]
    shape = (len(periods), len(learning_rates), len(seeds))

    def join(*leaves):
        return np.concatenate(leaves).reshape(*shape, *leaves[0].shape[1:])

    return jax.tree.map(join, *results)


def grid(
    *,
    seeds: int | Sequence[int],
    learning_rates: Sequence[float],
    periods: Sequence[int] = (1,),
) -> list[Point]:
    """Returns every combination; seeds vary fastest, then learning rates, then periods.

    Raises:
        ValueError: if a grid is empty or has a value out of range.
    """
    seeds = grids.as_seeds(seeds)
    grids.check(seeds=seeds, learning_rates=learning_rates, periods=periods)
    return [
        Point(seed, rate, period) for period in periods for rate in learning_rates for seed in seeds
    ]


def iterate(
    run: Run,
    points: Sequence[Point],
    *,
    args: tuple[chex.ArrayTree, ...] = (),
    done: Collection[int] = (),
    chunk_size: int | None = None,
    memory_limit: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Iterator[Part]:
    """Runs the points in order, and yields the results of each call of the program.

    The points of each call depend on the points, the chunk size and the number of devices, but not
    on `done`. So a resumed sweep gives the same results as an uninterrupted one, bit for bit.

    Args:
        run: as in `sweep`.
        points: from `grid`; points of one period are adjacent.
        args: as in `sweep`.
        done: indices of points not to run again; a call with no other points is skipped.
        chunk_size: as in `sweep`.
        memory_limit: as in `sweep`.
        on_progress: as in `sweep`; runs in `done` count as finished.
        devices: as in `sweep`.

    Yields:
        Parts without the points in `done`.

    Raises:
        ValueError: as in `sweep`.

    Example:
        >>> import jax.numpy as jnp
        >>> points = grid(seeds=[1, 2, 3], learning_rates=[0.5])
        >>> run = lambda seed, rate, period: seed * rate
        >>> for part in iterate(run, points, done=[1], chunk_size=1, devices=jax.devices()[:1]):
        ...     part.indices, part.results.tolist()
        ([0], [0.5])
        ([2], [1.5])
    """
    devices = jax.devices() if devices is None else devices
    if not devices:
        raise ValueError("devices is empty; expected at least one.")
    on_cpu = devices[0].platform == "cpu"
    if chunk_size is None:
        chunk_size = 4 if on_cpu else 256
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected at least 1.")
    if memory_limit is None and not on_cpu:
        memory_limit = 0.8 * (devices[0].memory_stats() or {}).get("bytes_limit", math.inf)
    done = set(done)
    if done.issuperset(range(len(points))):
        return
    mesh = Mesh(np.asarray(devices), ("runs",))
    num = len(devices)
    shard = NamedSharding(mesh, PartitionSpec("runs"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    args = jax.device_put(args, everywhere)
    if jax.process_count() > 1:  # on CPU processes must meet within 30 s: do so before the calls
        _to_host(jax.device_put(np.zeros(num), shard))

    @functools.cache
    def compile_for(room):
        return _compile(run, mesh, room * num, args, one_by_one=on_cpu)

    least = 2 if on_cpu else 1  # XLA for CPU would unroll a loop of length 1
    calls, per_device = calls_of(points, num, chunk_size)
    if memory_limit is not None:
        fitting = _fit(compile_for, memory_limit, least, max(least, per_device))
        calls, per_device = calls_of(points, num, min(fitting, per_device))
    room = max(least, per_device)
    program = compile_for(room)
    finished = len(done)
    if on_progress:
        on_progress(finished, len(points))
    for indices in calls:
        if done.issuperset(indices):
            continue
        # Each device gets every num-th run; free slots repeat a run (on CPU they are skipped).
        slots = [k % num * room + k // num for k in range(len(indices))]
        filled = np.full(room * num, indices[0])
        filled[slots] = indices
        seeds = np.array([points[i].seed for i in filled], np.int32)
        rates = np.array([points[i].learning_rate for i in filled], np.float32)
        counts = np.bincount(np.arange(len(indices)) % num, minlength=num).astype(np.int32)
        period = np.int32(points[indices[0]].period)
        seeds, rates, counts = jax.device_put((seeds, rates, counts), shard)
        results = _to_host(program(seeds, rates, counts, jax.device_put(period, everywhere), *args))
        keep = [k for k, i in enumerate(indices) if i not in done]
        finished += len(keep)
        if on_progress:
            on_progress(finished, len(points))
        kept = operator.itemgetter([slots[k] for k in keep])
        yield Part([indices[k] for k in keep], jax.tree.map(kept, results))


def calls_of(
    points: Sequence[Point], num_devices: int, chunk_size: int
) -> tuple[list[list[int]], int]:
    """The points of each call, with one period per call; and the number of runs per device."""
    by_period: dict[int, list[int]] = {}
    for i, point in enumerate(points):
        by_period.setdefault(point.period, []).append(i)
    most = max(len(indices) for indices in by_period.values())
    num_calls = -(-most // (num_devices * chunk_size))  # integers, since floats may overflow
    per_device = -(-most // (num_devices * num_calls))
    chunk = num_devices * per_device
    return [
        indices[start : start + chunk]
        for indices in by_period.values()
        for start in range(0, len(indices), chunk)
    ], per_device


def _fit(compile_for, memory_limit, least, most) -> int:
    """The largest number of runs per device, from `least` to `most`, within the memory limit."""

    def needed(room):
        memory = compile_for(room).memory_analysis()  # for one device
        return (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )

    too_many = most, needed(most)
    if too_many[1] <= memory_limit:
        return most
    fits = least, needed(least)
    if fits[1] > memory_limit:
        raise ValueError(
            f"memory_limit is {memory_limit:.3g} bytes per device, but the smallest program needs "
            f"{fits[1]:.3g} bytes."
        )
    while too_many[0] - fits[0] > 1:
        # Memory grows about linearly, so the first guess is close.
        share = (memory_limit - fits[1]) / (too_many[1] - fits[1])
        guess = int(fits[0] + share * (too_many[0] - fits[0]))
        guess = min(max(guess, fits[0] + 1), too_many[0] - 1)
        if needed(guess) <= memory_limit:
            fits = guess, needed(guess)
        else:
            too_many = guess, needed(guess)
    return fits[0]


def _to_host(results):
    """Returns all results as NumPy arrays, in every process."""
    if jax.process_count() == 1:
        return jax.device_get(results)
    return multihost_utils.process_allgather(results, tiled=True)


@functools.partial(jax.jit, static_argnames=("run", "mesh", "one_by_one"))
def _program(run, mesh, one_by_one, seeds, rates, counts, period, *args):
    """Computes one chunk of runs, distributed over the devices."""

    def share(seeds, rates, counts, period, *args):
        if not one_by_one:
            return jax.vmap(lambda seed, rate: run(seed, rate, period, *args))(seeds, rates)

        # XLA does not know the loop's length, so the body is compiled, and rounds, in the same way.
        alone = jax.jit(convolutions.as_products(run))  # traced once for both uses
        like = jax.eval_shape(alone, seeds[0], rates[0], period, *args)
        empty = jax.tree.map(lambda leaf: jnp.zeros((len(seeds), *leaf.shape), leaf.dtype), like)

        def add(i, results):
            own = alone(seeds[i], rates[i], period, *args)
            return jax.tree.map(
                lambda all_, leaf: lax.dynamic_update_index_in_dim(all_, leaf, i, 0), results, own
            )

        return lax.fori_loop(0, counts[0], add, empty)

    runs, everywhere = PartitionSpec("runs"), PartitionSpec()
    spread = jax.shard_map(
        share,
        mesh=mesh,
        in_specs=(runs, runs, runs, everywhere, *(everywhere for _ in args)),
        out_specs=runs,
        check_vma=False,  # runs do not communicate
    )
    return spread(seeds, rates, counts, period, *args)


def _compile(run, mesh, chunk, args, *, one_by_one):
    """The program for one chunk of runs; JAX keeps it, so the same sweep compiles only once."""
    runs, everywhere = PartitionSpec("runs"), PartitionSpec()

    def scalars(dtype, shape, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    types = (
        scalars(jnp.int32, (chunk,), runs),
        scalars(jnp.float32, (chunk,), runs),
        scalars(jnp.int32, (mesh.size,), runs),
        scalars(jnp.int32, (), everywhere),
    )
    return _program.lower(run, mesh, one_by_one, *types, *args).compile()
