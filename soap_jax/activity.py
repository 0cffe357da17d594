"""Activity propagation: layers hand on a second-order step of their activities as the error.

    def loss(tap, params, x, y):
        h = tap("hidden", jnp.tanh(x @ params["in"]))
        return jnp.mean((h @ params["out"] - y) ** 2)

    grad_fn = activity.value_and_grad(loss, learning_rate=0.05)
    value, gradients = grad_fn(params, x, y, step=step)     # pure; any optimiser takes it from here
    value = loss(activity.untapped, params, x, y)       # evaluation

Two passes are made over one batch, of which only the second one's gradients reach the weights. For
each tapped activation a, of n elements in the whole batch,

    1.  g     = dL/da                   backprop, the taps doing nothing
    2.  a     ← a - (lr / n) g          every tap moves its activation; then, backwards,
        g'    = the cotangent that arrives: the taps above have already replaced theirs
        a_bar = (lr / n) g² / d'        what is handed on in place of g', where
                d = g - g',  d' = d + 2 bias sign(d),  d' = bias where d = 0

This is the secant estimate of a Newton step: where L is quadratic in a, with a diagonal Hessian h,
and without bias, `a_bar` is g / h. What lies between taps is differentiated as it is, so there may
be feedback alignment in it; both passes then go through feedback.

Before using it, know three things, all measured by `python -m benchmarks.activity`:

-   `bias` is an absolute number, while d shrinks as lr / n. Where bias is much larger than d, the
    error is merely `(lr / n) g² sign(d) / (2 bias)`. On MNIST, with the original's rate, the
    default and batches of 64, that is so small that the hidden layer does not learn.
-   In float32 the shift (lr / n) g is often below the rounding of a, so that d is zero or noise,
    which a small bias amplifies. Let `learning_rate` be 1000 times the weights', with a bias as
    many times larger than it would be: Newton's step is the same, and float32 suffices.
-   A tap below another one sees g' made of the other's step, not of a gradient, so that d is no
    second difference there. Layers below the topmost tap hardly learn.

The method comes from SOAP, the PyTorch package that this one grew from. There it was slower than
backprop, and so it is here.
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

Tap = Callable[[str, jax.Array], jax.Array]
"""`(name, activation) -> activation`."""

Loss = Callable[..., Any]
"""`(tap, params, *args) -> loss`, a scalar, or `(loss, aux)`."""

ValueAndGrad = Callable[..., tuple[Any, chex.ArrayTree]]
"""`(params, *args, step) -> (value, gradients)`, with `step` the number of completed updates.

For `soap_jax.training.make_gradient_step` `*args` are the feedback weights (None without) and the
batch."""

_MARK = "soap_jax.activity:"  # before a tap's number, in the jaxpr that `types_of_taps` reads
_TRANSPARENT = ("jit", "pjit", "checkpoint", "remat", "remat2")  # primitives that a tap may be in


def untapped(name: str, activation: jax.Array) -> jax.Array:
    """The tap that does nothing, for evaluation and plain backprop.

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

    at each tapped activation; see the module's docstring. As in `jax.value_and_grad` the value is
    the loss before the update: the first pass's, with activations as they are. So is `aux`.

    The loss takes a `tap` as its first argument and calls it on each activation to be tapped, by a
    name of its own: `h = tap("hidden", h)`. Any model will do that hands `tap` on: a plain
    function, a Linen module (`model.apply(variables, x, tap)`), an NNX one. Tap whole batches,
    outside `vmap`, `scan` and the like; `jit` and `checkpoint` may be around a tap. The result
    works under `jit`, `vmap`, `scan` and, by each device's share of the batch, `shard_map`. The
    loss is traced three times, with a warm-up once more.

    Args:
        loss: `(tap, params, *args) -> scalar`, the mean over a batch.
        learning_rate: positive scalar, lr above: how far the activities move, in the original as
            far as the weights. May be traced.
        bias: positive scalar, which keeps the step finite where g hardly changes. With the default
            the original's result is repeated: on MNIST, after 0.2 epoch at the original's rate,
            the training loss is 0.93 (there 0.92), backprop's 0.38 (0.37).
        warmup: number of first updates that are plain backprop; the original has 5.
        has_aux: whether `loss` returns `(loss, aux)`.

    Returns:
        `(params, *args, step) -> (value, gradients)`, with `step` the number of completed updates,
        an integer scalar that may be traced, and gradients by `params`; with `has_aux`,
        `((value, aux), gradients)`.

    Raises:
        ValueError: if a number is out of range; and from the returned function if `step` is no
            integer scalar, if nothing is tapped, if a name is used twice or is no string, if what
            is tapped is not floating point, or if a tap lies inside `vmap`, `scan` and the like.

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
        SOAP, the PyTorch package that this one grew from; there is no paper.
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
        # Closed over, not passed: arguments may be anything, not arrays alone.
        is_warm = jnp.asarray(step) >= warmup
        return lax.cond(is_warm, lambda: propagate(params, args), lambda: backprop(params, args))

    return grad_fn


def types_of_taps(run: Callable[[Tap], Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The type of each tapped activation, by name; computes nothing.

    A tap in a mapped or repeated part of the loss sees one example, or many in turn. It could not
    know its activation as a whole, so the jaxpr is searched for where taps have ended up.
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
            "the loss gets as its first argument. (Is it handed on to the model?)"
        )
    types: dict[str, jax.ShapeDtypeStruct] = {}
    for call, shape, inside in _marks(jaxpr):
        name, type_ = calls[call]
        if shape != type_.shape:  # `vmap` leaves no equation of its own
            inside = "vmap"
        if inside:
            raise ValueError(
                f"tap {name!r} lies inside {inside}, where it is not called once on a whole "
                "activation; expected it outside, as in tap(name, jax.vmap(layer)(x)) or "
                "tap(name, jax.lax.scan(...)[1]). `jit` and `checkpoint` may be around a tap."
            )
        if name in types:
            raise ValueError(
                f"the tap's name {name!r} is used twice; expected a name of its own for each "
                "tapped activation."
            )
        types[name] = type_
    if lost := [name for name, _ in calls if name not in types]:
        raise ValueError(
            f"tap {lost[0]!r} is called, but not by the loss: its jaxpr lacks it; expected each "
            "tap to be called once whenever the loss is evaluated."
        )
    return types


def check_positive(name: str, value: ArrayLike) -> None:
    """Raises ValueError unless the value is a positive number, or one that is traced."""
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
    """The second pass's tap: shifts `a`, and hands on the secant step."""
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
    # Not g² first: of an error of 1e-20 it is zero in float32.
    a_bar = g.astype(wide) * (rate * g.astype(wide) / biased)
    return a_bar.astype(g.dtype), None, None, None


_move.defvjp(_move_fwd, _move_bwd)


def _at_least_float32(dtype: DTypeLike):
    return np.promote_types(dtype, np.float32)


def _marks(jaxpr, inside: str = "") -> Iterator[tuple[int, tuple[int, ...], str]]:
    """Finds `(call, shape, primitive that it is inside of)` of the taps in a jaxpr."""
    for eqn in jaxpr.eqns:
        kind = eqn.primitive.name
        if kind == "name" and eqn.params["name"].startswith(_MARK):
            yield int(eqn.params["name"].removeprefix(_MARK)), eqn.invars[0].aval.shape, inside
        for part in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(part):
                body = part.jaxpr if isinstance(part, core.ClosedJaxpr) else part
                yield from _marks(body, inside or ("" if _is_transparent(eqn) else kind))


def _is_transparent(eqn) -> bool:
    """Whether a tap may be in it: it is called as it stands, as what `with_feedback` returns is."""
    name = eqn.primitive.name
    return name in _TRANSPARENT or (
        name == "custom_vjp_call"
        and eqn.params["call_jaxpr"].jaxpr.debug_info.func_src_info.startswith("with_feedback ")
    )


def _is_jaxpr(value) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _check_tap(name, activation):
    if not isinstance(name, str):
        raise ValueError(f"a tap's name is {name!r}; expected a string: tap(name, activation).")
    dtype = jnp.result_type(activation)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"the activation at tap {name!r} has dtype {dtype}; expected a floating-point dtype, "
            "since only such an activation has a gradient. Tap it before it is cast, or after."
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
