"""Half of a cut, after which the channels are scored anew.

A first-order score says what a channel is worth beside all others, and a cut takes many at once.
So a first cut goes half the way, is compensated, and what it leaves is scored again: iterative
pruning (Molchanov et al., arXiv 1906.10771, section 3.2) without training in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from secateur.core.channels import ChannelGroup
from secateur.core.plan import PrunePlan, groups_after
from secateur.prune.macs import MacsModel
from secateur.prune.plan import Budget, balancing, default_budget, plan_prune
from secateur.prune.problem import Limit

HALF = 0.5  # of the way, geometrically: the square root of what stays


def plan_halfway(
    groups: Sequence[ChannelGroup],
    cost: MacsModel,
    fused: Mapping[str, NDArray[np.float64]],
    budget: Budget,
    share: float,
    *,
    limits: Sequence[Limit] = (),
    floor: float | None = None,
    criterion: str = "-",
    fusion: str = "-",
) -> tuple[PrunePlan, Budget]:
    """Return the cut to the square root of ``share`` of the MACs, and the budget of the whole cut.

    That is ``budget`` with a ``floor`` that suits both halves: the product of what suits each,
    counted from the network it is made in, unless it is given; its scores are balanced already
    (``balanced_whole``). ``limits``, if any, are what the whole cut has to keep. ``fused``:
    (width,) scores by group.

    Raises:
        PlanError: half the way is further than the grid and the floor allow.
    """
    way = budget.grid, budget.balance
    half = default_budget(groups, cost, share**HALF, *way)
    if floor is not None:
        half = replace(half, floor=floor)
    plan = plan_prune(groups, cost, fused, {}, half, criterion=criterion, fusion=fusion)
    rest = default_budget(groups_after(groups, plan), cost, share ** (1 - HALF), *way, limits)
    both = half.floor * rest.floor if floor is None else floor
    return plan, replace(budget, floor=both, balance=0.0)


def scores_of_whole(
    groups: Sequence[ChannelGroup], plan: PrunePlan, scores: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.float64]]:
    """Return scores of what ``plan`` leaves as those of all channels: 0 where one is gone."""
    whole = {group.name: np.zeros(group.width) for group in groups}
    for cut in plan.cuts:
        whole[cut.name][list(cut.kept)] = scores[cut.name]
    return whole


def balanced_whole(
    groups: Sequence[ChannelGroup],
    plan: PrunePlan,
    scores: Mapping[str, NDArray[np.float64]],
    balance: float,
) -> dict[str, NDArray[np.float64]]:
    """Return scores of all channels balanced between groups, by those that ``plan`` leaves."""
    left = {cut.name: list(cut.kept) for cut in plan.cuts}
    found = {}
    for group in groups:
        own = scores[group.name]
        found[group.name] = own * balancing(own[left[group.name]] / group.spread, balance)
    return found
