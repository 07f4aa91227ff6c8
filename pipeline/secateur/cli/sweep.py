"""``secateur sweep``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from secateur.cli.options import (
    DEFAULT_TARGET,
    CacheOption,
    JsonOption,
    RecipeArgument,
    TargetOption,
)
from secateur.core.errors import RecipeError
from secateur.core.progress import shown
from secateur.devices.target import load_target

if TYPE_CHECKING:
    from secateur.flow.sweep import Sweep

_MACS = "Shares of the parent's MACs that stay, with commas."


def sweep(
    recipe: RecipeArgument,
    target: TargetOption = DEFAULT_TARGET,
    macs: Annotated[str, typer.Option(help=_MACS)] = "0.8,0.6,0.4,0.2",
    recover: Annotated[
        bool, typer.Option("--recover", help="Recover each cut as the recipe says; takes longer.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where sweep.json and .png go.")] = Path(
        "out"
    ),
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cut to several budgets and show what each costs every task: which one to build?

    Budgets of the recipe are passed over. Without --recover the cuts are ranked and compensated
    only: what a build searches and recovers makes each better, most the deepest.

    Example: secateur sweep examples/scenes.yaml --macs 0.7,0.5,0.3
    """
    from secateur.bench.pictures import tradeoff_chart
    from secateur.bundle.write import prepare_folder
    from secateur.core.files import write_json
    from secateur.flow.cache import StageCache
    from secateur.flow.recipe import load_recipe
    from secateur.flow.sweep import sweep as run_sweep

    shares, folder = _shares(macs), out / load_target(target).name
    prepare_folder(folder)
    with shown(quiet=as_json):
        result = run_sweep(
            load_recipe(recipe), target, shares, cache=StageCache(cache), recover=recover
        )
    write_json(folder / "sweep.json", result.to_json())
    tradeoff_chart(
        folder / "sweep.png",
        [100 * point.macs / result.points[0].macs for point in result.points],
        [point.change_percent for point in result.points],
        [point.latency_ms for point in result.points],
    )
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2))
    else:
        _print(result, folder, Console())


def _shares(text: str) -> list[float]:
    """Read the shares.

    Raises:
        RecipeError: one is no number between 0 and 1.
    """
    shares = []
    for word in text.split(","):
        try:
            share = float(word)
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise RecipeError(
                f"--macs: '{word.strip()}' is no share of the MACs",
                hint="give numbers above 0 and below 1, as --macs 0.7,0.5,0.3",
            )
        shares.append(share)
    return shares


def _print(result: Sweep, folder: Path, console: Console) -> None:
    parent = result.points[0]
    timed = parent.latency_ms is not None
    tasks = list(parent.change_percent)
    times = ["p50 ms"] if timed else []
    table = Table("MACs", "M", "M params", *times, "ΔT", *tasks)
    for point in result.points:
        first = point is parent
        changes = [f"{point.change_percent[task]:+.2f}{' !' if task in point.too_low else ''}"
                   for task in tasks]  # fmt: skip
        table.add_row(
            "parent" if first else f"{point.macs / parent.macs:.3f}",
            f"{point.macs / 1e6:.4g}", f"{point.params / 1e6:.4g}",
            *([f"{point.latency_ms:.4g}"] if timed else []),
            *(["", *[""] * len(tasks)] if first else [f"{point.delta_t:+.2f}", *changes]),
        )  # fmt: skip
    limited = any(point.too_low for point in result.points)
    table.caption = "changes in %" + ("; !: more than the task's max_drop" if limited else "")
    console.print(table)
    steps = max(point.recovery_steps for point in result.points)
    quick = "ranked and compensated only: search and recovery (--recover) make each better"
    console.print(f"recovered for {steps} steps each" if steps else quick, soft_wrap=True)
    if limited and result.least is not None:
        share = result.least.share
        console.print(f"least that keeps every max_drop: prune: {{budget: {{macs: {share:g}}}}}")
    for share, why in result.missed.items():
        console.print(f"{share:g}: {why}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"table     {folder / 'sweep.json'}", soft_wrap=True, highlight=False)
    console.print(f"pictures  {folder / 'sweep.png'}", soft_wrap=True, highlight=False)
