"""The errors of layers: the cotangents of the products of kernels and activations.

Zeros, called *taps*, are added to these products; the gradient by a tap is the error of the
product. So one backward pass, that of `with_feedback`, gives all errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from soap_jax.transform import labels as lb
from soap_jax.transform import nested, tracing, wrap
from soap_jax.transform import values as vals
from soap_jax.transform.reader import Reader
from soap_jax.transform.values import Value

Errors = dict[str, jax.Array]
"""Errors by the paths of their kernels, such as "Dense_0/kernel"."""


def layer_errors(fun: Callable, *, has_aux: bool = False) -> Callable[..., Errors]:
    """Returns a function that computes the errors of all layers of `fun`.

        y = x · W,    error of W = y_bar

    for every kernel W (a param with at least two axes) in a product with an activation x, with or
    without feedback, including the first layer. It costs less than the gradient; call it under
    `jit`.

    An error has the shape of the product, with the kernel's output axes last. So the batch axis is
    first for the usual layer libraries, also for `vmap` of `W @ x`. If a kernel is used several
    times, the error is that of the first use. Kernels that are joined before their product (the
    gates of an LSTM) share one error. Inside `lax.scan`, over time or over layers, the first axis
    of the error is the iteration. There are no errors for products in `while_loop`, `cond`,
    `shard_map` and functions with custom derivatives, or for kernels in no product with an
    activation.

    If `fun` is a mean over a batch, the error of an example is divided by the batch size.

    Args:
        fun: `(params, *args, **kwargs) -> scalar`, as for `with_feedback`.
        has_aux: whether it returns `(scalar, aux)`, as in `jax.grad`; aux is dropped.

    Returns:
        `(params, feedback, *args, **kwargs) -> errors`: the errors of `with_feedback(fun)`, by the
        paths of their kernels. With feedback of None they are those of backpropagation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"in": jnp.eye(2), "out": jnp.ones((2, 1))}
        >>> feedback = {"out": jnp.array([[5.0], [-1.0]])}
        >>> def loss(params, x):
        ...     return jnp.sum(x @ params["in"] @ params["out"])
        >>> layer_errors(loss)(params, feedback, jnp.ones((1, 2)))
        {'in': Array([[ 5., -1.]], dtype=float32), 'out': Array([[1.]], dtype=float32)}

    References:
        Lillicrap et al. (2016). https://doi.org/10.1038/ncomms13276
    """
    both = gradient_and_errors(fun, has_aux=has_aux)
    return lambda params, feedback, *args, **kwargs: both(params, feedback, *args, **kwargs)[1]


def gradient_and_errors(
    fun: Callable, *, has_aux: bool = False
) -> Callable[..., tuple[chex.ArrayTree, Errors]]:
    """Like `layer_errors`, for `(gradient by params, errors)` at the cost of the gradient."""

    def gradient_and_errors_of(params, feedback, *args, **kwargs):
        traced = tracing.trace(fun, params, args, kwargs)
        kernels = {
            i
            for i, (path, x) in enumerate(zip(traced.paths, traced.operands, strict=True))
            if path is not None and jnp.ndim(x) >= 2 and vals.inexact(x)
        }
        labels = [value.label for value in _inputs(traced, kernels)]
        found = _find(traced.paths, kernels, traced.closed, labels)

        def tapped(params, taps, *args, **kwargs):
            again = tracing.trace(fun, params, args, kwargs)
            tapper = _Tapper(traced.paths, kernels, iter(taps))
            outs = tapper.run(again.closed, _inputs(again, kernels))
            return again.rebuild([out.array for out in outs])

        gradient = jax.grad(
            wrap.with_feedback(tapped), argnums=(0, 2), has_aux=has_aux, allow_int=True
        )
        out = gradient(params, feedback, [vals.zeros(tap.aval) for tap in found], *args, **kwargs)
        of_params, of_taps = out[0] if has_aux else out
        return of_params, {
            "/".join(traced.paths[i] or ()): jnp.transpose(error, tap.order)
            for tap, error in zip(found, of_taps, strict=True)
            for i in tap.leaves
        }

    return gradient_and_errors_of


class Tap(NamedTuple):
    """An array of zeros that is added to a product.

    Attributes:
        leaves: the kernels in the product.
        aval: the type of the array.
        order: the product's axes, with the kernel's output axes last.
    """

    leaves: tuple[int, ...]
    aval: jax.ShapeDtypeStruct
    order: tuple[int, ...]


class _Tapper(Reader):
    """Evaluates a function, with taps added to its products.

    Args:
        paths: as in `Reader`.
        kernels: the kernels whose first product gets a tap.
        taps: the arrays to add, or None for zeros.

    Attributes:
        found: the taps so far.
    """

    def __init__(self, paths, kernels: set[int], taps: Iterator[Any] | None = None):
        super().__init__(paths)
        self.left = set(kernels)
        self.taps = taps
        self.found: list[Tap] = []

    def equation(self, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
        """Evaluates one equation."""
        if self.abstract:
            return super().equation(eqn, values)
        labels = [value.label for value in values]
        with self.only_labels():
            outs = [out.label for out in super().equation(eqn, list(map(Value, labels)))]
        if eqn.primitive.name in _MADE_AGAIN and any(label.kernels for label in labels):
            return _MADE_AGAIN[eqn.primitive.name](self, eqn, values, outs)
        arrays = vals.bind(eqn, [value.array for value in values])
        if tap := _tap(eqn, labels, self.left):
            arrays[0] = arrays[0] + self.take(tap)
        return list(map(Value, outs, arrays))

    def take(self, tap: Tap) -> jax.Array:
        """Records a tap, and returns its array."""
        self.left -= set(tap.leaves)
        self.found.append(tap)
        return vals.zeros(tap.aval) if self.taps is None else next(self.taps)


def _tap(eqn, labels: Sequence[lb.Label], kernels: set[int]) -> Tap | None:
    """The tap of an equation that is a product of some of these kernels and data, or None."""
    if lb.kind(eqn) not in lb.PRODUCTS:
        return None
    for k, (mine, other) in enumerate(zip(labels[:2], labels[1::-1], strict=True)):
        leaves = {i for i, status in mine.kernels.items() if not lb.looked_up(status)}
        leaves &= kernels - other.kernels.keys()
        if leaves and other.data:
            aval = eqn.outvars[0].aval
            aval = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
            return Tap(tuple(sorted(leaves)), aval, _order(eqn, k))
    return None


def _order(eqn, kernel: int) -> tuple[int, ...]:
    """A product's axes, with its kernel's output axes last."""
    axes = tuple(range(eqn.outvars[0].aval.ndim))
    if eqn.primitive.name == "conv_general_dilated":
        batch, features, *window = eqn.params["dimension_numbers"].out_spec
        return (batch, *window, features)
    if eqn.primitive.name == "dot_general" and kernel == 0:
        (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
        end = eqn.invars[0].aval.ndim - len(contracted)
        return (*axes[: len(batch)], *axes[end:], *axes[len(batch) : end])
    return axes


def _inputs(traced: tracing.Traced, kernels: set[int]) -> list[Value]:
    beside = [x if i in kernels else None for i, x in enumerate(traced.operands)]
    active = [path is not None for path in traced.paths]
    return traced.inputs(traced.operands, beside, active)[traced.num_hoisted :]


def _find(paths, kernels, closed: core.ClosedJaxpr, labels: Sequence[lb.Label]) -> list[Tap]:
    """The taps of a jaxpr."""
    tapper = _Tapper(paths, kernels)
    jax.eval_shape(
        lambda arrays: [out.array for out in tapper.run(closed, list(map(Value, labels, arrays)))],
        [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars],
    )
    return tapper.found


def _scan(tapper: _Tapper, eqn, values, outs):
    """Evaluates a scan that scans over its taps too."""
    labels = nested.scan_body(tapper, eqn, [value.label for value in values])
    closed, length = eqn.params["jaxpr"], eqn.params["length"]
    kernels = set(tapper.left)
    taps = [
        tapper.take(
            Tap(
                tap.leaves,
                jax.ShapeDtypeStruct((length, *tap.aval.shape), tap.aval.dtype),
                (0, *(axis + 1 for axis in tap.order)),
            )
        )
        for tap in _find(tapper.paths, kernels, closed, labels)
    ]
    consts, init, xs = nested.scan_parts(eqn, [value.array for value in values])

    def body(carry, rows):
        xs, taps = rows
        inner = _Tapper(tapper.paths, kernels, iter(taps))
        arrays = [*consts, *carry, *xs]
        ys = [out.array for out in inner.run(closed, list(map(Value, labels, arrays)))]
        return ys[: len(init)], ys[len(init) :]

    carry, ys = lax.scan(body, list(init), (list(xs), taps), **nested.scan_options(eqn))
    return list(map(Value, outs, [*carry, *ys]))


_MADE_AGAIN = {
    name: entry.make for name, entry in nested.NESTED.items()
    if name in ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")
} | {"scan": _scan}  # fmt: skip
