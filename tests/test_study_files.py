"""Files are whole or absent, and one process at a time writes to a directory."""

import errno
import io
import os
import subprocess
import sys

import numpy as np
import pytest

from soap_jax.study import files


def names(directory):
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.csv"
    files.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        files.write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["table.csv"]


def test_directories_on_the_way_are_made_and_everybody_may_read(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    files.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o644


class FullDisk(io.RawIOBase):
    """A file that takes no more than a few bytes."""

    def __init__(self, file, space):
        self.file, self.space = file, space

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        self.space -= len(content)
        if self.space < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(content)


def at_fsync(monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    return lambda file: np.savez(file, a=np.ones(99))


def at_write(monkeypatch):
    return lambda file: np.savez(FullDisk(file, 300), a=np.ones(99))


def at_rename(monkeypatch):
    def replace(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", replace)
    return lambda file: np.savez(file, a=np.ones(99))


@pytest.mark.parametrize("full", [at_fsync, at_write, at_rename])
def test_a_full_disk_is_an_error_in_words_that_names_the_file(full, tmp_path, monkeypatch):
    path = tmp_path / "part.npz"
    files.write_atomically(path, lambda file: file.write(b"old"))
    with pytest.raises(OSError, match=r"cannot write .*/part\.npz: No space left on device") as got:
        files.write_atomically(path, full(monkeypatch))
    assert got.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["part.npz"]


def test_what_a_killed_process_left_half_written_goes_and_nothing_else(tmp_path):
    class Killed(BaseException):
        pass

    def killed(file):
        os.link(file.name, f"{file.name}.kept")  # as the kernel leaves it: not cleaned up
        os.rename(f"{file.name}.kept", f"{file.name[:-11]}x.unfinished")
        raise Killed

    for path in (tmp_path / "study.json", tmp_path / "parts" / "bp-0-0.1-0.npz"):
        with pytest.raises(Killed):
            files.write_atomically(path, killed)
    assert len(names(tmp_path)) == 2
    others = {
        "notes.tmp": tmp_path,
        ".editor.tmp": tmp_path,
        ".own.unfinished": tmp_path / "mine" / "deep",
    }
    for name, directory in others.items():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("somebody's")
    with files.locked(tmp_path):
        assert names(tmp_path) == sorted([".lock", *others])


HOLD = """
import sys
from soap_jax.study import files
with files.locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_directory_is_held_by_one_process_until_it_ends_however_it_ends(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        try:
            assert other.stdout.readline() == "held\n"
            for _ in range(2):  # being refused does not free it
                with (
                    pytest.raises(ValueError, match=r"another process is writing to .*--out"),
                    files.locked(tmp_path),
                ):
                    raise AssertionError("not reached")
        finally:
            other.kill()
            other.wait()
    for _ in range(2):
        with files.locked(tmp_path):
            pass


def test_an_error_within_frees_the_directory(tmp_path):
    with pytest.raises(RuntimeError, match="within"), files.locked(tmp_path / "new"):
        raise RuntimeError("within")
    with files.locked(tmp_path / "new"):
        pass


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(ValueError, match=r"cannot write results to .*--out"),
        files.locked(tmp_path / "file" / "out"),
    ):
        raise AssertionError("not reached")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot write results"), files.locked(tmp_path):
        raise AssertionError("not reached")
