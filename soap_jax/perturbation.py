"""Gradient estimates by perturbation: learning without a backward pass of errors.

    grad_fn = perturbation.forward_gradient(loss)         # or one of the other two
    value, gradients = grad_fn(params, x, y, key=key)     # pure; for any optimiser

Params or activations are changed in a random direction. The slope of the loss in that direction,
times the direction, is an estimate of the gradient:

    g = (1/n) Σ sᵢ vᵢ      over n random directions v, with the slope s of the loss along each

                           v changes      s
    forward_gradient       params         ∇L · v, exact, by forward differentiation
    weight_perturbation    params         (L(θ + σv) - L(θ - σv)) / 2σ
    node_perturbation      activations    the same; here g are errors, from which each layer
                                          computes its own gradient

The entries of v are independent, with mean 0, variance 1 and fourth moment κ, which is 3 for normal
numbers and 1 for signs. The mean of the estimate is then the gradient. (For differences it is so up
to σ² times third derivatives, and exactly if L is quadratic.) The variance is

    E |g - ∇L|² = (N + κ - 2) |∇L|² / n,      N entries in v

So with one direction the noise is N times the gradient. If the loss has the same curvature in all
directions, only 1/N of backprop's learning rate is stable. This is the lower end of a comparison
with feedback. In node perturbation N is the number of units (of one example, see there), which is
smaller.

The loss is evaluated 1 + 2n times, or n times with tangents. (`jax.vmap` over directions needs n
times the memory.) A loss that draws random numbers, such as dropout, takes its key from `args`, so
all evaluations draw the same numbers. In `soap_jax.study.compare` the first two are the methods
"forward_gradient" and "weight_perturbation".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from soap_jax import activity, draws, dtypes, grids, trees

Loss = Callable[..., Any]
"""A function `(params, *args) -> loss`, a scalar, or `(loss, aux)`."""

Sampler = Callable[[chex.PRNGKey, tuple[int, ...]], jax.Array]
"""A function `(key, shape) -> numbers` of mean 0 and variance 1, with directions as first axis."""

GradFn = Callable[..., tuple[Any, chex.ArrayTree]]
"""A function `(params, *args, key) -> (value, gradients)`."""


def forward_gradient(
    loss: Loss, *, directions: int = 1, sampler: Sampler = draws.normal, has_aux: bool = False
) -> GradFn:
    """Makes a function that returns a loss and its forward gradient.

        g = (1/n) Σ (∇L · vᵢ) vᵢ,    ∇L · v by `jax.jvp`

    It is unbiased, with variance (N + 1) |∇L|² / n for normal directions and N params. If the
    directions form an orthogonal basis, each of length √N, it is exactly the gradient. No
    activation is stored for a backward pass.

    Args:
        loss: `(params, *args) -> scalar`. It must support forward-mode differentiation, which
            functions with `jax.custom_vjp` do not, such as `with_feedback` and the feedback ops.
        directions: n, the number of directions over which the mean is taken.
        sampler: draws all n directions of one array of params: `(key, (n, *shape)) -> numbers`.
        has_aux: whether `loss` returns `(loss, aux)`.

    Returns:
        `(params, *args, key) -> (value, gradients)`, where `key` is a keyword argument; with
        `has_aux` it returns `((value, aux), gradients)`.

    Raises:
        ValueError: if `directions` is not an integer of at least 1; and from the returned function,
            if params are not all real floating-point arrays, if `key` is not a PRNG key, or if the
            sampler draws another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def loss(w, x):
        ...     return jnp.sum((w - x) ** 2)
        >>> grad_fn = forward_gradient(loss, directions=10_000)
        >>> value, gradient = grad_fn(jnp.array([1.0, 2.0]), 0.0, key=jax.random.key(0))
        >>> float(value), gradient.round(0)  # ± 0.08: |∇L| √(3 / 10,000)
        (5.0, Array([2., 4.], dtype=float32))

    References:
        Atılım Güneş Baydin, Barak A. Pearlmutter, Don Syme, Frank Wood, Philip Torr. Gradients
        without backpropagation. 2022. https://arxiv.org/abs/2202.08587
    """
    _check(directions, sampler)

    def grad_fn(params: chex.ArrayTree, *args, key: chex.PRNGKey):
        tangents = _draw(key, params, directions, sampler)

        def slope(tangent):
            of_params = (lambda params: loss(params, *args)), (params,), (tangent,)
            return jax.jvp(*of_params, has_aux=has_aux)

        axes = (None, 0, None) if has_aux else (None, 0)
        value, slopes, *aux = jax.vmap(slope, out_axes=axes)(tangents)
        return (value, *aux) if has_aux else value, _estimate(slopes, tangents)

    return grad_fn


def weight_perturbation(
    loss: Loss,
    *,
    scale: ArrayLike = 1e-3,
    directions: int = 1,
    sampler: Sampler = draws.signs,
    has_aux: bool = False,
) -> GradFn:
    """Makes a function that returns a loss and its gradient by weight perturbation.

        g = (1/n) Σ sᵢ vᵢ,    s = (L(θ + σv) - L(θ - σv)) / 2σ

    With signs as directions this is SPSA, simultaneous perturbation stochastic approximation, with
    variance (N - 1) |∇L|² / n for N params. Nothing is differentiated, so the loss may contain
    spikes, rounding, or a device behind `jax.pure_callback`.

    Args:
        loss: `(params, *args) -> scalar`.
        scale: σ, positive, may be traced. It must be larger than the rounding errors of params and
            loss. The default is large enough for float32; for bfloat16 use 0.1.
        directions: as in `forward_gradient`.
        sampler: as in `forward_gradient`; by default signs.
        has_aux: as in `forward_gradient`; value and `aux` are those of the unchanged params.

    Returns:
        As `forward_gradient`.

    Raises:
        ValueError: if the scale is not positive; or as `forward_gradient`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> grad_fn = weight_perturbation(lambda w: jnp.round(10 * w**2) / 10, scale=0.5)
        >>> value, gradient = grad_fn(jnp.array(1.5), key=jax.random.key(0))
        >>> round(float(value), 4), round(float(gradient), 4)
        (2.2, 3.0)

    References:
        Gert Cauwenberghs. A fast stochastic error-descent algorithm for supervised learning and
        optimization. NeurIPS, 1992.
        https://proceedings.neurips.cc/paper/1992/hash/67d96d458abdef21792e6d8e590244e7-Abstract.html
        James C. Spall. Multivariate stochastic approximation using a simultaneous perturbation
        gradient approximation. IEEE Transactions on Automatic Control, 1992.
        https://doi.org/10.1109/9.119632
    """
    _check(directions, sampler, scale)

    def grad_fn(params: chex.ArrayTree, *args, key: chex.PRNGKey):
        def loss_at(params):
            value = loss(params, *args)
            return value[0] if has_aux else value

        steps = _draw(key, params, directions, sampler)
        return loss(params, *args), _estimate(_slopes(loss_at, params, steps, scale), steps)

    return grad_fn


def node_perturbation(
    loss: activity.Loss,
    *,
    scale: ArrayLike = 1e-3,
    directions: int = 1,
    sampler: Sampler = draws.normal,
    has_aux: bool = False,
) -> GradFn:
    """Makes a function that returns a loss and its gradient by node perturbation.

        e = (1/n) Σ sᵢ ξᵢ,    s = (L(a + σξ) - L(a - σξ)) / 2σ      at all tapped activations a
        W_bar = xᵀ e                                        where the tap is at a = x W

    The operations between an error e and the taps below it are differentiated exactly. So tap the
    output of every layer before its nonlinearity, including the output of the network; params after
    the last tap have their exact gradient. `tap` is used as in `soap_jax.activity`.

    If the loss is `(batch,)`, one number per example, the noise of each example is weighted by its
    own loss. The variance of the error of an example is then (N + 1) |e|² / n, with N the units of
    one example. (The loss of an example must not depend on other examples, as it does with batch
    normalisation.) If the loss is a scalar, the mean, N is the number of units of the whole batch,
    and every error contains the noise of all examples.

    Args:
        loss: `(tap, params, *args) -> scalar`, or `(batch,)`, of which the mean is minimised.
        scale: σ, positive, may be traced; as in `weight_perturbation`, but for activations.
        directions: as in `forward_gradient`.
        sampler: as in `forward_gradient`.
        has_aux: as in `forward_gradient`; value and `aux` are those of the unchanged activations.

    Returns:
        As `forward_gradient`.

    Raises:
        ValueError: as in `weight_perturbation`; as `soap_jax.activity.value_and_grad` for taps; or
            if the loss is `(batch,)` and the first axis of a tap has another length.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def loss(tap, w, x):
        ...     return jnp.sum(tap("y", x @ w) ** 2, axis=-1)
        >>> grad_fn = node_perturbation(loss, directions=10_000)
        >>> w, x = jnp.array([[1.0], [2.0]]), jnp.eye(2)
        >>> value, gradient = grad_fn(w, x, key=jax.random.key(0))
        >>> float(value), gradient.round(0)
        (2.5, Array([[1.],
               [2.]], dtype=float32))

    References:
        Ila R. Fiete, H. Sebastian Seung. Gradient learning in spiking neural networks by dynamic
        perturbation of conductances. Physical Review Letters, 2006.
        https://doi.org/10.1103/PhysRevLett.97.048104
        Justin Werfel, Xiaohui Xie, H. Sebastian Seung. Learning curves for stochastic gradient
        descent in linear feedforward networks. Neural Computation, 2005 (the variances).
        https://doi.org/10.1162/089976605774320539
    """
    _check(directions, sampler, scale)

    def grad_fn(params: chex.ArrayTree, *args, key: chex.PRNGKey):
        types = activity.types_of_taps(lambda tap: loss(tap, params, *args))
        noise = _draw(key, types, directions, sampler)

        def losses_at(shifts):
            value = loss(lambda name, a: a + shifts[name], params, *args)
            return value[0] if has_aux else value

        zeros = jax.tree.map(jnp.zeros_like, types)
        slopes = _slopes(losses_at, zeros, noise, scale)
        _check_examples(slopes.shape[1:], types)
        errors = _estimate(slopes / max(slopes[0].size, 1), noise)

        def mean_loss(params):
            out = loss(lambda name, a: _send(jnp.asarray(a), errors[name]), params, *args)
            value, aux = out if has_aux else (out, None)
            return jnp.mean(value), aux

        (value, aux), gradients = jax.value_and_grad(mean_loss, has_aux=True)(params)
        return (value, aux) if has_aux else value, gradients

    return grad_fn


@jax.custom_vjp
def _send(a, error):
    """Returns `a`, with `error` as its cotangent."""
    del error
    return a


def _send_fwd(a, error):
    return a, error


def _send_bwd(error, arrived):
    del arrived
    return error, None


_send.defvjp(_send_fwd, _send_bwd)


def _draw(key, tree, directions, sampler):
    """Draws directions `(n, *shape)` for every array of a tree, in its dtype."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    for keys, leaf in leaves:
        dtype = dtypes.of(leaf)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{trees.show(trees.path_of(keys))} is {dtype or type(leaf).__name__}; expected "
                "real floating-point arrays, along which there are slopes. Bind other values to "
                "the loss."
            )

    def one(key, leaf):
        shape = (directions, *jnp.shape(leaf))
        drawn = jnp.asarray(sampler(key, shape))
        if drawn.shape != shape:
            raise ValueError(f"sampler drew {drawn.shape}; expected {shape}, the given shape.")
        return drawn.astype(jnp.result_type(leaf))

    each = jax.random.split(draws.typed(key), len(leaves))
    drawn = [one(key, leaf) for key, (_, leaf) in zip(each, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def _slopes(fun, at, steps, scale):
    """Computes central differences of `fun` along each step, `(n, ...)`."""

    def moved(step, sign):
        def one(x, d):
            wide = dtypes.widen(x, d)
            moved = wide[0] + jnp.asarray(sign * scale, wide[1].dtype) * wide[1]
            return moved.astype(jnp.result_type(x))

        return fun(jax.tree.map(one, at, step))

    def slope(step):
        up, down = dtypes.widen(moved(step, 1), moved(step, -1))
        return (up - down) / jnp.asarray(2 * scale, up.dtype)

    return jax.vmap(slope)(steps)


def _estimate(slopes, steps):
    """Computes the mean of slope times step; slopes have the first axes of the steps."""

    def one(step):
        s, d = dtypes.widen(slopes, step)
        s = jnp.expand_dims(s, range(s.ndim, d.ndim))
        return jnp.mean(s * d, axis=0).astype(step.dtype)

    return jax.tree.map(one, steps)


def _check(directions, sampler, scale: ArrayLike = 1.0):
    grids.check_count("directions", directions)
    activity.check_positive("scale", scale)
    if not callable(sampler):
        raise ValueError(f"sampler is {sampler!r}; expected a function (key, shape) -> numbers.")


def _check_examples(examples, types):
    others = {name: type_.shape for name, type_ in types.items() if type_.shape[:1] != examples}
    if len(examples) > 1 or (examples and others):
        raise ValueError(
            f"the loss has the shape {examples} and taps have {others or types}; expected a "
            "scalar, or one number for each example, and taps with examples as their first axis."
        )
