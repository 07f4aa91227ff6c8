"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe (YAML).", show_default=False)]
TargetOption = Annotated[
    str, typer.Option("--target", "-t", help="A target; see `secateur targets`.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, no progress.")]
CacheOption = Annotated[
    Path | None,
    typer.Option("--cache", help="Folder of finished stages (default: $SECATEUR_CACHE)."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="A device: local, or ssh://[user@]host[:port][?python=/path/to/python3]."),
]
DEFAULT_TARGET = "x86-64-cpu"
