"""Scores of what a milder cut leaves (prune.stages), and the plans that they give."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_run import RECIPE
from conftest import SPEC, TASKS, tiny_model
from secateur.compensate import RefitSettings, refit
from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.core.plan import GroupCut, PrunePlan
from secateur.core.task import Task
from secateur.data.loading import batches, open_reader
from secateur.flow import rescoring
from secateur.flow.cache import StageCache
from secateur.flow.job import Job, open_job
from secateur.flow.recipe import parse_recipe
from secateur.flow.rescoring import scores_after
from secateur.flow.stages import plan_scored, score_channels
from secateur.importance.bank import score_tasks
from secateur.prune import apply_plan, find_groups
from torch import Tensor, nn
from torch.nn import functional


def kept(groups: tuple[ChannelGroup, ...], **of: tuple[int, ...]) -> PrunePlan:
    """A plan that keeps these channels of some groups, and of the others all."""
    cuts = tuple(
        GroupCut(group.name, group.width, of.get(group.name, tuple(range(group.width))))
        for group in groups
    )
    return PrunePlan(cuts, 0, 0, 0, 1, "taylor", "mean", {})


def scenes(tasks: tuple[Task, ...] = TASKS):
    reader = open_reader("scenes", None, "train", count=8, height=32, width=48)
    return list(batches(reader, tasks, SPEC, 4))


def score(model: MultiTaskModel, groups) -> dict:
    return score_tasks(model, groups, TASKS, "taylor", scenes, 2)


@pytest.mark.parametrize("refitted", [True, False])
def test_what_stays_is_scored_as_the_cut_network_and_what_goes_is_0(refitted: bool) -> None:
    model = tiny_model()
    groups = find_groups(model, SPEC.example(2))
    plan = kept(groups, expand=tuple(range(0, 48, 3)), down=(1, 2, 30))
    images = torch.cat([batch.images for batch in scenes()]) if refitted else None
    found = scores_after(model, groups, plan, images, RefitSettings(), score)
    cut = apply_plan(model, groups, plan)
    if images is not None:
        cut = refit(model, cut, groups, plan, images)
    left = score(cut, find_groups(cut.eval(), SPEC.example(2)))
    for task in TASKS:
        for each in plan.cuts:
            values = found[task.name][each.name]
            np.testing.assert_allclose(values[list(each.kept)], left[task.name][each.name])
            assert not np.delete(values, each.kept).any() and len(values) == each.width


class Twins(nn.Module):
    """Four hidden channels of which the first two are the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Conv2d(3, 4, 3, padding=1)
        self.hidden.weight.data[1] = self.hidden.weight.data[0]
        self.hidden.bias.data[1] = self.hidden.bias.data[0]
        self.depth = nn.Conv2d(4, 1, 1)
        self.depth.weight.data[:] = 1.0

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"depth": self.depth(functional.relu(self.hidden(image)))}


def test_a_channel_matters_more_once_its_twin_is_gone() -> None:
    task = Task("depth", "depth", "depth", "depth")
    model = MultiTaskModel(Twins(), [task]).eval()
    groups = find_groups(model, SPEC.example(2))
    stream = partial(scenes, (task,))

    def of(other: MultiTaskModel, own) -> dict:
        return score_tasks(other, own, (task,), "taylor", stream, 2)

    images = torch.cat([batch.images for batch in stream()])
    plan = kept(groups, hidden=(0, 2, 3))
    after = scores_after(model, groups, plan, images, RefitSettings(), of)["depth"]["hidden"]
    before = of(model, groups)["depth"]["hidden"]
    assert after[0] > 1.5 * before[0]
    np.testing.assert_allclose(after[2:], before[2:], rtol=0.1)


def opened(folder: Path, stages: int) -> Job:
    recipe = RECIPE.replace("budget: {macs: 0.5}", f"budget: {{macs: 0.3}}, stages: {stages}")
    assert f"stages: {stages}" in recipe
    return open_job(parse_recipe(recipe, folder / "recipe.yaml"), StageCache(folder / "cache"))


@pytest.fixture
def scenes_project(tmp_path: Path) -> Path:
    from cli_run import make_project

    return make_project(tmp_path).parent


def test_stages_change_which_channels_stay_and_never_the_budget(
    scenes_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = opened(scenes_project, 1)
    scored = score_channels(job, 4)
    assert rescoring.rescored(job, scored).fused is scored.fused
    once = plan_scored(job, scored)

    job = opened(scenes_project, 3)
    again = rescoring.rescored(job, score_channels(job, 4))
    staged = plan_scored(job, again)
    assert staged.macs_after <= staged.budget_macs == once.budget_macs
    assert staged.cuts != once.cuts
    for task, scores in scored.per_task.items():  # what tasks are said to lose is of the parent
        for name, values in scores.items():
            np.testing.assert_array_equal(again.per_task[task][name], values)

    monkeypatch.setattr(rescoring, "scores_after", None)  # found in the cache
    found = rescoring.rescored(job, score_channels(job, 4))
    assert plan_scored(job, found).cuts == staged.cuts


def test_what_an_earlier_stage_dropped_stays_dropped(scenes_project: Path) -> None:
    job = opened(scenes_project, 2)
    scored = rescoring.rescored(job, score_channels(job, 4))
    gone = {name: values == 0 for name, values in scored.fused.items()}
    assert sum(each.sum() for each in gone.values()) > 0
    plan = plan_scored(job, replace(scored, budget=replace(scored.budget, floor=0.0)))
    for cut in plan.cuts:
        alive = int((~gone[cut.name]).sum())
        assert not gone[cut.name][list(cut.kept)].any() or len(cut.kept) > alive
