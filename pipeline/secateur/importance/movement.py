"""Movement: how far fine-tuning moves a channel's weights away from zero (arXiv 2005.07683).

``S = -sum_k lr_k * sum_w w * dL/dw`` over the steps of a short fine-tuning of a copy and the
channel's producing weights (on channels as in arXiv 2112.05705). Each task moves a copy
of its own, so that its scores do not depend on which other tasks are scored beside it; fusion joins
them. A step is one batch of plain gradient descent and moves the weights by ``RATE`` of their norm,
so that a loss's scale does not matter.

S may be negative. Over the channels that the task uses the least S becomes 0 (one shift for the
whole network, which keeps their order); channels that it does not use score 0.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import Scores, TaskData
from secateur.importance.passes import backwards, left_as_found
from secateur.importance.places import Gradients, producers
from secateur.importance.reach import seen_whole

RATE = 1e-3


def score(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], data: TaskData
) -> dict[str, Scores]:
    """Return the shifted movement of each channel."""
    with left_as_found(model, ()):
        return {task: _movement(model, groups, data, task) for task in data.tasks}


def _movement(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], data: TaskData, task: str
) -> Scores:
    moving = copy.deepcopy(model).eval().requires_grad_(True)
    weights = list(moving.parameters())
    places = producers(moving, groups)
    moved: Scores = {}  # of the groups that the task uses
    for batch, how in seen_whole(moving, data, [task]):
        ((_, gradients),) = backwards(moving, weights, batch, [task], how)
        gradient_of = dict(zip(weights, gradients, strict=True))
        rate = _rate(gradient_of)
        for name, found in places.items():
            for place in found:
                rows = place.gradient_rows(gradient_of)
                if rows is not None:
                    towards_zero = (place.weights() * rows).sum(1).double().cpu().numpy()
                    moved[name] = moved.get(name, 0.0) - rate * towards_zero
        with torch.no_grad():
            for weight, gradient in gradient_of.items():
                if gradient is not None:
                    weight.sub_(gradient, alpha=rate)
    least = min((float(values.min()) for values in moved.values()), default=0.0)
    unused = {group.name: np.zeros(group.width) for group in groups}
    return unused | {name: values - least for name, values in moved.items()}


def _rate(gradients: Gradients) -> float:
    """Return the step that moves the weights a task uses by ``RATE`` of their norm."""
    used = [(weight, gradient) for weight, gradient in gradients.items() if gradient is not None]
    if not used:
        return 0.0
    weight_norm = nn.utils.get_total_norm([weight.detach() for weight, _ in used])
    gradient_norm = nn.utils.get_total_norm([gradient for _, gradient in used])
    return RATE * float(weight_norm / gradient_norm) if gradient_norm > 0 else 0.0
