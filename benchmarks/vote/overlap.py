"""Do similar tasks keep the same channels? SECATEUR_DATA=... python benchmarks/vote/overlap.py

From the library that ``cifar.py`` made: each task's keep-sets against those of the five tasks that
LEEP calls most similar to it, and of the five least similar. Per group, in order of depth, the mean
IoU, and what sets drawn at random would have. Written to ``results/vote_overlap.json``, ``.png``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fusion.overlap import depth_of
from secateur.vote.ballot import overlap
from suite import RESULTS, read_json, write_suite
from vote.cifar_claims import NETWORKS
from vote.lab import SHARES, Lab
from vote.starts import NEIGHBOURS

Keeps = Mapping[str, Sequence[int]]
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=NETWORKS)
    asked = parser.parse_args().network
    rows = [row for row in told() if row["network"] not in asked]  # stays as it was
    for network in asked:
        rows += overlaps(Lab(network))
    rows.sort(key=lambda row: NETWORKS.index(row["network"]))
    write_suite("vote_overlap", "python benchmarks/vote/overlap.py", [0], rows, [])
    draw(rows, RESULTS / "vote_overlap.png")


def told() -> list[Row]:
    """Return the rows that an earlier run wrote."""
    path = RESULTS / "vote_overlap.json"
    return list(read_json(path)["rows"]) if path.exists() else []


def overlaps(lab: Lab) -> list[Row]:
    """Return one row per share of the MACs and group that is cut, in order of depth."""
    ranked = {task.name: lab.neighbours(task.name) for task in lab.bank}
    parent = lab.parent
    widths = {group.name: group.width for group in parent.groups}
    rows = []
    for share in SHARES:
        keeps = {task.name: lab.keeps(task.name, share) for task in lab.bank}
        for name in sorted(widths, key=lambda one: depth_of(parent.model, parent.groups, one)):
            counts = [len(own[name]) for own in keeps.values()]
            if min(counts) < widths[name]:
                rows.append({
                    "network": lab.network, "share": share, "group": name, "width": widths[name],
                    "kept": round(float(np.mean(counts)), 1),
                    "similar": _mean(keeps, name, {t: o[:NEIGHBOURS] for t, o in ranked.items()}),
                    "dissimilar": _mean(keeps, name,
                                        {t: o[-NEIGHBOURS:] for t, o in ranked.items()}),
                    "chance": round(_chance(float(np.mean(counts)), widths[name]), 4),
                })  # fmt: skip
    return rows


def _mean(keeps: Mapping[str, Keeps], name: str, others: Mapping[str, Sequence[str]]) -> float:
    """Return the mean IoU of one group's keep-sets over each task and its others."""
    found = [
        overlap({name: keeps[task][name]}, {name: keeps[other][name]})
        for task, own in others.items() for other in own
    ]  # fmt: skip
    return round(float(np.mean(found)), 4)


def _chance(kept: float, width: int) -> float:
    """Return about the IoU of two sets of ``kept`` of ``width`` channels drawn at random."""
    return kept / (2 * width - kept)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the overlaps by depth, one panel per network and share."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, panels = pyplot.subplots(
        len(networks), len(SHARES), figsize=(20, 4 * len(networks)), sharey=True, squeeze=False
    )
    for network, line in zip(networks, panels, strict=True):
        for share, panel in zip(SHARES, line, strict=True):
            own = [r for r in rows if (r["network"], r["share"]) == (network, share)]
            for kind, style in (("similar", "o-"), ("dissimilar", "s-"), ("chance", ":")):
                panel.plot([row[kind] for row in own], style, label=kind, markersize=4)
            panel.set_title(f"{network}, {1 - share:.0%} of the MACs removed")
            panel.set_xticks(range(len(own)), [row["group"].removeprefix("network.body.")
                             for row in own], rotation=90, fontsize=6)  # fmt: skip
            panel.grid(alpha=0.3)
        line[0].set_ylabel("IoU of keep-sets")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
