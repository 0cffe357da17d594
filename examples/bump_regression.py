"""Fits a noisy bump with a 1-20-1 network: backprop, feedback alignment and sign synchronisation.

This is the smallest problem that shows how feedback alignment works. The error reaches the hidden
layer through fixed random weights B, which do not depend on W (Lillicrap et al., 2016). In the end
the fit is as good as backprop's: W turns towards B, as the last column shows. If B gets the signs
of W at every step (Liao et al., 2016), its size matters. Raw signs are larger than W and make the
hidden layer's steps larger, so the loss falls faster than with backprop. With signs of the size of
B0, it does not.

This program has only one seed and one learning rate, at which larger steps help.
`sign_sync_sweep.py` has several of both.

    python examples/bump_regression.py [figure.png]
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

from soap_jax import Fixed, SignSync, Transport, init_feedback, metrics, models, training

METHODS = {  # the rule, and how it is drawn: Okabe and Ito's colours, for colour-blind readers
    "backprop": (Transport(), "#000000", "-"),  # B <- W at every step is exactly backprop
    "FA": (Fixed(), "#D55E00", "--"),
    "sign, raw": (SignSync(magnitude="unit"), "#0072B2", "-."),
    "sign, |B0|": (SignSync(magnitude="preserve"), "#009E73", ":"),
}

model = models.MLP((20, 1))  # tanh; the first layer has no feedback and needs none
optimizer = optax.sgd(0.05)


def apply_fn(params, feedback, x):
    """The model as `soap_jax.training` needs it."""
    return model.apply({"params": params, "feedback": feedback}, x)


def mean_squared_error(outputs, targets):
    """The loss, in place of the default cross-entropy."""
    return jnp.mean((outputs - targets) ** 2)


def bump(x):
    """The function behind the data."""
    return jnp.exp(-(x**2))


def fit(rule, x, y, steps, seed=0):
    """Trains on all data at once; returns the state and the losses, `(steps,)`."""
    # One seed gives every method the same weights and the same B0.
    keys = jax.random.split(jax.random.key(seed))
    variables = model.init({"params": keys[0], "feedback": keys[1]}, x)
    params, b0 = variables["params"], variables["feedback"]
    feedback = init_feedback(keys[1], params, rule, feedback=b0)
    state = training.init_train_state(params, optimizer, feedback=feedback)
    step = training.make_train_step(apply_fn, optimizer, loss_fn=mean_squared_error)
    # The whole training is one compiled scan, so that 5000 tiny steps take no time.
    return jax.jit(lambda s: jax.lax.scan(lambda s, _: step(s, (x, y)), s, length=steps))(state)


def main(out="results/bump_regression.png", steps=5000, noise=0.1):
    """Fits by every method; returns the losses, `(steps,)`, by name."""
    x = jnp.linspace(-3, 3, 100)[:, None]
    y = bump(x) + noise * jax.random.normal(jax.random.key(1), x.shape)

    figure = Figure(figsize=(7.2, 3), layout="constrained")
    fits, curves = figure.subplots(1, 2)
    fits.plot(x, y, ".", color="#999999", markersize=4, label="data")
    losses = {}
    marks = [i for i in (0, 30, 100, 300, 1000, steps - 1) if i < steps]
    print("loss at step" + "".join(f"{i:9d}" for i in marks) + "  rms to bump  angle B to W")
    for name, (rule, color, line) in METHODS.items():
        state, losses[name] = fit(rule, x, y, steps)
        feedback = training.feedback_weights(state.feedback)
        outputs = apply_fn(state.params, feedback, x)
        fits.plot(x, outputs, line, color=color, label=name)
        curves.plot(range(1, steps + 1), losses[name], line, color=color, label=name)
        rms = jnp.sqrt(mean_squared_error(outputs, bump(x)))
        angle = metrics.weight_angle(state.params, feedback)["Dense_1"]["kernel"]
        cells = "".join(f"{losses[name][i]:9.4f}" for i in marks)
        print(f"{name:12}{cells}{rms:13.3f}{angle:12.1f}°")

    fits.set(xlabel="x", ylabel="y", title="Fits")
    curves.set(xscale="log", yscale="log", xlabel="step", ylabel="mean squared error", title="Loss")
    curves.axhline(noise**2, color="#999999", linewidth=0.8, label="noise variance")
    fits.legend(frameon=False, fontsize=8)
    curves.legend(frameon=False, fontsize=8)
    pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=200)
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
