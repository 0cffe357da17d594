"""Your own data sets, read from files."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from soap_jax import _archives, data


def read(path: str | os.PathLike[str]) -> data.Dataset:
    """Reads your own data set.

    Args:
        path: one of three forms. FILE.npz with x_train, y_train, x_test and y_test. A directory
            with four IDX files with MNIST's names, `train-images-idx3-ubyte` and so on, unpacked or
            `.gz`. Or a directory with some of CIFAR-10's binary batches, `data_batch_1.bin` and so
            on, unpacked, `.gz` or `.xz`; without `test_batch.bin` the last fifth is for testing.
            Inputs may have any shape and number of examples; labels are integers from 0.

    Returns:
        The data set; its source contains a checksum.

    Raises:
        OSError: if it cannot be read.
        ValueError: if something is missing, does not fit, or is not a number.
    """
    path, digest = pathlib.Path(path).expanduser(), hashlib.sha256()
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; expected data, FILE.npz or a directory.")
    arrays = _reader(path)(path)
    for array in arrays:
        digest.update(repr((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array).data)
    train = _checked(f"{path}: x_train and y_train", *arrays[:2])
    test = _checked(f"{path}: x_test and y_test", *arrays[2:])
    x, labels = train
    if x.shape[1:] != test.images.shape[1:] or len(x) < 5 or np.ptp(x) == 0:
        raise ValueError(
            f"{path}: x_train has the shape {x.shape} and x_test {test.images.shape}; expected "
            "examples of the same shape, and at least 5 training examples, not all equal."
        )
    if x.dtype != test.images.dtype:
        raise ValueError(
            f"{path}: x_train is kept as {x.dtype} and x_test as {test.images.dtype}; expected the "
            "same dtype and scale."
        )
    if labels.min() > 0 or test.labels.max() > labels.max():
        raise ValueError(
            f"{path}: labels are {labels.min()} to {labels.max()} in y_train and "
            f"{test.labels.min()} to {test.labels.max()} in y_test; expected classes from 0, and "
            "none that is only in y_test."
        )
    return data.Dataset(
        path.name.removesuffix(".npz"),
        train,
        test,
        num_classes=int(max(labels.max(), test.labels.max())) + 1,
        max_value=255 if x.dtype == np.uint8 else np.abs(x).max(),
        source=f"{path.name} sha256:{digest.hexdigest()[:16]}",
    )


def _checked(who, x, y) -> data.Split:
    """Checks inputs and labels; converts to uint8 or float32 with a channel axis, and int32."""
    if x.ndim < 2 or y.shape != x.shape[:1] or not x.size:
        raise ValueError(
            f"{who} have the shapes {x.shape} and {y.shape}; expected (examples, ...) and "
            "(examples,), with one integer label per example."
        )
    numbers = x.dtype.kind in "biuf"
    with np.errstate(over="ignore"):  # refused below
        images = x.astype(np.uint8 if x.dtype == np.uint8 else np.float32) if numbers else x
    if not numbers or not np.isfinite(images).all():
        raise ValueError(
            f"{who}: inputs have dtype {x.dtype}, or are not finite as float32; expected finite "
            "numbers."
        )
    if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= 2**16:
        seen = f", {y.min()} to {y.max()}" if y.dtype.kind in "iuf" else ""
        raise ValueError(f"{who}: labels are {y.dtype}{seen}; expected integers from 0 to 65535.")
    return data.Split(images[..., None] if x.ndim == 3 else images, y.astype(np.int32))


def _read_npz(path):
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream), np.load(stream) as file:
            if missing := [name for name in names if name not in file]:
                raise ValueError(f"{', '.join(missing)} is missing")
            return [file[name] for name in names]
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); expected a file from np.savez with the arrays "
            f"{', '.join(names)}."
        ) from error


def _reader(path):
    if not path.is_dir():
        return _read_npz
    return _read_batches if any(path.glob("data_batch_*.bin*")) else _read_idx


def _read_batches(path):
    """Reads CIFAR-10's binary batches: records of a label and 3 x 32 x 32 pixels."""
    openers: dict[str, Callable[..., Any]] = {".bin": open, ".gz": gzip.open, ".xz": lzma.open}

    def records(file):
        try:
            with openers[file.suffix](file, "rb") as stream:
                found = np.frombuffer(stream.read(), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
        except (ValueError, KeyError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(
                f"{file} is not a binary batch of CIFAR-10 ({error}); expected records of "
                "3073 bytes."
            ) from error
        if found[:, 0].max(initial=0) > 9:
            raise ValueError(f"{file} is not a binary batch of CIFAR-10: a label is above 9.")
        images = found[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return images, found[:, 0]

    def once(pattern):  # a batch that exists packed and unpacked counts once
        return {file.name.split(".")[0]: file for file in sorted(path.glob(pattern))}.values()

    batches = map(records, once("data_batch_*.bin*"))
    x, labels = map(np.concatenate, zip(*batches, strict=True))
    for file in once("test_batch.bin*"):
        return x, labels, *records(file)
    rest = len(x) - len(x) // 5
    return x[:rest], labels[:rest], x[rest:], labels[rest:]


def _read_idx(path):
    arrays = []
    for name, ndim in zip(_archives.IDX_NAMES, (3, 1, 3, 1), strict=True):
        found = [file for file in (path / name, path / name[:-3]) if file.is_file()]
        if not found:
            raise FileNotFoundError(
                f"{path} lacks {name}; expected {', '.join(_archives.IDX_NAMES)}, or these "
                "unpacked, without .gz."
            )
        arrays.append(_archives.read_idx(found[0], ndim=ndim))
    return arrays
