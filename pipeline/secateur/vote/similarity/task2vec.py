"""Task2Vec: cosine of normalised diagonal Fisher information (arXiv 1902.03545, d_sym).

Their embedding is the diagonal of the Fisher information of the parent's weights, averaged per
filter; here it is that of the filter's gate, which the criterion ``fisher`` gives. Their
symmetric distance compares ``F_a / (F_a + F_b)`` with ``F_b / (F_a + F_b)``, so that filters
whose information is large for every task do not decide. Before that each embedding is brought to
sum 1: losses of different kinds have no common scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from secateur.vote.similarity.measure import Array, Sketch, cosine, same_shape, wrong

EXPLAINED = "the two tasks' normalised Fisher information has a cosine of {value:.3f} (0..1)"


def sketch(fisher: Mapping[str, Array]) -> Sketch:
    """Return the task's Fisher information as one vector of sum 1, groups in order of their names.

    ``fisher`` are (width,) mean squared per-sample gradients of each group's gates.

    Raises:
        LibraryError: there are none, or one is negative or not finite.
    """
    if not fisher:
        raise wrong("there is no Fisher information to make a sketch of")
    values = np.concatenate([np.asarray(fisher[group], np.float64) for group in sorted(fisher)])
    if not (values >= 0).all() or not np.isfinite(values).all():
        raise wrong("Fisher information is negative or not finite")
    top = values.max(initial=0.0)
    if top:
        values = values / top
        values /= values.sum()
    return values.astype(np.float32)


def similarity(own: Array, other: Array) -> float:
    """Return the cosine, in 0..1, symmetric, 1 for itself (0 where either is all zero)."""
    same_shape(own, other)
    mine, theirs = (np.asarray(each, np.float64) for each in (own, other))
    total = mine + theirs
    total[total == 0] = 1.0  # neither task uses that filter
    return max(0.0, cosine(mine / total, theirs / total))
