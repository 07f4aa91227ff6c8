"""Instructions of operators: how they are counted, tables of them, budgets and choices by them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_run import RECIPE, make_project, run
from secateur.bench.profile import Sampling
from secateur.core.errors import DeviceError, SecateurError
from secateur.devices.counted import Counted
from secateur.devices.latency_table import LatencyTable, load_table, save_table
from secateur.devices.profiled import NetworkTimes, ToldNetwork, ToldNode, read_networks
from secateur.devices.target import load_target

PI = "raspberry-pi-5"


def node(name: str, us: float, reads: list[int], makes: list[int]) -> ToldNode:
    return ToldNode(name=name, us=[us], reads=[reads], makes=[makes])


# Two operators of 500 and 2000 microseconds, and a change of layout between them.
NODES = [
    node("conv", 500, [1, 3], [1, 8]),
    node("reorder", 10, [1, 8], [1, 8]),
    node("mul_nchwc", 2000, [1, 8], [1, 4]),
]
NETWORK = ToldNetwork(
    run_us=[1.0], nodes=NODES, sequence=[(each.name, each.us[0]) for each in NODES]
)


def lines(counts: Sequence[tuple[str, int, int]]) -> str:
    return "".join(f"secateur:{kind} {first} {second}\n" for kind, first, second in counts)


def clock(count: int, microseconds: float) -> tuple[str, int, int]:
    return "clock", count, int(1000 * microseconds)


RUN = [
    clock(7, 0), ("mark", 0, 1000), clock(1500, 1), ("mark", 1, 9000), ("mark", 2, 10_000),
    clock(10_100, 100), clock(10_200, 105),  # before the first operator
    clock(10_300, 110), clock(13_300, 610), clock(13_400, 700), clock(13_500, 710),
    clock(13_600, 800), clock(20_600, 2800), clock(20_700, 2900), ("mark", 3, 21_000),
]  # fmt: skip


def test_the_instructions_between_two_readings_of_the_clock_are_the_operators() -> None:
    counted = Counted(lines(RUN), [NETWORK])
    (times,) = counted.operators({"conv": "a", "mul": "b"})
    assert times.run_us.tolist() == [8.0]  # thousands, without the traces
    # the change of layout goes to the operator whose result it takes
    assert {place: float(each[0]) for place, each in times.places_us.items()} == {
        "a": 3.0 + 0.1, "b": 7.0,
    }  # fmt: skip


def test_a_run_whose_clock_was_not_read_is_refused() -> None:
    silent = [each for each in RUN if each[0] == "mark"]
    with pytest.raises(DeviceError, match="clock was read 0 times in a run of 3 operators"):
        Counted(lines(silent), [NETWORK]).operators({})


def test_whole_runs_are_the_marks_differences() -> None:
    marks = [("mark", 0, 100), ("mark", 1, 350), ("mark", 2, 400), ("mark", 3, 1000)]
    assert Counted(lines(marks), [NETWORK, NETWORK]).wholes() == [250, 600]


NODE = '{"name": "a", "us": [1.0], "reads": [], "makes": []}'


@pytest.mark.parametrize("text", ["{", "[]", '[{"run_us": [-1], "nodes": []}]',
                                  '[{"run_us": [], "nodes": []}]', "[" * 100_000,
                                  f'[{{"run_us": [1, 2], "nodes": [{NODE}]}}]'])  # fmt: skip
def test_what_a_device_says_of_operators_is_checked(tmp_path: Path, text: str) -> None:
    (tmp_path / "result").write_text(text)
    with pytest.raises(DeviceError, match="about its operators is not valid") as stop:
        read_networks(tmp_path / "result", "ssh://board", 1)
    assert stop.value.message.isprintable()


# -- planned by


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose budget is most of the parent's instructions."""
    monkeypatch.syspath_prepend(str(tmp_path))
    half = RECIPE.replace("budget: {macs: 0.5}, search: {tries: 3, images: 8}",
                          "budget: {instructions: 0.8}, grid: 8, search: false")  # fmt: skip
    make_project(tmp_path, half)
    return tmp_path


def made_table(project: Path) -> LatencyTable:
    """A table of the project's operators on a machine that counts weights and values."""
    from secateur.flow.axes import turn_axes
    from secateur.flow.cache import StageCache
    from secateur.flow.job import open_job
    from secateur.flow.latency import profile_job
    from secateur.flow.meters import Meter
    from secateur.flow.recipe import load_recipe

    def operators(
        models: Sequence[bytes], places: Mapping[str, str], rounds: int
    ) -> list[NetworkTimes]:
        found = []
        for model in models:
            graph = onnx.load_from_string(model).graph
            sizes = {each.name: int(np.prod(each.dims)) for each in graph.initializer}
            each = dict.fromkeys(places.values(), np.array([1.0]))
            for node in graph.node:
                if node.name in places:
                    weights = sum(sizes.get(name, 0) for name in node.input) / 2
                    each[places[node.name]] = each[places[node.name]] + weights
            found.append(NetworkTimes(np.array([float(sum(v[0] for v in each.values()))]), each))
        return found

    job = turn_axes(open_job(load_recipe(project / "recipe.yaml"), StageCache(project / "c")))
    few = Sampling(rounds=1, batch=8, fewest=4, most=4)
    meter = Meter(operators, "onnxruntime 1", {"cpu": "x"}, 1, few, "million instructions")
    return profile_job(job, load_target(PI), project / "t.json", meter)


def test_a_budget_in_instructions_is_planned_by_their_table(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = made_table(project)
    assert load_table(project / "t.json") == table and table.unit == "million instructions"
    words = [project / "recipe.yaml", "--target", PI, "--table", project / "t.json",
             "--cache", project / "c"]  # fmt: skip
    code, out, err = run(capsys, "plan", *words, "--json")
    assert code == 0, out + err
    budget = json.loads(out)["budgets"]["instructions"]
    assert budget["how"] == "table" and 0.5 < budget["planned"] <= 0.8
    assert budget["unit"] == "of the parent's instructions"
    estimate = json.loads(out)["latency_estimate"]
    assert estimate["unit"] == "million instructions"
    assert estimate["plan"]["ms"] / estimate["parent"]["ms"] == pytest.approx(
        budget["planned"], rel=0.05
    )
    code, out, _ = run(capsys, "plan", *words)
    assert code == 0 and "a proxy and no latency" in out.replace("\n", " ")


@pytest.mark.parametrize(
    ("budget", "unit", "said"),
    [
        ("{instructions: 0.5}", "ms", "is in ms, and the budget is prune.budget.instructions"),
        ("{latency_ms: 1}", "million instructions", "in million instructions, and the budget is"),
        ("{latency_ms: 1, instructions: 0.5}", "ms", "latency_ms and instructions"),
        ("{instructions: 1.5}", "ms", "instructions"),
    ],
)
def test_budgets_and_tables_that_do_not_fit_are_one_sentence(
    project: Path, capsys: pytest.CaptureFixture[str], budget: str, unit: str, said: str
) -> None:
    recipe = project / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("{instructions: 0.8}", budget))
    threads = 4 if unit == "ms" else 1
    table = LatencyTable("onnxruntime 1", threads, {"cpu": "x"}, {}, unit=unit)  # type: ignore[arg-type]
    save_table(project / "t.json", table)
    code, _, err = run(capsys, "plan", recipe, "--target", PI, "--table", project / "t.json",
                       "--cache", project / "c")  # fmt: skip
    assert code == 2 and said in err.replace("\n", " ")


def test_where_nothing_can_be_counted_a_hint_says_what_to_do(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    words = ("plan", project / "recipe.yaml", "--cache", project / "c", "--target")
    code, _, err = run(capsys, *words, PI)
    assert code == 2 and "qemu-aarch64" in err and "apt install qemu-user" in err
    code, _, err = run(capsys, *words, "x86-64-cpu")
    assert code == 2 and "no emulated CPU stands in for x86-64-cpu" in err
    code, _, err = run(capsys, "profile", project / "recipe.yaml", "--target", PI)
    assert code == 2 and "--device ssh://[user@]host or emulated" in err.replace("\n", " ")


# -- the real thing: minutes


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip where no userland can be prepared; few networks are counted."""
    from secateur.flow.emulated import prepared_userland

    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path_factory.getbasetemp() / "counting"))
    monkeypatch.setattr("secateur.flow.meters.COUNTING", Sampling(1, 3, 1, 1))
    try:
        prepared_userland()
    except SecateurError as error:
        pytest.skip(f"no aarch64 userland here: {error}")


@pytest.mark.slow
def test_operators_are_counted_under_emulation_and_a_plan_keeps_its_instructions(
    counting: None, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = project / "pi.json"
    recipe = project / "recipe.yaml"
    code, out, err = run(capsys, "profile", recipe, "--target", PI, "--device", "emulated",
                         "--out", table, "--cache", project / "c", "--json")  # fmt: skip
    assert code == 0, out + err
    summary, found = json.loads(out), load_table(table)
    assert summary["unit"] == "million instructions (a proxy, no latency)"
    assert "cortex-a76" in found.host["cpu"] and found.threads == 1
    whole = found.runs[1].ms  # the full one: its operators are what it consists of
    operators = sum(points[1].microseconds for points in found.points.values()) / 1000
    assert 0.5 * whole < operators < 1.5 * whole
    code, out, err = run(capsys, "plan", recipe, "--target", PI, "--table", table,
                         "--cache", project / "c", "--json")  # fmt: skip
    assert code == 0, out + err
    assert json.loads(out)["budgets"]["instructions"]["planned"] <= 0.8


@pytest.fixture
def auto(project: Path) -> Iterator[Path]:
    recipe = project / "recipe.yaml"
    text = RECIPE.replace("depth}", "depth, max_drop: 90}").replace("recover:    {epochs: 1}\n", "")
    recipe.write_text(f"{text}runtime: auto\nprecision: {{mode: auto, images: 8, guard: false}}\n")
    yield recipe


@pytest.mark.slow
def test_auto_takes_the_fewest_instructions_of_what_passes(
    counting: None, auto: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Not by "ncnn": benchmarks/ncnn may be found as a package of that name.
    pytest.importorskip("pnnx", reason="ncnn is absent: pip install '.[ncnn]'")
    code, out, err = run(capsys, "build", auto, "--target", PI, "--device", "emulated",
                         "--out", auto.parent / "out", "--cache", auto.parent / "c",
                         "--json")  # fmt: skip
    assert code in (0, 1), out + err
    (row,) = json.loads(out)
    choice = row["manifest"]["precision_choice"]
    counts = choice["million_instructions"]
    assert set(counts) | set(choice["too_low"]) == {
        "onnxruntime fp32", "onnxruntime fp16", "onnxruntime int8", "ncnn fp32", "ncnn fp16",
        "ncnn int8",
    }  # fmt: skip
    assert choice["chosen"] == min(counts, key=counts.get) and "no latency" in choice["why"]
    runtime, precision = choice["chosen"].split()
    assert (row["manifest"]["runtime"], row["manifest"]["precision"]) == (runtime, precision)
    assert row["counted"]["instructions"]["inference"] / 1e6 == pytest.approx(
        counts[choice["chosen"]], rel=0.05
    )
    assert run(capsys, "verify", row["bundle"])[0] == 0


def test_unmeasured_auto_keeps_the_targets_own_runtime_and_says_so(
    auto: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "build", auto, "--target", PI, "--out", auto.parent / "out",
                         "--cache", auto.parent / "c", "--json")  # fmt: skip
    assert code in (0, 1), out + err
    manifest = json.loads(out)[0]["manifest"]
    assert (manifest["runtime"], manifest["precision"]) == ("onnxruntime", "fp32")
    assert "--device ssh://" in manifest["precision_choice"]["why"]


def test_scale_and_unit_travel_together() -> None:
    table = LatencyTable("x", 1, {}, {}, unit="million instructions")
    assert replace(table, scale=2.0).scaled(1.5).unit == "million instructions"
