"""FPGM: distance to the geometric median of the filters (He et al., arXiv 1811.00250).

``sum_j ||w_c - w_j||_2`` over the group's filters in a producing layer, averaged over its
producers: the filter that the others can replace best scores least. Same for every task, no data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import Scores, TaskData, same_for_all
from secateur.importance.places import Place, producers

BY_SCALE = True


def score(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], data: TaskData
) -> dict[str, Scores]:
    """Return each channel's summed distance to the other channels of its group."""
    scores = {
        name: np.mean([_distances(place) for place in found], axis=0)
        for name, found in producers(model, groups).items()
    }
    return same_for_all(data, scores)


def _distances(place: Place) -> NDArray[np.float64]:
    filters = place.weights().double()
    distances: NDArray[np.float64] = torch.cdist(filters, filters).sum(dim=1).cpu().numpy()
    return distances
