"""Importance of single weights: ``|w * dL/dw|``, the first-order change of the loss if one went.

The criterion ``taylor`` asks it of channels (Molchanov et al., arXiv 1906.10771); sparsity within a
channel has to ask it of weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import TaskData
from secateur.importance.passes import backwards, left_as_found
from secateur.importance.reach import seen_whole


def score_weights(
    model: MultiTaskModel, names: Sequence[str], data: TaskData
) -> dict[str, dict[str, Tensor]]:
    """Return, per task and parameter of ``names``, the mean over batches, shaped like the weight.

    All tasks share one forward per batch; the model is left as it was. A weight that a task does
    not use counts as 0.
    """
    wanted: list[nn.Parameter] = [model.get_parameter(name) for name in names]
    totals = {task: [torch.zeros_like(each) for each in wanted] for task in data.tasks}
    count = 0
    with left_as_found(model, wanted):
        for batch, how in seen_whole(model, data, data.tasks):
            count += 1
            for task, gradients in backwards(model, wanted, batch, data.tasks, how):
                for total, weight, gradient in zip(totals[task], wanted, gradients, strict=True):
                    if gradient is not None:
                        total += (weight.detach() * gradient).abs()
    return {
        task: {name: total / max(count, 1) for name, total in zip(names, found, strict=True)}
        for task, found in totals.items()
    }
