"""Gate Taylor: the first-order change of the loss when a channel's batch-norm gate closes.

For a group with batch norms, per batch ``b`` and channel: ``g_b = gamma * dL/dgamma + beta *
dL/dbeta`` (Molchanov et al., arXiv 1906.10771, eq. 8 on gates); the score is the root of the mean
of ``g_b^2``, averaged over the group's batch norms. A group without batch norm uses ``g_b = sum w *
dL/dw`` over the channel's producing weights and bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import Scores, TaskData
from secateur.importance.passes import scores_of, weight_pass
from secateur.importance.places import gates


def score(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], data: TaskData
) -> dict[str, Scores]:
    """Return ``sqrt(mean_b g_b^2)``, with batch norm in eval mode."""
    squares = weight_pass(
        model, gates(model, groups), data, lambda w, gradient: (w * gradient).sum(1).square()
    )
    return scores_of(squares, lambda rows: np.sqrt(rows).mean(axis=0))
