"""The planted case: a depth-wise trunk with six heads that plain int8 breaks, at known layers."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import run
from safetensors.torch import save_file
from secateur.bench.latency import Protocol
from secateur.core.model import ModelInput, MultiTaskModel
from secateur.core.task import Task
from secateur.data.loading import open_reader
from secateur.flow.build import build as run_build
from secateur.flow.cache import StageCache
from secateur.flow.recipe import parse_recipe
from secateur.recover import TrainSettings, train
from torch import Tensor, nn
from torch.nn import functional

pytestmark = pytest.mark.slow

HEADS = {"objects": 8, "scene": 8, "near": 1, "far": 1, "normals": 3, "room": 4}
LARGE = 400.0
WORN = 60.0  # the same in every block: nothing to keep that would not be most of the network
SIDES = {n: {f"blocks.{n}.project.0", f"blocks.{n + 1}.expand.0"} for n in range(4)}
PLANTED = (1, 3)  # blocks whose result has one channel that is LARGE times the others

FACTORY = """\
from test_six_heads import SixHeads

def make():
    return SixHeads()
"""

RECIPE = """\
model: {factory: "sixproject:make", checkpoint: six.safetensors, input: {shape: [3, 32, 48]}}
tasks:
  objects: {output: objects, kind: segmentation, classes: 8, label: segmentation, max_drop: 4}
  scene:   {output: scene, kind: segmentation, classes: 8, label: segmentation, max_drop: 4}
  near:    {output: near, kind: depth, label: depth, max_drop: 4}
  far:     {output: far, kind: depth, label: depth, max_drop: 4}
  normals: {output: normals, kind: normals, max_drop: 4}
  room:    {output: room, kind: classification, classes: 4, max_drop: 4}
data:
  train: {reader: scenes, split: train, options: {count: 48, height: 32, width: 48}}
  eval:  {reader: scenes, split: test, options: {count: 24, height: 32, width: 48}}
prune:      {budget: {macs: 1.0}, search: false, images: 4, axes: original, criterion: magnitude}
compensate: false
precision:
"""


def layer(inputs: int, outputs: int, size: int, **options: int) -> nn.Sequential:
    """A convolution and its norm, which export folds into it."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options),
        nn.BatchNorm2d(outputs),
    )


class Block(nn.Module):
    """Expand, depth-wise, project: ReLU6 inside, a linear result."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = layer(width, 3 * width, 1)
        self.depthwise = layer(3 * width, 3 * width, 3, groups=3 * width)
        self.project = layer(3 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu6(self.expand(x))
        return self.project(functional.relu6(self.depthwise(y)))


class SixHeads(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = layer(3, width, 3, stride=2)
        self.blocks = nn.ModuleList(Block(width) for _ in range(5))
        self.mix = layer(width, 2 * width, 1)
        self.heads = nn.ModuleDict({
            name: nn.Linear(2 * width, size) if name == "room" else nn.Conv2d(2 * width, size, 1)
            for name, size in HEADS.items()
        })  # fmt: skip

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = functional.relu6(self.stem(image))
        for block in self.blocks:
            x = block(x)
        x = functional.relu6(self.mix(x))
        up = functional.interpolate(x, scale_factor=2.0, mode="bilinear")
        return {name: head(x.mean((2, 3)) if name == "room" else up)
                for name, head in self.heads.items()}  # fmt: skip


def trained_network() -> SixHeads:
    torch.manual_seed(0)
    kinds = {"objects": "segmentation", "scene": "segmentation", "near": "depth", "far": "depth",
             "normals": "normals", "room": "classification"}  # fmt: skip
    tasks = [Task(name, name, kind, {"normals": "normals", "room": "room"}.get(name, kind),
                  classes=HEADS[name])
             for name, kind in kinds.items()]  # fmt: skip
    reader = open_reader("scenes", None, "train", count=48, height=32, width=48)
    spec = ModelInput(3, 32, 48, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    settings = TrainSettings(steps=120, batch_size=8, learning_rate=1e-2)
    network = train(MultiTaskModel(SixHeads(), tasks), reader, spec, settings).model.network
    assert isinstance(network, SixHeads)
    return network


def planted(network: SixHeads, blocks: Sequence[int], factor: float) -> SixHeads:
    """Make one channel between two layers ``factor`` times larger, and change nothing else.

    The block that follows a planted one divides by as much, so outputs stay what they were.
    """
    network = copy.deepcopy(network)
    with torch.no_grad():
        for number in blocks:
            norm, reading = network.blocks[number].project[1], network.blocks[number + 1].expand[0]
            norm.weight[0] *= factor
            norm.bias[0] *= factor
            reading.weight[:, 0] /= factor
    return network


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("six")
    (folder / "sixproject.py").write_text(FACTORY)
    network = trained_network()
    for name, weights in (
        ("six", planted(network, PLANTED, LARGE)),
        ("worn", planted(network, range(4), WORN)),
    ):
        save_file(weights.state_dict(), folder / f"{name}.safetensors")
    return folder


def build(project: Path, name: str, precision: str, text: str = RECIPE) -> tuple[Path, Any]:
    recipe = parse_recipe(f"{text}  {precision}\n", project / f"{name}.yaml")
    made = run_build(recipe, "x86-64-cpu", project / name, cache=StageCache(project / "cache"),
                     protocol=Protocol(10, 0.1, 10))  # fmt: skip
    return made.folder, json.loads((made.folder / "manifest.json").read_text())


def test_plain_int8_breaks_it_and_diagnose_names_the_planted_layers(capsys, project: Path) -> None:
    plain = "{mode: int8, calibrator: minmax, images: 32, equalise: false, guard: false}"
    folder, manifest = build(project, "plain", plain)
    change = manifest["accuracy"]["change_percent"]
    assert sum(lost < -10 for lost in change.values()) >= 2, change
    code, stdout, _ = run(capsys, "diagnose", folder, "--json")
    findings = json.loads(stdout)["findings"]
    assert code == 1
    # Either side of the tensor with the large channel may bear its grid.
    sides = [SIDES[n] for n in PLANTED]
    named = [set(f["modules"]) for f in findings if f["cost_percent"] < -4]
    assert named and all(len(modules) == 1 for modules in named)
    assert all(any(modules <= pair for pair in sides) for modules in named), named
    assert all(any(modules <= pair for modules in named) for pair in sides), named


def test_the_guard_repairs_it_and_keeps_little_else(project: Path) -> None:
    guarded = "{mode: int8, calibrator: minmax, images: 32, equalise: false}"
    _, manifest = build(project, "guarded", guarded)
    found = manifest["quantisation"]
    assert manifest["accuracy"]["too_low"] == [] and found["guard"]["passed"]
    kept = {row["module"] for row in found["kept"] if row["why"] != "head"}
    sides = {
        name for n in PLANTED for name in (f"blocks.{n}.project.0", f"blocks.{n + 1}.expand.0")
    }
    assert kept and kept <= sides
    assert found["macs_share"]["int8"] > 0.5


def test_equalisation_alone_repairs_it(project: Path) -> None:
    auto = "{mode: int8, calibrator: minmax, images: 32, guard: false}"
    _, manifest = build(project, "equalised", auto)
    assert manifest["quantisation"]["equalised_channels"] > 0
    assert manifest["accuracy"]["too_low"] == []
    assert manifest["quantisation"]["kept"] == []


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("right", "layout: RGB", ""),
        ("bgr", "layout: BGR", "with the channels not in the order BGR but in the other one"),
        ("plain", "mean: [0, 0, 0], std: [1, 1, 1]", "with mean and std of ImageNet"),
    ],
)
def test_a_wrong_way_to_prepare_images_is_seen_by_the_accuracy(
    capsys, project: Path, name: str, given: str, says: str
) -> None:
    """Calibration alone cannot see it: such images are as good as any."""
    text = RECIPE.replace("[3, 32, 48]}", f"[3, 32, 48], {given}}}")
    folder, _ = build(project, name, "{mode: int8, images: 32, guard: false}", text)
    code, stdout, _ = run(capsys, "diagnose", folder, "--json")
    found = json.loads(stdout)["findings"]
    told = [each["message"] for each in found if each["kind"] == "preprocessing"]
    assert len(told) == bool(says) and (code == 1 or not says)
    assert all(says in message for message in told)


def test_a_bundle_is_looked_at_where_a_variable_of_its_recipe_is_not_set(
    capsys, project: Path, monkeypatch
) -> None:
    monkeypatch.setenv("SIX", "six.safetensors")
    text = RECIPE.replace("six.safetensors", '"${SIX}"')
    folder, _ = build(project, "variable", "{mode: int8, images: 32, guard: false}", text)
    monkeypatch.delenv("SIX")
    code, stdout, stderr = run(capsys, "diagnose", folder, "--json")
    said = json.loads(stdout)
    assert code in (0, 1) and "Traceback" not in stderr
    assert "uses ${SIX}, which is not set" in said["skipped"][0]


def test_where_the_guard_finds_too_little_the_network_learns_to_bear_int8(project: Path) -> None:
    text = RECIPE.replace("six.safetensors", "worn.safetensors").replace(
        "max_drop: 4", "max_drop: 9"
    )
    given = "mode: int8, calibrator: minmax, images: 32, equalise: false"
    _, manifest = build(project, "worn", f"{{{given}}}", text)
    guarded = manifest["quantisation"]
    assert guarded["guard"]["passed"] and guarded["distilled"] is None
    folder, manifest = build(
        project, "distilled", f"{{{given}, distill: {{steps: 120, learning_rate: 1.0e-3}}}}", text
    )
    found = manifest["quantisation"]
    assert found["distilled"]["taken"] and manifest["accuracy"]["too_low"] == []
    assert found["distilled"]["int8_before"] == round(guarded["macs_share"]["int8"], 4)
    assert found["macs_share"]["int8"] > 1.1 * guarded["macs_share"]["int8"]
    assert {row["why"] for row in found["kept"]} == {"head"}
    # What it learned from is the fp32 cut alone; what ships is the writer's own form of it.
    assert (folder / "fp32.onnx").exists() and manifest["parity"]
