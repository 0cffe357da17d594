"""The command line, as a user runs it: in a process of its own."""

import json
import subprocess
import sys

import pandas as pd
import pytest

SMALL = [
    "--learning-rates=0.1,1e30",
    "--seeds=2",
    "--epochs=1",
    "--hidden=8",
    "--evaluations=2",
    "--activation=relu",
]


def soap_jax(*args, cwd):
    command = [sys.executable, "-W", "error", "-c", "from soap_jax.cli import main; main()", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.fixture(scope="module")
def small_study(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("study")
    return cwd, soap_jax("study", *SMALL, cwd=cwd)


def test_a_study_prints_a_table_and_writes_results_and_figures(small_study):
    cwd, done = small_study
    assert done.returncode == 0, done.stderr
    assert "FA, fixed feedback" in done.stdout and "Results in results/digits" in done.stdout
    out = cwd / "results" / "digits"
    assert {path.name for path in out.iterdir()} == {
        "study.json",
        "evaluations.csv",
        "runs.csv",
        "summary.csv",
        "figures",
    }
    assert json.loads((out / "study.json").read_text())["config"]["hidden"] == [8]
    assert len(pd.read_csv(out / "runs.csv")) == 4 * 2 * 2


def test_diverged_runs_are_counted_and_never_averaged(small_study):
    cwd, done = small_study
    runs = pd.read_csv(cwd / "results" / "digits" / "runs.csv")
    assert (runs["diverged"] == (runs["learning_rate"] == 1e30)).all()
    assert done.stdout.count("2 of 4") == 4
    assert "nan" not in done.stdout
    summary = pd.read_csv(cwd / "results" / "digits" / "summary.csv")
    assert (summary["best_rate"] == 0.1).all() and summary["test_accuracy"].notna().all()
    assert runs.loc[runs["diverged"], "test_accuracy"].isna().all()


def test_the_same_study_again_shows_what_is_there(small_study):
    cwd, first = small_study
    before = (cwd / "results" / "digits" / "runs.csv").stat().st_mtime_ns
    again = soap_jax("study", *SMALL, cwd=cwd)
    assert again.returncode == 0, again.stderr
    assert "already holds the results" in again.stdout
    assert (cwd / "results" / "digits" / "runs.csv").stat().st_mtime_ns == before
    table = [line for line in first.stdout.splitlines() if "sign sync" in line and "of 4" in line]
    assert table and all(line in again.stdout for line in table)


def test_another_study_in_the_same_directory_is_refused(small_study):
    cwd, _ = small_study
    other = soap_jax("study", *SMALL, "--period=2", cwd=cwd)
    assert other.returncode == 2
    assert "another configuration's results (period: 1 there, 2 now)" in other.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dataset=minst"], "dataset is 'minst'; expected one of digits"),
        (["--learning-rates="], "learning_rates is empty"),
        (["--learning-rates=0.1,-1"], "learning_rates has -1.0 at index 1"),
        (["--learning-rates=0.1;0.2"], "--learning-rates is '0.1;0.2'; expected numbers"),
        (["--methods=bp,dfa"], "methods is 'bp', 'dfa'"),
        (["--period=0"], "period is 0"),
        (["--out=/dev/null/out"], "cannot write results to /dev/null/out"),
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


def test_help_says_what_every_option_does_and_its_default(tmp_path):
    done = soap_jax("study", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for option in ("--learning-rates", "--methods", "--period", "--out", "--data-dir"):
        assert option in done.stdout
    assert done.stdout.count("default:") == 13


def test_version(tmp_path):
    assert soap_jax("--version", cwd=tmp_path).stdout == "soap_jax 0.1.0\n"
