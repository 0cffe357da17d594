"""Feedback as a state: how it starts, when it changes, and what never changes."""

import dataclasses
import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import soap_jax.feedback
import soap_jax.linen
import soap_jax.nnx
from soap_jax import ops, optimizers, rules, training
from soap_jax.feedback import (
    CONDITIONALS_IN_PLACE,
    FeedbackState,
    feedback_of,
    init_feedback,
    sync_feedback,
    sync_feedback_unless,
)
from soap_jax.transform.explanation import Row

KEY = jax.random.key(7)
PARAMS = {
    "a": {
        "kernel": np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8),
        "bias": np.ones(8, np.float32),
    },
    "b": {"kernel": np.cos(np.arange(32, dtype=np.float32)).reshape(8, 4)},
}
SPECS = {"a": {"kernel": P(None, "data"), "bias": P(None)}, "b": {"kernel": P("data", None)}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisySign(rules.Rule):
    """A user's rule: sign(W), each bit flipped with a probability."""

    flip: float

    def __call__(self, kernel, feedback, key):
        flipped = jax.random.bernoulli(key, self.flip, kernel.shape)
        return jnp.where(flipped, -jnp.sign(kernel), jnp.sign(kernel))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Momentum(rules.Rule):
    """A user's rule with a memory: W comes in through its running mean, and syncs are counted."""

    decay: float = 0.5

    def init(self, kernel, feedback, key):
        return {"mean": jnp.zeros_like(kernel), "count": 0}

    def __call__(self, kernel, feedback, key, memory):
        mean = self.decay * memory["mean"] + kernel
        return feedback + mean, {"mean": mean, "count": memory["count"] + 1}


def all_rules(period):
    magnitudes = ("unit", "glorot", "preserve", "norm", "redraw", "kernel")
    sync = [rules.SignSync(period=period, magnitude=magnitude) for magnitude in magnitudes]
    transport = [rules.Transport(period=period), rules.Transport(period=period, rate=0.25)]
    return {str(rule): rule for rule in (rules.Fixed(), *sync, *transport)}


EVERY_RULE = all_rules(3) | {
    "NoisySign": NoisySign(period=3, flip=0.25),
    "mapping": {"a/*": rules.SignSync(period=3, magnitude="norm"), "*": rules.Transport(period=3)},
}
INTEGER_RULES = (
    rules.Fixed(),
    rules.SignSync(period=3, magnitude="unit"),
    rules.SignSync(period=3, magnitude="preserve"),
)
every_rule = pytest.mark.parametrize("rule", EVERY_RULE.values(), ids=EVERY_RULE.keys())
some_rules = pytest.mark.parametrize(
    "rule", [EVERY_RULE["mapping"], *list(all_rules(3).values())[4:6]], ids=str
)
every_library_rule = pytest.mark.parametrize("rule", all_rules(3).values(), ids=str)

sync = jax.jit(sync_feedback)


def init(rule, key=KEY):
    return init_feedback(key, PARAMS, rule)


# Parameters at steps 0, 1, ...: about half of them change their signs at every step.
STEPS = 11
PARAMS_AT = jax.tree.map(
    lambda leaf: np.stack([leaf * np.cos(t * (1 + leaf**2) * 3) for t in range(STEPS)]), PARAMS
)


def params_at(step):
    return jax.tree.map(lambda leaf: leaf[step], PARAMS_AT)


@jax.jit
def run(state, steps):
    """The last state and the feedback after every step."""

    def body(state, inputs):
        step, params = inputs
        state = sync_feedback(params, state, step)
        return state, state.feedback

    return lax.scan(
        body, state, (steps, jax.tree.map(lambda leaf: jnp.asarray(leaf)[steps], PARAMS_AT))
    )


def loop(state, steps):
    """`run` as a Python loop; returns the last state."""
    for step in steps:
        state = sync(params_at(step), state, step)
    return state


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def dtypes(state):
    return {leaf.dtype.name for leaf in jax.tree.leaves(state.feedback)}


def at(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def rule_of(rule, path):
    return rule if isinstance(rule, rules.Rule) else rule["a/*" if path == "a" else "*"]


def is_random(rule):
    return isinstance(rule, NoisySign) or getattr(rule, "magnitude", None) == "redraw"


# What a state is


def test_a_state_holds_the_period_as_a_leaf_and_the_rule_as_static_data():
    state = init(rules.SignSync(period=10, magnitude="norm"))
    assert state.rule == rules.SignSync(magnitude="norm")
    chex.assert_trees_all_equal(state.period, jnp.array(10, jnp.int32), strict=True)
    structure = jax.tree.structure(state)
    assert structure == jax.tree.structure(init(rules.SignSync(period=3, magnitude="norm")))
    assert structure != jax.tree.structure(init(rules.SignSync(period=10, magnitude="unit")))
    assert hash(structure) is not None


def test_the_rule_survives_jit():
    state = sync(PARAMS, init(EVERY_RULE["NoisySign"]), 0)
    assert state.rule == NoisySign(flip=0.25)
    assert hash(state.rule) == hash(NoisySign(flip=0.25))


def test_feedback_has_its_kernels_shape_and_dtype_and_its_initialisers_values():
    params = {"out": {"kernel": jnp.ones((60, 40), jnp.bfloat16)}, "w": jnp.ones((50, 70))}
    state = init_feedback(KEY, params, initializer=jax.nn.initializers.glorot_normal())
    assert types(state.feedback) == types(params)
    # 3,500 normal deviates: a relative standard error of 1.2 %.
    assert np.std(state.feedback["w"]) == pytest.approx(np.sqrt(2 / 120), rel=0.05)
    ones = init_feedback(KEY, params, initializer=jax.nn.initializers.constant(3.0)).feedback
    chex.assert_trees_all_equal(ones, jax.tree.map(lambda leaf: 3 * leaf, params), strict=True)


def test_initialisers_can_differ_by_layer():
    initializers = {"a/*": jax.nn.initializers.ones, "*": jax.nn.initializers.constant(2.0)}
    params = {name: {"kernel": jnp.zeros((2, 3))} for name in "ab"}
    feedback = init_feedback(KEY, params, initializer=initializers).feedback
    expected = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.full((2, 3), 2.0)}}
    chex.assert_trees_all_equal(feedback, expected)


def test_initialisers_must_match_and_cover_the_leaves():
    one = jax.nn.initializers.ones
    with pytest.raises(ValueError, match=r"initializer's pattern 'c/\*' matches no leaf .*'a'"):
        init_feedback(KEY, PARAMS, initializer={"c/*": one, "*": one})
    with pytest.raises(ValueError, match=r"no initializer for the feedback at \['b'\].* '\*'"):
        init_feedback(KEY, PARAMS, initializer={"a/*": one})


def test_feedback_is_independent_of_the_kernel_and_between_layers():
    params = {name: {"kernel": jnp.zeros((50, 60))} for name in "ab"}
    feedback = init_feedback(KEY, params).feedback
    a, b = (np.asarray(feedback[name]["kernel"]).ravel() for name in "ab")
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.1  # five standard errors of 3,000 pairs


@pytest.mark.parametrize("key", [jax.random.key(1), jax.random.PRNGKey(1)], ids=["typed", "raw"])
def test_both_kinds_of_keys_work(key):
    state = init(rules.SignSync(magnitude="redraw"), key)
    synced = sync(PARAMS, state, 0)
    assert types(synced) == types(state)
    assert np.any(np.asarray(synced.feedback["b"]["kernel"] != state.feedback["b"]["kernel"]))


@pytest.mark.parametrize(
    "rule", [rules.SignSync(period=3, magnitude="unit"), EVERY_RULE["mapping"]], ids=str
)
def test_init_under_jit_equals_eager(rule):
    state = jax.jit(lambda key: init_feedback(key, PARAMS, rule))(KEY)
    eager = init(rule)
    assert types(state) == types(eager)
    # Fused under jit, an initialiser may round the last bit differently.
    chex.assert_trees_all_close(state.feedback, eager.feedback, rtol=1e-6)
    chex.assert_trees_all_equal(
        (state.period, state.key_data),
        (eager.period, eager.key_data),
    )


# Pairing of runs


def test_a_layers_draw_depends_on_the_key_and_its_path_alone():
    everything = init(rules.Fixed()).feedback
    one = init_feedback(
        KEY, PARAMS, rules.SignSync(period=5, magnitude="unit"), where="b/*"
    ).feedback
    assert one["a"] == {"kernel": None, "bias": None}
    chex.assert_trees_all_equal(one["b"], everything["b"])
    more = init_feedback(KEY, PARAMS | {"A": {"kernel": PARAMS["b"]["kernel"]}}).feedback
    chex.assert_trees_all_equal(more["a"]["kernel"], everything["a"]["kernel"])
    other = init(rules.Fixed(), jax.random.key(8)).feedback
    assert not np.any(np.asarray(other["b"]["kernel"] == everything["b"]["kernel"]))


def test_a_redraw_depends_on_the_key_the_step_and_its_path_alone():
    rule = rules.SignSync(magnitude="redraw")
    kernels = {name: {"kernel": np.ones((3, 5), np.float32)} for name in "ab"}
    state = init_feedback(KEY, kernels, rule)

    def drawn(state, step, name, kernels=kernels):
        return np.asarray(sync(kernels, state, step).feedback[name]["kernel"])

    draws = [drawn(state, 0, "a"), drawn(state, 1, "a"), drawn(state, 0, "b")]
    draws.append(drawn(init_feedback(jax.random.key(8), kernels, rule), 0, "a"))
    assert len({draw.tobytes() for draw in draws}) == len(draws)
    chex.assert_trees_all_equal(drawn(state, 0, "a"), draws[0])
    alone = init_feedback(KEY, kernels, rule, where="a/*")
    chex.assert_trees_all_equal(drawn(alone, 0, "a"), draws[0])


# When it changes


@every_rule
def test_feedback_syncs_where_the_period_divides_the_step_and_nowhere_else(rule):
    state = init(rule)
    _, history = run(state, np.arange(STEPS))
    history = jax.tree.map(np.asarray, history)
    before = jax.tree.map(np.asarray, state.feedback)
    for step in range(STEPS):
        now = at(history, step)
        if step % 3:
            chex.assert_trees_all_equal(now, before)
        elif is_random(rule):
            for name in "ab":
                signs = np.sign(np.asarray(now[name]["kernel"]))
                kernel = np.asarray(params_at(step)[name]["kernel"])
                agreement = 1.0 if isinstance(rule, rules.SignSync) else 0.5
                assert np.mean(signs == np.where(kernel < 0, -1, 1)) >= agreement
                assert np.any(now[name]["kernel"] != before[name]["kernel"])
        else:
            for name in "ab":
                kernel, feedback = (tree[name]["kernel"] for tree in (params_at(step), before))
                own, memory = rule_of(rule, name), state.memory.get(f"{name}/kernel")
                args = (kernel, feedback, KEY)
                expected = own(*args) if memory is None else own(*args, memory)[0]
                # Compiled alone and inside a scan, a rule may round differently.
                chex.assert_trees_all_close(now[name]["kernel"], expected, rtol=1e-5, atol=1e-6)
        before = now


@pytest.mark.parametrize("period", [1, 2, 5])
def test_step_0_and_every_multiple_of_the_period_are_synced(period):
    _, history = run(init(rules.SignSync(period=period, magnitude="unit")), np.arange(STEPS))
    for step in range(STEPS):
        last = step - step % period
        expected = jnp.sign(params_at(last)["b"]["kernel"])
        chex.assert_trees_all_equal(history["b"]["kernel"][step], expected)


def test_each_pattern_keeps_its_own_period_and_the_first_match_counts():
    rule = {
        "a/kernel": rules.SignSync(period=2, magnitude="unit"),
        "*/kernel": rules.Transport(period=3),
    }
    state = init(rule)
    assert {pattern: int(period) for pattern, period in state.period.items()} == {
        "a/kernel": 2,
        "*/kernel": 3,
    }
    assert state.rule == (
        ("a/kernel", rules.SignSync(magnitude="unit")),
        ("*/kernel", rules.Transport()),
    )
    _, history = run(state, np.arange(STEPS))
    for step in range(STEPS):
        signs = jnp.sign(params_at(step - step % 2)["a"]["kernel"])
        chex.assert_trees_all_equal(history["a"]["kernel"][step], signs)
        copied = params_at(step - step % 3)["b"]["kernel"]
        chex.assert_trees_all_close(history["b"]["kernel"][step], copied, rtol=1e-6)


def test_a_sweep_over_periods_equals_runs_with_each():
    periods = jnp.array([1, 2, 5])
    states = jax.vmap(lambda period: init(rules.SignSync(period=period, magnitude="unit")))(periods)
    chex.assert_trees_all_equal(states.period, periods)
    _, swept = lax.map(lambda state: run(state, np.arange(STEPS)), states)
    for i, period in enumerate((1, 2, 5)):
        _, alone = run(init(rules.SignSync(period=period, magnitude="unit")), np.arange(STEPS))
        chex.assert_trees_all_equal(at(swept, i), alone)


# What never changes


@every_rule
def test_structure_shapes_dtypes_and_weak_types_never_change(rule):
    state = init(rule)
    for step in (0, 1):
        synced = sync(PARAMS, state, step)
        assert jax.tree.structure(synced) == jax.tree.structure(state)
        assert types(synced) == types(state)
    chex.assert_trees_all_equal(synced.period, state.period)
    chex.assert_trees_all_equal(synced.key_data, state.key_data)


def test_types_never_change_in_double_precision():
    with jax.enable_x64(True):
        for rule in EVERY_RULE.values():
            state = init(rule)
            assert types(jax.eval_shape(sync, PARAMS, state, 3)) == types(state)
            assert {leaf.dtype for leaf in jax.tree.leaves(state.period)} == {jnp.dtype("int32")}


def test_neither_steps_nor_periods_retrace():
    traces = []

    @jax.jit
    def counted(params, state, step):
        traces.append(step)
        return sync_feedback(params, state, step)

    for period in (1, 2, 7):
        state = init(rules.SignSync(period=period, magnitude="unit"))
        for step in range(3):
            state = counted(PARAMS, state, step)
    assert len(traces) == 1


def test_three_thousand_syncs_leak_nothing():
    """SOAP's graph grew by one node per sync: a step went from 4 ms to 67 ms."""
    traces = []

    @jax.jit
    def step_fn(params, state, step):
        traces.append(1)
        state = sync_feedback(params, state, step)
        return jax.tree.map(lambda leaf: 0.999 * leaf, params), state, step + 1

    carry = (
        jax.tree.map(jnp.float32, PARAMS),
        init(rules.SignSync(period=2, magnitude="unit")),
        jnp.array(0),
    )
    for _ in range(3):
        carry = step_fn(*carry)
    live = len(jax.live_arrays())
    for _ in range(3000):
        carry = step_fn(*carry)
    assert len(jax.live_arrays()) == live
    assert len(traces) == 1
    assert carry[2] == 3003


@every_library_rule
def test_adopted_feedback_keeps_its_dtype(rule):
    for dtype in ("bfloat16", "int8") if rule in INTEGER_RULES else ("bfloat16",):
        feedback = jax.tree.map(lambda leaf, dtype=dtype: np.sign(leaf).astype(dtype), PARAMS)
        feedback["a"]["bias"] = None
        state = init_feedback(KEY, PARAMS, rule, feedback=feedback)
        assert dtypes(state) == {dtype}
        assert types(jax.eval_shape(sync, PARAMS, state, 0)) == types(state)


def test_int8_feedback_holds_signs():
    feedback = {"b": {"kernel": jnp.zeros((8, 4), jnp.int8)}}
    state = init_feedback(KEY, PARAMS, rules.SignSync(magnitude="unit"), feedback=feedback)
    synced = sync(PARAMS, state, 0).feedback["b"]["kernel"]
    chex.assert_trees_all_equal(synced, np.sign(PARAMS["b"]["kernel"]).astype(np.int8), strict=True)


# Transformations


@every_rule
def test_scan_equals_a_python_loop(rule):
    state = init(rule)
    scanned, _ = run(state, np.arange(STEPS))
    looped = loop(state, range(STEPS))
    chex.assert_trees_all_close(scanned.feedback, looped.feedback, rtol=1e-5, atol=1e-6)


@some_rules
def test_vmap_over_seeds_equals_each_alone(rule):
    keys = jax.random.split(KEY, 3)
    states = jax.vmap(lambda key: init_feedback(key, PARAMS, rule))(keys)
    together = jax.jit(jax.vmap(sync_feedback, (None, 0, None)))(PARAMS, states, 3)
    assert types(together) == types(states)
    for i in range(3):
        alone = sync(PARAMS, at(states, i), 3)
        chex.assert_trees_all_close(at(together.feedback, i), alone.feedback, rtol=1e-6)


def test_vmap_over_steps_equals_each_alone():
    state = init(rules.SignSync(period=2, magnitude="redraw"))
    together = jax.vmap(sync, (None, None, 0))(PARAMS, state, jnp.arange(4))
    for step in range(4):
        alone = sync(PARAMS, state, step)
        chex.assert_trees_all_close(at(together.feedback, step), alone.feedback, rtol=1e-6)


@some_rules
def test_a_donated_state_is_reused(rule):
    state = init(rule)
    expected = sync(PARAMS, state, 0)
    donated = jax.jit(sync_feedback, donate_argnums=1)(PARAMS, state, 0)
    chex.assert_trees_all_equal(donated.feedback, expected.feedback)
    assert state.feedback["a"]["kernel"].is_deleted()


def test_no_gradient_flows_through_a_sync_to_params():
    state = init(rules.Transport(rate=0.5))

    def through_sync(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(sync(params, state, 0).feedback))

    assert through_sync(PARAMS) > 0
    bars = jax.grad(through_sync)(jax.tree.map(jnp.float32, PARAMS))
    chex.assert_trees_all_equal(bars, jax.tree.map(jnp.zeros_like, bars))


def test_a_sync_inside_the_loss_equals_one_before_it():
    x = np.ones((5, 3), np.float32)
    state = init(rules.Transport(rate=0.5))

    def loss(params, feedback):
        h = jnp.tanh(ops.feedback_dense(x, params["a"]["kernel"], None))
        return jnp.sum(ops.feedback_dense(h, params["b"]["kernel"], feedback["b"]["kernel"]) ** 2)

    params = jax.tree.map(jnp.float32, PARAMS)
    inside = jax.grad(lambda params: loss(params, sync_feedback(params, state, 0).feedback))(params)
    before = jax.grad(loss)(params, sync(params, state, 0).feedback)
    chex.assert_trees_all_close(inside, before, rtol=1e-5, atol=1e-6)
    assert np.any(np.asarray(before["a"]["kernel"]))


@pytest.mark.parametrize("step, share", [(0, 0.25), (1, 1.0)])
def test_the_derivative_by_feedback_is_the_rules_at_a_sync_and_one_between(step, share):
    state = init(rules.Transport(period=3, rate=0.75))

    def total(feedback):
        own = dataclasses.replace(state, feedback=feedback)
        return sum(map(jnp.sum, jax.tree.leaves(sync_feedback(PARAMS, own, step).feedback)))

    bars = jax.jit(jax.grad(total))(state.feedback)
    chex.assert_trees_all_close(bars, jax.tree.map(lambda b: jnp.full_like(b, share), bars))


def in_one_form(form, state, its_turn):
    """What one of the forms of a sync makes of the feedback and the memory."""
    kernels = {(name, "kernel"): PARAMS[name]["kernel"] for name in "ab"}
    old = {(name, "kernel"): state.feedback[name]["kernel"] for name in "ab"}
    sync_once = jax.jit(functools.partial(form, state.rule), donate_argnums=(3, 4))
    return sync_once, (its_turn, kernels, state.key, old, state.memory)


@pytest.mark.parametrize("form", [soap_jax.feedback._conditional, soap_jax.feedback._loop])
@pytest.mark.parametrize("magnitude", ["redraw", "kernel"])
def test_nothing_of_a_sync_is_computed_between_syncs(magnitude, form):
    # XLA moves out of a loop what does not change in it: it would then be done at every step.
    state = init(rules.SignSync(magnitude=magnitude))
    sync_once, args = in_one_form(form, state, jnp.array(True))
    text = sync_once.lower(*args).compile().as_text()
    entry = text[text.index("\nENTRY") :].split("\n}")[0]
    for shape in ("[3,8]", "[8,4]"):  # only handed on, and taken back
        ops_ = re.findall(rf"= \w+{re.escape(shape)}\S* ([\w-]+)\(", entry)
        assert set(ops_) <= {"parameter", "get-tuple-element", "copy", "bitcast"}, ops_


@pytest.mark.parametrize("its_turn", [True, False])
@pytest.mark.parametrize("rule", [rules.SignSync(), Momentum()], ids=str)
def test_a_loop_and_a_conditional_sync_alike(rule, its_turn):
    found = []
    for form in (soap_jax.feedback._conditional, soap_jax.feedback._loop):
        sync_once, args = in_one_form(form, init(rule), jnp.array(its_turn))
        found.append(sync_once(*args))
    chex.assert_trees_all_equal(*found)


@pytest.mark.parametrize(
    "rule", [*(rules.SignSync(magnitude=m) for m in ("unit", "glorot", "kernel")),
             rules.Transport()], ids=str,
)  # fmt: skip
def test_feedback_of_kernels_is_a_sync_at_every_step(rule):
    synced = sync(PARAMS, init(rule), 0).feedback
    chex.assert_trees_all_equal(jax.jit(feedback_of, static_argnums=1)(PARAMS, rule), synced)
    bars = jax.grad(lambda params: jnp.sum(feedback_of(params, rule)["a"]["kernel"] ** 2))(
        jax.tree.map(jnp.float32, PARAMS)
    )
    assert not np.any(bars["a"]["kernel"])


@pytest.mark.parametrize(
    "rule", [rules.Fixed(), rules.SignSync(), rules.SignSync(magnitude="redraw"),
             rules.SignSync(magnitude="unit", period=2), rules.Transport(rate=0.5)], ids=str,
)  # fmt: skip
def test_feedback_of_kernels_refuses_a_rule_that_needs_more(rule):
    with pytest.raises(ValueError, match="expected a rule of period 1 that depends only on the"):
        feedback_of(PARAMS, rule)


# Memory


def test_a_rules_memory_is_kept_by_path_and_handed_on():
    state = init({"a/*": Momentum(period=2), "*": rules.SignSync(magnitude="unit")})
    assert set(state.memory) == {"a/kernel"}
    start = state.feedback["a"]["kernel"]
    for step in range(5):  # synced at 0, 2 and 4
        state = sync(PARAMS, state, step)
    kernel = PARAMS["a"]["kernel"]
    assert int(state.memory["a/kernel"]["count"]) == 3
    chex.assert_trees_all_close(state.memory["a/kernel"]["mean"], 1.75 * kernel)
    chex.assert_trees_all_close(state.feedback["a"]["kernel"], start + 4.25 * kernel, rtol=1e-6)


def test_a_memory_is_carried_by_scans_and_by_vmap_over_periods():
    def train(period):
        return run(init(Momentum(period=period)), np.arange(STEPS))[0]

    together = jax.jit(jax.vmap(train))(jnp.array([1, 2, 3]))
    for i, period in enumerate((1, 2, 3)):
        alone = loop(init(Momentum(period=period)), range(STEPS))
        chex.assert_trees_all_close(at(together.feedback, i), alone.feedback, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(at(together.memory, i), alone.memory, rtol=1e-5, atol=1e-6)


def test_norms_memory_is_the_root_mean_square_at_the_start():
    state = init(rules.SignSync(period=3))
    for name in "ab":
        feedback = np.asarray(state.feedback[name]["kernel"], np.float64)
        expected = np.sqrt(np.mean(feedback**2))
        assert float(state.memory[f"{name}/kernel"]) == pytest.approx(expected, rel=1e-6)


def test_a_sync_that_is_held_back_leaves_feedback_and_memory_alone():
    state = init(Momentum())
    chex.assert_trees_all_equal(sync_feedback_unless(jnp.array(True), PARAMS, state, 0), state)
    released = sync_feedback_unless(jnp.array(False), PARAMS, state, 0)
    chex.assert_trees_all_equal(released, sync(PARAMS, state, 0))


@dataclasses.dataclass(frozen=True)
class Returns(rules.Rule):
    """A rule that returns what it should not."""

    what: str = "array"

    def init(self, kernel, feedback, key):
        return jnp.zeros(3)

    def __call__(self, kernel, feedback, key, memory):
        return {"array": feedback, "longer": (feedback, jnp.zeros(4))}[self.what]


@pytest.mark.parametrize(
    "what, message",
    [
        ("array", r"Returns.* for \['a'\]\['kernel'\]; expected \(feedback, memory\)"),
        ("longer", r"a memory of \(\(4,\), .* expected \(\(3,\)"),
    ],
)
def test_a_rule_with_a_memory_returns_both_the_memory_alike(what, message):
    with pytest.raises(ValueError, match=message):
        sync_feedback(PARAMS, init(Returns(what=what)), 0)


@dataclasses.dataclass(frozen=True)
class Remembers(rules.Rule):
    """A rule whose memory is the feedback itself."""

    def init(self, kernel, feedback, key):
        return feedback

    def __call__(self, kernel, feedback, key, memory):
        return memory, feedback


def test_a_memory_shares_no_buffer_with_feedback():
    state = jax.jit(sync_feedback, donate_argnums=1)(PARAMS, init(Remembers()), 0)
    assert set(state.memory) == {"a/kernel", "b/kernel"}


def test_two_kernels_of_one_name_have_no_common_memory():
    params = {"a": {"b": np.ones((2, 3), np.float32)}, "a/b": np.ones((2, 3), np.float32)}
    with pytest.raises(ValueError, match="two kernels are called 'a/b'"):
        init_feedback(KEY, params, rules.SignSync(), where=lambda path, leaf: True)


def test_a_state_without_the_memory_that_its_rule_needs_is_refused():
    state = dataclasses.replace(init(rules.SignSync()), memory={})
    with pytest.raises(ValueError, match="was called without its memory"):
        sync_feedback(PARAMS, state, 0)


@every_rule
def test_lowers_for_every_platform(rule):
    traced = sync.trace(PARAMS, init(rule), 0)
    for platform in ("cpu", "cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        controlled = "stablehlo.case" in text or "stablehlo.while" in text
        assert controlled == (rule != rules.Fixed())
        if controlled and platform == "cuda" and not CONDITIONALS_IN_PLACE:
            assert "stablehlo.while" in text


# Checkpoints


def save(state):
    """The state's leaves as plain arrays, as a checkpoint holds them."""
    return list(map(np.asarray, jax.tree.leaves(state)))


def load(saved, like):
    return jax.tree.structure(like).unflatten(map(jnp.asarray, saved))


@every_rule
def test_a_resumed_run_repeats(rule):
    whole = loop(init(rule), range(STEPS))
    half = loop(init(rule), range(5))
    resumed = loop(load(save(half), init(rule, jax.random.key(99))), range(5, STEPS))
    chex.assert_trees_all_equal(resumed.feedback, whole.feedback)


# Several devices


def sharded_params(mesh):
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec)),
        PARAMS,
        SPECS,
    )


def kernels_of(tree):
    return [tree[name]["kernel"] for name in "ab"]


def lie_alike(some, others):
    return all(
        one.sharding.is_equivalent_to(other.sharding, one.ndim)
        for one, other in zip(kernels_of(some), kernels_of(others), strict=True)
    )


@every_library_rule
def test_feedback_keeps_its_kernels_explicit_sharding(explicit_mesh, rule):
    expected = sync(PARAMS, init(rule), 3).feedback
    with jax.set_mesh(explicit_mesh):
        params = sharded_params(explicit_mesh)
        state = init_feedback(KEY, params, rule)
        synced = sync(params, state, 3)
        for feedback in (state.feedback, synced.feedback):
            assert types(kernels_of(feedback)) == types(kernels_of(params))
            assert lie_alike(feedback, params)
        assert types(synced) == types(state)
    # A norm is summed in parts, and draws may be rounded otherwise, on several devices.
    chex.assert_trees_all_close(synced.feedback, expected, rtol=1e-6)


def test_init_under_jit_gives_feedback_its_kernels_explicit_sharding(mesh):
    params = sharded_params(mesh)
    state = jax.jit(lambda params: init_feedback(KEY, params))(params)
    assert types(kernels_of(state.feedback)) == types(kernels_of(params))
    assert lie_alike(state.feedback, params)
    expected = jax.device_get(init(rules.Fixed()).feedback)
    chex.assert_trees_all_close(jax.device_get(state.feedback), expected, rtol=1e-6)


@some_rules
def test_feedback_keeps_its_kernels_automatic_sharding(auto_mesh, rule):
    params = sharded_params(auto_mesh)
    state = init_feedback(KEY, params, rule)
    assert lie_alike(state.feedback, params)
    assert lie_alike(sync(params, state, 3).feedback, params)


@pytest.mark.parametrize("where", ["host", "another device", "replicated", "split otherwise"])
def test_adopted_feedback_moves_to_where_its_kernel_lies(auto_mesh, where):
    params = sharded_params(auto_mesh)
    feedback = jax.tree.map(lambda leaf: -leaf, PARAMS)
    feedback["a"]["bias"] = None
    if where == "another device":
        feedback = jax.device_put(feedback, jax.devices()[1])
    elif where == "replicated":
        feedback = jax.device_put(feedback, jax.sharding.NamedSharding(auto_mesh, P()))
    elif where == "split otherwise":
        feedback = {"b": {"kernel": feedback["b"]["kernel"]}, "a": feedback["a"]}
        swapped = jax.sharding.NamedSharding(auto_mesh, P(None, "data"))
        feedback["b"]["kernel"] = jax.device_put(feedback["b"]["kernel"], swapped)
    state = init_feedback(KEY, params, rules.SignSync(magnitude="unit"), feedback=feedback)
    assert lie_alike(state.feedback, params)
    chex.assert_trees_all_equal(kernels_of(state.feedback), [-leaf for leaf in kernels_of(PARAMS)])


def test_adopted_feedback_is_resharded_under_jit_on_an_explicit_mesh(mesh):
    params = sharded_params(mesh)
    feedback = jax.device_put({"b": {"kernel": -PARAMS["b"]["kernel"]}}, P(None, None))

    @jax.jit
    def adopt(params, feedback):
        return init_feedback(KEY, params, rules.SignSync(magnitude="unit"), feedback=feedback)

    adopted = adopt(params, feedback).feedback["b"]["kernel"]
    assert jax.typeof(adopted) == jax.typeof(params["b"]["kernel"])


@some_rules
def test_shard_map_over_seeds_equals_each_alone(auto_mesh, rule):
    states = jax.vmap(lambda key: init_feedback(key, PARAMS, rule))(jax.random.split(KEY, 4))
    params = jax.tree.map(lambda leaf: np.stack([leaf * (-1) ** i for i in range(4)]), PARAMS)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=auto_mesh, in_specs=P("data"), out_specs=P("data"))
    def split(params, states):
        return lax.map(lambda pair: sync_feedback(*pair, 3), (params, states))

    together = split(params, states)
    assert jax.tree.structure(together) == jax.tree.structure(states)
    for i in range(4):
        alone = sync(at(params, i), at(states, i), 3)
        chex.assert_trees_all_close(at(together.feedback, i), alone.feedback, rtol=1e-6)


@pytest.mark.parametrize("magnitude", ["unit", "preserve", "norm"])
def test_shard_map_over_parts_of_kernels_equals_the_whole(auto_mesh, magnitude):
    state = init(rules.SignSync(magnitude=magnitude))
    feedback_specs = {"a": {"kernel": P(None, "data"), "bias": None}, "b": SPECS["b"]}
    specs = FeedbackState(feedback_specs, P(), P(), P(), state.rule, state.key_impl)
    split = jax.shard_map(
        lambda params, state: sync_feedback(params, state, 0),
        mesh=auto_mesh,
        in_specs=(SPECS, specs),
        out_specs=specs,
    )
    chex.assert_trees_all_equal(
        jax.jit(split)(PARAMS, state).feedback, sync(PARAMS, state, 0).feedback
    )


# Flax


def test_linens_feedback_is_adopted_as_it_is():
    model = nn.Sequential([nn.Dense(3), nn.tanh, soap_jax.linen.FeedbackDense(2)])
    x = np.ones((5, 4), np.float32)
    variables = model.init(KEY, x)
    state = init_feedback(
        KEY, variables["params"], rules.SignSync(magnitude="unit"), feedback=variables["feedback"]
    )
    chex.assert_trees_all_equal(state.feedback, variables["feedback"])
    synced = sync(variables["params"], state, 0).feedback
    assert jax.tree.structure(synced) == jax.tree.structure(variables["feedback"])
    chex.assert_trees_all_equal(
        synced["layers_2"]["kernel"], jnp.sign(variables["params"]["layers_2"]["kernel"])
    )
    assert model.apply({"params": variables["params"], "feedback": synced}, x).shape == (5, 2)


def test_boxed_leaves_keep_their_boxes():
    boxed = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    layer = soap_jax.linen.FeedbackDense(2, kernel_init=boxed, feedback_init=boxed)
    variables = layer.init(KEY, np.ones((5, 4), np.float32))
    for feedback in (variables["feedback"], None):
        state = init_feedback(
            KEY, variables["params"], rules.SignSync(magnitude="unit"), feedback=feedback
        )
        synced = sync(variables["params"], state, 0)
        assert synced.feedback["kernel"].names == ("in", "out")
        chex.assert_trees_all_equal(synced.feedback["kernel"].value, jnp.ones((4, 2)))


def test_nnx_gets_a_state_back_that_is_ready_for_update():
    model = nnx.Sequential(
        nnx.Linear(4, 3, rngs=nnx.Rngs(0)), soap_jax.nnx.FeedbackLinear(3, 2, rngs=nnx.Rngs(1))
    )
    params, feedback = nnx.state(model, nnx.Param), nnx.state(model, soap_jax.nnx.Feedback)
    state = init_feedback(KEY, params, rules.SignSync(magnitude="unit"), feedback=feedback)
    synced = sync(params, state, 0)
    assert isinstance(synced.feedback, nnx.State)
    assert jax.tree.structure(synced.feedback) == jax.tree.structure(feedback)
    nnx.update(model, synced.feedback)
    layer = model.layers[1]
    assert isinstance(layer.feedback, soap_jax.nnx.Feedback)
    chex.assert_trees_all_equal(layer.feedback[...], jnp.sign(layer.kernel[...]))


# Which leaves


@pytest.mark.parametrize(
    "where, expected",
    [
        (None, {"a/kernel", "b/kernel"}),
        ("b/*", {"b/kernel"}),
        (["a/kernel", "a/bias"], {"a/kernel", "a/bias"}),
        (lambda path, leaf: leaf.shape[0] == 8, {"a/bias", "b/kernel"}),
    ],
)
def test_where_says_which_leaves_get_feedback(where, expected):
    initializer = jax.nn.initializers.normal()
    feedback = init_feedback(KEY, PARAMS, where=where, initializer=initializer).feedback
    assert feedback.keys() == PARAMS.keys()
    found = {f"{a}/{b}" for a in feedback for b, leaf in feedback[a].items() if leaf is not None}
    assert found == expected


def test_adopted_feedback_may_leave_layers_out():
    feedback = {"a": {"kernel": None}, "b": {"kernel": PARAMS["b"]["kernel"]}}
    state = init_feedback(KEY, PARAMS, rules.SignSync(magnitude="unit"), feedback=feedback)
    synced = sync(PARAMS, state, 0).feedback
    assert synced["a"] == {"kernel": None}
    chex.assert_trees_all_equal(synced["b"]["kernel"], np.sign(PARAMS["b"]["kernel"]))


# Errors


@pytest.mark.parametrize("rule", ["sign", {}, None, rules.SignSync, 3, {"*": "sign"}])
def test_a_rule_of_another_type_raises(rule):
    inner = "sign" if isinstance(rule, dict) and rule else rule
    message = rf"rule is {re.escape(repr(inner))}; expected a rule such as soap_jax.SignSync"
    with pytest.raises(ValueError, match=message):
        init(rule)


def test_a_rules_pattern_that_matches_nothing_raises():
    rule = {"Dense_9/*": rules.SignSync(magnitude="unit"), "*": rules.Fixed()}
    with pytest.raises(ValueError, match=r"pattern 'Dense_9/\*' matches no feedback.*\['b'\]"):
        init(rule)


def test_a_rules_pattern_that_matches_only_leaves_without_feedback_raises():
    rule = {"a/*": rules.SignSync(magnitude="unit"), "b/*": rules.Fixed()}
    with pytest.raises(ValueError, match=r"pattern 'a/\*' matches no feedback"):
        init_feedback(KEY, PARAMS, rule, where="b/*")


def test_feedback_without_a_rule_raises():
    message = r"no rule for the feedback at \['b'\]\['kernel'\].*'a/\*'.*Add the pattern"
    with pytest.raises(ValueError, match=message):
        init({"a/*": rules.SignSync(magnitude="unit")})


def test_an_initialiser_that_is_none_raises():
    with pytest.raises(ValueError, match=r"initializer is 'match'; expected .*'matched'"):
        init_feedback(KEY, PARAMS, initializer="match")


def test_a_leaf_that_cannot_be_drawn_is_named():
    with pytest.raises(ValueError, match=r"shape \(8,\) for \['a'\]\['bias'\].*select the kernels"):
        init_feedback(KEY, PARAMS, where="a/*", initializer=jax.nn.initializers.glorot_normal())


def test_where_selects_among_adopted_feedback():
    other = jax.tree.map(lambda leaf: 2 * leaf, PARAMS)
    state = init_feedback(KEY, PARAMS, where="b/*", feedback=other)
    chex.assert_trees_all_equal(
        state.feedback, {"a": {"kernel": None, "bias": None}, "b": other["b"]}
    )


def test_where_must_select_what_the_adopted_feedback_has():
    with pytest.raises(ValueError, match=r"`where` selects \['b'\]\['kernel'\], for which"):
        init_feedback(KEY, PARAMS, where="*kernel", feedback={"a": PARAMS["a"]})


def test_matched_feedback_is_as_large_as_its_kernel():
    params = {"kernel": 3.7 * jax.random.uniform(KEY, (30, 4, 25)), "w": jnp.full((40, 50), 0.2)}
    params["w"] = params["w"].astype(jnp.bfloat16)
    feedback = init_feedback(KEY, params, initializer="matched").feedback
    assert types(feedback) == types(params)
    for name, kernel in params.items():  # 2,000 deviates and more: 1.6 % at most
        b, w = (np.asarray(x, np.float32) for x in (feedback[name], kernel))
        assert np.sqrt((b**2).mean()) == pytest.approx(np.sqrt((w**2).mean()), rel=0.06)
        assert abs(b.mean()) < 0.1 * b.std()
    by_layer = {"w": "matched", "*": jax.nn.initializers.ones}
    ones = init_feedback(KEY, params, initializer=by_layer).feedback
    chex.assert_trees_all_equal(ones, feedback | {"kernel": jnp.ones((30, 4, 25))})


def test_a_pattern_or_predicate_that_selects_nothing_raises():
    with pytest.raises(ValueError, match=r"where='c/\*' matches no leaf"):
        init_feedback(KEY, PARAMS, where="c/*")
    with pytest.raises(ValueError, match="no leaf of params gets feedback"):
        init_feedback(KEY, PARAMS, where=lambda path, leaf: False)


@pytest.mark.parametrize("predicate", [lambda path: True, lambda: True, lambda a, b, c: True])
def test_a_predicate_takes_a_path_and_a_leaf(predicate):
    for where in (predicate, ["a/*", predicate]):
        with pytest.raises(ValueError, match=r"has the signature \(.*\); expected \(path, leaf\)"):
            init_feedback(KEY, PARAMS, where=where)


def test_an_explanation_tells_names_with_a_slash_from_nested_ones():
    params = {"first": jnp.ones((3, 4)), "a": {"b": jnp.ones((4, 4))}, "a/b": jnp.ones((4, 4))}

    def fun(params, x):
        return x @ params["first"] @ params["a"]["b"] + params["a/b"].sum()

    where = soap_jax.explain(fun, params, jnp.ones((2, 3)))
    for some in (where, [where]):
        feedback = init_feedback(KEY, params, rules.Fixed(), where=some).feedback
        assert feedback["a"]["b"] is not None and feedback["a/b"] is None


def test_an_integer_kernel_raises():
    params = {"out": {"kernel": np.ones((2, 3), np.int32)}}
    message = r"kernel at \['out'\]\['kernel'\] has dtype int32"
    with pytest.raises(ValueError, match=message):
        init_feedback(KEY, params)
    with pytest.raises(ValueError, match=message):
        init_feedback(KEY, params, feedback={"out": {"kernel": np.ones((2, 3), np.float32)}})


def test_adopted_feedback_that_does_not_fit_raises():
    with pytest.raises(ValueError, match=r"feedback at \['c'\]\['kernel'\] has no kernel"):
        init_feedback(KEY, PARAMS, feedback={"c": {"kernel": np.ones((8, 4))}})
    with pytest.raises(
        ValueError, match=r"\['b'\]\['kernel'\] has shape \(4, 8\); expected \(8, 4\)"
    ):
        init_feedback(KEY, PARAMS, feedback={"b": {"kernel": np.ones((4, 8))}})


def test_params_that_the_state_was_not_made_for_raise():
    state = init(rules.SignSync(magnitude="unit"))
    with pytest.raises(ValueError, match=r"feedback at \['b'\]\['kernel'\] has no kernel"):
        sync({"a": PARAMS["a"]}, state, 0)


def test_a_rule_that_returns_another_shape_raises():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Transposed(rules.Rule):
        def __call__(self, kernel, feedback, key):
            return feedback.T

    message = r"Transposed\(period=1\) returned feedback of shape \(8, 3\) for \['a'\]\['kernel'\]"
    with pytest.raises(ValueError, match=message + r"; expected \(3, 8\)"):
        sync(PARAMS, init(Transposed()), 0)


def test_a_rule_that_cannot_serve_a_kernel_says_so():
    params = {"scale": np.ones(5, np.float32)}
    state = init_feedback(
        KEY,
        params,
        rules.SignSync(magnitude="glorot"),
        where="scale",
        initializer=jax.nn.initializers.ones,
    )
    with pytest.raises(ValueError, match=r"kernel of shape \(5,\) has no fan-in and fan-out"):
        sync(params, state, 0)


def test_a_pattern_that_an_earlier_one_shadows_is_refused():
    params = {"a": {"kernel": jnp.ones((3, 2))}, "b": {"kernel": jnp.ones((2, 3))}}
    with pytest.raises(
        ValueError, match=r"'a/\*' matches no feedback that is left over by earlier"
    ):
        init_feedback(
            jax.random.key(0), params, {"*": rules.Fixed(), "a/*": rules.SignSync(magnitude="unit")}
        )


def test_a_rule_that_cannot_be_hashed_is_refused_at_once():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Listed(rules.Rule):
        rates: list

        def __call__(self, kernel, feedback, key):
            return feedback

    with pytest.raises(ValueError, match="not hashable"):
        init_feedback(jax.random.key(0), {"kernel": jnp.ones((3, 2))}, Listed(rates=[1.0]))


def test_a_last_star_may_have_nothing_left_to_catch():
    params = {"a": {"kernel": jnp.ones((3, 2))}}
    rule = {"a/*": rules.SignSync(magnitude="unit"), "*": rules.Fixed()}
    state = init_feedback(jax.random.key(0), params, rule)
    assert (sync_feedback(params, state, 0).feedback["a"]["kernel"] == 1).all()


def test_syncing_what_is_not_a_state_is_refused():
    params = {"kernel": jnp.ones((3, 2))}
    state = init_feedback(jax.random.key(0), params)
    for wrong in ((state, params), (params, state.feedback)):
        with pytest.raises(ValueError, match="expected the FeedbackState that init_feedback"):
            sync_feedback(*wrong, 0)


# Stored in another dtype than the kernel's


def wide(state):
    """The same state, stored in float32."""
    feedback = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state.feedback)
    return dataclasses.replace(state, feedback=feedback)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_floating_dtype_rounds_what_is_drawn_or_adopted(dtype):
    drawn = init(rules.Fixed())
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype), drawn.feedback)
    states = [init_feedback(KEY, PARAMS, dtype=dtype)]
    states += [init_feedback(KEY, PARAMS, dtype=dtype, feedback=drawn.feedback)]
    for state in states:
        assert dtypes(state) == {dtype}
        assert jax.tree.structure(state) == jax.tree.structure(drawn)
        chex.assert_trees_all_equal(state.feedback, expected)
    synced = sync(PARAMS, init_feedback(KEY, PARAMS, rules.Transport(), dtype=dtype), 0)
    copied = {name: {"kernel": layer["kernel"].astype(dtype)} for name, layer in PARAMS.items()}
    chex.assert_trees_all_equal(synced.feedback, copied | {"a": copied["a"] | {"bias": None}})


@pytest.mark.parametrize("dtype", ["int8", "int32", "int4", "int2"])
def test_an_integer_dtype_stores_the_signs_of_what_is_drawn_or_adopted(dtype):
    drawn = init(rules.Fixed())
    adopted = {"b": {"kernel": np.array([[0.3, -2.5, 0.0, -0.0]] * 8, np.float32)}}
    for rule in INTEGER_RULES if dtype == "int8" else INTEGER_RULES[:2]:
        state = init_feedback(KEY, PARAMS, rule, dtype=dtype)
        assert dtypes(state) == {dtype}
        chex.assert_trees_all_equal(wide(state).feedback, jax.tree.map(jnp.sign, drawn.feedback))
        state = init_feedback(KEY, PARAMS, rule, feedback=adopted, dtype=dtype)
        assert dtypes(state) == {dtype}
        assert wide(state).feedback["b"]["kernel"][0].tolist() == [1, -1, 0, 0]


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("rule", [*INTEGER_RULES[1:], "mapping"], ids=str)
def test_signs_sync_as_they_do_in_float32(rule, dtype):
    if rule == "mapping":
        rule = {"a/*": rules.SignSync(period=2, magnitude="unit"), "*": INTEGER_RULES[2]}
    signs = init_feedback(KEY, PARAMS, rule, dtype="int8").feedback
    state = init_feedback(KEY, PARAMS, rule, feedback=signs, dtype=dtype)
    last, history = run(state, np.arange(STEPS))
    assert types(last) == types(state)
    _, expected = run(wide(state), np.arange(STEPS))
    chex.assert_trees_all_equal(jax.tree.map(jnp.float32, history), expected)
    assert {-1, 1} == set(np.unique(history["b"]["kernel"].astype(jnp.float32)))


def test_integer_signs_of_zero_are_as_documented():
    params = {"w": jnp.array([[0.0, -0.0, 0.0, 2.0, -2.0]])}
    start = {"w": jnp.array([[-0.5, 0.5, 0.0, 0.0, 0.5]])}
    for magnitude, expected in (("unit", [0, 0, 0, 1, -1]), ("preserve", [1, 1, 0, 0, -1])):
        rule = rules.SignSync(magnitude=magnitude)
        state = init_feedback(KEY, params, rule, feedback=start, dtype=jnp.int8)
        assert sync(params, state, 0).feedback["w"][0].tolist() == expected


def test_a_rule_of_ones_own_may_return_integers():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Ternary(rules.Rule):
        def __call__(self, kernel, feedback, key):
            return jnp.round(3 * kernel).astype(feedback.dtype)

    state = sync(PARAMS, init_feedback(KEY, PARAMS, Ternary(), dtype=jnp.int8), 0)
    assert dtypes(state) == {"int8"}
    expected = np.round(3 * PARAMS["b"]["kernel"])
    chex.assert_trees_all_equal(state.feedback["b"]["kernel"].astype(jnp.float32), expected)


def train(state, *, scanned):
    """Params, feedback and losses after a dozen donated steps of a 5-8-7-3 net of ops."""
    rng = np.random.default_rng(0)
    data = rng.standard_normal((48, 5), np.float32), rng.integers(0, 3, 48, np.int32)

    def apply_fn(params, feedback, x):
        for name, w in params.items():
            b = feedback[name]
            x = ops.feedback_dense(x if name == "a" else jnp.tanh(x), w, b)
        return x

    optimizer = optax.sgd(0.5, momentum=0.9)
    step = training.make_train_step(apply_fn, optimizer)
    copy = jax.tree.map(jnp.array, (NET, state))  # donated
    carry = training.init_train_state(copy[0], optimizer, feedback=copy[1])
    if scanned:
        carry, losses = training.train_epoch(step, carry, data, KEY, batch_size=4)
        return carry.params, wide(carry.feedback).feedback, losses
    step = jax.jit(step, donate_argnums=0)
    for i in range(12):
        before = carry
        carry, loss = step(carry, jax.tree.map(lambda leaf, i=i: leaf[4 * i : 4 * i + 4], data))
        assert before.feedback.feedback["b"].is_deleted()
    return carry.params, wide(carry.feedback).feedback, loss


NET = {
    name: jnp.asarray(np.random.default_rng(i).standard_normal(shape, np.float32) / 2)
    for i, (name, shape) in enumerate({"a": (5, 8), "b": (8, 7), "c": (7, 3)}.items())
}


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("rule", INTEGER_RULES, ids=str)
def test_stored_in_fewer_bits_it_trains_as_the_same_values_in_float32(rule, dtype, scanned):
    where = ["b", "c"]
    state = init_feedback(KEY, NET, rule, where=where, dtype=dtype)
    assert dtypes(state) == {dtype}
    narrow, expected = train(state, scanned=scanned), train(wide(state), scanned=scanned)
    for got, same in zip(jax.tree.leaves(narrow), jax.tree.leaves(expected), strict=True):
        assert got.dtype == same.dtype
        np.testing.assert_array_equal(got, same)
    assert not np.allclose(narrow[0]["a"], NET["a"], atol=0.1)  # it has learnt


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_the_dtype_is_kept_under_jit_vmap_and_sharding(explicit_mesh, dtype):
    rule = rules.SignSync(period=3, magnitude="unit")

    def both(key):
        state = init_feedback(key, PARAMS, rule, dtype=dtype)
        return state, sync_feedback(PARAMS, state, 3)

    alone = [both(key) for key in jax.random.split(KEY, 2)]
    together = jax.jit(jax.vmap(both))(jax.random.split(KEY, 2))
    for i in range(2):
        chex.assert_trees_all_equal(at(together, i), alone[i])
        assert types(at(together, i)) == types(alone[i])
    with jax.set_mesh(explicit_mesh):
        params = sharded_params(explicit_mesh)
        state = init_feedback(KEY, params, rule, dtype=dtype)
        for one in (state, sync(params, state, 3)):
            assert lie_alike(one.feedback, params) and dtypes(one) == {dtype}


def test_boxed_and_flax_feedback_is_stored_in_another_dtype():
    boxed = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    layer = soap_jax.linen.FeedbackDense(2, kernel_init=boxed, feedback_init=boxed)
    variables = layer.init(KEY, np.ones((5, 4), np.float32))
    for feedback in (variables["feedback"], None):
        state = init_feedback(
            KEY,
            variables["params"],
            rules.SignSync(magnitude="unit"),
            feedback=feedback,
            dtype=jnp.int8,
        )
        synced = sync(variables["params"], state, 0)
        assert synced.feedback["kernel"].names == ("in", "out") and dtypes(synced) == {"int8"}


FLOAT_RULES = [rule for rule in all_rules(3).values() if rule not in INTEGER_RULES]
FLOAT_RULES += [NoisySign(period=3, flip=0.25), rules.WeightMirror(period=3)]


@pytest.mark.parametrize("rule", FLOAT_RULES, ids=str)
def test_integer_feedback_under_a_rule_of_floats_raises_when_made_and_when_synced(rule):
    static = re.escape(str(dataclasses.replace(rule, period=1)))
    message = rf"{static} returned float32 for \['.'\].*stored as int8.*SignSync with 'unit'"
    feedback = {"b": {"kernel": jnp.ones((8, 4), jnp.int8)}}
    for more in ({"dtype": jnp.int8}, {"dtype": jnp.int8, "where": "b/*"}, {"feedback": feedback}):
        with pytest.raises(ValueError, match=message):
            init_feedback(KEY, PARAMS, rule, **more)
    state = dataclasses.replace(init(rule), feedback=feedback)
    with pytest.raises(ValueError, match=message):
        sync(PARAMS, state, 1)


def test_each_rule_of_a_mapping_is_asked_for_integers():
    rule = {"a/*": rules.SignSync(magnitude="glorot"), "*": rules.SignSync(magnitude="unit")}
    with pytest.raises(ValueError, match=r"glorot.* returned float32 for \['a'\]\['kernel'\]"):
        init_feedback(KEY, PARAMS, rule, dtype=jnp.int8)
    feedback = init(rules.Fixed()).feedback  # in float32 at "a"
    feedback["b"] = {"kernel": jnp.sign(feedback["b"]["kernel"]).astype(jnp.int8)}
    synced = sync(PARAMS, init_feedback(KEY, PARAMS, rule, feedback=feedback), 0)
    assert dtypes(synced) == {"int8", "float32"}


def explained(dtype):
    """An explanation of a model that computes in the dtype."""
    used, full = np.dtype(dtype), np.dtype("float32")
    rows = [
        Row((name, "kernel"), "feedback", (), layer["kernel"].shape, full, full, used, 0, "exact")
        for name, layer in PARAMS.items()
    ]
    return soap_jax.Explanation(tuple(rows))


class Leak(rules.Rule):
    """A user's own rule, which says nothing of what it does."""

    def __call__(self, kernel, feedback, key):
        return feedback / 2


@pytest.mark.parametrize(
    ("rule", "stored"),
    [
        (rules.Fixed(), "bfloat16"),
        (rules.SignSync(magnitude="unit"), "bfloat16"),
        (rules.SignSync(magnitude="glorot"), "bfloat16"),
        (rules.SignSync(magnitude="preserve"), "bfloat16"),
        (rules.SignSync(magnitude="redraw"), "bfloat16"),
        (rules.SignSync(magnitude="norm"), "float32"),
        (rules.Transport(), "bfloat16"),
        (rules.Transport(rate=0.5), "float32"),
        (rules.WeightMirror(), "float32"),
        (Leak(), "float32"),
    ],
    ids=str,
)
def test_feedback_is_stored_as_it_is_used_unless_its_rule_accumulates(rule, stored):
    where = explained("bfloat16")
    state = init_feedback(KEY, PARAMS, rule, where=where, dtype="used")
    assert dtypes(state) == {stored} and rule.accumulates == (stored == "float32")
    drawn = init_feedback(KEY, PARAMS, rule, where=where, dtype=stored)
    chex.assert_trees_all_equal(state.feedback, drawn.feedback)


def test_each_layer_is_stored_as_its_own_rule_allows():
    rule = {"a/*": rules.Transport(rate=0.5), "*": rules.SignSync(magnitude="unit")}
    state = init_feedback(KEY, PARAMS, rule, where=explained("float16"), dtype="used")
    assert [state.feedback[k]["kernel"].dtype.name for k in "ab"] == ["float32", "float16"]


def test_feedback_is_never_stored_in_more_bits_than_it_has():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    for params, feedback in ((half, None), (half, half), (PARAMS, half)):
        where = explained("float32")
        state = init_feedback(KEY, params, where=where, feedback=feedback, dtype="used")
        assert dtypes(state) == {"bfloat16"}


@pytest.mark.parametrize("where", [None, "*/kernel", lambda path, leaf: "kernel" in path])
def test_how_it_is_used_only_an_explanation_says(where):
    with pytest.raises(ValueError, match=r"dtype='used' .*; expected also where=soap_jax.expl"):
        init_feedback(KEY, PARAMS, where=where, dtype="used")


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bool_, jnp.complex64, "unused"])
def test_a_dtype_that_holds_no_signs_raises(dtype):
    with pytest.raises(ValueError, match=r"dtype is .*; expected a floating-point dtype .*int8"):
        init_feedback(KEY, PARAMS, dtype=dtype)


# Flax's serialisation


def mixed_state():
    """A state with a mapping of rules, boxes and None leaves."""
    params = {
        "a": {"kernel": nn.Partitioned(PARAMS["a"]["kernel"], names=(None, "x"))},
        "b": PARAMS["b"],
        "c": {"bias": np.ones(3, np.float32)},
    }
    rule = {"a/*": rules.SignSync(period=3, magnitude="redraw"), "*": rules.Transport(period=7)}
    return init_feedback(KEY, params, rule)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("make", [lambda dtype: init_feedback(KEY, PARAMS, dtype=dtype)])
def test_a_state_survives_flax_serialisation(make, dtype):
    state = make(dtype)
    again = serialization.from_bytes(
        jax.tree.map(jnp.zeros_like, state), serialization.to_bytes(state)
    )
    assert jax.tree.structure(again) == jax.tree.structure(state)
    chex.assert_trees_all_equal(again, state, strict=True)


def test_whatever_holds_a_state_survives_flax_serialisation():
    state = mixed_state()
    optimizer = optax.MultiSteps(optimizers.kolen_pollack(optax.adam(0.1), decay=0.5), 2)
    params = {name: PARAMS[name] for name in "ab"} | {"c": {"bias": np.ones(3, np.float32)}}
    opt_state = optimizer.init((params, jax.tree.map(jnp.asarray, {"b": PARAMS["b"]})))
    whole = training.TrainState(params, state, opt_state, jnp.asarray(5))
    for tree in (state, whole, {"nested": [whole]}):
        content = serialization.to_bytes(tree)
        again = serialization.from_bytes(jax.tree.map(jnp.zeros_like, tree), content)
        assert jax.tree.structure(again) == jax.tree.structure(tree)
        chex.assert_trees_all_equal(again, tree)
    synced = sync_feedback(PARAMS | {"c": params["c"]}, again["nested"][0].feedback, 21)
    expected = sync_feedback(PARAMS | {"c": params["c"]}, state, 21)
    chex.assert_trees_all_equal(synced, expected)


def test_a_states_content_is_a_plain_dict_and_other_content_is_refused():
    state = init_feedback(KEY, {"kernel": PARAMS["b"]["kernel"]}, rules.SignSync(period=3))
    content = serialization.to_state_dict(state)
    assert set(content) == {"feedback", "period", "memory", "key_data"}
    assert set(content["feedback"]) == {"kernel"}
    with pytest.raises(ValueError, match=r"has the entries \['feedback'\]; expected feedback, per"):
        serialization.from_state_dict(state, {"feedback": content["feedback"]})


# Defaults


def test_matched_feedback_is_the_default():
    matched = init_feedback(KEY, PARAMS, initializer="matched")
    chex.assert_trees_all_equal(init_feedback(KEY, PARAMS), matched, strict=True)


@pytest.mark.parametrize(
    ("shape", "expected"), [((30, 70), 0.02), ((5, 5, 4, 36), 0.002), ((2000,), 2 / 2001), ((), 1)]
)
@pytest.mark.parametrize("jit", [False, True])
def test_feedback_of_a_kernel_of_zeros_has_glorots_size(shape, expected, jit):
    def make(key, kernel):
        return init_feedback(key, {"w": kernel}, where="w").feedback["w"]

    make = jax.jit(make) if jit else make
    draws = [make(key, jnp.zeros(shape)) for key in jax.random.split(KEY, 2 if shape else 500)]
    # 2,000 deviates and more, 500 of the scalar: a relative standard error of at most 6 %.
    assert np.mean(np.square(draws)) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_matched_feedback_neither_underflows_nor_overflows(size):
    params = {"w": np.full((50, 60), size, np.float32)}
    feedback = init_feedback(KEY, params).feedback["w"]
    assert np.std(feedback / np.float32(size)) == pytest.approx(1, rel=0.06)


def test_matched_feedback_takes_a_stack_of_kernels_of_any_sharding(explicit_mesh):
    kernel = jax.device_put(np.ones((8, 4), np.float32), NamedSharding(explicit_mesh, P("data")))
    with jax.set_mesh(explicit_mesh):
        feedback = init_feedback(KEY, {"kernel": kernel}).feedback["kernel"]
    assert feedback.sharding == kernel.sharding
    np.testing.assert_allclose(feedback, init_feedback(KEY, {"kernel": np.ones((8, 4), np.float32)})
                               .feedback["kernel"], rtol=1e-6)  # fmt: skip


# Wrong arguments


@pytest.mark.parametrize(
    "key",
    [0, None, "key", jnp.ones(2), np.zeros(3, np.uint32), jax.random.split(KEY), jax.random.key],
)
def test_what_is_no_key_raises(key):
    with pytest.raises(ValueError, match=r"key is .*; expected one PRNG key, such as jax.random"):
        init_feedback(key, PARAMS)


@pytest.mark.parametrize("initializer", ["matched", jax.nn.initializers.glorot_normal()])
def test_an_empty_kernel_raises(initializer):
    params = {"a": {"kernel": jnp.ones((0, 3))}, "b": PARAMS["b"]}
    message = r"kernel at \['a'\]\['kernel'\] has shape \(0, 3\), which is empty; .* of `where`"
    with pytest.raises(ValueError, match=message):
        init_feedback(KEY, params, initializer=initializer)
    with pytest.raises(ValueError, match=message):
        init_feedback(KEY, params, feedback=params)
    init_feedback(KEY, params, where="b/*", initializer=initializer)


@pytest.mark.parametrize(
    "step",
    [
        10.5,
        10.0,
        float("nan"),
        2**31,
        -1,
        True,
        None,
        "1",
        jnp.ones(()),
        jnp.array([1]),
        np.ones(2),
    ],
    ids=str,
)
def test_a_step_that_is_no_whole_number_raises(step):
    state = init(rules.SignSync(period=10))
    with pytest.raises(ValueError, match=r"step is .*; expected an integer scalar from 0 to 21474"):
        sync_feedback(PARAMS, state, step)


def test_a_traced_step_that_is_no_whole_number_raises():
    state = init(rules.SignSync(period=10))
    with pytest.raises(ValueError, match=r"step is float32\[\]; expected an integer scalar"):
        sync(PARAMS, state, 10.5)


@pytest.mark.parametrize("period", [0, -1, -7, -(2**31)])
def test_a_traced_period_below_one_never_syncs(period):
    @jax.jit
    def synced(period, step):
        state = init(rules.SignSync(period=period))
        return state.feedback, sync_feedback(PARAMS, state, step).feedback

    for step in (0, 1, 7):
        before, after = synced(jnp.int32(period), step)
        chex.assert_trees_all_equal(before, after)


def test_several_periods_in_a_rule_of_ones_own_raise():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Unchecked(rules.Rule):
        def __post_init__(self):
            pass

    with pytest.raises(ValueError, match=r"Unchecked: period has shape \(2,\); expected a scalar"):
        init(Unchecked(period=jnp.array([1, 2])))


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (None, r"returned NoneType for \['b'\]\['kernel'\]; expected an array of shape \(8, 4\)"),
        ("x", r"returned str for"),
        (jnp.ones((4, 8)), r"returned feedback of shape \(4, 8\) for .*; expected \(8, 4\)"),
        (1.0, r"returned feedback of shape \(\) for .*; expected \(8, 4\)"),
        (jnp.ones((8, 4), jnp.complex64), r"returned complex64 for .*; expected real numbers"),
    ],
)
def test_an_initialiser_that_returns_no_feedback_raises(drawn, message):
    with pytest.raises(ValueError, match="the initializer " + message):
        init_feedback(KEY, PARAMS, where="b/*", initializer=lambda key, shape, dtype: drawn)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wrong(rules.Rule):
        def __call__(self, kernel, feedback, key):
            return drawn

    with pytest.raises(ValueError, match=r"Wrong\(period=1\) " + message):
        sync_feedback(PARAMS, init_feedback(KEY, PARAMS, Wrong(), where="b/*"), 0)


@pytest.mark.parametrize("dtype", ["float16", "int32", "bool"])
def test_what_an_initialiser_returns_is_cast_to_the_kernels_dtype(dtype):
    feedback = init_feedback(KEY, PARAMS, initializer=lambda key, shape, _: np.ones(shape, dtype))
    assert dtypes(feedback) == {"float32"}


def test_complex_feedback_of_a_real_kernel_raises():
    message = r"feedback at \['b'\]\['kernel'\] has dtype complex64 and its kernel float32"
    feedback = {"b": {"kernel": PARAMS["b"]["kernel"] * np.complex64(1j)}}
    with pytest.raises(ValueError, match=message):
        init_feedback(KEY, PARAMS, feedback=feedback)
    with pytest.raises(ValueError, match=message.replace(r" at \['b'\]\['kernel'\]", "")):
        ops.feedback_dense(jnp.ones((2, 8)), PARAMS["b"]["kernel"], feedback["b"]["kernel"])
    kernel = {"kernel": jnp.ones((3, 2), jnp.complex64)}
    assert init_feedback(KEY, kernel, feedback={"kernel": jnp.ones((3, 2))}).feedback
    assert init_feedback(KEY, kernel).feedback["kernel"].dtype == jnp.complex64


@pytest.mark.parametrize("wrong", [5, 0.5, [5], ("b/*", None)], ids=str)
def test_where_and_patterns_that_are_no_strings_raise(wrong):
    with pytest.raises(ValueError, match=r"where is .*; expected glob|a pattern is .*; expected a"):
        init_feedback(KEY, PARAMS, where=wrong)
    for more in ({"rule": {5: rules.Fixed()}}, {"initializer": {5: "matched"}}):
        with pytest.raises(ValueError, match="a pattern is 5; expected a string that matches"):
            init_feedback(KEY, PARAMS, **more)


def test_leaves_that_are_no_arrays_are_left_alone_or_named():
    params = {"kernel": PARAMS["b"]["kernel"], "activation": jnp.tanh}
    assert init_feedback(KEY, params).feedback["activation"] is None
    with pytest.raises(ValueError, match=r"kernel at \['activation'\] is a .*; expected a floatin"):
        init_feedback(KEY, params, where="*")


def test_matched_feedback_of_a_shape_without_values_raises():
    shapes = jax.eval_shape(lambda: PARAMS)
    with pytest.raises(ValueError, match=r"\['kernel'\] is a shape without values; .*eval_shape"):
        init_feedback(KEY, shapes)
    assert types(jax.eval_shape(lambda p: init_feedback(KEY, p).feedback, shapes))
