"""Learning in time without going back in time: RFLO, e-prop, and their kind for any recurrent cell.

Backpropagation through time sends an error back through all earlier steps. Here nothing goes back:
what a param did to each unit, until now, is carried forwards in a trace, and the present error
meets the trace. Let D be the Jacobian of a step by its state, and M that by the params, with no
error passing a recurrent kernel (`with_feedback` of the cell, with feedback of zeros there). Then

    E ← M + D E                     the trace, of every param and state variable
    gradient = Σ_t  L_t · E_t       L: the learning signal, the present loss's error by the state

Without recurrent kernels D is elementwise, unit by unit, so that a trace is as large as its param,
not as units times params, and M and D take one vjp each, of ones, for a state variable. With

    h ← (1 - 1/τ) h + tanh(h W + x U) / τ           this is RFLO (Murray 2019)
    an adaptive LIF neuron, its surrogate gradient   e-prop (Bellec et al. 2020)

and with any other cell whose D is elementwise, be it of Linen, NNX, Equinox or a plain function,
the same for that cell: an LSTM keeps traces of its cell state, a cell whose D is zero (`SimpleCell`
of Flax) none at all, and one without recurrent kernels the exact gradient, online.

    def cell(params, h, x):                             # one example
        return h + (jnp.tanh(h @ params["w"] + x @ params["u"]) - h) / 10.0

    def loss(params, h, target):                        # a batch, one time
        return jnp.mean((h @ params["out"] - target) ** 2)

    grad_fn = temporal.value_and_grad(cell, loss)
    value, grads = grad_fn(params, {"out": B}, h0, xs, targets)     # for any optimiser

The learning signal takes the way from the loss to the cell that `with_feedback` gives it: random
feedback at the readout's kernels, feedback equal to them ("symmetric e-prop"), learned feedback, or
none given, which is exact. What lies on this way, the readout above all, has its exact gradient.

What one should know:

-   In a spiking neuron the reset is a product with the spike. Both papers leave it out of the
    trace: put that spike under `jax.lax.stop_gradient`.
-   A leaky readout is not local. Let the cell keep leaky averages of its spikes instead, and read
    these out linearly: it is the same output, and e-prop's filtered traces come by themselves.
-   The program of the step says whether D is elementwise and on which unit each entry of a param
    acts; values are never looked at. What cannot be followed is refused, with primitive and line.
-   The error may pass several cells that are stacked into one, see `where` of `online`.

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

from soap_jax import ops, trees
from soap_jax.transform import explanation, tracing, units, with_feedback
from soap_jax.transform import values as vals

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
        traces: those that a later error can meet; none of a variable without a past.
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
        plan = _plan(cell, where, params, state, first)

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
        return _start(_plan(cell, where, params, state, x), params, state)

    def step(params, feedback, carry, x, target):
        plan = _plan(cell, where, params, carry.state, x)
        return _step(plan, cell, loss, feedback_bar, params, feedback, carry, x, target)

    return Online(init, step)


class _Plan(NamedTuple):
    """What the program of a step says of it.

    Attributes:
        number: by state variable that has traces, its units.
        jacobian: pairs of state variables, (new, old), whose D is not zero.
        direct: by variable, the params whose M is not zero.
        axes: by variable, the params that it has traces of, and their axis of units.
        cut: the kernels that no error passes in a trace.
        recurrent: those that none passes in the learning signal, either.
    """

    number: dict[str, int]
    jacobian: frozenset[tuple[str, str]]
    direct: dict[str, frozenset[str]]
    axes: dict[str, dict[str, int]]
    cut: frozenset[trees.Path]
    recurrent: frozenset[trees.Path]


def _step(plan, cell, loss, feedback_bar, params, feedback, carry, x, target):
    """One step: the present gradient, then new traces."""
    state = _State(carry.state)
    floats, rest = state.split(carry.state)

    def present(params, floats, rest, x, target):
        call = jax.vmap(lambda *args: _called(cell, *args), (None, 0, 0))
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
        given |= _zeros(params, plan.recurrent)
        return signal(params, _placed(params, given), floats, rest, x, target)

    _check_wired(plan, signal, params, given, floats, (rest, x, target))
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
    grads = _replaced(grads, present_grads)
    traces = _traces(plan, cell, state, params, carry, floats, rest, x)
    return Carry(new, traces), (value, (grads, *learned) if learned else grads)


def _traces(plan, cell, state, params, carry, floats, rest, x):
    """E ← M + D E."""
    if not plan.axes:
        return carry.traces
    mine = {name for names in plan.direct.values() for name in names}
    own = {name: leaf for name, leaf in trees.named(params).items() if name in mine}
    zeros = _placed(params, _zeros(params, plan.cut))

    def step(params, floats, rest, x):
        new, _ = _called(cell, params, state.join(floats, rest), x)
        return {q: state.split(new)[0][q] for q in plan.axes}

    def one(floats, rest, x):
        def f(chosen, floats):
            return with_feedback(step)(_replaced(params, chosen), zeros, floats, rest, x)

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
    leaves, floats = trees.named(params), _State(state).split(state)[0]

    def zeros(example, leaf):  # of the state's sharding along the batch
        some = jnp.zeros_like(example, dtype=leaf.dtype)[:, 0].reshape(-1, *[1] * jnp.ndim(leaf))
        return vals.vary_like(jnp.broadcast_to(some, (len(example), *leaf.shape)), example)

    traces = {q: {p: zeros(floats[q], leaves[p]) for p in axes} for q, axes in plan.axes.items()}
    return Carry(state, traces)


# The state


class _State:
    """Which leaves of a state are floating point, and what they are called."""

    def __init__(self, state):
        leaves, self.tree = jax.tree.flatten(state)
        self.names = list(trees.named(state))
        self.floats = [vals.inexact(leaf) for leaf in leaves]

    def split(self, state) -> tuple[dict[str, Any], list[Any]]:
        """Floating-point leaves by name, and the others."""
        leaves = list(zip(self.names, self.floats, jax.tree.leaves(state), strict=True))
        rest = [leaf for _, is_float, leaf in leaves if not is_float]
        return {name: leaf for name, is_float, leaf in leaves if is_float}, rest

    def join(self, floats, rest):
        """The state again."""
        left = iter(rest)
        pairs = zip(self.names, self.floats, strict=True)
        leaves = [floats[name] if is_float else next(left) for name, is_float in pairs]
        return jax.tree.unflatten(self.tree, leaves)


def _called(cell, params, state, x):
    """The cell's new state and its output; raises ValueError if the state changes its type."""
    out = cell(params, state, x)
    before, tree = jax.tree_util.tree_flatten_with_path(state)
    if jax.tree.structure(out) == tree:
        new, output = out, out
    elif isinstance(out, tuple) and len(out) == 2 and jax.tree.structure(out[0]) == tree:
        new, output = out
    else:
        raise ValueError(
            f"the cell returned {jax.tree.structure(out)}; expected a state of the structure that "
            f"it was given, {tree}, or a pair of such a state and an output."
        )
    for (keys, old), leaf in zip(before, jax.tree.leaves(new), strict=True):
        types = [f"{jnp.result_type(a)}{list(jnp.shape(a))}" for a in (old, leaf)]
        if types[0] != types[1]:
            raise ValueError(
                f"the cell's state {_called_state(keys)} went in as {types[0]} and came out as "
                f"{types[1]}; expected the same shape and dtype, of one example."
            )
    return new, output


def _called_state(keys) -> str:
    return "".join(f"[{name!r}]" for name in trees.path_of(keys)) or "(one array)"


def _example(tree):
    """The types of one example of a batch."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], x.dtype), tree)


def _check_state(state):
    keyed = jax.tree_util.tree_leaves_with_path(state)
    sizes = {jnp.shape(leaf)[:1] for _, leaf in keyed}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"the state has leaves of shapes {[jnp.shape(leaf) for _, leaf in keyed]}; expected "
            "(batch, units), with one batch in all of them."
        )
    for keys, leaf in keyed:
        if vals.inexact(leaf) and jnp.ndim(leaf) != 2:
            raise ValueError(
                f"the state {_called_state(keys)} has shape {jnp.shape(leaf)}; expected (batch, "
                "units). Flatten what has more axes inside the cell."
            )
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise ValueError(
                f"the state {_called_state(keys)} is complex; expected its real and its imaginary "
                "part as two variables (jax.lax.complex puts them together)."
            )


# Params by name and path


def _differentiated(params) -> dict[str, Any]:
    named = trees.named(params).items()
    return {p: leaf for p, leaf in named if tracing.is_array(leaf) and vals.inexact(leaf)}


def _replaced(params, leaves):
    """Params with some of their leaves replaced, by name."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: leaves.get("/".join(trees.path_of(keys)), leaf), params
    )


def _placed(params, feedback):
    """A feedback tree like params, of feedback by path."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: feedback.get(trees.path_of(keys)), params
    )


def _zeros(params, paths):
    """Feedback of zeros by path."""
    keyed = jax.tree_util.tree_leaves_with_path(params)
    found = {trees.path_of(keys): leaf for keys, leaf in keyed}
    return {path: jnp.zeros_like(found[path]) for path in sorted(paths)}


# What the program says


def _plan(cell, where, params, state, x) -> _Plan:
    """Reads the cell's program: its recurrent kernels, D and M."""
    _check_state(state)
    state, x = _example(state), _example(x)
    passed, lost = _passed(cell, params, state, x)
    recurrent = frozenset(trees.select(params, where)) if where is not None else passed
    cut = passed | recurrent
    layout = _State(state)
    floats, rest = layout.split(state)
    mine = _differentiated(params)

    def step(params, floats, rest, x):
        new, output = _called(cell, params, layout.join(floats, rest), x)
        return layout.split(new)[0], [o for o in jax.tree.leaves(output) if vals.inexact(o)]

    def forward(mine, beside, floats, rest, x):
        beside = _placed(params, beside)
        return with_feedback(step)(_replaced(params, mine), beside, floats, rest, x)

    program = _Backward(forward, mine, _zeros(params, cut), floats, rest, x)
    number = {q: leaf.shape[0] for q, leaf in floats.items()}
    jacobian, direct = set(), {}
    for q in floats:
        one_hot = {r: units.Local(0, number[q]) if r == q else "zero" for r in floats}
        direct[q], old = program.read("zero", (one_hot, "zero"))
        for r, label in old.items():
            if not units.depends(label):
                continue
            if label != units.Local(0, number[q]) or number[r] != number[q]:
                raise ValueError(_not_elementwise(q, r, label, lost))
            jacobian.add((q, r))
    seen = {path: "zero" if path in recurrent else "free" for path in cut}
    _, old = program.read(seen, ("zero", units.Mixed("the cell's output", "")))
    carried = {r for _, r in jacobian} | {r for r, label in old.items() if units.depends(label)}
    axes: dict[str, dict[str, int]] = {q: {} for q in floats if q in carried}
    for q in axes:
        for name, label in direct[q].items():
            if isinstance(label, units.Mixed):
                raise ValueError(_not_local(name, q, label))
            if isinstance(label, units.Local):
                axes[q][name] = label.axis
    for _ in axes:
        for q, r in jacobian:
            for name, axis in axes[r].items():
                if q in axes and axes[q].setdefault(name, axis) != axis:
                    raise ValueError(_not_local(name, q, None))
    return _Plan(
        number,
        frozenset(jacobian),
        {q: frozenset(n for n in axes[q] if units.depends(direct[q][n])) for q in axes},
        axes,
        cut,
        recurrent,
    )


class _Backward:
    """The program of a function's vjp by its first and third argument, to be read with labels."""

    def __init__(self, fun, *args):
        def backward(args, bars):
            params, beside, floats, *others = args
            _, vjp = jax.vjp(lambda p, f: fun(p, beside, f, *others), params, floats)
            return vjp(bars)

        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), args)
        self.args = args, jax.eval_shape(fun, *args)
        self.closed, out = jax.make_jaxpr(backward, return_shape=True)(*self.args)
        self.out = jax.tree.structure(out)

    def read(self, beside, bars):
        """The labels of params and floats, by those of `beside` and of the cotangents."""
        others = ["free"] * (len(self.args[0]) - 2)
        labels = jax.tree.broadcast((("free", beside, *others), bars), self.args)
        return jax.tree.unflatten(self.out, units.read(self.closed, jax.tree.leaves(labels)))


def _passed(cell, params, state, x) -> tuple[frozenset[trees.Path], str]:
    """The kernels that an error of the state passes in a product; and those that it cannot."""

    def step(params, state, x):
        return _called(cell, params, state, x)[0]

    traced = tracing.trace(step, params, (state, x), {})
    first = traced.num_hoisted + sum(path is not None for path in traced.paths)
    of_state = range(first, first + len(jax.tree.leaves(state)))
    active = [i in of_state for i in range(len(traced.paths))]
    kernels = [
        i for i in range(traced.num_hoisted, first) if vals.inexact(traced.operands[i])
    ]  # every floating-point param, as if it had feedback
    found = explanation.read(traced, kernels, active)
    passed, lost = set(), []
    for i in kernels:
        path, note = traced.paths[i] or (), found.note(i)
        if any(use.primitive not in explanation.ELEMENTWISE for use in note.served):
            passed.add(path)
        lost += [f"{trees.show(path)} in {use}, {use.problem}" for use in note.broken]
    return frozenset(passed), "; ".join(lost[:1])


def _check_wired(plan, signal, params, feedback, floats, others):
    """Raises ValueError if params lack a learning signal only because it is cut."""
    if not plan.recurrent:
        return

    def forward(mine, beside, floats, *others):
        beside = _placed(params, beside)
        return signal(_replaced(params, mine), beside, floats, *others)[0]

    mine = _differentiated(params)
    beside = feedback | _zeros(params, plan.recurrent)
    program = _Backward(forward, mine, beside, floats, *others)
    bar = units.Mixed("the loss", "")
    whole, _ = program.read("free", bar)
    cut = {path: "zero" if path in plan.recurrent else "free" for path in beside}
    present, old = program.read(cut, bar)
    reached = {p for p, label in present.items() if units.depends(label)}
    reached |= {p for q, axes in plan.axes.items() if units.depends(old[q]) for p in axes}
    silent = [p for p, label in whole.items() if units.depends(label) and p not in reached]
    if silent:
        kernels = ", ".join(sorted(map(trees.show, plan.recurrent)))
        raise ValueError(
            f"no learning signal comes to the param {silent[0]!r}: within one step its error would "
            f"have to pass a recurrent kernel, one of {kernels}. Is one of them not recurrent, but "
            "leads from one layer to the next? Then say with `where` which are recurrent. Else "
            "jax.lax.stop_gradient says that the param does not learn."
        )


def _not_elementwise(new, old, label, lost) -> str:
    where = f"{label}" if isinstance(label, units.Mixed) else "a change of layout"
    return (
        f"the cell's state {new!r} does not depend on {old!r} unit by unit: in {where} several "
        "units meet, so that a trace of each param's size cannot say what it did. Expected "
        "recurrent kernels that are params, and go into a product as they are"
        + (f" (not so: {lost})" if lost else "")
        + "; and no op across units, such as a norm of the state."
    )


def _not_local(name, variable, label) -> str:
    where = f" (they meet in {label})" if label else ""
    return (
        f"an entry of the param {name!r} acts on several units of the state {variable!r}{where}, "
        "so that it has no trace of its size. Expected one unit for each entry, along one axis of "
        "`units`, or of several gates one after the other. Give each unit its own; take it out of "
        "the cell (an encoder of the input, say); or stop its gradient in the cell "
        "(jax.lax.stop_gradient)."
    )
