"""The grids of a sweep, checked before anything heavy is imported."""

from __future__ import annotations

import math
import numbers
import struct
from collections.abc import Sequence


def check(
    *, seeds: Sequence[int], learning_rates: Sequence[float], periods: Sequence[int] = (1,)
) -> None:
    """Raises ValueError unless the grids of a sweep are non-empty and in range.

    Example:
        >>> check(seeds=[0], learning_rates=[0.1, -0.1])
        Traceback (most recent call last):
        ...
        ValueError: learning_rates has -0.1 at index 1; expected positive, finite numbers.
    """

    def each(name, values, holds, expected, same=lambda value: value):
        if len(values) == 0:
            raise ValueError(f"{name} is empty; expected at least one.")
        for i, value in enumerate(values):
            if isinstance(value, bool) or not holds(value):
                raise ValueError(f"{name} has {value!r} at index {i}; expected {expected}.")
        if len(set(map(same, values))) < len(values):
            raise ValueError(f"{name} has a value twice: {list(values)}.")

    def whole(value):
        return isinstance(value, numbers.Integral)

    def positive(value):
        return isinstance(value, numbers.Real) and 0 < _as_float32(value) < math.inf

    each("seeds", seeds, lambda s: whole(s) and 0 <= s < 2**31, "integers from 0 to 2³¹ - 1")
    each("learning_rates", learning_rates, positive, "positive, finite numbers", _as_float32)
    each("periods", periods, lambda p: whole(p) and 1 <= p < 2**31, "integers of at least 1")


def _as_float32(value) -> float:
    """The value as a sweep will use it: very small and very large ones become 0 and infinity."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.inf
