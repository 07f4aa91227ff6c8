"""Plan a cut whose widths were searched for, judged by the cut network after compensation.

The judge adds up, over the tasks, the loss of the refitted network relative to the parent's, on
images that the refit did not see. A task without labels is judged by the distance to the parent's
output, relative to that of the first allocation tried. Under other limits than MACs the judge only
chooses between sums that the exact planner may keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secateur.compensate import RefitSettings, refit
from secateur.core.channels import ChannelGroup
from secateur.core.errors import PlanError
from secateur.core.model import MultiTaskModel, evaluating, model_fingerprint
from secateur.core.plan import PrunePlan
from secateur.core.progress import hidden, track
from secateur.core.task import Task
from secateur.data.loading import Batch, Subset, batches, has_labels, image_batch, spread
from secateur.flow.job import Job
from secateur.flow.recipe import SearchSpec
from secateur.flow.scoring import meaning
from secateur.metrics.kind import kind_of
from secateur.prune import apply_plan, plan_prune, plan_widths
from secateur.prune.budget import ladders
from secateur.prune.costs import macs_limit
from secateur.prune.macs import MacsModel
from secateur.prune.plan import Budget
from secateur.prune.search import search_counts

# (floor, balance beyond the budget's) of the rankings that the search starts from
STARTS = ((0.3, 0.0), (0.2, 0.15), (0.1, 0.25), (0.1, -0.15))
# Powers of the exact planner's sums: a plain one suits rotated streams of transformers best, a
# sharp one convolutions (benchmarks/budget/objective.py).
SUMS = (1.0, 8.0)
Judge = Callable[[Sequence[ChannelGroup], PrunePlan], float]
QUICK = RefitSettings(ridge=0.03, sweeps=2, per_weight=8, samples=(2048, 8192), settle=False)


@dataclass(frozen=True)
class SearchSettings:
    """``tries`` allocations are judged; a group keeps at least ``floor`` of its channels."""

    tries: int = 60
    floor: float = 0.1


def plan_by_search(
    model: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    cost: MacsModel,
    fused: Mapping[str, NDArray[np.float64]],
    budget: Budget,
    images: Tensor,
    judged: Batch,
    settings: SearchSettings,
    *,
    per_task: Mapping[str, Mapping[str, NDArray[np.float64]]] | None = None,
    criterion: str = "-",
    fusion: str = "-",
    seed: int = 0,
) -> PrunePlan:
    """Return the best plan found; which channels go is decided by ``fused`` within each group.

    ``images``: (N, C, H, W) for the refit, without labels; ``judged`` are other images, with the
    targets there are.

    Raises:
        PlanError: the budget is below what the grid allows.
    """
    loss = judge_of(model, images, judged)

    def planned(counts: Sequence[int]) -> PrunePlan:
        return plan_widths(
            groups, cost, fused, counts, budget,
            per_task=per_task or {}, criterion=criterion, fusion=fusion,
        )  # fmt: skip

    def judge(counts: Sequence[int]) -> float:
        return loss(groups, planned(counts))

    starts = _starts(groups, cost, fused, budget, settings.floor)
    grids = [group.step(budget.grid) for group in groups]
    rungs = ladders([fused[group.name] for group in groups], grids, settings.floor)
    found = search_counts(
        rungs, cost, int(budget.macs * cost.macs([g.width for g in groups])), starts, judge,
        tries=settings.tries, seed=seed,
    )  # fmt: skip
    return replace(planned(found.counts), solver="search")


def _starts(
    groups: Sequence[ChannelGroup],
    cost: MacsModel,
    fused: Mapping[str, NDArray[np.float64]],
    budget: Budget,
    least: float,
) -> list[list[int]]:
    """Return the widths of rankings that a budget allows, and of the greatest sums kept.

    No group keeps less than the share ``least`` in them.
    """
    limit = macs_limit(cost, int(budget.macs * cost.macs([group.width for group in groups])))
    starts = [(floor, min(max(budget.balance + more, 0.0), 1.0)) for floor, more in STARTS]
    ways = dict.fromkeys((max(floor, least), balance) for floor, balance in starts)
    if least < starts[-1][0]:
        ways[least, starts[-1][1]] = None
    ranked = [replace(budget, floor=floor, balance=balance) for floor, balance in ways]
    held = max(budget.floor, least)
    summed = [replace(budget, floor=held, sharpness=power) for power in SUMS]
    found: list[list[int]] = []
    for way, limits in [*((way, ()) for way in ranked), *((way, (limit,)) for way in summed)]:
        try:
            plan = plan_prune(groups, cost, fused, {}, way, criterion="-", fusion="-",
                              limits=limits)  # fmt: skip
        except PlanError:
            if way is ranked[-1] and not found:  # the lowest floor: no ranking fits
                raise
            continue
        counts = [len(cut.kept) for cut in plan.cuts]
        if counts not in found:
            found.append(counts)
    return found


def searched_plan(
    job: Job,
    wanted: SearchSpec,
    groups: Sequence[ChannelGroup],
    cost: MacsModel,
    fused: Mapping[str, NDArray[np.float64]],
    ranked: PrunePlan,
    budget: Budget,
    per_task: Mapping[str, Mapping[str, NDArray[np.float64]]],
) -> PrunePlan:
    """Return the searched plan for a recipe, found before or now; ``ranked`` is the plan without.

    Refit and judge draw different training images; labels judge where there are any. A group keeps
    the recipe's floor; without one the search may go below the ranking's.
    """
    usual = SearchSettings(wanted.tries)
    given = job.recipe.prune.floor
    least = min(usual.floor, budget.floor) if given is None else given

    def find() -> Mapping[str, Any]:
        images, judged = _images(job, wanted)
        plan = plan_by_search(
            job.selected, groups, cost, fused, budget, images, judged,
            replace(usual, floor=least), per_task=per_task,
            criterion=ranked.criterion, fusion=ranked.fusion,
        )  # fmt: skip
        return plan.to_json()

    # two rankings may agree on this plan and differ at other widths
    order = {name: np.argsort(-values, kind="stable").tolist() for name, values in fused.items()}
    key = (*judge_key(job, wanted), ranked.to_json(), order, least)
    return PrunePlan.from_json(job.cache.json("search", key, find))


def best_judged(
    job: Job, wanted: SearchSpec, groups: Sequence[ChannelGroup], plans: Sequence[PrunePlan]
) -> PrunePlan:
    """Return the plan whose cut, refitted, the judge likes best; the first of equal ones."""

    def find() -> list[float]:
        loss = job_judge(job, wanted)
        return [loss(groups, plan) for plan in track(plans, "judging the plans", len(plans))]

    if all(plan.cuts == plans[0].cuts for plan in plans):
        return plans[0]
    key = (*judge_key(job, wanted), [plan.to_json() for plan in plans])
    losses = job.cache.json("judged_plans", key, find)
    return plans[int(np.argmin(losses))]


def loss_of_parent(job: Job) -> float:
    """Return what the judge says of the parent: 1 per task with labels, 0 per other, their mean."""
    return len(_labelled(job)) / len(job.tasks)


def judge_key(job: Job, wanted: SearchSpec) -> tuple[Any, ...]:
    """Return what a judgement depends on beside the plans."""
    labelled = [task.name for task in _labelled(job)]
    tasks = [(meaning(task), task.name in labelled) for task in job.selected.tasks]
    return (model_fingerprint(job.selected), wanted.model_dump(), asdict(job.spec),
            job.train.fingerprint, tasks)  # fmt: skip


def _labelled(job: Job) -> list[Task]:
    return [task for task in job.selected.tasks if has_labels(job.train, [task])]


def _images(job: Job, wanted: SearchSpec) -> tuple[Tensor, Batch]:
    """Return (N, C, H, W) images for the refit, and the others to judge by."""
    chosen = spread(job.train, wanted.images)
    judged = [index for number, index in enumerate(chosen) if number % 3]
    batch = next(batches(Subset(job.train, judged), _labelled(job), job.spec, len(judged)))
    return image_batch(job.train, chosen[::3], job.spec), batch


def job_judge(job: Job, wanted: SearchSpec) -> Judge:
    """Return the judge of a job's plans; refit and judge draw different training images."""
    return judge_of(job.selected, *_images(job, wanted))


def judge_of(model: MultiTaskModel, images: Tensor, judged: Batch) -> Judge:
    """Return what says how a plan's cut does after a quick refit on ``images``; less is better."""
    loss = RelativeLoss(model, judged)

    def judge(groups: Sequence[ChannelGroup], plan: PrunePlan) -> float:
        cut = apply_plan(model, groups, plan)
        with hidden():
            return loss(refit(model, cut, groups, plan, images, QUICK))

    return judge


class RelativeLoss:
    """The mean over tasks of a cut network's loss relative to a reference."""

    def __init__(self, parent: MultiTaskModel, judged: Batch) -> None:
        self._judged = judged
        self._kinds = {task.name: kind_of(task) for task in parent.tasks}
        with evaluating(parent):
            self._parent = parent(judged.images)
        self._reference = {
            name: float(self._kinds[name].loss(self._parent[name], target))
            for name, target in judged.targets.items()
        }

    def __call__(self, model: MultiTaskModel) -> float:
        """Return that loss; 1 is the parent's, infinite where a loss is no number."""
        with evaluating(model):
            outputs = model(self._judged.images)
        shares = []
        for name, kind in self._kinds.items():
            if name in self._judged.targets:
                loss = float(kind.loss(outputs[name], self._judged.targets[name]))
            else:
                loss = float(kind.distillation_loss(outputs[name], self._parent[name]))
            if math.isfinite(loss):  # what is no number sets no scale for the others
                self._reference.setdefault(name, loss)
            shares.append(loss / max(self._reference.get(name, 1.0), 1e-9))
        mean = sum(shares) / len(shares)
        return mean if math.isfinite(mean) else math.inf
