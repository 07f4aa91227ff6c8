"""Activation times gradient at a channel's output (Molchanov et al., arXiv 1611.06440).

``mean_n |1/M sum over M positions of a_n * dL_n/da_n|``, at the channel's batch-norm output (or its
producer's); a group's are averaged. The paper's layer-wise L2 normalisation is left out: tasks are
normalised over the whole network in fusion, and groups balanced when planning.
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
    """Return the mean over samples of the absolute, position-averaged product."""
    changes = gate_pass(
        model,
        gates(model, groups),
        data,
        lambda gradient, positions: (gradient / positions).abs().sum(dim=0),
    )
    return scores_of(changes, lambda rows: rows.mean(axis=0))
