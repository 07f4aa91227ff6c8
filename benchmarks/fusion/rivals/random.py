"""Uniform random scores per channel, ranked over the whole network: the floor under all."""

from __future__ import annotations

import numpy as np
from fusion.bench import Bench
from secateur.core.model import MultiTaskModel


def cut(bench: Bench, share: float, seed: int) -> MultiTaskModel:
    """Return the cut by random scores."""
    rng = np.random.default_rng(seed)
    scores = {group.name: rng.uniform(size=group.width) for group in bench.groups}
    return bench.apply(bench.plan(scores, share))
