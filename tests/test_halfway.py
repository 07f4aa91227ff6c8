"""Channels scored a second time, on what half of the cut leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_run import make_project
from conftest import SPEC, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur.core.errors import PlanError
from secateur.core.plan import PrunePlan
from secateur.flow import planning
from secateur.flow.cache import StageCache
from secateur.flow.job import Job, open_job
from secateur.flow.recipe import load_recipe
from secateur.prune import apply_plan, count_macs, find_groups, macs_model
from secateur.prune.halfway import balanced_whole, plan_halfway, scores_of_whole
from secateur.prune.plan import Budget, default_budget, plan_prune

MODEL, EXAMPLE = tiny_model().eval(), SPEC.example(2)
GROUPS = find_groups(MODEL, EXAMPLE)
COST = macs_model(MODEL, GROUPS, EXAMPLE)


def a_job(folder: Path, **prune: object) -> Job:
    recipe = load_recipe(make_project(folder))
    changed = recipe.prune.model_copy(update={"search": False, **prune})
    return open_job(recipe.model_copy(update={"prune": changed}), StageCache(folder / "cache"))


def kept_of(plan: PrunePlan) -> dict[str, tuple[int, ...]]:
    return {cut.name: cut.kept for cut in plan.cuts}


@given(seed=st.integers(0, 1000), share=st.floats(0.2, 0.9))
@settings(max_examples=20, deadline=None)
def test_the_second_half_takes_from_what_the_first_leaves(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    scores = {group.name: rng.lognormal(size=group.width) for group in GROUPS}
    budget = default_budget(GROUPS, COST, share, 1)

    first, both = plan_halfway(GROUPS, COST, scores, budget, share)
    assert first.macs_after <= share**0.5 * first.macs_before
    assert count_macs(apply_plan(MODEL, GROUPS, first), EXAMPLE) == first.macs_after

    left = {cut.name: rng.lognormal(size=len(cut.kept)) for cut in first.cuts}
    whole = scores_of_whole(GROUPS, first, left)
    again = balanced_whole(GROUPS, first, whole, budget.balance)
    then = plan_prune(GROUPS, COST, again, {}, both, criterion="-", fusion="-")
    assert then.macs_after <= share * then.macs_before
    for name, kept in kept_of(first).items():  # what is gone comes back only where there is room
        now = {*kept_of(then)[name]}
        assert now <= {*kept} or now >= {*kept}


def test_a_floor_that_is_given_is_that_of_the_whole_cut() -> None:
    scores = {group.name: np.arange(1.0, group.width + 1) for group in GROUPS}
    first, both = plan_halfway(GROUPS, COST, scores, Budget(0.5, 1, 0.4), 0.5, floor=0.4)
    assert both.floor == 0.4
    assert all(len(cut.kept) >= 0.4 * cut.width for cut in first.cuts)
    with pytest.raises(PlanError, match="below the least"):
        plan_halfway(GROUPS, COST, scores, Budget(0.01, 1, 0.9), 0.01, floor=0.9)


def test_channels_are_scored_again_on_a_compensated_cut_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, seen = a_job(tmp_path), []
    score_tasks = planning.score_tasks

    def watched(model, groups, tasks, *rest):
        seen.append((count_macs(model, job.example), sum(group.width for group in groups)))
        return score_tasks(model, groups, tasks, *rest)

    monkeypatch.setattr(planning, "score_tasks", watched)
    groups, plan = planning.make_plan(job, 1)
    (macs, width), whole = seen[0], sum(group.width for group in groups)
    assert plan.macs_after < macs <= job.kept_share**0.5 * plan.macs_before
    assert sum(len(cut.kept) for cut in plan.cuts) < width < whole
    assert planning.make_plan(job, 1)[1] == plan
    assert len(seen) == 1  # the second time from disk

    once = a_job(tmp_path, rescore=False)
    assert planning.make_plan(once, 1)[1].macs_after <= plan.budget_macs
    assert len(seen) == 1
    for rule in ("cosine_magnitude", "guarded", "vote"):
        _, other = planning.make_plan(a_job(tmp_path, fusion=rule), 1)
        assert 0 < other.macs_after <= other.budget_macs


def test_what_a_task_loses_is_told_of_the_whole_network(tmp_path: Path) -> None:
    scored = planning.score_channels(a_job(tmp_path), 1)
    once = planning.score_channels(a_job(tmp_path, rescore=False), 1)
    for task, own in once.per_task.items():
        for name, values in own.items():
            np.testing.assert_array_equal(scored.per_task[task][name], values)
    assert any((scored.fused[name] == 0).any() for name in scored.fused)


def test_a_budget_that_cannot_be_met_is_told_as_ever(tmp_path: Path) -> None:
    job = a_job(tmp_path)
    tight = job.recipe.prune.model_copy(
        update={"budget": job.recipe.prune.budget.model_copy(update={"macs": 1e-4})}
    )
    recipe = job.recipe.model_copy(update={"prune": tight})
    with pytest.raises(PlanError, match=r"the budget of .* is below") as told:
        planning.make_plan(replace(job, recipe=recipe, kept_share=1e-4), 1)
    assert "(0.000 of the parent)" in str(told.value)
