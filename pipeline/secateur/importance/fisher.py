"""Diagonal empirical Fisher information of each channel's gate, one gradient per sample.

``mean_n (sum over positions of a_n * dL_n/da_n)^2`` at the channel's batch-norm output (or its
producer's): Theis et al., arXiv 1801.05787, without their factor 1/2. A group's gates are
averaged. Squared per sample, not per batch: samples that pull in opposite ways do not cancel.
"""

from __future__ import annotations

from collections.abc import Sequence

from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import Scores, TaskData
from secateur.importance.passes import gate_pass, scores_of
from secateur.importance.places import gates


def score(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], data: TaskData
) -> dict[str, Scores]:
    """Return the mean over samples of the squared gradient of the channel's gate."""
    squares = gate_pass(
        model, gates(model, groups), data, lambda gradient, _: gradient.square().sum(dim=0)
    )
    return scores_of(squares, lambda rows: rows.mean(axis=0))
