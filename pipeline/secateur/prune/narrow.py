"""Take channels out of every layer that holds them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn
from torch_pruning import ops
from torch_pruning.pruner.function import PrunerBox

from secateur.core.channels import Axis, ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.prune.conv_groups import is_grouped


def drop_channels(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], dropped: Mapping[str, Collection[int]]
) -> None:
    """Remove, in place, the channels of each group that ``dropped`` numbers (0 is its first).

    The groups' members name every layer and position, so nothing is traced again.
    """
    doomed: dict[tuple[str, Axis], set[int]] = defaultdict(set)
    bare: dict[str, set[int]] = defaultdict(set)
    for group in groups:
        numbers = dropped.get(group.name, ())
        for member in group.members:
            for number in numbers:
                doomed[member.layer, member.axis].update(member.indices[number])
        for name in group.parameters:
            bare[name].update(group.channels[number] for number in numbers)
        if group.heads_of:
            _set_heads(model.get_submodule(group.heads_of), group, group.width - len(numbers))
    for (layer, axis), places in doomed.items():
        if places:
            _narrow(model.get_submodule(layer), axis, sorted(places))
    for name, places in bare.items():
        owner, _, attribute = name.rpartition(".")
        parameter = model.get_parameter(name)
        kept = [place for place in range(parameter.shape[-1]) if place not in places]
        setattr(model.get_submodule(owner), attribute, nn.Parameter(parameter.data[..., kept]))


def _narrow(layer: nn.Module, axis: Axis, places: list[int]) -> None:
    """Remove channels of one layer; of a grouped convolution they are whole groups."""
    pruner = PrunerBox[ops.module2type(layer)]
    if axis == "in":
        pruner.prune_in_channels(layer, places)
    elif is_grouped(layer):
        per_group = layer.out_channels // layer.groups
        pruner.prune_out_channels(layer, places)
        layer.groups = layer.out_channels // per_group
        layer.in_channels = layer.groups * layer.weight.shape[1]
    else:
        pruner.prune_out_channels(layer, places)


def _set_heads(block: Any, group: ChannelGroup, heads: int) -> None:
    block.num_heads = heads
    if hasattr(block, "attn_dim"):
        block.attn_dim = heads * len(group.members[0].indices[0])
