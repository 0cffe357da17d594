"""What one operation of a compiled program does: its products, bytes, copies and collectives.

`benchmarks.compiled` uses this for whole programs, and explains the terms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

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


class Collective(NamedTuple):
    """A collective operation.

    Attributes:
        kind: such as "all-reduce".
        nbytes: of the array where it is whole, on each device.
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
        """The bytes that each device sends in a ring, each time."""
        if self.kind.startswith("collective-"):
            return self.nbytes
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.nbytes * (self.devices - 1) / self.devices


def launches(one: hlo.Instruction) -> bool:
    """Whether it is an operation that is launched, a prefetch excepted."""
    if one.opcode in (*NOTHING, *CONTROL) or one.opcode.endswith("-done"):
        return False
    if is_prefetch(one) or _is_free_call(one):
        return False
    if one.opcode in ("fusion", "copy", "custom-call") or _kind(one):
        return True
    return any(array.size > 1 for array in one.arrays)  # otherwise it is for a TPU's scalar core


def is_prefetch(one: hlo.Instruction) -> bool:
    """Whether it moves data between memories, as TPUs fetch what they work on."""
    if one.opcode not in ("copy", "copy-start", "slice-start"):
        return False
    return _results(one)[0].space != one.operands[0].arrays[0].space


def trips(loop: hlo.Instruction) -> int | None:
    """The number of iterations of a loop, or None if it depends on a value."""
    if found := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(found[1])
    (condition,) = loop.called("condition")
    if condition.root.opcode != "compare" or condition.root.attribute("direction") != "LT":
        return None
    start, end = (_constant(one, loop) for one in condition.root.operands)
    return None if start is None or end is None else end - start  # JAX counts one by one


def _constant(one, loop) -> int | None:
    """The value of an instruction of a loop's condition before the loop, if it is written."""
    while one.opcode in ("copy", "bitcast"):
        one = one.operands[0]
    if one.opcode == "constant" and one.inside.isdigit():
        return int(one.inside)
    carried = loop.operands[0]
    if one.opcode == "get-tuple-element" and one.home is not loop.home and carried.operands:
        return _constant(carried.operands[int(one.attribute("index") or 0)], loop)
    return None


# Collectives


def collectives(one: hlo.Instruction) -> Iterator[tuple[object, hlo.Instruction, str]]:
    """The collectives that it is, or that are fused into it: identity, instruction and kind.

    TPUs divide some collectives into pieces, fused with other work; pieces share a chain.
    """
    for part in one.within() if one.opcode == "fusion" else [one]:
        if kind := _kind(part):
            chain = re.search(r'chain_id="(\d+)"', part.attributes)
            pieces = part.attribute("channel_id"), chain and chain[1]
            yield part.name if part is one else pieces, part, kind


def collective(one: hlo.Instruction, kind: str, times: float, *, synced: bool) -> Collective:
    """An instruction that is a collective, as a value."""
    arrays = one.arrays
    if one.opcode == "all-gather-start":
        arrays = arrays[len(one.operands) :]  # operands come first
    elif one.opcode == "collective-permute-start":
        arrays = arrays[:1]
    devices = _devices(one)
    nbytes = sum(array.nbytes for array in arrays) * (devices if kind == "reduce-scatter" else 1)
    return Collective(kind, nbytes, devices, times, synced or bool(SYNC.search(one.op_name)))


def _kind(one) -> str | None:
    kind = one.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def _devices(one) -> int:
    """How many take part: `{{0,1},{2,3}}`, `[2,2]<=[4]` or `mesh['x'=2,'y'=2] {'x'}`."""
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


# Copies and casts


def rewritten(one: hlo.Instruction, sizes: Collection[int], *, synced: bool) -> list[str]:
    """For each result that is an operand written again: "copy", or "cast" if its dtype changes.

    Args:
        one: the instruction.
        sizes: how many elements an array must have to count.
        synced: whether syncs are due; otherwise a sync does not change what passes through it.
    """
    ways: list[list[str]] = []
    if one.opcode in ("copy", "copy-start"):
        fetched = is_prefetch(one) and (_results(one)[0].space or not _was_fetched(one, synced))
        ways = [[] if fetched else ["copy"]]
    elif one.opcode in ("convert", "transpose"):
        ways = [[one.opcode]]
    elif one.opcode == "fusion":
        ways = [_way(end) or [] for end in one.called("calls")[0].results]
    return [
        "cast" if "convert" in way else "copy"
        for way, array in zip(ways, _results(one), strict=False)
        if array.size in sizes and set(way) - {"bitcast"}
    ]


def _was_fetched(one, synced):
    """Whether TPUs bring arrays back to main memory as they fetched them, unchanged."""
    source = one.operands[0]
    while not is_prefetch(source):
        loop = source.operands and source.operands[0]  # of a sync that is not due
        if source.opcode in ("bitcast", "copy-done", "slice-done") or _is_free_call(source):
            source = source.operands[0]
        elif source.opcode == "get-tuple-element" and not synced and _is_sync_loop(loop):
            source = loop.operands[0].operands[int(source.attribute("index"))]
        else:
            return False
    return True


def _is_sync_loop(one):
    return one.opcode == "while" and bool(SYNC.search(one.op_name)) and trips(one) is None


def _way(one) -> list[str] | None:
    """The opcodes from a parameter to an instruction, if only layout and dtype change."""
    way: list[str] = []
    while one.opcode in (*LAYOUT, "convert", "fusion"):
        if one.opcode == "fusion":
            within = _way(one.called("calls")[0].root)
            if within is None or len(one.operands) != 1:
                return None
            way += within
        else:
            way.append(one.opcode)
        one = one.operands[0]
    return way if one.opcode == "parameter" else None


# Bytes


def traffic(one: hlo.Instruction) -> float:
    """The bytes that it reads and writes in main memory; not those of collectives."""
    if one.opcode in (*NOTHING, *CONTROL) or one.opcode.endswith("-done") or _kind(one):
        return 0
    if one.opcode in ("copy-start", "slice-start"):
        source, result = one.operands[0].arrays[0], _results(one)[0]
        return result.nbytes * ((not source.space) + (not result.space))
    if one.opcode == "fusion":
        (inner,) = one.called("calls")
        pairs = zip(one.operands, inner.parameters, strict=True)
        read = sum(_read(own) for operand, own in pairs if not operand.arrays[0].space)
        return read + _written(one, inner)
    if one.opcode in SLICES:
        return 2 * _in_memory(one)
    if one.opcode == "dynamic-update-slice":
        return 2 * one.operands[1].nbytes
    return _in_memory(one) + sum(map(_in_memory, dict.fromkeys(one.operands)))


def _read(parameter) -> float:
    """The bytes that a fused computation reads of a parameter: slices, or all."""
    read = 0.0
    for user in parameter.users:
        first = user.operands[0] is parameter
        in_place = user.opcode == "dynamic-update-slice" and first
        if in_place or user.opcode == "tuple" or _kind(user):
            continue  # passed on
        if user.opcode == "bitcast":
            read += _read(user)
        elif user.opcode in SLICES and first:
            read += user.nbytes
        elif user.opcode == "fusion":
            pairs = zip(user.operands, user.called("calls")[0].parameters, strict=True)
            read += max(_read(own) for operand, own in pairs if operand is parameter)
        else:
            read = math.inf
    return min(read, parameter.nbytes)


def _written(one, inner) -> float:
    """The bytes that a fusion writes: of what is updated in place, the updates."""
    written = 0
    for end, array in zip(inner.results, one.arrays, strict=False):
        while end.opcode == "bitcast":
            end = end.operands[0]
        if array.space or end.opcode == "parameter" or _kind(end):
            continue
        updates = end.opcode == "dynamic-update-slice"
        written += end.operands[1].nbytes if updates else array.nbytes
    return written


def _results(one):
    """The arrays that an instruction makes, without those that an asynchronous start passes on."""
    if one.opcode == "copy-start":
        return one.arrays[:1]
    return one.arrays[1:2] if one.opcode == "slice-start" else one.arrays


def _in_memory(one):
    return sum(array.nbytes for array in one.arrays if not array.space)


def _is_free_call(one):
    return one.opcode == "custom-call" and one.attribute("custom_call_target") in FREE_CALLS


# Products


def products(one: hlo.Instruction) -> Iterator[hlo.Instruction]:
    """The products that it is, or that are fused into it."""
    for part in one.within() if one.opcode == "fusion" else [one]:
        target = part.attribute("custom_call_target") if part.opcode == "custom-call" else ""
        if part.opcode in ("dot", "convolution") or re.match("__cublas|__cudnn", target or ""):
            yield part


def flops(one: hlo.Instruction) -> float:
    """The FLOPs of a product: two per multiplication of numbers that are not padding."""
    left, right = one.operands[0].arrays[0], one.operands[1].arrays[0]
    if labels := one.attribute("dim_labels"):
        of_cudnn = one.opcode == "custom-call"
        return (_flops_of_cudnn if of_cudnn else _flops_of_convolution)(one, left, right, labels)
    axes = one.attribute("lhs_contracting_dims")
    if axes is None:  # cuBLAS
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.attributes)
        axes = found[1] if found else ""
    contracted = (left.shape[int(axis)] for axis in re.findall(r"\d+", axes))
    return 2.0 * one.arrays[0].size * math.prod(contracted)


def _flops_of_convolution(one, left, right, labels):
    of_left, of_right, of_result = re.match(r"(\w+)_(\w+)->(\w+)", labels).groups()
    result, pairs = one.arrays[0], 1
    spatial = sorted(label for label in of_left if label.isdigit())
    window = dict(re.findall(r"(\w+)=([^\s}]+)", one.attribute("window") or ""))

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
    """As the forward convolution that it is, or whose gradient it is."""
    target, result = one.attribute("custom_call_target") or "", one.arrays[0]
    output, kernel = result, right
    if "BackwardInput" in target:
        output = left
    elif "BackwardFilter" in target:
        output, kernel = right, result
    of_kernel = labels.split("_")[1].split("->")[0]
    return 2.0 * output.size * kernel.size / kernel.shape[of_kernel.index("o")]
