"""Studies in processes of their own, which the tests of survival stop in all the ways there are."""

import contextlib
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import time

TASK = """
import jax, jax.numpy as jnp
from soap_jax import study

def init(key):
    a, b = jax.random.split(key)
    return {"a": jax.random.normal(a, (1, 16)), "b": jax.random.normal(b, (16, 1)) / 4}

def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - jnp.sin(3 * x)) ** 2)

task = study.Task(init=init, loss=loss, train=jnp.linspace(-1, 1, 64)[:, None])
methods = ["kp"]
learning_rates, seeds, steps, batch_size = (0.1, 0.2), 16, 8_000, 8
evaluations, chunk_size = 4, 1
"""
"""32 short runs, one per device in a call; one program, soon compiled."""
RUNS = 32

TABLES = ("runs.parquet", "runs.csv", "evaluations.parquet", "evaluations.csv", "losses.parquet")

STUDY = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from soap_jax.cli import main
main()
"""
"""The real command; Ctrl-C works in it also if the tests run in the background."""

WITHOUT_REPORT = "from soap_jax import cli; cli._show = lambda *_: None; cli.main()"
"""The same without conclusions, which have tests of their own and take seconds."""

SCRIPT = """
import runpy, sys
from soap_jax import study

own = runpy.run_path(sys.argv[2])
names = "learning_rates seeds steps batch_size evaluations chunk_size periods".split()
study.compare(
    own["task"],
    own["methods"],
    **{name: own[name] for name in names if name in own},
    out=sys.argv[1],
    on_progress=lambda *told: print(*told, flush=True),
)
"""
"""What the command does between start and report, saying after each call how far it is."""


@functools.cache
def file(task=TASK):
    """A file of its own for a task."""
    path = pathlib.Path(_scratch().name, f"task{abs(hash(task))}.py")
    path.write_text(task)
    return path


def arguments(out, task=TASK):
    """The command's arguments."""
    return "study", str(file(task)), f"--out={out}"


def arguments_of_script(out, task=TASK):
    """The arguments of `SCRIPT`."""
    return str(out), str(file(task))


@functools.cache
def _scratch():
    return tempfile.TemporaryDirectory(prefix="soap_jax_test_")  # gone with this process


def environment(devices=2, **more):
    """With a number of CPU devices, and programs that are compiled once for all processes."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": f"{_scratch().name}/programs",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return os.environ | cache | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"} | more


@contextlib.contextmanager
def started(script, *args, env=None, cwd=None):
    """A process, with attributes `out` and `err`, files; it is killed at the end at the latest."""
    with tempfile.TemporaryDirectory() as logs:
        out, err = pathlib.Path(logs, "out"), pathlib.Path(logs, "err")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-c", script, *args],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=env or environment(),
                cwd=cwd,
            )
        process.out, process.err = out, err
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def ended(process, timeout=120):
    """Waits; returns the exit code, and what was said, each run of blanks as one."""
    code = process.wait(timeout)
    return (
        code,
        " ".join(process.out.read_text().split()),
        " ".join(process.err.read_text().split()),
    )


def run(script, *args, timeout=120, **options):
    """As `ended`, of a process started here."""
    with started(script, *args, **options) as process:
        return ended(process, timeout)


def parts(out):
    """The parts in a study's directory, with the time of each: what is done again has another."""
    return {path.name: path.stat().st_mtime_ns for path in pathlib.Path(out, "parts").glob("*.npz")}


def await_parts(process, out, more_than=0, timeout=90):
    """Waits until there are more parts than so many; the process must not end before."""
    end = time.monotonic() + timeout
    while len(parts(out)) <= more_than:
        assert process.poll() is None, process.err.read_text()
        assert time.monotonic() < end, "no part appeared"
        time.sleep(0.005)


@functools.cache
def reference(task=TASK):
    """The files of tables of a study that nothing disturbed, on two devices."""
    out = pathlib.Path(_scratch().name, f"{file(task).stem}-undisturbed")
    code, _, said = run(SCRIPT, *arguments_of_script(out, task))
    assert code == 0, said
    return tables(out)


def tables(out):
    """The bytes of a finished study's tables."""
    return {name: pathlib.Path(out, name).read_bytes() for name in TABLES}


def assert_finished_alike(out, task=TASK):
    """The tables are the reference's to the byte, and nothing unfinished is left."""
    assert tables(out) == reference(task)
    left = {path.name for path in pathlib.Path(out).rglob("*")}
    assert not [name for name in left if name.endswith(".unfinished")]
    assert not left & {"parts", "progress.json"}
