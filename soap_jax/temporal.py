"""Learning in time without going back in time: RFLO and e-prop, for any recurrent cell.

Backpropagation through time sends an error back through all earlier steps. Here nothing goes back:
traces carry forwards what each param did to its unit until now, and the present error multiplies
them. Let D be the Jacobian of one step by the state before it, and M the one by the params, both
with feedback of zeros at the recurrent kernels (`with_feedback`), so that no error passes these:

    E ← M + D E                     the trace, of every param and state variable
    gradient = Σ_t  L_t · E_t       L: the learning signal, the present loss's error by the state

Such a D must be elementwise, unit by unit. Then a trace is as large as its param, not as units
times params, and a vjp with a cotangent of ones gives M and D of a state variable. This is

    RFLO (Murray 2019)              for h ← (1 - 1/τ) h + tanh(h W + x U) / τ
    e-prop (Bellec et al. 2020)     for adaptive LIF neurons with a surrogate gradient

and the same for the cells of Linen, NNX and Equinox and for your own. An LSTM keeps traces of its
cell state. A cell whose D is zero (`SimpleCell` of Flax) keeps none. A cell without recurrent
kernels gets the exact gradient, online.

    def cell(params, h, x):                             # one example
        return h + (jnp.tanh(h @ params["w"] + x @ params["u"]) - h) / 10.0

    def loss(params, h, target):                        # a batch, one time
        return jnp.mean((h @ params["out"] - target) ** 2)

    grad_fn = temporal.value_and_grad(cell, loss)
    value, grads = grad_fn(params, {"out": B}, h0, xs, targets)     # for any optimiser

The learning signal goes from the loss to the cell by `with_feedback`: through random feedback at
the readout's kernels, feedback equal to them ("symmetric"), learned feedback, or, where none is
given, the kernels themselves. The readout's own gradient is exact.

What one should know:

-   A spiking neuron's reset is a product with its spike, and e-prop leaves it out of the trace: put
    that spike under `jax.lax.stop_gradient`.
-   A leaky readout is not local. Let the cell keep leaky averages of its spikes instead, and read
    these out linearly: it is the same output, and e-prop's filtered traces come by themselves.
-   The program of the step says whether D is elementwise and on which unit each entry of a param
    acts; values are never looked at. What cannot be followed is refused, with primitive and line.
-   Several layers may be stacked in one cell: see `where` of `online`.

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
"""`(params, state, x) -> state`, or `(params, state, x) -> (state, output)`, of one example."""

Loss = Callable[[Any, Any, Any], jax.Array]
"""`(params, output, target) -> scalar` of a batch at one time, the mean over its examples."""

Traces = Mapping[str, Mapping[str, jax.Array]]
"""By state variable and param, their paths as in "cell/kernel": `(batch, *shape of the param)`."""


class Carry(NamedTuple):
    """What goes from step to step.

    Attributes:
        state: the cell's state, leaves `(batch, ...)`.
        traces: by state variable, "" for a state of one array, and by param; none of a variable on
            which the next step does not depend elementwise.
    """

    state: chex.ArrayTree
    traces: Traces


class Online(NamedTuple):
    """A cell that learns step by step.

    Attributes:
        init: `(params, state, x) -> carry`, with traces of zeros; of `x` only its type counts.
        step: `(params, feedback, carry, x, target) -> (carry, (loss, grads))`.
    """

    init: Callable[..., Carry]
    step: Callable[..., tuple[Carry, tuple[jax.Array, chex.ArrayTree]]]


def value_and_grad(
    cell: Cell, loss: Loss, *, where: trees.Where = None, feedback_bar: ops.FeedbackBar = None
) -> Callable[..., tuple[jax.Array, chex.ArrayTree]]:
    """Makes a function that returns the loss of sequences and its time-local gradient.

        loss = Σ_t loss_t,      gradient = Σ_t L_t · E_t

    as the module's docstring has it: what `online` gives at each step, summed by a scan. Memory is
    that of the carry, whatever the number of steps. With one step the gradient is that of
    `with_feedback`; without recurrent kernels, and without feedback, it is exact.

    Args:
        cell: of one example, as in `online`.
        loss: of a batch at one time, as in `online`; for a mean over time divide by its length.
        where: as in `online`.
        feedback_bar: as in `online`.

    Returns:
        `(params, feedback, state, xs, targets) -> (loss, grads)`, with `grads` a tree like
        `params`, or a pair with feedback's if there is a `feedback_bar`; `state` the first one,
        leaves `(batch, units)`; `xs` with leaves `(time, batch, ...)`; `targets` with leaves
        `(time, ...)`. It is pure: `jit`, `vmap` and `scan` it.

    Raises:
        ValueError: from the returned function, as from `online`'s.

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
                "expected a first axis of one length, time, in all of them."
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
    """The same step by step: params may change at each, and nothing is kept of earlier ones.

    At each step, with s the state before it, s' and E' those after it,

        grads = ∂ loss(cell(params, s, x)) / ∂ params  +  (∂ loss / ∂ s) · E     = L · E'
        E' = M + D E

    The recurrent kernels are those that an error of the state passes in a product. In M and D it
    passes none of them. Nor does it in the learning signal, unless `where` says that some are not
    recurrent: of two layers in one cell, what leads from the first to the second. With `where` at
    the kernels inside of each layer, the error passes the one between them, by its own feedback if
    it has some, and each layer keeps traces of itself.

    Args:
        cell: `(params, state, x) -> state`, or `-> (state, output)`, of one example: a plain
            function, `module.apply` of a Flax cell, an Equinox cell put together from its params.
            Floating-point leaves of the state are `(units,)`, each of its own number; others
            (counters, say) are carried along.
        loss: `(params, output, target) -> scalar`, the loss of a batch at one time, with its
            readout; the output's leaves are `(batch, ...)`. A cell that returns only its state has
            it for output. `params` are the same tree.
        where: which kernels are recurrent, as in `soap_jax.init_feedback`; by default see above.
        feedback_bar: feedback's own gradient, as in `soap_jax.with_feedback`: "kernel" for learned
            feedback (Kolen-Pollack).

    Returns:
        The pair `init` and `step`, pure functions; call `step` under `jit`. `feedback` is a tree
        like `params`, None or missing leaves for exact errors, None at recurrent kernels.

    Raises:
        ValueError: when `step` is traced: if the state changes its structure, shape or dtype; if D
            is not elementwise, or a param acts on several units in one entry; if a recurrent kernel
            is given feedback; if no learning signal comes to params though one would by
            backpropagation; and as `with_feedback`.

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
    """One step: the present gradient, then new traces."""
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
            "there, since a time-local error passes no recurrent kernel. (Is it not recurrent, but "
            "leads from one layer to another? Say with `where` which are.)"
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
    """E ← M + D E."""
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

        # Each example's own: the cotangent of a param that is the same on all devices is a sum.
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
    """Values of units, `(batch, units)`, in a shape that multiplies a trace: once for each gate."""
    axis = plan.axes[variable][name] + 1
    gates = trace.shape[axis] // plan.number[variable]
    shape = [n if i in (0, axis) else 1 for i, n in enumerate(trace.shape)]
    return jnp.tile(values, (1, gates)).reshape(shape).astype(trace.dtype)


def _sum(x):
    """The sum over examples. XLA reduces a first axis five times slower on CPU than this."""
    ones = jnp.ones(x.shape[0], x.dtype)
    return jnp.tensordot(ones, x, 1, precision=lax.Precision.HIGHEST)


def _start(plan, params, state) -> Carry:
    """The first carry."""
    leaves, floats = trees.named(params), _cells.State(state).split(state)[0]

    def zeros(example, leaf):  # of the state's sharding along the batch
        some = jnp.zeros_like(example, dtype=leaf.dtype)[:, 0].reshape(-1, *[1] * jnp.ndim(leaf))
        return vals.vary_like(jnp.broadcast_to(some, (len(example), *leaf.shape)), example)

    traces = {q: {p: zeros(floats[q], leaves[p]) for p in axes} for q, axes in plan.axes.items()}
    return Carry(state, traces)
