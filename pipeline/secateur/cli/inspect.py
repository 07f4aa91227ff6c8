"""``secateur inspect``, ``score`` and ``plan``: look before cutting."""

from __future__ import annotations

import json
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
from secateur.core.progress import shown

if TYPE_CHECKING:
    from secateur.tasks import TaskUse


def inspect(
    recipe: RecipeArgument,
    layers: Annotated[bool, typer.Option(help="List every layer with the tasks using it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Per task: what it uses alone and shared, and what dropping it saves.

    Example: secateur inspect examples/scenes.yaml
    """
    from secateur.flow.cache import StageCache
    from secateur.flow.job import open_job
    from secateur.flow.recipe import load_recipe
    from secateur.prune.macs import count_layer_macs
    from secateur.tasks import decompose

    job = open_job(load_recipe(recipe), StageCache())
    use = decompose(job.parent, job.example, count_layer_macs(job.parent, job.example))
    if as_json:
        typer.echo(json.dumps(_use_json(use), indent=2))
        return
    console = Console()
    table = Table("task", "private params", "private M MACs (saved by dropping)", "used params",
                  "used M MACs")  # fmt: skip
    for task in use.tasks:
        table.add_row(
            task,
            f"{use.private(task, use.params):,}",
            f"{use.private(task, use.macs) / 1e6:.1f}",
            f"{use.used(task, use.params):,}",
            f"{use.used(task, use.macs) / 1e6:.1f}",
        )
    console.print(table)
    for count in range(2, len(use.tasks) + 1):
        console.print(f"shared by {count} tasks: {use.shared_by(count, use.params):,} params, "
                      f"{use.shared_by(count, use.macs) / 1e6:.1f} M MACs")  # fmt: skip
    if layers:
        listing = Table("layer", "tasks", "params", "M MACs")
        for name, users in use.layers.items():
            listing.add_row(name, ", ".join(sorted(users)), f"{use.params[name]:,}",
                            f"{use.macs.get(name, 0) / 1e6:.2f}")  # fmt: skip
        console.print(listing)


def _use_json(use: TaskUse) -> dict[str, object]:
    amounts = {"params": use.params, "macs": use.macs}
    return {
        "tasks": {
            task: {
                "private": {name: use.private(task, a) for name, a in amounts.items()},
                "used": {name: use.used(task, a) for name, a in amounts.items()},
            }
            for task in use.tasks
        },
        "shared_by": {
            count: {name: use.shared_by(count, a) for name, a in amounts.items()}
            for count in range(2, len(use.tasks) + 1)
        },
        "layers": {
            name: {
                "tasks": sorted(users),
                "params": use.params[name],
                "macs": use.macs.get(name, 0),
            }
            for name, users in use.layers.items()
        },
    }


def score(recipe: RecipeArgument, cache: CacheOption = None, as_json: JsonOption = False) -> None:
    """Fill the score bank: how much each channel matters to each task of the parent.

    Example: secateur score examples/scenes.yaml
    """
    from secateur.flow.cache import StageCache
    from secateur.flow.job import open_job
    from secateur.flow.recipe import load_recipe
    from secateur.flow.stages import score_bank

    with shown(quiet=as_json):
        job = open_job(load_recipe(recipe), StageCache(cache))
        bank = score_bank(job, [task.name for task in job.parent.tasks])
    rows = {
        task: {"groups": len(scores), "channels": sum(len(values) for values in scores.values())}
        for task, scores in bank.items()
    }
    if as_json:
        typer.echo(json.dumps({"parent": job.parent_key, "bank": rows}, indent=2))
        return
    table = Table("task", "groups", "channels scored")
    for task, row in rows.items():
        table.add_row(task, str(row["groups"]), str(row["channels"]))
    Console().print(table)


def plan(
    recipe: RecipeArgument,
    target: TargetOption = DEFAULT_TARGET,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """The cut as data: what each group keeps and what each task loses; touches no weight.

    Example: secateur plan examples/scenes.yaml --target x86-64-cpu
    """
    from secateur.devices.target import load_target
    from secateur.flow.cache import StageCache
    from secateur.flow.job import open_job
    from secateur.flow.recipe import load_recipe
    from secateur.flow.stages import make_plan

    profile = load_target(target)
    with shown(quiet=as_json):
        job = open_job(load_recipe(recipe), StageCache(cache))
        _, decided = make_plan(job, job.grid(profile))
    if as_json:
        typer.echo(json.dumps(decided.to_json(), indent=2))
        return
    console = Console()
    table = Table("group", "kept", "of")
    for cut in decided.cuts:
        table.add_row(cut.name, str(len(cut.kept)), str(cut.width))
    console.print(table)
    share = decided.macs_after / decided.macs_before
    console.print(f"MACs {decided.macs_before / 1e6:.2f} M -> {decided.macs_after / 1e6:.2f} M "
                  f"({share:.4f}; budget {decided.budget_macs / 1e6:.2f} M)")  # fmt: skip
    for task, lost in decided.lost.items():
        console.print(f"{task}: {100 * lost:.1f} % of its importance goes")
