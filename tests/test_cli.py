"""The command line, as a user runs it: in a process of its own."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from soap_jax.study import statistics

SMALL = [
    "--methods=bp,fa,sign,frozen",
    "--learning-rates=0.1,1e30",
    "--seeds=2",
    "--epochs=1",
    "--hidden=8",
    "--evaluations=2",
    "--activation=relu",
    "--period=1,3",
    "--weight-decay=1e-9",
]

TASK = """
import jax, jax.numpy as jnp
from soap_jax import Fixed, study

x = jax.random.normal(jax.random.key(0), (64, 4))

def init(key):
    return {"in": jax.random.normal(key, (4, 6)) / 2, "out": jax.random.normal(key, (6, 1)) / 2}

def loss(params, batch):
    return jnp.mean((jnp.tanh(batch @ params["in"]) @ params["out"] - batch[:, :1]) ** 2)

task = study.Task(init=init, loss=loss, train=x)
methods = {"bp": "bp", "mine": study.Method(rule=Fixed(), label="my own")}
learning_rates, steps, seeds, batch_size = [0.1, 0.2], 40, 3, 16
claims = [study.Ratio("mine", "bp", within=(0.5, 2.0))]
"""


def soap_jax(*args, cwd, script="from soap_jax.cli import main; main()", **env):
    command = [sys.executable, "-W", "error", "-c", script, *args]
    env = os.environ | env
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=300)


@pytest.fixture(scope="module")
def small_study(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("study")
    return cwd, soap_jax("study", *SMALL, cwd=cwd)


def test_a_study_prints_a_table_and_writes_results_and_figures(small_study):
    cwd, done = small_study
    assert done.returncode == 0, done.stderr
    assert "FA, fixed feedback" in done.stdout and "Report: results/digits" in done.stdout
    assert "not testable here" in done.stdout
    said = " ".join(done.stdout.split())
    assert "mlp 64-8-10, relu, sgd with weight decay 1e-09. 20 runs of 16 steps, 4 methods" in said
    out = cwd / "results" / "digits"
    assert {path.name for path in out.iterdir()} - {"mediation.csv"} == {
        ".lock",
        "study.json",
        "evaluations.csv",
        "evaluations.parquet",
        "runs.csv",
        "runs.parquet",
        "losses.parquet",
        "summary.csv",
        "claims.csv",
        "report.html",
        "figures",
    }
    facts = json.loads((out / "study.json").read_text())
    assert facts["config"]["hidden"] == [8] and facts["command"].startswith("soap-jax study --meth")
    assert facts["data_source"].startswith("scikit-learn") and facts["title"] == "digits"
    assert len(pd.read_csv(out / "runs.csv")) == (3 + 2) * 2 * 2  # signs at two periods


def test_csv_and_parquet_are_the_same_tables(small_study):
    out = small_study[0] / "results" / "digits"
    for name in ("runs", "evaluations"):
        csv = pd.read_csv(out / f"{name}.csv")
        pd.testing.assert_frame_equal(
            csv, pd.read_parquet(out / f"{name}.parquet"), rtol=1e-14, atol=0
        )


def test_report_draws_the_same_conclusions_again_without_training(small_study):
    cwd, first = small_study
    out = cwd / "results" / "digits"
    made = ("summary.csv", "claims.csv", "report.html")
    before = {name: (out / name).read_bytes() for name in made}
    for name in made:
        (out / name).unlink()
    again = soap_jax("report", str(out), cwd=cwd)
    assert again.returncode == 0, again.stderr
    assert {name: (out / name).read_bytes() for name in made} == before
    verdicts = first.stdout[first.stdout.index("Claims") : first.stdout.index("Report:")]
    assert verdicts in again.stdout


def test_report_at_another_target_counts_steps_to_it_and_leaves_the_first_report(small_study):
    cwd, _ = small_study
    out = cwd / "results" / "digits"
    losses = (
        pd.read_parquet(out / "losses.parquet").set_index(["method", "learning_rate"]).sort_index()
    )
    curves = statistics.smooth(np.stack(losses.loc[("bp", 0.1), "train_loss"]))
    target = round(max(curve[:8].min() for curve in curves) + 0.01, 3)
    before = (out / "report.html").read_bytes()
    done = soap_jax("report", str(out), f"--target-loss={target}", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert f"target-{target:g}/report.html" in done.stdout
    assert (out / "report.html").read_bytes() == before
    table = pd.read_csv(out / f"target-{target:g}" / "summary.csv")
    steps = table.set_index(["method", "period"]).loc[("bp", 0), "steps_to_target"]
    assert steps == pytest.approx(stats.gmean([np.argmax(c <= target) + 1 for c in curves]))
    assert "exploratory" in done.stdout


READ_ONLY = """
import tempfile, pathlib
make = tempfile.TemporaryFile
def refuse(*args, dir=None, **more):
    if pathlib.Path(dir) == pathlib.Path({!r}):
        raise PermissionError(13, "Permission denied")
    return make(*args, dir=dir, **more)
tempfile.TemporaryFile = refuse
from soap_jax.cli import main; main()
"""
"""The command where a directory cannot be written, whoever runs the test."""


def test_a_report_on_a_directory_that_may_only_be_read_goes_elsewhere_and_says_where(
    small_study, tmp_path
):
    out = small_study[0] / "results" / "digits"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    done = soap_jax("report", str(out), cwd=tmp_path, script=READ_ONLY.format(str(out)))
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "digits may only be read: the report goes to results/report-digits." in said
    made = tmp_path / "results" / "report-digits"
    assert (made / "report.html").read_bytes() == (out / "report.html").read_bytes()
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_a_terminal_without_degree_and_plus_minus_signs_gets_the_rest(small_study, tmp_path):
    """As all of what is printed goes through two streams, one command stands for all."""
    cwd, _ = small_study
    tiny = ("train", "--epochs=1", "--hidden=3", "--method=fa", f"--out={tmp_path}/one")
    for args in (tiny, ("report", "results/digits"), ("study", "--help")):
        done = soap_jax(*args, cwd=cwd, PYTHONIOENCODING="ascii")
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii() and ("?" in done.stdout or args[0] == "study")
    done = soap_jax("report", "nirgendwo-ü", cwd=cwd, PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and "holds no comparison" in done.stderr


def test_too_little_memory_is_one_line(tmp_path):
    broken = """
from soap_jax import cli
def fail(self):
    raise {}
cli.Train.run = fail
cli.main()
"""
    for error in ("MemoryError", "RuntimeError('RESOURCE_EXHAUSTED: 9 bytes.\\nat once')"):
        done = soap_jax("train", cwd=tmp_path, script=broken.format(error))
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: not enough memory (")
        assert len(done.stderr.splitlines()) == 1


def test_report_of_nothing_says_so(tmp_path):
    done = soap_jax("report", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and "nowhere holds no comparison" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_diverged_runs_are_counted_and_never_averaged(small_study):
    cwd, done = small_study
    runs = pd.read_csv(cwd / "results" / "digits" / "runs.csv")
    assert (runs["diverged"] == (runs["learning_rate"] == 1e30)).all()
    assert done.stdout.count("2 of 4") == 4
    assert "nan" not in done.stdout
    summary = pd.read_csv(cwd / "results" / "digits" / "summary.csv")
    assert (summary["best_rate"] == 0.1).all() and summary["test_accuracy"].notna().all()
    broken = runs["diverged"] & (runs["method"] != "frozen")  # whose loss is huge but finite
    assert runs.loc[broken, "test_accuracy"].isna().all()


def test_the_same_study_again_shows_what_is_there(small_study):
    cwd, first = small_study
    before = (cwd / "results" / "digits" / "runs.csv").read_bytes()
    again = soap_jax("study", *SMALL, cwd=cwd)
    assert again.returncode == 0, again.stderr
    assert "20 runs are there already, in results/digits." in again.stdout
    assert (cwd / "results" / "digits" / "runs.csv").read_bytes() == before
    table = [line for line in first.stdout.splitlines() if "sign sync" in line and "of 4" in line]
    assert table and all(line in again.stdout for line in table)


def test_another_study_in_the_same_directory_is_refused(small_study):
    cwd, _ = small_study
    other = soap_jax("study", *SMALL, "--period=2", cwd=cwd)
    assert other.returncode == 2
    assert "runs with other settings (" in other.stderr
    assert "periods: was [1, 3], is now [2]" in other.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dataset=minst"], "Did you mean 'mnist'?"),
        (["--learning-rates="], "learning_rates is empty"),
        (["--learning-rates=0.1,-1"], "learning_rates has -1.0 at index 1"),
        (["--learning-rates=0.1;0.2"], "--learning-rates: could not convert string to float"),
        (["--seeds=many"], "--seeds: invalid literal for int()"),
        (["--rates", "0.1"], "Unrecognized options: --rates, 0.1. Did you mean --learning-rates"),
        (["--data=mine.npz"], "there is no mine.npz; expected data, FILE.npz"),
        (["mine.txt"], "mine.txt is not a task file; expected a Python file, FILE.py."),
        (["."], ". is not a task file; expected a Python file, FILE.py."),
        (["--steps=3", "--epochs=2"], "--steps and --epochs: expected one of them."),
        (["my_task.py"], "there is no file my_task.py"),
        (["--methods=bp,pepita"], "methods: 'pepita' is unknown; expected bp, fa"),
        (["--period=0"], "periods has 0 at index 0"),
        (["--memory-limit=0"], "memory_limit is 0.0"),
        (["--out=/dev/null/out"], "cannot write results to /dev/null/out"),
        ([f"--out={'a' * 300}"], "File name too long"),
        (["--seeds=99999999999999999999"], "seeds is 99999999999999999999; expected at most"),
        (["--seeds=300000000"], "seeds is 300000000; expected at most"),
        (["--epochs=999999999999"], "epochs is 999999999999; expected at most"),
        (["--hidden=99999999999"], "hidden is 99999999999; expected at most"),
        ([f"--period={'9' * 5000}"], "Error parsing --period: Exceeds the limit"),
    ],
)
def test_bad_input_is_one_line_without_a_traceback(args, message, tmp_path):
    done = soap_jax("study", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_directory_without_the_data_is_named(tmp_path):
    args = ["--dataset=mnist", "--data-dir=.", "--out=out"]
    done = soap_jax("study", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert "train-images-idx3-ubyte.gz" in done.stderr and "Traceback" not in done.stderr


def test_too_little_memory_for_one_run_says_how_much_one_needs(tmp_path):
    done = soap_jax("study", *SMALL, "--memory-limit=0.0001", cwd=tmp_path)
    assert done.returncode == 2
    assert (
        "memory_limit is 1.07e+05 bytes per device, but the smallest program needs" in done.stderr
    )


def test_help_says_what_every_option_does_and_its_default(tmp_path):
    done = soap_jax("study", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for option in (
        "--learning-rates",
        "--methods",
        "--period",
        "--out",
        "--data-dir",
        "--weight-decay",
    ):
        assert option in done.stdout
    assert done.stdout.count("default:") >= 25 and "mlp, or conv" in done.stdout
    done = soap_jax(cwd=tmp_path)
    assert done.returncode == 0 and "report" in done.stdout


def test_version(tmp_path):
    assert soap_jax("--version", cwd=tmp_path).stdout == "soap_jax 0.1.0\n"


def test_own_data_and_a_conv_net_at_a_quick_size(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (60, 6, 6), dtype=np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    args = ("--data=mine.npz", "--model=conv", "--channels=2,3", "--methods=bp,fa", "--quick")
    args += ("--steps=6", "--batch-size=16", "--evaluations=2")
    done = soap_jax("study", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "results" / "mine-quick" / "study.json").read_text())
    assert facts["kernels"] == ["Conv_0/kernel", "Conv_1/kernel", "Dense_0/kernel"]
    assert facts["data_source"].startswith("mine.npz sha256:") and facts["seeds"] == [0, 1, 2]
    assert facts["loops"] == {"bp": "products", "fa": "products"}


def test_a_task_of_ones_own_is_studied_as_its_file_says_and_options_go_before(tmp_path):
    (tmp_path / "my_task.py").write_text(TASK)
    done = soap_jax("study", "my_task.py", "--seeds=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "my_task: 64 training examples. 8 runs of 40 steps, 2 methods" in " ".join(
        done.stdout.split()
    )
    out = tmp_path / "results" / "my_task"
    facts = json.loads((out / "study.json").read_text())
    assert facts["seeds"] == [0, 1] and facts["protocol"]["learning_rates"] == [0.1, 0.2]
    assert facts["methods"]["mine"]["label"] == "my own" and len(facts["claims"]) == 1
    assert "my own" in (out / "report.html").read_text() and "my own" in done.stdout
    dry = soap_jax("study", "my_task.py", "--quick", "--dry-run", "--epochs=2", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "12 runs of" in " ".join(dry.stdout.split()) and re.search(
        r"About \d+ seconds", dry.stdout
    )
    help = soap_jax("study", "my_task.py", "--help", cwd=tmp_path)
    assert "(default: 0.1,0.2)" in help.stdout and "--hidden" not in help.stdout


def test_several_tasks_have_a_directory_each_and_say_what_is_quick(tmp_path):
    content = f"{TASK}tasks = dict(one=task, two=task)\nsmaller = dict(seeds=2, steps=4)\ndel task"
    (tmp_path / "my_task.py").write_text(content)
    done = soap_jax("study", "my_task.py", "--quick", "--seeds=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("one", "two"):
        path = tmp_path / "results" / "my_task-quick" / name / "study.json"
        facts = json.loads(path.read_text())
        assert facts["title"] == f"my_task {name}" and facts["seeds"] == [0]
        assert facts["protocol"]["steps"] == 4


def test_rates_of_the_command_line_go_before_those_of_a_file(tmp_path):
    (tmp_path / "my_task.py").write_text(f"{TASK}smaller = dict(learning_rates=(0.1,), steps=4)")
    for given, rates in (("--learning-rates=0.3", [0.3]), ("--seeds=1", [0.1])):
        args = ("--quick", given, f"--out={rates[0]}")
        done = soap_jax("study", "my_task.py", *args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / str(rates[0]) / "study.json").read_text())
        assert record["protocol"]["learning_rates"] == rates


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import nowhere", "my_task.py, line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("x = (", "my_task.py: SyntaxError: '(' was never closed (my_task.py, line 1)"),
        ("x = 1\ny = 1 / 0", "my_task.py, line 2: ZeroDivisionError: division by zero"),
        ("task = 3", "my_task.py defines no `task`; expected task = soap_jax.study.Task("),
        (TASK.replace("steps, ", "").replace("40, ", ""), "steps is None and epochs is None"),
        (TASK.replace('"bp": "bp"', '"bp": "pb"'), "methods: 'pb' is unknown"),
        (f"{TASK}seeds = [1, 2]", "my_task.py: seeds is [1, 2]; expected int."),
        (f"{TASK}learning_rates = 0.1", "learning_rates is 0.1; expected tuple[float, ...]."),
        (f"{TASK}steps = 20.5", "steps is 20.5; expected int | None."),
        (f"{TASK}claims = 'fa'", "claims is 'fa'; expected a list of Claims or Tests"),
        (f"{TASK}evaluations = 0", "evaluations is 0; expected at least 1"),
        (f"{TASK}tasks = dict(a=task)", "my_task.py defines `task` and `tasks`"),
        (f"{TASK}epochs = 3", "my_task.py defines steps and epochs; expected one of them."),
        (f"{TASK}seeds = -1", "seeds is -1; expected at least 1"),
        ("raise SystemExit", "my_task.py, line 1: SystemExit: SystemExit."),
        (TASK.replace('Ratio("mine"', 'Ratio("mien"'), "claim '1' names the method 'mien'"),
        (f"{TASK}smaller = 3", "my_task.py: smaller is 3; expected options of --quick"),
        (f"{TASK}smaller = dict(steps=2.5)", "my_task.py: steps is 2.5; expected int | None."),
        ("tasks = dict(a=3)", "my_task.py `tasks` has 3 at 'a'; expected task = soap_jax"),
        (f"{TASK}tasks = {{'a/b': task}}\ndel task", "tasks is ['a/b']; expected a dict"),
        (f"{TASK}tasks = {{'..': task}}\ndel task", "tasks is ['..']; expected a dict"),
        ("from soap_jax import tasks", "my_task.py defines no `task`"),
    ],
)
def test_a_task_file_that_does_not_work_is_one_line(content, message, tmp_path):
    (tmp_path / "my_task.py").write_text(content)
    done = soap_jax("study", "my_task.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_length_of_the_command_line_goes_before_that_of_a_file(tmp_path):
    (tmp_path / "my_task.py").write_text(TASK.replace("steps, ", "epochs, "))
    done = soap_jax("study", "my_task.py", "--steps=39", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "runs of 38 steps" in done.stdout  # 19 evaluations


def test_warnings_are_one_line_each(tmp_path):
    normed = TASK.replace('@ params["out"]', '@ jnp.sin(params["mid"])) @ params["out"]')
    normed = normed.replace("jnp.tanh(batch", "jnp.tanh(jnp.tanh(batch").replace(
        '{"in"', '{"mid": jnp.eye(6), "in"'
    )
    (tmp_path / "my_task.py").write_text(f"{normed}evaluation = 3")
    script = 'import warnings; warnings.simplefilter("default")\n'
    script += "from soap_jax.cli import main; main()"
    done = soap_jax("study", "my_task.py", "--dry-run", cwd=tmp_path, script=script)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "warning: my_task.py defines evaluation, which is not an option. Did you mean evaluations?",
        "warning: Errors pass through mid by exact backprop, also in methods with feedback: "
        "soap_jax.explain says why.",
    ]


def test_an_unknown_command_is_named(tmp_path):
    done = soap_jax("studdy", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: there is no command 'studdy'; expected study, report or train.\n"


def test_programs_are_kept_for_the_next_time_unless_that_is_off(tmp_path):
    (tmp_path / "my_task.py").write_text(TASK)
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    env["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    code = "from soap_jax.cli import main; main()"

    def kept(*args):
        command = [sys.executable, "-c", code, "study", "my_task.py", *args]
        subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
        return {file.name for file in (tmp_path / "cache").rglob("*-cache")}

    assert kept("--no-cache", "--out=a") == set()
    first = kept("--out=b")
    assert first and kept("--out=c") == first
