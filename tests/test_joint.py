"""The refit of all layers together, which ends a compensation that no recovery follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TinyNet
from secateur.core.model import MultiTaskModel
from secateur.data.loading import image_batch
from secateur.data.sample import Reader, Sample
from secateur.flow.cache import StageCache
from secateur.flow.job import Job, open_job
from secateur.flow.joint import Joint, refit_jointly
from secateur.flow.planning import make_plan
from secateur.flow.recipe import parse_recipe
from secateur.flow.recovery import recovered
from secateur.flow.stages import begin_cut, finish_cut
from secateur.metrics.kind import kind_of

RECIPE = """
model: {{factory: test_joint:strong, input: {{shape: [3, 32, 48]}}}}
tasks:
  segmentation: {{output: seg, kind: segmentation, classes: 8}}
  depth: {{output: depth, kind: depth}}
data:
  train: {{reader: scenes, split: train, options: {{count: 16, height: 32, width: 48}}}}
  eval: {{reader: scenes, split: test, options: {{count: 4, height: 32, width: 48}}}}
prune: {{budget: {{macs: 0.2}}, grid: 4, search: false}}
compensate: {{images: 8, {joint}}}
recover: {recover}
"""


def strong() -> TinyNet:
    """A network whose outputs differ between images, as a trained one's do."""
    network = TinyNet()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    return network


def job(tmp_path: Path, joint: str = "joint: 24", recover: str = "none") -> Job:
    torch.manual_seed(0)
    text = RECIPE.format(joint=joint, recover=recover)
    return open_job(parse_recipe(text, tmp_path / "recipe.yaml"), StageCache(tmp_path / "cache"))


def distance(work: Job, model: MultiTaskModel) -> float:
    """How far a network is from the parent on all training images."""
    images = image_batch(work.train, range(len(work.train)), work.spec)
    with torch.no_grad():
        own, parent = model.eval()(images), work.selected(images)
    return sum(float(kind_of(task).distillation_loss(own[task.name], parent[task.name]))
               for task in work.tasks)  # fmt: skip


def same(one: MultiTaskModel, other: MultiTaskModel) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class Unlabelled:
    """The same images; whoever asks for a label is told off."""

    def __init__(self, reader: Reader) -> None:
        self.source, self.fingerprint = reader, reader.fingerprint
        self.label_names = frozenset[str]()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return replace(self.source[index], labels={})


def test_all_layers_together_come_nearer_to_the_parent_without_a_label(tmp_path: Path) -> None:
    work = job(tmp_path)
    work = replace(work, train=Unlabelled(work.train))
    groups, plan = make_plan(work, 4)
    begun = begin_cut(work, groups, plan)
    cut = finish_cut(work, plan, begun)
    assert distance(work, cut.recovered) < 0.95 * distance(work, begun)
    assert cut.joint == "24 passes over 8 images"
    assert cut.steps == 0 and same(cut.compensated, cut.recovered), "it is no recovery"
    before = [p.shape for p in begun.parameters()]
    assert [p.shape for p in cut.recovered.parameters()] == before


@pytest.mark.parametrize(("joint", "recover"), [
    ("joint: 0", "none"), ("joint: 24", "{steps: 1}"), ("joint: 24", "{steps: 1, labels: false}"),
])  # fmt: skip
def test_it_is_left_out_where_nobody_wants_it_or_recovery_follows(
    joint: str, recover: str, tmp_path: Path
) -> None:
    work = job(tmp_path, joint, recover)
    groups, plan = make_plan(work, 4)
    begun = begin_cut(work, groups, plan)
    assert refit_jointly(work, plan, begun) == Joint(begun)


def test_it_is_found_again_and_never_taken_for_a_recovery(tmp_path: Path, monkeypatch) -> None:
    work = job(tmp_path)
    groups, plan = make_plan(work, 4)
    begun = begin_cut(work, groups, plan)
    first = refit_jointly(work, plan, begun).model
    alike = "{epochs: 24, learning_rate: 0.001, labels: false, augment: none, freeze_norms: 0}"
    _, steps = recovered(job(tmp_path, recover=alike), plan, begun)
    assert steps == 48, "of all sixteen images, where eight are what it is fitted on"
    monkeypatch.setattr("secateur.flow.recovery.train", None)
    again = refit_jointly(work, plan, begun).model
    assert same(again, first)


def test_what_does_harm_is_undone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("secateur.flow.joint.RATE", 3.0)
    work = job(tmp_path)
    groups, plan = make_plan(work, 4)
    begun = begin_cut(work, groups, plan)
    cut = finish_cut(work, plan, begun)
    assert same(cut.recovered, begun) and cut.joint.startswith("undone: ")


def test_a_neighbours_weights_are_not_pulled_back_to_the_parent(tmp_path: Path) -> None:
    work = job(tmp_path)
    groups, plan = make_plan(work, 4)
    begun = begin_cut(work, groups, plan)
    cut = finish_cut(work, plan, begun, joint=False)
    assert same(cut.recovered, begun) and cut.joint == ""


class Training(TinyNet):
    """A network that drops features while it trains, and gives losses in place of outputs."""

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": image.mean()} if self.training else super().forward(image)


def test_what_a_network_does_in_training_alone_stays_out(tmp_path: Path) -> None:
    work = job(tmp_path)
    groups, plan = make_plan(work, 4)
    begun = begin_cut(work, groups, plan)
    own = Training()
    own.load_state_dict(work.selected.network.state_dict(), strict=False)
    with torch.no_grad():
        own.seg.weight.mul_(1.5)  # something to put right
    begun = MultiTaskModel(own, begun.tasks).eval()
    assert refit_jointly(work, plan, begun).told == "24 passes over 8 images"
