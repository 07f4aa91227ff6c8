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
from secateur.core.surgery import Surgery
from secateur.prune.conv_groups import is_grouped


def drop_channels(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], dropped: Mapping[str, Collection[int]]
) -> None:
    """Remove, in place, the channels of each group that ``dropped`` numbers (0 is its first)."""
    narrow(model, plan_surgery(groups, dropped))


def plan_surgery(
    groups: Sequence[ChannelGroup],
    dropped: Mapping[str, Collection[int]],
    blocks: Sequence[str] = (),
) -> Surgery:
    """Return what is taken out of each layer for the channels that ``dropped`` numbers by group."""
    channels: dict[tuple[str, Axis], set[int]] = defaultdict(set)
    parameters: dict[str, set[int]] = defaultdict(set)
    heads: dict[str, tuple[int, int]] = {}
    for group in groups:
        numbers = dropped.get(group.name, ())
        for member in group.members:
            for number in numbers:
                channels[member.layer, member.axis].update(member.indices[number])
        for name in group.parameters:
            parameters[name].update(group.channels[number] for number in numbers)
        if group.heads_of:
            heads[group.heads_of] = (group.width - len(numbers), len(group.members[0].indices[0]))
    return Surgery(
        tuple(blocks),
        {place: tuple(sorted(gone)) for place, gone in channels.items() if gone},
        {name: tuple(sorted(gone)) for name, gone in parameters.items() if gone},
        heads,
    )


def narrow(network: nn.Module, surgery: Surgery) -> None:
    """Carry out, in place, all of ``surgery`` but for its blocks; nothing is traced again."""
    for name, (count, channels) in surgery.heads.items():
        block: Any = network.get_submodule(name)
        block.num_heads = count
        if hasattr(block, "attn_dim"):
            block.attn_dim = count * channels
    for (layer, axis), gone in surgery.channels.items():
        _narrow(network.get_submodule(layer), axis, list(gone))
    for name, gone in surgery.parameters.items():
        owner, _, attribute = name.rpartition(".")
        parameter = network.get_parameter(name)
        kept = [place for place in range(parameter.shape[-1]) if place not in set(gone)]
        setattr(network.get_submodule(owner), attribute, nn.Parameter(parameter.data[..., kept]))


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
