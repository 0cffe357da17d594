"""The command line: `soap-jax study`, `soap-jax report`, `soap-jax train`.

The only place that prints. Heavy imports wait until a command runs, so that `--help` answers at
once. A field below, or of the configuration that it extends, is an option, and its line under
Attributes is the option's help.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
import os
import pathlib
import re
import shlex
import sys
import time
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any

try:
    import tyro
except ModuleNotFoundError as error:
    raise SystemExit("The command line needs: pip install 'soap_jax[study]'") from error

from soap_jax.study import preset

if typing.TYPE_CHECKING:
    from soap_jax.study import task_files

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
CACHE_SIZE = 2**30
"""The most bytes of compiled programs that are kept; JAX removes those longest unused."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Running:
    """How a study runs.

    Attributes:
        quick: the same at a size that takes about a minute: at most three seeds, three rates, one
            period and 300 steps.
        dry_run: say how many runs and steps there would be, and about how long they would take.
        cache: keep compiled programs for the next time, in the user's cache directory.
        distributed: start jax.distributed: the same command in every process (SLURM, TPU pods).
        out: where results go; by default results/NAME, with --quick results/NAME-quick.
    """

    quick: Flag = False
    dry_run: Flag = False
    cache: bool = True
    distributed: Flag = False
    out: pathlib.Path | None = None

    def place(self, name: str) -> pathlib.Path:
        """The directory of results."""
        return _checked(self.out or pathlib.Path("results") / (name + "-quick" * self.quick))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(_Running, preset.StudyConfig):
    """Compare backprop, feedback alignment and its relatives over rates and seeds.

    Prints verdicts and writes a report, figures, tidy results and the full configuration. A study
    that was stopped goes on where it was when the same command is given again.

    Own models: `soap-jax study my_task.py`, a file that defines `task`, a soap_jax.study.Task, and,
    if it likes, `methods`, `claims`, `optimizer` and other values for options (`steps`, ...).

    Attributes:
        data_dir: directory with the published files of the data set; else TensorFlow Datasets is
            asked.
    """

    data_dir: pathlib.Path | None = None

    def __post_init__(self):
        """Its values are checked when the configuration is made of them."""

    def run(self):
        """Compares."""
        config = _as(preset.StudyConfig, self)
        config = config.smaller() if self.quick else config
        name = pathlib.Path(config.data or config.dataset).stem
        out = self.place(name)
        _start_jax(cache=self.cache, distributed=self.distributed)
        dataset = _load(config, self.data_dir)
        arguments = preset.comparison_arguments(config, dataset)
        facts = {"config": dataclasses.asdict(config), "data_source": dataset.source}
        about = f" ({dataset.source}), {preset.network_summary(config, dataset)}"
        _compare(arguments, out, {"title": name, **facts}, about=about, dry_run=self.dry_run)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskStudy(_Running, preset.Protocol):
    """Compare methods on a task of one's own, or on several.

    Attributes:
        task: a file that defines `task`, a soap_jax.study.Task, or `tasks`, several by name; and
            optionally `methods`, `claims`, `optimizer` and other defaults of the options below,
            such as `steps`; `smaller` has those of --quick. Each of several tasks has its results
            in a directory of its name.
        select: the column by which rates are chosen; by default validation_loss, without validation
            data train_loss.
        maximise: whether its largest value is best.
    """

    task: tyro.conf.Positional[pathlib.Path]
    select: str | None = None
    maximise: bool | None = None

    def run(self, file: task_files.TaskFile):
        """Compares what the file defines."""
        options = self.smaller(self._quick(file)) if self.quick else self
        chosen = {name: getattr(file, name) for name in ("methods", "claims", "optimizer")}
        chosen |= {"select": self.select, "maximise": self.maximise}
        out = self.place(self.task.stem)
        for name, task in file.tasks.items():
            title = " ".join(filter(None, (self.task.stem, name)))
            arguments = options.arguments() | chosen | {"task": task}
            _compare(arguments, out / name, {"title": title}, dry_run=self.dry_run)

    def _quick(self, file: task_files.TaskFile) -> dict[str, Any]:
        """What the file changes with --quick; lists that the command line gives stay."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        defaults |= file.options
        return {
            name: value
            for name, value in file.smaller.items()
            if not isinstance(value, tuple) or getattr(self, name) == defaults[name]
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Draw all conclusions again from a study's results, without training anything.

    Attributes:
        directory: of a finished study.
        target_loss: count steps to another training loss; the report goes to a directory of its
            own.
        out: where the report goes; by default the study's directory, or results/report-NAME if
            that may only be read.
    """

    directory: tyro.conf.Positional[pathlib.Path]
    target_loss: float | None = None
    out: pathlib.Path | None = None

    def run(self):
        """Reports."""
        start = time.perf_counter()
        from soap_jax.study import comparison, files

        found, out = comparison.load(self.directory), self.out
        if out is None and not files.is_writable(self.directory):
            out = pathlib.Path("results") / f"report-{self.directory.resolve().name}"
            _console().print(f"{self.directory} may only be read: the report goes to {out}.")
        out = out or self.directory
        if self.target_loss is not None:
            found = found.at_target(self.target_loss)
            out = out / f"target-{self.target_loss:g}"
            _console().print(
                f"Loss {self.target_loss:g} was chosen after the runs: what follows is exploratory."
            )
        _show(found, out, start)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(preset.TrainConfig):
    """Train one model by one method, with curves and checkpoints.

    A training that was stopped goes on from its last checkpoint when the same command is given
    again; with more epochs, a finished one goes on too.

    Attributes:
        data_dir: directory with the published files of the data set; else TensorFlow Datasets is
            asked.
        cache: keep compiled programs for the next time, in the user's cache directory.
        out: where results go; by default results/train/DATASET-METHOD.
    """

    data_dir: pathlib.Path | None = None
    cache: bool = True
    out: pathlib.Path | None = None

    def __post_init__(self):
        """Its values are checked when the configuration is made of them."""

    def run(self):
        """Trains."""
        start = time.perf_counter()
        config = _as(preset.TrainConfig, self)
        name = f"{pathlib.Path(config.data or config.dataset).stem}-{config.method}"
        out = _checked(self.out or pathlib.Path("results") / "train" / name)
        _start_jax(cache=self.cache)
        from soap_jax.study import files, single

        console = _console()
        with files.locked(out):
            result = (single.read_record(out, config) or {}).get("result")
            if result is not None and result["epochs"] == config.epochs:
                console.print(
                    f"{out} already holds this model. Ask for more --epochs to train it further, "
                    "or delete it to train again."
                )
            else:
                result = self._train(config, out, console)["result"]
        ends = (result[f"test_{name}"] for name in ("loss", "accuracy"))
        loss, accuracy = (math.nan if value is None else value for value in ends)
        console.print(
            f"\nTest accuracy {100 * accuracy:.1f} %, loss {loss:.4f}, after {config.epochs} "
            "epochs."
        )
        if result["diverged"]:
            console.print(
                "It diverged: a loss is not finite, or ends far above where it began. Try a "
                "smaller --learning-rate, with another --out."
            )
        console.print(
            f"In {out}: train.json, curves (figures and tables) and checkpoints of the epochs "
            f"{', '.join(map(str, single.checkpoint_epochs(out)))}. "
            f"{time.perf_counter() - start:.0f} s in all."
        )

    def _train(self, config, out, console):
        from rich import progress

        from soap_jax.study import single
        from soap_jax.study.methods import METHODS

        dataset, before = _load(config, self.data_dir), single.checkpoint_epochs(out)
        console.print(
            f"{dataset.name} ({dataset.source}). {METHODS[config.method].label}, "
            f"{preset.network_summary(config, dataset)}, rate {config.learning_rate:g}, seed "
            f"{config.seed}."
        )
        if before:
            console.print(f"Going on from the checkpoint of epoch {before[-1]}.")
        console.print("\n  epoch   training loss   validation loss   accuracy %   gradient angle")
        bar = progress.Progress(console=console, transient=True)
        task = bar.add_task("  training", total=config.epochs)

        def show(row):
            epoch = int(row["epoch"])
            bar.update(task, completed=epoch)
            if epoch % math.ceil(config.epochs / 10) == 0 or epoch == config.epochs:
                loss = f"{row['train_loss']:.4f}" if epoch else "-"
                angle = next(v for name, v in row.items() if name.startswith("gradient_angle/"))
                console.print(
                    f"  {epoch:>5}   {loss:>13}   {row['validation_loss']:>15.4f}"
                    f"   {100 * row['validation_accuracy']:>10.1f}   {angle:>13.1f}°"
                )

        try:
            with bar:
                return single.train(out, config, dataset, on_epoch=show)
        except BaseException:
            found = single.checkpoint_epochs(out)
            what = f"the checkpoint of epoch {found[-1]} kept in" if found else "no checkpoint in"
            console.print(f"Stopped with {what} {out}. The same command goes on from there.")
            raise


def main():
    """Entry point of the `soap-jax` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # ° and ± are not in every terminal's encoding
            stream.reconfigure(errors="replace")
    if sys.argv[1:] == ["--version"]:
        import soap_jax

        print(f"soap_jax {soap_jax.__version__}")
        return
    with _errors(), _warnings():
        _parse(sys.argv[1:])()


def _parse(args: list[str]) -> Callable[[], None]:
    """Reads a command and its options; returns a function that runs it."""
    task = next((arg for arg in args if arg.endswith(".py")), None)
    command, first = (*args[:2], "-", "-")[:2]
    if not command.startswith("-") and command not in ("study", "report", "train"):
        raise ValueError(f"there is no command {command!r}; expected study, report or train.")
    if command == "study" and task is None and not first.startswith("-"):
        raise ValueError(f"{first} is not a task file; expected a Python file, FILE.py.")
    if command == "study" and task and any(a.partition("=")[0] == "--methods" for a in args):
        raise ValueError(f"--methods is not for task files; define methods in {task}.")
    if len(given := _lengths(args)) > 1:
        raise ValueError(f"{' and '.join(f'--{name}' for name in given)}: expected one of them.")
    study: Any = Annotated[Study, tyro.conf.subcommand("study")]
    file = None
    if args[:1] == ["study"] and task is not None:
        file, default = _read_task_file(task, args)
        study = Annotated[TaskStudy, tyro.conf.subcommand("study", default=default)]
    report = Annotated[Report, tyro.conf.subcommand("report")]
    train = Annotated[Train, tyro.conf.subcommand("train")]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = tyro.cli(
                study | report | train,
                args=args or ["--help"],
                prog="soap-jax",
                description="Feedback alignment for JAX and Flax. --version says which this is.",
                registry=_options(),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        _, *lines = (line.strip("│ ") for line in said.getvalue().splitlines())
        about, *others = re.split("[─-]{5,}", "\n".join(lines).lstrip("-\n"), maxsplit=1)
        more = "".join(others)
        near = re.findall(r"^--[a-z][\w-]+", more, re.MULTILINE) if "Perhaps" in more else ()
        hint = f". Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(" ".join(about.split()) + hint) from None
    return parsed.run if file is None else functools.partial(parsed.run, file)


def _lengths(args: list[str]) -> list[str]:
    """The options among `args` that set the length of a run: steps, epochs."""
    given = {arg.partition("=")[0] for arg in args}
    return [name for name in ("steps", "epochs") if f"--{name}" in given]


def _options() -> tyro.constructors.ConstructorRegistry:
    """How values are written: lists with commas, and nothing for what may be None."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def rule(info):
        kind, *others = typing.get_args(info.type) or (None,)
        many = info.type_origin is tuple
        if not many and (info.type_origin is not types.UnionType or others != [type(None)]):
            return None
        metavar = kind.__name__.upper()

        def read(texts):
            parts = texts[0].split(",") if many else texts
            found = tuple(kind(part.strip()) for part in parts if part.strip())
            return found if many else found[0]

        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=f"{metavar},{metavar},..." if many else metavar,
            instance_from_str=read,
            is_instance=lambda value: True,
            str_from_instance=lambda value: [",".join(map(str, value)) if many else str(value)],
        )

    return registry


def _read_task_file(path: str, args: list[str]) -> tuple[task_files.TaskFile, TaskStudy]:
    """Returns a task file's content, and a command with its values as defaults."""
    _start_jax(cache="--no-cache" not in args, distributed="--distributed" in args)
    from soap_jax.study import task_files

    hints = typing.get_type_hints(TaskStudy)
    file = task_files.read(path, {name: hints[name] for name in hints.keys() - {"task"}})
    defaults = dict(file.options)
    lengths = [name for name in ("steps", "epochs") if defaults.get(name) is not None]
    if len(lengths) > 1:
        raise ValueError(f"{path} defines steps and epochs; expected one of them.")
    if _lengths(args):
        defaults |= dict.fromkeys(lengths)
    return file, TaskStudy(task=pathlib.Path(path), **defaults)


def _as(kind, options):
    """The part of a command's options that is a configuration, checked."""
    return kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)})


def _checked(out: pathlib.Path) -> pathlib.Path:
    """The directory, if there can be one; before JAX starts, which takes seconds."""
    from soap_jax.study import files

    files.check_path(out)
    return out


def _load(config, data_dir):
    from soap_jax import data, tasks

    return tasks.read(config.data) if config.data else data.load(config.dataset, data_dir=data_dir)


def _start_jax(*, cache: bool, distributed: bool = False):
    """JAX with a CPU device for each core, where a sweep puts a run on each; and with its cache.

    JAX finds a program in the cache by its text, all versions and flags, and the device, of a CPU
    by the instructions that it has: so machines may share a home.
    """
    import jax

    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        # Two at least, even on one core: for one XLA compiles otherwise, and the last bits differ.
        mine = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))  # Linux's
        jax.config.update("jax_num_cpu_devices", max(2, len(mine(0))))
    if not cache:
        jax.config.update("jax_enable_compilation_cache", False)
    elif "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        path = pathlib.Path(home) / "soap_jax" / f"jax-{jax.__version__}"
        with contextlib.suppress(OSError):  # without a home that can be written, without a cache
            path.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(path))
            jax.config.update("jax_compilation_cache_max_size", CACHE_SIZE)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if distributed:
        jax.distributed.initialize()
        jax.devices()  # all meet here: later they see at once when one of them ends


def _console(quiet: bool = False):
    from rich.console import Console

    return Console(highlight=False, markup=False, quiet=quiet)


def _compare(arguments, out, record, *, about="", dry_run=False):
    """Trains what is missing, showing progress; then draws conclusions."""
    start = time.perf_counter()
    import jax

    from soap_jax import grids, study
    from soap_jax.study import methods, store, terminal, trial

    first = jax.process_index() == 0
    console = _console(quiet=not first)
    chosen = methods.resolve(arguments["methods"])
    grids.check_count("seeds", arguments["seeds"], most=grids.MOST_RUNS)
    points = len(arguments["learning_rates"]) * arguments["seeds"]
    runs = {k: points * len(m.periods(arguments["periods"])) for k, m in chosen.items()}
    task = arguments["task"]
    steps = trial.steps_of(task, *(arguments[k] for k in ("steps", "epochs", "batch_size")))
    grids.check_count("evaluations", arguments["evaluations"])
    steps -= steps % trial.evaluations_of(steps, arguments["evaluations"])
    console.print(
        f"{record['title']}: {task.examples.get('train', 'made')} training examples{about}. "
        f"{sum(runs.values())} runs of {steps} steps, {len(runs)} methods, on "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}."
    )
    if dry_run:
        seconds = _estimate(arguments, runs, steps)
        long = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{math.ceil(seconds)} seconds"
        console.print(f"About {long}, compilation included.")
        return
    if first and (before := len(store.Store(out).done())):
        console.print(f"{before} runs are there already, in {out}.")
    record |= {"command": _command(sys.argv[1:])}
    labels = {name: method.label or name for name, method in chosen.items()}
    try:
        with terminal.Progress(console, labels) as progress:
            found = study.compare(**arguments, out=out, record=record, on_progress=progress.show)
    except BaseException as error:
        if first and not isinstance(error, ValueError):
            console.print(
                f"Stopped with {len(store.Store(out).done())} of {sum(runs.values())} runs kept in "
                f"{out}. The same command goes on from there."
            )
        raise
    if found is not None:
        _show(found, out, start)


def _command(args: list[str]) -> str:
    """The command that repeats a study, without what changes no result: where to, and how it runs.

    Example:
        >>> _command(["study", "--seeds", "3", "--out", "there", "--no-cache"])
        'soap-jax study --seeds 3'
    """
    words, rest = ["soap-jax"], iter(args)
    for arg in rest:
        if arg == "--out":
            next(rest, None)
        elif not arg.startswith(("--out=", "--cache", "--no-cache", "--distributed")):
            words.append(arg)
    return shlex.join(words)


def _estimate(arguments, runs, steps) -> float:
    """The seconds that a comparison will take: a few of its runs are timed up to an evaluation."""
    from soap_jax import study
    from soap_jax.study import trial

    events: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}

    def note(method, done, *_):
        events[method].append((time.perf_counter(), done))

    evaluations = trial.evaluations_of(steps, arguments["evaluations"])
    some = min(4, evaluations)
    few = {"epochs": None, "steps": steps // evaluations * some, "evaluations": some}
    few |= {"learning_rates": arguments["learning_rates"][:2]}
    study.compare(**arguments | few, on_progress=note)
    seconds = 0.0
    for name, ((begin, _), (compiled, _), *parts) in events.items():
        end, done = parts[-1]
        since, before = parts[0] if len(parts) > 1 else (compiled, 0)
        each = (end - since) / (done - before) * evaluations / some
        seconds += compiled - begin + each * runs[name]
    return seconds


def _show(found, out: pathlib.Path, start: float):
    """Draws conclusions from a comparison, writes and prints them."""
    from soap_jax.study import files, report, terminal

    findings = found.judge()
    with files.locked(out):
        report.write(found, findings, out)
    console = _console()
    console.print()
    console.print(terminal.summary_table(found))
    if findings:
        console.print(terminal.claims_table(findings))
    console.print(
        f"\nReport: {out / 'report.html'}\nBeside it: tables (Parquet, CSV) and figures. "
        f"{time.perf_counter() - start:.0f} s in all.",
        soft_wrap=True,  # a path in one piece
    )


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turns what a user can mend into one line, and Ctrl-C into the shell's exit code for it."""
    try:
        yield
        return
    except (ValueError, OSError, ImportError) as error:
        _say(str(error))
        code = 2
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):  # XLA's, typeless
            _say(
                f"not enough memory ({_first_line(error)}). Ask for smaller --hidden or "
                "--batch-size, or in a study for a smaller --chunk-size."
            )
            code = 2
        elif _one_of_many():
            traceback.print_exc()
            code = 1
        else:
            raise
    if code == 130 or _one_of_many():  # JAX's own exit waits for what runs, and for the others
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def _warnings() -> Iterator[None]:
    """Prints each warning for users as one line."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message, category, *where):
            if category is UserWarning:
                print(f"warning: {message}", file=sys.stderr)
            else:
                usual(message, category, *where)

        warnings.showwarning = show
        yield


def _say(error: str):
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}error: {error}{plain}", file=sys.stderr)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _one_of_many() -> bool:
    """Whether other processes take part in the study."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()
