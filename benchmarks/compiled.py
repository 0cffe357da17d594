"""What a compiled program does, read from it: products, kernels, copies, collectives, bytes.

    found = facts(jax.jit(step, donate_argnums=0).lower(state, batch).compile(), kernels=shapes)
    found.quiet.launches, found.quiet.copies, found.sync.collectives, found.peak

Nothing runs, so the program may be for a device that is not there. A step with a sync that has its
turn and one without are told apart: `sync` and `quiet`. What belongs to the sync stands in a
conditional, or in a loop whose length XLA does not know, that comes from `soap_jax.feedback._sync`.

Counted as they stand in the program, each once: products, copies, casts. Counted as often as they
are executed, a loop's length times: launches, FLOPs, bytes, decisions, collectives. A loop of
unknown length outside the sync counts as one round; of branches outside the sync, and within it,
the one with most to do counts.

    product     dot, convolution, or a call of cuBLAS or cuDNN, wherever it stands
    launch      GPU: a kernel or a copy on the device; TPU: an operation on arrays at the top level
    copy        an array of a kernel's size that is written a second time, unchanged but for layout;
                what TPUs fetch into their fast memory (VMEM), and bring back changed, is none
    cast        the same in another dtype
    decision    a predicate, or the condition of a loop of unknown length; on GPU the host waits
    FLOPs       of the products, 2 per multiplication; zeros that convolutions pad with do not count
    bytes       read and written in the device's main memory by every operation at the top level:
                of operands that it only takes slices of, these; XLA's own account, where it has
                one, is `reported`
    sent        bytes that each device sends in a ring: of n devices and S bytes, 2 S (n - 1) / n in
                an all-reduce, half of that in an all-gather or a reduce-scatter
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import jax
import numpy as np

from benchmarks import hlo

SYNC = re.compile(r"\b_sync\b")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
               "collective-permute", "collective-broadcast")  # fmt: skip
CONTROL = ("while", "conditional", "call", "async-start")
NOTHING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
           "opt-barrier", "domain", "partition-id", "replica-id", "add-dependency",
           "async-update")  # fmt: skip
FREE_CALLS = ("ConcatBitcast", "AllocateBuffer")
LAYOUT = ("bitcast", "copy", "transpose", "reshape")
SLICES = ("slice", "dynamic-slice", "gather")


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


class Collective(NamedTuple):
    """A collective operation.

    Attributes:
        kind: such as "all-reduce".
        nbytes: of the whole array, where it is whole, per device.
        devices: how many take part.
        times: how often it is executed.
        of_sync: whether it comes from a sync, by its place or its name.
    """

    kind: str
    nbytes: int
    devices: int
    times: float
    of_sync: bool

    @property
    def sent(self) -> float:
        """The bytes that each device sends, each time."""
        if self.kind.startswith("collective-"):
            return self.nbytes
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.nbytes * (self.devices - 1) / self.devices


@dataclasses.dataclass(frozen=True)
class Work:
    """What one execution does; see the module.

    Attributes:
        products, copies, casts: as they stand in the program.
        kernels: the operations that are launched.
        prefetched: bytes of main memory that TPUs fetch or bring back beside other work.
        collectives: those, wherever they stand.
        decisions: how often control flow depends on a value.
    """

    products: int
    copies: int
    casts: int
    kernels: tuple[Kernel, ...] = dataclasses.field(repr=False)
    prefetched: float
    collectives: tuple[Collective, ...] = dataclasses.field(repr=False)
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
        """Per kind of collective: how many, and the bytes that each device sends."""
        found: dict[str, tuple[float, float]] = {}
        for one in self.collectives:
            count, sent = found.get(one.kind, (0, 0))
            found[one.kind] = count + one.times, sent + one.times * one.sent
        return found


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a compiled program is.

    Attributes:
        quiet: what it does when no sync has its turn.
        sync: what it does when every sync has.
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
        kernels: the shapes of the kernels. An array is of a kernel's size that has as many elements
            as one of them, so that it is found in any layout. Give a shard's shape, too.
    """
    program = hlo.parse(compiled.as_text())
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    reading = _Reading(program, frozenset(math.prod(shape) for shape in kernels))
    executed = list(reading.executed(program.entry))
    opcodes = collections.Counter(one.instruction.opcode for one in executed)
    loops = [one for one in executed if one.instruction.opcode == "while"]
    return Facts(
        quiet=reading.work([one for one in executed if one.when != "synced"]),
        sync=reading.work([one for one in executed if one.when != "unsynced"], synced=True),
        conditionals=opcodes["conditional"],
        dynamic_loops=sum(reading.trips(one.instruction, one.computation) is None for one in loops),
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        reported={name: cost[name] for name in ("flops", "bytes accessed") if name in cost},
    )


class _Executed(NamedTuple):
    """An instruction at the top level of what is executed."""

    instruction: hlo.Instruction
    computation: hlo.Computation
    times: float
    when: Literal["always", "synced", "unsynced"]


@dataclasses.dataclass(frozen=True)
class _Reading:
    """A program, and the sizes of its kernels."""

    program: hlo.Program
    sizes: frozenset[int]

    def executed(self, computation, times=1.0, when="always") -> Iterator[_Executed]:
        """All that is executed at the top level, from a computation on."""
        for one in computation.instructions.values():
            yield _Executed(one, computation, times, when)
            of_sync = when == "always" and bool(SYNC.search(one.op_name))
            if one.opcode == "while":
                trips = self.trips(one, computation)
                inner = "synced" if of_sync and trips is None else when
                for part in self.program.called(one, "body", "condition"):
                    yield from self.executed(part, times * (trips or 1), inner)
            elif one.opcode == "conditional":
                yield from self._branches(one, times, when, of_sync)
            elif one.opcode in CONTROL:
                for part in self.program.called(one, "to_apply", "calls", "called_computations"):
                    yield from self.executed(part, times, when)

    def _branches(self, one, times, when, of_sync):
        roles = "true_computation", "false_computation", "branch_computations"
        branches = self.program.called(one, *roles)
        most = max(branches, key=lambda branch: self._size(branch))
        for branch in branches:
            if of_sync:  # the other one hands feedback on
                yield from self.executed(branch, times, "synced" if branch is most else "unsynced")
            else:
                yield from self.executed(branch, times * (branch is most), when)

    def _size(self, computation):
        """How much there is to do: FLOPs and bytes, then instructions."""
        work = self.work(list(self.executed(computation)))
        within = (self.program.within(one) for one in computation.instructions.values())
        return work.flops + work.nbytes, sum(1 for _ in itertools.chain.from_iterable(within))

    def trips(self, loop, computation) -> int | None:
        """How often a loop runs, or None where that depends on a value."""
        if found := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(found[1])
        (condition,) = self.program.called(loop, "condition")
        root, outer = condition.root, computation
        start = outer.operand(loop, 0)
        if root.opcode != "compare" or root.attribute("direction") != "LT":
            return None

        def constant(computation, one):
            while one.opcode in ("copy", "bitcast"):
                one = computation.operand(one, 0)
            if one.opcode == "constant" and one.inside.isdigit():
                return int(one.inside)
            if one.opcode == "get-tuple-element" and computation is condition:
                place = int(one.attribute("index") or 0)
                carried = start.operands[place] if start.opcode == "tuple" else start.name
                return constant(outer, outer.instructions[carried])
            return None

        low, high = (constant(condition, condition.operand(root, i)) for i in (0, 1))
        return None if low is None or high is None else high - low  # JAX counts one by one

    def work(self, executed: list[_Executed], *, synced: bool = False) -> Work:
        """What these do, in an execution in which syncs have their turn or not."""
        copies = casts = products = 0
        prefetched = decisions = 0.0
        kernels, found = [], {}
        for one, computation, times, when in executed:
            if one.opcode == "conditional":
                decisions += times
            elif one.opcode == "while" and self.trips(one, computation) is None:
                decisions += times * (1 + synced)  # before and after its round
            if one.opcode in CONTROL:
                continue
            inside = [one] if one.opcode in NOTHING else list(self.program.within(one))
            for part in inside:
                if collective := _collective(part, times, when):
                    found.setdefault(part.name if part is one else _chain(part), collective)
            nbytes = self._traffic(one, computation)
            copies += self._copies(one, computation)
            casts += self._casts(one, computation)
            if _moves(one, computation):
                prefetched += times * nbytes
            elif _launches(one):
                flops, dtypes = 0.0, set()
                for part, home in self._products(one, computation):
                    products += 1
                    flops += _flops(part, home)
                    dtypes.add(home.operand(part, 0).arrays[0].dtype)
                dtype = max(dtypes, default=None, key=lambda name: hlo.Array(name, ()).nbytes)
                kernels.append(Kernel(one.name, flops, dtype, nbytes, times))
        collectives = tuple(found.values())
        return Work(products, copies, casts, tuple(kernels), prefetched, collectives, decisions)

    def _products(self, one, computation):
        """The products within, each with its computation."""
        if _is_product(one):
            yield one, computation
        elif one.opcode == "fusion":
            for part in self.program.called(one, "calls"):
                for inner in part.instructions.values():
                    yield from self._products(inner, part)

    # Copies and casts

    def _copies(self, one, computation):
        return sum(not casts for casts, array in self._handed_on(one, computation))

    def _casts(self, one, computation):
        return sum(casts for casts, array in self._handed_on(one, computation))

    def _handed_on(self, one, computation) -> list[tuple[bool, hlo.Array]]:
        """Results of a kernel's size that are an operand written again: whether cast, and which."""
        results, ways = _results(one), []
        if one.opcode in ("copy", "copy-start"):
            moved = _moves(one, computation)
            ways = [[] if moved and not self._fetched(one, computation) else ["copy"]]
        elif one.opcode in ("convert", "transpose"):
            ways = [[one.opcode]]
        elif one.opcode == "fusion":
            (inner,) = self.program.called(one, "calls")
            root = inner.root
            ends = root.operands if root.opcode == "tuple" else (root.name,)
            ways = [self._way(inner, inner.instructions[end]) or [] for end in ends]
        return [
            ("convert" in way, array)
            for way, array in zip(ways, results, strict=False)
            if array.size in self.sizes and set(way) - {"bitcast", "parameter"}
        ]

    def _fetched(self, one, computation):
        """Whether what TPUs bring back to main memory is what they fetched, unchanged."""
        if _results(one)[0].space:
            return False
        source = computation.operand(one, 0)
        while source.opcode in ("bitcast", "copy-done"):
            source = computation.operand(source, 0)
        return source.opcode in ("copy", "copy-start") and _moves(source, computation)

    def _way(self, computation, one) -> list[str] | None:
        """The opcodes from a parameter to an instruction, if only layout and dtype change."""
        way = []
        while one.opcode in (*LAYOUT, "convert", "fusion"):
            if one.opcode == "fusion":
                (inner,) = self.program.called(one, "calls")
                within = self._way(inner, inner.root)
                if within is None or len(one.operands) != 1:
                    return None
                way += within
            else:
                way.append(one.opcode)
            one = computation.operand(one, 0)
        return [*way, "parameter"] if one.opcode == "parameter" else None

    # Bytes

    def _traffic(self, one, computation):
        """The bytes that it reads and writes in main memory."""
        if one.opcode in NOTHING or one.opcode in CONTROL or one.opcode.endswith("-done"):
            return 0
        if _kind(one):
            return 0  # what collectives send is counted apart
        if one.opcode in ("copy-start", "slice-start"):
            source = computation.operand(one, 0).arrays[0]
            (result,) = _results(one)
            return result.nbytes * ((not source.space) + (not result.space))
        if one.opcode == "fusion":
            (inner,) = self.program.called(one, "calls")
            read = sum(
                self._read(inner, name)
                for i, name in inner.parameters.items()
                if not computation.operand(one, i).arrays[0].space
            )
            return read + self._written(one, inner)
        if one.opcode in SLICES:
            return 2 * _in_memory(one)
        if one.opcode == "dynamic-update-slice":
            return 2 * computation.operand(one, 1).nbytes
        operands = (computation.instructions[name] for name in dict.fromkeys(one.operands))
        return _in_memory(one) + sum(map(_in_memory, operands))

    def _read(self, computation, name):
        """The bytes that a fused computation reads of a parameter: slices, or all."""
        array = computation.instructions[name].arrays
        read = 0
        for user in computation.users[name]:
            first = user.operands[0] == name
            if user.opcode == "tuple" or _kind(user):
                continue  # handed on in place
            if user.opcode == "bitcast":
                part = self._read(computation, user.name)
            elif user.opcode in SLICES and first:
                part = user.nbytes
            elif user.opcode == "dynamic-update-slice" and first:
                part = 0
            elif user.opcode == "fusion":
                (inner,) = self.program.called(user, "calls")
                own = [inner.parameters[i] for i, of in enumerate(user.operands) if of == name]
                part = max(self._read(inner, parameter) for parameter in own)
            else:
                part = math.inf
            read += part
        return min(read, sum(one.nbytes for one in array))

    def _written(self, one, inner):
        """The bytes that a fusion writes: of what is updated in place, the updates."""
        root = inner.root
        ends = root.operands if root.opcode == "tuple" else (root.name,)
        written = 0
        for end, array in zip(ends, one.arrays, strict=False):
            source = inner.instructions[end]
            while source.opcode == "bitcast":
                source = inner.operand(source, 0)
            if array.space or source.opcode == "parameter" or _kind(source):
                continue
            updates = source.opcode == "dynamic-update-slice"
            written += inner.operand(source, 1).nbytes if updates else array.nbytes
        return written


def _kind(one) -> str | None:
    """Which collective it is, or starts."""
    kind = one.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def _collective(one, times, when):
    kind = _kind(one)
    if not kind:
        return None
    arrays = one.arrays
    if one.opcode == "all-gather-start":
        arrays = arrays[len(one.operands) :]  # operands come first
    elif one.opcode == "collective-permute-start":
        arrays = arrays[:1]
    devices = _group(one)
    nbytes = sum(array.nbytes for array in arrays) * (devices if kind == "reduce-scatter" else 1)
    of_sync = when == "synced" or bool(SYNC.search(one.op_name))
    return Collective(kind, nbytes, devices, times, of_sync)


def _chain(one) -> tuple[str | None, ...]:
    """What the pieces share into which TPUs divide a collective, each fused with other work."""
    chain = re.search(r'chain_id="(\d+)"', one.attributes)
    return one.attribute("channel_id"), chain and chain[1]


def _group(one) -> int:
    """How many devices take part: `{{0,1},{2,3}}`, `[2,2]<=[4]` or `mesh['x'=2,'y'=2] {'x'}`."""
    text = one.attributes
    if found := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", text):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return 2 if "source_target_pairs" in text else 1


def _results(one):
    """The arrays that an instruction makes, without what an asynchronous start hands on."""
    if one.opcode == "copy-start":
        return one.arrays[:1]
    return one.arrays[1:2] if one.opcode == "slice-start" else one.arrays


def _in_memory(one):
    return sum(array.nbytes for array in one.arrays if not array.space)


def _moves(one, computation):
    """Whether it moves data between memories, as TPUs fetch what they work on."""
    if one.opcode not in ("copy", "copy-start", "slice-start"):
        return False
    return _results(one)[0].space != computation.operand(one, 0).arrays[0].space


def _launches(one):
    if one.opcode in NOTHING or one.opcode.endswith("-done"):
        return False
    if one.opcode == "custom-call":
        return one.attribute("custom_call_target") not in FREE_CALLS
    if one.opcode in ("fusion", "copy") or _kind(one):
        return True
    return any(array.size > 1 for array in one.arrays)  # else it is for a TPU's scalar core


# Products


def _is_product(one):
    target = one.attribute("custom_call_target") if one.opcode == "custom-call" else ""
    return one.opcode in ("dot", "convolution") or bool(re.match("__cublas|__cudnn", target or ""))


def _flops(one, computation) -> float:
    """Two per multiplication of numbers that are not padding."""
    left, right = (computation.operand(one, i).arrays[0] for i in (0, 1))
    if one.opcode == "dot":
        axes = re.findall(r"\d+", one.attribute("lhs_contracting_dims") or "")
        return 2.0 * one.arrays[0].size * math.prod(left.shape[int(axis)] for axis in axes)
    if labels := one.attribute("dim_labels"):
        if one.opcode == "custom-call":
            return _flops_of_cudnn(one, left, right, labels)
        return _flops_of_convolution(one, left, right, labels)
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.attributes)
    axes = re.findall(r"\d+", found[1]) if found else []
    return 2.0 * one.arrays[0].size * math.prod(left.shape[int(axis)] for axis in axes)


def _flops_of_convolution(one, left, right, labels):
    of_left, of_right, of_result = re.match(r"(\w+)_(\w+)->(\w+)", labels).groups()
    result = one.arrays[0]
    pairs = 1
    spatial = sorted(label for label in of_left if label.isdigit())
    window = dict(re.findall(r"(\w+)=(\S+)", (one.attribute("window") or "").strip("{}")))

    def values(name, default):
        return window[name].split("x") if name in window else [default] * len(spatial)

    for axis, stride, pad, left_dilation, right_dilation in zip(
        spatial, values("stride", "1"), values("pad", "0_0"), values("lhs_dilate", "1"),
        values("rhs_dilate", "1"), strict=True,
    ):  # fmt: skip
        place = np.arange(result.shape[of_result.index(axis)])[:, None] * int(stride)
        place = place + np.arange(right.shape[of_right.index(axis)]) * int(right_dilation)
        place, dilation = place - int(pad.split("_")[0]), int(left_dilation)
        last = (left.shape[of_left.index(axis)] - 1) * dilation
        pairs *= int(((place >= 0) & (place <= last) & (place % dilation == 0)).sum())
    batch, features = (result.shape[of_result.index(label)] for label in "bf")
    return 2.0 * batch * features * right.shape[of_right.index("i")] * pairs


def _flops_of_cudnn(one, left, right, labels):
    """As the forward convolution that it is, or is the gradient of."""
    target, result = one.attribute("custom_call_target") or "", one.arrays[0]
    output, kernel = result, right
    if "BackwardInput" in target:
        output = left
    elif "BackwardFilter" in target:
        output, kernel = right, result
    of_kernel = labels.split("_")[1].split("->")[0]
    return 2.0 * output.size * kernel.size / kernel.shape[of_kernel.index("o")]
