"""The contract of a criterion, and how one is found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secateur.core import registry
from secateur.core.channels import ChannelGroup
from secateur.core.errors import RecipeError
from secateur.core.model import MultiTaskModel

Loss = Callable[[dict[str, Tensor], int], Tensor]
"""From the model's outputs and the batch's number to one task's scalar loss."""


class Criterion(Protocol):
    """A module with ``score``; it must leave the model's weights as they were."""

    def score(
        self,
        model: MultiTaskModel,
        groups: Sequence[ChannelGroup],
        images: Iterable[Tensor],
        loss: Loss,
    ) -> dict[str, NDArray[np.float64]]:
        """Return a non-negative (width,) score per group name, for the task of ``loss``."""
        ...


def criterion_of(name: str) -> Criterion:
    """Return the criterion ``name``.

    Raises:
        RecipeError: there is no file (or entry point) of that name.
    """
    try:
        module: Criterion = registry.load("secateur.importance", name)
    except KeyError as error:
        raise RecipeError(
            f"prune.criterion: '{name}' is not a criterion",
            hint=f"criteria: {', '.join(registry.entries('secateur.importance'))}",
        ) from error
    return module
