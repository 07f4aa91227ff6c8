"""Plan a cut whose widths were searched for, judged by the cut network after compensation.

The judge adds up, over the tasks, the loss of the refitted network relative to the parent's, on
images that the refit did not see. A task without labels is judged by the distance to the parent's
output, relative to that of the first allocation tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from secateur.core.progress import hidden
from secateur.data.loading import Batch, Subset, batches, has_labels, image_batch, spread
from secateur.flow.job import Job
from secateur.flow.recipe import SearchSpec
from secateur.metrics.kind import kind_of
from secateur.prune import apply_plan, plan_prune, plan_widths
from secateur.prune.budget import ladders
from secateur.prune.macs import MacsModel
from secateur.prune.plan import Budget
from secateur.prune.search import search_counts

# (floor, balance) of the rankings that the search starts from
STARTS = ((0.3, 0.65), (0.2, 0.8), (0.1, 0.9), (0.1, 0.5))
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
    loss = RelativeLoss(model, judged)

    def planned(counts: Sequence[int]) -> PrunePlan:
        return plan_widths(
            groups, cost, fused, counts, budget,
            per_task=per_task or {}, criterion=criterion, fusion=fusion,
        )  # fmt: skip

    def judge(counts: Sequence[int]) -> float:
        plan = planned(counts)
        cut = apply_plan(model, groups, plan, images[:1])
        with hidden():
            return loss(refit(model, cut, groups, plan, images, QUICK))

    starts = _starts(groups, cost, fused, budget)
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
    """Return the searched plan for a recipe, found before or now; ``ranked`` is one of its starts.

    Refit and judge draw different training images; labels judge where there are any.
    """
    chosen = spread(job.train, wanted.images)
    refitted = chosen[::3]
    judged = [index for number, index in enumerate(chosen) if number % 3]
    labelled = [task for task in job.selected.tasks if has_labels(job.train, [task])]

    def find() -> Mapping[str, Any]:
        batch = next(batches(Subset(job.train, judged), labelled, job.spec, len(judged)))
        plan = plan_by_search(
            job.selected, groups, cost, fused, budget,
            image_batch(job.train, refitted, job.spec), batch,
            SearchSettings(wanted.tries), per_task=per_task,
            criterion=ranked.criterion, fusion=ranked.fusion,
        )  # fmt: skip
        return plan.to_json()

    # two rankings may agree on this plan and differ at other widths
    order = {name: np.argsort(-values, kind="stable").tolist() for name, values in fused.items()}
    key = (model_fingerprint(job.selected), ranked.to_json(), wanted.model_dump(), asdict(job.spec),
           job.train.fingerprint, [task.name for task in labelled], order)  # fmt: skip
    return PrunePlan.from_json(job.cache.json("search", key, find))


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
        """Return that loss; 1 is the parent's."""
        with evaluating(model):
            outputs = model(self._judged.images)
        shares = []
        for name, kind in self._kinds.items():
            if name in self._judged.targets:
                loss = float(kind.loss(outputs[name], self._judged.targets[name]))
            else:
                loss = float(kind.distillation_loss(outputs[name], self._parent[name]))
            shares.append(loss / max(self._reference.setdefault(name, loss), 1e-9))
        return sum(shares) / len(shares)
