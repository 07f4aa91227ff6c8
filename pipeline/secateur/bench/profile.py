"""Measure a latency table: whole networks at random widths, each operator timed where it stands.

An operator alone is not what it is in its network: the runtime fuses it with its neighbours, puts
changes of memory layout between them, and its weights are no longer in the cache when its turn
comes. So the network itself runs, narrowed at random; its runtime says what each operator took.
Widths are drawn so that every batch of networks covers each group's range evenly (a Latin
hypercube: McKay, Beckman, Conover, 1979). Each batch is predicted before it joins the table; when
the predictions are right, the table is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from secateur.bench.estimate import table_estimate
from secateur.core.progress import track
from secateur.devices.latency_table import LatencyTable, Point, Run
from secateur.devices.operators import Operators

BLOCK = 32
OFFSETS = (2, 4, 6, 8, 12, 16, 24, 32)  # channels above a multiple of it: where stairs show
LEAST_RUNS = 24  # before a table predicts anything


class Times(Protocol):
    """Microseconds of (rounds,) runs: the whole run, and of each place."""

    @property
    def run_us(self) -> NDArray[np.float64]:
        """The whole run."""

    @property
    def places_us(self) -> Mapping[str, NDArray[np.float64]]:
        """The kernels of each place."""


Timer = Callable[[Sequence[bytes], int], Sequence[Times]]


@dataclass(frozen=True)
class Narrowed:
    """A network at any widths: ``to(kept)`` is its serialised model.

    Its groups keep from ``least`` to ``full``, in steps of ``steps``.
    """

    operators: Operators
    to: Callable[[Sequence[int]], bytes]
    least: Sequence[int]
    full: Sequence[int]
    steps: Sequence[int]


@dataclass(frozen=True)
class Sampling:
    """``batch`` networks take turns for ``rounds``, until a batch is predicted to ``tolerance``.

    At least ``fewest`` batches and at most ``most`` are measured.
    """

    rounds: int = 16
    batch: int = 8
    fewest: int = 5
    most: int = 10
    tolerance: float = 0.015
    seed: int = 0


def measure_table(
    network: Narrowed,
    timer: Timer,
    start: LatencyTable,
    keep: Callable[[LatencyTable], None],
    sampling: Sampling | None = None,
) -> LatencyTable:
    """Return ``start`` with what the network needs; what it has is not measured again.

    ``timer`` gives the times of serialised models that take turns; ``keep`` gets the table after
    each batch, so that a run that is stopped goes on where it was.
    """
    sampling = sampling or Sampling()
    table = start
    if not table.stairs:
        table = _with_stairs(network, timer, table, sampling.rounds)
        if table.stairs:
            keep(table)
    for number in track(range(sampling.most), "measuring operators", sampling.most):
        if len(table.runs) > number * sampling.batch:
            continue
        if number >= sampling.fewest and _last_error(table, sampling.batch) <= sampling.tolerance:
            break
        table = _with_batch(network, timer, table, _drawn(network, number, sampling), sampling)
        keep(table)
    return table


def _with_stairs(network: Narrowed, timer: Timer, table: LatencyTable, rounds: int) -> LatencyTable:
    """Add what the network takes a few channels above the middle of every group's range."""
    middles = [full // 2 // BLOCK * BLOCK for full in network.full]
    if not any(middles):
        return table  # all groups are too narrow to show a step
    networks = [
        [min(full, low + more) if low else full
         for low, full in zip(middles, network.full, strict=True)]
        for more in OFFSETS
    ]  # fmt: skip
    times = timer([network.to(kept) for kept in networks], rounds)
    stairs = tuple((more, fastest(each.run_us)[0] / 1000)
                   for more, each in zip(OFFSETS, times, strict=True))  # fmt: skip
    return replace(table, stairs=stairs)


def _drawn(network: Narrowed, number: int, sampling: Sampling) -> list[tuple[int, ...]]:
    """Return the widths of a batch; the first one's begins with the least and the full ones."""
    rng = np.random.default_rng((sampling.seed, number))
    columns = []
    for least, full, step in zip(network.least, network.full, network.steps, strict=True):
        shares = rng.permutation(sampling.batch) + rng.uniform(size=sampling.batch)
        widths = least + shares / sampling.batch * (full - least)
        on_grid = np.clip(np.rint(widths / step) * step, least, full)
        columns.append([int(width) for width in on_grid])
    drawn = list(zip(*columns, strict=True))
    if number == 0:
        drawn[:2] = [tuple(network.least), tuple(network.full)]
    return drawn


def _with_batch(
    network: Narrowed,
    timer: Timer,
    table: LatencyTable,
    batch: Sequence[tuple[int, ...]],
    sampling: Sampling,
) -> LatencyTable:
    """Add the batch; its times are brought to the first batch's minute by the parent's."""
    everyone = [tuple(network.full), *batch]
    times = timer([network.to(kept) for kept in everyone], sampling.rounds)
    parent_ms = fastest(times[0].run_us)[0] / 1000
    reference = table.parent_ms or parent_ms
    drift = reference / parent_ms
    known = table if len(table.runs) >= LEAST_RUNS else None
    runs, points = list(table.runs), {k: list(p) for k, p in table.points.items()}
    for kept, each in zip(batch, times[1:], strict=True):
        predicted = table_estimate(network.operators, known, kept).ms if known else None
        runs.append(Run(kept, drift * fastest(each.run_us)[0] / 1000, predicted))
        for placed in network.operators.timed:
            time, spread = fastest(each.places_us.get(placed.name, np.zeros(1)))
            point = Point(placed.read(kept), placed.made(kept), drift * time, spread)
            points.setdefault(placed.kind, []).append(point)
    return replace(table, runs=tuple(runs), parent_ms=reference,
                   points={k: tuple(p) for k, p in points.items()})  # fmt: skip


def _last_error(table: LatencyTable, batch: int) -> float:
    return replace(table, runs=table.runs[-batch:]).error()


def fastest(times: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean of the fastest quarter of (rounds,) times, and half the quartiles' distance.

    The latter relative to the former. Whatever else runs on the machine only adds to a time; a
    mean of several is not bound to a profiler's whole microseconds.
    """
    low, high = np.quantile(times, [0.25, 0.75])
    mean = float(times[times <= low].mean())
    return mean, float((high - low) / 2 / mean) if mean else 0.0


def spread_of(table: LatencyTable) -> Mapping[str, float]:
    """Return the median and the largest spread of the table's points."""
    spreads = [p.spread for points in table.points.values() for p in points] or [0.0]
    return {"median": float(np.median(spreads)), "largest": float(max(spreads))}
