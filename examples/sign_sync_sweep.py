"""Does sign-synchronised feedback learn faster than backprop? A sweep over learning rates.

Feedback B with only the signs of W is enough to learn well (Liao et al., 2016). With raw signs, it
even seems to beat backprop: at small learning rates it needs a fraction of the updates. The last
row of the table explains this. Raw signs are larger than W, so the hidden layer gets a larger
error. This multiplies its learning rate, but not the output layer's. Hence

- there is a gain at small rates, where larger steps help, and a loss at large rates; at the best
  rate of each method, there is no gain here;
- signs that keep the norm of B, "norm", have the same information about W and gain nothing.

Fixed random feedback, FA (Lillicrap et al., 2016), has no information about W at the start, and is
slower. At the largest rates, the order is reversed: there it is an advantage to be slow. (In the
figure, lines are means over seeds, and bands reach from the fastest to the slowest seed.)

    python examples/sign_sync_sweep.py [figure.png]
"""

import os
import pathlib
import sys

import jax
import numpy as np
import optax
from matplotlib import ticker
from matplotlib.figure import Figure

import soap_jax
from soap_jax import Fixed, SignSync, Transport, data, models, sweeps, training

METHODS = {  # the rule, and how it is drawn: Okabe and Ito's colours, for colour-blind readers
    "backprop": (Transport(), "#000000", "o"),  # B <- W at every step is exactly backprop
    "FA": (Fixed(), "#D55E00", "s"),
    "sign, raw": (SignSync(magnitude="unit"), "#0072B2", "^"),
    "sign, norm": (SignSync(magnitude="norm"), "#CC79A7", "v"),
    "sign, |B0|": (SignSync(magnitude="preserve"), "#009E73", "D"),
}
RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

model = models.MLP((256, 10))  # tanh; the first layer has no feedback and needs none


def apply_fn(params, feedback, x):
    """The model as `soap_jax.training` needs it."""
    return model.apply({"params": params, "feedback": feedback}, x)


def make_run(rule, epochs):
    """Makes one run: a pure function that `sweep` compiles once for all rates and seeds."""

    def run(seed, learning_rate, period, x, labels):
        del period  # every rule here syncs at every step
        # The rules draw nothing: with one seed all methods share weights, B0 and order.
        keys = jax.random.split(jax.random.key(seed), 3)
        variables = model.init({"params": keys[0], "feedback": keys[1]}, x[:1])
        params, b0 = variables["params"], variables["feedback"]
        feedback = soap_jax.init_feedback(keys[1], params, rule, feedback=b0)
        synced = soap_jax.sync_feedback(params, feedback, 0).feedback
        factor = soap_jax.metrics.effective_learning_rate(1.0, params, synced)

        optimizer = optax.sgd(learning_rate)  # Adam would cancel any amplification
        step = training.make_train_step(apply_fn, optimizer)
        state = training.init_train_state(params, optimizer, feedback=feedback)

        def epoch(state, key):
            return training.train_epoch(step, state, (x, labels), key, batch_size=64)

        _, losses = jax.lax.scan(epoch, state, jax.random.split(keys[2], epochs))
        return {"losses": losses.reshape(-1), "factor": factor["Dense_1"]["kernel"]}

    return run


def updates_to(target, losses, window=10):
    """Updates until the mean loss of the last `window` batches is below target, or NaN."""
    below = np.lib.stride_tricks.sliding_window_view(losses, window, axis=-1).mean(-1) < target
    return np.where(below.any(-1), below.argmax(-1) + window, np.nan)


def main(out="results/sign_sync_sweep.png", rates=RATES, seeds=3, epochs=35, target=0.5):
    """Sweeps every method; returns its updates to the target, `(rates, seeds)`, by name."""
    digits = data.load("digits")
    args = (digits.train.images.astype(np.float32) / digits.max_value, digits.train.labels)
    updates, factors = {}, {}
    for name, (rule, _, _) in METHODS.items():
        run = make_run(rule, epochs)
        record = sweeps.sweep(run, seeds=range(seeds), learning_rates=rates, args=args)
        updates[name] = updates_to(target, record["losses"][0])  # [0]: the only period
        factors[name] = record["factor"].mean()

    print(f"Updates to loss {target}, mean of {seeds} seeds (nan: more than {epochs} epochs)")
    print(f"{'learning rate':16}" + "".join(f"{name:>12}" for name in METHODS))
    for i, rate in enumerate(rates):
        print(f"{rate:<16g}" + "".join(f"{steps[i].mean():12.0f}" for steps in updates.values()))
    print(f"{'hidden rate x':16}" + "".join(f"{factor:12.1f}" for factor in factors.values()))

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    ax = figure.subplots()
    for name, (_, color, marker) in METHODS.items():
        steps = updates[name]
        ax.plot(rates, steps.mean(-1), color=color, marker=marker, markersize=4, label=name)
        ax.fill_between(rates, steps.min(-1), steps.max(-1), color=color, alpha=0.15, linewidth=0)
    ax.set(xscale="log", yscale="log", xlabel="learning rate", ylabel=f"updates to loss {target}")
    for axis in (ax.xaxis, ax.yaxis):  # 100, 200, 500 rather than powers of ten
        axis.set(major_locator=ticker.LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
        axis.set(minor_locator=ticker.NullLocator())
    ax.legend(frameon=False)
    pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=200)
    return updates


if __name__ == "__main__":
    # A sweep puts one run on each device: one CPU device per core, before JAX is first used.
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    main(*sys.argv[1:])
