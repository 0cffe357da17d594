"""Checks of the numbers of a sweep, before heavy imports or large allocations."""

from __future__ import annotations

import difflib
import math
import numbers
import reprlib
import struct
from collections.abc import Collection, Sequence

MOST = 2**31 - 1
"""The largest int32, the limit of seeds, steps and periods."""
MOST_RUNS = 10**6
"""The largest number of runs of a study, all of whose names are kept in memory."""


def as_seeds(seeds: int | Sequence[int]) -> Sequence[int]:
    """Returns the seeds 0 to n - 1 for a number n, and given seeds as they are.

    Raises:
        ValueError: if a number of seeds is not an integer from 1 to `MOST_RUNS`.

    Example:
        >>> as_seeds(3), as_seeds([5, 7])
        (range(0, 3), [5, 7])
    """
    if isinstance(seeds, int | numbers.Number):
        check_count("seeds", seeds, most=MOST_RUNS)
        return range(int(seeds))
    return seeds


def check(
    *, seeds: Sequence[int], learning_rates: Sequence[float], periods: Sequence[int] = (1,)
) -> None:
    """Raises ValueError unless the grids of a sweep are non-empty and in range.

    Example:
        >>> check(seeds=[0], learning_rates=[0.1, -0.1])
        Traceback (most recent call last):
        ...
        ValueError: learning_rates has -0.1 at index 1; expected positive, finite float32 numbers.
    """

    def each(name, values, holds, expected, same=lambda value: value):
        try:
            num = len(values)
        except TypeError:
            said = reprlib.repr(values)
            raise ValueError(f"{name} is {said}; expected a list of {expected}.") from None
        if num == 0:
            raise ValueError(f"{name} is empty; expected at least one.")
        for i, value in enumerate(values):
            if isinstance(value, bool) or not holds(value):
                said = reprlib.repr(value)
                raise ValueError(f"{name} has {said} at index {i}; expected {expected}.")
        if len(set(map(same, values))) < num:
            raise ValueError(f"{name} has a value twice: {list(values)}.")

    def whole(value):
        return isinstance(value, numbers.Integral)

    def positive(value):
        return isinstance(value, numbers.Real) and 0 < as_float32(value) < math.inf

    to_most = f"to {MOST}"
    each("seeds", seeds, lambda s: whole(s) and 0 <= s <= MOST, f"integers from 0 {to_most}")
    each("learning_rates", learning_rates, positive, "positive, finite float32 numbers", as_float32)
    each("periods", periods, lambda p: whole(p) and 1 <= p <= MOST, f"integers from 1 {to_most}")


def check_count(name: str, value: int, *, most: int = MOST) -> None:
    """Raises ValueError unless the value is an integer from 1 to `most`.

    Example:
        >>> check_count("seeds", 10**9, most=1000)
        Traceback (most recent call last):
        ...
        ValueError: seeds is 1000000000; expected at most 1000.
    """
    said = f"{name} is {reprlib.repr(value)}; expected"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{said} an integer.")
    if value < 1:
        raise ValueError(f"{said} at least 1.")
    if value > most:
        raise ValueError(f"{said} at most {most}.")


def check_known(name: str, value: str, known: Collection[str], *, other: str = "") -> None:
    """Raises ValueError unless the value is in `known`; `other` is appended to them in the message.

    Example:
        >>> check_known("model", "cnn", ["mlp", "conv"])
        Traceback (most recent call last):
        ...
        ValueError: model: 'cnn' is unknown; expected mlp, conv.
    """
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: {value!r} is unknown; expected {', '.join(known)}{other}.{hint}")


def as_float32(value) -> float:
    """Rounds the value to float32, where very small and large values become 0 and infinity."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.inf
