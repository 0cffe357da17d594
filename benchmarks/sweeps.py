"""How many trainings per second does a sweep do, against a Python loop, by runs and devices?

    python -m benchmarks.sweeps [--rounds 3] [--quick] [--out benchmarks/results]

A run is one short training with sign sync at every 10th step. It draws weights, feedback and an
order of the data from its seed, does SGD steps, and returns the loss of the last step. The same run
is done in five forms, always with the data on the device:

    loop of steps       a Python loop over runs, and in each over batches: a jitted, donated step
    loop of epochs      a Python loop over runs, each of them one scan, `training.train_epoch`
    sweep, 1 device     `training.sweep`: one program for all runs (on accelerators 64 at once)
    sweep, n devices    the same, on all devices; on CPU that is one for each core
    vmap, 1 device      a jitted `jax.vmap` over 64 runs at once

The table gives training runs per second after compilation and, in brackets, the ratio to the loop
of steps. Then it gives the seconds that `sweep` needs to trace and compile at its first call and at
a second call, and the ratio to the loop of steps if both include their first compilation. Shown are
medians over rounds, of ratios within a round. A loop needs twice the time for twice as many runs,
so it is timed for at most 16 runs, and its speed is assumed to be the same for more runs.
"""

from __future__ import annotations

import functools
import os
import random
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import soap_jax
from benchmarks import common
from soap_jax import models, training

NETWORKS = {  # features, steps of a run, batch size, numbers of runs
    "64-32-10, 200 steps of 32": ((64, 32, 10), 200, 32, (1, 4, 16, 64, 256, 1024)),
    "784-256-10, 40 steps of 64": ((784, 256, 10), 40, 64, (1, 4, 16, 64, 256)),
}
QUICK = {"64-32-10, 20 steps of 32": ((64, 32, 10), 20, 32, (8,))}
LOOPED = 16
AT_ONCE = 64
RATE, PERIOD = 0.05, 10
LOOP, EPOCHS, ALONE, VMAP = "loop of steps", "loop of epochs", "sweep, 1 device", "vmap, 1 device"
LOOPS = (LOOP, EPOCHS)


def make_run(features, steps, batch_size):
    """A run's start and step, with its learning rate in its state; its data and batch size."""
    inputs, *widths = features
    model = models.MLP(widths)
    rng = np.random.default_rng(0)
    num = steps * batch_size
    x = rng.standard_normal((num, inputs), np.float32)
    labels = rng.integers(0, widths[-1], num, np.int32)

    def apply_fn(params, feedback, x):
        return model.apply({"params": params, "feedback": feedback}, x)

    def start(seed, rate, period):
        init_key, order_key = jax.random.split(jax.random.key(seed))
        variables = model.init(init_key, x[:1])
        params, feedback = variables["params"], variables["feedback"]
        rule = soap_jax.SignSync(period=period, magnitude="unit")
        feedback = soap_jax.init_feedback(order_key, params, rule, feedback=feedback)
        state = training.init_train_state(params, optax.sgd(rate), feedback=feedback)
        return (state, jnp.asarray(rate)), order_key

    def step(state, batch):
        state, rate = state
        state, loss = training.make_train_step(apply_fn, optax.sgd(rate))(state, batch)
        return (state, rate), loss

    return start, step, (x, labels), batch_size


def make_forms(start, step, data, batch_size):
    """For each form, a function of the number of runs that gives losses and compile seconds."""
    devices = jax.devices()
    data = jax.device_put(data, devices[0])
    start_one = jax.jit(start)
    order_of = jax.jit(lambda key: training.epoch_order(key, len(data[0]), batch_size))
    epoch = functools.partial(training.train_epoch, step, batch_size=batch_size)

    @functools.partial(jax.jit, donate_argnums=0)
    def step_on(state, indices, data):
        return step(state, jax.tree.map(lambda leaf: leaf[indices], data))

    def run(seed, rate, period, *data):
        state, key = start(seed, rate, period)
        return epoch(state, data, key)[1][-1]

    @jax.jit
    def mapped(seeds, *data):
        return jax.vmap(lambda seed: run(seed, RATE, PERIOD, *data))(seeds)

    def loop_of_steps(num):
        losses = []
        for seed in range(num):
            state, key = start_one(seed, RATE, PERIOD)
            for indices in np.asarray(order_of(key)):
                state, loss = step_on(state, indices, data)
            losses.append(loss)
        return jax.device_get(losses), 0.0

    def loop_of_epochs(num):
        losses = []
        for seed in range(num):
            state, key = start_one(seed, RATE, PERIOD)
            losses.append(epoch(state, data, key)[1][-1])
        return jax.device_get(losses), 0.0

    def sweep(num, devices):
        begin, stamps = time.perf_counter(), []
        losses = training.sweep(
            run,
            seeds=range(num),
            learning_rates=[RATE],
            periods=[PERIOD],
            args=data,
            devices=devices,
            on_progress=lambda done, total: stamps.append(time.perf_counter()),
        )
        return losses.ravel(), stamps[0] - begin  # the first: after compilation

    def by_vmap(num):
        chunks = [np.arange(i, min(i + AT_ONCE, num)) for i in range(0, num, AT_ONCE)]
        return np.concatenate(jax.device_get([mapped(seeds, *data) for seeds in chunks])), 0.0

    return {
        LOOP: loop_of_steps,
        EPOCHS: loop_of_epochs,
        ALONE: functools.partial(sweep, devices=devices[:1]),
        largest_sweep(): functools.partial(sweep, devices=devices),  # or the same
        VMAP: by_vmap,
    }


def largest_sweep():
    """The name of the sweep on all devices."""
    num = jax.device_count()
    return f"sweep, {num} devices" if num > 1 else ALONE


def warm_up(forms, num):
    """Compiles all forms; returns the seconds: for the loop, the extra time of its first call."""

    def call(name):
        begin = time.perf_counter()
        losses, compiling = forms[name](num)
        return losses, compiling, time.perf_counter() - begin

    first = {name: call(name) for name in forms}
    for losses, _, _ in first.values():
        np.testing.assert_allclose(losses, first[LOOP][0], rtol=1e-3)  # the same run in each
    loop = first[LOOP][2] - call(LOOP)[2]
    return {LOOP: loop} | {name: first[name][1] for name in sweeps_of(forms)}


def sweeps_of(forms):
    """The names of the forms that compile in a call."""
    return [name for name in forms if name.startswith("sweep")]


def measure(forms, num, rounds):
    """Times all forms: seconds per training, and of sweeps seconds to compile, by round."""
    counts = {name: min(num, LOOPED) if name in LOOPS else num for name in forms}
    forms[VMAP](min(num, AT_ONCE))  # compiles
    spent, again = ({name: [] for name in forms} for _ in range(2))
    for _ in range(rounds):
        for name in random.sample(list(forms), len(forms)):
            begin = time.perf_counter()
            compiling = forms[name](counts[name])[1]
            spent[name].append((time.perf_counter() - begin - compiling) / counts[name])
            again[name].append(compiling)
    return spent, {name: again[name] for name in sweeps_of(forms)}


def summarise(num, spent, again, new):
    """The columns of each form."""
    in_all = {name: [new[name] + num * s for s in spent[name]] for name in new}
    forms = {}
    for name, seconds in spent.items():
        times, quartiles = common.ratio(spent, LOOP, name)
        forms[name] = form = {"per_s": 1 / statistics.median(seconds)}
        form |= {"ratio": times, "quartiles": quartiles}
        if name in new:
            form |= {"compile_s": new[name], "in_all_per_s": num / statistics.median(in_all[name])}
            form["ratio_in_all"] = common.ratio(in_all, LOOP, name)[0]
        if name in again:
            form["compile_again_s"] = statistics.median(again[name])
    return forms


def plot(rows):
    """Trainings per second against runs, log-log: a panel per network, a line per form."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(1.5 + 4.5 * len(networks), 4.6), layout="constrained")
    axes = figure.subplots(1, len(networks), squeeze=False)[0]
    for ax, network in zip(axes, networks, strict=True):
        mine = [row for row in rows if row["network"] == network]
        runs = [row["runs"] for row in mine]
        for i, name in enumerate(mine[0]["forms"]):
            forms = [row["forms"][name] for row in mine]
            ax.plot(runs, [form["per_s"] for form in forms], "o-", ms=4, c=f"C{i}", label=name)
            if name in (LOOP, largest_sweep()):
                ax.plot(runs, [form["in_all_per_s"] for form in forms], ":", c=f"C{i}")
        ax.plot([], [], ":", color="0.4", label="with compilation")
        ax.set(xscale="log", yscale="log", title=network)
        ax.set_xticks(runs, [str(n) for n in runs])
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("trainings per second")
    axes[0].legend(frameon=False, fontsize=9)
    figure.supxlabel("runs", fontsize=10)
    return figure


def main():
    """Runs the benchmark, prints the table, writes it, its rows and the figure."""
    args = common.arguments(__doc__, rounds=3).parse_args()
    networks, rounds = (QUICK, 2) if args.quick else (NETWORKS, args.rounds)
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))

    rows = []
    for network, (features, steps, batch_size, numbers) in networks.items():
        forms = make_forms(*make_run(features, steps, batch_size))
        new = warm_up(forms, numbers[0])
        for num in numbers:
            of_forms = summarise(num, *measure(forms, num, rounds), new)
            rows.append({"network": network, "runs": num, "forms": of_forms})

    def show(name):
        def cell(row):
            form = row["forms"][name]
            return f"{form['per_s']:.4g}" + (name != LOOP) * f" ({form['ratio']:.2f})"

        return cell

    def of_sweep(key):
        return lambda row: f"{row['forms'][largest_sweep()][key]:.2f}"

    columns = {"network": "network", "runs": "runs"}
    columns |= {name: show(name) for name in rows[0]["forms"]}
    columns |= {"compiles, s": of_sweep("compile_s"), "again, s": of_sweep("compile_again_s")}
    columns["ratio with it"] = of_sweep("ratio_in_all")
    more = {"rounds": rounds, "looped": LOOPED, "dtype": "float32"}
    common.publish("sweeps", args.out, rows, columns, figure=plot(rows), **more)


if __name__ == "__main__":
    main()
