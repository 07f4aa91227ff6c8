"""Times of a network's operators as measured on one machine's runtime, over their widths."""

from __future__ import annotations

import json
import math
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

Floats = NDArray[np.float64]
Unit = Literal["ms", "million instructions"]
SCHEMA = 2
STEPS = (4, 8, 16, 32)  # of channels, that kernels may work in
BASE = 64  # channels, about, that a scan starts from
FLAT = 0.5  # of what a share of channels should cost: below, they came for (almost) nothing
BLOCK = 16  # channels: a vector of AVX-512, a block of ONNX Runtime's NCHWc
LENGTHS = (0.2, 0.5, 1.5)  # of widths' logarithms, over which deviations from a plane are alike
NOISES = (0.1, 1.0, 10.0)  # variance of single measurements, relative to that of deviations


@dataclass(frozen=True, order=True)
class Point:
    """The time of one operator that reads ``c_in`` channels and makes ``c_out``.

    In a table of instructions ``microseconds`` are thousands of these.
    ``spread`` is half the distance of the quartiles of its runs relative to it.
    """

    c_in: int
    c_out: int
    microseconds: float
    spread: float = 0.0


@dataclass(frozen=True)
class Run:
    """One network that was measured: what its groups kept, and its milliseconds.

    ``predicted_ms`` is what the networks before it say of it, None where they were too few.
    """

    kept: tuple[int, ...]
    ms: float
    predicted_ms: float | None = None


@dataclass(frozen=True)
class LatencyTable:
    """``points`` per kind of operator, measured with ``runtime`` (name and version) on ``host``.

    The network was in ``precision``: nodes of other precisions are among those of an int8 one.
    ``runs`` are the networks they come from, in order: each kind has one point of each. All are
    relative to one minute, in which the parent took ``parent_ms``. ``stairs`` are (channels more,
    ms) of networks whose groups are that much wider than multiples of 32. ``scale`` multiplies
    every prediction: what whole networks take now relative to then.

    With ``unit`` "million instructions" it is what an emulator counted on the CPU of ``host``:
    wherever another table has milliseconds it has these. A proxy; no latency follows from it.
    """

    runtime: str
    threads: int
    host: Mapping[str, Any]
    points: Mapping[OperatorKind, tuple[Point, ...]]
    precision: Precision = "fp32"
    runs: tuple[Run, ...] = ()
    stairs: tuple[tuple[int, float], ...] = ()
    parent_ms: float = 0.0
    scale: float = 1.0
    unit: Unit = "ms"

    def surface(self, kind: OperatorKind) -> Surface:
        """Return the kind's times as a surface over both widths.

        Raises:
            DeviceError: the kind was not measured, or its points have holes.
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
        points = self.points[kind]
        if not points or len(points) != len(self.runs):
            raise DeviceError(
                f"the latency table has holes: {len(points)} of {len(self.runs)} points of "
                f"{kind.said()} are there",
                hint="finish it by running the same `secateur profile` again",
            )
        found = Surface(points)
        self._surfaces[kind] = found
        return found

    @cached_property
    def fixed_us(self) -> float:
        """Microseconds of a run that no cut changes, before the scale.

        What the runs took beside their operators: dispatch and small nodes, less what measuring
        added to each operator.
        """
        beside = [1000 * run.ms - sum(points[at].microseconds for points in self.points.values())
                  for at, run in enumerate(self.runs)]  # fmt: skip
        return float(np.median(beside)) if beside else 0.0

    def error(self) -> float:
        """Return the mean relative error on the networks predicted before they were measured."""
        wrong = [abs(run.predicted_ms / run.ms - 1) for run in self.runs if run.predicted_ms]
        return float(np.mean(wrong)) if wrong else float("nan")

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
            {"kind": asdict(kind), "points": [asdict(point) for point in points]}
            for kind, points in sorted(self.points.items())
        ]
        rest = {key: getattr(self, key) for key in
                ("runtime", "threads", "host", "precision", "parent_ms", "scale",
                 "unit")}  # fmt: skip
        runs = [asdict(run) for run in self.runs]
        return {"schema": SCHEMA, **rest, "stairs": self.stairs, "runs": runs, "entries": entries}


class Surface:
    """Times over (c_in, c_out), through noisy points anywhere: a Gaussian process.

    Its mean is linear in both widths and their product, and in what each lacks to a multiple of
    ``BLOCK``: kernels compute the last vector of channels as if it were full, or in a slower way.
    What deviates from the mean, relative to it, is alike for widths of like logarithms that lack
    alike (Rasmussen and Williams, 2006, algorithm 2.1). Length and noise are those that predict
    each point best from the others (equation 5.12).
    """

    def __init__(self, points: Sequence[Point]) -> None:
        widths = np.array([(p.c_in, p.c_out) for p in points], np.float64)
        times = np.array([p.microseconds for p in points], np.float64)
        self._fit = _Fit(widths, times) if times.any() else None

    @property
    def takes_time(self) -> bool:
        """Whether the operator runs by itself: one that is part of another does not."""
        return self._fit is not None

    def at(self, c_in: int, c_out: int) -> float:
        """Return microseconds at one pair of widths."""
        return float(self.table(np.array([c_in]), np.array([c_out]))[0, 0])

    def table(self, c_in: NDArray[np.int64], c_out: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return (n, m) microseconds for (n,) widths read and (m,) widths made."""
        shape = len(c_in), len(c_out)
        if self._fit is None:
            return np.zeros(shape)
        pairs = np.stack(np.meshgrid(c_in, c_out, indexing="ij"), axis=-1).reshape(-1, 2)
        return self._fit.at(pairs.astype(np.float64)).reshape(shape)


class _Fit:
    """The process through (n, 2) widths and their (n,) times, not all of them zero."""

    def __init__(self, widths: Floats, times: Floats) -> None:
        self._least = float(times[times > 0].min()) / 10
        features = _features(widths)
        self._most = np.maximum(np.abs(features).max(axis=0), 1)
        weights = 1 / np.maximum(times, self._least)
        scaled = features / self._most * weights[:, None]
        self._plane, *_ = np.linalg.lstsq(scaled, times * weights, rcond=1e-6)
        self._places = _places(widths)
        deviations = times / self._mean(widths) - 1
        fits = [self._fitted(deviations, length, noise) for length in LENGTHS for noise in NOISES]
        _, self._length, self._shares = min(fits, key=lambda fit: fit[0])

    def at(self, widths: Floats) -> Floats:
        """Return (n,) microseconds at (n, 2) widths."""
        alike = _alike(_places(widths), self._places, self._length)
        return np.maximum(self._mean(widths) * (1 + alike @ self._shares), self._least)

    def _fitted(
        self, deviations: Floats, length: float, noise: float
    ) -> tuple[float, float, Floats]:
        """Return the mean squared error of points left out, the length and the points' shares."""
        among = _alike(self._places, self._places, length) + noise * np.eye(len(deviations))
        inverse = np.linalg.inv(among)
        shares = inverse @ deviations
        return float(np.mean((shares / np.diag(inverse)) ** 2)), length, shares

    def _mean(self, widths: Floats) -> Floats:
        means: Floats = np.maximum(_features(widths) / self._most @ self._plane, self._least)
        return means


def _features(widths: Floats) -> Floats:
    read, made = widths.T
    read_lack, made_lack = (-widths % BLOCK).T
    one = np.ones_like(read)
    sides = np.stack([one, read, made, read * made], axis=1)
    lacks = np.stack([read_lack, made_lack, read * made_lack, made * read_lack], axis=1)
    return np.concatenate([sides, lacks], axis=1)


def _places(widths: Floats) -> Floats:
    """Return (n, 4) coordinates in which what is near is alike."""
    return np.concatenate([np.log(np.maximum(widths, 1)), -widths % BLOCK / BLOCK], axis=1)


def _alike(these: Floats, those: Floats, length: float) -> Floats:
    squares = ((these[:, None] - those[None]) ** 2).sum(axis=-1)
    alike: Floats = np.exp(-squares / (2 * length**2))
    return alike


def channel_grid(table: LatencyTable) -> int:
    """Return the multiple to keep channel counts at: the runtime's own step.

    It is the largest to which widths can be raised for a small part of what they should cost.
    """
    line, found = dict(table.stairs), 1
    for step in STEPS:
        raised = [(low, low + step // 2) for low in line
                  if low % step == step // 2 and low + step // 2 in line]  # fmt: skip
        paid = [
            (line[high] - line[low]) / line[high] / ((high - low) / (BASE + high))
            for low, high in raised
        ]
        if paid and float(np.mean(paid)) <= FLAT:
            found = step
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
            _kind(entry["kind"]): tuple(_point(point) for point in entry["points"])
            for entry in data["entries"]
        }
        runs = tuple(_run(run) for run in data["runs"])
        stairs = tuple((int(more), float(ms)) for more, ms in data["stairs"])
        if not isinstance(data["host"], dict):
            raise TypeError("host is no mapping")
        rest = {k: v for k, v in data.items() if k not in ("schema", "entries", "runs", "stairs")}
        rest["scale"] = _positive(data.get("scale", 1.0), "scale")
        if data.get("parent_ms"):  # 0 until the parent was measured
            rest["parent_ms"] = _positive(data["parent_ms"], "parent_ms")
        return LatencyTable(points=points, runs=runs, stairs=stairs, **rest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DeviceError(
            f"{path} is not a whole latency table: {error!r}",
            hint="measure it again with `secateur profile RECIPE`",
        ) from error


def _run(data: Mapping[str, Any]) -> Run:
    predicted = data.get("predicted_ms")
    return Run(
        tuple(int(count) for count in data["kept"]),
        _positive(data["ms"], "ms"),
        None if predicted is None else _positive(predicted, "predicted_ms"),
    )


def _positive(value: Any, name: str) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} is {value}, expected a positive number")
    return number


def _point(data: Mapping[str, Any]) -> Point:
    return Point(int(data["c_in"]), int(data["c_out"]), float(data["microseconds"]),
                 float(data.get("spread", 0.0)))  # fmt: skip


def _kind(data: Mapping[str, Any]) -> OperatorKind:
    pairs = {key: tuple(data[key]) for key in ("kernel", "stride")}
    return OperatorKind(**{**data, **pairs})
