"""Keypoints in 0..1 image coordinates: L1 loss; mean error and PCK@0.1 in percent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.core.task import Task
from secateur.metrics.kind import Evaluator, TaskKind, like
from secateur.metrics.regression import Regression


class Keypoints(Regression):
    """Outputs (N, 2K), x and y alternating; targets (N, K, 2), NaN where not visible."""

    higher_is_better: Mapping[str, bool] = {"mean_error": False, "pck_10": True}

    def evaluator(self) -> Evaluator:
        return KeypointsEvaluator()


class KeypointsEvaluator:
    """Sums distances of visible points and counts those within 0.1 of the image size."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)  # distances, near, seen

    def update(self, output: Tensor, target: Tensor) -> None:
        distance = (output - like(target, output)).reshape(target.shape).norm(dim=-1)
        seen = distance[torch.isfinite(target).all(-1)]  # a wild output counts, not a hidden point
        near, count = (seen < 0.1).sum().double(), torch.tensor(float(seen.numel()))
        self.sums += torch.stack([seen.double().sum().cpu(), near.cpu(), count.double()])

    def compute(self) -> dict[str, float]:
        distance, near, count = self.sums.tolist()
        count = max(count, 1)
        return {"mean_error": distance / count, "pck_10": 100 * near / count}


def create(task: Task) -> TaskKind:
    """Return the kind for ``task``."""
    return Keypoints()
