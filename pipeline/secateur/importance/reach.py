"""What of a network a task's gradient reaches, and a forward that hides none of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from secateur.core.attached import Attached
from secateur.core.errors import ModelError
from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import TaskBatch


def seen_whole(
    model: MultiTaskModel, batches: Iterable[TaskBatch], tasks: Sequence[str]
) -> Iterator[tuple[TaskBatch, AbstractContextManager[Any]]]:
    """Yield each batch, and what ``model`` is run in on it: see ``attached``."""
    how: AbstractContextManager[Any] | None = None
    for batch in batches:
        how = how or attached(model, batch.images[:1], tasks)
        yield batch, how


def attached(
    model: MultiTaskModel, image: Tensor, tasks: Sequence[str]
) -> AbstractContextManager[Any]:
    """Return what to run ``model`` in, so that scores tell what ``tasks`` are computed from.

    A ``detach`` in forward (a head that shall not train the trunk) hides from a gradient what the
    task reads all the same: where one does so, it is passed over. One that hides nothing stays: a
    straight-through estimator is made of it. ``image``: (1, C, H, W).

    Raises:
        ModelError: a task's gradient reaches no weight whatever: scores would be of nothing.
    """
    plain = _reached(model, image, tasks)
    with Attached():
        whole = _reached(model, image, tasks)
    for task, names in whole.items():
        if not names | plain[task]:
            raise ModelError(
                f"no gradient of task '{task}' reaches a weight of the network, so nothing tells "
                "what it needs",
                hint="do without torch.no_grad, numpy and .data in forward, or score by what needs "
                "no gradient: prune.criterion: magnitude",
            )
    hidden = any(names - plain[task] for task, names in whole.items())
    return Attached() if hidden else nullcontext()


def _reached(model: MultiTaskModel, image: Tensor, tasks: Sequence[str]) -> dict[str, set[str]]:
    """Return, per task, the parameters that a gradient of its output reaches."""
    parameters = dict(model.named_parameters())
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            outputs = model(image)
        found = {}
        for task in tasks:
            gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
            if outputs[task].requires_grad and parameters:
                gradients = torch.autograd.grad(
                    outputs[task].sum(), [*parameters.values()], retain_graph=True,
                    allow_unused=True,
                )  # fmt: skip
            pairs = zip(parameters, gradients, strict=True)
            found[task] = {name for name, gradient in pairs if gradient is not None}
        return found
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(flags[name])
