"""Single-loss Fisher pruning (Theis et al., arXiv 1801.05787, eq. 6): one loss, no tasks.

``F_c = 1 / 2N sum_n g_nc^2`` with ``g_nc`` the gradient of the summed loss of image ``n`` by the
gate of channel ``c``, mean over the group's batch norms. Departure: no cost term in the score,
since the solver meets the budget.
"""

from __future__ import annotations

from fusion.bench import Bench
from fusion.rivals.scoring import IMAGES, gate_squares, summed
from fusion.rivals.training import start
from secateur.core.model import MultiTaskModel


def cut(bench: Bench, share: float, seed: int) -> MultiTaskModel:
    """Return the cut by the diagonal Fisher of the summed loss."""
    stage = start(bench)
    one_by_one = bench.stream(
        IMAGES, seed, 1
    )  # a square of a batch's mean is not a mean of squares
    squares = gate_squares(stage.model, stage.groups, one_by_one, summed(bench))["sum"]
    scores = {name: values.mean(axis=0) / (2 * IMAGES) for name, values in squares.items()}
    return bench.apply(bench.plan(scores, share))
