"""Activity propagation: layers send back a second-order step of their activities as the error.

    def loss(tap, params, x, y):
        h = tap("hidden", jnp.tanh(x @ params["in"]))
        return jnp.mean((h @ params["out"] - y) ** 2)

    grad_fn = activity.value_and_grad(loss, learning_rate=0.05)
    value, gradients = grad_fn(params, x, y, step=step)     # pure; for any optimiser
    value = loss(activity.untapped, params, x, y)       # evaluation

The method makes two passes over one batch. Only the gradients of the second pass update the
weights. For each tapped activation a, with n elements in the whole batch,

    1.  g     = dL/da                   backprop, with taps that do nothing
    2.  a     ← a - (lr / n) g          every tap shifts its activation; in the backward pass
        g'    = the cotangent that arrives, after the taps above have replaced theirs
        a_bar = (lr / n) g² / d'        the cotangent that is sent back instead of g', where
                d = g - g',  d' = d + 2 bias sign(d),  d' = bias where d = 0

This is the secant estimate of a Newton step: if L is quadratic in a, with a diagonal Hessian h, and
without bias, `a_bar` is g / h. Operations between taps are differentiated as usual, and may include
feedback alignment; both passes then use feedback.

Three limitations, all measured by `python -m benchmarks.activity`:

-   `bias` is an absolute number, while d is proportional to lr / n. If bias is much larger than d,
    the error is only `(lr / n) g² sign(d) / (2 bias)`. On MNIST, with the learning rate of the
    original, the default bias and batches of 64, it is so small that the hidden layer does not
    learn.
-   In float32 the shift (lr / n) g is often below the rounding error of a. Then d is zero or noise,
    which a small bias amplifies. To avoid this, use a `learning_rate` of 1000 times the weights',
    and multiply the bias by 1000 too: the Newton step is the same, and float32 is accurate enough.
-   For a tap below another tap, g' comes from the step of the other tap, not from a gradient, so d
    is not a second difference. Layers below the topmost tap hardly learn.

The method comes from SOAP, the PyTorch predecessor of this package. It was slower than backprop
there, and it is slower here.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.typing import ArrayLike, DTypeLike

__all__ = [
    "Loss",
    "Tap",
    "ValueAndGrad",
    "untapped",
    "value_and_grad",
]

Tap = Callable[[str, jax.Array], jax.Array]
"""A function `(name, activation) -> activation`."""

Loss = Callable[..., Any]
"""A function `(tap, params, *args) -> loss`, a scalar, or `(loss, aux)`."""

ValueAndGrad = Callable[..., tuple[Any, chex.ArrayTree]]
"""A function `(params, *args, step) -> (value, gradients)`; `step` counts completed updates.

In `soap_jax.training.make_gradient_step` `*args` are the feedback weights (or None) and the
batch."""

_MARK = "soap_jax.activity:"  # prefix of a tap's number in the jaxpr of `types_of_taps`
_TRANSPARENT = ("jit", "pjit", "checkpoint", "remat", "remat2")  # primitives that a tap may be in


def untapped(name: str, activation: jax.Array) -> jax.Array:
    """Returns the activation: the tap for evaluation and plain backprop.

    Args:
        name: any.
        activation: any.

    Returns:
        `activation`.

    Example:
        >>> import jax.numpy as jnp
        >>> untapped("hidden", jnp.ones(2))
        Array([1., 1.], dtype=float32)
    """
    del name
    return activation


def value_and_grad(
    loss: Loss,
    *,
    learning_rate: ArrayLike,
    bias: ArrayLike = 1e-5,
    warmup: int = 0,
    has_aux: bool = False,
) -> ValueAndGrad:
    """Makes a function that returns a loss and its activity-propagation gradients.

        a_bar = (lr / n) g² / d',   d = g - g',   d' = d + 2 bias sign(d)  (bias where d = 0)

    at each tapped activation; see the module's docstring. As in `jax.value_and_grad`, the value is
    the loss before the update, from the first pass, with unshifted activations. So is `aux`.

    The loss takes a `tap` as its first argument and calls it on each activation with a different
    name: `h = tap("hidden", h)`. The model may be anything that passes `tap` on: a plain function,
    a Linen module (`model.apply(variables, x, tap)`) or an NNX module. Tap whole batches, outside
    `vmap`, `scan` and similar transformations; a tap may be inside `jit` and `checkpoint`. The
    result works under `jit`, `vmap`, `scan` and `shard_map` (on each device's part of the batch).
    The loss is traced three times, and once more with a warm-up.

    Args:
        loss: `(tap, params, *args) -> scalar`, the mean over a batch.
        learning_rate: positive scalar, the step size lr of the activities above; the original uses
            that of the weights. May be traced.
        bias: positive scalar, which keeps the step finite where g hardly changes. The default
            repeats the result of the original: on MNIST, after 0.2 epoch with the original's
            learning rate, the training loss is 0.93 (there 0.92), with backprop 0.38 (0.37).
        warmup: number of first updates that use plain backprop; 5 in the original.
        has_aux: whether `loss` returns `(loss, aux)`.

    Returns:
        `(params, *args, step) -> (value, gradients)`, with `step` the number of completed updates,
        an integer scalar that may be traced, and gradients by `params`; with `has_aux`,
        `((value, aux), gradients)`.

    Raises:
        ValueError: if a number is out of range; and from the returned function, if `step` is not an
            integer scalar, if nothing is tapped, if a name is used twice or is not a string, if a
            tapped activation is not floating point, or if a tap is inside `vmap`, `scan` or a
            similar transformation.

    Example:
        >>> import jax.numpy as jnp
        >>> from soap_jax import activity
        >>> def loss(tap, w, x):
        ...     return 2.0 * jnp.sum(tap("a", w * x) ** 2)
        >>> grad_fn = activity.value_and_grad(loss, learning_rate=0.1, bias=1e-9)
        >>> value, gradient = grad_fn(jnp.array(3.0), 1.0, step=0)  # g = 12 and h = 4: a step of 3
        >>> float(value), round(float(gradient), 4)
        (18.0, 3.0)

    References:
        SOAP, the PyTorch predecessor of this package; there is no paper.
    """
    check_positive("learning_rate", learning_rate)
    check_positive("bias", bias)
    warmup = _check_warmup(warmup)

    def backprop(params, args):
        return jax.value_and_grad(lambda p: loss(untapped, p, *args), has_aux=has_aux)(params)

    def propagate(params, args):
        types = types_of_taps(lambda tap: loss(tap, params, *args))

        def first(shifts):
            return loss(lambda name, a: a + shifts[name], params, *args)

        zeros = jax.tree.map(jnp.zeros_like, types)
        value, g = jax.value_and_grad(first, has_aux=has_aux)(zeros)

        def tap(name, a):
            return _move(jnp.asarray(a), g[name], learning_rate / jnp.size(a), bias)

        gradients = jax.grad(lambda p: loss(tap, p, *args), has_aux=has_aux)(params)
        return value, gradients[0] if has_aux else gradients

    def grad_fn(params: chex.ArrayTree, *args, step: ArrayLike):
        _check_step(step)
        if warmup == 0:
            return propagate(params, args)
        # A closure, since arguments of `cond` must be arrays.
        is_warm = jnp.asarray(step) >= warmup
        return lax.cond(is_warm, lambda: propagate(params, args), lambda: backprop(params, args))

    return grad_fn


def types_of_taps(run: Callable[[Tap], Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the type of each tapped activation by name, without computing anything.

    In a mapped or repeated part of the loss, a tap would get only one example, or several in turn,
    but it needs the whole activation. So the jaxpr is searched for the places of taps.
    """
    calls: list[tuple[str, jax.ShapeDtypeStruct]] = []

    def tap(name, activation):
        _check_tap(name, activation)
        type_ = jax.eval_shape(lambda: activation)  # with its sharding
        calls.append((name, type_))
        return checkpoint_name(activation, f"{_MARK}{len(calls) - 1}")

    jaxpr = jax.make_jaxpr(lambda: run(tap))().jaxpr
    if not calls:
        raise ValueError(
            "the loss taps nothing; expected at least one `h = tap(name, h)`, with the `tap` that "
            "the loss gets as its first argument. Pass it on to the model."
        )
    types: dict[str, jax.ShapeDtypeStruct] = {}
    for call, shape, inside in _marks(jaxpr):
        name, type_ = calls[call]
        if shape != type_.shape:  # `vmap` leaves no equation of its own
            inside = "vmap"
        if inside:
            raise ValueError(
                f"tap {name!r} is inside {inside}, so it is not called once on a whole "
                "activation; expected it outside, as in tap(name, jax.vmap(layer)(x)) or "
                "tap(name, jax.lax.scan(...)[1]). A tap may be inside `jit` and `checkpoint`."
            )
        if name in types:
            raise ValueError(
                f"the tap's name {name!r} is used twice; expected a different name for each "
                "tapped activation."
            )
        types[name] = type_
    if lost := [name for name, _ in calls if name not in types]:
        raise ValueError(
            f"tap {lost[0]!r} was called, but is not in the jaxpr of the loss; expected each tap "
            "to be called once in every evaluation of the loss."
        )
    return types


def check_positive(name: str, value: ArrayLike) -> None:
    """Raises ValueError unless the value is a positive number; traced values pass."""
    if isinstance(value, jax.core.Tracer):
        return
    try:
        number = float(value)  # type: ignore[arg-type]
        positive = np.ndim(value) == 0 and 0 < number < np.inf
    except (TypeError, ValueError):
        positive = False
    if not positive:
        raise ValueError(f"{name} is {value!r}; expected a positive number.")


@jax.custom_vjp
def _move(a, g, rate, bias):
    """The tap of the second pass: shifts `a`, and sends back the secant step."""
    return _move_fwd(a, g, rate, bias)[0]


def _move_fwd(a, g, rate, bias):
    wide = _at_least_float32(a.dtype)
    shift = jnp.asarray(rate, wide) * g.astype(wide)
    return (a.astype(wide) - shift).astype(a.dtype), (g, rate, bias)


def _move_bwd(residuals, arrived):
    g, rate, bias = residuals
    wide = _at_least_float32(g.dtype)
    rate, bias = jnp.asarray(rate, wide), jnp.asarray(bias, wide)
    difference = g.astype(wide) - arrived.astype(wide)
    biased = jnp.where(difference == 0, bias, difference + 2 * bias * jnp.sign(difference))
    # Do not compute g² first: for an error of 1e-20 it underflows in float32.
    a_bar = g.astype(wide) * (rate * g.astype(wide) / biased)
    return a_bar.astype(g.dtype), None, None, None


_move.defvjp(_move_fwd, _move_bwd)


def _at_least_float32(dtype: DTypeLike):
    return np.promote_types(dtype, np.float32)


def _marks(jaxpr, inside: str = "") -> Iterator[tuple[int, tuple[int, ...], str]]:
    """Finds the taps in a jaxpr: `(call, shape, name of the primitive around it)`."""
    for eqn in jaxpr.eqns:
        kind = eqn.primitive.name
        if kind == "name" and eqn.params["name"].startswith(_MARK):
            yield int(eqn.params["name"].removeprefix(_MARK)), eqn.invars[0].aval.shape, inside
        for part in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(part):
                body = part.jaxpr if isinstance(part, core.ClosedJaxpr) else part
                yield from _marks(body, inside or ("" if _is_transparent(eqn) else kind))


def _is_transparent(eqn) -> bool:
    """Whether a tap may be inside an equation that calls its jaxpr once, or `with_feedback`."""
    name = eqn.primitive.name
    return name in _TRANSPARENT or (
        name == "custom_vjp_call"
        and eqn.params["call_jaxpr"].jaxpr.debug_info.func_src_info.startswith("with_feedback ")
    )


def _is_jaxpr(value) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _check_tap(name, activation):
    if not isinstance(name, str):
        raise ValueError(
            f"a tap's name is {name!r}; expected a string, as in tap(name, activation)."
        )
    dtype = jnp.result_type(activation)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"the activation at tap {name!r} has dtype {dtype}; expected a floating-point dtype, "
            "since other activations have no gradient. Tap it before or after the cast."
        )


def _check_step(step):
    number = isinstance(step, numbers.Integral | np.ndarray | jax.Array)
    if not number or jnp.ndim(step) or not jnp.issubdtype(jnp.result_type(step), jnp.integer):
        what = f"an array {jax.typeof(step)}" if hasattr(step, "dtype") else type(step).__name__
        raise ValueError(
            f"step is {what}; expected an integer scalar, the number of completed updates, as in "
            "grad_fn(params, *args, step=step)."
        )


def _check_warmup(warmup) -> int:
    try:
        count = operator.index(warmup)
    except TypeError:
        count = -1
    if count < 0:
        raise ValueError(f"warmup is {warmup!r}; expected a number of updates, an integer >= 0.")
    return count
