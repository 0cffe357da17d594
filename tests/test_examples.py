"""The examples run, small, and show what their text says; each stays short enough to be read."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import soap_jax

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))

for module in ("matplotlib", "sklearn"):
    pytest.importorskip(module, reason=f"the examples need {module}: the extra `study`")


def load(name):
    """Imports an example by its path; its main() does not run."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_picture(path):
    """A PNG of at least 600 x 400 pixels that shows something in several colours."""
    from matplotlib import image

    pixels = image.imread(path)[..., :3]
    assert pixels.shape[0] >= 400 and pixels.shape[1] >= 600
    assert len(np.unique(np.round(pixels * 15).reshape(-1, 3), axis=0)) > 10
    assert 0.02 < np.mean(np.any(pixels < 0.9, axis=-1)) < 0.5  # neither blank nor a blot


def test_all_examples_are_tested():
    loops = {"linen_loop", "nnx_loop", "sign_sync_sweep", "bump_regression"}
    transformed = {"conv_batchnorm", "equinox_mlp", "lstm_sequences", "transformer"}
    compared = {"compare_conv", "compare_regression", "my_task"}
    recipes = {"federated", "private_feedback"}
    assert set(NAMES) == loops | transformed | compared | recipes | {
        "new_rule",
        "activity_propagation",
        "direct_feedback",
        "rflo",
    }


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_short_and_say_how_to_run_them(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) < 120
    assert f"{'soap-jax study' if name == 'my_task' else 'python'} examples/{name}.py" in text
    assert not re.search(r"\.value\b", text)  # on its way out of NNX


def count_in_log(caplog, message, run):
    """Runs, and counts the lines of JAX's log that hold the message."""
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        out = run()
    return out, sum(message in line for line in caplog.messages)


@pytest.mark.parametrize("name", ["linen_loop", "nnx_loop"])
def test_loops_learn_measure_alignment_and_trace_once(name, capsys, caplog):
    history, traced = count_in_log(
        caplog,
        "Finished tracing train_step",
        lambda: load(name).main(steps=100, report_every=50),
    )
    assert traced == 1
    assert list(history) == [0, 50, 100]
    first, last = history[0], history[100]
    assert first["accuracy"] < 0.3
    assert last["accuracy"] > 0.8
    # Random feedback before the first sync; Gaussian W has 37.1 degrees to its own signs.
    np.testing.assert_allclose(first["weight_angle"], 90, atol=8)
    assert all(20 < angle < 40 for angle in last["weight_angle"])
    np.testing.assert_allclose(first["gradient_angle"], 90, atol=20)
    assert all(0 < angle < 50 for angle in last["gradient_angle"])
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize("name", ["linen_loop", "nnx_loop"])
def test_loops_compile_their_step_once(name, caplog):
    message = "Finished XLA compilation of jit(train_step"
    _, compiled = count_in_log(caplog, message, lambda: load(name).main(steps=2, report_every=9))
    assert compiled == 1


def test_loop_donates_its_state():
    example = load("linen_loop")
    states = []
    train_step = example.train_step

    def spy(state, *batch):
        states.append(state)
        return train_step(state, *batch)

    example.train_step = spy
    example.main(steps=12, report_every=1000)
    kernels = [state[1].feedback["second"]["kernel"] for state in states]
    assert len(kernels) == 13
    assert all(kernel.is_deleted() for kernel in kernels)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(states[-1][0]))


def test_bump_is_fitted_by_every_method(tmp_path, capsys):
    path = tmp_path / "new" / "bump.png"
    losses = load("bump_regression").main(out=path, steps=1000)
    assert_picture(path)
    for name, curve in losses.items():
        assert curve.shape == (1000,), name
        assert curve[0] == losses["backprop"][0], "methods of one seed start alike"
        assert curve[-1] < 0.02 < 0.2 < curve[0], name
    at_100 = {name: float(curve[100]) for name, curve in losses.items()}
    assert at_100["sign, raw"] < at_100["backprop"] < at_100["sign, |B0|"]
    assert at_100["backprop"] < at_100["FA"]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(losses)


def test_sweep_shows_the_gain_of_raw_signs_and_none_of_norm_matched_ones(tmp_path, capsys):
    path = tmp_path / "new" / "sweep.png"
    updates = load("sign_sync_sweep").main(out=path, rates=(0.1, 0.5), seeds=2, epochs=8)
    assert_picture(path)
    assert all(steps.shape == (2, 2) for steps in updates.values())
    small = {name: steps[0] for name, steps in updates.items()}  # per seed: runs are paired
    assert np.all(small["sign, raw"] < 0.5 * small["backprop"])
    assert np.all(small["sign, norm"] > small["backprop"])
    assert np.all(small["sign, |B0|"] > small["backprop"])
    assert np.all(small["FA"] > small["sign, norm"])
    large = {name: steps[1] for name, steps in updates.items()}
    assert np.all(large["sign, raw"] > 2 * large["backprop"])  # the same amplification, harmful
    factors = capsys.readouterr().out.splitlines()[-1].removeprefix("hidden rate x").split()
    assert factors[0] == "1.0"
    assert 8 < float(factors[2]) < 10.5  # 11.5 cos(37.1 degrees) = 9.2


def test_updates_to_a_target_are_counted_by_hand():
    updates_to = load("sign_sync_sweep").updates_to
    losses = np.array([[4.0, 3.0, 1.0, 0.0], [4.0, 4.0, 4.0, 4.0]])
    # Means of two: 3.5, 2, 0.5. The third pair is complete after four updates.
    np.testing.assert_array_equal(updates_to(1.0, losses, window=2), [4, np.nan])


def table_of(out):
    """The first two columns of a printed explanation."""
    rows = (line.split("  ") for line in out.splitlines() if line.startswith(" "))
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {row[0]: row[1] for row in cells if len(row) > 2 and row[0] != "param"}


def test_equinox_model_learns_best_by_backprop_then_signs_then_fa(capsys):
    pytest.importorskip("equinox")
    accuracy = load("equinox_mlp").main(seeds=1, epochs=10)
    out = capsys.readouterr().out
    assert table_of(out) == {
        "layers/0/weight": "no effect",
        "layers/1/weight": "feedback",
        "layers/2/weight": "feedback",
    }
    assert all(curves.shape == (1, 10) for curves in accuracy.values())
    last = {name: curves[:, -3:].mean() for name, curves in accuracy.items()}
    assert 0.85 < last["FA"] < last["sign sync"] < last["backprop"]


def test_equinox_loop_without_feedback_is_backprop():
    pytest.importorskip("equinox")
    changed, plain = load("equinox_mlp"), load("equinox_mlp")
    plain.loss_fa = lambda model, feedback, *batch: plain.loss(model, *batch)
    a, b = (example.main(1, 1, methods=("backprop",))["backprop"] for example in (changed, plain))
    np.testing.assert_array_equal(a, b)


def test_lstm_gains_nothing_from_random_recurrent_feedback_but_much_from_signs(capsys):
    methods = ("sign sync", "FA", "cell only")
    accuracy = load("lstm_sequences").main(seeds=1, epochs=3, methods=methods)
    effects = table_of(capsys.readouterr().out)
    assert effects.pop("readout/kernel") == "feedback"
    assert effects == {
        f"cell/{side}{gate}/kernel": effect
        for gate in "ifgo"
        for side, effect in {"h": "feedback", "i": "no effect"}.items()
    }
    last = {name: curves[:, -1] for name, curves in accuracy.items()}
    for worse in ("FA", "cell only"):
        assert np.all(last[worse] > 0.6)
        assert np.all(last[worse] + 0.02 < last["sign sync"])
    assert abs(last["FA"].mean() - last["cell only"].mean()) < 0.03


def test_attention_learns_by_feedback_alignment_and_not_without(capsys):
    accuracy = load("transformer").main(steps=160, methods=("FA", "no credit"))
    effects = table_of(capsys.readouterr().out)
    assert {effects[name] for name in effects if "scale" not in name} == {"feedback"}
    (fa_80, fa_160), (_, rest_160) = (accuracy[name][0] for name in ("FA", "no credit"))
    assert fa_80 < 0.5
    assert rest_160 < 0.4 < 0.75 < fa_160


def test_signs_in_the_dense_layers_help_a_conv_net(capsys):
    accuracy = load("conv_batchnorm").main(2, 1, methods=("signs in dense", "FA"))
    effects = table_of(capsys.readouterr().out)
    assert effects.pop("Conv_0/kernel") == "no effect"
    effects = {name: effect for name, effect in effects.items() if "scale" not in name}
    assert sorted(effects) == ["Conv_1/kernel", "Conv_2/kernel", "Dense_0/kernel", "Dense_1/kernel"]
    assert set(effects.values()) == {"feedback"}
    assert np.all(accuracy["signs in dense"] > accuracy["FA"] + 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_examples_run_in_full_as_programs(name, tmp_path):
    if "equinox" in name:
        pytest.importorskip("equinox")
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "nan" not in done.stdout.replace("(nan: more", "")
    if "figure.png" in (EXAMPLES / f"{name}.py").read_text():
        assert_picture(tmp_path / "results" / f"{name}.png")


def test_the_template_of_a_rule_aligns_feedback_better_than_none(capsys):
    found = load("new_rule").main(epochs=5)
    (fixed, fixed_angle), (mine, my_angle) = found["Fixed"], found["SignTransport"]
    assert min(fixed, mine) > 0.85
    assert my_angle < 40 < fixed_angle
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_direct_feedback_teaches_hidden_layers_by_errors_that_come_to_point_downhill(capsys):
    accuracy, angles = load("direct_feedback").main(seeds=1, epochs=3)
    assert accuracy["frozen"] + 0.03 < accuracy["DFA"] < accuracy["backprop"]
    start, end = angles[0]
    np.testing.assert_allclose(start, 90, atol=6)  # 85 to 94 over ten seeds
    assert 85 > end[0] > end[1] > end[2] > 40
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_rflo_learns_as_backprop_through_time_does_and_not_by_the_readout_alone(capsys):
    losses = load("rflo").main(trials=400)
    assert len({float(curve[0]) for curve in losses.values()}) <= 2  # summed in another order
    last = {name: float(curve[-1]) for name, curve in losses.items()}
    assert 2 * max(last["RFLO"], last["backprop"]) < last["readout only"] < 0.3
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_federated_clients_gain_by_the_global_weights_as_feedback(capsys):
    right = load("federated").main(seeds=1, rounds=6)
    assert np.all(right["global weights"] > right["backprop"])
    assert np.all(right["backprop"] > 0.4)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_private_gradients_of_dfa_learn_and_noise_costs(capsys):
    right = load("private_feedback").main(seeds=1, steps=40, noises=(0.0, 6.0))
    assert len(capsys.readouterr().out.splitlines()) == len(right) == 4
    for method in ("backprop", "DFA"):
        assert right[method, 0.0] > 0.7
        assert 0.15 < right[method, 6.0] < right[method, 0.0] - 0.1


def test_direct_feedback_by_names_is_that_by_hand():
    example = load("direct_feedback")
    x, labels = jnp.ones((5, 64)) * jnp.arange(5.0)[:, None], jnp.arange(5)
    params = example.Net().init(jax.random.key(0), x)["params"]
    projections = soap_jax.init_projections(jax.random.key(1), example.loss_dfa, params, x, labels)
    by_names, by_hand = (
        jax.jit(jax.grad(f))(params, projections, x, labels)
        for f in (example.loss_dfa, example.loss_by_hand)
    )
    jax.tree.map(np.testing.assert_array_equal, by_names, by_hand)


def test_activity_propagation_is_slower_than_backprop_and_no_better_for_longer_moves(capsys):
    losses = load("activity_propagation").main(steps=300, epochs=4)
    for curves in losses.values():
        assert all(curve[0] == curves["backprop"][0] for curve in curves.values())
    bump, digits = ({m: c[-20:].mean() for m, c in losses[k].items()} for k in ("bump", "digits"))
    assert bump["activity"] > 5 * bump["backprop"]
    assert digits["resized"] < digits["rate x 1000"] < digits["activity"] - 0.2
    assert len(capsys.readouterr().out.splitlines()) == 11


@pytest.mark.slow
def test_compare_conv_places_a_rule_of_ones_own_among_the_librarys():
    result = load("compare_conv").main(seeds=2, epochs=2)
    assert list(result.summary().method) == ["bp", "fa", "signs", "flip"]
    rows = result.evaluations.query("method == 'flip'").groupby("step")
    angles = rows["weight_angle/Dense_0/kernel"].mean()
    assert angles.iloc[-1] < angles.iloc[0] - 10


@pytest.mark.slow
def test_compare_regression_judges_its_claims(tmp_path):
    result = load("compare_regression").main(seeds=3, report=tmp_path / "report.html")
    fa, kp = result.judge()
    assert fa.verdict != "fails" and kp.verdict != "fails"
    page = (tmp_path / "report.html").read_text()
    assert "Learned feedback helps" in page and "DFA" in page


def test_my_task_is_a_task():
    task = load("my_task").task
    assert task.examples == {"train": 1138, "validation": 300, "test": 359}
    params = task.init(jax.random.key(0))
    assert np.isfinite(task.loss(params, task.train))
