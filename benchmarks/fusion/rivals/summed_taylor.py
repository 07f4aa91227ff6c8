"""torch-pruning's GroupTaylor on the summed loss, but in our groups and under our budget solver.

Scores as in ``tp_group_taylor``; the difference between the two is what the library's rounding
and its ratio cost.
"""

from __future__ import annotations

import torch_pruning
from fusion.bench import Bench
from fusion.rivals.scoring import torch_pruning_scores
from fusion.rivals.tp_group_taylor import summed_gradients
from fusion.rivals.training import start
from secateur.core.model import MultiTaskModel


def cut(bench: Bench, share: float, seed: int) -> MultiTaskModel:
    """Return the cut by GroupTaylor scores."""
    stage = start(bench)
    gradients = summed_gradients(bench, seed)
    for name, parameter in stage.model.named_parameters():
        parameter.grad = gradients.get(name)
    importance = torch_pruning.importance.GroupTaylorImportance()
    scores = torch_pruning_scores(stage.model, stage.groups, bench.example, importance)
    return bench.apply(bench.plan(scores, share))
