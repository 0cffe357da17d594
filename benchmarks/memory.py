"""How much memory does each method need?

    python -m benchmarks.memory [--quick] [--out benchmarks/results]

The numbers are the compiler's own account of the jitted, donated train step, in bytes. Nothing is
timed.

    params          the parameters
    feedback        feedback weights or projections (of "dfa, keys" the keys)
    optimizer       the optimiser's state
    temporaries     activations, gradients and all else that exists within a step, at its maximum
    peak            arguments (the above and the batch), temporaries, and results that are not
                    written over arguments
    ratio           of the peak to backprop's
    donated         whether results are written over the whole state, so that no part of it exists
                    twice

The period of a rule is an array in the state, so all periods have the same program, shown as T=1.
The figure shows the parts of the peak for one network.
"""

from __future__ import annotations

import dataclasses

import jax
import optax
from matplotlib.figure import Figure

from benchmarks import common, methods
from soap_jax import training

METHODS = ("bp", "fa", "fa, with_feedback", "fa, bfloat16", "sign, T=1", "sign, T=1, int8",
           "sign_preserve, T=1", "sign_norm, T=1", "sign_redraw, T=1", "weight_mirror, T=1", "kp",
           "dfa", "dfa, keys", "dfa, parallel")  # fmt: skip
FEW = ("bp", "fa", "sign, T=1", "kp", "dfa", "dfa, keys")
OPTIMIZERS = {"sgd": optax.sgd(0.01), "adam": optax.adam(1e-3)}
PARTS = ("params", "feedback", "optimizer", "batch", "temporaries")
MB = 1e6


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, a batch size and an optimiser."""

    network: str
    batch: int
    optimizer: str = "sgd"
    names: tuple[str, ...] = METHODS

    def __str__(self):
        return f"{self.network}, batch {self.batch}, {self.optimizer}"


SHOWN = "784-1024-1024-1024-10"
CASES = (
    Case("784-256-10", 64),
    Case("784-256-10", 512),
    Case(SHOWN, 64),
    Case(SHOWN, 512),
    Case(SHOWN, 64, "adam"),
    Case("conv 32-64", 64, names=FEW),
    Case("transformer, 2 blocks of 128", 16),
)
QUICK = (Case(SHOWN, 8, names=("bp", "fa", "sign, T=1", "dfa", "dfa, parallel")),)


def size(tree) -> int:
    """The bytes of a tree of arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def measure(case: Case, name: str) -> dict[str, int | bool]:
    """Compiles one step, and returns its memory."""
    optimizer = OPTIMIZERS[case.optimizer]
    step, state, batch = methods.make(name, case.network, case.batch, optimizer)
    memory = jax.jit(step, donate_argnums=0).lower(state, batch).compile().memory_analysis()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes  # the loss, mainly
    return {
        "params": size(state.params),
        "feedback": size(training.feedback_weights(state.feedback)),
        "optimizer": size(state.opt_state),
        "batch": size(batch),
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.argument_size_in_bytes + memory.temp_size_in_bytes + kept,
        "donated": memory.alias_size_in_bytes == size(state),
    }


def plot(rows):
    """The parts of the peak: a panel per case, a bar per method."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(2 + 3.4 * len(cases), 1.4 + 0.26 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for ax, case in zip(axes, cases, strict=True):
        mine = [row for row in rows if row["case"] == case]
        y = [names.index(row["method"]) for row in mine]
        left = [0.0] * len(mine)
        for part, color in zip(PARTS, ("C0", "C1", "C2", "0.75", "C3"), strict=True):
            widths = [row[part] / MB for row in mine]
            ax.barh(y, widths, left=left, color=color, label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        ax.axvline(mine[0]["peak"] / MB, color="0.3", lw=1, ls=":")
        ax.set_title(case, fontsize=9)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("MB (dotted: backprop's peak)", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(PARTS), frameon=False)
    return figure


def main():
    """Compiles all steps, prints the table, writes it, its rows and the figure."""
    args = common.arguments(__doc__, rounds=1).parse_args()  # there are no rounds
    rows = []
    for case in QUICK if args.quick else CASES:
        for name in case.names:
            if not methods.supports(name, case.network):
                continue
            row = {"case": str(case), "network": case.network, "batch_size": case.batch}
            row |= {"update": case.optimizer, "method": name, **measure(case, name)}
            reference = next((r for r in rows if r["case"] == row["case"]), row)
            rows.append(row | {"ratio": row["peak"] / reference["peak"]})

    def show(part):
        return lambda row: f"{row[part] / MB:.3f}"

    columns = {"network, batch, optimiser": "case", "method": "method"}
    columns |= {f"{part}, MB": show(part) for part in (*PARTS, "peak") if part != "batch"}
    columns["ratio"] = lambda row: f"{row['ratio']:.2f}"
    columns["donated"] = lambda row: "all" if row["donated"] else "not all"
    figure = plot([row for row in rows if row["network"] == SHOWN])
    common.publish("memory", args.out, rows, columns, figure=figure, dtype="float32")


if __name__ == "__main__":
    main()
