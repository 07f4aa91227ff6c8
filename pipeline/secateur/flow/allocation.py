"""Plan a cut whose widths were searched for, judged by the cut network after compensation.

The judge needs no labels: it is the distance of the refitted network's outputs to the parent's on
images that the refit did not see, per task relative to the spread of the parent's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secateur.compensate import RefitSettings, refit
from secateur.core.channels import ChannelGroup
from secateur.core.errors import PlanError
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.plan import PrunePlan
from secateur.prune import apply_plan, plan_prune, plan_widths
from secateur.prune.budget import ladders
from secateur.prune.macs import MacsModel
from secateur.prune.plan import Budget
from secateur.prune.search import search_counts

# (floor, balance) of the rankings that the search starts from
STARTS = ((0.3, 0.65), (0.2, 0.8), (0.1, 0.9), (0.1, 0.5))
QUICK = RefitSettings(ridge=0.03, sweeps=2, per_weight=16, samples=(4096, 16_384))


@dataclass(frozen=True)
class SearchSettings:
    """``tries`` judged allocations, each refitted on ``refit_images``; ``floor`` of every group."""

    tries: int = 100
    refit_images: int = 64
    judge_images: int = 64
    floor: float = 0.1


def plan_by_search(
    model: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    cost: MacsModel,
    fused: Mapping[str, NDArray[np.float64]],
    budget: Budget,
    example: Tensor,
    images: Tensor,
    settings: SearchSettings,
    *,
    per_task: Mapping[str, Mapping[str, NDArray[np.float64]]] | None = None,
    criterion: str = "-",
    fusion: str = "-",
    seed: int = 0,
) -> PrunePlan:
    """Return the best plan found; which channels go is decided by ``fused`` within each group.

    ``images``: (N, C, H, W), without labels; every other one judges.

    Raises:
        PlanError: the budget is below what the grid allows.
    """
    named = {"per_task": per_task or {}, "criterion": criterion, "fusion": fusion}
    parts = images[::2][: settings.refit_images], images[1::2][: settings.judge_images]

    def judge(counts: Sequence[int]) -> float:
        plan = plan_widths(groups, cost, fused, counts, budget, **named)
        cut = apply_plan(model, groups, plan, example)
        return _distance(model, refit(model, cut, groups, plan, parts[0], QUICK), parts[1])

    starts = _starts(groups, cost, fused, budget)
    rungs = ladders([fused[group.name] for group in groups], budget.grid, settings.floor)
    found = search_counts(
        rungs, cost, int(budget.macs * cost.macs([g.width for g in groups])), starts, judge,
        tries=settings.tries, seed=seed,
    )  # fmt: skip
    return plan_widths(groups, cost, fused, found.counts, budget, **named)


def _starts(
    groups: Sequence[ChannelGroup],
    cost: MacsModel,
    fused: Mapping[str, NDArray[np.float64]],
    budget: Budget,
) -> list[list[int]]:
    """Return the widths of rankings that a budget allows, from fair between groups to global."""
    starts = []
    for floor, balance in STARTS:
        ranking = replace(budget, floor=floor, balance=balance)
        try:
            plan = plan_prune(groups, cost, fused, {}, ranking, criterion="-", fusion="-")
        except PlanError:
            if (floor, balance) == STARTS[-1]:  # the lowest floor: no ranking fits
                raise
            continue
        starts.append([len(cut.kept) for cut in plan.cuts])
    return starts


def _distance(parent: MultiTaskModel, cut: MultiTaskModel, images: Tensor) -> float:
    with evaluating(parent), evaluating(cut):
        wanted, given = parent(images), cut(images)
    shares = [
        float((given[name] - wanted[name]).square().mean() / wanted[name].var(correction=0))
        for name in wanted
    ]
    return sum(shares) / len(shares)
