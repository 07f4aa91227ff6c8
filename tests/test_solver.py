"""The planner of widths: nothing beats what it calls the best, and no limit is passed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import SPEC, tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from secateur.core.channels import ChannelGroup
from secateur.core.errors import PlanError
from secateur.core.model import parameter_count
from secateur.core.plan import PrunePlan
from secateur.core.widths import Width
from secateur.prune import apply_plan, count_macs, find_groups, macs_model, plan_prune, plan_widths
from secateur.prune.costs import macs_limit, params_limit, task_limits, width_problem
from secateur.prune.elimination import Elimination
from secateur.prune.exact import solve_exact, solve_greedy
from secateur.prune.macs import MacsModel
from secateur.prune.plan import Budget
from secateur.prune.problem import ONE, Limit, Problem, Term, Totals, by_count, product

EXAMPLE = SPEC.example()


def stairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A latency in steps of four channels, as runtimes have it; not a product of anything."""
    return np.outer(np.ceil(first / 4), 1 + np.ceil(second / 4)) * 0.37 + 0.11


def random_problem(seed: int, share: float) -> Problem:
    """A net of 3 to 5 groups: a chain, a residual sum, a concat, with four kinds of limits."""
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(3, 6))
    full = [int(rng.integers(2, 5)) * 4 for _ in range(groups)]
    widths = tuple(tuple(range(width, 0, -4)) for width in full)
    scores = [np.sort(rng.uniform(size=width))[::-1] for width in full]
    lost = tuple(
        tuple(float(score[k:].sum()) for k in ks) for score, ks in zip(scores, widths, strict=True)
    )
    single = [Width(0, ((g, 1),)) for g in range(groups)]
    reads = [Width(3), *single[:-1]]
    reads[2] = single[0] + single[1]  # a concat
    macs = tuple(
        Term(first, second, product(float(rng.integers(1, 9))))
        for first, second in zip(reads, single, strict=True)
    )
    slow = tuple(Term(term.first, term.second, stairs) for term in macs)
    peak = (Term(single[0] + single[1], ONE, product(1.0)),)
    task = tuple(
        Term(
            single[g],
            ONE,
            by_count(np.cumsum(rng.uniform(size=full[g] + 1))[::-1]),  # falls as more is kept
        )
        for g in range(groups)
    )
    free = [Limit(name, np.inf, terms) for name, terms in
            (("macs", macs), ("latency_ms", slow), ("memory", peak), ("task", task))]  # fmt: skip
    limits = []
    for limit in free:
        most, least = limit.total(full), limit.total([4] * groups)
        if limit.name == "task":
            most, least = least, most
            limits.append(Limit(limit.name, least + 0.8 * (most - least), limit.terms))
        else:
            limits.append(Limit(limit.name, least + share * (most - least), limit.terms))
    return Problem(widths, lost, tuple(limits))


def brute_force(problem: Problem) -> float | None:
    """The least loss over every choice that passes no limit."""
    best = None
    for at in itertools.product(*(range(len(widths)) for widths in problem.widths)):
        counts = problem.counts(at)
        if all(limit.total(counts) <= limit.most for limit in problem.limits):
            best = min(problem.objective(at), np.inf if best is None else best)
    return best


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 1.0))
@example(seed=400, share=0.75)  # the best choice spends a limit to the last bit
@example(seed=1, share=0.9999999999999999)  # the parent passes its limits by one bit
def test_nothing_beats_the_exact_choice(seed: int, share: float) -> None:
    problem = random_problem(seed, share)
    wanted = brute_force(problem)
    if wanted is None:
        with pytest.raises(PlanError):
            solve_exact(problem)
        return
    found = solve_exact(problem)
    assert found.objective == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    assert found.bound <= wanted + 1e-9
    assert found.gap is not None and found.gap <= 1e-6
    for limit in problem.limits:
        assert found.spent[limit.name] == limit.total(found.counts) <= limit.most


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.1, 1.0))
def test_the_greedy_baseline_holds_the_limits_and_never_beats_the_exact(
    seed: int, share: float
) -> None:
    problem = random_problem(seed, share)
    try:
        baseline = solve_greedy(problem)
    except PlanError:
        return
    assert all(baseline.spent[limit.name] <= limit.most for limit in problem.limits)
    assert solve_exact(problem).objective <= baseline.objective + 1e-9


def test_the_same_input_gives_the_same_plan() -> None:
    problem = random_problem(7, 0.4)
    assert solve_exact(problem) == solve_exact(problem)


def test_an_impossible_budget_says_the_least() -> None:
    width = Width(0, ((0, 1),))
    limit = Limit("MACs", 5e6, (Term(width, Width(10), product(1e5)),), unit="M", scale=1e-6,
                  key="prune.budget.macs")  # fmt: skip
    problem = Problem(((32, 16, 8),), ((0.0, 1.0, 2.0),), (limit,))
    for solve in (solve_exact, solve_greedy):
        with pytest.raises(PlanError, match=r"budget of 5 M for MACs .* reach: 8 M"):
            solve(problem)


def test_limits_that_exclude_one_another_are_told() -> None:
    width = Width(0, ((0, 1),))
    small = Limit("params", 12, (Term(width, ONE, product(1.0)),))
    floor = Limit("task", 1, (Term(width, ONE, by_count([9.0] * 16 + [0.0])),))
    problem = Problem(((16, 8),), ((0.0, 1.0),), (small, floor))
    with pytest.raises(PlanError, match="each of these can be met alone"):
        solve_exact(problem)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_elimination_finds_the_minimum_and_every_marginal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [int(n) for n in rng.integers(1, 4, 5)]
    scopes = [(0,), (0, 1), (1, 2), (0, 2), (3, 4), (2, 3)][: int(rng.integers(2, 7))]
    tables = [rng.uniform(size=[sizes[v] for v in scope]) for scope in scopes]
    total = np.zeros(sizes)
    for scope, table in zip(scopes, tables, strict=True):
        total = total + table.reshape([n if v in scope else 1 for v, n in enumerate(sizes)])
    order = Elimination(sizes, scopes)
    value, at = order.minimise(tables)
    assert value == pytest.approx(total.min()) == total[tuple(at)]
    for variable, marginal in enumerate(order.marginals(tables)):
        others = tuple(v for v in range(5) if v != variable)
        assert np.allclose(marginal, total.min(axis=others))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_limits_of_a_net_count_what_the_cut_net_has(seed: int) -> None:
    model = tiny_model()
    groups = find_groups(model, EXAMPLE)
    cost = macs_model(model, groups, EXAMPLE)
    rng = np.random.default_rng(seed)
    counts = [int(rng.integers(1, group.width + 1)) for group in groups]
    scores = {group.name: rng.uniform(size=group.width) for group in groups}
    plan = plan_widths(groups, cost, scores, counts, Budget(1.0), per_task={"any": scores},
                       criterion="-", fusion="-")  # fmt: skip
    cut = apply_plan(model, groups, plan)
    assert macs_limit(cost, 0).total(counts) == count_macs(cut, EXAMPLE)
    assert params_limit(model, groups, 0).total(counts) == parameter_count(cut)
    ordered = [scores[group.name] for group in groups]
    (floor,) = task_limits(ordered, {"any": ordered}, {"any": 0.3})
    assert floor.total(counts) == pytest.approx(plan.lost["any"]) and floor.most == 0.7


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_running_totals_are_those_of_the_limits(seed: int) -> None:
    problem, rng = random_problem(seed, 0.5), np.random.default_rng(seed)
    totals = Totals(problem)
    for _ in range(10):
        at = [int(rng.integers(len(widths))) for widths in problem.widths]
        counts = problem.counts(at)
        assert totals(at) == [limit.total(counts) for limit in problem.limits]


def two_task_net() -> tuple[tuple[ChannelGroup, ...], MacsModel, dict, dict]:
    """A net, and scores by which "loud" needs what "quiet" does not."""
    model = tiny_model(width=32)
    groups = find_groups(model, EXAMPLE)
    rng = np.random.default_rng(0)
    loud = {group.name: np.sort(rng.lognormal(size=group.width)) for group in groups}
    quiet = {name: values[::-1] for name, values in loud.items()}
    fused = {name: loud[name] + 0.01 * quiet[name] for name in loud}
    return groups, macs_model(model, groups, EXAMPLE), fused, {"loud": loud, "quiet": quiet}


def test_a_tasks_floor_binds() -> None:
    groups, cost, fused, per_task = two_task_net()

    def planned(floors: dict[str, float]) -> PrunePlan:
        return plan_prune(groups, cost, fused, per_task, Budget(0.4, 4, 0.1), criterion="-",
                          fusion="-", floors=floors)  # fmt: skip

    free, held = planned({"loud": 0.01}), planned({"quiet": 0.8})
    assert free.lost["quiet"] > 0.2 >= held.lost["quiet"]
    assert held.solver == "exact"
    assert held.macs_after <= held.budget_macs
    assert planned({"quiet": 0.8}) == held
    with pytest.raises(PlanError, match=r"no choice of widths was found for all: MACs <= .*"
                       r"importance of task 'quiet' lost <= 1 %"):  # fmt: skip
        planned({"quiet": 0.99})


def test_the_greedy_baseline_keeps_a_floor() -> None:
    groups, cost, fused, per_task = two_task_net()
    ordered = {task: [own[g.name] for g in groups] for task, own in per_task.items()}
    scores = [fused[group.name] for group in groups]
    limits = [macs_limit(cost, cost.macs([g.width for g in groups]) // 2),
              *task_limits(scores, ordered, {"quiet": 0.3})]  # fmt: skip
    problem = width_problem(scores, [4] * len(groups), 0.1, limits)
    baseline = solve_greedy(problem)
    assert all(baseline.spent[limit.name] <= limit.most for limit in limits)
    assert solve_exact(problem).objective <= baseline.objective


def test_a_plan_says_who_made_it_and_how_far_from_the_best_it_may_be() -> None:
    groups, cost, fused, per_task = two_task_net()

    def planned(**options) -> PrunePlan:
        return plan_prune(groups, cost, fused, per_task, Budget(0.4, 4, 0.1), criterion="-",
                          fusion="-", **options)  # fmt: skip

    exact = planned(limits=[macs_limit(cost, planned().budget_macs)])
    greedy = planned(bounded=True)
    assert exact.solver == "exact" and exact.gap == pytest.approx(0, abs=1e-6)
    assert greedy.solver == "greedy" and 0 < greedy.gap < 1
    assert planned().gap is None  # without being asked
    assert PrunePlan.from_json(greedy.to_json()) == greedy
    older = {k: v for k, v in greedy.to_json().items() if k not in ("solver", "gap")}
    assert PrunePlan.from_json(older).gap is None


def test_a_real_net_is_planned_to_proven_optimality_and_better_than_greedily() -> None:
    model = tiny_model(width=64)
    groups = find_groups(model, EXAMPLE)
    cost = macs_model(model, groups, EXAMPLE)
    full = [group.width for group in groups]
    rng = np.random.default_rng(0)
    scores = [rng.lognormal(rng.normal(), 1, size=width) for width in full]
    limits = [macs_limit(cost, cost.macs(full) * 2 // 5),
              params_limit(model, groups, parameter_count(model) * 7 // 10),
              *task_limits(scores, {"any": scores}, {"any": 0.5})]  # fmt: skip
    problem = width_problem(scores, [8] * len(scores), 0.1, limits)
    exact, baseline = solve_exact(problem), solve_greedy(problem)
    assert exact.gap <= 1e-6 and exact.objective < baseline.objective
    assert all(exact.spent[limit.name] <= limit.most for limit in limits)
    assert all(k % 8 == 0 for k, width in zip(exact.counts, full, strict=True) if k < width)
