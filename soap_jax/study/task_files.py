"""Task files: Python files that say what `soap-jax study FILE.py` compares.

task = study.Task(...)                      # or `tasks`, a dict of several by name
methods = ["bp", "fa"]                      # optional, as are `claims` and `optimizer`
learning_rates, steps = (0.1, 0.3), 1000    # defaults of the command's options
smaller = {"steps": 50}                     # what --quick changes
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import runpy
import sys
import traceback
import types
import typing
import warnings
from collections.abc import Mapping
from typing import Any

import optax

from soap_jax import tasks
from soap_jax.study import preset


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFile:
    """What a task file defines.

    Attributes:
        tasks: by name; the only one of a file that defines `task` has the name "".
        methods: as in `soap_jax.study.compare`.
        claims: as in `soap_jax.study.compare`.
        optimizer: as in `soap_jax.study.compare`.
        options: defaults of the command's options.
        smaller: the options that --quick changes; numbers are upper limits.
    """

    tasks: Mapping[str, tasks.Task]
    methods: Any = tuple(preset.DEFAULT_METHODS)
    claims: Any = ()
    optimizer: Any = optax.sgd
    options: Mapping[str, Any]
    smaller: Mapping[str, Any]


def read(path: str, hints: Mapping[str, Any]) -> TaskFile:
    """Runs a task file and checks what it defines.

    Args:
        path: of the file.
        hints: types of the command's options, by name.

    Raises:
        ValueError: if the file fails, or defines something else than is expected.
        FileNotFoundError: if there is no such file.
    """
    found = _run(path)
    _warn_of_typos(path, found, {*hints, *TaskFile.__dataclass_fields__, "task"} - {"options"})
    options = {name: _option(path, name, found[name], hints) for name in hints.keys() & found}
    values = {name: _defined(found, name) for name in ("methods", "claims", "optimizer")}
    values = {name: value for name, value in values.items() if value is not None}
    smaller = _defined(found, "smaller")
    smaller = {} if smaller is None else smaller
    if not isinstance(smaller, Mapping) or smaller.keys() - hints.keys():
        raise ValueError(
            f"{path}: smaller is {smaller!r}; expected options of --quick, such as "
            "{'seeds': 2, 'steps': 40}."
        )
    smaller = {name: _option(path, name, value, hints) for name, value in smaller.items()}
    return TaskFile(tasks=_tasks(path, found), options=options, smaller=smaller, **values)


def _run(path: str) -> dict[str, Any]:
    """The names that the file defines; it may import its neighbours."""
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    sys.path.insert(0, str(pathlib.Path(path).parent))
    try:
        return runpy.run_path(path)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = [f", line {frame.lineno}" for frame in frames if frame.filename == path][-1:]
        first = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        said = f"{path}{''.join(where)}: {type(error).__name__}: {first}."
        raise ValueError(said) from error


def _warn_of_typos(path: str, found: Mapping[str, Any], known: set[str]) -> None:
    """Warns of values whose names are almost those of options: they have no effect."""
    for name, value in found.items():
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if near and name not in known and not (callable(value) or near[0] in found):
            warnings.warn(
                f"{path} defines {name}, which is not an option. Did you mean {near[0]}?",
                stacklevel=2,
            )


def _defined(found: Mapping[str, Any], name: str) -> Any:
    """The file's value of a name, or None; a module of that name was only imported."""
    value = found.get(name)
    return None if isinstance(value, types.ModuleType) else value


def _tasks(path: str, found: Mapping[str, Any]) -> Mapping[str, tasks.Task]:
    """The tasks by name."""
    many = _defined(found, "tasks")
    if many is not None and "task" in found:
        raise ValueError(f"{path} defines `task` and `tasks`; expected one of them.")
    many = {"": found.get("task")} if many is None else many
    if not (isinstance(many, Mapping) and many and all(map(_is_folder, many))):
        named = list(many) if isinstance(many, Mapping) else type(many).__name__
        raise ValueError(
            f"{path}: tasks is {named}; expected a dict of soap_jax.study.Tasks by name. Each name "
            "must be valid as a directory's."
        )
    for name, task in many.items():
        if not isinstance(task, tasks.Task):
            said = f"`tasks` has {task!r} at {name!r}" if name else "defines no `task`"
            raise ValueError(f"{path} {said}; expected task = soap_jax.study.Task(...).")
    return many


def _is_folder(name: Any) -> bool:
    """Whether a task's name, or the "" of the only one, can be a directory's."""
    plain = isinstance(name, str) and name.isprintable() and name not in (".", "..")
    return plain and pathlib.Path(name).name == name


def _option(path: str, name: str, value: Any, hints: Mapping[str, Any]) -> Any:
    """An option's value as a task file gives it."""
    try:
        return _converted(value, hints[name])
    except (TypeError, ValueError) as error:
        kind = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
        raise ValueError(f"{path}: {name} is {value!r}; expected {kind}.") from error


def _converted(value: Any, hint: Any) -> Any:
    """An option's value in its type: a list becomes a tuple, and numbers keep their values."""
    kind, *others = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is tuple and not isinstance(value, str):
        return tuple(_converted(each, kind) for each in value)
    if value is None and type(None) in others:
        return None
    if isinstance(value, str) != (kind is str) and kind is not pathlib.Path:
        raise TypeError(kind)
    found = kind(value)
    if found != value and kind is not pathlib.Path:
        raise ValueError(kind)
    return found
