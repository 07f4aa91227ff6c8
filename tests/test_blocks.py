"""Whole residual blocks: which there are, what is left without them, and when they go."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from cli_run import RECIPE, make_project, run
from conftest import SPEC, tiny_model
from safetensors.torch import save_file
from secateur.core.model import MultiTaskModel, evaluating, output_difference
from secateur.core.plan import PrunePlan
from secateur.core.task import Task
from secateur.devices.target import load_target
from secateur.flow import allocation, budgets
from secateur.flow.blocks import Outline, without_least
from secateur.flow.cache import StageCache
from secateur.flow.job import Job, open_job
from secateur.flow.recipe import load_recipe
from secateur.prune import apply_plan, count_macs
from secateur.prune.blocks import find_blocks, without_blocks
from torch import Tensor, fx, nn

EXAMPLE = SPEC.example(2)
X86 = load_target("x86-64-cpu")
LABEL = Task("label", "label", "classification", "label", 3)


class Adds(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, width, 1), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Scales(nn.Module):  # gives nothing with parameters of zero
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.first, self.second, self.third = Adds(), Adds(), Adds()
        self.twice = Adds()
        self.scales = Scales()
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.third(self.second(self.first(self.stem(x))))
        return {"label": self.head(self.scales(self.twice(self.twice(x))).mean((2, 3)))}


def blocks_model() -> MultiTaskModel:
    return MultiTaskModel(Blocks(), (LABEL,)).eval()


class Classifier(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, num_classes=3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"label": self.backbone(x)}


def test_blocks_add_to_what_they_are_given() -> None:
    model = blocks_model()
    blocks = ("network.first", "network.second", "network.third")
    assert find_blocks(model, EXAMPLE) == blocks  # neither one that runs twice nor a gate
    assert find_blocks(without_blocks(model, blocks), EXAMPLE) == ()


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("resnet18", 64, 5),  # 8 but for the stages' firsts; layer1 keeps its width
        ("resnet50", 64, 12),
        ("tf_efficientnet_lite0", 64, 9),
        ("vit_tiny_patch16_224", 224, 12),
        ("convnext_atto", 64, 12),
        ("densenet121", 64, 0),  # it concatenates
    ],
)
def test_the_blocks_of_known_backbones(name: str, size: int, count: int) -> None:
    model = MultiTaskModel(Classifier(name), (LABEL,)).eval()
    blocks = find_blocks(model, torch.randn(1, 3, size, size))
    assert len(blocks) == count


def traced(model: MultiTaskModel) -> MultiTaskModel:
    return MultiTaskModel(fx.symbolic_trace(model.network), model.tasks).eval()


def test_in_a_traced_network_blocks_are_sums() -> None:
    """torch.fx calls no module of modules; neither a gate nor a sum of other things is a block."""
    model = traced(blocks_model())
    blocks = ("network.first.inner", "network.second.inner", "network.third.inner")
    assert find_blocks(model, EXAMPLE) == blocks
    plain, graph = blocks_model(), without_blocks(model, blocks[1:2])
    assert output_difference(without_blocks(plain, ["network.second"]), graph, EXAMPLE) == 0
    assert not any(name.startswith("network.second") for name, _ in graph.named_parameters())
    tiny = traced(tiny_model())
    assert find_blocks(tiny, EXAMPLE) == ("network.add",)  # its layers lie in no module of theirs


def test_blocks_that_follow_one_another_go_in_any_order() -> None:
    model = traced(blocks_model())
    first, second, third = find_blocks(model, EXAMPLE)
    wanted = without_blocks(blocks_model(), ["network.first", "network.second"])
    for order in ((first, second), (second, first)):
        shorter = without_blocks(model, order)
        assert find_blocks(shorter, EXAMPLE) == (third,)
        assert output_difference(wanted, shorter, EXAMPLE) == 0


def test_without_a_block_the_network_is_the_one_whose_block_adds_nothing() -> None:
    model = blocks_model()
    silent = blocks_model()
    with torch.no_grad():
        for parameter in silent.get_submodule("network.second").parameters():
            parameter.zero_()
    shorter = without_blocks(model, ["network.second"])
    assert output_difference(silent, shorter, EXAMPLE) == 0
    assert count_macs(shorter, EXAMPLE) < count_macs(model, EXAMPLE)
    with evaluating(model):
        assert not torch.equal(model(EXAMPLE)["label"], shorter(EXAMPLE)["label"])


BLOCKS_RECIPE = RECIPE.replace("tinyproject:make", "blockproject:make").replace(
    "images: 16}", "images: 16, blocks: true}"
)
FACTORY = """\
import torch
from torch import nn
from conftest import TinyNet
from test_blocks import Adds

class Net(TinyNet):
    def __init__(self):
        super().__init__()
        self.early, self.idle = Adds(3), Adds(3)

    def forward(self, x):
        return super().forward(self.idle(self.early(x)))

def make():
    return Net()
"""


def project(folder: Path, monkeypatch, recipe: str = BLOCKS_RECIPE) -> Path:
    """A network whose block ``idle`` computes a lot and adds next to nothing."""
    path = make_project(folder, recipe)
    (folder / "blockproject.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(folder))
    import blockproject

    torch.manual_seed(0)
    network = blockproject.make().eval()
    with torch.no_grad():
        network.idle.inner[-1].weight.fill_(1e-4)
    save_file(network.state_dict(), folder / "tiny.safetensors")
    return path


def job_of(folder: Path, monkeypatch, recipe: str = BLOCKS_RECIPE) -> Job:
    return open_job(load_recipe(project(folder, monkeypatch, recipe)), StageCache(folder / "c"))


def test_a_block_that_adds_nothing_goes_and_its_channels_stay_with_others(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(allocation, "_labelled", lambda _: [])  # the parent was never trained
    floor = BLOCKS_RECIPE.replace("kind: depth}", "kind: depth, floor: 0.3}")
    job = job_of(tmp_path, monkeypatch, floor)
    planned = budgets.plan_within(job, X86)
    plan = planned.plan
    assert "network.idle.inner" in plan.removed and not any("idle" in cut.name for cut in plan.cuts)
    assert plan.macs_before == count_macs(job.selected, job.example)
    cut = apply_plan(job.selected, planned.scored.groups, plan)
    assert count_macs(cut, job.example) == plan.macs_after <= 0.5 * plan.macs_before
    assert planned.budgets["macs"].planned == pytest.approx(plan.macs_after / plan.macs_before)
    assert 0 < plan.lost["depth"] <= 0.7 + 1e-6  # what the block took counts, too
    assert PrunePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert budgets.plan_within(job, X86).plan == plan  # the same again, from the cache
    outline = budgets._outlined
    asked: list[tuple[str, ...]] = []
    for by in (["x86-64-cpu"], ["x86-64-cpu"], ["raspberry-pi-5"]):

        def outline_of(trial: Job) -> Outline:
            asked.append(trial.removed)
            return outline(trial, X86, {})

        before = len(asked)
        without_least(job, outline_of, by)
        assert (len(asked) > before) == (by != ["x86-64-cpu"] or before == 0)


@pytest.mark.parametrize("mode", ["fp32", "int8"])
def test_operators_without_a_block_are_those_of_the_whole_network(
    tmp_path, monkeypatch, mode: str
) -> None:
    """So what was measured of the one is known of the other."""
    precision = f"precision: {{mode: {mode}, calibrator: minmax, images: 8}}\n"
    job = job_of(tmp_path, monkeypatch, BLOCKS_RECIPE + precision)
    whole = budgets.basis_of(job, X86)
    shorter = budgets.basis_of(replace(job, removed=find_blocks(job.selected, job.example)), X86)
    kinds = {each.kind for each in whole.timed.timed}
    assert {each.kind for each in shorter.timed.timed} < kinds
    names = {each.kind.place for each in shorter.timed.timed}
    assert len(names) == len(shorter.timed.timed)  # each has a place of its own


def test_where_no_narrow_network_fits_a_shorter_one_is_built(
    tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = BLOCKS_RECIPE.replace("macs: 0.5", "macs: 0.3")
    path = project(tmp_path, monkeypatch, recipe.replace("blocks: true", "floor: 0.5"))
    code, _, err = run(capsys, "plan", path, "--target", "x86-64-cpu")
    assert code == 2 and "MACs" in err
    path.write_text(recipe.replace("blocks: true", "floor: 0.5, blocks: true"))
    cache = ["--cache", tmp_path / "cache"]
    code, out, err = run(capsys, "plan", path, "--target", "x86-64-cpu", *cache)
    assert code == 0, err
    assert "blocks that go whole: network." in out
    code, out, err = run(capsys, "build", path, "--target", "x86-64-cpu", "--out",
                         tmp_path / "out", "--json", *cache)  # fmt: skip
    assert code == 0, err
    bundle = tmp_path / "out" / "x86-64-cpu" / "fp32"
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["plan"]["removed"] and manifest["plan"]["macs_after"] < 0.3 * 9770496
    code, _, err = run(capsys, "verify", bundle)
    assert code == 0, err


def test_a_library_has_no_vote_on_blocks(
    tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = BLOCKS_RECIPE.replace("blocks: true", "blocks: true, warm_start: library")
    code, _, err = run(capsys, "plan", project(tmp_path, monkeypatch, recipe), "--target",
                       "x86-64-cpu")  # fmt: skip
    assert code == 2 and "earlier cuts do not vote on whole blocks" in " ".join(err.split())
