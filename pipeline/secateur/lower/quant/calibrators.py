"""From a tensor's statistics to the range that int8 shall cover.

ONNX Runtime's calibrators were the first choice. They keep every activation of a call, take bin
edges from the first batch (so the split into batches changes the result), skip NaN in silence and
know no squared error. These work on ``TensorStatistics``, so that one pass over the images serves
all of them; tests hold min-max and percentile against ONNX Runtime's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from secateur.lower.quant.statistics import HALF, TensorStatistics

Calibrator = Literal["minmax", "moving_average", "percentile", "entropy", "mse"]
CALIBRATORS: tuple[Calibrator, ...] = get_args(Calibrator)
Range = tuple[float, float]
Values = NDArray[np.floating[Any]]

PERCENTILE = 99.99  # of a tensor's values lie inside; half of the rest is cut on each side
LEVELS = 128  # of |x| in signed int8
ENTROPY_THRESHOLDS = 256  # tried at most
MSE_SHARES = np.linspace(1.0, 0.02, 99)  # of the largest |x|; of equals the widest wins
MSE_LEVELS = 255


def calibrated_range(statistics: TensorStatistics, calibrator: Calibrator) -> Range:
    """Return the (lowest, highest) value that the 8-bit grid has to reach."""
    return RULES[calibrator](statistics)


def _minmax(statistics: TensorStatistics) -> Range:
    return statistics.lowest, statistics.highest


def _moving_average(statistics: TensorStatistics) -> Range:
    return statistics.mean_lowest, statistics.mean_highest


def _percentile(statistics: TensorStatistics) -> Range:
    """Cut the same share of values on either side, at the outer edge of the bin it falls in."""
    share = (100 - PERCENTILE) / 200
    below = np.cumsum(statistics.counts) / statistics.counts.sum()
    first = int(np.searchsorted(below, share, side="right"))
    last = int(np.searchsorted(below, 1 - share))
    edges = (first - HALF, last + 1 - HALF)
    return _clip(statistics, edges[0] * statistics.bin_width, edges[1] * statistics.bin_width)


def _entropy(statistics: TensorStatistics) -> Range:
    """Clip |x| where 128 levels keep its distribution best, by Kullback-Leibler divergence.

    Migacz, 8-bit inference with TensorRT (GTC 2017, s7310). As in NVIDIA's pytorch-quantization
    the bin at zero counts as much as its neighbour: a ReLU's zeros would decide everything.
    """
    counts = _magnitudes(statistics)
    counts[0] = counts[1]
    # Only where values end: a threshold in a gap would clip nothing more than the bin before it.
    ends = np.flatnonzero(counts) + 1
    stops = ends[ends >= LEVELS][::-1]  # the widest first: of equals nothing is won by clipping
    if len(stops) == 0:
        return _minmax(statistics)
    stops = stops[:: -(-len(stops) // ENTROPY_THRESHOLDS)]
    best = int(np.argmin([_divergence(counts, int(stop)) for stop in stops]))
    return _symmetric_clip(statistics, int(stops[best]) * statistics.bin_width)


def _divergence(counts: NDArray[np.float64], stop: int) -> float:
    """Return KL(clipped at ``stop`` bins || that on LEVELS levels)."""
    inside = counts[:stop]
    filled = inside > 0
    level = np.arange(stop) * LEVELS // stop
    total = np.bincount(level, weights=inside, minlength=LEVELS)
    share = total / np.maximum(np.bincount(level, weights=filled, minlength=LEVELS), 1)
    clipped = inside.copy()
    clipped[-1] += counts[stop:].sum()
    p, q = clipped[filled] / clipped.sum(), share[level][filled] / inside.sum()
    return float(np.sum(p * np.log(p / q)))


def _mse(statistics: TensorStatistics) -> Range:
    """Clip |x| where rounding to 255 levels and clipping together cost the least squared error.

    The trade-off of Banner et al. 2019 (arXiv 1810.05723, eq. 3), on the counts instead of a
    fitted density.
    """
    centres = (np.arange(-HALF, HALF) + 0.5) * statistics.bin_width
    # A bin at zero holds mostly exact zeros (ReLU), which every grid keeps.
    centres[HALF] = 0.0
    seen = statistics.counts > 0
    values, weights = np.asarray(centres[seen]), statistics.counts[seen]
    peak = max(-statistics.lowest, statistics.highest)
    tried = [_symmetric_clip(statistics, float(share * peak)) for share in MSE_SHARES]
    errors = [float(np.sum(weights * _rounding(values, *limits) ** 2)) for limits in tried]
    return tried[int(np.argmin(errors))]


def _rounding(values: Values, lowest: float, highest: float) -> Values:
    lowest, highest = min(lowest, 0.0), max(highest, 0.0)
    step = (highest - lowest) / MSE_LEVELS or 1.0
    zero = round(-lowest / step)
    grid = np.clip(np.rint(values / step), -zero, MSE_LEVELS - zero)
    return np.asarray(values - grid * step)


def _magnitudes(statistics: TensorStatistics) -> NDArray[np.float64]:
    """Return the histogram of |x| (HALF bins)."""
    counts = statistics.counts
    return (counts[HALF:] + counts[:HALF][::-1]).astype(np.float64)


def _symmetric_clip(statistics: TensorStatistics, threshold: float) -> Range:
    return _clip(statistics, -threshold, threshold)


def _clip(statistics: TensorStatistics, lowest: float, highest: float) -> Range:
    """Never reach beyond what was seen."""
    return max(lowest, statistics.lowest), min(highest, statistics.highest)


RULES: Mapping[Calibrator, Callable[[TensorStatistics], Range]] = {
    "minmax": _minmax,
    "moving_average": _moving_average,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}
