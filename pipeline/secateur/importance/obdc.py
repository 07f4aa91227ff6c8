"""OBD-C: optimal brain damage on channels (Wang et al., arXiv 1905.05934).

``sum w^2 * F_ww`` over the channel's producing weights, averaged over the group's producers. The
Hessian's diagonal is replaced by the empirical Fisher's, ``F_ww = mean_b (dL/dw)^2``, of batches:
torch-pruning's OBDCImportance takes single samples, which needs every sample's own weight gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import Scores, TaskData
from secateur.importance.passes import scores_of, weight_pass
from secateur.importance.places import producers


def score(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], data: TaskData
) -> dict[str, Scores]:
    """Return the second-order change of the loss, cross terms left out."""
    changes = weight_pass(
        model, producers(model, groups), data, lambda w, gradient: (w * gradient).square().sum(1)
    )
    return scores_of(changes, lambda rows: rows.mean(axis=0))
