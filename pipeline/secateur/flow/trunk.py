"""The trunk that networks for other tasks share (``model.trunk``), and what lies in it.

Earlier cuts of one network speak of its channels wherever they are. Those of another network, with
a head for another task on the same pre-trained trunk, speak of the trunk's. Without a trunk named,
the whole network takes its place, and no other network has the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from secateur.core.channels import ChannelGroup
from secateur.core.errors import RecipeError
from secateur.core.model import MultiTaskModel

EVERYWHERE = ""


def trunk_prefix(trunk: str | None) -> str:
    """Return how the names of the trunk's layers begin in a ``MultiTaskModel``."""
    return f"network.{trunk}." if trunk else EVERYWHERE


def check_trunk(trunk: str, network: nn.Module) -> None:
    """See that the network has a part of this name, and that there is more of it than that part.

    Raises:
        RecipeError: it has none, or none with weights, or nothing beside it.
    """
    within = [name for name, _ in network.named_parameters() if name.startswith(f"{trunk}.")]
    if not within:
        parts = [name for name, part in network.named_children() if [*part.parameters()]]
        raise RecipeError(
            f"model.trunk: the network has no part '{trunk}' with weights",
            hint=f"its parts are {', '.join(parts)}; deeper ones are written a.b",
        )
    if len(within) == len([*network.parameters()]):
        raise RecipeError(
            f"model.trunk: '{trunk}' is the whole network",
            hint="name the part that networks for other tasks share, or leave trunk out",
        )


def weights_digest(model: MultiTaskModel, prefix: str = EVERYWHERE) -> str:
    """Return a digest of the tensors whose names begin with ``prefix``: names, shapes and bytes.

    No code counts, so that what a library knows outlives another release of torch.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(prefix):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(data.numpy().tobytes())
    return digest.hexdigest()[:20]


def within(groups: Iterable[ChannelGroup], prefix: str) -> tuple[ChannelGroup, ...]:
    """Return the groups that the trunk alone makes; its channels that heads make, too, are none."""

    def made(group: ChannelGroup) -> Sequence[str]:
        makers = [member.layer for member in group.members if member.axis == "out"]
        return [*makers, *group.parameters]

    return tuple(g for g in groups if all(name.startswith(prefix) for name in made(g)))
