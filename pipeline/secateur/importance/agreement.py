"""Do the tasks pull a channel's weights the same way? (CosPrune, Garg et al., arXiv 2304.06840.)

``c_b = 2 / (T (T - 1)) * sum over pairs i < j of <g_i, g_j> / (|g_i| |g_j|)``, where ``g_t`` is the
gradient of task t's loss in all weights that produce the channel, averaged over batches b. (The
authors' code leaves gradients of one task in the next; here each is the task's own.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import Scores, TaskData
from secateur.importance.passes import backwards, left_as_found
from secateur.importance.places import Gradients, Place, producers
from secateur.importance.reach import seen_whole
from secateur.importance.running_sums import batches_to_add

TINY = 1e-30  # the authors' guard against 0 / 0


def agreement(model: MultiTaskModel, groups: Sequence[ChannelGroup], data: TaskData) -> Scores:
    """Return per group the (width,) mean cosine ``c`` mapped to 0..1 as ``(1 + c) / 2``.

    A pair with a task that does not use the channel counts as cosine 0. One task alone agrees with
    itself: 1 everywhere.
    """
    pairs = list(combinations(data.tasks, 2))
    if not pairs:
        return {group.name: np.ones(group.width) for group in groups}
    places = producers(model, groups)
    parameters = (p for found in places.values() for place in found for p in place.parameters)
    wanted = list(dict.fromkeys(parameters))
    totals, count = {group.name: np.zeros(group.width) for group in groups}, np.zeros(1)
    sums = {name: torch.from_numpy(values) for name, values in {**totals, "": count}.items()}
    with left_as_found(model, wanted):
        for batch, how in seen_whole(model, batches_to_add(data, sums), data.tasks):
            count += 1
            gradients: dict[str, Gradients] = {
                task: dict(zip(wanted, found, strict=True))
                for task, found in backwards(model, wanted, batch, data.tasks, how)
            }
            for name, found in places.items():
                totals[name] += _mean_cosine(found, gradients, pairs)
    return {name: (1 + total / np.maximum(count, 1)) / 2 for name, total in totals.items()}


def _mean_cosine(
    places: Sequence[Place],
    gradients: Mapping[str, Gradients],
    pairs: Sequence[tuple[str, str]],
) -> NDArray[np.float64]:
    rows = {task: _rows(places, found) for task, found in gradients.items()}
    cosines = [
        (rows[a] * rows[b]).sum(1) / (rows[a].norm(dim=1) * rows[b].norm(dim=1) + TINY)
        for a, b in pairs
    ]
    mean: NDArray[np.float64] = torch.stack(cosines).mean(dim=0).clamp(-1, 1).cpu().numpy()
    return mean


def _rows(places: Sequence[Place], gradients: Gradients) -> Tensor:
    """Return a task's gradient in each channel's weights, all its producers side by side."""
    parts = [
        rows if (rows := place.gradient_rows(gradients)) is not None else 0 * place.weights()
        for place in places
    ]
    return torch.cat(parts, dim=1).double()
