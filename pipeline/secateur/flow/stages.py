"""Each stage of a build, wrapped so that what was finished before is found again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secateur.compensate import RefitSettings, refit, views
from secateur.core.channels import ChannelGroup
from secateur.core.errors import BuildError, PlanError, RecipeError
from secateur.core.model import ModelInput, MultiTaskModel, evaluating, model_fingerprint
from secateur.core.plan import PrunePlan
from secateur.core.task import Task
from secateur.data.loading import Batch, Subset, batches, has_labels, image_batch, spread
from secateur.data.transforms import image_tensor
from secateur.flow.allocation import SUMS, best_judged, searched_plan
from secateur.flow.cache import StageCache
from secateur.flow.job import Job
from secateur.flow.recovery import forgets_weights, made_worse, recovered
from secateur.flow.scoring import meaning, session_scores, torch_scores
from secateur.fusion.scores import NEEDS_AGREEMENT, GroupScores, fuse, rule_of
from secateur.importance.agreement import agreement
from secateur.importance.bank import load_scores, save_scores, score_tasks, task_data
from secateur.lower import export_onnx
from secateur.lower.export import FORM, OPSET
from secateur.metrics.delta import Delta, delta
from secateur.metrics.kind import kind_of
from secateur.prune import (
    MacsModel,
    apply_plan,
    count_macs,
    find_groups,
    macs_model,
    plan_prune,
    without_masks,
)
from secateur.prune.plan import Budget, default_budget
from secateur.runtimes.base import Session

SCORE_BATCH = 8
# Memory of the refit goes with pixels, and so does the number of equations: large inputs need
# fewer images for as much of both (128 images at 192x256).
REFIT_PIXELS = 6_300_000
FEW_IMAGES = 96  # fewer than these are also shown mirrored and enlarged
Scores = dict[str, NDArray[np.float64]]
Metrics = dict[str, dict[str, float]]


def score_bank(job: Job, tasks: Sequence[str], criterion: str | None = None) -> dict[str, Scores]:
    """Return the scores of ``tasks`` on the groups of ``job.scored``, from the bank or made now.

    They are stored per task, so any subset of tasks is planned without another backward pass.
    The recipe's criterion gives them unless another is named.
    """
    criterion = criterion or job.recipe.prune.criterion
    paths = {
        task: job.cache.folder("scores", *score_key(job, [task]), criterion) / "scores.safetensors"
        for task in job.scored.tasks
        if task.name in tasks
    }
    bank = {task.name: load_scores(path) for task, path in paths.items()}
    missing = [task for task in paths if bank[task.name] is None]
    if missing:
        groups = find_groups(job.scored, job.example)
        made = score_tasks(job.scored, groups, missing, criterion, *score_stream(job, missing))
        for task in missing:
            save_scores(paths[task], made[task.name])
            bank[task.name] = made[task.name]
    return {name: scores for name, scores in bank.items() if scores is not None}


def score_key(job: Job, tasks: Sequence[Task]) -> tuple[Any, ...]:
    """Return what anything read from the tasks' gradients on the training images depends on."""
    return (model_fingerprint(job.scored), job.train.fingerprint,
            [meaning(task) for task in tasks],
            job.recipe.prune.images, asdict(job.spec))  # fmt: skip


def score_stream(job: Job, tasks: Sequence[Task]) -> tuple[Callable[[], Iterable[Batch]], int]:
    """Return the batches that importance is read from, and how many they are."""
    subset = Subset(job.train, spread(job.train, job.recipe.prune.images))
    labelled = [task for task in tasks if has_labels(job.train, [task])]
    stream = partial(batches, subset, labelled, job.spec, SCORE_BATCH)
    return stream, -(-len(subset) // SCORE_BATCH)


def task_agreement(job: Job, groups: Sequence[ChannelGroup]) -> Scores:
    """Return how alike the kept tasks' gradients are, 0..1, on the parent's groups."""
    folder = job.cache.folder("agreement", *score_key(job, job.tasks))
    found = load_scores(folder / "scores.safetensors")
    if found is None:
        data = task_data(job.scored, job.tasks, *score_stream(job, job.tasks))
        found = agreement(job.scored, groups, data)
        save_scores(folder / "scores.safetensors", found)
    return found


def scores_for(
    groups: Sequence[ChannelGroup],
    parent_groups: Sequence[ChannelGroup],
    scores: GroupScores,
    missing: float | None = None,
) -> Scores:
    """Carry scores from the whole parent's groups to those of the selected model.

    Dropping heads may split a group or give it another root, so channels are matched by the
    layer and position that makes them. ``missing`` is for channels that ``parent_groups`` lack,
    which those of a whole parent never do.
    """
    where = {
        (member.layer, place): (group.name, channel)
        for group in parent_groups
        for member in group.members
        if member.axis == "out"
        for channel, places in enumerate(member.indices)
        for place in places
    }
    carried = {}
    for group in groups:
        makers = [member for member in group.members if member.axis == "out"]
        values = np.zeros(group.width)
        for channel in range(group.width):
            places = [(maker.layer, maker.indices[channel][0]) for maker in makers]
            found = next((where[place] for place in places if place in where), None)
            if found is None and missing is None:
                raise KeyError(places)
            values[channel] = scores[found[0]][found[1]] if found else missing
        carried[group.name] = values
    return carried


@dataclass(frozen=True)
class Scored:
    """What a cut is planned from, by ``groups`` of the job's outline.

    ``per_task`` and ``fused`` are (width,) scores per group; ``totals`` is per task the sum of its
    scores over the whole parent.
    """

    groups: tuple[ChannelGroup, ...]
    cost: MacsModel
    budget: Budget
    per_task: Mapping[str, GroupScores]
    fused: GroupScores
    totals: Mapping[str, float]


def make_plan(job: Job, grid: int) -> tuple[tuple[ChannelGroup, ...], PrunePlan]:
    """Score, fuse and plan the cut of the selected model; touches no weight."""
    scored = score_channels(job, grid)
    return scored.groups, plan_scored(job, scored)


def score_channels(job: Job, grid: int) -> Scored:
    """Score the selected model's channels for every kept task, and fuse the tasks' scores."""
    wanted = job.recipe.prune
    rule_of(wanted.fusion)  # a wrong name is told before the scoring
    bank = score_bank(job, [task.name for task in job.tasks])
    parent_groups = find_groups(job.scored, job.example)
    groups = find_groups(job.outline, job.example)
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
    fused = fuse(
        per_task,
        {task.name: task.weight for task in job.tasks},
        wanted.fusion,
        agreement=agree,
        oracle=lambda trial: _removed(_ranked(job, replace(empty, fused=trial))),
        keep_share=job.kept_share**0.5,  # MACs go with the square of the widths
    )
    return replace(empty, fused=fused)


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


@dataclass(frozen=True)
class Cut:
    """The cut network after compensation and after recovery, and the steps recovery took.

    ``undone``: recovery made it worse, so ``recovered`` is the compensated one, after no steps.
    """

    compensated: MultiTaskModel
    recovered: MultiTaskModel
    steps: int
    key: str
    undone: bool = False


def make_cut(job: Job, groups: Sequence[ChannelGroup], plan: PrunePlan) -> Cut:
    """Apply the plan, compensate and recover."""
    return finish_cut(job, plan, begin_cut(job, groups, plan))


def begin_cut(job: Job, groups: Sequence[ChannelGroup], plan: PrunePlan) -> MultiTaskModel:
    """Apply the plan and compensate."""
    pruned = apply_plan(job.selected, groups, plan)
    _check_surgery(job, pruned, plan)
    return pruned if forgets_weights(job) else compensated(job, groups, plan, pruned)


def finish_cut(
    job: Job, plan: PrunePlan, begun: MultiTaskModel, origin: str = "", *, inherited: bool = False
) -> Cut:
    """Recover the cut; ``recovered`` says the rest. Zeros that masks hold stay, the masks go."""
    final, steps = recovered(job, plan, begun, origin, inherited=inherited)
    worse = bool(steps) and made_worse(job, begun, final)
    begun, final = without_masks(begun), without_masks(final)
    if worse:
        return Cut(begun, begun, 0, model_fingerprint(begun), undone=True)
    return Cut(begun, final, steps, model_fingerprint(final))


def _check_surgery(job: Job, pruned: MultiTaskModel, plan: PrunePlan) -> None:
    """Compare the cut with its plan before any time is spent on it.

    Raises:
        BuildError: its MACs are not the plan's, or an output changed its shape.
    """
    counted = count_macs(pruned, job.example)
    if counted != plan.macs_after:
        raise BuildError(
            f"the cut model has {counted} MACs, the plan said {plan.macs_after}",
            hint="report this with the recipe: the cost model missed a layer",
        )
    with evaluating(pruned):
        before, after = job.selected(job.example), pruned(job.example)
    for name, tensor in before.items():
        if tensor.shape != after[name].shape:
            raise BuildError(
                f"task '{name}' has shape {tuple(after[name].shape)} after the cut, expected "
                f"{tuple(tensor.shape)}",
                hint="report this with the recipe: an output layer was not protected",
            )


def compensated(
    job: Job, groups: Sequence[ChannelGroup], plan: PrunePlan, pruned: MultiTaskModel,
    whole: MultiTaskModel | None = None,
) -> MultiTaskModel:  # fmt: skip
    """Return ``pruned``, cut from ``whole`` (``job.selected``), refitted if the recipe says so."""
    wanted = job.recipe.compensate
    if wanted is False:
        return pruned
    settings = RefitSettings(ridge=wanted.ridge)
    return refit(whole or job.selected, pruned, groups, plan, refit_images(job), settings)


def refit_images(job: Job) -> Tensor:
    """Return the (N, C, H, W) training images that compensation is fitted on."""
    images = image_batch(job.train, refit_indices(job), job.spec)
    return views(images) if len(images) < FEW_IMAGES else images


def refit_indices(job: Job) -> list[int]:
    """Return which training images compensation is fitted on; none where there is no such step."""
    wanted = job.recipe.compensate
    if wanted is False:
        return []
    count = min(wanted.images, REFIT_PIXELS // (job.spec.height * job.spec.width))
    return spread(job.train, max(count, 2))


def torch_accuracy(job: Job, model: MultiTaskModel, title: str) -> Metrics:
    """Return a torch model's metrics on the evaluation data."""
    return torch_scores(job, model, title).metrics


def session_accuracy(job: Job, session: Session, model: Path, title: str) -> Metrics:
    """Return a runtime's metrics on the evaluation data; ``session`` has opened ``model``."""
    return session_scores(job, session, model, title).metrics


def exported(job: Job, model: MultiTaskModel, key: str) -> Path:
    """Return an ONNX file of ``model``, made now or found."""
    return onnx_file(model, job.spec, job.cache, key)


def onnx_file(model: MultiTaskModel, spec: ModelInput, cache: StageCache, key: str) -> Path:
    """Return an ONNX file of a model whose weights ``key`` names, made now or found."""
    outputs = [(task.name, task.output) for task in model.tasks]
    path = cache.folder("onnx", key, outputs, asdict(spec), OPSET, FORM) / "model.onnx"
    if not path.exists():
        export_onnx(model, spec.example(), path)
    return path


def change(job: Job, parent: Metrics, other: Metrics) -> Delta:
    """Return ΔT of ``other`` against the parent over the kept tasks."""
    higher = {task.name: kind_of(task).higher_is_better for task in job.tasks}
    return delta(parent, other, higher)


def too_low(job: Job, result: Delta) -> tuple[str, ...]:
    """Return the tasks that lost more than their ``max_drop``."""
    return tuple(
        task.name
        for task in job.tasks
        if task.max_drop is not None
        and not -result.per_task[task.name] <= task.max_drop  # NaN is too low
    )


def check_evaluable(job: Job) -> None:
    """Raise when the evaluation data carry no labels for a kept task.

    Raises:
        RecipeError: without them no accuracy can be stated, and no task guarded.
    """
    for task in job.tasks:
        if not has_labels(job.eval, [task]):
            raise RecipeError(
                f"data.eval has no label '{task.label}' for task '{task.name}'; it has "
                f"{', '.join(sorted(job.eval.label_names)) or 'none'}",
                hint="evaluation needs labels; a few dozen labelled images are enough",
            )


def plain_image(job: Job, index: int) -> NDArray[np.uint8]:
    """Return an evaluation image at the input's size as (H, W, 3) uint8 RGB."""
    spec = ModelInput(3, job.spec.height, job.spec.width, (0, 0, 0), (1 / 255,) * 3)
    pixels = image_tensor(job.eval[index].image, spec).numpy().transpose(1, 2, 0)
    return np.ascontiguousarray(pixels.round().astype(np.uint8))
