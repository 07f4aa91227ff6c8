"""Decide a cut from scores and a budget; touches no weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from secateur.core.channels import ChannelGroup
from secateur.core.errors import PlanError
from secateur.core.plan import GroupCut, PrunePlan
from secateur.prune.budget import default_floor, solve
from secateur.prune.costs import macs_limit, task_limits, width_problem
from secateur.prune.macs import MacsModel
from secateur.prune.problem import Allocation, Limit, Problem, allocation

GroupScores = Mapping[str, NDArray[np.float64]]
MUCH_HIGHER = 100.0  # times what the best channel of those that a ranking loses counts


@dataclass(frozen=True)
class Budget:
    """``macs``: share of the parent's MACs, restricted to the kept tasks, that may stay (0..1].

    ``grid``: every changed width, in positions, is a multiple of it. ``floor``: the least share of
    a group's channels that stays. ``balance``: 0 ranks all channels of the network together, 1
    compares them only within their group (every group keeps about the same share), between is
    between. ``sharpness``: the power of the scores that the exact planner adds up. First-order
    scores do not add up: what many channels of one group lose together is more than the sum, so a
    plain sum (1) empties the costliest groups; in high powers the highest scores decide, as in a
    ranking (benchmarks/budget/objective.py compares).
    """

    macs: float
    grid: int = 8
    floor: float = 0.3
    balance: float = 0.65
    sharpness: float = 8.0


def default_budget(
    groups: Sequence[ChannelGroup],
    cost: MacsModel,
    macs: float,
    grid: int,
    balance: float = 0.65,
    limits: Sequence[Limit] = (),
) -> Budget:
    """Return the budget with the floor that suits it, or ``limits`` where there are some.

    The floor is that of ``budget.default_floor``.
    """
    widths = [group.width for group in groups]
    grids = [group.step(grid) for group in groups]
    within = limits or [macs_limit(cost, int(macs * cost.macs(widths)))]
    floor = default_floor(widths, grids, within)
    return Budget(macs, grid, floor, balance)


def plan_prune(
    groups: Sequence[ChannelGroup],
    cost: MacsModel,
    fused: GroupScores,
    per_task: Mapping[str, GroupScores],
    budget: Budget,
    *,
    criterion: str,
    fusion: str,
    limits: Sequence[Limit] = (),
    floors: Mapping[str, float] | None = None,
    bounded: bool = False,
) -> PrunePlan:
    """Return the cut that keeps the most fused score within the budget, or within ``limits``.

    ``fused`` and each of ``per_task`` give (width,) scores by group name. ``floors``: the share of
    its own importance that a task keeps at least (0..1). Without limits and floors the greedy
    planner fills the MACs of ``budget``; with them the exact one keeps all of them. ``bounded``:
    say of a greedy plan, too, how far from the best it may be.

    Raises:
        PlanError: the budget is below what the grid and the floor allow.
    """
    full = cost.macs([group.width for group in groups])
    raw = [fused[group.name] / group.spread for group in groups]  # a head counts by its channels
    scores = [own * balancing(own, budget.balance) for own in raw]
    grids = [group.step(budget.grid) for group in groups]
    within = limits or [macs_limit(cost, int(budget.macs * full))]
    if limits or floors:
        from secateur.prune.exact import solve_exact  # OR-Tools takes a while to import

        ordered = {task: [own[group.name] for group in groups] for task, own in per_task.items()}
        kept = [*within, *task_limits(scores, ordered, floors or {})]
        losses = _sharpened(scores, budget.sharpness, grids, budget.floor, kept)
        found = solve_exact(width_problem(losses, grids, budget.floor, kept))
    else:
        problem = width_problem(scores, grids, budget.floor, within, thin=False)
        counts = solve(scores, cost, int(budget.macs * full), grids, budget.floor)
        found = _greedy_allocation(problem, counts, bounded)
    plan = plan_widths(
        groups, cost, fused, found.counts, budget, per_task=per_task, criterion=criterion,
        fusion=fusion,
    )  # fmt: skip
    return replace(plan, solver=found.method, gap=found.gap)


def _greedy_allocation(problem: Problem, counts: Sequence[int], bounded: bool) -> Allocation:
    at = [widths.index(count) for widths, count in zip(problem.widths, counts, strict=True)]
    if not bounded:
        return allocation(problem, at, -np.inf, "greedy")
    from secateur.prune.exact import lower_bound

    return allocation(problem, at, lower_bound(problem), "greedy")


def plan_widths(
    groups: Sequence[ChannelGroup],
    cost: MacsModel,
    fused: GroupScores,
    counts: Sequence[int],
    budget: Budget,
    *,
    per_task: Mapping[str, GroupScores],
    criterion: str,
    fusion: str,
) -> PrunePlan:
    """Return the cut that keeps each group's ``counts`` best channels by fused score."""
    full = cost.macs([group.width for group in groups])
    cuts = tuple(
        GroupCut(group.name, group.width, _best(fused[group.name], count))
        for group, count in zip(groups, counts, strict=True)
    )
    return PrunePlan(
        cuts=cuts,
        macs_before=full,
        macs_after=cost.macs(counts),
        budget_macs=int(budget.macs * full),
        channel_grid=budget.grid,
        criterion=criterion,
        fusion=fusion,
        lost={task: _lost_share(cuts, values) for task, values in per_task.items()},
    )


def balancing(scores: NDArray[np.float64], balance: float) -> float:
    """Return what to multiply a group's scores by: 1 over their mean to the power ``balance``.

    First-order scores of deep, wide groups are small per channel although losing many of them at
    once is not; a purely global ranking starves those groups.
    """
    mean = float(scores.mean())
    return 1 / mean**balance if mean > 0 else 1.0


def _sharpened(
    scores: Sequence[NDArray[np.float64]],
    power: float,
    grids: Sequence[int],
    floor: float,
    limits: Sequence[Limit],
) -> Sequence[NDArray[np.float64]]:
    """Return (width,) scores to a power, 1 for the best one that a ranking loses.

    Those that are much higher are not told apart, so that a solver's resolution is left to others.
    """
    if power == 1:
        return scores
    from secateur.prune.exact import solve_greedy

    try:
        counts = solve_greedy(width_problem(scores, grids, floor, limits)).counts
    except PlanError:  # the exact planner may find one, and says better why there is none
        counts = tuple(len(own) // 2 for own in scores)
    lost = [np.sort(own)[: len(own) - count] for own, count in zip(scores, counts, strict=True)]
    threshold = max((float(own.max()) for own in lost if own.size), default=0.0) or 1.0
    return [((own.clip(min=0) / threshold) ** power).clip(max=MUCH_HIGHER) for own in scores]


def _best(scores: NDArray[np.float64], count: int) -> tuple[int, ...]:
    order = np.argsort(-scores, kind="stable")[:count]
    return tuple(int(channel) for channel in np.sort(order))


def _lost_share(cuts: Sequence[GroupCut], scores: GroupScores) -> float:
    kept = sum(float(scores[cut.name][list(cut.kept)].sum()) for cut in cuts)
    total = sum(float(scores[cut.name].sum()) for cut in cuts)
    return 1 - kept / total if total > 0 else 0.0
