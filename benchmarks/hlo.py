"""Compiled programs as values: reads XLA's text (`compiled.as_text()`) into instructions.

    program = parse(compiled.as_text())
    for one in program.entry.instructions.values():
        one.opcode, one.arrays, one.operands, one.called("calls")

It reads only what `benchmarks.compiled` needs: types, operands, called computations, attributes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_NAME = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|"
    r"called_computations)=(%[\w.\-]+|\{[^}]*\})"
)
_HEAD = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of one array.

    Attributes:
        dtype: in XLA's words, such as "f32" or "bf16".
        shape: its axes.
        space: its memory: 0 is the device's main memory; on TPU 1 is VMEM.
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
        bits = _BITS.get(self.dtype)
        if bits is None:  # the first number in f32, bf16, s4, f8e4m3fn, c64
            bits = int(re.search(r"\d+", self.dtype)[0])
        return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique within its program.
        opcode: such as "fusion".
        arrays: of its result; of a tuple in order, at any depth.
        inside: the text between the parentheses of the operands.
        attributes: the text that follows.
        root: whether it is its computation's result.
        home: the computation that it stands in.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    inside: str
    attributes: str
    root: bool
    home: Computation = dataclasses.field(repr=False)

    @functools.cached_property
    def operands(self) -> tuple[Instruction, ...]:
        """The instructions that make its operands."""
        if self.opcode in ("constant", "parameter"):
            return ()
        return tuple(self.home.instructions[name] for name in _NAME.findall(self.inside))

    @property
    def users(self) -> list[Instruction]:
        """The instructions that have it as an operand."""
        return self.home.users[self.name]

    @property
    def nbytes(self) -> int:
        """The bytes of its result."""
        return sum(array.nbytes for array in self.arrays)

    @functools.cached_property
    def op_name(self) -> str:
        """Where it comes from in the traced function: "jit(step)/jit(_sync)/cond"."""
        return self.attribute("op_name") or ""

    def attribute(self, name: str) -> str | None:
        """The value of an attribute: quoted, in braces or brackets, or up to the next comma."""
        value = r'\{[^}]*\}|\[[^\]]*\][^,\s]*|"[^"]*"|[^,\s}]+'
        found = re.search(rf"\b{name}=({value})", self.attributes)
        return found[1].strip('"') if found else None

    def called(self, *roles: str) -> list[Computation]:
        """The computations that these attributes name; without attributes, all that it names."""
        return [
            self.home.program[name]
            for role, names in _CALLS.findall(self.attributes)
            if not roles or role in roles
            for name in _NAME.findall(names)
        ]

    def within(self) -> Iterator[Instruction]:
        """The instruction, and all of the computations that it calls, at any depth."""
        yield self
        for computation in self.called():
            for one in computation.instructions.values():
                yield from one.within()


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """A computation.

    Attributes:
        name: unique within its program.
        instructions: by name, in their order.
        program: all computations of its program by name.
    """

    name: str
    instructions: dict[str, Instruction] = dataclasses.field(repr=False)
    program: dict[str, Computation] = dataclasses.field(repr=False)

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction that makes the result."""
        return next(one for one in self.instructions.values() if one.root)

    @property
    def results(self) -> tuple[Instruction, ...]:
        """The instructions that make the result's parts."""
        return self.root.operands if self.root.opcode == "tuple" else (self.root,)

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """Its parameters, by number."""
        found = (one for one in self.instructions.values() if one.opcode == "parameter")
        return sorted(found, key=lambda one: int(one.inside))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that use one, by its name."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for one in self.instructions.values():
            for operand in dict.fromkeys(one.operands):
                found[operand.name].append(one)
        return found


def parse(text: str) -> Computation:
    """Reads a compiled program; returns its entry.

    Raises:
        ValueError: if the text has no entry, so it is not from XLA.
    """
    program: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = program[head[2]] = Computation(head[2], {}, program)
            entry = current if head[1] else entry
        elif current is not None and (found := _LINE.match(line)):
            root, name, rest = found.groups()
            current.instructions[name] = _instruction(name, rest, bool(root), current)
        elif line.startswith("}"):
            current = None
    if entry is None:
        raise ValueError(
            f"the text has no ENTRY; expected what compiled.as_text() returns, not {text[:80]!r}."
        )
    return entry


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type in XLA's text.

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


def _instruction(name, rest, root, home):
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    return Instruction(name, opcode, arrays(type_), rest[:end], rest[end + 1 :], root, home)


def _closing(text):
    """The position of the parenthesis that closes the one at the start of a text."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i
    raise ValueError(f"a parenthesis does not close in {text[:80]!r}.")
