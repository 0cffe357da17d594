"""Compiled programs as values: XLA's text (`compiled.as_text()`), read into instructions.

    program = parse(compiled.as_text())
    for instruction in program.entry.instructions.values():
        instruction.opcode, instruction.arrays, instruction.operands
        program.called(instruction, "calls")

Only what `benchmarks.compiled` asks for is read: types, operands, called computations, attributes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of one array.

    Attributes:
        dtype: in XLA's words, such as "f32" or "bf16".
        shape: its axes.
        space: the memory it lies in: 0 is the device's main memory; on TPU 1 is VMEM.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes, without padding."""
        bits = BITS.get(self.dtype)
        if bits is None:  # the first number in f32, bf16, s4, f8e4m3fn, c64
            bits = int(re.search(r"\d+", self.dtype)[0])
        return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique within its program.
        opcode: such as "fusion".
        arrays: of its result, a tuple's in their order, however deep.
        operands: names of instructions of the same computation.
        inside: what stands between the operands' parentheses, as it is written.
        attributes: what follows, as it is written.
        root: whether it is its computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str
    root: bool

    @property
    def nbytes(self) -> int:
        """The bytes of its result."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced function: "jit(step)/jit(_sync)/cond"."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def calls(self) -> dict[str, tuple[str, ...]]:
        """The computations that it names, by attribute: `{"body": ("region_0.1",)}`."""
        found = _CALLS.findall(self.attributes)
        return {role: tuple(_NAME.findall(names)) for role, names in found}

    def attribute(self, name: str) -> str | None:
        """The value of an attribute without spaces or commas, or within braces or brackets."""
        value = rf"\b{name}=(\{{[^}}]*\}}|\[[^\]]*\][^,\s]*|\"[^\"]*\"|[^,\s]+)"
        found = re.search(value, self.attributes)
        return found[1].strip('"') if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation: its instructions by name, in their order."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction that makes the result."""
        return next(one for one in self.instructions.values() if one.root)

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """The names of its parameters, by number."""
        found = (one for one in self.instructions.values() if one.opcode == "parameter")
        return {int(one.inside): one.name for one in found}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that use one, by its name."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for one in self.instructions.values():
            for operand in dict.fromkeys(one.operands):
                found[operand].append(one)
        return found

    def operand(self, instruction: Instruction, i: int) -> Instruction:
        """The i-th operand of one of its instructions."""
        return self.instructions[instruction.operands[i]]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: its computations by name, of which one is the entry."""

    computations: dict[str, Computation]
    entry: Computation

    def called(self, instruction: Instruction, *roles: str) -> list[Computation]:
        """The computations that an instruction names in these attributes."""
        names = (name for role in roles for name in instruction.calls.get(role, ()))
        return [self.computations[name] for name in names]

    def within(self, instruction: Instruction) -> Iterator[Instruction]:
        """An instruction, and all of the computations that it calls, however deep."""
        yield instruction
        for computation in self.called(instruction, *instruction.calls):
            for one in computation.instructions.values():
                yield from self.within(one)


_NAME = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|"
    r"called_computations)=(%[\w.\-]+|\{[^}]*\})"
)
_HEAD = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?")


def parse(text: str) -> Program:
    """Reads a compiled program.

    Raises:
        ValueError: if the text has no entry, as what is not XLA's has none.
    """
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = Computation(head[2], {})
            computations[current.name] = current
            entry = current if head[1] else entry
        elif current is not None and (found := _LINE.match(line)):
            one = _instruction(found[2], found[3], root=bool(found[1]))
            current.instructions[one.name] = one
        elif line.startswith("}"):
            current = None
    if entry is None:
        raise ValueError(
            f"the text has no ENTRY; expected what compiled.as_text() returns, not {text[:80]!r}."
        )
    return Program(computations, entry)


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type as it is written.

    Example:
        >>> arrays("(f32[2,3]{1,0:T(8,128)S(1)}, /*index=1*/s32[])")[0]
        Array(dtype='f32', shape=(2, 3), space=1)
    """
    found = []
    for dtype, axes, layout in _ARRAY.findall(text):
        shape = tuple(int(axis.removeprefix("<=")) for axis in axes.split(",") if axis)
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(dtype, shape, int(space[1]) if space else 0))
    return tuple(found)


def _instruction(name, rest, *, root):
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    inside = rest[:end]
    operands = () if opcode in ("constant", "parameter") else tuple(_NAME.findall(inside))
    return Instruction(name, opcode, arrays(type_), operands, inside, rest[end + 1 :], root)


def _closing(text):
    """Where the parenthesis closes with which a text begins."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i
    raise ValueError(f"a parenthesis does not close in {text[:80]!r}.")
