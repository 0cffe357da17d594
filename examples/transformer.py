"""Your model, two lines changed: an NNX transformer whose attention learns by feedback alignment.

The task is associative recall: eight pairs of a key and a value in random order, then only a key.
The answer is its value. Without attention, the model knows the values, but not the right one.

The error goes back through feedback in the projections. Inside attention, the products of queries
and keys, and of weights and values, are products of activations, which stay exact. "no credit" is
the control: B = 0 at attention's kernels, so they do not change. All other kernels learn by FA.

What to see (means over five seeds, `main(seeds=5)`): after 80 updates, backprop finds the value in
100.0% of new sequences, feedback with the signs of W in 99.8%, and FA in 26.4%. FA is slower, but
attention does learn: 88.0% after 160 updates and 99.8% after 240, at least 99% in every seed.
Without credit for attention, it is only 32.8% after 240 updates.

    python examples/transformer.py
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import soap_jax
from soap_jax import Fixed, SignSync


class Zero(soap_jax.Rule):
    """`B <- 0`: no error is sent back here."""

    def __call__(self, kernel, feedback, key):  # noqa: D102
        return jnp.zeros_like(feedback)


SIGNS = SignSync(magnitude="norm")  # of W, at every step; B keeps its norm
NO_CREDIT = {"attention/*": Zero(), "*": Fixed()}
METHODS = {"backprop": None, "sign sync": SIGNS, "FA": Fixed(), "no credit": NO_CREDIT}


class Transformer(nnx.Module):
    """Keys and values, both `(batch, time)`, to the logits of the last one's value."""

    def __init__(self, rngs):
        norm = functools.partial(nnx.LayerNorm, 32, rngs=rngs)
        linear = functools.partial(nnx.Linear, rngs=rngs)
        attend = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.keys = nnx.Embed(8, 32, rngs=rngs)
        self.values = nnx.Embed(9, 32, rngs=rngs)  # the ninth: no value given
        self.attention = nnx.Sequential(norm(), attend)
        self.mlp = nnx.Sequential(norm(), linear(32, 64), nnx.gelu, linear(64, 32))
        self.readout = nnx.Sequential(norm(), linear(32, 8))

    def __call__(self, keys, values):  # noqa: D102
        x = self.keys(keys) + self.values(values)
        x = x + self.attention(x)
        return self.readout((x + self.mlp(x))[:, -1])


graph = nnx.graphdef(Transformer(nnx.Rngs(0)))
answer = jax.jit(lambda params, *inputs: nnx.merge(graph, params)(*inputs).argmax(-1))
optimizer = optax.adam(3e-3)


def loss(params, keys, values, answers):
    """Cross-entropy, written for backprop."""
    logits = nnx.merge(graph, params)(keys, values)
    return optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()


loss_fa = soap_jax.with_feedback(loss)  # the first line: (params, feedback, keys, ...)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(carry, batch):
    """One update: sync feedback, compute the gradient, pass it to Optax."""
    params, state, opt_state, step = carry
    if state is not None:  # else `loss_fa` is `loss`: backprop
        state = soap_jax.sync_feedback(params, state, step)  # for a rule other than Fixed
    gradient = jax.grad(loss_fa)(params, state and state.feedback, *batch)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(params, updates), state, opt_state, step + 1


def sequences(rng, n):
    """Draws keys and values, both `(n, 9)`, and answers `(n,)`."""
    keys = rng.permuted(np.tile(np.arange(8), (n, 1)), axis=1)
    values, asked = rng.integers(8, size=(n, 8)), (np.arange(n), rng.integers(8, size=n))
    return np.c_[keys, keys[asked]], np.c_[values, np.full(n, 8)], values[asked]


def main(seeds=1, steps=240, report_every=80, methods=tuple(METHODS)):
    """Trains by each method; returns the accuracies, `(seeds, reports)` by method."""
    results = {name: np.zeros((seeds, steps // report_every)) for name in methods}
    for name, seed in itertools.product(methods, range(seeds)):
        params = nnx.state(Transformer(nnx.Rngs(seed)), nnx.Param)  # the same for every method
        rng = np.random.default_rng(seed)
        *test, answers = sequences(rng, 2000)
        explanation = soap_jax.explain(loss, params, *test, answers)
        state = METHODS[name] and soap_jax.init_feedback(  # the second line
            jax.random.key(seed), params, METHODS[name], where=explanation, initializer="matched"
        )
        carry = params, state, optimizer.init(params), jnp.zeros((), jnp.int32)
        for step in range(steps):
            carry = train_step(carry, sequences(rng, 64))
            if (step + 1) % report_every == 0:
                right = answer(carry[0], *test) == answers
                results[name][seed, step // report_every] = right.mean()
    print(explanation, end="\n\n")
    print("accuracy after updates", *range(report_every, steps + 1, report_every))
    for name, curves in results.items():
        print(f"{name:9}", *(f"{accuracy:7.1%}" for accuracy in curves.mean(0)))
    return results


if __name__ == "__main__":
    main()
