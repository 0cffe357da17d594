"""A stack of layers, each on its own chips: the cost of an error chain between chips.

    job("dfa", target)      # for `benchmarks.accelerators`

Each of eight tanh layers of 4096 units is on an eighth of the chips, which split the batch. Batches
go through in parts: in every tick, a chip computes its layer on one part and sends the result to
the next layer's chips (GPipe's schedule). In backprop and feedback alignment, errors come back in
the same way, tick by tick. In direct feedback, the output's error goes to all chips at once, and
each chip then has everything for its layer's gradient: there is no chain, and chips do not wait for
it. Waiting chips compute on zeros, so this work counts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import jobs, targets
from soap_jax import ops

METHODS = ("bp", "fa", "dfa")
NETWORK = "8 layers of 4096"
LAYERS, WIDTH, CLASSES, PARTS, BATCH = 8, 4096, 10, 8, 16384
RATE = 0.01


def job(name: str, target: targets.Target) -> jobs.Job:
    """A train step of the placed stack, `(params, feedback, x, labels) -> (params, loss)`."""
    mesh = targets.grid(target, layer=LAYERS, data=len(target.devices) // LAYERS)
    placed, split = PartitionSpec("layer"), PartitionSpec("data")
    everywhere = PartitionSpec()

    def shape(spec, *axes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(axes, dtype, sharding=NamedSharding(mesh, spec))

    params = {
        "stack": shape(placed, LAYERS, WIDTH, WIDTH),
        "head": shape(everywhere, WIDTH, CLASSES),
    }
    feedback = {
        "bp": None,
        "fa": params,
        "dfa": shape(placed, LAYERS, CLASSES, WIDTH),
    }[name]
    batch = shape(split, BATCH, WIDTH), shape(split, BATCH, dtype=jnp.int32)
    step = jax.shard_map(
        _direct_step if name == "dfa" else _chained_step,
        mesh=mesh,
        in_specs=jax.tree.map(lambda leaf: leaf.sharding.spec, (params, feedback, *batch)),
        out_specs=({"stack": placed, "head": everywhere}, everywhere),
        check_vma=False,  # gradients are summed by hand
    )
    kernels = {(WIDTH, WIDTH), (WIDTH, CLASSES)}
    args = params, feedback, *batch
    return jobs.Job(
        step, args, {"donate_argnums": 0}, frozenset(kernels), state=jobs.shard_bytes(params)
    )


def _chained_step(params, feedback, x, labels):
    def loss_of(params):
        own = None if feedback is None else feedback["stack"][0]
        outputs = _forward(params["stack"][0], own, x)[1][LAYERS - 1 :]
        head = None if feedback is None else feedback["head"]
        return _loss(_dense(outputs, params["head"], head), labels)

    loss, gradients = jax.value_and_grad(loss_of)(params)
    return _updated(params, gradients, loss)


def _direct_step(params, projection, x, labels):
    kernel = params["stack"][0]
    inputs, outputs = _forward(kernel, None, x)

    def of_head(head, outputs):
        logits = _dense(outputs, head)
        return _loss(logits, labels), logits

    last = outputs[LAYERS - 1 :]
    (loss, logits), head_bar = jax.value_and_grad(of_head, has_aux=True)(params["head"], last)
    error = lax.psum(jax.grad(_loss)(logits, labels), "layer")  # zero but on the last layer's chips
    inputs, outputs = (
        lax.dynamic_slice_in_dim(a, lax.axis_index("layer"), PARTS) for a in (inputs, outputs)
    )
    bar = _dense(error, projection[0]) * (1 - jnp.square(outputs))
    (kernel_bar,) = jax.linear_transpose(lambda kernel: _dense(inputs, kernel), kernel)(bar)
    return _updated(params, {"stack": kernel_bar[None], "head": head_bar}, loss)


def _forward(kernel, feedback, x):
    """The layer's inputs and outputs, tick by tick; parts come one tick later at every layer."""
    parts = x.reshape(PARTS, -1, WIDTH).astype(jnp.bfloat16)
    first = lax.axis_index("layer") == 0

    def tick(arrived, t):
        h = jnp.where(first, parts[jnp.minimum(t, PARTS - 1)], arrived)
        y = jnp.tanh(_dense(h, kernel, feedback))
        to_next = [(i, i + 1) for i in range(LAYERS - 1)]
        return lax.ppermute(y, "layer", to_next), (h, y)

    ticks = jnp.arange(PARTS + LAYERS - 1)
    return lax.scan(tick, jnp.zeros_like(parts[0]), ticks)[1]


def _dense(x, kernel, feedback=None):
    return ops.feedback_dense(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), feedback)


def _loss(logits, labels):
    """The mean over the whole batch; zero but on the last layer's chips."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), labels.reshape(PARTS, -1)
    )
    return jnp.where(lax.axis_index("layer") == LAYERS - 1, losses.sum() / BATCH, 0.0)


def _updated(params, gradients, loss):
    summed = {
        "stack": lax.psum(gradients["stack"].astype(jnp.bfloat16), "data"),
        "head": lax.psum(gradients["head"], ("layer", "data")),
    }
    new = jax.tree.map(lambda p, g: p - RATE * g.astype(p.dtype), params, summed)
    return new, lax.psum(loss, ("layer", "data"))
