"""Named image data sets as NumPy arrays.

    dataset = load("digits")                         # part of scikit-learn: needs no network
    dataset = load("mnist", data_dir="~/mnist")      # the published files, in a directory
    dataset = load("mnist")                          # from TensorFlow Datasets

The arrays are the same for all sources, in the published order. Images are uint8, as stored; divide
by `Dataset.max_value` for values from 0 to 1. Importing this module does not import scikit-learn or
TensorFlow Datasets.
"""

import operator
import os
import pathlib
from typing import NamedTuple

import numpy as np

from soap_jax import _archives

NAMES = ("digits", *_archives.ARCHIVES)

DATA_DIR_VARIABLE = "SOAP_JAX_DATA_DIR"


class Split(NamedTuple):
    """Labelled images.

    Attributes:
        images: `(n, height, width, channels)`, uint8, as stored.
        labels: `(n,)`, int32.
    """

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """A data set and its source.

    Attributes:
        name: one of `NAMES`, or a file's name for data from `soap_jax.tasks.read`.
        train: the training examples.
        test: the test examples.
        num_classes: the number of classes; labels are `0 .. num_classes - 1`.
        max_value: the pixel value that means 1.0: 255, or 16 for digits.
        source: the source and a checksum or version of the arrays, to record with a result.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    max_value: int
    source: str


def load(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads a data set by name.

    `digits` are the 8 x 8 digits of scikit-learn; a fifth of each class, always the same examples,
    is for testing. The other data sets are searched in this order:

    1. The published files in `data_dir`, or else in the directory in the environment variable
       `SOAP_JAX_DATA_DIR`: four IDX files, `.gz` or unpacked, or `cifar-10-binary.tar.gz`. They may
       be in the directory itself, in a subfolder called `name`, or in torchvision's subfolders
       (`MNIST/raw`).
    2. The data directory of TensorFlow Datasets (`TFDS_DATA_DIR`). The first call downloads and
       prepares the data there; later calls only read them. TensorFlow is not needed.

    Args:
        name: one of `NAMES`.
        data_dir: directory with the published files. If given, it must contain them; not needed for
            digits.

    Returns:
        The data set; the arrays are the same for all sources.

    Raises:
        ValueError: if the name is unknown, or a file is damaged or not the published one.
        FileNotFoundError: if the directory does not exist, or lacks files.
        ConnectionError: if the data must be downloaded, and there is no network.
        ModuleNotFoundError: if the extra `study` is not installed.

    Example:
        >>> dataset = load("digits")
        >>> dataset.train.images.shape, dataset.test.images.shape
        ((1438, 8, 8, 1), (359, 8, 8, 1))
    """
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(NAMES)}.")
    if name == "digits":
        return _load_digits()
    archive = _archives.ARCHIVES[name]
    paths = _find_files(name, data_dir)
    if paths is not None:
        arrays = _archives.read(name, paths)
        source = f"{archive.kind} directory {_archives.content(name, paths)}"
    else:
        try:
            from soap_jax import _tfds
        except ModuleNotFoundError as error:
            raise _needs_extra(name, error) from error
        arrays, source = _tfds.load(name)
    train, test = Split(*arrays["train"]), Split(*arrays["test"])
    return Dataset(name, train, test, _archives.NUM_CLASSES, max_value=255, source=source)


def split_validation(split: Split, num: int, *, seed: int = 0) -> tuple[Split, Split]:
    """Splits off a random part for validation, the same part at every call.

    Args:
        split: the `n` examples to divide.
        num: the number of validation examples, `0 < num < n`.
        seed: the seed of the random choice.

    Returns:
        `(rest, validation)`, with `n - num` and `num` examples, in their previous order.

    Raises:
        ValueError: if `num` is out of range.

    Example:
        >>> rest, validation = split_validation(load("digits").train, 200)
        >>> len(rest.labels), len(validation.labels)
        (1238, 200)
    """
    n, num = len(split.labels), operator.index(num)
    if not 0 < num < n:
        raise ValueError(
            f"num is {num}; expected 1 to {n - 1}, so that both parts of the {n} examples are not "
            "empty."
        )
    chosen = np.zeros(n, bool)
    chosen[_permutation(n, seed)[:num]] = True
    return _take(split, ~chosen), _take(split, chosen)


def _take(split: Split, which: np.ndarray) -> Split:
    return Split(split.images[which], split.labels[which])


def _permutation(n: int, seed: int) -> np.ndarray:
    # RandomState, not default_rng, since NumPy guarantees that its stream never changes.
    return np.random.RandomState(seed).permutation(n)


def _needs_extra(name: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"the data set {name} needs the module {error.name}: pip install 'soap_jax[study]'.",
        name=error.name,
    )


def _load_digits() -> Dataset:
    try:
        import sklearn
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise _needs_extra("digits", error) from error
    digits = datasets.load_digits()
    split = Split(digits.images[..., np.newaxis].astype(np.uint8), digits.target.astype(np.int32))
    in_test = np.zeros(len(split.labels), bool)
    for label in range(_archives.NUM_CLASSES):
        (members,) = np.nonzero(split.labels == label)
        num_test = round(0.2 * len(members))
        in_test[members[_permutation(len(members), seed=0)[:num_test]]] = True
    return Dataset(
        name="digits",
        train=_take(split, ~in_test),
        test=_take(split, in_test),
        num_classes=_archives.NUM_CLASSES,
        max_value=16,
        source=f"scikit-learn {sklearn.__version__}",
    )


TORCHVISION_NAMES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
"""The names of torchvision's folders of the data sets."""


def _find_files(name: str, data_dir: str | os.PathLike[str] | None) -> list[pathlib.Path] | None:
    """Returns all published files of a data set, or None to use TFDS."""
    directory = data_dir if data_dir is not None else os.environ.get(DATA_DIR_VARIABLE) or None
    if directory is None:
        return None
    said = "data_dir" if data_dir is not None else f"the environment variable {DATA_DIR_VARIABLE}"
    root = pathlib.Path(directory).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{said} is {str(root)!r}; expected a directory.")
    names = [file.name for file in _archives.ARCHIVES[name].files]
    folders = [root / name, root]
    if name in TORCHVISION_NAMES:
        folders += [root / TORCHVISION_NAMES[name] / "raw", root / "raw"]
    for folder in folders:
        packed_first = [[folder / n, folder / n.removesuffix(".gz")] for n in names]
        found = [next(filter(pathlib.Path.is_file, paths), None) for paths in packed_first]
        missing = [n for n, path in zip(names, found, strict=True) if path is None]
        if not missing:
            return [path for path in found if path is not None]
        if len(missing) < len(names):
            raise FileNotFoundError(
                f"{folder} has some files of {name} but lacks {', '.join(missing)}; expected all "
                "of them in one folder."
            )
    if data_dir is not None:
        raise FileNotFoundError(
            f"{said} is {str(root)!r}, which lacks the files of {name}: {', '.join(names)}; "
            f"expected them (IDX files packed or unpacked) there, in its subfolder {name!r} or in "
            "torchvision's subfolders. Without data_dir they are downloaded."
        )
    return None
