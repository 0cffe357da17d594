"""Is an epoch of a convolutional network on CPU as fast as its steps called from Python?

    python -m benchmarks.convolutions [--rounds 5] [--quick] [--out benchmarks/results]

Backprop and Adam, float32. A small network: 14 x 14 images, two strided convolutions 3 x 3, 16 and
32 channels, and a dense layer. A large one (Moskovitz et al., 2018): 24 x 24 colour images, two
unpadded convolutions 5 x 5 of 64 channels with pooling, dense layers 384, 192 and 10. Each is timed
in four ways: a jitted step called from Python; the same step in `jax.lax.scan`;
`soap_jax.training.train_epoch`, with matrix products; and PyTorch, if it is installed. Ratios are
to the first, within a round.
"""

from __future__ import annotations

import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from benchmarks import common
from soap_jax import models, tasks, training

IMAGES = {"small": (14, 14, 1), "large": (24, 24, 3)}
NETWORKS = {
    "small": models.ConvNet((16, 32), activation=nn.relu, feedback=False),
    "large": tasks.MoskovitzNet(),
}
STEPS = {"small": 20, "large": 2}
BATCHES = (64, 128)


def jax_runners(network, data, batch_size):
    """An epoch in three ways, each a function that waits for it."""
    model = NETWORKS[network]
    params = model.init(jax.random.key(0), data[0][:1])["params"]
    optimizer = optax.adam(1e-3)
    step = training.make_train_step(
        lambda params, feedback, x: model.apply({"params": params}, x), optimizer
    )
    called = jax.jit(step, donate_argnums=0)
    order = np.arange(len(data[0])).reshape(-1, batch_size)
    batches = [tuple(leaf[indices] for leaf in data) for indices in order]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    scan = jax.jit(lambda state: lax.scan(step, state, stacked), donate_argnums=0)

    def from_python(state):
        for batch in batches:
            state, loss = called(state, batch)
        return state, loss

    def epoch(state):
        return training.train_epoch(step, state, data, jax.random.key(1), batch_size=batch_size)

    def runner(train):
        state = training.init_train_state(jax.tree.map(jnp.array, params), optimizer)

        def run():
            nonlocal state
            state, _ = jax.block_until_ready(train(state))

        return run

    ways = {"step from Python": from_python, "scan": scan, "train_epoch": epoch}
    return {name: runner(train) for name, train in ways.items()}


def torch_runner(network, data, batch_size):
    """The same in PyTorch."""
    import torch
    from torch import nn as tnn

    def relu(*layers):
        return [part for layer in layers for part in (layer, tnn.ReLU())]

    if network == "small":
        layers = relu(tnn.Conv2d(1, 16, 3, 2, 1), tnn.Conv2d(16, 32, 3, 2, 1))
        layers += [tnn.Flatten(), tnn.Linear(512, 10)]
    else:
        layers = []
        for channels in (3, 64):
            layers += [*relu(tnn.Conv2d(channels, 64, 5)), tnn.MaxPool2d(2)]
        layers += [tnn.Flatten(), *relu(tnn.Linear(576, 384), tnn.Linear(384, 192))]
        layers += [tnn.Linear(192, 10)]
    model = tnn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    x = torch.tensor(np.asarray(data[0])).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(np.asarray(data[1])).long()

    def run():
        for start in range(0, len(x), batch_size):
            mine = slice(start, start + batch_size)
            optimizer.zero_grad()
            tnn.functional.cross_entropy(model(x[mine]), labels[mine]).backward()
            optimizer.step()

    return run


def main():
    """Runs the benchmark, prints the table, writes JSON and table."""
    args = common.arguments(__doc__, rounds=5).parse_args()
    rounds = 2 if args.quick else args.rounds
    with_torch = importlib.util.find_spec("torch") is not None
    rows = []
    for network in ("small",) if args.quick else IMAGES:
        for batch_size in BATCHES:
            rng, steps = np.random.default_rng(0), STEPS[network]
            shape = (steps * batch_size, *IMAGES[network])
            data = (
                jnp.asarray(rng.standard_normal(shape, np.float32)),
                jnp.asarray(rng.integers(0, 10, shape[0], np.int32)),
            )
            runners = jax_runners(network, data, batch_size)
            if with_torch:
                runners["PyTorch"] = torch_runner(network, data, batch_size)
            for run in runners.values():
                run()  # compile and warm up
            times = common.interleave(runners, rounds)
            per_step = {name: [spent / steps for spent in t] for name, t in times.items()}
            found = common.summary(per_step, "step from Python")
            rows.append({"network": network, "batch": batch_size, "ways": found})
    columns = {"network": "network", "batch": "batch"}
    for name in rows[0]["ways"]:
        columns[f"{name}, ms"] = lambda row, name=name: common.show_ms(row["ways"][name])
    columns["train_epoch to step from Python [quartiles]"] = lambda row: common.show_ratio(
        row["ways"]["train_epoch"]
    )
    more = {"rounds": rounds, "steps": STEPS}
    if with_torch:
        import torch

        more["torch"] = {"version": torch.__version__, "threads": torch.get_num_threads()}
    common.publish("convolutions", args.out, rows, columns, **more)


if __name__ == "__main__":
    main()
