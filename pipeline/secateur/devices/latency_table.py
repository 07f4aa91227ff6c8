"""Milliseconds of single operators as measured on one machine's runtime, over their widths."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import DeviceError
from secateur.core.files import write_json
from secateur.devices.operators import OperatorKind
from secateur.devices.target import Precision

SCHEMA = 1
Use = Literal["grid", "trial", "held_out", "scan"]
MULTIPLES = (1, 2, 4, 8, 16, 32, 64)  # of channels, that kernels may work in
FLAT = 0.04  # a share of the time that widening to the next multiple may cost


@dataclass(frozen=True, order=True)
class Point:
    """The median time of one operator that reads ``c_in`` channels and makes ``c_out``.

    ``spread`` is half the distance of the quartiles relative to the median. ``grid`` points are
    interpolated between, ``held_out`` ones judge that, ``scan`` ones show the runtime's steps;
    ``trial`` points said whether the grid was fine enough.
    """

    c_in: int
    c_out: int
    microseconds: float
    spread: float = 0.0
    use: Use = "grid"


@dataclass(frozen=True)
class LatencyTable:
    """``points`` per kind of operator, measured with ``runtime`` (name and version) on ``host``.

    Time beside the kernels is ``per_node_us`` for each node and ``per_run_us`` for each run.
    ``scale`` multiplies every prediction: what whole networks take relative to their parts.
    """

    runtime: str
    threads: int
    host: Mapping[str, Any]
    points: Mapping[OperatorKind, tuple[Point, ...]]
    per_node_us: float = 0.0
    per_run_us: float = 0.0
    scale: float = 1.0

    def surface(self, kind: OperatorKind) -> Surface:
        """Return the kind's times as a surface over both widths.

        Raises:
            DeviceError: the kind was not measured, or its grid has holes.
        """
        return self._surfaces[kind] if kind in self._surfaces else self._make_surface(kind)

    @cached_property
    def _surfaces(self) -> dict[OperatorKind, Surface]:
        return {}

    def _make_surface(self, kind: OperatorKind) -> Surface:
        if kind not in self.points:
            near = [k.said() for k in self.points if k.operator == kind.operator]
            raise DeviceError(
                f"the latency table has no {kind.said()}; of that operator it has "
                f"{', '.join(sorted(near)[:3]) or 'none'}",
                hint="measure the operators of this recipe with `secateur profile RECIPE`",
            )
        found = surface_of(kind, self.points[kind], self._steps[kind.precision])
        self._surfaces[kind] = found
        return found

    @cached_property
    def _steps(self) -> dict[Precision, tuple[int, int]]:
        return {kind.precision: steps(self, kind.precision) for kind in self.points}

    def error(self) -> float:
        """Return the mean relative error on held-out points, weighted by their times."""
        wrong, total = 0.0, 0.0
        for kind, points in self.points.items():
            for point in points:
                if point.use == "held_out":
                    predicted = self.surface(kind).at(point.c_in, point.c_out)
                    wrong += abs(predicted - point.microseconds)
                    total += point.microseconds
        return wrong / total if total else float("nan")

    def check_runtime(self, runtime: str) -> None:
        """Refuse a runtime that the table was not measured with.

        Raises:
            DeviceError: its name or version is another.
        """
        if runtime != self.runtime:
            raise DeviceError(
                f"the latency table was measured with {self.runtime}, this machine has {runtime}",
                hint="measure it again with `secateur profile RECIPE`",
            )

    def scaled(self, factor: float) -> LatencyTable:
        """Return the table with every prediction ``factor`` times what it was."""
        return replace(self, scale=self.scale * factor)

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON-like data."""
        entries = [
            {"kind": asdict(kind), "points": [asdict(point) for point in sorted(points)]}
            for kind, points in sorted(self.points.items())
        ]
        rest = {key: getattr(self, key) for key in
                ("runtime", "threads", "host", "per_node_us", "per_run_us", "scale")}  # fmt: skip
        return {"schema": SCHEMA, **rest, "entries": entries}


class Surface:
    """Times over a full grid of (c_in, c_out): bilinear between, exact on the grid's points.

    A width between two measured ones counts as the next multiple of the runtime's ``steps``.
    Beyond the grid the nearest cell is continued.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        times: NDArray[np.float64],
        steps: tuple[int, int] = (1, 1),
    ) -> None:
        self._inputs, self._outputs = np.array(inputs), np.array(outputs)
        self._times, self._steps = times, steps

    def at(self, c_in: int, c_out: int) -> float:
        """Return microseconds at one pair of widths."""
        return float(self.table(np.array([c_in]), np.array([c_out]))[0, 0])

    def table(self, c_in: NDArray[np.int64], c_out: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return (n, m) microseconds for (n,) widths read and (m,) widths made."""
        left = _weights(c_in, self._inputs, self._steps[0])
        right = _weights(c_out, self._outputs, self._steps[1])
        times: NDArray[np.float64] = np.maximum(left @ self._times @ right.T, 0.0)
        return times


def _weights(widths: NDArray[np.int64], known: NDArray[np.int64], step: int) -> NDArray[np.float64]:
    """Return (n, k): how much of each known width's time counts for each width asked for."""
    weights = np.zeros((len(widths), len(known)))
    if len(known) == 1:
        weights[:, 0] = 1.0
        return weights
    for row, width in enumerate(widths):
        after = int(np.clip(np.searchsorted(known, width), 1, len(known) - 1))
        low, high = known[after - 1], known[after]
        stepped = width
        if low < width < high:
            stepped = min(-(-width // step) * step, high)
        share = (stepped - low) / (high - low)
        weights[row, after - 1], weights[row, after] = 1 - share, share
    return weights


def surface_of(
    kind: OperatorKind, points: Sequence[Point], steps: tuple[int, int] = (1, 1)
) -> Surface:
    """Return the surface through a kind's grid points.

    Raises:
        DeviceError: a combination of the widths measured is missing.
    """
    grid = {(p.c_in, p.c_out): p.microseconds for p in points if p.use == "grid"}
    inputs, outputs = (sorted({pair[axis] for pair in grid}) for axis in (0, 1))
    if kind.square and grid:
        return Surface(inputs[:1], outputs, np.array([[grid[c, c] for c in outputs]]), steps)
    holes = [(a, b) for a in inputs for b in outputs if (a, b) not in grid]
    if holes or not grid:
        missing = f"{len(holes)} of {len(inputs) * len(outputs)}" if grid else "all"
        first = f", the first at {holes[0][0]} -> {holes[0][1]} channels" if holes else ""
        raise DeviceError(
            f"the latency table has holes: {missing} points of {kind.said()} are missing{first}",
            hint="finish it by running the same `secateur profile` again",
        )
    times = np.array([[grid[a, b] for b in outputs] for a in inputs])
    return Surface(inputs, outputs, times, steps)


def steps(table: LatencyTable, precision: Precision) -> tuple[int, int]:
    """Return the multiples of channels read and made in which the runtime's time moves."""
    lines: tuple[list[dict[int, float]], ...] = ([], [])
    for kind, points in table.points.items():
        if kind.precision != precision:
            continue
        scans = [p for p in points if p.use == "scan"]
        for axis in (0, 1):
            by_other: dict[int, dict[int, float]] = {}
            for p in scans:
                own, other = (p.c_in, p.c_out) if axis == 0 else (p.c_out, p.c_in)
                by_other.setdefault(other, {})[own] = p.microseconds
            lines[axis].extend(line for line in by_other.values() if len(line) > 2)
    return _step_of(lines[0]), _step_of(lines[1])


def channel_grid(table: LatencyTable, precision: Precision = "fp32") -> int:
    """Return the multiple to keep channel counts at: the larger step of the two sides."""
    return max(steps(table, precision))


def _step_of(lines: Sequence[Mapping[int, float]]) -> int:
    """Return the largest multiple to which any width can be widened for (almost) nothing."""
    found = 1
    for multiple in MULTIPLES:
        shortfalls = [
            max(0.0, 1 - time / line[-(-width // multiple) * multiple])
            for line in lines
            for width, time in line.items()
            if -(-width // multiple) * multiple in line and width % multiple
        ]
        if not shortfalls:
            continue
        if float(np.mean(shortfalls)) > FLAT:
            break
        found = multiple
    return found


def save_table(path: Path, table: LatencyTable) -> None:
    """Write a table as JSON."""
    write_json(path, table.to_json())


def load_table(path: Path) -> LatencyTable:
    """Read a table.

    Raises:
        DeviceError: there is none, or it is damaged or of another version of this format.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DeviceError(
            f"cannot read the latency table {path}: {error}",
            hint="measure one with `secateur profile RECIPE`",
        ) from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise DeviceError(
            f"{path} is a latency table of version {schema!r}, expected {SCHEMA}",
            hint="measure it again with `secateur profile RECIPE`",
        )
    try:
        points = {
            _kind(entry["kind"]): tuple(Point(**point) for point in entry["points"])
            for entry in data["entries"]
        }
        rest = {k: v for k, v in data.items() if k not in ("schema", "entries")}
        return LatencyTable(points=points, **rest)
    except (KeyError, TypeError, AttributeError) as error:
        raise DeviceError(
            f"{path} is not a whole latency table: {error!r}",
            hint="measure it again with `secateur profile RECIPE`",
        ) from error


def _kind(data: Mapping[str, Any]) -> OperatorKind:
    pairs = {key: tuple(data[key]) for key in ("kernel", "stride")}
    return OperatorKind(**{**data, **pairs})
