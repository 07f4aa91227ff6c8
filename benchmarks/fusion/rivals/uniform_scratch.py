"""Uniform width, re-initialised: the narrow network to be trained from scratch.

The control of "rethinking the value of network pruning" (Liu et al., arXiv 1810.05270). Inherits no
weight: all layers are reset as PyTorch builds them. It departs from the paper in its training: as
short as every row's recovery, where the paper trains as long as the parent was, or longer.
"""

from __future__ import annotations

import torch
from fusion.bench import Bench
from fusion.rivals import random_uniform
from secateur.core.model import MultiTaskModel


def cut(bench: Bench, share: float, seed: int) -> MultiTaskModel:
    """Return the uniformly narrow network with fresh weights."""
    model = random_uniform.cut(bench, share, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return model
