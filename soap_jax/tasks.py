"""What is learnt: a model's start, its loss, its data and its metrics, but no learning method."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from soap_jax import _archives, data, training

Data: TypeAlias = chex.ArrayTree
"""A tree of arrays with one leading axis, that of the examples."""


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Everything of a training but the learning method: what `soap_jax.study.compare` compares on.

    With `init_state` the model has a state, such as the statistics of batch normalisation, and its
    loss draws, as dropout does; the functions then take more:

        loss      (params, state, batch, key) -> (scalar, state)
        metrics   (params, state, batch) -> scalar

    Functions must be pure. What a loss closes over is constant to it: the batch is an argument.

    Attributes:
        init: `key -> params`, any pytree of any library.
        loss: `(params, batch) -> scalar`, the mean over the batch.
        train: the training examples; or a function `key -> batch` that makes them on the device.
        validation: held-out examples, by which learning rates are chosen; None without any.
        test: examples that are looked at once, at the end of a run; None without any.
        metrics: by name, `(params, batch) -> scalar`, the mean over the batch. One named "loss"
            takes the place of the loss in evaluations. Otherwise the loss of a model with a state
            is evaluated with a fixed key, and the state that it returns is dropped.
        init_state: `key -> state`; None for a model without one.

    Raises:
        ValueError: if a function is none, a metric's name is no name of a column, or the arrays of
            a part differ in length or are empty.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jnp.linspace(-1.0, 1.0, 8)[:, None]
        >>> task = Task(
        ...     init=lambda key: {"kernel": jax.random.normal(key, (1, 1))},
        ...     loss=lambda params, batch: jnp.mean((batch[0] @ params["kernel"] - batch[1]) ** 2),
        ...     train=(x, 2 * x),
        ... )
        >>> task.examples
        {'train': 8}
    """

    init: Callable[[chex.PRNGKey], chex.ArrayTree]
    loss: Callable[..., jax.Array]
    train: Data | Callable[[chex.PRNGKey], chex.ArrayTree]
    validation: Data | None = None
    test: Data | None = None
    metrics: Mapping[str, Callable[..., jax.Array]] = dataclasses.field(default_factory=dict)
    init_state: Callable[[chex.PRNGKey], chex.ArrayTree] | None = None

    def __post_init__(self):
        for name in ("init", "loss", "init_state"):
            value = getattr(self, name)
            if not callable(value) and (value is not None or name != "init_state"):
                raise ValueError(f"{name} is {value!r}; expected a function.")
        metrics = self.metrics
        if not (isinstance(metrics, Mapping) and all(map(callable, metrics.values()))):
            raise ValueError(
                f"metrics is {metrics!r}; expected functions by name, such as "
                "{'accuracy': accuracy}."
            )
        for name in metrics:
            if not (isinstance(name, str) and name and "/" not in name):
                raise ValueError(f"a metric is named {name!r}; expected a word without '/'.")
        for name in ("train", "validation", "test"):
            part = getattr(self, name)
            if not ((part is None and name != "train") or (callable(part) and name == "train")):
                object.__setattr__(self, name, jax.tree.map(_as_array, part))
                _check_data(name, getattr(self, name))

    @property
    def generated(self) -> bool:
        """Whether the training examples are made by a function."""
        return callable(self.train)

    @property
    def examples(self) -> dict[str, int]:
        """The number of examples of each part that is made of arrays."""
        parts = {name: getattr(self, name) for name in ("train", "validation", "test")}
        return {
            name: jax.tree.leaves(part)[0].shape[0]
            for name, part in parts.items()
            if part is not None and not callable(part)
        }


def _as_array(leaf):
    """What is made of arrays as one, such as pandas' tables, in the machine's order of bytes."""
    if isinstance(leaf, jax.Array) or not getattr(leaf, "shape", ()):
        return leaf
    array = np.asanyarray(leaf)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _check_data(name, part):
    leaves = {
        jax.tree_util.keystr(keys) or "the array": leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(part)
    }
    lengths = {}
    for keys, leaf in leaves.items():
        if not getattr(leaf, "shape", ()):
            raise ValueError(
                f"{name} holds {leaf!r} at {keys}; expected arrays whose first axis is that of the "
                "examples."
            )
        kinds = (np.number, np.bool_, jax.dtypes.prng_key)
        if isinstance(leaf, np.ma.MaskedArray) or not any(
            jnp.issubdtype(leaf.dtype, kind) for kind in kinds
        ):
            raise ValueError(
                f"{name} holds {type(leaf).__name__} of {leaf.dtype} at {keys}; expected numbers."
            )
        held: Any = jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True)
        whole = held != leaf.dtype and np.issubdtype(held, np.integer)
        if whole and np.any(leaf != np.asarray(leaf).astype(held)):
            raise ValueError(f"{name} holds integers beyond {held} at {keys}, JAX's widest now.")
        lengths[keys] = leaf.shape[0]
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        said = ", ".join(f"{length} at {keys}" for keys, length in lengths.items()) or "none"
        raise ValueError(f"{name} has examples: {said}; expected the same number, at least 1.")


def classification(
    model: nn.Module, dataset: data.Dataset, *, scale: Scaling | None = None
) -> Task:
    """The task of telling classes apart, by cross-entropy.

    A fifth of the training examples, at most 5,000, are for validation. Inputs stay as they are
    stored and are scaled in the loss. The accuracy is NaN if any output is not finite.

    Args:
        model: Linen's, `(batch, ...) -> (batch, classes)`, without feedback of its own.
        dataset: from `soap_jax.data.load` or `read`.
        scale: of inputs; by default `scaling(dataset)`.

    Returns:
        The task; batches are `(images, labels)`.

    Example:
        >>> from soap_jax import models
        >>> task = classification(models.MLP((256, 10), feedback=False), data.load("digits"))
        >>> task.examples
        {'train': 1151, 'validation': 287, 'test': 359}
    """
    train, validation, test = split(dataset)
    scaled = scale or scaling(dataset)

    def outputs(params, x):
        return model.apply({"params": params}, scaled(x))

    def init(key):
        return model.init({"params": key}, scaled(train.images[:1]))["params"]

    def loss(params, batch):
        x, labels = batch
        return training.cross_entropy(outputs(params, x), labels)

    def accuracy(params, batch):
        x, labels = batch
        logits = outputs(params, x)
        hits = jnp.argmax(logits, -1) == labels
        return jnp.where(jnp.isfinite(logits).all(), hits.mean(), jnp.nan)

    return Task(init, loss, train, validation, test, metrics={"accuracy": accuracy})


def split(dataset: data.Dataset) -> tuple[data.Split, data.Split, data.Split]:
    """Training, validation and test examples; a fifth of the first, at most 5,000, validate."""
    num = min(len(dataset.train.labels) // 5, 5000)
    return *data.split_validation(dataset.train, num), dataset.test


class Scaling(NamedTuple):
    """How inputs as they are stored become float32: `(x - mean) / std`."""

    mean: float
    std: float

    def __call__(self, x: jax.Array | np.ndarray) -> jax.Array:
        """Returns the inputs of a model."""
        return (jnp.asarray(x).astype(jnp.float32) - self.mean) / self.std


def scaling(dataset: data.Dataset, inputs: str = "standard") -> Scaling:
    """The scaling of a data set's inputs, one for all values.

    Args:
        dataset: the data.
        inputs: "standard", for mean 0 and variance 1 over the training examples without those for
            validation; or "unit", where `dataset.max_value` becomes 1.
    """
    if inputs == "unit":
        return Scaling(0.0, float(dataset.max_value))
    images = split(dataset)[0].images
    return Scaling(float(images.mean()), float(images.std()))


def read(path: str | os.PathLike[str]) -> data.Dataset:
    """Reads a data set of one's own.

    Args:
        path: FILE.npz, which holds x_train, y_train, x_test and y_test; or a directory of four IDX
            files with MNIST's names, `train-images-idx3-ubyte` and so on, unpacked or `.gz`. Inputs
            have any shape and number of examples; labels are integers from 0.

    Returns:
        The data set; its source has a checksum of its content.

    Raises:
        OSError: if it cannot be read.
        ValueError: if something lacks, does not fit, or is no number.
    """
    path, digest = pathlib.Path(path).expanduser(), hashlib.sha256()
    arrays = (_read_idx if path.is_dir() else _read_npz)(path)
    for array in arrays:
        digest.update(repr((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array).data)
    train = _checked(f"{path}: x_train and y_train", *arrays[:2])
    test = _checked(f"{path}: x_test and y_test", *arrays[2:])
    x, labels = train
    if x.shape[1:] != test.images.shape[1:] or len(x) < 5 or np.ptp(x) == 0:
        raise ValueError(
            f"{path}: x_train has the shape {x.shape} and x_test {test.images.shape}; expected "
            "examples alike in shape, and at least 5 to train on that differ."
        )
    if x.dtype != test.images.dtype:
        raise ValueError(
            f"{path}: x_train is kept as {x.dtype} and x_test as {test.images.dtype}; expected the "
            "same, on one scale."
        )
    if labels.min() > 0 or test.labels.max() > labels.max():
        raise ValueError(
            f"{path}: labels are {labels.min()} to {labels.max()} in y_train and "
            f"{test.labels.min()} to {test.labels.max()} in y_test; expected classes from 0 on, "
            "and none that is in y_test alone."
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
    """Inputs as uint8 or float32, images with their channels, and int32 labels."""
    if x.ndim < 2 or y.shape != x.shape[:1] or not x.size:
        raise ValueError(
            f"{who} have the shapes {x.shape} and {y.shape}; expected (examples, ...) and "
            "(examples,), as many of each: a label is one integer."
        )
    numbers = x.dtype.kind in "biuf"
    with np.errstate(over="ignore"):  # refused below
        images = x.astype(np.uint8 if x.dtype == np.uint8 else np.float32) if numbers else x
    if not numbers or not np.isfinite(images).all():
        raise ValueError(
            f"{who}: inputs are of {x.dtype}, or not finite as float32; expected numbers, and no "
            "NaN among them."
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
                raise ValueError(f"it lacks {', '.join(missing)}")
            return [file[name] for name in names]
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); expected a file by np.savez with the arrays "
            f"{', '.join(names)}."
        ) from error


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
