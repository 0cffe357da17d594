"""The figure of `benchmarks.peers`."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator


def plot(rows, colours):
    """A panel per network and batch size: milliseconds by method, in colours by system."""
    panels = list(dict.fromkeys((row["network"], row["batch"]) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    depth = -(-len(panels) // 2)
    size = 9.5 if len(panels) > 1 else 5, 0.9 + (0.8 + 0.36 * len(methods)) * depth
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(depth, min(2, len(panels)), sharey=True, squeeze=False).flatten()
    for ax, panel in zip(axes, panels, strict=True):
        for row in rows:
            if (row["network"], row["batch"]) != panel:
                continue
            for i, (system, colour) in enumerate(colours.items()):
                if system in row["systems"]:
                    values = row["systems"][system]
                    y = methods.index(row["method"]) + 0.16 * (i - 1.5)
                    ax.plot(values["ms_quartiles"], [y, y], color=colour, lw=1.5)
                    ax.plot(values["ms"], y, "o", color=colour, ms=5, label=system)
        ax.set_title("{}, batch {}".format(*panel), fontsize=10)
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        ax.set_xlim(low, max(high, 2 * low))
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(axis="x", color="0.92")
        ax.set_yticks(range(len(methods)), methods)
        ax.set_ylim(len(methods) - 0.5, -0.5)
        ax.spines[["top", "right"]].set_visible(False)
    labels = dict(zip(*axes[0].get_legend_handles_labels()[::-1], strict=True))
    labels = {system: labels[system] for system in colours if system in labels}
    figure.legend(
        labels.values(), labels.keys(), loc="outside upper center", ncols=4, frameon=False
    )
    figure.supxlabel("ms per step (log scale), median and quartiles", fontsize=10)
    return figure
