"""Scores measured again on what a milder cut leaves (``prune.stages``).

Scores of the whole parent say what a channel does beside all others. After a large cut that is
another network, so channels are scored again on the way, as iterative schedules do between their
trainings (Molchanov et al., arXiv 1906.10771, section 3.2); here a refit takes training's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secateur.compensate import RefitSettings, refit
from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.core.plan import PrunePlan, groups_after
from secateur.flow.job import Job
from secateur.flow.stages import (
    Scored,
    ranked_plan,
    refit_images,
    score_key,
    score_stream,
    with_fused,
)
from secateur.importance.bank import load_scores, save_scores, score_tasks
from secateur.importance.criterion import Scores
from secateur.prune import apply_plan
from secateur.prune.plan import default_budget

Score = Callable[
    [MultiTaskModel, Sequence[ChannelGroup]], Mapping[str, Mapping[str, NDArray[np.float64]]]
]


def rescored(job: Job, scored: Scored) -> Scored:
    """Return ``scored`` with scores fused anew after each stage but the last.

    Stages fall geometrically in MACs. What tasks are said to lose still goes by their scores on
    the parent.
    """
    now, stages = scored, job.recipe.prune.stages
    for number in range(1, stages):
        milder = replace(job, limits=(), kept_share=job.kept_share ** (number / stages))
        budget = default_budget(
            scored.groups, scored.cost, milder.kept_share, scored.budget.grid,
            job.recipe.prune.balance,
        )  # fmt: skip
        if job.recipe.prune.floor is not None:
            budget = replace(budget, floor=job.recipe.prune.floor)
        plan = ranked_plan(milder, replace(now, budget=budget))
        found = _scores_after(job, scored.groups, plan)
        now = with_fused(milder, replace(scored, per_task=found, budget=budget))
    return replace(scored, fused=now.fused)


def _scores_after(job: Job, groups: Sequence[ChannelGroup], plan: PrunePlan) -> dict[str, Scores]:
    """Return each kept task's scores on what the plan leaves, from the cache or made now."""
    wanted, criterion = job.recipe.compensate, job.recipe.prune.criterion
    refitted = wanted and wanted.model_dump()
    folder = job.cache.folder(
        "rescored", *score_key(job, job.tasks), criterion, job.outline_key, refitted,
        [(cut.name, cut.kept) for cut in plan.cuts],
    )  # fmt: skip
    bank = {task.name: load_scores(folder / f"{task.name}.safetensors") for task in job.tasks}
    if all(scores is not None for scores in bank.values()):
        return {name: scores for name, scores in bank.items() if scores is not None}

    def score(model: MultiTaskModel, left: Sequence[ChannelGroup]) -> dict[str, Scores]:
        stream = score_stream(job, job.tasks)
        return score_tasks(model, left, job.tasks, criterion, *stream)

    images = refit_images(job) if wanted else None
    settings = RefitSettings(ridge=wanted.ridge) if wanted else RefitSettings()
    found = scores_after(job.selected, groups, plan, images, settings, score)
    for name, scores in found.items():
        save_scores(folder / f"{name}.safetensors", scores)
    return found


def scores_after(
    model: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    plan: PrunePlan,
    images: Tensor | None,
    settings: RefitSettings,
    score: Score,
) -> dict[str, Scores]:
    """Return (width,) scores per task and group, measured by ``score`` on what ``plan`` leaves.

    ``groups`` are those of ``model`` without the blocks that the plan removes. What is left is
    refitted on (N, C, H, W) ``images`` first, unless there are none. Channels that the plan drops
    score 0.
    """
    left = apply_plan(model, groups, plan)
    if images is not None:
        left = refit(model, left, groups, plan, images, settings)
    found = score(left.eval(), groups_after(groups, plan))
    kept = {cut.name: list(cut.kept) for cut in plan.cuts}
    whole: dict[str, Scores] = {}
    for task, scores in found.items():
        whole[task] = {group.name: np.zeros(group.width) for group in groups}
        for name, values in scores.items():
            whole[task][name][kept[name]] = values
    return whole
