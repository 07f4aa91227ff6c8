"""Where a group's channels live: layers whose weights are seen as one row per channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.core.channels import ChannelGroup, Member
from secateur.core.model import MultiTaskModel

PRODUCING = (nn.Conv2d, nn.Linear)
BATCH_NORM = nn.modules.batchnorm._BatchNorm
WEIGHTED = (*PRODUCING, BATCH_NORM, nn.LayerNorm, nn.GroupNorm)

Gradients = Mapping[nn.Parameter, Tensor | None]
"""The gradient of one loss in each weight; None where the loss does not depend on it."""


@dataclass(frozen=True)
class Place:
    """One layer that holds a group's channels.

    ``parameters`` are its weight, and its bias where that counts. ``index`` (width, k) are the
    positions of each channel, or None when they are all of the layer's, in order.
    """

    layer: str
    module: nn.Module
    reads: bool
    parameters: tuple[nn.Parameter, ...]
    index: Tensor | None

    @property
    def width(self) -> int:
        """Number of the group's channels."""
        if self.index is not None:
            return len(self.index)
        return int(self.parameters[0].shape[1 if self.reads else 0])

    def rows(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return ``tensors``, shaped like ``parameters``, as one (width, K) row per channel."""
        sides = [tensor.transpose(0, 1) if self.reads else tensor for tensor in tensors]
        whole = torch.cat([side.reshape(len(side), -1) for side in sides], dim=1)
        return whole if self.index is None else whole[self.index].flatten(1)

    def weights(self) -> Tensor:
        """Return the layer's own weights as (width, K) rows."""
        return self.rows([parameter.detach() for parameter in self.parameters])

    def gradient_rows(self, gradients: Gradients) -> Tensor | None:
        """Return the gradients of the layer's weights as (width, K) rows, None if there are none.

        Of a weight without a gradient beside one that has it, the gradient is 0.
        """
        known = [gradients[parameter] for parameter in self.parameters]
        if all(gradient is None for gradient in known):
            return None
        pairs = zip(known, self.parameters, strict=True)
        return self.rows([torch.zeros_like(w) if g is None else g for g, w in pairs])

    def per_channel(self, values: Tensor) -> Tensor:
        """Sum (N, C) values at the layer's positions into (N, width), one per channel."""
        return values if self.index is None else values[:, self.index].sum(dim=2)


Places = Mapping[str, Sequence[Place]]
"""The places of each group, by its name; a group has at least the layer it is rooted in."""


def producers(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], *, bias: bool = False
) -> Places:
    """Return the convolutions and linear layers that make each group's channels."""
    modules = dict(model.named_modules())
    return {
        group.name: [
            _place(member, modules[member.layer], bias)
            for member in group.members
            if member.axis == "out" and isinstance(modules[member.layer], PRODUCING)
        ]
        for group in groups
    }


def batch_norms(model: MultiTaskModel, groups: Sequence[ChannelGroup], *, bias: bool) -> Places:
    """Return each group's batch norms that have a scale and a shift; a group may have none."""
    modules = dict(model.named_modules())
    return {
        group.name: [
            _place(member, modules[member.layer], bias)
            for member in group.members
            if isinstance(modules[member.layer], BATCH_NORM) and modules[member.layer].affine
        ]
        for group in groups
    }


def gates(model: MultiTaskModel, groups: Sequence[ChannelGroup]) -> Places:
    """Return where closing a gate would silence a channel: batch norms, or else producers."""
    makers = producers(model, groups, bias=True)
    norms = batch_norms(model, groups, bias=True)
    return {name: found or makers[name] for name, found in norms.items()}


def weighted(model: MultiTaskModel, groups: Sequence[ChannelGroup]) -> Places:
    """Return every layer whose weights a group's channels own, readers included; no biases."""
    modules = dict(model.named_modules())
    return {
        group.name: [
            _place(member, modules[member.layer], False)
            for member in group.members
            if isinstance(modules[member.layer], WEIGHTED)
            and modules[member.layer].weight is not None
        ]
        for group in groups
    }


def _place(member: Member, module: nn.Module, bias: bool) -> Place:
    weight = module.get_parameter("weight")
    reads = member.axis == "in" and weight.dim() > 1
    with_bias = bias and not reads and module.bias is not None
    positions = weight.shape[1] if reads else weight.shape[0]
    index = torch.tensor(member.indices)
    whole = torch.equal(index, torch.arange(positions)[:, None])
    parameters = (weight, module.get_parameter("bias")) if with_bias else (weight,)
    return Place(member.layer, module, reads, parameters, None if whole else index)
