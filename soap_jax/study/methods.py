"""The methods of a comparison: one registry for tables, figures, reports and the command line.

Feedback that is larger than its kernel multiplies the learning rate of the layers below it, and
only of those. `bp_scaled` applies the same factor to backprop: its feedback is the kernel, scaled
to the norm of the kernel's signs.
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
"""The learning rate of feedback on the losses of `soap_jax.local`, by plain SGD.

It does not depend on the learning rate of params.

It was chosen on digits with 256 tanh units, at a learning rate of 0.05. The angle of feedback to
its kernel after 20 epochs is 71 degrees for FA, 59 for information alignment, 65 for activation
alignment and 2 for symmetric alignment. At a third of this rate symmetric alignment is still at 21
degrees. At three times this rate information and activation alignment diverge at a learning rate of
0.3 in ReLU networks, and information alignment also in networks with three hidden layers."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """A learning method; with the default of every field it is backprop.

    The method trains `soap_jax.with_feedback` of the task's loss, unless it has a loss or a
    gradient of its own. For a task with a state, `loss` and `gradient` take the state after
    feedback and return it as `jax.value_and_grad(..., has_aux=True)` would.

    Attributes:
        rule: the rule that changes feedback outside the optimiser, `soap_jax.Fixed()` for FA; or a
            mapping from path patterns to rules, as in `soap_jax.init_feedback`.
        feedback_bar: the gradient of feedback, as in `soap_jax.with_feedback`; if given, the
            optimiser also updates feedback: it is over `(params, feedback)`.
        where: the kernels with feedback, as in `soap_jax.init_feedback`; by default every kernel
            for which `soap_jax.explain` says that feedback has an effect.
        initializer: the initialiser of feedback, as in `soap_jax.init_feedback`.
        direct: the signal of direct feedback: the output's "exact" error (DFA), its "sign" (sDFA)
            or the "target" (DRTP). It is sent to the values that the task names
            (`soap_jax.tasks.Taps`). Projections replace feedback, and `feedback_bar` is then the
            gradient of the projections.
        taps: the values that get direct feedback; by default the task's taps.
        loss: `(params, feedback, batch) -> scalar`, a loss that replaces `with_feedback` of the
            task's loss; with a state `(params, feedback, state, batch, key) -> (scalar, state)`.
        init_feedback: `(key, params, batch) -> feedback`, any tree.
        gradient: `(params, feedback, batch, key, step, learning_rate) -> (loss, gradient)`, for an
            update that is not the gradient of a loss.
        estimator: a gradient estimator for the task's own loss, such as
            `soap_jax.perturbation.forward_gradient`: `(loss, has_aux=True) -> grad_fn`, where
            `loss` is `(params, *args) -> (scalar, aux)` and `grad_fn` is
            `(params, *args, key=key) -> ((scalar, aux), gradient)`.
        optimizer: `(base, learning_rate) -> optimiser`, which wraps the task's optimiser `base`.
        reference: the key of the method that this one is compared with.
        label: the name in tables and figures; by default the method's key.
        color: the colour in figures; by default the next free one of a palette.
        isolates: the property that a comparison with this method isolates, in a few words.
        paper: the paper that introduced the method.
        scale: for scaled backprop, which multiplies each kernel in the backward pass by
            `norm(sign(W)) / norm(W)`: the ratio at the "start", or the current one ("live").
        last_only: whether only the last kernel learns, with the params that are used after it.
        swept: whether a method whose rule has a period runs with each of `compare(periods=...)`.
        needs: what the method needs and the task does not provide. Supply it by
            `dataclasses.replace(METHODS[name], gradient=...)`, or by `loss` and `init_feedback`.
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
            given = f"direct with {set_}" if self.direct else "taps without direct"
            raise ValueError(
                f"a method has {given}; expected direct with at most taps, initializer, "
                "feedback_bar and optimizer, since direct feedback replaces the other fields."
            )

    @property
    def has_own_gradient(self) -> bool:
        """Whether it uses direct feedback, or has its own loss, gradient or estimator."""
        return any(x is not None for x in (self.direct, self.loss, self.gradient, self.estimator))

    @property
    def has_feedback(self) -> bool:
        """Whether errors pass through feedback that differs from the kernels."""
        differs = self.scale is not None or not self.exact
        return differs and not (self.has_own_gradient or self.needs or self.last_only)

    @property
    def exact(self) -> bool:
        """Whether each layer's update has the direction of the true gradient."""
        made = self.has_own_gradient or self.needs or self.feedback_bar or self.init_feedback
        return not made and (self.rule is None or self.rule == rules.Transport())

    @property
    def feedback_rule(self) -> rules.Rule | Mapping[str, rules.Rule]:
        """The rule of its feedback; for backprop a rule whose feedback is W."""
        if self.rule is not None:
            return self.rule
        return Scaled(live=self.scale == "live") if self.scale else rules.Transport()

    @property
    def has_period(self) -> bool:
        """Whether it has a single rule with a period."""
        return isinstance(self.rule, rules.Rule) and not isinstance(self.rule, rules.Fixed)

    def periods(self, swept: Sequence[int] | None) -> tuple[int, ...]:
        """The periods of its runs; `(0,)` if it has none.

        Example:
            >>> METHODS["sign"].periods((1, 10)), METHODS["fa"].periods((1, 10))
            ((1, 10), (0,))
        """
        if not self.has_period:
            return (0,)
        return tuple(swept) if swept and self.swept else (int(self.rule.period),)  # type: ignore

    def describe(self) -> str:
        """Its feedback as text; equal methods have equal descriptions.

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
                said.append(f"{field}={stable_repr(value)}")
        said += [f"scale={self.scale!r}"] * bool(self.scale)
        said += ["last_only=True"] * self.last_only
        return ", ".join(said) or "backprop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(rules.Rule):
    """Backprop with the scale of signs: `B <- W norm(sign(W)) / norm(W)`.

    Attributes:
        live: whether the ratio is computed at every sync, rather than once at the start.
    """

    live: bool = False

    def init(self, kernel, feedback, key):
        """The ratio at the start; None if the rule is live."""
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
    """One of several rules, chosen by the entry "index" of its memory, which may be traced."""

    members: tuple[rules.Rule, ...]

    def init(self, kernel, feedback, key):
        """The index and the memory of each rule."""
        own = [member.init(kernel, feedback, key) for member in self.members]
        return {"index": jnp.int32(0), "own": own}

    def __call__(self, kernel, feedback, key, memory=None):
        """Returns the feedback of the rule at the index."""

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


def stable_repr(value) -> str:
    """The name of a function or the `repr` of a value, the same in every process."""
    if isinstance(value, functools.partial):
        words = [*map(stable_repr, value.args)]
        words += [f"{key}={stable_repr(of)}" for key, of in value.keywords.items()]
        return f"{stable_repr(value.func)}({', '.join(words)})"
    return getattr(value, "__qualname__", None) or re.sub(" at 0x[0-9a-f]+", "", repr(value))


def _slowly(base, learning_rate):
    """The task's optimiser for params, plain SGD for feedback."""
    del learning_rate
    parts = {"params": base, "feedback": optax.sgd(FEEDBACK_RATE)}
    return optax.partition(parts, ("params", "feedback"))


def _held(base, learning_rate):
    """The task's optimiser for params and feedback, except for parts that are held fixed."""
    del learning_rate
    return optimizers.hold_fixed(base)


def _factored(initializer, **words):
    own = {"initializer": initializer, "optimizer": _held, "feedback_bar": "kernel"}
    return Method(rule=rules.Fixed(), **own, **words)


def _low_rank(key, shape, dtype):
    """Factors of rank 10, or of the kernel's full rank where that is less."""
    rank = min(10, math.prod(shape[:-1]), shape[-1])
    return initializers.low_rank(rank, as_factors=True)(key, shape, dtype)


def _sign(magnitude, **words):
    return Method(rule=rules.SignSync(magnitude=magnitude), **words)


def _local(loss, **words):
    return Method(rule=rules.Fixed(), feedback_bar=loss, optimizer=_slowly, **words)


_KUNIN, _LIAO = "Kunin et al. 2020", "Liao et al. 2016"
MAX_NAME_BYTES = 100
"""The most bytes of a method's name."""

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
        isolates="B = |B0| sign(W), SOAP's remedy: the scale of B0, but another direction",
        paper=f"{_LIAO}; SOAP 2019",
    ),
    "sign_norm": _sign(
        "norm",
        label="sign sync, norm kept",
        color="#CC79A7",
        isolates="B = c sign(W) with the norm of B0: only the direction of the signs",
    ),
    "bp_scaled": Method(
        scale="start",
        label="backprop, scaled",
        color="#B87A00",
        isolates="backprop with the scale that raw signs have at the start",
    ),
    "bp_scaled_live": Method(
        scale="live",
        label="backprop, scaled live",
        color="#2F93C9",
        isolates="backprop with the current scale of raw signs, as the weights grow",
    ),
    "frozen": Method(
        last_only=True,
        label="hidden layers frozen",
        color="#8A8A8A",
        isolates="only the last layer learns: the baseline for every method",
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
        isolates="B = W, copied once per period: the effect of an outdated copy",
        paper="Akrout et al. 2019",
    ),
    "weight_mirror": Method(
        rule=rules.WeightMirror(),
        swept=False,  # at its learning rate it needs hundreds of syncs
        label="weight mirror",
        color="#4455FF",
        isolates="B learns W from noise that is sent through the layer",
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
        isolates="B = R B0, and only R learns: no weight has a mirrored copy",
        paper="Li, Benna 2024",
    ),
    "ldfa": _factored(
        _low_rank,
        label="LDFA, low rank",
        color="#B8860B",
        isolates="B = Q P of rank 10, and both learn: the error has to pass a low rank",
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
        isolates="B learns from W",
        paper=_KUNIN,
    ),
    "activation_alignment": _local(
        local.ActivationAlignment(),
        label="activation alignment",
        color="#BB00AA",
        isolates="B learns from the activities, with a penalty on op(x, B)",
        paper=_KUNIN,
    ),
    "dfa": Method(
        direct="exact",
        label="DFA, direct feedback",
        color="#FF0033",
        isolates="the output's error is sent directly to every layer",
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
        isolates="the target in place of the error",
        paper="Frenkel et al. 2021",
    ),
    "rflo": Method(
        needs="one step of the cell and of the loss (soap_jax.temporal)",
        label="RFLO, eligibility traces",
        color="#4682B4",
        isolates="the current error and forward traces: no backward pass through time",
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
        isolates="a random direction, and the exact slope of the loss along it",
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
    """Raises ValueError if a method with direct feedback lacks taps or a target."""
    if method.direct is None:
        return
    taps = method.taps or task.taps
    if taps is None:
        raise ValueError(
            f"the method {name!r} sends the output's error directly to activations, but the task "
            "names none; expected Task(..., taps=Taps(('h1', 'h2'), output='logits')) and a loss "
            "that names these values by jax.ad_checkpoint.checkpoint_name."
        )
    if method.direct == "target" and taps.target is None:
        raise ValueError(
            f"the method {name!r} sends the target, but its taps have none; expected "
            "Taps(..., target=batch -> targets)."
        )


def resolve(methods: Mapping[str, str | Method] | Sequence[str]) -> dict[str, Method]:
    """The methods of a comparison, by the keys that its tables use.

    Args:
        methods: names in `METHODS`, or a mapping from keys to names and methods.

    Raises:
        ValueError: if there is no method, a name is given twice or is unknown, a value is not a
            method, or a method lacks what it needs.

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
            f"methods is {methods!r}; expected at least one method, each once: a list of names of "
            "soap_jax.study.METHODS, or a dict from your own names to these names or to Methods."
        )
    found = {}
    for key, method in pairs:
        valid = isinstance(key, str) and key.isprintable() and "/" not in key
        if not valid or not 0 < len(key.encode()) <= MAX_NAME_BYTES:
            raise ValueError(
                f"a method is named {key!r}; expected a printable string without '/', of at most "
                f"{MAX_NAME_BYTES} bytes, since it is part of file names."
            )
        if isinstance(method, str):
            grids.check_known(
                "methods", method, METHODS, other=", or a Method of your own in a dict"
            )
            method = METHODS[method]
        if not isinstance(method, Method):
            raise ValueError(
                f"the method {key!r} is {method!r}; expected a soap_jax.study.Method or a name "
                "of soap_jax.study.METHODS."
            )
        if method.needs and not method.has_own_gradient:
            raise ValueError(
                f"the method {key!r} needs {method.needs}, which a task does not provide; expected "
                "a Method of your own: dataclasses.replace(study.METHODS[...], gradient=...), or "
                "loss= and init_feedback=."
            )
        if method.feedback_bar is not None and method.rule is None and not method.has_own_gradient:
            raise ValueError(
                f"the method {key!r} has a feedback_bar but no rule; expected rule=Fixed(): the "
                "optimiser then learns this feedback."
            )
        found[key] = method
    return found


def _ratio(kernel):
    """`norm(sign(W)) / norm(W)`; 1 for a kernel of zeros."""
    size = jnp.linalg.norm(kernel)
    return jnp.where(size > 0, jnp.linalg.norm(jnp.sign(kernel)) / size, 1.0)
