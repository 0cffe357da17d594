"""Files that are written atomically, and directories that one process at a time writes to."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any

import filelock

_UNFINISHED = ".unfinished"


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Locks a directory for this process, and creates it if it does not exist.

    Half-written files that a killed process left are removed.

    Raises:
        ValueError: if another process holds the lock, or the directory cannot be written to.
    """
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        lock = filelock.FileLock(path / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(
            f"another process is writing to {path}. Wait for it, or name another directory with "
            "--out."
        ) from None
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        for depth in ("", "*/"):  # no deeper: other directories may lie under `path`
            for leftover in path.glob(f"{depth}.*{_UNFINISHED}"):
                leftover.unlink()
        yield
    finally:
        lock.release()


def is_writable(path: pathlib.Path) -> bool:
    """Whether files can be created in a directory."""
    try:
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False


def check_path(path: pathlib.Path) -> None:
    """Raises ValueError if a directory cannot have this path: too long a name, or no access."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # `locked` creates it, or raises an error with the reason
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path, error):
    return ValueError(
        f"cannot write results to {path}: {error.strerror}. Name another directory with --out."
    )


def write_atomically(path: pathlib.Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Calls `write(file)` on a file beside `path`, then renames it to `path`.

    Raises:
        OSError: if the file cannot be written; `path` is then unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=_UNFINISHED, delete=False
        ) as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                pathlib.Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(error.errno, f"cannot write {path}: {why}") from error


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: pathlib.Path, record: Any) -> None:
    """Writes a record that JSON can represent, atomically."""
    write_text(path, json.dumps(record, indent=2) + "\n")
