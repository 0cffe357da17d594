"""Activity propagation: the error of a layer is a second-order step of its activities.

There are two passes. The first finds the gradient g of each tapped activation. The second moves the
activation by -(lr / n) g, which changes the gradient by d. It passes on (lr / n) g² / d, a secant
estimate of Newton's step, in place of the gradient. The loss only has to name its activations with
the `tap` it gets. The result is gradients for any optimiser. See `soap_jax.activity`.

A constant, `bias`, is added to d to keep the quotient finite. As d is tiny (it is divided by n, the
number of activations in a batch), the constant matters more than d. What to see (one seed; four
others agree), where "size" is the length of the first layer's gradient relative to backprop's:

- "activity" has the rate of the weights and the default bias, as in the original experiment. It is
  slower than backprop: it passes on so little that the hidden layer hardly learns.
- "rate x 1000" moves the activities 1000 times as far. Newton's step is the same, but d is larger
  than bias and than float32's rounding, which removes most of the small moves. Now the hidden layer
  learns: on the bump faster than with backprop, on digits more slowly.
- "resized" is backprop with the first layer's gradient as long as activity propagation would make
  it. On the bump it is about as fast, so the gain was a longer step: a larger learning rate. On
  digits, where the lengths are similar, it is like backprop.

    python examples/activity_propagation.py [directory with MNIST's files]
"""

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from soap_jax import activity, data, training

RATE = 0.05  # of the weights
METHODS = ("backprop", "activity", "rate x 1000", "resized")


class Net(nn.Module):
    """A tanh network whose hidden activations are tapped; `untapped`, an ordinary network."""

    hidden: int
    out: int

    @nn.compact
    def __call__(self, x, tap=activity.untapped):
        """Returns the outputs."""
        h = tap("hidden", nn.tanh(nn.Dense(self.hidden)(x)))
        return nn.Dense(self.out)(h)


def mean_squared_error(outputs, targets):
    """The loss of the regression."""
    return jnp.mean((outputs - targets) ** 2)


@functools.partial(jax.jit, static_argnames=("net", "loss_fn", "method"))
def train(net, loss_fn, method, params, x, y, order):
    """Trains by SGD; returns loss and size of W₁'s gradient by step, each `(steps,)`."""

    def loss(tap, params, x, y):
        return loss_fn(net.apply({"params": params}, x, tap), y)

    backprop = jax.value_and_grad(functools.partial(loss, activity.untapped))
    rate = RATE if method == "activity" else 1000 * RATE
    propagate = activity.value_and_grad(loss, learning_rate=rate, warmup=5)  # 5: the original's

    def step(carry, indices):
        i, params = carry
        batch = params, x[indices], y[indices]
        value, gradients = backprop(*batch)
        size = jnp.ones(())
        if method != "backprop":
            _, propagated = propagate(*batch, step=i)
            new, old = (g["Dense_0"]["kernel"] for g in (propagated, gradients))
            size = jnp.linalg.norm(new) / jnp.linalg.norm(old)
            resized = {"Dense_0": jax.tree.map(lambda g: size * g, gradients["Dense_0"])}
            gradients = gradients | resized if method == "resized" else propagated
        params = jax.tree.map(lambda w, g: w - RATE * g, params, gradients)
        return (i + 1, params), (value, size)

    return jax.lax.scan(step, (0, params), order)[1]


def compare(title, net, loss_fn, x, y, order, marks, window):
    """Trains from the same weights by every method; returns losses by method."""
    params = net.init(jax.random.key(0), x[:1])["params"]
    print(f"{title:28}" + "".join(f"{mark:9d}" for mark in marks) + "     size")
    losses = {}
    for method in METHODS:
        curve, size = jax.device_get(train(net, loss_fn, method, params, x, y, order))
        losses[method] = curve
        cells = (f"{curve[mark - window : mark].mean():9.4f}" for mark in marks)
        print(f"  {method:26}", *cells, f"{np.median(size):9.2g}", sep="")
    return losses


def main(data_dir=None, steps=5000, epochs=20):
    """Trains on both problems; returns the losses, `(steps,)`, by problem and method."""
    x = jnp.linspace(-3, 3, 100)[:, None]
    y = jnp.exp(-(x**2)) + 0.1 * jax.random.normal(jax.random.key(1), x.shape)
    order = np.tile(np.arange(100), (steps, 1))  # all data at once
    marks = [mark for mark in (1, 100, 300, 1000) if mark < steps] + [steps]
    bump = compare("bump, loss at step", Net(20, 1), mean_squared_error, x, y, order, marks, 1)

    print()
    name = "mnist" if data_dir else "digits"
    images = data.load(name, data_dir=data_dir)
    pixels, y = images.train.images, jnp.asarray(images.train.labels)
    x = jnp.asarray(pixels.reshape(len(y), -1).astype(np.float32) / images.max_value)
    keys = jax.random.split(jax.random.key(2), 1 if data_dir else epochs)
    order = jnp.concatenate([training.epoch_order(key, len(x), 64) for key in keys])
    marks = [len(order) * part // 10 for part in (1, 3, 10)]
    title, loss_fn = f"{name}, mean loss before step", training.cross_entropy
    digits = compare(title, Net(100, 10), loss_fn, x, y, order, marks, min(20, marks[0]))
    return {"bump": bump, name: digits}


if __name__ == "__main__":
    main(*sys.argv[1:])
