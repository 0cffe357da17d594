"""Paths into trees, and pairs of a kernel and its feedback.

A feedback tree mirrors `params`: the feedback for `params[path]` is at the same path. An NNX module
cannot have two attributes of the same name, so there the leaf is called `feedback` and belongs to
its sibling `kernel`. `map_pairs` supports both forms, and all code that compares or combines
kernels with feedback uses it. A missing or `None` leaf means exact backpropagation.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from soap_jax import dtypes, factors

__all__ = [
    "KERNEL_NAMES",
    "Path",
    "Selector",
    "Where",
    "map_pairs",
    "named",
    "pairs",
    "select",
]

Path = tuple[str, ...]
"""The names from a tree's root to a leaf, without a Flax box around the leaf."""

Selector = str | Callable[[str, jax.Array], bool]
"""A glob pattern over "a/b/c" paths, or a predicate `(path, leaf) -> bool`."""

Where = Selector | Sequence[Selector] | None
"""A selection of leaves by one selector, or by any of several."""

KERNEL_NAMES = ("kernel", "w", "weight")
"""The names of leaves that get feedback by default, if they have at least two axes."""


def map_pairs(
    fn: Callable[[Path, jax.Array, jax.Array], Any],
    params: chex.ArrayTree,
    feedback: chex.ArrayTree,
    *,
    stored: bool = False,
) -> chex.ArrayTree:
    """Maps `fn(path, kernel, feedback)` over the pairs of `params` and `feedback`.

    Args:
        fn: what to compute from one pair.
        params: a tree that contains the kernels: a dict of arrays, an `nnx.State`, any pytree.
        feedback: a tree whose leaves are at their kernels' paths, or are called `feedback` next to
            a `kernel`. `None` leaves are skipped.
        stored: whether `fn` gets factored feedback as factors, instead of as one array.

    Returns:
        A tree of feedback's structure; `None` leaves stay `None`, and factors count as one leaf.

    Raises:
        ValueError: if a feedback leaf has no kernel or not its kernel's shape, if it is complex and
            its kernel real, or if its kernel is not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"out": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
        >>> feedback = {"out": {"kernel": jnp.full((2, 3), 7.0)}}
        >>> map_pairs(lambda path, w, b: float((w * b).sum()), params, feedback)
        {'out': {'kernel': 42.0}}
    """
    kernels = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def one(keys, leaf):
        if leaf is None:
            return None
        path = path_of(keys)
        kernel = kernels.get(path)
        if kernel is None and path[-1:] == ("feedback",):
            kernel = kernels.get((*path[:-1], "kernel"))
        if kernel is None and not path:
            raise ValueError(
                f"feedback is {type(leaf).__name__!r}; expected a tree that mirrors params, such "
                "as `init_feedback(key, params).feedback`. Was it left out of the call?"
            )
        if kernel is None:
            is_state = path[:1] == ("feedback",)
            guess = (
                "Is it a FeedbackState? Pass its tree, `state.feedback`."
                if is_state
                else ("Was feedback left out of the call, or swapped with params?")
            )
            if path[-1] in ("left", "right"):
                guess = "Factors are a soap_jax.factors.Product or LowRank, not a dict of arrays."
            raise ValueError(
                f"feedback at {show(path)} has no kernel: params has no leaf there. ({guess}) "
                "Expected feedback at its kernel's path (in NNX: an attribute 'feedback' next to "
                f"a 'kernel'). The leaves of params: {', '.join(map(show, kernels)) or 'none'}."
            )
        check_kernel(kernel, path)
        check_feedback(leaf, kernel, path)
        return fn(path, kernel, leaf if stored else factors.as_array(leaf, kernel.dtype))

    def is_leaf(leaf):
        return leaf is None or factors.is_factored(leaf)

    return jax.tree_util.tree_map_with_path(one, feedback, is_leaf=is_leaf)


def pairs(
    params: chex.ArrayTree, feedback: chex.ArrayTree, *, stored: bool = False
) -> dict[Path, tuple[jax.Array, Any]]:
    """Returns the pairs that `map_pairs` maps over: `(kernel, feedback)` by path.

    Example:
        >>> import jax.numpy as jnp
        >>> list(pairs({"kernel": jnp.eye(2)}, {"kernel": jnp.zeros((2, 2))}))
        [('kernel',)]
    """
    found: dict[Path, tuple[jax.Array, Any]] = {}
    map_pairs(lambda path, *pair: found.setdefault(path, pair), params, feedback, stored=stored)
    return found


def by_kernel(
    params: chex.ArrayTree, feedback: chex.ArrayTree, *, stored: bool = False
) -> dict[Path, Any]:
    """Returns feedback leaves by their kernel's path, also if they are called `feedback`.

    Args:
        params: as in `map_pairs`.
        feedback: as in `map_pairs`.
        stored: as in `map_pairs`.

    Raises:
        ValueError: as `map_pairs`.

    Example:
        >>> import jax.numpy as jnp
        >>> list(by_kernel({"a": {"kernel": jnp.eye(2)}}, {"a": {"feedback": jnp.eye(2)}}))
        [('a', 'kernel')]
    """
    paths = {path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)}
    return {
        path if path in paths else (*path[:-1], "kernel"): leaf
        for path, (_, leaf) in pairs(params, feedback, stored=stored).items()
    }


def at_kernels(params: chex.ArrayTree, feedback: chex.ArrayTree) -> chex.ArrayTree:
    """Returns the feedback tree with which gradients are exact: `feedback := kernel`.

    Args:
        params: as in `map_pairs`.
        feedback: as in `map_pairs`; only its structure is used. The result has the kernels' dtypes,
            so kernels are not rounded.

    Returns:
        A tree of feedback's structure that contains the kernels.

    Raises:
        ValueError: as `map_pairs`.

    Example:
        >>> import jax.numpy as jnp
        >>> at_kernels({"kernel": jnp.eye(2)}, {"kernel": jnp.zeros((2, 2))})["kernel"].trace()
        Array(2., dtype=float32)
    """
    return map_pairs(lambda path, kernel, leaf: kernel, params, feedback)


def select(params: chex.ArrayTree, where: Where) -> set[Path]:
    """Returns the paths of the kernels that `where` selects.

    Raises:
        ValueError: if a pattern matches nothing, if nothing is selected, or if a selected leaf is
            not floating point or is empty.
    """
    leaves = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
    if where is None:
        chosen = {p for p, leaf in leaves.items() if p[-1:] and p[-1] in KERNEL_NAMES}
        chosen = {p for p in chosen if jnp.ndim(leaves[p]) > 1}
    else:
        selectors = (where,) if isinstance(where, str) or callable(where) else where
        if not isinstance(selectors, Iterable):
            raise ValueError(
                f"where is {where!r}; expected glob patterns such as 'Dense_1/kernel', the result "
                "of soap_jax.explain, or a predicate (path, leaf) -> bool."
            )
        chosen = set()
        for selector in selectors:
            if hasattr(selector, "rows"):  # an explanation; names in its paths may contain "/"
                chosen |= leaves.keys() & {r.path for r in selector.rows if r.effect == "feedback"}
                continue
            if callable(selector):
                _check_predicate(selector)
                chosen |= {p for p, leaf in leaves.items() if selector("/".join(p), leaf)}
                continue
            matched = {p for p in leaves if matches(selector, p)}
            if not matched:
                raise ValueError(
                    f"where={selector!r} matches no leaf of params. The leaves are: "
                    f"{', '.join(map(show, leaves)) or 'none'}."
                )
            chosen |= matched
    if not chosen:
        why = (
            f"by default leaves named {' or '.join(KERNEL_NAMES)} with at least two axes do; "
            "select others with `where`"
            if where is None
            else "`where` selects none (an explanation selects kernels with the effect 'feedback')"
        )
        raise ValueError(
            f"no leaf of params gets feedback: {why}. The leaves are: "
            f"{', '.join(map(show, leaves)) or 'none'}."
        )
    for path in chosen:
        check_kernel(leaves[path], path)
        check_not_empty(leaves[path], path)
    return chosen


def _check_predicate(predicate: Callable) -> None:
    """Raises ValueError if a predicate of `where` does not take a path and a leaf."""
    try:
        signature = inspect.signature(predicate)
    except ValueError:  # a built-in function may have none
        return
    try:
        signature.bind("path", "leaf")
    except TypeError as error:
        raise ValueError(
            f"a predicate of `where` has the signature {signature}; expected (path, leaf), such as "
            "lambda path, leaf: leaf.ndim == 2."
        ) from error


def check_kernel(kernel: jax.Array, path: Path = ()) -> None:
    """Raises ValueError unless the kernel is floating point."""
    if not is_inexact(kernel):
        raise ValueError(
            f"the kernel{_at(path)} {_kind(kernel)}; expected a floating-point dtype, since other "
            "kernels have no gradient. Leave it out, or cast it."
        )


def check_not_empty(kernel: jax.Array, path: Path = ()) -> None:
    """Raises ValueError for a kernel without entries."""
    if 0 in jnp.shape(kernel):
        raise ValueError(
            f"the kernel{_at(path)} has shape {jnp.shape(kernel)}, which is empty; expected at "
            "least one weight. Leave it out of `where`, or set its feedback leaf to None."
        )


def check_feedback(feedback: Any, kernel: jax.Array, path: Path = ()) -> None:
    """Raises ValueError unless feedback has its kernel's shape, and is real if the kernel is real.

    The forward pass cannot detect these mistakes, since it does not use feedback.
    """
    if factors.is_factored(feedback):
        return _check_factors(feedback, kernel, path)
    if isinstance(feedback, tuple | list) or dtypes.of(feedback) is None:
        raise ValueError(
            f"feedback{_at(path)} is a {type(feedback).__name__}; expected an array of numbers, or "
            "factors, that is a soap_jax.factors.Product or LowRank."
        )
    if jnp.shape(feedback) != jnp.shape(kernel):
        raise ValueError(
            f"feedback{_at(path)} has shape {jnp.shape(feedback)}; expected {jnp.shape(kernel)}, "
            "the shape of its kernel. Feedback is laid out like the kernel, not transposed."
        )
    dtype = jnp.result_type(feedback)
    if not dtypes.holds(jnp.result_type(kernel), dtype):
        raise ValueError(
            f"feedback{_at(path)} has dtype {dtype} and its kernel {jnp.result_type(kernel)}; "
            "expected real feedback for a real kernel, since the error is real."
        )


def _check_factors(feedback, kernel, path) -> None:
    """Raises ValueError unless factors are real and their product has the kernel's shape."""
    kind = type(feedback).__name__
    named = " and ".join(f"{jnp.result_type(f)}{list(jnp.shape(f))}" for f in feedback)
    if not all(jnp.issubdtype(jnp.result_type(f), jnp.floating) for f in feedback):
        raise ValueError(
            f"feedback{_at(path)} is a {kind} of {named}; expected real floating-point factors."
        )
    left, right = map(jnp.shape, feedback)
    fits = left[-1:] == right[-2:-1] and (*left[:-1], *right[-1:]) == jnp.shape(kernel)
    if not fits or right[:-2] not in ((), left[:-2]):
        *rows, out = jnp.shape(kernel)
        raise ValueError(
            f"feedback{_at(path)} is a {kind} of {named}; expected ({', '.join(map(str, rows))}, "
            f"rank) and (rank, {out}), so that their product has the kernel's shape."
        )


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is a floating-point or complex array or number."""
    dtype = dtypes.of(leaf)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def path_of(keys: Sequence[Any]) -> Path:
    """Returns the names in a `jax.tree_util` key path, without the `value` of a Flax box."""
    keys = tuple(keys)
    if len(keys) > 1 and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]  # an nnx.Variable or nn.Partitioned
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def named(tree: chex.ArrayTree) -> dict[str, Any]:
    """Returns the leaves of a tree by path, with each path as one string, for loggers and tables.

    `None` is not a leaf. A tree that is a single array has the path "".

    Raises:
        ValueError: if two leaves have the same name.

    Example:
        >>> named({"Dense_0": {"kernel": 1.0, "bias": None}})
        {'Dense_0/kernel': 1.0}
    """
    found: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(path_of(keys))
        if name in found:
            raise ValueError(
                f"two leaves are called {name!r}; expected different names. Names must not contain "
                "'/'."
            )
        found[name] = leaf
    return found


def matches(pattern: str, path: Path) -> bool:
    """Whether the glob `pattern` matches the path; `*` also matches "/"."""
    if not isinstance(pattern, str):
        raise ValueError(
            f"a pattern is {pattern!r}; expected a string that matches paths, such as "
            "'Dense_1/kernel' or 'Dense_*/kernel'."
        )
    return fnmatch.fnmatchcase("/".join(path), pattern)


def show(path: Path) -> str:
    """Formats the path for messages: `['Dense_1']['kernel']`, or `params` for a tree's root."""
    return "".join(f"[{name!r}]" for name in path) or "params"


def _at(path: Path) -> str:
    return f" at {show(path)}" if path else ""


def _kind(leaf):
    dtype = dtypes.of(leaf)
    return f"is a {type(leaf).__name__}" if dtype is None else f"has dtype {dtype}"
