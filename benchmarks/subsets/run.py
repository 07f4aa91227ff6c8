"""All task subsets planned from one score bank, and whether scoring the kept tasks alone pays.

    SECATEUR_DATA=... python benchmarks/subsets/run.py [--seeds 0 1 2 3 4] [--quick]

First, every subset of the tasks at three budgets is planned from the bank's scores, without a
backward pass; the seconds are for all of them together. Then each proper subset is cut to half its
MACs, refitted and measured without training, its channels chosen by the kept tasks' scores or by
all tasks' scores, in the balanced axes of all tasks; and once more by the kept tasks' scores in the
kept tasks' own axes. Widths are the same in all three, so trunk and head budgets are equal.
Resumable.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fusion.bench import GRID, PARENT, Bench, Metrics, Scores
from fusion.ours import REFIT_IMAGES, task_scores
from secateur.bench.accuracy import evaluate_model
from secateur.compensate import refit
from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.core.progress import shown
from secateur.flow.channel_scores import scores_for
from secateur.fusion.scores import fuse
from secateur.metrics.delta import delta
from secateur.metrics.kind import kind_of
from secateur.prune import apply_plan, find_groups, macs_model, plan_prune, plan_widths
from secateur.prune.plan import Budget
from secateur.tasks import select_tasks
from suite import RESULTS, Show, append_row, read_rows, write_suite

BUDGETS = (0.7, 0.5, 0.3)
CELLS = RESULTS / "subsets.cells.jsonl"
Subset = tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", default=PARENT)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--quick", action="store_true", help="only the plans")
    options = parser.parse_args()
    bench = Bench(options.parent)
    with shown():
        planned = plan_all(bench.turned())
        for seed in [] if options.quick else options.seeds:
            for kept in subsets(bench):
                if len(kept) < len(bench.parent.tasks):
                    _compare_once(bench, kept, seed)
    rows = read_rows(CELLS)
    shows = [Show("seconds to plan 7 subsets x 3 budgets from one bank, no backward pass", 60,
                  round(planned["seconds"], 1), "<=")]  # fmt: skip
    for what, claim in (("gain", "scoring the kept tasks only"),
                        ("gain_with_axes", "scoring and axes of the kept tasks only")):  # fmt: skip
        gains = [row[what] for row in rows]
        if gains:
            error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
            shows.append(
                Show(f"points of delta T gained by {claim}, {len(gains)} pairs, "
                     f"standard error {error:.2f}", 0.0, round(statistics.fmean(gains), 2), ">=")
            )  # fmt: skip
    seeds = sorted({row["seed"] for row in rows})
    write_suite("subsets", "python benchmarks/subsets/run.py", seeds, [planned, *rows], shows)


def subsets(bench: Bench) -> Iterator[Subset]:
    names = [task.name for task in bench.parent.tasks]
    for size in range(1, len(names) + 1):
        yield from combinations(names, size)


def plan_all(bench: Bench) -> dict[str, Any]:
    """Plan every subset at every budget; return the plans' figures and the seconds they took."""
    bank = task_scores(bench, "taylor", 0)
    started = time.monotonic()
    plans = []
    for kept in subsets(bench):
        selected = select_tasks(bench.parent, kept).eval()
        groups = find_groups(selected, bench.example)
        cost = macs_model(selected, groups, bench.example)
        scores = {name: scores_for(groups, bench.groups, bank[name]) for name in kept}
        fused = fuse(scores, dict.fromkeys(kept, 1.0), "mean")
        for share in BUDGETS:
            plan = plan_prune(
                groups, cost, fused, scores, Budget(share, GRID), criterion="taylor", fusion="mean"
            )
            plans.append({"keep": list(kept), "budget": share, "macs": plan.macs_after,
                          "of": plan.macs_before, "lost": dict(plan.lost)})  # fmt: skip
    return {"what": "plans", "seconds": time.monotonic() - started, "plans": plans}


def _compare_once(bench: Bench, kept: Subset, seed: int) -> None:
    key = {"parent": bench.name, "keep": list(kept), "seed": seed}
    if any(key.items() <= row.items() for row in read_rows(CELLS)):
        return
    row = {"what": "kept or all", **key, **compare(bench, kept, seed)}
    append_row(CELLS, row)
    changes = {name: round(row[name], 2) for name in ("all", "kept", "kept, own axes")}
    print(*key.values(), changes, flush=True)


def compare(bench: Bench, kept: Subset, seed: int) -> dict[str, Any]:
    """Return ΔT of refitted cuts by the kept tasks' scores and axes, and by all tasks'."""
    every = tuple(task.name for task in bench.parent.tasks)
    parent = select_tasks(bench.parent, kept).eval()
    metrics = evaluate_model(parent, bench.test, bench.spec, batch_size=32)
    turned, budget = bench.turned(), Budget(0.5, GRID)
    counts: list[int] = []
    result: dict[str, Any] = {}
    for name, source, by in (
        ("kept", turned, kept),
        ("all", turned, every),
        ("kept, own axes", bench.turned(tasks=kept), kept),
    ):
        selected = select_tasks(source.parent, kept).eval()
        groups = find_groups(selected, bench.example)
        fused = _fused(source, groups, by, seed)
        if not counts:
            cost = macs_model(selected, groups, bench.example)
            ranked = plan_prune(groups, cost, fused, {}, budget, criterion="-", fusion="-")
            counts = [len(cut.kept) for cut in ranked.cuts]
        plan = plan_widths(
            groups, cost, fused, counts, budget, per_task={}, criterion="-", fusion="-"
        )
        cut = apply_plan(selected, groups, plan)
        fitted = refit(selected, cut, groups, plan, bench.images(REFIT_IMAGES, seed))
        result[name] = _change(bench, metrics, fitted)
    return {**result, "gain": result["kept"] - result["all"],
            "gain_with_axes": result["kept, own axes"] - result["all"]}  # fmt: skip


def _fused(bench: Bench, groups: Sequence[ChannelGroup], names: Sequence[str], seed: int) -> Scores:
    bank = task_scores(bench, "taylor", seed)
    scores = {name: scores_for(groups, bench.groups, bank[name]) for name in names}
    return fuse(scores, dict.fromkeys(names, 1.0), "mean")


def _change(bench: Bench, parent: Metrics, model: MultiTaskModel) -> float:
    """Return ΔT of ``model`` on the test images."""
    metrics = evaluate_model(model, bench.test, bench.spec, batch_size=32)
    higher = {task.name: kind_of(task).higher_is_better for task in model.tasks}
    return delta(parent, metrics, higher).mean


if __name__ == "__main__":
    main()
