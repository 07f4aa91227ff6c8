"""Regression of a vector per image: L1 loss; mean absolute error and RMSE in label units."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from secateur.core.task import Task
from secateur.metrics.kind import Evaluator, TaskKind, like, masked_mean


class Regression:
    """Outputs and targets (N, D); NaN in the target where unknown."""

    higher_is_better: Mapping[str, bool] = {"mae": False, "rmse": False}

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        truth = like(target, output)
        error = (output - truth.nan_to_num()).abs()
        return masked_mean(error, torch.isfinite(truth))

    def distillation_loss(self, output: Tensor, parent: Tensor) -> Tensor:
        return functional.l1_loss(output, parent)

    def sample_target(self, parent: Tensor, generator: torch.Generator) -> Tensor:
        """Draw with Gaussian noise of a tenth of the batch's spread."""
        spread = parent.std().nan_to_num() + 1e-3
        return parent + 0.1 * spread * torch.randn(parent.shape, generator=generator)

    def evaluator(self) -> Evaluator:
        return RegressionEvaluator()


class RegressionEvaluator:
    """Sums absolute and squared errors over known values."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)  # absolute, squared, known values

    def update(self, output: Tensor, target: Tensor) -> None:
        truth = like(target, output)
        error = (output - truth)[torch.isfinite(truth)].double()
        count = torch.tensor(float(error.numel()), dtype=torch.float64)
        rows = [error.abs().sum().cpu(), error.square().sum().cpu(), count]
        self.sums += torch.stack(rows)

    def compute(self) -> dict[str, float]:
        absolute, square, count = self.sums.tolist()
        count = max(count, 1)
        return {"mae": absolute / count, "rmse": (square / count) ** 0.5}


def create(task: Task) -> TaskKind:
    """Return the kind for ``task``."""
    return Regression()
