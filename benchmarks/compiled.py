"""Reads what a compiled program does: products, kernels, copies, collectives, bytes.

    found = facts(jax.jit(step, donate_argnums=0).lower(state, batch).compile(), kernels=shapes)
    found.quiet.launches, found.quiet.copies, found.sync.collectives, found.peak

Nothing runs, so the program may be for a device that is not there. There are separate facts for a
step with a due sync (`sync`) and without (`quiet`). The operations of the sync are in a
conditional, or in a loop of unknown length, that comes from `soap_jax.feedback._sync`.

Products, copies and casts are counted once, as they stand in the program. Launches, FLOPs, bytes,
decisions and collectives are counted as often as they are executed, so a loop counts by its length.
A loop of unknown length outside the sync counts as one round. Of several branches, outside or
inside the sync, the branch with the most work counts.

    product     dot, convolution, or a call of cuBLAS or cuDNN, wherever it stands
    launch      GPU: a kernel or a copy on the device; TPU: an operation on arrays at the top level
    copy        an array of a kernel's size that is written a second time, with the same values, in
                any layout; arrays that TPUs fetch into VMEM and bring back changed do not count
    cast        the same in another dtype
    decision    a predicate, or the condition of a loop of unknown length; on GPU the host waits
    FLOPs       of the products, 2 per multiplication; the zeros of padded convolutions do not count
    bytes       read and written in the device's main memory by every operation at the top level;
                if an operation only takes slices of an operand, only the slices count; XLA's own
                numbers, if there are any, are `reported`
    sent        bytes that each device sends in a ring: for n devices, S bytes: 2 S (n - 1) / n in
                an all-reduce, and half of it in an all-gather or a reduce-scatter
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Literal, NamedTuple

import jax

from benchmarks import hlo, operations

When = Literal["always", "synced", "unsynced"]
"""Whether at every execution, only if syncs are due, or only if they are not due."""


class Kernel(NamedTuple):
    """An operation at the top level.

    Attributes:
        name: of its instruction.
        flops: of its products.
        dtype: of its products' operands, None without.
        nbytes: read and written in main memory.
        times: how often it is executed.
    """

    name: str
    flops: float
    dtype: str | None
    nbytes: float
    times: float


@dataclasses.dataclass(frozen=True)
class Work:
    """The operations of one execution; see the module.

    Attributes:
        products, copies, casts: as they stand in the program.
        kernels: the operations that are launched.
        prefetched: bytes of main memory that TPUs fetch or bring back beside other work.
        collectives: the collective operations, anywhere in the program.
        decisions: how often control flow depends on a value.
    """

    products: int
    copies: int
    casts: int
    kernels: tuple[Kernel, ...] = dataclasses.field(repr=False)
    prefetched: float
    collectives: tuple[operations.Collective, ...] = dataclasses.field(repr=False)
    decisions: float

    @property
    def launches(self) -> float:
        """How many operations are launched."""
        return sum(kernel.times for kernel in self.kernels)

    @property
    def flops(self) -> float:
        """The FLOPs of all products."""
        return sum(kernel.times * kernel.flops for kernel in self.kernels)

    @property
    def nbytes(self) -> float:
        """The bytes read and written in main memory."""
        return self.prefetched + sum(kernel.times * kernel.nbytes for kernel in self.kernels)

    @property
    def sent(self) -> float:
        """The bytes that each device sends."""
        return sum(one.times * one.sent for one in self.collectives)

    def by_kind(self) -> dict[str, tuple[float, float]]:
        """For each kind of collective: the number, and the bytes that each device sends."""
        found: dict[str, tuple[float, float]] = {}
        for one in self.collectives:
            count, sent = found.get(one.kind, (0, 0))
            found[one.kind] = count + one.times, sent + one.times * one.sent
        return found


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts about a compiled program.

    Attributes:
        quiet: what it does if no sync is due.
        sync: what it does if every sync is due.
        conditionals: in the program.
        dynamic_loops: loops in the program whose length XLA does not know.
        arguments: bytes, per device as all that follow.
        results: bytes.
        aliased: bytes of results that are written over arguments: what was donated.
        temporaries: bytes, at their fullest.
        reported: XLA's own FLOPs and bytes, where it has an account (TPU).
    """

    quiet: Work
    sync: Work
    conditionals: int
    dynamic_loops: int
    arguments: int
    results: int
    aliased: int
    temporaries: int
    reported: dict[str, float]

    @property
    def peak(self) -> int:
        """Bytes of arguments, temporaries, and results that are not written over arguments."""
        return self.arguments + self.temporaries + self.results - self.aliased


def facts(compiled: jax.stages.Compiled, kernels: Iterable[tuple[int, ...]] = ()) -> Facts:
    """Reads a compiled program.

    Args:
        compiled: from `jax.jit(...).lower(...).compile()`.
        kernels: the shapes of the kernels. An array has a kernel's size if it has as many elements
            as one of them, in any layout. Also give the shapes of shards.
    """
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    executed = list(_executed(hlo.parse(compiled.as_text())))
    opcodes = collections.Counter(one.instruction.opcode for one in executed)
    loops = [one.instruction for one in executed if one.instruction.opcode == "while"]
    sizes = {math.prod(shape) for shape in kernels}
    return Facts(
        quiet=_work([one for one in executed if one.when != "synced"], sizes, synced=False),
        sync=_work([one for one in executed if one.when != "unsynced"], sizes, synced=True),
        conditionals=opcodes["conditional"],
        dynamic_loops=[operations.trips(loop) for loop in loops].count(None),
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        reported={name: cost[name] for name in ("flops", "bytes accessed") if name in cost},
    )


class _Executed(NamedTuple):
    """An instruction at the top level of what is executed."""

    instruction: hlo.Instruction
    times: float
    when: When


def _executed(
    computation: hlo.Computation, times: float = 1, when: When = "always"
) -> Iterator[_Executed]:
    """All instructions that a computation executes at the top level."""
    for one in computation.instructions.values():
        yield _Executed(one, times, when)
        of_sync = when == "always" and bool(operations.SYNC.search(one.op_name))
        if one.opcode == "while":
            trips = operations.trips(one)
            inner: When = "synced" if of_sync and trips is None else when
            for part in one.called("body", "condition"):
                yield from _executed(part, times * (1 if trips is None else trips), inner)
        elif one.opcode == "conditional":
            branches = one.called()
            most = max(branches, key=_size)
            for branch in branches:
                if of_sync:  # the other one passes feedback on
                    turn: When = "synced" if branch is most else "unsynced"
                    yield from _executed(branch, times, turn)
                else:
                    yield from _executed(branch, times * (branch is most), when)
        elif one.opcode in operations.CONTROL:
            for part in one.called():
                yield from _executed(part, times, when)


def _size(computation):
    """The amount of work: FLOPs and bytes, then instructions."""
    work = _work(list(_executed(computation)), frozenset(), synced=False)
    parts = (one.within() for one in computation.instructions.values())
    return work.flops + work.nbytes, sum(1 for part in parts for _ in part)


def _work(executed: list[_Executed], sizes: Collection[int], *, synced: bool) -> Work:
    """What these do in an execution in which syncs are due or not."""
    products, prefetched, decisions = 0, 0.0, 0.0
    kernels, found, rewritten = [], {}, collections.Counter[str]()
    for one, times, when in executed:
        if one.opcode == "conditional":
            decisions += times
        elif one.opcode == "while" and operations.trips(one) is None:
            decisions += times * (1 + synced)  # before and after its round
        rewritten.update(operations.rewritten(one, sizes, synced=synced))
        for identity, part, kind in operations.collectives(one):
            value = operations.collective(part, kind, times, synced=when == "synced")
            found.setdefault(identity, value)
        nbytes = operations.traffic(one)
        if operations.is_prefetch(one):
            prefetched += times * nbytes
        elif operations.launches(one):
            own = list(operations.products(one))
            products += len(own)
            dtypes = [part.operands[0].arrays[0].dtype for part in own]
            widest = max(dtypes, default=None, key=lambda name: hlo.Array(name, ()).nbytes)
            flops = sum(map(operations.flops, own))
            kernels.append(Kernel(one.name, flops, widest, nbytes, times))
    copies, casts = rewritten["copy"], rewritten["cast"]
    sent = tuple(found.values())
    return Work(products, copies, casts, tuple(kernels), prefetched, sent, decisions)
