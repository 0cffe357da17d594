"""What does a sync cost as a conditional, as a loop, and with nothing stored?

    python -m benchmarks.sync_time [--rounds 9] [--quick] [--out benchmarks/results]

It times epochs as one scan (`training.train_epoch`): backprop, fixed feedback, raw signs with the
sync in both forms of `soap_jax.feedback.CONDITIONALS_IN_PLACE`, and signs that are computed when
they are used (`feedback_of`). Each round times all of them once, in a new random order. Ratios are
to backprop within a round. It is for a GPU: on CPU the forms take the same time.
"""

from __future__ import annotations

import jax
import optax

import soap_jax
from benchmarks import common, methods
from soap_jax import feedback, training

FORMS = {"conditional": True, "loop": False}
CASES = (
    ("784-256-10", 64, 400),
    ("784-1024-1024-1024-10", 64, 400),
    ("784-1024-1024-1024-10", 512, 200),
)
QUICK = (("784-256-10", 8, 4),)
SIGNS = soap_jax.SignSync(magnitude="unit")


def not_stored(network: str, batch: int) -> methods.Training:
    """Training by backprop, except that errors go back through the signs of the kernels."""
    module = methods.NETWORKS[network].module(False)
    apply = soap_jax.with_feedback(lambda params, x: module.apply({"params": params}, x))
    plain = methods.make("bp", network, batch)
    first = min(plain.state.params)  # its feedback would have no effect

    def apply_fn(params, weights, x):
        del weights
        above = soap_jax.feedback_of(
            params, SIGNS, where=lambda path, _: path.endswith("kernel") and first not in path
        )
        return apply(params, above, x)

    return plain._replace(step=training.make_train_step(apply_fn, optax.sgd(0.01)))


def compiled(made: methods.Training, network: str, batch: int, steps: int, in_place: bool):
    """A function that trains an epoch and waits, its sync in one form."""
    step, state, _ = made
    data = methods.random_batch(methods.NETWORKS[network].shape, steps * batch)
    feedback.CONDITIONALS_IN_PLACE = in_place
    feedback._sync.clear_cache()
    key = jax.random.key(0)
    epoch = training.train_epoch.lower(step, state, data, key, batch_size=batch).compile()

    def run():
        nonlocal state
        state, losses = epoch(state, data, key)
        jax.block_until_ready((state, losses))

    run()
    return run


def main():
    """Runs the benchmark, prints the table, writes JSON and table."""
    args = common.arguments(__doc__, rounds=9).parse_args()
    cases, rounds = (QUICK, 2) if args.quick else (CASES, args.rounds)
    usual, rows = feedback.CONDITIONALS_IN_PLACE, []
    for network, batch, steps in cases:
        runners = {"signs, not stored": (not_stored(network, batch), usual)}
        runners |= {name: (methods.make(name, network, batch), usual) for name in ("bp", "fa")}
        for name in ("sign, T=1", "sign, T=10", "sign, T=100"):
            for form, in_place in FORMS.items():
                runners[f"{name}, {form}"] = methods.make(name, network, batch), in_place
        runs = {
            name: compiled(made, network, batch, steps, in_place)
            for name, (made, in_place) in runners.items()
        }
        times = common.interleave(runs, rounds)
        found = common.summary({n: [t / steps for t in spent] for n, spent in times.items()}, "bp")
        rows += [{"network": network, "batch": batch, "method": n, **found[n]} for n in runs]
    feedback.CONDITIONALS_IN_PLACE = usual
    columns = {"network": "network", "batch": "batch", "method": "method"}
    columns |= {"step, ms": common.show_ms, "of backprop's": common.show_ratio}
    common.publish("sync_time", args.out, rows, columns, rounds=rounds)


if __name__ == "__main__":
    main()
