"""Pictures of the suite: ΔT and worst task against MACs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion.bench import PARENT

RECOVERY = 0.15


def draw_curves(
    table: Mapping[tuple[str, str, float, float], Mapping[str, Any]], path: Path
) -> None:
    """Draw ΔT and the worst task per method against MACs removed, with error bars over seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    methods = sorted({m for p, m, _, r in table if p == PARENT and r == RECOVERY})
    if not methods:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6), sharey=True)
    colours = pyplot.get_cmap("tab20")
    for axis, what, title in zip(
        axes, ("delta_t", "worst_task"), ("ΔT, %", "worst task, %"), strict=True
    ):
        for number, method in enumerate(methods):
            points = sorted(
                (100 - 100 * keep, values[what])
                for (p, m, keep, r), values in table.items()
                if p == PARENT and m == method and r == RECOVERY
            )
            axis.errorbar(
                [x for x, _ in points], [y["mean"] for _, y in points],
                yerr=[y["std"] for _, y in points], label=method, marker="o", capsize=3,
                linewidth=3 if method == "cut" else 1.2, color=colours(number % 20),
                linestyle="-" if number < 20 else "--",
            )  # fmt: skip
        axis.set_xlabel("MACs removed, %")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=-70)
    axes[1].legend(fontsize=7, ncol=2, loc="lower left")
    figure.suptitle(f"{PARENT}, recovery {RECOVERY:.0%} of the parent's steps, 654 test images")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
