"""`with_feedback`: a feedback argument for any JAX function of params."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

from soap_jax import ops, trees
from soap_jax.feedback import FeedbackState
from soap_jax.transform import tracing
from soap_jax.transform import values as vals
from soap_jax.transform.reader import Reader

Out = TypeVar("Out")


def with_feedback(
    fun: Callable[..., Out], *, feedback_bar: ops.FeedbackBar = None
) -> Callable[..., Out]:
    """Adds a feedback argument to any function of a tree of params.

    With `fun_fa = with_feedback(fun)`, `fun_fa(params, feedback, *args)` equals
    `fun(params, *args)`. Let W be a kernel with a feedback leaf B, and y = x · W (or elementwise,
    y = x * W) its product with an activation x. In the backward pass

        x_bar = y_bar · Bᵀ        with feedback: all layers below get a pseudo-gradient
        W_bar = xᵀ · y_bar        as in backpropagation

    and everything else is differentiated exactly. So if feedback equals the kernels, this is exact
    backpropagation. A missing or None leaf means backpropagation for that kernel; None instead of
    the whole tree means plain backpropagation.

    The function may use Linen, NNX (`nnx.split` and `nnx.merge`), Equinox, Haiku or no library. It
    is traced, as under `jit`: arrays among its arguments become tracers, and other arguments do not
    change. Arrays that it closes over are constants, so pass the batch as an argument. The result
    composes with `grad`, `value_and_grad`, `has_aux`, `jit`, `vmap`, `scan`, `checkpoint` and
    `shard_map`. Only reverse mode works, since a pseudo-gradient is defined by its backward pass.
    Call it under `jit`: each call outside `jit` traces `fun` again.

    The docstring of `soap_jax.transform` states what is guaranteed and what is refused. Use
    `soap_jax.explain` to see this for your function before you run it.

    Args:
        fun: `(params, *args, **kwargs) -> outputs`; `params` is any pytree.
        feedback_bar: the cotangent of feedback, as in `soap_jax.ops.feedback_op`: None, "kernel"
            (Kolen-Pollack), or a function of one product's operands.

    Returns:
        `fun_fa(params, feedback, *args, **kwargs) -> outputs`, where `feedback` is a tree like
        `params` (see `soap_jax.trees`), such as `init_feedback(...).feedback`. It raises
        ValueError when it is traced, if a leaf's path or shape is not its kernel's or if its
        kernel is in no product with an activation; and when it is differentiated, if an error would
        flow back through a kernel with feedback after more than its layout was changed: a
        normalised kernel, two kernels combined, a mask computed from weights.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from soap_jax import with_feedback
        >>> def loss(params, x):
        ...     return jnp.sum(jnp.tanh(x @ params["in"]) @ params["out"])
        >>> params = {"in": jnp.eye(2), "out": jnp.ones((2, 1))}
        >>> feedback = {"out": jnp.array([[5.0], [-1.0]])}
        >>> jax.grad(with_feedback(loss))(params, feedback, jnp.array([0.01, 0.0]))["in"].round(2)
        Array([[ 0.05, -0.01],
               [ 0.  , -0.  ]], dtype=float32)

    References:
        Lillicrap et al. Random synaptic feedback weights support error backpropagation for deep
        learning. Nature Communications, 2016. https://doi.org/10.1038/ncomms13276
    """
    ops.check_feedback_bar(feedback_bar)

    def fun_fa(params: chex.ArrayTree, feedback: chex.ArrayTree, *args, **kwargs) -> Out:
        if isinstance(feedback, FeedbackState):
            raise ValueError("feedback is a FeedbackState; pass its tree, `state.feedback`.")
        by_path = trees.by_kernel(params, feedback)
        traced = tracing.trace(fun, params, args, kwargs)
        _check_uses(traced, by_path)
        beside = [
            _as_stored(by_path[path], x, cast=feedback_bar is not None) if path in by_path else None
            for path, x in zip(traced.paths, traced.operands, strict=True)
        ]
        return traced.rebuild(_through_feedback(traced, feedback_bar)(traced.operands, beside))

    for name in ("__module__", "__name__", "__qualname__"):  # not `wraps`: the signature differs
        if hasattr(fun, name):
            setattr(fun_fa, name, getattr(fun, name))
    return fun_fa


def _through_feedback(traced: tracing.Traced, feedback_bar):
    """Returns `(operands, beside) -> outputs`, which uses feedback in its backward pass."""

    def f(operands, beside):
        del beside
        return traced.evaluate(operands)

    f.__name__ = "with_feedback"  # by which `soap_jax.activity` finds it in a jaxpr
    f = jax.custom_vjp(f)

    def f_fwd(operands, beside):
        values = [x.value for x in operands]
        learns = [feedback_bar is not None and b is not None and b.perturbed for b in beside]
        active = [
            (x.perturbed or learn) and vals.inexact(x.value)
            for x, learn in zip(operands, learns, strict=True)
        ]
        stored = [None if b is None else b.value for b in beside]
        refused: list[str | None] = []

        @jax.custom_jvp
        def run(active_values, learned):
            del learned
            return traced.evaluate(_merged(active, active_values, values))

        @run.defjvp
        def run_jvp(primals, tangents):
            operands = _merged(active, primals[0], values)
            own = _merged(learns, primals[1], stored)
            dots = iter(tangents[0])
            feedback_dots = iter(tangents[1])
            inputs = traced.inputs(operands, own, active)
            for i, (is_active, learn) in enumerate(zip(active, learns, strict=True)):
                if is_active:
                    inputs.append(traced.tangent(i, next(dots)))
                if learn:
                    inputs[-1] = _learning(i, inputs[-1], next(feedback_dots), feedback_bar)
            reader = Reader(traced.paths, feedback_bar=feedback_bar)
            found = reader.run(traced.derivative(active, operands), inputs)
            outs, dots = found[: traced.num_outputs], iter(found[traced.num_outputs :])
            both = [
                (out.array, next(dots)) if vals.inexact(out.array) else (out.array, None)
                for out in outs
            ]
            refused[:] = [None if dot is None else dot.label.refused for _, dot in both]
            return [out for out, _ in both], [
                np.zeros(jnp.shape(out), jax.dtypes.float0) if dot is None else dot.array
                for out, dot in both
            ]

        outs, vjp = jax.vjp(run, _chosen(active, values), _chosen(learns, stored))
        return outs, (vjp, _Static((tuple(active), tuple(learns), tuple(refused))))

    def f_bwd(residuals, outs_bar):
        vjp, static = residuals
        active, learns, refused = static.value
        for y_bar, problem in zip(outs_bar, refused, strict=False):
            if problem and not _is_zero(y_bar):
                raise ValueError(problem)
        outs_bar = [_instantiated(y_bar) for y_bar in outs_bar]
        bars, feedback_bars = map(iter, vjp(outs_bar))
        return [next(bars) if mine else None for mine in active], [
            next(feedback_bars) if mine else None for mine in learns
        ]

    f.defvjp(f_fwd, f_bwd, symbolic_zeros=True)
    return f


def _learning(i, dot, feedback_dot, feedback_bar):
    """A kernel's tangent with the tangent of feedback, which then gets a cotangent at each product.

    For "kernel" it is the kernel's cotangent: the form with feedback is the sum of both tangents.
    """
    feedback = dot.array + feedback_dot if feedback_bar == "kernel" else feedback_dot
    return dot._replace(label=dot.label._replace(kernels={i: "laid out"}), feedback=feedback)


def _merged(mine, chosen, others):
    chosen = iter(chosen)
    return [next(chosen) if m else x for m, x in zip(mine, others, strict=True)]


def _chosen(mine, values):
    return [x for m, x in zip(mine, values, strict=True) if m]


def _is_zero(y_bar) -> bool:
    return isinstance(y_bar, jax.custom_derivatives.SymbolicZero)


def _instantiated(y_bar):
    if not _is_zero(y_bar):
        return y_bar
    if y_bar.dtype == jax.dtypes.float0:
        return np.zeros(y_bar.shape, jax.dtypes.float0)
    return vals.zeros(y_bar.aval)


@jax.tree_util.register_static
class _Static:
    """A static value among the residuals."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return self.value == other.value

    def __hash__(self):
        return hash(self.value)


def _as_stored(feedback, kernel, *, cast: bool):
    """Casts feedback to its kernel's dtype, unless it is stored in fewer bits and need not be."""
    feedback = vals.vary_like(jnp.asarray(feedback), kernel)
    if cast or vals.bits(feedback.dtype) >= vals.bits(kernel.dtype):
        return feedback.astype(kernel.dtype)
    return feedback


def _check_uses(traced, by_path):
    """Raises ValueError if a kernel has feedback that is not used, or feedback of its layer too."""
    reader = Reader(traced.paths, abstract=True)
    active = [True] * len(traced.operands)
    beside = [None if path is None else by_path.get(path) for path in traced.paths]
    reader.run(traced.closed, traced.inputs(traced.operands, beside, active)[traced.num_hoisted :])
    for i, path in enumerate(traced.paths):
        if path not in by_path:
            continue
        notes = reader.note(i)
        if notes.layer:
            raise ValueError(
                f"the kernel at {trees.show(path)} belongs to a layer that has feedback of its "
                f"own, at {notes.layer.line}; expected None at its path, since the layer's "
                "feedback is used."
            )
        if notes.met:
            continue
        where = f"used in {notes.last}" if notes.last else "not used"
        for broken in notes.lost:
            where = f"used in {broken}, {reader.told(broken)}"
        raise ValueError(
            f"feedback at {trees.show(path)} would do nothing: its kernel is in no product with an "
            f"activation in which feedback could replace it. It is {where}. Put None at its path, "
            "or use init_feedback(key, params, where=soap_jax.explain(fun, params, *args)) to "
            "select the kernels for which feedback has an effect. Arrays that the function closes "
            "over are constants, not activations: pass the batch as an argument."
        )
