"""How fast and how well budgets are planned, and met in milliseconds: benchmarks/budget/planner.py

    SECATEUR_DATA=... python benchmarks/budget/planner.py [--part solver|built]

``solver``: three multi-task networks with random scores, under MACs and parameters together and
under a made-up latency table in steps of 16 channels; the greedy baseline beside it. Groups and
operators are found before the clock runs. ``built``: the parent nyuv2_lite0 at 288x384, planned to
shares of its own measured latency; the cut is then measured beside the parent, in turns. A stopped
run goes on; a quiet machine is needed for the second part.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from secateur.bench.latency import measure
from secateur.core.errors import PlanError
from secateur.core.model import MultiTaskModel, model_fingerprint
from secateur.core.progress import shown
from secateur.core.task import Task
from secateur.devices.host import library_versions
from secateur.devices.latency_table import LatencyTable, Point, Run
from secateur.devices.operators import Operators, PlacedOperator
from secateur.devices.target import load_target
from secateur.flow.axes import turn_axes
from secateur.flow.budgets import parent_ms, plan_within
from secateur.flow.cache import StageCache
from secateur.flow.job import Job, open_job
from secateur.flow.latency import latency_limit
from secateur.flow.recipe import BudgetSpec, parse_recipe
from secateur.flow.stages import exported
from secateur.lower import export_onnx
from secateur.lower.operators import list_operators
from secateur.prune import apply_plan, find_groups, macs_model
from secateur.prune.budget import default_floor
from secateur.prune.costs import layer_widths, macs_limit, params_limit, width_problem
from secateur.prune.exact import solve_exact, solve_greedy
from secateur.prune.problem import Limit, Problem
from secateur.runtimes.base import runtime_of
from secateur.zoo.compose import HeadSpec, compose
from suite import RESULTS, Show, append_row, exit_status, read_rows, write_suite

CELLS = RESULTS / "budget_planner.cells.jsonl"
SEED = 0
SHARES = (0.7, 0.5, 0.35, 0.25)
GRID, KERNEL = 8, 16  # channels: of the plans, of the made-up table
RUNS = 48  # networks that the made-up table was measured on
SECONDS, GAP = 5.0, 0.01
LEAST, MOST = 0.93, 1.00  # of the budget
TASKS = (
    Task("segmentation", "seg", "segmentation", "segmentation", classes=13),
    Task("depth", "depth", "depth", "depth"),
    Task("room", "room", "classification", "room", classes=4),
)
HEADS = {
    "seg": HeadSpec("segmentation", 13),
    "depth": HeadSpec("depth", 1),
    "room": HeadSpec("classification", 4),
}
RECIPE = """\
model:
  factory: secateur.zoo:nyuv2_lite0
  checkpoint: benchmarks/parents/nyuv2_lite0.safetensors
  input: {shape: [3, 288, 384]}
tasks:
  segmentation: {output: segmentation, kind: segmentation, classes: 13}
  depth:        {output: depth, kind: depth}
  normals:      {output: normals, kind: normals}
data:
  train: {reader: nyuv2, root: "${SECATEUR_DATA}/nyuv2_288x384", split: train}
  eval:  {reader: nyuv2, root: "${SECATEUR_DATA}/nyuv2_288x384", split: test}
prune: {budget: {macs: 0.5}, images: 32}
"""


@dataclass(frozen=True)
class Case:
    """A timm backbone with three heads, and its input."""

    backbone: str
    height: int
    width: int


CASES = (
    Case("efficientnet_lite0", 288, 384),
    Case("resnet50", 224, 224),
    Case("vit_base_patch16_224", 224, 224),
)
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("solver", "built"), help="one part only")
    options = parser.parse_args()
    versions = {n: library_versions().get(n) for n in ("torch", "timm", "onnxruntime")}
    done = [row for row in read_rows(CELLS) if row["versions"] == versions]

    def keep(row: Row) -> None:
        done.append({**row, "versions": versions})
        append_row(CELLS, done[-1])

    with shown():
        if options.part != "built":
            for case in CASES:
                solve_case(case, done, keep)
        if options.part != "solver":
            meet_budgets(done, keep)
    shows = claims(done)
    write_suite("budget_planner", "python benchmarks/budget/planner.py", [SEED], done, shows)
    exit_status(shows)


def solve_case(case: Case, done: Sequence[Row], keep: Callable[[Row], None]) -> None:
    """Plan a network to every budget that is not done."""
    wanted = [(share, kind) for share in SHARES for kind in ("macs, params", "latency")]
    known = {(row["model"], row["share"], row["budget"]) for row in done if row["part"] == "solver"}
    missing = [(share, kind) for share, kind in wanted if (case.backbone, share, kind) not in known]
    if not missing:
        return
    posed = pose(case)
    for share, kind in missing:
        problem = posed(share, kind)
        keep({"part": "solver", "model": case.backbone, "share": share, "budget": kind,
              **solved(problem)})  # fmt: skip


def pose(case: Case) -> Callable[[float, str], Problem]:
    """Return what makes the choice of widths for a share of the parent and a kind of budget."""
    torch.manual_seed(SEED)
    size: dict[str, Any] = {}
    if case.backbone.startswith("vit"):
        size["img_size"] = (case.height, case.width)
    model = MultiTaskModel(compose(case.backbone, HEADS, **size), TASKS).eval()
    example = torch.randn(1, 3, case.height, case.width)
    groups = find_groups(model, example)
    cost, params = macs_model(model, groups, example), params_limit(model, groups, 0)
    with tempfile.TemporaryDirectory() as scratch:
        export_onnx(model, example, Path(scratch) / "model.onnx")
        operators = list_operators(Path(scratch) / "model.onnx", layer_widths(model, groups))
    full = [group.width for group in groups]
    latency = latency_limit(operators, made_up_table(operators, full), 0.0)
    grids = [group.step(GRID) for group in groups]
    rng = np.random.default_rng(SEED)
    scores = [rng.lognormal(rng.normal(), 1, width) / width for width in full]

    def problem(share: float, kind: str) -> Problem:
        limits: list[Limit] = [replace(latency, most=share * latency.total(full))]
        if kind == "macs, params":
            limits = [macs_limit(cost, int(share * cost.macs(full))),
                      replace(params, most=int(share * params.total(full)))]  # fmt: skip
        return width_problem(scores, grids, default_floor(full, grids, limits), limits)

    return problem


def made_up_table(operators: Operators, full: Sequence[int]) -> LatencyTable:
    """Return times of a machine that works in blocks of 16 channels, two microseconds a call."""

    def time_of(placed: PlacedOperator, kept: Sequence[int]) -> Point:
        widths = placed.read(kept), placed.made(kept)
        read, made = (-(-width // KERNEL) * KERNEL for width in widths)
        kind = placed.kind
        return Point(*widths, 2 + 2e-5 * kind.macs(read, made) + 2e-4 * kind.traffic(read, made))

    rng = np.random.default_rng(SEED)
    drawn = [[int(w) for w in rng.integers(1, np.array(full) + 1)] for _ in range(RUNS)]
    drawn[:2] = [[1] * len(full), list(full)]
    points = {p.kind: tuple(time_of(p, kept) for kept in drawn) for p in operators.timed}
    totals = [sum(own[at].microseconds for own in points.values()) for at in range(RUNS)]
    runs = tuple(Run(tuple(kept), us / 1000) for kept, us in zip(drawn, totals, strict=True))
    return LatencyTable("made up", 1, {}, points, runs=runs)


def solved(problem: Problem) -> Row:
    """Solve twice exactly and once greedily, with the seconds that each took."""
    start = time.perf_counter()
    try:
        exact = solve_exact(problem)
    except PlanError as error:  # what cannot be met is told, and as fast
        return {"seconds": time.perf_counter() - start, "gap": None, "impossible": error.message}
    seconds = time.perf_counter() - start
    same = solve_exact(problem).counts == exact.counts
    start = time.perf_counter()
    try:
        greedy: float | None = solve_greedy(problem).objective
    except PlanError:
        greedy = None
    return {
        "groups": len(problem.widths), "widths": sum(map(len, problem.widths)),
        "seconds": seconds, "gap": exact.gap, "lost": exact.objective, "identical": same,
        "greedy_lost": greedy, "greedy_seconds": time.perf_counter() - start,
        "spent": {limit.name: exact.spent[limit.name] / limit.most for limit in problem.limits},
    }  # fmt: skip


def meet_budgets(done: Sequence[Row], keep: Callable[[Row], None]) -> None:
    """Plan the parent to each share of its measured latency that is not done, and measure."""
    known = {row["share"] for row in done if row["part"] == "built"}
    missing = [share for share in SHARES if share not in known]
    if missing:
        job = turn_axes(open_job(parse_recipe(RECIPE, Path.cwd() / "planner.yaml"), StageCache()))
        for share in missing:
            keep({"part": "built", "model": "nyuv2_lite0", "share": share, **built(job, share)})


def built(job: Job, share: float) -> Row:
    target = load_target("x86-64-cpu")
    runtime, image = runtime_of(target.runtime), job.example[:1].numpy()

    def call(model: MultiTaskModel, key: str) -> Callable[[], object]:
        return partial(runtime.open_session(exported(job, model, key), target.threads).run, image)

    parent = call(job.selected, job.parent_key)
    wanted_ms = share * parent_ms(job, target)
    budget = BudgetSpec(latency_ms=wanted_ms)
    prune = job.recipe.prune.model_copy(update={"budget": budget, "search": False})
    asked = replace(job, recipe=job.recipe.model_copy(update={"prune": prune}))
    start = time.perf_counter()
    planned = plan_within(asked, target)
    seconds = time.perf_counter() - start
    cut = apply_plan(job.selected, planned.scored.groups, planned.plan)
    together = measure({"parent": parent, "cut": call(cut, model_fingerprint(cut))})
    beside_ms, cut_ms = together["parent"].median_ms, together["cut"].median_ms
    pairs = zip(together["cut"].block_medians_ms, together["parent"].block_medians_ms, strict=True)
    return {
        "budget_ms": wanted_ms, "planned_ms": planned.budgets["latency_ms"].planned,
        "parent_ms": beside_ms, "cut_ms": cut_ms,
        "of_budget": cut_ms / wanted_ms, "of_parents_share": cut_ms / (share * beside_ms),
        "of_share_by_blocks": float(np.median([own / beside for own, beside in pairs])) / share,
        "noisy": together["cut"].noisy or together["parent"].noisy,
        "macs": planned.plan.macs_after / planned.plan.macs_before,
        "grid": planned.plan.channel_grid, "gap": planned.plan.gap, "seconds": seconds,
        "lost": planned.plan.lost,
    }  # fmt: skip


def claims(rows: Sequence[Row]) -> list[Show]:
    shows = []
    for case in CASES:
        own = [row for row in rows if row["part"] == "solver" and row["model"] == case.backbone]
        met = [row for row in own if row["gap"] is not None]
        if not met:
            continue
        slowest, widest = (max(row[key] for row in met) for key in ("seconds", "gap"))
        same = sum(row["identical"] for row in met) / len(met)
        shows += [
            Show(f"{case.backbone}: seconds of the slowest plan", SECONDS, slowest, "<="),
            Show(f"{case.backbone}: the widest optimality gap", GAP, widest, "<="),
            Show(f"{case.backbone}: share of plans that are the same again", 1.0, same, ">="),
        ]
    built_rows = [row for row in rows if row["part"] == "built"]
    if built_rows:
        noisy = sum(row["noisy"] for row in built_rows)
        flagged = f" ({noisy} of {len(built_rows)} runs noisy)" if noisy else ""
        said = f"nyuv2_lite0, 288x384: p50 / share of the parent's p50 beside it{flagged}"
        spent = [row["of_parents_share"] for row in built_rows]
        shows += [
            Show(f"{said}, the highest", MOST, max(spent), "<="),
            Show(f"{said}, the lowest", LEAST, min(spent), ">="),
            Show("... p50 / the milliseconds asked for, whatever the parent takes beside it, "
                 "the highest", MOST, max(row["of_budget"] for row in built_rows), "<="),
        ]  # fmt: skip
    return shows


if __name__ == "__main__":
    main()
