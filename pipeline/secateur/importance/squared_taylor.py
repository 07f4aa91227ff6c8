"""Squared gate Taylor (Molchanov et al., arXiv 1906.10771, eq. 8).

``(sum_{s in channel} w_s * dL/dw_s)^2`` of each batch, averaged over the batches. The weights are
those of the gate: a batch norm's scale and shift (the paper's best setting), or else the channel's
producing weights and bias; a group's gates are averaged. ``taylor`` is its root: the same order
within a group, but here a few large channels hold most of a task's total.
"""

from __future__ import annotations

from collections.abc import Sequence

from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import Scores, TaskData
from secateur.importance.passes import scores_of, weight_pass
from secateur.importance.places import gates


def score(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], data: TaskData
) -> dict[str, Scores]:
    """Return the mean over batches of the squared first-order change of the loss."""
    squares = weight_pass(
        model, gates(model, groups), data, lambda w, gradient: (w * gradient).sum(1).square()
    )
    return scores_of(squares, lambda rows: rows.mean(axis=0))
