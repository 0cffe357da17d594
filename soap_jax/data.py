"""Named image data sets as NumPy arrays.

    dataset = load("digits")                         # comes with scikit-learn: needs no network
    dataset = load("mnist", data_dir="~/mnist")      # the published files, in a directory
    dataset = load("mnist")                          # through TensorFlow Datasets

Whichever way a data set comes, its arrays are the same, in the published order. Images stay uint8,
as they are stored; divide by `Dataset.max_value` for values from 0 to 1. Importing this module
loads neither scikit-learn nor TensorFlow Datasets.
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
    """A data set and where it came from.

    Attributes:
        name: one of `NAMES`.
        train: the examples to learn from.
        test: the examples to judge by.
        num_classes: labels are `0 .. num_classes - 1`.
        max_value: the pixel value that means 1.0: 255, or 16 for digits.
        source: which way the arrays came and which content they have, to be recorded with a result.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    max_value: int
    source: str


def load(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads a data set by name.

    `digits` are the 8 x 8 digits that come with scikit-learn, a fifth of each class (seeded, always
    the same) for testing. The others are looked for in this order:

    1. the published files, in `data_dir` or else in the directory that the environment variable
       `SOAP_JAX_DATA_DIR` names: four IDX files, `.gz` or unpacked, or `cifar-10-binary.tar.gz`;
       directly, in a sub-folder called `name`, or where torchvision leaves them (`MNIST/raw`);
    2. TensorFlow Datasets' data directory (`TFDS_DATA_DIR`), where they are prepared at the first
       call, which downloads them, and read from then on. TensorFlow is not needed.

    Args:
        name: one of `NAMES`.
        data_dir: directory with the published files. If given, it must have them; digits need none.

    Returns:
        The data set; the arrays are the same whichever way they came.

    Raises:
        ValueError: the name is unknown, or a file is damaged or not the published one.
        FileNotFoundError: the directory is not there, or lacks files.
        ConnectionError: there is no directory, and no network either.
        ModuleNotFoundError: the extra `study` is not installed.

    Example:
        >>> dataset = load("digits")
        >>> dataset.train.images.shape, dataset.test.images.shape
        ((1438, 8, 8, 1), (359, 8, 8, 1))
    """
    if name not in NAMES:
        raise ValueError(f"Unknown data set {name!r}; expected one of {', '.join(NAMES)}.")
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
    """Sets a random part of a split aside for validation, the same part at every call.

    Args:
        split: the examples to divide, `n` of them.
        num: how many go to validation, `0 < num < n`.
        seed: which examples they are.

    Returns:
        `(rest, validation)`, of `n - num` and `num` examples, each in the order they had.

    Raises:
        ValueError: `num` is out of range.

    Example:
        >>> rest, validation = split_validation(load("digits").train, 200)
        >>> len(rest.labels), len(validation.labels)
        (1238, 200)
    """
    n, num = len(split.labels), operator.index(num)
    if not 0 < num < n:
        raise ValueError(
            f"num is {num}; expected 1 to {n - 1}, so that both parts of the split's {n} examples "
            "have some."
        )
    chosen = np.zeros(n, bool)
    chosen[_permutation(n, seed)[:num]] = True
    return _take(split, ~chosen), _take(split, chosen)


def _take(split: Split, which: np.ndarray) -> Split:
    return Split(split.images[which], split.labels[which])


def _permutation(n: int, seed: int) -> np.ndarray:
    # RandomState, not default_rng: NumPy promises that its stream never changes.
    return np.random.RandomState(seed).permutation(n)


def _needs_extra(name: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"The data set {name} needs the module {error.name}: pip install 'soap_jax[study]'.",
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
"""What torchvision calls the folders of the data sets."""


def _find_files(name: str, data_dir: str | os.PathLike[str] | None) -> list[pathlib.Path] | None:
    """Returns all published files of a data set, or None if TFDS is to be asked."""
    directory = data_dir if data_dir is not None else os.environ.get(DATA_DIR_VARIABLE) or None
    if directory is None:
        return None
    said = "data_dir" if data_dir is not None else f"The environment variable {DATA_DIR_VARIABLE}"
    root = pathlib.Path(directory).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{said} is {str(root)!r}, which is not a directory.")
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
                f"{folder} has some of the files of {name} but lacks {', '.join(missing)}; "
                "expected all of them in one folder."
            )
    if data_dir is not None:
        raise FileNotFoundError(
            f"{said} is {str(root)!r}, which lacks the files of {name}: {', '.join(names)}; "
            f"expected them (IDX files also unpacked) there, in its sub-folder {name!r} or where "
            "torchvision leaves them. Without data_dir they are downloaded."
        )
    return None
