"""``secateur report``: one page about all bundles of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from secateur.cli.options import JsonOption


def report(
    folder: Annotated[
        Path, typer.Argument(help="A folder with bundles below it.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page (default: FOLDER/report.html).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """One HTML page: accuracy, costs, what was cut per layer, pictures, provenance.

    It needs no network and asks for none. Exits 1 when a bundle is damaged (the page says which).

    Example: secateur report out/ --out report.html
    """
    from secateur.flow.report import report as write_report

    result = write_report(folder, out)
    if as_json:
        found = {"page": str(result.page), "bundles": result.bundles, "problems": result.problems}
        typer.echo(json.dumps(found, indent=2))
    else:
        console = Console(soft_wrap=True, highlight=False, markup=False)
        for problem in result.problems:
            console.print(f"problem   {problem}", style="bold red")
        size = result.page.stat().st_size / 1e6
        console.print(f"report    {result.page} ({len(result.bundles)} bundles, {size:.1f} MB)")
    if result.problems:
        raise typer.Exit(1)
