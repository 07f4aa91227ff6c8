"""What is read back of a ``bench.json``: checked, since it may come from another machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.core.errors import BundleError, first_problem

Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Positive = Milliseconds
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Lenient(BaseModel):
    """Later versions may write more."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class LatencyRow(_Lenient):
    """One row of the protocol's figures; ``block_medians_ms`` is empty in older files."""

    min_ms: Milliseconds
    median_ms: Milliseconds
    percentiles_ms: dict[str, Milliseconds]
    max_ms: Milliseconds
    runs: int
    coefficient_of_variation: float
    noisy: bool
    block_medians_ms: tuple[Milliseconds, ...] = ()
    remarks: tuple[str, ...] = ()  # why it is noisy


class OfflineRow(_Lenient):
    """Images a second, where all are there from the start."""

    batch: int
    images_per_s: Positive
    latency: LatencyRow


class SweepRow(_Lenient):
    """One number of threads."""

    threads: int
    median_ms: Milliseconds
    p99_ms: Milliseconds
    images_per_s: Positive
    noisy: bool


class MemoryRow(_Lenient):
    """MB: of the whole process at its highest, and what the file asks for."""

    process_peak: Positive | None
    weights: Finite | None
    activations: Finite | None


class EnergyRow(_Lenient):
    """Millijoules of one inference above idle, their standard error, and what the meter covers.

    Within the noise they may be below nothing.
    """

    per_inference_mj: Finite
    standard_error_mj: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    within_noise: bool
    idle_w: Finite
    busy_w: Finite
    rounds: int
    meter: str
    covers: tuple[str, ...]

    @property
    def source(self) -> str:
        """The meter and what it covers: figures of another source are not to be held beside."""
        return f"{self.meter}: {', '.join(self.covers)}"


class NoEnergy(_Lenient):
    """Why the machine told no energy."""

    not_measurable: str


class BenchHost(_Lenient):
    """The machine that was measured on."""

    cpu: str = "unknown"


class BenchRecord(_Lenient):
    """``bench.json``; ``latency`` has at least ``host_to_host``, the runtime's call alone."""

    device: str
    target: str
    precision: str
    runtime: str
    threads: int
    model_sha256: str
    latency: dict[str, LatencyRow]
    host: BenchHost
    energy: EnergyRow | NoEnergy | None = None  # older files say nothing, nor of the following
    offline: OfflineRow | None = None
    threads_sweep: tuple[SweepRow, ...] | None = None
    memory_mb: MemoryRow | None = None


def read_bench(path: Path) -> BenchRecord:
    """Return what ``secateur bench`` wrote.

    Raises:
        BundleError: it cannot be read, or is not such a file.
    """
    hint = "write it with `secateur bench BUNDLE`"
    try:
        return BenchRecord.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror})", hint=hint) from error
    except ValidationError as error:
        raise BundleError(f"{path}: {first_problem(error)}", hint=hint) from error
    except ValueError as error:
        raise BundleError(f"{path} is not JSON: {error}", hint=hint) from error
