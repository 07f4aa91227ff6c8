"""``secateur diagnose``: which node costs which task how much, and what else is wrong."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from secateur.cli.options import JsonOption
from secateur.cli.verify import BundleArgument
from secateur.core.progress import shown

if TYPE_CHECKING:
    from secateur.flow.diagnose import Diagnosis, Finding


def diagnose(
    bundle: BundleArgument,
    limit: Annotated[int, typer.Option(help="Images that costs are measured on.", min=1)] = 128,
    as_json: JsonOption = False,
) -> None:
    """Say why a bundle is worse than its model, node by node and task by task.

    Looks for a wrong preprocessing constant, a runtime that leaves the ONNX reference, fp16
    overflow, and the nodes whose precision costs a task most. Exits 1 when one of the first three
    is found or a task is below its max_drop.

    Example: secateur diagnose out/x86-64-cpu/int8
    """
    from secateur.flow.diagnose import diagnose as run_diagnose

    with shown(quiet=as_json):
        found = run_diagnose(bundle, limit=limit)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "faulty": found.faulty}, indent=2))
    else:
        _print(found, Console())
    if found.faulty:
        raise typer.Exit(1)


def _print(found: Diagnosis, console: Console) -> None:
    low = dict.fromkeys(found.too_low, ", below its max_drop")
    lines = [f"{task}: {change:+.2f} % against fp32{low.get(task, '')}"
             for task, change in found.change_percent.items()]  # fmt: skip
    lines += [_said(finding) for finding in found.findings] or ["nothing was found"]
    lines += [f"not looked at: {reason}" for reason in found.skipped]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _said(finding: Finding) -> str:
    if finding.kind != "precision":
        where = f" at node {finding.nodes[0]} ({finding.modules[0]})" if finding.nodes else ""
        return f"{finding.kind}{where}: {finding.message}"
    shown_nodes = f"node {finding.nodes[0]}"
    if len(finding.nodes) > 1:
        shown_nodes = f"{len(finding.nodes)} nodes, {finding.nodes[0]} to {finding.nodes[-1]},"
    module = f"torch module {', '.join(finding.modules)}"
    if finding.cost_percent is None:
        return f"{shown_nodes} ({module}): {finding.message}"
    return (f"{shown_nodes} ({module}) alone changes {finding.task} by "
            f"{finding.cost_percent:+.2f} %; {finding.message}")  # fmt: skip
