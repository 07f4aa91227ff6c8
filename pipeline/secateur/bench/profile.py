"""Measure a latency table: as few points as its error on held-out ones allows.

Per kind of operator the corners of the widths' range come first. Then points inside the widest
gaps are tried; where the table is wrong by more than the tolerance they join its grid (with all
points of their row and column), until it is right. Random points that it never sees judge it at
the end. Two of the heaviest convolutions are also scanned in small steps, which shows the
multiples that the runtime's kernels work in.

The points of one batch take turns, and each time is the mean of the middle half of the rounds: a
median that is not bound to the whole microseconds that a profiler gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from secateur.bench.one_operator import one_operator
from secateur.core.progress import track
from secateur.devices.latency_table import LatencyTable, Point, Use, steps, surface_of
from secateur.devices.operators import OperatorKind

Timer = Callable[[Sequence[bytes], int], Sequence[NDArray[np.float64]]]
Pair = tuple[int, int]
SCAN_OFFSETS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)
SCANNED = 2  # kinds
HELD_OUT = 2  # random pairs of widths per kind
BLOCK = 32  # scans start at a multiple of it, and widths in between are its halves


@dataclass(frozen=True)
class Demand:
    """Which widths of a kind a network can ask for: from the least to the most, both sides."""

    kind: OperatorKind
    c_in: Pair
    c_out: Pair


@dataclass(frozen=True)
class Sampling:
    """``rounds`` a point is run; trials may be wrong by ``tolerance`` or ``least_us``.

    ``passes`` bounds how often a kind's grid is refined. Widths inside a range are multiples of
    ``multiple``, as a plan's are, or of the runtime's own steps where those are longer.
    """

    rounds: int = 30
    tolerance: float = 0.05
    least_us: float = 1.0
    passes: int = 4
    multiple: int = 8
    batch: int = 8
    seed: int = 0


@dataclass
class _Bench:
    """Times points, notes them, and hands the table on after each batch."""

    table: LatencyTable
    timer: Timer
    sampling: Sampling
    keep: Callable[[LatencyTable], None]
    known: dict[tuple[OperatorKind, Pair], Point] = field(default_factory=dict)

    def measure(self, kind: OperatorKind, pairs: Iterable[Pair], use: Use) -> list[Point]:
        """Return the points, measured now or before, noted for this use."""
        pairs = list(dict.fromkeys(pairs))
        missing = [pair for pair in pairs if (kind, pair) not in self.known]
        size = self.sampling.batch
        for start in range(0, len(missing), size):
            batch = missing[start : start + size]
            models = [one_operator(kind, *pair) for pair in batch]
            for pair, times in zip(batch, self.timer(models, self.sampling.rounds), strict=True):
                time, spread = middle(times)
                self.known[kind, pair] = Point(*pair, time, spread)
            self._note(kind, batch, use)
        self._note(kind, pairs, use)
        return [self.known[kind, pair] for pair in pairs]

    def _note(self, kind: OperatorKind, pairs: Sequence[Pair], use: Use) -> None:
        """Give the points this use in the table, the grid's before any other."""
        points = {(p.c_in, p.c_out): p for p in self.table.points.get(kind, ())
                  if p.use != "scan"}  # fmt: skip
        scans = [p for p in self.table.points.get(kind, ()) if p.use == "scan"]
        for pair in pairs:
            point = replace(self.known[kind, pair], use=use)
            if use == "scan":
                scans.append(point)
            else:
                points[pair] = point
        merged = tuple(sorted({*points.values(), *scans}))
        if merged != self.table.points.get(kind, ()):
            self.table = replace(self.table, points={**self.table.points, kind: merged})
            self.keep(self.table)


def measure_table(
    demands: Sequence[Demand],
    timer: Timer,
    start: LatencyTable,
    keep: Callable[[LatencyTable], None],
    sampling: Sampling | None = None,
) -> LatencyTable:
    """Return ``start`` with what the demands need; points it has are not measured again.

    ``timer`` gives (rounds,) microseconds per serialised model; ``keep`` gets the table after
    each batch, so that a run that is stopped goes on where it was.
    """
    bench = _Bench(start, timer, sampling or Sampling(), keep)
    for kind, points in start.points.items():
        bench.known.update({(kind, (p.c_in, p.c_out)): p for p in points})
    heavy = [d for d in demands if not d.kind.square and d.c_in[1] > BLOCK and d.c_out[1] > BLOCK]
    heavy.sort(key=lambda d: -d.kind.macs(d.c_in[1], d.c_out[1]))
    for demand in heavy[:SCANNED]:
        _scan(bench, demand)
    for demand in track(demands, "measuring operators", len(demands)):
        _refine(bench, demand)
    return bench.table


def _scan(bench: _Bench, demand: Demand) -> None:
    """Measure small steps of either width from about half of the other's range."""
    kind = demand.kind
    start_in, start_out = (_block(sum(span) // 2) for span in (demand.c_in, demand.c_out))
    offsets = SCAN_OFFSETS
    bench.measure(kind, [(start_in + o, start_out + BLOCK) for o in offsets], "scan")
    bench.measure(kind, [(start_in + BLOCK, start_out + o) for o in offsets], "scan")


def _block(width: int) -> int:
    return max(BLOCK, width // BLOCK * BLOCK)


def _refine(bench: _Bench, demand: Demand) -> None:
    """Measure the corners, then what trials show to be missing, then what judges the table."""
    kind, sampling = demand.kind, bench.sampling
    rng = np.random.default_rng(sampling.seed)
    earlier = [p for p in bench.table.points.get(kind, ()) if p.use == "grid"]
    inputs = {*demand.c_in, *(p.c_in for p in earlier)}
    outputs = {*demand.c_out, *(p.c_out for p in earlier)}
    own_in, own_out = steps(bench.table, kind.precision)
    step = max(own_in, sampling.multiple), max(own_out, sampling.multiple)
    for _ in range(sampling.passes):
        grid = bench.measure(kind, _grid(kind, inputs, outputs), "grid")
        surface = surface_of(kind, [replace(p, use="grid") for p in grid], (own_in, own_out))
        points = bench.measure(kind, _trials(kind, inputs, outputs, step, rng), "trial")
        wrong = [p for p in points if _is_wrong(p, surface.at(p.c_in, p.c_out), sampling)]
        if not wrong:
            break
        inputs |= {p.c_in for p in wrong}
        outputs |= {p.c_out for p in wrong}
    bench.measure(kind, _grid(kind, inputs, outputs), "grid")
    bench.measure(kind, _strangers(demand, inputs, outputs, step, rng), "held_out")


def _strangers(
    demand: Demand, inputs: set[int], outputs: set[int], step: Pair, rng: np.random.Generator
) -> list[Pair]:
    """Return random pairs of widths on the steps that the grid has not."""
    taken = set(_grid(demand.kind, inputs, outputs))
    pairs = []
    for _ in range(HELD_OUT):
        pair = (_drawn(demand.c_in, step[0], rng), _drawn(demand.c_out, step[1], rng))
        pairs.append((pair[1], pair[1]) if demand.kind.square else pair)
    return [pair for pair in pairs if pair not in taken]


def _drawn(span: Pair, step: int, rng: np.random.Generator) -> int:
    return int(min(span[1], max(span[0], round(rng.uniform(*span) / step) * step)))


def _is_wrong(point: Point, predicted: float, sampling: Sampling) -> bool:
    allowed = max(sampling.tolerance * point.microseconds, sampling.least_us)
    return abs(predicted - point.microseconds) > allowed


def _grid(kind: OperatorKind, inputs: Iterable[int], outputs: Iterable[int]) -> list[Pair]:
    if kind.square:
        return [(c, c) for c in sorted({*inputs, *outputs})]
    return [(a, b) for a in sorted(inputs) for b in sorted(outputs)]


def _trials(
    kind: OperatorKind,
    inputs: Iterable[int],
    outputs: Iterable[int],
    step: Pair,
    rng: np.random.Generator,
) -> list[Pair]:
    """Return two pairs of widths that the grid has not, where its gaps are the widest."""
    middles = [_middles(sorted(known), s) for known, s in zip((inputs, outputs), step, strict=True)]
    if kind.square:
        return [(c, c) for c in _middles(sorted({*inputs, *outputs}), max(step))[:2]]
    known = sorted(inputs), sorted(outputs)
    pairs = []
    for turn in range(2):
        pair = [int(found[min(turn, len(found) - 1)]) if found else int(rng.choice(known[axis]))
                for axis, found in enumerate(middles)]  # fmt: skip
        pairs.append((pair[0], pair[1]))
    grid = set(_grid(kind, *known))
    return [p for p in dict.fromkeys(pairs) if p not in grid]


def _middles(known: Sequence[int], step: int) -> list[int]:
    """Return the middles of the gaps, the widest (relative to its width) first, on the steps."""
    found = []
    for low, high in pairwise(known):
        middle_ = round((low + high) / 2 / step) * step
        if low < middle_ < high:
            found.append((-(high - low) / high, middle_))
    return [middle_ for _, middle_ in sorted(found)]


def middle(times: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean of the middle half of (rounds,) times, and half the quartiles' distance.

    The latter relative to the former.
    """
    low, high = np.quantile(times, [0.25, 0.75])
    inside = times[(times >= low) & (times <= high)]
    mean = float(inside.mean())
    return mean, float((high - low) / 2 / mean) if mean else 0.0


def demands_of(
    ranges: Iterable[tuple[OperatorKind, Pair, Pair]],
) -> list[Demand]:
    """Return one demand per kind, over all the widths that operators of that kind can have."""
    found: dict[OperatorKind, Demand] = {}
    for kind, c_in, c_out in ranges:
        if kind in found:
            before = found[kind]
            c_in = min(c_in[0], before.c_in[0]), max(c_in[1], before.c_in[1])
            c_out = min(c_out[0], before.c_out[0]), max(c_out[1], before.c_out[1])
        found[kind] = Demand(kind, c_in, c_out)
    return [found[kind] for kind in sorted(found)]


def spread_of(table: LatencyTable) -> Mapping[str, float]:
    """Return the median and the largest spread of the table's points."""
    spreads = [p.spread for points in table.points.values() for p in points] or [0.0]
    return {"median": float(np.median(spreads)), "largest": float(max(spreads))}
