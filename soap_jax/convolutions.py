"""Convolutions as matrix products on CPU, where XLA computes their gradients slowly in loops.

Inside a loop, XLA for CPU computes the gradient by a convolution's kernel up to a hundred times
slower than outside (https://github.com/jax-ml/jax/issues/12868). Matrix products are equally fast
inside. So `as_products` replaces the convolutions of a function, also those of its gradients, by
shifted copies of their input and one matrix product:

    y[n, i, o] = sum over w, c of x[n, i + w, c] kernel[w, c, o]

`soap_jax.training.train_epoch` and, on CPU, `soap_jax.sweeps` use it automatically.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

__all__ = [
    "Unsuitable",
    "as_products",
    "convolves",
]

Function = TypeVar("Function", bound=Callable)
Program = core.Jaxpr | core.ClosedJaxpr

MOST_COPIES = 256
"""The largest number of shifted copies of one input."""

MOST_BYTES = 2**30
"""The largest total size of these copies in bytes."""

NAME = "convolution_as_product"
"""The name of the call that replaces a convolution."""


class Unsuitable(ValueError):
    """The reason why a convolution is not replaced."""


def as_products(fun: Function) -> Function:
    """Returns the function with its convolutions replaced by matrix products on CPU.

    Results are equal up to rounding. On other devices the convolutions do not change. Convolutions
    in loops, branches and calls are replaced too. Not replaced are

    -   convolutions of integers;
    -   those that need more than `MOST_COPIES` copies of their input, or `MOST_BYTES` for these;
    -   those that an explicit mesh shards;
    -   those in the derivatives of `jax.custom_vjp` and `custom_jvp` functions, if the returned
        function is differentiated.

    So wrap the function that computes the gradient, such as a whole training step, not the model.

    Args:
        fun: a function from arrays to arrays, or from trees to trees of arrays.

    Returns:
        A function to scan or compile.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def step(kernel, x):
        ...     loss = lambda kernel: jax.lax.conv(x, kernel, (1, 1), "VALID").sum()
        ...     return kernel - 0.1 * jax.grad(loss)(kernel), None
        >>> kernel, batches = jnp.ones((2, 1, 3, 3)), jnp.ones((5, 4, 1, 6, 6))
        >>> jax.lax.scan(as_products(step), kernel, batches)[0].shape
        (2, 1, 3, 3)
    """

    @functools.wraps(fun)
    def wrapped(*args, **kwargs):
        closed, like = jax.make_jaxpr(fun, return_shape=True)(*args, **kwargs)
        replaced: Any = _replaced(closed, {})
        outs = core.jaxpr_as_fun(replaced)(*jax.tree.leaves((args, kwargs)))
        return jax.tree.unflatten(jax.tree.structure(like), outs)

    return wrapped  # type: ignore[return-value]


def convolves(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> bool:
    """Whether a jaxpr contains a convolution, also in nested jaxprs."""
    return any(
        eqn.primitive.name == "conv_general_dilated"
        or any(map(convolves, filter(_is_jaxpr, jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr))))
        for eqn in jaxpr.eqns
    )


def convolution(lhs: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    """Computes `conv_general_dilated` with these parameters by a matrix product.

    There are two ways: the product of shifted copies of the input, or the sum of shifted copies of
    the product of the input. The one with fewer multiplications is used. The second way is for
    gradients by the input of strided or unpadded convolutions, whose result has more positions than
    their input.

    Raises:
        Unsuitable: if the number of spatial dimensions is not 1, 2 or 3, or if more than
            `MOST_COPIES` or `MOST_BYTES` are needed.
    """
    conv = _Convolution(lhs.shape, rhs.shape, params)
    batch_groups = params["batch_group_count"]
    groups = params["feature_group_count"] * batch_groups
    x, x_axes = _grouped(lhs, conv.axes[0], "n" if batch_groups > 1 else "c", groups)
    kernel, kernel_axes = _grouped(rhs, conv.axes[1], "o", groups)
    out_axes = conv.axes[2] if groups == 1 else conv.axes[2].replace("o", "go")
    dtype = params["preferred_element_type"] or jnp.result_type(lhs, rhs)
    product = functools.partial(_product, kernel=kernel, kernel_axes=kernel_axes, params=params)
    if conv.product_first:
        axes = _beside(out_axes, OUT, INPUT, WINDOW, conv.rank)
        y = product(x, x_axes, out_axes=axes, dtype=jnp.promote_types(dtype, jnp.float32))
        y = conv.summed(y, axes).astype(dtype)
    else:
        y = product(*conv.copies(x, x_axes), out_axes=out_axes, dtype=dtype)
    return y.reshape(conv.out_shape)


INPUT, WINDOW, OUT = "XYZ", "uvw", "xyz"
"""The names of spatial axes; the other axes are n, c, o (batch, input and output features) and
g (groups)."""


class _Convolution:
    """The geometry of a convolution.

    Attributes:
        rank: the number of spatial dimensions.
        axes: the names of the axes of the input, the kernel and the result.
        window, size: the spatial shapes of the kernel and the result.
        product_first: whether the product is computed before the copies.
        out_shape: the result's shape.
    """

    def __init__(self, lhs_shape, rhs_shape, params):
        specs = params["dimension_numbers"]
        lhs, rhs, out = specs.lhs_spec, specs.rhs_spec, specs.out_spec
        self.rank = len(lhs_shape) - 2
        if not 1 <= self.rank <= 3:
            raise Unsuitable(f"the rank is {self.rank}; expected 1 to 3.")
        self.axes = (
            _named(lhs, "nc" + INPUT),
            _named(rhs, "oc" + WINDOW),
            _named(out, "no" + OUT),
        )
        self.strides, self.steps = params["window_strides"], params["rhs_dilation"]
        self.padding, self.holes = params["padding"], params["lhs_dilation"]
        self.input = [lhs_shape[d] for d in lhs[2:]]
        self.window = [rhs_shape[d] for d in rhs[2:]]
        self.size = [
            ((n - 1) * hole + low + high - (w - 1) * step) // stride + 1
            for n, hole, (low, high), w, step, stride in zip(
                self.input,
                self.holes,
                self.padding,
                self.window,
                self.steps,
                self.strides,
                strict=True,
            )
        ]
        features = lhs_shape[lhs[0]] // params["batch_group_count"], rhs_shape[rhs[0]]
        lengths = dict(zip((*out[:2], *out[2:]), (*features, *self.size), strict=True))
        self.out_shape = [lengths[d] for d in range(len(out))]
        window, size, inputs = map(math.prod, (self.window, self.size, self.input))
        self.product_first = window <= MOST_COPIES and inputs < size
        if min(window, size) > MOST_COPIES:
            raise Unsuitable(f"it needs more than {MOST_COPIES} copies.")
        rows = lhs_shape[lhs[0]] * window
        if self.product_first:
            count = rows * inputs * rhs_shape[rhs[0]]
        else:
            count = rows * size * lhs_shape[lhs[1]]
        if 4 * count > MOST_BYTES:  # in float32
            raise Unsuitable(f"its copies need more than {MOST_BYTES} bytes.")

    def copies(self, x, axes):
        """Makes shifted copies of the input.

        There is one copy per position of the window or of the result, whichever are fewer. Both
        give the same array, with an axis for each dimension of the window and of the result.
        """
        spatial = [axes.index(name) for name in INPUT[: self.rank]]
        config = [(0, 0, 0)] * x.ndim
        for d, (low, high), hole in zip(spatial, self.padding, self.holes, strict=True):
            config[d] = low, high, hole - 1
        x = lax.pad(x, jnp.zeros((), x.dtype), config)
        over = WINDOW, self.window, self.steps
        along = OUT, self.size, self.strides
        if math.prod(self.window) > math.prod(self.size):
            over, along = along, over
        parts = []
        for position in _positions(over[1]):
            start, stop, stride = [0] * x.ndim, list(x.shape), [1] * x.ndim
            for d, at, step, size, width in zip(
                spatial, position, over[2], *along[1:], strict=True
            ):
                start[d], stop[d] = at * step, at * step + (size - 1) * width + 1
                stride[d] = width
            parts.append(lax.slice(x, start, stop, stride))
        found = _beside(axes, INPUT, along[0], over[0], self.rank)
        # Concatenate along an existing axis: XLA's code for this is faster than for a stack.
        joined = lax.concatenate(parts, found.index(over[0][0]))
        lengths = dict(zip(axes, x.shape, strict=True))
        lengths |= dict(zip(over[0], over[1], strict=False))
        lengths |= dict(zip(along[0], along[1], strict=False))
        return joined.reshape([lengths[name] for name in found]), found

    def summed(self, y, axes):
        """Shifts the product at each position of the window to its place, and sums them."""
        first = axes.index(WINDOW[0])
        length = y.shape[first + self.rank]
        y = y.reshape(*y.shape[:first], -1, *y.shape[first + self.rank + 1 :])
        left = axes.replace(WINDOW[: self.rank], "")
        total: Any = 0
        for k, position in enumerate(_positions(self.window)):
            config, stride = [(0, 0, 0)] * len(left), [1] * len(left)
            for d, at in enumerate(position):
                axis = left.index(INPUT[d])
                low = self.padding[d][0] - at * self.steps[d]
                needed = (self.size[d] - 1) * self.strides[d] + 1
                high = needed - (self.input[d] - 1) * self.holes[d] - 1 - low
                config[axis], stride[axis] = (low, high, self.holes[d] - 1), self.strides[d]
            part = lax.slice_in_dim(y, k * length, (k + 1) * length, axis=first)
            part = lax.pad(part, jnp.zeros((), y.dtype), config)
            total = total + lax.slice(part, [0] * part.ndim, part.shape, stride)
        return total


def _named(spec, names):
    """The names of the axes, in the array's order."""
    return "".join(name for _, name in sorted(zip(spec, names, strict=False)))


def _grouped(array, axes, name, groups):
    """Splits an axis into groups, if there are several."""
    if groups == 1:
        return array, axes
    d = axes.index(name)
    shape = *array.shape[:d], groups, array.shape[d] // groups, *array.shape[d + 1 :]
    return array.reshape(shape), axes.replace(name, "g" + name)


def _product(x, x_axes, *, kernel, kernel_axes, out_axes, dtype, params):
    """Sums the product over all shared axes that the result lacks, by one matrix product.

    It does not use one `dot_general` over several axes, for which XLA would transpose the copies.
    """
    summed = "".join(a for a in x_axes if a in kernel_axes and a not in out_axes)
    grouped = "g" in out_axes
    x, x_free, x_at = _as_matrix(x, x_axes, summed)
    kernel, kernel_free, kernel_at = _as_matrix(kernel, kernel_axes, summed)
    batch = ((0,), (0,)) if grouped else ((), ())
    y = lax.dot_general(
        x,
        kernel,
        (((x_at,), (kernel_at,)), batch),
        precision=params["precision"],
        preferred_element_type=dtype,
    )
    lengths = x_free | kernel_free
    axes = "".join(lengths)
    y = y.reshape(list(lengths.values()))
    return lax.transpose(y, [axes.index(name) for name in out_axes])


def _as_matrix(array, axes, summed):
    """Reshapes to one matrix per group; returns it, its free axes' lengths and the summed axis."""
    lengths = dict(zip(axes, array.shape, strict=True))
    first = "g" if "g" in axes else ""
    free = "".join(name for name in axes if name not in summed + first)
    leads = axes.replace("g", "") == summed + free
    order = first + (summed + free if leads else free + summed)
    array = lax.transpose(array, [axes.index(name) for name in order])
    shape = [math.prod(lengths[name] for name in names) for names in (first, free, summed)]
    shape = [shape[0], *(shape[:0:-1] if leads else shape[1:])][not first :]
    at = len(first) + (0 if leads else 1)
    return array.reshape(shape), {name: lengths[name] for name in first + free}, at


def _beside(axes, spatial, instead, more, rank):
    """Renames the spatial axes, and inserts `more` after them, or before them if they are last.

    So if features are the last axis, they stay last, and whole rows are copied.
    """
    names = spatial[:rank]
    renamed = axes.translate(str.maketrans(names, instead[:rank]))
    ends = sorted(axes.index(name) for name in names)
    at = ends[0] if ends[-1] == len(axes) - 1 else ends[-1] + 1
    return renamed[:at] + more[:rank] + renamed[at:]


def _positions(shape):
    return itertools.product(*map(range, shape))


def _replaced(jaxpr: Program, known: dict[int, tuple[Program, Program]]) -> Program:
    """Replaces convolutions in a program; `known` caches jaxprs that several equations share.

    The cache is by `id`, and keeps each jaxpr, so that its `id` is not used again.
    """
    if id(jaxpr) not in known:
        new = jaxpr
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        if convolves(jaxpr) and inner is not jaxpr:  # closed; since JAX 0.12 a jaxpr is its own
            new = jaxpr.replace(jaxpr=_replaced(inner, known))
        elif convolves(jaxpr):
            eqns = [_equation(eqn, known) for eqn in jaxpr.eqns]
            new = jaxpr.replace(eqns=eqns)  # type: ignore[call-arg]
        known[id(jaxpr)] = jaxpr, new
    return known[id(jaxpr)][1]


def _equation(eqn: core.JaxprEqn, known: dict[int, tuple[Program, Program]]) -> core.JaxprEqn:
    """Replaces a convolution by a call, and the convolutions in an equation's jaxprs."""
    if eqn.primitive.name == "conv_general_dilated":
        return _call(eqn)
    if eqn.params.get("name") == NAME:  # done before
        return eqn

    def replaced(leaf):
        return _replaced(leaf, known) if _is_jaxpr(leaf) else leaf

    params = {
        name: jax.tree.map(replaced, value, is_leaf=_is_jaxpr)
        if any(map(_is_jaxpr, jax.tree.leaves(value, is_leaf=_is_jaxpr)))
        else value
        for name, value in eqn.params.items()
    }
    return eqn.replace(params=params)


def _call(eqn: core.JaxprEqn) -> core.JaxprEqn:
    """Replaces a convolution's equation by a call that chooses by the platform of compilation."""
    as_it_is = functools.partial(_bind, eqn.primitive, eqn.params)
    types: list[Any] = [v.aval for v in eqn.invars]
    if any(map(any, (aval.sharding.spec for aval in types))):  # an explicit mesh shards it
        return eqn
    if not all(jnp.issubdtype(t.dtype, jnp.inexact) and math.prod(t.shape) for t in types):
        return eqn
    by_product = functools.partial(convolution, **eqn.params)

    def either(lhs, rhs):
        return lax.platform_dependent(lhs, rhs, cpu=by_product, default=as_it_is)

    either.__name__ = NAME
    try:
        (call,) = jax.make_jaxpr(jax.jit(either))(*types).jaxpr.eqns
    except Unsuitable:
        return eqn
    theirs, ours = ([_type(v.aval) for v in (*e.invars, *e.outvars)] for e in (eqn, call))
    if theirs != ours:  # another sharding, or other varying mesh axes
        return eqn
    return eqn.replace(primitive=call.primitive, params=call.params, effects=call.effects)


def _bind(primitive, params, lhs, rhs):
    return primitive.bind(lhs, rhs, **params)


def _type(aval: Any) -> Any:
    return aval.strip_weak_type()


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)
