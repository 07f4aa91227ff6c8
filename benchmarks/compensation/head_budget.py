"""Would it pay to give the heads a budget of their own?

    SECATEUR_DATA=... python benchmarks/compensation/head_budget.py [--seeds 0 1 2] [--quick]

Channels of one task alone are ranked as if they were worth ``factor`` times what their scores say,
so that heads keep more or less of themselves and the trunk the rest, at the same MACs; 1 is the
ranking as it is. (AdapMTL, arXiv 2408.03913, found heads far more prunable than the trunk.) Cuts
are refitted, nothing is trained, and the validation images judge.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from compensation.redundancy import KEEP, cut
from fusion.bench import PARENT, Bench
from fusion.ours import CUT, REFIT_IMAGES, budget_of, fused_scores
from secateur.core.plan import PrunePlan
from secateur.core.progress import shown
from secateur.tasks.decompose import decompose
from suite import Show, exit_status, write_suite

FACTORS = (1.0, 0.25, 0.5, 0.7, 1.4, 2.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="half the MACs, one seed, no figures")
    options = parser.parse_args()
    seeds = options.seeds[:1] if options.quick else options.seeds
    bench, rows = CUT.bench(Bench(PARENT)), []
    with shown():
        for seed in seeds:
            for keep in KEEP[:1] if options.quick else KEEP:
                for factor in FACTORS:
                    key = {"factor": factor, "keep": keep, "seed": seed}
                    row = {**key, **row_of(bench, factor, keep, seed)}
                    rows.append(row)
                    kept = f"heads {row['heads_kept']:.2f} trunk {row['trunk_kept']:.2f}"
                    print(*key.values(), kept, f"{row['delta_t']:.2f}", flush=True)
    if not options.quick:
        command = "python benchmarks/compensation/head_budget.py"
        write_suite("head_budget", command, seeds, rows, claims(rows))
        exit_status(claims(rows))


def row_of(bench: Bench, factor: float, keep: float, seed: int) -> dict[str, Any]:
    """Cut with the heads' scores changed, refit, and measure on the validation images."""
    heads, budget = of_heads(bench), budget_of(bench, keep, CUT.allocation)
    # Balancing divides a group by its mean to a power; the rest of a factor is what ranks it.
    worth = factor ** (1 / (1 - budget.balance))
    fused = fused_scores(bench, CUT.criterion, CUT.rule, keep, seed)
    scores = {name: own * (worth if name in heads else 1.0) for name, own in fused.items()}
    plan, metrics = cut(bench, scores, keep, bench.images(REFIT_IMAGES, seed))
    trunk = {group.name for group in bench.groups} - heads
    return {**metrics, "heads_kept": kept_share(plan, heads),
            "trunk_kept": kept_share(plan, trunk)}  # fmt: skip


def of_heads(bench: Bench) -> set[str]:
    """Return the groups whose makers a single task depends on."""
    users = decompose(bench.parent, bench.example).layers
    found = set()
    for group in bench.groups:
        makers = [member.layer for member in group.members if member.axis == "out"]
        if len(set[str]().union(*(users[maker] for maker in makers))) == 1:
            found.add(group.name)
    return found


def kept_share(plan: PrunePlan, names: set[str]) -> float:
    """Return the share (0..1) of the groups' channels that the plan keeps."""
    chosen = [one for one in plan.cuts if one.name in names]
    return sum(len(one.kept) for one in chosen) / sum(one.width for one in chosen)


def claims(rows: list[dict[str, Any]]) -> list[Show]:
    """Return what the best other factor adds at each share of MACs, means over the seeds.

    It is the best of six on the very images that judge, which is kind to it.
    """
    shows = []
    for keep in KEEP:
        found = {factor: [row["delta_t"] for row in rows
                          if (row["factor"], row["keep"]) == (factor, keep)]
                 for factor in FACTORS}  # fmt: skip
        mean = {factor: float(np.mean(values)) for factor, values in found.items()}
        best = max(FACTORS[1:], key=lambda factor: mean[factor])
        claim = (f"points of delta T that another share for heads (their scores x {best:g}) adds, "
                 f"{1 - keep:.0%} of MACs removed, refitted, not trained")  # fmt: skip
        shows.append(Show(claim, 0.0, round(mean[best] - mean[1.0], 2), ">="))
    return shows


if __name__ == "__main__":
    main()
