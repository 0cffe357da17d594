"""One training: by hand, method by method, alone and among others."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name

import soap_jax
from soap_jax import data, study, sweeps, tasks
from soap_jax.study import METHODS, loops, methods, preset, store, trial

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 6)).astype(np.float32)
Y = np.sin(X[:, :2]).astype(np.float32)
SHAPES = {"a": (6, 5), "b": (5, 4), "c": (4, 2)}
RATE = 0.2
TWICE = {"kp": "kp", "again": "kp"}
"""Two methods of one small program, which the second finds in JAX's cache."""
BY_NAME = [name for name, method in METHODS.items() if not method.needs]
OWN_B = {"fa", "sign_preserve", "weight_mirror", "kp"} | {n for n in METHODS if "alignment" in n}
"""Those that begin with B0 itself."""


def init(key):
    keys = jax.random.split(key, len(SHAPES))
    return {
        name: jax.random.normal(key, shape) / np.sqrt(shape[0])
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def loss(params, batch):
    h = batch[0] @ params["a"]
    for name in list(params)[1:]:
        h = checkpoint_name(jnp.tanh(h), f"into_{name}") @ params[name]
    return jnp.mean((checkpoint_name(h, "out") - batch[1]) ** 2)


TAPS = tasks.Taps(("into_b", "into_c"), "out", target=lambda batch: batch[1])
TASK = study.Task(init, loss, (X, Y), validation=(X[:9], Y[:9]), test=(X, Y), taps=TAPS)
SHALLOW = dataclasses.replace(
    TASK,
    init=lambda key: {"a": init(key)["a"], "b": init(key)["b"][:, :2]},
    taps=TAPS._replace(names=("into_b",)),
)


class Started:
    """A training by one method with seed 3: its state, and what can be done with it."""

    def __init__(self, method, task=TASK, *, optimizer=optax.sgd, period=1, rate=RATE, size=8):
        method = METHODS[method] if isinstance(method, str) else method
        batch = jax.tree.map(lambda leaf: leaf[:size], task.train)
        layers = trial.layers_of(task, task.init(jax.random.key(0)), None, batch)
        sizes = {"batch_size": size, "steps": 8, "evaluations": 2}
        self.of = trial.make(task, (method,), layers, optimizer=optimizer, **sizes)
        self.data = trial.data_of(task)
        self.state, self.plan = self.of.init(3, rate, period, 0, self.data)
        self.batch = trial.batch_of(task, self.data, self.plan, 0)
        self._step, self._measure = jax.jit(self.of.step), jax.jit(self.of.measure)

    @property
    def params(self):
        return self.state.train.params

    @property
    def weights(self):
        return soap_jax.training.feedback_weights(self.state.train.feedback)

    def step(self, num=1, *, rate=RATE):
        for i in range(num):
            self.state, _ = self._step(self.state, self.plan, rate, 0, self.data, i)
        return self

    def measure(self):
        return self._measure(self.state, self.plan, RATE, 0, self.data)


def moved(started, **how):
    """By how much a step changes params."""
    before = started.params
    return jax.tree.map(jnp.subtract, started.step(**how).params, before)


def compare(names=TWICE, **options):
    short = {"learning_rates": (0.05, RATE), "seeds": 2, "steps": 8, "batch_size": 8}
    return study.compare(TASK, names, **short | {"evaluations": 2} | options)


def all_losses(result, name, **at):
    return np.stack(result.rows("losses", name, **at)["train_loss"])


# By hand


def test_a_step_of_raw_signs_is_the_one_by_hand():
    started = Started("sign")
    params, (x, y) = started.params, started.batch
    a, b, c = (np.asarray(params[name], float) for name in "abc")
    h1 = np.tanh(x @ a)
    h2 = np.tanh(h1 @ b)
    error = 2 * (h2 @ c - y) / y.size
    error2 = error @ np.sign(c).T * (1 - h2**2)
    error1 = error2 @ np.sign(b).T * (1 - h1**2)
    expected = {"a": x.T @ error1, "b": h1.T @ error2, "c": h2.T @ error}
    expected = jax.tree.map(lambda g: -RATE * g, expected)
    chex.assert_trees_all_close(moved(started), expected, rtol=1e-3, atol=1e-6)  # differences


def test_errors_are_compared_example_by_example():
    """Of the hidden layer: `(e Bᵀ) (1 - h²)` to `(e Wᵀ) (1 - h²)`, the mean of their angles."""
    started = Started("fa", SHALLOW)
    (x, y), a = TASK.validation, np.asarray(started.params["a"])
    h, w, b = np.tanh(x @ a), np.asarray(started.params["b"]), np.asarray(started.weights["b"])
    error = h @ w - y
    one, other = (error @ kernel.T * (1 - h**2) for kernel in (w, b))
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    angles = np.degrees(np.arccos((one * other).sum(1) / norms))
    np.testing.assert_allclose(started.measure()["error_angle/a"], angles.mean(), rtol=1e-4)


def test_feedback_is_measured_as_the_next_step_uses_it():
    row = Started("sign", SHALLOW).measure()
    assert row["weight_angle/b"] < 60  # signs of the present weights
    assert Started("fa", SHALLOW).measure()["weight_angle/b"] > 60


def test_effective_learning_rates_are_what_each_method_makes_of_the_rate():
    shares = {}
    for name in ("bp", "frozen", "sign", "bp_scaled", "bp_scaled_live"):
        started = Started(name, SHALLOW)
        rows = started.measure(), started.step(8).measure()
        shares[name] = np.stack([row["effective_learning_rate/a"] for row in rows]) / RATE
        along = [row["norm_ratio/b"] * np.cos(np.radians(row["weight_angle/b"])) for row in rows]
        if name == "sign":
            np.testing.assert_allclose(shares[name], along, rtol=0.3)  # through tanh
    np.testing.assert_allclose(shares["bp"], 1, rtol=1e-5)
    assert (shares["frozen"] == 0).all()
    scaled, live = shares["bp_scaled"], shares["bp_scaled_live"]
    np.testing.assert_allclose([scaled[1], live[0]], scaled[0], rtol=1e-4)
    assert abs(live[1] / live[0] - 1) > 1e-3


def test_scaled_backprop_multiplies_gradients_by_the_amplification_of_all_layers_above():
    expected = moved(Started("bp"))
    for name in ("bp_scaled", "bp_scaled_live"):
        started = Started(name)
        ratio = {k: np.sqrt(w.size) / np.linalg.norm(w) for k, w in started.params.items()}
        factors = {"a": ratio["b"] * ratio["c"], "b": ratio["c"], "c": 1.0}
        scaled = {k: factors[k] * leaf for k, leaf in expected.items()}
        # differences of parameters keep about four digits of an update
        chex.assert_trees_all_close(moved(started), scaled, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("optimizer", [optax.sgd, optax.adam])
def test_kolen_pollack_brings_feedback_to_weights_at_the_rate_of_the_decay(optimizer):
    """W - B shrinks by 1 - learning_rate * decay at every update, for any optimiser."""

    def decayed(rate):
        return optax.chain(optimizer(rate), optax.add_decayed_weights(-0.1 * rate))

    def apart(started):
        return {k: started.params[k] - started.weights[k] for k in ("b", "c")}

    started = Started("kp", optimizer=decayed)
    before = apart(started)
    expected = jax.tree.map(lambda leaf: (1 - 0.1 * RATE) ** 3 * leaf, before)
    chex.assert_trees_all_close(apart(started.step(3)), expected, atol=1e-6)


def test_local_losses_teach_feedback_at_a_rate_of_their_own():
    """Symmetric alignment: B moves towards W by `FEEDBACK_RATE`, whatever the learning rate."""
    before = Started("symmetric_alignment")
    fast, slow = (Started("symmetric_alignment").step(rate=rate) for rate in (0.5, 0.001))
    chex.assert_trees_all_equal(fast.weights, slow.weights)
    assert (fast.params["c"] != slow.params["c"]).any()
    for name in ("b", "c"):
        w, b = before.params[name], before.weights[name]
        expected = b + methods.FEEDBACK_RATE * (w - b)
        np.testing.assert_allclose(fast.weights[name], expected, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def of_preset():
    """How the preset compares, with one hidden layer."""
    config = preset.StudyConfig(hidden=(7,), methods=("fa", "dfa", "drtp"), inputs="unit")
    return preset.comparison_arguments(config, data.load("digits"))


def started_by_preset(of_preset, name):
    return Started(of_preset["methods"][name], of_preset["task"], size=9)


def test_dfa_with_one_hidden_layer_is_fa_with_the_same_feedback(of_preset):
    """Its step, and all that is measured of both."""
    fa, dfa = (started_by_preset(of_preset, name) for name in ("fa", "dfa"))
    (projection,) = jax.tree.leaves(dfa.weights)
    feedback = fa.state.train.feedback
    weights = jax.tree.map(lambda leaf: projection.T, feedback.feedback)
    feedback = dataclasses.replace(feedback, feedback=weights)
    fa.state = fa.state._replace(train=fa.state.train._replace(feedback=feedback))
    rows = fa.measure(), dfa.measure()
    assert set(rows[0]) - set(rows[1]) == {
        "weight_angle/Dense_1/kernel",
        "norm_ratio/Dense_1/kernel",
    }
    chex.assert_trees_all_close({k: rows[0][k] for k in rows[1]}, rows[1], rtol=1e-4)
    chex.assert_trees_all_close(fa.step().params, dfa.step().params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(jax.tree.leaves(dfa.weights), [projection])  # it stays


def test_drtp_sends_the_target(of_preset):
    """The hidden layer's gradient by hand: `xᵀ (t P / n * (1 - h²))`."""
    drtp = started_by_preset(of_preset, "drtp")
    (projection,) = jax.tree.leaves(drtp.weights)
    images, labels = map(np.asarray, drtp.batch)
    x = images.reshape(9, 64) / 16.0
    hidden = np.tanh(x @ np.asarray(drtp.params["Dense_0"]["kernel"], float))
    error = np.eye(10)[labels] @ np.asarray(projection) / 9 * (1 - hidden**2)
    found = moved(drtp)["Dense_0"]["kernel"]
    np.testing.assert_allclose(found, -RATE * x.T @ error, rtol=1e-3, atol=1e-6)


# Paired


@pytest.mark.parametrize("name", BY_NAME)
def test_every_method_starts_from_the_same_weights_feedback_and_order(name):
    started, fa = Started(name), Started("fa")
    chex.assert_trees_all_equal(started.params, fa.params)
    chex.assert_trees_all_equal(started.batch, fa.batch)
    if name in OWN_B:
        chex.assert_trees_all_equal(*(jax.tree.map(abs, s.weights) for s in (started, fa)))


def test_periods_are_runs_of_their_own_for_methods_that_sync():
    result = compare(["bp", "sign"], periods=(1, 5))
    assert set(result.rows("runs", "bp", RATE)["period"]) == {0}
    often, seldom = (all_losses(result, "sign", rate=RATE, period=t) for t in (1, 5))
    np.testing.assert_array_equal(often[:, :2], seldom[:, :2])  # both synced at step 0
    assert (often[:, -1] != seldom[:, -1]).all()


# Alone and among others


@pytest.fixture(scope="module")
def unbroken():
    return compare()


def assert_same(one, other):
    for name in ("runs", "evaluations", "losses"):
        assert getattr(one, name).equals(getattr(other, name)), name


def test_a_run_alone_is_bit_identical_to_its_place_in_the_comparison(unbroken):
    """And many in one vmapped program, as accelerators do them, are the same to rounding."""
    data = trial.data_of(TASK)
    run = jax.jit(loops.scanned(Started("kp").of))
    expected = all_losses(unbroken, "kp", rate=RATE)
    seeds, args = jnp.arange(2), (jnp.float32(RATE), jnp.int32(0), jnp.int32(0), data)
    np.testing.assert_array_equal(run(seeds[1], *args)["train_loss"], expected[1])
    many = jax.jit(jax.vmap(run, (0, None, None, None, None)))
    np.testing.assert_allclose(many(seeds, *args)["train_loss"], expected, rtol=1e-4)


def test_another_number_of_cpu_devices_gives_the_same_bits(unbroken, monkeypatch):
    devices = jax.devices()
    if jax.default_backend() != "cpu" or len(devices) < 4:
        pytest.skip("needs four CPU devices")
    monkeypatch.setattr(sweeps.jax, "devices", lambda *_: devices[:3])
    found = compare()
    assert found.record["device"]["count"] == 3
    assert_same(found, unbroken)


def test_neither_chunks_nor_a_memory_limit_change_cpu_results(unbroken):
    assert_same(compare(chunk_size=1, memory_limit=2.0**30), unbroken)
    with pytest.raises(ValueError, match=r"memory_limit is 1 bytes per device, but the smallest"):
        compare(memory_limit=1.0)


def test_nothing_is_compiled_where_nothing_is_missing(unbroken, tmp_path, monkeypatch):
    compare(out=tmp_path)
    monkeypatch.setattr(sweeps, "_compile", None)
    told = []
    again = compare(out=tmp_path, on_progress=lambda *call: told.append(call))
    assert told == [(name, None, 4, 8, 8) for name in TWICE]
    assert_same(again, unbroken)


def test_every_part_is_kept_before_the_next_is_trained(tmp_path):
    told, kept = [], []

    def note(method, done, in_all, done_of_all, total):
        told.append(done_of_all)
        kept.append(len(store.Store(tmp_path).done()))

    compare(["kp"], out=tmp_path, on_progress=note, chunk_size=1, seeds=6)
    assert len(told) > 3 and told[-1] == 12
    # At the start of a method, when it is compiled, and after each call, before its part is kept.
    assert all(k <= t for k, t in zip(kept, told, strict=True))
    assert all(now >= before for before, now in zip(told, kept[1:], strict=False))


# Each learns


@pytest.mark.slow
def test_every_method_learns_and_is_measured():
    names = [name for name in BY_NAME if not METHODS[name].has_own_gradient]
    result = compare(names, steps=400, learning_rates=(0.1,), evaluations=4)
    for name in names:
        rows = result.rows("evaluations", name, 0.1)
        measured = {"gradient_angle/a", "error_angle/b", "weight_angle/c", "norm_ratio/b"}
        assert np.isfinite(rows[[*measured, "validation_loss"]]).all(axis=None), name
        first, last = (rows[rows["step"] == step]["validation_loss"].mean() for step in (0, 400))
        assert last < 0.8 * first, name


@pytest.mark.slow
def test_learnt_feedback_turns_towards_the_weights_farther_than_fa_turns_weights_to_it():
    learnt = ("kp", "weight_mirror", *(name for name in METHODS if name.endswith("_alignment")))
    config = preset.StudyConfig(
        methods=("fa", *learnt), learning_rates=(0.1,), seeds=2, hidden=(64,), epochs=10
    )
    result = study.compare(**preset.comparison_arguments(config, data.load("digits")))
    column = "weight_angle/Dense_1/kernel"
    angle = {name: result.measured(column, name, 0.1, end=True).mean() for name in result.methods}
    assert all(angle[name] < angle["fa"] - 3 for name in learnt), angle


def test_made_batches_and_the_loss_draw_from_different_keys():
    seen = []

    def train(key):
        seen.append(key)
        return jnp.ones((2, 3))

    task = study.Task(init=lambda key: {}, loss=lambda params, batch: 0.0, train=train)
    plan = trial.Plan(None, jax.random.key(0))
    trial.batch_of(task, {}, plan, 5)
    (made,) = (jax.random.key_data(key).tolist() for key in seen)
    assert made != jax.random.key_data(jax.random.fold_in(plan.key, 5)).tolist()
