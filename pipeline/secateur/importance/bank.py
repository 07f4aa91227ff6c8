"""The score bank: every task's scores of one parent, so that any subset is planned for free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
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
from secateur.importance.criterion import Scores, TaskBatch, TaskData, criterion_of
from secateur.metrics.kind import TaskKind, kind_of

GroupScores = Mapping[str, NDArray[np.float64]]
Stream = Callable[[], Iterable[Batch]]


def score_tasks(
    model: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    tasks: Sequence[Task],
    criterion: str,
    stream: Stream,
    batch_count: int,
    kept: Path | None = None,
) -> dict[str, Scores]:
    """Return (width,) scores per task and group: each task's own, made in one pass over the images.

    The model is left as it was. For targets and ``kept``, see ``task_data``.

    Raises:
        RecipeError: there is no such criterion.
        DataError: a score is not finite.
    """
    data = task_data(model, tasks, stream, batch_count, kept)
    bank = criterion_of(criterion)(model, groups, data)
    for task, scores in bank.items():
        bad = [name for name, values in scores.items() if not np.isfinite(values).all()]
        if bad:
            raise DataError(
                f"the importance of group '{bad[0]}' for task '{task}' is not finite",
                hint="check the labels and the model's outputs on the training images",
            )
    return bank


def task_data(
    model: MultiTaskModel,
    tasks: Sequence[Task],
    stream: Stream,
    batch_count: int,
    kept: Path | None = None,
) -> TaskData:
    """Return the batches of ``stream`` with each task's loss; one batch is held at a time.

    Where a batch carries no target for a task, one is drawn from the model's own output (see
    ``TaskKind.sample_target``), the same in every pass and whatever tasks are beside it. A pass
    that is stopped goes on from what it left in the file ``kept``, whose name has to tell apart
    all that the pass depends on.
    """
    kinds = {task.name: kind_of(task) for task in tasks}
    names = tuple(kinds)

    def batches(skipped: int) -> Iterator[TaskBatch]:
        shown = track(stream(), f"scoring {', '.join(names)}", batch_count)
        for number, batch in enumerate(shown):
            if number < skipped:
                continue
            targets = {name: batch.targets[name] for name in names if name in batch.targets}
            if len(targets) < len(names):
                with evaluating(model):
                    outputs = model(batch.images)
                for name in names:
                    if name not in targets:
                        generator = torch.Generator().manual_seed(number)
                        targets[name] = kinds[name].sample_target(outputs[name], generator)
            losses = {name: partial(kinds[name].loss, target=targets[name]) for name in names}
            own = {name: partial(_by_image, kinds[name], target=targets[name]) for name in names}
            yield TaskBatch(batch.images, losses, own)

    return TaskData(names, batches, kept)


def _by_image(kind: TaskKind, output: Tensor, target: Tensor) -> Tensor:
    """Return the sum over images of each one's own loss."""
    pairs = zip(torch.split(output, 1), torch.split(target, 1), strict=True)
    return torch.stack([kind.loss(made, wanted) for made, wanted in pairs]).sum()


def save_scores(path: Path, scores: GroupScores) -> None:
    """Write one task's scores as safetensors."""
    with atomic_path(path) as temporary:
        save_file(
            {name: np.ascontiguousarray(values) for name, values in scores.items()}, temporary
        )


def load_scores(path: Path) -> Scores | None:
    """Read scores, or return None when there are none or the file is damaged."""
    try:
        return dict(load_file(path))
    except (FileNotFoundError, SafetensorError):
        return None
