"""Image classification by a multilayer perceptron or a small convolutional network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from soap_jax import data, grids, models, training
from soap_jax.feedback import glorot_normal
from soap_jax.tasks.task import Taps, Task, accuracy


def classification(
    model: nn.Module,
    dataset: data.Dataset,
    *,
    scale: Scaling | None = None,
    taps: Sequence[str] = (),
) -> Task:
    """Makes a classification task with the cross-entropy loss.

    A fifth of the training examples, at most 5,000, are for validation. Inputs keep their stored
    dtype, and are scaled in the loss. The accuracy is NaN if any output is not finite.

    Args:
        model: a Linen module `(batch, ...) -> (batch, classes)`, without feedback of its own.
        dataset: from `soap_jax.data.load` or `read`.
        scale: the scaling of inputs; by default `scaling(dataset)`.
        taps: names of the model's values that get direct feedback; the output must be named
            "logits".

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

    def target(batch):
        return jax.nn.one_hot(batch[1], dataset.num_classes, dtype=jnp.float32)

    named = Taps(tuple(taps), "logits", target) if taps else None
    metrics = {"accuracy": lambda params, batch: accuracy(outputs(params, batch[0]), batch[1])}
    return Task(init, loss, train, validation, test, metrics=metrics, taps=named)


def mlp(
    depth: int = 1,
    width: int = 256,
    *,
    dataset: data.Dataset | None = None,
    activation: models.Activation = nn.tanh,
) -> Task:
    """Makes the task of image classification by a multilayer perceptron.

    Args:
        depth: number of hidden layers.
        width: width of each hidden layer.
        dataset: from `soap_jax.data.load` or `read`; by default the digits of scikit-learn.
        activation: activation of hidden layers.

    Returns:
        The task, with the hidden activations named for direct feedback.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> mlp(depth=2).taps.names
        ('hidden_0', 'hidden_1')
    """
    grids.check_count("depth", depth)
    grids.check_count("width", width)
    dataset = data.load("digits") if dataset is None else dataset
    features = (width,) * depth + (dataset.num_classes,)
    model = models.MLP(features, activation=activation, feedback=False)
    return classification(model, dataset, taps=model.hidden)


def small_conv(dataset: data.Dataset | None = None, *, channels: Sequence[int] = (16, 32)) -> Task:
    """Makes the task of image classification by a small convolutional network.

    The network has 3 x 3 convolutions with stride 2 and ReLUs, then a dense layer. Images of
    28 x 28 pixels or more, such as MNIST's, are reduced to half their size by the mean over 2 x 2
    pixels, so that a training takes a minute on a CPU.

    Args:
        dataset: images, from `soap_jax.data.load` or `read`; by default the digits of scikit-learn.
        channels: output channels of each convolution.

    Returns:
        The task, with the hidden activations named for direct feedback.

    Example:
        >>> small_conv().train.images.shape[1:]
        (8, 8, 1)
    """
    dataset = data.load("digits") if dataset is None else dataset
    if dataset.train.images.ndim != 4:
        raise ValueError(
            f"examples have the shape {dataset.train.images.shape[1:]}; expected images."
        )
    if min(dataset.train.images.shape[1:3]) >= 28:
        dataset = dataset._replace(train=_halved(dataset.train), test=_halved(dataset.test))
    model = models.ConvNet(tuple(channels), dataset.num_classes, activation=nn.relu, feedback=False)
    return classification(model, dataset, taps=model.hidden)


def _halved(part: data.Split) -> data.Split:
    n, height, width, channels = part.images.shape
    even = part.images[:, : height // 2 * 2, : width // 2 * 2]
    blocks = even.reshape(n, height // 2, 2, width // 2, 2, channels)
    return part._replace(images=blocks.mean((2, 4), dtype=np.float32))


class MoskovitzNet(nn.Module):
    """Architecture 1 of Moskovitz et al.: `(batch, height, width, channels) -> (batch, classes)`.

    It uses the middle 24 x 24 pixels: twice an unpadded 5 x 5 convolution with 64 channels, ReLU
    and 2 x 2 max pooling; then dense layers 576-384-192-classes with ReLUs.

    Attributes:
        classes: size of the output.
    """

    classes: int = 10

    @property
    def hidden(self) -> tuple[str, ...]:
        """The names of the hidden activations."""
        return tuple(f"hidden_{i}" for i in range(4))

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits, named "logits"."""
        top, left = ((side - 24) // 2 for side in x.shape[1:3])
        x = x[:, top : top + 24, left : left + 24]
        for i in range(2):
            conv = nn.Conv(64, (5, 5), padding="VALID", kernel_init=glorot_normal, name=f"Conv_{i}")
            x = checkpoint_name(nn.max_pool(nn.relu(conv(x)), (2, 2), (2, 2)), f"hidden_{i}")
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate((384, 192)):
            dense = nn.Dense(width, kernel_init=glorot_normal, name=f"Dense_{i}")
            x = checkpoint_name(nn.relu(dense(x)), f"hidden_{i + 2}")
        last = nn.Dense(self.classes, kernel_init=glorot_normal, name="Dense_2")
        return checkpoint_name(last(x), "logits")


def moskovitz_conv(dataset: data.Dataset) -> Task:
    """Makes the task of image classification by `MoskovitzNet`, in the paper on CIFAR-10.

    The paper uses Adam with batches of 128 images.

    Args:
        dataset: images of at least 24 x 24 pixels, such as `soap_jax.data.load("cifar10")`, or a
            part of CIFAR-10 from `read`.

    Returns:
        The task, with the hidden activations named for direct feedback.

    Raises:
        ValueError: if images are smaller.

    References:
        Theodore Moskovitz, Ashok Litwin-Kumar, L. F. Abbott. Feedback alignment in deep
            convolutional networks. 2018. https://arxiv.org/abs/1812.06488
    """
    shape = dataset.train.images.shape[1:]
    if len(shape) != 3 or min(shape[:2]) < 24:
        raise ValueError(f"images have the shape {shape}; expected at least 24 x 24 pixels.")
    model = MoskovitzNet(dataset.num_classes)
    return classification(model, dataset, taps=model.hidden)


def split(dataset: data.Dataset) -> tuple[data.Split, data.Split, data.Split]:
    """Splits off a fifth of the training examples, at most 5,000, for validation.

    Returns:
        Training, validation and test examples.
    """
    num = min(len(dataset.train.labels) // 5, 5000)
    return *data.split_validation(dataset.train, num), dataset.test


class Scaling(NamedTuple):
    """The scaling of stored inputs to float32: `(x - mean) / std`."""

    mean: float
    std: float

    def __call__(self, x: jax.Array | np.ndarray) -> jax.Array:
        """Returns the inputs of a model."""
        return (jnp.asarray(x).astype(jnp.float32) - self.mean) / self.std


def scaling(dataset: data.Dataset, inputs: str = "standard") -> Scaling:
    """Computes the scaling of a data set's inputs, with one mean and std for all values.

    Args:
        dataset: the data set.
        inputs: "standard", for mean 0 and variance 1 over the training examples (without validation
            examples); or "unit", which divides by `dataset.max_value`.
    """
    if inputs == "unit":
        return Scaling(0.0, float(dataset.max_value))
    images = split(dataset)[0].images
    return Scaling(float(images.mean()), float(images.std()))
