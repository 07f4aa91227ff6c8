"""Is B faster than A? Turns taken block by block, and an interval of the ratio of medians.

Calls that follow one another share whatever the machine is busy with, so a call is no independent
sample; blocks of calls are resampled (a block bootstrap, Künsch 1989), and where A and B took
turns, a pair of neighbouring blocks stays together.

Energies are means with their own errors; their difference is held against both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from secateur.bench.energy import NOISE
from secateur.bench.latency import BLOCKS, Protocol
from secateur.bench.record import EnergyRow
from secateur.core.progress import track

Call = Callable[[], object]
Medians = NDArray[np.float64]
LEVEL = 0.95
RESAMPLES = 4000
SESSIONS = 0.02  # two sessions of the very same file differ by up to half a percent here


@dataclass(frozen=True)
class Ratio:
    """B's median latency over A's, with its 95 % interval; above 1, B is slower."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["faster", "slower", "no difference"]:
        """What can be said beyond the noise.

        The interval knows how calls of these two sessions vary, not how sessions do; a difference
        that another session might have is none.
        """
        if self.low <= 1 <= self.high or abs(self.value - 1) < SESSIONS:
            return "no difference"
        return "faster" if self.value < 1 else "slower"

    def exceeds(self, percent: float) -> bool:
        """Say whether B is slower beyond the noise, and by more than ``percent``."""
        return self.verdict == "slower" and self.value > 1 + percent / 100


@dataclass(frozen=True)
class EnergyChange:
    """Millijoules of one inference in A and B, from two bench.json, and the difference's error.

    A difference counts from two standard errors on.
    """

    a_mj: float
    b_mj: float
    standard_error_mj: float
    source: str
    verdict: Literal["less", "more", "no difference"]

    def exceeds(self, percent: float) -> bool:
        """Say whether B takes more beyond the noise, and by more than ``percent``."""
        return self.verdict == "more" and self.b_mj > self.a_mj + abs(self.a_mj) * percent / 100


def energy_change(a: EnergyRow, b: EnergyRow) -> EnergyChange:
    """Return the change from A to B; both from the same source."""
    error = math.hypot(a.standard_error_mj, b.standard_error_mj)
    more = b.per_inference_mj - a.per_inference_mj
    verdict: Literal["less", "more", "no difference"] = "no difference"
    if abs(more) > NOISE * error:
        verdict = "more" if more > 0 else "less"
    return EnergyChange(a.per_inference_mj, b.per_inference_mj, error, a.source, verdict)


def take_turns(
    a: Call, b: Call, protocol: Protocol | None = None, blocks: int = BLOCKS
) -> tuple[Medians, Medians]:
    """Return each call's (blocks,) block medians in ms, from blocks of A and B in turn.

    Who goes first changes from pair to pair. Each gets the protocol's seconds and runs.
    """
    protocol = protocol or Protocol()
    calls = (a, b)
    counts = [_calls_per_block(call, protocol, blocks) for call in calls]
    medians = np.empty((2, blocks))
    for pair in track(range(blocks), "measuring in turns", blocks):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            medians[which, pair] = np.median(_times(calls[which], counts[which]))
    return medians[0], medians[1]


def ratio_of_medians(a: Medians, b: Medians, *, paired: bool, seed: int = 0) -> Ratio:
    """Return the ratio B / A of (n,) and (m,) block medians with its bootstrap interval.

    ``paired``: ``a[i]`` and ``b[i]`` were measured side by side (so n = m).
    """
    random = np.random.default_rng(seed)
    picks_a = random.integers(0, len(a), (RESAMPLES, len(a)))
    picks_b = picks_a if paired else random.integers(0, len(b), (RESAMPLES, len(b)))
    ratios = np.median(b[picks_b], axis=1) / np.median(a[picks_a], axis=1)
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Ratio(float(np.median(b) / np.median(a)), float(low), float(high))


def _calls_per_block(call: Call, protocol: Protocol, blocks: int) -> int:
    """Warm up, and return how many calls a block needs."""
    until, runs = time.perf_counter() + protocol.warmup_ms / 1000, 0
    start = time.perf_counter()
    while runs == 0 or time.perf_counter() < until:
        call()
        runs += 1
    each = (time.perf_counter() - start) / runs
    return max(math.ceil(protocol.runs / blocks), round(protocol.seconds / blocks / each))


def _times(call: Call, count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return times
