"""Direct feedback: sends the output's error, or the target, directly to every block.

Direct feedback alignment (DFA) does not send errors from block to block. Instead each hidden
activation a gets its cotangent from the cotangent e of the network's output, through a fixed random
`projection` P of its own:

    a_bar = e · P            P: (out, *features) for an activation (batch, *features)

No error goes on to the block below. Write the network as usual, stop the ordinary path with
`soap_jax.ops.detach`, and connect the activations to the output:

    h1 = block1(x)                                  # anything: dense, convolution, attention
    h2 = block2(detach(h1))
    output = head(detach(h2))
    output = direct_feedback(output, (h1, h2), (p1, p2))

The value of the output does not change, only derivatives do. Without `detach` the activation gets
the sum of both errors.

**Time and space.** P has the shape (out, *features), where features are the last axes of the
activation. All other axes of the activation, and all but the last axis of the output, are leading
axes, which are aligned from the left. The error is that of a direct connection from the activation
to the output, `output + a · Pᵀ`. This connection sums over leading axes that the output lacks, and
broadcasts over leading axes that the activation lacks:

    output          activation         P               error
    (batch, out)    (batch, F)         (out, F)        one per example
    (batch, out)    (batch, T, F)      (out, F)        the same at every time
    (batch, out)    (batch, T, F)      (out, T, F)     through another P at every time
    (batch, T, out) (batch, T, F)      (out, F)        one per example and time
    (batch, T, out) (batch, F)         (out, F)        summed over time
    (batch, out)    (batch, H, W, C)   (out, H, W, C)  Nøkland's choice for convolutions

**Scale.** e is a cotangent, so it contains the factor 1/batch of the loss, like every gradient.
Signs and targets do not contain it, so sDFA and DRTP divide by the number of output rows. A
projection may have any floating-point or integer dtype (such as int8 for signs), and is cast to the
activation's dtype.

**Learning.** With `projection_bar="kernel"` the cotangent of a projection is that of the weights of
the direct connection, the product of the sent error and the activation:

    P_bar = eᵀ · a           summed over leading axes: direct Kolen-Pollack (DKP)

An optimiser over (params, projections) updates both, with weight decay as in Kolen-Pollack
learning.

**Devices.** A projection may also be a function `(error, shape, key) -> x_bar`: a noisy or
quantised projection, or one that an analog or optical device computes (`jax.pure_callback`). It
gets the sent error, `(*leading, out)`, and returns the cotangent of an activation of the given
shape:

    def noisy(error, shape, key):
        return (error @ p + 0.1 * jax.random.normal(key, shape)).reshape(shape)

A function cannot be an argument of a `jax.jit` function, but `jax.tree_util.Partial(project, p)`,
which contains its arrays, can. It is called as `project(p, error, shape, key)`.

References:
    Arild Nøkland. Direct feedback alignment provides learning in deep neural networks. NeurIPS,
    2016. https://arxiv.org/abs/1609.01596
    Charlotte Frenkel, Martin Lefebvre, David Bol. Learning without feedback: fixed random learning
    signals allow for feedforward training of deep neural networks. Frontiers in Neuroscience, 2021
    (DRTP, sDFA). https://arxiv.org/abs/1909.01311
    Matthew Bailey Webster, Jonghyun Choi, Changwook Ahn. Learning the connections in direct
    feedback alignment. 2021 (DKP). https://openreview.net/forum?id=zgGmAx9ZcY
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from soap_jax import draws, dtypes, ops, trees
from soap_jax.feedback import glorot_normal

__all__ = [
    "Block",
    "Error",
    "ProjectFn",
    "ProjectionBar",
    "direct_feedback",
    "direct_target",
    "draw_projection",
    "draw_projections",
    "scan_blocks",
]

ProjectFn = Callable[[jax.Array, tuple[int, ...], chex.PRNGKey | None], jax.Array]
"""A projection computed by a device: `(error, shape, key) -> x_bar`, with x_bar of this shape."""

Error = Literal["exact", "sign"]
"""The error that is sent: the output's cotangent (DFA), or its signs (sDFA)."""

ProjectionBar = Literal["kernel"] | None
"""The cotangent of a projection: zeros (None), or a kernel's (direct Kolen-Pollack)."""

Block = Callable[[chex.ArrayTree, jax.Array], jax.Array]
"""A function `(params, x) -> y`, with y of x's shape and dtype."""


def direct_feedback(
    output: jax.Array,
    activation: chex.ArrayTree,
    projection: chex.ArrayTree,
    *,
    error: Error = "exact",
    target: jax.Array | None = None,
    stacked: bool = False,
    rows: float | None = None,
    initializer: jax.nn.initializers.Initializer = glorot_normal,
    key: chex.PRNGKey | None = None,
    projection_bar: ProjectionBar = None,
) -> jax.Array:
    """Direct feedback alignment: sends the output's error to activations; returns the output.

    With e the cotangent of the output,

        a_bar = e · P                  error="exact": DFA
        a_bar = sign(e) · P / rows     error="sign": sDFA
        a_bar = t · P / rows           with a target t: DRTP, see also `direct_target`

    The layers that compute the output get e itself. Stop the ordinary path from the activation to
    the next block with `soap_jax.ops.detach`. With one hidden layer, and P the transpose of its
    feedback, this is feedback alignment.

    Args:
        output: `(*leading, out)`; with a target, any array on which the loss depends.
        activation: `(*leading', *features)`, or a tree of such arrays.
        projection: `(out, *features)`, or a tree of projections, of activation's structure; see
            `draw_projections`. A typed PRNG key means `draw_projection(key, out, features)`: the
            projection is not stored, and the backward pass draws it again. The activation then has
            as many leading axes as the output, and at least its last axis is a feature axis. A
            function `(error, shape, key) -> x_bar` means a device; see the module's docstring.
        error: "exact" or "sign".
        target: `(*leading, out)`, floating point; sent instead of the output's error.
        stacked: whether activations and projections (or keys) have a first axis of blocks, as in
            the result of `scan_blocks`. All blocks then use one matrix product; a function is
            called once for all of them.
        rows: with "sign" or a target, the number of rows over which the loss is a mean; by default
            the product of all axes but the last of the output (or of the target). Give it if `vmap`
            or `shard_map` splits the batch.
        initializer: draws projections from keys, as in `draw_projection`.
        key: a PRNG key for projections that are functions, from which each of them gets its own key
            (None if no key is given). For fresh noise give a fresh key at every step.
        projection_bar: the cotangent of the projections. None: zeros. "kernel": the product of the
            sent error and the activation, for direct Kolen-Pollack; only for floating-point arrays,
            and not with a target.

    Returns:
        `output`.

    Raises:
        ValueError: at trace time, if structures or shapes do not fit, if `error` or
            `projection_bar` is unknown, or if a projection that should learn is not a
            floating-point array.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from soap_jax import ops
        >>> def f(hidden, projection):
        ...     output = ops.detach(hidden) @ jnp.ones((3, 2))
        ...     return direct_feedback(output, hidden, projection).sum()
        >>> jax.grad(f)(jnp.ones((1, 3)), jnp.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]))
        Array([[11., 22., 33.]], dtype=float32)

    References:
        Nøkland (2016), Frenkel et al. (2021); see the module's docstring.
    """
    if error not in ("exact", "sign"):
        raise ValueError(f"error is {error!r}; expected 'exact' (DFA) or 'sign' (sDFA).")
    if error == "sign" and target is not None:
        raise ValueError(
            "got error='sign' and a target; expected one of them, since only one can be sent."
        )
    check_projection_bar(projection_bar, target)
    learns = projection_bar is not None
    name, sender = ("output", output) if target is None else ("target", target)
    _check_array(name, sender)
    rows = _rows(rows, sender)
    paths, activations, projections = _pairs(activation, projection)
    for path, a, p in zip(paths, activations, projections, strict=True):
        _check(name, sender, a, p, path, stacked=stacked)
        if learns and (callable(p) or not jnp.issubdtype(jnp.result_type(p), jnp.inexact)):
            what = "a function" if callable(p) else f"of dtype {jnp.result_type(p)}"
            raise ValueError(
                f"the projection{_at(path)} is {what}; expected a floating-point array, since "
                f"projection_bar is {projection_bar!r}: an optimiser updates it."
            )
    types = [jax.typeof(a) for a in activations]
    keys = [None if key is None else jax.random.fold_in(draws.typed(key), _number(path))
            for path in paths]  # fmt: skip
    arrays, whole = _arrays((projections, keys, target))

    def f(output, activations, arrays):
        del activations, arrays
        return output

    def f_fwd(output, activations, arrays):
        return output, (arrays, activations if learns else None)

    def f_bwd(residuals, e):
        arrays, activations = residuals
        projections, keys, target = whole(arrays)
        sent = e if target is None else target / rows
        if error == "sign":
            sent = jnp.sign(e) / rows
        project = functools.partial(_project, sent, stacked=stacked, initializer=initializer)

        def send(projections):
            """Computes the activations' cotangents, which are linear in the projections."""
            return list(map(project, types, projections, keys, paths))

        bars = send(projections)
        if not learns:
            return e, bars, None
        (learnt,) = jax.linear_transpose(send, projections)(list(activations))
        return e, bars, [*learnt, *[None] * (len(arrays) - len(learnt))]  # projections come first

    f = jax.custom_vjp(f)
    f.defvjp(f_fwd, f_bwd)
    with jax.named_scope(ops.DIRECT):
        return f(output, activations, arrays if learns else lax.stop_gradient(arrays))


def check_projection_bar(projection_bar: ProjectionBar, target: Any = None) -> None:
    """Raises ValueError unless `projection_bar` is a valid option, and None with a target."""
    if projection_bar not in (None, "kernel"):
        raise ValueError(
            f"projection_bar is {projection_bar!r}; expected None, or 'kernel' (direct "
            "Kolen-Pollack)."
        )
    if projection_bar is not None and target is not None:
        raise ValueError(
            f"projection_bar is {projection_bar!r}, with a target; expected None, since "
            "projections learn from errors."
        )


def direct_target(
    activation: jax.Array,
    target: jax.Array,
    projection: jax.Array,
    *,
    rows: float | None = None,
    initializer: jax.nn.initializers.Initializer = glorot_normal,
    key: chex.PRNGKey | None = None,
) -> jax.Array:
    """Direct random target projection (DRTP): sends the target to an activation, which it returns.

        a_bar = t · P / rows

    with t the one-hot target. (The original does not divide, which multiplies the hidden layers'
    learning rate by the batch size.) a_bar does not depend on the output, so a block could learn
    before the next one runs. Give the returned activation to the next layer, without `detach`: a
    block learns only if a cotangent reaches it. The value of that cotangent is ignored, and XLA
    removes its computation.

    Args:
        activation: `(*leading', *features)`.
        target: `(*leading, out)`, floating point, such as `jax.nn.one_hot(labels, classes)`; its
            leading axes are aligned with the activation's as in `direct_feedback`.
        projection: `(out, *features)`, a typed PRNG key or a function, as in `direct_feedback`.
        rows: the number of targets over which the loss is a mean; by default the product of all
            axes of the target but the last. Give it if `vmap` or `shard_map` splits the batch.
        initializer: draws the projection from a key, as in `draw_projection`.
        key: as in `direct_feedback`.

    Returns:
        `activation`.

    Raises:
        ValueError: at trace time, if shapes do not fit or the target is not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> targets, projection = jnp.eye(2), jnp.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
        >>> jax.grad(lambda a: direct_target(a, targets, projection).sum())(jnp.zeros((2, 3)))
        Array([[ 0.5,  1. ,  1.5],
               [ 5. , 10. , 15. ]], dtype=float32)

    References:
        Frenkel et al. (2021); see the module's docstring.
    """
    for name, array in (("activation", activation), ("target", target), ("projection", projection)):
        _check_array(name, array)
    return direct_feedback(
        ops.detach(activation),
        activation,
        projection,
        target=target,
        rows=rows,
        initializer=initializer,
        key=key,
    )


def draw_projection(
    key: chex.PRNGKey,
    out: int,
    features: int | Sequence[int],
    dtype: DTypeLike = jnp.float32,
    *,
    initializer: jax.nn.initializers.Initializer = glorot_normal,
) -> jax.Array:
    """Draws a projection from the output's error to all features of an activation.

    It draws one matrix and reshapes it, since an initialiser would treat a shape
    `(out, height, width, channels)` as a convolution.

    Args:
        key: a PRNG key.
        out: size of the output.
        features: shape of the activation without its leading axes.
        dtype: a floating-point dtype.
        initializer: `(key, (out, size of the features), dtype) -> array`; by default Glorot normal,
            which is as large as the product of Glorot kernels from the activation to the output.
            See also `soap_jax.initializers`.

    Returns:
        `(out, *features)`.

    Raises:
        ValueError: if `key` is not one key, if `out` or `features` are not positive integers, or if
            the initialiser does not return an array of the matrix's shape.

    Example:
        >>> import jax
        >>> draw_projection(jax.random.key(0), 10, (8, 8, 32)).shape
        (10, 8, 8, 32)
    """
    draws.typed(key)  # raises
    try:
        shape = tuple(map(operator.index, (out, *jax.tree.leaves(features))))
    except TypeError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(
            f"out is {out!r} and features are {features!r}; expected a positive integer, the size "
            "of the output, and one or several positive integers, the shape of the activation "
            "without its leading axes."
        )
    matrix = shape[0], math.prod(shape[1:])
    drawn = initializer(key, matrix, dtype)
    if getattr(drawn, "shape", None) != matrix:
        got = type(drawn).__name__ if not hasattr(drawn, "shape") else f"shape {drawn.shape}"
        raise ValueError(
            f"the initializer returned {got}; expected an array of shape {matrix}, that is (out, "
            "size of the features)."
        )
    return drawn.reshape(shape)


def draw_projections(
    key: chex.PRNGKey,
    output: jax.Array | jax.ShapeDtypeStruct,
    activation: chex.ArrayTree,
    *,
    stacked: bool = False,
    stored: bool = True,
    initializer: jax.nn.initializers.Initializer = glorot_normal,
) -> chex.ArrayTree:
    """Draws a float32 projection for every activation of a tree.

    A draw depends only on `key` and the activation's path in the tree. In a stack, every block has
    its own draw.

    Args:
        key: a PRNG key.
        output: `(*leading, out)`; only the shapes of output and activation are used.
        activation: `(*leading', *features)`, or a tree of such arrays, with as many leading axes as
            the output; at least the last axis is a feature axis. With `stacked`, `(blocks, ...)`.
        stacked: as in `direct_feedback`.
        stored: whether to return projections. False returns their keys, from which every backward
            pass draws the same projections, which saves memory and costs time.
        initializer: as in `draw_projection`; with keys, give it to `direct_feedback` too.

    Returns:
        A tree of activation's structure, whose leaves are projections `(out, *features)` or typed
        keys; with `stacked`, `(blocks, ...)` of these.

    Raises:
        ValueError: as `draw_projection`, or if an activation's shape does not fit the output's.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> output, hidden = jnp.ones((4, 10)), {"a": jnp.ones((4, 7)), "b": jnp.ones((4, 5, 3))}
        >>> jax.tree.map(jnp.shape, draw_projections(jax.random.key(0), output, hidden))
        {'a': (10, 7), 'b': (10, 5, 3)}
    """
    key = draws.typed(key)

    def one(path, leaf):
        leaf_key = jax.random.fold_in(key, _number(path))
        shape = jnp.shape(leaf)
        if stacked:
            leaf_key, shape = jax.random.split(leaf_key, shape[0]), shape[1:]
        if not stored:
            return leaf_key
        return _draw(leaf_key, jnp.shape(output), shape, stacked=stacked, initializer=initializer)

    return jax.tree_util.tree_map_with_path(one, activation)


def scan_blocks(
    block: Block, params: chex.ArrayTree, x: jax.Array, *, parallel: bool = True
) -> jax.Array:
    """Runs a stack of equal blocks with `detach` between them, for direct feedback.

        a_0 = block(params[0], detach(x)),   a_l = block(params[l], detach(a_(l-1)))

    No block's error depends on another's, so the backward pass may run in any order:

        parallel=True     forward as a scan; backward as one batched (vmapped) computation
        parallel=False    both as scans

    The gradients are the same. Connect the result to the output:

        activations = scan_blocks(block, params, x)
        output = head(detach(activations[-1]))
        output = direct_feedback(output, activations, projections, stacked=True)

    Args:
        block: a pure function `(params, x) -> y`, with y of x's shape and dtype.
        params: params of all blocks, every leaf `(blocks, ...)`.
        x: the first block's input. It gets no cotangent: layers before the stack need direct
            feedback of their own.
        parallel: see above; True was faster in measurements on CPU (`benchmarks/README.md`), and is
            expected to be faster on other devices. `soap_jax.with_feedback` finds the kernels of a
            block only with False.

    Returns:
        `(blocks, *y.shape)`, the activations after every block.

    Raises:
        ValueError: if the leaves' first axes differ, or a block's output does not have its input's
            shape and dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> params = jnp.stack([jnp.eye(3), 2 * jnp.eye(3)])
        >>> scan_blocks(lambda w, x: x @ w, params, jnp.ones((1, 3)))[:, 0]
        Array([[1., 1., 1.],
               [2., 2., 2.]], dtype=float32)

    References:
        Nøkland (2016); see the module's docstring.
    """
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            f"the leaves of params have the shapes {jax.tree.map(jnp.shape, params)}; expected a "
            "first axis of one length, the number of blocks, in all of them."
        )
    y = jax.eval_shape(lambda params, x: block(_first(params), x), params, x)
    if (y.shape, y.dtype) != (jnp.shape(x), jnp.result_type(x)):
        raise ValueError(
            f"block maps {jnp.result_type(x)}{list(jnp.shape(x))} to {y.dtype}{list(y.shape)}; "
            "expected the same shape and dtype, since its output is the next block's input."
        )
    return (_scan_then_vmap if parallel else _scan_both_ways)(block, params, ops.detach(x))


def _is_float0(bar):
    return bar.dtype == jax.dtypes.float0


def _first(params):
    return jax.tree.map(lambda leaf: leaf[0], params)


def _scan_both_ways(block, params, x):
    def body(x, params):
        y = block(params, x)
        return ops.detach(y), y

    return lax.scan(body, x, params)[1]


def _scan_then_vmap(block, params, x):
    # Traced values in the block's closure must be arguments of the custom derivative.
    jaxpr = jax.make_jaxpr(block)(_first(params), x)
    constants = jaxpr.consts

    def block_of(params, x, *constants):
        (y,) = jax.core.eval_jaxpr(jaxpr.jaxpr, constants, *jax.tree.leaves((params, x)))
        return y

    def f(params, x, constants):
        return _scan_both_ways(lambda params, x: block_of(params, x, *constants), params, x)

    def f_fwd(params, x, constants):
        def body(x, params):
            y, pull_back = jax.vjp(
                lambda *args: block_of(args[0], x, *args[1:]), params, *constants
            )
            return y, (y, pull_back)

        _, (activations, pull_backs) = lax.scan(body, x, params)
        return activations, (pull_backs,)

    def f_bwd(residuals, bars):
        (pull_backs,) = residuals
        params_bar, *bars = jax.vmap(lambda pull_back, bar: pull_back(bar))(pull_backs, bars)
        return params_bar, None, [None if _is_float0(bar) else bar.sum(0) for bar in bars]

    f = jax.custom_vjp(f)
    f.defvjp(f_fwd, f_bwd)
    return f(params, x, constants)


def _project(error, activation_type, projection, key, path, *, stacked, initializer):
    """Computes an activation's cotangent from the error; see the module's docstring for axes."""
    shape, dtype = activation_type.shape[stacked:], activation_type.dtype
    if callable(projection):
        return _called(projection, error, activation_type, key, path)
    if _is_key(projection):
        projection = _draw(projection, error.shape, shape, stacked=stacked, initializer=initializer)
    rank = projection.ndim - 1 - stacked
    lead = len(shape) - rank
    if error.ndim - 1 > lead:
        error = error.sum(range(lead, error.ndim - 1))
    shared = error.ndim - 1

    # The product of (*leading, out) and (out, *features) or (blocks, out, *features). If shardings
    # are part of the types, the result has the activation's.
    split = activation_type.sharding.spec
    blocks, split = split[:stacked], split[stacked:]
    y = lax.dot_general(
        error.astype(dtype),
        projection.astype(dtype),
        (((shared,), (int(stacked),)), ((), ())),
        out_sharding=_sharding(activation_type, *split[:shared], *blocks, *split[lead:]),
    )
    if stacked:
        y = jnp.moveaxis(y, shared, 0)
    axes = (*range(stacked + shared), *range(stacked + lead, stacked + len(shape)))
    out_sharding = _sharding(activation_type, *activation_type.sharding.spec)
    return lax.broadcast_in_dim(y, activation_type.shape, axes, out_sharding=out_sharding)


def _called(projection, error, activation_type, key, path):
    """Computes an activation's cotangent with a projection that is a function."""
    shape, dtype = activation_type.shape, activation_type.dtype
    bar = projection(error, shape, key)
    found = getattr(bar, "shape", None), getattr(bar, "dtype", None)
    if found[0] != shape or not dtypes.holds(dtype, found[1]):
        got = f"{found[1]}{list(found[0])}" if found[0] is not None else type(bar).__name__
        raise ValueError(
            f"the projection{_at(path)}, a function, returned {got}; expected the activation's "
            f"cotangent, an array of shape {shape} that can be cast to {dtype}. The function was "
            f"called with an error of shape {error.shape}."
        )
    return bar.astype(dtype)


def _sharding(of, *split):
    """The sharding by these axes of the mesh; None if shardings are not part of the types."""
    mesh = of.sharding.mesh
    if jax.sharding.AxisType.Explicit not in (mesh.axis_types or ()):
        return None
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*split))


def _draw(key, output_shape, shape, *, stacked, initializer):
    """Draws the projection of a key for an activation of this shape, or one for every block."""
    draw = functools.partial(
        draw_projection,
        out=output_shape[-1],
        features=_features(output_shape, shape),
        initializer=initializer,
    )
    return jax.vmap(draw)(key) if stacked else draw(key)


def _features(output_shape, shape):
    """The feature axes of an activation that has as many leading axes as the output."""
    if len(output_shape) == 1 and len(shape) > 1:
        raise ValueError(
            f"the output has shape {output_shape} and an activation {shape}; expected an output "
            "(*leading, out) with the batch among its leading axes. For one number per example "
            "give y[:, None]. For a single example use draw_projection(key, out, features)."
        )
    return shape[min(len(output_shape) - 1, len(shape) - 1) :]


def _rows(rows, sender):
    """The number of rows over which the loss is a mean."""
    if rows is None:
        return math.prod(jnp.shape(sender)[:-1])
    is_number = isinstance(rows, numbers.Real) and not isinstance(rows, bool)
    if not (is_number and 0 < rows < math.inf):
        raise ValueError(f"rows is {rows!r}; expected a positive number, the size of the batch.")
    return float(rows)


def _check_array(name, array):
    if isinstance(array, list | tuple | dict) or array is None:
        raise ValueError(f"the {name} is a {type(array).__name__}; expected one array.")


def _number(path) -> int:
    """A number for a path in a tree, to fold into a key."""
    return zlib.crc32("/".join(trees.path_of(path)).encode())


def _arrays(tree):
    """A tree's arrays, and a function that puts arrays back among the tree's other leaves."""
    leaves, structure = jax.tree.flatten(tree)
    is_array = [isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves]

    def whole(arrays):
        left = iter(arrays)
        return jax.tree.unflatten(
            structure, [next(left) if a else x for a, x in zip(is_array, leaves, strict=True)]
        )

    return [leaf for a, leaf in zip(is_array, leaves, strict=True) if a], whole


def _at(path) -> str:
    at = jax.tree_util.keystr(path)
    return f" at {at}" if at else ""


def _is_key(projection) -> bool:
    return jnp.issubdtype(jnp.result_type(projection), jax.dtypes.prng_key)


def _sketch(tree):
    """The shapes of a tree's leaves, for error messages."""
    return jax.tree.map(
        lambda x: "function" if callable(x) else jnp.shape(x), tree, is_leaf=callable
    )


def _pairs(activation, projection):
    """The paths, activations and projections, as lists in the same order."""
    flat, structure = jax.tree_util.tree_flatten_with_path(activation)
    projections, projection_structure = jax.tree.flatten(projection, is_leaf=callable)
    if structure != projection_structure or not flat:  # type: ignore[operator]
        raise ValueError(
            f"activations are {_sketch(activation)}, projections {_sketch(projection)}; expected "
            "one projection for each activation, in trees of the same structure."
        )
    paths, activations = zip(*flat, strict=True)
    return paths, list(activations), projections


def _check(name, sender, activation, projection, path, *, stacked):
    """Raises ValueError unless a projection leads from the sender to the activation."""
    at, shape = _at(path), jnp.shape(activation)
    for what, array in ((name, sender), (f"activation{at}", activation)):
        if not jnp.issubdtype(jnp.result_type(array), jnp.inexact):
            hint = ", such as jax.nn.one_hot(labels, classes)" if what == "target" else ""
            raise ValueError(
                f"the {what} has dtype {jnp.result_type(array)}; expected floating point{hint}."
            )
    if jnp.ndim(sender) < 1:
        raise ValueError(f"the {name} is a scalar; expected (*leading, out), a row per example.")
    if jnp.ndim(activation) < 1 + stacked:
        expected = "(blocks, *leading, *features)" if stacked else "(*leading, *features)"
        raise ValueError(f"the activation{at} has shape {shape}; expected {expected}.")
    if callable(projection):
        return  # its result is checked when it is called
    of = jnp.shape(projection)
    if not _is_key(projection) and not dtypes.holds(
        jnp.result_type(activation), jnp.result_type(projection)
    ):
        raise ValueError(
            f"the projection{at} has dtype {jnp.result_type(projection)} and the activation "
            f"{jnp.result_type(activation)}; expected real numbers for a real activation."
        )
    if of == (2,) and jnp.result_type(projection) == jnp.uint32:
        raise ValueError(
            f"the projection{at} is a raw key from jax.random.PRNGKey; expected a projection or a "
            "typed key from jax.random.key."
        )
    if stacked:
        if shape[:1] != of[:1]:
            raise ValueError(
                f"with stacked=True the activation{at} has shape {shape} and its projection {of}; "
                "expected (blocks, *leading, *features) and (blocks, out, *features), or (blocks,) "
                "keys."
            )
        shape, of = shape[1:], of[1:]
    sender_shape = jnp.shape(sender)
    if _is_key(projection):
        if of:
            raise ValueError(
                f"the projection{at} is an array of keys of shape {jnp.shape(projection)}; "
                "expected one key per activation, or (blocks,) keys with stacked=True."
            )
        of = (*sender_shape[-1:], *_features(sender_shape, shape))
    leading = shape[: max(len(shape) - len(of) + 1, 0)]
    no_batch = stacked or (len(shape) > 1 and shape[:1] == sender_shape[:1])
    if len(sender_shape) > 1 and shape == of[1:] and no_batch:
        what = "after the axis of blocks" if stacked else "for a batch"
        raise ValueError(
            f"the projection{at} of shape {of} has all axes of the activation {shape} as features, "
            f"so no axis is left {what}, as in the {name} {sender_shape}; expected a projection "
            "(out, *features) for an activation (batch, *features), as drawn by "
            "draw_projection(key, out, activation.shape[1:])."
            + (" For a list of ordinary activations leave out `stacked`." if stacked else "")
        )
    shared = min(len(leading), len(sender_shape) - 1)
    fits = of[:1] == sender_shape[-1:] and len(of) > 1 and shape[len(leading) :] == of[1:]
    if not fits or leading[:shared] != sender_shape[:shared]:
        raise ValueError(
            f"the projection{at} has shape {of}, the activation {shape} and the {name} "
            f"{sender_shape}; expected a projection (out, *features), where out is the last axis "
            f"of the {name} and features are the last axes of the activation. The other axes of "
            f"the activation must agree, from the left, with the leading axes of the {name}."
        )


def check_length(length: int, call: str) -> None:
    """Raises ValueError unless `length` is an integer of at least 1; `call` is a correct call."""
    if not hasattr(length, "__index__"):
        raise ValueError(f"length is a {type(length).__name__}; expected an integer, as in {call}.")
    if length < 1:
        raise ValueError(f"length is {length}; expected 1 or more.")
