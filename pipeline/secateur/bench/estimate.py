"""What a cut will take: from a latency table with its error, or a roofline that says it is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from secateur.core.errors import DeviceError
from secateur.devices.latency_table import LatencyTable
from secateur.devices.operators import Operators
from secateur.devices.target import Precision, Target

MACS_PER_CYCLE = {"fp32": 8, "fp16": 16, "int8": 32}  # two 128-bit pipes of an Arm core
BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
# The share of the peak that published single-image latencies reach: ResNet-50 in fp16 by ncnn on
# Raspberry Pi 5 (46.2 ms on 4 threads) 0.58; in int8 by TensorRT on AGX Orin (0.64 ms) 0.15.
SHARE_OF_PEAK = {"cpu": 0.5, "gpu": 0.15}
ROOFLINE_ERROR = 0.5  # half to one and a half times: what the figures above scatter by


@dataclass(frozen=True)
class Estimate:
    """Milliseconds of one image and half the width of the error bar; ``source`` says whence."""

    ms: float
    error_ms: float
    source: Literal["table", "roofline"]

    def said(self) -> str:
        """Return it in words."""
        label = "" if self.source == "table" else "roofline estimate, not measured: "
        return f"{label}{self.ms:.4g} ± {self.error_ms:.2g} ms"


def table_estimate(operators: Operators, table: LatencyTable, kept: Sequence[int]) -> Estimate:
    """Return the latency of a network whose group ``g`` keeps ``kept[g]`` channels.

    The error bar is the table's relative error on networks that it predicted before they ran.

    Raises:
        DeviceError: the table lacks an operator, or has holes.
    """
    total = table.fixed_us
    for placed in operators.timed:
        total += table.surface(placed.kind).at(placed.read(kept), placed.made(kept))
    error = table.error()
    ms = total * table.scale / 1000
    return Estimate(ms, ms * (0.0 if np.isnan(error) else error), "table")


def roofline(
    operators: Operators,
    target: Target,
    kept: Sequence[int],
    *,
    precision: Precision = "fp32",
) -> Estimate:
    """Return a latency from the target's peak rate, in its fastest power mode, and bandwidth.

    Each operator takes as long as its arithmetic or its traffic, whichever is more (Williams et
    al., "Roofline", 2009), at the share of the peak that published latencies reach.

    Raises:
        DeviceError: the profile lacks the peak rate or the bandwidth.
    """
    macs_per_s = _peak_macs(target, precision)
    if macs_per_s is None or target.memory is None:
        raise DeviceError(
            f"the profile of {target.name} lacks the peak rate or the memory bandwidth in "
            f"{precision}, so no latency can be estimated",
            hint=f"measure a table there: secateur profile RECIPE --target {target.name}",
        )
    share = SHARE_OF_PEAK[target.accelerator]
    bytes_per_s = target.memory.bandwidth_gb_s * 1e9
    seconds = 0.0
    for placed in operators.timed:
        c_in, c_out = placed.read(kept), placed.made(kept)
        arithmetic = placed.kind.macs(c_in, c_out) / (share * macs_per_s)
        traffic = placed.kind.traffic(c_in, c_out) * BYTES[precision] / bytes_per_s
        seconds += max(arithmetic, traffic)
    return Estimate(1000 * seconds, 1000 * seconds * ROOFLINE_ERROR, "roofline")


def _peak_macs(target: Target, precision: Precision) -> float | None:
    if target.accelerator == "cpu":
        if target.cpu is None:
            return None
        rate = MACS_PER_CYCLE[precision] * target.cpu.max_ghz * 1e9
        return rate * min(target.threads, target.cpu.cores)
    if precision == "fp32":
        return None
    rates = [target.dense_rate(precision, mode.name) or 0.0 for mode in target.power_modes]
    return max(rates, default=0.0) * 1e12 / 2 or None
