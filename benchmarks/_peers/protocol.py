"""A worker's end of the link: lines of JSON on stdin and stdout, and checks of what it times.

A worker's file describes its system by `serve(facts, load, make)`. The parent asks, a line each:

    {"do": "load", "widths", "batch", "steps"}       random data: `steps` batches, and one to check
    {"do": "make", "system", "method"}               a network, checked, and trained for a few steps
    {"do": "run", "system", "method", "epochs"}      {"seconds": ...} that the epochs took

and the worker answers each by a line, `{"failed": reason}` where it cannot. Otherwise it waits.

No other system is imported here, nor anything of this repository.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

RATE = 0.01
CLASSES = 10
WARMUP = 3  # steps before every block
TOLERANCE = 0.01  # of the largest entry: an update of 1e-5 is read off weights of 0.1, in float32


Batch = tuple[np.ndarray, np.ndarray]
"""Examples and their labels."""


class Weights(NamedTuple):
    """What a network consists of, as NumPy arrays, first layer first.

    Attributes:
        kernels: `(in, out)` each.
        biases: `(out,)` each.
        feedback: for each layer after the first its B `(in, out)`, or of direct feedback the
            projection `(classes, in)` of the output's error to its input; empty for backprop.
    """

    kernels: Sequence[np.ndarray]
    biases: Sequence[np.ndarray]
    feedback: Sequence[np.ndarray]


class Trainer(Protocol):
    """A network in training by SGD of learning rate `RATE`."""

    def train(self, data: Any, epochs: int) -> None:
        """Goes over all of `data` so many times, in batches of a new random order, and waits."""

    def weights(self) -> Weights:
        """The parameters and feedback as they are."""


def serve(
    facts: dict[str, Any],
    load: Callable[[np.ndarray, np.ndarray], Any],
    make: Callable[[str, str, list[int], int], Trainer],
) -> None:
    """Answers until stdin ends.

    Args:
        facts: what the parent should know of this worker; sent first.
        load: `(x, labels) -> data`, in the form that the trainers take.
        make: `(system, method, widths, batch_size) -> trainer`.
    """
    # What else a system prints would garble the link, so stdout becomes stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    trainers: dict[tuple[str, str], Trainer] = {}
    sizes: dict[str, Any] = {}

    def do_load(widths, batch, steps):
        trainers.clear()
        sizes.clear()
        rng = np.random.default_rng(0)
        x = rng.standard_normal((steps * batch, widths[0]), np.float32)
        labels = rng.integers(0, CLASSES, steps * batch)
        one = x[:batch], labels[:batch]
        sizes.update(widths=widths, batch=batch, all=load(x, labels), one=load(*one), check=one)
        return {}

    def do_make(system, method):
        trainer = make(system, method, sizes["widths"], sizes["batch"])
        error = check(trainer, method, sizes["one"], sizes["check"])
        trainer.train(sizes["all"], 1)  # compile
        trainers[system, method] = trainer
        return {"error": error}

    def do_run(system, method, epochs):
        trainer = trainers[system, method]
        trainer.train(sizes["one"], WARMUP)
        begin = time.perf_counter()
        trainer.train(sizes["all"], epochs)
        return {"seconds": time.perf_counter() - begin}

    todo = {"load": do_load, "make": do_make, "run": do_run}
    print(json.dumps(facts), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = todo[request.pop("do")](**request)
        except Exception as error:
            answer = {"failed": describe(error)}
        print(json.dumps(answer), file=answers)


def fail(error: Exception) -> None:
    """Tells the parent that there will be no worker, and why."""
    print(json.dumps({"failed": describe(error)}))


def describe(error: Exception) -> str:
    """An exception in one line, without paths."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return without_paths(f"{type(error).__name__}: {error}".splitlines()[0])


def without_paths(line: str) -> str:
    """A line with dots for its paths, since results are published."""
    return re.sub(r"(/[\w.+-]+){2,}", "...", line)


def check(trainer: Trainer, method: str, data: Any, batch: Batch) -> float:
    """Compares a step's update with the method's formula, and sees the loss go down.

    Returns:
        The largest difference from the formula, of the largest entry of a kernel's gradient.
    """
    before = trainer.weights()
    trainer.train(data, 1)
    after = trainer.weights()
    feedback = prescribed(method, before, after.feedback)
    gradients = formula(before._replace(feedback=feedback), batch, direct=method == "DFA")
    worst = 0.0
    for old, new, gradient in zip(before.kernels, after.kernels, gradients, strict=True):
        difference = (old.astype(np.float64) - new) / RATE - gradient
        worst = max(worst, float(np.abs(difference).max() / np.abs(gradient).max()))
    if not worst < TOLERANCE:
        raise ValueError(f"an update differs by {worst:.2g} from the formula of {method}")
    trainer.train(data, 5)
    if not cross_entropy(trainer.weights(), batch) < cross_entropy(before, batch):
        raise ValueError(f"the loss did not go down in 6 steps of {method}")
    return worst


def prescribed(method: str, before: Weights, drawn: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    """The feedback that a step has to use: of weights before it, and the magnitudes it took."""
    kernels = before.kernels[1:]
    match method:
        case "bp":
            return kernels
        case "FA" | "DFA":
            return before.feedback
        case "uSF":
            return [np.abs(B).max() * np.sign(W) for W, B in zip(kernels, drawn, strict=True)]
        case "frSF":
            return [np.abs(B) * np.sign(W) for W, B in zip(kernels, before.feedback, strict=True)]
        case "brSF":
            if np.array_equal(np.abs(drawn[0]), np.abs(before.feedback[0])):
                raise ValueError("the magnitudes of brSF were not drawn anew")
            return [np.abs(B) * np.sign(W) for W, B in zip(kernels, drawn, strict=True)]
    raise ValueError(f"no formula of {method}")


def forward(weights: Weights, x: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The inputs of a tanh network's layers, and the probabilities of its classes, in float64."""
    hs = [x.astype(np.float64)]
    for kernel, bias in zip(weights.kernels, weights.biases, strict=True):
        hs.append(np.tanh(hs[-1] @ kernel + bias))
    logits = hs[-2] @ weights.kernels[-1] + weights.biases[-1]
    p = np.exp(logits - logits.max(1, keepdims=True))
    return hs[:-1], p / p.sum(1, keepdims=True)


def cross_entropy(weights: Weights, batch: Batch) -> float:
    """The mean over a batch."""
    x, labels = batch
    return -np.log(forward(weights, x)[1][np.arange(len(x)), labels]).mean()


def formula(weights: Weights, batch: Batch, *, direct: bool) -> list[np.ndarray]:
    """The gradients of the kernels, errors going back through feedback."""
    x, labels = batch
    hs, p = forward(weights, x)
    error = output_error = (p - np.eye(p.shape[1])[labels]) / len(x)
    gradients = [hs[-1].T @ error]
    for h, h_in, B in zip(hs[:0:-1], hs[-2::-1], reversed(weights.feedback), strict=True):
        error = (output_error @ B if direct else error @ B.T) * (1 - h**2)
        gradients.insert(0, h_in.T @ error)
    return gradients
