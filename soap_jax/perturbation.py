"""Gradients estimated by perturbation: learning with no way back for errors.

    grad_fn = perturbation.forward_gradient(loss)         # or one of the other two
    value, gradients = grad_fn(params, x, y, key=key)     # pure; any optimiser takes it from here

Something is changed at random, and the slope of the loss in that direction, times the direction, is
an estimate of the gradient:

    g = (1/n) Σ sᵢ vᵢ      over n random directions v, with the loss's slope s along each

                           v changes      s
    forward_gradient       params         ∇L · v, exactly, by forward differentiation
    weight_perturbation    params         (L(θ + σv) - L(θ - σv)) / 2σ
    node_perturbation      activations    the same; its g are errors, from which each layer has its
                                          gradient by itself

The entries of v are independent, of mean 0 and variance 1, and of fourth moment κ: 3 for normal
numbers, 1 for signs. The estimate then has the gradient as its mean (differences: up to σ² times
third derivatives, none where L is quadratic), and around it the variance

    E |g - ∇L|² = (N + κ - 2) |∇L|² / n,      N entries in v

So one direction has N times as much noise as gradient, and where the loss is curved alike in all
directions it stands 1/N of backprop's learning rate. That is the lower end of a comparison with
feedback. In node perturbation N counts units (of one example, see there), which are fewer.

Losses are evaluated 1 + 2n times, or n times with tangents (`jax.vmap` over directions: n times
the memory). A loss that draws, as with dropout, takes its key among `args`, so that all evaluations
draw the same. `soap_jax.study.compare` knows the first two as "forward_gradient" and
"weight_perturbation".
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
"""`(params, *args) -> loss`, a scalar, or `(loss, aux)`."""

Sampler = Callable[[chex.PRNGKey, tuple[int, ...]], jax.Array]
"""`(key, shape) -> numbers` of mean 0 and variance 1; the first axis is that of the directions."""

GradFn = Callable[..., tuple[Any, chex.ArrayTree]]
"""`(params, *args, key) -> (value, gradients)`."""


def forward_gradient(
    loss: Loss, *, directions: int = 1, sampler: Sampler = draws.normal, has_aux: bool = False
) -> GradFn:
    """Makes a function that returns a loss and its forward gradient.

        g = (1/n) Σ (∇L · vᵢ) vᵢ,    ∇L · v by `jax.jvp`

    Unbiased, with the variance (N + 1) |∇L|² / n for normal directions, N the number of params.
    Directions that are a basis, each √N long, give the gradient itself. No activation is stored for
    a way back.

    Args:
        loss: `(params, *args) -> scalar`. It is differentiated forwards, which functions of
            `jax.custom_vjp` refuse: `with_feedback` and the ops of feedback among them.
        directions: n, how many are averaged.
        sampler: what draws them, all n at once for each array of params: `(key, (n, *shape))`.
        has_aux: whether `loss` returns `(loss, aux)`.

    Returns:
        `(params, *args, key) -> (value, gradients)`, with `key` by its name; with `has_aux`
        `((value, aux), gradients)`.

    Raises:
        ValueError: for a number of directions that is none; and from the returned function if
            params are not all real floating-point arrays, for a key that is none, or if the
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

    Directions of signs make it SPSA, simultaneous perturbation stochastic approximation; its
    variance is (N - 1) |∇L|² / n, N the number of params. Nothing is differentiated, so the loss
    may be anything: with spikes, rounding, a device behind `jax.pure_callback`.

    Args:
        loss: `(params, *args) -> scalar`.
        scale: σ, positive, may be traced. Larger than what rounding makes of params and loss: in
            float32 the default is, in bfloat16 take 0.1.
        directions: as in `forward_gradient`.
        sampler: as there; by default signs.
        has_aux: as there; `aux` is that of the unchanged params, as the value is.

    Returns:
        As `forward_gradient`.

    Raises:
        ValueError: if the scale is not positive; or as there.

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

    An error e reaches the params below its tap, down to the next taps, by their own derivative. So
    tap the output of every layer before its nonlinearity, the network's output included; params
    after the last tap have their exact gradient. `tap` is that of `soap_jax.activity`.

    With a loss of `(batch,)`, that of each example, each one's noise is weighed by its own loss:
    the variance of an example's error is (N + 1) |e|² / n, N its own units. (An example's loss must
    not depend on others, as with batch normalisation it does.) With a scalar loss, the mean, N is
    the units of the whole batch, and the noise of all examples reaches each.

    Args:
        loss: `(tap, params, *args) -> scalar`, or `(batch,)`, whose mean is learnt.
        scale: σ, positive, may be traced; for activations as for params in `weight_perturbation`.
        directions: as in `forward_gradient`.
        sampler: as there.
        has_aux: as there; `aux` is that of the unchanged activations, as the value is.

    Returns:
        As `forward_gradient`.

    Raises:
        ValueError: as in `weight_perturbation`; as `soap_jax.activity.value_and_grad` for taps; or
            if a loss `(batch,)` meets a tap whose first axis is another.

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
    """`a`, whose cotangent is `error`, whatever comes back to it."""
    del error
    return a


def _send_fwd(a, error):
    return a, error


def _send_bwd(error, arrived):
    del arrived
    return error, None


_send.defvjp(_send_fwd, _send_bwd)


def _draw(key, tree, directions, sampler):
    """Directions `(n, *shape)` for every array of a tree, in its dtype."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    for keys, leaf in leaves:
        dtype = dtypes.of(leaf)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{trees.show(trees.path_of(keys))} is {dtype or type(leaf).__name__}; expected "
                "real floating-point arrays, of which there are slopes. Bind the rest to the loss."
            )

    def one(key, leaf):
        shape = (directions, *jnp.shape(leaf))
        drawn = jnp.asarray(sampler(key, shape))
        if drawn.shape != shape:
            raise ValueError(f"sampler drew {drawn.shape}; expected {shape}, as asked for.")
        return drawn.astype(jnp.result_type(leaf))

    each = jax.random.split(draws.typed(key), len(leaves))
    drawn = [one(key, leaf) for key, (_, leaf) in zip(each, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def _slopes(fun, at, steps, scale):
    """Central differences of `fun` along each step, `(n, ...)`."""

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
    """The mean of slope times step; a slope's axes are the first of its step's."""

    def one(step):
        s, d = dtypes.widen(slopes, step)
        s = jnp.expand_dims(s, range(s.ndim, d.ndim))
        return jnp.mean(s * d, axis=0).astype(step.dtype)

    return jax.tree.map(one, steps)


def _check(directions, sampler, scale: ArrayLike = 1.0):
    grids.check_count("directions", directions)
    activity.check_positive("scale", scale)
    if not callable(sampler):
        raise ValueError(f"sampler is {sampler!r}; expected (key, shape) -> numbers.")


def _check_examples(examples, types):
    others = {name: type_.shape for name, type_ in types.items() if type_.shape[:1] != examples}
    if len(examples) > 1 or (examples and others):
        raise ValueError(
            f"the loss has the shape {examples} and taps have {others or types}; expected a "
            "scalar, or one number for each example, and taps with the examples' axis first."
        )
