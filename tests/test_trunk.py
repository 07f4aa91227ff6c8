"""Networks for different tasks on one trunk: what was cut of one helps to cut another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_run import run
from secateur.core.errors import RecipeError
from secateur.core.model import MultiTaskModel
from secateur.core.task import Task
from secateur.flow import sketches
from secateur.flow.axes import turn_axes
from secateur.flow.cache import StageCache
from secateur.flow.inherited import best_start
from secateur.flow.job import Job, open_job
from secateur.flow.merged import has_narrowed_norms, merged_network
from secateur.flow.recipe import parse_recipe
from secateur.flow.refit import refit_indices
from secateur.flow.stages import begin_cut
from secateur.flow.trunk import check_trunk, weights_digest, within
from secateur.flow.warm_start import Planned, plan_job
from secateur.prune import find_groups
from secateur.vote.inherit import Donor, SubNetwork, embed
from secateur.vote.library import (
    add_entry,
    find_entries,
    ids_of_recipe,
    load_entry,
    open_library,
)
from torch import Tensor, nn

NETS = "from test_trunk import make_both, make_net as make, make_plain\n"
RECIPE = """\
model:
  factory: nets:make
  arguments: {head: HEAD, seed: SEED}
  trunk: trunk
  input: {shape: [3, 32, 48]}
tasks: TASKS
data:
  train: {reader: scenes, split: train, options: {count: 16, height: 32, width: 48}}
  eval:  {reader: scenes, split: test, options: {count: 4, height: 32, width: 48}}
prune:      {budget: {macs: 0.5}, search: false, images: 16, grid: 2, EXTRA}
compensate: {images: 8}
recover:    {steps: 2}
library:    {path: lib}
"""
ROOM = "{answer: {output: answer, kind: classification, classes: 4, label: room}}"
DEPTH = "{answer: {output: answer, kind: depth, label: depth}}"
TARGET = "raspberry-pi-5"  # no latency is measured for it here


class Trunk(nn.Module):
    """A stem and two inverted residuals, whose stream is turned to balanced axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 24, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, 1, 1, groups=24), nn.ReLU(),
                nn.Conv2d(24, 16, 1),
            )
            for _ in range(2)
        )  # fmt: skip
        self.last = nn.Conv2d(16, 32, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x).relu()


class Net(nn.Module):
    """The trunk with a head for depth (N, 1, h, w) or for the room (N, 4)."""

    def __init__(self, head: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = Trunk()
        torch.manual_seed(seed)
        self.kind = head
        self.head = nn.Conv2d(32, 1 if head == "depth" else 4, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        answer = self.head(self.trunk(images))
        return {"answer": answer.relu() + 1 if self.kind == "depth" else answer.mean((2, 3))}


def make_net(head: str, seed: int = 1) -> nn.Module:
    return Net(head, seed)


class Both(nn.Module):
    """One trunk, a head for depth and one for the room, and a neck that both read."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.trunk = Net("room", 1).trunk
        torch.manual_seed(seed)
        self.neck = nn.Conv2d(32, 12, 1)
        self.heads = nn.ModuleDict({"depth": nn.Conv2d(12, 1, 1), "room": nn.Conv2d(12, 4, 1)})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.neck(self.trunk(images)).relu()
        return {
            "depth": self.heads["depth"](x).relu() + 1,
            "room": self.heads["room"](x).mean((2, 3)),
        }


class Plain(nn.Module):
    """A trunk without channels that could be turned; one head has such, in two layers."""

    def __init__(self, head: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU())
        more = [nn.Conv2d(16, 16, 1)] if head == "pair" else []
        self.head = nn.Sequential(*more, nn.Conv2d(16, 1, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"answer": self.head(self.trunk(images)).relu() + 1}


def make_both(seed: int) -> nn.Module:
    return Both(seed)


def make_plain(head: str) -> nn.Module:
    return Plain(head)


def recipe(head: str, seed: int = 1, extra: str = "rescore: false") -> str:
    tasks = DEPTH if head == "depth" else ROOM
    text = RECIPE.replace("HEAD", head).replace("SEED", str(seed)).replace("TASKS", tasks)
    return text.replace("EXTRA", extra)


def asking(head: str, seed: int = 1, **keys: str) -> str:
    said = "".join(f", {key}: {value}" for key, value in keys.items())
    return recipe(head, seed, f"rescore: false, warm_start: library{said}")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with one cut in its library: of the network for rooms."""
    folder = tmp_path_factory.mktemp("trunk")
    (folder / "nets.py").write_text(NETS)
    (folder / "room.yaml").write_text(recipe("room"))
    return folder


@pytest.fixture
def first(capsys, project: Path) -> Path:
    arguments = ("--cache", project / "cache", "--target", TARGET, "--out", project / "out")
    code, _, stderr = run(capsys, "build", project / "room.yaml", *arguments)
    assert code == 0, stderr
    return project


def planned(project: Path, text: str) -> tuple[Job, Planned]:
    job = open_job(parse_recipe(text, project / "x.yaml"), StageCache(project / "cache"))
    job = turn_axes(job)
    return job, plan_job(job, 2)


@pytest.mark.parametrize("measure", ["score_cosine", "mean_feature"])
def test_a_cut_for_another_task_on_the_trunk_votes(first: Path, measure: str) -> None:
    job, made = planned(first, asking("depth", similarity=measure, vote_weight="1"))
    assert made.vote and not made.vote.cold, made.vote
    [voter] = made.vote.voters
    assert voter.tasks == ("answer",) and 0 < voter.similarity <= 1
    entry = load_entry(open_library(first / "lib"), voter.id)
    theirs = {cut.name: {*cut.kept} for cut in entry.plan.cuts}
    kept = {cut.name: {*cut.kept} for cut in made.plan.cuts}
    shared = [group.name for group in within(find_groups(job.selected, job.example), job.trunk)]
    assert len(shared) >= 4 and {*shared} <= kept.keys()
    for name in shared:  # votes alone rank: what it kept comes before all else
        assert kept[name] <= theirs[name] or theirs[name] <= kept[name]


def test_its_trunk_is_inherited_and_nothing_of_its_head(first: Path) -> None:
    job, made = planned(first, asking("depth"))
    [donor] = made.donors
    assert donor.network.weights and donor.tasks == ()
    assert all(name.startswith("network.trunk.") for name in donor.network.weights)
    begun = begin_cut(job, made.scored.groups, made.plan)
    start, origin, _ = best_start(job, made, begun)
    assert origin and 0 < origin.share < 1 and "inherited, the rest refitted" in origin.losses
    assert not origin.of_tasks and not origin.recovered  # there is much to learn yet
    assert [*start.state_dict()] == [*begun.state_dict()]


def test_what_one_trunk_cannot_tell_apart_is_no_measure(first: Path) -> None:
    for measure in ("cka", "leep"):
        _, made = planned(first, asking("depth", similarity=measure))
        assert made.vote and f"nothing that '{measure}' could compare" in made.vote.cold


def test_a_head_in_axes_of_its_own_is_not_heard(first: Path, project: Path) -> None:
    """The same network, but its entry counts a head's channels in other axes."""
    library = open_library(first / "lib")
    entry = load_entry(library, find_entries(library)[0].id)
    odd = replace(
        entry, facts=replace(entry.facts, recipe="other"), axes={**entry.axes, "head": np.eye(3)}
    )
    add_entry(open_library(first / "odd"), odd)
    _, made = planned(first, asking("room").replace("{path: lib}", "{path: odd}"))
    [donor] = made.donors
    assert donor.tasks == ()
    assert all(name.startswith("network.trunk.") for name in donor.network.weights)


def test_a_trunk_that_is_coupled_otherwise_is_refused(first: Path) -> None:
    library = open_library(first / "lib")
    entry = load_entry(library, find_entries(library)[0].id)
    cuts = [
        replace(cut, name=cut.name.replace("trunk.last", "trunk.other")) for cut in entry.plan.cuts
    ]
    odd = replace(entry, plan=replace(entry.plan, cuts=tuple(cuts)), scores={})
    add_entry(open_library(first / "coupled"), odd)
    _, made = planned(first, asking("depth").replace("{path: lib}", "{path: coupled}"))
    assert made.vote and made.vote.cold
    assert made.vote.refused == {"its trunk's channel groups are not those that yours has": 1}


def test_a_task_of_the_same_name_in_another_network_is_no_expert_for_it(first: Path) -> None:
    job, made = planned(first, asking("room", seed=2))
    [donor] = made.donors
    assert donor.tasks == ()
    whole = merged_network(job, made.donors)
    assert whole is not None
    own = {name: tensor.numpy() for name, tensor in job.selected.state_dict().items()}
    theirs = embed(own, donor.network)
    found = whole.state_dict()
    for name in donor.network.weights:  # its trunk, with zeros for what it dropped
        if "stem.1" not in name:  # a norm that is settled on these images, to the same function
            np.testing.assert_array_equal(found[name].numpy(), theirs[name], err_msg=name)
    assert not np.array_equal(found["network.head.weight"].numpy(), own["network.head.weight"])
    images = job.example
    with torch.no_grad():  # and a head that reads it as the parent's head read the whole one
        wanted, refitted = job.selected(images)["answer"], whole(images)["answer"]
    assert refitted.shape == wanted.shape and bool(refitted.isfinite().all())


def test_the_same_network_votes_and_gives_its_head_too(first: Path) -> None:
    _, made = planned(first, asking("room", seed=1))
    [donor] = made.donors
    assert donor.tasks == ("answer",)
    assert any(name.startswith("network.head.") for name in donor.network.weights)


def test_without_a_trunk_another_network_is_another_parent(first: Path) -> None:
    text = asking("depth").replace("  trunk: trunk\n", "")
    _, made = planned(first, text)
    assert made.vote and made.vote.cold


def test_axes_of_the_trunk_are_the_librarys_and_those_of_the_head_its_own(first: Path) -> None:
    [entry] = find_entries(open_library(first / "lib"))
    theirs = load_entry(open_library(first / "lib"), entry.id).axes
    job, _ = planned(first, asking("depth"))
    own = {group.name for group in within(find_groups(job.selected, job.example), job.trunk)}
    shared = own & theirs.keys()
    assert shared
    for name in shared:
        np.testing.assert_array_equal(job.axes[name], theirs[name])
    assert job.library_basis == entry.facts.basis


def test_a_digest_knows_weights_and_not_code() -> None:
    def model(seed: int, kind: type[Net] = Net) -> MultiTaskModel:
        task = Task("answer", "answer", "classification", "room", classes=4)
        return MultiTaskModel(kind("room", seed), [task])

    class Otherwise(Net):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return super().forward(images)

    one, other = model(1), model(2)
    assert weights_digest(one) == weights_digest(model(1, Otherwise)) != weights_digest(other)
    assert weights_digest(one, "network.trunk.") == weights_digest(other, "network.trunk.")
    with torch.no_grad():
        other.network.trunk.last.bias[0] += 1e-3
    assert weights_digest(one, "network.trunk.") != weights_digest(other, "network.trunk.")


@pytest.mark.parametrize(
    ("trunk", "says"), [("body", "no part 'body'.*\n*.*trunk, head"), ("trun", "no part 'trun'")]
)
def test_a_trunk_that_is_not_there_is_told(trunk: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as told:
        check_trunk(trunk, Net("room", 1))
    assert "trunk, head" in str(told.value)


def test_a_trunk_that_is_everything_is_told() -> None:
    with pytest.raises(RecipeError, match="the whole network"):
        check_trunk("trunk", nn.ModuleDict({"trunk": Trunk()}))


def test_groups_that_a_head_makes_too_are_not_the_trunks() -> None:
    task = Task("a", "answer", "classification", "room", classes=4)
    model = MultiTaskModel(Net("room", 1), [task])
    [group, *_] = within(find_groups(model.eval(), torch.randn(1, 3, 32, 48)), "network.trunk.")
    maker = next(member for member in group.members if member.axis == "out")
    both = replace(group, members=(*group.members, replace(maker, layer="network.head")))
    assert within([group, both], "network.trunk.") == (group,)
    assert within([group, both], "") == (group, both)


@pytest.mark.parametrize(
    ("given", "columns"),
    [
        (torch.ones(2, 5), 5),
        ({"a": torch.ones(2, 3, 4, 4), "b": [torch.ones(2, 7, 6)]}, 3 + 6),
        ((torch.ones(2, 4, 8), 14, torch.tensor(3.0)), 8),
        ([torch.ones(2, 4), torch.ones(3, 4)], 0),
        ("nothing", 0),
    ],
)
def test_features_are_whatever_a_trunk_gives_of_each_image(given: object, columns: int) -> None:
    rows = sketches.rows_of(given)
    assert (rows is None and not columns) or rows.shape == (2, columns)


def both(seed: int, keep: str, extra: str = "rescore: false", tasks: str = "depth room") -> str:
    known = {"depth": "depth: {output: depth, kind: depth}",
             "room": "room: {output: room, kind: classification, classes: 4}"}  # fmt: skip
    said = "{" + ", ".join(known[name] for name in tasks.split()) + "}"
    text = RECIPE.replace("nets:make", "nets:make_both").replace(
        "head: HEAD, seed: SEED", f"seed: {seed}"
    )
    return text.replace("TASKS", said + f"\nkeep: [{keep}]").replace("EXTRA", extra)


ASK = "rescore: false, warm_start: library, similarity: mean_feature"


def test_two_kept_tasks_do_not_share_what_was_refitted_to_a_strangers_trunk(first: Path) -> None:
    text = both(3, "depth", ASK)
    job, made = planned(first, text)
    assert [donor.tasks for donor in made.donors] == [()]
    assert merged_network(job, made.donors) is not None  # and now it is in the cache
    job, made = planned(first, both(3, "room", ASK))
    found = merged_network(job, made.donors)
    alone = merged_network(replace(job, cache=StageCache(first / "empty")), made.donors)
    assert found is not None and alone is not None
    for name, tensor in alone.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.fixture
def with_room(capsys, project: Path) -> Path:
    """The library ``both``, with a cut for rooms of the network that has depth, too."""
    (project / "both.yaml").write_text(both(3, "room").replace("{path: lib}", "{path: both}"))
    arguments = ("--cache", project / "cache", "--target", TARGET, "--out", project / "of-both")
    code, _, stderr = run(capsys, "build", project / "both.yaml", *arguments)
    assert code == 0, stderr
    return project


def test_weights_for_a_task_that_goes_were_not_recovered_for_the_one_kept(with_room: Path) -> None:
    text = both(3, "depth", ASK).replace("{path: lib}", "{path: both}")
    job, made = planned(with_room, text)
    assert [donor.tasks for donor in made.donors] == [("room",)]
    begun = begin_cut(job, made.scored.groups, made.plan)
    _, origin, _ = best_start(job, made, begun)
    assert origin and origin.donors and not origin.recovered


def test_a_task_that_the_recipe_does_not_list_leaves_the_trunk_to_vote(with_room: Path) -> None:
    text = both(3, "depth", ASK, tasks="depth").replace("{path: lib}", "{path: both}")
    _, made = planned(with_room, text)
    [donor] = made.donors
    assert donor.tasks == ()
    assert all(name.startswith("network.trunk.") for name in donor.network.weights)


def test_channels_in_axes_that_ours_are_not_in_stay_out(first: Path) -> None:
    """A head there may read the trunk's last channels in a way that lets them be turned."""
    library = open_library(first / "lib")
    entry = load_entry(library, find_entries(library)[0].id)
    axes = {**entry.axes, "trunk.last": np.eye(32)}
    add_entry(open_library(first / "turned"), replace(entry, axes=axes, scores={}))
    text = asking("depth", similarity="mean_feature").replace("{path: lib}", "{path: turned}")
    _, made = planned(first, text)
    [donor] = made.donors
    assert "network.trunk.blocks.0.0.weight" in donor.network.weights
    assert not [name for name in donor.network.weights if "trunk.last" in name]


def test_what_a_recipe_made_is_told_by_network_and_data_too(first: Path) -> None:
    library = open_library(first / "lib")
    [entry] = find_entries(library)
    facts = entry.facts

    def ids(network: str, data: str) -> set[str]:
        return ids_of_recipe(library, facts.parent, facts.recipe, network=network, data=data)

    assert ids(facts.network, facts.data) == {entry.id}
    assert ids("another", facts.data) == ids(facts.network, "other images") == set()


@pytest.mark.parametrize("head", ["pair", "one"])
def test_a_trunk_without_turned_channels_is_in_the_axes_it_was_trained_in(
    project: Path, head: str
) -> None:
    text = recipe("depth").replace("nets:make", "nets:make_plain").replace(", seed: 1", "")
    text = text.replace("head: depth", f"head: {head}")
    job = turn_axes(open_job(parse_recipe(text, project / "x.yaml"), StageCache(project / "cache")))
    assert (job.basis == "original") == (head == "one")
    assert job.library_basis == "original"


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 8), nn.LayerNorm(8), nn.BatchNorm2d(8)])
def test_norms_over_channels_do_not_bear_zeros(norm: nn.Module) -> None:
    task = Task("a", "a", "depth", "a")
    model = MultiTaskModel(nn.Sequential(norm), [task])
    donor = Donor("x", ("a",), SubNetwork({}, {("network.0", "out"): {1}}, {}), 1.0)
    assert has_narrowed_norms(model, donor) == (not isinstance(norm, nn.BatchNorm2d))


@pytest.mark.parametrize(("start", "count"), [("library", 12), ("none", 16)])
def test_starts_are_judged_on_images_that_no_refit_saw(
    project: Path, start: str, count: int
) -> None:
    text = recipe("room", extra=f"warm_start: {start}").replace("images: 8}", "images: 100}")
    job = open_job(parse_recipe(text, project / "x.yaml"), StageCache(project / "cache"))
    assert len(job.train) == 16 and len({*refit_indices(job)}) == count
