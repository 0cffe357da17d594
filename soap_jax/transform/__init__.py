"""Feedback for any JAX function, read off its linear program.

What holds without exception: *in the backward pass of `with_feedback(fun)` no error passes a factor
that is made of kernels with feedback and of no activation, unless that factor is their feedback.
Whatever else would pass is refused, with path, primitive and line.*

An error is the cotangent of what the function returns, on its way back. To know each factor that
it passes, one looks at the program of `jax.jvp`: equations that compute the function, and equations
that are linear in tangents, whose other operands are the coefficients. Backwards, JAX transposes
the linear ones, so these coefficients are the factors, and there are no others. With that,

1.  What is made of kernels and of no activation is *weights*. While only their layout was changed,
    the same layout of feedback stands beside them. Layout is what moves elements (reshape,
    transpose, cast, slice, concatenate, rows chosen by an index), products and selections with
    constants and with arguments that carry no tangent (masks), and sums along axes. Anything else
    breaks them: a nonlinear function, another kernel or another param that is mixed in.
2.  An *activation* is made where weights and data meet in a product (a `dot_general` that sums, a
    convolution, `ragged_dot`), or where an activation that carries a tangent is multiplied to them
    elementwise or added. Rows that an integer argument looks up are an embedding: weights in a
    product with an activation, and an activation after any other op. What `fun` closes over is a
    constant.
3.  A coefficient that is weights is taken in the form of their feedback. If they are broken, there
    is none, and the error is refused.
4.  A kernel's own tangent may meet that kernel: so it is in a penalty. Then both forms go on, with
    the kernel and with its feedback. The first counts if nothing but numbers and constants
    multiplies it on the way out, so that penalties are exact; and the second once an activation
    does.
5.  A single number made of a whole kernel, such as its norm, is no weight by this definition: it is
    exact where it scales errors.

`labels` has these rules, for one equation; `reader` applies them to a program, and `nested` to its
loops, branches and calls, which it makes again, so that a scan stays a scan. `with_feedback` (in
`wrap`) evaluates the program, and `explain` only reads it, so what it says is what happens. JAX
differentiates the result as it does any function: same products, same memory, same structure.

Direct feedback needs none of this: `with_direct_feedback` (in `named`) cuts a function at values
that it names, in the program that computes it, where names stand (`cut`). `explain` reads from the
derivative of any function which gradients direct feedback makes.

What one should know:

-   A mask as a matrix (`diag(mask) @ w`) is data in a product, which makes an activation of the
    kernel: multiply elementwise.
-   A mask made of weights (`w * (abs(w) > c)`) is refused: compute it outside and pass it as an
    argument. A function that closes over its batch is refused: pass it as an argument.
-   A penalty of two kernels together is refused where both have feedback; differentiate it apart
    and add the gradients.
-   Weights can be hidden in an activation: `(x + w) - x` is one.
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
