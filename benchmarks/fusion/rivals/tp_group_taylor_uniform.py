"""Plain torch-pruning: GroupTaylor on the summed loss, the same share of every layer.

The first example of its README: ``pruning_ratio`` and ``round_to=8``, nothing else. Importance and
gradients as in ``tp_group_taylor``. No departure.
"""

from __future__ import annotations

import torch_pruning
from fusion.bench import Bench
from fusion.rivals.pruner import cut_as_its_users_do
from fusion.rivals.tp_group_taylor import summed_gradients
from secateur.core.model import MultiTaskModel


def cut(bench: Bench, share: float, seed: int) -> MultiTaskModel:
    """Return what torch-pruning's GroupTaylor leaves, ranked within each layer."""
    importance = torch_pruning.importance.GroupTaylorImportance()
    return cut_as_its_users_do(bench, share, importance, summed_gradients(bench, seed))
