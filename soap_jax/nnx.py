"""Flax NNX layers for feedback alignment and direct feedback.

The layers with a kernel are subclasses of Flax's, with a few more arguments. The forward pass, the
parameters and the cotangent of each kernel are Flax's. Only the cotangent of the layer's input is
computed with `layer.feedback` instead of `layer.kernel`. `Feedback` is a variable type of its own,
not a `Param`, so optimisers do not update it:

    params, feedback = nnx.state(model, nnx.Param), nnx.state(model, Feedback)
    state = init_feedback(key, params, SignSync(period=10), feedback=feedback)
    state = sync_feedback(params, state, step)
    nnx.update(model, state.feedback)

The same `rngs` give the same kernels as in a model of plain Flax layers, whether or not `rngs` has
a stream `feedback`, so runs with and without feedback are paired. The first layer of a model needs
no feedback, since the gradient by the input is not computed: use Flax's layer. A layer whose
feedback is `None` uses exact backpropagation.

Layers that Flax creates itself can be replaced. (Flax's hooks for products do not get their layer.)
For attention and a GRU cell:

    for name in ("query", "key", "value"):
        layer = FeedbackLinearGeneral(6, (heads, size), rngs=rngs)
        layer.kernel, layer.bias = getattr(attention, name).kernel, getattr(attention, name).bias
        setattr(attention, name, layer)
    cell.dense_h = FeedbackLinear(4, 12, use_bias=False, rngs=rngs)

By default feedback is stored in its kernel's dtype, also in checkpoints and metrics. If a layer
computes in a smaller dtype (`dtype=jnp.bfloat16`, params in float32), feedback is cast at every
step. `feedback_dtype=jnp.bfloat16` stores it in that dtype instead. Training is then bit-identical
for the rules for which `init_feedback(dtype="used")` does the same.

The projections of direct feedback (`soap_jax.direct`) do not replace kernels. They are variables of
another type, `Projection`, and are drawn from the same stream of keys:

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
    """Feedback weights, with the shape of the sibling `kernel`; not a `Param`.

    It has the kernel's metadata, including its sharding. In `nnx.bridge` it is Linen's collection
    "feedback".

    Example:
        >>> from flax import nnx
        >>> layer = FeedbackLinear(3, 2, rngs=nnx.Rngs(0))
        >>> layer.feedback.shape
        (3, 2)
        >>> list(nnx.state(layer, nnx.Param))
        ['bias', 'kernel']
    """


class Projection(nnx.Variable):
    """A tree of fixed random projections, or of their keys; not a `Param` and not `Feedback`.

    In `nnx.bridge` it is Linen's collection "projection". (`ToLinen` supports one projection, not a
    tree of them: use `soap_jax.linen.DirectFeedback` there.)

    Example:
        >>> from flax import nnx
        >>> layer = DirectFeedback(3, [(7,), (5,)], rngs=nnx.Rngs(0))
        >>> [p.shape for p in layer.projection.get_value()]
        [(3, 7), (3, 5)]
    """


nnx.register_variable_name("feedback", Feedback, overwrite=True)
nnx.register_variable_name("projection", Projection, overwrite=True)

_Base: Any = object  # for the type checker: the Flax layer that the mixin extends


class _FeedbackLayer(_Base):
    """A mixin for Flax layers that are bilinear in input and kernel, up to a bias."""

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
        # The kernel's metadata, such as its sharding, unless `feedback_init` sets other metadata.
        metadata = self.kernel.get_metadata() | twin.kernel.get_metadata()
        metadata.pop("on_create_value", None)  # the twin has used it already
        stored = dtypes.stored(drawn, feedback_dtype)
        self.feedback: Feedback | None = Feedback(stored, **metadata)
        self.feedback_bar = feedback_bar

    def __call__(self, inputs: jax.Array, *args, **kwargs) -> jax.Array:
        """Applies Flax's layer; the input's cotangent is computed with feedback."""
        feedback = None if self.feedback is None else self.feedback.get_value()
        flax_layer, flax_call = _flax_layer(type(self)), super().__call__
        # `op` must not close over traced values, so it closes over the layer's structure only.
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
    """The Flax layer from which a feedback layer is derived."""
    return next(c for c in cls.__mro__ if c.__module__.startswith("flax."))


def _check_rngs(rngs) -> None:
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(f"rngs is {rngs!r}; expected an nnx.Rngs, such as nnx.Rngs(0).")


def _feedback_key(rngs: nnx.Rngs) -> jax.Array:
    """Makes a key for feedback without a change of the stream that draws the kernels."""
    if "feedback" in rngs:
        return rngs.feedback()
    stream = rngs.params  # falls back to the default stream
    key = jax.random.fold_in(stream.key[...], stream.count[...])
    return jax.random.fold_in(key, zlib.crc32(b"feedback"))


class FeedbackLinear(_FeedbackLayer, nnx.Linear):
    """A feedback-alignment `nnx.Linear`: `(..., in_features) -> (..., out_features)`.

    It takes all arguments of Flax's layer, and the following.

    Args:
        feedback_init: initialiser of the feedback weights, by default `kernel_init`, so that kernel
            and feedback have the same size at the start. If `kernel_init` gives zeros, set another
            one: with feedback of zeros the layers below get no error.
        feedback_bar: the cotangent of feedback, as in `soap_jax.ops.feedback_op`.
        feedback_dtype: the dtype in which feedback is stored, by default the kernel's; see the
            module's docstring. A signed integer dtype stores signs.
        rngs: as in Flax; the stream `feedback`, if it exists, draws the feedback weights.

    Raises:
        ValueError: if feedback cannot be stored in `feedback_dtype`; when called, if feedback does
            not have the kernel's shape.

    Example:
        >>> from flax import nnx
        >>> FeedbackLinear(3, 2, rngs=nnx.Rngs(0)).feedback.shape
        (3, 2)

    References:
        Lillicrap et al. (2016). https://doi.org/10.1038/ncomms13276
    """


class FeedbackLinearGeneral(_FeedbackLayer, nnx.LinearGeneral):
    """A feedback-alignment `nnx.LinearGeneral`: a linear layer over any axes.

    Its arguments are Flax's, and the arguments `feedback_*` of `FeedbackLinear`.

    Example:
        >>> from flax import nnx
        >>> FeedbackLinearGeneral(3, (2, 5), rngs=nnx.Rngs(0)).feedback.shape
        (3, 2, 5)
    """


class FeedbackEinsum(_FeedbackLayer, nnx.Einsum):
    """A feedback-alignment `nnx.Einsum`: an einsum of the input with the kernel.

    Its arguments are Flax's, and the arguments `feedback_*` of `FeedbackLinear`.

    Example:
        >>> from flax import nnx
        >>> FeedbackEinsum("bi,io->bo", (3, 2), rngs=nnx.Rngs(0)).feedback.shape
        (3, 2)
    """


class FeedbackConv(_FeedbackLayer, nnx.Conv):
    """A feedback-alignment `nnx.Conv`: a convolution over `(batch, *spatial, features)`.

    Its arguments are Flax's, and the arguments `feedback_*` of `FeedbackLinear`.

    Example:
        >>> from flax import nnx
        >>> FeedbackConv(1, 2, (3, 3), rngs=nnx.Rngs(0)).feedback.shape
        (3, 3, 1, 2)
    """


class FeedbackConvTranspose(_FeedbackLayer, nnx.ConvTranspose):
    """A feedback-alignment `nnx.ConvTranspose`: a transposed convolution.

    Its arguments are Flax's, and the arguments `feedback_*` of `FeedbackLinear`.

    Example:
        >>> from flax import nnx
        >>> FeedbackConvTranspose(1, 2, (3, 3), rngs=nnx.Rngs(0)).feedback.shape
        (3, 3, 1, 2)
    """


class _Projections(nnx.Module):
    """A module with a tree of projections as one variable."""

    def __init__(self, out_features, features, projection_init, stored, stacked, rngs):
        _check_rngs(rngs)
        shapes = jax.tree.map(_as_tuple, features, is_leaf=_is_shape)

        def one_example(shape):
            return jax.ShapeDtypeStruct((*shape[:stacked], 1, *shape[stacked:]), jnp.float32)

        if "feedback" not in rngs:
            # A stream of its own, so that these draws do not change later draws of kernels.
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
    """Raises ValueError unless a key would draw a projection for the features `expected`."""
    leading = min(len(output) - 1, len(activation) - 1 - stacked)
    features = (*activation[:stacked], *activation[stacked + leading :])
    if features != expected:
        raise ValueError(
            f"features are {expected}, but with an activation of shape {activation} and an output "
            f"of shape {output} they are {features}. Only a stored projection (stored=True) can be "
            "shared along axes that the output does not have."
        )


class DirectFeedback(_Projections):
    """Direct feedback alignment: `(output, activations) -> output`.

    Sends the output's error to the activations through fixed random projections; see
    `soap_jax.direct.direct_feedback`. Stop the ordinary path with `soap_jax.ops.detach`.

    Args:
        out_features: size of the output.
        features: the shape of the activation without its leading axes, an int or a tuple of ints;
            or a tree of these, of the activations' structure: `[(8, 8, 32), 256]`.
        error: "exact" (DFA) or "sign" (sDFA).
        projection_init: initialiser of the projections, `(key, (out, features), dtype) -> array`.
        stored: whether to store projections. False stores keys instead, and every backward pass
            draws the same projections again, which saves memory and costs time. The activations
            must then have as many leading axes as the output.
        stacked: whether activations have a first axis of blocks, as from `DirectStack`; then their
            shapes in `features` begin with the number of blocks.
        rows: the divisor of signs, as in `direct_feedback`.
        projection_bar: the projections' cotangent, as in `direct_feedback`.
        rngs: as in Flax; the stream `feedback`, if it exists, draws the projections.

    Raises:
        ValueError: when called, as `direct_feedback`; or with `stored=False`, if an activation has
            other features.

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

    Sends the one-hot target to the activation through a fixed random projection; see
    `soap_jax.direct.direct_target`. Give the returned activation to the next layer.

    Args:
        out_features: size of the target.
        features: the shape of the activation without its leading axes, an int or a tuple of ints.
        projection_init: initialiser of the projection, `(key, (out, features), dtype) -> array`.
        stored: as in `DirectFeedback`.
        rows: the divisor of targets, as in `direct_target`.
        rngs: as in Flax; the stream `feedback`, if it exists, draws the projection.

    Raises:
        ValueError: when called, as `direct_target`; or with `stored=False`, if the activation has
            other features.

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
    """A stack of equal, detached blocks for direct feedback: `x -> (length, *x.shape)`.

    No block's error depends on another's, so the backward pass can be one batched computation; see
    `soap_jax.direct.scan_blocks`. Connect the activations to the output:

        activations = self.stack(x)
        output = self.head(detach(activations[-1]))
        output = self.direct(output, activations)           # DirectFeedback(..., stacked=True)

    x gets no cotangent. Layers before the stack need a projection of their own:

        h0 = self.stem(x)
        activations = self.stack(detach(h0))
        output = self.head(detach(activations[-1]))
        output = self.direct_stem(output, [h0])             # DirectFeedback(10, [64], ...)
        output = self.direct(output, activations)

    Args:
        make_block: `rngs -> nnx.Module`; the module is `x -> y`, with y of x's shape and dtype. It
            is called once per block; `stack.block` is one module with params `(length, ...)`.
        length: number of blocks.
        parallel: as in `soap_jax.direct.scan_blocks`.
        rngs: given to `make_block`.

    Raises:
        ValueError: if `make_block` is a module; if `length` is not an integer of at least 1; if a
            block has no `nnx.Param`, or has other variables (batch statistics, streams of keys,
            feedback); when called, if a block's output does not have its input's shape and dtype.

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
                f"make_block is a {type(make_block).__name__}; expected a function of rngs that "
                "makes a block, such as `lambda rngs: nnx.Linear(64, 64, rngs=rngs)`."
            )
        direct.check_length(length, "DirectStack(make_block, length, rngs=rngs)")
        blocks = [make_block(rngs) for _ in range(length)]
        graph, *states = nnx.split(blocks[0], nnx.Param, ...)
        if kinds := {type(leaf).__name__ for _, leaf in nnx.to_flat_state(states[1])}:
            raise ValueError(
                f"a block of DirectStack has variables of the type {', '.join(sorted(kinds))}; "
                "expected nnx.Param only, since blocks run in any order. Instead write a loop of "
                "these blocks with `soap_jax.ops.detach` between them."
            )
        if not jax.tree.leaves(states[0]):
            raise ValueError(
                "a block of DirectStack has no nnx.Param; expected a block with parameters."
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
