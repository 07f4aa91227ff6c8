"""Decide the cut: score the selected model's channels, fuse tasks' scores, choose the widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from secateur.core.channels import ChannelGroup
from secateur.core.errors import PlanError
from secateur.core.plan import PrunePlan, groups_after
from secateur.flow.allocation import SUMS, best_judged, searched_plan
from secateur.flow.channel_scores import (
    STOPPED,
    Scores,
    covers,
    score_bank,
    score_key,
    score_stream,
    scores_for,
    task_agreement,
)
from secateur.flow.job import Job
from secateur.flow.refit import compensated
from secateur.fusion.scores import NEEDS_AGREEMENT, GroupScores, fuse, rule_of
from secateur.importance.agreement import agreement
from secateur.importance.bank import load_scores, save_scores, score_tasks, task_data
from secateur.prune import (
    MacsModel,
    apply_plan,
    count_macs,
    find_groups,
    macs_model,
    plan_prune,
)
from secateur.prune.halfway import HALF, balanced_whole, plan_halfway, scores_of_whole
from secateur.prune.plan import Budget, default_budget

AGREEMENT = " agreement"  # beside the tasks, none of which has such a name


@dataclass(frozen=True)
class Scored:
    """What a cut is planned from, by ``groups`` of the job's outline.

    ``per_task`` and ``fused`` are (width,) scores per group; ``totals`` is per task the sum of its
    scores over the whole parent. Where ``fused`` was read after half of the cut, it is balanced
    between groups already, and ``budget`` does not balance it again.
    """

    groups: tuple[ChannelGroup, ...]
    cost: MacsModel
    budget: Budget
    per_task: Mapping[str, GroupScores]
    fused: GroupScores
    totals: Mapping[str, float]


def make_plan(job: Job, grid: int) -> tuple[tuple[ChannelGroup, ...], PrunePlan]:
    """Score, fuse and plan the cut of the selected model, which stays as it is."""
    scored = score_channels(job, grid)
    return scored.groups, plan_scored(job, scored)


def score_channels(job: Job, grid: int) -> Scored:
    """Score the selected model's channels for every kept task, and fuse the tasks' scores.

    What is fused was read after half of the cut, unless the recipe says no.
    """
    wanted = job.recipe.prune
    rule_of(wanted.fusion)  # a wrong name is told before the scoring
    parent_groups = find_groups(job.scored, job.example)
    groups = find_groups(job.outline, job.example)
    if not covers(parent_groups, groups):  # a removed block alone fixed some channels
        job, parent_groups = replace(job, scored=job.outline), groups
    bank = score_bank(job, [task.name for task in job.tasks])
    if not groups:
        said = "no channel of this model can go: all are fixed by operators or outputs"
        raise PlanError(said, hint="convolutions and linear layers can be cut")
    per_task = {name: scores_for(groups, parent_groups, scores) for name, scores in bank.items()}
    agree = None
    if wanted.fusion in NEEDS_AGREEMENT:
        agree = scores_for(groups, parent_groups, task_agreement(job, parent_groups))
    cost = macs_model(job.outline, groups, job.example)
    budget = default_budget(
        groups, cost, wanted.budget.macs or 1.0, grid, wanted.balance, job.limits
    )
    if wanted.floor is not None:
        budget = replace(budget, floor=wanted.floor)

    totals = {name: sum(float(own.sum()) for own in scores.values())
              for name, scores in bank.items()}  # fmt: skip
    empty = Scored(groups, cost, budget, per_task, {}, totals)
    scored = replace(empty, fused=_fused(job, empty, per_task, agree, job.kept_share))
    return _rescored(job, scored) if wanted.rescore and job.kept_share < 1 else scored


def _fused(
    job: Job, scored: Scored, per_task: Mapping[str, GroupScores], agree: GroupScores | None,
    share: float,
) -> GroupScores:  # fmt: skip
    """Return the tasks' scores on the groups of ``scored`` as one, by the recipe's rule.

    ``share``: about how much stays of the MACs of the network that the scores are of.
    """
    return fuse(
        per_task,
        {task.name: task.weight for task in job.tasks},
        job.recipe.prune.fusion,
        agreement=agree,
        oracle=lambda trial: _removed(_ranked(job, replace(scored, fused=trial))),
        keep_share=share**0.5,  # MACs go with the square of the widths
    )


def plan_scored(job: Job, scored: Scored) -> PrunePlan:
    """Return the cut by the fused scores, its widths searched for if the recipe says so.

    The search knows of MACs alone; under other limits its judge chooses between sums to keep.
    """
    floors = job.recipe.floors()
    other = bool(job.limits or floors)
    search = job.recipe.judged() if other else job.recipe.searched()
    if search is False:
        return _ranked(job, scored, floors, bounded=True)
    if other:
        budgets = [replace(scored.budget, sharpness=power) for power in SUMS]
        summed = [_ranked(job, replace(scored, budget=budget), floors) for budget in budgets]
        return best_judged(job, search, scored.groups, summed)
    ranked = _ranked(job, scored)
    return searched_plan(
        job, search, scored.groups, scored.cost, scored.fused, ranked, scored.budget,
        scored.per_task,
    )  # fmt: skip


def _rescored(job: Job, scored: Scored) -> Scored:
    """Return what to plan from after half of the cut: its fused scores are of what that leaves.

    What the first half drops scores 0; ``per_task`` stays as it was, of the whole network.
    """
    wanted, groups = job.recipe.prune, scored.groups
    try:
        first, budget = plan_halfway(
            groups, scored.cost, scored.fused, scored.budget, job.kept_share, limits=job.limits,
            floor=wanted.floor, criterion=wanted.criterion, fusion=wanted.fusion,
        )  # fmt: skip
    except PlanError:
        return scored  # the whole cut is further still, and says better what cannot be
    first = replace(first, removed=job.removed)
    per_task, agree = _scores_halfway(job, groups, first)
    fused = _fused(
        job, scored, {task: scores_of_whole(groups, first, own) for task, own in per_task.items()},
        None if agree is None else scores_of_whole(groups, first, agree), job.kept_share**HALF,
    )  # fmt: skip
    balanced = balanced_whole(groups, first, fused, scored.budget.balance)
    return replace(scored, budget=budget, fused=balanced)


def _scores_halfway(
    job: Job, groups: Sequence[ChannelGroup], first: PrunePlan
) -> tuple[dict[str, Scores], Scores | None]:
    """Return each task's scores on what ``first`` leaves, compensated, and how alike tasks are.

    They are made now or found; the last is None where the rule has no need of it.
    """
    wanted, fitted = job.recipe.prune, job.recipe.compensate
    key = (*score_key(job, job.tasks), job.outline_key, first.to_json(),
           fitted and fitted.model_dump())  # fmt: skip
    folder = job.cache.folder("scores_halfway", *key)
    paths = {task.name: folder / wanted.criterion / f"{task.name}.safetensors"
             for task in job.tasks}  # fmt: skip
    if wanted.fusion in NEEDS_AGREEMENT:
        paths[AGREEMENT] = folder / "agreement.safetensors"
    found = {name: load_scores(path) for name, path in paths.items()}
    if any(scores is None for scores in found.values()):
        draft = compensated(job, groups, first, apply_plan(job.selected, groups, first))
        left, stream = groups_after(groups, first), score_stream(job, job.tasks)
        sums = folder / wanted.criterion / STOPPED
        made = score_tasks(draft, left, job.tasks, wanted.criterion, *stream, sums)
        if AGREEMENT in paths:
            data = task_data(draft, job.tasks, *stream, folder / STOPPED)
            made[AGREEMENT] = agreement(draft, left, data)
        for name, path in paths.items():
            save_scores(path, made[name])
        found = dict(made)
    per_task = {name: scores for name, scores in found.items() if scores is not None}
    return per_task, per_task.pop(AGREEMENT, None)


def _ranked(
    job: Job, scored: Scored, floors: Mapping[str, float] | None = None, *, bounded: bool = False
) -> PrunePlan:
    if job.removed:
        floors = {task: floor / _left(scored, task) for task, floor in (floors or {}).items()}
    plan = plan_prune(
        scored.groups, scored.cost, scored.fused, scored.per_task, scored.budget,
        criterion=job.recipe.prune.criterion, fusion=job.recipe.prune.fusion, limits=job.limits,
        floors=floors, bounded=bounded,
    )  # fmt: skip
    return _with_removed(job, scored, plan) if job.removed else plan


def _with_removed(job: Job, scored: Scored, plan: PrunePlan) -> PrunePlan:
    """Return the plan of an outline as one of the selected model, counted from all of that."""
    whole = count_macs(job.selected, job.example)
    lost = {task: 1 - (1 - share) * _left(scored, task) for task, share in plan.lost.items()}
    most = int((job.recipe.prune.budget.macs or 1.0) * whole)
    return replace(plan, removed=job.removed, macs_before=whole, budget_macs=most, lost=lost)


def _left(scored: Scored, task: str) -> float:
    """Return the share of a task's importance (0..1] that lies in the outline."""
    total = scored.totals[task]
    there = sum(float(own.sum()) for own in scored.per_task[task].values())
    return there / total if total > 0 and there > 0 else 1.0


def _removed(plan: PrunePlan) -> dict[str, NDArray[np.bool_]]:
    """Return, per group, a (width,) mask of the channels that the plan drops."""
    return {cut.name: ~np.isin(np.arange(cut.width), cut.kept) for cut in plan.cuts}
