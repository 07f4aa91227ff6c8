"""A training's state on disk after each epoch, written whole or not at all."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from secateur.core.files import atomic_path


class Stateful(Protocol):
    """A model, an optimiser, a balance: whatever has a state to go on from."""

    def state_dict(self) -> dict[str, Any]:
        """Return what there is to keep."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Go on from ``state_dict``."""
        ...


@dataclass
class Progress:
    """Per epoch done the mean loss and, with a validation, its score; the best epoch's weights."""

    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def stale(self) -> int:
        """Return the epochs since the best score."""
        return len(self.scores) - 1 - self.scores.index(max(self.scores)) if self.scores else 0


def save_checkpoint(folder: Path | None, parts: Mapping[str, Stateful], progress: Progress) -> None:
    """Write ``state.pt`` into ``folder`` (nothing without one)."""
    if folder is None:
        return
    state = {name: part.state_dict() for name, part in parts.items()}
    with atomic_path(folder / "state.pt") as temporary:
        torch.save({**state, **vars(progress)}, temporary)


def load_checkpoint(folder: Path | None, parts: Mapping[str, Stateful]) -> Progress:
    """Load the state that ``save_checkpoint`` wrote into ``parts``.

    Without one, or with a damaged one, change nothing.
    """
    if folder is None:
        return Progress()
    try:
        state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError):
        return Progress()
    if not isinstance(state, dict) or not parts.keys() <= state.keys():
        return Progress()
    for name, part in parts.items():
        part.load_state_dict(state.pop(name))
    return Progress(**state)
