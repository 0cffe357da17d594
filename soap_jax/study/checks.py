"""Checks of a task before any training, and the fingerprint that identifies the task."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from soap_jax import trees
from soap_jax.study import loops, trial
from soap_jax.tasks import Task


def check(task: Task, batch_size: int) -> tuple[trial.Layers, dict[str, Any]]:
    """Tries the task's functions with one seed.

    Args:
        task: the task.
        batch_size: the examples in a batch.

    Returns:
        The task's kernels, and a fingerprint that differs between tasks.

    Raises:
        ValueError: if a function of the task does not do what `Task` documents.
    """
    key = jax.random.key(0)
    for name in ("init", "init_state", "train"):
        if callable(function := getattr(task, name)):
            _traced_shapes(name, function, key)
    params = jax.jit(task.init)(key)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"init gives {leaf.dtype} at {jax.tree_util.keystr(keys)}; expected floating-point "
                "params. Put values that are not learned into init_state."
            )
    state = task.init_state and jax.jit(task.init_state)(key)
    if callable(task.train):
        batch = task.train(key)
    else:
        batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[:batch_size]), task.train)
    _check_device(task)
    fun = trial.loss_of(task)
    args = params, state, batch, key

    def value(*args):
        loss, _ = fun(*args)
        return loss

    loss = _traced_shapes("loss", value, *args)
    if getattr(loss, "shape", None) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"the loss is {loss}; expected a floating-point scalar, the mean over the batch."
        )
    closed = jax.make_jaxpr(fun)(*args)
    jaxpr = closed.jaxpr
    first, second = value(*args), value(*args)
    if not np.isfinite(first):
        raise ValueError(
            f"the loss is {first} before the first update; expected a finite number. Check init "
            "and the scale of the data."
        )
    used = {var for eqn in jaxpr.eqns for var in eqn.invars if not isinstance(var, core.Literal)}
    leaves = len(jax.tree.leaves((params, state)))
    of_batch = jaxpr.invars[leaves : leaves + len(jax.tree.leaves(batch))]
    if first != second:
        raise _impure("loss")
    if not used.intersection(of_batch):
        raise ValueError(
            "the loss does not use its batch; expected loss(params, batch). Arrays that the loss "
            "closes over are constants: pass the examples as train."
        )
    own = args[:1] if task.init_state is None else args[:2]
    functions = {"loss": lambda *given: value(params, state, given[-1], key)}
    functions |= {f"the metric {name!r}": metric for name, metric in task.metrics.items()}
    held_out = {p: _types(getattr(task, p), batch_size) for p in task.examples if p != "train"}
    for part, examples in {"train": batch, **held_out}.items():
        for name, function in functions.items():
            found = _traced_shapes(f"{name}, on examples of {part},", function, *own, examples)
            if getattr(found, "shape", None) != ():
                raise ValueError(f"{name} is {found}; expected a scalar.")
    return trial.layers_of(task, params, state, batch), {
        "loss": hashlib.sha256(program_text(closed).encode()).hexdigest(),
        "params": {
            name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in trees.named(params).items()
        },
        "metrics": list(task.metrics),
        "data": {part: _digest(getattr(task, part)) for part in task.examples},
    }


def _traced_shapes(name, function, *args):
    """The shapes that a function returns; an error if it raises or is not pure."""
    try:
        shapes = jax.eval_shape(lambda *args: function(*args), *args)
        texts = {
            program_text(jax.make_jaxpr(lambda *args: function(*args))(*args)) for _ in range(2)
        }
    except Exception as error:
        raise ValueError(f"{name} raises {type(error).__name__}: {error}") from error
    if len(texts) > 1:
        raise _impure(name)
    return shapes


def _impure(name):
    return ValueError(
        f"{name} is not pure: two calls with the same arguments differ. Expected a function of its "
        "arguments alone. Draw random numbers from its key argument; a loss has one if the task "
        "has init_state."
    )


def _check_device(task):
    """Raises ValueError if the task's arrays do not fit on a device."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    size = sum(
        leaf.nbytes for part in task.examples for leaf in jax.tree.leaves(getattr(task, part))
    )
    if limit is not None and size > limit:
        raise ValueError(
            f"the task's arrays have {size} bytes, but the device has only {limit}; expected data "
            "that fit on the device. Use a narrower dtype or fewer examples."
        )


def _types(part, batch_size):
    def of(x):  # JAX takes 64-bit arrays as 32-bit ones by default
        return jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), jax.typeof(x).dtype)

    return jax.tree.map(of, part)


def program_text(jaxpr: core.ClosedJaxpr) -> str:
    """A program as text, with a digest of its constants and without memory addresses."""
    consts = [getattr(part, "consts", ()) for part in loops.every_jaxpr(jaxpr)]
    return re.sub(r"0x[0-9a-f]+", "", f"{jaxpr.jaxpr} {_digest(consts)}")


def _digest(tree) -> str:
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()


def _is_key(leaf) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
