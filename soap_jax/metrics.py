"""Metrics of alignment: of feedback with kernels, of errors and of gradients with the true ones.

All metrics are pure and fast enough for use inside a jitted training loop. Angles are in degrees;
an angle with a zero tensor is NaN.

Metrics of weights take `(params, feedback)` and return a tree of scalars of feedback's structure.
Metrics of one layer's error take `(y_bar, kernel, feedback)`, where `y_bar`, the cotangent of the
layer's output, is the error e of the papers.

For loggers, `soap_jax.trees.named` converts these trees to flat dicts:

    >>> import jax.numpy as jnp
    >>> params = {"in": {"kernel": jnp.eye(2)}, "out": {"kernel": jnp.eye(2)}}
    >>> feedback = {"in": None, "out": {"kernel": -jnp.eye(2)}}
    >>> trees.named({"weight_angle": weight_angle(params, feedback)})
    {'weight_angle/out/kernel': Array(180., dtype=float32)}
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from soap_jax import dtypes, ops, rules, trees


def angle(a: chex.ArrayTree, b: chex.ArrayTree) -> jax.Array:
    """Computes the angle between two arrays, or between two trees as one long vector each.

        angle = 2 atan2(|u - v|, |u + v|),  u = a / |a|,  v = b / |b|

    This equals `arccos(u · v)`, but is also accurate near 0 and 180 degrees.

    Args:
        a: an array, or a tree of arrays.
        b: an array or tree of the same shapes.

    Returns:
        float32 (or wider) scalar, degrees in [0, 180]; NaN if either is zero.

    Raises:
        ValueError: if the trees or shapes differ, or if the trees contain no array.

    Example:
        >>> import jax.numpy as jnp
        >>> float(angle(jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])))
        90.0

    References:
        William Kahan. How futile are mindless assessments of roundoff in floating-point
        computation? 2006 (section 12). https://people.eecs.berkeley.edu/~wkahan/Mindless.pdf
    """
    leaves_a, structure_a = jax.tree.flatten(a)
    leaves_b, structure_b = jax.tree.flatten(b)
    same_shapes = list(map(jnp.shape, leaves_a)) == list(map(jnp.shape, leaves_b))
    if structure_a != structure_b or not same_shapes:  # type: ignore[operator]
        raise ValueError(
            f"the trees have the shapes {jax.tree.map(jnp.shape, a)} and "
            f"{jax.tree.map(jnp.shape, b)}; expected the same structure and shapes."
        )
    if not leaves_a:
        raise ValueError(f"the trees are {a!r} and {b!r}, without arrays; expected arrays.")
    leaves = dtypes.widen(*leaves_a, *leaves_b)
    leaves_a, leaves_b = leaves[: len(leaves_a)], leaves[len(leaves_a) :]
    units = list(zip(_unit(leaves_a), _unit(leaves_b), strict=True))
    apart = _norm([u - v for u, v in units])
    together = _norm([u + v for u, v in units])
    return jnp.degrees(2 * jnp.arctan2(apart, together))


def weight_angle(params: chex.ArrayTree, feedback: chex.ArrayTree) -> chex.ArrayTree:
    """Computes the angle between feedback and kernel for each layer: `angle(B, W)`.

    Args:
        params: as in `soap_jax.trees.map_pairs`.
        feedback: as in `soap_jax.trees.map_pairs`.

    Returns:
        A tree of scalars in degrees, of feedback's structure.

    Raises:
        ValueError: if feedback does not fit params.

    Example:
        >>> import jax.numpy as jnp
        >>> weight_angle({"kernel": jnp.eye(2)}, {"kernel": -jnp.eye(2)})
        {'kernel': Array(180., dtype=float32)}

    References:
        Lillicrap et al. (2016). https://doi.org/10.1038/ncomms13276
    """
    return trees.map_pairs(lambda path, w, b: angle(b, w), params, feedback)


def norm_ratio(params: chex.ArrayTree, feedback: chex.ArrayTree) -> chex.ArrayTree:
    """Computes the norm of feedback over the norm of its kernel for each layer: `|B| / |W|`.

    Args:
        params: as in `soap_jax.trees.map_pairs`.
        feedback: as in `soap_jax.trees.map_pairs`.

    Returns:
        A tree of scalars, of feedback's structure.

    Raises:
        ValueError: if feedback does not fit params.

    Example:
        >>> import jax.numpy as jnp
        >>> norm_ratio({"kernel": jnp.eye(2)}, {"kernel": 3 * jnp.eye(2)})
        {'kernel': Array(3., dtype=float32)}
    """

    def ratio(path, w, b):
        w, b = dtypes.widen(w, b)
        return _norm([b]) / _norm([w])

    return trees.map_pairs(ratio, params, feedback)


def sign_concordance(params: chex.ArrayTree, feedback: chex.ArrayTree) -> chex.ArrayTree:
    """Computes, for each layer, the share of non-zero weights with the same sign as feedback.

        mean over W != 0 of [sign(B) = sign(W)]

    Args:
        params: as in `soap_jax.trees.map_pairs`.
        feedback: as in `soap_jax.trees.map_pairs`.

    Returns:
        A tree of scalars in [0, 1], of feedback's structure; NaN for a kernel of zeros.

    Raises:
        ValueError: if feedback does not fit params.

    Example:
        >>> import jax.numpy as jnp
        >>> w, b = jnp.array([1.0, -2.0, 3.0, 0.0]), jnp.array([1.0, 1.0, 1.0, 1.0])
        >>> round(float(sign_concordance({"w": w}, {"w": b})["w"]), 3)
        0.667

    References:
        Liao, Leibo, Poggio. How important is weight symmetry in backpropagation? AAAI, 2016.
        https://arxiv.org/abs/1510.05067
    """

    def concordance(path, w, b):
        w, b = dtypes.widen(w, b)
        return jnp.mean(jnp.sign(b) == jnp.sign(w), where=w != 0)

    return trees.map_pairs(concordance, params, feedback)


def effective_learning_rate(
    learning_rate: ArrayLike, params: chex.ArrayTree, feedback: chex.ArrayTree
) -> chex.ArrayTree:
    """Computes the effective learning rate of the layer below each kernel with feedback.

        learning_rate * norm_ratio * cos(weight_angle) = learning_rate * <B, W> / <W, W>

    It is the learning rate times the length of B along W, relative to the length of W. With exact
    backpropagation it is `learning_rate`. If several layers with feedback are above a layer, their
    factors multiply.

    Args:
        learning_rate: scalar.
        params: as in `soap_jax.trees.map_pairs`.
        feedback: as in `soap_jax.trees.map_pairs`.

    Returns:
        A tree of scalars, of feedback's structure.

    Raises:
        ValueError: if feedback does not fit params.

    Example:
        >>> import jax.numpy as jnp
        >>> params, feedback = {"w": jnp.array([0.5, -0.5])}, {"w": jnp.array([1.0, -1.0])}
        >>> effective_learning_rate(0.5, params, feedback)
        {'w': Array(1., dtype=float32)}
    """

    def rate(path, w, b):
        w, b = dtypes.widen(w, b)
        return jnp.asarray(learning_rate, w.dtype) * jnp.sum(b * w) / jnp.sum(w * w)

    return trees.map_pairs(rate, params, feedback)


def gradient_angle(
    gradient: Callable[[chex.ArrayTree, chex.ArrayTree], chex.ArrayTree],
    params: chex.ArrayTree,
    feedback: chex.ArrayTree,
) -> chex.ArrayTree:
    """Computes the angle between pseudo-gradient and true gradient for each parameter.

        angle(gradient(params, feedback), gradient(params, kernels))

    The true gradient is that of the same model with the kernels as feedback.

    Args:
        gradient: `(params, feedback) -> gradient`, such as
            `lambda params, feedback: jax.grad(loss)(params, feedback, batch)`.
        params: as in `soap_jax.trees.map_pairs`.
        feedback: as in `soap_jax.trees.map_pairs`.

    Returns:
        A tree of scalars in degrees, of the gradient's structure.

    Raises:
        ValueError: if feedback does not fit params, or if `gradient` returns a scalar.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from soap_jax import ops
        >>> def loss(params, feedback):
        ...     hidden = jnp.tanh(jnp.array([1.0, 2.0]) @ params["below"])
        ...     return ops.feedback_dense(hidden, params["top"], feedback["top"])[0]
        >>> params = {"below": jnp.eye(2), "top": jnp.ones((2, 1))}
        >>> gradient_angle(jax.grad(loss), params, {"top": -params["top"]})
        {'below': Array(180., dtype=float32), 'top': Array(0., dtype=float32)}

    References:
        Lillicrap et al. (2016). https://doi.org/10.1038/ncomms13276
    """
    pseudo = gradient(params, feedback)
    if jax.tree_util.all_leaves([pseudo]) and jnp.ndim(pseudo) == 0:
        raise ValueError(
            "gradient(params, feedback) is a scalar, like a loss; expected a gradient, such as "
            "jax.grad(loss)(params, feedback)."
        )
    true = gradient(params, trees.at_kernels(params, feedback))
    return jax.tree.map(angle, pseudo, true)


def cotangent_angle(
    y_bar: jax.Array,
    kernel: jax.Array,
    feedback: jax.Array,
    *,
    op: ops.BilinearOp | None = None,
    x: jax.Array | None = None,
    per_example: bool = True,
) -> jax.Array:
    """Computes the angle between the input cotangents of one layer by feedback and by kernel.

        angle(x_bar by feedback, x_bar by kernel);   dense: angle(e Bᵀ, e Wᵀ)

    for any error e. It is a local metric; see `error_angle` for the whole chain of layers.

    Args:
        y_bar: cotangent e of the layer's output, `(batch, ...)`.
        kernel: forward weights W.
        feedback: feedback weights B, of the kernel's shape.
        op: the layer's bilinear op; by default a dense layer.
        x: the layer's input, or any array of its shape and dtype; needed with `op`.
        per_example: whether to compute one angle per example, or one for the batch as one vector.

    Returns:
        `(batch,)` degrees, NaN for an example whose error is zero; or a scalar.

    Raises:
        ValueError: if the shapes differ, or `op` is given without `x`.

    Example:
        >>> import jax.numpy as jnp
        >>> e, kernel = jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [0.0]])
        >>> cotangent_angle(e, kernel, jnp.array([[0.0], [3.0]]))
        Array([90., 90.], dtype=float32)

    References:
        Lillicrap et al. (2016), figure 2. https://doi.org/10.1038/ncomms13276
    """
    pseudo, true = _input_cotangents(y_bar, kernel, feedback, op, x)
    return error_angle(pseudo, true, per_example=per_example)


def error_angle(
    pseudo: chex.ArrayTree, true: chex.ArrayTree, *, per_example: bool = True
) -> chex.ArrayTree:
    """Computes the angle between the errors of a method and of backprop at activations.

        angle(a_bar by feedback or projections, a_bar by kernels)

    To compute the cotangent of an activation, add zeros to it and differentiate by them. For the
    output of a dense layer it is the gradient by the bias for each example.

    Args:
        pseudo: cotangents of activations by the method, each `(batch, ...)`.
        true: cotangents by backprop in the same network, of the same structure and shapes.
        per_example: whether to compute one angle per example, or one for the batch as one vector.

    Returns:
        A tree of the same structure: `(batch,)` degrees, NaN for an example whose error is zero; or
        scalars.

    Raises:
        ValueError: if structures or shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> error_angle({"h": jnp.eye(2)}, {"h": jnp.ones((2, 2))})["h"].round()
        Array([45., 45.], dtype=float32)

    References:
        Nøkland (2016). https://arxiv.org/abs/1609.01596
    """
    one = jax.vmap(angle) if per_example else angle
    if jax.tree.structure(pseudo) != jax.tree.structure(true):  # type: ignore[operator]
        angle(pseudo, true)  # raises
    return jax.tree.map(one, pseudo, true)


def angles_by_example(a: jax.Array, b: jax.Array, batch_size: int) -> jax.Array:
    """Computes the angles between two batches of errors for each example, if there is a batch axis.

    Args:
        a: errors, such as one array of `soap_jax.transform.layer_errors`.
        b: errors of the same shape.
        batch_size: the number of examples. The first axis of this length is the batch axis.

    Returns:
        `(batch_size,)` degrees, NaN for an example whose error is zero; without a batch axis a
        scalar, the angle between the whole arrays.

    Raises:
        ValueError: if shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> angles_by_example(jnp.eye(2), jnp.ones((2, 2)), 2).round()
        Array([45., 45.], dtype=float32)
        >>> angles_by_example(jnp.eye(2), jnp.ones((2, 2)), 3).round()
        Array(45., dtype=float32)
    """
    axes = [axis for axis, length in enumerate(jnp.shape(a)) if length == batch_size]
    return jax.vmap(angle, in_axes=axes[0])(a, b) if axes else angle(a, b)


def effective_rank(errors: chex.ArrayTree, *, batch_size: int | None = None) -> chex.ArrayTree:
    """Computes the effective rank of a batch of errors for each layer: the number of directions.

        exp(- Σ pᵢ log pᵢ),    p = σ / Σ σ

    where σ are the singular values of the errors as a matrix with one row per example. It is 1 if
    the errors of all examples are parallel, n for n orthogonal errors of equal length, and never
    more than the rank. Feedback alignment's errors have a lower effective rank than backprop's.

    Several errors of one example, such as those at the pixels of an image, form one long row. Use
    `x.reshape(-1, channels)` to give each its own row.

    The singular values are computed from the R of a QR decomposition; their error in float32 is
    about 1e-7 of the largest. (The eigenvalues of the Gram matrix only resolve values above 1/200
    of the largest, and miss up to a tenth of the effective rank of a feedback-aligned layer.) On an
    idle CPU 256 examples with 256 units take 6 ms, and 64 take 0.6 ms. On busy cores, where
    LAPACK's threads wait for each other, it takes many times longer. So do not measure at every
    step (`soap_jax.record_alignment`).

    Args:
        errors: `(batch, ...)`; or a tree of such arrays, as from `soap_jax.transform.layer_errors`.
        batch_size: the number of examples. The first axis of this length is the batch axis, also
            in errors of a scan over time. By default it is the first axis.

    Returns:
        A tree of the same structure, of scalars from 1 to min(batch, size); 0 for errors of zero,
        NaN if an error is not finite.

    Raises:
        ValueError: if an array has fewer than two axes, is empty, or has no batch axis.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from soap_jax import record_alignment, transform
        >>> effective_rank({"one": jnp.ones((3, 2)), "three": 5 * jnp.eye(3)})["three"].round(4)
        Array(3., dtype=float32)
        >>> def loss(params, x):
        ...     return jnp.sum(jnp.tanh(x @ params["in"]) @ params["out"])
        >>> def error_rank(x, params, feedback):
        ...     return effective_rank(transform.layer_errors(loss)(params, feedback, x))
        >>> params = {"in": jnp.eye(3), "out": jnp.ones((3, 1))}
        >>> chosen = {"error_rank": functools.partial(error_rank, jnp.eye(3))}
        >>> row = record_alignment(chosen, params, {"out": -params["out"]}, step=0, period=100)
        >>> row.values["error_rank/out"].round(4)
        Array(1., dtype=float32)

    References:
        Olivier Roy, Martin Vetterli. The effective rank: a measure of effective dimensionality.
        EUSIPCO, 2007. https://infoscience.epfl.ch/record/110188
        Gauthier Boeshertz, Razvan Pascanu, Claudia Clopath. Overcoming rank collapse in feedback
        alignment. 2026 (the rank of errors; we have not read its formula). https://arxiv.org/abs/2606.11123
    """

    def one(keys, x):
        shape = jnp.shape(x)
        num = shape[0] if batch_size is None and shape else batch_size
        if len(shape) < 2 or 0 in shape or num not in shape:
            where = "/".join(trees.path_of(keys))
            raise ValueError(
                f"the error{where and f' at {where}'} has the shape {shape}; expected (batch, ...) "
                f"with {'at least one example' if batch_size is None else f'{num} examples'}."
            )
        _, (x,) = _scaled(dtypes.widen(x))
        rows = jnp.moveaxis(rules.replicated(x), shape.index(num), 0).reshape(num, -1)
        tall = rows if rows.shape[0] >= rows.shape[1] else rows.T
        values = jnp.linalg.svd(jnp.linalg.qr(tall, mode="r"), compute_uv=False)
        total = jnp.sum(values)
        share = values / jnp.where(total == 0, 1, total)
        return jnp.where(total == 0, 0, jnp.exp(jnp.sum(jax.scipy.special.entr(share))))

    return jax.tree_util.tree_map_with_path(one, errors)


def path_angle(kernels: Sequence[jax.Array], feedback: Sequence[jax.Array]) -> jax.Array:
    """Computes the angle between the products of feedback and of kernels along a path of layers.

        angle(B_1 B_2 ··· B_m, W_1 W_2 ··· W_n)

    Products may align even if single factors do not. For FA use the feedback of each layer from an
    activation to the output, for product feedback alignment the factors along the path, and for DFA
    `[projection.T]`. The two paths may have different lengths.

    Args:
        kernels: matrices `(in, out)`, where each `out` is the next matrix's `in`.
        feedback: matrices of the same form; their product has the shape of the kernels' product.

    Returns:
        Scalar, degrees.

    Raises:
        ValueError: if a path is empty or its shapes do not chain, or the products differ in shape.

    Example:
        >>> import jax.numpy as jnp
        >>> a, b = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> float(path_angle([a, b], [a @ b])), float(path_angle([a], [-a]))
        (0.0, 180.0)

    References:
        Li Ji-An, Marcus K. Benna. Deep learning without weight symmetry. 2024 (path alignment).
        https://arxiv.org/abs/2405.20594
    """
    return angle(_product("feedback", feedback), _product("kernels", kernels))


def direct_weight_angle(
    kernel: jax.Array, below: jax.Array, above: jax.Array | None = None
) -> jax.Array:
    """Computes the weight alignment of DFA: the angle between a kernel and its projections.

        angle(W_l, P_(l-1)ᵀ P_l)         hidden layers: F_l F_(l-1)ᵀ in the paper's layout
        angle(W_L, P_(L-1)ᵀ)             the output layer

    A network aligns in this way so that its errors by backpropagation would agree with those by the
    projections. There is no angle for the first layer, which has no projection below it.

    Args:
        kernel: `(in, out of the layer)`.
        below: the projection of the layer's input, `(out, in)`.
        above: the projection of the layer's output, `(out, out of the layer)`; None for the
            network's output layer.

    Returns:
        Scalar, degrees.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> float(direct_weight_angle(jnp.ones((3, 2)), jnp.ones((4, 3)), jnp.ones((4, 2))))
        0.0

    References:
        Maria Refinetti, Stéphane d'Ascoli, Ruben Ohana, Sebastian Goldt. Align, then memorise: the
        dynamics of learning with feedback alignment. ICML, 2021. https://arxiv.org/abs/2011.12428
    """
    shapes = [jnp.shape(x) for x in (kernel, below, *([] if above is None else [above]))]
    fits = all(len(shape) == 2 for shape in shapes) and shapes[0][0] == shapes[1][1]
    last = (shapes[1][0],) if above is None else shapes[-1][1:]
    if not (fits and shapes[0][1:] == last and (above is None or shapes[1][0] == shapes[2][0])):
        raise ValueError(
            f"kernel, below and above have the shapes {shapes}; expected kernel (in, width), below "
            "(out, in) and above (out, width); or above None, if width is out."
        )
    path = [below.T] if above is None else [below.T, above]
    return angle(kernel, _product("projections", path))


class Descent(NamedTuple):
    """The descent condition over a batch.

    Attributes:
        mean: scalar, the mean of eᵀ W B e over the batch; while it is positive, the loss descends.
        share: scalar, the share of examples for which it is positive.
    """

    mean: jax.Array
    share: jax.Array


def descent_condition(
    y_bar: jax.Array,
    kernel: jax.Array,
    feedback: jax.Array,
    *,
    op: ops.BilinearOp | None = None,
    x: jax.Array | None = None,
) -> Descent:
    """Computes whether the error by feedback is within 90 degrees of the true error.

        eᵀ W B e = <x_bar by kernel, x_bar by feedback>

    in the paper's layout, where outputs are W x, and errors at inputs B e.

    Args:
        y_bar: cotangent e of the layer's output, `(batch, ...)`.
        kernel: forward weights.
        feedback: feedback weights, of the kernel's shape.
        op: the layer's bilinear op; by default a dense layer.
        x: the layer's input, or any array of its shape and dtype; needed with `op`.

    Returns:
        A `Descent`: the mean over the batch, and the share of examples for which it is positive.

    Raises:
        ValueError: if the shapes differ, or `op` is given without `x`.

    Example:
        >>> import jax.numpy as jnp
        >>> e, kernel = jnp.array([[1.0], [-2.0]]), jnp.array([[1.0], [1.0]])
        >>> descent_condition(e, kernel, jnp.array([[3.0], [-1.0]]))
        Descent(mean=Array(5., dtype=float32), share=Array(1., dtype=float32))

    References:
        Lillicrap et al. (2016). https://doi.org/10.1038/ncomms13276
    """
    pseudo, true = _input_cotangents(y_bar, kernel, feedback, op, x)
    products = (pseudo * true).reshape(len(pseudo), -1).sum(-1)
    return Descent(jnp.mean(products), jnp.mean(products > 0))


def _product(name, matrices):
    """The product of matrices, widened."""
    shapes = list(map(jnp.shape, matrices))
    chained = all(a[-1:] == b[:1] for a, b in itertools.pairwise(shapes))
    if not shapes or not chained or any(len(shape) != 2 for shape in shapes):
        raise ValueError(
            f"{name} have the shapes {shapes}; expected matrices (in, out), where each out is the "
            "next matrix's in."
        )
    exact = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return functools.reduce(exact, dtypes.widen(*matrices))


def _input_cotangents(y_bar, kernel, feedback, op, x):
    """The cotangents of a layer's input by feedback and by the kernel, widened."""
    trees.check_feedback(feedback, kernel)
    y_bar, kernel, feedback = dtypes.widen(y_bar, kernel, feedback)
    if y_bar.ndim < 1 + (op is None):
        raise ValueError(
            f"y_bar has shape {y_bar.shape}; expected (batch, ...). For one example give "
            "y_bar[None]."
        )
    if op is None:
        if kernel.ndim != 2 or y_bar.shape[-1] != kernel.shape[-1]:
            raise ValueError(
                f"y_bar has shape {y_bar.shape} and the kernel {kernel.shape}; expected (batch, "
                "..., out) and (in, out), as in a dense layer. For another layer give `op`."
            )
        exact = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
        return exact(y_bar, feedback.T), exact(y_bar, kernel.T)
    if x is None:
        raise ValueError(
            "`op` is given without `x`; expected also the layer's input, for its shape and dtype."
        )
    x_type = jax.typeof(x.astype(y_bar.dtype))
    return tuple(
        jax.linear_transpose(lambda x, w=w: op(x, w), x_type)(y_bar)[0] for w in (feedback, kernel)
    )


def _norm(leaves):
    """The norm of all leaves as one vector, without overflow or underflow of the squares."""
    scale, scaled = _scaled(leaves)
    return scale * _norm_in_range(scaled)


def _unit(leaves):
    """The leaves, divided by their norm; NaN if that is zero."""
    _, scaled = _scaled(leaves)
    norm = _norm_in_range(scaled)
    return [x / norm for x in scaled]


def _norm_in_range(leaves):
    return jnp.sqrt(sum(jnp.sum(jnp.square(jnp.abs(x))) for x in leaves))


def _scaled(leaves):
    """The largest absolute value (1 if all are zero), and the leaves divided by it."""
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x), initial=0) for x in leaves])
    scale = jnp.where(largest > 0, largest, 1)
    return scale, [x / scale for x in leaves]
