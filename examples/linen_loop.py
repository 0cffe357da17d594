"""Your own Optax loop for a Linen model that learns by sign-synchronised feedback.

Three things are new, compared with a plain Flax loop: `FeedbackDense` in the model, a feedback
state next to the parameters, and one call of `sync_feedback` before the gradient.

The first layer is plain. Feedback carries the error to a layer's input. The input of the first
layer is the data, and the gradient by the data is not computed.

The state is donated to the jitted step. Between two syncs, feedback passes through the step
unchanged. Without donation, JAX would copy it at every step.

    python examples/linen_loop.py
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from soap_jax import SignSync, data, init_feedback, metrics, sync_feedback
from soap_jax.linen import FeedbackDense


class Net(nn.Module):
    """Two hidden layers: `(batch, 64) -> (batch, 10)`."""

    @nn.compact
    def __call__(self, x):
        """Returns the logits."""
        x = nn.tanh(nn.Dense(64, name="first")(x))
        x = nn.tanh(FeedbackDense(64, name="second")(x))
        return FeedbackDense(10, name="output")(x)


model = Net()
optimizer = optax.adam(1e-3)


def loss_fn(params, feedback, x, labels):
    """Cross-entropy. Its value does not depend on feedback; its gradient does."""
    logits = model.apply({"params": params, "feedback": feedback}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.partial(jax.jit, donate_argnums=0)
def train_step(carry, x, labels):
    """One update: sync feedback, compute the pseudo-gradient, pass it to Optax."""
    params, state, opt_state, step = carry
    # Before the gradient, so that the first update already uses the signs of W.
    state = sync_feedback(params, state, step)
    loss, gradient = jax.value_and_grad(loss_fn)(params, state.feedback, x, labels)
    # Optax gets only the parameters, so weight decay, for example, does not change feedback.
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return (optax.apply_updates(params, updates), state, opt_state, step + 1), loss


@jax.jit
def measure(params, feedback, x, labels):
    """Accuracy, and angles of feedback to W and of the pseudo-gradient to the true gradient."""
    logits = model.apply({"params": params, "feedback": feedback}, x)

    def gradient(params, feedback):
        return jax.grad(loss_fn)(params, feedback, x, labels)

    weight_angle = metrics.weight_angle(params, feedback)
    gradient_angle = metrics.gradient_angle(gradient, params, feedback)
    return {
        "accuracy": jnp.mean(jnp.argmax(logits, -1) == labels),
        "weight_angle": [weight_angle[name]["kernel"] for name in ("second", "output")],
        "gradient_angle": [gradient_angle[name]["kernel"] for name in ("first", "second")],
    }


def main(steps=500, report_every=100, batch_size=64):
    """Trains on scikit-learn's digits and returns the measurements by step."""
    digits = data.load("digits")
    x, x_test = (
        split.images.reshape(-1, 64).astype(np.float32) / digits.max_value
        for split in (digits.train, digits.test)
    )

    # Kernels and feedback have separate random streams. With the same "params" key, a plain Flax
    # model with the same names has the same kernels, so runs with and without FA are paired.
    keys = jax.random.split(jax.random.key(0), 3)
    variables = model.init({"params": keys[0], "feedback": keys[1]}, x[:1])
    # Every 10 updates, B gets the signs of W and keeps its own norm. Raw signs ("unit") are several
    # times as large as W. Adam cancels this factor, but SGD does not: see `sign_sync_sweep.py`.
    rule = SignSync(period=10, magnitude="norm")
    state = init_feedback(keys[2], variables["params"], rule, feedback=variables["feedback"])
    params = variables["params"]
    carry = params, state, optimizer.init(params), jnp.zeros((), jnp.int32)

    print("                      angle of B to W   angle to true gradient")
    print("step  test accuracy    second   output           first   second")
    rng, history = np.random.default_rng(0), {}
    for step in range(steps + 1):
        if step % report_every == 0:
            params, state, *_ = carry
            measured = measure(params, state.feedback, x_test, digits.test.labels)
            history[step] = row = jax.device_get(measured)
            weight, gradient = row["weight_angle"], row["gradient_angle"]
            print(f"{step:4d} {row['accuracy']:14.1%} {weight[0]:9.1f}° {weight[1]:7.1f}°"
                  f" {gradient[0]:14.1f}° {gradient[1]:7.1f}°")  # fmt: skip
        batch = rng.choice(len(x), batch_size, replace=False)
        carry, _ = train_step(carry, x[batch], digits.train.labels[batch])
    return history


if __name__ == "__main__":
    main()
