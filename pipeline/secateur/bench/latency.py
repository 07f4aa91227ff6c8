"""Latency by one protocol: warm-up, at least 3 s and 100 runs, trtexec's names, noise stated.

Two models are compared by taking turns within one run, because a busy machine drifts by more
than the difference between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.core.progress import track
from secateur.devices.host import temperature_c
from secateur.devices.on_bench import take_samples, throttled, throttling

NOISY_ABOVE = 0.10  # coefficient of variation, or change of the median within the run
PERCENTILES = (90, 95, 97, 99, 99.9)
COLD_BLOCKS = 2  # slow ones at the beginning from which on it was not warm; one may be chance
BLOCKS = 30  # whose medians are kept: calls that follow one another are not independent


@dataclass(frozen=True)
class Protocol:
    """How long to warm up and to measure."""

    warmup_ms: float = 200
    seconds: float = 3
    runs: int = 100


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call; ``coefficient_of_variation`` above 0.10 sets ``noisy``.

    So does a run whose thirds have medians that differ by more than 10 %: its clock has changed, or
    something else began to run, and what follows is not what was before; one that began before it
    was warm; and one during which the machine says that it lowered its clock. ``remarks`` says
    which. Nothing is left out of any figure: ``outliers`` counts the calls above the third quartile
    by more than three times the distance between the quartiles.

    ``block_medians_ms`` are the medians of 30 successive parts of the run: what is needed to tell
    later whether another run differs by more than the noise.
    """

    min_ms: float
    mean_ms: float
    median_ms: float
    percentiles_ms: Mapping[str, float]
    max_ms: float
    runs: int
    coefficient_of_variation: float
    noisy: bool
    block_medians_ms: tuple[float, ...] = ()
    temperature_before_c: float | None = None
    temperature_after_c: float | None = None
    throttled: bool | None = None  # None: the machine does not tell
    outliers: int = 0
    remarks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-like data."""
        return asdict(self)


def summarise(
    samples_ms: NDArray[np.float64],
    before_c: float | None = None,
    after_c: float | None = None,
    throttled: bool | None = None,
) -> Latency:
    """Return the statistics of (runs,) latencies in milliseconds."""
    mean = float(samples_ms.mean())
    variation = float(samples_ms.std() / mean)
    remarks = [*_varies(variation), *_drifts(samples_ms)]
    if throttled:
        remarks.append("the machine lowered its clock meanwhile, for heat or lack of power")
    return Latency(
        min_ms=float(samples_ms.min()),
        mean_ms=mean,
        median_ms=float(np.median(samples_ms)),
        percentiles_ms={f"p{p:g}": float(np.percentile(samples_ms, p)) for p in PERCENTILES},
        max_ms=float(samples_ms.max()),
        runs=len(samples_ms),
        coefficient_of_variation=variation,
        noisy=bool(remarks),
        block_medians_ms=block_medians(samples_ms),
        temperature_before_c=before_c,
        temperature_after_c=after_c,
        throttled=throttled,
        outliers=_outliers(samples_ms),
        remarks=tuple(remarks),
    )


def _varies(variation: float) -> list[str]:
    """Say whether calls differ too much from one another."""
    said = f"calls vary by {variation:.0%} (coefficient of variation)"
    return [said] if variation > NOISY_ABOVE else []


def _drifts(samples_ms: NDArray[np.float64]) -> list[str]:
    """Say whether one part of a run took longer than another, and what that may come from."""
    thirds, blocks = block_medians(samples_ms, 3), block_medians(samples_ms)
    more = max(thirds) / min(thirds) - 1
    if more > NOISY_ABOVE:
        which = ("first", "middle", "last")[thirds.index(max(thirds))]
        why = {
            "first": "it was not warm, or something else ended",
            "middle": "something else ran",
            "last": "it was throttled, or something else began to run",
        }[which]
        return [f"the {which} third of the run took {more:.0%} more than the fastest: {why}"]
    settled = float(np.median(blocks[len(blocks) // 2 :]))
    slow = [block > (1 + NOISY_ABOVE) * settled for block in blocks]
    cold = slow.index(False) if False in slow else 0
    if cold < COLD_BLOCKS:
        return []
    return [f"it was not warm: the first {cold} of {len(blocks)} parts took "
            f"{blocks[0] / settled - 1:.0%} more than the second half"]  # fmt: skip


def _outliers(samples_ms: NDArray[np.float64]) -> int:
    """Count calls beyond Tukey's outer fence."""
    low, high = np.percentile(samples_ms, [25, 75])
    return int((samples_ms > high + 3 * (high - low)).sum())


def block_medians(samples_ms: NDArray[np.float64], blocks: int = BLOCKS) -> tuple[float, ...]:
    """Return the median of each of ``blocks`` successive parts of (runs,) samples."""
    parts = np.array_split(samples_ms, min(blocks, len(samples_ms)))
    return tuple(float(np.median(part)) for part in parts)


def measure(
    calls: Mapping[str, Callable[[], object]],
    protocol: Protocol | None = None,
    title: str = "measuring latency",
) -> dict[str, Latency]:
    """Measure every call, taking turns, until each has its seconds and its runs."""
    protocol = protocol or Protocol()
    before, alarms = temperature_c(), throttling()
    samples = take_samples(
        calls, **asdict(protocol), progress=lambda rounds: track(rounds, title, len(rounds))
    )
    after, lowered = temperature_c(), throttled(alarms, throttling())
    return {
        name: summarise(np.array(values), before, after, lowered)
        for name, values in samples.items()
    }


@dataclass(frozen=True)
class Offline:
    """Images a second where all are there from the start; ``latency`` is of a ``batch`` of them."""

    batch: int
    images_per_s: float
    latency: Latency

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-like data."""
        return asdict(self)


def offline(samples_ms: NDArray[np.float64], batch: int, lowered: bool | None = None) -> Offline:
    """Return the throughput of (runs,) calls with ``batch`` images each: all images, all time.

    ``lowered``: whether the clock was, meanwhile; None where nothing tells.
    """
    found = summarise(samples_ms, throttled=lowered)
    return Offline(batch, 1000 * batch / found.mean_ms, found)


def sweep_counts(cores: int) -> list[int]:
    """Return the numbers of threads to try: powers of two, and all cores."""
    return sorted({cores, *(2**n for n in range(cores.bit_length()) if 2**n <= cores)})


def sweep_row(threads: int, one: Latency, many: Offline) -> dict[str, Any]:
    """Return what ``bench.json`` says of one number of threads."""
    return {
        "threads": threads, "median_ms": one.median_ms, "p99_ms": one.percentiles_ms["p99"],
        "images_per_s": many.images_per_s, "noisy": one.noisy or many.latency.noisy,
    }  # fmt: skip
