"""The preset study: one network on one image data set with each method, and seven claims.

    result = study.compare(**preset.comparison_arguments(StudyConfig(), data.load("digits")))

`soap-jax study` runs this preset, and `soap-jax train` runs one of its trainings. Each field below
is an option of these commands, and its entry under Attributes is the help of the option. Importing
this module loads no large libraries.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from soap_jax import grids

if TYPE_CHECKING:
    import chex
    import optax

    from soap_jax import data, models, tasks
    from soap_jax.study import methods

DATASETS = {"digits": 64, "mnist": 784, "fashion_mnist": 784, "kmnist": 784, "cifar10": 3072}
"""The data sets, and the number of values in one example of each."""
_SIGNS, _SCALED = ("sign", "sign_preserve", "sign_norm"), ("bp_scaled", "bp_scaled_live")
DEFAULT_METHODS = ("bp", "fa", *_SIGNS, *_SCALED, "frozen")
WEIGHT_DECAY = 1e-3
"""The default weight decay with methods such as `kp`, which cannot align without it."""
CHOICES = {
    "dataset": tuple(DATASETS),
    "model": ("mlp", "conv"),
    "activation": ("tanh", "relu", "sigmoid"),
    "optimizer": ("sgd", "momentum", "adam"),
    "init": ("matched", "soap"),
    "inputs": ("standard", "unit"),
}
MAX_EPOCHS = 10**6
"""The most epochs. Their orders of examples are all drawn at the start."""
MAX_WEIGHTS = 2**31 - 1
"""The most weights in a network, 8 GiB as float32."""
WARMUP = 5
"""The updates of plain backprop before activity propagation begins, as in the original package.

The bias is also that of the original, the default of `soap_jax.activity`. On digits the gradient of
the hidden layers is then about a thousandth of backprop's, so they hardly learn. With a bias of
1e-8 or less the output layer does not learn either."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """The settings of a comparison of methods that do not depend on the network.

    Attributes:
        learning_rates: the grid of learning rates, the same for every method.
        seeds: number of seeds; a seed gives every method the same initial weights, feedback and
            order of examples.
        epochs: passes over the training data.
        steps: parameter updates, in place of epochs.
        batch_size: examples per step.
        periods: updates from one synchronisation to the next; methods that sync run with each of
            them. Tables and figures show the smallest.
        target_loss: the training loss to which steps are counted; by default the smallest that
            every run of the reference reaches within an eighth of the steps.
        evaluations: number of evaluations of a run, equally spaced.
        extend: the most learning rates to add on each side of the grid. A rate is added for all
            methods, where some method's best rate lies at the edge and no run diverged there.
        measures: additional measures: effective_rank, of each kernel's errors. It is costly, so use
            few evaluations.
        chunk_size: the most runs per device at once; limits memory on accelerators. By default 4 on
            CPU, else 256.
        memory_limit: the most GiB per device for the program (the process needs about 0.7 more);
            makes chunks smaller where needed.
    """

    learning_rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
    seeds: int = 10
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 64
    periods: Annotated[tuple[int, ...], tyro.conf.arg(name="period")] = ()
    target_loss: float | None = None
    evaluations: int = 20
    extend: int = 0
    measures: tuple[str, ...] = ()
    chunk_size: int | None = None
    memory_limit: float | None = None

    def smaller(self, changes: Mapping[str, Any] | None = None):
        """A smaller configuration for about a minute: three seeds, three rates, 300 steps.

        Args:
            changes: other values of fields; numbers are upper limits.
        """
        rates = self.learning_rates[:: math.ceil(len(self.learning_rates) / 3)]
        most: dict[str, Any] = {"seeds": 3, "steps": 300, "evaluations": 10}
        most |= {"learning_rates": rates, "periods": self.periods[:1], **(changes or {})}
        for name, value in most.items():
            own = getattr(self, name)
            if isinstance(value, int | float) and own is not None:
                most[name] = min(own, value)
        return dataclasses.replace(self, **most)

    def arguments(self) -> dict[str, Any]:
        """These fields as arguments of `soap_jax.study.compare`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(Protocol)}
        if self.steps is not None:
            values["epochs"] = None
        if self.memory_limit is not None:
            values["memory_limit"] = self.memory_limit * 2**30
        return values | {"periods": self.periods or None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """The network and its data.

    Attributes:
        dataset: digits, mnist, fashion_mnist, kmnist or cifar10; only digits needs no download.
        data: your own data instead: FILE.npz with x_train, y_train, x_test and y_test, or a
            directory of four IDX files, unpacked or gzipped, with the names of MNIST's files.
        model: mlp, or conv: 3 x 3 convolutions of stride 2, then a dense layer.
        hidden: widths of the hidden layers of mlp.
        channels: output channels of the convolutions of conv.
        activation: tanh, relu or sigmoid.
        optimizer: sgd, momentum (SGD with momentum 0.9) or adam. Claims are tested only with sgd.
        weight_decay: decoupled weight decay: each update also subtracts
            learning_rate * weight_decay * w. It is the same for every method, and also applies to
            feedback that learns by its kernel's gradient. Layers that are not trained do not decay.
            By default 0.001 if some method has such feedback (kp, pfa, ldfa, dkp), else 0.
        init: initial weights: matched gives every method the same kernels (Glorot normal); soap is
            that of the original package, where methods without feedback start as in PyTorch
            (uniform within 1 / √fan_in) and learn more slowly.
        inputs: pixels: standard (mean 0 and variance 1 over the training examples) or unit (0
            to 1).
    """

    dataset: str = "digits"
    data: str | None = None
    model: str = "mlp"
    hidden: tuple[int, ...] = (256,)
    channels: tuple[int, ...] = (8, 16)
    activation: str = "tanh"
    optimizer: str = "sgd"
    weight_decay: float | None = None
    init: str = "matched"
    inputs: str = "standard"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig(Protocol, Network):
    """The configuration of a study; equal ones give equal results on the same machine.

    Attributes:
        methods: names of the methods to compare, of bp, fa, sign, sign_preserve, sign_norm,
            bp_scaled, bp_scaled_live, frozen, sign_glorot, sign_redraw, transport, weight_mirror,
            kp, pfa, ldfa, information_alignment, symmetric_alignment, activation_alignment, dfa,
            dkp, sdfa, drtp, forward_gradient, weight_perturbation and, with mlp,
            activity_propagation. (rflo is for recurrent nets of your own.)

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> StudyConfig(learning_rates=[0.3, 0.1]).learning_rates
        (0.1, 0.3)
    """

    methods: tuple[str, ...] = DEFAULT_METHODS
    epochs: int = 20
    periods: Annotated[tuple[int, ...], tyro.conf.arg(name="period")] = (1, 10, 100)
    target_loss: float | None = 0.5

    def __post_init__(self):
        from soap_jax.study.methods import METHODS

        for name in ("methods", "learning_rates", "hidden", "channels", "periods"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, known in CHOICES.items():
            grids.check_known(name, getattr(self, name), known)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            given = ", ".join(self.methods) or "empty"
            raise ValueError(
                f"methods is {given}; expected at least one method, each once, of "
                f"{', '.join(METHODS)}."
            )
        for method in self.methods:
            grids.check_known("methods", method, METHODS)
        for name in self.methods:
            _check_offered(name, self.model)
        grids.check_count("seeds", self.seeds, most=grids.MOST_RUNS)
        grids.check_count("epochs", self.epochs, most=MAX_EPOCHS)
        for name in ("steps", "batch_size", "evaluations", "chunk_size"):
            if getattr(self, name) is not None:
                grids.check_count(name, getattr(self, name))
        self._check_widths()
        grids.check(seeds=[0], learning_rates=self.learning_rates, periods=self.periods)
        grid = math.prod(map(len, (self.methods, self.periods, self.learning_rates)))
        product = "seeds times methods, learning_rates and periods"
        grids.check_count(product, self.seeds * grid, most=grids.MOST_RUNS)
        for name in ("target_loss", "memory_limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; expected a positive number.")
        decay = self.weight_decay
        if decay is None:
            learn = any(METHODS[name].feedback_bar == "kernel" for name in self.methods)
            decay = WEIGHT_DECAY if learn else 0.0
        if not 0 <= grids.as_float32(decay) < math.inf:
            raise ValueError(
                f"weight_decay is {decay}; expected a number of at least 0, finite as a float32."
            )
        for name, value in {
            "weight_decay": decay,
            "learning_rates": tuple(sorted(self.learning_rates)),
            "periods": tuple(sorted(self.periods)),
        }.items():
            object.__setattr__(self, name, value)

    def _check_widths(self):
        for name in ("hidden", "channels"):
            if not (widths := getattr(self, name)):
                raise ValueError(
                    f"{name} is empty; expected the widths of at least one hidden layer: without "
                    "one, feedback has no effect."
                )
            for width in widths:
                grids.check_count(name, width)
            sizes = (1 if self.data else DATASETS[self.dataset], *widths, 10)
            weights = sum(a * b for a, b in itertools.pairwise(sizes))
            grids.check_count(f"{name} counted in weights", weights, most=MAX_WEIGHTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Network):
    """The configuration of a single training.

    Attributes:
        method: a method of a study: bp, fa, sign_preserve, dfa, ...
        learning_rate: the learning rate.
        seed: seed of initial weights, initial feedback and the order of examples, as in a study.
        epochs: passes over the training data; with a larger number later, training continues.
        batch_size: examples per step.
        period: updates from one synchronisation of feedback to the next, for methods that sync.
        checkpoint_every: epochs from one checkpoint to the next; the last epoch always has one.
        keep: number of checkpoints to keep; older ones are deleted.

    Raises:
        ValueError: for a value out of range.
    """

    method: str = "sign_preserve"
    learning_rate: float = 0.1
    seed: int = 0
    epochs: int = 50
    batch_size: int = 64
    hidden: tuple[int, ...] = (256, 256)
    period: int = 10
    checkpoint_every: int = 5
    keep: int = 3

    def __post_init__(self):
        from soap_jax.study.methods import METHODS

        for name in ("hidden", "channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        grids.check_known("method", self.method, METHODS)
        _check_offered(self.method, self.model)
        grids.check(seeds=[self.seed], learning_rates=[self.learning_rate])
        for name in ("period", "checkpoint_every", "keep"):
            grids.check_count(name, getattr(self, name))
        object.__setattr__(self, "weight_decay", self.as_study().weight_decay)

    def as_study(self) -> StudyConfig:
        """A study of only this network and method; the study runs seed 0 instead of `seed`.

        Example:
            >>> TrainConfig(method="fa", learning_rate=0.5).as_study().learning_rates
            (0.5,)
        """
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(Network)}
        return StudyConfig(
            **shared,
            methods=(self.method,),
            learning_rates=(self.learning_rate,),
            seeds=1,
            epochs=self.epochs,
            batch_size=self.batch_size,
            periods=(self.period,),
        )


def comparison_arguments(
    config: StudyConfig, dataset: data.Dataset, *, scale: tasks.Scaling | None = None
) -> dict[str, Any]:
    """The arguments of `soap_jax.study.compare` for the preset.

    Args:
        config: the configuration.
        dataset: the data, from `soap_jax.data.load` or `soap_jax.tasks.read`.
        scale: the scaling of inputs; by default that of the configuration.

    Raises:
        ValueError: if the data do not fit the configuration.
    """
    from soap_jax import tasks
    from soap_jax.study import preset_claims

    model = network(config, dataset)
    scale = scale or tasks.scaling(dataset, config.inputs)
    return config.arguments() | {
        "task": tasks.classification(model, dataset, scale=scale, taps=model.hidden),
        "methods": {name: _method(config, name, model, scale) for name in config.methods},
        "optimizer": optimizer(config),
        "select": "validation_accuracy",
        "maximise": True,
        "claims": preset_claims.CLAIMS,
    }


def network(config: Network, dataset: data.Dataset) -> models.MLP | models.ConvNet:
    """The network without feedback.

    Raises:
        ValueError: if the data do not fit it.
    """
    import flax.linen as nn

    from soap_jax import models

    activation, classes = getattr(nn, config.activation), dataset.num_classes
    if config.model == "mlp":
        return models.MLP((*config.hidden, classes), activation=activation, feedback=False)
    if dataset.train.images.ndim != 4:
        raise ValueError(
            f"model is 'conv', but examples have the shape {dataset.train.images.shape[1:]}; "
            "expected images, (height, width) or (height, width, channels)."
        )
    return models.ConvNet(config.channels, classes, activation=activation, feedback=False)


def network_summary(config: Network, dataset: data.Dataset) -> str:
    """The network and optimiser as text, such as "mlp 64-256-10, tanh, sgd"."""
    sizes = (dataset.train.images[0].size, *config.hidden, dataset.num_classes)
    widths = "-".join(map(str, sizes if config.model == "mlp" else config.channels))
    decay = f" with weight decay {config.weight_decay:g}" if config.weight_decay else ""
    return f"{config.model} {widths}, {config.activation}, {config.optimizer}{decay}"


def optimizer(config: StudyConfig) -> Callable[[Any], optax.GradientTransformation]:
    """The optimiser as a function of the learning rate, with decoupled weight decay.

    w <- w + Δw - learning_rate * weight_decay * w
    """
    import jax.numpy as jnp
    import optax

    kinds = {
        "sgd": optax.sgd,
        "momentum": functools.partial(optax.sgd, momentum=0.9),
        "adam": optax.adam,
    }

    def of_rate(learning_rate):
        chosen = kinds[config.optimizer](learning_rate)
        if not config.weight_decay:
            return chosen
        share = config.weight_decay * jnp.asarray(learning_rate, jnp.float32)
        return optax.chain(chosen, optax.add_decayed_weights(-share))

    decay = f", weight decay {config.weight_decay:g}" if config.weight_decay else ""
    of_rate.__qualname__ = config.optimizer + decay  # the name in records
    return of_rate


def _method(config: StudyConfig, name: str, model: Any, scale: tasks.Scaling) -> methods.Method:
    """A method of the registry, completed for this network and its initial weights."""
    from soap_jax import activity, feedback, training
    from soap_jax.study.methods import METHODS

    method = METHODS[name]
    changes: dict[str, Any] = {}
    if method.initializer == "matched":
        changes["initializer"] = feedback.glorot_normal
    if config.init == "soap" and method.rule is None and method.direct is None:
        changes["init"] = init_as_torch
    if name == "activity_propagation":

        def tapped(tap, params, batch):
            logits: Any = model.apply({"params": params}, scale(batch[0]), tap)
            return training.cross_entropy(logits, batch[1])

        def gradient(params, feedback, batch, key, step, learning_rate):
            of = activity.value_and_grad(tapped, learning_rate=learning_rate, warmup=WARMUP)
            return of(params, batch, step=step)

        changes["gradient"] = gradient
    return dataclasses.replace(method, **changes)


def _check_offered(name: str, model: str) -> None:
    """Raises ValueError for a method whose needs the preset does not provide for the model."""
    from soap_jax.study.methods import METHODS

    needs = METHODS[name].needs
    offered = model == "mlp" and name == "activity_propagation"
    if needs and not offered:
        raise ValueError(
            f"the method {name!r} needs {needs}, which model={model!r} does not offer here. Leave "
            "the method out, or train it by soap_jax.study.compare on a task of your own."
        )


def init_as_torch(key: chex.PRNGKey, params: chex.ArrayTree) -> chex.ArrayTree:
    """Draws new kernels and biases like PyTorch's layers: uniform within 1 / √fan_in.

    Args:
        key: a PRNG key.
        params: `{layer: {"kernel": ..., "bias": ...}}`; only shapes are used.
    """
    import jax
    from flax import linen as nn

    torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    drawn = {}
    for name, layer_key in zip(params, jax.random.split(key, len(params)), strict=True):
        kernel_key, bias_key = jax.random.split(layer_key)
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        bound = math.prod(kernel.shape[:-1]) ** -0.5
        drawn[name] = {
            "kernel": torch_uniform(kernel_key, kernel.shape, kernel.dtype),
            "bias": jax.random.uniform(bias_key, bias.shape, bias.dtype, -bound, bound),
        }
    return drawn
