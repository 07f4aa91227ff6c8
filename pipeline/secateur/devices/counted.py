"""Instructions of whole models and of their operators, from what the counting emulator tells."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import DeviceError
from secateur.devices.profiled import NetworkTimes, ToldNetwork, ToldNode, by_place

_LINE = re.compile(r"^secateur:(mark|clock) (\d+) (\d+)$", re.MULTILINE)
THOUSAND = 1000.0  # instructions: what stands where a latency table has microseconds


@dataclass(frozen=True)
class Counted:
    """The counter's lines (``count_instructions.c``), and what ``on_profile.py`` told."""

    lines: str
    networks: Sequence[ToldNetwork]

    def wholes(self) -> list[int]:
        """Return the instructions of one run of each model that ``count_whole`` ran."""
        marks = {mark: count for mark, (count, _) in self._marked().items()}
        return [marks[2 * at + 1] - marks[2 * at] for at in range(len(self.networks))]

    def operators(self, places: Mapping[str, str]) -> list[NetworkTimes]:
        """Return thousands of instructions of each run and place, of ``count_operators``.

        Raises:
            DeviceError: the clock was not read around each operator.
        """
        marked, found = self._marked(), []
        for at, network in enumerate(self.networks):
            run = marked[4 * at + 1][0] - marked[4 * at][0]
            nodes = _counted_nodes(network, marked[4 * at + 2][1])
            found.append(by_place(ToldNetwork(run_us=[run / THOUSAND], nodes=nodes), places))
        return found

    def _marked(self) -> dict[int, tuple[int, NDArray[np.float64]]]:
        """Return per mark its count, and (n, 2) counts and nanoseconds of the clock until the next.

        Floats hold a count exactly up to 2**53.
        """
        found: dict[int, tuple[int, list[tuple[int, int]]]] = {}
        clocks: list[tuple[int, int]] = []
        for kind, first, second in _LINE.findall(self.lines):
            if kind == "mark":
                clocks = []
                found[int(first)] = int(second), clocks
            else:
                clocks.append((int(first), int(second)))
        return {
            mark: (count, np.array(rows, np.float64).reshape(-1, 2))
            for mark, (count, rows) in found.items()
        }


def _counted_nodes(network: ToldNetwork, clocks: NDArray[np.float64]) -> list[ToldNode]:
    """Return the nodes with the instructions between the two readings of the clock around each.

    The run reads the clock before its first operator and after its last one, too: where they begin
    is where the clock's own differences are those that the runtime noted.
    """
    durations = np.array([each for _, each in network.sequence])
    count = 2 * len(durations)
    starts = range(len(clocks) - count + 1)
    if not count or not starts:
        raise DeviceError(
            f"the clock was read {len(clocks)} times in a run of {len(durations)} operators, "
            f"expected twice for each",
            hint="this release of ONNX Runtime times its operators in another way: report it",
        )
    spans = [np.diff(clocks[s : s + count].reshape(-1, 2, 2), axis=1)[:, 0] for s in starts]
    best = min(spans, key=lambda each: float(np.abs(each[:, 1] / 1000 - durations).sum()))
    thousands: dict[str, float] = {}
    for (name, _), instructions in zip(network.sequence, best[:, 0], strict=True):
        thousands[name] = thousands.get(name, 0.0) + instructions / THOUSAND
    return [node.model_copy(update={"us": [thousands[node.name]]}) for node in network.nodes]
