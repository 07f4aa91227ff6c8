"""L2 norm of each channel's producing weights (Li et al., arXiv 1608.08710, with L2 for L1).

Needs no data and is the same for every task: a baseline.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import Scores, TaskData, same_for_all
from secateur.importance.places import Place, producers

BY_SCALE = True


def score(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], data: TaskData
) -> dict[str, Scores]:
    """Return, per group, the mean over its producing layers of the L2 norm per channel."""
    return same_for_all(data, norms(model, groups, 2))


def norms(model: MultiTaskModel, groups: Sequence[ChannelGroup], order: int) -> Scores:
    """Return the norm of that order of each channel's weights, averaged over its producers."""
    return {
        name: np.mean([_norms(place, order) for place in found], axis=0)
        for name, found in producers(model, groups).items()
    }


def _norms(place: Place, order: int) -> NDArray[np.float64]:
    norms: NDArray[np.float64] = place.weights().double().norm(order, dim=1).cpu().numpy()
    return norms
