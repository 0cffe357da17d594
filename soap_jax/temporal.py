"""Time-local learning without backpropagation through time: RFLO and e-prop for recurrent cells.

Backpropagation through time sends an error back through all earlier steps. The methods here do not:
traces carry the past effect of each param on its unit forwards in time, and the current error
multiplies them. Let D be the Jacobian of one step by the state before it, and M the Jacobian by the
params. In both, the recurrent kernels are cut: they have feedback of zeros (`with_feedback`). Then

    E ← M + D E                     the trace, of every param and state variable
    gradient = Σ_t  L_t · E_t       L: the learning signal, dloss_t / dstate

D must be elementwise: each unit depends only on its own past. Then a trace has the size of its
param, instead of units times params, and one vjp with a cotangent of ones gives M and D of a state
variable. The method is known as

    RFLO (Murray 2019)              for h ← (1 - 1/τ) h + tanh(h W + x U) / τ
    e-prop (Bellec et al. 2020)     for adaptive LIF neurons with a surrogate gradient

It works for the cells of Linen, NNX and Equinox and for your own. An LSTM has traces of its cell
state. A cell with D = 0 (Flax's `SimpleCell`) has no traces. A cell without recurrent kernels gets
the exact gradient, online.

    def cell(params, h, x):                             # one example
        return h + (jnp.tanh(h @ params["w"] + x @ params["u"]) - h) / 10.0

    def loss(params, h, target):                        # a batch, one time
        return jnp.mean((h @ params["out"] - target) ** 2)

    grad_fn = temporal.value_and_grad(cell, loss)
    value, grads = grad_fn(params, {"out": B}, h0, xs, targets)     # for any optimiser

The learning signal goes from the loss to the cell by `with_feedback`. At the readout's kernels it
uses random feedback, feedback equal to the kernels ("symmetric"), learned feedback, or by default
the kernels themselves. The readout's own gradient is exact.

Points to note:

-   A spiking neuron's reset is a product with its spike, which e-prop leaves out of the trace:
    apply `jax.lax.stop_gradient` to that spike.
-   A leaky readout is not local. Instead keep leaky averages of the spikes in the cell's state, and
    read these out linearly. The output is the same, and the traces are e-prop's filtered traces.
-   Whether D is elementwise, and on which unit each entry of a param acts, is found from the
    program of the step, not from values. If this is not possible, an exception names primitive and
    line.
-   Feedback larger than the readout multiplies the recurrent weights' learning rate. In Murray's
    example RFLO is as good as backpropagation through time only for this reason: see
    `python -m benchmarks.temporal`.
-   One cell may contain several layers: see `where` of `online`.

References:
    James M. Murray. Local online learning in recurrent networks with random feedback. eLife, 2019.
    https://doi.org/10.7554/eLife.43299
    Guillaume Bellec, Franz Scherr, Anand Subramoney, Elias Hajek, Darjan Salaj, Robert Legenstein,
    Wolfgang Maass. A solution to the learning dilemma for recurrent networks of spiking neurons.
    Nature Communications, 2020. https://doi.org/10.1038/s41467-020-17236-y
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from soap_jax import _cells, ops, trees
from soap_jax.transform import values as vals
from soap_jax.transform import with_feedback

Cell = Callable[[Any, Any, Any], Any]
"""A function `(params, state, x) -> state` or `-> (state, output)`, for one example."""

Loss = Callable[[Any, Any, Any], jax.Array]
"""A function `(params, output, target) -> scalar`, the mean over a batch at one time."""

Traces = Mapping[str, Mapping[str, jax.Array]]
"""Traces `(batch, *shape of the param)`, by paths of state variable and param ("cell/kernel")."""


class Carry(NamedTuple):
    """The carry from step to step: state and traces.

    Attributes:
        state: the cell's state, leaves `(batch, ...)`.
        traces: by state variable ("" for a state of one array) and by param. There are no traces of
            a variable on which the next step does not depend elementwise.
    """

    state: chex.ArrayTree
    traces: Traces


class Online(NamedTuple):
    """A cell that learns step by step.

    Attributes:
        init: `(params, state, x) -> carry`, with traces of zeros; only the type of `x` is used.
        step: `(params, feedback, carry, x, target) -> (carry, (loss, grads))`.
    """

    init: Callable[..., Carry]
    step: Callable[..., tuple[Carry, tuple[jax.Array, chex.ArrayTree]]]


def value_and_grad(
    cell: Cell, loss: Loss, *, where: trees.Where = None, feedback_bar: ops.FeedbackBar = None
) -> Callable[..., tuple[jax.Array, chex.ArrayTree]]:
    """Makes a function that returns the loss of sequences and its time-local gradient.

        loss = Σ_t loss_t,      gradient = Σ_t L_t · E_t

    as in the module's docstring. A scan sums the results of `online` over all steps. The memory is
    that of the carry, for any number of steps. With one step the gradient is that of
    `with_feedback`; without recurrent kernels and without feedback it is exact.

    Args:
        cell: for one example, as in `online`.
        loss: for a batch at one time, as in `online`; for a mean over time divide by its length.
        where: as in `online`.
        feedback_bar: as in `online`.

    Returns:
        `(params, feedback, state, xs, targets) -> (loss, grads)`. `grads` is a tree like `params`,
        or with a `feedback_bar` a pair of such a tree and the gradient by feedback. `state` is the
        initial state, leaves `(batch, units)`; `xs` has leaves `(time, batch, ...)`; `targets` has
        leaves `(time, ...)`. It is pure, and works under `jit`, `vmap` and `scan`.

    Raises:
        ValueError: from the returned function, as from `step` of `online`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from soap_jax import temporal
        >>> def cell(params, h, x):
        ...     return 0.5 * h + params["u"] * x
        >>> def loss(params, h, target):
        ...     return jnp.sum((h - target) ** 2)
        >>> grad_fn = temporal.value_and_grad(cell, loss)
        >>> xs, targets = jnp.ones((2, 1, 1)), jnp.zeros((2, 1, 1))
        >>> value, grads = grad_fn({"u": jnp.ones(1)}, None, jnp.zeros((1, 1)), xs, targets)
        >>> float(value), float(grads["u"][0])              # 1² + 1.5², and twice that
        (3.25, 6.5)

    References:
        Murray (2019), Bellec et al. (2020); see the module's docstring.
    """
    ops.check_feedback_bar(feedback_bar)

    def grad_fn(params, feedback, state, xs, targets):
        leaves = jax.tree.leaves((xs, targets))
        if len({jnp.shape(leaf)[:1] for leaf in leaves}) != 1 or not jnp.ndim(leaves[0]):
            raise ValueError(
                f"xs and targets have leaves of shapes {[jnp.shape(leaf) for leaf in leaves]}; "
                "expected a first axis of one length, the time, in all of them."
            )
        first = jax.tree.map(lambda x: x[0], xs)
        plan = _cells.read(cell, where, params, state, first)

        def step(carry, x, target):
            return _step(plan, cell, loss, feedback_bar, params, feedback, carry, x, target)

        start = _start(plan, params, state)
        target = jax.tree.map(lambda x: x[0], targets)
        closed, out = jax.make_jaxpr(step, return_shape=True)(start, first, target)
        tree = jax.tree.structure(out)

        def body(carry, inputs):
            carry, total = carry
            found = core.jaxpr_as_fun(closed)(*jax.tree.leaves((carry, *inputs)))
            carry, found = jax.tree.unflatten(tree, found)
            return (carry, jax.tree.map(jnp.add, total, found)), None

        _, zeros = jax.tree.unflatten(tree, map(vals.zeros, closed.out_avals))
        (_, total), _ = lax.scan(body, (start, zeros), (xs, targets))
        return total

    return grad_fn


def online(
    cell: Cell, loss: Loss, *, where: trees.Where = None, feedback_bar: ops.FeedbackBar = None
) -> Online:
    """Makes functions that compute the loss and its time-local gradient at each step.

    Params may change at every step. With s the state before the step, and s' and E' state and
    traces after it,

        grads = ∂ loss(cell(params, s, x)) / ∂ params  +  (∂ loss / ∂ s) · E     = L · E'
        E' = M + D E

    Recurrent kernels are those through which an error of the state passes in a product. They are
    cut in M and D, and by default in the learning signal too. If a cell contains two layers, the
    kernel from the first to the second is not recurrent. To keep it in the learning signal, select
    the recurrent kernels of each layer with `where`. An error then passes through the kernel
    between the layers, or through its feedback if it has any, and each layer has its own traces.

    Args:
        cell: `(params, state, x) -> state`, or `-> (state, output)`, for one example: a plain
            function, `module.apply` of a Flax cell, or an Equinox cell combined with its params.
            Floating-point leaves of the state are `(units,)`, and may have different numbers of
            units; other leaves, such as counters, are only carried.
        loss: `(params, output, target) -> scalar`, the loss of a batch at one time, including the
            readout; the output's leaves are `(batch, ...)`. If the cell returns only its state, the
            output is the state. `params` is the same tree as for the cell.
        where: the recurrent kernels, as in `soap_jax.init_feedback`; by default as above.
        feedback_bar: the gradient by feedback, as in `soap_jax.with_feedback`: "kernel" for learned
            feedback (Kolen-Pollack).

    Returns:
        The pure functions `init` and `step`; call `step` under `jit`. `feedback` is a tree like
        `params`, with None or missing leaves for exact errors, and None at recurrent kernels.

    Raises:
        ValueError: when `step` is traced: if the state changes its structure, shape or dtype; if D
            is not elementwise, or one entry of a param acts on several units; if a recurrent kernel
            has feedback; if a param gets no learning signal, but would get one by backpropagation;
            and as `with_feedback`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from soap_jax import temporal
        >>> params = {"w": jnp.zeros((2, 2)), "out": jnp.ones((2, 1))}
        >>> learner = temporal.online(
        ...     lambda params, h, x: 0.5 * h + jnp.tanh(h @ params["w"] + x),
        ...     lambda params, h, target: jnp.sum(h @ params["out"] * target))
        >>> carry = learner.init(params, jnp.ones((1, 2)), jnp.zeros((1, 2)))
        >>> feedback = {"out": jnp.array([[3.0], [5.0]])}
        >>> x, target = jnp.zeros((1, 2)), jnp.ones((1, 1))
        >>> carry, (value, grads) = learner.step(params, feedback, carry, x, target)
        >>> grads["w"]                                      # h_before times B
        Array([[3., 5.],
               [3., 5.]], dtype=float32)
    """
    ops.check_feedback_bar(feedback_bar)

    def init(params, state, x):
        return _start(_cells.read(cell, where, params, state, x), params, state)

    def step(params, feedback, carry, x, target):
        plan = _cells.read(cell, where, params, carry.state, x)
        return _step(plan, cell, loss, feedback_bar, params, feedback, carry, x, target)

    return Online(init, step)


def _step(plan, cell, loss, feedback_bar, params, feedback, carry, x, target):
    """Computes one step: the current gradient, then new traces."""
    state = _cells.State(carry.state)
    floats, rest = state.split(carry.state)

    def present(params, floats, rest, x, target):
        call = jax.vmap(lambda *args: _cells.called(cell, *args), (None, 0, 0))
        new, output = call(params, state.join(floats, rest), x)
        return loss(params, output, target), new

    signal = with_feedback(present, feedback_bar=feedback_bar)
    given = trees.by_kernel(params, feedback)
    if refused := sorted(plan.recurrent & given.keys()):
        raise ValueError(
            f"the kernel at {trees.show(refused[0])} is recurrent and has feedback; expected None "
            "there, since a time-local error does not pass through recurrent kernels. If it is not "
            "recurrent, but leads from one layer to another, select the recurrent kernels with "
            "`where`."
        )

    def of_loss(params, feedback, floats):
        given = trees.by_kernel(params, feedback)
        given |= _cells.zeros(params, plan.recurrent)
        return signal(params, _cells.placed(params, given), floats, rest, x, target)

    _cells.check_wired(plan, signal, params, given, floats, (rest, x, target))
    argnums = (0, 2) if feedback_bar is None else (0, 2, 1)
    (value, new), (grads, bars, *learned) = jax.value_and_grad(of_loss, argnums, has_aux=True)(
        params, feedback, floats
    )
    present_grads = trees.named(grads)
    for q, trace in carry.traces.items():
        for name, e in trace.items():
            past = _sum(_along(bars[q], e, plan, q, name) * e)
            axes = tuple(vals.varying(past) - vals.varying(present_grads[name]))
            present_grads[name] += lax.psum(past, axes) if axes else past  # as `grad` does
    grads = _cells.replaced(grads, present_grads)
    traces = _traces(plan, cell, state, params, carry, floats, rest, x)
    return Carry(new, traces), (value, (grads, *learned) if learned else grads)


def _traces(plan, cell, state, params, carry, floats, rest, x):
    """Computes new traces, E ← M + D E."""
    if not plan.axes:
        return carry.traces
    mine = {name for names in plan.direct.values() for name in names}
    own = {name: leaf for name, leaf in trees.named(params).items() if name in mine}
    zeros = _cells.placed(params, _cells.zeros(params, plan.cut))

    def step(params, floats, rest, x):
        new, _ = _cells.called(cell, params, state.join(floats, rest), x)
        return {q: state.split(new)[0][q] for q in plan.axes}

    def one(floats, rest, x):
        def f(chosen, floats):
            return with_feedback(step)(_cells.replaced(params, chosen), zeros, floats, rest, x)

        # For M of each example: the cotangent of a param that does not vary over devices is a sum.
        chosen = jax.tree.map(lambda leaf: vals.vary_like(leaf, next(iter(floats.values()))), own)
        new, vjp = jax.vjp(f, chosen, floats)
        return {
            q: vjp({r: (jnp.ones_like if r == q else jnp.zeros_like)(new[r]) for r in new})
            for q in new
        }

    found = jax.vmap(one)(floats, rest, x)
    traces: dict[str, dict[str, jax.Array]] = {}
    for q, (m, d) in found.items():
        traces[q] = {}
        for name in plan.axes[q]:
            terms = [m[name]] if name in plan.direct[q] else []
            for r, trace in carry.traces.items():
                if (q, r) in plan.jacobian and name in trace:
                    terms.append(_along(d[r], trace[name], plan, r, name) * trace[name])
            traces[q][name] = sum(terms[1:], terms[0])
    return traces


def _along(values, trace, plan, variable, name):
    """Reshapes values of units, `(batch, units)`, to multiply a trace, repeated for each gate."""
    axis = plan.axes[variable][name] + 1
    gates = trace.shape[axis] // plan.number[variable]
    shape = [n if i in (0, axis) else 1 for i, n in enumerate(trace.shape)]
    return jnp.tile(values, (1, gates)).reshape(shape).astype(trace.dtype)


def _sum(x):
    """Sums over examples, on CPU five times faster than XLA's reduction of a first axis."""
    ones = jnp.ones(x.shape[0], x.dtype)
    return jnp.tensordot(ones, x, 1, precision=lax.Precision.HIGHEST)


def _start(plan, params, state) -> Carry:
    """The first carry."""
    leaves, floats = trees.named(params), _cells.State(state).split(state)[0]

    def zeros(example, leaf):  # with the state's sharding along the batch
        some = jnp.zeros_like(example, dtype=leaf.dtype)[:, 0].reshape(-1, *[1] * jnp.ndim(leaf))
        return vals.vary_like(jnp.broadcast_to(some, (len(example), *leaf.shape)), example)

    traces = {q: {p: zeros(floats[q], leaves[p]) for p in axes} for q, axes in plan.axes.items()}
    return Carry(state, traces)
