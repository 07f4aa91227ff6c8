"""Whole groups of grouped convolutions (ResNeXt, RegNet) as channel groups.

The groups of such a convolution must stay equally wide, so they are kept or removed whole, with
what makes their inputs and reads their outputs: ``conv1`` makes, a squeeze-and-excitation scales,
``conv3`` reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from torch import nn
from torch_pruning.dependency import Group

from secateur.core.channels import Axis, ChannelGroup, Member

Places = dict[tuple[str, Axis], dict[int, list[int]]]  # by layer and axis: by unit, the positions


def is_grouped(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Say whether ``module`` is a convolution of several groups, not a depth-wise one."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups < module.out_channels


def conv_groups(coupled: Sequence[Group], names: Mapping[nn.Module, str]) -> list[ChannelGroup]:
    """Return one group of channels per set of grouped convolutions that go together.

    ``coupled`` are torch-pruning's groups with a grouped convolution in them; it couples neither
    the inputs of one with its outputs, nor the places within. A set whose convolutions disagree
    about what belongs together is left out, and so stays whole.
    """
    found = []
    for bundle in _bundles(coupled):
        group = _channel_group(bundle, names)
        if group is not None:
            found.append(group)
    return found


def _bundles(coupled: Sequence[Group]) -> list[list[Group]]:
    """Return the groups that share a grouped convolution, together."""
    bundles: list[tuple[set[nn.Conv2d], list[Group]]] = []
    for group in coupled:
        layers, members = _grouped(group), [group]
        for other in [bundle for bundle in bundles if bundle[0] & layers]:
            bundles.remove(other)
            layers |= other[0]
            members += other[1]
        bundles.append((layers, members))
    return [members for _, members in bundles]


def _channel_group(bundle: Sequence[Group], names: Mapping[nn.Module, str]) -> ChannelGroup | None:
    convolutions = {names[layer]: layer for group in bundle for layer in _grouped(group)}
    places: Places = defaultdict(lambda: defaultdict(list))
    for group in bundle:
        unit_of = _units(group)
        if unit_of is None:
            return None
        for item in group:
            layer, axis = item.dep.target.module, _axis(item)
            follows = axis == "in" and is_grouped(layer)  # from the groups that are left
            if layer in names and not follows:
                for root, place in zip(item.root_idxs, item.idxs, strict=True):
                    places[names[layer], axis][unit_of[root]].append(place)
    count = next(iter(convolutions.values())).groups
    whole = all((name, "out") in places for name in convolutions)  # else an output's own channels
    if not whole or not all(_is_even(by_unit, count) for by_unit in places.values()):
        return None
    members = tuple(
        Member(layer, axis, tuple(tuple(sorted(by_unit[unit])) for unit in range(count)))
        for (layer, axis), by_unit in sorted(places.items())
    )
    root = min(convolutions)
    name = f"{root.removeprefix('network.')}.groups"
    return ChannelGroup(name, root, tuple(range(count)), members)


def _units(group: Group) -> dict[int, int] | None:
    """Return which convolution group each channel of ``group``'s root is in; None if undecided."""
    unit_of: dict[int, int] = {}
    for item in group:
        layer = item.dep.target.module
        if is_grouped(layer):
            width = layer.in_channels if _axis(item) == "in" else layer.out_channels
            for root, place in zip(item.root_idxs, item.idxs, strict=True):
                unit = place * layer.groups // width
                if unit_of.setdefault(root, unit) != unit:
                    return None
    every = {root for item in group for root in item.root_idxs}
    return unit_of if every == unit_of.keys() else None


def _is_even(by_unit: Mapping[int, Sequence[int]], count: int) -> bool:
    return len(by_unit) == count and len({len(places) for places in by_unit.values()}) == 1


def _grouped(group: Group) -> set[nn.Conv2d]:
    return {item.dep.target.module for item in group if is_grouped(item.dep.target.module)}


def _axis(item: Any) -> Axis:
    return "in" if item.dep.handler.__name__ == "prune_in_channels" else "out"
