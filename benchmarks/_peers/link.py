"""The parent's end of the link to a worker; `protocol` is the other."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import tempfile

from benchmarks._peers import protocol

HERE = pathlib.Path(__file__).parent
CORES = len(os.sched_getaffinity(0))


class Failed(Exception):
    """A worker could not do what it was asked, with the reason."""


class Worker:
    """A process that answers one line of JSON by another, and otherwise waits.

    Attributes:
        facts: what the worker says of itself.
    """

    def __init__(self, python: str, file: str, platform: str = ""):
        """Starts a worker.

        Args:
            python: the interpreter, of the environment of the system.
            file: the worker's, in this directory.
            platform: where a peer is to run, "cpu" or "gpu".

        Raises:
            Failed: if it does not start.
        """
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        # Its GPU, if any, is shared; OpenMP's threads are as many as XLA's, one per core.
        environment |= {"OMP_NUM_THREADS": str(CORES), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the worker is)
        self._process = subprocess.Popen(
            [python, str(HERE / file), platform],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
            bufsize=1,
        )
        self.facts = self._answer()

    def ask(self, **request):
        """Sends a request of `protocol` and waits for its answer.

        Raises:
            Failed: if the worker cannot do it, or is gone.
        """
        with contextlib.suppress(BrokenPipeError):  # reading says why
            self._process.stdin.write(json.dumps(request) + "\n")
        return self._answer()

    def close(self):
        """Ends the worker."""
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            last = (self._errors.read().strip() or "it said nothing").splitlines()[-1]
            raise Failed(f"the worker ended: {protocol.without_paths(last)}")
        answer = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer
