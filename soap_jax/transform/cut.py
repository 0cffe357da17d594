"""The cut of `with_direct_feedback`: a jaxpr whose named values are joined to its output.

A jaxpr is evaluated again, equation by equation, and

1.  at a *tap* the value goes on detached, so that no error comes back to it from whatever uses it:
    the next block, a skip connection, the next step of a recurrent net;
2.  where the *output* is named, all taps so far are joined to it.

Until then a tap's value is one more result of the calls, scans and checkpoints that it is in. These
are made again by the public functions that made them, so that a scan stays a scan. All other
equations, custom derivatives included, are bound as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core, source_info_util
from jax.interpreters import partial_eval

from soap_jax import draws, ops
from soap_jax.transform import nested, tracing
from soap_jax.transform import values as vals

Stacked = Literal["blocks", "time"] | int
"""What a scan runs over that has a tap and not the output: blocks, time, or the output's axis."""

Values = dict[str, jax.Array]
"""Values of taps, by name."""


class Place(NamedTuple):
    """Where a value is named: in which equation, and in the jaxprs of which others."""

    eqn: core.JaxprEqn
    within: tuple[core.JaxprEqn, ...]

    @property
    def line(self) -> str:
        """File, line and function."""
        return _line(self.eqn, *reversed(self.within))


class State(NamedTuple):
    """Values of taps on their way to the output, and a key for what is drawn there."""

    values: Values
    key: chex.PRNGKey | None = None


class Cut:
    """A traced function whose taps are cut and joined to its output.

    Args:
        traced: the function.
        taps: names of taps.
        output: the output's name; None: the first floating-point output of the function.
        words: by tap, what its scans run over.
        join: `(output, values, key, cut) -> output`, where the output is named.
        exact: taps that are not cut.

    Attributes:
        rounds: how often the output is computed, by the scans that it is in.
    """

    def __init__(
        self,
        traced: tracing.Traced,
        taps: Sequence[str],
        output: str | None,
        words: Mapping[str, Stacked | None],
        join: Join,
        exact: Collection[str] = (),
    ):
        self.traced, self.output, self.words, self.join = traced, output, words, join
        places = _checked(traced, taps, output)
        around = places[output].within if output else ()
        self.taps = {tap: places[tap] for tap in taps if tap not in exact}
        self.around_output = set(map(id, around))
        self.around = {id(e) for place in self.taps.values() for e in place.within}
        self.around |= self.around_output
        self.rounds = math.prod(eqn.params["length"] for eqn in around if _is_scan(eqn))
        for tap in self.taps:
            self._check_word(tap)

    def scans(self, tap: str) -> list[core.JaxprEqn]:
        """The scans that have the tap and not the output, from the outermost."""
        within = self.taps[tap].within
        return [eqn for eqn in within if _is_scan(eqn) and id(eqn) not in self.around_output]

    def stacked(self, tap: str) -> bool:
        """Whether the tap's value has a first axis of blocks where it is joined."""
        return bool(self.scans(tap)) and self.words.get(tap) == "blocks"

    def _check_word(self, tap: str) -> None:
        scans, word = self.scans(tap), self.words.get(tap)
        if scans and word is None:
            raise ValueError(
                f"the tap {tap!r} at {self.taps[tap].line} is inside a scan at {_line(scans[0])} "
                "that does not have the output. Say what it runs over: stacked='blocks' (each "
                "round gets a projection of its own), stacked='time' (all share one, and each gets "
                "the same error), or an integer, the output's axis of time (all share one, and "
                "each gets its own step's error)."
            )
        if len(scans) > 1 and isinstance(word, int):
            raise ValueError(
                f"the tap {tap!r} at {self.taps[tap].line} is inside {len(scans)} scans that do "
                f"not have the output, and stacked is {word}; expected one scan, over the output's "
                "axis."
            )

    def show(self, taps: Collection[str]) -> str:
        """Names and lines."""
        return ", ".join(f"{tap!r} at {self.taps[tap].line}" for tap in taps)

    @property
    def args(self) -> list[Any]:
        """What the function was traced with."""
        return self.traced.operands[self.traced.num_hoisted :]

    def evaluate(self, args: Sequence[Any], key: chex.PRNGKey | None = None) -> list[Any]:
        """The function's outputs; `key` goes to `join`, another one in each round of a scan."""
        outs, state = self._run(self.traced.closed, args, State({}, key))
        if self.output is None:
            k = next(k for k, out in enumerate(outs) if vals.inexact(out))
            outs[k] = self.join(outs[k], *state, self)
        return outs

    def _run(self, closed: core.ClosedJaxpr, args, state: State) -> tuple[list[Any], State]:
        jaxpr = closed.jaxpr
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))

        def read(atom):
            return atom.val if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            names = source_info_util.current_name_stack() + eqn.source_info.name_stack
            with (
                source_info_util.user_context(eqn.source_info.traceback, name_stack=names),
                eqn.ctx.manager,
            ):
                outs, state = self._equation(eqn, list(map(read, eqn.invars)), state)
            env.update(zip(eqn.outvars, outs, strict=True))
        return list(map(read, jaxpr.outvars)), state

    def _equation(self, eqn: core.JaxprEqn, args, state: State) -> tuple[list[Any], State]:
        if id(eqn) in self.around:
            again = _scan if _is_scan(eqn) else _call
            if id(eqn) in self.around_output:
                return again(self, eqn, args, state)
            outs, inner = again(self, eqn, args, State({}))
            return outs, state._replace(values=state.values | inner.values)
        outs = vals.bind(eqn, args)
        name = eqn.params["name"] if eqn.primitive.name == "name" else None
        if name in self.taps:
            return [ops.detach(outs[0])], state._replace(values=state.values | {name: outs[0]})
        if name is not None and name == self.output:
            return [self.join(outs[0], *state, self)], State({})
        return outs, state


Join = Callable[[jax.Array, Values, chex.PRNGKey | None, Cut], jax.Array]
"""`(output, values, key, cut) -> output`."""


def _call(cut: Cut, eqn, args, state):
    """A call or a checkpoint."""
    shardings = [eqn.params.get(f"{of}_shardings") for of in ("in", "out")]

    def f(*args):
        closed = nested.close(eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"])
        outs, inner = cut._run(closed, nested.constrain(args, shardings[0]), state)
        return nested.constrain(outs, shardings[1]), inner

    if eqn.primitive.name in ("jit", "pjit"):
        f.__name__ = eqn.params["name"]
        donated = tuple(
            i for i, is_donated in enumerate(eqn.params["donated_invars"]) if is_donated
        )
        f = jax.jit(f, inline=eqn.params["inline"], donate_argnums=donated)
    elif "policy" in eqn.params:
        f = jax.checkpoint(f, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    return f(*args)


def _scan(cut: Cut, eqn, args, state):
    """A scan, which returns its taps' values beside what it returns."""
    consts, init, xs = nested.scan_parts(eqn, args)
    keys = None
    if state.key is not None:
        keys = jax.random.split(draws.typed(state.key), eqn.params["length"])

    def body(carry, rows):
        xs, key = rows
        args = [*consts, *carry, *xs]
        outs, inner = cut._run(eqn.params["jaxpr"], args, state._replace(key=key))
        return outs[: len(init)], (outs[len(init) :], inner.values)

    options = nested.scan_options(eqn)
    carry, (ys, values) = lax.scan(body, list(init), (list(xs), keys), **options)
    values = {tap: _hoisted(cut, tap, eqn, value) for tap, value in values.items()}
    return [*carry, *ys], State(values)


def _hoisted(cut: Cut, tap, eqn, value):
    """The values of all rounds, `(rounds, ...)`, as the output is to get them."""
    word = cut.words[tap]
    if word == "time":
        return lax.reduce_sum(value, (0,))  # whose cotangent is every round's
    if word == "blocks":
        is_innermost = eqn is cut.scans(tap)[-1]
        return value if is_innermost else value.reshape(-1, *value.shape[2:])
    if not isinstance(word, int) or word >= value.ndim:
        raise ValueError(
            f"stacked is {word} for the tap {tap!r} at {cut.taps[tap].line}, whose values are "
            f"{value.shape[1:]} in each round; expected the output's axis of time, 0 or 1."
        )
    return jnp.moveaxis(value, 0, word)


# What can be cut


_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat", "scan")

_OTHERS = {
    "cond": "which may not run. Name what it returns",
    "custom_jvp_call": "which has a derivative of its own. Name what it returns",
    "custom_vjp_call": "which has a derivative of its own. Name what it returns (with_feedback "
    "goes around with_direct_feedback, not inside)",
    "shard_map": "whose values are split. Call with_direct_feedback inside shard_map",
    "while": "which JAX differentiates only forwards. Use lax.scan, or lax.fori_loop with a fixed "
    "number of rounds",
}


def _checked(traced, taps: Sequence[str], output: str | None) -> dict[str, Place]:
    """The places of taps and output.

    Raises:
        ValueError: if no error would come from the output to a tap.
    """
    found = list(_named(traced.closed.jaxpr))
    used = {name for name, _ in _named(_live(traced, [True] * traced.num_outputs))}
    places: dict[str, Place] = {}
    order: dict[str, int] = {}
    for name in [*taps, output] if output else taps:
        what = f"the output {name!r}" if name == output else f"the tap {name!r}"
        mine = [(k, place) for k, (n, place) in enumerate(found) if n == name]
        if not mine:
            others = ", ".join(sorted({repr(n) for n, _ in found if not n.startswith("soap_jax")}))
            raise ValueError(
                f"{what} does not occur: the function names {others or 'nothing'}. Name the value "
                f"in it, h = jax.ad_checkpoint.checkpoint_name(h, {name!r})."
            )
        if len(mine) > 1:
            lines = " and ".join(dict.fromkeys(place.line for _, place in mine))
            raise ValueError(
                f"{what} occurs {len(mine)} times, at {lines}. Give each value a name of its own, "
                "such as f'block{i}', or scan over the blocks. Arrays of a tree are named one by "
                "one."
            )
        ((order[name], places[name]),) = mine
        for eqn in places[name].within:
            primitive = eqn.primitive.name
            if primitive not in _CALLS:
                raise ValueError(
                    f"{what} at {places[name].line} is inside {primitive} at {_line(eqn)}, "
                    f"{_OTHERS.get(primitive, 'which cannot be cut')}."
                )
        if name not in used:
            raise ValueError(
                f"{what} at {places[name].line} is not used. Go on with what checkpoint_name "
                "returns, not with the value before."
            )
    if output:
        _check_output(traced, taps, output, places, order)
    return places


def _check_output(traced, taps, output, places, order):
    for tap in taps:
        if order[tap] > order[output]:
            raise ValueError(
                f"the output {output!r} at {places[output].line} comes before the tap {tap!r} at "
                f"{places[tap].line}, to which no error would come. Name the output after it."
            )
    avals = traced.closed.out_avals
    loss = [k for k, first in enumerate(traced.first) if first]
    if len(loss) != 1 or avals[loss[0]].ndim:
        loss = list(range(len(avals)))
    live = _live(traced, [k in loss and vals.inexact(aval) for k, aval in enumerate(avals)])
    if output not in {name for name, _ in _named(live)}:
        raise ValueError(
            f"the loss does not depend on the output {output!r} at {places[output].line}, so that "
            "no error would come to the taps. Go on with what checkpoint_name returns."
        )


def _live(traced, outputs: Sequence[bool]) -> core.Jaxpr:
    """What these outputs are made of."""
    return partial_eval.dce_jaxpr(traced.closed.jaxpr, outputs, instantiate=True)[0]


def _named(
    jaxpr: core.Jaxpr, within: tuple[core.JaxprEqn, ...] = ()
) -> Iterator[tuple[str, Place]]:
    """All named values, in the order of evaluation."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name":
            yield eqn.params["name"], Place(eqn, within)
        for param in eqn.params.values():
            for inner in param if isinstance(param, list | tuple) else [param]:
                if isinstance(inner, core.ClosedJaxpr):
                    inner = inner.jaxpr
                if isinstance(inner, core.Jaxpr):
                    yield from _named(inner, (*within, eqn))


def _is_scan(eqn) -> bool:
    return eqn.primitive.name == "scan"


def _line(*eqns: core.JaxprEqn) -> str:
    """The line of the first that has one: what JAX takes from its cache has none."""
    lines = (source_info_util.summarize(eqn.source_info) for eqn in eqns)
    return next(filter(None, lines), "an unknown line")
