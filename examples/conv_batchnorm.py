"""Your model, two lines changed: convolutions with batch norm, and a rule for each kind of layer.

The loss is an ordinary Flax loss that returns its value and the new running statistics, for
`jax.grad(..., has_aux=True)`. Convolutions use feedback like dense layers. Batch norm has no
kernel, so its derivative stays exact, including the derivatives of means and variances.

The question: which layers need the signs of W as feedback? `init_feedback` takes a mapping from
path patterns to rules. The first pattern that matches a kernel is used.

What to see (means over ten seeds, `main(seeds=10)`): after one epoch, FA is far behind: it has
64.5% of the test digits right, and backprop 92.7%. After ten epochs, FA has 95.2% and backprop
97.8%. Signs in the two dense layers, which come first on the error's way back, close most of the
gap (86.7%, 97.0%). Signs in the convolutions close less (75.7%, 96.2%). Both together close a
little more than the dense layers alone (89.8%, 97.4%). After one epoch, this order holds in at
least nine of ten seeds.

    python examples/conv_batchnorm.py
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import soap_jax
from soap_jax import Fixed, SignSync

SIGNS = SignSync(magnitude="norm")  # of W, at every step; B keeps its norm
METHODS = {"backprop": None, "FA": Fixed(), "signs everywhere": SIGNS}
METHODS["signs in dense"] = {"Dense_*": SIGNS, "*": Fixed()}
METHODS["signs in conv"] = {"Conv_*": SIGNS, "*": Fixed()}
SIZE = 64  # of a batch


class Net(nn.Module):
    """Three convolutions, two dense layers: `(batch, 8, 8, 1) -> (batch, 10)`."""

    @nn.compact
    def __call__(self, x, train):  # noqa: D102
        for features, stride in ((16, 1), (32, 2), (32, 2)):
            x = nn.Conv(features, (3, 3), strides=stride, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


model = Net()
init = jax.jit(model.init, static_argnames="train")
optimizer = optax.sgd(0.05, momentum=0.9)


def loss(params, batch_stats, x, labels):
    """Cross-entropy, and the running statistics; written for backprop."""
    variables = {"params": params, "batch_stats": batch_stats}
    logits, new = model.apply(variables, x, train=True, mutable="batch_stats")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), new["batch_stats"]


loss_fa = soap_jax.with_feedback(loss)  # the first line: (params, feedback, batch_stats, x, labels)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(carry, x, labels):
    """One update: sync feedback, compute the gradient, pass it to Optax."""
    params, state, stats, opt_state, step = carry
    if state is not None:  # with None in its place, `loss_fa` is `loss`: backprop
        state = soap_jax.sync_feedback(params, state, step)  # for a rule other than Fixed
    feedback = state and state.feedback
    gradient, stats = jax.grad(loss_fa, has_aux=True)(params, feedback, stats, x, labels)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(params, updates), state, stats, opt_state, step + 1


@jax.jit
def accuracy(params, batch_stats, x, labels):
    """The share of images classified correctly, with the running statistics."""
    logits = model.apply({"params": params, "batch_stats": batch_stats}, x, train=False)
    return jnp.mean(jnp.argmax(logits, -1) == labels)


def main(seeds=3, epochs=10, methods=tuple(METHODS)):
    """Trains by each method; returns the test accuracies, `(seeds, epochs)` by method."""
    digits = soap_jax.data.load("digits")
    (x, labels), test = (
        (split.images.astype(np.float32) / digits.max_value, split.labels)
        for split in (digits.train, digits.test)
    )
    results = {name: np.zeros((seeds, epochs)) for name in methods}
    for name, seed in itertools.product(methods, range(seeds)):
        keys = jax.random.split(jax.random.key(seed))  # the same for every method
        variables = init(keys[0], x[:1], train=False)
        params, stats = variables["params"], variables["batch_stats"]
        explanation = soap_jax.explain(loss, params, stats, x[:SIZE], labels[:SIZE])
        state = METHODS[name] and soap_jax.init_feedback(  # the second line
            keys[1], params, METHODS[name], where=explanation, initializer="matched"
        )
        carry = params, state, stats, optimizer.init(params), jnp.zeros((), jnp.int32)
        rng = np.random.default_rng(seed)
        for epoch in range(epochs):
            for batch in rng.permutation(len(x))[: len(x) // SIZE * SIZE].reshape(-1, SIZE):
                carry = train_step(carry, x[batch], labels[batch])
            results[name][seed, epoch] = accuracy(carry[0], carry[2], *test)
    print(explanation, end="\n\n")
    shown = sorted({1, min(5, epochs), epochs})
    print("test accuracy after epochs", *shown)
    for name, curves in results.items():
        print(f"{name:16}", *(f"{curves[:, epoch - 1].mean():7.1%}" for epoch in shown))
    return results


if __name__ == "__main__":
    main()
