"""Feedback weights as a state, which `init_feedback` creates and `sync_feedback` updates.

    state = init_feedback(key, params, SignSync(period=10))
    state = sync_feedback(params, state, step)      # pure; call it before taking the gradient
    state.feedback                                  # what the model uses

The state is a pytree of arrays, separate from `params`, and the optimiser does not update it. Its
rule is static and its periods are leaves, so a new step or period does not cause a retrace.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import zlib
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from soap_jax import draws, dtypes, factors, rules, trees

__all__ = [
    "FeedbackState",
    "Initializer",
    "RulesByPattern",
    "feedback_of",
    "init_feedback",
    "sync_feedback",
    "sync_feedback_unless",
]

Initializer = jax.nn.initializers.Initializer | Literal["matched"]
"""A function `(key, shape, dtype) -> array`, or "matched": as large as the kernel."""

glorot_normal = jax.nn.initializers.glorot_normal()

RulesByPattern = tuple[tuple[str, rules.Rule], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FeedbackState:
    """Feedback weights, with the rule, period, memory and key that syncs need.

    Attributes:
        feedback: the feedback tree, which the model uses; see `soap_jax.trees`.
        period: int32 scalar, the number of updates from one sync to the next; for a mapping of
            rules, a dict from pattern to such a scalar.
        memory: the memories of rules that have one (`Rule.init`), by path ("Dense_1/kernel"). A
            memory belongs to its feedback: to use other feedback, call
            `init_feedback(feedback=...)`.
        key_data: uint32, the data of `key`. With a typed key among its leaves, JAX would not use
            its fast path when a jitted function returns the state.
        rule: static, the rule with its period set to 1, or `(pattern, rule)` pairs.
        key_impl: static, the random generator of `key_data`.
    """

    feedback: chex.ArrayTree
    period: chex.ArrayTree
    memory: dict[str, chex.ArrayTree]
    key_data: jax.Array
    rule: rules.Rule | RulesByPattern = dataclasses.field(metadata={"static": True})
    key_impl: Hashable = dataclasses.field(metadata={"static": True})

    @property
    def key(self) -> chex.PRNGKey:
        """The PRNG key from which random rules derive their keys."""
        return jax.random.wrap_key_data(self.key_data, impl=self.key_impl)


_ARRAYS = ("feedback", "period", "memory", "key_data")


def _to_state_dict(state):
    return {name: serialization.to_state_dict(getattr(state, name)) for name in _ARRAYS}


def _from_state_dict(state, content):
    if set(content) != set(_ARRAYS):
        raise ValueError(
            f"the content of a FeedbackState has the entries {sorted(content)}; expected "
            f"{', '.join(_ARRAYS)}, as flax.serialization.to_state_dict gives them. To adopt the "
            "weights of an older state, call init_feedback(key, params, rule, "
            "feedback=content['feedback']), which also makes the rule's memory."
        )
    arrays = {
        name: serialization.from_state_dict(getattr(state, name), content[name], name)
        for name in _ARRAYS
    }
    return dataclasses.replace(state, **arrays)


# For `to_bytes` and `from_bytes` of a FeedbackState, or of a tree that contains one. The rule and
# the generator are static: they come from the target of the restore, as with flax.struct.
serialization.register_serialization_state(FeedbackState, _to_state_dict, _from_state_dict)


def init_feedback(
    key: chex.PRNGKey,
    params: chex.ArrayTree,
    rule: rules.Rule | Mapping[str, rules.Rule] = rules.Fixed(),  # noqa: B008 (immutable)
    *,
    where: trees.Where = None,
    initializer: Initializer | Mapping[str, Initializer] = "matched",
    feedback: chex.ArrayTree | None = None,
    dtype: DTypeLike | Literal["used"] | None = None,
) -> FeedbackState:
    """Draws feedback weights for a model's kernels, or adopts the model's own.

    Drawn feedback is for `soap_jax.with_feedback`, which works with any model, and for functions
    that pass it to `soap_jax.ops`. A model with layers of `soap_jax.linen` or `soap_jax.nnx`
    already has feedback: adopt it with `feedback=`.

    A layer's draw depends only on `key` and the layer's path, so runs with different rules, or with
    feedback on different layers, are paired. Feedback has its kernel's shape and sharding. The
    first layer needs no feedback, since the gradient by the input is not computed.

    Args:
        key: a PRNG key for the feedback weights and for rules that draw; do not use it elsewhere.
        params: the model's parameters: any pytree, such as Linen's `variables["params"]` or
            `nnx.state(model, nnx.Param)`.
        rule: how feedback changes; or a mapping from path patterns to rules, such as
            `{"Dense_1/*": SignSync(), "*": Fixed()}`. The first pattern that matches a leaf counts.
        where: the leaves of `params` that get feedback: the result of `soap_jax.explain`; glob
            patterns over paths such as "Dense_1/kernel"; a predicate `(path, leaf) -> bool`; or a
            list of these, such as `[explanation, "*/scale"]`. By default the leaves named kernel,
            w or weight that have at least two axes.
        initializer: one of four forms. "matched", the default: normal, with the root mean square of
            each kernel. For a kernel of zeros, where feedback of zeros would stop all layers below
            from learning, it is Glorot's √(2/(fan_in + fan_out)), with 1 for a missing axis. A
            function `(key, shape, dtype) -> array`, preferably the kernels' own initialiser; the
            result is cast to the kernel's dtype. A function that draws `soap_jax.factors`
            (`initializers.product`), only for `Fixed()` and a floating-point dtype. Or a mapping
            from path patterns to initialisers; the first pattern that matches a leaf counts.
            Feedback larger than its kernel multiplies the learning rate of the layers below, which
            is easily mistaken for a better method.
        feedback: feedback weights to adopt instead, such as Linen's `variables["feedback"]`,
            `nnx.state(model, soap_jax.nnx.Feedback)`, or a second draw of `params`; with `where`,
            only the leaves that it selects. The state shares their buffers, so donating the state
            deletes them.
        dtype: the dtype in which feedback is stored; by default the kernel's, or the dtype of the
            adopted feedback. A floating dtype stores rounded weights (bfloat16, which needs half of
            float32's memory, or 8-bit floats). A signed integer dtype stores signs (int8, which
            needs a quarter, int4 or int2). It is for rules whose values are whole numbers: `Fixed`,
            `SignSync` with "unit" or "preserve", or your own rule that returns integers.
            Products still use the model's dtype: training with stored signs or rounded weights is
            the same as with these values in float32, bit for bit on CPU. Rules that change feedback
            in small steps lose steps that are below the resolution of the dtype.
            "used" stores feedback in the dtype in which products use it, if that is smaller than
            the kernel's, as in a model that computes in bfloat16 with float32 params. Training is
            bit-identical, with half the memory and without a cast of all feedback at every step. It
            needs `where=soap_jax.explain(...)`, which knows the dtypes. Feedback keeps its dtype if
            its rule accumulates small steps (`Rule.accumulates`). Do not use it for feedback that
            an optimiser changes (Kolen-Pollack, local losses). It is not the default, so that
            checkpoints and metrics have feedback in the kernel's dtype.

    Returns:
        The state. `state.feedback` has the structure of `params`, with `None` for leaves without
        feedback. For layers of `soap_jax.nnx` adopt the model's feedback: `nnx.update` with a tree
        like `params` would replace the parameters by feedback.

    Raises:
        ValueError: if `key` is not one key; if `rule` is not a rule or a mapping of rules, or not
            hashable; if a pattern matches nothing, or a leaf has no rule or initialiser; if nothing
            is selected; if a kernel is empty or not floating point; if an initialiser's result or
            the adopted feedback does not fit `params`; or if `dtype` is not floating point or a
            signed integer, is an integer dtype for a rule that returns floats, or is "used"
            without an explanation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"out": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
        >>> state = init_feedback(jax.random.key(0), params, rules.SignSync(period=10))
        >>> jax.tree.map(jnp.shape, state.feedback)
        {'out': {'bias': None, 'kernel': (3, 2)}}
        >>> state.rule, int(state.period)
        (SignSync(period=1, magnitude='norm'), 10)
        >>> rule = rules.SignSync(magnitude="unit")
        >>> state = init_feedback(jax.random.key(0), params, rule, dtype=jnp.int8)
        >>> sync_feedback(params, state, 0).feedback["out"]["kernel"][0]
        Array([1, 1], dtype=int8)
    """
    static, period = _split_period(rule)
    as_used = isinstance(dtype, str) and dtype == "used"
    if not as_used:
        dtypes.check_stored(dtype)
    feedback_key, rule_key = jax.random.split(draws.typed(key))
    if feedback is None or where is not None:
        chosen = trees.select(params, where)
        if feedback is None:
            initializers = _initializers(initializer, chosen)

            def make(path, kernel):
                return _draw(initializers[path], _fold_in_path(feedback_key, path), kernel, path)
        else:
            given = trees.by_kernel(params, feedback, stored=True)
            if missing := sorted(chosen - given.keys()):
                raise ValueError(
                    f"`where` selects {', '.join(map(trees.show, missing))}, for which `feedback` "
                    "has no leaf; expected a leaf for each. Select only leaves that it has, or "
                    "leave out `feedback` to draw all of them."
                )

            def make(path, kernel):
                return given[path]

        def one(keys, kernel):
            path = trees.path_of(keys)
            return make(path, kernel) if path in chosen else None

        feedback = jax.tree_util.tree_map_with_path(one, params)

    used = _used(where, static, trees.pairs(params, feedback, stored=True)) if as_used else {}

    def store(path, kernel, leaf):
        trees.check_not_empty(kernel, path)
        own = used.get(path) if as_used else dtype
        if factors.is_factored(leaf):
            return _stored_factors(leaf, own, kernel, path)
        return rules.shard_like(dtypes.stored(leaf, own), kernel)

    feedback = trees.map_pairs(store, params, feedback, stored=True)
    try:
        hash(static)
    except TypeError as error:
        raise ValueError(
            f"rule is {rule!r}, which is not hashable ({error}); expected a rule whose fields are "
            "numbers, strings or tuples, since the rule is static under `jit`."
        ) from error
    memory = _memory_of(static, trees.pairs(params, feedback), rule_key)
    data, impl = jax.random.key_data(rule_key), jax.random.key_impl(rule_key)
    state = FeedbackState(feedback, period, memory, data, static, impl)
    _check_fits(params, state)
    return state


def sync_feedback(params: chex.ArrayTree, state: FeedbackState, step: ArrayLike) -> FeedbackState:
    """Applies the state's rule to the feedback if `step % period == 0`.

    Call it before you compute the gradient, with the number of completed parameter updates: the
    first sync is then at step 0, before learning starts. It is the only weight transport. The
    function is pure and works under `jit`, `scan`, `vmap` and `shard_map` (where a rule gets one
    shard of a sharded kernel). Structure, shapes, dtypes and shardings stay the same, and no
    gradient flows from feedback to `params`. Random rules derive their key from the state's key and
    `step`, so a resumed run gives the same numbers.

    Args:
        params: the parameters that the state was made for.
        state: from `init_feedback`.
        step: integer scalar, the number of completed parameter updates, below 2³¹.

    Returns:
        The state with synced feedback, or with bit-identical feedback between syncs.

    Raises:
        ValueError: if `state` is not a `FeedbackState`, if `step` is not an integer scalar, if the
            state's feedback does not fit `params`, or if a rule returns something other than an
            array of feedback's shape, or floats for feedback of an integer dtype.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[2.0, -3.0]])}
        >>> rule = rules.SignSync(period=10, magnitude="unit")
        >>> state = init_feedback(jax.random.key(0), params, rule)
        >>> sync_feedback(params, state, 20).feedback["kernel"]
        Array([[ 1., -1.]], dtype=float32)
        >>> sync_feedback(params, state, 21).feedback["kernel"] - state.feedback["kernel"]
        Array([[0., 0.]], dtype=float32)

    References:
        Liao, Leibo, Poggio. How important is weight symmetry in backpropagation? AAAI, 2016.
        https://arxiv.org/abs/1510.05067
    """
    return sync_feedback_unless(False, params, state, step)


def sync_feedback_unless(
    held_back: ArrayLike, params: chex.ArrayTree, state: FeedbackState, step: ArrayLike
) -> FeedbackState:
    """Like `sync_feedback`, but does not sync if `held_back`, a boolean scalar, is true.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[2.0, -3.0]])}
        >>> state = init_feedback(jax.random.key(0), params, rules.SignSync(magnitude="unit"))
        >>> new = sync_feedback_unless(True, params, state, 20).feedback["kernel"]
        >>> new - state.feedback["kernel"]
        Array([[0., 0.]], dtype=float32)
    """
    if not isinstance(state, FeedbackState):
        raise ValueError(
            f"state is a {type(state).__name__}; expected the FeedbackState that init_feedback "
            "returned, as in sync_feedback(params, state, step)."
        )
    step = _as_step(step)
    pairs = trees.pairs(params, state.feedback, stored=True)
    new: dict[trees.Path, jax.Array] = {}
    memory = dict(state.memory)
    for pattern, rule, paths in _rules_of(state.rule, list(pairs)):
        if type(rule) is rules.Fixed or not paths:
            continue
        _check_whole(rule, paths, pairs)
        kernels = {path: lax.stop_gradient(pairs[path][0]) for path in paths}
        old = {path: pairs[path][1] for path in paths}
        remembered = {name: memory[name] for name in map(_name, paths) if name in memory}
        period = state.period if pattern is None else state.period[pattern]
        synced, learnt = _sync(rule, kernels, old, remembered, period, state.key, step, held_back)
        new |= synced
        memory |= learnt
    feedback = trees.map_pairs(
        lambda path, w, b: new.get(path, b), params, state.feedback, stored=True
    )
    return dataclasses.replace(state, feedback=feedback, memory=memory)


def _check_fits(params, state):
    """Raises ValueError if a rule cannot sync the feedback's integer dtype or its factors."""
    leaves = jax.tree.leaves(state.feedback, is_leaf=factors.is_factored)
    if any(factors.is_factored(leaf) or _is_integer(leaf) for leaf in leaves):
        jax.eval_shape(lambda: sync_feedback(params, state, 0))


def _check_whole(rule, paths, pairs):
    """Raises ValueError if feedback that a rule changes is stored as factors."""
    for path in paths:
        if factors.is_factored(leaf := pairs[path][1]):
            raise ValueError(
                f"feedback at {trees.show(path)} is a {type(leaf).__name__} and its rule {rule}; "
                "expected the rule Fixed(), since only an optimiser changes factors."
            )


@functools.partial(jax.jit, static_argnums=0)  # so that calls outside `jit` compile only once
def _sync(rule, kernels, feedback, memory, period, key, step, held_back):
    """Applies one rule to feedback by path and memory by name, if a sync is due."""
    # The value of a traced period is not checked; below 1 no sync is ever due.
    period = period.astype(step.dtype)
    its_turn = (step % jnp.maximum(period, 1) == 0) & (period >= 1) & jnp.logical_not(held_back)
    return _apply_if(rule, its_turn, kernels, jax.random.fold_in(key, step), feedback, memory)


CONDITIONALS_IN_PLACE = jax.__version_info__ >= (0, 11)
"""Whether XLA for GPU passes arrays through a conditional without a copy, as on other devices.

Before JAX 0.11 it copies them at every step: compiled for an H100, feedback is in memory twice. A
loop with zero or one iteration works in place there, but copies its condition to the host,
which takes longer (`python -m benchmarks.sync_time`, on a GPU)."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _apply_if(rule, its_turn, *args):
    """Applies the rule if `its_turn`, without a copy of unchanged arrays."""
    conditional, loop = (functools.partial(form, rule) for form in (_conditional, _loop))
    if CONDITIONALS_IN_PLACE:
        return conditional(its_turn, *args)
    return lax.platform_dependent(its_turn, *args, cuda=loop, rocm=loop, default=conditional)


def _conditional(rule, its_turn, kernels, key, feedback, memory):
    apply = functools.partial(_apply, rule, kernels, key)
    return lax.cond(its_turn, apply, lambda *old: old, feedback, memory)


def _loop(rule, its_turn, kernels, key, feedback, memory):
    def once(carry):
        trips, feedback, memory = carry

        def here(x):
            """Returns `x` so that XLA does not move its uses out of the loop, to every step."""
            return lax.optimization_barrier((trips, x))[1]

        applied = _apply(rule, jax.tree.map(here, kernels), here(key), feedback, memory)
        # Not 0: under `shard_map` a constant has another type than `trips`.
        return trips - 1, *applied

    carry = its_turn.astype(jnp.int32), feedback, memory
    return lax.while_loop(lambda carry: carry[0] > 0, once, carry)[1:]


@_apply_if.defjvp
def _apply_if_jvp(rule, primals, tangents):
    """The derivative by feedback and memory: the rule's at a sync, else the identity."""
    its_turn, kernels, key, *old = primals
    kept = tuple(tangents[3:])
    _, moved = jax.jvp(functools.partial(_apply, rule, kernels, key), tuple(old), kept)

    def select(moved, kept):
        is_integer = kept.dtype == jax.dtypes.float0
        return kept if is_integer else jnp.where(its_turn, moved, kept)

    return _apply_if(rule, *primals), jax.tree.map(select, moved, kept)


def _apply(rule, kernels, key, feedback, memory):
    """Computes new feedback by path and new memory by name with a rule."""
    new, learnt = {}, {}
    for path, old in feedback.items():
        args = kernels[path], old, _fold_in_path(key, path)
        name = _name(path)
        if name in memory:
            made, learnt[name] = _with_memory(rule, args, memory[name], path)
        else:
            made = _without_memory(rule, args, path)
        _check_drawn(f"{rule} returned", made, old.shape, old.dtype, path)
        if _is_integer(old) and not _is_integer(made):
            raise ValueError(
                f"{rule} returned {jnp.result_type(made)} for {trees.show(path)}, whose feedback "
                f"is stored as {old.dtype}; expected integers. Store feedback as floating point "
                "(such as bfloat16), or use Fixed(), or SignSync with 'unit' or 'preserve'. If "
                "your own rule computes whole numbers, return them `.astype(feedback.dtype)`."
            )
        new[path] = jnp.asarray(made).astype(old.dtype)
    return new, learnt


def _without_memory(rule, args, path):
    """Calls a rule without a memory; checks that it does not return one."""
    made = rule(*args)
    if isinstance(made, tuple):
        raise ValueError(
            f"{rule} returned a tuple for {trees.show(path)}; expected feedback alone, since its "
            "`init` returned no memory. For a rule with a memory, define init(self, kernel, "
            "feedback, key), which returns the first one."
        )
    return made


def _with_memory(rule, args, memory, path):
    """Calls a rule with a memory; checks that it returns feedback and a memory of the same type."""
    made = rule(*args, memory)
    if not (isinstance(made, tuple) and len(made) == 2):
        raise ValueError(
            f"{rule} returned a {type(made).__name__} for {trees.show(path)}; expected (feedback, "
            "memory), since its `init` returned a memory."
        )
    feedback, learnt = made

    def type_of(tree):
        return jax.tree.map(type_of_leaf, tree)

    def type_of_leaf(leaf):
        try:
            dtype = jnp.result_type(leaf)
        except TypeError:  # not an array
            return type(leaf).__name__
        return jnp.shape(leaf), dtype

    if type_of(learnt) != type_of(memory):
        raise ValueError(
            f"{rule} returned a memory of {type_of(learnt)} for {trees.show(path)}; expected "
            f"{type_of(memory)}, the shapes and dtypes that its `init` gave."
        )
    return feedback, learnt


def _memory_of(static, pairs, key):
    """The first memories of the rules that have one, by name."""
    memory = {}
    for _, rule, paths in _rules_of(static, list(pairs), complete=True):
        for path in paths:
            kernel, leaf = pairs[path]
            own = rules.first_memory(rule, kernel, leaf, _fold_in_path(key, path))
            if own is None:
                continue
            if _name(path) in memory:
                raise ValueError(
                    f"two kernels are called {_name(path)!r} when '/' joins the parts of a path; "
                    f"expected different names, by which the memory of {rule} is kept. Rename one."
                )
            memory[_name(path)] = own
    return memory


def _name(path):
    return "/".join(path)


def feedback_of(
    params: chex.ArrayTree, rule: rules.Rule, *, where: trees.Where = None
) -> chex.ArrayTree:
    """Computes feedback from the kernels alone, for rules that need no stored feedback.

    This is a sync at every step, at least as fast as a sync of stored feedback:

        loss_fa(params, feedback_of(params, SignSync(magnitude="unit")), batch)

    Args:
        params: the parameters.
        rule: a rule that depends only on the kernel: `SignSync` with "unit", "glorot" or "kernel",
            or `Transport(rate=1)`. Its period must be 1.
        where: as in `init_feedback`.

    Returns:
        The feedback tree, with None for leaves without feedback. No gradient flows from it to
        `params`.

    Raises:
        ValueError: for another rule, or as `init_feedback` for `where`.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.array([[2.0, -3.0]]), "bias": jnp.zeros(2)}
        >>> feedback_of(params, rules.SignSync(magnitude="unit"))
        {'bias': None, 'kernel': Array([[ 1., -1.]], dtype=float32)}
    """
    reads_kernel_alone = (
        isinstance(rule, rules.SignSync) and rule.magnitude in ("unit", "glorot", "kernel")
    ) or rule == rules.Transport()
    if not (reads_kernel_alone and rule.period == 1):
        raise ValueError(
            f"rule is {rule!r}; expected a rule of period 1 that depends only on the kernel: "
            "SignSync with magnitude 'unit', 'glorot' or 'kernel', or Transport(). For other rules "
            "keep feedback in a state: init_feedback, sync_feedback."
        )
    chosen = trees.select(params, where)
    key = jax.random.key(0)  # these rules draw nothing

    def one(keys, kernel):
        if trees.path_of(keys) not in chosen:
            return None
        kernel = lax.stop_gradient(kernel)
        return jnp.asarray(rule(kernel, kernel, key)).astype(kernel.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def _as_step(step) -> jax.Array:
    """Returns the step as an int32 or int64 array; ValueError unless it is an integer scalar."""
    is_array = isinstance(step, jax.Array | np.ndarray)
    is_integer = isinstance(step, numbers.Integral) and not isinstance(step, bool)
    if is_integer and 0 <= int(step) <= rules.LARGEST:
        return jnp.asarray(int(step), jnp.int32)
    if not (is_array and jnp.issubdtype(step.dtype, jnp.integer) and step.ndim == 0):
        got = f"{step.dtype}{list(step.shape)}" if is_array else repr(step)
        raise ValueError(
            f"step is {got}; expected an integer scalar from 0 to {rules.LARGEST} (int32), the "
            "number of completed parameter updates."
        )
    step = jnp.asarray(step)
    return step.astype(jnp.int64 if step.dtype.itemsize == 8 else jnp.int32)


def _split_period(rule) -> tuple[Any, chex.ArrayTree]:
    """Splits a rule, or a mapping of rules, into its static part and its periods."""
    if isinstance(rule, rules.Rule):
        rules.check_period(type(rule).__name__, rule.period)
        return rules.at_every_step(rule), jnp.asarray(rule.period, jnp.int32)
    if isinstance(rule, Mapping) and rule:
        parts = {pattern: _split_period(one) for pattern, one in rule.items()}
        static_parts = tuple((pattern, static) for pattern, (static, _) in parts.items())
        return static_parts, {pattern: period for pattern, (_, period) in parts.items()}
    raise ValueError(
        f"rule is {rule!r}; expected a rule such as soap_jax.SignSync(period=10), or a mapping "
        "from path patterns to rules."
    )


def _rules_of(static, paths, *, complete=False):
    """Lists `(pattern, rule, paths)`; `complete`: every pattern and every path must match."""
    if isinstance(static, rules.Rule):
        return [(None, static, paths)]
    out, rest = [], list(paths)
    for pattern, rule in static:
        mine = [path for path in rest if trees.matches(pattern, path)]
        if complete and not mine and pattern != "*":  # "*" may match nothing
            raise ValueError(
                f"the rule's pattern {pattern!r} matches no feedback that is left over by earlier "
                f"patterns. Feedback is at: {', '.join(map(trees.show, paths))}. The first pattern "
                "that matches counts, so put '*' last."
            )
        out.append((pattern, rule, mine))
        rest = [path for path in rest if path not in mine]
    if complete and rest:
        raise ValueError(
            f"no rule for the feedback at {', '.join(map(trees.show, rest))}: none of the "
            f"patterns {', '.join(repr(pattern) for pattern, _ in static)} matches. Add the "
            "pattern '*' at the end."
        )
    return out


def _used(where, static, pairs) -> dict[trees.Path, np.dtype]:
    """The dtypes, by path, of feedback that can be stored in the smaller dtype of its use."""
    if not hasattr(where, "rows"):
        raise ValueError(
            "dtype='used' needs the dtype in which products use feedback; expected also "
            "where=soap_jax.explain(fun, params, *args). Or give the dtype itself, such as "
            "jax.numpy.bfloat16."
        )
    used = {row.path: row.used for row in where.rows}
    return {
        path: used[path]
        for _, rule, paths in _rules_of(static, list(pairs), complete=True)
        for path in paths
        if not (rule.accumulates or factors.is_factored(pairs[path][1]))
        and used[path].itemsize < pairs[path][1].dtype.itemsize
    }


def _stored_factors(leaf, dtype, kernel, path):
    """Casts factors to the dtype and shards them like their kernel; no integer dtypes."""
    if dtype is not None and jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"dtype is {np.dtype(dtype)} and feedback at {trees.show(path)} a "
            f"{type(leaf).__name__}; expected a floating-point dtype, since an optimiser updates "
            "factors."
        )
    left, right = (dtypes.stored(factor, dtype) for factor in leaf)
    split = rules.partition_spec(kernel)
    stack = split[: right.ndim - 2]
    left = rules.shard_as(left, kernel, (*split[:-1], None))
    return type(leaf)(left, rules.shard_as(right, kernel, (*stack, None, *split[-1:])))


def _is_integer(leaf):
    return jnp.issubdtype(jnp.result_type(leaf), jnp.integer)


def _draw(initializer, key, kernel, path):
    if isinstance(initializer, str) and initializer == "matched":
        return _draw_matched(key, kernel, path)
    if not callable(initializer):
        raise ValueError(
            f"initializer is {initializer!r}; expected a function (key, shape, dtype) -> array, "
            "'matched', or a mapping from path patterns to these."
        )
    try:
        drawn = initializer(key, kernel.shape, kernel.dtype)
    except ValueError as error:
        raise ValueError(
            f"the initializer cannot draw feedback of shape {kernel.shape} for {trees.show(path)}: "
            f"{error} If that leaf is not a kernel, select the kernels with `where`; else give "
            "another initializer."
        ) from error
    if factors.is_factored(drawn):
        trees.check_feedback(drawn, kernel, path)
    else:
        _check_drawn("the initializer returned", drawn, kernel.shape, kernel.dtype, path)
    return jax.tree.map(lambda x: jnp.asarray(x).astype(kernel.dtype), drawn)


def _draw_matched(key, kernel, path):
    """Draws normal feedback of the kernel's root mean square, or Glorot's for a zero kernel."""
    if isinstance(kernel, jax.ShapeDtypeStruct):
        raise ValueError(
            f"params at {trees.show(path)} is a shape without values; expected an array, since "
            "initializer='matched' draws feedback as large as its kernel. Give another initializer,"
            " or call init_feedback within jax.eval_shape."
        )
    wide = dtypes.wide(kernel)
    size = rules.root_mean_square(jnp.asarray(kernel))
    *window, fan_in, fan_out = (1, 1, *kernel.shape) if kernel.ndim < 2 else kernel.shape
    glorot = math.sqrt(2 / (math.prod(window) * (fan_in + fan_out)))
    size = jnp.where(size > 0, size, glorot)
    return (size * jax.random.normal(key, kernel.shape, wide)).astype(kernel.dtype)


def _check_drawn(who, drawn, shape, dtype, path):
    """Raises ValueError unless `drawn` is an array that can be feedback."""
    found = dtypes.of(drawn)
    if found is None:
        raise ValueError(
            f"{who} {type(drawn).__name__} for {trees.show(path)}; expected an array of shape "
            f"{shape} and dtype {dtype}."
        )
    if jnp.shape(drawn) != shape:
        raise ValueError(
            f"{who} feedback of shape {jnp.shape(drawn)} for {trees.show(path)}; expected {shape}, "
            "the shape of its kernel."
        )
    if not dtypes.holds(dtype, found):
        raise ValueError(
            f"{who} {found} for {trees.show(path)}; expected real numbers, like its kernel."
        )


def _initializers(initializer, paths):
    """The initialiser of each path."""
    if not isinstance(initializer, Mapping):
        return dict.fromkeys(paths, initializer)
    found: dict[trees.Path, Initializer] = {}
    for pattern, one in initializer.items():
        mine = [path for path in paths if trees.matches(pattern, path)]
        if not mine and pattern != "*":
            raise ValueError(
                f"the initializer's pattern {pattern!r} matches no leaf that gets feedback: "
                f"{', '.join(map(trees.show, sorted(paths)))}."
            )
        for path in mine:
            found.setdefault(path, one)
    if missing := sorted(set(paths) - set(found)):
        raise ValueError(
            f"no initializer for the feedback at {', '.join(map(trees.show, missing))}: none of "
            f"the patterns {', '.join(map(repr, initializer))} matches. Add the pattern '*' at "
            "the end."
        )
    return found


def _fold_in_path(key, path):
    """Derives a layer's key from its path, so that it does not depend on other layers."""
    return jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
