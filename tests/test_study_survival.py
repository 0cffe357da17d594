"""A study that is killed, interrupted, locked out or out of disk goes on, and ends alike."""

import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import study_processes as processes

from soap_jax.study import store

LONG = processes.TASK + "methods, seeds, steps, periods = ['kp', 'sign'], 20, 20_000, (1, 10)"
"""120 runs of two methods: enough for ten kills."""


def told(process):
    """How many runs are done, by the process's own last word."""
    lines = [line.split() for line in process.out.read_text().splitlines()]
    return int(lines[-1][3]) if lines else 0


def kept(out):
    return len(store.Store(out).done())


def kill_and_go_on(out, task, devices, seed):
    """Kills the study once on each number of devices but the last, which finishes it."""
    rng = random.Random(seed)
    script = processes.SCRIPT, *processes.arguments_of_script(out, task)
    *killed, last = devices
    for num in killed:
        before = processes.parts(out)
        env = processes.environment(num)
        with processes.started(*script, env=env) as study:
            processes.await_parts(study, out, more_than=len(before))
            time.sleep(rng.uniform(0, 0.4))
            study.send_signal(signal.SIGKILL)
            assert study.wait() == -signal.SIGKILL, "it ended before it was killed"
            after = processes.parts(out)
            assert before.items() < after.items(), "what was kept is not done again"
            # A call does one run per device here. It says so, and its part is written: what was in
            # training when the process was killed is at most the next call's.
            assert 0 <= told(study) - kept(out) <= num
    assert processes.run(*script, env=processes.environment(last))[0] == 0
    processes.assert_finished_alike(out, task)


@pytest.mark.slow
def test_a_study_killed_at_random_goes_on_and_gives_the_same_bits(tmp_path):
    kill_and_go_on(tmp_path, processes.TASK, devices=[2, 3], seed=0)


@pytest.mark.slow
def test_a_study_killed_ten_times_at_random_gives_the_same_bits(tmp_path):
    kill_and_go_on(tmp_path, LONG, devices=[2, 3, 4, 2, 3, 2, 4, 3, 2, 3, 2], seed=1)


def test_the_command_is_alone_in_its_directory_and_goes_on_after_kill_and_ctrl_c(tmp_path):
    out = tmp_path / "out"
    command = processes.STUDY, *processes.arguments(out)
    with processes.started(*command) as first:
        processes.await_parts(first, out)
        first.send_signal(signal.SIGSTOP)  # so that it is not done meanwhile
        code, said, error = processes.run(*command)
        first.send_signal(signal.SIGCONT)
        assert code == 2 and "Stopped" not in said
        assert error == (
            f"error: another process is writing to {out}. Wait for it, or name another directory "
            "with --out."
        )
        processes.await_parts(first, out, more_than=len(processes.parts(out)))  # it goes on
        first.kill()
        first.wait()

    before = processes.parts(out)
    with processes.started(*command) as second:
        processes.await_parts(second, out, more_than=len(before))
        second.send_signal(signal.SIGINT)
        code, said, error = processes.ended(second)
    assert (code, error) == (130, "")
    num = kept(out)
    assert f"Stopped with {num} of {processes.RUNS} runs kept in {out}. The same command" in said
    assert "Traceback" not in said

    code, said, error = processes.run(*command)
    assert code == 0, error
    assert f"{num} runs are there already, in {out}." in said
    processes.assert_finished_alike(out)
    assert (out / "report.html").exists()


FULL_DISK = """
import os, shutil, subprocess, sys
from soap_jax import cli
from soap_jax.study import store

cli._show = lambda *_: None
out, copy, *args = sys.argv[1:]
sys.argv[1:] = args

def study():
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0

print("code", study())
endings = {name[-4:] for name in os.listdir(f"{out}/parts")}
print("files", *sorted(os.listdir(out)), *endings)
print("kept", len(store.Store(out).done()), flush=True)
assert study() == 2  # still full
subprocess.run(["mount", "-o", "remount,size=8m", out], check=True)
print("code", study(), flush=True)
shutil.copytree(out, copy)
"""


def in_a_small_disk(out, kilobytes, *command, **options):
    """Runs a command in a namespace of its own, where `out` is a disk of so many kilobytes."""
    mount = f'mount -t tmpfs -o size={kilobytes}k tmpfs "$0" && exec "$@"'
    return subprocess.run(
        ["unshare", "-Urm", "sh", "-c", mount, str(out), *command],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def test_a_full_disk_is_an_error_in_words_and_the_study_goes_on_once_there_is_room(tmp_path):
    out, copy = tmp_path / "out", tmp_path / "copy"
    out.mkdir()
    try:
        possible = in_a_small_disk(out, 300, "true").returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("needs Linux, and leave to mount a disk in a namespace (unshare -Urm)")
    args = out, copy, *processes.arguments(out)
    done = in_a_small_disk(
        out, 300, sys.executable, "-c", FULL_DISK, *map(str, args), env=processes.environment()
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    said = " ".join(done.stdout.split())
    assert [line for line in lines if line.startswith("code")] == ["code 2", "code 0"]
    kept = next(int(line.split()[1]) for line in lines if line.startswith("kept"))
    assert 0 < kept < processes.RUNS
    assert "files .lock parts progress.json .npz" in lines  # no half-written file, under no name
    assert f"Stopped with {kept} of {processes.RUNS} runs kept in {out}." in said
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 2 and "Traceback" not in done.stderr
    assert all("No space left on device" in line and str(out) in line for line in errors)
    processes.assert_finished_alike(pathlib.Path(copy))
