"""What `soap-jax train` trains. Imports nothing heavy: the command line reads its defaults."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib

from soap_jax import grids
from soap_jax.study.config import METHODS, PERIODIC, StudyConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The configuration of one model in training.

    Attributes:
        dataset: name of the data set.
        method: name of the method, one of `soap_jax.study.config.METHODS`.
        learning_rate: the learning rate.
        seed: of initial weights, initial feedback and the order of examples, as in a study.
        epochs: passes over the training data.
        batch_size: examples per step.
        hidden: widths of the hidden layers.
        activation: activation of the hidden layers.
        optimizer: as in `StudyConfig`.
        weight_decay: as in `StudyConfig`.
        init: as in `StudyConfig`.
        inputs: as in `StudyConfig`.
        period: parameter updates from one synchronisation of feedback to the next; 0, whatever is
            given, for methods that never sync.
        checkpoint_every: epochs from one checkpoint to the next; the last epoch has one anyway.
        keep: how many checkpoints to keep, the newest ones.

    Raises:
        ValueError: for a value out of range.
    """

    dataset: str = "digits"
    method: str = "sign_preserve"
    learning_rate: float = 0.1
    seed: int = 0
    epochs: int = 50
    batch_size: int = 64
    hidden: tuple[int, ...] = (256, 256)
    activation: str = "tanh"
    optimizer: str = "sgd"
    weight_decay: float | None = None
    init: str = "matched"
    inputs: str = "standard"
    period: int = 10
    checkpoint_every: int = 5
    keep: int = 3

    def __post_init__(self):
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if self.method not in METHODS:
            near = difflib.get_close_matches(self.method, METHODS, n=1)
            raise ValueError(
                f"method is {self.method!r}; expected one of {', '.join(METHODS)}."
                + (f" Did you mean {near[0]!r}?" if near else "")
            )
        if self.method not in PERIODIC:
            object.__setattr__(self, "period", 0)
        else:
            grids.check_count("period", self.period)
        if not 0 <= self.seed <= grids.MOST:
            raise ValueError(
                f"seed is {reprlib.repr(self.seed)}; expected an integer from 0 to {grids.MOST}."
            )
        try:
            grids.check(seeds=[0], learning_rates=[self.learning_rate])
        except ValueError:
            raise ValueError(
                f"learning_rate is {self.learning_rate!r}; expected a positive, finite float32 "
                "number."
            ) from None
        for name in ("checkpoint_every", "keep"):
            grids.check_count(name, getattr(self, name))
        object.__setattr__(self, "weight_decay", self.as_study().weight_decay)

    def as_study(self) -> StudyConfig:
        """A study of this network and method alone; it differs in which seeds it runs.

        Example:
            >>> TrainConfig(method="fa", learning_rate=0.5).as_study().learning_rates
            (0.5,)
        """
        return StudyConfig(
            dataset=self.dataset,
            methods=(self.method,),
            learning_rates=(self.learning_rate,),
            seeds=1,
            epochs=self.epochs,
            batch_size=self.batch_size,
            hidden=self.hidden,
            activation=self.activation,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            init=self.init,
            inputs=self.inputs,
            periods=(self.period or 1,),
            evaluations=self.epochs,
        )
