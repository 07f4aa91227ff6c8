"""The contract of a task kind, and how one is found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from secateur.core import registry
from secateur.core.errors import DataError, RecipeError
from secateur.core.task import Task


class Evaluator(Protocol):
    """Streams over batches and keeps only sums, so memory does not grow with the data.

    ``sums`` (float64, a shape of its own) is all that ``update`` adds to and ``compute`` reads, and
    zero everywhere until there is a label: the sums of two sets of images add up to those of both.
    """

    sums: Tensor

    def update(self, output: Tensor, target: Tensor) -> None: ...

    def compute(self) -> dict[str, float]: ...


class TaskKind(Protocol):
    """What one kind of task needs. Outputs are raw network outputs of shape (N, ...)."""

    higher_is_better: Mapping[str, bool]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the scalar training loss; pixels without a label do not count."""
        ...

    def distillation_loss(self, output: Tensor, parent: Tensor) -> Tensor:
        """Return the scalar distance to the parent's output; zero when they are equal."""
        ...

    def sample_target(self, parent: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a target from the parent's output.

        Without labels the distance to the parent is zero, and so is its gradient; a drawn
        target gives the Fisher information of the parent's own prediction instead.
        """
        ...

    def evaluator(self) -> Evaluator: ...


def kind_of(task: Task) -> TaskKind:
    """Return the task's kind.

    Raises:
        RecipeError: there is no file (or entry point) of that name, or a class count is missing.
    """
    try:
        module = registry.load("secateur.metrics", task.kind)
    except KeyError as error:
        raise RecipeError(
            f"tasks.{task.name}.kind: '{task.kind}' is not a task kind",
            hint=f"kinds: {', '.join(registry.entries('secateur.metrics'))}",
        ) from error
    kind: TaskKind = module.create(task)
    return kind


def class_count(task: Task) -> int:
    """Return ``task.classes``.

    Raises:
        RecipeError: it is not set.
    """
    if not task.classes:
        raise RecipeError(
            f"tasks.{task.name}.classes is missing",
            hint=f"a {task.kind} task needs the number of its classes, for example classes: 13",
        )
    return task.classes


def resized(output: Tensor, target: Tensor) -> Tensor:
    """Return a dense (N, C, h, w) output resized bilinearly to the target's (H, W)."""
    size = target.shape[-2:]
    if output.shape[-2:] == size:
        return output
    return functional.interpolate(output, size=size, mode="bilinear", align_corners=False)


def like(target: Tensor, output: Tensor) -> Tensor:
    """Return a target of values per image in the shape of the output.

    Raises:
        DataError: they are not equally many.
    """
    if target.numel() != output.numel():
        raise DataError(
            f"the label has {target.numel() // len(target)} value(s) per image, the output "
            f"{output.numel() // len(output)}, in batches of {tuple(target.shape)} and "
            f"{tuple(output.shape)}",
            hint="set tasks.<name>.output or label to those that belong together",
        )
    return target.reshape(output.shape)


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Return the mean of ``values`` where ``valid``; zero, with a gradient, where none is.

    What is not valid may be NaN or infinite.
    """
    kept = torch.where(valid, values, torch.zeros_like(values))
    return kept.sum() / valid.to(values.dtype).sum().clamp(min=1)
