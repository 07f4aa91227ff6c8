"""``secateur targets``"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from secateur.cli.options import JsonOption
from secateur.devices.target import load_target, target_names


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
    table = Table("target", "what", "runtime", "precisions", "builds")
    for target in chosen:
        table.add_row(target.name, target.title, target.runtime, ", ".join(target.precisions),
                      ", ".join(target.builds))  # fmt: skip
    console.print(table)
    if name:
        facts = Table("fact", "value", "source")
        for row in chosen[0].rows():
            facts.add_row(row.fact, row.value, row.source + (" (derived)" if row.derived else ""))
        console.print(facts)
        if chosen[0].note:
            console.print(chosen[0].note)
