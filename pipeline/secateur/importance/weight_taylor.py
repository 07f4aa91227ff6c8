"""Group weight Taylor: ``sum over members |sum w * dL/dw|`` (DepGraph, arXiv 2301.12900).

Members are all layers that own weights of the channel: those that make, scale and read it. Within
a member the products are summed before the absolute value, the first-order change if the member
went as a whole (torch-pruning's GroupTaylorImportance with ``multivariable=True``; its default is
``sum |w * dL/dw|``). The gradient is a batch's, and absolute values are averaged over batches, so
that changes of opposite sign do not cancel. Biases do not count, as there; batch norms and
depth-wise layers do, which torch-pruning 1.6.1 passes over.
"""

from __future__ import annotations

from collections.abc import Sequence

from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import Scores, TaskData
from secateur.importance.passes import scores_of, weight_pass
from secateur.importance.places import weighted


def score(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], data: TaskData
) -> dict[str, Scores]:
    """Return, summed over a group's members, the first-order change of the loss."""
    changes = weight_pass(
        model, weighted(model, groups), data, lambda w, gradient: (w * gradient).sum(1).abs()
    )
    return scores_of(changes, lambda rows: rows.sum(axis=0))
