"""A cut as what is taken out of each layer: enough to make a network of the same code narrower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.core.channels import Axis
from secateur.core.errors import PlanError


@dataclass(frozen=True)
class Surgery:
    """Positions that go, per layer, with no word of the groups that they were chosen in.

    ``channels`` are those of a layer's inputs or outputs, ``parameters`` those on the last axis of
    parameters that no layer of a known kind holds. ``heads``: of a block of attention, how many
    stay, and the channels of each. ``blocks`` are residual blocks that go whole.
    """

    blocks: tuple[str, ...]
    channels: Mapping[tuple[str, Axis], tuple[int, ...]]
    parameters: Mapping[str, tuple[int, ...]]
    heads: Mapping[str, tuple[int, int]]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-like data."""
        layers: dict[str, dict[str, list[int]]] = {}
        for (layer, axis), gone in self.channels.items():
            layers.setdefault(layer, {})[axis] = list(gone)
        return {"blocks": list(self.blocks), "layers": layers,
                "parameters": {name: list(gone) for name, gone in self.parameters.items()},
                "heads": {name: list(two) for name, two in self.heads.items()}}  # fmt: skip

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Surgery:
        """Read what ``to_json`` wrote.

        Raises:
            PlanError: a field is missing or has another form.
        """
        try:
            channels: dict[tuple[str, Axis], tuple[int, ...]] = {}
            for layer, axes in data["layers"].items():
                for axis, gone in axes.items():
                    channels[layer, _axis(axis)] = _positions(gone)
            heads = {name: (int(count), int(size)) for name, (count, size) in data["heads"].items()}
            parameters = {name: _positions(gone) for name, gone in data["parameters"].items()}
            return Surgery(tuple(map(str, data["blocks"])), channels, parameters, heads)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(
                f"this does not say what to cut: {error!r}", hint="build the bundle again"
            ) from error


def _axis(name: str) -> Axis:
    if name == "in":
        return "in"
    if name == "out":
        return "out"
    raise ValueError(f"'{name}' is no axis")


def _positions(places: object) -> tuple[int, ...]:
    if not isinstance(places, list):
        raise TypeError("positions are a list")
    return tuple(int(place) for place in places)
