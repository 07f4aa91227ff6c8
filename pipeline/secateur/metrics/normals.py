"""Surface normals: 1 - cosine; mean and median angle in degrees, share within 11.25°."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from secateur.core.task import Task
from secateur.metrics.kind import TaskKind, masked_mean, resized

BINS = 1800  # of 0.1 degree, so that the median needs no list of all angles


class Normals:
    """Outputs (N, 3, h, w) of any length; targets (N, 3, H, W) unit vectors, 0 where unknown."""

    higher_is_better: Mapping[str, bool] = {
        "mean_angle": False,
        "median_angle": False,
        "within_11": True,
    }

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        valid = target.square().sum(1) > 0.25
        target = torch.where(valid[:, None], target, 0)  # NaN would spoil gradients, times 0 too
        return masked_mean(1 - _cosine(resized(output, target), target), valid)

    def distillation_loss(self, output: Tensor, parent: Tensor) -> Tensor:
        return (1 - _cosine(output, parent)).mean()

    def sample_target(self, parent: Tensor, generator: torch.Generator) -> Tensor:
        """Draw around the parent's direction with a spread of about 10 degrees."""
        direction = functional.normalize(parent, dim=1)
        noise = torch.randn(parent.shape, generator=generator)
        return functional.normalize(direction + 0.17 * noise, dim=1)

    def evaluator(self) -> NormalsEvaluator:
        return NormalsEvaluator()


class NormalsEvaluator:
    """Sums angles over valid pixels and keeps their histogram for the median."""

    def __init__(self) -> None:
        # the histogram; then the sum of degrees, and how many are within 11.25
        self.sums = torch.zeros(BINS + 2, dtype=torch.float64)

    def update(self, output: Tensor, target: Tensor) -> None:
        valid = target.square().sum(1) > 0.25
        cosine = _cosine(resized(output.float(), target), target)
        angle = torch.rad2deg(torch.acos(cosine[valid].clamp(-1, 1))).cpu()
        self.sums[:BINS] += torch.histc(angle, BINS, 0, 180).double()
        self.sums[BINS] += angle.double().sum()
        self.sums[BINS + 1] += (angle < 11.25).sum()

    def compute(self) -> dict[str, float]:
        histogram, (degrees, within) = self.sums[:BINS], self.sums[BINS:].tolist()
        pixels = max(float(histogram.sum()), 1.0)
        middle = int(torch.searchsorted(histogram.cumsum(0), pixels / 2))
        return {
            "mean_angle": degrees / pixels,
            "median_angle": (min(middle, BINS - 1) + 0.5) * 180 / BINS,
            "within_11": 100 * within / pixels,
        }


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return (N, H, W) cosines of (N, 3, H, W) vectors, 0 where one has no length.

    On CPUs 5 to 18 times as fast, with its gradient, as ``functional.cosine_similarity`` over
    dimension 1, which cost a tenth of a recovery.
    """
    squares = a.square().sum(1) * b.square().sum(1)
    return (a * b).sum(1) * squares.clamp_min(1e-16).rsqrt()


def create(task: Task) -> TaskKind:
    """Return the kind for ``task``."""
    return Normals()
