"""Find the groups of channels that can only go together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch_pruning.dependency import Group

from secateur.core.channels import Axis, ChannelGroup, Member
from secateur.core.model import MultiTaskModel
from secateur.prune.attention import head_groups
from secateur.prune.conv_groups import conv_groups, is_grouped
from secateur.prune.tracing import ROOT_TYPES, coupled_sets, dependency_graph, differentiable
from secateur.prune.trial import removable


def whole_layers(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], example: Tensor
) -> dict[str, int]:
    """Return the layers none of whose output channels can go, and their parameters, most first.

    What makes a task's output stays whole of itself, and is not among them.
    """
    cut = {member.layer for group in groups for member in group.members if member.axis == "out"}
    last = {id(layer) for layer in output_layers(model, example)}
    found = {
        name: sum(parameter.numel() for parameter in layer.parameters())
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and name not in cut and id(layer) not in last
    }
    return dict(sorted(found.items(), key=lambda one: -one[1]))


def output_layers(model: MultiTaskModel, example: Tensor) -> list[nn.Module]:
    """Return the last parametrised layers before each output: their channels are the answer.

    Found by walking the autograd graph back from each output to the nearest weights, so names
    play no part.
    """
    owners = {
        id(parameter): module
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.numel() > 1  # a learnt scale after the last layer is not that layer
    }
    found: list[nn.Module] = []
    with differentiable(model):
        outputs = model(example)
    for output in outputs.values():
        frontier, seen = [output.grad_fn], set()
        while frontier:
            node = frontier.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            owned = [owners[leaf] for leaf in _leaves(parents) if leaf in owners]
            if owned:
                found.extend(owned)
            else:
                frontier.extend(parents)
    return found


def _leaves(nodes: Sequence[Any]) -> Iterator[int]:
    """Yield the ids of weights among autograd ``nodes``, looking through Linear's transposes."""
    for node in nodes:
        if hasattr(node, "variable"):
            yield id(node.variable)
        elif type(node).__name__ in ("TBackward0", "TransposeBackward0"):
            yield from _leaves([parent for parent, _ in node.next_functions])


def find_groups(model: MultiTaskModel, example: Tensor) -> tuple[ChannelGroup, ...]:
    """Return every group of channels that may be removed, outputs' own channels excepted.

    Raises:
        ModelError: the model cannot be traced.
    """
    heads = head_groups(model)
    graph = dependency_graph(model, example)
    names = {module: name for name, module in model.named_modules()}
    bare = {id(parameter): name for name, parameter in model.named_parameters()}
    fixed = {*_uncounted_layers(model), *_tied_layers(model)}
    by_head = {model.get_submodule(group.root) for group in heads}  # not row by row
    protected = [*output_layers(model, example), *fixed, *by_head]
    plain: list[Group] = []
    coupled: list[Group] = []
    for group in coupled_sets(graph, protected):
        if not _touches(group, fixed):
            grouped = any(is_grouped(item.dep.target.module) for item in group)
            (coupled if grouped else plain).append(group)
    own = [part for group in plain for part in _split(group, names, bare)]
    return removable(model, (*heads, *own, *conv_groups(coupled, names)), example)


def _uncounted_layers(model: nn.Module) -> list[nn.Module]:
    """Return layers with weights whose cost the cost model does not follow, so they stay whole."""
    counted = (*ROOT_TYPES, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    return [
        module
        for module in model.modules()
        if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        and not isinstance(module, counted)
    ]


def _tied_layers(model: nn.Module) -> list[nn.Module]:
    """Return layers that share a parameter with another: narrowed, each would have its own."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    return [
        module
        for module in model.modules()
        if any(p is not None and owners[id(p)] > 1 for p in module._parameters.values())
    ]


def _touches(group: Group, fixed: set[nn.Module]) -> bool:
    """Say whether cutting ``group`` would narrow a fixed layer, or a parameter in an unknown way.

    A bare parameter, such as a position embedding, is known where it has the group's channels,
    all of them and nothing else, along its last axis.
    """
    width = len(group[0].idxs)
    for item in group:
        dependency, indices = item
        target = dependency.target.module
        if None in item.root_idxs:  # torch-pruning lost track of which channel is which
            return True
        if isinstance(target, nn.Parameter):
            if list(indices) != list(range(width)) or target.shape[-1] != width:
                return True
        elif target in fixed:
            return True
    return False


def _split(
    group: Group, names: dict[nn.Module, str], bare: dict[int, str]
) -> Iterator[ChannelGroup]:
    """Split one coupled set by source: channels with the same members form one group."""
    parameters = tuple(
        sorted(bare[id(d.target.module)] for d, _ in group if id(d.target.module) in bare)
    )
    places: dict[int, dict[tuple[str, Axis], list[int]]] = defaultdict(lambda: defaultdict(list))
    for item in group:
        dependency, indices = item
        layer = names.get(dependency.target.module)
        if layer is None:  # an element-wise operation, not a layer with weights
            continue
        axis: Axis = "in" if dependency.handler.__name__ == "prune_in_channels" else "out"
        if _is_depthwise(dependency.target.module):
            axis = "out"
        for root, index in zip(item.root_idxs, indices, strict=True):
            places[root][layer, axis].append(index)
    by_members: dict[tuple[tuple[str, Axis, int], ...], list[int]] = defaultdict(list)
    for channel in sorted(places):
        key = tuple(sorted((layer, axis, len(at)) for (layer, axis), at in places[channel].items()))
        by_members[key].append(channel)
    root = names[group[0].dep.target.module]
    for part, (key, channels) in enumerate(by_members.items()):
        members = tuple(
            Member(layer, axis, tuple(tuple(sorted(places[c][layer, axis])) for c in channels))
            for layer, axis, _ in key
        )
        label = root.removeprefix("network.")
        name = label if len(by_members) == 1 else f"{label}#{part}"
        yield ChannelGroup(name, root, tuple(channels), members, parameters)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.out_channels
