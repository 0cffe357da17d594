"""Train steps by the name of a method and of a network, for the benchmarks.

    step, state, batch = make("sign, T=10", "784-256-10", 64)
    step = jax.jit(step, donate_argnums=0)
    state, loss = step(state, batch)

Layers with feedback are from `soap_jax.linen`. "with_feedback" and "direct" transform the network
of Flax's own layers. All methods of one network start from the same params. `sketch` gives shapes
in place of arrays, for steps that are only compiled.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

import soap_jax
from benchmarks.transform import Transformer
from soap_jax import direct, models, ops, optimizers, rules, training

CLASSES = 10
DECAY = 1e-4  # of Kolen-Pollack, per update


@dataclasses.dataclass(frozen=True)
class Method:
    """How a step computes its gradient; the defaults give backprop.

    Attributes:
        rule: of feedback weights, None without.
        transformed: whether by `with_feedback`, else by layers.
        learns: whether feedback gets its kernels' updates (Kolen-Pollack).
        per_example: whether the network is written for one example, and batched by `vmap`.
        direct: direct feedback. Projections are stored; or drawn from keys in every backward pass;
            or stored, for named values; or stored, with all hidden layers but the first as one
            stack, which has a scan or a parallel computation as its backward pass.
        options: more arguments of `init_feedback`.
    """

    rule: soap_jax.Rule | None = None
    transformed: bool = False
    learns: bool = False
    per_example: bool = False
    direct: Literal["stored", "keys", "names", "scan", "parallel"] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


RULES = {
    "sign": rules.SignSync(magnitude="unit"),
    **{f"sign_{m}": rules.SignSync(magnitude=m) for m in get_args(rules.Magnitude) if m != "unit"},
    "transport": rules.Transport(),
    "weight_mirror": rules.WeightMirror(),
}
PERIODS = (1, 10, 100)

_SYNCED = {
    f"{name}, T={period}": Method(dataclasses.replace(rule, period=period))
    for name, rule in RULES.items()
    for period in PERIODS
}
_FEEDBACK = {"fa": Method(soap_jax.Fixed()), **_SYNCED}

METHODS = {
    "bp": Method(),
    **_FEEDBACK,
    **{
        f"{name}, with_feedback": dataclasses.replace(method, transformed=True)
        for name, method in _FEEDBACK.items()
    },
    "fa, bfloat16": Method(soap_jax.Fixed(), options={"dtype": jnp.bfloat16}),
    "sign, T=1, int8": dataclasses.replace(_SYNCED["sign, T=1"], options={"dtype": jnp.int8}),
    "kp": Method(soap_jax.Fixed(), learns=True),
    "dfa": Method(direct="stored"),
    "dfa, keys": Method(direct="keys"),
    "dfa, by names": Method(direct="names"),
    "dfa, scan": Method(direct="scan"),
    "dfa, parallel": Method(direct="parallel"),
    "bp, per example": Method(per_example=True),
    "fa, per example": Method(soap_jax.Fixed(), per_example=True),
}

Tap = Callable[[jax.Array], jax.Array]


class Network(NamedTuple):
    """A network from examples of one shape to ten classes.

    Attributes:
        module: of layers with feedback, or without (`feedback=False`).
        shape: of an example.
        tapped: `tap -> apply`, Flax's `apply` of the plain network with a function after every
            block but the last.
        stack: whether all hidden layers but the first are equal, so that they can be a stack.
    """

    module: Callable[..., nn.Module]
    shape: tuple[int, ...]
    tapped: Callable[[Tap], Callable[..., jax.Array]]
    stack: bool = False


def _by_activation(make_module, shape, **more):
    """A network whose hidden layers all end in its `activation`, tanh."""

    def module(feedback, tap=lambda h: h):
        return make_module(feedback=feedback, activation=lambda h: tap(jnp.tanh(h)))

    return Network(module, shape, lambda tap: module(False, tap).apply, **more)


def _mlp(*features, **more):
    return _by_activation(
        lambda **options: models.MLP((*features, CLASSES), **options), (784,), **more
    )


def _transformer(shape, **sizes):
    """A network of `Transformer`, tapped after its embedding and after every block."""

    def tapped(tap):
        def intercept(call, args, kwargs, context):
            y = call(*args, **kwargs)
            return tap(y) if (context.module.name or "").startswith(("embed", "block_")) else y

        def apply(variables, x):
            with nn.intercept_methods(intercept):
                return Transformer(feedback=False, **sizes).apply(variables, x)

        return apply

    return Network(functools.partial(Transformer, **sizes), shape, tapped)


NETWORKS = {
    "784-256-10": _mlp(256),
    "784-1024-1024-1024-10": _mlp(1024, 1024, 1024, stack=True),
    "8 x 4096": _mlp(*8 * [4096], stack=True),
    "8 x 8192": _mlp(*8 * [8192], stack=True),
    "conv 32-64": _by_activation(models.ConvNet, (28, 28, 1)),
    "transformer, 2 blocks of 128": _transformer((64, 32)),
    "transformer, 8 blocks of 2048": _transformer((1536, 256), blocks=8, width=2048, heads=16),
}


class Training(NamedTuple):
    """What `make` makes.

    Attributes:
        step: `(state, batch) -> (state, loss)`, for `jax.jit` or a scan.
        state: before the first update, on the device; donate it.
        batch: `(x, labels)`, on the device.
    """

    step: training.TrainStep
    state: training.TrainState
    batch: training.Batch


def supports(method: str, network: str) -> bool:
    """Whether this step exists: a stack needs a network with one."""
    return METHODS[method].direct not in ("scan", "parallel") or NETWORKS[network].stack


def make(
    method: str,
    network: str,
    batch_size: int,
    optimizer: optax.GradientTransformation | None = None,
) -> Training:
    """Makes one method's train step of one network, by default by SGD."""
    batch = random_batch(NETWORKS[network].shape, batch_size)
    variables = jax.tree.map(jnp.copy, _variables(network))  # of its own: it will be donated
    return Training(*_start(method, network, variables, batch, optimizer, None), batch)


def sketch(
    method: str,
    network: str,
    batch_size: int,
    optimizer: optax.GradientTransformation | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> Training:
    """`make` with shapes (`jax.ShapeDtypeStruct`) for arrays: a large network is not made.

    Args:
        method: of `METHODS`.
        network: of `NETWORKS`.
        batch_size: examples per step.
        optimizer: by default SGD.
        dtype: in which layers compute, as in Flax's layers; params, feedback and the loss
            remain float32.
    """
    net = NETWORKS[network]
    x = jax.ShapeDtypeStruct((batch_size, *net.shape), jnp.float32)
    batch = x, jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    step = None

    def start(variables):
        nonlocal step
        step, state = _start(method, network, variables, batch, optimizer, dtype)
        return state

    variables = jax.eval_shape(net.module(True).init, jax.random.key(0), x)
    state = jax.eval_shape(start, variables)
    return Training(step, state, batch)


def _start(method, network, variables, batch, optimizer, dtype):
    """The step, and the state before the first one."""
    spec, net = METHODS[method], NETWORKS[network]
    optimizer = optimizer or optax.sgd(0.01)
    params = variables["params"]
    apply_fn, feedback = _plain(net), None
    if spec.direct in ("scan", "parallel"):
        params = _stacked(params)
        apply_fn, feedback = _direct_stack(params, parallel=spec.direct == "parallel")
    elif spec.direct == "names":
        apply_fn, feedback = _direct_by_names(net, params, batch[0])
    elif spec.direct:
        apply_fn, feedback = _direct(net, params, batch[0], stored=spec.direct == "stored")
    elif spec.rule is not None:
        apply_fn = _transformed(net) if spec.transformed else _layers(net)
        feedback = soap_jax.init_feedback(
            jax.random.key(1), params, spec.rule, feedback=variables["feedback"], **spec.options
        )
    if spec.per_example:
        apply_fn = _per_example(apply_fn)
    if dtype is not None:
        apply_fn = _in_dtype(apply_fn, dtype)
    if spec.learns:
        optimizer = optimizers.kolen_pollack(optimizer, decay=DECAY)
    step = training.make_train_step(apply_fn, optimizer, learn_feedback=spec.learns)
    return step, training.init_train_state(
        params, optimizer, feedback=feedback, learn_feedback=spec.learns
    )


@functools.cache
def _variables(network):
    """Params and feedback, the same for all methods."""
    net = NETWORKS[network]
    return jax.jit(net.module(True).init)(jax.random.key(0), jnp.ones((1, *net.shape)))


def random_batch(shape: tuple[int, ...], batch_size: int) -> training.Batch:
    """Standard normal inputs and labels."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch_size, *shape), np.float32)
    return jax.device_put((x, rng.integers(0, CLASSES, batch_size, np.int32)))


def _plain(net):
    module = net.module(False)
    return lambda params, feedback, x: module.apply({"params": params}, x)


def _layers(net):
    module = net.module(True)
    return lambda params, feedback, x: module.apply({"params": params, "feedback": feedback}, x)


def _transformed(net):
    module = net.module(False)
    return soap_jax.with_feedback(lambda params, x: module.apply({"params": params}, x))


def _in_dtype(apply_fn, dtype):
    """Computes in a dtype, as layers with `dtype=` do: they cast kernels, biases and inputs."""

    def apply_cast(params, feedback, x):
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        return apply_fn(cast, feedback, x.astype(dtype)).astype(jnp.float32)

    return apply_cast


def _per_example(apply_fn):
    def apply_all(params, feedback, x):
        return jax.vmap(lambda example: apply_fn(params, feedback, example[None])[0])(x)

    return apply_all


def _direct(net, params, x, *, stored):
    """Every block but the last learns by direct feedback."""

    def forward(params, x):
        hidden = []

        def tap(h):
            hidden.append(h)
            return ops.detach(h)

        return net.tapped(tap)({"params": params}, x), hidden

    def apply_fn(params, projections, x):
        return direct.direct_feedback(*forward(params, x), projections)

    output, hidden = jax.eval_shape(forward, params, x)
    key = jax.random.key(1)
    return apply_fn, direct.draw_projections(key, output, hidden, stored=stored)


def _direct_by_names(net, params, x):
    """Like `_direct`, by names in the network."""

    def forward(params, x):
        names.clear()

        def tap(h):
            names.append(f"h{len(names)}")
            return jax.ad_checkpoint.checkpoint_name(h, names[-1])

        output = net.tapped(tap)({"params": params}, x)
        return jax.ad_checkpoint.checkpoint_name(output, "output")

    names: list[str] = []
    jax.eval_shape(forward, params, x)
    apply_fn = soap_jax.with_direct_feedback(forward, tuple(names), "output")
    return apply_fn, soap_jax.init_projections(jax.random.key(1), apply_fn, params, x)


def _stacked(params):
    """The params of an MLP, its hidden layers after the first stacked."""
    first, *stack, last = (params[f"Dense_{i}"] for i in range(len(params)))
    return {"first": first, "stack": jax.tree.map(lambda *s: jnp.stack(s), *stack), "last": last}


def _direct_stack(params, *, parallel):
    """Like `_direct`, with all hidden layers but the first as a stack."""

    def dense(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    def block(layer, x):
        return jnp.tanh(dense(layer, x))

    def apply_fn(params, projections, x):
        first = block(params["first"], x)
        stack = direct.scan_blocks(block, params["stack"], first, parallel=parallel)
        output = dense(params["last"], ops.detach(stack[-1]))
        output = direct.direct_feedback(output, stack, projections["stack"], stacked=True)
        return direct.direct_feedback(output, first, projections["first"])

    blocks, width, _ = params["stack"]["kernel"].shape
    keys = jax.random.split(jax.random.key(1), blocks + 1)
    drawn = [direct.draw_projection(key, CLASSES, width) for key in keys]
    return apply_fn, {"first": drawn[0], "stack": jnp.stack(drawn[1:])}
