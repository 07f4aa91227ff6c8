"""A picture of who uses what: one bar per stage of the network, coloured by its users."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.core.files import atomic_path
from secateur.tasks.decompose import Amounts, TaskUse, Users

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BARS = 40


def draw_use(use: TaskUse, path: Path) -> None:
    """Write a PNG: MACs above and parameters below, per stage in execution order, stacked by the
    set of tasks that use them.

    A stage is a submodule; the finest level that gives at most 40 bars is drawn.

    Raises:
        BundleError: ``path`` cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    stages = _stages(list(use.layers))
    order = list(dict.fromkeys(stages.values()))
    sets = {users for amounts in (use.params, use.macs) for split in amounts.values()
            for users in split}  # fmt: skip
    ranked = sorted(sets, key=lambda users: (-len(users), sorted(users)))
    wheel = colormaps["tab10" if len(ranked) <= 10 else "tab20"]
    colours = {users: wheel(i % wheel.N) for i, users in enumerate(ranked)}
    figure = Figure(figsize=(max(6.4, 0.26 * len(order) + 3.0), 7.0), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for axis, amounts, label in zip(
        axes, (use.macs, use.params), ("MACs of one image (M)", "parameters (k)"), strict=True
    ):
        scale = 1e6 if amounts is use.macs else 1e3
        _bars(axis, _per_stage(amounts, stages, scale), order, colours)
        axis.set_ylabel(label)
        axis.margins(x=0.01)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(title="used by", frameon=False, fontsize=8)
    axes[1].set_xticks(range(len(order)), order, rotation=90, fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _stages(layers: Sequence[str]) -> dict[str, str]:
    """Return the stage of each layer: its name cut at the deepest level with few enough."""
    parts = {layer: layer.removeprefix("network.").split(".") for layer in layers}
    chosen = {layer: path[0] for layer, path in parts.items()}
    for depth in range(2, max((len(path) for path in parts.values()), default=0) + 1):
        finer = {layer: ".".join(path[:depth]) for layer, path in parts.items()}
        if len(set(finer.values())) > MOST_BARS:
            break
        chosen = finer
    return chosen


def _per_stage(
    amounts: Amounts, stages: Mapping[str, str], scale: float
) -> dict[Users, dict[str, float]]:
    totals: dict[Users, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for layer, split in amounts.items():
        for users, count in split.items():
            totals[users][stages[layer]] += count / scale
    return totals


def _bars(
    axis: Axes,
    totals: Mapping[Users, Mapping[str, float]],
    order: Sequence[str],
    colours: Mapping[Users, tuple[float, ...]],
) -> None:
    floor = [0.0] * len(order)
    for users, colour in colours.items():
        heights = [totals.get(users, {}).get(stage, 0.0) for stage in order]
        label = ", ".join(sorted(users)) or "no task"
        axis.bar(range(len(order)), heights, 0.8, floor, color=colour, label=label)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
