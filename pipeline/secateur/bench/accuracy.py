"""Per-task metrics of anything that maps images to task outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.core.model import ModelInput, MultiTaskModel, evaluating
from secateur.core.progress import track
from secateur.core.task import Task
from secateur.data.loading import batches
from secateur.data.sample import Reader
from secateur.metrics.kind import kind_of

Predict = Callable[[Tensor], Mapping[str, Tensor]]
Sums = Mapping[str, NDArray[np.float64]]
"""Per task what its evaluator summed up in each unit: (units, ...)."""

MOST_UNITS = 2048
"""Units that images are kept apart in: one each, or where there are more, neighbours together."""


@dataclass(frozen=True)
class Scores:
    """``metrics`` of all images; NaN for a task that cannot be judged, for one of two reasons.

    ``wrong`` counts the images where a task's output has NaN, ``unlabelled`` names the tasks that
    no image has a label for. ``sums`` are there if asked for.
    """

    metrics: dict[str, dict[str, float]]
    sums: Sums = field(default_factory=dict)
    wrong: Mapping[str, int] = field(default_factory=dict)
    unlabelled: tuple[str, ...] = ()


def evaluate(
    predict: Predict,
    tasks: Sequence[Task],
    reader: Reader,
    spec: ModelInput,
    *,
    batch_size: int = 16,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Return ``{task: {metric: value}}`` of ``predict`` over ``reader``.

    Dense outputs are resized to the input's size, where labels are compared.
    """
    return score(predict, tasks, reader, spec, batch_size=batch_size, limit=limit).metrics


def score(
    predict: Predict,
    tasks: Sequence[Task],
    reader: Reader,
    spec: ModelInput,
    *,
    batch_size: int = 16,
    limit: int | None = None,
    title: str = "evaluating",
    per_image: bool = False,
) -> Scores:
    """``evaluate``, and say what cannot be judged; ``per_image`` keeps what intervals need."""
    evaluators = {task.name: kind_of(task).evaluator() for task in tasks}
    count = min(len(reader), limit or len(reader))
    units = _Units(tasks, count) if per_image else None
    wrong = dict.fromkeys(evaluators, 0)
    stream = batches(reader, tasks, spec, batch_size, limit=limit)
    for batch in track(stream, title, -(-count // batch_size)):
        outputs = predict(batch.images)
        for task in tasks:
            output, target = outputs[task.name], batch.targets[task.name]
            wrong[task.name] += int(output.isnan().flatten(1).any(1).sum())
            evaluators[task.name].update(output, target)
        if units is not None:
            units.add(outputs, batch.targets)
    unlabelled = tuple(name for name, each in evaluators.items() if not each.sums.any())
    return Scores(
        {
            name: dict.fromkeys(found, math.nan) if wrong[name] or name in unlabelled else found
            for name, found in ((name, each.compute()) for name, each in evaluators.items())
        },
        units.sums if units is not None else {},
        {name: images for name, images in wrong.items() if images},
        unlabelled,
    )


def evaluate_model(
    model: MultiTaskModel, reader: Reader, spec: ModelInput, **options: object
) -> dict[str, dict[str, float]]:
    """``evaluate`` a torch model in eval mode."""
    return score_model(model, reader, spec, **options).metrics


def score_model(
    model: MultiTaskModel, reader: Reader, spec: ModelInput, **options: object
) -> Scores:
    """``score`` a torch model in eval mode."""
    device = next(model.parameters()).device

    def predict(images: Tensor) -> dict[str, Tensor]:
        return {name: output.cpu() for name, output in model(images.to(device)).items()}

    with evaluating(model):
        return score(predict, model.tasks, reader, spec, **options)  # type: ignore[arg-type]


def metrics_of(tasks: Sequence[Task], sums: Sums) -> dict[str, dict[str, float]]:
    """Return the tasks' metrics of all units together."""
    found = {}
    for task in tasks:
        evaluator = kind_of(task).evaluator()
        evaluator.sums = torch.from_numpy(sums[task.name].sum(axis=0))
        found[task.name] = evaluator.compute()
    return found


class _Units:
    """Collects each image's sums; a few thousand rows at most, however many images come."""

    def __init__(self, tasks: Sequence[Task], count: int) -> None:
        self._kinds = {task.name: kind_of(task) for task in tasks}
        self._count, self._seen, size = count, 0, min(count, MOST_UNITS)
        self.sums = {
            name: np.zeros((size, *kind.evaluator().sums.shape))
            for name, kind in self._kinds.items()
        }

    def add(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
        for name, kind in self._kinds.items():
            rows = self.sums[name]
            for index in range(len(targets[name])):
                evaluator, which = kind.evaluator(), slice(index, index + 1)
                evaluator.update(outputs[name][which], targets[name][which])
                rows[(self._seen + index) * len(rows) // self._count] += evaluator.sums.numpy()
        self._seen += len(next(iter(targets.values())))
