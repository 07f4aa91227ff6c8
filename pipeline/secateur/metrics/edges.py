"""Edge maps: class-balanced binary cross-entropy (HED, Xie and Tu 2015); F1 in percent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from secateur.core.task import Task
from secateur.metrics.kind import TaskKind, resized

UNKNOWN = 255.0


class Edges:
    """Outputs (N, 1, h, w) logits; targets (N, H, W): 1 edge, 0 none, 255 unknown."""

    higher_is_better: Mapping[str, bool] = {"f1": True}

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        valid = target != UNKNOWN
        logits, truth = resized(output, target)[:, 0][valid], target[valid]
        share = truth.mean() if truth.numel() else truth.sum()
        weight = torch.where(truth > 0.5, 1 - share, share)
        return functional.binary_cross_entropy_with_logits(
            logits, truth, weight, reduction="sum"
        ) / max(truth.numel(), 1)

    def distillation_loss(self, output: Tensor, parent: Tensor) -> Tensor:
        soft = parent.sigmoid()
        cross = functional.binary_cross_entropy_with_logits(output, soft)
        return cross - functional.binary_cross_entropy_with_logits(parent, soft)

    def sample_target(self, parent: Tensor, generator: torch.Generator) -> Tensor:
        return torch.bernoulli(parent.sigmoid(), generator=generator)[:, 0]

    def evaluator(self) -> EdgesEvaluator:
        return EdgesEvaluator()


class EdgesEvaluator:
    """Counts pixels at the threshold 0.5 (no matching tolerance)."""

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)  # true positive, said, true, all known

    def update(self, output: Tensor, target: Tensor) -> None:
        valid = target != UNKNOWN
        said = (resized(output.float(), target)[:, 0] > 0) & valid
        true = (target > 0.5) & valid
        rows = [said & true, said, true, valid]
        self.sums += torch.stack([row.sum() for row in rows]).double().cpu()

    def compute(self) -> dict[str, float]:
        true_positive, said, true, _ = self.sums.tolist()
        return {"f1": 100 * 2 * true_positive / max(said + true, 1)}


def create(task: Task) -> TaskKind:
    """Return the kind for ``task``."""
    return Edges()
