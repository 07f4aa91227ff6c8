"""Uniform random scores, the floor under every criterion; the same for every task.

``random`` draws with seed 0, ``random:7`` with seed 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from secateur.core.channels import ChannelGroup
from secateur.core.errors import RecipeError
from secateur.core.model import MultiTaskModel
from secateur.importance.criterion import Criterion, Scores, TaskData, same_for_all


def score(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], data: TaskData, *, seed: int = 0
) -> dict[str, Scores]:
    """Return uniform scores in 0..1, fixed by ``seed``."""
    rng = np.random.default_rng(seed)
    return same_for_all(data, {group.name: rng.uniform(size=group.width) for group in groups})


def configured(option: str) -> Criterion:
    """Return the criterion with the seed ``option``.

    Raises:
        RecipeError: it is not a number >= 0.
    """
    if not option.isdecimal():
        raise RecipeError(
            f"prune.criterion: '{option}' is not a seed", hint="write for example random:3"
        )
    return partial(score, seed=int(option))
