"""The contract of a criterion, and how one is found.

A criterion is a file with one function, ``score``. Those that read gradients go over the images in
``passes``, where all tasks share one forward; the others ignore the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secateur.core import registry
from secateur.core.channels import ChannelGroup
from secateur.core.errors import RecipeError
from secateur.core.model import MultiTaskModel

Scores = dict[str, NDArray[np.float64]]
"""(width,) numbers by group name."""
Loss = Callable[[Tensor], Tensor]
"""From one task's output to its scalar loss, a mean over the batch."""


@dataclass(frozen=True)
class TaskBatch:
    """``images`` (N, C, H, W), and what each task's output on them should have been.

    ``own`` are the same losses of each image by itself, added up. Where labels are of few pixels,
    or of few images, a mean over the batch is no mean of these; where ``own`` is empty, it is.
    """

    images: Tensor
    losses: Mapping[str, Loss]
    own: Mapping[str, Loss] = field(default_factory=dict)

    def by_image(self) -> TaskBatch:
        """Return the batch with the sum over images of each one's own loss, per task."""
        size = len(self.images)
        sums = {task: partial(_times, size, loss) for task, loss in self.losses.items()}
        return replace(self, losses={**sums, **self.own})


def _times(factor: int, loss: Loss, output: Tensor) -> Tensor:
    return factor * loss(output)


@dataclass(frozen=True)
class TaskData:
    """The tasks to score and the batches to score them on; iterating starts again each time.

    ``stream`` leaves out as many of the first batches as it is told to. ``kept``, if any, is the
    file in which a pass that is stopped leaves its sums (``running_sums``).
    """

    tasks: tuple[str, ...]
    stream: Callable[[int], Iterable[TaskBatch]]
    kept: Path | None = None

    def __iter__(self) -> Iterator[TaskBatch]:
        return iter(self.stream(0))


class Criterion(Protocol):
    """Scores every task of ``data``, each from its own loss alone; leaves ``model`` as it was."""

    def __call__(
        self, model: MultiTaskModel, groups: Sequence[ChannelGroup], data: TaskData
    ) -> dict[str, Scores]:
        """Return, per task and group name, finite (width,) scores >= 0."""
        ...


def criterion_of(name: str) -> Criterion:
    """Return the criterion ``name``; ``name:option`` where its file has ``configured(option)``.

    Raises:
        RecipeError: there is no file (or entry point) of that name, or the option does not fit.
    """
    entry, colon, option = name.partition(":")
    try:
        module = registry.load("secateur.importance", entry)
    except KeyError as error:
        raise RecipeError(
            f"prune.criterion: '{entry}' is not a criterion",
            hint=f"criteria: {', '.join(registry.entries('secateur.importance'))}",
        ) from error
    if not colon:
        plain: Criterion = module.score
        return plain
    if not hasattr(module, "configured"):
        raise RecipeError(
            f"prune.criterion: '{entry}' takes no option, got '{option}'",
            hint=f"write prune.criterion: {entry}",
        )
    configured: Criterion = module.configured(option)
    return configured


def goes_by_scale(name: str) -> bool:
    """Say whether a criterion goes by how large numbers are that a network may scale freely.

    Its file says so with ``BY_SCALE``; gradients times weights do not change with such a scale.

    Raises:
        RecipeError: there is no such criterion.
    """
    criterion_of(name)
    return getattr(registry.load("secateur.importance", name.partition(":")[0]), "BY_SCALE", False)


def same_for_all(data: TaskData, scores: Scores) -> dict[str, Scores]:
    """Return ``scores`` for every task: what a criterion does that no task has a say in."""
    return {task: dict(scores) for task in data.tasks}
