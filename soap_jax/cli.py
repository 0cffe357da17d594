"""The command line: `soap-jax study`. The only place that prints.

Heavy imports wait until a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import pathlib
import time
from typing import Annotated

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit("The command line needs: pip install 'soap_jax[study]'") from error

from soap_jax.study.config import ACTIVATIONS, DATASETS, METHODS, StudyConfig

app = typer.Typer(
    help="Feedback alignment for JAX and Flax.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
        str, typer.Option(help="Grid of learning rates of plain SGD, the same for every method.")
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
    period: Annotated[
        int, typer.Option(help="Parameter updates from one sign synchronisation to the next.")
    ] = StudyConfig.period,
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
    out: Annotated[
        pathlib.Path | None,
        typer.Option(help="Where results go.", show_default="results/DATASET"),
    ] = None,
):
    """Compare backprop, feedback alignment and sign synchronisation over rates and seeds.

    Prints a table and writes tidy results, the full configuration and figures.
    """
    try:
        config = StudyConfig(
            dataset=dataset,
            methods=_split("methods", methods, str),
            learning_rates=_split("learning-rates", learning_rates, float),
            seeds=seeds,
            epochs=epochs,
            batch_size=batch_size,
            hidden=_split("hidden", hidden, int),
            activation=activation,
            period=period,
            target_loss=target_loss,
            evaluations=evaluations,
            chunk_size=chunk_size,
        )
        _run_study(config, data_dir, out or pathlib.Path("results") / dataset)
    except (ValueError, OSError, ImportError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from None


def _split(option, text, kind):
    """Parses a comma-separated option."""
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(
            f"--{option} is {text!r}; expected numbers with commas between them."
        ) from None


def _run_study(config: StudyConfig, data_dir: pathlib.Path | None, out: pathlib.Path):
    start = time.perf_counter()
    import jax
    from rich.console import Console

    # One CPU device per core: a sweep puts a run on each. Must come before JAX is first used.
    jax.config.update("jax_num_cpu_devices", _num_cores())

    from soap_jax import data
    from soap_jax.study import figures, results, summary

    console = Console(highlight=False, markup=False)
    directory = results.ResultsDir(out, config)
    if directory.finished:
        made_by = directory.facts["versions"]
        console.print(
            f"{out} already holds the results of this configuration (soap_jax "
            f"{made_by['soap_jax']}, jax {made_by['jax']}); showing them. Delete it to run again."
        )
        tables = directory.read()
    else:
        dataset = data.load(config.dataset, data_dir=data_dir)
        facts = results.provenance(config, dataset)
        tables = _train(config, dataset, console)
        facts["seconds"] = round(time.perf_counter() - start, 1)
        directory.write(tables, facts)
    table = summary.summarise(tables["runs"])
    directory.write_table("summary", table)
    paths = figures.draw_all(config, tables, out / "figures")
    _print_summary(console, config, table)
    console.print(
        f"\nResults in {out} (study.json, evaluations.csv, runs.csv, summary.csv) and figures, "
        f"first {paths[0]}. {time.perf_counter() - start:.0f} s in all."
    )


def _num_cores() -> int:
    """The number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _train(config, dataset, console):
    """Trains every method, showing progress; returns the tidy tables."""
    import jax
    import pandas as pd
    from rich import progress

    from soap_jax.study import experiment, results

    num_train = len(experiment.split(dataset).train[1])
    marks = experiment.evaluation_steps(config, num_train)
    num_runs = len(config.learning_rates) * config.seeds
    devices = jax.local_devices()
    console.print(
        f"{config.dataset}: {num_train} training examples ({dataset.source}). {num_runs} runs of "
        f"{marks[-1]} steps for each of {len(config.methods)} methods, on {len(devices)} x "
        f"{devices[0].device_kind}."
    )
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("runs"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    parts = []
    with progress.Progress(*columns, console=console, transient=True) as bar:
        for method in config.methods:
            begin = time.perf_counter()
            task = bar.add_task(f"{METHODS[method]}: compiling", total=None)
            compiled = 0.0

            def show(done, total, task=task, begin=begin, method=method):
                nonlocal compiled
                if done == 0:
                    compiled = time.perf_counter() - begin
                    bar.reset(task, description=METHODS[method])
                bar.update(task, completed=done, total=total)

            record = experiment.train_method(config, method, dataset, on_progress=show)
            parts.append(results.tidy(config, method, record, marks))
            bar.remove_task(task)
            console.print(
                f"  {METHODS[method]:<22} {num_runs} runs in "
                f"{time.perf_counter() - begin - compiled:.1f} s, compiled in {compiled:.1f} s"
            )
    return {
        name: pd.concat([part[name] for part in parts], ignore_index=True)
        for name in results.TABLES
    }


def _print_summary(console, config, table):
    import math

    from rich import box
    from rich.table import Table

    shared = table["shared_rate"].iloc[0]
    reference = METHODS["bp"] if "bp" in config.methods else "all methods"

    def rate(row):
        value = row["best_rate"]
        return "-" if math.isnan(value) else f"{value:g}" + "*" * bool(row["best_rate_at_edge"])

    def accuracy(row):
        mean, high = 100 * row["test_accuracy"], 100 * row["test_accuracy_high"]
        if math.isnan(mean):
            return "-"
        return f"{mean:.1f}" if math.isnan(high) else f"{mean:.1f} ± {high - mean:.1f}"

    def steps(row):
        value = row["steps_to_target"]
        return "-" if math.isnan(value) else "> " * bool(row["censored"]) + f"{value:.0f}"

    def ratio(row):
        value, low, high = (row["ratio_to_bp" + end] for end in ("", "_low", "_high"))
        if math.isnan(value):
            return "1" if row["method"] == "bp" and not math.isnan(shared) else "-"
        if row["censored"]:
            return f"> {value:.2f}"
        return f"{value:.2f}" if math.isnan(low) else f"{value:.2f} [{low:.2f}, {high:.2f}]"

    screen = Table(
        title=f"{config.dataset}, {config.seeds} seeds, 95 % intervals",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    screen.add_column("method", no_wrap=True)
    target = f"{config.target_loss:g}"
    for title in ("best\nrate", "test\naccuracy %", f"steps to\nloss {target}", "ratio\nto bp"):
        screen.add_column(title, justify="right", no_wrap=True)
    screen.add_column("diverged", justify="right", no_wrap=True)
    for _, row in table.iterrows():
        screen.add_row(
            METHODS[row["method"]],
            rate(row),
            accuracy(row),
            steps(row),
            ratio(row),
            f"{row['diverged']} of {row['runs']}",
        )
    console.print()
    console.print(screen)
    if math.isnan(shared):
        console.print(
            f"At no learning rate does every run of {reference} reach loss {target}: no steps to "
            "compare."
        )
    else:
        console.print(
            "Accuracy at each method's best rate, chosen on validation data. Steps at rate "
            f"{shared:g}, the smallest at which every run of {reference} gets there."
        )
    if table["best_rate_at_edge"].any():
        console.print("* at the edge of the grid: the best rate may lie beyond it.")


def main():
    """Entry point of the `soap-jax` command."""
    app()
