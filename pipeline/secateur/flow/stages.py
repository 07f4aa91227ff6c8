"""Each stage of a build, wrapped so that what was finished before is found again."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.bench.accuracy import evaluate, evaluate_model
from secateur.compensate import refit
from secateur.core.channels import ChannelGroup
from secateur.core.errors import BuildError, RecipeError
from secateur.core.files import file_sha256
from secateur.core.model import ModelInput, MultiTaskModel, evaluating, model_fingerprint
from secateur.core.plan import PrunePlan
from secateur.core.task import Task
from secateur.data.loading import batches, has_labels, image_batch, spread
from secateur.data.sample import Reader, Sample
from secateur.data.transforms import Augment, image_tensor
from secateur.flow.cache import load_weights, save_weights
from secateur.flow.job import Job
from secateur.fusion.scores import fuse
from secateur.importance.bank import load_scores, save_scores, score_task
from secateur.lower import export_onnx
from secateur.lower.export import OPSET
from secateur.metrics.delta import Delta, delta
from secateur.metrics.kind import kind_of
from secateur.prune import apply_plan, count_macs, find_groups, macs_model, plan_prune
from secateur.prune.plan import Budget
from secateur.recover import TrainSettings, steps_per_epoch, train
from secateur.runtimes.base import Session

SCORE_BATCH = 8
# Recovery is short: zooms and colour jitter would move batch norm away from deployment's images.
AUGMENTS = {"none": None, "flip": Augment(scale=1.0, jitter=0.0), "full": Augment()}
Scores = dict[str, NDArray[np.float64]]
Metrics = dict[str, dict[str, float]]


class _Subset:
    """Some samples of a reader."""

    def __init__(self, reader: Reader, indices: Sequence[int]) -> None:
        self._reader, self._indices = reader, list(indices)
        self.fingerprint = reader.fingerprint

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def label_names(self) -> frozenset[str]:
        return self._reader.label_names

    def __getitem__(self, index: int) -> Sample:
        return self._reader[self._indices[index]]


def score_bank(job: Job, tasks: Sequence[str]) -> dict[str, Scores]:
    """Return the scores of ``tasks`` on the groups of ``job.scored``, from the bank or made now.

    They are stored per task, so any subset of tasks is planned without another backward pass.
    """
    groups = find_groups(job.scored, job.example)
    scored_key = model_fingerprint(job.scored)
    wanted = job.recipe.prune
    subset = _Subset(job.train, spread(job.train, wanted.images))
    labelled = [task for task in job.scored.tasks if has_labels(job.train, [task])]
    bank: dict[str, Scores] = {}
    for task in job.scored.tasks:
        if task.name not in tasks:
            continue
        key = (scored_key, job.train.fingerprint, _meaning(task), wanted.criterion,
               wanted.images, asdict(job.spec))  # fmt: skip
        path = job.cache.folder("scores", *key) / "scores.safetensors"
        scores = load_scores(path)
        if scores is None:
            shown = [task] if task in labelled else []
            scores = score_task(
                job.scored, groups, task, wanted.criterion,
                partial(batches, subset, shown, job.spec, SCORE_BATCH),
                -(-len(subset) // SCORE_BATCH),
            )  # fmt: skip
            save_scores(path, scores)
        bank[task.name] = scores
    return bank


def scores_for(
    groups: Sequence[ChannelGroup], parent_groups: Sequence[ChannelGroup], scores: Scores
) -> Scores:
    """Carry scores from the whole parent's groups to those of the selected model.

    Dropping heads may split a group or give it another root, so channels are matched by the
    layer and position that makes them.
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
            name, at = where[makers[0].layer, makers[0].indices[channel][0]]
            values[channel] = scores[name][at]
        carried[group.name] = values
    return carried


def make_plan(job: Job, grid: int) -> tuple[tuple[ChannelGroup, ...], PrunePlan]:
    """Score, fuse and plan the cut of the selected model; touches no weight."""
    names = [task.name for task in job.tasks]
    bank = score_bank(job, names)
    parent_groups = find_groups(job.scored, job.example)
    groups = find_groups(job.selected, job.example)
    per_task = {name: scores_for(groups, parent_groups, bank[name]) for name in names}
    wanted = job.recipe.prune
    fused = fuse(per_task, {task.name: task.weight for task in job.tasks}, wanted.fusion)
    cost = macs_model(job.selected, groups, job.example)
    plan = plan_prune(
        groups, cost, fused, per_task,
        Budget(wanted.budget.macs, grid, wanted.floor, wanted.balance),
        criterion=wanted.criterion, fusion=wanted.fusion,
    )  # fmt: skip
    return groups, plan


@dataclass(frozen=True)
class Cut:
    """The cut network after compensation and after recovery, and the steps recovery took."""

    compensated: MultiTaskModel
    recovered: MultiTaskModel
    steps: int
    key: str


def make_cut(job: Job, groups: Sequence[ChannelGroup], plan: PrunePlan) -> Cut:
    """Apply the plan, compensate and recover."""
    pruned = apply_plan(job.selected, groups, plan, job.example)
    _check_surgery(job, pruned, plan)
    refitted = compensated(job, groups, plan, pruned)
    recovered, steps = _recovered(job, plan, refitted)
    return Cut(refitted, recovered, steps, model_fingerprint(recovered))


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
    job: Job, groups: Sequence[ChannelGroup], plan: PrunePlan, pruned: MultiTaskModel
) -> MultiTaskModel:
    """Return ``pruned`` refitted on unlabelled training images, if the recipe says so."""
    wanted = job.recipe.compensate
    if wanted is False:
        return pruned
    images = image_batch(job.train, spread(job.train, wanted.images), job.spec)
    return refit(job.selected, pruned, groups, plan, images, ridge=wanted.ridge)


def _recovered(job: Job, plan: PrunePlan, model: MultiTaskModel) -> tuple[MultiTaskModel, int]:
    wanted = job.recipe.recover
    if wanted == "none":
        return model, 0
    settings = TrainSettings(
        epochs=wanted.epochs,
        batch_size=wanted.batch_size,
        learning_rate=wanted.learning_rate,
        distill=wanted.distill,
        seed=wanted.seed,
    )
    key = (job.parent_key, asdict(plan)["cuts"], str(job.recipe.compensate),
           job.train.fingerprint, wanted.model_dump(), asdict(job.spec),
           [(_meaning(task), task.weight) for task in job.tasks])  # fmt: skip
    folder = job.cache.folder("recover", *key)
    recovered = copy.deepcopy(model)
    steps = wanted.epochs * steps_per_epoch(len(job.train), wanted.batch_size)
    if load_weights(folder / "weights.safetensors", recovered):
        return recovered, steps
    result = train(
        model, job.train, job.spec, settings,
        parent=job.selected, augment=AUGMENTS[wanted.augment],
        checkpoint=folder, title="recovering",
    )  # fmt: skip
    save_weights(folder / "weights.safetensors", result.model)
    (folder / "state.pt").unlink(missing_ok=True)
    return result.model, steps


def torch_accuracy(job: Job, model: MultiTaskModel, title: str) -> Metrics:
    """Return a torch model's metrics on the evaluation data."""
    key = (model_fingerprint(model), *_eval_key(job))
    metrics: Metrics = job.cache.json(
        "accuracy", key, lambda: evaluate_model(model, job.eval, job.spec, title=title)
    )
    return metrics


def session_accuracy(job: Job, session: Session, onnx: Path, title: str) -> Metrics:
    """Return a runtime's metrics on the evaluation data."""

    def predict(images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        outputs = session.run(images.numpy())
        return {name: torch.from_numpy(array) for name, array in outputs.items()}

    metrics: Metrics = job.cache.json(
        "accuracy", (file_sha256(onnx), *_eval_key(job)),
        lambda: evaluate(predict, job.tasks, job.eval, job.spec, title=title),
    )  # fmt: skip
    return metrics


def _eval_key(job: Job) -> tuple[Any, ...]:
    return (job.eval.fingerprint, asdict(job.spec), [_meaning(task) for task in job.tasks])


def _meaning(task: Task) -> dict[str, Any]:
    """Return what of a task changes its scores and metrics (how much may be lost does not)."""
    return {k: v for k, v in asdict(task).items() if k not in ("max_drop", "weight")}


def exported(job: Job, model: MultiTaskModel, key: str) -> Path:
    """Return an ONNX file of ``model``, made now or found."""
    outputs = [(task.name, task.output) for task in job.tasks]
    path = job.cache.folder("onnx", key, outputs, asdict(job.spec), OPSET) / "model.onnx"
    if not path.exists():
        export_onnx(model, job.example, path)
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
        if task.max_drop is not None and -result.per_task[task.name] > task.max_drop
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
