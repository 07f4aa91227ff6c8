"""``secateur build``"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from secateur.cli.options import (
    DEFAULT_TARGET,
    DEVICES,
    CacheOption,
    JsonOption,
    RecipeArgument,
    TableOption,
    teller,
)
from secateur.cli.tables import change_table
from secateur.core.progress import shown
from secateur.devices.isa import int8_form
from secateur.devices.target import load_target

if TYPE_CHECKING:
    from secateur.bundle.manifest import Accuracy, AccuracyIntervals, BudgetRecord, Manifest
    from secateur.flow.build import BuildResult

_TARGETS = f"A target, see `secateur targets` (default: {DEFAULT_TARGET}); may be repeated."
_DEVICES = f"Where `auto` chooses and the engine is built, or the bundle measured: {DEVICES}."


def build(
    recipe: RecipeArgument,
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help=_TARGETS)] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the bundles go.")] = Path("out"),
    device: Annotated[str | None, typer.Option(help=_DEVICES)] = None,
    table: TableOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cut, compensate, recover, lower, measure and bundle; run again to resume.

    With --device ssh://…, the target's engine is then built on that device and brought into the
    bundle. A CPU's bundle is measured there; `auto` chooses there. With --device emulated, `auto`
    chooses by instructions on an emulated Arm CPU, and those of the bundle are counted.

    Exits 1 when a task lost more than its max_drop, or a budget was missed (the bundle is written
    and says so).

    Example: secateur build examples/scenes.yaml --target x86-64-cpu --out out
    """
    from secateur.flow.build import build as run_build
    from secateur.flow.cache import StageCache
    from secateur.flow.ncnn import target_of
    from secateur.flow.precision import Device
    from secateur.flow.preflight import open_checked
    from secateur.flow.recipe import load_recipe
    from secateur.flow.there import check_there, finish_there

    loaded = load_recipe(recipe)
    command = "secateur " + shlex.join(sys.argv[1:])
    results, rows, tell = [], [], teller(quiet=as_json)
    names = target or [DEFAULT_TARGET]
    for name in names if device else ():
        check_there(loaded, name, device or "")  # before the long work
    for name in names[1:]:  # the first one's turn comes at once
        with shown(quiet=as_json):
            open_checked(loaded, target_of(loaded, name), StageCache(cache), table)
    for name in names:
        with shown(quiet=as_json):
            made = run_build(loaded, name, out, cache=StageCache(cache), table=table,
                             device=Device(device or "", tell), command=command)  # fmt: skip
        report = finish_there(made.folder, device, tell) if device else None
        results.append(made)
        if as_json:
            rows.append({**result_json(made), **({report.key: report.told} if report else {})})
            continue
        if len(names) > 1:
            Console().rule(made.manifest.device)
        print_result(made, Console())
        if report:
            Console().print(f"{report.key:9} {report.file}", soft_wrap=True, highlight=False)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    if any(result.manifest.accuracy.too_low or missed(result.manifest) for result in results):
        raise typer.Exit(1)


def doubts(manifest: Manifest) -> list[str]:
    """Say which tasks the parent is no better at than a guess: what a cut loses means nothing."""
    found = []
    for task in manifest.tasks:
        metrics = manifest.accuracy.parent[task.name]
        guess = 100 / (task.classes or 100)
        if metrics.get("top1", 100.0) <= guess:
            found.append(
                f"{task.name}: the parent is right in {metrics['top1']:.3g} %, a guess in "
                f"{guess:.3g} %: is model.checkpoint given, and its classes in order?"
            )
        if task.kind == "segmentation" and metrics.get("miou", 100.0) <= guess:
            found.append(
                f"{task.name}: the parent's mIoU is {metrics['miou']:.3g} %, one class everywhere "
                f"may have {guess:.3g} %: is model.checkpoint given, its classes in order, and "
                "model.input's mean and std right?"
            )
        if metrics.get("abs_rel", 0.0) > 1:
            found.append(
                f"{task.name}: the parent's depth is off by {metrics['abs_rel']:.3g} times "
                "the truth: do labels and outputs have the same unit?"
            )
    return found


def _recovery_harmed(accuracy: Accuracy) -> bool:
    """Say whether the cut was surely better before recovery than what ships.

    Of what ships in a lower precision it is not known which of the two cost it.
    """
    if accuracy.pruned is not None or accuracy.intervals is None:
        return False
    return accuracy.delta_t_before_recovery > accuracy.intervals.delta_t[1]


def missed(manifest: Manifest) -> list[str]:
    """Return the budgets that the bundle does not keep."""
    return [name for name, budget in manifest.budgets.items() if budget.met is False]


def result_json(result: BuildResult) -> dict[str, object]:
    """Return what --json prints of a build."""
    manifest = result.manifest.model_dump(mode="json", exclude={"recipe"})
    return {"bundle": str(result.folder), "manifest": manifest, "library": result.library,
            "replaced": result.replaced}  # fmt: skip


def print_result(result: BuildResult, console: Console) -> None:
    """Print what was gained and lost, and where everything lies."""
    manifest = result.manifest
    accuracy = manifest.accuracy
    console.print(change_table(accuracy.parent, accuracy.shipped, accuracy.change_percent,
                               ("parent", "cut")))  # fmt: skip
    console.print(_cost_table(manifest))
    for name, budget in manifest.budgets.items():
        line = f"budget    {budget_line(name, budget)}"
        console.print(line, style="bold red" if budget.met is False else None, highlight=False)
    solved = solver_line(manifest.plan["solver"], manifest.plan["gap"])
    console.print(f"plan      {solved}", highlight=False)
    before = f"; before recovery {accuracy.delta_t_before_recovery:+.2f} %"
    if manifest.plan.get("recovery_undone") or not manifest.plan["recovery_steps"]:
        before = ""  # what was there before is what ships, but for its precision
    console.print(
        f"ΔT {accuracy.delta_t:+.2f} %{_range(accuracy.intervals)} "
        f"(worst task {accuracy.worst_task} "
        f"{accuracy.change_percent[accuracy.worst_task]:+.2f} %)"
        f"{before}; on {accuracy.images} images",
        highlight=False,
    )
    if together := manifest.plan.get("joint_refit"):
        console.print(f"refit     all layers together: {together}", soft_wrap=True, highlight=False)
    if unlabelled := manifest.plan.get("without_labels"):
        console.print(f"labels    data.train has none of {', '.join(unlabelled)}: what is not "
                      "learnt from labels is learnt from the parent", soft_wrap=True)  # fmt: skip
    if before and _recovery_harmed(accuracy):
        console.print("[yellow]doubtful[/]  recovery did harm on data.eval: try fewer epochs, "
                      "recover.early_stop, or recover: none", soft_wrap=True)  # fmt: skip
    for doubt in doubts(manifest):
        console.print(f"[yellow]doubtful[/]  {doubt}", soft_wrap=True, highlight=False)
    if sparsity := manifest.plan.get("sparsity"):
        console.print(sparsity_line(sparsity), soft_wrap=True, highlight=False, markup=False)
    for line in _precision_lines(manifest):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if manifest.plan.get("recovery_undone"):
        console.print("[bold]recovery made the network worse on its own training images and was "
                      "undone[/]: recover longer, or lower recover.learning_rate")  # fmt: skip
    for task in accuracy.too_low:
        console.print(f"[bold red]task '{task}' lost more than its max_drop allows[/]")
    folder = result.folder
    warm = manifest.plan.get("warm_start")
    if warm is not None:
        console.print(f"start     {_start(warm)}", soft_wrap=True, highlight=False, markup=False)
    if result.library:
        console.print(f"library   {result.library}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"bundle    {folder}", soft_wrap=True, highlight=False)
    if result.replaced:
        console.print(f"[yellow]replaces[/]  {result.replaced}; --out keeps both",
                      soft_wrap=True, highlight=False)  # fmt: skip
    console.print(f"table     {folder / 'manifest.json'}", soft_wrap=True, highlight=False)
    for picture in ("contact_sheet.png", "savings.png"):
        console.print(f"pictures  {folder / 'pictures' / picture}", soft_wrap=True, highlight=False)
    for line in _next_lines(folder, manifest):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _next_lines(folder: Path, manifest: Manifest) -> list[str]:
    """Say how the bundle is run, and first what is still to be done on its device."""
    target = load_target(manifest.device)
    lines = []
    if target.engine_runtime and not (folder / "model.engine").exists():
        lines.append("engine    not built yet, it is made on the device itself: repeat this build "
                     "with --device ssh://HOST, or copy the bundle there and run "
                     "`python3 build_engine.py`")  # fmt: skip
    if not manifest.latency_ms and not (folder / "bench.json").exists():
        lines.append(f"latency   to be measured there: secateur bench {folder} --device ssh://HOST")
    return [*lines, f"run it    python3 {folder / 'run.py'} IMAGE"]


def budget_line(name: str, budget: BudgetRecord) -> str:
    """Return in words what was wanted and what is spent, or kept."""
    how = {
        "counted": "",
        "measured": ", measured",
        "table": ", by the table",
        "emulated": ", counted on an emulated CPU",
    }[budget.how]
    said = (
        f"{name}: at {budget.sense} {budget.wanted:g} {budget.unit}; plan {budget.planned:.4g}{how}"
    )
    if budget.shipped is not None:
        said += f"; shipped {budget.shipped:.4g}"
    return said + ("; missed" if budget.met is False else "")


def solver_line(solver: str, gap: float | None) -> str:
    """Return who chose the widths, and of an exact choice how far from the best it may be.

    The bound of a greedy one is too loose to tell users: it stays in the manifest.
    """
    said = f"widths by {solver}"
    if solver != "exact" or gap is None:
        return said
    return f"{said}; optimality gap {100 * gap:.3g} % of the score lost"


def sparsity_line(plan: Mapping[str, Any]) -> str:
    """Return what 2:4 sparsity takes, from ``SparsityPlan.to_json``."""
    lost = ", ".join(f"{task} {share:.1%}" for task, share in plan["lost"].items())
    return (f"sparsity  2:4 in {len(plan['weights'])} layers, {len(plan['dense'])} stay dense; "
            f"importance of their weights that goes: {lost}")  # fmt: skip


def _range(intervals: AccuracyIntervals | None) -> str:
    if intervals is None:
        return ""
    low, high = intervals.delta_t
    return f", 95 % interval {low:+.2f} to {high:+.2f}"


# What was done to the fp32 model first, by key of the manifest's quantisation.
READY = {"equalised_channels": "channels equalised", "corrected_biases": "biases corrected"}


def _precision_lines(manifest: Manifest) -> list[str]:
    """Say what stayed in high precision and why, as a block to pin, and why this precision."""
    lines = []
    if manifest.precision_choice:
        lines.append(f"precision {manifest.precision}: {manifest.precision_choice['why']}")
    found = manifest.quantisation
    if found is None:
        return lines
    shares = ", ".join(
        f"{share:.1%} {name}" for name, share in found["macs_share"].items() if share
    )
    lines.append(f"MACs      {shares}; {found['calibrator']} of {found['images']} images")
    ready = [f"{found[key]} {what}" for key, what in READY.items() if found.get(key)]
    if ready:
        lines.append(f"for int8  {', '.join(ready)}")
    taught = found.get("distilled")
    if taught and taught.get("failed"):
        lines.append(f"distilled not at all: {taught['failed']}")
    elif taught:
        shares = f"{taught['int8_after']:.1%} of the MACs, {taught['int8_before']:.1%} without"
        lines.append(f"distilled {taught['steps']} steps: int8 has {shares}; "
                     f"{'taken' if taught['taken'] else 'not taken'}")  # fmt: skip
    if found["guard"] and all(task.max_drop is None for task in manifest.tasks):
        lines.append("guard     no task has a max_drop: nothing was guarded")
    elif found["guard"]:
        outcome = "passed" if found["guard"]["passed"] else "found nothing that passes"
        lines.append(f"guard     {outcome}, {found['guard']['evaluations']} evaluations")
    why = {row["node"]: f"{row['module'] or 'no module'}: {row['why']}" for row in found["kept"]}
    if found["pin"] and not (taught and taught.get("taken")):  # pins alone do not teach again
        lines.append("to keep this without a search, set in the recipe:\nprecision:\n  mode: "
                     f"{manifest.precision}\n  guard: false\n  distill: false\n  pin:")  # fmt: skip
        lines += [f"    {node}: {precision}" + (f"  # {why[node]}" if node in why else "")
                  for node, precision in found["pin"].items()]  # fmt: skip
    latency, known = manifest.latency_ms, load_target(manifest.device)
    if known.cpu and known.arch == "aarch64" and int8_form(known.cpu.isa) == "fp32":
        lines.append("int8 is slower than fp32 on Arm cores without dot product: mode auto would "
                     "not take it")  # fmt: skip
    elif latency and latency["cut"]["median_ms"] > latency["cut_fp32"]["median_ms"]:
        lines.append(f"{manifest.precision} is slower than fp32 here: mode auto would not take it")
    return lines


def _start(warm: Mapping[str, Any]) -> str:
    if warm["cold"]:
        return f"cold: {warm['cold']}"
    weights = warm["weights"]
    chosen = weights["reason"] or f"{weights['chosen']} (of {', '.join(weights['losses'])})"
    return f"{len(warm['voters'])} earlier cuts voted; weights: {chosen}"


def _cost_table(manifest: Manifest) -> Table:
    parent, cut = manifest.cost_parent, manifest.cost
    table = Table("one image", "parent (kept tasks)", "cut", "ratio")
    rows = [
        ("M MACs", parent.macs / 1e6, cut.macs / 1e6),
        ("M parameters", parent.params / 1e6, cut.params / 1e6),
        ("ONNX bytes", parent.onnx_bytes, cut.onnx_bytes),
    ]
    latency = manifest.latency_ms
    if latency:
        before, after = (latency[name]["median_ms"] for name in ("parent", "cut"))
        rows.append((f"p50 ms, {manifest.threads} thread", before, after))
    for name, before, after in rows:
        table.add_row(name, f"{before:,.5g}", f"{after:,.5g}", f"{after / before:.4f}")
    if any(result["noisy"] for result in latency.values()):
        table.caption = "noisy: the latencies varied by more than 10 %"
    return table
