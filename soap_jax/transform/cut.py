"""The cut of `with_direct_feedback`: connects named values of a jaxpr to its output.

The jaxpr is evaluated equation by equation, with two changes:

1.  A *tap* is detached, so it gets no error from its later uses: the next block, a skip connection,
    the next step of a recurrent net.
2.  At the named *output* all taps so far are connected to it.

Up to there, the calls, scans and checkpoints that contain a tap return its value as an additional
result. These are rebuilt with JAX's public functions, so a scan stays a scan. All other equations,
including custom derivatives, are applied unchanged.
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
"""The iterations of a scan with a tap but without the output: blocks, time, or an output axis."""

Values = dict[str, jax.Array]
"""Values of taps, by name."""


class Place(NamedTuple):
    """The place of a named value: its equation, and the equations whose jaxprs contain it."""

    eqn: core.JaxprEqn
    within: tuple[core.JaxprEqn, ...]

    @property
    def line(self) -> str:
        """The file, line and function."""
        return _line(self.eqn, *reversed(self.within))


class State(NamedTuple):
    """The values of taps before the output, and a key for draws at the output."""

    values: Values
    key: chex.PRNGKey | None = None


class Cut:
    """A traced function whose taps are cut and connected to its output.

    Args:
        traced: the function.
        taps: names of taps.
        output: the name of the output, or None for the function's first floating-point output.
        words: by tap, what its scans iterate over.
        join: `(output, values, key, cut) -> output`, which is called at the output.
        exact: taps that are not cut.

    Attributes:
        rounds: how often scans compute the output.
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
        """The scans that contain the tap and not the output, outermost first."""
        within = self.taps[tap].within
        return [eqn for eqn in within if _is_scan(eqn) and id(eqn) not in self.around_output]

    def stacked(self, tap: str) -> bool:
        """Whether the tap's value has a first axis of blocks at the output."""
        return bool(self.scans(tap)) and self.words.get(tap) == "blocks"

    def _check_word(self, tap: str) -> None:
        scans, word = self.scans(tap), self.words.get(tap)
        if scans and word is None:
            raise ValueError(
                f"the tap {tap!r} at {self.taps[tap].line} is inside a scan at {_line(scans[0])} "
                "that does not contain the output. Say what it iterates over: stacked='blocks' "
                "(each iteration has its own projection), stacked='time' (all share one projection "
                "and get the same error), or an integer, the output's axis of time (all share one "
                "projection, and each gets the error of its own step)."
            )
        if len(scans) > 1 and isinstance(word, int):
            raise ValueError(
                f"the tap {tap!r} at {self.taps[tap].line} is inside {len(scans)} scans that do "
                f"not contain the output, and stacked is {word}; expected one scan, over this axis "
                "of the output."
            )

    def show(self, taps: Collection[str]) -> str:
        """Formats the names and lines of taps."""
        return ", ".join(f"{tap!r} at {self.taps[tap].line}" for tap in taps)

    @property
    def args(self) -> list[Any]:
        """The arguments with which the function was traced."""
        return self.traced.operands[self.traced.num_hoisted :]

    def evaluate(self, args: Sequence[Any], key: chex.PRNGKey | None = None) -> list[Any]:
        """Computes the function's outputs; `join` gets `key`, or a new key per scan iteration."""
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
"""A function `(output, values, key, cut) -> output`."""


def _call(cut: Cut, eqn, args, state):
    """Rebuilds a call or a checkpoint, which returns the values of its taps too."""
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
    """Rebuilds a scan, which returns the values of its taps too."""
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
    """Converts the values of all iterations, `(rounds, ...)`, to the form used at the output."""
    word = cut.words[tap]
    if word == "time":
        return lax.reduce_sum(value, (0,))  # every iteration gets the cotangent of the sum
    if word == "blocks":
        is_innermost = eqn is cut.scans(tap)[-1]
        return value if is_innermost else value.reshape(-1, *value.shape[2:])
    if not isinstance(word, int) or word >= value.ndim:
        raise ValueError(
            f"stacked is {word} for the tap {tap!r} at {cut.taps[tap].line}, whose values are "
            f"{value.shape[1:]} in each iteration; expected the output's axis of time, 0 or 1."
        )
    return jnp.moveaxis(value, 0, word)


# Checks


_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat", "scan")

_OTHERS = {
    "cond": "which may not run. Name its result instead",
    "custom_jvp_call": "which has a custom derivative. Name its result instead",
    "custom_vjp_call": "which has a custom derivative. Name its result instead (and call "
    "with_feedback on the result of with_direct_feedback, not the other way round)",
    "shard_map": "whose values are sharded. Call with_direct_feedback inside shard_map",
    "while": "which JAX cannot differentiate in reverse mode. Use lax.scan, or lax.fori_loop with "
    "a fixed number of iterations",
}


def _checked(traced, taps: Sequence[str], output: str | None) -> dict[str, Place]:
    """Returns the places of taps and output.

    Raises:
        ValueError: if a name is missing or occurs twice, or if a tap cannot get an error from the
            output.
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
                f"in the function: h = jax.ad_checkpoint.checkpoint_name(h, {name!r})."
            )
        if len(mine) > 1:
            lines = " and ".join(dict.fromkeys(place.line for _, place in mine))
            raise ValueError(
                f"{what} occurs {len(mine)} times, at {lines}; expected once. Give each value its "
                "own name, such as f'block{i}', or scan over the blocks. In a tree, name each "
                "array separately."
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
                f"{what} at {places[name].line} is not used. Use the result of checkpoint_name "
                "in the rest of the function, not its argument."
            )
    if output:
        _check_output(traced, taps, output, places, order)
    return places


def _check_output(traced, taps, output, places, order):
    for tap in taps:
        if order[tap] > order[output]:
            raise ValueError(
                f"the output {output!r} at {places[output].line} comes before the tap {tap!r} at "
                f"{places[tap].line}, which would get no error. Name the output after the tap."
            )
    avals = traced.closed.out_avals
    loss = [k for k, first in enumerate(traced.first) if first]
    if len(loss) != 1 or avals[loss[0]].ndim:
        loss = list(range(len(avals)))
    live = _live(traced, [k in loss and vals.inexact(aval) for k, aval in enumerate(avals)])
    if output not in {name for name, _ in _named(live)}:
        raise ValueError(
            f"the loss does not depend on the output {output!r} at {places[output].line}, so the "
            "taps would get no error. Use the result of checkpoint_name in the rest of the "
            "function."
        )


def _live(traced, outputs: Sequence[bool]) -> core.Jaxpr:
    """The jaxpr without the equations that these outputs do not need."""
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
    """The line of the first equation that has one; equations from JAX's cache have none."""
    lines = (source_info_util.summarize(eqn.source_info) for eqn in eqns)
    return next(filter(None, lines), "an unknown line")
