"""Streaming statistics of one tensor: range, averaged range and a histogram that never re-bins.

A bin is ``2**exponent`` wide and zero lies on an edge. When a value falls outside, the width
doubles and neighbouring bins are added, which is exact. So the result depends on the values alone,
not on how they came in batches: a calibration that was killed and resumed ends in the same counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

HALF = 2048  # bins on each side of zero, as TensorRT's entropy calibrator has
LEAST_EXPONENT = -100  # of a tensor that is all zeros
AVERAGING = 0.01  # of a new image's range, as in ONNX Runtime and torch.ao

Array = NDArray[Any]


class TensorStatistics:
    """What calibrators need to know of one activation; memory does not grow with the images.

    ``lowest`` and ``highest`` are over all images. ``mean_lowest`` and ``mean_highest`` are the
    exponential moving averages of each image's own (Jacob et al. 2018, arXiv 1712.05877, 3.1),
    freed of their start at zero as in Adam (arXiv 1412.6980, section 3). ``counts`` (2 * HALF)
    are of the values in [-HALF, HALF) * bin_width.
    """

    def __init__(self) -> None:
        self.images = 0
        self.lowest = np.inf
        self.highest = -np.inf
        self._sums = (0.0, 0.0)
        self.exponent = LEAST_EXPONENT
        self.counts = np.zeros(2 * HALF, dtype=np.int64)

    @property
    def bounded(self) -> bool:
        """Whether it has a range: attention masks write -infinity."""
        return self.lowest != -np.inf

    @property
    def bin_width(self) -> float:
        """The width of one bin, in the tensor's unit."""
        return float(2.0**self.exponent)

    @property
    def mean_lowest(self) -> float:
        """The averaged lowest value."""
        return self._sums[0] / (1 - (1 - AVERAGING) ** self.images)

    @property
    def mean_highest(self) -> float:
        """The averaged highest value."""
        return self._sums[1] / (1 - (1 - AVERAGING) ** self.images)

    def add(self, values: NDArray[np.float32]) -> bool:
        """Count one image's values, of any shape; say whether they are what a sound model gives.

        NaN and +infinity are not, and leave the statistics as they were. A mask's -infinity is,
        but has no place on a grid: the tensor is no longer ``bounded``.
        """
        lowest, highest = float(values.min()), float(values.max())
        if np.isnan(lowest) or highest == np.inf:
            return False
        self.images += 1
        if lowest == -np.inf:
            self.lowest, self.highest = lowest, max(self.highest, highest)
            return True
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)
        low, high = self._sums
        self._sums = (low + AVERAGING * (lowest - low), high + AVERAGING * (highest - high))
        self._widen(max(-lowest, highest))
        scaled = values.reshape(-1) * np.float32(2.0**-self.exponent)
        places = np.floor(scaled, out=scaled).astype(np.intp)
        places += HALF
        self.counts += np.bincount(places, minlength=2 * HALF)
        return True

    def _widen(self, peak: float) -> None:
        """Make bins wide enough for values up to ``peak``."""
        wanted = int(np.frexp(peak)[1]) - int(np.log2(HALF))
        if peak > 0 and wanted > self.exponent:
            shift = min(wanted - self.exponent, int(np.log2(HALF)) + 1)
            targets = (np.arange(-HALF, HALF) >> shift) + HALF
            merged = np.bincount(targets, weights=self.counts, minlength=2 * HALF)
            self.counts, self.exponent = merged.astype(np.int64), wanted

    def state(self) -> dict[str, Array]:
        """Return everything as arrays, for ``from_state``."""
        numbers = [self.images, self.exponent, self.lowest, self.highest, *self._sums]
        return {"numbers": np.array(numbers, dtype=np.float64), "counts": self.counts}

    @staticmethod
    def from_state(state: Mapping[str, Array]) -> TensorStatistics:
        """Read what ``state`` gave."""
        statistics = TensorStatistics()
        images, exponent, lowest, highest, low, high = (float(n) for n in state["numbers"])
        statistics.images, statistics.exponent = int(images), int(exponent)
        statistics.lowest, statistics.highest = lowest, highest
        statistics._sums = (low, high)
        statistics.counts = state["counts"].astype(np.int64)
        return statistics
