"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe (YAML).", show_default=False)]
TargetOption = Annotated[
    str, typer.Option("--target", "-t", help="A target; see `secateur targets`.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, no progress.")]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Folder of finished stages (default: $SECATEUR_CACHE, or ~/.cache/secateur).",
    ),
]
TableOption = Annotated[
    Path | None,
    typer.Option(
        help="A latency table of the target (`secateur profile`); default: measured here."
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="A device: local, or ssh://user@host[:port][?python=/path/to/python3]."),
]
DEFAULT_TARGET = "x86-64-cpu"
DEVICES = "local, ssh://user@host[:port][?python=…], or emulated[:CPU]"


def teller(*, quiet: bool) -> Callable[[str], None]:
    """Return what prints lines of a device on stderr, as they are."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    return (lambda _: None) if quiet else console.print
