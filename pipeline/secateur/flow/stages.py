"""The cut itself, and what is made and said of it; what was finished before is found again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.core.channels import ChannelGroup
from secateur.core.errors import BuildError, RecipeError
from secateur.core.files import file_sha256, write_text
from secateur.core.model import ModelInput, MultiTaskModel, evaluating, model_fingerprint
from secateur.core.plan import PrunePlan
from secateur.data.loading import has_labels
from secateur.data.transforms import image_tensor
from secateur.flow.cache import StageCache
from secateur.flow.job import Job
from secateur.flow.joint import Joint, refit_jointly
from secateur.flow.recovery import forgets_weights, made_worse, recovered
from secateur.flow.refit import compensated
from secateur.flow.scoring import session_scores, torch_scores
from secateur.lower import export_onnx
from secateur.lower.export import FORM, OPSET
from secateur.metrics.delta import Delta, delta
from secateur.metrics.kind import kind_of
from secateur.prune import (
    apply_plan,
    count_macs,
    without_masks,
)
from secateur.runtimes.base import Session

Metrics = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Cut:
    """The cut network after compensation and after recovery, and the steps recovery took.

    ``undone``: recovery made it worse, so ``recovered`` is the compensated one, after no steps.
    ``joint`` says what became of the refit of all layers together, where that was wanted.
    """

    compensated: MultiTaskModel
    recovered: MultiTaskModel
    steps: int
    key: str
    undone: bool = False
    joint: str = ""


def begin_cut(job: Job, groups: Sequence[ChannelGroup], plan: PrunePlan) -> MultiTaskModel:
    """Apply the plan and compensate."""
    pruned = apply_plan(job.selected, groups, plan)
    _check_surgery(job, pruned, plan)
    return pruned if forgets_weights(job) else compensated(job, groups, plan, pruned)


def finish_cut(
    job: Job,
    plan: PrunePlan,
    begun: MultiTaskModel,
    origin: str = "",
    *,
    inherited: bool = False,
    joint: bool = True,
) -> Cut:
    """Recover the cut; ``recovered`` says the rest. Zeros that masks hold stay, the masks go.

    Where no recovery follows, compensation ends with a refit of all layers together, unless
    ``joint`` is False: towards the parent, it would undo what a neighbour's weights have learnt.
    """
    together = refit_jointly(job, plan, begun, origin) if joint else Joint(begun)
    begun = together.model
    final, steps = recovered(job, plan, begun, origin, inherited=inherited)
    worse = bool(steps) and made_worse(job, begun, final)
    begun, final = without_masks(begun), without_masks(final)
    if worse:
        return Cut(begun, begun, 0, model_fingerprint(begun), undone=True)
    return Cut(begun, final, steps, model_fingerprint(final), joint=together.told)


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
    digest = path.with_suffix(".sha256")
    if not (path.exists() and digest.exists() and digest.read_text() == file_sha256(path)):
        export_onnx(model, spec.example(), path)
        write_text(digest, file_sha256(path))
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
