"""Who uses which parameter: found by use (autograd), never by a module's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.model import MultiTaskModel


@dataclass(frozen=True)
class TaskUse:
    """``layers``: for each layer with weights, the tasks whose output depends on it.

    ``params`` and ``macs`` are per layer; a layer no task uses has an empty set.
    """

    tasks: tuple[str, ...]
    layers: Mapping[str, frozenset[str]]
    params: Mapping[str, int]
    macs: Mapping[str, int]

    def private(self, task: str, amounts: Mapping[str, int]) -> int:
        """Return the amount in layers only ``task`` uses: what dropping it saves."""
        return sum(amounts.get(name, 0) for name, users in self.layers.items() if users == {task})

    def used(self, task: str, amounts: Mapping[str, int]) -> int:
        """Return the amount in all layers that ``task`` uses."""
        return sum(amounts.get(name, 0) for name, users in self.layers.items() if task in users)

    def shared_by(self, count: int, amounts: Mapping[str, int]) -> int:
        """Return the amount in layers used by exactly ``count`` tasks."""
        return sum(
            amounts.get(name, 0) for name, users in self.layers.items() if len(users) == count
        )


def decompose(model: MultiTaskModel, example: Tensor, macs: Mapping[str, int]) -> TaskUse:
    """Return which tasks depend on which layer; ``macs`` are per layer of ``model``."""
    owners = {
        name: list(module.parameters(recurse=False)) for name, module in model.named_modules()
    }
    owners = {name: parameters for name, parameters in owners.items() if parameters}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.eval()
    outputs = model(example)
    everything = list(model.parameters())
    users: dict[str, set[str]] = {name: set() for name in owners}
    for task, output in outputs.items():
        gradients = torch.autograd.grad(
            output.sum(), everything, retain_graph=True, allow_unused=True
        )
        reached = {id(p) for p, g in zip(everything, gradients, strict=True) if g is not None}
        for name, parameters in owners.items():
            if any(id(parameter) in reached for parameter in parameters):
                users[name].add(task)
    return TaskUse(
        tasks=tuple(outputs),
        layers={name: frozenset(tasks) for name, tasks in users.items()},
        params={name: sum(p.numel() for p in owned) for name, owned in owners.items()},
        macs=macs,
    )
