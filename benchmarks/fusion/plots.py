"""Pictures of the suite: ΔT and worst task against MACs, of the rivals and of the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion.bench import PARENT
from rivals_table import MEAN, OURS

RECOVERY = 0.15
CUT = "cut"
MARKERS = "osD^v<>PX*"

Table = Mapping[tuple[str, str, float, float], Mapping[str, Any]]


def draw_curves(table: Table, path: Path) -> None:
    """Draw ΔT and the worst task per method against MACs removed, with error bars over seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    found: dict[str, dict[float, Mapping[str, Any]]] = {}
    for (parent, method, keep, recovery), values in table.items():
        if (parent, recovery) == (PARENT, RECOVERY) and keep < 1:
            found.setdefault(method, {})[keep] = values
    rivals = [m for m in found if not m.startswith(OURS) and m != CUT]
    rules = [m for m in found if m.startswith("rule ")]
    if not {CUT, MEAN} <= found.keys():
        return
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 10), sharex=True, sharey="row")
    for row, ours, others, what in (
        (axes[0], CUT, rivals, "rivals"),
        (axes[1], MEAN, rules, "rules of fusion"),
    ):
        others = sorted(others, key=lambda m: (-_at_70(found[m]), m))
        for axis, key, title in zip(
            row, ("delta_t", "worst_task"), ("ΔT", "worst task"), strict=True
        ):
            _draw(axis, found, [ours, *others], key)
            axis.set_title(f"{title} in %, beside {what}")
        row[0].set_ylabel("change against the parent, %")
        row[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    for axis in axes[1]:
        axis.set_xlabel("MACs removed, %")
        axis.set_xticks([50, 70, 90])
    figure.suptitle(f"{PARENT}, recovery {RECOVERY:.0%} of the parent's steps, 654 test images")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _draw(
    axis: Any, found: Mapping[str, Mapping[float, Mapping[str, Any]]], methods: Sequence[str],
    key: str,
) -> None:  # fmt: skip
    """Draw the curves, the first of ``methods`` before all others."""
    from matplotlib import pyplot

    colours = pyplot.get_cmap("tab10")
    for number, method in enumerate(methods):
        cells = sorted(found[method].items(), reverse=True)
        ours = number == 0
        axis.errorbar(
            [100 - 100 * keep for keep, _ in cells], [cell[key]["mean"] for _, cell in cells],
            yerr=[cell[key]["std"] for _, cell in cells],
            label="mean" if method == MEAN else method.removeprefix("rule "), capsize=3,
            marker=MARKERS[number % len(MARKERS)], markersize=5, linewidth=3 if ours else 1.1,
            color="black" if ours else colours(number % 10),
            linestyle="-" if number <= 10 else "--", zorder=3 if ours else 2,
        )  # fmt: skip
    axis.grid(alpha=0.3)


def _at_70(cells: Mapping[float, Mapping[str, Any]]) -> float:
    return float(cells[0.3]["delta_t"]["mean"]) if 0.3 in cells else float("-inf")
