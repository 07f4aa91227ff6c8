"""Find channel groups with torch-pruning's dependency graph (DepGraph, arXiv 2301.12900)."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch_pruning
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning.dependency import Group
from torch_pruning.dependency.index_mapping import update_index_mapping

from secateur.core.channels import Axis, ChannelGroup, Member
from secateur.core.errors import ModelError
from secateur.core.model import MultiTaskModel
from secateur.prune.attention import head_groups
from secateur.prune.conv_groups import conv_groups, is_grouped
from secateur.prune.trial import removable

ROOT_TYPES = (nn.Conv2d, nn.Linear)


def dependency_graph(model: MultiTaskModel, example: Tensor) -> torch_pruning.DependencyGraph:
    """Trace ``model`` on ``example`` and return torch-pruning's graph of it.

    Raises:
        ModelError: the model cannot be traced.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # the graph is read off autograd
    model.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch-pruning warns of each unwrapped parameter
            graph = torch_pruning.DependencyGraph().build_dependency(
                model,
                example_inputs=(example,),  # a bare tensor it would unpack, image by image
                verbose=False,
            )
    except Exception as error:  # torch-pruning and the model may raise anything
        raise ModelError(
            f"the dependency graph of the model cannot be traced: {error}",
            hint="forward must be made of differentiable torch calls on module parameters",
        ) from error
    _map_concats(graph)
    return graph


def _map_concats(graph: torch_pruning.DependencyGraph) -> None:
    """Give every concat its channel offsets back.

    torch-pruning 1.6 switches them off for each concat downstream of a 3-D parameter (a position
    embedding), although only the concat with the class token needs that.
    """
    bare = (ops.OPTYPE.PARAMETER, ops.OPTYPE.EXPAND)
    switched_off = [
        node
        for node in graph.module2node.values()
        if node.type == ops.OPTYPE.CONCAT
        and not node.enable_index_mapping
        and not any(source.type in bare for source in node.inputs)
    ]
    for node in switched_off:
        node.enable_index_mapping = True
    if switched_off:
        update_index_mapping(graph)


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
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for output in model(example).values():
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
    fixed = set(_uncounted_layers(model))
    by_head = {model.get_submodule(group.root) for group in heads}  # not row by row
    protected = [*output_layers(model, example), *fixed, *by_head]
    plain: list[Group] = []
    coupled: list[Group] = []
    for group in _coupled_sets(graph, protected):
        if not _touches(group, fixed):
            grouped = any(is_grouped(item.dep.target.module) for item in group)
            (coupled if grouped else plain).append(group)
    own = [part for group in plain for part in _split(group, names, bare)]
    return removable(model, (*heads, *own, *conv_groups(coupled, names)), example)


def _coupled_sets(
    graph: torch_pruning.DependencyGraph, protected: Sequence[nn.Module]
) -> list[Group]:
    """Return torch-pruning's groups; a layer from which it cannot follow its channels has none."""
    ignored, started = list(protected), list[nn.Module]()
    follow = graph.get_pruning_group

    def noted(root: nn.Module, *rest: Any) -> Group:
        started.append(root)
        return follow(root, *rest)

    graph.get_pruning_group = noted
    while True:
        every = graph.get_all_groups(ignored_layers=ignored, root_module_types=list(ROOT_TYPES))
        try:
            return list(every)
        except (IndexError, RuntimeError, ValueError, TypeError, AttributeError, KeyError):
            ignored.append(started[-1])


def _uncounted_layers(model: nn.Module) -> list[nn.Module]:
    """Return layers with weights whose cost the cost model does not follow, so they stay whole."""
    counted = (*ROOT_TYPES, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    return [
        module
        for module in model.modules()
        if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        and not isinstance(module, counted)
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
