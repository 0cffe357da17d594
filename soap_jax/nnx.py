"""Flax NNX layers that learn by feedback alignment, and by direct feedback.

The layers with a kernel are Flax's own, with all their arguments and a few more. The forward pass,
the parameters and their gradients are Flax's; only the way back to the layer's input goes through
`layer.feedback` in place of `layer.kernel`. `Feedback` is a variable type of its own, not a
`Param`, so that no optimiser sees it:

    params, feedback = nnx.state(model, nnx.Param), nnx.state(model, Feedback)
    state = init_feedback(key, params, SignSync(period=10), feedback=feedback)
    state = sync_feedback(params, state, step)
    nnx.update(model, state.feedback)

The same `rngs` give the same kernels as in a model of plain Flax layers, whether `rngs` has a
stream `feedback` or not, so runs with and without feedback are paired. The first layer of a model
needs no feedback (the gradient by the input is not computed): use Flax's own. The value `None` in
place of feedback runs that layer by exact backpropagation.

Layers that Flax makes itself can be replaced. (Its hooks for products do not know which layer they
serve.) Of attention, and of a GRU's cell:

    for name in ("query", "key", "value"):
        layer = FeedbackLinearGeneral(6, (heads, size), rngs=rngs)
        layer.kernel, layer.bias = getattr(attention, name).kernel, getattr(attention, name).bias
        setattr(attention, name, layer)
    cell.dense_h = FeedbackLinear(4, 12, use_bias=False, rngs=rngs)

Feedback is stored in its kernel's dtype, as checkpoints and metrics have it. Where a layer computes
in fewer bits (`dtype=jnp.bfloat16`, params in float32) it is cast at every step;
`feedback_dtype=jnp.bfloat16` stores it so instead. Training has the same bits for the rules for
which `init_feedback(dtype="used")` would do so.

Direct feedback (`soap_jax.direct`) has no kernels whose place it could take, so its projections are
variables of another type, `Projection`, drawn by the same stream of keys:

    self.direct = DirectFeedback(10, (256,), rngs=rngs)
    ...
    return self.direct(self.head(detach(hidden)), hidden)           # soap_jax.ops.detach
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from soap_jax import direct, dtypes, factors, ops, trees
from soap_jax.feedback import glorot_normal


class Feedback(nnx.Variable):
    """Feedback weights, of the shape of the sibling `kernel`. Not a `Param`.

    It has the kernel's metadata, its sharding included. `nnx.bridge` knows it as the collection
    "feedback" of Linen.

    Example:
        >>> from flax import nnx
        >>> layer = FeedbackLinear(3, 2, rngs=nnx.Rngs(0))
        >>> layer.feedback.shape
        (3, 2)
        >>> list(nnx.state(layer, nnx.Param))
        ['bias', 'kernel']
    """


class Projection(nnx.Variable):
    """A tree of fixed random projections, or of their keys: neither `Param` nor `Feedback`.

    `nnx.bridge` knows it as the collection "projection" of Linen. (`ToLinen` takes a single
    projection, no tree of them: use `soap_jax.linen.DirectFeedback` there.)

    Example:
        >>> from flax import nnx
        >>> layer = DirectFeedback(3, [(7,), (5,)], rngs=nnx.Rngs(0))
        >>> [p.shape for p in layer.projection.get_value()]
        [(3, 7), (3, 5)]
    """


nnx.register_variable_name("feedback", Feedback, overwrite=True)
nnx.register_variable_name("projection", Projection, overwrite=True)

_Base: Any = object  # to the type checker: whatever layer of Flax the mixin comes before


class _FeedbackLayer(_Base):
    """Mixin before one of Flax's layers: a bilinear op of input and kernel, and perhaps a bias."""

    kernel: Any

    def __init__(
        self,
        *args,
        feedback_init: nnx.Initializer | None = None,
        feedback_bar: ops.FeedbackBar = None,
        feedback_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
        **kwargs,
    ):
        _check_rngs(rngs)
        dtypes.check_stored(feedback_dtype, "feedback_dtype")
        feedback_rngs = nnx.Rngs(params=_feedback_key(rngs))
        super().__init__(*args, rngs=rngs, **kwargs)
        if feedback_init is not None:
            kwargs["kernel_init"] = factors.arrays_only(feedback_init)
        twin = _flax_layer(type(self))(*args, rngs=feedback_rngs, **kwargs)
        drawn = twin.kernel[...]
        trees.check_feedback(drawn, self.kernel[...], ("feedback",))
        # Sharding and whatever else the kernel carries, unless `feedback_init` says otherwise.
        metadata = self.kernel.get_metadata() | twin.kernel.get_metadata()
        metadata.pop("on_create_value", None)  # which made the twin's value
        stored = dtypes.stored(drawn, feedback_dtype)
        self.feedback: Feedback | None = Feedback(stored, **metadata)
        self.feedback_bar = feedback_bar

    def __call__(self, inputs: jax.Array, *args, **kwargs) -> jax.Array:
        """Applies Flax's layer; its input's cotangent goes through feedback."""
        feedback = None if self.feedback is None else self.feedback.get_value()
        flax_layer, flax_call = _flax_layer(type(self)), super().__call__
        # `op` may close over no traced value: not over the layer, but over its structure.
        graph, state = nnx.split(self)
        shapes = jax.eval_shape(lambda: state)

        def op(x, kernel):
            layer = nnx.merge(graph, shapes)
            layer.kernel, layer.bias, layer.use_bias = nnx.Param(kernel), None, False
            layer.mask = None
            return flax_layer.__call__(layer, x, *args, **kwargs)

        return ops.through_feedback(
            op,
            inputs,
            self.kernel[...],
            feedback,
            forward=lambda x: flax_call(x, *args, **kwargs),
            feedback_bar=self.feedback_bar,
            mask=getattr(self, "mask", None),
            path=("feedback",),
        )


def _flax_layer(cls: type) -> Any:
    """Flax's own layer, from which a feedback layer derives."""
    return next(c for c in cls.__mro__ if c.__module__.startswith("flax."))


def _check_rngs(rngs) -> None:
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(f"rngs is {rngs!r}; expected streams of keys, such as nnx.Rngs(0).")


def _feedback_key(rngs: nnx.Rngs) -> jax.Array:
    """A key for feedback that leaves the stream of the kernels as Flax's layers would find it."""
    if "feedback" in rngs:
        return rngs.feedback()
    stream = rngs.params  # falls back to the default stream
    key = jax.random.fold_in(stream.key[...], stream.count[...])
    return jax.random.fold_in(key, zlib.crc32(b"feedback"))


class FeedbackLinear(_FeedbackLayer, nnx.Linear):
    """Feedback-alignment `nnx.Linear`: `(..., in_features) -> (..., out_features)`.

    Takes the arguments of Flax's layer, and

    Args:
        feedback_init: initialiser of the feedback weights, by default `kernel_init`, so that both
            start of one size. (Where that gives zeros, give another: zeros send back no error.)
        feedback_bar: feedback's own cotangent, as in `soap_jax.ops.feedback_op`.
        feedback_dtype: of what is stored, by default the kernel's; see the module's docstring. A
            signed integer dtype stores signs.
        rngs: as in Flax; a stream `feedback`, if there is one, draws the feedback weights.

    Raises:
        ValueError: if nothing can be stored in `feedback_dtype`; and when called with feedback of a
            shape that is not the kernel's.

    Example:
        >>> from flax import nnx
        >>> FeedbackLinear(3, 2, rngs=nnx.Rngs(0)).feedback.shape
        (3, 2)

    References:
        Lillicrap et al. (2016). https://doi.org/10.1038/ncomms13276
    """


class FeedbackLinearGeneral(_FeedbackLayer, nnx.LinearGeneral):
    """Feedback-alignment `nnx.LinearGeneral`: a linear layer over any axes.

    Its arguments are Flax's, and those of `FeedbackLinear` that begin with `feedback_`.

    Example:
        >>> from flax import nnx
        >>> FeedbackLinearGeneral(3, (2, 5), rngs=nnx.Rngs(0)).feedback.shape
        (3, 2, 5)
    """


class FeedbackEinsum(_FeedbackLayer, nnx.Einsum):
    """Feedback-alignment `nnx.Einsum`: an einsum of the input with the kernel.

    Its arguments are Flax's, and those of `FeedbackLinear` that begin with `feedback_`.

    Example:
        >>> from flax import nnx
        >>> FeedbackEinsum("bi,io->bo", (3, 2), rngs=nnx.Rngs(0)).feedback.shape
        (3, 2)
    """


class FeedbackConv(_FeedbackLayer, nnx.Conv):
    """Feedback-alignment `nnx.Conv`: a convolution over `(batch, *spatial, features)`.

    Its arguments are Flax's, and those of `FeedbackLinear` that begin with `feedback_`.

    Example:
        >>> from flax import nnx
        >>> FeedbackConv(1, 2, (3, 3), rngs=nnx.Rngs(0)).feedback.shape
        (3, 3, 1, 2)
    """


class FeedbackConvTranspose(_FeedbackLayer, nnx.ConvTranspose):
    """Feedback-alignment `nnx.ConvTranspose`: a transposed convolution.

    Its arguments are Flax's, and those of `FeedbackLinear` that begin with `feedback_`.

    Example:
        >>> from flax import nnx
        >>> FeedbackConvTranspose(1, 2, (3, 3), rngs=nnx.Rngs(0)).feedback.shape
        (3, 3, 1, 2)
    """


class _Projections(nnx.Module):
    """A tree of projections as one variable."""

    def __init__(self, out_features, features, projection_init, stored, stacked, rngs):
        _check_rngs(rngs)
        shapes = jax.tree.map(_as_tuple, features, is_leaf=_is_shape)

        def one_example(shape):
            return jax.ShapeDtypeStruct((*shape[:stacked], 1, *shape[stacked:]), jnp.float32)

        if "feedback" not in rngs:
            # Many draws may follow each other, but none may change which kernels are drawn later.
            rngs.feedback = nnx.RngStream(_feedback_key(rngs), tag="feedback")
        self.projection = Projection(
            direct.draw_projections(
                rngs.feedback(),
                jax.ShapeDtypeStruct((1, out_features), jnp.float32),
                jax.tree.map(one_example, shapes, is_leaf=_is_shape),
                stacked=stacked,
                stored=stored,
                initializer=projection_init,
            )
        )
        self.features = tuple(jax.tree.leaves(shapes, is_leaf=_is_shape))
        self.projection_init = projection_init
        self.stored = stored
        self.stacked = stacked

    def _projection(self, output, activations):
        leaves = jax.tree.leaves(activations)
        if not self.stored and len(leaves) == len(self.features):
            for expected, leaf in zip(self.features, leaves, strict=True):
                _check_features(expected, jnp.shape(output), jnp.shape(leaf), self.stacked)
        return self.projection.get_value()


def _is_shape(node):
    sizes = node if isinstance(node, tuple) else (node,)
    return all(isinstance(size, int) for size in sizes)


def _as_tuple(shape):
    return (shape,) if isinstance(shape, int) else shape


def _check_features(expected, output, activation, stacked):
    """Raises ValueError unless these are the features for which a key would draw a projection."""
    leading = min(len(output) - 1, len(activation) - 1 - stacked)
    features = (*activation[:stacked], *activation[stacked + leading :])
    if features != expected:
        raise ValueError(
            f"features are {expected}, but with the activation {activation} and the output "
            f"{output} they are {features}. Only stored projections (stored=True) can be shared "
            "by axes that the output does not have."
        )


class DirectFeedback(_Projections):
    """Direct feedback alignment: `(output, activations) -> output`.

    Hands the output's error to the activations through fixed random projections; see
    `soap_jax.direct.direct_feedback`, and stop the ordinary path with `soap_jax.ops.detach`.

    Args:
        out_features: size of the output.
        features: the shape of the activation without its leading axes, an int or a tuple of ints;
            or a tree of such, of the activations' structure: `[(8, 8, 32), 256]`.
        error: "exact" (DFA) or "sign" (sDFA).
        projection_init: initialiser of the projections, `(key, (out, features), dtype) -> array`.
        stored: False keeps a key in place of each projection, and every backward pass draws it
            again: less memory for more arithmetic, the same numbers. `features` are then all axes
            but as many as the output leads with.
        stacked: whether activations have a first axis of blocks, as `DirectStack` gives them; then
            their shapes in `features` begin with the number of blocks.
        rows: by what signs are divided, as in `direct_feedback`.
        projection_bar: the projections' own cotangent, as in `direct_feedback`.
        rngs: as in Flax; a stream `feedback`, if there is one, draws the projections.

    Raises:
        ValueError: when called, as `direct_feedback` does, or without stored projections if an
            activation has other features.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = DirectFeedback(3, {"a": 7, "b": (5, 4)}, rngs=nnx.Rngs(0))
        >>> layer.projection.get_value()["b"].shape
        (3, 5, 4)

    References:
        Nøkland (2016). https://arxiv.org/abs/1609.01596
    """

    def __init__(
        self,
        out_features: int,
        features: Any,
        *,
        error: direct.Error = "exact",
        projection_init: nnx.Initializer = glorot_normal,
        stored: bool = True,
        stacked: bool = False,
        rows: float | None = None,
        projection_bar: direct.ProjectionBar = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(out_features, features, projection_init, stored, stacked, rngs)
        self.error: direct.Error = error
        self.rows = rows
        self.projection_bar: direct.ProjectionBar = projection_bar

    def __call__(self, output: jax.Array, activations: chex.ArrayTree) -> jax.Array:
        """Returns the output."""
        return direct.direct_feedback(
            output,
            activations,
            self._projection(output, activations),
            error=self.error,
            stacked=self.stacked,
            rows=self.rows,
            initializer=self.projection_init,
            projection_bar=self.projection_bar,
        )


class DirectTarget(_Projections):
    """Direct random target projection (DRTP): `(activation, target) -> activation`.

    Hands the one-hot target to the activation through a fixed random projection; see
    `soap_jax.direct.direct_target`. Go on with what is returned.

    Args:
        out_features: size of the target.
        features: the shape of the activation without its leading axes, an int or a tuple of ints.
        projection_init: initialiser of the projection, `(key, (out, features), dtype) -> array`.
        stored: as in `DirectFeedback`.
        rows: by what targets are divided, as in `direct_target`.
        rngs: as in Flax; a stream `feedback`, if there is one, draws the projection.

    Raises:
        ValueError: when called, as `direct_target` does, or without a stored projection if the
            activation has other features.

    Example:
        >>> from flax import nnx
        >>> DirectTarget(3, (7,), rngs=nnx.Rngs(0)).projection.shape
        (3, 7)

    References:
        Frenkel et al. (2021). https://arxiv.org/abs/1909.01311
    """

    def __init__(
        self,
        out_features: int,
        features: int | tuple[int, ...],
        *,
        projection_init: nnx.Initializer = glorot_normal,
        stored: bool = True,
        rows: float | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(out_features, features, projection_init, stored, False, rngs)
        self.rows = rows

    def __call__(self, activation: jax.Array, target: jax.Array) -> jax.Array:
        """Returns the activation."""
        projection = self._projection(target, activation)
        return direct.direct_target(
            activation, target, projection, rows=self.rows, initializer=self.projection_init
        )


class DirectStack(nnx.Module):
    """Equal blocks, each cut off from the next: `x -> (length, *x.shape)`, for direct feedback.

    The backward pass has no order, so it can run as one batched computation; see
    `soap_jax.direct.scan_blocks`. Join the activations to the output:

        activations = self.stack(x)
        output = self.head(detach(activations[-1]))
        output = self.direct(output, activations)           # DirectFeedback(..., stacked=True)

    No cotangent goes back to x. A stem that makes x learns by a projection of its own:

        h0 = self.stem(x)
        activations = self.stack(detach(h0))
        output = self.head(detach(activations[-1]))
        output = self.direct_stem(output, [h0])             # DirectFeedback(10, [64], ...)
        output = self.direct(output, activations)

    Args:
        make_block: `rngs -> nnx.Module`, a module `x -> y`, y of x's shape and dtype. It is called
            once for every block; `stack.block` is one whose params are `(length, ...)`.
        length: number of blocks.
        parallel: as in `soap_jax.direct.scan_blocks`.
        rngs: given to `make_block`.

    Raises:
        ValueError: if `make_block` is a module, if `length` is not an integer of at least 1, or if
            a block has no `nnx.Param`, or other variables (batch statistics, streams of keys,
            feedback); and when called, if a block's output is unlike its input.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> stack = DirectStack(lambda rngs: nnx.Linear(3, 3, rngs=rngs), 4, rngs=nnx.Rngs(0))
        >>> stack(jnp.ones((2, 3))).shape, stack.block.kernel.shape
        ((4, 2, 3), (4, 3, 3))

    References:
        Nøkland (2016). https://arxiv.org/abs/1609.01596
    """

    def __init__(
        self,
        make_block: Callable[[nnx.Rngs], nnx.Module],
        length: int,
        *,
        parallel: bool = True,
        rngs: nnx.Rngs,
    ):
        if isinstance(make_block, nnx.Module) or not callable(make_block):
            raise ValueError(
                f"make_block is a {type(make_block).__name__}; expected a function of rngs, which "
                "makes a block: `lambda rngs: nnx.Linear(64, 64, rngs=rngs)`."
            )
        direct.check_length(length, "DirectStack(make_block, length, rngs=rngs)")
        blocks = [make_block(rngs) for _ in range(length)]
        graph, *states = nnx.split(blocks[0], nnx.Param, ...)
        if kinds := {type(leaf).__name__ for _, leaf in nnx.to_flat_state(states[1])}:
            raise ValueError(
                f"a block of DirectStack has variables of the type {', '.join(sorted(kinds))}; "
                "expected nnx.Param only, since blocks run in any order. Write a loop of such "
                "blocks with `soap_jax.ops.detach` between them."
            )
        if not jax.tree.leaves(states[0]):
            raise ValueError(
                "a block of DirectStack has no nnx.Param; expected a block that learns."
            )
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, blocks))
        self.block = nnx.merge(graph, params)
        self.parallel = parallel

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the activations after every block."""
        graph, *states = nnx.split(self.block)

        def block(states, x):
            return nnx.merge(graph, *states)(x)

        return direct.scan_blocks(block, states, x, parallel=self.parallel)
