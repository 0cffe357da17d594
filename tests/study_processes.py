"""Studies in processes of their own, which the tests of survival stop in all the ways there are."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from soap_jax.study.preset import StudyConfig

CONFIG = StudyConfig(
    methods=("bp",),
    learning_rates=(0.1, 0.2),
    seeds=16,
    epochs=120,
    hidden=(16,),
    evaluations=4,
    chunk_size=1,
)
"""32 short runs, one per device in a call; one program, soon compiled."""

TABLES = ("runs.parquet", "runs.csv", "evaluations.parquet", "evaluations.csv", "losses.parquet")

STUDY = "from soap_jax.cli import main; main()"
"""The real command."""

WITHOUT_REPORT = "from soap_jax import cli; cli._show = lambda *_: None; cli.main()"
"""The same without conclusions, which have tests of their own and take seconds."""

TELLING = """
import json, sys
from soap_jax import data, study
from soap_jax.study import preset

out, config = sys.argv[1], preset.StudyConfig(**json.loads(sys.argv[2]))
arguments = preset.comparison_arguments(config, data.load("digits"))
study.compare(**arguments, out=out, on_progress=lambda *told: print(*told, flush=True))
"""
"""A script that compares the same, saying after each call how far it is."""


def arguments(out, config=CONFIG):
    """The command's arguments for a configuration."""
    fields = dataclasses.asdict(config)
    fields["period"] = fields.pop("periods")
    yield from ("study", f"--out={out}")
    for name, value in fields.items():
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            yield f"--{name.replace('_', '-')}={text}"


def telling(out, config=CONFIG):
    """The arguments of `TELLING`."""
    return str(out), json.dumps(dataclasses.asdict(config))


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
def reference(config=CONFIG):
    """The files of tables of a study that nothing disturbed, on two devices."""
    out = pathlib.Path(_scratch().name, f"reference-{hash(config)}")
    code, _, said = run(TELLING, *telling(out, config))
    assert code == 0, said
    return tables(out)


def tables(out):
    """The bytes of a finished study's tables."""
    return {name: pathlib.Path(out, name).read_bytes() for name in TABLES}


def assert_finished_alike(out, config=CONFIG):
    """The tables are the reference's to the byte, and nothing unfinished is left."""
    assert tables(out) == reference(config)
    left = {path.name for path in pathlib.Path(out).rglob("*")}
    assert not [name for name in left if name.endswith(".unfinished")]
    assert not left & {"parts", "progress.json"}
