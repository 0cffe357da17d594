"""The methods of a comparison: one registry, read by tables, figures, reports and the command line.

Feedback larger than its kernel multiplies the learning rate of the layers below, and of no other.
`bp_scaled` does that to backprop: its feedback is the kernel itself, made as large as its signs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import chex
import jax.numpy as jnp
import optax
from jax import lax

from soap_jax import (
    feedback,
    grids,
    initializers,
    local,
    ops,
    optimizers,
    perturbation,
    rules,
    trees,
)
from soap_jax.tasks import Taps, Task

FEEDBACK_RATE = 0.01
"""The rate at which feedback descends the losses of `soap_jax.local`, by plain SGD, at every rate.

On digits with 256 tanh units, at a learning rate of 0.05, feedback is 71 degrees off its kernel
after 20 epochs of FA, 59 by information alignment, 65 by activation alignment, 2 by symmetric
alignment. With a third of this rate symmetric alignment is still at 21 degrees; with three times as
much information and activation alignment diverge at a learning rate of 0.3 in networks of ReLUs,
and the former in those of three hidden layers, too."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """A learning method; all fields left alone make backprop.

    Feedback is that of `soap_jax.with_feedback` on the task's loss, unless the method has a loss or
    a gradient of its own. For a task with a state, `loss` and `gradient` take it after feedback and
    return it as `jax.value_and_grad(..., has_aux=True)` would.

    Attributes:
        rule: how feedback changes outside the optimiser, `soap_jax.Fixed()` for FA; or a mapping
            from path patterns to rules, as in `soap_jax.init_feedback`.
        feedback_bar: feedback's own gradient, as in `soap_jax.with_feedback`; with one, the
            optimiser is over `(params, feedback)`.
        where: the kernels with feedback, as in `soap_jax.init_feedback`; by default all that
            `soap_jax.explain` finds it can serve.
        initializer: of feedback, as in `soap_jax.init_feedback`.
        direct: what is sent straight to the values that the task names (`soap_jax.tasks.Taps`):
            the output's "exact" error (DFA), its "sign" (sDFA) or the "target" (DRTP). The
            projections take feedback's place; `feedback_bar` is their own gradient.
        taps: the values that get direct feedback, in place of the task's.
        loss: `(params, feedback, batch) -> scalar`, for what is no feedback on the task's loss;
            with a state `(params, feedback, state, batch, key) -> (scalar, state)`.
        init_feedback: `(key, params, batch) -> feedback`, any tree.
        gradient: `(params, feedback, batch, key, step, learning_rate) -> (loss, gradient)`, for
            what is no gradient of a loss.
        estimator: what makes gradients of the task's own loss, such as
            `soap_jax.perturbation.forward_gradient`: `(loss, has_aux=True) -> grad_fn`, where
            `loss` is `(params, *args) -> (scalar, aux)` and `grad_fn`
            `(params, *args, key=key) -> ((scalar, aux), gradient)`.
        optimizer: `(base, learning_rate) -> optimiser`, around the task's own.
        reference: the method that it is compared with.
        label: what tables and figures call it; by default its key.
        color: in figures; by default one by its place.
        isolates: what a comparison with it isolates, in a few words.
        paper: who wrote of it first.
        scale: for backprop whose kernels, as errors pass them, are multiplied by
            `norm(sign(W)) / norm(W)`: that of the "start", or a "live" one.
        last_only: whether the last kernel alone learns, and what is used after it.
        swept: whether `compare(periods=...)` multiplies its runs, if it has a rule with a period.
        needs: what it needs of a task and only a method of your own can bring: such a method is
            `dataclasses.replace(METHODS[name], loss=..., init_feedback=...)`.
        init: `(key, params) -> params`, for a method that starts from other params.
    """

    rule: rules.Rule | Mapping[str, rules.Rule] | None = None
    feedback_bar: ops.FeedbackBar = None
    where: trees.Where = None
    initializer: feedback.Initializer = "matched"
    direct: Literal["exact", "sign", "target"] | None = None
    taps: Taps | None = None
    loss: Callable[..., chex.ArrayTree] | None = None
    init_feedback: Callable[..., chex.ArrayTree] | None = None
    gradient: Callable[..., tuple] | None = None
    estimator: Callable[..., perturbation.GradFn] | None = None
    optimizer: Callable[..., optax.GradientTransformation] | None = None
    reference: str = "bp"
    label: str | None = None
    color: str | None = None
    isolates: str = ""
    paper: str = ""
    scale: Literal["start", "live"] | None = None
    last_only: bool = False
    swept: bool = True
    needs: str = ""
    init: Callable[..., chex.ArrayTree] | None = None

    def __post_init__(self):
        for name in ("reference", "label", "color", "isolates", "paper"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name not in ("label", "color")):
                raise ValueError(f"{name} is {value!r}; expected a string.")
        if self.direct is not None:
            grids.check_known("direct", self.direct, ("exact", "sign", "target"))
        others = ("rule", "where", "loss", "gradient", "estimator", "init_feedback")
        set_ = [name for name in others if getattr(self, name) is not None]
        if (self.direct and set_) or (self.taps and not self.direct):
            said = f"direct with {set_}" if self.direct else "taps without direct"
            raise ValueError(
                f"a method has {said}; expected direct, and with it at most taps, initializer, "
                "feedback_bar and optimizer: direct feedback takes the place of the others."
            )

    @property
    def own(self) -> bool:
        """Whether it is direct feedback, or has a loss or a gradient of its own."""
        return any(x is not None for x in (self.direct, self.loss, self.gradient, self.estimator))

    @property
    def exact(self) -> bool:
        """Whether it follows the true gradient's direction, layer by layer."""
        made = self.own or self.needs or self.feedback_bar or self.init_feedback
        return not made and (self.rule is None or self.rule == rules.Transport())

    @property
    def sync(self) -> rules.Rule | Mapping[str, rules.Rule]:
        """What its feedback follows; backprop's is W itself."""
        if self.rule is not None:
            return self.rule
        return Scaled(live=self.scale == "live") if self.scale else rules.Transport()

    @property
    def synced(self) -> bool:
        """Whether one period says how often its feedback changes."""
        return isinstance(self.rule, rules.Rule) and not isinstance(self.rule, rules.Fixed)

    def periods(self, swept: Sequence[int] | None) -> tuple[int, ...]:
        """The periods that it runs with; `(0,)` if it has none.

        Example:
            >>> METHODS["sign"].periods((1, 10)), METHODS["fa"].periods((1, 10))
            ((1, 10), (0,))
        """
        if not self.synced:
            return (0,)
        return tuple(swept) if swept and self.swept else (int(self.rule.period),)  # type: ignore

    def describe(self) -> str:
        """Its feedback in words that can be compared.

        Example:
            >>> METHODS["kp"].describe()
            "Fixed(), feedback_bar='kernel'"
        """
        said = [repr(self.rule)] if self.rule is not None else []
        usual = (None, "matched", feedback.glorot_normal)
        for field in ("direct", "taps", "feedback_bar", "where", "initializer", "loss",
                      "init_feedback", "gradient", "estimator", "optimizer"):  # fmt: skip
            value = getattr(self, field)
            if not any(value is one or value == one for one in usual):
                said.append(f"{field}={in_words(value)}")
        said += [f"scale={self.scale!r}"] * bool(self.scale)
        said += ["last_only=True"] * self.last_only
        return ", ".join(said) or "backprop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(rules.Rule):
    """Backprop with the scale of signs: `B <- W norm(sign(W)) / norm(W)`, a ratio of the start.

    Attributes:
        live: whether the ratio is that of now.
    """

    live: bool = False

    def init(self, kernel, feedback, key):
        """The ratio, unless it is that of now."""
        del feedback, key
        return None if self.live else _ratio(kernel)

    def __call__(self, kernel, feedback, key, memory=None):
        """Returns the scaled kernel."""
        del key
        ratio = _ratio(kernel) if self.live else memory
        scaled = (ratio * kernel).astype(feedback.dtype)
        return scaled if self.live else (scaled, memory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyOf(rules.Rule):
    """One of several rules; the entry "index" of its memory, which may be traced, says which."""

    members: tuple[rules.Rule, ...]

    def init(self, kernel, feedback, key):
        """The index and what each rule remembers."""
        own = [member.init(kernel, feedback, key) for member in self.members]
        return {"index": jnp.int32(0), "own": own}

    def __call__(self, kernel, feedback, key, memory=None):
        """Returns what the rule at the index makes."""

        def branch(i):
            def apply(kernel, feedback, own):
                args, member = (kernel, feedback, key), self.members[i]
                if own[i] is None:
                    return member(*args).astype(feedback.dtype), own
                made, learnt = member(*args, own[i])
                return made.astype(feedback.dtype), [*own[:i], learnt, *own[i + 1 :]]

            return apply

        branches = list(map(branch, range(len(self.members))))
        made, own = lax.switch(memory["index"], branches, kernel, feedback, memory["own"])
        return made, memory | {"own": own}


def in_words(value) -> str:
    """A function or a value in words that are the same in another process."""
    if isinstance(value, functools.partial):
        words = [*map(in_words, value.args)]
        words += [f"{key}={in_words(of)}" for key, of in value.keywords.items()]
        return f"{in_words(value.func)}({', '.join(words)})"
    return getattr(value, "__qualname__", None) or re.sub(" at 0x[0-9a-f]+", "", repr(value))


def _slowly(base, learning_rate):
    """Params by the task's optimiser, feedback by plain SGD."""
    del learning_rate
    parts = {"params": base, "feedback": optax.sgd(FEEDBACK_RATE)}
    return optax.partition(parts, ("params", "feedback"))


def _held(base, learning_rate):
    """The task's own for all that learns."""
    del learning_rate
    return optimizers.hold_fixed(base)


def _factored(initializer, **words):
    own = {"initializer": initializer, "optimizer": _held, "feedback_bar": "kernel"}
    return Method(rule=rules.Fixed(), **own, **words)


def _low_rank(key, shape, dtype):
    """Factors of rank 10, or of the kernel's where that is less."""
    rank = min(10, math.prod(shape[:-1]), shape[-1])
    return initializers.low_rank(rank, as_factors=True)(key, shape, dtype)


def _sign(magnitude, **words):
    return Method(rule=rules.SignSync(magnitude=magnitude), **words)


def _local(loss, **words):
    return Method(rule=rules.Fixed(), feedback_bar=loss, optimizer=_slowly, **words)


_KUNIN, _LIAO = "Kunin et al. 2020", "Liao et al. 2016"
MOST_BYTES = 100
"""The longest name of a method."""

METHODS: dict[str, Method] = {
    "bp": Method(label="backprop", color="#707070", isolates="the reference"),
    "fa": Method(
        rule=rules.Fixed(),
        label="FA, fixed feedback",
        color="#D55E00",
        isolates="fixed random feedback",
        paper="Lillicrap et al. 2016",
    ),
    "sign": _sign(
        "unit",
        label="sign sync, raw",
        color="#0072B2",
        isolates="B = sign(W): another direction and a much larger scale",
        paper=f"{_LIAO}; SOAP 2019",
    ),
    "sign_preserve": _sign(
        "preserve",
        label="sign sync, |B0| kept",
        color="#009E73",
        isolates="B = |B0| sign(W): SOAP's remedy; the scale of B0, but another direction",
        paper=f"{_LIAO}; SOAP 2019",
    ),
    "sign_norm": _sign(
        "norm",
        label="sign sync, norm kept",
        color="#CC79A7",
        isolates="B = c sign(W), as large as B0: only the direction of the signs",
    ),
    "bp_scaled": Method(
        scale="start",
        label="backprop, scaled",
        color="#B87A00",
        isolates="backprop with the scale of raw signs at the start",
    ),
    "bp_scaled_live": Method(
        scale="live",
        label="backprop, scaled live",
        color="#2F93C9",
        isolates="backprop with the scale of raw signs, updated as the weights grow",
    ),
    "frozen": Method(
        last_only=True,
        label="hidden layers frozen",
        color="#8A8A8A",
        isolates="only the last layer learns: every method must beat this",
    ),
    "sign_glorot": _sign(
        "glorot",
        label="sign sync, Glorot",
        color="#8E6FC4",
        isolates="signs at the scale of Glorot's initialisation",
        paper="BioTorch 2021",
    ),
    "sign_redraw": _sign(
        "redraw",
        label="sign sync, redrawn",
        color="#7D8A00",
        isolates="signs with fresh random magnitudes at every sync",
        paper=_LIAO,
    ),
    "transport": Method(
        rule=rules.Transport(),
        label="weight transport",
        color="#C94F6D",
        isolates="a copy of W, every T updates: how old the copy may be",
        paper="Akrout et al. 2019",
    ),
    "weight_mirror": Method(
        rule=rules.WeightMirror(),
        swept=False,  # at its rate it needs hundreds of syncs
        label="weight mirror",
        color="#4455FF",
        isolates="B learns W from noise passed through the layer",
        paper="Akrout et al. 2019",
    ),
    "kp": Method(
        rule=rules.Fixed(),
        feedback_bar="kernel",
        label="Kolen-Pollack",
        color="#007722",
        isolates="B gets the same updates as W: with weight decay it converges to W",
        paper="Kolen, Pollack 1994; Akrout et al. 2019",
    ),
    "pfa": _factored(
        initializers.product(10),
        label="PFA, product of factors",
        color="#5A9600",
        isolates="B = R B0, where R learns: no synapse mirrors another",
        paper="Li, Benna 2024",
    ),
    "ldfa": _factored(
        _low_rank,
        label="LDFA, low rank",
        color="#B8860B",
        isolates="B = Q P of rank 10, both learned: few dimensions of the error pass",
        paper="Hanut, Kadmon 2025",
    ),
    "information_alignment": _local(
        local.InformationAlignment(),
        label="information alignment",
        color="#9900FF",
        isolates="B learns from the activities, without errors",
        paper=_KUNIN,
    ),
    "symmetric_alignment": _local(
        local.SymmetricAlignment(),
        label="symmetric alignment",
        color="#CC66EE",
        isolates="B learns from W itself",
        paper=_KUNIN,
    ),
    "activation_alignment": _local(
        local.ActivationAlignment(),
        label="activation alignment",
        color="#BB00AA",
        isolates="B learns from the activities, without decay of their size",
        paper=_KUNIN,
    ),
    "dfa": Method(
        direct="exact",
        label="DFA, direct feedback",
        color="#FF0033",
        isolates="the output's error, directly to every layer",
        paper="Nøkland 2016",
    ),
    "dkp": Method(
        direct="exact",
        feedback_bar="kernel",
        label="direct Kolen-Pollack",
        color="#CC3300",
        isolates="DFA with projections that learn like Kolen-Pollack feedback",
        paper="Webster et al. 2021",
    ),
    "sdfa": Method(
        direct="sign",
        label="sDFA, signs of errors",
        color="#FF0099",
        isolates="DFA with only the signs of the error",
        paper="Frenkel et al. 2021",
    ),
    "drtp": Method(
        direct="target",
        label="DRTP, targets",
        color="#995511",
        isolates="DFA with the target in place of the error",
        paper="Frenkel et al. 2021",
    ),
    "rflo": Method(
        needs="one step of the cell and of the loss (soap_jax.temporal)",
        label="RFLO, eligibility traces",
        color="#4682B4",
        isolates="the current error and traces that run forward: no error goes back in time",
        paper="Murray 2019; Bellec et al. 2020",
    ),
    "activity_propagation": Method(
        needs="a gradient by taps on the activations (soap_jax.activity)",
        label="activity propagation",
        color="#00838F",
        isolates="a second-order step of the activities",
        paper="SOAP 2019",
    ),
    "forward_gradient": Method(
        estimator=perturbation.forward_gradient,
        label="forward gradient",
        color="#3E7F3E",
        isolates="one random direction, and the exact slope of the loss along it",
        paper="Baydin et al. 2022",
    ),
    "weight_perturbation": Method(
        estimator=perturbation.weight_perturbation,
        label="weight perturbation",
        color="#A0522D",
        isolates="random signs added to all weights, and the change of the loss",
        paper="Cauwenberghs 1992",
    ),
}
"""The library's own methods, by name."""


def check_fits(task: Task, name: str, method: Method) -> None:
    """Raises ValueError if a method with direct feedback lacks the values to which it goes."""
    if method.direct is None:
        return
    taps = method.taps or task.taps
    if taps is None:
        raise ValueError(
            f"the method {name!r} sends the output's error straight to activations, and the task "
            "names none; expected Task(..., taps=Taps(('h1', 'h2'), output='logits')) and a loss "
            "that names these values by jax.ad_checkpoint.checkpoint_name."
        )
    if method.direct == "target" and taps.target is None:
        raise ValueError(
            f"the method {name!r} sends the target, and the task's taps have none; expected "
            "Taps(..., target=batch -> targets)."
        )


def resolve(methods: Mapping[str, str | Method] | Sequence[str]) -> dict[str, Method]:
    """The methods of a comparison, by the keys that its tables use.

    Args:
        methods: names in `METHODS`, or a mapping from keys to names and methods.

    Raises:
        ValueError: for none, for a name twice, an unknown one, what is no method, a method that
            needs what only one of your own can bring, or one whose reference is not there.

    Example:
        >>> {key: method.rule for key, method in resolve(["bp", "fa"]).items()}
        {'bp': None, 'fa': Fixed()}
    """
    pairs: list[tuple[Any, Any]] = []
    if isinstance(methods, Mapping):
        pairs = list(methods.items())
    elif isinstance(methods, Sequence) and not isinstance(methods, str):
        pairs = [(name, name) for name in methods]
    keys = [key for key, _ in pairs]
    if not keys or any(keys.count(key) > 1 for key in keys):
        raise ValueError(
            f"methods is {methods!r}; expected at least one and each once: names of "
            "soap_jax.study.METHODS, or a dict from your own names to these or to Methods."
        )
    found = {}
    for key, method in pairs:
        said = isinstance(key, str) and key.isprintable() and "/" not in key
        if not said or not 0 < len(key.encode()) <= MOST_BYTES:
            raise ValueError(
                f"a method is named {key!r}; expected a printable string without '/', of at most "
                f"{MOST_BYTES} bytes: it names files."
            )
        if isinstance(method, str):
            grids.check_known(
                "methods", method, METHODS, other=", or a Method of your own in a dict"
            )
            method = METHODS[method]
        if not isinstance(method, Method):
            raise ValueError(
                f"the method {key!r} is {method!r}; expected a soap_jax.study.Method, or the name "
                "of one of the library's."
            )
        if method.needs and not method.own:
            raise ValueError(
                f"the method {key!r} needs {method.needs}, which a task does not tell; expected "
                f"dataclasses.replace(study.METHODS[...], loss=..., init_feedback=...) with a "
                "loss of your own (see soap_jax.direct)."
            )
        if method.feedback_bar is not None and method.rule is None and not method.own:
            raise ValueError(
                f"the method {key!r} has a feedback_bar but no rule; expected rule=Fixed(), whose "
                "feedback the optimiser then learns."
            )
        found[key] = method
    return found


def _ratio(kernel):
    """How much larger than a kernel its signs are; 1 for a kernel of zeros."""
    size = jnp.linalg.norm(kernel)
    return jnp.where(size > 0, jnp.linalg.norm(jnp.sign(kernel)) / size, 1.0)
