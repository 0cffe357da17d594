"""`compare`: trains a task with many methods over the same learning rates and paired seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from soap_jax import convolutions, grids, sweeps
from soap_jax.study import (
    checks,
    comparison,
    environment,
    files,
    loops,
    results,
    statistics,
    store,
    trial,
)
from soap_jax.study import methods as registry
from soap_jax.study.claims import Claim, Test, as_claims
from soap_jax.study.contrasts import Difference, Share
from soap_jax.study.methods import Method
from soap_jax.tasks import Task

OnProgress = Callable[[str, int | None, int, int, int], None]
"""A callback, `(method, done, total, done_all, total_all) -> None`: the runs that are done and
their total, of this method and of all methods; `done` is None before the method is compiled."""


def compare(
    task: Task,
    methods: Mapping[str, str | Method] | Sequence[str],
    *,
    learning_rates: Sequence[float],
    seeds: int | Sequence[int] = 10,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int = 64,
    optimizer: trial.Optimizer = optax.sgd,
    periods: Sequence[int] | None = None,
    evaluations: int = 20,
    eval_batch_size: int | None = None,
    measures: Sequence[str] = (),
    target_loss: float | None = None,
    select: str | None = None,
    maximise: bool | None = None,
    extend: int = 0,
    claims: Sequence[Claim | Test] = (),
    keep_params: bool = False,
    out: str | os.PathLike[str] | None = None,
    chunk_size: int | None = None,
    memory_limit: float | None = None,
    on_progress: OnProgress | None = None,
    record: Mapping[str, Any] | None = None,
) -> comparison.Comparison | None:
    """Trains a task with every method, at every learning rate and with every seed.

    A seed gives every method the same initial params, the same initial feedback and the same order
    of examples, so that methods are compared seed by seed. On CPU each device trains one run after
    another; on accelerators many runs are trained as one batch (see `soap_jax.sweeps`). On CPU
    convolutions are computed as matrix products (see `soap_jax.convolutions`), and the record notes
    this. For speed on CPU, configure JAX with one device per core before its first use.

    Args:
        task: the task: model, data and loss.
        methods: names in `soap_jax.study.METHODS`; or a dict from your own names to these names
            or to `Method`s.
        learning_rates: the grid, the same for every method.
        seeds: the number of seeds, counted from 0; or the seeds themselves.
        steps: parameter updates of a run, rounded down to a multiple of its evaluations, by at
            most a tenth.
        epochs: passes over the training data, in place of `steps`. Examples are shuffled without
            replacement, and a last, incomplete batch is left out.
        batch_size: examples per step; ignored if `task.train` is a function, which sets it.
        optimizer: `learning_rate -> optax.GradientTransformation`; the rate may be the peak of a
            schedule.
        periods: updates from one synchronisation to the next; methods whose rule has a period run
            with each of them. By default each rule's own period.
        evaluations: the number of evaluations of a run, equally spaced, not counting the one at the
            start. There are fewer if the steps would otherwise be rounded down by more than a
            tenth: 39 steps and 20 evaluations become 38 steps and 19 evaluations.
        eval_batch_size: the most examples in one batch of an evaluation; batches are weighted by
            their size. By default one batch of all examples, which metrics that are not means over
            examples need.
        measures: additional measures: "effective_rank", the effective rank of each kernel's errors
            (see `soap_jax.metrics.effective_rank`). It is costly, so use few evaluations.
        target_loss: the training loss to which steps are counted. By default the smallest smoothed
            loss that every run of the reference reaches within an eighth of the steps, at its best
            rate; there is no target if that is not below 0.9 of the loss at the start.
        select: the column by which each method's learning rate is chosen, at the end of training:
            by default "validation_loss", or "train_loss" if there are no validation data.
        maximise: whether a larger value of `select` is better; required unless it is a loss.
        extend: the most learning rates to add on each side of a grid of at least three rates. A
            rate is added for all methods, where some method's best rate lies at the edge of the
            grid and no run diverged there. Added rates set neither the target nor the shared rate.
        claims: the claims to test; their bounds are stored before the first run. They name methods
            of this comparison or of `soap_jax.study.METHODS`.
        keep_params: whether `out` also keeps each run's final params, for `Comparison.params`.
        out: the directory for results. If the process is killed, the same call resumes the
            comparison there. Methods and seeds can be added to it later.
        chunk_size: the most runs per device at once.
        memory_limit: the most bytes per device for a program.
        on_progress: called as runs finish; see `OnProgress`.
        record: additional entries of the record, such as a title.

    Returns:
        The comparison, as `soap_jax.study.load(out)` returns it. Under `jax.distributed` every
        process makes the same call; the first process gets the comparison, the others None.

    Raises:
        ValueError: before any training, for an argument out of range; for a claim on an unknown
            method or metric; for a task that has no kernel for feedback, or whose loss is not a
            scalar, not finite at the start or not a pure function; for a method that does not fit
            the task; or for a directory that holds other results.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from soap_jax import study
        >>> x = jax.random.normal(jax.random.key(0), (64, 4))
        >>> def init(key):
        ...     return {"a": jax.random.normal(key, (4, 8)), "b": jnp.ones((8, 1)) / 8}
        >>> def loss(params, x):
        ...     return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - x[:, :1]) ** 2)
        >>> task = study.Task(init=init, loss=loss, train=x)
        >>> result = study.compare(
        ...     task, ["bp", "fa"], learning_rates=(0.1,), seeds=2, steps=8, batch_size=16
        ... )
        >>> len(result.runs)
        4
    """
    if not isinstance(task, Task):
        raise ValueError(f"task is a {type(task).__name__}; expected a soap_jax.study.Task.")
    chosen = registry.resolve(methods)
    for name, method in chosen.items():
        registry.check_fits(task, name, method)
    if task.generated:
        batch_size = trial.generated_batch_size(task)
    if not callable(optimizer):
        raise ValueError(
            f"optimizer is {optimizer!r}; expected a function of the learning rate, such as "
            "optax.sgd."
        )
    seeds, learning_rates = _as_list(grids.as_seeds(seeds)), _as_list(learning_rates)
    periods = None if periods is None else _as_list(periods) or None
    grids.check(seeds=seeds, learning_rates=learning_rates, periods=periods or (1,))
    learning_rates = sorted(map(float, learning_rates))
    steps = trial.steps_of(task, steps, epochs, batch_size)
    grids.check_count("evaluations", evaluations)
    for name, count in (
        ("eval_batch_size", eval_batch_size),
        ("chunk_size", chunk_size),
        ("extend", extend or None),
    ):
        if count is not None:
            grids.check_count(name, count)
    for name in measures:
        grids.check_known("measures", name, trial.MEASURES)
    evaluations = trial.evaluations_of(steps, evaluations)
    steps -= steps % evaluations
    select = select or ("validation_loss" if task.validation is not None else "train_loss")
    _check_select(task, select, maximise)
    for name, number in (("target_loss", target_loss), ("memory_limit", memory_limit)):
        if number is not None and not (np.isreal(number) and 0 < number < float("inf")):
            raise ValueError(f"{name} is {number!r}; expected a positive number.")
    periods_of = {name: method.periods(periods) for name, method in chosen.items()}

    def points(rates):
        grid = sweeps.grid(seeds=seeds, learning_rates=rates)
        return {
            name: [point._replace(period=period) for period in own_periods for point in grid]
            for name, own_periods in periods_of.items()
        }

    num = sum(map(len, points(learning_rates).values()))
    grids.check_count("the number of runs", num, most=grids.MOST_RUNS)
    layers, fingerprint = checks.check(task, batch_size)
    settings = {
        "optimizer": optimizer,
        "batch_size": batch_size,
        "steps": steps,
        "evaluations": evaluations,
        "eval_batch_size": eval_batch_size,
        "measures": list(measures),
    }
    programs = _programs(task, chosen, layers, settings, keep_params)
    full_record = {
        "title": "comparison",
        "config": None,
        "command": None,
        **(record or {}),
        "format": store.FORMAT,
        "protocol": {
            **settings,
            "keep_params": keep_params,
            "optimizer": registry.stable_repr(optimizer),
            "learning_rates": learning_rates,
            "periods": list(periods or ()),
            "target_loss": target_loss,
            "select": select,
            "maximise": bool(maximise),
            "task": fingerprint,
        },
        "seeds": seeds,
        "methods": _method_records(chosen, periods_of, programs),
        "extended": [],
        "kernels": list(layers.kernels),
        "feedback_kernels": list(layers.feedback_kernels),
        "backprop_kernels": list(layers.backprop_kernels),
        "examples": task.examples,
        "window": statistics.WINDOW,
        "claims": [claim.to_dict() for claim in as_claims(claims)],
        "loops": {name: "products" if p.products else "scan" for name, (p, _) in programs.items()},
        **environment.provenance(),
    }
    _check_processes_agree(full_record)
    if out is None and keep_params:
        raise ValueError(
            "keep_params is True, but out is None; expected out=, a directory for params."
        )
    with contextlib.ExitStack() as stack:
        out_store, path = None, None
        if jax.process_index() == 0:
            path = pathlib.Path(out or stack.enter_context(tempfile.TemporaryDirectory()))
            stack.enter_context(files.locked(path))
            out_store = store.Store(path)
            full_record["extended"] = out_store.record.get("extended", [])
            _check_claims(claims, task, {*chosen, *out_store.record.get("methods", ())})
            if note := results.backprop_note(full_record):
                warnings.warn(note, stacklevel=2)
        while True:
            rates = _from_first_process([*learning_rates, *full_record["extended"]])
            mine = points(rates)
            if out_store:
                out_store.begin(
                    full_record, [_run(name, p) for name, of in mine.items() for p in of]
                )
            start = time.perf_counter()
            _train(task, programs, mine, chunk_size, memory_limit, on_progress, out_store)
            more = []
            if out_store:
                if not out_store.finished:
                    out_store.finish(functools.partial(_complete_tables, out_store.record, start))
                found = comparison.load(out_store.path)
                more = _rates_to_add(found, extend)
            if not _from_first_process([float(len(more))])[0]:
                break
            full_record["extended"] = _from_first_process([*full_record["extended"], *more])
    if out_store is None:
        return None
    if out is None:
        found.path = None
    return found


def _complete_tables(record, start, tables):
    """The tables with the column `steps_to_target`, and entries of the record.

    The target loss is known only when all runs are done.
    """
    found = comparison.Comparison(record, tables)
    target = None if math.isnan(found.target_loss) else found.target_loss
    additions = {"target_loss": target, "seconds": round(time.perf_counter() - start, 1)}
    return tables | {"runs": found.runs}, additions


def _rates_to_add(found: comparison.Comparison, extend: int) -> list[float]:
    """The rates to add beyond an edge where some method is best and no run diverged."""
    base, rates = found.protocol["learning_rates"], found.rates
    if len(base) < 3 or not extend:
        return []
    best = [found.best_rate(m, t) for m, of in found.methods.items() for t in of["periods"]]
    more = []
    for edge, neighbour, sign in ((rates[0], rates[1], -1), (rates[-1], rates[-2], 1)):
        added = sum(sign * (rate - base[0 if sign < 0 else -1]) > 0 for rate in rates)
        diverged = found.runs["diverged"][found.runs["learning_rate"] == edge].any()
        if edge in best and added < extend and not diverged:
            more.append(float(f"{edge * edge / neighbour:.3g}"))
    return more


@dataclasses.dataclass(frozen=True)
class Program:
    """A training as a function that one or several methods share.

    Attributes:
        run: the whole training as one function; see `loops.scanned`.
        products: whether its convolutions are computed as matrix products.
        digest: a hash of the program.
    """

    run: Callable[..., Any]
    products: bool
    digest: str


def _programs(task, chosen, layers, settings, keep_params) -> dict[str, tuple[Program, int]]:
    """The program of each method, and the method's index in it.

    Every program is traced, so that errors appear before any training. The registry fixes which
    methods share a program, so no result depends on the other methods of a comparison.
    """
    made: dict[Any, Program] = {}
    found = {}
    for name, method in chosen.items():
        key = trial.shared_key(method)
        like = {"where": method.where, "initializer": method.initializer, "init": method.init}
        members = {
            trial.shared_key(one): dataclasses.replace(one, **like)
            for one in registry.METHODS.values()
            if not one.needs and trial.shared_key(one) is not None
        }
        if key not in members:
            members, key = {None: method}, None
        program_key = name if key is None else tuple(map(id, like.values()))
        if program_key not in made:
            made[program_key] = _program(
                task, name, tuple(members.values()), layers, settings, keep_params
            )
        found[name] = made[program_key], list(members).index(key)
    return found


def _program(task, name, members, layers, settings, keep_params) -> Program:
    functions = trial.make(task, members, layers, keep_params=keep_params, **settings)
    run = loops.scanned(functions)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    args = scalar, jax.ShapeDtypeStruct((), jnp.float32), scalar, scalar, trial.data_of(task)
    try:
        jaxpr = jax.make_jaxpr(run)(*args)
    except Exception as error:
        raise ValueError(
            f"the method {name!r} does not fit the task: {type(error).__name__}: {error}"
        ) from error
    products = jax.devices()[0].platform == "cpu" and convolutions.convolves(jaxpr)
    digest = hashlib.sha256(checks.program_text(jaxpr).encode()).hexdigest()[:16]
    return Program(run, products, digest)


def _train(task, programs, points, chunk_size, memory_limit, on_progress, out_store):
    """Trains every run that is not done yet, and stores each part as soon as it is done."""
    stored = out_store.done() if out_store else set()
    finished = {
        name: _from_first_process([float(_run(name, point) in stored) for point in mine])
        for name, mine in points.items()
    }
    total = sum(map(len, points.values()))
    data = trial.data_of(task)
    for name, (program, index) in programs.items():
        mine = points[name]
        num_done = int(sum(finished[name]))
        done_by_others = int(sum(map(sum, finished.values()))) - num_done

        def progress(done, in_all, name=name, num_done=num_done, done_by_others=done_by_others):
            if on_progress:
                so_far = done_by_others + (num_done if done is None else done)
                on_progress(name, done, in_all, so_far, total)

        progress(None, len(mine))
        keywords = {
            "args": (jnp.int32(index), data),
            "done": np.flatnonzero(finished[name]).tolist(),
            "chunk_size": chunk_size,
            "on_progress": progress,
        }
        parts = sweeps.iterate(program.run, mine, memory_limit=memory_limit, **keywords)
        for part in parts:
            if out_store:
                out_store.add([_run(name, mine[i]) for i in part.indices], part.results)
        finished[name] = [1.0] * len(mine)


def _as_list(values) -> list:
    """A list of Python numbers, from a number or any sequence of numbers."""
    return np.ravel([*values] if isinstance(values, Iterable) else values).tolist()


def _run(name, point) -> store.Run:
    return store.Run(name, point.learning_rate, point.seed, point.period)


def _check_select(task, select, maximise):
    columns = ["train_loss"]
    if task.validation is not None:
        columns += [f"validation_{name}" for name in dict.fromkeys(("loss", *task.metrics))]
    grids.check_known("select", select, columns)
    known = (False, None) if select.endswith("_loss") else (True, False)
    if maximise not in known:
        raise ValueError(
            f"maximise is {maximise!r} for {select}; expected {known[0]} or {known[1]}."
        )


def _check_claims(claims, task, methods):
    """Raises ValueError for a claim on a method or a metric that cannot be in the results."""
    parts = [part for part in ("validation", "test") if getattr(task, part) is not None]
    names = dict.fromkeys(("loss", *task.metrics))
    metrics = ["train_loss", *(f"{part}_{name}" for part in parts for name in names)]
    for claim in as_claims(claims):
        for test in claim.tests:
            if isinstance(test, Difference | Share):
                grids.check_known(f"claim {claim.key!r}: metric", test.metric, metrics)
        for name in (name for test in claim.tests for name in test.method_names):
            if name not in methods | registry.METHODS.keys():
                raise ValueError(
                    f"claim {claim.key!r} names the method {name!r}; expected one of this "
                    f"comparison, {', '.join(sorted(methods))}, or of soap_jax.study.METHODS."
                )


def _method_records(chosen, periods_of, programs) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "label": method.label or name,
            "color": method.color,
            "reference": method.reference,
            "isolates": method.isolates,
            "paper": method.paper,
            "description": method.describe(),
            "exact": method.exact,
            "has_feedback": method.has_feedback,
            "program": f"{programs[name][1]} of {programs[name][0].digest}",
            "init": method.init and registry.stable_repr(method.init),
            "periods": list(periods_of[name]),
        }
        for name, method in chosen.items()
    }


def _check_processes_agree(full_record):
    """Raises ValueError, in every process, if processes were started differently."""
    known = {
        name: full_record[name] for name in ("protocol", "seeds", "methods", "versions", "settings")
    }
    try:
        digest = np.frombuffer(hashlib.sha256(repr(known).encode()).digest(), np.uint8)
        multihost_utils.assert_equal(digest)
    except AssertionError:
        raise ValueError(
            "the processes of this comparison were started with different options, different "
            "versions of soap_jax or jax, or different settings of JAX or XLA; expected the same "
            "in every process."
        ) from None


def _from_first_process(numbers: list[float]) -> list[float]:
    """The numbers of the first process, in every process."""
    if jax.process_count() == 1:
        return numbers
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    mine = np.resize(np.array([*numbers, 0.0], np.float64), size).view(np.uint32)  # x64 is off
    return multihost_utils.broadcast_one_to_all(mine).view(np.float64).tolist()
