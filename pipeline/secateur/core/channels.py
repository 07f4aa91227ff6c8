"""Channel groups: sets of channels that exist in several layers and can only go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Axis = Literal["out", "in"]


@dataclass(frozen=True)
class Member:
    """One layer that holds a group's channels.

    ``axis`` is "out" for a layer that makes them (or scales them, as batch norm does) and "in"
    for one that reads them. ``indices[c]`` are the positions of the group's channel ``c`` there:
    one, or several where a flatten or a repeated concat spreads a channel.
    """

    layer: str
    axis: Axis
    indices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels coupled by the network's structure.

    ``root`` is the layer whose output the dependency graph starts from, ``channels`` the
    positions of the group's channels in it. A concat couples channels of several sources under
    one root; each source is a group of its own, so that every layer's width stays on the grid.
    ``parameters`` are bare ones that hold the channels along their last axis, such as a position
    embedding. ``heads_of`` names the attention block whose heads are the group's channels.
    """

    name: str
    root: str
    channels: tuple[int, ...]
    members: tuple[Member, ...]
    parameters: tuple[str, ...] = ()
    heads_of: str = ""

    @property
    def width(self) -> int:
        """Number of channels."""
        return len(self.channels)

    @property
    def spread(self) -> int:
        """How many positions one channel is in every layer, or more: those of a head, say."""
        return min(len(member.indices[0]) for member in self.members)

    def step(self, grid: int) -> int:
        """Return how many channels make layers narrower by ``grid`` positions, or just more."""
        return -(-grid // self.spread)
