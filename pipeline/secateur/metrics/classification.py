"""Image classification: cross-entropy; top-1 accuracy in percent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from secateur.core.task import Task
from secateur.metrics.kind import TaskKind, class_count


class Classification:
    """Outputs (N, classes) logits; targets (N,) int64."""

    higher_is_better: Mapping[str, bool] = {"top1": True}

    def __init__(self, classes: int, ignore_index: int) -> None:
        self.classes, self.ignore_index = classes, ignore_index

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        total = functional.cross_entropy(
            output, target, ignore_index=self.ignore_index, reduction="sum"
        )
        return total / (target != self.ignore_index).sum().clamp(min=1)

    def distillation_loss(self, output: Tensor, parent: Tensor) -> Tensor:
        return functional.kl_div(
            output.log_softmax(1), parent.log_softmax(1), log_target=True, reduction="batchmean"
        )

    def sample_target(self, parent: Tensor, generator: torch.Generator) -> Tensor:
        return torch.multinomial(parent.softmax(1), 1, generator=generator)[:, 0]

    def evaluator(self) -> ClassificationEvaluator:
        return ClassificationEvaluator(self.ignore_index)


class ClassificationEvaluator:
    """Counts correct answers."""

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index
        self.sums = torch.zeros(2, dtype=torch.float64)  # hits, images

    def update(self, output: Tensor, target: Tensor) -> None:
        valid = target != self.ignore_index
        hits = (output.argmax(1) == target)[valid]
        self.sums += torch.stack([hits.sum(), valid.sum()]).double().cpu()

    def compute(self) -> dict[str, float]:
        hits, count = self.sums.tolist()
        return {"top1": 100 * hits / max(count, 1)}


def create(task: Task) -> TaskKind:
    """Return the kind for ``task``, which must state its ``classes``."""
    return Classification(class_count(task), task.ignore_index)
