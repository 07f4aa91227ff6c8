"""Training-free cuts, and what allocation and selection are each worth.

    SECATEUR_DATA=... python benchmarks/compensation/run.py [--parent NAME] [--seeds 0 1 2]

No recovery: the cut is measured plain, with batch norms re-estimated on 256 unlabelled images,
refitted on the same images, and refitted after a rewrite in balanced axes; then with its channels
scored again after half of the cut; then with all layers refitted together, by a few passes of
gradient steps over the same images towards the parent's outputs. Importance, axes and search read
labels, except where the row says "no labels". A second table crosses how many
channels each group keeps with which ones. Seconds, of deciding and of treating, are of one process
as the machine was. Resumable.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fusion.bench import PARENT, Bench, Scores
from fusion.ours import REFIT_IMAGES, Recipe, fused_scores
from fusion.run import measure
from secateur.compensate import refit
from secateur.core.model import MultiTaskModel
from secateur.core.plan import PrunePlan
from secateur.core.progress import shown
from secateur.data.loading import Subset, batches, spread
from secateur.flow.allocation import RelativeLoss
from secateur.flow.joint import PASSES, joint_spec
from secateur.flow.recovery import JUDGE_IMAGES
from secateur.prune import plan_widths
from secateur.prune.plan import Budget
from secateur.recover import TrainSettings, train
from suite import RESULTS, Show, append_row, read_rows, write_suite

KEEP = (0.8, 0.7, 0.5, 0.3)
TARGETS = {0.8: -0.3, 0.7: -1.0, 0.5: -4.0, 0.3: -14.0}
CELLS = RESULTS / "compensation.cells.jsonl"
BEST = "axes and refit"
UNLABELLED = f"{BEST}, no labels"
AGAIN = f"{BEST}, scored again"
TOGETHER = ", all layers together"
WAYS = (("search", AGAIN), ("search", BEST), ("balanced", AGAIN), ("balanced", BEST))  # best first
UNTURNED = ("plain", "batch norm", "refit")  # in the axes as trained


def cells(seeds: list[int]) -> Iterator[tuple[str, str, float, int]]:
    """Yield (allocation, treatment or selection, share of MACs kept, seed)."""
    for seed in seeds:
        for keep in KEEP:
            for treatment in ("plain", "batch norm", "refit", BEST, UNLABELLED, AGAIN,
                              f"{AGAIN}{TOGETHER}", f"{UNLABELLED}{TOGETHER}"):  # fmt: skip
                yield "balanced", treatment, keep, seed
        for keep in KEEP:
            yield "search", BEST, keep, seed
            yield "search", UNLABELLED, keep, seed
            yield "search", AGAIN, keep, seed
        for keep in (0.5, 0.3):
            for allocation in ("uniform", "global", "balanced", "search"):
                for selection in ("random", "l2", "taylor"):
                    yield allocation, f"select {selection}", keep, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", default=PARENT)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--keep", type=float, nargs="*", help="only these shares of MACs")
    parser.add_argument("--what", nargs="*", help="only these treatments or selections")
    parser.add_argument("--allocation", nargs="*", help="only these")
    parser.add_argument("--quick", action="store_true", help="half the MACs only, ranked only")
    options = parser.parse_args()
    bench = Bench(options.parent)
    with shown():
        for allocation, what, keep, seed in cells(options.seeds):
            if options.quick and (keep != 0.5 or allocation == "search"):
                continue
            wanted = ((options.keep, keep), (options.what, what), (options.allocation, allocation))
            if any(only and value not in only for only, value in wanted):
                continue
            key = {"parent": bench.name, "allocation": allocation, "what": what, "keep": keep,
                   "seed": seed}  # fmt: skip
            if any(key.items() <= row.items() for row in read_rows(CELLS)):
                continue
            row = {**key, **run_cell(bench, allocation, what, keep, seed)}
            append_row(CELLS, row)
            print(*key.values(), f"{row['delta_t']:.2f}", f"{row['seconds']} s", flush=True)
    rows = read_rows(CELLS)
    seeds = sorted({row["seed"] for row in rows})
    write_suite("compensation", "python benchmarks/compensation/run.py", seeds, rows, claims(rows))


def run_cell(bench: Bench, allocation: str, what: str, keep: float, seed: int) -> dict[str, Any]:
    """Cut by one allocation and selection, treat, and measure on the test images."""
    axes = what not in UNTURNED
    recipe = Recipe(
        allocation="balanced" if allocation == "uniform" else allocation,
        axes=axes,
        labels=not what.startswith(UNLABELLED),
        rescore=what.startswith(AGAIN) or what == f"{UNLABELLED}{TOGETHER}",
    )
    started = time.monotonic()
    bench = recipe.bench(bench)
    plan = _plan(bench, recipe, allocation, what, keep, seed)
    pruned = bench.apply(plan)
    images = bench.images(REFIT_IMAGES, seed)
    plan_seconds, started = time.monotonic() - started, time.monotonic()
    model = _treated(bench, pruned, plan, what, images)
    if what.endswith(TOGETHER):
        model = together(bench, model, seed)
    seconds = time.monotonic() - started
    return {**measure(bench, model), "macs": plan.macs_after / plan.macs_before,
            "plan_seconds": round(plan_seconds, 1), "seconds": round(seconds, 1)}  # fmt: skip


def _plan(
    bench: Bench, recipe: Recipe, allocation: str, what: str, keep: float, seed: int
) -> PrunePlan:
    if not what.startswith("select "):
        return recipe.plan(bench, keep, seed)
    if allocation == "uniform":
        counts = _uniform(bench, keep)
    else:
        counts = [len(cut.kept) for cut in recipe.plan(bench, keep, seed).cuts]
    criterion = {"random": f"random:{seed}", "l2": "magnitude", "taylor": "taylor"}
    chosen: Scores = fused_scores(
        bench, criterion[what.removeprefix("select ")], "mean", keep, seed
    )
    return plan_widths(
        bench.groups, bench.cost, chosen, counts, Budget(keep), per_task={}, criterion=what,
        fusion="mean",
    )  # fmt: skip


def _uniform(bench: Bench, keep: float) -> list[int]:
    """Return the largest equal share of every group, on the grid, that the budget allows."""
    widths = np.array([group.width for group in bench.groups])
    for share in np.linspace(1, 0, 400):
        counts = np.maximum(8, np.minimum(widths, widths * share // 8 * 8)).astype(int)
        if bench.cost.macs(counts) <= keep * bench.full_macs:
            return [int(count) for count in counts]
    raise ValueError(f"no uniform width fits {keep}")


def _treated(
    bench: Bench, pruned: MultiTaskModel, plan: PrunePlan, what: str, images: Tensor
) -> MultiTaskModel:
    if what == "plain":
        return pruned
    if what == "batch norm":
        model = copy.deepcopy(pruned)
        update_bn(torch.split(images, 32), model)
        return model.eval()
    return refit(bench.parent, pruned, bench.groups, plan, images)


def together(bench: Bench, model: MultiTaskModel, seed: int) -> MultiTaskModel:
    """Refit all layers together as a recipe without recovery does (``flow/joint.py``).

    As there, what leaves the tasks farther from the parent on training images is undone.
    """
    spec = joint_spec(PASSES).model_dump(exclude={"augment", "early_stop", "reinit"})
    fitted = train(model, bench.some(REFIT_IMAGES, seed), bench.spec,
                   TrainSettings(**spec, as_deployed=True), parent=bench.parent,
                   title="refitting together").model  # fmt: skip
    judged = Subset(bench.fit, spread(bench.fit, JUDGE_IMAGES))
    loss = RelativeLoss(bench.parent, next(batches(judged, [], bench.spec, len(judged))))
    return fitted if loss(fitted) <= loss(model) else model


def claims(rows: list[dict[str, Any]]) -> list[Show]:
    """Return the targets without recovery against the mean over the seeds measured.

    They are told of the best way without any gradient step on the cut that there is a row of, and
    of all layers refitted together. Recipes without recovery search widths and score twice.
    """
    shows = []
    for parent in dict.fromkeys(row["parent"] for row in rows):
        for keep, target in TARGETS.items():
            layerwise = next((one for one in (_claim(rows, parent, keep, target, *way)
                                              for way in WAYS) if one), None)  # fmt: skip
            jointly = _claim(rows, parent, keep, target, "balanced", f"{AGAIN}{TOGETHER}")
            shows += [show for show in (layerwise, jointly) if show]
    return shows


def _claim(
    rows: list[dict[str, Any]], parent: str, keep: float, target: float, allocation: str, what: str
) -> Show | None:
    wanted = (parent, allocation, what, keep)
    found = [row["delta_t"] for row in rows
             if (row["parent"], row["allocation"], row["what"], row["keep"]) == wanted]  # fmt: skip
    if not found:
        return None
    way = f"{what}, {'widths searched' if allocation == 'search' else 'ranked'}"
    claim = (f"delta T % without recovery, {parent}, {100 - 100 * keep:.0f} % of MACs removed, "
             f"{way}, {len(found)} seed(s)")  # fmt: skip
    return Show(claim, target, round(float(np.mean(found)), 2), ">=")


if __name__ == "__main__":
    main()
