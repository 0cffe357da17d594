"""Your model, two lines changed: an Equinox MLP that learns by feedback alignment.

The program is ordinary Equinox: an `eqx.nn.MLP`, a loss, an Optax step under `eqx.filter_jit`. The
two lines are marked. `with_feedback` gives the loss a second argument, the feedback tree, which has
the structure of the model. `init_feedback` draws this tree. `explain` finds the weights that get
feedback. The first layer needs none, since its input is the data, and the gradient by the data is
not computed. The kernels are called `weight` and are the left factors of their products. A third
line, `sync_feedback`, is needed only for rules that change feedback during training.

`initializer="matched"` makes feedback as large as the kernels. Equinox draws them smaller than
Glorot's initialiser would. With Glorot's initialiser, the norm of feedback is at least 1.7 times
that of the weights. The hidden layers' learning rate is larger by the same factor, and sign sync
seems to beat backprop in the first epochs (see `sign_sync_sweep.py` for this effect).

What to see (means over ten seeds, `main(seeds=10)`): random fixed feedback, FA, starts slower
(63.0% of the test digits right after one epoch, backprop 75.9%) and is behind after twenty epochs
(92.8%, backprop 96.2%). Signs of the weights close the gap at the start (76.5%), and less than half
of it at the end (94.2%). At the end, this order holds in all ten seeds.

    python examples/equinox_mlp.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import soap_jax
from soap_jax import Fixed, SignSync

METHODS = {"backprop": None, "FA": Fixed(), "sign sync": SignSync(magnitude="norm")}

optimizer = optax.sgd(0.1)
SIZE = 32  # of a batch


def loss(model, x, labels):
    """Cross-entropy, written for backprop."""
    logits = jax.vmap(model)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


loss_fa = soap_jax.with_feedback(loss)  # the first line: (model, feedback, x, labels)


@eqx.filter_jit(donate="all-except-first")
def train_step(batch, model, state, opt_state, step):
    """One update. `eqx.filter_grad` is only by the model, so feedback gets no gradient."""
    if state is not None:  # with None in its place, `loss_fa` is `loss`: backprop
        state = soap_jax.sync_feedback(model, state, step)  # for a rule other than Fixed
    feedback = state and state.feedback
    gradient = eqx.filter_grad(loss_fa)(model, feedback, *batch)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return eqx.apply_updates(model, updates), state, opt_state, step + 1


@eqx.filter_jit
def accuracy(model, x, labels):
    """The share of images classified correctly."""
    return jnp.mean(jnp.argmax(jax.vmap(model)(x), -1) == labels)


def train(rule, seed, train_set, test_set, epochs):
    """Trains by one method; returns the test accuracy after each epoch."""
    x, labels = train_set
    model_key, feedback_key = jax.random.split(jax.random.key(seed))  # the same for every method
    model = eqx.nn.MLP(64, 10, width_size=128, depth=2, activation=jnp.tanh, key=model_key)
    state = None
    if rule is not None:
        explanation = soap_jax.explain(loss, model, x[:1], labels[:1])
        state = soap_jax.init_feedback(  # the second line
            feedback_key, model, rule, where=explanation, initializer="matched"
        )
        if seed == 0 and rule == Fixed():
            print(explanation, end="\n\n")
    opt_state = optimizer.init(eqx.filter(model, eqx.is_array))
    step, rng, curve = jnp.zeros((), jnp.int32), np.random.default_rng(seed), []
    for _ in range(epochs):
        for batch in rng.permutation(len(x))[: len(x) // SIZE * SIZE].reshape(-1, SIZE):
            model, state, opt_state, step = train_step(
                (x[batch], labels[batch]), model, state, opt_state, step
            )
        curve.append(float(accuracy(model, *test_set)))
    return curve


def main(seeds=3, epochs=20, methods=tuple(METHODS)):
    """Trains by every method; returns the test accuracies, `(seeds, epochs)` by method."""
    digits = soap_jax.data.load("digits")
    train_set, test_set = (
        (split.images.reshape(-1, 64).astype(np.float32) / digits.max_value, split.labels)
        for split in (digits.train, digits.test)
    )
    results = {}
    for name in methods:
        runs = [train(METHODS[name], seed, train_set, test_set, epochs) for seed in range(seeds)]
        results[name] = np.array(runs)
    shown = sorted({1, min(5, epochs), epochs})
    print("test accuracy after epochs", *shown)
    for name, curves in results.items():
        print(f"{name:9}", *(f"{curves[:, epoch - 1].mean():7.1%}" for epoch in shown))
    return results


if __name__ == "__main__":
    main()
