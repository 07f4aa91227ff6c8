"""``secateur profile``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from secateur.cli.options import (
    DEFAULT_TARGET,
    DEVICES,
    CacheOption,
    JsonOption,
    RecipeArgument,
    TargetOption,
    teller,
)
from secateur.core.progress import shown


def profile(
    recipe: RecipeArgument,
    target: TargetOption = DEFAULT_TARGET,
    device: Annotated[str, typer.Option(help=f"Where to measure: {DEVICES}.")] = "local",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The table's file (default: latency.json, or instructions.json)."
        ),
    ] = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the recipe's operators here, for budgets in milliseconds; run again to resume.

    With --device ssh://host, on that device. With --device emulated, count their instructions on
    the Arm CPU that stands in for the target, for a budget in instructions: a proxy, no latency.

    Example: secateur profile examples/scenes.yaml --target x86-64-cpu --out latency.json
    """
    from secateur.bench.profile import spread_of
    from secateur.devices.emulated import EMULATED, asked_cpus
    from secateur.devices.latency_table import channel_grid
    from secateur.flow.axes import turn_axes
    from secateur.flow.cache import StageCache
    from secateur.flow.job import open_job
    from secateur.flow.latency import profile_job
    from secateur.flow.meters import meter_of
    from secateur.flow.ncnn import target_of
    from secateur.flow.precision import check_precision
    from secateur.flow.recipe import load_recipe

    loaded, cpus = load_recipe(recipe), asked_cpus(device, [])
    known = target_of(loaded, target)
    path = out or Path("latency.json" if cpus is None else "instructions.json")
    where = (device, "") if cpus is None else (EMULATED, next(iter(cpus), ""))
    with shown(quiet=as_json):
        job = open_job(loaded, StageCache(cache))
        check_precision(job, known)
        job = turn_axes(job)
        with meter_of(known, where[0], teller(quiet=as_json), where[1]) as meter:
            table = profile_job(job, known, path, meter)
    spread = spread_of(table)
    summary = {
        "table": str(path),
        "unit": table.unit if table.unit == "ms" else f"{table.unit} (a proxy, no latency)",
        "on": table.host.get("cpu"),
        "runtime": table.runtime,
        "threads": table.threads,
        "kinds": len(table.points),
        "points": sum(len(points) for points in table.points.values()),
        "held_out_error": table.error(),
        "spread_median": spread["median"],
        "spread_largest": spread["largest"],
        "channel_grid": channel_grid(table) if table.stairs else None,
        "scale": table.scale,
    }
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    rows = Table("latency table", "")
    for name, value in summary.items():
        said = "not shown by groups so narrow" if value is None else str(value)
        rows.add_row(name, f"{value:.4g}" if isinstance(value, float) else said)
    Console().print(rows)
