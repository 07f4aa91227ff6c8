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
from secateur.devices.on_bench import take_samples

NOISY_ABOVE = 0.10  # coefficient of variation, or change of the median within the run
PERCENTILES = (90, 95, 97, 99, 99.9)
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
    something else began to run, and what follows is not what was before.

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

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-like data."""
        return asdict(self)


def summarise(
    samples_ms: NDArray[np.float64],
    before_c: float | None = None,
    after_c: float | None = None,
) -> Latency:
    """Return the statistics of (runs,) latencies in milliseconds."""
    mean = float(samples_ms.mean())
    variation = float(samples_ms.std() / mean)
    thirds = block_medians(samples_ms, 3)
    return Latency(
        min_ms=float(samples_ms.min()),
        mean_ms=mean,
        median_ms=float(np.median(samples_ms)),
        percentiles_ms={f"p{p:g}": float(np.percentile(samples_ms, p)) for p in PERCENTILES},
        max_ms=float(samples_ms.max()),
        runs=len(samples_ms),
        coefficient_of_variation=variation,
        noisy=variation > NOISY_ABOVE or max(thirds) > (1 + NOISY_ABOVE) * min(thirds),
        block_medians_ms=block_medians(samples_ms),
        temperature_before_c=before_c,
        temperature_after_c=after_c,
    )


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
    before = temperature_c()
    samples = take_samples(
        calls, **asdict(protocol), progress=lambda rounds: track(rounds, title, len(rounds))
    )
    after = temperature_c()
    return {name: summarise(np.array(values), before, after) for name, values in samples.items()}
