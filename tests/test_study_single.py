"""One model in training: as in the study, stopped and resumed bit for bit, loaded again."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pandas as pd
import pytest
import study_processes as processes

from soap_jax import data
from soap_jax.study import compare, files, preset, single
from soap_jax.study.preset import TrainConfig

TINY = {"hidden": (7,), "epochs": 5, "checkpoint_every": 2, "keep": 2, "period": 3}
ARGS = ["--hidden=7", "--period=3", "--keep=2", "--method=sign_redraw", "--optimizer=momentum"]
SCRIPT = [sys.executable, "-W", "error", "-c", processes.STUDY, "train"]


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def train(path, digits, *, until=None, **options):
    """Trains a tiny network; `until` stops it after that epoch. Returns what train.json says."""

    def on_epoch(row):
        if row["epoch"] == until:
            raise KeyboardInterrupt

    config = TrainConfig(**TINY | options)
    if until is None:
        return single.train(path, config, digits)
    with pytest.raises(KeyboardInterrupt):
        single.train(path, config, digits, on_epoch=on_epoch)
    return single.read_record(path, config)


def curves_of(path):
    return pd.read_parquet(path / "curves.parquet")


def leaves(path):
    """All arrays of the last checkpoint."""
    return list(map(np.asarray, jax.tree.leaves(single.load(path).state)))


def assert_same(path, other):
    curves, others = map(curves_of, (path, other))
    pd.testing.assert_frame_equal(curves, others, check_exact=True)
    assert (path / "curves.csv").read_bytes() == (other / "curves.csv").read_bytes()
    pairs = list(zip(leaves(path), leaves(other), strict=True))
    assert len(pairs) >= 5
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours, theirs, strict=True)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A finished training, not to be changed: copy it."""
    path = tmp_path_factory.mktemp("trained")
    train(path, digits, method="sign_preserve")
    return path


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.mark.parametrize(
    ("method", "model"), [("sign_preserve", "mlp"), ("frozen", "mlp"), ("fa", "conv")]
)
def test_losses_are_those_of_the_studys_run(method, model, digits, tmp_path):
    options = {"method": method, "model": model, "channels": (3, 4), "seed": 3, "epochs": 3}
    train(tmp_path, digits, **options)
    curves = curves_of(tmp_path)
    study = TrainConfig(**TINY | options).as_study()
    arguments = preset.comparison_arguments(study, digits)
    found = compare(**arguments | {"seeds": [3], "evaluations": 3, "claims": ()})
    losses = np.asarray(found.losses["train_loss"][0], float).reshape(3, -1).mean(1)
    np.testing.assert_allclose(curves["train_loss"][1:], losses, rtol=1e-5)
    for name in found.evaluations.columns.intersection(curves.columns[3:]):
        # measured by another program, which rounds otherwise
        of_study = found.evaluations[name]
        np.testing.assert_allclose(curves[name], of_study, rtol=1e-3, err_msg=name)


def test_the_order_of_an_epoch_does_not_depend_on_how_many_there_are():
    few, many = (jax.random.split(jax.random.key(0), num) for num in (3, 50))
    np.testing.assert_array_equal(*(jax.random.key_data(keys[:3]) for keys in (few, many)))


def test_curves_have_a_row_per_epoch_and_all_measurements(trained):
    curves = curves_of(trained)
    assert list(curves["epoch"]) == [0, 1, 2, 3, 4, 5]
    assert list(curves["step"]) == [17 * epoch for epoch in range(6)]
    first = ["epoch", "step", "train_loss", "validation_loss", "validation_accuracy"]
    measured = ("weight_angle/Dense_1", "norm_ratio/Dense_1", "error_angle/Dense_0")
    measured += ("gradient_angle/Dense_0", "effective_learning_rate/Dense_0")
    assert list(curves)[:5] == first
    assert set(list(curves)[5:]) == {f"{name}/kernel" for name in measured}
    assert curves[1:].notna().all(axis=None) and np.isnan(curves["train_loss"][0])
    pd.testing.assert_frame_equal(pd.read_csv(trained / "curves.csv"), curves)
    assert curves["validation_loss"].iloc[-1] < curves["validation_loss"][0]


def test_train_json_says_how_it_was_trained_and_what_came_of_it(trained):
    facts = json.loads((trained / "train.json").read_text())
    assert facts["config"]["hidden"] == [7] and facts["data_source"].startswith("scikit-learn")
    assert facts["feedback"] == "SignSync(period=1, magnitude='preserve')"
    assert {"soap_jax", "jax", "orbax-checkpoint"} <= set(facts["versions"])
    assert facts["device"]["platform"] == jax.default_backend()
    assert facts["result"]["epochs"] == 5 and 0.3 < facts["result"]["test_accuracy"] < 1


def test_a_trained_model_is_loaded_for_use_in_python(trained, digits):
    model = single.load(trained)
    logits = model.apply_fn(model.params, model.feedback, digits.test.images)
    accuracy = float((logits.argmax(-1) == digits.test.labels).mean())
    facts = json.loads((trained / "train.json").read_text())
    assert accuracy == pytest.approx(facts["result"]["test_accuracy"])
    assert (model.epoch, model.config.method) == (5, "sign_preserve")
    assert int(model.state.step) == 85
    kernel, feedback = (tree["Dense_1"]["kernel"] for tree in (model.params, model.feedback))
    assert kernel.shape == feedback.shape == (7, 10)
    assert int(single.load(trained, epoch=4).state.step) == 68


def test_the_last_checkpoints_are_kept(trained):
    assert single.checkpoint_epochs(trained) == [4, 5]


@pytest.mark.parametrize(
    ("method", "optimizer", "until"),
    [
        ("sign_redraw", "momentum", 3),
        ("bp", "sgd", 1),
        *(
            pytest.param(*case, 3, marks=pytest.mark.slow)
            for case in (
                ("weight_mirror", "sgd"),
                ("kp", "momentum"),
                ("information_alignment", "adam"),
                ("dfa", "sgd"),
                ("drtp", "adam"),
                ("activity_propagation", "sgd"),
            )
        ),
    ],
)
def test_a_stopped_training_ends_as_if_it_had_not_stopped(
    method, optimizer, until, digits, tmp_path
):
    """Stopped after a checkpoint at epoch 2, and before any."""
    options = {"method": method, "optimizer": optimizer, "learning_rate": 0.01}
    train(tmp_path / "whole", digits, **options)
    stopped = train(tmp_path / "stopped", digits, until=until, **options)
    assert (
        single.checkpoint_epochs(tmp_path / "stopped") == [2] * (until > 2)
        and stopped["result"] is None
    )
    assert train(tmp_path / "stopped", digits, **options)["result"]["epochs"] == 5
    assert_same(tmp_path / "stopped", tmp_path / "whole")


def test_more_epochs_extend_a_finished_training(copy, digits, tmp_path):
    whole = train(tmp_path / "whole", digits, method="sign_preserve", epochs=7)
    longer = train(copy, digits, method="sign_preserve", epochs=7)
    assert_same(copy, tmp_path / "whole")
    assert longer["result"] == whole["result"]
    assert longer["config"]["epochs"] == 7 and longer["resumed"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 4}, r"\(epochs: was 5, is now 4\)"),
        (
            {"epochs": 9, "seed": 1, "hidden": (8,)},
            r"hidden: was \[7\], is now \[8\]; seed: was 0, is now 1",
        ),
        ({"keep": 9}, r"keep: was 2, is now 9"),
        ({"method": "bp"}, r"method: was sign_preserve, is now bp"),
    ],
)
def test_other_options_are_refused(options, message, trained):
    config = TrainConfig(**TINY | {"method": "sign_preserve"} | options)
    with pytest.raises(ValueError, match=message):
        single.read_record(trained, config)


def test_other_data_are_refused(copy, digits):
    with pytest.raises(ValueError, match=r"other settings \(data_source: was .*, is now others\)"):
        train(copy, digits._replace(source="others"), method="sign_preserve", epochs=6)


def test_without_partitionable_keys_training_cannot_be_extended(tmp_path, digits):
    """The keys of the epochs would be others."""
    with jax.threefry_partitionable(False):
        train(tmp_path, digits, until=0)
        with pytest.raises(ValueError, match="jax_threefry_partitionable is off"):
            train(tmp_path, digits, epochs=6)
    with pytest.raises(ValueError, match=r"jax_threefry_partitionable: was False, is now True"):
        train(tmp_path, digits)


def test_more_steps_than_an_int32_counts_are_refused(digits, tmp_path):
    many = digits._replace(
        train=data.Split(np.zeros((5000, 8, 8, 1), np.uint8), np.arange(5000) % 10)
    )
    with pytest.raises(ValueError, match="epochs is 1000000; expected at most"):
        train(tmp_path, many, epochs=10**6, batch_size=1)


def test_other_versions_are_noted_where_training_goes_on(copy, digits):
    facts = json.loads((copy / "train.json").read_text())
    facts["versions"]["jax"] = "0.0.1"
    (copy / "train.json").write_text(json.dumps(facts))
    facts = train(copy, digits, method="sign_preserve", epochs=6)
    assert facts["versions"]["jax"] == "0.0.1"
    (resumed,) = facts["resumed"]
    assert (resumed["after_epoch"], resumed["versions"]["jax"]) == (5, jax.__version__)


def alter_arrays(step):
    """A byte in the largest file, which Orbax does not notice."""
    file = max((f for f in (step / "state").rglob("*") if f.is_file()), key=os.path.getsize)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def drop_arrays(step):
    shutil.rmtree(step / "state")


def halve_progress(step):
    file = step / "progress" / "metadata"
    os.truncate(file, file.stat().st_size // 2)


def alter_curves(step):
    file = step / "progress" / "metadata"
    file.write_text(file.read_text().replace("[0, 1,", "[0, 2,", 1))


@pytest.mark.parametrize("damage", [alter_arrays, drop_arrays, halve_progress, alter_curves])
def test_a_damaged_checkpoint_is_named(damage, copy, capfd):
    damage(copy / "checkpoints" / "5")
    with pytest.raises(
        ValueError, match=r"checkpoints/5 cannot be read.*resumes from the checkpoint of ep"
    ):
        single.load(copy)
    assert single.load(copy, epoch=4).epoch == 4
    assert capfd.readouterr() == ("", "")


def test_training_goes_on_before_a_damaged_checkpoint_that_was_deleted(copy, trained, digits):
    shutil.rmtree(copy / "checkpoints" / "5")
    (copy / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()  # killed while it was written
    train(copy, digits, method="sign_preserve")
    assert_same(copy, trained)


def test_a_method_that_another_version_trained_otherwise_is_refused(copy, digits):
    facts = json.loads((copy / "train.json").read_text())
    facts["feedback"] = "SignSync(magnitude='norm')"
    (copy / "train.json").write_text(json.dumps(facts))
    with pytest.raises(
        ValueError, match=r"other settings \(feedback: was SignSync\(magnitude='norm'"
    ):
        train(copy, digits, method="sign_preserve", epochs=6)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of late writes
def test_a_full_disk_leaves_earlier_checkpoints_readable(digits, tmp_path, capfd):
    """A limit on the size of files stands in for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_epoch(row):
        if row["epoch"] == 3:
            while not single.checkpoint_epochs(tmp_path):  # it is written meanwhile
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    options = {"hidden": (256,), "method": "bp", "epochs": 6}
    try:
        with pytest.raises(ValueError, match=r"cannot write to .*: File too large.*of epoch 2 is"):
            single.train(tmp_path, TrainConfig(**TINY | options), digits, on_epoch=on_epoch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert single.load(tmp_path).epoch == 2
    assert capfd.readouterr() == ("", "")
    train(tmp_path, digits, **options)
    assert single.checkpoint_epochs(tmp_path) == [4, 6]


def test_a_diverged_training_goes_on_and_says_so(digits, tmp_path):
    result = train(tmp_path, digits, method="bp", learning_rate=3e38)["result"]
    assert result["diverged"] and result["test_loss"] is None and result["epochs"] == 5
    assert (tmp_path / "curves.csv").read_text().splitlines()[-1].startswith("5,85,,,")
    curves = curves_of(tmp_path)
    assert len(curves) == 6 and np.isnan(curves["validation_loss"].iloc[-1])
    png, pdf = tmp_path / "curves.png", tmp_path / "curves.pdf"
    assert png.read_bytes()[:4] == b"\x89PNG" and pdf.read_bytes()[:4] == b"%PDF"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sgn"}, "method: 'sgn' is unknown; expected bp, fa.* Did you mean 'sign'"),
        (
            {"learning_rate": float("nan")},
            "learning_rates has nan at index 0; expected positive, finite",
        ),
        ({"seed": -1}, "seeds has -1 at index 0; expected integers from 0"),
        ({"period": 0}, "period is 0; expected at least 1"),
        ({"learning_rate": 0.0}, "learning_rates has 0.0"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0; expected at least 1"),
        ({"dataset": "minst"}, "minst"),
        ({"epochs": 0}, "epochs is 0"),
    ],
)
def test_a_value_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_a_batch_of_more_than_all_examples_is_refused(digits, tmp_path):
    with pytest.raises(ValueError, match="batch_size is 2000; expected at most 1151"):
        train(tmp_path, digits, batch_size=2000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no model: there is no train.json"),
        ("{", "train.json is not the record of a training"),
        (
            '{"format": 9, "versions": {"soap_jax": "7"}, "config": {}}',
            "format 9, made by soap_jax",
        ),
        ('{"format": 2, "versions": {"soap_jax": "7"}, "config": {"x": 1}}', "not the record"),
    ],
)
def test_a_directory_that_holds_no_model_is_named(content, message, tmp_path):
    if content:
        (tmp_path / "train.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        single.load(tmp_path)


def test_checkpoints_without_their_description_are_refused(copy):
    (copy / "train.json").unlink()
    with pytest.raises(ValueError, match=r"holds checkpoints, but not train\.json"):
        single.read_record(copy, TrainConfig())


def test_an_epoch_without_a_checkpoint_is_named(trained):
    with pytest.raises(ValueError, match="no checkpoint of epoch 3; it has those of epochs 4, 5"):
        single.load(trained, epoch=3)


@contextlib.contextmanager
def started(cwd, *args):
    """The command, in a process of its own that does not outlive the test."""
    command = [*SCRIPT, *ARGS, *args]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    cache = {"JAX_COMPILATION_CACHE_DIR": str(cwd / "cache")}  # to start faster
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with subprocess.Popen(command, cwd=cwd, env=os.environ | cache, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process, path):
    while not path.exists() and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.slow
def test_the_command_survives_kill_and_ctrl_c_bit_for_bit(digits, tmp_path):
    options = {"method": "sign_redraw", "optimizer": "momentum", "epochs": 40}
    whole = tmp_path / "whole"
    train(whole, digits, **options)
    args = ("--epochs=40", "--checkpoint-every=2", "--out=out")
    out = tmp_path / "out"

    with started(tmp_path, *args) as killed:
        wait_for(killed, out / "checkpoints" / "4")
        with pytest.raises(ValueError, match="another process is writing"), files.locked(out):
            pass
        time.sleep(random.random() / 4)
        killed.kill()
        killed.communicate()
    before = single.checkpoint_epochs(out)[-1]
    assert killed.returncode == -signal.SIGKILL and 4 <= before < 40

    with started(tmp_path, *args) as stopped:
        wait_for(stopped, out / "checkpoints" / str(before + 2))
        stopped.send_signal(signal.SIGINT)
        printed, errors = stopped.communicate(timeout=60)
    assert (stopped.returncode, errors) == (130, "")
    assert f"Going on from the checkpoint of epoch {before}" in printed
    assert "gradient angle" in printed
    after = single.checkpoint_epochs(out)[-1]
    assert before < after < 40
    assert f"checkpoint of epoch {after} kept in out" in " ".join(printed.split())

    train(out, digits, **options)
    assert_same(out, whole)
    with started(tmp_path, *args) as again:
        printed, errors = again.communicate(timeout=60)
    assert (again.returncode, errors) == (0, "")
    assert "out already holds this model" in printed and "Test accuracy" in printed
    assert (out / "curves.png").exists() and (out / "curves.pdf").exists()


def test_the_command_refuses_bad_input_in_one_line(tmp_path):
    with started(tmp_path, "--activation=tan") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    assert "tanh" in errors and list(tmp_path.iterdir()) == []
