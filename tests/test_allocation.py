"""The allocation search: stays within the budget, never ends worse than its starts."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import SPEC, TASKS, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur.data.loading import Batch
from secateur.flow.allocation import SearchSettings, judge_of, plan_by_search
from secateur.prune import apply_plan, count_macs, find_groups, macs_model, plan_prune
from secateur.prune.budget import ladders
from secateur.prune.costs import macs_limit
from secateur.prune.plan import Budget
from secateur.prune.search import search_counts

EXAMPLE = SPEC.example()


@settings(max_examples=20, deadline=None)
@given(share=st.floats(0.35, 0.9), seed=st.integers(0, 99))
def test_every_allocation_tried_is_on_the_ladder_and_within_the_budget(
    share: float, seed: int
) -> None:
    model = tiny_model()
    groups = find_groups(model, EXAMPLE)
    cost = macs_model(model, groups, EXAMPLE)
    rng = np.random.default_rng(seed)
    scores = {group.name: rng.uniform(0.1, 1, group.width) for group in groups}
    rungs = ladders([scores[group.name] for group in groups], [4] * len(groups), 0.1)
    plan = plan_prune(
        groups, cost, scores, {}, Budget(share, 4, 0.1, 0.5), criterion="-", fusion="-"
    )
    budget, tried = plan.budget_macs, []

    def judge(counts: list[int]) -> float:
        tried.append(tuple(counts))
        assert cost.macs(counts) <= budget
        assert all(k in r.widths for k, r in zip(counts, rungs, strict=True))
        return float(np.random.default_rng(sum(counts)).uniform())

    start = [len(cut.kept) for cut in plan.cuts]
    found = search_counts(rungs, cost, budget, [start], judge, tries=15, seed=seed)
    assert len(tried) == found.tries == 15
    assert found.counts in tried
    assert found.loss == min(judge(list(counts)) for counts in set(tried))
    assert found.loss <= found.start_loss


def test_the_search_finds_the_group_that_the_judge_cares_for() -> None:
    model = tiny_model()
    groups = find_groups(model, EXAMPLE)
    cost = macs_model(model, groups, EXAMPLE)
    scores = {group.name: np.ones(group.width) for group in groups}
    rungs = ladders(list(scores.values()), [4] * len(scores), 0.1)
    plan = plan_prune(groups, cost, scores, {}, Budget(0.5, 4, 0.1, 1.0), criterion="-", fusion="-")
    start = [len(cut.kept) for cut in plan.cuts]
    dear = min(range(len(start)), key=lambda g: start[g] / groups[g].width)
    found = search_counts(
        rungs, cost, plan.budget_macs, [start], lambda counts: -counts[dear], tries=60
    )
    assert found.counts[dear] > start[dear]


@pytest.mark.parametrize("labelled", [True, False])
def test_a_searched_plan_costs_what_it_says_with_labels_and_without(labelled: bool) -> None:
    model = tiny_model()
    groups = find_groups(model, EXAMPLE)
    cost = macs_model(model, groups, EXAMPLE)
    rng = np.random.default_rng(0)
    scores = {group.name: rng.uniform(0.1, 1, group.width) for group in groups}
    images = SPEC.example(8, seed=1)
    targets = {}
    if labelled:
        outputs = model(images)
        targets = {"depth": outputs["depth"][:, 0].detach().abs() + 0.1}
    plan = plan_by_search(
        model, groups, cost, scores, Budget(0.5, 4), images, Batch(images, targets, ()),
        SearchSettings(tries=6),
    )  # fmt: skip
    assert plan.macs_after <= plan.budget_macs
    assert count_macs(apply_plan(model, groups, plan), EXAMPLE) == plan.macs_after
    assert {task.name for task in TASKS} == {task.name for task in model.tasks}


def test_the_judge_likes_the_plan_that_keeps_what_the_outputs_need() -> None:
    model = tiny_model()
    groups = find_groups(model, EXAMPLE)
    cost = macs_model(model, groups, EXAMPLE)
    scores = {group.name: np.ones(group.width) for group in groups}
    images = SPEC.example(8, seed=1)
    judge = judge_of(model, images, Batch(SPEC.example(4, seed=2), {}, ()))
    wide, narrow = (
        plan_prune(groups, cost, scores, {}, Budget(share, 4, 0.1), criterion="-", fusion="-")
        for share in (0.9, 0.3)
    )
    judge(groups, narrow)  # without labels, losses are relative to the first
    assert judge(groups, wide) < 0.5 * judge(groups, narrow)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_exact_planner_of_sharp_sums_keeps_the_highest_scores(share: float) -> None:
    """A plain sum gives up the best channel of a dear group for many poor ones; a sharp one not."""
    model = tiny_model()
    groups = find_groups(model, EXAMPLE)
    cost = macs_model(model, groups, EXAMPLE)
    rng = np.random.default_rng(3)
    scores = {group.name: rng.lognormal(sigma=1.5, size=group.width) for group in groups}
    full = cost.macs([group.width for group in groups])
    limit = macs_limit(cost, int(share * full))

    def highest_lost(power: float) -> float:
        plan = plan_prune(
            groups, cost, scores, {}, Budget(share, 1, 0.0, 0.0, power), criterion="-",
            fusion="-", limits=[limit],
        )  # fmt: skip
        assert plan.solver == "exact" and plan.macs_after <= limit.most
        return max(float(np.delete(scores[c.name], list(c.kept)).max(initial=0)) for c in plan.cuts)

    assert highest_lost(8.0) <= highest_lost(1.0)


@pytest.mark.parametrize("floor", [0.5, 0.05])
def test_a_search_leaves_every_group_its_floor(floor: float) -> None:
    model = tiny_model()
    groups = find_groups(model, EXAMPLE)
    cost = macs_model(model, groups, EXAMPLE)
    rng = np.random.default_rng(0)
    scores = {group.name: rng.uniform(0.1, 1, group.width) for group in groups}
    least = plan_prune(
        groups, cost, scores, {}, Budget(0.6, 1, floor), criterion="-", fusion="-"
    ).macs_after / cost.macs([group.width for group in groups])
    plan = plan_by_search(
        model, groups, cost, scores, Budget(least, 1, floor), SPEC.example(8, seed=1),
        Batch(SPEC.example(8, seed=1), {}, ()), SearchSettings(tries=6, floor=floor),
    )  # fmt: skip
    assert all(len(cut.kept) >= floor * cut.width for cut in plan.cuts)
