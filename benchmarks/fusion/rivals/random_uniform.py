"""The same share of every group's channels stays; which ones is random.

Against ``random``, whose groups differ by chance, this is the plain narrow network.
"""

from __future__ import annotations

import numpy as np
from fusion.bench import Bench
from fusion.rivals.scoring import rank_share
from numpy.typing import NDArray
from secateur.core.model import MultiTaskModel


def cut(bench: Bench, share: float, seed: int) -> MultiTaskModel:
    """Return the uniformly narrow cut."""
    rng = np.random.default_rng(seed)
    scores: dict[str, NDArray[np.float64]] = {}
    for group in bench.groups:  # ranked within its group, so one threshold is one keep share
        scores |= rank_share({group.name: rng.uniform(size=group.width)})
    return bench.apply(bench.plan(scores, share))
