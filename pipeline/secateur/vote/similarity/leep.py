"""LEEP: what another task's labels tell about one's own, through the parent's source classes.

LEEP (arXiv 2002.12462, eqs. 1-2) asks how well a classifier with source labels ``z`` predicts a new
task's labels ``y``: ``mean log sum_z P(y|z) theta(x)_z``, with ``P(y, z)`` the mean of
``theta(x)_z`` over the images of label ``y``. To compare two tasks of one parent, the classifier is
the parent followed by the other task's ``P'(y'|z)``, so that ``y'`` are the source labels:

    Q(y|z) = sum_y' P(y|y') P'(y'|z),    P(y, y') = sum_z P(y, z) P'(y'|z)

Only the small joint tables are kept, not each image's probabilities, so the mean is taken outside
of the logarithm, ``sum P(y, z) log Q(y|z)``: by Jensen a lower bound of LEEP, and LEEP itself where
the parent is sure. It is compared with the best that source labels can do, ``sum P(y, z) log
P(y|z)``; the difference is minus a Kullback-Leibler divergence, which gives the range.
"""

from __future__ import annotations

import numpy as np

from secateur.vote.similarity.measure import Array, Sketch, wrong

EXPLAINED = (
    "its labels predict yours with {value:.3f} of the likelihood that the parent's source classes "
    "allow (0..1)"
)


def sketch(probabilities: Array, labels: Array) -> Sketch:
    """Return the joint table P(y, z) of the task's labels and the parent's source classes: (Y, Z).

    ``probabilities`` (N, Z) are the parent's softmax outputs on the task's images, ``labels`` (N,)
    the task's own labels, any integers (of a dense task: those of sampled pixels).

    Raises:
        LibraryError: the arrays do not fit, or a row is no distribution.
    """
    given = np.asarray(probabilities, np.float64)
    if given.ndim != 2 or not len(given) or np.shape(labels) != (len(given),):
        raise wrong(
            f"probabilities have shape {given.shape} and labels {np.shape(labels)}, expected "
            "(N, Z) and (N,) with N > 0"
        )
    if not (given >= 0).all() or not np.allclose(given.sum(axis=1), 1.0, atol=1e-3):
        raise wrong("the probabilities of an image do not sum to 1")
    classes, places = np.unique(labels, return_inverse=True)
    joint = np.zeros((len(classes), given.shape[1]))
    np.add.at(joint, places, given / len(given))
    return joint.astype(np.float32)


def similarity(own: Array, other: Array) -> float:
    """Return ``exp(-KL)`` in 0..1: 1 where ``other``'s labels tell all that source classes can.

    Not symmetric: a task of finer classes tells more about a coarser one than the reverse. A task
    compared with itself gives 1 where source classes decide its labels, less where they do not.

    Raises:
        LibraryError: the sketches are of different source classes.
    """
    mine, theirs = np.array(own, np.float64), np.array(other, np.float64)  # copies
    if mine.ndim != 2 or theirs.ndim != 2 or mine.shape[1] != theirs.shape[1]:
        raise wrong(
            f"its sketch has shape {theirs.shape}, yours {mine.shape}: other source classes"
        )
    if not mine.any() or not theirs.any():
        return 0.0  # of nothing, nothing can be told
    joint = mine / mine.sum()
    unseen = theirs.sum(axis=0) == 0  # source classes of which the other task has no image
    theirs[:, unseen] = theirs.sum(axis=1, keepdims=True)
    router = theirs / theirs.sum(axis=0)
    through = joint @ router.T
    guess = _given(through) @ router
    seen = joint > 0
    least = np.finfo(np.float64).tiny
    lost = joint[seen] @ np.log(_given(joint)[seen] / np.maximum(guess[seen], least))
    return min(1.0, float(np.exp(-lost)))


def _given(table: Array) -> Array:
    """Return P(row | column); a column of zeros stays one."""
    total = table.sum(axis=0)
    return table / np.where(total > 0, total, 1.0)
