"""LAMP: layer-adaptive magnitude (Lee et al., arXiv 2010.07611), on channels.

As torch-pruning's LAMPImportance does: a channel's squared magnitude ``m`` is ``sum w^2`` averaged
over all members of its group (makers, norms, readers; no biases), and its score ``m_c / sum of m_j
over the channels with m_j >= m_c``: the largest channel of every group scores 1. (Depth-wise
layers are members here; torch-pruning 1.6.1 passes them over.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import Scores, TaskData, same_for_all
from secateur.importance.places import weighted

BY_SCALE = True


def score(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], data: TaskData
) -> dict[str, Scores]:
    """Return each channel's share in what is left when all smaller ones of its group are gone."""
    scores = {}
    for name, found in weighted(model, groups).items():
        squares = [place.weights().double().square().sum(1).cpu().numpy() for place in found]
        scores[name] = _share_of_rest(np.mean(squares, axis=0))
    return same_for_all(data, scores)


def _share_of_rest(magnitudes: NDArray[np.float64]) -> NDArray[np.float64]:
    order = np.argsort(magnitudes, kind="stable")
    rest = np.cumsum(magnitudes[order][::-1])[::-1]  # of the channel and all larger ones
    shares = np.zeros_like(magnitudes)
    shares[order] = np.divide(magnitudes[order], rest, out=shares.copy(), where=rest > 0)
    return shares
