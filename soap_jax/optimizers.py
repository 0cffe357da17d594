"""Kolen-Pollack learning: feedback gets the updates and the weight decay of its kernel.

    W <- (1 - decay) W + ΔW
    B <- (1 - decay) B + ΔW

For any ΔW the difference W - B is multiplied by exactly 1 - decay at every update, so B converges
to W without access to W. The gradient by feedback must be the gradient by its kernel. Then an Optax
optimiser over the pair `(params, feedback)` does this, if it is linear in the gradient (SGD; with
momentum the difference decays as under SGD with momentum), or elementwise with *decoupled* weight
decay (AdamW):

    loss_fa = with_feedback(loss, feedback_bar="kernel")       # or a layer's feedback_bar="kernel"
    optimizer = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.1, momentum=0.9))
    opt_state = optimizer.init((params, feedback))
    grads = jax.grad(loss_fa, argnums=(0, 1))(params, feedback, batch)
    updates, opt_state = optimizer.update(grads, opt_state, (params, feedback))
    params, feedback = optax.apply_updates((params, feedback), updates)

It does not if weight decay goes through a nonlinear transformation. With Adam after
`add_decayed_weights`, for example, the decay of B is divided by other moments than the decay of W.
Clipping by the global norm is another problem: over the pair it would count kernels twice, and over
the params only (`optax.masked`) B would get its unclipped gradient. For all these cases use
`kolen_pollack`. It runs any optimiser on the params only and gives feedback the resulting update,
so it also needs no moments for feedback:

    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    optimizer = kolen_pollack(clipped, decay=1e-4)
"""

from __future__ import annotations

import numbers
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from soap_jax import dtypes, factors, trees


class KolenPollackState(NamedTuple):
    """The state of `kolen_pollack`.

    Attributes:
        num_updates: int32 scalar, the number of updates so far.
        inner: the optimiser's state, over `params`.
    """

    num_updates: jax.Array
    inner: optax.OptState


def kolen_pollack(
    optimizer: optax.GradientTransformation, *, decay: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """Makes an optimiser for Kolen-Pollack learning from an optimiser of the params.

        W <- (1 - decay) W + ΔW,      B <- (1 - decay) B + ΔW

    with ΔW the update of `optimizer`. The result is an optimiser over the pair `(params,
    feedback)`. Only kernels with feedback decay. The gradient by feedback is not used, so
    `feedback_bar` is not needed.

    Args:
        optimizer: any Optax optimiser over `params`, including clipping. It should have no weight
            decay, which would be part of ΔW, so that W would leak into B: use `decay` instead. Wrap
            the result, not `optimizer`, in `optax.MultiSteps`, since weights decay at every call of
            `update`.
        decay: the share of W and B that decays at every update, in (0, 1), or a schedule of it. It
            corresponds to the learning rate times the weight decay of other optimisers.

    Returns:
        A gradient transformation. Its `init` takes `(params, feedback)`. Its `update` takes
        `((gradient, anything), state, (params, feedback))` and the extra arguments of `optimizer`
        (where `grad` and `value_fn` are over the pair too).

    Raises:
        ValueError: if decay is not in (0, 1) or `optimizer` is not an optimiser; and when it is
            used, if the argument is not a pair `(params, feedback)`, or feedback is not floating
            point.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> optimizer = kolen_pollack(optax.sgd(0.1), decay=0.5)
        >>> learnt = {"kernel": jnp.array(4.0)}, {"kernel": jnp.array(0.0)}
        >>> gradient = {"kernel": jnp.array(10.0)}, None
        >>> updates, _ = optimizer.update(gradient, optimizer.init(learnt), learnt)
        >>> [float(tree["kernel"]) for tree in optax.apply_updates(learnt, updates)]
        [1.0, -1.0]

    References:
        Akrout et al. Deep learning without weight transport. NeurIPS, 2019 (equations 16 and 17).
        https://arxiv.org/abs/1904.05391
        John F. Kolen, Jordan B. Pollack. Backpropagation without weight transport. ICNN, 1994.
    """
    _check_optimizer(optimizer)
    known = not (callable(decay) or isinstance(decay, jax.core.Tracer))
    if known and not _is_share(decay):
        raise ValueError(
            f"decay is {decay!r}; expected a number in (0, 1), the share of W and B that decays "
            "at every update: the learning rate times the weight decay."
        )
    of_params = optax.with_extra_args_support(optimizer)

    def init(learnt):
        params, feedback = _pair(learnt)
        for path, (_, leaf) in trees.pairs(params, feedback, stored=True).items():
            if factors.is_factored(leaf):
                raise ValueError(
                    f"feedback at {trees.show(path)} is a {type(leaf).__name__}; expected an array "
                    "of its kernel's shape, which gets the kernel's update. Factors learn from "
                    "their own gradients: use with_feedback(loss, feedback_bar='kernel') and "
                    "hold_fixed."
                )
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                raise ValueError(
                    f"feedback at {trees.show(path)} has dtype {leaf.dtype}; expected a "
                    "floating-point dtype, since the kernel's updates are added to it."
                )
        return KolenPollackState(jnp.zeros((), jnp.int32), of_params.init(params))

    def update(updates, state, params=None, **extra_args):
        (gradient, _), (params, feedback) = _pair(updates), _pair(params)
        extra_args = _of_params(extra_args, feedback)
        change, inner = of_params.update(gradient, state.inner, params, **extra_args)
        share = decay(state.num_updates) if callable(decay) else decay
        kernels = trees.by_kernel(params, feedback)

        def decayed(leaf, weight):
            change, wide = dtypes.widen(leaf, weight)
            return (change - jnp.asarray(share, wide.dtype) * wide).astype(weight.dtype)

        def of_param(keys, leaf, weight):
            return decayed(leaf, weight) if trees.path_of(keys) in kernels else leaf

        of_feedback = jax.tree.map(decayed, trees.at_kernels(change, feedback), feedback)
        change = jax.tree_util.tree_map_with_path(of_param, change, params)
        return (change, of_feedback), KolenPollackState(
            optax.safe_increment(state.num_updates), inner
        )

    return optax.GradientTransformationExtraArgs(init, update)


def hold_fixed(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Makes an optimiser that does not update fixed factors of feedback, nor keep moments for them.

    These are the right factors of each `soap_jax.factors.Product`. Their gradient is 0, but weight
    decay would change them.

    Args:
        optimizer: any Optax optimiser, over feedback or a tree that contains feedback, such as the
            pair `(params, feedback)`.

    Returns:
        An optimiser over the same tree.

    Raises:
        ValueError: if `optimizer` is not an optimiser.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from soap_jax import factors
        >>> feedback = {"kernel": factors.Product(jnp.ones((3, 4)), jnp.ones((4, 2)))}
        >>> optimizer = hold_fixed(optax.add_decayed_weights(0.5))
        >>> zeros = jax.tree.map(jnp.zeros_like, feedback)
        >>> updates, _ = optimizer.update(zeros, optimizer.init(feedback), feedback)
        >>> jax.tree.map(lambda u: float(u.max()), updates)
        {'kernel': Product(left=0.5, right=0.0)}
    """
    _check_optimizer(optimizer)
    inner = optax.with_extra_args_support(optimizer)

    def learned(tree):
        return jax.tree.map(lambda held, x: None if held else x, factors.fixed(tree), tree)

    def whole(part, tree):
        return jax.tree.map(
            lambda held, x, own: x if held else own, factors.fixed(tree), tree, part
        )

    def init(tree):
        return inner.init(learned(tree))

    def update(updates, state, params=None, **extra_args):
        given = {
            "grad": learned,
            "value_fn": lambda value: lambda part: value(whole(part, params)),
        }
        extra_args = {k: given[k](arg) if k in given else arg for k, arg in extra_args.items()}
        own = None if params is None else learned(params)
        changes, state = inner.update(learned(updates), state, own, **extra_args)
        return whole(changes, jax.tree.map(jnp.zeros_like, updates)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _check_optimizer(optimizer):
    """Raises ValueError unless `optimizer` is an Optax optimiser."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__}; expected an Optax optimiser, such as "
            "optax.sgd(0.1)."
        )


def _of_params(extra_args, feedback):
    """Converts Optax's extra arguments from the pair to the params only."""
    fixed = {
        "grad": lambda pair: pair[0],
        "value_fn": lambda value: lambda params: value((params, feedback)),
    }
    return {k: fixed[k](arg) if k in fixed else arg for k, arg in extra_args.items()}


def _is_share(decay) -> bool:
    if isinstance(decay, jax.Array | np.ndarray):
        return decay.ndim == 0 and 0 < float(decay) < 1
    return isinstance(decay, numbers.Real) and 0 < float(decay) < 1


def _pair(learnt: chex.ArrayTree) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    if not (isinstance(learnt, tuple) and len(learnt) == 2):
        raise ValueError(
            f"kolen_pollack was given a {type(learnt).__name__}; expected the pair (params, "
            "feedback) in `init`, and pairs as gradient and as third argument of `update`."
        )
    return learnt
