"""A build adds its cut to the library, and the next one starts from it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_run import RECIPE, make_project, run
from safetensors.torch import save_file
from secateur.core.errors import RecipeError
from secateur.core.model import evaluating, model_fingerprint
from secateur.flow import warm_start
from secateur.flow.axes import fit, turn_axes
from secateur.flow.cache import StageCache
from secateur.flow.entry import _share_of_macs
from secateur.flow.inherited import best_start
from secateur.flow.job import Job, open_job
from secateur.flow.merged import merged_network
from secateur.flow.recipe import parse_recipe
from secateur.flow.sketches import sketch_tasks
from secateur.flow.stages import begin_cut
from secateur.flow.warm_start import MERGED, OWN, SPARE, VOTED, Planned, plan_job
from secateur.prune import find_groups
from secateur.prune.axes import linear_groups
from secateur.vote.entry import Entry
from secateur.vote.library import add_entry, find_entries, load_entry, open_library
from secateur.vote.store import connect
from test_axes import bottlenecks

TARGET = "raspberry-pi-5"  # no latency is measured for it here
FACTORY = "from test_axes import Bottlenecks as make\n"  # its stream is turned to balanced axes
ROOM = """\
model:
  factory: streams:make
  checkpoint: streams.safetensors
  input: {shape: [3, 32, 48]}
tasks:
  depth: {output: depth, kind: depth}
  room:  {output: room, kind: classification, classes: 4}
keep: [room]
data:
  train: {reader: scenes, split: train, options: {count: 16, height: 32, width: 48}}
  eval:  {reader: scenes, split: test, options: {count: 4, height: 32, width: 48}}
prune:      {budget: {macs: 0.5}, search: false, images: 16, grid: 2}
compensate: {images: 8}
recover:    {steps: 2}
library:    {path: lib}
"""
STARTS = {
    "parent", "inherited", "inherited and compensated", "inherited, the rest refitted", "merged",
}  # fmt: skip
BOTH = ROOM.replace("keep: [room]", "keep: [depth, room]")


def asking(*, library: str = "{path: lib}", **keys: object) -> str:
    """The recipe of both tasks, started from the library."""
    said = "".join(f", {key}: {value}" for key, value in keys.items())
    recipe = BOTH.replace("grid: 2}", f"grid: 2, warm_start: library{said}}}")
    return recipe.replace("{path: lib}", library)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a cache, nothing built yet."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "streams.py").write_text(FACTORY)
    save_file(bottlenecks().network.state_dict(), folder / "streams.safetensors")
    return folder


def build(capsys, project: Path, recipe: str, out: str) -> dict:
    path = project / f"{out}.yaml"
    path.write_text(recipe)
    code, stdout, stderr = run(capsys, "build", path, "--cache", project / "cache", "--target",
                               TARGET, "--out", project / out, "--json")  # fmt: skip
    assert code == 0, stderr
    (result,) = json.loads(stdout)
    return result


def plan(capsys, project: Path, recipe: str) -> dict:
    path = project / "plan.yaml"
    path.write_text(recipe)
    code, stdout, stderr = run(capsys, "plan", path, "--cache", project / "cache", "--target",
                               TARGET, "--json")  # fmt: skip
    assert code == 0, stderr
    return json.loads(stdout)


def planned(project: Path, recipe: str) -> tuple[Job, Planned]:
    loaded = parse_recipe(recipe, project / "recipe.yaml")
    job = turn_axes(open_job(loaded, StageCache(project / "cache")))
    return job, plan_job(job, 2)


@pytest.fixture
def first(capsys, project: Path) -> Entry:
    """The entry of the first cut, which keeps the room alone; built once."""
    library = open_library(project / "lib")
    if not (project / "first").exists():
        build(capsys, project, ROOM, "first")
    (found,) = (each for each in find_entries(library) if each.facts.recipe == ROOM)
    return load_entry(library, found.id)


def copied(project: Path, name: str, *entries: Entry) -> str:
    """A library of these entries; return its line in the recipe."""
    for entry in entries:
        add_entry(open_library(project / name), entry)
    return f"{{path: {name}, add: false}}"


def stranger(first: Entry, **facts: object) -> Entry:
    return replace(first, facts=replace(first.facts, recipe="another", **facts))


def one_channel_else(first: Entry, name: str) -> Entry:
    """The same cut by another recipe, with another last channel of one group."""
    cuts = []
    for cut in first.plan.cuts:
        if cut.name == name:
            other = max(set(range(cut.width)) - set(cut.kept))
            cut = replace(cut, kept=tuple(sorted((*cut.kept[:-1], other))))
        cuts.append(cut)
    return replace(stranger(first), plan=replace(first.plan, cuts=tuple(cuts)))


def contrary(first: Entry) -> Entry:
    """The same cut, had it kept what it dropped (and, of more, its first channels)."""
    cuts = []
    for cut in first.plan.cuts:
        order = sorted(range(cut.width), key=lambda channel, kept=cut.kept: channel in kept)
        cuts.append(replace(cut, kept=tuple(sorted(order[: len(cut.kept)]))))
    return replace(stranger(first), plan=replace(first.plan, cuts=tuple(cuts)))


def test_a_build_adds_its_cut_once(capsys, project: Path, first: Entry) -> None:
    manifest = json.loads((project / f"first/{TARGET}/fp32/manifest.json").read_text())
    facts = first.facts
    assert facts.parent == manifest["parent"]["trunk"]
    assert facts.network == manifest["parent"]["network"] == facts.parent  # no trunk is named
    assert facts.basis == manifest["parent"]["basis"] and facts.basis.startswith("balanced-")
    assert facts.accuracy == manifest["accuracy"]["shipped"]
    assert (facts.delta_t, facts.steps) == (manifest["accuracy"]["delta_t"], 2)
    assert first.plan.macs_after == manifest["cost"]["macs"]
    assert first.scores.keys() == {"room"} and first.weights
    assert first.sketches.keys() == {"score_cosine", "mean_feature", "cka", "leep"}
    again = build(capsys, project, ROOM, "first")
    assert first.id in again["library"] and "warm_start" not in again["manifest"]["plan"]
    assert [each.id for each in find_entries(open_library(project / "lib"))] == [first.id]


def test_a_build_may_keep_its_cut_to_itself(capsys, project: Path, first: Entry) -> None:
    private = ROOM.replace("{path: lib}", "{path: lib, add: false}")
    assert build(capsys, project, private, "private")["library"] == ""
    entries = find_entries(open_library(project / "lib"))
    assert private not in [each.facts.recipe for each in entries]


def test_a_library_that_cannot_be_written_does_not_undo_a_build(
    capsys, project: Path, first: Entry
) -> None:
    (project / "file").write_text("no folder")
    result = build(capsys, project, ROOM.replace("path: lib", "path: file"), "unwritten")
    assert result["library"].startswith("not added: ")
    assert (project / f"unwritten/{TARGET}/fp32/manifest.json").exists()


def test_the_next_build_starts_from_the_library(capsys, project: Path, first: Entry) -> None:
    recipe = asking()
    result = build(capsys, project, recipe, "second")
    warm = result["manifest"]["plan"]["warm_start"]
    assert warm["cold"] == "" and [each["id"] for each in warm["voters"]] == [first.id]
    weights = warm["weights"]
    assert weights["donors"] == [first.id]
    assert weights["losses"].keys() == STARTS
    assert weights["chosen"] == min(weights["losses"], key=weights["losses"].get)
    shown = plan(capsys, project, recipe)["warm_start"]
    assert {**shown, "weights": weights} == warm
    again = build(capsys, project, recipe, "second")["manifest"]
    assert again["plan"] == result["manifest"]["plan"]  # its own entry is no neighbour of it
    assert again["files"]["model.onnx"] == result["manifest"]["files"]["model.onnx"]
    tasks = {each.facts.task_names for each in find_entries(open_library(project / "lib"))}
    assert tasks == {("room",), ("depth", "room")}


def test_plan_shows_who_voted_and_what_that_changed(capsys, project: Path, first: Entry) -> None:
    cold = plan(capsys, project, BOTH)
    other = contrary(first)
    recipe = asking(library=copied(project, "contrary", other), vote_weight=1.0)
    warm = plan(capsys, project, recipe)
    vote = warm.pop("warm_start")
    assert "warm_start" not in cold
    (voter,) = vote["voters"]
    assert (voter["id"], voter["tasks"], voter["weight"]) == (other.id, ["room"], 1)
    assert 0 < voter["similarity"] <= 1 and "cosine" in voter["why"]
    groups = {cut["name"]: cut for cut in warm["cuts"]}
    assert vote["iou"].keys() == groups.keys()
    assert vote["confidence"] and {*vote["confidence"].values()} == {0.0}  # of a single voter
    # how many of each group stay is what own scores say; which ones, the vote decides
    counts = [{c["name"]: len(c["kept"]) for c in each["cuts"]} for each in (cold, warm)]
    assert counts[0] == counts[1]
    own = {c["name"]: {*c["kept"]} for c in cold["cuts"]}
    both = sum(len(own[name] & {*cut["kept"]}) for name, cut in groups.items())
    union = sum(len(own[name] | {*cut["kept"]}) for name, cut in groups.items())
    assert vote["iou_of_all"] == pytest.approx(both / union) and vote["iou_of_all"] < 1
    assert {*groups["mix"]["kept"]} == own["mix"]  # of which the room's cut says nothing
    for cut in other.plan.cuts:
        mine, theirs = {*groups[cut.name]["kept"]}, {*cut.kept}
        assert mine <= theirs or theirs <= mine
    code, stdout, _ = run(capsys, "plan", project / "plan.yaml", "--cache", project / "cache")
    assert code == 0 and other.id[:8] in stdout and "confidence" in stdout


def test_several_voters_share_the_say(capsys, project: Path, first: Entry) -> None:
    name = next(cut.name for cut in first.plan.cuts if len(cut.kept) < cut.width)
    line = copied(project, "two", first, one_channel_else(first, name))
    for votes in ("keeps", "scores"):
        vote = plan(capsys, project, asking(library=line, votes=votes))["warm_start"]
        assert [each["weight"] for each in vote["voters"]] == pytest.approx([0.5, 0.5])
        # of the other groups that they have they kept the same channels
        assert 0 < vote["confidence"].pop(name) < 1
        had = {cut.name for cut in first.plan.cuts}
        assert all(value == (group in had) for group, value in vote["confidence"].items())


@pytest.mark.parametrize("measure", ["mean_feature", "cka", "leep"])
def test_every_measure_finds_the_first_cut(capsys, project: Path, first: Entry, measure) -> None:
    line = copied(project, "one", first)
    vote = plan(capsys, project, asking(library=line, similarity=measure))["warm_start"]
    assert vote["similarity"] == measure and [v["id"] for v in vote["voters"]] == [first.id]


def test_sketches_of_dense_and_whole_image_labels(tmp_path: Path) -> None:
    recipe = make_project(tmp_path, RECIPE.replace("[segmentation, depth]", "[segmentation, room]"))
    loaded = parse_recipe(recipe.read_text().replace("images: 16}", "images: 16, similarity: "
                          "task2vec}"), recipe)  # fmt: skip
    found, again = (sketch_tasks(open_job(loaded, StageCache(tmp_path / name))) for name in "ab")
    labels, sources = found["leep"].shape
    assert 1 < labels <= 8 + 4 and sources == 8 + 4  # classes seen, and all the parent has
    assert found["leep"].sum() == pytest.approx(1, abs=1e-4)
    assert found["cka"].shape == (16 * 17 // 2,) and found["mean_feature"].shape == (32 + 16 + 32,)
    assert found.keys() == {"score_cosine", "task2vec", "mean_feature", "cka", "leep"}
    for name, sketch in found.items():
        np.testing.assert_array_equal(sketch, again[name])  # else no two builds were one entry


def test_task2vec_is_there_where_a_recipe_asks_for_it(capsys, project: Path, first) -> None:
    line = copied(project, "one", first)
    vote = plan(capsys, project, asking(library=line, similarity="task2vec"))["warm_start"]
    assert "no useful cut" in vote["cold"]
    assert vote["refused"] == {"it holds no 'task2vec' sketch": 1}


@pytest.mark.parametrize("inherit", ["nearest", "average"])
def test_a_cut_of_the_same_channels_inherits_the_whole_network(
    project: Path, first: Entry, inherit: str
) -> None:
    """The room's own recipe, told apart by a comment, finds the very cut that it would make."""
    line = copied(project, "one", first)
    recipe = ROOM.replace("grid: 2}", f"grid: 2, warm_start: library, inherit: {inherit}}}")
    job, made = planned(project, recipe.replace("{path: lib}", line))
    assert made.plan.cuts == first.plan.cuts and made.vote and made.vote.iou_of_all == 1
    begun = begin_cut(job, made.scored.groups, made.plan)
    started, origin, key = best_start(job, made, begun)
    assert origin and origin.share == 1.0 and origin.donors == (first.id,)
    assert (key == "") == (origin.chosen == "parent")
    assert key in ("", model_fingerprint(started))


def test_axes_follow_the_criterion_where_the_recipe_does_not_say(project: Path) -> None:
    def axes(**keys: str) -> str:
        said = "".join(f", {key}: {value}" for key, value in keys.items())
        return parse_recipe(ROOM.replace("grid: 2", f"grid: 2{said}"), project / "r.yaml").axes()

    assert axes() == axes(criterion="fisher") == "balanced"
    assert axes(criterion="lamp") == axes(criterion="taylor", axes="original") == "original"
    with pytest.raises(RecipeError, match="which 'l1' goes by"):
        axes(criterion="l1", axes="balanced")


def test_the_same_recipe_for_another_device_hears_what_the_first_one_cut(
    project: Path, first: Entry
) -> None:
    recipe = ROOM.replace("grid: 2}", "grid: 2, warm_start: library}")
    assert first.facts.device == TARGET
    own = replace(first, facts=replace(first.facts, recipe=recipe))
    recipe = recipe.replace("{path: lib}", copied(project, "devices", own))
    loaded = parse_recipe(recipe, project / "recipe.yaml")
    loaded = loaded.model_copy(update={"source": own.facts.recipe})
    job = turn_axes(open_job(loaded, StageCache(project / "cache")))
    heard = {device: plan_job(job, 2, device).vote for device in (TARGET, "another device")}
    assert heard[TARGET] and heard[TARGET].cold
    again = heard["another device"]
    assert again and [voter.similarity for voter in again.voters] == [pytest.approx(1)]


def test_tasks_that_no_neighbour_has_are_merged_from_the_parent(project: Path, first) -> None:
    """The room alone was cut: for both tasks its network is merged with the parent's for depth."""
    job, made = planned(project, asking(library=copied(project, "merged", first)))
    merged = merged_network(job, made.donors)
    assert merged is not None and [donor.tasks for donor in made.donors] == [("room",)]
    shapes = [tensor.shape for tensor in job.selected.parameters()]
    assert [tensor.shape for tensor in merged.parameters()] == shapes
    begun = begin_cut(job, made.scored.groups, made.plan)
    _, origin, _ = best_start(job, made, begun)
    assert origin and origin.losses.keys() == STARTS
    assert origin.chosen == min(origin.losses, key=lambda name: origin.losses[name])


def test_a_plan_of_merged_weights_goes_by_what_channels_are_worth_there(
    project: Path, first: Entry, monkeypatch
) -> None:
    line = copied(project, "where", first)
    _, made = planned(project, asking(library=line))
    assert made.merged is not None and made.vote and made.vote.plan_of == MERGED
    _, own = planned(project, asking(library=line, inherit="none"))
    assert own.merged is None and own.vote and own.vote.plan_of != MERGED
    assert made.plan.cuts != own.plan.cuts
    monkeypatch.setattr(warm_start, "begin_cut", None)  # both starts' losses are found again
    assert planned(project, asking(library=line))[1].plan == made.plan
    for name, scores in own.scored.per_task["room"].items():  # what its entry will hold
        np.testing.assert_array_equal(made.scored.per_task["room"][name], scores)


def test_a_merged_network_worse_than_the_parents_cut_is_not_planned_from(
    project: Path, first: Entry
) -> None:
    worse = {name: -3 * array if array.ndim > 1 else array for name, array in first.weights.items()}
    line = copied(project, "worse", replace(stranger(first), weights=worse))
    job, made = planned(project, asking(library=line))
    assert made.donors and made.merged is None and made.vote and made.vote.plan_of != MERGED
    _, origin, _ = best_start(job, made, begin_cut(job, made.scored.groups, made.plan))
    assert origin and origin.losses.keys() == STARTS - {"merged"}


@pytest.mark.parametrize(("worth", "expected"), [(1.2, OWN), (1.05, VOTED)])
def test_votes_that_choose_clearly_worse_are_not_followed(
    project: Path, first: Entry, monkeypatch, worth: float, expected: str
) -> None:
    """``worth``: the loss of the voted cut, that of own scores' being 1."""
    library = copied(project, "contrary", contrary(first))
    shutil.rmtree(project / "cache" / "start_losses", ignore_errors=True)
    losses = iter([worth, 1.0])  # votes, own scores
    monkeypatch.setattr(warm_start, "start_loss", lambda job: lambda model: next(losses))
    _, made = planned(project, asking(library=library, inherit="none"))
    assert made.vote and (made.vote.plan_of, made.vote.losses) == (
        expected, {VOTED: worth, OWN: 1.0}
    )  # fmt: skip
    cold = planned(project, BOTH)[1].plan
    assert (made.plan.cuts == cold.cuts) == (expected == OWN)
    assert made.donors  # whose weights may still be taken


def test_nothing_is_merged_where_no_neighbour_has_a_kept_task(project: Path, first) -> None:
    job, made = planned(project, asking(library=copied(project, "other", first)))
    others = [replace(donor, tasks=("another",)) for donor in made.donors]
    assert merged_network(job, others) is None


def test_weights_come_from_the_parent_where_the_recipe_says_so(project: Path, first) -> None:
    line = copied(project, "one", first)
    job, made = planned(project, asking(library=line, inherit="none"))
    begun = begin_cut(job, made.scored.groups, made.plan)
    started, origin, key = best_start(job, made, begun)
    assert started is begun and key == "" and origin and origin.reason


@pytest.mark.parametrize(
    ("facts", "why"),
    [({"parent": "p" * 20}, "another parent"), ({"basis": "original"}, "other axes")],
)
def test_a_stranger_is_refused_and_the_start_is_cold(
    capsys, project: Path, first: Entry, facts, why: str
) -> None:
    line = copied(project, why.split()[-1], stranger(first, **facts))
    cold, shown = (plan(capsys, project, recipe) for recipe in (BOTH, asking(library=line)))
    vote = shown.pop("warm_start")
    assert shown == cold and "no useful cut" in vote["cold"] and vote["voters"] == []
    (reason,) = vote["refused"]
    assert why in reason
    code, stdout, _ = run(capsys, "plan", project / "plan.yaml", "--cache", project / "cache")
    assert code == 0 and "cold start: the library has no useful cut" in " ".join(stdout.split())
    job, made = planned(project, asking(library=line))
    begun = begin_cut(job, made.scored.groups, made.plan)
    assert best_start(job, made, begun)[0] is begun


def test_a_cut_brings_its_axes_to_other_images_and_another_machine(
    project: Path, first: Entry
) -> None:
    """Another machine is an empty cache here: what it would find by itself is others' axes."""
    line = copied(project, "carried", stranger(first))
    other = asking(library=line, similarity="mean_feature").replace("count: 16", "count: 20")
    cache = StageCache(project / "elsewhere")

    def turned(recipe: str) -> Job:
        return turn_axes(open_job(parse_recipe(recipe, project / "recipe.yaml"), cache))

    job = turned(other)
    assert job.basis == first.facts.basis != turned(other.replace("library, ", "none, ")).basis
    assert job.axes.keys() == first.axes.keys() and len(first.axes) > 0
    vote = plan_job(job, 2).vote
    assert vote and not vote.cold and len(vote.voters) == 1

    damaged = replace(stranger(first), facts=replace(first.facts, recipe="yet another"))
    copied(project, "carried", damaged)
    library = open_library(project / "carried")
    (bad, good) = sorted(each.id for each in find_entries(library))
    with connect(library.index) as index:
        index.execute("UPDATE entries SET axes = ? WHERE id = ?", ("0" * 64, bad))
    job = open_job(parse_recipe(other, project / "recipe.yaml"), StageCache(project / "third"))
    assert turn_axes(job).basis == load_entry(library, good).facts.basis
    with evaluating(job.parent), evaluating(job.scored):
        before, after = job.parent(job.example), job.scored(job.example)
    assert all(torch.allclose(before[name], after[name], atol=1e-3) for name in after)


def test_axes_are_found_where_the_budget_is_not_in_macs(project: Path, first: Entry) -> None:
    """Only MACs tell before the scoring which cuts will be near: a fifth of them is too few."""
    line = copied(project, "deep", stranger(first, budget=0.2))
    recipe = asking(library=line, similarity="mean_feature").replace("count: 16", "count: 20")

    def basis(budget: str) -> str:
        text = recipe.replace("budget: {macs: 0.5}", f"budget: {budget}")
        assert budget in text
        cache = StageCache(project / "cache of deep" / budget.strip("{}").replace(": ", "-"))
        return turn_axes(open_job(parse_recipe(text, project / "recipe.yaml"), cache)).basis

    assert basis("{params: 0.5}") == first.facts.basis != basis("{macs: 0.5}")


@pytest.mark.parametrize("spoil", ["narrow", "singular", "not a number", "renamed"])
def test_axes_that_do_not_fit_are_left_alone(project: Path, first: Entry, spoil: str) -> None:
    (name, matrix), *rest = first.axes.items()
    bad = {
        "narrow": {name: matrix[:-1]}, "singular": {name: np.zeros_like(matrix)},
        "not a number": {name: matrix * np.nan}, "renamed": {"other": matrix},
    }[spoil]  # fmt: skip
    job = planned(project, asking())[0]
    groups = linear_groups(job.parent, find_groups(job.parent, job.example), job.example)
    assert fit(job.parent, groups, first.axes)
    assert not fit(job.parent, groups, {**dict(rest), **bad})


def test_cuts_far_from_the_budget_do_not_vote(capsys, project: Path, first: Entry) -> None:
    line = copied(project, "far", stranger(first, budget=0.2))
    assert plan(capsys, project, asking(library=line))["warm_start"]["cold"]


def test_what_cannot_be_matched_is_refused(capsys, project: Path, first: Entry) -> None:
    facts = stranger(first).facts
    renamed = replace(facts, tasks=(replace(facts.tasks[0], name="pose"),))
    another = replace(facts, tasks=(replace(facts.tasks[0], kind="depth", classes=None),))
    shorter = replace(first.plan, cuts=first.plan.cuts[1:])
    fewer = {"room": {cut.name: first.scores["room"][cut.name] for cut in shorter.cuts}}
    unlike = {"score_cosine": np.zeros_like(first.sketches["score_cosine"])}
    damaged = replace(first, facts=facts, weights={"a": np.ones(3, np.float32)})
    line = copied(
        project, "odd", damaged, replace(first, facts=renamed), replace(first, facts=another),
        replace(first, facts=facts, plan=shorter, scores=fewer),
        replace(first, facts=facts, sketches=unlike),
    )  # fmt: skip
    for path in (project / "odd/blobs").iterdir():
        if path.stat().st_size < 200:
            path.unlink()
    vote = plan(capsys, project, asking(library=line))["warm_start"]
    told = " | ".join(vote["refused"])
    assert vote["cold"] and sum(vote["refused"].values()) == 5
    for reason in ("a task 'pose'", "task 'room' is depth, yours classification of 4 classes",
                   "not those that its tasks have", "not similar at all",
                   f"entry {damaged.id} lacks its array file"):  # fmt: skip
        assert reason in told


def test_each_cut_of_the_same_tasks_and_channels_has_one_vote(project: Path, first: Entry) -> None:
    again = replace(first, facts=replace(stranger(first).facts, recipe="the same, in int8"))
    line = copied(project, "twice", stranger(first), again)
    _, made = planned(project, asking(library=line))
    assert made.vote and len(made.vote.voters) == 1
    assert "a nearer one has the same tasks and keeps the same channels" in made.vote.refused


def test_of_cuts_of_the_same_tasks_the_nearest_budget_votes(project: Path, first: Entry) -> None:
    name = next(cut.name for cut in first.plan.cuts if len(cut.kept) < cut.width)
    near, far = one_channel_else(first, name), stranger(first, budget=0.7)
    line = copied(project, "budgets", far, near, stranger(first, budget=0.4))
    _, made = planned(project, asking(library=line))
    assert made.vote and [each.budget for each in made.vote.voters] == [near.facts.budget]
    assert made.vote.refused["a cut of the same tasks to a budget nearer yours votes"] == 2


def test_scores_of_another_criterion_say_nothing(project: Path, first: Entry) -> None:
    other = replace(stranger(first), plan=replace(first.plan, criterion="fisher"))
    line = copied(project, "fisher", other)
    _, made = planned(project, asking(library=line))
    assert made.vote and made.vote.cold
    assert made.vote.refused == {"its channels were scored by fisher, yours by taylor": 1}
    _, made = planned(project, asking(library=line, similarity="mean_feature"))
    assert made.vote and not made.vote.cold  # what it kept does not depend on that


def test_tasks_that_a_measure_cannot_compare_start_cold(project: Path, first: Entry) -> None:
    recipe = asking(similarity="leep").replace("[depth, room]", "[depth]")
    _, made = planned(project, recipe)
    assert made.vote and "have nothing that 'leep' could compare; they have" in made.vote.cold


def test_an_unknown_measure_is_told(capsys, project: Path) -> None:
    path = project / "magic.yaml"
    path.write_text(asking(similarity="magic"))
    code, _, stderr = run(capsys, "plan", path, "--cache", project / "cache")
    assert code == 2 and "'magic' is not a measure" in stderr


def test_a_bundle_added_by_hand_states_its_axes(capsys, project: Path, first: Entry) -> None:
    code, stdout, _ = run(capsys, "library", "add", project / f"first/{TARGET}/fp32",
                          "--library", project / "by_hand", "--json")  # fmt: skip
    library = open_library(project / "by_hand")
    assert code == 0
    assert load_entry(library, json.loads(stdout)["id"]).facts.basis == first.facts.basis


def test_refused_neighbours_leave_their_places_to_others(
    capsys, project: Path, first: Entry
) -> None:
    shorter = replace(first.plan, cuts=first.plan.cuts[1:])
    fewer = {"room": {cut.name: first.scores["room"][cut.name] for cut in shorter.cuts}}
    odd = replace(stranger(first), plan=shorter, scores=fewer)
    nearer = [replace(odd, facts=replace(odd.facts, recipe=f"odd {n}")) for n in range(SPARE + 1)]
    far = {"score_cosine": np.roll(first.sketches["score_cosine"], 1)}
    line = copied(project, "spare", *nearer, replace(contrary(first), sketches=far))
    vote = plan(capsys, project, asking(library=line, neighbours=1))["warm_start"]
    assert not vote["cold"] and len(vote["voters"]) == 1
    assert sum(vote["refused"].values()) == SPARE + 1


def test_an_entry_that_cannot_be_read_stops_nobody(capsys, project: Path, first: Entry) -> None:
    line = copied(project, "torn", first, one_channel_else(first, first.plan.cuts[0].name))
    with connect(project / "torn/index.sqlite") as index:
        index.execute("UPDATE entries SET facts = '{}' WHERE id != ?", (first.id,))
    for measure in ("score_cosine", "cka"):
        asked = asking(library=line, similarity=measure)
        vote = plan(capsys, project, asked)["warm_start"]
        assert [each["id"] for each in vote["voters"]] == [first.id]
        assert sum(vote["refused"].values()) == 1


def test_a_cut_to_another_budget_is_entered_by_what_it_kept(first: Entry) -> None:
    by_ms = replace(first.plan, budget_macs=first.plan.macs_before)
    assert _share_of_macs(by_ms) == first.plan.macs_after / first.plan.macs_before < 0.9
    assert _share_of_macs(first.plan) == first.facts.budget
    by_params = replace(first.plan, budget_macs=first.plan.macs_before * 9 // 10)
    assert _share_of_macs(by_params) == first.plan.macs_after / first.plan.macs_before
