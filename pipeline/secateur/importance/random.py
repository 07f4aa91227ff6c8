"""Uniform random scores, the floor under every criterion; the same for every task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import Loss

SEED = 0


def score(
    model: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    images: Iterable[Tensor],
    loss: Loss,
) -> dict[str, NDArray[np.float64]]:
    """Return uniform scores in 0..1, fixed by ``SEED``."""
    rng = np.random.default_rng(SEED)
    return {group.name: rng.uniform(size=group.width) for group in groups}
