"""Local losses: feedback learns from the activity of the batch, without any error.

Information, symmetric and activation alignment: the feedback B of each layer minimises a loss of
the layer's input x and weights. The loss is a sum of terms, which the paper calls primitives. With
y = op(x, W) and n examples they are

    amp      -<op(x, B), op(x, W)> / n      makes op(x, B) similar to y: aligns B with W if x varies
    null     |opᵀ(y; B)|² / 2n              keeps the cotangent that B sends back from y small
    sparse   |op(x, B)|² / 2n               keeps op(x, B) small
    self     -<B, W>                        aligns B with W directly (not local: depends on W)
    decay    |B|² / 2

For a dense layer op(x, W) is x · W, and n is the number of rows of x. In general n is how often op
uses each entry of W, in a convolution at every position of every example. Write the layer for
batches: under a `vmap` over examples each example counts as a batch, and their gradients are added.
The gradients of several uses of a kernel are added too: a recurrent kernel that is used T times
gets the sum of T gradients.

Give a loss as `feedback_bar` to a layer or a transform; any Optax optimiser can use its gradient:

    loss_fa = with_feedback(loss, feedback_bar=InformationAlignment())
    grads = jax.grad(loss_fa, argnums=(0, 1))(params, feedback, batch)
    updates, opt_state = optimizer.update(grads, opt_state, (params, feedback))
    params, feedback = optax.apply_updates((params, feedback), updates)

with an optimiser over the pair, such as

    parts = {"params": optax.adam(1e-3), "feedback": optax.sgd(0.01)}
    optimizer = optax.partition(parts, ("params", "feedback"))

Weight mirror and Kolen-Pollack learning belong to the same family. Weight mirror draws its own
activities, so it is a rule, `soap_jax.WeightMirror`. Kolen-Pollack learning uses the kernel's
gradient, `feedback_bar="kernel"`.

References:
    Daniel Kunin, Aran Nayebi, Javier Sagastuy-Brena, Surya Ganguli, Jonathan Bloom, Daniel Yamins.
    Two routes to scalable credit assignment without weight symmetry. ICML, 2020.
    https://arxiv.org/abs/2003.01513
"""

from __future__ import annotations

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
from jax.extend import core

from soap_jax import dtypes, ops


class _Weighted(ops.LocalLoss):
    """The base class of local losses, whose fields are the weights of primitives."""

    def __post_init__(self):
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value: float = getattr(self, field.name)
            if not (isinstance(value, numbers.Real) and 0 <= value < math.inf):
                raise ValueError(
                    f"{type(self).__name__}: {field.name} is {value!r}; expected a number of at "
                    "least 0, the weight of that primitive."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SymmetricAlignment(_Weighted):
    """Symmetric alignment: `self_weight · self + decay · decay`.

        feedback_bar = decay · B - self_weight · W

    so B converges to self_weight / decay · W. It is weight transport by the optimiser.

    Attributes:
        self_weight: weight of the primitive "self".
        decay: weight of the primitive "decay".

    Raises:
        ValueError: if a weight is not a number of at least 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from soap_jax import ops
        >>> def f(feedback):
        ...     x, kernel = jnp.ones((1, 2)), jnp.eye(2)
        ...     loss = SymmetricAlignment(decay=0.5)
        ...     return ops.feedback_dense(x, kernel, feedback, feedback_bar=loss).sum()
        >>> jax.grad(f)(jnp.ones((2, 2)))
        Array([[-0.5,  0.5],
               [ 0.5, -0.5]], dtype=float32)

    References:
        Kunin et al. (2020); see the module's docstring.
    """

    self_weight: float = 1.0
    decay: float = 1.0

    def loss(
        self, op: ops.BilinearOp, x: jax.Array, kernel: jax.Array, feedback: jax.Array
    ) -> jax.Array:
        """Returns the loss."""
        del op, x
        own, decay = jnp.sum(feedback * kernel), _half_square(feedback)
        return decay * float(self.decay) - own * float(self.self_weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationAlignment(_Weighted):
    """Activation alignment: `amp · amp + sparse · sparse`.

        feedback_bar = opᵀ(sparse · op(x, B) - amp · op(x, W); x) / n

    so op(x, B) converges to amp / sparse · op(x, W) for the x of the batches. Where x is always
    zero, as after dead units, B does not change.

    Attributes:
        amp: weight of the primitive "amp".
        sparse: weight of the primitive "sparse".

    Raises:
        ValueError: if a weight is not a number of at least 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from soap_jax import ops
        >>> def f(feedback):
        ...     x, kernel = jnp.array([[1.0, 0.0]]), jnp.eye(2)
        ...     loss = ActivationAlignment()
        ...     return ops.feedback_dense(x, kernel, feedback, feedback_bar=loss).sum()
        >>> jax.grad(f)(jnp.full((2, 2), 3.0))
        Array([[2., 3.],
               [0., 0.]], dtype=float32)

    References:
        Kunin et al. (2020); see the module's docstring.
    """

    amp: float = 1.0
    sparse: float = 1.0

    def loss(
        self, op: ops.BilinearOp, x: jax.Array, kernel: jax.Array, feedback: jax.Array
    ) -> jax.Array:
        """Returns the loss."""
        y, ours = op(x, kernel), op(x, feedback)
        amp, sparse = jnp.sum(ours * y), _half_square(ours)
        return (sparse * float(self.sparse) - amp * float(self.amp)) / _examples(op, x, kernel)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InformationAlignment(_Weighted):
    """Information alignment: `amp · amp + decay · decay + null · null`.

        feedback_bar = decay · B + (null · B yᵀy - amp · xᵀy) / n       (a dense layer)

    It is local and draws no noise. Up to a constant, amp and null together are the reconstruction
    error |x - opᵀ(y; B)|² / 2n of B as a decoder of x from y; decay keeps this decoder small. For a
    dense layer with uncorrelated inputs of variance 1, B converges to
    amp · W (decay + null · WᵀW)⁻¹. This is aligned with W if WᵀW is close to a multiple of the
    identity, or small compared with decay / null. Plain gradient descent is stable for learning
    rates below 2 / (decay + null · λ), where λ, the largest eigenvalue of yᵀy / n, grows with W.

    Attributes:
        amp: weight of the primitive "amp".
        decay: weight of the primitive "decay".
        null: weight of the primitive "null".

    Raises:
        ValueError: if a weight is not a number of at least 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from soap_jax import ops
        >>> def f(feedback):
        ...     x, kernel = jnp.array([[1.0, 2.0]]), jnp.eye(2)
        ...     loss = InformationAlignment(null=0.0)
        ...     return ops.feedback_dense(x, kernel, feedback, feedback_bar=loss).sum()
        >>> jax.grad(f)(jnp.zeros((2, 2)))
        Array([[-1., -2.],
               [-2., -4.]], dtype=float32)

    References:
        Kunin et al. (2020); see the module's docstring.
    """

    amp: float = 1.0
    decay: float = 1.0
    null: float = 1.0

    def loss(
        self, op: ops.BilinearOp, x: jax.Array, kernel: jax.Array, feedback: jax.Array
    ) -> jax.Array:
        """Returns the loss."""
        y = op(x, kernel)
        (sent_back,) = jax.linear_transpose(lambda x: op(x, feedback), jax.typeof(x))(y)
        amp, null = jnp.sum(op(x, feedback) * y), _half_square(sent_back)
        # A layer may compute in another dtype than its kernel's.
        amp, null, decay = dtypes.widen(amp, null, _half_square(feedback))
        local = null * float(self.null) - amp * float(self.amp)
        return local / _examples(op, x, kernel) + decay * float(self.decay)


def _examples(op, x, kernel) -> float:
    """How often `op` uses an entry of the kernel, counting padded positions of a convolution."""
    jaxpr = jax.make_jaxpr(op)(x, kernel)
    products: float = _products(jaxpr.jaxpr)
    if products == 0:  # without a product primitive: treat it as a dense layer
        (y,) = jaxpr.out_avals
        products = math.sqrt(x.size * y.size * kernel.size)
    return products / kernel.size


def _products(jaxpr) -> int:
    """The number of multiplications in a jaxpr's matrix products and convolutions."""
    total = 0
    for eqn in jaxpr.eqns:
        size = math.prod(eqn.outvars[0].aval.shape)
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = eqn.params["dimension_numbers"].rhs_spec[0]
            total += size * math.prod(kernel.shape) // kernel.shape[features]
        for value in eqn.params.values():
            inner = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
            total += _products(inner) if isinstance(inner, core.Jaxpr) else 0
    return total


def _half_square(x):
    return jnp.sum(x * x) / 2
