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
from torch import Tensor

from secateur.core.channels import ChannelGroup
from secateur.core.errors import PlanError
from secateur.core.model import MultiTaskModel
from secateur.core.plan import PrunePlan
from secateur.core.progress import hidden, track
from secateur.flow.allocation import Judge, job_judge, judge_key, loss_of_parent
from secateur.flow.job import Job
from secateur.flow.recipe import SearchSpec
from secateur.prune import macs_model
from secateur.prune.blocks import find_blocks, without_blocks
from secateur.prune.plan import Budget, plan_widths

PATIENCE = 2  # removals in a row that are judged worse end the search


@dataclass(frozen=True)
class Outline:
    """The network without some blocks: its groups, and ``over``, how often it spends its budgets.

    ``plan`` makes the plan that fits them, or raises PlanError.
    """

    groups: Sequence[ChannelGroup]
    over: float
    plan: Callable[[], PrunePlan]


OutlineOf = Callable[[tuple[str, ...]], Outline]


def without_least(job: Job, outline_of: Callable[[Job], Outline], by: Sequence[Any]) -> Job:
    """Return the job without the blocks whose removal leaves the best cut within its budgets.

    ``by`` is what ``outline_of`` plans by beside the recipe: what was found by other than that is
    no answer.

    Raises:
        PlanError: no removal leaves a network that can be cut to the budgets.
    """
    wanted = job.recipe.judged() or SearchSpec()

    def find() -> list[str]:
        removed = best_removal(
            job.selected, job.example, job_judge(job, wanted), loss_of_parent(job),
            lambda blocks: outline_of(replace(job, removed=blocks)),
        )  # fmt: skip
        return list(removed)

    weights = [(task.name, task.weight) for task in job.tasks]
    key = (*judge_key(job, wanted), job.recipe.prune.model_dump(mode="json"), job.recipe.floors(),
           weights, list(by))  # fmt: skip
    return replace(job, removed=tuple(job.cache.json("blocks", key, find)))


def best_removal(
    model: MultiTaskModel,
    example: Tensor,
    judge: Judge,
    unharmed: float,
    outline_of: OutlineOf,
) -> tuple[str, ...]:
    """Return the blocks of ``model`` whose removal leaves the best cut within the budgets.

    ``unharmed`` is what the judge would say of the model itself; ``example``: (N, C, H, W).

    Raises:
        PlanError: no removal leaves a network that can be cut to the budgets.
    """
    whole = outline_of(())
    with suppress(PlanError):  # the first that is judged sets the scale of tasks without labels
        judge(whole.groups, whole.plan())
    harm: dict[str, float] = {}
    blocks = find_blocks(model, example)
    for block in track(blocks, "trying to remove blocks", len(blocks)):
        with hidden():
            outline = outline_of((block,))
            saved = 1 - outline.over / whole.over
            if saved > 0:
                loss = judge(outline.groups, _uncut(model, example, block, outline.groups))
                harm[block] = (loss - unharmed) / saved
    return _best_prefix(sorted(harm, key=harm.__getitem__), judge, outline_of)


def _best_prefix(order: Sequence[str], judge: Judge, outline_of: OutlineOf) -> tuple[str, ...]:
    """Return as many of the first blocks as the cut within the budgets is the better for."""
    losses: list[float] = []
    reason: PlanError | None = None
    for count in track(range(len(order) + 1), "planning without blocks", len(order) + 1):
        with hidden():
            outline = outline_of(tuple(order[:count]))
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
    return tuple(order[: int(np.argmin(losses))])


def _uncut(
    model: MultiTaskModel, example: Tensor, block: str, groups: Sequence[ChannelGroup]
) -> PrunePlan:
    """Return the plan that removes the block and keeps every channel of the others."""
    cost = macs_model(without_blocks(model, [block]), groups, example)
    widths = [group.width for group in groups]
    alike = {group.name: np.ones(group.width) for group in groups}
    plan = plan_widths(groups, cost, alike, widths, Budget(1.0), per_task={}, criterion="-",
                       fusion="-")  # fmt: skip
    return replace(plan, removed=(block,))
