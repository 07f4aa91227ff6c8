"""What several rivals measure: gate changes, torch-pruning's own scores, norms, ranks, users."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from fusion.bench import Bench, Scores
from numpy.typing import NDArray
from secateur.core.channels import ChannelGroup, Member
from secateur.core.model import MultiTaskModel
from secateur.data.loading import Batch
from secateur.prune.tracing import dependency_graph
from secateur.tasks import decompose
from torch import Tensor, nn

IMAGES = 96  # labelled training images that a score is measured on
Objective = Callable[[Mapping[str, Tensor], Batch], Mapping[str, Tensor]]
"""From outputs and batch to the losses to differentiate, each on its own, by name."""


def gate_scores(
    bench: Bench, model: MultiTaskModel, groups: Sequence[ChannelGroup], seed: int
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Return each task's gate Taylor, as ``secateur.importance.taylor`` defines it."""
    per_task: Objective = lambda outputs, batch: bench.losses(outputs, batch.targets)  # noqa: E731
    squares = gate_squares(model, groups, bench.stream(IMAGES, seed), per_task)
    return {task: roots(values) for task, values in squares.items()}


def mean_of_tasks(per_task: Mapping[str, Scores]) -> dict[str, NDArray[np.float64]]:
    """Return the mean of the tasks' scores, each divided by its sum over all groups."""
    groups = next(iter(per_task.values()))
    totals = {t: sum(float(v.sum()) for v in scores.values()) for t, scores in per_task.items()}
    return {
        name: np.mean([scores[name] / (totals[t] or 1.0) for t, scores in per_task.items()], axis=0)
        for name in groups
    }


def summed(bench: Bench) -> Objective:
    """Return the objective of a method that knows one loss only: the sum over the tasks."""

    def objective(outputs: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return {"sum": torch.stack(list(bench.losses(outputs, batch.targets).values())).sum()}

    return objective


def roots(squares: Scores) -> dict[str, NDArray[np.float64]]:
    """Return Taylor scores of ``gate_squares``: the root of each gate's sum, then their mean."""
    return {name: np.sqrt(values).mean(axis=0) for name, values in squares.items()}


def gate_squares(
    model: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    stream: Iterable[Batch],
    objective: Objective,
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Return, by loss and group, (gates, width) sums over batches of squared gate changes.

    The change is ``gamma * dL/dgamma + beta * dL/dbeta`` of each batch norm of the group (Molchanov
    et al., arXiv 1906.10771, eq. 8 on gates), or the same of its producing layers where it has
    none. Every loss is differentiated on its own and nothing is left in ``.grad``.
    """
    modules = dict(model.named_modules())
    gates = {group.name: gate_members(group, modules) for group in groups}
    layers = sorted({member.layer for members in gates.values() for member in members})
    owned = {layer: _affine(modules[layer]) for layer in layers}
    flat = [parameter for parameters in owned.values() for parameter in parameters]
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    model.eval()
    for parameter in flat:
        parameter.requires_grad_(True)
    for batch in stream:
        for name, loss in objective(model(batch.images), batch).items():
            gradients = torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True)
            by_parameter = dict(zip(map(id, flat), gradients, strict=True))
            changes = {layer: _change(owned[layer], by_parameter) for layer in layers}
            sums = found.setdefault(
                name, {g.name: np.zeros((len(gates[g.name]), g.width)) for g in groups}
            )
            for group, members in gates.items():
                for row, member in enumerate(members):
                    values = changes[member.layer]
                    sums[group][row] += [values[list(at)].sum() ** 2 for at in member.indices]
    return found


def gate_members(group: ChannelGroup, modules: Mapping[str, nn.Module]) -> list[Member]:
    """Return where the group's channels are scaled: its batch norms, else its producing layers."""
    makers = [member for member in group.members if member.axis == "out"]
    batch_norm = nn.modules.batchnorm._BatchNorm
    norms = [m for m in makers if isinstance(modules[m.layer], batch_norm)]
    return norms or [m for m in makers if isinstance(modules[m.layer], nn.Conv2d | nn.Linear)]


def _affine(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in (module.weight, module.bias) if isinstance(p, nn.Parameter)]


def _change(
    parameters: Sequence[nn.Parameter], gradients: Mapping[int, Tensor | None]
) -> NDArray[np.float64]:
    total = np.zeros(len(parameters[0]))
    for parameter in parameters:
        gradient = gradients[id(parameter)]
        if gradient is not None:  # None: this loss does not depend on the layer
            total += (parameter.detach() * gradient).reshape(len(total), -1).sum(1).double().numpy()
    return total


def torch_pruning_scores(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], example: Tensor, importance: Any
) -> dict[str, NDArray[np.float64]]:
    """Return what a ``torch_pruning`` importance gives the channels of our groups."""
    graph = dependency_graph(model, example)
    modules = dict(model.named_modules())
    whole: dict[str, NDArray[np.float64]] = {}
    for root in {group.root for group in groups}:
        cut = graph.get_pruner_of_module(modules[root])
        everything = list(range(cut.get_out_channels(modules[root])))
        coupled = graph.get_pruning_group(modules[root], cut.prune_out_channels, everything)
        whole[root] = importance(coupled).double().numpy()
    return {group.name: whole[group.root][list(group.channels)] for group in groups}


def channel_norms(
    modules: Mapping[str, nn.Module], groups: Sequence[ChannelGroup]
) -> dict[str, Tensor]:
    """Return (width,) L2 norms of each channel's filters, over their group's mean; with grad."""
    result = {}
    for group in groups:
        squares = []
        for member in group.members:
            module = modules[member.layer]
            if member.axis == "out" and isinstance(module, nn.Conv2d | nn.Linear):
                rows = module.weight.reshape(len(module.weight), -1).pow(2).sum(1)
                squares.append(rows[torch.tensor(member.indices)].sum(1))
        norms = torch.stack(squares).sum(0).clamp(min=1e-20).sqrt()
        result[group.name] = norms / norms.mean()
    return result


def rank_share(scores: Scores) -> dict[str, NDArray[np.float64]]:
    """Rank all channels of all these groups together: 1 for the best, 1 / n for the worst."""
    flat = np.concatenate(list(scores.values()))
    ranks = np.empty(len(flat))
    ranks[np.argsort(flat, kind="stable")] = np.arange(1, len(flat) + 1) / len(flat)
    ends = np.cumsum([len(values) for values in scores.values()])[:-1]
    return dict(zip(scores, np.split(ranks, ends), strict=True))


def users(bench: Bench) -> dict[str, frozenset[str]]:
    """Return which tasks depend on each group of the parent."""
    layers = decompose(copy.deepcopy(bench.parent), bench.example).layers
    return {
        group.name: frozenset(
            task for m in group.members if m.axis == "out" for task in layers[m.layer]
        )
        for group in bench.groups
    }
