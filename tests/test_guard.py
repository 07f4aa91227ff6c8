"""The guard's search, on judges made up in front of the reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from secateur.lower.quant.bisect import bisect_noise
from secateur.lower.quant.guard import Assignment, Guarded, guard
from secateur.lower.quant.units import Unit

Damage = Mapping[str, Mapping[str, float]]  # per task and unit: percent lost when it is int8


def units(*costs: int, heads: int = 0) -> list[Unit]:
    """Units u0, u1 … of these costs; the last ``heads`` end heads."""
    ends = len(costs) - heads
    return [Unit(f"u{i}", f"layer{i}", "Conv", cost, cost, i >= ends)
            for i, cost in enumerate(costs)]  # fmt: skip


def additive(damage: Damage) -> Callable[[Assignment], dict[str, float]]:
    def judge(assignment: Assignment) -> dict[str, float]:
        return {task: -sum(lost for name, lost in of_task.items() if assignment[name] == "int8")
                for task, of_task in damage.items()}  # fmt: skip

    return judge


def guarded(
    found: list[Unit], limits: Mapping[str, float], damage: Damage, **options: int
) -> tuple[Guarded, list[Assignment]]:
    asked: list[Assignment] = []

    def judge(assignment: Assignment) -> dict[str, float]:
        asked.append(assignment)
        return additive(damage)(assignment)

    result = guard(found, limits, judge, lambda: damage, low="int8", high=lambda _: "fp32",
                   **options)  # fmt: skip
    return result, asked


def kept(result: Guarded) -> set[str]:
    return {name for name, precision in result.assignment.items() if precision == "fp32"}


def test_what_passes_is_not_searched() -> None:
    found = units(10, 10, 10)
    result = guard(
        found, {"depth": 1.0}, additive({"depth": {"u0": 0.9, "u1": 0, "u2": 0}}),
        lambda: pytest.fail("nothing to search"), low="int8", high=lambda _: "fp32",
    )  # fmt: skip
    assert result.passed and result.evaluations == 1 and kept(result) == set()


@pytest.mark.parametrize("culprit", [0, 17, 39])
def test_a_planted_culprit_is_found_and_nothing_else_is_kept(culprit: int) -> None:
    found = units(*[100] * 40)
    name = f"u{culprit}"
    damage = {
        "seg": {unit.name: 0.01 for unit in found} | {name: 12.0},
        "room": {unit.name: 0.01 for unit in found},
    }
    result, asked = guarded(found, {"seg": 1.0, "room": 1.0}, damage)
    assert result.passed and kept(result) == {name} and result.why == {name: "seg"}
    assert len(asked) == result.evaluations <= 4


def test_each_task_has_its_own_culprit() -> None:
    found = units(*[100] * 30)
    none = dict.fromkeys((unit.name for unit in found), 0.0)
    damage = {"seg": none | {"u3": 5.0}, "depth": none | {"u20": 7.0}}
    result, _ = guarded(found, {"seg": 1.0, "depth": 1.0}, damage)
    assert result.why == {"u3": "seg", "u20": "depth"}


def test_of_two_remedies_the_cheaper_one_is_taken() -> None:
    # Either u0 alone or u1 alone brings the task within its limit; u1 costs a tenth.
    found = units(1000, 100, 10, 10, 10)
    damage = {"seg": {"u0": 3.0, "u1": 2.9, "u2": 0.1, "u3": 0.1, "u4": 0.1}}
    result, _ = guarded(found, {"seg": 4.0}, damage)
    assert result.passed and kept(result) == {"u1"}


def test_ends_of_heads_stay_and_say_so() -> None:
    result, asked = guarded(units(5, 5, 5, heads=2), {}, {"seg": dict.fromkeys(["u0"], 99.0)})
    assert kept(result) == {"u1", "u2"} and result.why == {"u1": "head", "u2": "head"}
    assert len(asked) == 1  # a task without a limit has none to break


def test_where_nothing_passes_all_is_kept_and_said_to_fail() -> None:
    def judge(assignment: Assignment) -> dict[str, float]:
        return {"seg": -9.0}

    found = units(*[10] * 20)
    even = {"seg": dict.fromkeys((unit.name for unit in found), 1.0)}
    result = guard(found, {"seg": 1.0}, judge, lambda: even, low="int8", high=lambda _: "fp32")
    assert not result.passed and len(kept(result)) == 20 and result.change == {"seg": -9.0}


def test_nan_does_not_pass() -> None:
    def judge(assignment: Assignment) -> dict[str, float]:
        return {"seg": 0.0 if assignment["u0"] == "fp32" else float("nan")}

    result = guard(units(1, 1), {"seg": 1.0}, judge, lambda: {"seg": {"u0": 1, "u1": 0}},
                   low="int8", high=lambda _: "fp32")  # fmt: skip
    assert result.passed and kept(result) == {"u0"}


@given(st.data())
def test_whatever_the_judge_the_result_passes_within_the_evaluations(data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(0, 1000), min_size=1, max_size=25))
    found = units(*costs, heads=data.draw(st.integers(0, len(costs))))
    lost = st.floats(0, 5)
    tasks = ["seg", "depth"]
    damage = {task: {u.name: data.draw(lost) for u in found} for task in tasks}
    seen = {task: {u.name: data.draw(lost) for u in found} for task in tasks}  # no better than luck
    limits = {task: data.draw(st.floats(0, 20)) for task in tasks}
    most = data.draw(st.integers(2, 30))
    asked: list[Assignment] = []

    def judge(assignment: Assignment) -> dict[str, float]:
        asked.append(assignment)
        return additive(damage)(assignment)

    result = guard(found, limits, judge, lambda: seen, low="int8", high=lambda _: "fp16",
                   evaluations=most)  # fmt: skip
    assert len(asked) == result.evaluations <= most
    assert result.passed and result.change == additive(damage)(result.assignment)
    assert all(-result.change[task] <= limits[task] for task in tasks)
    high = {name for name, precision in result.assignment.items() if precision == "fp16"}
    assert {unit.name for unit in found if unit.ends_head} <= high == set(result.why)
    # With evaluations to spare, giving up any one unit that is worth it breaks a limit.
    if result.evaluations < most - 1:
        for unit in found:
            if unit.name in high and not unit.ends_head and unit.cost >= sum(costs) / 1000 > 0:
                change = additive(damage)({**result.assignment, unit.name: "int8"})
                assert any(-change[task] > limits[task] for task in tasks)


# -- bisection


@given(st.data())
def test_bisection_finds_every_loud_node_and_no_quiet_one(data: st.DataObject) -> None:
    names = [f"n{i}" for i in range(data.draw(st.integers(1, 80)))]
    loud = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    task_of = {name: data.draw(st.sampled_from(["seg", "depth"])) for name in loud}
    asked = []

    def noise(part: Sequence[str]) -> dict[str, float]:
        asked.append(tuple(part))
        return {task: 1e-6 * len(part) + sum(task_of.get(name) == task for name in part)
                for task in ("seg", "depth")}  # fmt: skip

    found = bisect_noise(names, noise)
    named = {culprit.nodes[0]: culprit.task for culprit in found.culprits}
    assert named == task_of and len(asked) == found.evaluations <= 64
    assert {culprit.nodes for culprit in found.culprits} == {(name,) for name in loud}


def test_bisection_stops_when_it_has_asked_enough() -> None:
    names = [f"n{i}" for i in range(64)]
    found = bisect_noise(names, lambda part: {"seg": float(len(part))}, least=0.0, evaluations=9)
    assert found.evaluations == 9
    assert sorted(name for c in found.culprits for name in c.nodes) == sorted(names)


def test_without_an_error_nothing_is_blamed() -> None:
    assert bisect_noise(["a", "b"], lambda part: {"seg": 0.0}).culprits == ()
    assert bisect_noise([], lambda part: {"seg": 0.0}).culprits == ()


@pytest.mark.parametrize("count", [3, 24, 40, 100])
def test_an_error_that_lies_evenly_is_that_of_stretches(count: int) -> None:
    names = [str(number) for number in range(count)]
    found = bisect_noise(names, lambda part: {"seg": 0.02 * len(part) / count})
    named = [node for culprit in found.culprits for node in culprit.nodes]
    assert len(named) == len(set(named)) > count / 2  # a rest of less than LEAST_SHARE is dropped
    assert sum(culprit.share for culprit in found.culprits) == pytest.approx(len(named) / count)
