"""``secateur targets``"""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from secateur.cli.options import JsonOption
from secateur.devices.target import Target, load_target, target_names


def targets(
    name: Annotated[str | None, typer.Argument(help="Show every fact of this target.")] = None,
    as_json: JsonOption = False,
) -> None:
    """The devices known, with each fact and its source.

    Example: secateur targets raspberry-pi-5
    """
    chosen = [load_target(each) for each in ([name] if name else target_names())]
    if as_json:
        typer.echo(json.dumps([target.model_dump(mode="json") for target in chosen], indent=2))
        return
    console = Console()
    if name:
        _print_whole(chosen[0], console)
        return
    table = Table(Column("target", no_wrap=True), "what", "run by", "precisions", "builds")
    for target in chosen:
        table.add_row(target.name, target.title, runtime_of(target), ", ".join(target.precisions),
                      ", ".join(target.builds))  # fmt: skip
    console.print(table)


def runtime_of(target: Target) -> str:
    """Return what runs a bundle on the device."""
    return target.engine_runtime or target.runtime


def _print_whole(target: Target, console: Console) -> None:
    """Print every fact, and below it where it is from, so that no address is cut."""
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    say(f"{target.name}: {target.title}")
    say(f"{target.arch}; {', '.join(target.precisions)}; run by {runtime_of(target)}"
        + (f", checked here with {target.runtime}" if target.engine_runtime else ""))  # fmt: skip
    if target.note:
        say(target.note)
    for row in target.rows():
        say(f"\n{row.fact}: {row.value}" + (" (derived)" if row.derived else ""))
        say(f"    {' '.join(row.source.split())}", style="dim")
