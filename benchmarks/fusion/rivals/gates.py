"""One factor per channel, multiplied into the layers that scale the group's channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from fusion.rivals.scoring import gate_members
from numpy.typing import NDArray
from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from torch import Tensor
from torch.func import functional_call


@dataclass(frozen=True)
class Gates:
    """Where the gates of all groups, laid end to end, act.

    ``slots`` gives, for each channel of each gated layer, the number of its gate; ``total`` stands
    for no gate. A gate scales the channel's batch norms (gamma and beta alike, so before an
    activation that timm fuses into the norm), or its producing layers where there is none.
    """

    widths: Mapping[str, int]
    slots: Mapping[str, Tensor]

    @property
    def total(self) -> int:
        """Number of gates."""
        return sum(self.widths.values())

    def outputs(self, model: MultiTaskModel, images: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Run ``model`` with its channels scaled by ``values`` (total,)."""
        scaled = self._scaled(model, values)
        result: dict[str, Tensor] = functional_call(model, scaled, (images,))
        return result

    def fold(self, model: MultiTaskModel, values: Tensor) -> None:
        """Multiply ``values`` (total,) into the weights for good."""
        parameters = dict(model.named_parameters())
        for name, scaled in self._scaled(model, values.detach()).items():
            parameters[name].data.copy_(scaled.detach())

    def split(self, values: Tensor) -> dict[str, NDArray[np.float64]]:
        """Return ``values`` (total,) by group."""
        parts = torch.split(values.detach().double(), list(self.widths.values()))
        return {name: part.numpy() for name, part in zip(self.widths, parts, strict=True)}

    def _scaled(self, model: MultiTaskModel, values: Tensor) -> dict[str, Tensor]:
        padded = torch.cat([values, values.new_ones(1)])
        parameters = dict(model.named_parameters())
        scaled = {}
        for layer, slots in self.slots.items():
            for kind in ("weight", "bias"):
                parameter = parameters.get(f"{layer}.{kind}")
                if parameter is not None:
                    factor = padded[slots].reshape(-1, *[1] * (parameter.dim() - 1))
                    scaled[f"{layer}.{kind}"] = parameter * factor
        return scaled


def gates_of(model: MultiTaskModel, groups: Sequence[ChannelGroup]) -> Gates:
    """Return the gates of ``groups`` in ``model``."""
    modules = dict(model.named_modules())
    widths = {group.name: group.width for group in groups}
    total, offset = sum(widths.values()), 0
    slots: dict[str, Tensor] = {}
    for group in groups:
        for member in gate_members(group, modules):
            size = len(modules[member.layer].weight)
            at = slots.setdefault(member.layer, torch.full((size,), total))
            for channel, places in enumerate(member.indices):
                at[list(places)] = offset + channel
        offset += group.width
    return Gates(widths, slots)
