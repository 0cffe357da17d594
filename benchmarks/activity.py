"""How much slower than backprop does activity propagation learn, and what does its step cost?

    python -m benchmarks.activity [--seeds 10] [--rounds 30] [--quick] [--data-dir DIR]

The first half repeats the original comparison: MNIST, 784-100-10, plain SGD at 0.05, PyTorch's
default initial weights, a start with five batches of backprop, the training loss after 0.2 epoch.
The original reports 0.92, and 0.37 for backprop. Its activation function, batch size, inputs and
bias are not known, so several are tried, and all are shown. After the first five batches, the
control "frozen" no longer trains the hidden layers, and "scaled" multiplies their gradient by 8. In
the setting in which backprop is nearest to the original, `bias`, the dtype and the rate of the
activities are also varied (not the rate of the weights). The table also has the angle between the
first layer's gradient and backprop's, and the ratio of their lengths.

The second half times steps in the same way as `benchmarks.step_time`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from soap_jax import activity, data, metrics

RATE, WARMUP, EPOCHS, LAST = 0.05, 5, 0.2, 20
ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}
INPUTS = {"standard": (0.1307, 0.3081), "0 to 1": (0.0, 1.0)}  # mean and deviation
BATCH_SIZES = (16, 64)
DEFAULT_BIAS = 1e-5
SCALE = 8  # about as long as activity propagation's gradients are at their best bias
CLOSEST = ("784-100-10", "standard", "tanh", 64)
DEEPER = ("784-100-100-10", "standard", "tanh", 64)
# At a rate 1000 times as large, d is 1000 times as large, and rounding does not affect it.
VARIANTS = [(RATE, "float32"), (RATE, "float64"), (1000 * RATE, "float32")]
BIASES = (1e-3, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10)  # at rate 0.05; they go with the rate
TIMED = {"784-100-10": (64, 512), "784-1024-1024-1024-10": (64, 512)}


def init(key, network, dtype):
    """PyTorch's default: weights and biases uniform within 1 / √fan_in."""
    params = []
    for n, m in itertools.pairwise(map(int, network.split("-"))):
        key, *keys = jax.random.split(key, 3)
        bound = n**-0.5
        # Always drawn in float32, so that runs of both dtypes start with the same weights.
        draw = functools.partial(jax.random.uniform, dtype="float32", minval=-bound, maxval=bound)
        params.append({"kernel": draw(keys[0], (n, m)), "bias": draw(keys[1], (m,))})
    return jax.tree.map(lambda w: w.astype(dtype), params)


def loss(tap, params, x, labels, activation):
    """Cross-entropy of an MLP whose hidden layers are tapped after their activation function."""
    *hidden, output = params
    for i, layer in enumerate(hidden):
        x = tap(f"hidden_{i}", ACTIVATIONS[activation](x @ layer["kernel"] + layer["bias"]))
    logits = x @ output["kernel"] + output["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def gradient_of(method, activation, rate=RATE, bias=DEFAULT_BIAS):
    """`(params, x, labels, step) -> (loss, gradients)` of a method."""
    loss_of = functools.partial(loss, activation=activation)
    if method == "activity":
        return activity.value_and_grad(loss_of, learning_rate=rate, bias=bias, warmup=WARMUP)

    def backprop(params, *batch, step):
        f = functools.partial(loss_of, activity.untapped)
        value, gradients = jax.value_and_grad(f)(params, *batch)
        factor = {"frozen": 0, "scaled": SCALE}.get(method, 1)
        factor = jnp.where(step < WARMUP, 1, factor).astype(value.dtype)
        gradients[:-1] = jax.tree.map(lambda g: factor * g, gradients[:-1])
        return value, gradients

    return backprop


STATIC = ("method", "network", "activation", "batch_size", "dtype")


@functools.partial(jax.jit, static_argnames=STATIC)
def train(
    seeds, images, labels, inputs, rate, bias, *, method, network, activation, batch_size, dtype
):
    """Trains once per seed; returns loss, and angle and size of W₁'s gradient, each `(seeds,)`.

    They are means over the last 20 batches.
    """
    gradient = gradient_of(method, activation, rate, bias)
    backprop = gradient_of("backprop", activation)

    def step(carry, indices):
        i, params = carry
        x = (images[indices].reshape(batch_size, -1) / 255 - inputs[0]) / inputs[1]
        batch = x.astype(dtype), labels[indices]
        value, gradients = gradient(params, *batch, step=i)
        w, true = (g[0]["kernel"] for g in (gradients, backprop(params, *batch, step=i)[1]))
        size = jnp.linalg.norm(w) / jnp.linalg.norm(true)
        params = jax.tree.map(lambda w, g: w - RATE * g, params, gradients)
        return (i + 1, params), (value, metrics.angle(w, true), size)

    def run(seed):
        init_key, order_key = jax.random.split(jax.random.key(seed))
        steps = int(EPOCHS * len(labels)) // batch_size
        order = jax.random.permutation(order_key, len(labels))[: steps * batch_size]
        carry = jnp.zeros((), jnp.int32), init(init_key, network, dtype)
        _, kept = jax.lax.scan(step, carry, order.reshape(steps, batch_size))
        return jax.tree.map(lambda values: values[-LAST:].mean(), kept)

    return jax.lax.map(run, seeds)


def learn(split, seeds, settings):
    """Trains by every method in every setting; prints a row for each."""
    images, labels = jnp.asarray(split.images), jnp.asarray(split.labels)
    print(
        f"| {'network':<14} | inputs   | activation | batch | {'method':<28} | dtype   "
        "| training loss | angle | size    |"
    )
    print(f"| {'-' * 14} | -------- | ---------- | ----- | {'-' * 28} | ------- "
          "| ------------- | ----- | ------- |")  # fmt: skip
    results = []
    for setting in settings:
        network, inputs, activation, batch_size = setting
        controls = ["backprop", "frozen"]
        variants = [("activity", RATE, DEFAULT_BIAS, "float32")]
        if setting in (CLOSEST, DEEPER):
            controls += ["scaled"]
            variants = [("activity", r, b * r / RATE, d) for r, d in VARIANTS for b in BIASES]
        rows = [(name, RATE, DEFAULT_BIAS, "float32") for name in controls] + variants
        for method, rate, bias, dtype in rows:
            losses, angle, size = train(
                jnp.arange(seeds),
                images,
                labels,
                INPUTS[inputs],
                rate,
                bias,
                method=method,
                network=network,
                activation=activation,
                batch_size=batch_size,
                dtype=dtype,
            )
            losses = np.asarray(losses, np.float64)
            angle, size = float(jnp.mean(angle)), float(jnp.mean(size))
            name = f"activity {rate:g}, bias {bias:.0e}" if method == "activity" else method
            shown = f"{angle:4.0f}°" if math.isfinite(angle) else "    -"
            print(
                f"| {network:<14} | {inputs:<8} | {activation:<10} | {batch_size:>5} | {name:<28} "
                f"| {dtype} | {losses.mean():.3f} ± {losses.std(ddof=1):.3f} | {shown} "
                f"| {size:<7.2g} |",
                flush=True,
            )
            results.append(
                {"network": network, "inputs": inputs, "activation": activation}
                | {"batch": batch_size, "method": method, "dtype": dtype}
                | ({"rate": rate, "bias": bias} if method == "activity" else {})
                | {"training_losses": losses.tolist(), "gradient_size": size}
                | ({"gradient_angle": angle} if math.isfinite(angle) else {})
            )
    return results


def make_runner(method, network, batch_size):
    """Compiles one method's step; returns a function that does `n` steps and waits."""
    gradient = gradient_of(method, "tanh")

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x, labels):
        i, params = state
        value, gradients = gradient(params, x, labels, step=i)
        return (i + 1, jax.tree.map(lambda w, g: w - RATE * g, params, gradients)), value

    rng = np.random.default_rng(0)
    x = jax.device_put(rng.standard_normal((batch_size, 784), np.float32))
    labels = jax.device_put(rng.integers(0, 10, batch_size, np.int32))
    state = jnp.zeros((), jnp.int32), init(jax.random.key(0), network, "float32")

    def run(n):
        nonlocal state
        for _ in range(n):
            state, value = step(state, x, labels)
        jax.block_until_ready((state, value))

    return run


def time_steps(timed, rounds, seconds):
    """Times steps past the warm-up; prints a row for each network and batch size."""
    print("\n| network                | batch | backprop, ms | activity, ms | ratio [quartiles] |")
    print("| ---------------------- | ----- | ------------ | ------------ | ----------------- |")
    results = []
    for network, batch_sizes in timed.items():
        for batch_size in batch_sizes:
            runners = {m: make_runner(m, network, batch_size) for m in ("backprop", "activity")}
            for run in runners.values():
                run(2 * WARMUP)
            times = common.interleave_blocks(runners, rounds, seconds, "backprop")
            middle, (low, high) = common.ratio(times, "activity", "backprop")
            ms = {method: 1e3 * statistics.median(values) for method, values in times.items()}
            print(
                f"| {network:<22} | {batch_size:>5} | {ms['backprop']:>12.3f} "
                f"| {ms['activity']:>12.3f} | {middle:.2f} [{low:.2f}, {high:.2f}] |",
                flush=True,
            )
            results.append(
                {"network": network, "batch": batch_size, "ms": ms, "ratio": middle}
                | {"ratio_quartiles": [low, high]}
            )
    return results


def main():
    """Runs both halves, prints their tables, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="two seeds of one setting; few rounds")
    parser.add_argument("--data-dir", help="directory with MNIST's four files")
    parser.add_argument("--out", type=pathlib.Path, default=common.OUT)
    args = parser.parse_args()
    seeds, rounds, seconds = (2, 5, 0.02) if args.quick else (args.seeds, args.rounds, 0.25)
    if seeds < 2:
        parser.error("--seeds must be at least 2, to tell how much losses scatter.")
    settings, timed = [CLOSEST], TIMED
    if not args.quick:
        grid = itertools.product(["784-100-10"], INPUTS, ACTIVATIONS, BATCH_SIZES)
        settings += [setting for setting in grid if setting != CLOSEST] + [DEEPER]
    else:
        timed = {"784-100-10": (64,)}

    jax.config.update("jax_enable_x64", True)  # only for the rows in float64
    mnist = data.load("mnist", data_dir=args.data_dir)
    learned = learn(mnist.train, seeds, settings)
    timings = time_steps(timed, rounds, seconds)
    common.write(
        "activity",
        args.out,
        learned,
        timings=timings,
        rounds=rounds,
        seeds=seeds,
        source=mnist.source,
        learning_rate=RATE,
        warmup=WARMUP,
        epochs=EPOCHS,
        losses_of_last_batches=LAST,
    )


if __name__ == "__main__":
    main()
