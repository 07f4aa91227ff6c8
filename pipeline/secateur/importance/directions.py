"""How active, and how important to each task, are the *directions* of a group's channels?

Where channels may be mixed freely (``secateur.prune.axes``) single channels are an accident of
training. What matters there are two (width, width) matrices: the covariance of what the channels
carry, and each task's second moment of the gradient of its loss in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.core.channels import ChannelGroup, Member
from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import TaskBatch, TaskData
from secateur.importance.passes import backwards, left_as_found
from secateur.importance.reach import seen_whole
from secateur.importance.running_sums import batches_to_add

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Directions:
    """``activity``: covariance over positions and images. ``gradients``: per task; both (W, W)."""

    activity: Matrix
    gradients: Mapping[str, Matrix]


def measure_directions(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], data: TaskData
) -> dict[str, Directions]:
    """Return the directions of each group, read at the inputs of every layer that reads it.

    All tasks share one forward; a task that does not depend on a group has a matrix of zeros.
    ``groups`` must be read by convolutions or linear layers.
    """
    modules = dict(model.named_modules())
    readers = {m.layer: modules[m.layer] for g in groups for m in g.members if m.axis == "in"}
    axes = {name: -1 if isinstance(reader, nn.Linear) else 1 for name, reader in readers.items()}
    sums = {group.name: _Sums(group, data.tasks, axes) for group in groups}
    named = {f"{i} {k}": v for i, s in enumerate(sums.values()) for k, v in s.tensors().items()}
    with left_as_found(model, ()):
        for batch, how in seen_whole(model, batches_to_add(data, named), data.tasks):
            images = batch.images.detach().requires_grad_()  # so that activations have gradients
            with _inputs(readers) as (names, tensors):  # both are filled by the forward pass
                taken = TaskBatch(images, batch.losses)
                for task, found in backwards(model, tensors, taken, data.tasks, how):
                    for total in sums.values():
                        total.add_gradients(task, dict(zip(names, found, strict=True)))
            for total in sums.values():
                total.add_activity(dict(zip(names, tensors, strict=True)))
    return {name: total.directions() for name, total in sums.items()}


@contextmanager
def _inputs(layers: Mapping[str, nn.Module]) -> Iterator[tuple[list[str], list[Tensor]]]:
    """Note the names of layers that run and the tensors they read, each layer's first call."""
    names: list[str] = []
    tensors: list[Tensor] = []

    def note(name: str, tensor: Tensor) -> None:
        if name not in names:
            names.append(name)
            tensors.append(tensor)

    hooks = [
        layer.register_forward_pre_hook(lambda _m, args, name=name: note(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        yield names, tensors
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _Sums:
    """Running sums of one group, over batches and over the layers that read it."""

    group: ChannelGroup
    tasks: Sequence[str]
    axes: Mapping[str, int]  # where the channels of each reader's input are
    count: Tensor = field(init=False)
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)
    gradients: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        width = self.group.width
        self.count = torch.zeros(1, dtype=torch.float64)
        self.first = torch.zeros(width, dtype=torch.float64)
        self.second = torch.zeros(width, width, dtype=torch.float64)
        self.gradients = {task: torch.zeros_like(self.second) for task in self.tasks}

    def tensors(self) -> dict[str, Tensor]:
        """Return all that is added to, by name."""
        named = {f"gradients {task}": total for task, total in self.gradients.items()}
        return {"count": self.count, "first": self.first, "second": self.second, **named}

    def add_activity(self, inputs: Mapping[str, Tensor]) -> None:
        for columns in self._columns(inputs):
            self.count += columns.shape[1]
            self.first += columns.sum(1).cpu()
            self.second += (columns @ columns.T).cpu()

    def add_gradients(self, task: str, gradients: Mapping[str, Tensor | None]) -> None:
        for columns in self._columns(gradients):
            self.gradients[task] += (columns @ columns.T).cpu()

    def directions(self) -> Directions:
        count = self.count.clamp(min=1)
        mean = self.first / count
        activity = self.second / count - mean[:, None] * mean[None]
        return Directions(activity.numpy(), {t: g.numpy() for t, g in self.gradients.items()})

    def _columns(self, tensors: Mapping[str, Tensor | None]) -> list[Tensor]:
        """Return (width, positions) per reader, and per place of a channel in it."""
        found = []
        for member in self.group.members:
            tensor = tensors.get(member.layer)
            if member.axis == "in" and tensor is not None:
                axis = self.axes[member.layer]
                found += [_rows(tensor.detach(), member, j, axis)
                          for j in range(len(member.indices[0]))]  # fmt: skip
        return found


def _rows(tensor: Tensor, member: Member, place: int, axis: int) -> Tensor:
    """Return (width, positions) in float64: a covariance is a small difference of large sums."""
    at = torch.tensor([places[place] for places in member.indices], device=tensor.device)
    return tensor.index_select(axis, at).movedim(axis, 0).flatten(1).double()
