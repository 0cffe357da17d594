"""`with_direct_feedback`: direct feedback for any JAX function that names its values.

A model names values with JAX's identity function `jax.ad_checkpoint.checkpoint_name(h, "block1")`.
The names are in the function's jaxpr. `soap_jax.transform.cut` cuts the jaxpr there, and
`soap_jax.direct.direct_feedback` connects the values to the output.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from soap_jax import direct
from soap_jax.feedback import glorot_normal
from soap_jax.transform import tracing
from soap_jax.transform.cut import Cut, Join, Stacked


def with_direct_feedback(
    fun: Callable,
    taps: str | Sequence[str],
    output: str | None = None,
    *,
    target: Callable[..., jax.Array] | None = None,
    error: direct.Error = "exact",
    stacked: Stacked | Mapping[str, Stacked] | None = None,
    rows: float | None = None,
    initializer: jax.nn.initializers.Initializer = glorot_normal,
    projection_bar: direct.ProjectionBar = None,
) -> WithDirectFeedback:
    """Adds direct feedback (DFA, sDFA, DRTP) to any function that names its values.

    With `fun_dfa = with_direct_feedback(fun, ("block1", "block2"), "logits")`,
    `fun_dfa(params, projections, *args)` equals `fun(params, *args)`. In the backward pass, with e
    the error of the value named "logits" and P = projections["block1"], the value a named "block1"
    gets

        a_bar = e · P                  error="exact": DFA
        a_bar = sign(e) · P / rows     error="sign": sDFA
        a_bar = t · P / rows           target=: DRTP, with t = target(params, *args)

    and nothing else: a is detached for all its later uses. The inside of a block, and the head from
    the last tap to the loss, are differentiated exactly. Use the result of `checkpoint_name` in
    the rest of the function: a path that uses the value before it is named is not cut. A path
    around the value is not cut either, such as a residual stream with named branches; name the sum
    instead. `soap_jax.explain(fun_dfa, params, projections, *args)` shows for every param whether
    its gradient is exact, direct, mixed or none.

    The function may use Linen, NNX (`nnx.split` and `nnx.merge`), Equinox, Haiku or no library, and
    may name values inside `jit`, `vmap`, `remat` and `scan`. It is traced, as under `jit`. Call the
    result under `jit`, since each call outside `jit` traces it again.

    **Scans.** If the tap and the output are named in the same scan body (a step of a recurrent
    net), each step's error goes to that step's value. If the tap names the carry, no error goes
    back through time. If only the tap is in a scan, and not the output, `stacked` must say what the
    scan iterates over:

        stacked="blocks"    each iteration has its own projection: (blocks, out, *features)
        stacked="time"      all iterations share one projection and get the same error, as in a
                            recurrent net with one output at the end
        stacked=1           all iterations share one projection, and each gets the error of its own
                            step; the number is the output's axis of time, (batch, time, out)

    Args:
        fun: `(params, *args, **kwargs) -> outputs`, as for `with_feedback`; the only or first
            output is the loss.
        taps: names of the values that get direct feedback; floating point, each named once.
        output: name of the value whose error is sent, `(*leading, out)`; named after all taps.
        target: instead of `output`, a function `(params, *args, **kwargs) -> (*leading, out)`, such
            as the one-hot labels, whose value is sent instead of an error.
        error: "exact" or "sign".
        stacked: see above; or a mapping from taps to these. Blocks in nested scans form one axis.
        rows: with "sign" or `target`, the number of rows over which the loss is a mean; by default
            the product of all axes of the output (or of the target) but the last, and of the
            lengths of the scans that contain the output.
        initializer: draws projections, as in `soap_jax.direct.draw_projection`.
        projection_bar: the cotangent of the projections, as in `soap_jax.direct.direct_feedback`:
            "kernel" for direct Kolen-Pollack.

    Returns:
        `fun_dfa(params, projections, *args, projection_key=None, **kwargs) -> outputs`.
        `projections` is a mapping with an entry for every tap, as from `init_projections`. As in
        `direct_feedback` an entry is an array, a typed key, or a function
        `(error, shape, key) -> x_bar`, which gets a key derived from `projection_key`. A tap with
        the entry None is not cut; None instead of the mapping is backpropagation. fun_dfa raises
        ValueError when it is traced, with names and lines: if a name does not occur or occurs
        twice; if an output comes before a tap, or the loss does not use it; if a tap is inside a
        custom derivative, `cond` or `while_loop`; or if a projection does not fit.

    Raises:
        ValueError: if names, `target`, `error`, `stacked` or `projection_bar` are not as above.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax.ad_checkpoint import checkpoint_name
        >>> def loss(params, x):
        ...     h = checkpoint_name(x @ params["in"], "h")
        ...     return checkpoint_name(h @ params["out"], "y").sum()
        >>> params = {"in": jnp.eye(2), "out": jnp.ones((2, 1))}
        >>> loss_dfa = with_direct_feedback(loss, "h", "y")
        >>> jax.grad(loss_dfa)(params, {"h": jnp.array([[5.0, -1.0]])}, jnp.ones((1, 2)))["in"]
        Array([[ 5., -1.],
               [ 5., -1.]], dtype=float32)

    References:
        Arild Nøkland. Direct feedback alignment provides learning in deep neural networks. NeurIPS,
        2016. https://arxiv.org/abs/1609.01596
        Charlotte Frenkel, Martin Lefebvre, David Bol. Learning without feedback: fixed random
        learning signals allow for feedforward training of deep neural networks. Frontiers in
        Neuroscience, 2021 (DRTP, sDFA). https://arxiv.org/abs/1909.01311
    """
    taps = (taps,) if isinstance(taps, str) else tuple(taps)
    names = [*taps, output] if target is None else list(taps)
    if not taps or not all(isinstance(n, str) for n in names) or len(set(names)) != len(names):
        raise ValueError(
            f"taps are {taps!r} and the output is {output!r}; expected different names that the "
            "function gives with jax.ad_checkpoint.checkpoint_name: at least one tap, and the "
            "output, or a function of fun's arguments as `target`."
        )
    if target is not None and (output is not None or error != "exact" or not callable(target)):
        raise ValueError(
            f"target is {target!r}, with the output {output!r} and error={error!r}; expected only "
            "a function of fun's arguments, since the target is sent instead of an error."
        )
    if error not in ("exact", "sign"):
        raise ValueError(f"error is {error!r}; expected 'exact' (DFA) or 'sign' (sDFA).")
    direct.check_projection_bar(projection_bar, target)
    words = dict(stacked) if isinstance(stacked, Mapping) else dict.fromkeys(taps, stacked)
    if set(words) - set(taps) or not all(map(_is_word, words.values())):
        raise ValueError(
            f"stacked is {stacked!r}; expected 'blocks' (one projection per iteration of a scan), "
            "'time' (one projection for all), the output's axis of time as an integer, or a "
            "mapping from taps to these."
        )
    return WithDirectFeedback(
        fun, taps, output, target, error, tuple(words.items()), rows, initializer, projection_bar
    )


def _is_word(word) -> bool:
    is_axis = isinstance(word, int) and not isinstance(word, bool) and word >= 0
    return word in ("blocks", "time", None) or is_axis


@dataclasses.dataclass(frozen=True)
class WithDirectFeedback:
    """The function that `with_direct_feedback` returns; the attributes are its arguments."""

    fun: Callable
    taps: tuple[str, ...]
    output: str | None
    target: Callable[..., jax.Array] | None
    error: direct.Error
    stacked: tuple[tuple[str, Stacked | None], ...]
    rows: float | None
    initializer: jax.nn.initializers.Initializer
    projection_bar: direct.ProjectionBar

    @property
    def __name__(self) -> str:
        """The function's name, for profiles."""
        return getattr(self.fun, "__name__", "with_direct_feedback")

    def __call__(
        self,
        params: chex.ArrayTree,
        projections: chex.ArrayTree,
        *args,
        projection_key: chex.PRNGKey | None = None,
        **kwargs,
    ):
        """Computes the function, with direct feedback in the backward pass."""
        if projections is None:
            return self.fun(params, *args, **kwargs)
        if not isinstance(projections, Mapping) or set(projections) != set(self.taps):
            found = list(projections) if isinstance(projections, Mapping) else type(projections)
            raise ValueError(
                f"projections are {found}; expected a mapping with an entry for each of the taps "
                f"{self.taps}, as from init_projections(key, fun_dfa, params, *args)."
            )
        target = None if self.target is None else self.target(params, *args, **kwargs)

        def join(output, values, key, cut: Cut):
            rows = self.rows
            if rows is None and self.error == "sign":
                rows = math.prod(jnp.shape(output)[:-1]) * cut.rounds
            for stacked in (False, True):
                mine = {tap: v for tap, v in values.items() if cut.stacked(tap) == stacked}
                if not mine:
                    continue
                try:
                    output = direct.direct_feedback(
                        output,
                        mine,
                        {tap: projections[tap] for tap in mine},
                        error=self.error,
                        target=target,
                        stacked=stacked,
                        rows=rows,
                        initializer=self.initializer,
                        key=key,
                        projection_bar=self.projection_bar,
                    )
                except ValueError as problem:
                    raise ValueError(f"{problem} The taps are {cut.show(mine)}.") from problem
            return output

        cut = self.cut(params, args, kwargs, join, [t for t in self.taps if projections[t] is None])
        return cut.traced.rebuild(cut.evaluate(cut.args, projection_key))

    def cut(self, params, args, kwargs, join: Join, exact: Sequence[str] = ()) -> Cut:
        """Returns the traced function with its taps cut, except those in `exact`."""
        traced = tracing.trace(self.fun, params, args, kwargs)
        return Cut(traced, self.taps, self.output, dict(self.stacked), join, exact)


def init_projections(
    key: chex.PRNGKey,
    fun_dfa: WithDirectFeedback,
    params: chex.ArrayTree,
    *args,
    stored: bool = True,
    **kwargs,
) -> dict[str, jax.Array]:
    """Draws a float32 projection for every tap of a function with direct feedback.

    The projections are those of `soap_jax.direct.draw_projections` for the named activations. A
    draw depends only on `key` and the tap's name. `fun` is traced, but not executed.

    Args:
        key: a PRNG key.
        fun_dfa: the result of `with_direct_feedback`.
        params: the params of `fun`; like `args`, arrays or `jax.ShapeDtypeStruct`s.
        *args: the other arguments of `fun`.
        stored: whether to return projections. False returns their keys, from which every backward
            pass draws the same projections.
        **kwargs: the keyword arguments of `fun`.

    Returns:
        By tap, a projection `(out, *features)`, or `(blocks, out, *features)` for the blocks of a
        scan; or keys.

    Raises:
        ValueError: as `fun_dfa` when it is traced.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax.ad_checkpoint import checkpoint_name
        >>> def loss(params, x):
        ...     h = checkpoint_name(x @ params["in"], "h")
        ...     return checkpoint_name(h @ params["out"], "y").sum()
        >>> params = {"in": jnp.ones((5, 4)), "out": jnp.ones((4, 2))}
        >>> loss_dfa = with_direct_feedback(loss, "h", "y")
        >>> projections = init_projections(jax.random.key(0), loss_dfa, params, jnp.ones((3, 5)))
        >>> jax.tree.map(jnp.shape, projections)
        {'h': (2, 4)}
    """
    if not isinstance(fun_dfa, WithDirectFeedback):
        raise ValueError(
            f"fun_dfa is {fun_dfa!r}; expected the result of with_direct_feedback(fun, taps, "
            "output)."
        )
    found: dict[str, Any] = {}

    def join(output, values, key, cut: Cut):
        del key
        for tap, value in values.items():
            found[tap] = cut.stacked(tap), _type(output), _type(value)
        return output

    cut = fun_dfa.cut(params, args, kwargs, join)
    jax.eval_shape(cut.evaluate, cut.args)
    if fun_dfa.target is not None:
        (target,) = tracing.trace(fun_dfa.target, params, args, kwargs).closed.out_avals
        found = {tap: (stacked, target, value) for tap, (stacked, _, value) in found.items()}
    drawn = {
        tap: direct.draw_projections(
            key,
            sender,
            {tap: value},
            stacked=stacked,
            stored=stored,
            initializer=fun_dfa.initializer,
        )
        for tap, (stacked, sender, value) in found.items()
    }
    return {tap: drawn[tap][tap] for tap in fun_dfa.taps}


def _type(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
