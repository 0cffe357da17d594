"""Values of a traced function, and what `soap_jax.walk` knows of them.

A value that derives from params with feedback carries a `Kernel`: from which params, and whether
it still has its *twin*, the feedback in the same layout. All else is an activation or a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from soap_jax import trees


class Use(NamedTuple):
    """A place where kernels are used, as errors and `soap_jax.explain` tell of it.

    Attributes:
        paths: the params with feedback that the kernel derives from.
        primitive: the primitive's name.
        line: file, line and function.
        operands: the operands' shapes and dtypes.
        problem: why it cannot go through feedback; empty for a product that does.
        refused: whether an error that flows here is one; else the kernel is taken for activations.
    """

    paths: tuple[trees.Path, ...]
    primitive: str
    line: str
    operands: tuple[jax.ShapeDtypeStruct, ...]
    problem: str = ""
    refused: bool = True

    def __str__(self):
        """The place: "mul at model.py:12:4 (loss)"."""
        return f"{self.primitive} at {self.line}"


class Kernel(NamedTuple):
    """What is known of a value that derives from params with feedback.

    Attributes:
        paths: the params.
        lost: where it lost its twin; None while it has one.
        lookup: how it can be meant as an activation, too: as "rows" that were looked up, or as a
            "product" with what is no data; empty if it is weights and nothing else.
        number: whether it is a single number made of a kernel: a norm, a penalty.
        slot: its place among the values that a loop carries, until anything is done to it.
    """

    paths: tuple[trees.Path, ...]
    lost: Use | None = None
    lookup: Literal["", "rows", "product"] = ""
    number: bool = False
    slot: int | None = None


class Value(NamedTuple):
    """A value of the function, and what is known of it.

    Attributes:
        array: the value.
        twin: feedback in the kernel's present layout, in the dtype that it is stored in; or None.
        kernel: None for what is no kernel with feedback.
        data: whether it depends on an argument other than `params`.
        params: whether it depends on `params`.
    """

    array: Any
    twin: Any = None
    kernel: Kernel | None = None
    data: bool = False
    params: bool = False

    @property
    def known(self) -> Value:
        """What is known of the value, without it: static."""
        return self._replace(array=None, twin=None)

    @property
    def widened(self) -> Value:
        """The value, its twin cast to its own dtype."""
        if self.twin is None:
            return self
        return self._replace(twin=self.twin.astype(jnp.result_type(self.array)))

    @property
    def held(self) -> bool:
        """Whether it is a kernel and nothing else, so that feedback must not be lost in silence."""
        return self.kernel is not None and not self.kernel.lookup

    @property
    def constant(self) -> bool:
        """Whether it depends on no argument."""
        return not (self.data or self.params)


def bind(eqn: core.JaxprEqn, arrays: Sequence[Any]) -> Any:
    """Applies an equation's primitive to other operands; one output is not put into a list."""
    got = eqn.primitive.get_bind_params(eqn.params)  # with JAX 0.8 functions, too
    functions, params = got if isinstance(got, tuple) else ((), got)
    out = eqn.primitive.bind(*functions, *arrays, **params)
    return out[0] if eqn.primitive.multiple_results and len(out) == 1 else out


def outputs(eqn: core.JaxprEqn, values: Sequence[Value]) -> list[Value]:
    """Evaluates an equation as it is; its outputs are no kernels."""
    return derived(as_list(bind(eqn, [value.array for value in values])), values)


def derived(arrays: Sequence[Any], values: Sequence[Value]) -> list[Value]:
    """Values computed from others: no kernels, but of data or of params as those are."""
    data, params = any(v.data for v in values), any(v.params for v in values)
    return [Value(array, data=data, params=params) for array in arrays]


def as_list(out: Any) -> list:
    """What `bind` returned, as a list."""
    return list(out) if isinstance(out, list | tuple) else [out]


def is_float(value: Value) -> bool:
    """Whether the value can have a cotangent."""
    return jnp.issubdtype(jnp.result_type(value.array), jnp.inexact)


def paths(values: Sequence[Value]) -> tuple[trees.Path, ...]:
    """The params from which kernels derive."""
    return tuple(dict.fromkeys(path for v in values if v.kernel for path in v.kernel.paths))


def on_cotangent(x: jax.Array, callback: Callable[[], object]) -> jax.Array:
    """The identity, which calls back when a cotangent is sent back through it, and only then."""

    @jax.custom_vjp
    def f(x):
        return x

    def f_bwd(_, x_bar):
        callback()
        return (x_bar,)

    f.defvjp(lambda x: (x, None), f_bwd)
    return f(x)


def split(values: Sequence[Value]) -> tuple[list, list]:
    """Arrays and twins: what can be handed to a traced function; `known` is the rest."""
    return [value.array for value in values], [value.twin for value in values]


def join(known: Sequence[Value], arrays: Sequence, twins: Sequence) -> list[Value]:
    """The inverse of `split`."""
    return [k._replace(array=a, twin=t) for k, a, t in zip(known, arrays, twins, strict=True)]
