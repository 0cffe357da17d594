"""The command line: `soap-jax study`, `soap-jax report`. The only place that prints.

Heavy imports wait until a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import pathlib
import reprlib
import sys
import time
import traceback
from typing import Annotated

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit("The command line needs: pip install 'soap_jax[study]'") from error

from soap_jax.study.config import (
    ACTIVATIONS,
    DATASETS,
    METHODS,
    OPTIMIZERS,
    WEIGHT_DECAY,
    StudyConfig,
)
from soap_jax.study.single_config import TrainConfig

app = typer.Typer(
    help="Feedback alignment for JAX and Flax.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


_DECAY_BY_DEFAULT = f"0; {WEIGHT_DECAY:g} with kp"


def _comma_separated(values) -> str:
    return ",".join(str(value) for value in values)


def _show_version(value: bool):
    if value:
        import soap_jax

        typer.echo(f"soap_jax {soap_jax.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
):
    pass


@app.command()
def study(
    dataset: Annotated[
        str, typer.Option(help=f"Data set: {', '.join(DATASETS)}. Only digits needs no download.")
    ] = StudyConfig.dataset,
    methods: Annotated[
        str, typer.Option(help=f"Methods to compare, of {', '.join(METHODS)}.")
    ] = _comma_separated(StudyConfig.methods),
    learning_rates: Annotated[
        str, typer.Option(help="Grid of learning rates, the same for every method.")
    ] = _comma_separated(StudyConfig.learning_rates),
    seeds: Annotated[
        int, typer.Option(help="Number of seeds; every method starts alike from each.")
    ] = StudyConfig.seeds,
    epochs: Annotated[
        int, typer.Option(help="Passes over the training data.")
    ] = StudyConfig.epochs,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = StudyConfig.batch_size,
    hidden: Annotated[str, typer.Option(help="Widths of the hidden layers.")] = _comma_separated(
        StudyConfig.hidden
    ),
    activation: Annotated[
        str, typer.Option(help=f"Activation: {', '.join(ACTIVATIONS)}.")
    ] = StudyConfig.activation,
    optimizer: Annotated[
        str, typer.Option(help=f"Optimiser: {', '.join(OPTIMIZERS)}. Claims are about sgd.")
    ] = StudyConfig.optimizer,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            help="Decoupled weight decay, of every method alike.", show_default=_DECAY_BY_DEFAULT
        ),
    ] = StudyConfig.weight_decay,
    init: Annotated[
        str,
        typer.Option(
            help="Initial weights: matched (alike for all methods) or soap (the original package's,"
            " where methods without feedback start as PyTorch does)."
        ),
    ] = StudyConfig.init,
    inputs: Annotated[
        str,
        typer.Option(
            help="Pixels: standard (mean 0 and variance 1 over the training examples) or unit (0 to"
            " 1)."
        ),
    ] = StudyConfig.inputs,
    period: Annotated[
        str,
        typer.Option(
            help="Parameter updates from one synchronisation to the next; methods that sync run "
            "with each."
        ),
    ] = _comma_separated(StudyConfig.periods),
    target_loss: Annotated[
        float, typer.Option(help="Training loss to which steps are counted.")
    ] = StudyConfig.target_loss,
    evaluations: Annotated[
        int, typer.Option(help="How often a run is evaluated, in equal distances.")
    ] = StudyConfig.evaluations,
    data_dir: Annotated[
        pathlib.Path | None,
        typer.Option(help="Directory with the published files; else TensorFlow Datasets is asked."),
    ] = None,
    chunk_size: Annotated[
        int | None,
        typer.Option(
            help="At most so many runs per device at once; bounds memory on accelerators.",
            show_default="4 on CPU, else 64",
        ),
    ] = StudyConfig.chunk_size,
    memory_limit: Annotated[
        float | None,
        typer.Option(
            help="At most so many GiB per device for the program (a process takes about 0.7 "
            "besides); makes chunks smaller where needed."
        ),
    ] = StudyConfig.memory_limit,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="Start jax.distributed: the same command in every process (SLURM, TPU pods, ...).",
        ),
    ] = False,
    out: Annotated[
        pathlib.Path | None,
        typer.Option(help="Where results go.", show_default="results/DATASET"),
    ] = None,
):
    """Compare backprop, feedback alignment and its relatives over rates and seeds.

    Prints verdicts and writes a report, figures, tidy results and the full configuration. A study
    that was stopped goes on where it was when the same command is given again.
    """
    with _errors():
        config = StudyConfig(
            dataset=dataset,
            methods=_split("methods", methods, str),
            learning_rates=_split("learning-rates", learning_rates, float),
            seeds=seeds,
            epochs=epochs,
            batch_size=batch_size,
            hidden=_split("hidden", hidden, int),
            activation=activation,
            optimizer=optimizer,
            weight_decay=weight_decay,
            init=init,
            inputs=inputs,
            periods=_split("period", period, int),
            target_loss=target_loss,
            evaluations=evaluations,
            chunk_size=chunk_size,
            memory_limit=memory_limit,
        )
        _run_study(config, data_dir, out or pathlib.Path("results") / dataset, distributed)


@app.command()
def report(
    directory: Annotated[pathlib.Path, typer.Argument(help="Directory of a finished study.")],
    target_loss: Annotated[
        float | None,
        typer.Option(
            help="Count steps to another training loss; the report goes to a directory of its own.",
            show_default="that of the study",
        ),
    ] = None,
    out: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="Where the report goes.",
            show_default="the study's directory; results/report-NAME if that may only be read",
        ),
    ] = None,
):
    """Draw all conclusions again from a study's results, without training anything."""
    with _errors():
        start = time.perf_counter()
        from soap_jax.study import directory as directories
        from soap_jax.study import files, results

        study = directories.ResultsDir(directory)
        writable = files.is_writable(directory)
        if out is None and not writable:
            out = pathlib.Path("results") / f"report-{directory.resolve().name}"
            _console().print(f"{directory} may only be read: the report goes to {out}.")
        out = out or directory
        with contextlib.ExitStack() as held:
            paths = (directory, out) if writable else (out,)
            for path in {path.resolve(): path for path in paths}.values():
                held.enter_context(files.locked(path))
            config, tables = study.config, study.read()
            if target_loss is not None:
                config = dataclasses.replace(config, target_loss=target_loss)
                tables = results.at_target(tables, target_loss)
                out = out / f"target-{target_loss:g}"
                _console().print(
                    f"Loss {target_loss:g} was chosen after the runs: what follows is exploratory."
                )
            _report(config, study.facts, tables, out, start)


@app.command()
def train(
    dataset: Annotated[
        str, typer.Option(help=f"Data set: {', '.join(DATASETS)}. Only digits needs no download.")
    ] = TrainConfig.dataset,
    method: Annotated[
        str, typer.Option(help=f"Method: {', '.join(METHODS)}.")
    ] = TrainConfig.method,
    learning_rate: Annotated[
        float, typer.Option(help="Learning rate.")
    ] = TrainConfig.learning_rate,
    seed: Annotated[
        int, typer.Option(help="Of weights, feedback and the order of examples, as in a study.")
    ] = TrainConfig.seed,
    epochs: Annotated[
        int, typer.Option(help="Passes over the training data; more later go on from these.")
    ] = TrainConfig.epochs,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = TrainConfig.batch_size,
    hidden: Annotated[str, typer.Option(help="Widths of the hidden layers.")] = _comma_separated(
        TrainConfig.hidden
    ),
    activation: Annotated[
        str, typer.Option(help=f"Activation: {', '.join(ACTIVATIONS)}.")
    ] = TrainConfig.activation,
    optimizer: Annotated[
        str, typer.Option(help=f"Optimiser: {', '.join(OPTIMIZERS)}.")
    ] = TrainConfig.optimizer,
    weight_decay: Annotated[
        float | None,
        typer.Option(help="Decoupled weight decay.", show_default=_DECAY_BY_DEFAULT),
    ] = TrainConfig.weight_decay,
    init: Annotated[
        str, typer.Option(help="Initial weights: matched or soap, as in a study.")
    ] = TrainConfig.init,
    inputs: Annotated[
        str, typer.Option(help="Pixels: standard or unit, as in a study.")
    ] = TrainConfig.inputs,
    period: Annotated[
        int,
        typer.Option(
            help="Parameter updates from one synchronisation to the next, for methods that sync."
        ),
    ] = TrainConfig.period,
    checkpoint_every: Annotated[
        int, typer.Option(help="Epochs from one checkpoint to the next.")
    ] = TrainConfig.checkpoint_every,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep.")] = TrainConfig.keep,
    data_dir: Annotated[
        pathlib.Path | None,
        typer.Option(help="Directory with the published files; else TensorFlow Datasets is asked."),
    ] = None,
    out: Annotated[
        pathlib.Path | None,
        typer.Option(help="Where results go.", show_default="results/train/DATASET-METHOD"),
    ] = None,
):
    """Train one model by one method, with curves and checkpoints.

    A training that was stopped goes on from its last checkpoint when the same command is given
    again; with more epochs, a finished one goes on too.
    """
    with _errors():
        config = TrainConfig(
            dataset=dataset,
            method=method,
            learning_rate=learning_rate,
            seed=seed,
            epochs=epochs,
            batch_size=batch_size,
            hidden=_split("hidden", hidden, int),
            activation=activation,
            optimizer=optimizer,
            weight_decay=weight_decay,
            init=init,
            inputs=inputs,
            period=period,
            checkpoint_every=checkpoint_every,
            keep=keep,
        )
        default = pathlib.Path("results") / "train" / f"{dataset}-{method}"
        _run_train(config, data_dir, out or default)


@contextlib.contextmanager
def _errors():
    """Turns what a user can mend into one line, and Ctrl-C into the shell's exit code for it."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):  # XLA's, typeless
            typer.secho(
                f"error: not enough memory ({_first_line(error)}). Ask for smaller --hidden or "
                "--batch-size, or in a study for a smaller --chunk-size.",
                fg="red",
                err=True,
            )
            code = 2
        elif _one_of_many():
            traceback.print_exc()
            code = 1
        else:
            raise
    else:
        return
    if code == 130 or _one_of_many():  # JAX's own exit waits for what runs, and for the others
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _one_of_many() -> bool:
    """Whether other processes take part in the study."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _split(option, text, kind):
    """Parses a comma-separated option."""
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(
            f"--{option} is {reprlib.repr(text)}; expected numbers with commas between them."
        ) from None


def _run_study(
    config: StudyConfig, data_dir: pathlib.Path | None, out: pathlib.Path, distributed: bool
):
    start = time.perf_counter()
    from soap_jax.study import files

    files.check_path(out)  # before JAX starts, which takes seconds
    jax = _start_jax(distributed)
    from soap_jax import data
    from soap_jax.study import directory, results, runner

    first = jax.process_index() == 0
    console = _console(quiet=not first)
    if not first:
        if runner.first_process_says():
            runner.train(config, data.load(config.dataset, data_dir=data_dir), None)
        return
    with files.locked(out):
        into = directory.ResultsDir(out, config)
        runner.first_process_says(not into.finished)
        if into.finished:
            made_by = into.facts["versions"]
            console.print(
                f"{out} already holds the results of this configuration (soap_jax "
                f"{made_by['soap_jax']}, jax {made_by['jax']}); showing them. Delete it to run "
                "again."
            )
            tables = into.read()
        else:
            dataset = data.load(config.dataset, data_dir=data_dir)
            into.begin(results.provenance(config, dataset))
            tables = _train(into, dataset, console, start)
        _report(config, into.facts, tables, out, start)


def _start_jax(distributed: bool):
    """JAX with a CPU device for each core: a sweep puts a run on each."""
    import jax

    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        # Two at least, even on one core: for one XLA compiles otherwise, and the last bits differ.
        jax.config.update("jax_num_cpu_devices", max(2, _num_cores()))
    if distributed:
        jax.distributed.initialize()
    return jax


def _num_cores() -> int:
    """The number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _console(quiet: bool = False):
    from rich.console import Console

    return Console(highlight=False, markup=False, quiet=quiet)


def _decay(config: StudyConfig | TrainConfig) -> str:
    return f", weight decay {config.weight_decay:g}" if config.weight_decay else ""


def _train(into, dataset, console, start):
    """Trains what is missing, showing progress; returns the tables."""
    import jax

    from soap_jax.study import experiment, runner, screen

    config = into.config
    total = sum(len(experiment.points_of(config, method)) for method in config.methods)
    before = sum(len(into.done(method)) for method in config.methods)
    num_train = into.facts["examples"]["train"]
    steps = experiment.evaluation_steps(config, num_train)[-1]
    console.print(
        f"{config.dataset}: {num_train} training examples ({dataset.source}). {total} runs of "
        f"{steps} steps, {len(config.methods)} methods{_decay(config)}, on {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}."
    )
    if before:
        console.print(f"{before} runs are there already; going on with the others.")
    try:
        with screen.StudyProgress(console) as progress:
            runner.train(config, dataset, into, on_progress=progress.show)
    except BaseException:
        done = sum(len(into.done(method)) for method in config.methods)
        console.print(
            f"Stopped with {done} of {total} runs kept in {into.path}. The same command goes on "
            "from there."
        )
        raise
    return into.finish(seconds=round(time.perf_counter() - start, 1), runs_before=before)


def _report(config, facts, tables, out, start):
    """Draws conclusions from the tables, writes and prints them."""
    from soap_jax.study import claims, figures, files, mediation, report, screen, summary

    methods = summary.summarise(tables["runs"])
    findings = claims.evaluate(config, tables)
    effects = mediation.mediate(config, tables)
    conclusions = {
        "summary": methods,
        "claims": claims.tabulate(findings),
        "mediation": mediation.tabulate(effects),
    }
    for name, table in conclusions.items():
        files.write_text(out / f"{name}.csv", table.to_csv(index=False))
    figures.draw_all(config, tables, findings, effects, out / "figures")
    page = report.render(config, facts, tables, findings, effects)
    files.write_text(out / "report.html", page)

    console = _console()
    shown = summary.base(config, methods)
    console.print()
    console.print(screen.summary_table(config, shown))
    console.print(screen.summary_notes(config, shown))
    console.print()
    console.print(screen.claims_table(findings))
    console.print(screen.claims_notes(findings))
    console.print(
        f"\nReport: {out / 'report.html'}\nBeside it: tables (Parquet, CSV) and figures (PNG, "
        f"PDF). {time.perf_counter() - start:.0f} s in all.",
        soft_wrap=True,  # a path in one piece
    )


def _run_train(config: TrainConfig, data_dir: pathlib.Path | None, out: pathlib.Path):
    start = time.perf_counter()
    console = _console()
    from soap_jax.study import files

    files.check_path(out)
    from soap_jax import data
    from soap_jax.study import single

    with files.locked(out):
        into = single.TrainDir(out, config)
        if into.finished:
            console.print(
                f"{out} already holds this model. Ask for more --epochs to train it further, or "
                "delete it to train again."
            )
        else:
            dataset = data.load(config.dataset, data_dir=data_dir)
            into.begin(dataset)
            _train_one(into, dataset, console)
        _show_trained(into, console, start)


def _show_trained(into, console, start):
    """Draws the curves of a finished training and prints its result."""
    from soap_jax.study import single_figure

    result = into.facts["result"]
    loss, accuracy = (
        math.nan if result[name] is None else result[name]
        for name in ("test_loss", "test_accuracy")
    )
    single_figure.draw(into.config, into.read_curves(), into.path)
    console.print(
        f"\nTest accuracy {100 * accuracy:.1f} %, loss {loss:.4f}, after {result['epochs']} epochs."
    )
    if result["diverged"]:
        console.print(
            "It diverged: a loss is not finite, or ends far above where it began. Try a smaller "
            "--learning-rate, with another --out."
        )
    console.print(
        f"In {into.path}: train.json, curves (PNG, PDF, Parquet, CSV) and checkpoints of the "
        f"epochs {', '.join(map(str, into.kept()))}. {time.perf_counter() - start:.0f} s in all."
    )


def _train_one(into, dataset, console):
    """Trains one model until it is done, showing progress."""
    import jax

    from soap_jax.study import screen, single

    config = into.config
    sizes = (dataset.train.images[0].size, *config.hidden, dataset.num_classes)
    console.print(
        f"{config.dataset} ({dataset.source}). {METHODS[config.method]}: a "
        f"{'-'.join(map(str, sizes))} {config.activation} network, {config.optimizer} at rate "
        f"{config.learning_rate:g}{_decay(config)}, seed {config.seed}, on "
        f"{jax.devices()[0].device_kind}."
    )
    if into.kept():
        console.print(f"Going on from the checkpoint of epoch {into.kept()[-1]}.")
    try:
        with screen.EpochProgress(console, config.epochs) as progress:
            single.train(into, dataset, on_epoch=progress.show)
    except BaseException:
        kept = into.kept()
        console.print(
            f"Stopped with the checkpoint of epoch {kept[-1]} kept in {into.path}. The same "
            "command goes on from there."
            if kept
            else f"Stopped before the first checkpoint (--checkpoint-every is "
            f"{config.checkpoint_every})."
        )
        raise


def main():
    """Entry point of the `soap-jax` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # ° and ± are not in every terminal's encoding
            stream.reconfigure(errors="replace")
    app()
