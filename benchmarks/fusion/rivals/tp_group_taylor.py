"""Plain torch-pruning: GroupTaylor on the summed loss, ranked over all layers.

``sum |w * dL/dw|`` over each coupled layer's slice, mean over the layers, divided by the group's
mean (Molchanov et al., arXiv 1906.10771; DepGraph, arXiv 2301.12900); gradients accumulate over the
batches; ``global_pruning=True, round_to=8``, which its README offers for better structures and says
may cut single layers too far. No departure: its groups, its rounding.
"""

from __future__ import annotations

import copy

import torch
import torch_pruning
from fusion.bench import Bench
from fusion.rivals.pruner import cut_as_its_users_do
from fusion.rivals.scoring import IMAGES
from secateur.core.model import MultiTaskModel
from torch import Tensor


def cut(bench: Bench, share: float, seed: int) -> MultiTaskModel:
    """Return what torch-pruning's GroupTaylor leaves."""
    importance = torch_pruning.importance.GroupTaylorImportance()
    return cut_as_its_users_do(bench, share, importance, summed_gradients(bench, seed),
                               global_pruning=True)  # fmt: skip


def summed_gradients(bench: Bench, seed: int) -> dict[str, Tensor]:
    """Return the parent's weight gradients of the summed loss, added up over the batches."""
    model = copy.deepcopy(bench.parent).eval()
    for batch in bench.stream(IMAGES, seed):
        losses = bench.losses(model(batch.images), batch.targets)
        torch.autograd.backward(list(losses.values()))  # of their sum
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
