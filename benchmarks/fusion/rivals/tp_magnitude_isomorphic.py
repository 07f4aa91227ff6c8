"""Plain torch-pruning: L2 magnitude, global within isomorphic groups (arXiv 2407.04616).

``MagnitudeImportance(p=2)``, ``global_pruning=True, isomorphic=True, round_to=8``: channels compete
only with those of groups of the same sub-graph. No departure. Needs no data, so the seed changes
nothing.
"""

from __future__ import annotations

import torch_pruning
from fusion.bench import Bench
from fusion.rivals.pruner import cut_as_its_users_do
from secateur.core.model import MultiTaskModel


def cut(bench: Bench, share: float, seed: int) -> MultiTaskModel:
    """Return what torch-pruning's isomorphic magnitude pruning leaves."""
    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    return cut_as_its_users_do(bench, share, importance, global_pruning=True, isomorphic=True)
