"""What the exact planner should add up: benchmarks/budget/objective.py [--parent NAME ...]

The same scores, MACs budget and refit, no training; only the sum differs that the planner keeps
the most of: scores to some power (``Budget.sharpness``), and the greedy ranking beside it. Told on
the validation split, since a default is chosen here. A stopped run goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fusion.bench import GRID, PARENT, SECOND, Bench, Scores
from fusion.ours import REFIT_IMAGES, fused_scores
from fusion.run import measure
from secateur.compensate import refit
from secateur.core.plan import PrunePlan
from secateur.core.progress import shown
from secateur.prune import plan_prune
from secateur.prune.costs import macs_limit
from secateur.prune.plan import Budget, default_budget
from suite import RESULTS, Show, append_row, read_rows, write_suite

CELLS = RESULTS / "budget_objective.cells.jsonl"
WHERE = ((PARENT, 0), (PARENT, 1), (SECOND, 0), ("scenes_vit", 0))
SHARES = (0.5, 0.3)
GREEDY = 0.0  # in place of a power
POWERS = (GREEDY, 1.0, 2.0, 5.0, 8.0, 12.0)
NOISE = 1.0  # points of delta T that two cuts of the same quality may differ by here


def main() -> None:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parent", nargs="+", default=[name for name, _ in WHERE])
    wanted = parser.parse_args().parent
    done = {(r["parent"], r["seed"], r["keep"], r["power"]) for r in read_rows(CELLS)}
    with shown():
        for name, seed in WHERE:
            missing = [(keep, power) for keep in SHARES for power in POWERS
                       if (name, seed, keep, power) not in done]  # fmt: skip
            if name in wanted and missing:
                for row in cut_rows(Bench(name), seed, missing):
                    append_row(CELLS, row)
    rows = read_rows(CELLS)
    write_suite("budget_objective", "python benchmarks/budget/objective.py", [0, 1], rows,
                shows(rows))  # fmt: skip


def cut_rows(bench: Bench, seed: int, cells: list[tuple[float, float]]) -> Iterator[dict[str, Any]]:
    """Yield delta T on the validation split of each cut (share of MACs kept, power)."""
    turned = bench.turned()
    bench.parent_metrics("val")
    for keep, power in cells:
        scores = fused_scores(turned, "taylor", "mean", keep, seed)
        plan = plan_cut(turned, scores, keep, power)
        images = turned.images(REFIT_IMAGES, seed)
        cut = refit(turned.parent, turned.apply(plan), turned.groups, plan, images)
        found = measure(bench, cut, "val")
        yield {
            "parent": bench.name, "seed": seed, "keep": keep, "power": power,
            "macs": plan.macs_after / plan.macs_before, "gap": plan.gap if power else None,
            "delta_t": found["delta_t"], "worst": found["worst"],
            "change_percent": found["change_percent"],
        }  # fmt: skip


def plan_cut(bench: Bench, scores: Scores, keep: float, power: float) -> PrunePlan:
    """Return the greedy plan, or the exact one of scores to a power, within the same MACs."""
    budget: Budget = default_budget(bench.groups, bench.cost, keep, GRID)
    most = int(keep * bench.full_macs)
    limits = () if power == GREEDY else (macs_limit(bench.cost, most),)
    return plan_prune(
        bench.groups, bench.cost, scores, {}, replace(budget, sharpness=power or 1.0),
        criterion="-", fusion="-", limits=limits,
    )  # fmt: skip


def shows(rows: list[dict[str, Any]]) -> list[Show]:
    """Claim that the default power is within the noise of the best, and ahead of a plain sum."""
    default = Budget(0.5).sharpness
    means = {power: float(np.mean([r["delta_t"] for r in rows if r["power"] == power]))
             for power in POWERS}  # fmt: skip
    return [
        Show("points of delta T that the default power is below the best, mean of all cuts",
             NOISE, max(means.values()) - means[default], "<="),
        Show("points of delta T that the default power is ahead of a plain sum",
             NOISE, means[default] - means[1.0], ">="),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
