"""`study.compare`: what it refuses, what it keeps, and how its runs are made."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import soap_jax
from soap_jax import study
from soap_jax.study import trial

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 6)).astype(np.float32)
Y = np.sin(X[:, :2]).astype(np.float32)
SHORT = {"learning_rates": (0.05, 0.2), "seeds": 2, "steps": 8, "batch_size": 8, "evaluations": 2}


def init(key):
    a, b = jax.random.split(key)
    return {"a": jax.random.normal(a, (6, 5)) / 2, "b": jax.random.normal(b, (5, 2)) / 2}


def loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)


def largest(params, batch):
    x, y = batch
    return jnp.max(jnp.abs(jnp.tanh(x @ params["a"]) @ params["b"] - y))


TASK = study.Task(
    init=init, loss=loss, train=(X, Y), validation=(X[:9], Y[:9]), test=(X[9:], Y[9:])
)


def compare(task=TASK, methods=("bp", "fa"), **options):
    return study.compare(task, methods, **{**SHORT, **options})


def changed(**fields):
    return dataclasses.replace(TASK, **fields)


IMPURE = np.random.default_rng(1)
BAD_TASKS = {
    "loss is a vector": (
        lambda: changed(loss=lambda p, b: b[1] @ p["b"].T),
        "expected a floating-point scalar",
    ),
    "loss is NaN": (lambda: changed(loss=lambda p, b: loss(p, b) / 0.0 * 0.0), "finite number"),
    "loss draws": (
        lambda: changed(loss=lambda p, b: loss(p, b) + IMPURE.normal()),
        "is not pure: two calls",
    ),
    "loss closes over the batch": (
        lambda: changed(loss=lambda p, b: loss(p, (X, Y))),
        "does not use its batch",
    ),
    "no kernel": (
        lambda: changed(
            init=lambda key: {"a": jnp.ones((6, 2))},
            loss=lambda p, b: jnp.mean((b[0] @ p["a"] - b[1]) ** 2),
        ),
        "has no kernel for feedback",
    ),
    "metric raises": (
        lambda: changed(metrics={"bad": lambda p, b: p["no such"]}),
        "the metric 'bad', on examples of train, raises KeyError",
    ),
    "metric is a vector": (
        lambda: changed(metrics={"bad": lambda p, b: b[1][:, 0]}),
        "the metric 'bad' is .*; expected a scalar",
    ),
    "lengths": (lambda: changed(train=(X, Y[:5])), "train has examples: 48 at .* 5 at"),
    "empty": (lambda: changed(test=(X[:0], Y[:0])), "test has examples: 0"),
    "no arrays": (lambda: changed(validation=(X, 3)), "validation has 3"),
    "no function": (lambda: changed(init=3), "init is 3; expected a function"),
}


@pytest.mark.parametrize("name", BAD_TASKS)
def test_refuses_a_bad_task_before_training(name, tmp_path):
    make, message = BAD_TASKS[name]
    with pytest.raises(ValueError, match=message):
        compare(make(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


FIXED = soap_jax.Fixed()
BAD_METHODS = {
    "none": ([], "expected at least one"),
    "twice": (["bp", "bp"], "each once"),
    "unknown": (["bp", "sing"], "'sing' is unknown; .* Did you mean 'sign'"),
    "no method": ({"bp": "bp", "mine": FIXED}, "the method 'mine' is Fixed"),
    "targets": (["bp", "drtp"], "the method 'drtp' sends .* the task names none; expected Task"),
    "taps": (["dfa"], "the method 'dfa' sends .* the task names none; expected Task"),
    "learns nothing": ({"m": study.Method(feedback_bar="kernel")}, "a feedback_bar but no rule"),
    "own loss": (
        {"m": study.Method(loss=lambda params, feedback, batch: params["no such"])},
        "the method 'm' does not fit the task: KeyError",
    ),
    "where": (
        {"m": study.Method(rule=FIXED, where="c")},
        "the method 'm' does not fit the task: .*matches no leaf",
    ),
}


@pytest.mark.parametrize("name", BAD_METHODS)
def test_refuses_bad_methods_before_training(name, tmp_path):
    methods, message = BAD_METHODS[name]
    with pytest.raises(ValueError, match=message):
        compare(methods=methods, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


BAD_OPTIONS = {
    "steps and epochs": ({"epochs": 2}, "expected one of the two"),
    "neither": ({"steps": None}, "expected one of the two"),
    "batch": ({"batch_size": 49}, "batch_size is 49; expected at most 48"),
    "rates": ({"learning_rates": (0.1, -0.1)}, "learning_rates has -0.1"),
    "no rates": ({"learning_rates": ()}, "learning_rates is empty"),
    "seeds": ({"seeds": [0, 0]}, "seeds has a value twice"),
    "periods": ({"periods": (0,)}, "periods has 0"),
    "select": (
        {"select": "validation_accuracy"},
        "select: 'validation_accuracy' is unknown; expected train_loss",
    ),
    "target": ({"target_loss": -1.0}, "target_loss is -1.0"),
    "params": ({"keep_params": True}, "out is None"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_refuses_bad_options(name):
    options, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        compare(**options)


def loss_with_an_exact_kernel(params, batch):
    x, y = batch
    hidden = jnp.tanh(jnp.tanh(x @ params["a"]) @ jnp.sin(params["n"]))
    return jnp.mean((hidden @ params["b"] - y) ** 2)


def init_with_an_exact_kernel(key):
    return init(key) | {"n": jnp.eye(5)}


def test_kernels_without_feedback_are_recorded_and_said(tmp_path):
    task = changed(init=init_with_an_exact_kernel, loss=loss_with_an_exact_kernel)
    compare(task, ["bp"], out=tmp_path)  # no feedback, so no warning
    said = "Errors pass through n by exact backprop"
    with pytest.warns(UserWarning, match=said) as warned:
        found = compare(task, ["fa"], out=tmp_path)
    assert len(warned) == 1
    assert found.record["feedback_kernels"] == ["b"]
    assert found.record["backprop_kernels"] == ["n"]
    assert said in " ".join(str(found).split())
    found.report(tmp_path / "page.html")
    assert said in (tmp_path / "page.html").read_text()
    del found.record["backprop_kernels"]  # as in an older record
    assert said not in " ".join(str(found).split())


@pytest.mark.parametrize(
    ("steps", "asked", "found"), [(40, 20, 20), (39, 20, 19), (3, 20, 3), (1000, 7, 7)]
)
def test_at_most_a_tenth_of_the_steps_is_dropped(steps, asked, found):
    assert trial.evaluations_of(steps, asked) == found


def test_a_claim_on_an_unknown_method_is_refused_before_training():
    claim = study.Ratio("fa", "bpp", within=(1, 2))
    with pytest.raises(ValueError, match="claim '1' names the method 'bpp'; expected one of this"):
        compare(claims=[claim])
    (finding,) = compare(claims=[study.Ratio("kp", "bp", within=(1, 2))]).judge()
    assert finding.verdict == "not testable here"
    metric = study.Difference("fa", metric="test_los", within=(-1, 1))
    with pytest.raises(ValueError, match=r"claim '1': metric: 'test_los' is unknown.*Did you mean"):
        compare(claims=[metric])


def test_columns_are_those_that_the_design_fixes():
    task = dataclasses.replace(TASK, metrics={"largest": largest})
    result = compare(task, ["bp", "sign"], periods=(1, 2))
    ends = ["validation_largest", "validation_loss", "test_largest", "test_loss"]
    runs = ["steps", "diverged", "steps_to_target", "train_loss"]
    assert set(result.runs) == {"method", "learning_rate", "seed", "period", *runs, *ends}
    assert len(result.runs) == 3 * 2 * 2
    measures = ["gradient_angle/a", "error_angle/a", "effective_learning_rate/a"]
    measures += ["weight_angle/b", "norm_ratio/b"]
    assert set(measures) <= set(result.evaluations)
    assert sorted(result.evaluations["step"].unique()) == [0, 4, 8]
    assert result.kernels == ["a", "b"]


def test_transport_at_every_update_is_backprop_run_for_run():
    methods = {"bp": "bp", "copy": study.Method(rule=soap_jax.Transport(period=1))}
    result = compare(methods=methods)
    bp, copy = (result.rows("losses", name)["train_loss"].tolist() for name in methods)
    np.testing.assert_array_equal(bp, copy)


def plain_losses(seed, rate, feedback_of):
    """The same training, written out."""
    key = jax.random.key(seed)
    init_key, feedback_key, order_key = jax.random.split(key, 3)
    params = init(init_key)
    feedback = feedback_of(feedback_key, params)
    keys = jax.random.split(order_key, 2)
    order = np.concatenate(
        [jax.random.permutation(k, np.arange(48))[:48].reshape(-1, 8) for k in keys]
    )
    losses = []
    for indices in order[:8]:
        batch = X[indices], Y[indices]
        losses.append(loss(params, batch))
        grads = jax.grad(soap_jax.with_feedback(loss))(params, feedback, batch)
        params = jax.tree.map(lambda w, g: w - rate * g, params, grads)
    return losses


@pytest.mark.parametrize("name", ["bp", "fa"])
def test_a_run_is_the_training_that_one_would_write(name):
    def feedback_of(key, params):
        if name == "bp":
            return None
        return soap_jax.init_feedback(key, params, where="b").feedback

    result = compare(methods=["bp", "fa"])
    for seed in (0, 1):
        rows = result.rows("losses", name, 0.2)
        (mine,) = rows[rows["seed"] == seed]["train_loss"]
        np.testing.assert_allclose(mine, plain_losses(seed, 0.2, feedback_of), rtol=1e-5)


def test_scaled_backprop_is_backprop_times_the_size_of_signs():
    def feedback_of(key, params):
        b = params["b"]
        return {"b": b * jnp.linalg.norm(jnp.sign(b)) / jnp.linalg.norm(b)}

    result = compare(methods=["bp", "bp_scaled", "bp_scaled_live", "frozen"])
    for name in ("bp_scaled", "bp_scaled_live"):
        (losses, _) = result.rows("losses", name, 0.2)["train_loss"]
        np.testing.assert_allclose(losses[:2], plain_losses(0, 0.2, feedback_of)[:2], rtol=1e-5)
    ratio = result.measured("norm_ratio/b", "bp_scaled", 0.2, end=True)
    start = result.measured("norm_ratio/b", "bp_scaled", 0.2, end=False)
    live = result.measured("norm_ratio/b", "bp_scaled_live", 0.2, end=True)
    np.testing.assert_allclose(ratio, start, rtol=1e-5)
    assert abs(live / start - 1).max() > 1e-4
    rates = result.measured("effective_learning_rate/a", "bp_scaled", 0.2, end=False)
    np.testing.assert_allclose(rates, 0.2 * start, rtol=1e-4)


def test_frozen_layers_do_not_learn_nor_decay(tmp_path):
    def decayed(rate):
        return optax.chain(optax.add_decayed_weights(0.1), optax.adam(rate))

    out = tmp_path / "out"
    result = compare(methods=["bp", "frozen"], optimizer=decayed, keep_params=True, out=out)
    start = init(jax.random.split(jax.random.key(1), 3)[0])
    frozen, free = (result.params(name, 0.2, 1) for name in ("frozen", "bp"))
    np.testing.assert_array_equal(frozen["a"], start["a"])
    assert abs(frozen["b"] - start["b"]).max() > 0 and abs(free["a"] - start["a"]).max() > 0


def test_results_do_not_depend_on_who_else_takes_part():
    alone, beside = compare(methods=["fa"]), compare(methods=["sign", "fa", "kp"])
    mine, theirs = (r.rows("losses", "fa")["train_loss"].tolist() for r in (alone, beside))
    np.testing.assert_array_equal(mine, theirs)


def test_diverged_runs_end_as_nan():
    result = compare(methods=["bp"], learning_rates=(0.1, 1e20), steps=8)
    wild = result.rows("runs", "bp", 1e20)
    assert wild["diverged"].all() and wild["test_loss"].isna().all()
    assert not result.rows("runs", "bp", 0.1)["diverged"].any()


def test_made_batches_and_schedules():
    def batch(key):
        x = jax.random.normal(key, (8, 6))
        return x, jnp.sin(x[:, :2])

    def optimizer(rate):
        return optax.adam(optax.cosine_decay_schedule(rate, 8))

    task = study.Task(init=init, loss=loss, train=batch, test=(X, Y))
    result = compare(task, ["bp", "fa"], optimizer=optimizer)
    assert result.protocol["select"] == "train_loss"
    assert result.runs["test_loss"].notna().all()
    with pytest.raises(ValueError, match="expected steps"):
        compare(task, epochs=1, steps=None)


def test_evaluation_in_batches_is_weighted_by_size():
    whole = trial.evaluate(TASK, init(jax.random.key(0)), None, (X, Y))
    parts = trial.evaluate(TASK, init(jax.random.key(0)), None, (X, Y), batch_size=7)
    np.testing.assert_allclose(parts["loss"], whole["loss"], rtol=1e-5)


def test_goes_on_where_it_stopped(tmp_path):
    class Stop(Exception):
        pass

    def stop(method, done, *rest):
        if method == "fa" and done:
            raise Stop

    out = tmp_path / "out"
    with pytest.raises(Stop):
        compare(out=out, on_progress=stop)
    with pytest.raises(ValueError, match="not finished"):
        study.load(out)
    seen = []
    broken = compare(out=out, on_progress=lambda *args: seen.append(args))
    assert {done for method, done, *_ in seen if method == "bp"} == {None}
    whole = compare()
    for table in ("runs", "evaluations"):
        assert getattr(broken, table).equals(getattr(whole, table)), table
    again = study.load(out)
    assert again.runs.equals(broken.runs) and again.record == broken.record


def test_methods_and_seeds_can_be_added(tmp_path):
    out = tmp_path / "out"
    compare(methods=["bp"], out=out)
    compare(methods=["bp", "fa"], out=out)
    with pytest.raises(ValueError, match="expected every method with every seed"):
        compare(methods=["fa"], seeds=3, out=out)
    trained = []
    grown = compare(seeds=3, out=out, on_progress=lambda m, done, *rest: trained.append((m, done)))
    assert ("bp", 4) in trained and ("bp", 6) in trained
    assert grown.runs.equals(compare(seeds=3).runs)
    assert compare(methods=["bp"], seeds=1, out=out).runs.equals(grown.runs)


OTHERS = {
    "rates": ({"learning_rates": (0.05, 0.3)}, "protocol.learning_rates"),
    "data": ({"task": changed(train=(X + 1, Y))}, "protocol.task.data.train"),
    "loss": ({"task": changed(loss=lambda p, b: 2 * loss(p, b))}, "protocol.task.loss"),
    "optimizer": ({"optimizer": optax.adam}, "protocol.optimizer: was sgd, is now adam"),
    "method": (
        {"methods": {"bp": "bp", "fa": study.Method(rule=soap_jax.SignSync())}},
        "the method fa",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_refuses_a_directory_with_other_results(name, tmp_path):
    options, message = OTHERS[name]
    out = tmp_path / "out"
    compare(out=out)
    with pytest.raises(ValueError, match=message):
        compare(out=out, **options)


def test_refuses_other_bounds(tmp_path):
    out = tmp_path / "out"
    first = compare(out=out, claims=[study.Ratio("fa", "bp", within=(0.5, 2.0))])
    assert not first.judge()[0].exploratory
    with pytest.raises(ValueError, match="the claims, whose bounds"):
        compare(out=out, claims=[study.Ratio("fa", "bp", within=(0.1, 9.0))])
    moved = first.judge([study.Ratio("fa", "bp", within=(0.1, 9.0))])
    assert moved[0].exploratory


def test_refuses_results_of_another_version(tmp_path):
    out = tmp_path / "out"
    compare(out=out)
    record = json.loads((out / "study.json").read_text())
    record["versions"]["jax"] = "0.0.1"
    (out / "study.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"versions\.jax: was 0\.0\.1"):
        compare(seeds=3, out=out)
    record["format"] = 2
    (out / "study.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="format 2"):
        study.load(out)
    (out / "study.json").write_text("{}")
    with pytest.raises(ValueError, match="not the record"):
        study.load(out)


def test_extends_the_grid_for_all_methods(tmp_path):
    rates = {"learning_rates": (0.001, 0.002, 0.004), "out": tmp_path / "out"}
    result = compare(extend=2, **rates)
    assert result.rates == (0.001, 0.002, 0.004, 0.008, 0.016)
    assert result.record["extended"] == [0.008, 0.016]
    assert result.protocol["learning_rates"] == [0.001, 0.002, 0.004]
    assert compare(**rates).runs.equals(result.runs)


def test_leaves_the_settings_of_jax_alone():
    before = {name: jax.config.values[name] for name in jax.config.values}
    compare()
    assert before == {name: jax.config.values[name] for name in jax.config.values}


def test_the_last_kernel_alone_learns_with_learnt_feedback(tmp_path):
    learnt = study.Method(rule=soap_jax.Fixed(), feedback_bar="kernel", last_only=True)
    result = compare(methods={"m": learnt}, keep_params=True, out=tmp_path / "out")
    start = init(jax.random.split(jax.random.key(0), 3)[0])
    params = result.params("m", 0.2, 0)
    np.testing.assert_array_equal(params["a"], start["a"])
    assert abs(params["b"] - start["b"]).max() > 0
    moved = result.measured("weight_angle/b", "m", 0.2, end=True)
    assert abs(moved - result.measured("weight_angle/b", "m", 0.2, end=False)).max() > 0.01


def test_the_same_call_again_writes_nothing(tmp_path):
    out = tmp_path / "out"
    first = compare(out=out, learning_rates=(0.001, 0.002, 0.004), extend=1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    again = compare(out=out, learning_rates=(0.001, 0.002, 0.004), extend=1)
    assert again.runs.equals(first.runs) and again.record == first.record
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not (out / "progress.json").exists()


@pytest.mark.parametrize("more", [{"rule": FIXED}, {"loss": len}, {"where": "*"}])
def test_direct_feedback_takes_the_place_of_other_feedback(more):
    with pytest.raises(ValueError, match="a method has direct with"):
        study.Method(direct="exact", **more)
    with pytest.raises(ValueError, match="a method has taps without direct"):
        study.Method(taps=("h",))


def test_the_batch_size_of_made_batches_is_theirs():
    def train(key):
        return jax.random.normal(key, (6, 2))

    task = study.Task(
        init=lambda key: {"a": jnp.eye(2), "b": jnp.ones((2, 1))},
        loss=lambda params, x: jnp.mean((x @ params["a"] @ params["b"]) ** 2),
        train=train,
    )
    found = study.compare(task, ["bp"], learning_rates=(0.1,), seeds=1, steps=2)
    assert found.protocol["batch_size"] == 6
