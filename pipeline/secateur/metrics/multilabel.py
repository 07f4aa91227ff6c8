"""Several yes/no labels per image: binary cross-entropy; accuracy and macro F1 in percent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from secateur.core.task import Task
from secateur.metrics.kind import TaskKind, class_count


class Multilabel:
    """Outputs (N, classes) logits; targets (N, classes) of 0 and 1."""

    higher_is_better: Mapping[str, bool] = {"accuracy": True, "macro_f1": True}

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(output, target)

    def distillation_loss(self, output: Tensor, parent: Tensor) -> Tensor:
        soft = parent.sigmoid()
        cross = functional.binary_cross_entropy_with_logits(output, soft)
        return cross - functional.binary_cross_entropy_with_logits(parent, soft)

    def sample_target(self, parent: Tensor, generator: torch.Generator) -> Tensor:
        return torch.bernoulli(parent.sigmoid(), generator=generator)

    def evaluator(self) -> MultilabelEvaluator:
        return MultilabelEvaluator(self.classes)


class MultilabelEvaluator:
    """Counts hits per class at the threshold 0.5."""

    def __init__(self, classes: int) -> None:
        self.sums = torch.zeros(4, classes, dtype=torch.float64)  # tp, fp, fn, tn

    def update(self, output: Tensor, target: Tensor) -> None:
        said, true = (output > 0).cpu(), (target > 0.5).cpu()
        rows = [said & true, said & ~true, ~said & true, ~said & ~true]
        self.sums += torch.stack([row.double().sum(0) for row in rows])

    def compute(self) -> dict[str, float]:
        tp, fp, fn, tn = self.sums
        f1 = 2 * tp / (2 * tp + fp + fn).clamp(min=1)
        return {
            "accuracy": float(100 * (tp + tn).sum() / self.sums.sum().clamp(min=1)),
            "macro_f1": float(100 * f1.mean()),
        }


def create(task: Task) -> TaskKind:
    """Return the kind for ``task``, which must state its ``classes``."""
    return Multilabel(class_count(task))
