"""Does an LSTM hold a cue for 64 steps if it learns by direct feedback, not backwards in time?

    python -m benchmarks.delayed_cue [--updates 600] [--quick] [--out benchmarks/results]

A cue of +1 or -1 comes at the first step, noise for 64 more, and then the net is asked which it
was. Every method gets the same sequences and the same initial weights, at 4 rates x 3 seeds, all as
one program:

    bptt             backpropagation through time
    bptt, clipped    the same, with the gradient's norm clipped to 1
    dfa              the state (c, h) is cut at every step; the error of the last step goes to all
                     steps, through one fixed random projection for c and one for h
    frozen           the same with projections of zero: the readout alone learns

A run has solved the task if it is right for 95 % of 512 new sequences after its last update. Since
what an LSTM forgets at first decides what can be learnt, the forget gates' bias is 0 at the start,
as Flax has it, and 1, as is usual. "parity" does not suit one error for all steps: two cues come,
at steps 0 and 8, and the answer is whether they differ. So the error at one cue should depend on
the other.

On two cores, with JAX 0.10.2, XLA's runtime sometimes stops for good in one of these programs, with
all threads waiting. On one core it does not: `taskset -c 0 python -m benchmarks.delayed_cue`.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name

import soap_jax
from benchmarks import common

STEPS, UNITS, BATCH, NOISE, TESTED = 64, 32, 32, 0.1, 512
RATES, SEEDS = (0.001, 0.003, 0.01, 0.03), 3
SOLVED = 0.95
CUES = {"cue": (0,), "parity": (0, 8)}
"""When cues come."""

TASKS = (("cue", 0.0), ("cue", 1.0), ("parity", 1.0))
"""Each with the forget gates' bias at the start."""

METHODS = ("bptt", "bptt, clipped", "dfa", "frozen")


class Cell(nn.OptimizedLSTMCell):
    """An LSTM's cell that names what it carries."""

    def __call__(self, carry, x):
        """One step."""
        (c, h), _ = super().__call__(carry, x)
        c, h = checkpoint_name(c, "c"), checkpoint_name(h, "h")
        return (c, h), h


class Net(nn.Module):
    """Reads a sequence `(batch, time, 2)` and answers `(batch, 2)`."""

    @nn.compact
    def __call__(self, xs):
        """The answer's logits."""
        h = nn.RNN(Cell(UNITS, name="cell"))(xs)[:, -1]
        return checkpoint_name(nn.Dense(2)(h), "answer")


def loss(params, xs, labels):
    """Cross-entropy of the answer."""
    logits = Net().apply({"params": params}, xs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


loss_dfa = soap_jax.with_direct_feedback(loss, ("c", "h"), "answer", stacked="time")


def draw(key, task, size):
    """Sequences, and which cue it was or whether both are alike."""
    cue_key, noise_key = jax.random.split(key)
    cues = jax.random.bernoulli(cue_key, 0.5, (len(CUES[task]), size))
    xs = NOISE * jax.random.normal(noise_key, (size, STEPS + 1, 2))
    for step, cue in zip(CUES[task], cues, strict=True):
        xs = xs.at[:, step, 0].set(2.0 * cue - 1)
    return xs.at[:, -1, 1].set(1.0), cues.sum(0, dtype=jnp.int32) % 2  # now answer


def start(key, forget_bias):
    """Flax's own weights, but for the forget gates' bias."""
    params = Net().init(key, jnp.zeros((1, STEPS + 1, 2)))["params"]
    params["cell"]["hf"]["bias"] += forget_bias
    return params


def gradient(method, params, projections, xs, labels):
    """By one of the methods."""
    given = None if method.startswith("bptt") else projections
    if method == "frozen":
        given = jax.tree.map(jnp.zeros_like, projections)
    found = jax.grad(loss_dfa)(params, given, xs, labels)
    if method.endswith("clipped"):
        found, _ = optax.clip_by_global_norm(1.0).update(found, optax.EmptyState())
    return found


@functools.partial(jax.jit, static_argnames=("task", "method", "updates"))
def train(task, method, forget_bias, rates, seeds, updates):
    """The accuracy of every run after its last update, all runs side by side."""
    adam = optax.scale_by_adam()

    def one(rate, seed):
        init_key, key, data_key, test_key = jax.random.split(jax.random.key(seed), 4)
        params = start(init_key, forget_bias)
        shapes = jax.eval_shape(lambda: draw(key, task, BATCH))
        projections = soap_jax.init_projections(key, loss_dfa, params, *shapes)

        def update(state, key):
            params, opt_state = state
            found = gradient(method, params, projections, *draw(key, task, BATCH))
            change, opt_state = adam.update(found, opt_state)
            return (jax.tree.map(lambda p, u: p - rate * u, params, change), opt_state), None

        state = params, adam.init(params)
        (params, _), _ = jax.lax.scan(update, state, jax.random.split(data_key, updates))
        xs, labels = draw(test_key, task, TESTED)
        answers = jnp.argmax(Net().apply({"params": params}, xs), -1)
        return jnp.mean(answers == labels)

    return jax.vmap(one)(rates, seeds)


def main():
    """Trains by every method, prints the table, writes JSON and table."""
    parser = common.arguments(__doc__, rounds=1)
    parser.add_argument("--updates", type=int, default=600, help="by default %(default)s")
    args = parser.parse_args()
    tasks, updates = (TASKS[:1], 3) if args.quick else (TASKS, args.updates)
    runs = list(itertools.product(RATES, range(SEEDS)))
    rates, seeds = map(np.array, zip(*runs, strict=True))
    rows = []
    for (task, forget_bias), method in itertools.product(tasks, METHODS):
        begin = time.perf_counter()
        accuracy = np.asarray(train(task, method, forget_bias, rates, seeds, updates))
        by_rate = {str(rate): accuracy[rates == rate].tolist() for rate in RATES}
        where = {"task": task, "forget bias": forget_bias, "method": method}
        counts = {"solved": int(np.sum(accuracy >= SOLVED)), "runs": len(runs)}
        seconds = time.perf_counter() - begin
        rows.append(where | counts | {"accuracy": by_rate, "seconds": seconds})
        print(*where.values(), counts, flush=True)
    columns = {
        "task": "task",
        "bias": lambda row: f"{row['forget bias']:.0f}",
        "method": "method",
        "solved": lambda row: f"{row['solved']} of {row['runs']}",
    } | {f"rate {rate}": functools.partial(show, rate) for rate in RATES}
    common.publish("delayed_cue", args.out, rows, columns, updates=updates)


def show(rate: float, row: Mapping) -> str:
    """The accuracies of a rate's runs."""
    return " ".join(f"{accuracy:.2f}" for accuracy in row["accuracy"][str(rate)])


if __name__ == "__main__":
    main()
