"""Cosine of the tasks' importance scores: do the same channels matter to both?

Scores are normalised per group, so the cosine is the mean over groups of each group's own; a group
of 32 channels says as much as one of 512. Of several tasks, each says the same amount.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from secateur.vote.similarity.measure import Array, Sketch, cosine, wrong

EXPLAINED = "per group, the two tasks' channel scores have a mean cosine of {value:.3f} (0..1)"


def sketch(scores: Mapping[str, Mapping[str, Array]]) -> Sketch:
    """Return one vector of the groups' normalised scores, groups in the order of their names.

    ``scores`` are per task and group (width,) numbers >= 0, over the same groups for every task.

    Raises:
        LibraryError: there are none, they are negative, or the tasks' groups differ.
    """
    tasks = list(scores.values())
    if not tasks or not tasks[0] or any(task.keys() != tasks[0].keys() for task in tasks):
        raise wrong("scores must be given for one task or more, each over the same groups")
    return np.concatenate(
        [_unit(sum(_unit(task[group]) for task in tasks)) for group in sorted(tasks[0])]
    ).astype(np.float32)


def similarity(own: Array, other: Array) -> float:
    """Return the cosine, in 0..1, symmetric, 1 for itself (0 where all scores are zero)."""
    return max(0.0, cosine(own, other))


def _unit(values: Array | float) -> Array:
    """Return the vector at length 1, or as it is where it is all zero."""
    vector = np.asarray(values, np.float64)
    if not (vector >= 0).all() or not np.isfinite(vector).all():
        raise wrong("a score is negative or not finite")
    top = vector.max(initial=0.0)
    if not top:
        return vector
    vector = vector / top
    return np.asarray(vector / np.sqrt(vector @ vector))
