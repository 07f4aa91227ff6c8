"""Would it pay to choose channels by how well the others can stand in for them?

    SECATEUR_DATA=... python benchmarks/compensation/redundancy.py [--seeds 0 1 2] [--quick]

Compensation rebuilds what a dropped channel gave from those that stay, so a channel that others
predict well should be cheap to drop, whatever it is worth: its score may be lowered by the root of
the share of its variance that no other channel explains (optimal brain surgeon's 1 / [H^-1]_ii,
Hassibi and Stork 1993, on a reader's inputs). Either all others may stand in (``all``), or only
those not yet dropped, the cheapest going first (``left``). ``choice`` changes which channels a
group keeps and not how much the group counts beside others. Cuts are refitted, nothing is trained,
and the validation images judge.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fusion.bench import PARENT, Bench, Scores
from fusion.ours import CUT, REFIT_IMAGES, budget_of, fused_scores, ranked_plan
from fusion.run import measure
from secateur.compensate import refit
from secateur.core.plan import PrunePlan
from secateur.core.progress import shown
from suite import Show, exit_status, write_suite

KEEP = (0.5, 0.3)
POSITIONS = 4096  # of a batch of 32 images
RIDGE = 1e-3  # of the mean variance
AS_SCORED = "as scored"
WAYS = (AS_SCORED, "all", "all, choice", "left", "left, choice")
Array = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="half the MACs, one seed, no figures")
    options = parser.parse_args()
    seeds = options.seeds[:1] if options.quick else options.seeds
    bench, rows = CUT.bench(Bench(PARENT)), []
    with shown():
        for seed in seeds:
            images = bench.images(REFIT_IMAGES, seed)
            read = covariances(bench, images)
            for keep in KEEP[:1] if options.quick else KEEP:
                scores = fused_scores(bench, CUT.criterion, CUT.rule, keep, seed)
                for way in WAYS:
                    told = {name: judged(own, read.get(name, []), way)
                            for name, own in scores.items()}  # fmt: skip
                    _, metrics = cut(bench, told, keep, images)
                    row = {"way": way, "keep": keep, "seed": seed, **metrics}
                    rows.append(row)
                    print(way, keep, seed, f"{row['delta_t']:.2f}", flush=True)
    if not options.quick:
        command = "python benchmarks/compensation/redundancy.py"
        write_suite("redundancy", command, seeds, rows, claims(rows))
        exit_status(claims(rows))


def claims(rows: list[dict[str, Any]]) -> list[Show]:
    """Return what the best way adds to plain scores at each share of MACs, means over the seeds.

    It is the best of four on the very images that judge, which is kind to it.
    """
    shows = []
    for keep in KEEP:
        found = {way: [row["delta_t"] for row in rows if (row["way"], row["keep"]) == (way, keep)]
                 for way in WAYS}  # fmt: skip
        mean = {way: float(np.mean(values)) for way, values in found.items()}
        best = max(WAYS[1:], key=lambda way: mean[way])
        claim = (f"points of delta T that choosing by redundancy ({best}) adds, "
                 f"{1 - keep:.0%} of MACs removed, refitted, not trained")  # fmt: skip
        shows.append(Show(claim, 0.0, round(mean[best] - mean[AS_SCORED], 2), ">="))
    return shows


def cut(
    bench: Bench, scores: Scores, keep: float, images: Tensor
) -> tuple[PrunePlan, dict[str, Any]]:
    """Cut by the scores and refit; return the plan and the metrics on the validation images."""
    plan = ranked_plan(bench, scores, budget_of(bench, keep, CUT.allocation))
    model = refit(bench.parent, bench.apply(plan), bench.groups, plan, images)
    return plan, measure(bench, model, "val")


def covariances(bench: Bench, images: Tensor) -> dict[str, list[Array]]:
    """Return, per group, the (width, width) covariance of its channels at each of its readers.

    Readers that see a channel at several positions, or each by itself, are left out.
    """
    seen: dict[str, list[Tensor]] = defaultdict(list)
    generator = torch.Generator().manual_seed(0)

    def note(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        x = inputs[0].movedim(1, -1) if isinstance(layer, nn.Conv2d) else inputs[0]
        rows = x.flatten(0, -2)
        seen[name].append(rows[torch.randperm(len(rows), generator=generator)[:POSITIONS]])

    read = {
        (group.name, member.layer): [place for (place,) in member.indices]
        for group in bench.groups
        for member in group.members
        if member.axis == "in" and all(len(places) == 1 for places in member.indices)
    }
    layers = {name: bench.parent.get_submodule(name) for _, name in read}
    mixing = {name: layer for name, layer in layers.items() if getattr(layer, "groups", 1) == 1}
    hooks = [layer.register_forward_hook(partial(note, name)) for name, layer in mixing.items()]
    with torch.no_grad():
        for chunk in torch.split(images, 32):
            bench.parent(chunk)
    for hook in hooks:
        hook.remove()
    found: dict[str, list[Array]] = defaultdict(list)
    for (group, name), places in read.items():
        if name in mixing:
            inputs = torch.cat(seen[name])[:, places].double()
            found[group].append(np.atleast_2d(torch.cov(inputs.T).numpy()))
    return found


def judged(scores: Array, read: list[Array], way: str) -> Array:
    """Return (width,) scores with what others can stand in for taken off, by the hardest reader."""
    if way == AS_SCORED or not read:
        return scores
    who, _, choice = way.partition(", ")
    lower = alone if who == "all" else in_turn
    lowered: Array = np.max([lower(scores, covariance) for covariance in read], axis=0)
    return lowered * scores.mean() / lowered.mean() if choice else lowered


def alone(scores: Array, covariance: Array) -> Array:
    """Return the scores times the root of the share of variance that no other channel explains."""
    ridge, precision = _precision(covariance)
    lowered: Array = scores * _unexplained(np.diag(precision), np.diag(covariance), ridge) ** 0.5
    return lowered


def in_turn(scores: Array, covariance: Array) -> Array:
    """Return what each channel counts when it is the cheapest of those left; none less than before.

    A channel that goes is taken out of the others' precision by one step of elimination.
    """
    ridge, precision = _precision(covariance)
    left, value, highest = np.ones(len(scores), bool), np.zeros(len(scores)), 0.0
    for _ in scores:
        diagonal = np.where(left, np.diag(precision), 1.0)
        now = scores * _unexplained(diagonal, np.diag(covariance), ridge) ** 0.5
        first = int(np.where(left, now, np.inf).argmin())
        highest = max(highest, float(now[first]))
        value[first], left[first] = highest, False
        gone = precision[:, first]
        precision = precision - np.outer(gone, gone) / gone[first]
    return value


def _precision(covariance: Array) -> tuple[float, Array]:
    ridge = RIDGE * float(np.diag(covariance).mean()) + 1e-12
    precision = np.linalg.inv(np.asarray(covariance + ridge * np.eye(len(covariance)), np.float64))
    return ridge, np.asarray(precision, np.float64)


def _unexplained(precision: Array, variance: Array, ridge: float) -> Array:
    share: Array = (1 / precision - ridge) / np.maximum(variance, 1e-12)
    return share.clip(0, 1)


if __name__ == "__main__":
    main()
