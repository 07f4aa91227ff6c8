"""L1 norm of each channel's producing weights (Li et al., arXiv 1608.08710, section 3.1).

Needs no data and is the same for every task: a baseline.
"""

from __future__ import annotations

from collections.abc import Sequence

from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import Scores, TaskData, same_for_all
from secateur.importance.magnitude import norms

BY_SCALE = True


def score(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], data: TaskData
) -> dict[str, Scores]:
    """Return, per group, the mean over its producing layers of the L1 norm per channel."""
    return same_for_all(data, norms(model, groups, 1))
