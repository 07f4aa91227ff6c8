"""What somebody new to it gets wrong, and what they are told instead of a wrong number."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from cli_run import RECIPE, make_project, run
from conftest import SPEC, tiny_model
from secateur.cli.build import _recovery_harmed, doubts
from secateur.core.errors import DataError
from secateur.core.model import MultiTaskModel
from secateur.core.task import Task
from secateur.data.sample import Sample
from secateur.data.transforms import fit_sample, target_tensor
from secateur.prune import count_macs
from secateur.tasks import select_tasks
from torch import Tensor, nn

EXAMPLE = SPEC.example(2)


class Idle(nn.Module):
    """A network whose last block feeds no output, as a backbone cut short by its caller has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.more = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.idle, self.head = nn.Conv2d(8, 64, 3, 1, 1), nn.Conv2d(8, 1, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = [self.stem(image)]
        for layer in (self.more, self.idle):
            features.append(layer(features[-1]).relu())
        return {"depth": self.head(features[1])}


def test_layers_that_no_task_uses_are_not_counted_though_all_tasks_are_kept() -> None:
    torch.manual_seed(0)
    model = MultiTaskModel(Idle(), [Task("depth", "depth", "depth", "depth")]).eval()
    kept = select_tasks(model, ["depth"], EXAMPLE)
    assert "network.idle.weight" not in kept.state_dict()
    assert torch.equal(kept(EXAMPLE)["depth"], model(EXAMPLE)["depth"])
    assert count_macs(kept, EXAMPLE) < 0.3 * count_macs(model, EXAMPLE)
    whole = tiny_model()
    same = select_tasks(whole, [task.name for task in whole.tasks], EXAMPLE)
    assert type(same.network) is type(whole.network)  # without such layers nothing is traced


def test_inspect_shows_what_no_task_uses(capsys, tmp_path: Path) -> None:
    text = RECIPE.replace("tinyproject:make", "test_first_steps:Idle")
    text = text.replace("  checkpoint: tiny.safetensors\n", "")
    tasks = text[text.index("  segmentation:") : text.index("keep:")]
    text = text.replace(tasks, "  depth: {output: depth, kind: depth}\n")
    text = text.replace("keep: [segmentation, depth]\n", "")
    code, stdout, stderr = run(capsys, "inspect", make_project(tmp_path, text))
    assert code == 0, stderr
    assert "no task" in stdout and f"{8 * 64 * 9 + 64:,}" in stdout


def recipe_error(capsys, tmp_path: Path, text: str) -> str:
    code, _, stderr = run(capsys, "plan", make_project(tmp_path, text))
    assert code == 2
    return " ".join(stderr.split())


def test_a_key_given_twice_is_told(capsys, tmp_path: Path) -> None:
    told = recipe_error(capsys, tmp_path, f"{RECIPE}prune: {{budget: {{macs: 0.9}}}}\n")
    assert "line 16: key 'prune' stands there twice, first on line 13" in told


def test_a_misspelt_key_comes_before_the_one_that_lacks_for_it(capsys, tmp_path: Path) -> None:
    told = recipe_error(capsys, tmp_path, RECIPE.replace("budget:", "buget:"))
    assert "key 'prune.buget' is not known" in told and "did you mean 'budget'?" in told


def test_a_missing_package_of_the_factory_is_named(capsys, tmp_path: Path) -> None:
    path = make_project(tmp_path, RECIPE.replace("tinyproject:", "needy:"))
    (tmp_path / "needy.py").write_text("import nonesuch_package\n")
    code, _, stderr = run(capsys, "plan", path)
    assert code == 2 and "is 'nonesuch_package'?" in stderr


@pytest.mark.parametrize("options", ["{count: -3}", "{count: many}"])
def test_a_readers_options_are_checked(capsys, tmp_path: Path, options: str) -> None:
    text = RECIPE.replace("{count: 16, height: 32, width: 48}", options)
    assert "does not take these options" in recipe_error(capsys, tmp_path, text)


def test_labels_of_other_names_are_no_silence(capsys, tmp_path: Path) -> None:
    for name in ("image", "segmentation", "preview", "__MACOSX"):
        (tmp_path / "mine" / name).mkdir(parents=True)
    for index in range(4):
        picture = np.full((32, 48, 3), index, np.uint8)
        for name in (f"image/{index}", f"preview/p{index}", f"__MACOSX/._{index}"):
            cv2.imwrite(str(tmp_path / f"mine/{name}.png"), picture)
    cv2.imwrite(str(tmp_path / "mine/legend.png"), picture)
    train = "{reader: scenes, split: train, options: {count: 16, height: 32, width: 48}}"
    text = RECIPE.replace(train, "{reader: folder, root: mine, split: .}")
    path = make_project(tmp_path, text)
    code, _, stderr = run(capsys, "plan", path, "--cache", tmp_path / "cache")
    assert code == 0, stderr  # other pictures are no labels
    cv2.imwrite(str(tmp_path / "mine/segmentation/0_mask.png"), picture[..., 0])
    assert "is of none of the 4 images of split '.': it has '0_mask', an image is called '0'" in (
        recipe_error(capsys, tmp_path, text)
    )


def test_labels_of_another_picture_or_between_classes_are_told() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    segmentation = Task("seg", "seg", "segmentation", "seg", classes=3)
    room = Task("room", "room", "classification", "room", classes=4)
    smaller = Sample("a", image, {"seg": np.zeros((32, 32), np.uint8), "room": np.array(2.0)})
    assert target_tensor(smaller, segmentation, SPEC).shape == (SPEC.height, SPEC.width)
    assert target_tensor(smaller, room, SPEC) == 2
    labels = {"seg": np.zeros((30, 40), np.uint8), "room": np.array(1.5)}
    for task, told in ((segmentation, "is 40x30, its image 64x64"), (room, "has the class 1.5")):
        with pytest.raises(DataError, match=told):
            target_tensor(replace(smaller, labels=labels), task, SPEC)
    with pytest.raises(DataError, match="is 40x30"):  # as recovery reads it
        fit_sample(replace(smaller, labels=labels), SPEC, [segmentation])


def test_a_parent_no_better_than_a_guess_is_doubted() -> None:
    tasks = [
        SimpleNamespace(name="room", kind="classification", classes=4),
        SimpleNamespace(name="depth", kind="depth", classes=None),
        SimpleNamespace(name="seg", kind="segmentation", classes=5),
    ]

    def of(top1: float, abs_rel: float, miou: float) -> list[str]:
        parent = {"room": {"top1": top1}, "depth": {"abs_rel": abs_rel}, "seg": {"miou": miou}}
        return doubts(SimpleNamespace(tasks=tasks, accuracy=SimpleNamespace(parent=parent)))  # type: ignore[arg-type]

    assert of(80.0, 0.2, 60.0) == []
    guess, unit, one = of(25.0, 104.5, 14.0)
    assert "a guess in 25 %" in guess and "the same unit?" in unit
    assert "mIoU is 14 %, one class everywhere may have 20 %" in one


@pytest.mark.parametrize(
    ("before", "low_precision", "harmed"),
    [(-0.3, False, True), (-0.6, False, False), (-0.3, True, False)],
)
def test_a_recovery_that_did_harm_is_told(before: float, low_precision: bool, harmed: bool) -> None:
    """What ships lost .4 to .8 %; in a lower precision that may have cost it."""
    accuracy = SimpleNamespace(
        intervals=SimpleNamespace(delta_t=(-0.8, -0.4)), delta_t_before_recovery=before,
        pruned={} if low_precision else None,
    )  # fmt: skip
    assert _recovery_harmed(accuracy) == harmed  # type: ignore[arg-type]


def test_a_cut_without_labels_says_so_and_a_boards_latency_is_not_this_machines(
    capsys, tmp_path: Path
) -> None:
    train = "{reader: scenes, split: train, options: {count: 16, height: 32, width: 48}}"
    text = RECIPE.replace(train, "{reader: folder, root: plain, split: .}")
    (tmp_path / "plain").mkdir()
    for index in range(16):
        cv2.imwrite(str(tmp_path / f"plain/{index}.png"), np.full((32, 48, 3), index, np.uint8))
    path = make_project(tmp_path, text)
    options = ("--cache", tmp_path / "cache", "--out", tmp_path / "out")
    code, stdout, stderr = run(capsys, "build", path, "--target", "raspberry-pi-5", *options)
    assert code == 0, stderr
    assert "data.train has none of segmentation, depth" in " ".join(stdout.split())
    bundle = tmp_path / "out/raspberry-pi-5/fp32"
    plan = json.loads((bundle / "manifest.json").read_text())["plan"]
    assert plan["without_labels"] == ["segmentation", "depth"]
    code, stdout, stderr = run(capsys, "bench", bundle)
    assert code == 0, stderr
    assert "not written: measured on this CPU, not on a raspberry-pi-5" in " ".join(stdout.split())
    assert not (bundle / "bench.json").exists()
