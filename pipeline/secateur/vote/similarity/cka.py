"""Linear CKA of the two tasks' features on the same images (arXiv 1905.00414, sec. 3).

``<K, L> / (|K| |L|)`` with ``K``, ``L`` the centred Gram matrices of the features, blind to
rotation and scale of either feature space, so that networks of different widths compare.
"""

from __future__ import annotations

import numpy as np

from secateur.vote.similarity.measure import Array, Sketch, cosine, wrong

EXPLAINED = "on the same images, the two tasks' features have a linear CKA of {value:.3f} (0..1)"


def sketch(features: Array) -> Sketch:
    """Return the upper triangle of the centred Gram matrix at length 1: (N (N + 1) / 2,).

    ``features`` (N, D) are those of the task's own network (its cut, or its head on the parent:
    the parent's own are the same for every task), D may differ between tasks. The N images must
    be the same, in the same order, for all entries of a parent; 64 give 2080 numbers.

    Raises:
        LibraryError: there are fewer than two images, or the array has another form.
    """
    if features.ndim != 2 or len(features) < 2:
        raise wrong(f"features have shape {features.shape}, expected (N, D) with N >= 2")
    centred = np.asarray(features, np.float64)
    centred = centred - centred.mean(axis=0)
    top = np.abs(centred).max(initial=0.0)
    if top:
        centred /= top
    gram = centred @ centred.T
    upper = np.triu_indices(len(gram))
    # off the diagonal every value stands for two: then a dot product of sketches is <K, L>
    values = np.where(upper[0] == upper[1], 1.0, np.sqrt(2.0)) * gram[upper]
    length = np.sqrt(values @ values)
    return np.asarray(values / length if length else values, np.float32)


def similarity(own: Array, other: Array) -> float:
    """Return the CKA, in 0..1, symmetric, 1 for itself (0 where features do not vary)."""
    return max(0.0, cosine(own, other))
