"""Your own Optax loop for an NNX model that learns by sign-synchronised feedback.

This is `linen_loop.py` in NNX. Here feedback is in the model, as a variable with its own type:

    nnx.state(model, nnx.Param)      what the optimiser trains
    nnx.state(model, Feedback)       what `sync_feedback` changes, and not the optimiser

`sync_feedback` takes one `nnx.State` and returns the other, ready for `nnx.update`.

The first layer is plain: the gradient by the data is not computed. Model, optimiser and feedback
state are donated. Between two syncs, feedback passes through the jitted step unchanged. Without
donation, JAX would copy it at every step.

    python examples/nnx_loop.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from soap_jax import SignSync, data, init_feedback, metrics, sync_feedback
from soap_jax.nnx import Feedback, FeedbackLinear


class Net(nnx.Module):
    """Two hidden layers: `(batch, 64) -> (batch, 10)`."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.second = FeedbackLinear(64, 64, rngs=rngs)
        self.output = FeedbackLinear(64, 10, rngs=rngs)

    def __call__(self, x):
        """Returns the logits."""
        return self.output(nnx.tanh(self.second(nnx.tanh(self.first(x)))))


def loss_fn(model, x, labels):
    """Cross-entropy. Its value does not depend on feedback; its gradient does."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()


@functools.partial(nnx.jit, donate_argnums=(0, 1, 2))
def train_step(model, optimizer, state, x, labels):
    """One update: sync feedback, compute the pseudo-gradient, pass it to Optax."""
    # Before the gradient, so that the first update already uses the signs of W. The optimiser
    # counts its updates; the sync period refers to this count.
    state = sync_feedback(nnx.state(model, nnx.Param), state, optimizer.step[...])
    nnx.update(model, state.feedback)
    loss, gradient = nnx.value_and_grad(loss_fn)(model, x, labels)  # only by nnx.Param
    optimizer.update(model, gradient)
    return state, loss


@nnx.jit
def measure(model, x, labels):
    """Accuracy, and angles of feedback to W and of the pseudo-gradient to the true gradient."""
    graph, params, feedback = nnx.split(model, nnx.Param, Feedback)

    def gradient(params, feedback):
        return jax.grad(lambda p: loss_fn(nnx.merge(graph, p, feedback), x, labels))(params)

    weight_angle = metrics.weight_angle(params, feedback)
    gradient_angle = metrics.gradient_angle(gradient, params, feedback)
    return {
        "accuracy": jnp.mean(jnp.argmax(model(x), -1) == labels),
        "weight_angle": [weight_angle[name]["feedback"][...] for name in ("second", "output")],
        "gradient_angle": [gradient_angle[name]["kernel"][...] for name in ("first", "second")],
    }


def main(steps=500, report_every=100, batch_size=64):
    """Trains on scikit-learn's digits and returns the measurements by step."""
    digits = data.load("digits")
    x, x_test = (
        split.images.reshape(-1, 64).astype(np.float32) / digits.max_value
        for split in (digits.train, digits.test)
    )

    # With or without a separate stream for feedback, the kernels are those of plain nnx.Linear.
    model = Net(nnx.Rngs(params=0, feedback=1))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    # Every 10 updates, B gets the signs of W and keeps its own norm. Raw signs ("unit") are several
    # times as large as W. Adam cancels this factor, but SGD does not: see `sign_sync_sweep.py`.
    state = init_feedback(
        jax.random.key(0),
        nnx.state(model, nnx.Param),
        SignSync(period=10, magnitude="norm"),
        feedback=nnx.state(model, Feedback),
    )

    print("                      angle of B to W   angle to true gradient")
    print("step  test accuracy    second   output           first   second")
    rng, history = np.random.default_rng(0), {}
    for step in range(steps + 1):
        if step % report_every == 0:
            history[step] = row = jax.device_get(measure(model, x_test, digits.test.labels))
            weight, gradient = row["weight_angle"], row["gradient_angle"]
            print(f"{step:4d} {row['accuracy']:14.1%} {weight[0]:9.1f}° {weight[1]:7.1f}°"
                  f" {gradient[0]:14.1f}° {gradient[1]:7.1f}°")  # fmt: skip
        batch = rng.choice(len(x), batch_size, replace=False)
        state, _ = train_step(model, optimizer, state, x[batch], digits.train.labels[batch])
    return history


if __name__ == "__main__":
    main()
