"""``secateur compare``: two bundles, or two benches of one, side by side."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from secateur.cli.options import JsonOption
from secateur.cli.tables import change_table
from secateur.core.progress import shown

if TYPE_CHECKING:
    from secateur.flow.compare import Comparison

SideArgument = Annotated[
    Path, typer.Argument(help="A bundle's folder, or a bench.json.", show_default=False)
]


def compare(
    a: SideArgument,
    b: SideArgument,
    threshold: Annotated[
        float, typer.Option(min=0, help="How much slower or hungrier B may be, in percent.")
    ] = 5.0,
    max_drop: Annotated[
        float, typer.Option(min=0, help="How much worse a task of B may be, in percent.")
    ] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """B beside A; exit 1 if B lacks a task, or is slower, hungrier or worse than allowed.

    Two bundles for a machine like this one are run in turns here. Elsewhere, and for two
    bench.json, the stored latencies are compared if they are of the same CPU; so is the energy,
    where both machines told it.
    Faster or slower, less or more, is said only beyond the noise.

    Example: secateur compare out/main/x86-64-cpu/fp32 out/x86-64-cpu/fp32 --threshold 5
    """
    from secateur.flow.compare import compare as run_compare

    with shown(quiet=as_json):
        result = run_compare(a, b, threshold=threshold, max_drop=max_drop)
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2))
    else:
        _print(result, Console())
    if result.regressions:
        raise typer.Exit(1)


def _print(result: Comparison, console: Console) -> None:
    if result.tasks:
        console.print(change_table(
            {task: change.a for task, change in result.tasks.items()},
            {task: change.b for task, change in result.tasks.items()},
            {task: change.change_percent for task, change in result.tasks.items()}, ("A", "B"),
        ))  # fmt: skip
    table = Table("one image", "A", "B", "B / A")
    for cost in result.costs:
        table.add_row(cost.name, f"{cost.a:,}", f"{cost.b:,}", f"{cost.b / cost.a:.4f}")
    latency = result.latency
    if latency is not None:
        table.add_row(
            "ms (median)",
            f"{latency.a_ms:.4g}",
            f"{latency.b_ms:.4g}",
            f"{latency.ratio.value:.4f}",
        )
    energy = result.energy
    if energy is not None:
        share = f"{energy.b_mj / energy.a_mj:.4f}" if energy.a_mj > 0 else "–"
        table.add_row("mJ above idle", f"{energy.a_mj:.4g}", f"{energy.b_mj:.4g}", share)
    if table.row_count:
        console.print(table)
    if latency is not None:
        where = "run in turns here" if latency.how == "in turns" else "from two bench.json"
        verdict = latency.verdict if latency.verdict != "no difference" else "no faster, no slower"
        console.print(
            f"B is {verdict} than A beyond the noise ({where}): "
            f"{latency.ratio.value:.3f} of A's time, 95 % interval {latency.ratio.low:.3f} to "
            f"{latency.ratio.high:.3f}",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    if energy is not None:
        said = energy.verdict if energy.verdict != "no difference" else "no less, no more"
        console.print(
            f"B takes {said} energy than A beyond the noise (from two bench.json, {energy.source}; "
            f"standard error of the difference {energy.standard_error_mj:.2g} mJ)",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)
    for regression in result.regressions:
        console.print(f"regression: {regression}", style="bold red", soft_wrap=True, markup=False)
