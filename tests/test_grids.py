"""The grids of a sweep: what is accepted, and what is said about the rest."""

import re

import numpy as np
import pytest

from soap_jax import grids


@pytest.mark.parametrize(
    "grid",
    [
        {"seeds": [0], "learning_rates": [0.1]},
        {"seeds": range(3), "learning_rates": (1e-3, 1, np.float32(0.5)), "periods": (1, 10)},
        {"seeds": np.arange(3), "learning_rates": np.array([0.1, 0.2]), "periods": [np.int64(7)]},
        {"seeds": [2**31 - 1], "learning_rates": [1e-30], "periods": [2**31 - 1]},
    ],
    ids=["least", "ranges_and_tuples", "numpy", "extremes"],
)
def test_grids_in_range_pass(grid):
    assert grids.check(**grid) is None


GOOD = {"seeds": [0, 1], "learning_rates": [0.1, 0.2], "periods": [1, 2]}


@pytest.mark.parametrize("name", GOOD)
def test_an_empty_grid_raises(name):
    with pytest.raises(ValueError, match=f"^{name} is empty; expected at least one.$"):
        grids.check(**GOOD | {name: []})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seeds", -1, "integers from 0 to 2147483647"),
        ("seeds", 2**31, "integers from 0 to 2147483647"),
        ("seeds", 1.0, "integers from 0 to 2147483647"),
        ("seeds", np.float32(2), "integers from 0 to 2147483647"),
        ("seeds", True, "integers from 0 to 2147483647"),
        ("seeds", np.True_, "integers from 0 to 2147483647"),
        ("seeds", "1", "integers from 0 to 2147483647"),
        ("learning_rates", 0, "positive, finite float32 numbers"),
        ("learning_rates", -0.1, "positive, finite float32 numbers"),
        ("learning_rates", float("nan"), "positive, finite float32 numbers"),
        ("learning_rates", float("inf"), "positive, finite float32 numbers"),
        ("learning_rates", True, "positive, finite float32 numbers"),
        ("learning_rates", "0.1", "positive, finite float32 numbers"),
        ("learning_rates", None, "positive, finite float32 numbers"),
        ("periods", 0, "integers from 1 to 2147483647"),
        ("periods", -3, "integers from 1 to 2147483647"),
        ("periods", 2.0, "integers from 1 to 2147483647"),
        ("periods", True, "integers from 1 to 2147483647"),
        ("periods", 2**31, "integers from 1 to 2147483647"),
    ],
)
def test_a_value_out_of_range_raises_and_is_named_with_its_place(name, value, expected):
    message = f"{name} has {value!r} at index 2; expected {expected}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        grids.check(**GOOD | {name: [*GOOD[name], value]})


@pytest.mark.parametrize(
    ("name", "values"),
    [("seeds", [3, 4, 3]), ("learning_rates", [0.1, 1, 1.0]), ("periods", [10, 10])],
)
def test_a_value_given_twice_raises(name, values):
    with pytest.raises(ValueError, match=f"^{name} has a value twice: {re.escape(str(values))}.$"):
        grids.check(**GOOD | {name: values})


@pytest.mark.parametrize("rates", [[1e-60], [1e60], [0.1, 0.1 + 1e-12]])
def test_rates_that_float32_cannot_tell_from_zero_infinity_or_each_other_raise(rates):
    with pytest.raises(ValueError, match="learning_rates has"):
        grids.check(seeds=[0], learning_rates=rates)
