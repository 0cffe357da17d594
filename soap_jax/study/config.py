"""What a study runs. Imports nothing heavy, since the command line reads its defaults."""

from __future__ import annotations

import dataclasses

from soap_jax import grids

DATASETS = ("digits", "mnist", "fashion_mnist", "kmnist", "cifar10")
METHODS = {
    "bp": "backprop",
    "fa": "FA, fixed feedback",
    "sign": "sign sync, raw",
    "sign_preserve": "sign sync, |B0| kept",
}
"""The methods, and what tables and figures call them."""
ACTIVATIONS = ("tanh", "relu", "sigmoid")


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
        period: parameter updates from one sign synchronisation to the next.
        target_loss: the training loss that steps are counted to.
        evaluations: how often a run is evaluated, in equal distances.
        chunk_size: at most so many runs per device at once; see `soap_jax.sweeps.sweep`.

    Raises:
        ValueError: for a value out of range.
    """

    dataset: str = "digits"
    methods: tuple[str, ...] = tuple(METHODS)
    learning_rates: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
    seeds: int = 10
    epochs: int = 20
    batch_size: int = 64
    hidden: tuple[int, ...] = (256,)
    activation: str = "tanh"
    period: int = 1
    target_loss: float = 0.5
    evaluations: int = 20
    chunk_size: int | None = None

    def __post_init__(self):
        for name in ("methods", "learning_rates", "hidden"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_names("dataset", (self.dataset,), DATASETS)
        _check_names("methods", self.methods, METHODS)
        _check_names("activation", (self.activation,), ACTIVATIONS)
        for name in ("seeds", "epochs", "batch_size", "period", "evaluations", "chunk_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(
                f"hidden is {self.hidden}; expected the widths of one hidden layer or more: "
                "without one there is nothing for feedback to do."
            )
        grids.check(
            seeds=range(self.seeds), learning_rates=self.learning_rates, periods=[self.period]
        )
        if not 0 < self.target_loss < float("inf"):
            raise ValueError(f"target_loss is {self.target_loss}; expected a positive number.")
        object.__setattr__(self, "learning_rates", tuple(sorted(self.learning_rates)))


def _check_names(field, values, known):
    unknown = [value for value in values if value not in known]
    if unknown or not values or len(set(values)) < len(values):
        raise ValueError(
            f"{field} is {', '.join(map(repr, values)) or 'empty'}; expected "
            f"{'one of' if len(values) == 1 else 'different ones of'} {', '.join(known)}."
        )
