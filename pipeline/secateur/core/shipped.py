"""Where the folders that users read and edit are: in the checkout, or inside the wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Kind = Literal["targets", "benchmarks", "examples"]
PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parents[1]


def shipped_root() -> Path:
    """Return the folder that holds ``targets``, ``benchmarks``, ``examples``."""
    if (CHECKOUT / "pyproject.toml").is_file() and (CHECKOUT / "targets").is_dir():
        return CHECKOUT
    return PACKAGE / "shipped"


def shipped(kind: Kind) -> Path:
    """Return one of the shipped folders."""
    return shipped_root() / kind
