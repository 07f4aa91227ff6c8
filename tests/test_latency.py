"""Latency tables, how they are measured, and what is estimated from them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import SPEC, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur.bench.estimate import roofline, table_estimate
from secateur.bench.one_operator import one_operator
from secateur.bench.profile import Demand, Sampling, measure_table, middle
from secateur.core.errors import DeviceError, PlanError
from secateur.core.widths import Width
from secateur.devices.latency_table import (
    LatencyTable,
    Point,
    channel_grid,
    load_table,
    save_table,
    steps,
)
from secateur.devices.operators import OperatorKind, Operators, PlacedOperator
from secateur.devices.target import load_target
from secateur.flow.latency import corrected, latency_limit, peak_limits
from secateur.lower import export_onnx
from secateur.lower.operators import list_operators
from secateur.prune import apply_plan, find_groups, macs_model, plan_widths
from secateur.prune.costs import layer_widths, width_problem
from secateur.prune.exact import solve_exact
from secateur.prune.plan import Budget
from secateur.runtimes import onnxruntime as runtime

CONV = OperatorKind("Conv", 14, 14, 14, 14, (3, 3), detail="Relu")
DEPTHWISE = replace(CONV, groups=0)
EXAMPLE = SPEC.example()


def stairs(c_in: int, c_out: int) -> float:
    """What a runtime with blocks of 16 makes of a 3x3 convolution; microseconds."""
    return 5 + 0.01 * c_in * 16 * -(-c_out // 16)


def table_of(points: dict[OperatorKind, list[Point]], **changes) -> LatencyTable:
    return LatencyTable(
        "onnxruntime 1.31.1", 1, {"cpu": "a test"},
        {kind: tuple(each) for kind, each in points.items()}, **changes,
    )  # fmt: skip


def grid_points(inputs, outputs, cost=stairs) -> list[Point]:
    return [Point(a, b, cost(a, b)) for a in inputs for b in outputs]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=4, unique=True), st.integers(1, 64))
def test_a_table_is_exact_on_its_grid_and_monotone_where_its_data_are(
    widths: list[int], asked: int
) -> None:
    widths = sorted(widths)
    table = table_of({CONV: grid_points(widths, widths)})
    surface = table.surface(CONV)
    for a in widths:
        for b in widths:
            assert surface.at(a, b) == pytest.approx(stairs(a, b))
    line = [surface.at(asked, b) for b in range(widths[0], widths[-1] + 1)]
    assert all(after >= before - 1e-9 for before, after in pairwise(line))


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    table = table_of({CONV: [*grid_points([16, 32], [16, 32]), Point(24, 24, 9.5, 0.1, "held_out")],
                      DEPTHWISE: [Point(16, 16, 3.0)]}, per_node_us=0.4, scale=1.2)  # fmt: skip
    save_table(tmp_path / "t.json", table)
    assert load_table(tmp_path / "t.json").to_json() == table.to_json()


def test_held_out_points_give_the_error_and_are_not_interpolated_between() -> None:
    points = [Point(8, 16, 10.0), Point(8, 32, 20.0), Point(8, 24, 30.0, 0.0, "held_out")]
    table = table_of({CONV: points})
    assert table.surface(CONV).at(8, 24) == pytest.approx(15.0)
    assert table.error() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.check_runtime("onnxruntime 1.20.0"), "measured with onnxruntime 1.31.1, this"),
        (lambda t: t.surface(DEPTHWISE), "has no Conv.Relu 3x3/1 depth-wise at 14x14 fp32"),
        (lambda t: table_of({CONV: t.points[CONV][:-1]}).surface(CONV), "has holes: 1 of 4 points"),
        (lambda t: table_of({CONV: [Point(8, 8, 1.0, 0.0, "scan")]}).surface(CONV), "all points"),
    ],
)  # fmt: skip
def test_a_table_that_does_not_fit_is_refused_in_one_sentence(spoil, message: str) -> None:
    with pytest.raises(DeviceError, match=message) as refusal:
        spoil(table_of({CONV: grid_points([16, 32], [16, 32])}))
    assert "secateur profile" in refusal.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot read"), ('{"schema": 99}', "of version 99, expected 1"),
     ('{"schema": 1, "entries": [{}]}', "not a whole latency table")],
)  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DeviceError, match=message):
        load_table(tmp_path / "t.json")


@pytest.mark.parametrize("block", [4, 8, 16])
def test_the_channel_grid_is_the_block_that_the_times_show(block: int) -> None:
    def cost(c_in: int, c_out: int) -> float:
        return 1.0 * -(-c_in // 4) * -(-c_out // block)

    offsets = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)
    scans = [Point(32 + o, 64, cost(32 + o, 64), 0.0, "scan") for o in offsets]
    scans += [Point(64, 32 + o, cost(64, 32 + o), 0.0, "scan") for o in offsets]
    table = table_of({CONV: scans})
    assert steps(table, "fp32") == (4, block)
    assert channel_grid(table) == block


class StairTimer:
    """Answers as a runtime of blocks would, and counts what it was asked."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked = 0
        self._stop_after = stop_after

    def __call__(self, models, rounds):
        import onnx

        times = []
        for data in models:
            self.asked += 1
            if self._stop_after is not None and self.asked > self._stop_after:
                raise KeyboardInterrupt
            graph = onnx.load_from_string(data).graph
            c_out, c_in = graph.initializer[0].dims[:2]
            if {a.name: a.i for a in graph.node[0].attribute}["group"] > 1:
                c_in = 1
            times.append(np.full(rounds, stairs(c_in, c_out)))
        return times


DEMANDS = [Demand(CONV, (16, 96), (16, 160)), Demand(DEPTHWISE, (16, 96), (16, 96))]


def test_measuring_finds_steps_and_a_table_right_on_points_it_never_saw() -> None:
    table = measure_table(DEMANDS, StairTimer(), table_of({}), lambda _: None, Sampling(rounds=4))
    assert steps(table, "fp32")[1] == 16
    assert table.error() <= 0.05
    for c_in, c_out in [(48, 80), (33, 100), (96, 150)]:
        assert table.surface(CONV).at(c_in, c_out) == pytest.approx(stairs(c_in, c_out), rel=0.05)


def test_a_stopped_measurement_goes_on_where_it_was(tmp_path: Path) -> None:
    path, sampling = tmp_path / "t.json", Sampling(rounds=4)
    whole = StairTimer()
    expected = measure_table(DEMANDS, whole, table_of({}), lambda _: None, sampling)
    with pytest.raises(KeyboardInterrupt):
        measure_table(
            DEMANDS,
            StairTimer(stop_after=20),
            table_of({}),
            lambda t: save_table(path, t),
            sampling,
        )
    rest = StairTimer()
    resumed = measure_table(
        DEMANDS, rest, load_table(path), lambda t: save_table(path, t), sampling
    )
    assert 0 < rest.asked < whole.asked - 8
    assert resumed.to_json() == expected.to_json() == load_table(path).to_json()


def test_times_are_the_middle_half_with_their_spread() -> None:
    time, spread = middle(np.array([10.0, 10, 11, 11, 12, 12, 13, 500]))
    assert 10 <= time <= 13 and 0 < spread < 0.2


KINDS = [
    CONV, DEPTHWISE, OperatorKind("Conv", 9, 9, 5, 5, (5, 5), (2, 2), detail="Clip"),
    OperatorKind("Gemm", 1, 1, 1, 1), OperatorKind("MatMul", 12, 1, 12, 1),
    OperatorKind("Resize", 6, 8, 12, 16, detail="linear"),
    OperatorKind("Concat", 6, 8, 6, 8, groups=3), OperatorKind("Add", 6, 8, 6, 8),
    OperatorKind("Mul", 6, 8, 6, 8, detail="broadcast"), OperatorKind("ReduceMean", 6, 8, 1, 1),
    OperatorKind("MaxPool", 7, 7, 4, 4, (3, 3), (2, 2)), OperatorKind("Gelu", 12, 1, 12, 1),
    OperatorKind("LayerNormalization", 12, 1, 12, 1), OperatorKind("HardSwish", 6, 8, 6, 8),
]  # fmt: skip


def test_every_kind_of_operator_runs_and_is_timed() -> None:
    times = runtime.kernel_times([one_operator(kind, 16, 16) for kind in KINDS], 1, 5)
    assert all(each.shape == (5,) and (each >= 0).all() for each in times)
    per_node, per_run = runtime.overheads(1, 10)
    assert per_node >= 0 and per_run >= 0


def test_other_precisions_are_refused() -> None:
    with pytest.raises(DeviceError, match="in fp32 only, not in int8"):
        one_operator(replace(CONV, precision="int8"), 8, 8)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory):
    """The tiny model, its groups, its exported file and the operators read off that."""
    model = tiny_model()
    groups = find_groups(model, EXAMPLE)
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    export_onnx(model, EXAMPLE, path)
    return model, groups, list_operators(path, layer_widths(model, groups))


def test_operators_of_a_cut_are_those_of_the_cut_model_exported(net, tmp_path: Path) -> None:
    model, groups, operators = net
    counts = [8 * (1 + number % 2) for number in range(len(groups))]
    scores = {group.name: np.arange(group.width, dtype=float) for group in groups}
    plan = plan_widths(groups, macs_model(model, groups, EXAMPLE), scores, counts, Budget(1.0),
                       per_task={}, criterion="-", fusion="-")  # fmt: skip
    cut = apply_plan(model, groups, plan, EXAMPLE)
    export_onnx(cut, EXAMPLE, tmp_path / "cut.onnx")
    actual = list_operators(tmp_path / "cut.onnx", layer_widths(cut, []))
    planned = sorted((p.kind, p.read(counts), p.made(counts)) for p in operators.timed)
    assert planned == sorted((p.kind, p.read([]), p.made([])) for p in actual.timed)
    peaks = [
        max(sum(a(kept) * b(kept) * size for a, b, size in live) for live in each.live)
        for each, kept in ((operators, counts), (actual, []))
    ]
    assert peaks[0] == peaks[1]


def flat_table(operators: Operators) -> LatencyTable:
    """A table in which each operator takes a microsecond a channel made."""
    grid, ends = [(a, b) for a in (1, 200) for b in (1, 200)], [(1, 1), (200, 200)]
    points = {
        p.kind: [Point(a, b, float(b)) for a, b in (ends if p.kind.square else grid)]
        for p in operators.timed
    }
    return table_of(points, per_node_us=2.0)


def test_the_limit_and_the_estimate_agree_and_a_plan_keeps_the_budget(net) -> None:
    _, groups, operators = net
    table, full = flat_table(operators), [group.width for group in groups]
    before = table_estimate(operators, table, full)
    limits = [latency_limit(operators, table, 0.6 * before.ms), *peak_limits(operators, 10**5)]
    rng = np.random.default_rng(0)
    scores = [rng.uniform(size=width) for width in full]
    found = solve_exact(width_problem(scores, [4] * len(scores), 0.1, limits))
    after = table_estimate(operators, table, found.counts)
    assert found.spent["latency"] == pytest.approx(after.ms) and after.ms <= 0.6 * before.ms
    assert 0 < found.spent["peak activations"] <= 10**5
    assert found.gap <= 1e-6 and after.source == "table"


def test_a_missed_budget_corrects_the_table(net) -> None:
    _, groups, operators = net
    full = [group.width for group in groups]
    table = flat_table(operators)
    predicted = table_estimate(operators, table, full).ms
    again = corrected(table, predicted, 1.3 * predicted)
    assert table_estimate(operators, again, full).ms == pytest.approx(1.3 * predicted)


def test_a_roofline_says_that_it_is_an_estimate_and_is_of_the_published_size() -> None:
    def conv(size: int, c_in: int, c_out: int, count: int, kernel: int = 3) -> list[PlacedOperator]:
        kind = OperatorKind("Conv", size, size, size, size, (kernel, kernel))
        return [PlacedOperator("", kind, Width(c_in), Width(c_out))] * count

    # The 3x3 and 1x1 convolutions of ResNet-50's four stages: 3.9 of its 4.1 GMACs
    layers = [
        operator
        for size, inner, blocks in ((56, 64, 3), (28, 128, 4), (14, 256, 6), (7, 512, 3))
        for operator in (
            conv(size, inner, inner, blocks)
            + conv(size, 4 * inner, inner, blocks, 1)
            + conv(size, inner, 4 * inner, blocks, 1)
        )
    ]
    operators = Operators(tuple(layers), 0, ())
    orin = load_target("jetson-agx-orin-64gb")
    found = roofline(operators, orin, [], precision="int8")
    assert "not measured" in found.said() and found.source == "roofline"
    assert found.ms - found.error_ms <= 0.64 <= found.ms + found.error_ms  # MLPerf v3.1, int8
    with pytest.raises(DeviceError, match="lacks the peak rate or the memory bandwidth"):
        roofline(operators, load_target("x86-64-cpu"), [])


def test_profile_measures_a_recipe_and_says_what_it_found(tmp_path, capsys, monkeypatch) -> None:
    import platform

    from cli_run import make_project, run

    if platform.machine() != "x86_64":
        pytest.skip("measures for x86-64-cpu")
    recipe = make_project(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("secateur.flow.latency.WHOLE", replace_protocol())
    monkeypatch.setattr("secateur.flow.latency.ROUNDS", 3)
    out = tmp_path / "latency.json"
    code, said, _ = run(capsys, "profile", recipe, "--out", out, "--json")
    assert code == 0, said
    summary = json.loads(said)
    table = load_table(out)
    assert summary["points"] == sum(len(points) for points in table.points.values()) > 30
    assert table.runtime == runtime.version() and table.threads == 1
    monkeypatch.setattr(runtime, "version", lambda: "onnxruntime 0.0")
    code, said, _ = run(capsys, "profile", recipe, "--out", out, "--json")
    assert code == 2 and "this machine has onnxruntime 0.0" in json.loads(said)["error"]


def replace_protocol():
    from secateur.bench.latency import Protocol

    return Protocol(warmup_ms=1, seconds=0.01, runs=3)


def test_plans_keep_every_budget_of_the_recipe_and_correct_a_missed_latency(
    tmp_path, monkeypatch
) -> None:
    from cli_run import RECIPE, make_project
    from secateur.flow import budgets
    from secateur.flow.cache import StageCache
    from secateur.flow.job import open_job
    from secateur.flow.recipe import load_recipe
    from secateur.prune.costs import params_limit

    monkeypatch.syspath_prepend(str(tmp_path))
    wanted = "{latency_ms: 0.1, params: 0.9, peak_memory_mb: 0.12}"
    recipe = make_project(tmp_path, RECIPE.replace("{macs: 0.5}", wanted))
    job = open_job(load_recipe(recipe), StageCache(tmp_path / "c"))
    target = load_target("x86-64-cpu")
    groups = find_groups(job.selected, job.example)
    onnx = budgets.exported(job, job.selected, job.parent_key)
    operators = list_operators(onnx, layer_widths(job.selected, groups))
    full = [group.width for group in groups]
    table = flat_table(operators)
    table = table.scaled(0.12 / table_estimate(operators, table, full).ms)

    def machine(job, target, planned, protocol) -> float:
        """A machine that takes 1.3 times as long as the table says, and a ms for the parent."""
        counts = [len(cut.kept) for cut in planned.plan.cuts]
        return 1.3 * table_estimate(operators, table, counts).ms

    monkeypatch.setattr(budgets, "profile_job", lambda *_: table)
    monkeypatch.setattr(budgets, "parent_ms", lambda *_: 1.0)
    monkeypatch.setattr(budgets, "_measured_share", machine)
    planned = budgets.plan_within(job, target)
    counts = [len(cut.kept) for cut in planned.plan.cuts]
    assert 0.7 * 0.1 <= machine(job, target, planned, None) <= 0.1
    params = params_limit(job.selected, groups, 0)
    assert params.total(counts) <= 0.9 * params.total(full)
    assert max(limit.total(counts) for limit in peak_limits(operators, 0)) <= 0.12e6
    monkeypatch.setattr(budgets, "_measured_share", lambda *_: 0.1001)
    job = replace(job, cache=StageCache(tmp_path / "d"))  # with no earlier measure
    with pytest.raises(PlanError, match=r"no plan met the budget of 0\.1 ms in 4 tries"):
        budgets.plan_within(job, target)
