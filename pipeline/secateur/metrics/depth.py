"""Monocular depth in metres (Eigen et al., 2014): L1 loss; abs_rel, RMSE, delta < 1.25."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from secateur.core.task import Task
from secateur.metrics.kind import TaskKind, masked_mean, resized

NEAREST_METRES = 0.1  # predictions below this count as this, so that ratios stay finite


class Depth:
    """Outputs (N, 1, h, w) metres; targets (N, H, W) metres, 0 where unknown."""

    higher_is_better: Mapping[str, bool] = {"abs_rel": False, "rmse": False, "delta1": True}

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        known = (target > 0) & torch.isfinite(target)
        error = (resized(output, target)[:, 0] - torch.where(known, target, 0.0)).abs()
        return masked_mean(error, known)

    def distillation_loss(self, output: Tensor, parent: Tensor) -> Tensor:
        return functional.l1_loss(output, parent)

    def sample_target(self, parent: Tensor, generator: torch.Generator) -> Tensor:
        """Draw around the parent's depth with 10 % Gaussian noise."""
        noise = torch.randn(parent.shape, generator=generator)
        return (parent * (1 + 0.1 * noise))[:, 0].clamp(min=NEAREST_METRES)

    def evaluator(self) -> DepthEvaluator:
        return DepthEvaluator()


class DepthEvaluator:
    """Sums over valid pixels: abs_rel (ratio), rmse (metres), delta1 (percent)."""

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)  # |e|/d, e², hits, pixels

    def update(self, output: Tensor, target: Tensor) -> None:
        valid = (target > 0) & torch.isfinite(target)
        depth = resized(output.float(), target)[:, 0][valid].double().clamp(min=NEAREST_METRES)
        truth = target[valid].double()
        ratio = torch.maximum(depth / truth, truth / depth)
        error = depth - truth
        self.sums += torch.stack(
            [
                (error.abs() / truth).sum(),
                error.square().sum(),
                (ratio < 1.25).sum().double(),
                torch.tensor(float(truth.numel()), dtype=torch.float64),
            ]
        ).cpu()

    def compute(self) -> dict[str, float]:
        relative, square, hits, pixels = (float(value) for value in self.sums)
        pixels = max(pixels, 1.0)
        return {
            "abs_rel": relative / pixels,
            "rmse": (square / pixels) ** 0.5,
            "delta1": 100 * hits / pixels,
        }


def create(task: Task) -> TaskKind:
    """Return the kind for ``task``."""
    return Depth()
