"""What a step is judged by: labels, the parent's outputs and, if wanted, its features."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from secateur.core.errors import DataError
from secateur.core.model import ModelInput, MultiTaskModel
from secateur.core.task import Task
from secateur.data.loading import Batch
from secateur.metrics.kind import TaskKind, kind_of
from secateur.recover.features import attention_distance, attention_points, captured
from secateur.recover.settings import TrainSettings
from secateur.recover.teacher import RememberedOutputs


class Objective:
    """Per task ``weight * (task loss + distill * distance to the parent's output)``.

    ``repeats``: the same images come again and again, so that the parent's outputs may be kept;
    ``remembered`` are those of earlier trainings under the same parent.

    Raises:
        DataError: a task has no labels, or features are to be distilled, and there is no parent.
        ModelError: the parent's features cannot be compared with the network's.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        parent: MultiTaskModel | None,
        labelled: Sequence[Task],
        spec: ModelInput,
        settings: TrainSettings,
        accelerator: Accelerator,
        *,
        repeats: bool = False,
        remembered: RememberedOutputs | None = None,
    ) -> None:
        _check_teacher(model, parent, labelled, settings)
        self.model, self.tasks = model, model.tasks
        self.kinds: Mapping[str, TaskKind] = {task.name: kind_of(task) for task in model.tasks}
        # A task without labels learns from the parent alone, at full weight.
        names = {task.name for task in labelled}
        self.distill = {t.name: settings.distill if t.name in names else 1.0 for t in model.tasks}
        self.feature_weight = settings.feature_distill
        self.accelerator, self.device = accelerator, accelerator.device
        self.parent = None
        self.points: tuple[str, ...] = ()
        if parent is not None and (any(self.distill.values()) or self.feature_weight):
            self.parent = copy.deepcopy(parent).to(memory_format=torch.channels_last)
            self.parent = self.parent.to(self.device).eval()
            if self.feature_weight:
                self.points = attention_points(model, self.parent, spec.example())
        self.teacher: Callable[[Tensor], Mapping[str, Tensor]] | None = self.parent
        if repeats and self.parent is not None and not self.points and self.device.type == "cpu":
            self.teacher = remembered or RememberedOutputs(self.parent)

    def __call__(self, network: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return each task's loss, and the features' loss where there is one (both scalars).

        ``network`` is the model given before, prepared for the device.
        """
        images = batch.images.to(self.device).to(memory_format=torch.channels_last)
        with captured(self.model, self.points) as mine:
            outputs = network(images)
        wanted, theirs = self._parent_outputs(images)
        losses = {}
        for task in self.tasks:
            kind, output = self.kinds[task.name], outputs[task.name].float()
            loss = images.new_zeros(())
            if task.name in batch.targets:
                target = batch.targets[task.name].to(self.device)
                loss = loss + task.weight * kind.loss(output, target)
            if wanted:
                distance = kind.distillation_loss(output, wanted[task.name])
                loss = loss + task.weight * self.distill[task.name] * distance
            losses[task.name] = loss
        shared = self.feature_weight * attention_distance(mine, theirs) if self.points else None
        return losses, shared

    def _parent_outputs(self, images: Tensor) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
        if self.parent is None or self.teacher is None:
            return {}, {}
        with (
            torch.no_grad(),
            self.accelerator.autocast(),
            captured(self.parent, self.points) as features,
        ):
            outputs = self.teacher(images)
        return {name: tensor.float() for name, tensor in outputs.items()}, features


def _check_teacher(
    model: MultiTaskModel,
    parent: MultiTaskModel | None,
    labelled: Sequence[Task],
    settings: TrainSettings,
) -> None:
    if parent is not None:
        return
    if len(labelled) < len(model.tasks):
        raise DataError(
            "some task has no labels in the training data, and there is no parent to distil from",
            hint="use a reader with labels",
        )
    if settings.feature_distill:
        raise DataError(
            "features are to be distilled, and there is no parent to distil from",
            hint="give the parent, or set feature_distill to 0",
        )
