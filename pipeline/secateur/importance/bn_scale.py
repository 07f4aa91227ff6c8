"""Batch-norm scale: ``|gamma|`` (network slimming, Liu et al., arXiv 1708.06519, section 3).

The mean over the group's batch norms. A group without one takes the L2 norms of its producing
weights instead, rescaled by one number for all such groups so that they and the others have the
same mean per channel: the two kinds of number have no common unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import Scores, TaskData, same_for_all
from secateur.importance.magnitude import norms
from secateur.importance.places import Place, batch_norms

BY_SCALE = True


def score(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], data: TaskData
) -> dict[str, Scores]:
    """Return ``|gamma|``, or rescaled L2 norms where a group has no batch norm."""
    scales = {
        name: np.mean([_scale(place) for place in found], axis=0)
        for name, found in batch_norms(model, groups, bias=False).items()
        if found
    }
    bare = norms(model, [group for group in groups if group.name not in scales], 2)
    ratio = _mean(scales) / _mean(bare) if scales and _mean(bare) > 0 else 1.0
    return same_for_all(data, scales | {name: ratio * norm for name, norm in bare.items()})


def _scale(place: Place) -> NDArray[np.float64]:
    scale: NDArray[np.float64] = place.weights().double().abs().mean(dim=1).cpu().numpy()
    return scale


def _mean(scores: Scores) -> float:
    return float(np.concatenate(list(scores.values())).mean()) if scores else 0.0
