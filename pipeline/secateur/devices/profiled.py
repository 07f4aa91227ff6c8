"""What ``on_profile.py`` tells of a network, by the places of its operators; checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from secateur.core.errors import DeviceError, first_problem
from secateur.devices.connection import clean

# What ONNX Runtime adds to the name of a node, or of its result, that it writes anew.
ADDED = re.compile(r"(/.*|_nchwc|_token_\d+)+$")

Micro = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ToldNode(BaseModel):
    """One operator: the microseconds of its runs, the shapes it reads and makes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    us: list[Micro]
    reads: list[list[int]]
    makes: list[list[int]]


class ToldNetwork(BaseModel):
    """One model; ``sequence`` has the operators of its last run in order."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    run_us: list[Micro] = Field(min_length=1)
    nodes: list[ToldNode]
    sequence: list[tuple[str, Micro]] = []

    @model_validator(mode="after")
    def _every_run_is_told(self) -> ToldNetwork:
        if any(len(node.us) != len(self.run_us) for node in self.nodes):
            raise ValueError("an operator has more or fewer runs than its network")
        return self


_NETWORKS = TypeAdapter(list[ToldNetwork])


@dataclass(frozen=True)
class NetworkTimes:
    """Microseconds of (rounds,) runs: the whole run, and the kernels of each place.

    Those that belong to no place are part of the run alone. Where instructions are counted, they
    are thousands of these.
    """

    run_us: NDArray[np.float64]
    places_us: Mapping[str, NDArray[np.float64]]


def read_networks(path: Path, device: str, count: int) -> list[ToldNetwork]:
    """Read what a device wrote of ``count`` models.

    Raises:
        DeviceError: it is not what it must be.
    """
    try:
        told = _NETWORKS.validate_python(json.loads(path.read_text(encoding="utf-8")))
        if len(told) != count:
            raise ValueError(f"{len(told)} networks, expected {count}")
    except (ValueError, RecursionError) as error:
        raise DeviceError(
            f"what came from {device} about its operators is not valid: "
            f"{clean(first_problem(error))}",
            hint="check that the device is the one you mean, and profile again",
        ) from error
    return told


def by_place(network: ToldNetwork, places: Mapping[str, str]) -> NetworkTimes:
    """Return a network's times by the place of its operators.

    ``places`` gives the place of an operator by the names of its node and its results. What ONNX
    Runtime inserts (Reorder*, Transpose, a second DequantizeLinear) counts to the operator whose
    result it takes.
    """
    sums: dict[str, NDArray[np.float64]] = {}
    results: list[tuple[Sequence[int], str]] = []  # of earlier nodes: shape and place
    for node in network.nodes:
        place = places.get(node.name) or places.get(ADDED.sub("", node.name))
        if place is None:
            source = node.reads[:1]
            place = next((p for shape, p in reversed(results) if shape in source), None)
        if place is not None:
            sums[place] = sums.get(place, 0.0) + np.array(node.us, np.float64)
            results += [(shape, place) for shape in node.makes]
    return NetworkTimes(np.array(network.run_us, np.float64), sums)
