"""What a study runs. Imports nothing heavy, since the command line reads its defaults."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import reprlib

from soap_jax import grids

DATASETS = {"digits": 64, "mnist": 784, "fashion_mnist": 784, "kmnist": 784, "cifar10": 3072}
"""The data sets, and the values in an example of each."""
METHODS = {
    "bp": "backprop",
    "fa": "FA, fixed feedback",
    "sign": "sign sync, raw",
    "sign_preserve": "sign sync, |B0| kept",
    "sign_norm": "sign sync, norm kept",
    "bp_scaled": "backprop, scaled",
    "bp_scaled_live": "backprop, scaled live",
    "frozen": "hidden layers frozen",
    "sign_glorot": "sign sync, Glorot",
    "sign_redraw": "sign sync, redrawn",
    "transport": "weight transport",
    "weight_mirror": "weight mirror",
    "kp": "Kolen-Pollack",
    "information_alignment": "information alignment",
    "symmetric_alignment": "symmetric alignment",
    "activation_alignment": "activation alignment",
    "dfa": "DFA, direct feedback",
    "sdfa": "sDFA, signs of errors",
    "drtp": "DRTP, targets",
    "activity_propagation": "activity propagation",
}
"""The methods, and what tables and figures call them; see `soap_jax.study.methods`."""
DEFAULT_METHODS = tuple(METHODS)[:8]
PERIODIC = frozenset(name for name in METHODS if name.startswith(("sign", "transport")))
"""The methods whose feedback is synced every so many updates: they run once per period. (The weight
mirror learns at every update, as other learnt feedback does.)"""
WEIGHT_DECAY = 1e-3
"""That of a study with Kolen-Pollack learning, which is nothing without."""
ACTIVATIONS = ("tanh", "relu", "sigmoid")
OPTIMIZERS = ("sgd", "momentum", "adam")
INITS = ("matched", "soap")
INPUTS = ("standard", "unit")
MAX_RUNS = 10**6
"""The most runs in a study; each of them is known by name from the start."""
MAX_EPOCHS = 10**6
"""The most epochs, since their orders are drawn at the start."""
MAX_WEIGHTS = 2**31 - 1
"""The most weights in a network: 8 GiB of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The configuration of a study; two equal ones give the same results on the same machine.

    Attributes:
        dataset: name of the data set.
        methods: names of the methods to compare.
        learning_rates: the grid of learning rates, the same for every method.
        seeds: number of seeds; seed s gives every method the same initial weights, the same
            initial feedback and the same order of examples.
        epochs: passes over the training data.
        batch_size: examples per step.
        hidden: widths of the hidden layers.
        activation: activation of the hidden layers.
        optimizer: "sgd", "momentum" (SGD with momentum 0.9) or "adam".
        weight_decay: decoupled: each update also subtracts learning_rate * weight_decay * w, for
            every method and optimiser alike, and from the feedback of Kolen-Pollack learning;
            layers that are not trained do not decay. By default `WEIGHT_DECAY` if "kp" is among the
            methods, else 0.
        init: "matched" draws every method's kernels alike (Glorot normal); "soap" is that of the
            original package: as "matched" for methods with feedback, PyTorch's default (uniform
            within 1 / √fan_in) for the others, which then start slower.
        inputs: "standard" shifts and scales pixels to mean 0 and variance 1 over the training
            examples; "unit" scales them to between 0 and 1.
        periods: parameter updates from one synchronisation to the next; the methods in `PERIODIC`
            run once with each. Tables and figures show the smallest.
        target_loss: the training loss that steps are counted to.
        evaluations: how often a run is evaluated, in equal distances.
        chunk_size: at most so many runs per device at once; see `soap_jax.sweeps.sweep`.
        memory_limit: at most so many GiB per device; makes chunks smaller where needed.

    Raises:
        ValueError: for a value out of range.
    """

    dataset: str = "digits"
    methods: tuple[str, ...] = DEFAULT_METHODS
    learning_rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
    seeds: int = 10
    epochs: int = 20
    batch_size: int = 64
    hidden: tuple[int, ...] = (256,)
    activation: str = "tanh"
    optimizer: str = "sgd"
    weight_decay: float | None = None
    init: str = "matched"
    inputs: str = "standard"
    periods: tuple[int, ...] = (1, 10, 100)
    target_loss: float = 0.5
    evaluations: int = 20
    chunk_size: int | None = None
    memory_limit: float | None = None

    def __post_init__(self):
        for name in ("methods", "learning_rates", "hidden", "periods"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_names("dataset", (self.dataset,), DATASETS)
        _check_names("methods", self.methods, METHODS)
        _check_names("activation", (self.activation,), ACTIVATIONS)
        _check_names("optimizer", (self.optimizer,), OPTIMIZERS)
        _check_names("init", (self.init,), INITS)
        _check_names("inputs", (self.inputs,), INPUTS)
        grids.check_count("seeds", self.seeds, most=MAX_RUNS)
        grids.check_count("epochs", self.epochs, most=MAX_EPOCHS)
        for name in ("batch_size", "evaluations", "chunk_size"):
            if getattr(self, name) is not None:
                grids.check_count(name, getattr(self, name))
        self._check_hidden()
        grids.check(seeds=[0], learning_rates=self.learning_rates, periods=self.periods)
        runs = sum(len(self.periods_of(method)) for method in self.methods)
        runs *= len(self.learning_rates) * self.seeds
        if runs > MAX_RUNS:
            raise ValueError(
                f"seeds is {self.seeds}, which makes {runs} runs with these methods, "
                f"learning_rates and periods; expected at most {MAX_RUNS} runs."
            )
        for name in ("target_loss", "memory_limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; expected a positive number.")
        decay = self.weight_decay
        if decay is None:
            decay = WEIGHT_DECAY if "kp" in self.methods else 0.0
            object.__setattr__(self, "weight_decay", decay)
        if not 0 <= grids.as_float32(decay) < math.inf:
            raise ValueError(
                f"weight_decay is {decay}; expected a number of at least 0, finite as a float32."
            )
        for name in ("learning_rates", "periods"):
            object.__setattr__(self, name, tuple(sorted(getattr(self, name))))

    def _check_hidden(self):
        said = f"hidden is {reprlib.repr(self.hidden)}; expected"
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(
                f"{said} the widths of one hidden layer or more: without one there is nothing for "
                "feedback to do."
            )
        sizes = (DATASETS[self.dataset], *self.hidden, 10)
        weights = sum(a * b for a, b in itertools.pairwise(sizes))
        if weights > MAX_WEIGHTS:
            raise ValueError(
                f"{said} at most {MAX_WEIGHTS} weights in all; with {self.dataset} these are "
                f"{reprlib.repr(weights)}."
            )

    def periods_of(self, method: str) -> tuple[int, ...]:
        """The sync periods that a method runs with; `(0,)` for one that never syncs.

        Example:
            >>> StudyConfig().periods_of("sign"), StudyConfig().periods_of("bp")
            ((1, 10, 100), (0,))
        """
        return self.periods if method in PERIODIC else (0,)


def _check_names(field, values, known):
    if not values or len(set(values)) < len(values):
        raise ValueError(
            f"{field} is {', '.join(map(repr, values)) or 'empty'}; expected "
            f"{'one of' if len(values) == 1 else 'different ones of'} {', '.join(known)}."
        )
    for value in values:
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{field}: {value!r} is unknown; expected {', '.join(known)}.{hint}")
