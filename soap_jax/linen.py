"""Flax Linen layers for feedback alignment and direct feedback.

The layers with a kernel are subclasses of Flax's, with a few more arguments. The forward pass, the
parameters and the cotangent of each kernel are Flax's. Only the cotangent of the layer's input is
computed with the variable `feedback/<layer>/kernel` instead of `params/<layer>/kernel`:

    model = nn.Sequential([nn.Dense(256), nn.tanh, FeedbackDense(10)])
    variables = model.init({"params": key, "feedback": other_key}, x)
    y = model.apply({"params": params, "feedback": feedback}, x)      # no `mutable` needed

The same key and names give the same kernels as in a model of plain Flax layers, so runs with and
without feedback are paired. The first layer of a model needs no feedback, since the gradient by the
input is not computed: use Flax's layer. In lifted transforms name the collection next to the
parameters: `nn.scan(..., variable_axes={"params": 0, "feedback": 0}, split_rngs={"params": True,
"feedback": True})`. A layer whose feedback leaf is `None`, or is missing in a collection that was
passed, uses exact backpropagation.

For layers that Flax creates itself, such as the projections of attention, use
`qkv_dot_general_cls=FeedbackDotGeneral`. For modules without this option, such as recurrent cells,
use `soap_jax.with_feedback`.

By default feedback is stored in its kernel's dtype, also in checkpoints and metrics. If a layer
computes in a smaller dtype (`dtype=jnp.bfloat16`, params in float32), feedback is cast at every
step. `feedback_dtype=jnp.bfloat16` stores it in that dtype instead. Training is then bit-identical
for the rules for which `init_feedback(dtype="used")` does the same.

Feedback has its kernel's box (`nn.Partitioned`), and so its sharding. Under
`flax.nnx.bridge.ToNNX`, where the variables of a module need different names, give the layers
`feedback_name="feedback"`.

The projections of direct feedback (`soap_jax.direct`) do not replace kernels. They have a
collection of their own, "projection", and are drawn from the same stream of keys:

    h1 = nn.tanh(nn.Dense(256)(x))
    h2 = nn.tanh(nn.Dense(256)(detach(h1)))
    return DirectFeedback()(nn.Dense(10)(detach(h2)), (h1, h2))     # soap_jax.ops.detach
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import chex
import flax.core
import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax import lax
from jax.typing import DTypeLike

from soap_jax import direct, dtypes, factors, ops, trees
from soap_jax.feedback import glorot_normal

COLLECTION = "feedback"
PROJECTION = "projection"


class _Feedback(nn.Module, kw_only=True):
    """The feedback of one kernel: its options, and how it is created and read."""

    feedback_init: nn.initializers.Initializer | None = None
    feedback_bar: ops.FeedbackBar = None
    feedback_name: str = "kernel"
    feedback_dtype: DTypeLike | None = None

    @property
    def _layer(self):
        """The module of the kernel, which also has the feedback variable."""
        return self

    @property
    def _path(self):
        return (*self._layer.path, self.feedback_name)

    @nn.nowrap  # else tables of a model would list this method
    def _make(self, twin, *args, **kwargs):
        """Draws the feedback, if it does not exist yet, as `twin` draws a kernel."""
        layer = self._layer
        if layer.has_variable(COLLECTION, self.feedback_name):
            return
        if not layer.is_mutable_collection(COLLECTION):
            raise ValueError(self._no_collection())
        dtypes.check_stored(self.feedback_dtype, "feedback_dtype")
        drawn = twin.init(layer.make_rng(COLLECTION), *args, **kwargs)["params"]["kernel"]
        kernel: Any = layer.get_variable("params", "kernel")
        if _is_boxed(kernel) and not _is_boxed(drawn):
            drawn = kernel.replace_boxed(drawn)
        trees.check_feedback(meta.unbox(drawn), meta.unbox(kernel), self._path)
        stored = jax.tree.map(lambda leaf: dtypes.stored(leaf, self.feedback_dtype), drawn)
        layer.put_variable(COLLECTION, self.feedback_name, stored)

    @nn.nowrap
    def _read(self):
        layer = self._layer
        assert layer.scope is not None  # Flax has bound the module
        if COLLECTION not in layer.scope.root.variables():
            raise ValueError(self._no_collection())
        return meta.unbox(layer.get_variable(COLLECTION, self.feedback_name))

    def _no_collection(self):
        path = "/".join(self._layer.path)
        return (
            f"{type(self).__name__} at {path or 'the top'} found no collection 'feedback'. "
            "Pass it with the parameters:\n"
            "    model.apply({'params': params, 'feedback': feedback}, x)\n"
            "with `feedback` from model.init(...)['feedback'] or init_feedback(...).feedback; "
            "under nn.scan or nn.vmap also give variable_axes={'params': 0, 'feedback': 0}. "
            "For exact backpropagation pass None as the layer's leaf."
        )


class _FeedbackLayer(_Feedback, kw_only=True):
    """A mixin for Flax layers that are bilinear in input and kernel, up to a bias.

    All five layers use it. Flax's own hooks for products (`dot_general`) would not work: two of the
    layers do not have them, and they do not get the mask.
    """

    @nn.nowrap  # Flax wraps its own `__call__`; wrapped twice it would record intermediates twice
    def __call__(self, inputs: jax.Array, *args, **kwargs) -> jax.Array:
        """Applies Flax's layer; the input's cotangent is computed with feedback."""
        if self.is_initializing():
            # Call Flax's layer first, so that the params are those of a plain Flax layer.
            y = super().__call__(inputs, *args, **kwargs)
            init = factors.arrays_only(self.feedback_init or self.kernel_init)
            twin = self._flax_layer(kernel_init=init)
            self._make(twin, inputs, *args, **kwargs)
            return y
        feedback = self._read()
        linear, flax_call = self._flax_layer(), super().__call__
        return ops.through_feedback(
            lambda x, kernel: linear.apply({"params": {"kernel": kernel}}, x, *args, **kwargs),
            inputs,
            meta.unbox(self.get_variable("params", "kernel")),
            feedback,
            forward=lambda x: flax_call(x, *args, **kwargs),
            feedback_bar=self.feedback_bar,
            mask=getattr(self, "mask", None),
            path=self._path,
        )

    def _flax_layer(self, **changes):
        """Flax's own layer with the fields of this layer, but without bias and mask."""
        layer = next(c for c in type(self).__mro__ if c.__module__.startswith("flax."))
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(layer) if f.init}
        if "mask" in fields:
            fields["mask"] = None
        return layer(**fields | {"parent": None, "name": None, "use_bias": False} | changes)


def _is_boxed(leaf) -> bool:
    return isinstance(leaf, meta.AxisMetadata)


class FeedbackDense(_FeedbackLayer, nn.Dense):
    """A feedback-alignment `nn.Dense`: `(..., in) -> (..., features)`.

    All attributes but these four are Flax's.

    Attributes:
        feedback_init: initialiser of the feedback weights, by default `kernel_init`, so that kernel
            and feedback have the same size at the start. If `kernel_init` gives zeros, set another
            one: with feedback of zeros the layers below get no error.
        feedback_bar: the cotangent of feedback, as in `soap_jax.ops.feedback_op`.
        feedback_name: the variable's name in the collection, "kernel" or, for `nnx.bridge.ToNNX`,
            "feedback".
        feedback_dtype: the dtype in which feedback is stored, by default the kernel's; see the
            module's docstring. A signed integer dtype stores signs.

    Raises:
        ValueError: in `init`, if feedback cannot be stored in `feedback_dtype`; in `apply`, if the
            collection "feedback" is missing or feedback does not have the kernel's shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = FeedbackDense(features=2)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 3)))
        >>> variables["feedback"]["kernel"].shape
        (3, 2)

    References:
        Lillicrap et al. (2016). https://doi.org/10.1038/ncomms13276
    """


class FeedbackDenseGeneral(_FeedbackLayer, nn.DenseGeneral):
    """A feedback-alignment `nn.DenseGeneral`: a dense layer over any axes.

    Its attributes are Flax's, and the attributes `feedback_*` of `FeedbackDense`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = FeedbackDenseGeneral(features=(2, 5))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 3)))
        >>> variables["feedback"]["kernel"].shape
        (3, 2, 5)
    """


class FeedbackEinsum(_FeedbackLayer, nn.Einsum):
    """A feedback-alignment `nn.Einsum`: an einsum of the input with the kernel.

    Its attributes are Flax's, and the attributes `feedback_*` of `FeedbackDense`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = FeedbackEinsum(shape=(3, 2), einsum_str="bi,io->bo")
        >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 3)))
        >>> variables["feedback"]["kernel"].shape
        (3, 2)
    """


class FeedbackConv(_FeedbackLayer, nn.Conv):
    """A feedback-alignment `nn.Conv`: a convolution over `(batch, *spatial, features)`.

    Its attributes are Flax's, and the attributes `feedback_*` of `FeedbackDense`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = FeedbackConv(features=2, kernel_size=(3, 3))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 8, 8, 1)))
        >>> variables["feedback"]["kernel"].shape
        (3, 3, 1, 2)
    """


class FeedbackConvTranspose(_FeedbackLayer, nn.ConvTranspose):
    """A feedback-alignment `nn.ConvTranspose`: a transposed convolution.

    Its attributes are Flax's, and the attributes `feedback_*` of `FeedbackDense`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = FeedbackConvTranspose(features=2, kernel_size=(3, 3))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 8, 8, 1)))
        >>> variables["feedback"]["kernel"].shape
        (3, 3, 1, 2)
    """


class FeedbackDotGeneral(_Feedback):
    """A `dot_general_cls` that adds feedback to layers that Flax creates itself.

    It works in `nn.Dense`, `nn.DenseGeneral` and modules made of them, such as the four projections
    of attention:

        own = FeedbackDotGeneral
        nn.MultiHeadDotProductAttention(4, qkv_dot_general_cls=own, out_dot_general_cls=own)

    `nn.Dense(10, dot_general_cls=FeedbackDotGeneral)` is equivalent to `FeedbackDense(10)`: the
    feedback is at the kernel's path, `feedback/<layer>/kernel`, and is drawn in the same way. Its
    attributes are those of `FeedbackDense`; set them with `functools.partial`. One thing differs: a
    `feedback_bar` that is a function gets the product instead of the layer, without the bias and in
    the dtype of the computation. Recurrent cells have no `dot_general_cls`: use
    `soap_jax.with_feedback`.

    Raises:
        ValueError: as `FeedbackDense`; or if the caller is not a layer with a `dot_general_cls` and
            a param "kernel".

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = nn.MultiHeadDotProductAttention(2, qkv_dot_general_cls=FeedbackDotGeneral)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 5, 6)))
        >>> jax.tree.map(jnp.shape, variables["feedback"]["query"])
        {'kernel': (6, 2, 3)}
    """

    @property
    def _layer(self):
        return self.parent

    @nn.nowrap
    def __call__(self, x: jax.Array, kernel: jax.Array, *args, **kwargs) -> jax.Array:
        """Applies `jax.lax.dot_general`; the cotangent of `x` is computed with feedback."""
        layer = self._layer
        has_hook = hasattr(layer, "dot_general_cls") and layer.has_variable("params", "kernel")
        if isinstance(layer, _Feedback) or not has_hook:
            raise ValueError(
                f"FeedbackDotGeneral was called within {type(layer).__name__}; expected a Flax "
                "layer with a param 'kernel', as in nn.Dense(10, "
                "dot_general_cls=FeedbackDotGeneral)."
            )

        def product(x, kernel):
            return lax.dot_general(x, kernel, *args, **kwargs)

        if layer.is_initializing():
            init = factors.arrays_only(self.feedback_init or layer.kernel_init)
            none = {"parent": None, "name": None, "dot_general": None, "dot_general_cls": None}
            self._make(layer.clone(**none, kernel_init=init), x)
            return product(x, kernel)
        return ops.through_feedback(
            product, x, kernel, self._read(), feedback_bar=self.feedback_bar, path=self._path
        )


class _Projections(nn.Module, kw_only=True):
    """A mixin with a tree of projections as one variable of the collection "projection"."""

    projection_init: nn.initializers.Initializer = glorot_normal
    stored: bool = True
    rows: float | None = None

    def _projection(self, output, activation, *, stacked=False, features=None):
        assert self.scope is not None  # Flax has bound the module
        if self.is_initializing() and not self.has_variable(PROJECTION, PROJECTION):
            if not self.is_mutable_collection(PROJECTION):
                raise ValueError(self._no_projection())
            if features is not None:
                # One example, all of whose axes are features.
                output = jax.ShapeDtypeStruct((1, *output.shape[-1:]), output.dtype)
                activation = _of_one_example(activation, features, stacked)
            projection = direct.draw_projections(
                self.make_rng(COLLECTION),
                output,
                activation,
                stacked=stacked,
                stored=self.stored,
                initializer=self.projection_init,
            )
            self.put_variable(PROJECTION, PROJECTION, projection)
        projection = self.get_variable(PROJECTION, PROJECTION)
        if projection is None:
            raise ValueError(self._no_projection())
        return flax.core.unfreeze(projection)

    def _no_projection(self):
        path = "/".join(self.path)
        return (
            f"{type(self).__name__} at {path or 'the top'} found no projection in the collection "
            "'projection'. Pass it with the parameters:\n"
            "    model.apply({'params': params, 'projection': projection}, x)\n"
            "with `projection` from model.init(...)['projection']; under nn.scan or nn.vmap also "
            "give variable_axes={'params': 0, 'projection': 0}."
        )


def _of_one_example(activations, features, stacked):
    """Returns the shapes of one example of the activations, for these features."""

    def one(shape):
        shape = (shape,) if isinstance(shape, int) else tuple(map(operator.index, shape))
        return jax.ShapeDtypeStruct((*shape[:stacked], 1, *shape[stacked:]), jnp.float32)

    # Flax converts lists to tuples and dicts to FrozenDicts, so [7, 5] looks like one shape. The
    # structure of the activations shows which nodes are shapes.
    try:
        shapes = jax.tree.map(lambda _, shape: one(shape), _plain(activations), _plain(features))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"features are {features}; expected a tree of the activations' structure, with their "
            f"shapes {jax.tree.map(jnp.shape, activations)} without leading axes."
        ) from error
    return jax.tree.unflatten(jax.tree.structure(activations), jax.tree.leaves(shapes))


def _plain(tree):
    if isinstance(tree, Mapping):
        return {name: _plain(node) for name, node in tree.items()}
    return tuple(map(_plain, tree)) if isinstance(tree, list | tuple) else tree


class DirectFeedback(_Projections):
    """Direct feedback alignment: `(output, activations) -> output`.

    Sends the output's error to the activations through fixed random projections; see
    `soap_jax.direct.direct_feedback`. Stop the ordinary path with `soap_jax.ops.detach`.

    Attributes:
        error: "exact" (DFA) or "sign" (sDFA).
        features: the shape of the activation without its leading axes, an int or a tuple of ints;
            or a tree of these, of the activations' structure. By default the activation has as many
            leading axes as the output. With fewer features all times, or all places, share one
            projection.
        projection_init: initialiser of the projections, `(key, (out, features), dtype) -> array`.
        stored: whether to store projections. False stores keys instead, and every backward pass
            draws the same projections again, which saves memory and costs time. Not with
            `features`.
        stacked: whether activations have a first axis of blocks, as from `DirectStack`; then their
            shapes in `features` begin with the number of blocks.
        rows: the divisor of signs, as in `direct_feedback`.
        projection_bar: the projections' cotangent, as in `direct_feedback`.

    Raises:
        ValueError: in `apply`, if the collection "projection" is missing; if `features` do not fit
            or are given with `stored=False`; or as `direct_feedback`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> hidden, output = {"a": jnp.ones((4, 7)), "b": jnp.ones((4, 5))}, jnp.ones((4, 3))
        >>> variables = DirectFeedback().init(jax.random.key(0), output, hidden)
        >>> jax.tree.map(jnp.shape, variables)
        {'projection': {'projection': {'a': (3, 7), 'b': (3, 5)}}}

    References:
        Nøkland (2016). https://arxiv.org/abs/1609.01596
    """

    error: direct.Error = "exact"
    stacked: bool = False
    features: Any = None
    projection_bar: direct.ProjectionBar = None

    @nn.compact
    def __call__(self, output: jax.Array, activations: chex.ArrayTree) -> jax.Array:
        """Returns the output."""
        if self.features is not None and not self.stored:
            raise ValueError(
                f"features are {self.features}, with stored=False; expected stored=True, since "
                "keys draw for activations with as many leading axes as the output."
            )
        projection = self._projection(
            output, activations, stacked=self.stacked, features=self.features
        )
        return direct.direct_feedback(
            output,
            activations,
            projection,
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

    Attributes:
        projection_init: initialiser of the projection, `(key, (out, features), dtype) -> array`.
        stored: as in `DirectFeedback`.
        rows: the divisor of targets, as in `direct_target`.

    Raises:
        ValueError: in `apply`, if the collection "projection" is missing; or as `direct_target`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> targets = jax.nn.one_hot(jnp.array([0, 2]), 3)
        >>> variables = DirectTarget().init(jax.random.key(0), jnp.ones((2, 7)), targets)
        >>> variables["projection"]["projection"].shape
        (3, 7)

    References:
        Frenkel et al. (2021). https://arxiv.org/abs/1909.01311
    """

    @nn.compact
    def __call__(self, activation: jax.Array, target: jax.Array) -> jax.Array:
        """Returns the activation."""
        projection = self._projection(target, activation)
        return direct.direct_target(
            activation, target, projection, rows=self.rows, initializer=self.projection_init
        )


class DirectStack(nn.Module):
    """A stack of equal, detached blocks for direct feedback: `x -> (length, *x.shape)`.

    No block's error depends on another's, so the backward pass can be one batched computation; see
    `soap_jax.direct.scan_blocks`. Connect the activations to the output:

        activations = DirectStack(Block(), 12)(x)
        output = head(detach(activations[-1]))
        output = DirectFeedback(stacked=True)(output, activations)

    x gets no cotangent. Layers before the stack need a projection of their own:

        h0 = stem(x)
        activations = DirectStack(Block(), 12)(detach(h0))
        output = head(detach(activations[-1]))
        output = DirectFeedback()(output, [h0])
        output = DirectFeedback(stacked=True)(output, activations)

    Attributes:
        block: the template of the blocks, a module `x -> y`, with y of x's shape and dtype. The
            params are at `params/<name>/blocks`, every leaf `(length, ...)`; each block has its own
            draw.
        length: number of blocks.
        parallel: as in `soap_jax.direct.scan_blocks`.

    Raises:
        ValueError: if `block` is not an instance of a module; if `length` is not an integer of at
            least 1; if the block's output does not have its input's shape and dtype; or if the
            block has no params, has other variables (batch statistics, feedback), or needs keys
            (dropout).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> stack = DirectStack(nn.Dense(3), 4)
        >>> activations, variables = stack.init_with_output(jax.random.key(0), jnp.ones((2, 3)))
        >>> activations.shape, variables["params"]["blocks"]["kernel"].shape
        ((4, 2, 3), (4, 3, 3))

    References:
        Nøkland (2016). https://arxiv.org/abs/1609.01596
    """

    block: nn.Module
    length: int
    parallel: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the activations after every block."""
        direct.check_length(self.length, "DirectStack(block, length)")
        if not isinstance(self.block, nn.Module):
            kind = "class" if isinstance(self.block, type) else type(self.block).__name__
            raise ValueError(
                f"block is a {kind}; expected a module instance, such as nn.Dense(64)."
            )
        template = self.block.clone(parent=None)

        def init(key):
            variables = template.init(key, x)
            if others := sorted(variables.keys() - {"params"}):
                raise ValueError(self._only_params(f"has the collections {others}"))
            if "params" not in variables:
                raise ValueError(self._only_params("has no params"))
            return variables["params"]

        def init_all(key):
            params = jax.vmap(init)(jax.random.split(key, self.length))
            return meta.add_axis(params, 0, {meta.PARTITION_NAME: None})

        def block(params, x):
            try:
                return template.apply({"params": params}, x)
            except flax.errors.InvalidRngError as error:
                raise ValueError(self._only_params("draws random numbers")) from error

        params = self.param("blocks", init_all)
        return direct.scan_blocks(block, params, x, parallel=self.parallel)

    def _only_params(self, what):
        return (
            f"the block of {'/'.join(self.path) or 'DirectStack'}, a {type(self.block).__name__}, "
            f"{what}; expected params only, since blocks run in any order. Instead write a loop of "
            "these blocks with `soap_jax.ops.detach` between them."
        )
