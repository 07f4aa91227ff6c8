"""Gate Taylor per task, normalised and averaged, in several cuts with training in between.

The iterative schedule (Molchanov et al., arXiv 1906.10771, section 3.2) of the one-shot default:
equal steps in MACs, scores measured anew before each, no training after the last.
"""

from __future__ import annotations

from fusion.bench import Bench
from fusion.rivals.scoring import gate_scores, mean_of_tasks
from fusion.rivals.training import cut_to, opened, start, train
from secateur.core.model import MultiTaskModel

CUTS = 3
STEPS = 150  # training steps between the cuts, all together


def cut(bench: Bench, share: float, seed: int) -> MultiTaskModel:
    """Return the network after the last cut."""
    stage = start(bench)
    for number in range(1, CUTS + 1):
        scores = mean_of_tasks(gate_scores(bench, stage.model, stage.groups, seed))
        model = cut_to(bench, stage, scores, 1 - (1 - share) * number / CUTS)
        if number == CUTS:
            break
        train(bench, model, STEPS // (CUTS - 1), CUTS * seed + number)
        stage = opened(bench, model)
    return model
