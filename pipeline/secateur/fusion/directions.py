"""Fuse what directions of a group matter to each task into what matters to all."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


def fuse_gradients(
    gradients: Mapping[str, NDArray[np.float64]], weights: Mapping[str, float]
) -> NDArray[np.float64]:
    """Return the weighted mean of the tasks' (W, W) gradient moments, each of trace 1.

    The trace takes out how large a task's loss happens to be, as normalising does for scores. A
    task that does not use the group has no say.
    """
    total = sum(weights[task] for task in gradients)
    scaled = [
        weights[task] / total * matrix / np.trace(matrix)
        for task, matrix in gradients.items()
        if np.trace(matrix) > 0
    ]
    return np.sum(scaled, axis=0) if scaled else np.zeros_like(next(iter(gradients.values())))
