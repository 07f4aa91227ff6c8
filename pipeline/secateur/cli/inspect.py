"""``secateur inspect``, ``score`` and ``plan``: look before cutting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from secateur.cli.build import budget_line, solver_line, sparsity_line
from secateur.cli.options import (
    DEFAULT_TARGET,
    CacheOption,
    JsonOption,
    RecipeArgument,
    TableOption,
    TargetOption,
)
from secateur.core.progress import shown

if TYPE_CHECKING:
    from secateur.flow.estimates import PlanEstimate
    from secateur.flow.warm_start import Planned, Vote
    from secateur.prune import SparsityPlan
    from secateur.tasks import TaskUse

WHOLE = 5  # layers that stay whole and are named


def inspect(
    recipe: RecipeArgument,
    layers: Annotated[bool, typer.Option(help="List every layer with the tasks using it.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw who uses what, by stage, into this PNG file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Per task: what it uses alone and shared, and what dropping it saves.

    Example: secateur inspect examples/scenes.yaml --picture use.png
    """
    from secateur.core.errors import ModelError
    from secateur.flow.cache import StageCache
    from secateur.flow.job import open_job
    from secateur.flow.recipe import load_recipe
    from secateur.prune import find_groups
    from secateur.tasks import decompose, draw_use, select_tasks

    job = open_job(load_recipe(recipe), StageCache())
    every = [task.name for task in job.parent.tasks]
    try:
        groups = find_groups(select_tasks(job.parent, every, job.example), job.example)
    except ModelError:  # the channels cannot be grouped; parameters and MACs can be told apart
        groups = ()
    use = decompose(job.parent, job.example, groups)
    if picture is not None:
        draw_use(use, picture)
    if as_json:
        typer.echo(json.dumps(_use_json(use), indent=2))
        return
    console = Console()
    console.print(_use_table(use))
    if layers:
        listing = Table("layer", "tasks", "params", "M MACs")
        for name, users in use.layers.items():
            params, macs = use.of(name, use.params), use.of(name, use.macs)
            listing.add_row(
                name.removeprefix("network."),
                ", ".join(sorted(users)),
                f"{params:,}",
                f"{macs / 1e6:.2f}",
            )
        console.print(listing)
    if picture is not None:
        console.print(f"drawn: {picture}")


def _use_table(use: TaskUse) -> Table:
    """Return private, shared by each number of tasks, and total, per task and for all."""
    counts = range(2, len(use.tasks) + 1)
    caption = "dropping a task saves what is private to it; channels: those a cut may remove"
    shared = [f"shared by {count}" for count in counts]
    table = Table("task", "", "private", *shared, "total", caption=caption)
    rows = [("params", use.params, 1.0), ("M MACs", use.macs, 1e6)]
    if use.channels:
        rows.append(("channels", use.channels, 1.0))
    for task in use.tasks:
        for label, amounts, unit in rows:
            shares = [use.shared(task, count, amounts) for count in (1, *counts)]
            table.add_row(task if label == "params" else "", label, *_cells(shares, unit))
        table.add_section()
    idle = [(label, use.shared_by(0, amounts), unit) for label, amounts, unit in rows]
    if any(amount for _, amount, _ in idle):
        blank = [""] * len(counts)
        for label, amount, unit in idle:
            name = "no task" if label == "params" else ""
            table.add_row(name, label, *blank, "", _cells([amount], unit)[0])
        table.add_section()
    for label, amounts, unit in rows:
        shares = [use.shared_by(count, amounts) for count in (1, *counts)]
        table.add_row("all" if label == "params" else "", label, *_cells(shares, unit))
    return table


def _cells(amounts: list[int], unit: float) -> list[str]:
    """Return the amounts and their total as text; a larger unit than 1 gets a decimal."""
    return [f"{n / unit:,.{1 if unit > 1 else 0}f}" for n in (*amounts, sum(amounts))]


def _use_json(use: TaskUse) -> dict[str, object]:
    amounts = {"params": use.params, "macs": use.macs, "channels": use.channels}
    counts = range(2, len(use.tasks) + 1)
    return {
        "tasks": {
            task: {
                "private": {name: use.private(task, a) for name, a in amounts.items()},
                "shared_by": {
                    count: {name: use.shared(task, count, a) for name, a in amounts.items()}
                    for count in counts
                },
                "used": {name: use.used(task, a) for name, a in amounts.items()},
            }
            for task in use.tasks
        },
        "shared_by": {
            count: {name: use.shared_by(count, a) for name, a in amounts.items()}
            for count in (0, 1, *counts)
        },
        "layers": {
            name: {
                "tasks": sorted(users),
                "params": use.of(name, use.params),
                "macs": use.of(name, use.macs),
                "split": {
                    "+".join(sorted(some)): {
                        "params": use.params.get(name, {}).get(some, 0),
                        "macs": use.macs.get(name, {}).get(some, 0),
                    }
                    for some in sorted(
                        {*use.params.get(name, {}), *use.macs.get(name, {})}, key=sorted
                    )
                },
            }
            for name, users in use.layers.items()
        },
        "parameters": {name: sorted(users) for name, users in use.parameters.items()},
        "groups": {name: sorted(users) for name, users in use.groups.items()},
    }


def score(recipe: RecipeArgument, cache: CacheOption = None, as_json: JsonOption = False) -> None:
    """Fill the score bank: how much each channel matters to each task of the parent.

    Example: secateur score examples/scenes.yaml
    """
    from secateur.flow.axes import turn_axes
    from secateur.flow.cache import StageCache
    from secateur.flow.channel_scores import score_bank
    from secateur.flow.job import open_job
    from secateur.flow.recipe import load_recipe

    with shown(quiet=as_json):
        job = turn_axes(open_job(load_recipe(recipe), StageCache(cache)))
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
    table: TableOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """The cut as data: what each group keeps, what each task loses, what every budget comes to.

    Touches no weight. Latency is measured where the budget asks for it on this machine, else
    estimated: by --table, or from the target's profile.

    Example: secateur plan examples/scenes.yaml --target x86-64-cpu
    """
    from secateur.core.errors import DeviceError
    from secateur.flow.axes import turn_axes
    from secateur.flow.budgets import plan_within
    from secateur.flow.cache import StageCache
    from secateur.flow.estimates import estimate_plan
    from secateur.flow.ncnn import target_of
    from secateur.flow.preflight import open_checked
    from secateur.flow.recipe import load_recipe
    from secateur.flow.sparsity import planned_zeros
    from secateur.prune.groups import whole_layers

    loaded = load_recipe(recipe)
    profile = target_of(loaded, target)
    with shown(quiet=as_json):
        job = turn_axes(open_checked(loaded, profile, StageCache(cache), table))
        planned = plan_within(job, profile, table_file=table)
        zeros = planned_zeros(job, planned)
        whole = whole_layers(job.outline, planned.scored.groups, job.example)
        estimate: PlanEstimate | str = ""
        if not any(budget.how == "measured" for budget in planned.budgets.values()):
            try:
                estimate = estimate_plan(job, profile, planned, table)
            except DeviceError as error:  # a plan needs no latency
                estimate = error.message
    if as_json:
        typer.echo(json.dumps({**_plan_json(planned, zeros, estimate), "whole": whole}, indent=2))
        return
    console = Console()
    _print_plan(planned, zeros, estimate, console)
    if whole:
        named = [f"{name} ({count:,} parameters)" for name, count in whole.items()]
        more = f" and {len(named) - WHOLE} more (--json)" if len(named) > WHOLE else ""
        console.print("stay whole, since something in forward fixes their channels: "
                      f"{', '.join(named[:WHOLE])}{more}", soft_wrap=True, highlight=False,
                      markup=False)  # fmt: skip


def _print_plan(
    planned: Planned, zeros: SparsityPlan | None, estimate: PlanEstimate | str, console: Console
) -> None:
    decided, vote = planned.plan, planned.vote
    voted = {}
    if vote is not None and not vote.cold:
        voted = {"confidence": vote.confidence, "IoU with parent's": vote.iou}
    rows = Table("group", "kept", "of", *voted)
    for cut in decided.cuts:
        said = [f"{numbers.get(cut.name, 0.0):.2f}" for numbers in voted.values()]
        rows.add_row(cut.name, str(len(cut.kept)), str(cut.width), *said)
    console.print(rows)
    if vote is not None:
        _print_vote(vote, console)
    share = decided.macs_after / decided.macs_before
    most = f"; budget {decided.budget_macs / 1e6:.2f} M" if "macs" in planned.budgets else ""
    console.print(f"MACs {decided.macs_before / 1e6:.2f} M -> {decided.macs_after / 1e6:.2f} M "
                  f"({share:.4f}{most})")  # fmt: skip
    if decided.removed:
        console.print(f"blocks that go whole: {', '.join(decided.removed)}", markup=False)
    for task, lost in decided.lost.items():
        console.print(f"{task}: {100 * lost:.1f} % of its importance goes")
    for name, budget in planned.budgets.items():
        console.print(f"budget {budget_line(name, budget)}", soft_wrap=True, highlight=False)
    console.print(solver_line(decided.solver, decided.gap), soft_wrap=True, highlight=False)
    if estimate:
        latency = f"not estimated: {estimate}" if isinstance(estimate, str) else estimate.said()
        console.print(f"latency {latency}", soft_wrap=True, highlight=False, markup=False)
    if zeros:
        console.print(sparsity_line(zeros.to_json()), soft_wrap=True, highlight=False)


def _plan_json(
    planned: Planned, zeros: SparsityPlan | None, estimate: PlanEstimate | str
) -> dict[str, object]:
    vote = planned.vote
    asked = {} if vote is None else {"warm_start": vote.to_json()}
    if zeros is not None:
        asked["sparsity"] = zeros.to_json()
    budgets = {name: budget.model_dump(mode="json") for name, budget in planned.budgets.items()}
    if estimate:
        asked["latency_estimate"] = (
            {"unknown": estimate} if isinstance(estimate, str) else estimate.to_json()
        )
    return {**planned.plan.to_json(), "budgets": budgets, **asked}


def _print_vote(vote: Vote, console: Console) -> None:
    """Print who voted, why they did, and how much that changed."""
    if vote.cold:
        console.print(f"cold start: {vote.cold}", markup=False)
    else:
        table = Table("voter", "tasks", "MACs kept", vote.similarity, "weight")
        for each in vote.voters:
            table.add_row(each.id[:8], escape(", ".join(each.tasks)), f"{each.budget:.3f}",
                          f"{each.similarity:.3f}", f"{each.weight:.2f}")  # fmt: skip
        console.print(table)
        for each in vote.voters:
            console.print(f"{each.id[:8]}: {each.why}", markup=False, soft_wrap=True)
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in vote.losses.items())
        console.print(f"plan of: {vote.plan_of} (loss of the cut, the parent's is 1: {losses})",
                      markup=False, soft_wrap=True)  # fmt: skip
        console.print(f"IoU of what is kept with the parent's own choice: {vote.iou_of_all:.3f}")
    for why, count in vote.refused.items():
        console.print(f"{count} refused: {why}", markup=False, soft_wrap=True)
