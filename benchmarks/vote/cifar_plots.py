"""Pictures of the CIFAR suite: accuracy on new tasks against iterations and process seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vote.cifar_claims import COLD, ITERATIONS, TARGETS, Row, ranking

Points = NDArray[np.float64]  # (points, 4): iterations, seconds, accuracy and its deviation


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Draw, per network and share, accuracy against iterations and against seconds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    told = [row for row in rows if row["part"] == "new"]
    networks = sorted({row["network"] for row in told})
    if not networks:
        return
    palette, starts = mpl.colormaps["tab20"], dict.fromkeys(row["start"] for row in told)
    colours = {start: palette(number) for number, start in enumerate(starts)}  # alike everywhere
    height = 2 * len(networks)
    figure, panels = pyplot.subplots(height, len(TARGETS), figsize=(20, 4.5 * height), sharey="row")
    for place, network in enumerate(networks):
        for number, share in enumerate(TARGETS):
            own = [r for r in told if (r["network"], r["share"]) == (network, share)]
            best = ranking(rows, network, share, ITERATIONS[share])[:1]
            for row, (column, unit) in enumerate(((0, "iterations"), (1, "process seconds"))):
                panel = panels[2 * place + row][number]
                _draw(panel, own, best, column, colours)
                panel.set_xlabel(unit)
                panel.set_title(f"{network}, {1 - share:.0%} of the MACs removed")
                panel.grid(alpha=0.3)
        panels[2 * place][0].set_ylabel("accuracy on new tasks, %")
        panels[2 * place + 1][0].set_ylabel("accuracy on new tasks, %")
    lines = {line.get_label(): line for panel in panels.flat
             for line in panel.get_legend_handles_labels()[0]}  # fmt: skip
    figure.legend(lines.values(), lines, loc="lower center", ncol=6, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _draw(
    panel: Any, rows: Sequence[Row], best: Sequence[str], column: int, colours: Mapping[str, Any]
) -> None:
    """Draw cold schedules of each length by how they end, and every other start on its way."""
    for start in dict.fromkeys(row["start"] for row in rows):
        own = [row for row in rows if row["start"] == start]
        most = max(row["iterations"] for row in own)
        points = _ends(own) if start == COLD else _way([r for r in own if r["iterations"] == most])
        bold = 3.0 if start in best or start == COLD else 1.0
        panel.errorbar(points[:, column], points[:, 2], yerr=points[:, 3], label=start, marker="o",
                       markersize=3, capsize=2, linewidth=bold, color=colours[start])  # fmt: skip
    panel.set_xscale("symlog", linthresh=10 if column == 0 else 1)


def _ends(rows: Sequence[Row]) -> Points:
    """Return a point for each number of iterations that runs ended after."""
    lengths = sorted({row["iterations"] for row in rows})
    runs = [[row for row in rows if row["iterations"] == length] for length in lengths]
    return np.array([
        _point(length, [r["seconds"] for r in own], [r["accuracy"] for r in own])
        for length, own in zip(lengths, runs, strict=True)
    ])  # fmt: skip


def _way(rows: Sequence[Row]) -> Points:
    """Return a point for each number of iterations that runs were judged after."""
    return np.array([
        _point(int(at), [r["seconds_at"][at] for r in rows], [r["curve"][at] for r in rows])
        for at in sorted(rows[0]["curve"], key=int)
    ])  # fmt: skip


def _point(iterations: int, seconds: Sequence[float], accuracy: Sequence[float]) -> list[float]:
    return [iterations, float(np.mean(seconds)), float(np.mean(accuracy)), float(np.std(accuracy))]
