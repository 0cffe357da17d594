"""Feedback for any JAX function, by analysis of its linear program.

The guarantee: *in the backward pass of `with_feedback(fun)` an error is never multiplied by a
factor that is computed from kernels with feedback and from no activation. The factor is computed
from their feedback instead. Where this is not possible, an exception names path, primitive and
line.*

An error is a cotangent of the function's outputs on its way back through the function. The program
of `jax.jvp` shows every factor that multiplies it. This program consists of equations that compute
the function, and equations that are linear in tangents. The other operands of a linear equation are
its coefficients. In the backward pass JAX transposes the linear equations, so the coefficients are
the factors, and there are no other factors. The rules are:

1.  A value that is computed from kernels and from no activation is called *weights*. As long as
    only the layout of the kernels changes, the same layout of their feedback is computed too, as
    the *form with feedback*. There are three kinds of layout operations: those that move elements
    (reshape, transpose, cast, slice, concatenate, rows chosen by an index); products and selections
    with constants or with arguments that have no tangent (masks); and sums along axes. After any
    other operation the weights are *broken*, for example after a nonlinear function, or if another
    kernel or param is mixed in.
2.  The result of a product of weights and data (a `dot_general` that sums, a convolution,
    `ragged_dot`) is an *activation*. So is the elementwise product or sum of weights and an
    activation with a tangent. Rows that an integer argument looks up are an embedding: weights in a
    product with an activation, and an activation after any other operation. A value that `fun`
    closes over is a constant.
3.  If a coefficient is weights, its form with feedback is used. Broken weights have no such form,
    so the error is refused.
4.  A kernel's own tangent may be multiplied by that kernel, as in a penalty. Then two forms are
    computed, with the kernel and with its feedback. The first is used if only numbers and constants
    multiply it later, so penalties are exact. The second is used if an activation multiplies it.
    Broken weights into which data are mixed may be an activation, as in `tanh(x + w)`: they
    multiply their own kernel's tangent exactly, once. After that it is an error (rule 3).
5.  A single number computed from a whole kernel, such as its norm, does not count as weights: it
    scales errors exactly.

`labels` has these rules for one equation. `reader` applies them to a program, and `nested` to its
loops, branches and calls, which it rebuilds, so that a scan stays a scan. `with_feedback` (in
`wrap`) evaluates the program, and `explain` only analyses it with the same code, so it describes
what happens. JAX differentiates the result like any function: same products, same memory, same
structure.

Direct feedback does not need these rules. `with_direct_feedback` (in `named`) cuts a function at
values that it names, in the program that computes it, which contains the names (`cut`). `explain`
finds from the derivative of any function which gradients come from direct feedback.

Limitations:

-   A mask as a matrix (`diag(mask) @ w`) is data in a product, so the result is an activation.
    Multiply by the mask elementwise instead.
-   A mask computed from weights (`w * (abs(w) > c)`) is refused: compute it outside and pass it as
    an argument. A function that closes over its batch is refused: pass it as an argument.
-   A penalty on a product of two kernels is refused if both have feedback: differentiate it
    separately and add the gradients.
-   Weights can be hidden in an activation, as in `(x + w) - x`, in weights that an activation
    generates (`base + dw(h)`), or in an update inside the function (`w - lr * g`, as in MAML).
"""

from soap_jax.transform.errors import gradient_and_errors, layer_errors
from soap_jax.transform.explanation import Explanation, explain
from soap_jax.transform.named import init_projections, with_direct_feedback
from soap_jax.transform.wrap import with_feedback

__all__ = [
    "Explanation",
    "explain",
    "gradient_and_errors",
    "init_projections",
    "layer_errors",
    "with_direct_feedback",
    "with_feedback",
]
