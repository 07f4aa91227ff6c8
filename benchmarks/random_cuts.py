"""Cut networks to convert: a timm backbone with three heads, random weights, cut at random.

Random weights, with batch norms that have seen data, say nothing of accuracy; conversion they do
put to the test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from secateur.core.model import MultiTaskModel
from secateur.core.task import Task
from secateur.prune import apply_plan, find_groups, macs_model, plan_prune
from secateur.prune.plan import Budget
from secateur.zoo.compose import HeadSpec, compose
from torch import Tensor

SEED, SETTLING = 0, 8  # images that batch norms see, three times
TASKS = (
    Task("segmentation", "seg", "segmentation", "segmentation", classes=8),
    Task("depth", "depth", "depth", "depth"),
    Task("room", "room", "classification", "room", classes=4),
)
HEADS = {
    "seg": HeadSpec("segmentation", 8),
    "depth": HeadSpec("depth", 1),
    "room": HeadSpec("classification", 4),
}
TRANSFORMERS = ("vit", "deit")


@dataclass(frozen=True)
class Case:
    """A timm backbone, the side of its square images, and the share of MACs that stays."""

    backbone: str
    size: int = 96
    macs: float = 0.5

    def images(self, count: int) -> Tensor:
        """Return (count, 3, size, size) images of noise, the same at every call."""
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(count, 3, self.size, self.size, generator=generator)

    def network(self) -> MultiTaskModel:
        """Return the backbone with the heads, its batch norms settled on noise."""
        torch.manual_seed(SEED)
        square = (self.size, self.size)
        options: dict[str, Any] = (
            {"img_size": square} if self.backbone.startswith(TRANSFORMERS) else {}
        )
        model = MultiTaskModel(compose(self.backbone, HEADS, **options), TASKS).train()
        with torch.no_grad():
            for _ in range(3):
                model(torch.randn(SETTLING, 3, self.size, self.size))
        return model.eval()


def random_cut(parent: MultiTaskModel, case: Case, example: Tensor) -> MultiTaskModel:
    """Cut the parent to its share of MACs by random scores."""
    groups = find_groups(parent, example)
    random = np.random.default_rng(SEED)
    scores = {group.name: random.random(group.width) for group in groups}
    plan = plan_prune(
        groups, macs_model(parent, groups, example), scores, {"all": scores}, Budget(case.macs),
        criterion="random", fusion="mean",
    )  # fmt: skip
    return apply_plan(parent, groups, plan)
