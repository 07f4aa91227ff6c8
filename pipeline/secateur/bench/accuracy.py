"""Per-task metrics of anything that maps images to task outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from secateur.core.model import ModelInput, MultiTaskModel, evaluating
from secateur.core.progress import track
from secateur.core.task import Task
from secateur.data.loading import batches
from secateur.data.sample import Reader
from secateur.metrics.kind import kind_of

Predict = Callable[[Tensor], Mapping[str, Tensor]]


def evaluate(
    predict: Predict,
    tasks: Sequence[Task],
    reader: Reader,
    spec: ModelInput,
    *,
    batch_size: int = 16,
    limit: int | None = None,
    title: str = "evaluating",
) -> dict[str, dict[str, float]]:
    """Return ``{task: {metric: value}}`` of ``predict`` over ``reader``.

    Dense outputs are resized to the input's size, where labels are compared.
    """
    evaluators = {task.name: kind_of(task).evaluator() for task in tasks}
    count = min(len(reader), limit or len(reader))
    stream = batches(reader, tasks, spec, batch_size, limit=limit)
    for batch in track(stream, title, -(-count // batch_size)):
        outputs = predict(batch.images)
        for task in tasks:
            evaluators[task.name].update(outputs[task.name], batch.targets[task.name])
    return {name: evaluator.compute() for name, evaluator in evaluators.items()}


def evaluate_model(
    model: MultiTaskModel, reader: Reader, spec: ModelInput, **options: object
) -> dict[str, dict[str, float]]:
    """``evaluate`` a torch model in eval mode."""
    device = next(model.parameters()).device

    def predict(images: Tensor) -> dict[str, Tensor]:
        return {name: output.cpu() for name, output in model(images.to(device)).items()}

    with evaluating(model):
        return evaluate(predict, model.tasks, reader, spec, **options)  # type: ignore[arg-type]
