"""The scoring pass as the suites call it: the one place to change when its signature does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.data.loading import Batch
from secateur.importance.bank import score_task

Scores = dict[str, NDArray[np.float64]]


def score_all(
    model: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    criterion: str,
    stream: Callable[[], Iterable[Batch]],
    batch_count: int,
) -> dict[str, Scores]:
    """Return every task's (width,) scores per group."""
    return {
        task.name: score_task(model, groups, task, criterion, stream, batch_count)
        for task in model.tasks
    }
