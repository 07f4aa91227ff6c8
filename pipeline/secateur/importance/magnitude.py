"""L2 norm of each channel's producing weights (Li et al., arXiv 1608.08710, with L2 for L1).

Needs no data and is the same for every task: a baseline.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import Loss


def score(
    model: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    images: Iterable[Tensor],
    loss: Loss,
) -> dict[str, NDArray[np.float64]]:
    """Return, per group, the mean over its producing layers of the L2 norm per channel."""
    modules = dict(model.named_modules())
    result = {}
    for group in groups:
        rows = []
        for member in group.members:
            module = modules[member.layer]
            if member.axis == "out" and isinstance(module, nn.Conv2d | nn.Linear):
                norms = module.weight.detach().flatten(1).norm(dim=1).double().numpy()
                rows.append([np.linalg.norm(norms[list(at)]) for at in member.indices])
        result[group.name] = np.mean(rows, axis=0) if rows else np.zeros(group.width)
    return result
