"""The score bank: every task's scores of one parent, so that any subset is planned for free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from secateur.core.channels import ChannelGroup
from secateur.core.errors import DataError
from secateur.core.files import atomic_path
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.progress import track
from secateur.core.task import Task
from secateur.data.loading import Batch
from secateur.importance.criterion import Loss, criterion_of
from secateur.metrics.kind import kind_of

GroupScores = Mapping[str, NDArray[np.float64]]


def score_task(
    model: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    task: Task,
    criterion: str,
    stream: Callable[[], Iterable[Batch]],
    batch_count: int,
) -> dict[str, NDArray[np.float64]]:
    """Return (width,) scores per group for one task.

    Where the batches carry no target for the task, targets are drawn from the model's own
    outputs (see ``TaskKind.sample_target``).

    Raises:
        DataError: a score is not finite.
    """
    kind = kind_of(task)
    targets: list[Tensor] = []

    def images() -> Iterable[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for batch in track(stream(), f"scoring {task.name}", batch_count):
            if task.name in batch.targets:
                targets.append(batch.targets[task.name])
            else:
                with evaluating(model):
                    output = model(batch.images)[task.name]
                targets.append(kind.sample_target(output, generator))
            yield batch.images

    loss: Loss = lambda outputs, number: kind.loss(outputs[task.name], targets[number])  # noqa: E731
    scores = criterion_of(criterion).score(model, groups, images(), loss)
    bad = [name for name, values in scores.items() if not np.isfinite(values).all()]
    if bad:
        raise DataError(
            f"the importance of group '{bad[0]}' for task '{task.name}' is not finite",
            hint="check the labels and the model's outputs on the training images",
        )
    return scores


def save_scores(path: Path, scores: GroupScores) -> None:
    """Write one task's scores as safetensors."""
    with atomic_path(path) as temporary:
        save_file(
            {name: np.ascontiguousarray(values) for name, values in scores.items()}, temporary
        )


def load_scores(path: Path) -> dict[str, NDArray[np.float64]] | None:
    """Read scores, or return None when there are none or the file is damaged."""
    try:
        return dict(load_file(path))
    except (FileNotFoundError, SafetensorError):
        return None
