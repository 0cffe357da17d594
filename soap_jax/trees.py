"""Paths into trees, and which feedback leaf belongs to which kernel.

A feedback tree mirrors `params`: the feedback for `params[path]` lies at the same path. An NNX
module cannot hold two attributes of one name, so there the leaf is called `feedback` and pairs
with its sibling `kernel`. `map_pairs` knows both forms, and everything that compares or combines
kernels with feedback goes through it. A missing or `None` leaf means exact backpropagation.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from soap_jax import dtypes, factors

Path = tuple[str, ...]
"""Names from a tree's root to a leaf; the box that Flax may put around a leaf does not count."""

Where = str | Sequence[str] | Callable[[str, jax.Array], bool] | None
"""Selects leaves: glob patterns over "a/b/c" paths, or a predicate `(path, leaf) -> bool`."""

KERNEL_NAMES = ("kernel", "w", "weight")
"""Leaves of these names, of two axes or more, get feedback by default."""


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
        params: a tree that holds the kernels: a dict of arrays, an `nnx.State`, any pytree.
        feedback: a tree whose leaves lie at their kernels' paths, or are called `feedback` beside
            a `kernel`. `None` leaves are passed over.
        stored: whether `fn` gets feedback that is stored as factors as it is, not as one array.

    Returns:
        A tree of feedback's structure; `None` leaves stay `None`, and factors are one leaf.

    Raises:
        ValueError: if a feedback leaf has no kernel, or not its kernel's shape, if it is complex
            and its kernel real, or if its kernel is not floating point.

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
                guess = "Factors are a soap_jax.factors.Product or LowRank, no dict of arrays."
            raise ValueError(
                f"feedback at {show(path)} has no kernel: params has no leaf there. ({guess}) "
                "Feedback lies "
                "at its kernel's path (in NNX: is called 'feedback' beside a 'kernel'). The "
                f"leaves of params: {', '.join(map(show, kernels)) or 'none'}."
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
    """The pairs that `map_pairs` maps over, `(kernel, feedback)` by path.

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
    """Feedback leaves by their kernel's path, also where they are called `feedback` beside it.

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
    """The feedback tree that makes the same model's gradients exact: `feedback := kernel`.

    Args:
        params: as in `map_pairs`.
        feedback: as in `map_pairs`; gives the structure. Its values are not used, nor are its
            dtypes, in which kernels would be rounded.

    Returns:
        A tree of feedback's structure that holds the kernels.

    Raises:
        ValueError: as `map_pairs`.

    Example:
        >>> import jax.numpy as jnp
        >>> at_kernels({"kernel": jnp.eye(2)}, {"kernel": jnp.zeros((2, 2))})["kernel"].trace()
        Array(2., dtype=float32)
    """
    return map_pairs(lambda path, kernel, leaf: kernel, params, feedback)


def select(params: chex.ArrayTree, where: Where) -> set[Path]:
    """The paths of the kernels that `where` names; floating point all of them.

    Raises:
        ValueError: if a pattern matches nothing, if nothing at all is selected, or if what is
            selected is not floating point or has no entries.
    """
    leaves = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
    if where is None:
        chosen = {p for p, leaf in leaves.items() if p[-1:] and p[-1] in KERNEL_NAMES}
        chosen = {p for p in chosen if jnp.ndim(leaves[p]) > 1}
    elif callable(where):
        chosen = {p for p, leaf in leaves.items() if where("/".join(p), leaf)}
    else:
        patterns = (where,) if isinstance(where, str) else where
        if not isinstance(patterns, Iterable):
            raise ValueError(
                f"where is {where!r}; expected glob patterns such as 'Dense_1/kernel', what "
                "soap_jax.explain returned, or a predicate (path, leaf) -> bool."
            )
        chosen = set()
        for pattern in patterns:
            matched = {p for p in leaves if matches(pattern, p)}
            if not matched:
                raise ValueError(
                    f"where={pattern!r} matches no leaf of params. The leaves are: "
                    f"{', '.join(map(show, leaves)) or 'none'}."
                )
            chosen |= matched
    if not chosen:
        why = (
            f"by default these do: leaves named {' or '.join(KERNEL_NAMES)} with two axes or more; "
            "say otherwise with `where`"
            if where is None
            else "`where` selects none (an explanation: the kernels whose effect is feedback)"
        )
        raise ValueError(
            f"no leaf of params gets feedback: {why}. The leaves are: "
            f"{', '.join(map(show, leaves)) or 'none'}."
        )
    for path in chosen:
        check_kernel(leaves[path], path)
        check_not_empty(leaves[path], path)
    return chosen


def check_kernel(kernel: jax.Array, path: Path = ()) -> None:
    """Raises ValueError unless the kernel is floating point."""
    if not is_inexact(kernel):
        raise ValueError(
            f"the kernel{_at(path)} {_kind(kernel)}; expected a floating-point dtype, since only "
            "such a kernel has a gradient. Leave it out, or cast it."
        )


def check_not_empty(kernel: jax.Array, path: Path = ()) -> None:
    """Raises ValueError for a kernel without entries."""
    if 0 in jnp.shape(kernel):
        raise ValueError(
            f"the kernel{_at(path)} has shape {jnp.shape(kernel)}, which is empty; expected at "
            "least one weight. Give it no feedback: leave it out of `where`, or make its leaf None."
        )


def check_feedback(feedback: Any, kernel: jax.Array, path: Path = ()) -> None:
    """Raises ValueError unless feedback has its kernel's shape, and is real if the kernel is.

    No forward pass would notice either.
    """
    if factors.is_factored(feedback):
        return _check_factors(feedback, kernel, path)
    if isinstance(feedback, tuple | list) or dtypes.of(feedback) is None:
        raise ValueError(
            f"feedback{_at(path)} is a {type(feedback).__name__}; expected an array of numbers, or "
            "factors: a soap_jax.factors.Product or LowRank."
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
            "expected real feedback for a real kernel, whose error has no imaginary part."
        )


def _check_factors(feedback, kernel, path) -> None:
    """Raises ValueError unless factors are real, and their product has the kernel's shape."""
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
    """Whether a leaf is an array, or a number, that has a derivative."""
    dtype = dtypes.of(leaf)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def path_of(keys: Sequence[Any]) -> Path:
    """The names in a `jax.tree_util` key path, without the `value` of a Flax box."""
    keys = tuple(keys)
    if len(keys) > 1 and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]  # an nnx.Variable or nn.Partitioned
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def named(tree: chex.ArrayTree) -> dict[str, Any]:
    """The leaves of a tree by their paths in one string, as loggers and tables want them.

    `None` is no leaf. What has no path, a single array, is called "".

    Raises:
        ValueError: if two leaves have one name.

    Example:
        >>> named({"Dense_0": {"kernel": 1.0, "bias": None}})
        {'Dense_0/kernel': 1.0}
    """
    found: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(path_of(keys))
        if name in found:
            raise ValueError(f"two leaves are called {name!r}; expected one: do names hold a '/'?")
        found[name] = leaf
    return found


def matches(pattern: str, path: Path) -> bool:
    """Whether the glob `pattern` matches the path; `*` also spans "/"."""
    if not isinstance(pattern, str):
        raise ValueError(
            f"a pattern is {pattern!r}; expected a string over paths, such as 'Dense_1/kernel' or "
            "'Dense_*/kernel'."
        )
    return fnmatch.fnmatchcase("/".join(path), pattern)


def show(path: Path) -> str:
    """The path as error messages print it: `['Dense_1']['kernel']`; of a tree's root, `params`."""
    return "".join(f"[{name!r}]" for name in path) or "params"


def _at(path: Path) -> str:
    return f" at {show(path)}" if path else ""


def _kind(leaf):
    dtype = dtypes.of(leaf)
    return f"is a {type(leaf).__name__}" if dtype is None else f"has dtype {dtype}"
