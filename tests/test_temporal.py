"""Time-local learning: against NumPy loops by hand, full Jacobians, FA and backpropagation."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import soap_jax
from soap_jax import study, temporal, trees, with_feedback

BATCH, TIME, UNITS, INPUTS, OUTPUTS = 3, 6, 5, 4, 2
TAU = 4.0
ROUNDING = {"rtol": 1e-5, "atol": 2e-6}  # sums over time and examples, in another order


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


XS, TARGETS = normal(0, TIME, BATCH, INPUTS), normal(1, TIME, BATCH, OUTPUTS)
H0 = normal(2, BATCH, UNITS, scale=0.3)
PARAMS = {
    "w": normal(3, UNITS, UNITS, scale=0.5),
    "u": normal(4, INPUTS, UNITS),
    "b": normal(5, UNITS),
    "out": normal(6, UNITS, OUTPUTS),
}
B = normal(7, UNITS, OUTPUTS)
FEEDBACK = {"out": B}


def leaky(params, h, x):
    """Murray's units."""
    drive = h @ params["w"] + x @ params["u"] + params["b"]
    return (1 - 1 / TAU) * h + jnp.tanh(drive) / TAU


def loss(params, h, target):
    return jnp.mean((h @ params["out"] - target) ** 2)


def learn(cell, of_loss=loss, **options):
    return jax.jit(temporal.value_and_grad(cell, of_loss, **options))


def bptt(cell, of_loss=loss):
    """Loss and gradient through time."""

    def total(params, feedback, state, xs, targets):
        def body(state, inputs):
            x, target = inputs
            new, out = jax.vmap(lambda s, x: pair(cell(params, s, x), s))(state, x)
            return new, of_loss(params, out, target)

        return lax.scan(body, state, (xs, targets))[1].sum()

    return jax.jit(jax.value_and_grad(total))


def pair(returned, state):
    same = jax.tree.structure(returned) == jax.tree.structure(state)
    return (returned, returned) if same else returned


def in_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


# RFLO


def rflo(params, h, xs, targets, b):
    """Murray's equations: leaky eligibility traces, the error through B. In NumPy."""
    p = np.zeros((len(h), UNITS, UNITS))
    q, r = np.zeros((len(h), INPUTS, UNITS)), np.zeros((len(h), UNITS))
    total, grads = 0.0, {name: np.zeros_like(leaf) for name, leaf in params.items()}
    for x, target in zip(xs, targets, strict=True):
        drive = h @ params["w"] + x @ params["u"] + params["b"]
        slope = (1 - np.tanh(drive) ** 2) / TAU
        p = (1 - 1 / TAU) * p + h[:, :, None] * slope[:, None]
        q = (1 - 1 / TAU) * q + x[:, :, None] * slope[:, None]
        r = (1 - 1 / TAU) * r + slope
        h = (1 - 1 / TAU) * h + np.tanh(drive) / TAU
        error = h @ params["out"] - target
        total += np.mean(error**2)
        error = 2 * error / error.size
        signal = error @ b.T
        grads["w"] += np.einsum("bj,bij->ij", signal, p)
        grads["u"] += np.einsum("bj,bij->ij", signal, q)
        grads["b"] += np.sum(signal * r, 0)
        grads["out"] += h.T @ error
    return total, grads, {"w": p, "u": q, "b": r}


def test_rflo_is_the_loop_by_hand():
    total, grads, traces = rflo(*in_float64((PARAMS, H0, XS, TARGETS, B)))
    value, found = learn(leaky)(PARAMS, FEEDBACK, H0, XS, TARGETS)
    np.testing.assert_allclose(value, total, rtol=1e-6)
    chex.assert_trees_all_close(found, grads, **ROUNDING)
    learner = temporal.online(leaky, loss)
    carry, step = learner.init(PARAMS, H0, XS[0]), jax.jit(learner.step)
    for x, target in zip(XS, TARGETS, strict=True):
        carry, _ = step(PARAMS, FEEDBACK, carry, x, target)
    chex.assert_trees_all_close(carry.traces, {"": traces}, **ROUNDING)


# e-prop

ALPHA, RHO, KAPPA, BETA, THRESHOLD = 0.9, 0.95, 0.8, 0.3, 0.5


def slope(distance):
    """Of the pseudo-derivative: a triangle."""
    return 0.3 * jnp.maximum(0, 1 - jnp.abs(distance))


@jax.custom_jvp
def spike(distance):
    return (distance > 0).astype(distance.dtype)


spike.defjvp(lambda p, t: (spike(p[0]), slope(p[0]) * t[0]))


@jax.custom_vjp
def spike_by_vjp(distance):
    return (distance > 0).astype(distance.dtype)


spike_by_vjp.defvjp(
    lambda distance: (spike_by_vjp(distance), distance),
    lambda distance, bar: (slope(distance) * bar,),
)


def alif(params, state, x, spike=spike, reset=lax.stop_gradient):
    """Bellec's adaptive leaky integrate-and-fire neurons, and a leaky average of their spikes."""
    v, a = state["v"], state["a"]
    z = spike(v - THRESHOLD - BETA * a)
    v = ALPHA * v + z @ params["w"] + x @ params["u"] + params["b"] - THRESHOLD * reset(z)
    a = RHO * a + z
    average = KAPPA * state["average"] + spike(v - THRESHOLD - BETA * a)
    return {"v": v, "a": a, "average": average}


def of_average(params, state, target):
    return loss(params, state["average"], target)


ALIF0 = {"v": H0, "a": jnp.abs(normal(8, BATCH, UNITS)), "average": jnp.zeros((BATCH, UNITS))}


def eprop(params, state, xs, targets, b):
    """Bellec's equations: traces of v and a, filtered as the readout is. In NumPy."""
    v, a, average = state["v"], state["a"], state["average"]
    inputs = {"w": (UNITS,), "u": (INPUTS,), "b": ()}
    zeros = {name: np.zeros((len(v), *shape, UNITS)) for name, shape in inputs.items()}
    of_v, of_a, filtered = dict(zeros), dict(zeros), dict(zeros)
    grads = {name: np.zeros_like(leaf) for name, leaf in params.items()}

    def post(values, name):
        return values if name == "b" else values[:, None]

    def spikes(v, a):
        distance = v - THRESHOLD - BETA * a
        return (distance > 0) * 1.0, 0.3 * np.maximum(0, 1 - abs(distance))

    for x, target in zip(xs, targets, strict=True):
        z, psi = spikes(v, a)
        pre = {"w": z[:, :, None], "u": x[:, :, None], "b": 1.0}
        for name in inputs:
            of_a[name] = post(psi, name) * of_v[name] + post(RHO - psi * BETA, name) * of_a[name]
            of_v[name] = ALPHA * of_v[name] + pre[name]
        v = ALPHA * v + z @ params["w"] + x @ params["u"] + params["b"] - THRESHOLD * z
        a = RHO * a + z
        z, psi = spikes(v, a)
        average = KAPPA * average + z
        error = average @ params["out"] - target
        error = 2 * error / error.size
        grads["out"] += average.T @ error
        for name in inputs:
            e = post(psi, name) * (of_v[name] - BETA * of_a[name])
            filtered[name] = KAPPA * filtered[name] + e
            grads[name] += np.sum(post(error @ b.T, name) * filtered[name], 0)
    return grads, {"v": of_v, "a": of_a, "average": filtered}, z


@pytest.mark.parametrize("spike", [spike, spike_by_vjp], ids=["custom_jvp", "custom_vjp"])
def test_eprop_is_the_loop_by_hand(spike):
    grads, traces, z = eprop(*in_float64((PARAMS, ALIF0, XS, TARGETS, B)))
    assert 0 < z.mean() < 1
    cell = functools.partial(alif, spike=spike)
    _, found = learn(cell, of_average)(PARAMS, FEEDBACK, ALIF0, XS, TARGETS)
    chex.assert_trees_all_close(found, grads, **ROUNDING)
    learner = temporal.online(cell, of_average)
    carry, step = learner.init(PARAMS, ALIF0, XS[0]), jax.jit(learner.step)
    for x, target in zip(XS, TARGETS, strict=True):
        carry, _ = step(PARAMS, FEEDBACK, carry, x, target)
    chex.assert_trees_all_close(
        carry.traces, jax.tree.map(lambda e: np.broadcast_to(e, e.shape), traces), **ROUNDING
    )


def test_a_reset_that_is_not_stopped_is_in_the_trace():
    cell = functools.partial(alif, reset=lambda z: z)
    grads, _, _ = eprop(*in_float64((PARAMS, ALIF0, XS, TARGETS, B)))
    _, found = learn(cell, of_average)(PARAMS, FEEDBACK, ALIF0, XS, TARGETS)
    assert np.abs(found["w"] - grads["w"]).max() > 1e-2


# Any cell, against full Jacobians


def full(cell, of_loss, cut, params, feedback, state, xs, targets):
    """The definition with traces `(batch, all state, *param)`, by `jax.jacrev`: no units in it."""

    def at(leaves, otherwise=None):
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: leaves.get("/".join(trees.path_of(keys)), otherwise), params
        )

    named = trees.named(params)
    zeros = {name: jnp.zeros_like(named[name]) for name in cut}
    signal = with_feedback(
        lambda params, s, x, target: of_loss(
            params, jax.vmap(lambda s, x: pair(cell(params, s, x), s)[1])(s, x), target
        )
    )
    step = with_feedback(lambda params, s, x: pair(cell(params, s, x), s)[0])

    def flat(tree):
        return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])

    leaves, tree = jax.tree.flatten(jax.tree.map(lambda leaf: leaf[0], state))
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def flat_step(params, values, x):
        return flat(step(params, at(zeros), jax.tree.unflatten(tree, jnp.split(values, ends)), x))

    @jax.jit
    def one(params, state, traces, x, target):
        given = at(zeros | trees.named(feedback))
        direct, bars = jax.grad(signal, (0, 2))(params, given, state, x, target)
        bars = jax.vmap(flat)(bars)
        grads = jax.tree.map(lambda g, e: g + jnp.tensordot(bars, e, 2), direct, traces)
        jacobians = jax.vmap(jax.jacrev(flat_step, (0, 1)), (None, 0, 0))
        m, d = jacobians(params, jax.vmap(flat)(state), x)
        traces = jax.tree.map(lambda m, e: m + jnp.einsum("bij,bj...->bi...", d, e), m, traces)
        return jax.vmap(lambda s, x: pair(cell(params, s, x), s)[0])(state, x), traces, grads

    size = sum(leaf.size for leaf in leaves)
    traces = jax.tree.map(lambda leaf: jnp.zeros((len(xs[0]), size, *leaf.shape)), params)
    total = jax.tree.map(jnp.zeros_like, params)
    for x, target in zip(xs, targets, strict=True):
        state, traces, grads = one(params, state, traces, x, target)
        total = jax.tree.map(jnp.add, total, grads)
    return total


def linen(kind):
    cell = kind(UNITS)
    state = cell.initialize_carry(jax.random.key(0), (BATCH, UNITS))
    params = cell.init(jax.random.key(1), state, jnp.zeros((BATCH, UNITS)))["params"]
    return params, state, lambda params, s, x: cell.apply({"params": params}, s, x)


def of_nnx(kind):
    cell = kind(UNITS, UNITS, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(cell, nnx.Param, ...)
    state = cell.initialize_carry((BATCH, UNITS), nnx.Rngs(0))
    return params, state, lambda params, s, x: nnx.merge(graph, params, rest)(s, x)


def of_equinox(name):
    eqx = pytest.importorskip("equinox")
    kind = getattr(eqx.nn, name)
    params, static = eqx.partition(kind(UNITS, UNITS, key=jax.random.key(0)), eqx.is_array)
    zeros = jnp.zeros((BATCH, UNITS))

    def cell(params, state, x):
        new = eqx.combine(params, static)(x, state)
        return new, (new[0] if name == "LSTMCell" else new)

    return params, ((zeros, zeros) if name == "LSTMCell" else zeros), cell


CELLS = {  # how to make it, its recurrent kernels, its state variables with traces
    "linen LSTM": (linen, nn.LSTMCell, {f"h{gate}/kernel" for gate in "ifgo"}, {"0"}),
    "linen optimized LSTM": (
        linen, nn.OptimizedLSTMCell, {f"h{gate}/kernel" for gate in "ifgo"}, {"0"},
    ),
    "linen GRU": (linen, nn.GRUCell, {f"h{gate}/kernel" for gate in "rzn"}, {""}),
    "linen MGU": (linen, nn.MGUCell, {f"h{gate}/kernel" for gate in "fn"}, {""}),
    "linen simple": (linen, nn.SimpleCell, {"h/kernel"}, set()),
    "nnx GRU": (of_nnx, nnx.GRUCell, {"dense_h/kernel"}, {""}),
    "nnx LSTM": (of_nnx, nnx.LSTMCell, {f"h{gate}/kernel" for gate in "ifgo"}, {"0"}),
    "nnx optimized LSTM": (of_nnx, nnx.OptimizedLSTMCell, {"dense_h/kernel"}, {"0"}),
    "equinox GRU": (of_equinox, "GRUCell", {"weight_hh"}, {""}),
    "equinox LSTM": (of_equinox, "LSTMCell", {"weight_hh"}, {"1"}),
}  # fmt: skip
SQUARE = normal(9, TIME, BATCH, UNITS)  # as many inputs as units: shapes do not tell axes


LIKE_ANOTHER = ("linen optimized LSTM", "nnx LSTM", "nnx optimized LSTM", "equinox LSTM")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in LIKE_ANOTHER)) for n in CELLS],
)
def test_every_librarys_cells_are_the_definition(name):
    make, kind, cut, carried = CELLS[name]
    params, state, module = make(kind)
    params = {"cell": params, "out": PARAMS["out"]}

    def cell(params, state, x):
        return module(params["cell"], state, x)

    learner = temporal.online(cell, loss)
    carry = learner.init(params, state, SQUARE[0])
    assert set(carry.traces) == carried
    args = params, FEEDBACK, state, SQUARE, TARGETS
    expected = full(cell, loss, {f"cell/{path}" for path in cut}, *args)
    chex.assert_trees_all_close(learn(cell)(*args)[1], expected, **ROUNDING)


def test_gates_in_one_kernel_are_units_again_and_again():
    params, state, module = of_nnx(nnx.GRUCell)
    carry = temporal.online(module, lambda params, h, target: jnp.sum(h)).init(
        params, state, SQUARE[0]
    )
    shapes = jax.tree.map(jnp.shape, carry.traces[""])
    assert shapes["dense_h/kernel"] == shapes["dense_i/kernel"] == (BATCH, UNITS, 3 * UNITS)


# Identities


def test_one_step_is_feedback_alignment():
    def unrolled(params, h, xs, targets):
        return loss(params, jax.vmap(lambda h, x: leaky(params, h, x))(h, xs[0]), targets[0])

    args = H0, XS[:1], TARGETS[:1]
    expected = jax.jit(jax.value_and_grad(with_feedback(unrolled)))(PARAMS, FEEDBACK, *args)
    chex.assert_trees_all_close(learn(leaky)(PARAMS, FEEDBACK, *args), expected, rtol=1e-6)


def rotating(params, state, x):
    """A diagonal linear unit, complex, as a pair of state variables, and what it puts out."""
    decay = lax.complex(params["real"], params["imaginary"])
    z = decay * lax.complex(state["real"], state["imaginary"])
    new = {"real": jnp.real(z) + x @ params["u"], "imaginary": jnp.imag(z)}
    return new, jnp.tanh(new["real"]) + new["imaginary"] ** 2


def test_without_recurrent_kernels_and_feedback_it_is_backprop():
    params = {"u": PARAMS["u"], "out": PARAMS["out"]}
    params |= {"real": normal(10, UNITS, scale=0.5), "imaginary": normal(11, UNITS, scale=0.5)}
    args = {"real": H0, "imaginary": H0 / 2}, XS, TARGETS
    expected = bptt(rotating)(params, None, *args)
    for feedback in (None, {"out": params["out"]}):  # exact, and symmetric
        found = learn(rotating)(params, feedback, *args)
        chex.assert_trees_all_close(found, expected, **ROUNDING)


def test_with_recurrent_kernels_it_is_not():
    expected = bptt(leaky)(PARAMS, None, H0, XS, TARGETS)[1]
    found = learn(leaky)(PARAMS, None, H0, XS, TARGETS)[1]
    np.testing.assert_allclose(found["out"], expected["out"], rtol=1e-5)
    assert np.abs(found["w"] - expected["w"]).max() > 1e-2


def test_online_steps_sum_to_the_gradient_and_params_may_change_between_them():
    learner = temporal.online(leaky, loss)
    step = jax.jit(learner.step)

    def run(rate):
        params, carry, total = PARAMS, learner.init(PARAMS, H0, XS[0]), []
        for x, target in zip(XS, TARGETS, strict=True):
            carry, found = step(params, FEEDBACK, carry, x, target)
            params = jax.tree.map(lambda w, g: w - rate * g, params, found[1])
            total.append(found)
        return jax.tree.map(lambda *leaves: sum(leaves), *total)

    expected = learn(leaky)(PARAMS, FEEDBACK, H0, XS, TARGETS)
    chex.assert_trees_all_close(run(0.0), expected, **ROUNDING)
    assert run(0.1)[0] < expected[0]
    assert step._cache_size() == 1


# Learning signals


def test_feedback_learns_as_its_kernel_does():
    value, (grads, of_feedback) = learn(leaky, feedback_bar="kernel")(
        PARAMS, FEEDBACK, H0, XS, TARGETS
    )
    expected = learn(leaky)(PARAMS, FEEDBACK, H0, XS, TARGETS)
    chex.assert_trees_all_close((value, grads), expected, **ROUNDING)
    chex.assert_trees_all_close(of_feedback, {"out": grads["out"]}, **ROUNDING)


def stacked(params, state, x):
    """Two layers of leaky units in one cell."""
    first = leaky(params["first"], state["first"], x)
    return {"first": first, "second": leaky(params["second"], state["second"], first)}


SECOND = {"w": normal(12, 3, 3), "u": normal(13, UNITS, 3), "b": normal(14, 3)}
STACK = {"first": {k: PARAMS[k] for k in "wub"}, "second": SECOND, "out": normal(15, 3, OUTPUTS)}
STACK0 = {"first": H0, "second": jnp.zeros((BATCH, 3))}


def of_second(params, state, target):
    return loss(params, state["second"], target)


@pytest.mark.parametrize("between", [None, normal(16, UNITS, 3)], ids=["exact", "feedback"])
def test_errors_pass_from_layer_to_layer_where_kernels_are_not_recurrent(between):
    """By hand: each layer its own RFLO, the second one's learning signal handed on."""
    out = normal(17, 3, OUTPUTS)
    feedback = {"out": out, "second": {"u": between}}
    grad_fn = learn(stacked, of_second, where=["first/w", "second/w"])
    _, found = grad_fn(STACK, feedback, STACK0, XS, TARGETS)
    p = in_float64(STACK)
    back = np.asarray(p["second"]["u"] if between is None else between, np.float64)
    h = [np.asarray(H0, np.float64), np.zeros((BATCH, 3))]
    traces = [{"w": 0.0, "u": 0.0, "b": 0.0} for _ in h]
    grads = jax.tree.map(np.zeros_like, p)
    for x, target in zip(in_float64(XS), in_float64(TARGETS), strict=True):
        slopes = []
        for i, layer in enumerate(("first", "second")):
            drive = h[i] @ p[layer]["w"] + x @ p[layer]["u"] + p[layer]["b"]
            d = (1 - np.tanh(drive) ** 2) / TAU
            pre = {"w": h[i][:, :, None], "u": x[:, :, None]}
            new = {k: v * d[:, None] for k, v in pre.items()} | {"b": d}
            traces[i] = {k: (1 - 1 / TAU) * traces[i][k] + new[k] for k in new}
            h[i] = x = (1 - 1 / TAU) * h[i] + np.tanh(drive) / TAU
            slopes.append(d)
        error = 2 * (h[1] @ p["out"] - target) / target.size
        grads["out"] += h[1].T @ error
        second = error @ np.asarray(out, np.float64).T
        signals = [(second * slopes[1]) @ back.T, second]
        for layer, trace, signal in zip(("first", "second"), traces, signals, strict=True):
            for k, e in trace.items():
                along = signal if k == "b" else signal[:, None]
                grads[layer][k] += np.sum(along * e, 0)
    chex.assert_trees_all_close(found, grads, **ROUNDING)


# What it costs


def test_memory_does_not_grow_with_time():
    def temporaries(time, cell):
        shapes = [jax.ShapeDtypeStruct((time, BATCH, n), jnp.float32) for n in (INPUTS, OUTPUTS)]
        compiled = learn(cell).lower(PARAMS, FEEDBACK, H0, *shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(10, leaky), temporaries(1000, leaky)
    assert short == long
    trace = 4 * BATCH * (UNITS * UNITS + INPUTS * UNITS + UNITS)
    assert trace <= short < 10 * trace


def test_a_cell_without_memory_of_its_own_keeps_no_traces():
    def cell(params, h, x):
        return jnp.tanh(h @ params["w"] + x @ params["u"])

    assert temporal.online(cell, loss).init(PARAMS, H0, XS[0]).traces == {}


# Composition


def test_vmap_over_runs_equals_a_loop_and_closed_over_values_may_be_traced():
    def run(seed, decay):
        def cell(params, h, x):
            return decay * h + jnp.tanh(h @ params["w"] + x @ params["u"])

        keys = jax.random.split(jax.random.key(seed))
        params = PARAMS | {"w": jax.random.normal(keys[0], (UNITS, UNITS), jnp.float32)}
        feedback = {"out": jax.random.normal(keys[1], B.shape, jnp.float32)}
        return temporal.value_and_grad(cell, loss)(params, feedback, H0, XS, TARGETS)

    seeds, decays = jnp.arange(2), jnp.array([0.5, 0.9], jnp.float32)
    alone = [jax.jit(run)(*args) for args in zip(seeds, decays, strict=True)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    chex.assert_trees_all_close(jax.jit(jax.vmap(run))(seeds, decays), expected, **ROUNDING)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_stay_under_strict_promotion(dtype):
    args = jax.tree.map(lambda x: x.astype(dtype), (PARAMS, FEEDBACK, H0, XS, TARGETS))

    def cell(params, h, x):
        return jnp.asarray(0.75, dtype) * h + jnp.tanh(h @ params["w"] + x @ params["u"])

    with jax.numpy_dtype_promotion("strict"):
        value, grads = learn(cell)(*args)
    assert {leaf.dtype for leaf in jax.tree.leaves((value, grads))} == {jnp.dtype(dtype)}
    expected = learn(lambda p, h, x: 0.75 * h + jnp.tanh(h @ p["w"] + x @ p["u"]))(
        PARAMS, FEEDBACK, H0, XS, TARGETS
    )[1]
    tolerance = 1e-4 if dtype == jnp.float32 else 0.05 * float(jnp.abs(expected["w"]).max())
    np.testing.assert_allclose(grads["w"].astype(jnp.float32), expected["w"], atol=tolerance)


def test_what_is_no_float_is_carried_along():
    """Units that are refractory for a step after each spike, counted in integers."""

    def cell(params, state, x):
        v = 0.9 * state["v"] + state["v"] @ params["w"] + x @ params["u"]
        z = jnp.where(state["wait"] == 0, spike(v - THRESHOLD), 0.0)
        wait = jnp.where(z > 0, 1, jnp.maximum(state["wait"] - 1, 0))
        return {"v": v, "wait": wait.astype(jnp.int32)}, z

    state = {"v": H0, "wait": jnp.zeros((BATCH, UNITS), jnp.int32)}
    learner = temporal.online(cell, loss)
    carry, step = learner.init(PARAMS, state, XS[0]), jax.jit(learner.step)
    assert set(carry.traces) == {"v"}
    waits, largest = 0, 0.0
    for x, target in zip(XS, TARGETS, strict=True):
        carry, (_, grads) = step(PARAMS, FEEDBACK, carry, x, target)
        waits += int(carry.state["wait"].sum())
        largest = max(largest, float(jnp.abs(grads["u"]).max()))
    assert waits > 0 and largest > 0


@pytest.mark.parametrize("kind", ["auto", "explicit", "shard_map"])
def test_examples_may_be_spread_over_devices(kind, request):
    mesh = request.getfixturevalue("explicit_mesh" if kind == "explicit" else "auto_mesh")
    xs, targets, h = (jnp.concatenate([x, x[:, :1]], 1) for x in (XS, TARGETS, H0[None]))
    expected = learn(leaky)(PARAMS, FEEDBACK, h[0], xs, targets)
    specs = P(), P(), P("data"), P(None, "data"), P(None, "data")
    args = PARAMS, FEEDBACK, h[0], xs, targets
    with jax.set_mesh(mesh):
        if kind == "shard_map":

            def mean(params, h, target):
                return lax.pmean(loss(params, h, target), "data")

            grad_fn = temporal.value_and_grad(leaky, mean)
            grad_fn = jax.shard_map(grad_fn, mesh=mesh, in_specs=specs, out_specs=P())
        else:
            grad_fn = temporal.value_and_grad(leaky, loss)
            shardings = [jax.NamedSharding(mesh, spec) for spec in specs]
            args = [jax.device_put(x, s) for x, s in zip(args, shardings, strict=True)]
        found = jax.jit(grad_fn)(*args)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), **ROUNDING)


# Training


def start(key):
    keys = jax.random.split(key, 3)
    return {
        "w": jax.random.normal(keys[0], (12, 12)) / np.sqrt(12),
        "u": jax.random.normal(keys[1], (2, 12)),
        "b": jnp.zeros(12),
        "out": jax.random.normal(keys[2], (12, 1)) / np.sqrt(12),
    }


def test_it_is_a_method_of_a_comparison():
    """Remember the first input: `(examples, time, 2)`, the first at the start alone."""
    pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8, 2)).astype(np.float32) * 0.3
    x[:, 1:, 0] = 0
    y = np.repeat(np.sign(x[:, :1, :1]), 8, 1)

    def arguments(batch):
        xs, targets = (jnp.swapaxes(part, 0, 1) for part in batch)
        return jnp.zeros((len(batch[0]), 12)), xs, targets

    def mean(params, h, target):
        return loss(params, h, target) / x.shape[1]

    def total(params, batch):
        return bptt(leaky, mean)(params, None, *arguments(batch))[0]

    def init_feedback(key, params, batch):
        return soap_jax.init_feedback(key, params, where="out").feedback

    def gradient(params, feedback, batch, key, step, learning_rate):
        return temporal.value_and_grad(leaky, mean)(params, feedback, *arguments(batch))

    rflo = study.Method(gradient=gradient, init_feedback=init_feedback, reference="rflo")
    result = study.compare(
        study.Task(init=start, loss=total, train=(x, y)),
        {"rflo": rflo},  # and "bp", of course
        learning_rates=(0.3,),
        seeds=1,
        steps=60,
        batch_size=16,
        evaluations=6,
        optimizer=optax.sgd,
    )
    rows = result.evaluations
    assert rows["train_loss"].iloc[-1] < 0.8 * rows["train_loss"].dropna().iloc[0]
    assert 1 < rows["gradient_angle/w"].iloc[-1] < 90


# Bad input


def refused(match, cell=leaky, of_loss=loss, feedback=FEEDBACK, state=H0, params=PARAMS, **options):
    with pytest.raises(ValueError, match=match):
        learn(cell, of_loss, **options)(params, feedback, state, XS, TARGETS)


def test_a_state_that_changes_its_type_is_refused():
    refused(r"state \(one array\) was float32\[5\] before the step and is float32\[2\] after it",
            lambda params, h, x: h @ params["out"])  # fmt: skip
    refused(r"is bfloat16\[5\] after it", lambda params, h, x: h.astype(jnp.bfloat16))
    refused("the cell returned .*; expected a state of the same structure",
            lambda params, h, x: {"h": h})  # fmt: skip
    refused(r"shape \(3, 5, 1\); expected \(batch, units\)", state=H0[..., None])
    refused("same batch size in all of them", state=(H0, H0[:2]), cell=lambda params, s, x: s)
    refused("is complex; expected two real", state=H0.astype(complex))


def test_a_jacobian_that_is_not_elementwise_is_refused():
    fixed = normal(18, UNITS, UNITS)
    match = "state '' does not depend on '' unit by unit: dot_general at .*test_temporal.py"
    refused(match, lambda params, h, x: jnp.tanh(h @ fixed + x @ params["u"]))
    refused("unit by unit: reduce_sum", lambda params, h, x: h / jnp.sum(h) + x @ params["u"])
    refused(r"not so: \['w'\] in dot_general at .*, after abs",
            lambda params, h, x: jnp.tanh(h @ jnp.abs(params["w"]) + x @ params["u"]))  # fmt: skip
    refused("unit by unit: rev", lambda params, h, x: h[::-1] + x @ params["u"])
    refused("unit by unit: scan",
            lambda params, h, x: lax.fori_loop(0, 3, lambda i, h: 0.9 * h, h) + x @ params["u"],
            )  # fmt: skip


def test_a_param_that_acts_on_several_units_is_refused():
    params = PARAMS | {"tau": jnp.array(4.0, jnp.float32)}
    match = "entry of the param 'tau' acts on several units of the state '' .*reduce_sum"
    refused(match, lambda p, h, x: h - h / p["tau"] + x @ p["u"], params=params)

    def encoded(params, h, x):
        return 0.9 * h + jnp.tanh(x @ params["encode"]) @ params["u"]

    params = PARAMS | {"encode": normal(19, INPUTS, INPUTS)}
    refused("the param 'encode' acts on .*dot_general", encoded, params=params)
    refused("param 'w' acts on several units",  # once by columns, once by rows
            lambda p, h, x: 0.9 * h + h @ p["w"] + p["w"] @ h)  # fmt: skip
    per_unit = PARAMS | {"tau": jnp.full(UNITS, 4.0, jnp.float32)}
    learn(lambda p, h, x: h - h / p["tau"] + x @ p["u"])(per_unit, FEEDBACK, H0, XS, TARGETS)


def test_gates_that_are_interleaved_are_refused():
    params = PARAMS | {"u": normal(20, INPUTS, 2 * UNITS)}

    def cell(params, h, x):
        a, b = (x @ params["u"]).reshape(UNITS, 2).T
        return 0.9 * h + jnp.tanh(a) * b

    refused("param 'u' acts on several units .*reshape", cell, params=params)


def test_feedback_that_does_not_fit_is_refused():
    refused(r"feedback at \['out'\] has shape \(2, 5\); expected \(5, 2\)", feedback={"out": B.T})
    refused(r"\['w'\] is recurrent and has feedback; expected None",
            feedback=FEEDBACK | {"w": PARAMS["w"]})  # fmt: skip
    state = soap_jax.init_feedback(jax.random.key(0), PARAMS, where="out")
    refused("FeedbackState", feedback=state)
    with pytest.raises(ValueError, match="feedback_bar"):
        temporal.value_and_grad(leaky, loss, feedback_bar="kernels")


def test_params_that_no_learning_signal_reaches_are_refused():
    with pytest.raises(ValueError, match=r"the param 'first/.* gets no learning signal.*`where`"):
        learn(stacked, of_second)(STACK, None, STACK0, XS, TARGETS)

    def reset_before(params, h, x):
        """A gate that acts on the state before the recurrent product, as in Haiku's GRU."""
        gate = jax.nn.sigmoid(x @ params["gate"])
        return 0.5 * h + jnp.tanh((gate * h) @ params["w"] + x @ params["u"])

    params = PARAMS | {"gate": normal(21, INPUTS, UNITS)}
    refused("the param 'gate' gets no learning signal", reset_before, params=params)
    learn(
        lambda p, h, x: reset_before(p | {"gate": lax.stop_gradient(p["gate"])}, h, x)
    )(params, FEEDBACK, H0, XS, TARGETS)  # fmt: skip


def test_sequences_of_two_lengths_are_refused():
    with pytest.raises(ValueError, match="expected a first axis of one length, the time"):
        learn(leaky)(PARAMS, FEEDBACK, H0, XS, TARGETS[:-1])
