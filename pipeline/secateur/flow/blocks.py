"""Which residual blocks go whole, so that the channels of the others may stay.

Scores of channels do not add up to that of a block, so it is tried: the network without a block,
its others refitted, is judged as allocations are. Blocks then go in the order of what a removal
harms for what it saves, as long as the cut that the budgets still ask for is judged the better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from secateur.core.channels import ChannelGroup
from secateur.core.errors import PlanError
from secateur.core.plan import PrunePlan
from secateur.core.progress import hidden, track
from secateur.flow.allocation import Judge, job_judge, judge_key, loss_of_parent
from secateur.flow.job import Job
from secateur.flow.recipe import SearchSpec
from secateur.prune import macs_model
from secateur.prune.blocks import find_blocks
from secateur.prune.plan import Budget, plan_widths

PATIENCE = 2  # removals in a row that are judged worse end the search


@dataclass(frozen=True)
class Outline:
    """A job's outline: its groups, and ``over``, how many times its budgets it spends uncut.

    ``plan`` makes the plan that fits them, or raises PlanError.
    """

    groups: Sequence[ChannelGroup]
    over: float
    plan: Callable[[], PrunePlan]


def without_least(job: Job, outline_of: Callable[[Job], Outline]) -> Job:
    """Return the job without the blocks whose removal leaves the best cut within its budgets.

    Raises:
        PlanError: no removal leaves a network that can be cut to the budgets.
    """
    wanted = job.recipe.judged() or SearchSpec()

    def find() -> list[str]:
        blocks = find_blocks(job.selected, job.example)
        judge = job_judge(job, wanted)
        whole = outline_of(job)
        with suppress(PlanError):  # the first that is judged sets the scale of tasks without labels
            judge(whole.groups, whole.plan())
        order = _by_harm(job, blocks, judge, outline_of, whole.over)
        return _best_prefix(job, order, judge, outline_of)

    key = (*judge_key(job, wanted), job.recipe.prune.model_dump(mode="json"), job.recipe.floors())
    return replace(job, removed=tuple(job.cache.json("blocks", key, find)))


def _by_harm(
    job: Job, blocks: Sequence[str], judge: Judge, outline_of: Callable[[Job], Outline],
    whole: float,
) -> list[str]:  # fmt: skip
    """Return the blocks in the order of loss per share of the budgets' cost that they save."""
    harm: dict[str, float] = {}
    for block in track(blocks, "trying to remove blocks", len(blocks)):
        with hidden():
            trial = replace(job, removed=(block,))
            outline = outline_of(trial)
            saved = 1 - outline.over / whole
            if saved > 0:
                loss = judge(outline.groups, _uncut(trial, outline))
                harm[block] = (loss - loss_of_parent(job)) / saved
    return sorted(harm, key=harm.__getitem__)


def _best_prefix(
    job: Job, order: Sequence[str], judge: Judge, outline_of: Callable[[Job], Outline]
) -> list[str]:
    """Return as many of the first blocks as the cut within the budgets is the better for."""
    losses: list[float] = []
    reason: PlanError | None = None
    for count in track(range(len(order) + 1), "planning without blocks", len(order) + 1):
        with hidden():
            outline = outline_of(replace(job, removed=tuple(order[:count])))
            try:
                losses.append(judge(outline.groups, outline.plan()))
            except PlanError as error:  # more removals may make room
                losses.append(np.inf)
                reason = reason or error
        best = int(np.argmin(losses))
        if np.isfinite(losses[best]) and count - best >= PATIENCE:
            break
    if reason is not None and not np.isfinite(min(losses)):
        raise reason
    return list(order[: int(np.argmin(losses))])


def _uncut(job: Job, outline: Outline) -> PrunePlan:
    """Return the plan that removes the job's blocks and keeps every channel of the others."""
    widths = [group.width for group in outline.groups]
    alike: dict[str, Any] = {group.name: np.ones(group.width) for group in outline.groups}
    cost = macs_model(job.outline, outline.groups, job.example)
    plan = plan_widths(outline.groups, cost, alike, widths, Budget(1.0), per_task={},
                       criterion="-", fusion="-")  # fmt: skip
    return replace(plan, removed=job.removed)
