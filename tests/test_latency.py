"""Latency tables, how they are measured, and what is estimated from them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import SPEC, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur.bench.estimate import roofline, table_estimate
from secateur.bench.profile import OFFSETS, Narrowed, Sampling, fastest, measure_table
from secateur.core.channels import ChannelGroup
from secateur.core.errors import DeviceError, PlanError
from secateur.core.model import MultiTaskModel
from secateur.core.task import Task
from secateur.core.widths import Width
from secateur.devices.latency_table import (
    LatencyTable,
    Point,
    Run,
    Surface,
    channel_grid,
    load_table,
    save_table,
)
from secateur.devices.operators import OperatorKind, Operators, PlacedOperator
from secateur.devices.target import load_target
from secateur.flow.latency import corrected, latency_limit, peak_limits
from secateur.lower import export_onnx
from secateur.lower.operators import list_operators
from secateur.lower.quant import calibrate, emit, onnxruntime_x86, plan_quant
from secateur.lower.resized import Resized
from secateur.prune import apply_plan, find_groups, macs_model, plan_widths
from secateur.prune.costs import layer_widths, width_problem
from secateur.prune.exact import solve_exact
from secateur.prune.plan import Budget
from secateur.runtimes import onnxruntime as runtime
from secateur.zoo.compose import HeadSpec, compose

CONV = OperatorKind("Conv", 14, 14, 14, 14, (3, 3), detail="Relu")
DEPTHWISE = replace(CONV, groups=0)
EXAMPLE = SPEC.example()


def stairs(c_in: int, c_out: int) -> float:
    """What a runtime with blocks of 16 makes of a 3x3 convolution; microseconds."""
    return 5 + 0.01 * 16 * -(-c_in // 16) * 16 * -(-c_out // 16)


def table_of(points: dict[OperatorKind, list[Point]], **changes) -> LatencyTable:
    """A table of networks that take nothing beside their operators."""
    many = max((len(each) for each in points.values()), default=0)
    sums = [sum(each[at].microseconds for each in points.values() if at < len(each))
            for at in range(many)]  # fmt: skip
    runs = tuple(Run((), total / 1000) for total in sums)
    return LatencyTable(
        "onnxruntime 1.31.1", 1, {"cpu": "a test"},
        {kind: tuple(each) for kind, each in points.items()}, **{"runs": runs, **changes},
    )  # fmt: skip


def grid_points(inputs, outputs, cost=stairs) -> list[Point]:
    return [Point(a, b, cost(a, b)) for a in inputs for b in outputs]


@settings(max_examples=50, deadline=None)
@given(
    st.tuples(*[st.floats(0.01, 1)] * 4), st.integers(8, 128), st.integers(8, 128), st.booleans()
)
def test_what_is_bilinear_in_the_widths_is_known_everywhere(
    parts: tuple[float, ...], c_in: int, c_out: int, noisy: bool
) -> None:
    def cost(a: int, b: int) -> float:
        return 10 * parts[0] + parts[1] * a + parts[2] * b + parts[3] * a * b

    rng = np.random.default_rng(0)
    pairs = rng.integers(8, 129, (40, 2)).tolist()
    noise = rng.normal(1, 0.02 * noisy, 40)
    points = [Point(a, b, cost(a, b) * n) for (a, b), n in zip(pairs, noise, strict=True)]
    found = Surface(points).at(c_in, c_out)
    assert found == pytest.approx(cost(c_in, c_out), rel=0.15 if noisy else 1e-3)  # 0.1 in a corner


def test_an_operator_that_is_part_of_another_takes_nothing() -> None:
    points = [Point(c, c, 0.0) for c in (8, 16, 24)]
    assert (Surface(points).table(np.array([8, 20]), np.array([8])) == 0).all()


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    table = table_of({CONV: grid_points([16, 32], [16, 32]), DEPTHWISE: [Point(16, 16, 3.0)] * 4},
                     stairs=((4, 1.5), (8, 1.25)), parent_ms=2.0, scale=1.2)  # fmt: skip
    save_table(tmp_path / "t.json", table)
    assert load_table(tmp_path / "t.json") == table


def test_the_error_is_that_of_networks_predicted_before_they_were_measured() -> None:
    runs = (Run((8,), 10.0), Run((8,), 10.0, 11.0), Run((8,), 10.0, 8.0))
    assert table_of({}, runs=runs).error() == pytest.approx(0.15)
    assert np.isnan(table_of({}, runs=runs[:1]).error())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.check_runtime("onnxruntime 1.20.0"), "measured with onnxruntime 1.31.1, this"),
        (lambda t: t.surface(DEPTHWISE), "has no Conv.Relu 3x3/1 depth-wise at 14x14 fp32"),
        (lambda t: replace(t, runs=(*t.runs, t.runs[0])).surface(CONV), "has holes: 4 of 5 points"),
    ],
)  # fmt: skip
def test_a_table_that_does_not_fit_is_refused_in_one_sentence(spoil, message: str) -> None:
    with pytest.raises(DeviceError, match=message) as refusal:
        spoil(table_of({CONV: grid_points([16, 32], [16, 32])}))
    assert "secateur profile" in refusal.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot read"), ('{"schema": 1}', "of version 1, expected 2"),
     ('{"schema": 2, "entries": [{}]}', "not a whole latency table"),
     ('{"schema": 2, "entries": [], "runs": [], "stairs": [[4]], "host": {}}', "not a whole"),
     ('{"schema": 2, "entries": [], "runs": [], "stairs": [], "host": null}', "not a whole")],
)  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DeviceError, match=message):
        load_table(tmp_path / "t.json")


@pytest.mark.parametrize("block", [1, 4, 8, 16])
def test_the_channel_grid_is_the_block_that_the_times_show(block: int) -> None:
    line = tuple((more, 1.0 + (64 + -(-more // block) * block) ** 2 / 1000) for more in OFFSETS)
    assert channel_grid(table_of({}, stairs=line)) == block


class StairTimer:
    """Answers as a runtime of blocks would, and counts what it was asked."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked = 0
        self._stop_after = stop_after

    def __call__(self, models, rounds):
        times = []
        for data in models:
            self.asked += 1
            if self._stop_after is not None and self.asked > self._stop_after:
                raise KeyboardInterrupt
            c_in, c_out = json.loads(data)
            own = {"a": stairs(c_in, c_out), "b": 0.1 * c_out}
            times.append(runtime.NetworkTimes(
                np.full(rounds, sum(own.values()) + 7.0),
                {place: np.full(rounds, time) for place, time in own.items()},
            ))  # fmt: skip
        return times


PLACED = (
    PlacedOperator("a", replace(CONV, place="a"), Width(0, ((0, 1),)), Width(0, ((1, 1),))),
    PlacedOperator("b", replace(DEPTHWISE, place="b"), Width(0, ((1, 1),)), Width(0, ((1, 1),))),
)
NETWORK = Narrowed(
    Operators(PLACED, 0, ()), lambda kept: json.dumps(list(kept)).encode(), (16, 16), (160, 256),
    (8, 8),
)  # fmt: skip


def test_measuring_finds_steps_and_a_table_right_on_networks_it_never_saw() -> None:
    table = measure_table(NETWORK, StairTimer(), table_of({}), lambda _: None, Sampling(rounds=4))
    assert channel_grid(table) == 16
    assert table.fixed_us == pytest.approx(7.0)
    assert table.error() <= 0.02
    for kept in [(48, 80), (33, 100), (96, 150)]:
        wanted = stairs(*kept) + 0.1 * kept[1] + 7.0
        found = table_estimate(NETWORK.operators, table, kept).ms
        assert 1000 * found == pytest.approx(wanted, rel=0.04)


def test_groups_too_narrow_to_show_a_step_say_nothing_of_the_grid() -> None:
    narrow = replace(NETWORK, full=(24, 48))
    table = measure_table(narrow, StairTimer(), table_of({}), lambda _: None, Sampling(rounds=2))
    assert table.stairs == () and table.runs


def test_a_stopped_measurement_goes_on_where_it_was(tmp_path: Path) -> None:
    path, sampling = tmp_path / "t.json", Sampling(rounds=4)
    whole = StairTimer()
    expected = measure_table(NETWORK, whole, table_of({}), lambda _: None, sampling)
    with pytest.raises(KeyboardInterrupt):
        measure_table(
            NETWORK,
            StairTimer(stop_after=25),
            table_of({}),
            lambda t: save_table(path, t),
            sampling,
        )
    rest = StairTimer()
    resumed = measure_table(
        NETWORK, rest, load_table(path), lambda t: save_table(path, t), sampling
    )
    assert 0 < rest.asked < whole.asked - 8
    assert resumed == expected == load_table(path)


def test_times_are_the_fastest_quarter_with_their_spread() -> None:
    time, spread = fastest(np.array([10.0, 10, 11, 11, 12, 12, 13, 500]))
    assert 10 <= time <= 11 and 0 < spread < 0.2


@dataclass(frozen=True)
class Net:
    model: MultiTaskModel
    groups: tuple[ChannelGroup, ...]
    path: Path
    operators: Operators


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory):
    """The tiny model, its groups, its exported file and the operators read off that."""
    model = tiny_model()
    groups = find_groups(model, EXAMPLE)
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    export_onnx(model, EXAMPLE, path)
    return Net(model, groups, path, list_operators(path, layer_widths(model, groups)))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory):
    """A small transformer, its groups and its exported file."""
    torch.manual_seed(0)
    heads = {"seg": HeadSpec("segmentation", 4, width=16)}
    model = MultiTaskModel(
        compose("vit_tiny_patch16_224", heads, img_size=(32, 32), patch_size=8, embed_dim=48,
                depth=2, num_heads=3, out_indices=(0, 1)),
        (Task("seg", "seg", "segmentation", "segmentation", classes=4),),
    ).eval()  # fmt: skip
    path = tmp_path_factory.mktemp("onnx") / "vit.onnx"
    example = torch.zeros(1, 3, 32, 32)
    export_onnx(model, example, path)
    return model, find_groups(model, example), path


def quantised(path: Path, images: np.ndarray) -> Path:
    out = path.with_suffix(".int8.onnx")
    plan = plan_quant(path, calibrate(path, lambda: [images], "minmax"), {})
    emit(path, plan, onnxruntime_x86(), out)
    return out


def halves(groups) -> list[int]:
    return [max(1, group.width // 2) for group in groups]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_narrowed_file_runs_and_every_kernel_has_a_place_at_its_widths(
    vit, precision: str
) -> None:
    model, groups, path = vit
    if precision == "int8":
        path = quantised(path, np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype("f4"))
    widths, full = layer_widths(model, groups), [group.width for group in groups]
    operators, resized = list_operators(path, widths), Resized(path, widths, full)
    models = [resized.to(kept) for kept in (full, halves(groups))]
    assert len(models[1]) < 0.7 * len(models[0])
    for times in runtime.network_times(models, operators.places, 1, 3):
        timed = {p.name: p for p in operators.timed}
        assert times.places_us.keys() <= timed.keys() and times.run_us.shape == (3,)
        multiplied = [timed[name] for name in times.places_us
                      if timed[name].kind.operator in ("MatMul", "Softmax")]  # fmt: skip
        assert {p.made(halves(groups)) == p.made(full) for p in multiplied} == {False}
    ran = {p.kind.precision for p in operators.timed if p.kind.operator == "Conv"}
    assert ran == {precision}


def test_a_narrowed_file_has_the_weights_of_the_cut_model_exported(net, tmp_path: Path) -> None:
    model, groups, operators = net.model, net.groups, net.operators
    counts = [8 * (1 + number % 2) for number in range(len(groups))]
    scores = {group.name: np.arange(group.width, dtype=float) for group in groups}
    plan = plan_widths(groups, macs_model(model, groups, EXAMPLE), scores, counts, Budget(1.0),
                       per_task={}, criterion="-", fusion="-")  # fmt: skip
    cut = apply_plan(model, groups, plan)
    export_onnx(cut, EXAMPLE, tmp_path / "cut.onnx")
    full = [group.width for group in groups]
    narrowed = Resized(net.path, layer_widths(model, groups), full).to(counts)
    shapes = [
        sorted(tuple(t.dims) for t in each.graph.initializer if len(t.dims) in (1, 2, 4))
        for each in (onnx.load_from_string(narrowed), onnx.load(tmp_path / "cut.onnx"))
    ]
    assert shapes[0] == shapes[1]
    actual = list_operators(tmp_path / "cut.onnx", layer_widths(cut, []))

    def described(p: PlacedOperator, kept: list[int]):
        return replace(p.kind, place=""), p.read(kept), p.made(kept)

    wanted = {described(p, counts) for p in operators.timed if p.kind.macs(1, 1)}
    assert wanted == {described(p, []) for p in actual.timed}
    peaks = [
        max(sum(a(kept) * b(kept) * size for a, b, size in live) for live in each.live)
        for each, kept in ((operators, counts), (actual, []))
    ]
    assert peaks[0] == peaks[1]


def flat_table(operators: Operators) -> LatencyTable:
    """A table in which each operator takes a microsecond a channel made."""
    pairs = np.random.default_rng(0).integers(1, 200, (30, 2)).tolist()
    points = {p.kind: [Point(a, b, float(b)) for a, b in pairs] for p in operators.timed}
    return table_of(points)


def test_the_limit_and_the_estimate_agree_and_a_plan_keeps_the_budget(net) -> None:
    groups, operators = net.groups, net.operators
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
    groups, operators = net.groups, net.operators
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


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_profile_measures_a_recipe_and_says_what_it_found(
    tmp_path, capsys, monkeypatch, precision: str
) -> None:
    import platform

    from cli_run import RECIPE, make_project, run

    if platform.machine() != "x86_64":
        pytest.skip("measures for x86-64-cpu")
    recipe = make_project(tmp_path, f"{RECIPE}precision: {{mode: {precision}}}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    few = Sampling(rounds=2, batch=3, fewest=1, most=2)
    monkeypatch.setattr("secateur.flow.meters.SAMPLING", few)
    out = tmp_path / "latency.json"
    code, said, _ = run(capsys, "profile", recipe, "--out", out, "--json")
    assert code == 0, said
    summary = json.loads(said)
    table = load_table(out)
    assert summary["points"] == sum(len(points) for points in table.points.values()) > 30
    assert table.runtime == runtime.version() and table.threads == 1
    assert table.precision == precision
    assert table.host["target"] == "x86-64-cpu"
    one = recipe.with_name("one.yaml")
    one.write_text(recipe.read_text().replace("keep: [segmentation, depth]", "keep: [depth]"))
    code, said, _ = run(capsys, "profile", one, "--out", out, "--json")
    assert code == 2 and "was measured on another network" in json.loads(said)["error"]
    save_table(out, replace(table, host={**table.host, "cpu": "an abacus"}))
    code, said, _ = run(capsys, "profile", recipe, "--out", out, "--json")
    assert code == 2 and "measured on another cpu (an abacus, now " in json.loads(said)["error"]
    save_table(out, table)
    code, said, _ = run(capsys, "profile", recipe, "--out", out, "--target", "rtx-pc", "--json")
    assert code == 2 and "rtx-pc computes on its GPU" in json.loads(said)["error"]
    monkeypatch.setattr(runtime, "version", lambda: "onnxruntime 0.0")
    code, said, _ = run(capsys, "profile", recipe, "--out", out, "--json")
    assert code == 2 and "this machine has onnxruntime 0.0" in json.loads(said)["error"]


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
