"""Semantic segmentation: cross-entropy; mean IoU and pixel accuracy in percent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.classification import multiclass_confusion_matrix

from secateur.core.task import Task
from secateur.metrics.kind import TaskKind, class_count, resized


class Segmentation:
    """Outputs (N, classes, h, w) logits; targets (N, H, W) int64."""

    higher_is_better: Mapping[str, bool] = {"miou": True, "pixel_accuracy": True}

    def __init__(self, classes: int, ignore_index: int) -> None:
        self.classes, self.ignore_index = classes, ignore_index

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        logits = resized(output, target)
        total = functional.cross_entropy(
            logits, target, ignore_index=self.ignore_index, reduction="sum"
        )
        return total / (target != self.ignore_index).sum().clamp(min=1)

    def distillation_loss(self, output: Tensor, parent: Tensor) -> Tensor:
        divergence = functional.kl_div(
            output.log_softmax(1), parent.log_softmax(1), log_target=True, reduction="none"
        )
        return divergence.sum(1).mean()

    def sample_target(self, parent: Tensor, generator: torch.Generator) -> Tensor:
        rows = parent.softmax(1).permute(0, 2, 3, 1)  # (N, h, w, classes)
        drawn = torch.multinomial(rows.reshape(-1, self.classes), 1, generator=generator)
        return drawn.reshape(rows.shape[:3])

    def evaluator(self) -> SegmentationEvaluator:
        return SegmentationEvaluator(self.classes, self.ignore_index)


class SegmentationEvaluator:
    """Sums each class's hits, predicted and true pixels; IoU is averaged over those that occur."""

    def __init__(self, classes: int, ignore_index: int) -> None:
        self.classes, self.ignore_index = classes, ignore_index
        self.sums = torch.zeros(3, classes, dtype=torch.float64)

    def update(self, output: Tensor, target: Tensor) -> None:
        # Not argmax(1), which is four times slower on CPUs; both give the first of equals.
        predicted = resized(output.float(), target).max(1).indices
        matrix = multiclass_confusion_matrix(
            predicted.cpu(), target.cpu(), self.classes, ignore_index=self.ignore_index
        )
        self.sums += torch.stack([matrix.diagonal(), matrix.sum(0), matrix.sum(1)])

    def compute(self) -> dict[str, float]:
        hit, predicted, true = self.sums
        union = predicted + true - hit
        seen = union > 0
        if 0 <= self.ignore_index < self.classes:
            seen[self.ignore_index] = False  # what is said of unknown pixels is not judged
        return {
            "miou": float(100 * (hit[seen] / union[seen]).mean()) if seen.any() else 0.0,
            "pixel_accuracy": float(100 * hit.sum() / true.sum().clamp(min=1)),
        }


def create(task: Task) -> TaskKind:
    """Return the kind for ``task``, which must state its ``classes``."""
    return Segmentation(class_count(task), task.ignore_index)
