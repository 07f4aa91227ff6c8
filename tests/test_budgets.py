"""Budgets of a recipe: what is planned, what is said of it, and what happens to a missed one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from cli_run import RECIPE, make_project, run
from secateur.bench.latency import summarise
from secateur.bench.profile import OFFSETS
from secateur.bundle.manifest import Cost
from secateur.bundle.read import read_bundle
from secateur.cli.build import budget_line, missed
from secateur.core.errors import DeviceError, PlanError, VerifyError
from secateur.core.plan import PrunePlan
from secateur.devices.host import host_facts
from secateur.devices.latency_table import LatencyTable, Point, Run, save_table
from secateur.devices.target import Target, load_target
from secateur.flow import budgets, planning, verify
from secateur.flow.cache import StageCache
from secateur.flow.job import Job, open_job
from secateur.flow.recipe import load_recipe
from secateur.prune.costs import size_limit
from secateur.runtimes import onnxruntime as runtime
from torch import nn

X86 = load_target("x86-64-cpu")
SEARCH = "search: {tries: 3, images: 8}, "


def job_with(tmp_path: Path, monkeypatch, **changes: str) -> Job:
    """The small project; ``changes`` replace the values of keys in its recipe's prune line."""
    recipe = RECIPE.replace("{macs: 0.5}", changes.get("budget", "{macs: 0.5}"))
    recipe = recipe.replace("kind: depth}", f"kind: depth{changes.get('depth', '')}}}")
    recipe = recipe.replace("images: 16}", f"images: 16{changes.get('prune', '')}}}")
    recipe = recipe.replace(SEARCH, changes.get("search", SEARCH))
    recipe += changes.get("more", "")
    monkeypatch.syspath_prepend(str(tmp_path))
    return open_job(load_recipe(make_project(tmp_path, recipe)), StageCache(tmp_path / "c"))


def stairs(kernel: int) -> tuple[tuple[int, float], ...]:
    """Networks of a runtime that works in so many channels; none for 0."""
    return tuple((more, float(-(-(64 + more) // kernel) * kernel)) for more in OFFSETS if kernel)


def flat_table(job: Job, *, kernel: int = 0, host: str = "") -> LatencyTable:
    """A microsecond a channel made, and one a node."""
    basis, rng = budgets.basis_of(job, X86), np.random.default_rng(0)
    full = basis.full
    drawn = [[1] * len(full), full, *(rng.integers(1, full).tolist() for _ in range(10))]
    operators = basis.timed
    points = {
        placed.kind: tuple(
            Point(placed.read(kept), placed.made(kept), float(placed.made(kept))) for kept in drawn
        )
        for placed in operators.timed
    }
    nodes = len(operators.timed) + operators.bare
    runs = tuple(
        Run(tuple(kept), took, took)
        for at, kept in enumerate(drawn)
        for took in [(nodes + sum(own[at].microseconds for own in points.values())) / 1000]
    )
    facts = {"cpu": host or host_facts()["cpu"]}
    return LatencyTable(runtime.version(), 1, facts, points, runs=runs, stairs=stairs(kernel))


@pytest.mark.parametrize(
    ("prune", "kernel", "precision", "grid"),
    [
        ("", 16, "fp32", 16),  # what the table shows
        ("", 4, "fp32", 4),
        ("", 0, "fp32", 8),  # it shows nothing: the target's
        (", grid: 2", 16, "fp32", 2),  # the recipe wins
        ("", 16, "int8", 8),  # the table is of fp32
        ("", 16, "auto", 16),  # suits all
    ],
)
def test_the_grid_is_the_recipes_or_the_tables_or_the_targets(
    tmp_path, monkeypatch, prune: str, kernel: int, precision: str, grid: int
) -> None:
    job = job_with(tmp_path, monkeypatch, prune=prune, more=f"precision: {{mode: {precision}}}\n")
    table = LatencyTable("onnxruntime 1.0", 1, {}, {}, stairs=stairs(kernel))
    assert job.grid(X86, table) == grid
    assert job.grid(X86) == (2 if prune else 8)


def test_a_latency_budget_is_planned_on_the_tables_grid_and_measured_once(
    tmp_path, monkeypatch
) -> None:
    job = job_with(tmp_path, monkeypatch, budget="{latency_ms: 0.3}", depth=", floor: 0.1")
    table = flat_table(job, kernel=4)
    measured = []

    def machine(job: Job, target: Target, planned, protocol) -> float:
        measured.append([len(cut.kept) for cut in planned.plan.cuts])
        return 0.29 / 0.6

    monkeypatch.setattr(budgets, "profile_job", lambda *_: table)
    monkeypatch.setattr(budgets, "_measured_share", machine)
    monkeypatch.setattr(budgets, "parent_ms", lambda *_: 0.6)
    planned = budgets.plan_within(job, X86)
    assert planned.plan.channel_grid == 4 and planned.plan.solver == "exact"
    latency, floor = planned.budgets["latency_ms"], planned.budgets["tasks.depth.floor"]
    assert (latency.wanted, latency.planned, latency.how) == (0.3, pytest.approx(0.29), "measured")
    assert floor.sense == "least" and floor.planned == 1 - planned.plan.lost["depth"] >= 0.1
    again = budgets.plan_within(job, X86)
    assert again.plan == planned.plan and len(measured) == 1  # resumed, and the same plan

    def evidence(cut: float, parent: float = 0.6) -> SimpleNamespace:
        rng, cost = np.random.default_rng(0), Cost(macs=1, params=1, onnx_bytes=1)
        latency = {name: summarise(rng.normal(median, 0.002, 300))
                   for name, median in (("parent", parent), ("cut", cut))}  # fmt: skip
        return SimpleNamespace(latency=latency, cost=cost, cost_parent=cost)

    kept = budgets.settle(job, X86, planned, evidence(0.29))
    assert kept["latency_ms"].met and kept["latency_ms"].shipped == pytest.approx(0.29, abs=1e-3)
    noise = budgets.settle(job, X86, planned, evidence(0.30005))
    assert noise["latency_ms"].met
    slow = budgets.settle(job, X86, planned, evidence(0.34, 0.7))["latency_ms"]
    assert slow.met and slow.shipped == pytest.approx(0.34, abs=1e-3)  # so is the parent
    over = budgets.settle(job, X86, planned, evidence(0.32))["latency_ms"]
    assert over.met is False and "; shipped 0.32; missed" in budget_line("latency_ms", over)
    later = budgets.plan_within(job, X86)  # what was missed is corrected
    assert later.plan.cuts != planned.plan.cuts and len(measured) == 2


@pytest.mark.parametrize(("search", "judged"), [("", 2), ("search: false, ", 0)])
def test_plans_within_other_budgets_are_judged_unless_told_not_to(
    tmp_path, monkeypatch, search: str, judged: int
) -> None:
    job = job_with(tmp_path, monkeypatch, budget="{params: 0.6}", search=search)
    seen: list[PrunePlan] = []

    def choose(job: Job, wanted, groups, plans: list[PrunePlan]) -> PrunePlan:
        seen.extend(plans)
        return plans[0]

    monkeypatch.setattr(planning, "best_judged", choose)
    planned = budgets.plan_within(job, X86)
    assert planned.plan.solver == "exact" and len(seen) == judged
    assert planned.budgets["params"].planned <= 0.6


def test_a_latency_budget_of_an_int8_recipe_is_timed_in_int8(tmp_path, monkeypatch) -> None:
    more = "precision: {mode: int8, calibrator: minmax, images: 8}\n"
    job = job_with(tmp_path, monkeypatch, budget="{latency_ms: 0.3}", more=more)
    timed = []

    def call(job: Job, target: Target, file: Path) -> Callable[[], object]:
        nodes = {node.op_type for node in onnx.load(file).graph.node}
        timed.append("int8" if "QuantizeLinear" in nodes else "fp32")
        return lambda: None

    table = replace(flat_table(job), precision="int8").scaled(0.5)
    monkeypatch.setattr(budgets, "profile_job", lambda *_: table)
    monkeypatch.setattr(budgets, "_call", call)
    monkeypatch.setattr(budgets, "measure", lambda calls, *_: {
        name: summarise(np.full(300, 0.6 if name == "parent" else 0.29)) for name in calls
    })  # fmt: skip
    planned = budgets.plan_within(job, X86)
    assert planned.budgets["latency_ms"].planned == pytest.approx(0.29)
    assert timed == ["fp32", "fp32", "int8"]  # the parent alone; parent and cut
    save_table(tmp_path / "int8.json", table)
    fp32 = job_with(tmp_path, monkeypatch, budget="{latency_ms: 0.3}")
    with pytest.raises(DeviceError, match="measured in int8, the recipe's plans are timed in fp32"):
        budgets.plan_within(fp32, X86, table_file=tmp_path / "int8.json")


def test_a_floor_that_narrow_budgets_leave_room_under_is_chosen_by_latency(
    tmp_path, monkeypatch
) -> None:
    job = job_with(tmp_path, monkeypatch)
    table = flat_table(job, host="another")
    basis = budgets.basis_of(job, X86)
    full = budgets.table_estimate(basis.operators, table, basis.full).ms
    save_table(tmp_path / "table.json", table)
    floors = {}
    for share in (0.9, 0.45):
        prune = {"budget": {"latency_ms": share * full}, "grid": 1, "images": 16, "rescore": False}
        spec = type(job.recipe.prune).model_validate(prune)
        asked = replace(job, recipe=job.recipe.model_copy(update={"prune": spec}))
        planned = budgets.plan_within(asked, X86, table_file=tmp_path / "table.json")
        floors[share] = planned.scored.budget.floor
        assert planned.budgets["latency_ms"].how == "table"
    assert floors[0.9] == 0.3 > floors[0.45]


def plan(capsys, tmp_path: Path, *options: str | Path) -> tuple[int, str]:
    code, out, err = run(capsys, "plan", tmp_path / "recipe.yaml", "--cache", tmp_path / "c",
                         *options)  # fmt: skip
    assert "Traceback" not in out + err
    return code, " ".join((out + err).split())


def test_tables_and_budgets_that_do_not_fit_are_one_sentence(tmp_path, monkeypatch, capsys) -> None:
    job = job_with(tmp_path, monkeypatch, budget="{latency_ms: 0.01}")
    table, file = flat_table(job), tmp_path / "table.json"
    kind = next(iter(table.points))
    cases = {
        "below the least that the offered widths reach": table,
        "was measured with onnxruntime 0.1, this machine has": replace(
            table, runtime="onnxruntime 0.1"
        ),
        "the latency table has holes: 11 of 12 points": replace(
            table, points={**table.points, kind: table.points[kind][1:]}
        ),
        "the latency table has no": replace(
            table, points={k: v for k, v in table.points.items() if k != kind}
        ),
        "was measured with 3 threads": replace(table, threads=3),
        "is of raspberry-pi-4, and the target is x86-64-cpu": replace(
            table, host={**table.host, "target": "raspberry-pi-4"}
        ),
        "is of a network with the same layers in other widths": replace(
            table, runs=tuple(replace(each, kept=(1,) * len(each.kept)) for each in table.runs)
        ),
        "is not finished: 12 networks were measured, none to check it by": replace(
            table, runs=tuple(replace(each, predicted_ms=None) for each in table.runs)
        ),
    }
    for says, wrong in cases.items():
        save_table(file, wrong)
        code, said = plan(capsys, tmp_path, "--table", file)
        assert code == 2 and says in said and "hint:" in said
        assert "below" not in says or "the budget of 0.01 ms for latency" in said  # as it was given


def test_plan_says_what_each_budget_comes_to_and_estimates_what_it_cannot_measure(
    tmp_path, monkeypatch, capsys
) -> None:
    job_with(tmp_path, monkeypatch, search="search: false, ")
    code, said = plan(capsys, tmp_path, "--target", "jetson-orin-nano-8gb")
    assert code == 0 and "budget macs: at most 0.5 of the parent's MACs; plan 0.4" in said
    assert "widths by greedy" in said and "optimality gap" not in said
    assert "latency estimate (roofline, not measured), fp16: parent" in said
    code, said = plan(capsys, tmp_path, "--json")  # nothing is known of any x86-64 CPU
    found = json.loads(said)
    assert found["budgets"]["macs"]["planned"] <= 0.5 and 0 <= found["gap"] < 1
    assert "lacks the peak rate" in found["latency_estimate"]["unknown"]


def test_a_table_is_read_though_no_budget_is_planned_by_it(tmp_path, monkeypatch, capsys) -> None:
    job_with(tmp_path, monkeypatch)
    code, said = plan(capsys, tmp_path, "--table", tmp_path / "none.json")
    assert code == 2 and "cannot read the latency table" in said


def test_a_build_reads_its_table_before_any_long_work(tmp_path, monkeypatch, capsys) -> None:
    job_with(tmp_path, monkeypatch)
    words = ["--table", tmp_path / "none.json", "--cache", tmp_path / "c", "--out", tmp_path / "o"]
    code, out, err = run(capsys, "build", tmp_path / "recipe.yaml", *words)
    assert code == 2 and "cannot read the latency table" in " ".join((out + err).split())
    assert not list((tmp_path / "c").rglob("*.onnx"))  # the parent was not even exported


def test_a_size_is_planned_in_the_precision_that_ships(tmp_path, monkeypatch) -> None:
    plans = {}
    for mode in ("fp32", "fp16", "int8"):
        job = job_with(
            tmp_path, monkeypatch, budget="{size_mb: 0.03}", more=f"precision: {{mode: {mode}}}\n"
        )
        plans[mode] = budgets.plan_within(job, X86).plan.macs_after
    assert plans["fp32"] < plans["fp16"] < plans["int8"]


def test_what_a_guard_leaves_in_fp32_is_planned_at_four_bytes() -> None:
    body, end = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 100, 1)  # 216 and 800 weights
    model = nn.Sequential(body, end)
    parent_bytes = 4 * (216 + 800 + 100)
    for in_fp32, bytes_of_end in (((), 1.2), ((end,), 4.0)):
        limit = size_limit(model, (), parent_bytes, 0, 1.2, in_fp32)
        assert limit.total([]) == pytest.approx(1.2 * (216 + 100) + bytes_of_end * 800)


def test_a_precision_that_the_target_lacks_is_told_before_any_plan(
    tmp_path, monkeypatch, capsys
) -> None:
    job_with(tmp_path, monkeypatch, more="precision: {mode: fp16}\n")
    for verb, more in (("plan", []), ("profile", ["--out", tmp_path / "t.json"])):
        code, out, err = run(capsys, verb, tmp_path / "recipe.yaml", "--target", "raspberry-pi-4",
                             "--cache", tmp_path / "c", *more)  # fmt: skip
        assert code == 2 and "has fp32, int8 with onnxruntime" in " ".join((out + err).split())


@pytest.mark.parametrize("budget", ["{size_mb: .inf}", "{peak_memory_mb: .nan}"])
def test_a_budget_is_a_finite_number(tmp_path, monkeypatch, capsys, budget: str) -> None:
    recipe = make_project(tmp_path, RECIPE.replace("{macs: 0.5}", budget))
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, err = run(capsys, "plan", recipe)
    assert code == 2 and "finite number" in out + err


def test_a_model_that_nothing_can_be_cut_of_is_told(tmp_path, monkeypatch, capsys) -> None:
    job_with(tmp_path, monkeypatch)
    monkeypatch.setattr("secateur.flow.planning.find_groups", lambda model, example: ())
    code, said = plan(capsys, tmp_path)
    assert code == 2 and "no channel of this model can go" in said


def test_a_plan_that_fits_stays_though_nothing_fits_the_corrected_table(
    tmp_path, monkeypatch
) -> None:
    job = job_with(tmp_path, monkeypatch, budget="{latency_ms: 0.3}")
    save_table(tmp_path / "table.json", flat_table(job))
    made, planned = [], budgets._planned

    def once(*args):
        if made:
            raise PlanError("below the least", hint="-")
        made.append(planned(*args))
        return made[0]

    monkeypatch.setattr(budgets, "_planned", once)
    monkeypatch.setattr(budgets, "_measured_share", lambda *args: 0.5)
    monkeypatch.setattr(budgets, "parent_ms", lambda *args: 0.3)
    found = budgets.plan_within(job, X86, table_file=tmp_path / "table.json")
    assert found.plan == made[0].plan and found.budgets["latency_ms"].planned == 0.15


def test_a_table_of_another_machine_is_planned_by(tmp_path, monkeypatch, capsys) -> None:
    job = job_with(tmp_path, monkeypatch, budget="{latency_ms: 0.3}")
    save_table(tmp_path / "table.json", flat_table(job, host="another CPU"))
    code, said = plan(capsys, tmp_path, "--table", tmp_path / "table.json", "--json")
    found = json.loads(said)
    assert code == 0 and found["budgets"]["latency_ms"]["how"] == "table"
    assert found["budgets"]["latency_ms"]["planned"] <= 0.98 * 0.3 + 1e-9
    assert found["latency_estimate"]["plan"]["source"] == "table"
    assert found["latency_estimate"]["plan"]["ms"] < found["latency_estimate"]["parent"]["ms"]


def test_a_bundle_tells_its_budgets_and_verify_refuses_a_missed_one(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_bundle(bundle)
    macs = manifest.budgets["macs"]
    assert macs.met and macs.shipped == manifest.cost.macs / manifest.cost_parent.macs <= 0.5
    assert not missed(manifest) and manifest.plan["solver"] in ("greedy", "search")
    over = macs.model_copy(update={"shipped": 0.6, "met": False})
    late = manifest.model_copy(update={"budgets": {"macs": over}})
    assert missed(late) == ["macs"]
    with pytest.raises(VerifyError, match=r"missed its budget macs .*: 0\.6 of the parent's MACs"):
        verify.judged(bundle, late, "local", {}, lambda *_: None, None)
    monkeypatch.setattr(verify, "read_bundle", lambda folder: late)
    with pytest.raises(VerifyError, match="missed its budget"):
        verify.verify(bundle, accuracy=False)
