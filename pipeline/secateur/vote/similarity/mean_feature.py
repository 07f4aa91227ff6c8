"""Cosine of the tasks' mean penultimate features: do their images excite the parent alike?

The domain embedding that Task2Vec is compared with (arXiv 1902.03545), and the cheapest measure:
one forward pass, no labels.
"""

from __future__ import annotations

import numpy as np

from secateur.vote.similarity.measure import Array, Sketch, cosine, wrong

EXPLAINED = "the mean features of the two tasks' images have a cosine of {value:.3f} (-1..1)"


def sketch(features: Array) -> Sketch:
    """Return the (D,) mean of the parent's (N, D) penultimate features on the task's images.

    Raises:
        LibraryError: there are no images, or the array has another form.
    """
    if features.ndim != 2 or not len(features):
        raise wrong(f"features have shape {features.shape}, expected (N, D) with N > 0")
    mean = np.asarray(features, np.float64).mean(axis=0)
    return np.asarray(mean, np.float32)


def similarity(own: Array, other: Array) -> float:
    """Return the cosine, in -1..1, symmetric, 1 for itself (0 where a mean is all zero)."""
    return cosine(own, other)
