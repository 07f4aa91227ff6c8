"""Group L2 norm: torch-pruning's MagnitudeImportance with p = 2 (DepGraph, arXiv 2301.12900).

Sum of squares over each coupled layer's slice, mean over the layers, divided by the group's mean;
ranked over the whole network. Departure: our groups and our budget solver in place of the
library's ratio and rounding. Needs no data, so the seed changes nothing.
"""

from __future__ import annotations

import torch_pruning
from fusion.bench import Bench
from fusion.rivals.scoring import torch_pruning_scores
from fusion.rivals.training import start
from secateur.core.model import MultiTaskModel


def cut(bench: Bench, share: float, seed: int) -> MultiTaskModel:
    """Return the cut by group L2 norm."""
    stage = start(bench)
    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    scores = torch_pruning_scores(stage.model, stage.groups, bench.example, importance)
    return bench.apply(bench.plan(scores, share))
