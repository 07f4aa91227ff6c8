"""Finished stages kept on disk under a digest of everything they depend on.

Stages know nothing of it: the build wraps them. A killed build resumes because what was finished
is found again, and every entry is written whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import secateur
from secateur.core.files import atomic_path, value_digest, write_json


class StageCache:
    """One folder; the default is ``$SECATEUR_CACHE`` or ``~/.cache/secateur``."""

    def __init__(self, root: Path | None = None) -> None:
        default = os.environ.get("SECATEUR_CACHE") or Path.home() / ".cache" / "secateur"
        self.root = Path(root or default)

    def folder(self, stage: str, *parts: Any) -> Path:
        """Return the folder of a stage for these inputs (which need not exist yet)."""
        return self.root / stage / value_digest([secateur.__version__, stage, *parts])

    def json(self, stage: str, parts: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Return a JSON value, made now or found."""
        path = self.folder(stage, *parts) / "value.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            value = make()
            write_json(path, value)
            return value


def load_weights(path: Path, model: nn.Module) -> bool:
    """Load weights that ``save_weights`` wrote; say whether there were any that fit."""
    try:
        model.load_state_dict(load_file(path))
    except (FileNotFoundError, SafetensorError, RuntimeError):
        return False
    return True


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a model's state as safetensors."""
    state = {
        name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()
    }
    with atomic_path(path) as temporary:
        save_file(state, temporary)
