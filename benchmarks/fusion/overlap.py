"""Do the tasks want the same channels? Overlap of what each alone would keep, by depth.

    SECATEUR_DATA=... python benchmarks/fusion/overlap.py [--parent NAME]

Each task alone plans a cut to half the MACs, by its own scores, with the widths that all tasks
together get, so that only the choice differs. Per group of shared channels and pair of tasks: the
share of one's kept channels that the other keeps too, less what chance would give, so that 0 is
chance and 1 is the same set. Written to ``results/overlap.json`` and ``.png``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fusion.bench import PARENT, Bench
from fusion.ours import budget_of, ranked_plan, task_scores
from secateur.core.channels import ChannelGroup
from secateur.core.progress import shown
from secateur.fusion.scores import fuse
from secateur.prune import plan_widths
from secateur.prune.plan import Budget
from suite import RESULTS, write_suite
from torch import nn

SHARE = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", default=PARENT)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    options = parser.parse_args()
    bench = Bench(options.parent)
    with shown():
        rows = [
            {"parent": options.parent, "axes": axes, "seed": seed, **row}
            for axes, own in (("original", bench), ("balanced", bench.turned()))
            for seed in options.seeds
            for row in overlaps(own, seed)
        ]
    write_suite("overlap", "python benchmarks/fusion/overlap.py", options.seeds, rows, [])
    draw(rows, RESULTS / "overlap.png")


def overlaps(bench: Bench, seed: int) -> list[dict[str, Any]]:
    """Return one row per shared group that is cut, in order of depth."""
    bank = task_scores(bench, "taylor", seed)
    together = fuse(bank, dict.fromkeys(bank, 1.0), "mean")
    budget = budget_of(bench, SHARE, "balanced")
    counts = [len(cut.kept) for cut in ranked_plan(bench, together, budget).cuts]
    kept = {
        task: plan_widths(
            bench.groups, bench.cost, scores, counts, Budget(SHARE), per_task={},
            criterion="taylor", fusion="-",
        ).cuts
        for task, scores in bank.items()
    }  # fmt: skip
    rows = []
    for number, group in enumerate(bench.groups):
        shared = all(scores[group.name].any() for scores in bank.values())
        if not shared or counts[number] == group.width:
            continue
        chance = counts[number] / group.width
        pairs = {}
        for one, other in combinations(bank, 2):
            common = set(kept[one][number].kept) & set(kept[other][number].kept)
            share = len(common) / counts[number]
            pairs[f"{one} and {other}"] = round((share - chance) / (1 - chance), 4)
        rows.append({"group": group.name, "width": group.width, "kept": counts[number], **pairs})
    return sorted(rows, key=lambda row: depth_of(bench.parent, bench.groups, row["group"]))


def depth_of(model: nn.Module, groups: Sequence[ChannelGroup], name: str) -> int:
    """Return the position of a group's first layer among the modules."""
    order = [layer for layer, _ in model.named_modules()]
    group = next(group for group in groups if group.name == name)
    return min(order.index(member.layer) for member in group.members)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the overlap of each pair by depth, its mean over seeds, one panel per kind of axes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(row["axes"] for row in rows))
    figure, panels = pyplot.subplots(len(kinds), 1, figsize=(11, 4 * len(kinds)), sharey=True)
    for panel, kind in zip(np.atleast_1d(panels), kinds, strict=True):
        own = [row for row in rows if row["axes"] == kind]
        groups = list(dict.fromkeys(row["group"] for row in own))
        for pair in [name for name in own[0] if " and " in name]:
            means = [
                np.mean([row[pair] for row in own if row["group"] == group]) for group in groups
            ]
            panel.plot(range(len(groups)), means, marker="o", label=pair)
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set_xticks(range(len(groups)), [g.replace("backbone.", "") for g in groups],
                         rotation=60, ha="right", fontsize=7)  # fmt: skip
        panel.set_ylabel("overlap beyond chance")
        panel.set_title(f"{kind} axes")
        panel.grid(alpha=0.3)
    np.atleast_1d(panels)[0].legend()
    figure.suptitle(f"What each task alone would keep of shared channels, {rows[0]['parent']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
