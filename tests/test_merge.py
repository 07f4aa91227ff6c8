"""``secateur merge``: single-task networks of one architecture become one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_run import RECIPE, make_project, run
from conftest import SPEC, TASKS, TinyNet, tiny_model
from safetensors.torch import load_file, save_file
from secateur.data.loading import image_batch, open_reader
from secateur.tasks import select_tasks

NAMES = [task.name for task in TASKS]
EXAMPLE = SPEC.example(2)
Project = tuple[Path, dict[str, Path]]


def expert_of(task: str, noise: float, seed: int) -> dict[str, torch.Tensor]:
    """The weights of the tiny network that ``task`` uses, moved by noise as fine-tuning would."""
    state = select_tasks(tiny_model(), [task], EXAMPLE).network.state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1 else tensor
        for name, tensor in state.items()
    }  # fmt: skip


def rooms() -> torch.Tensor:
    """Rendered images that nothing was fitted on."""
    reader = open_reader("scenes", None, "test", count=8, height=32, width=48)
    return image_batch(reader, range(8), SPEC)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    recipe = make_project(tmp_path, RECIPE.replace("tiny.safetensors", "joint.safetensors"))
    files = {task: tmp_path / f"{task}.safetensors" for task in NAMES}
    for seed, (task, path) in enumerate(files.items()):
        save_file(expert_of(task, 0.05, seed), path)
    return recipe, files


def words(files: dict[str, Path], **others: object) -> list[str | Path]:
    named = [
        word for task, path in {**files, **others}.items() for word in ("-e", f"{task}={path}")
    ]
    return [
        *named,
        "--images",
        "8",
        "--out",
        next(iter(files.values())).parent / "joint.safetensors",
    ]


def merged(capsys, project: Project, *more: str | Path) -> dict:
    recipe, files = project
    code, stdout, stderr = run(capsys, "merge", recipe, *words(files), "--json", *more)
    assert code == 0, stderr
    return json.loads(stdout)


def test_the_merged_network_does_what_each_expert_does_and_is_the_next_parent(
    capsys, project: Project
) -> None:
    recipe, files = project
    result = merged(capsys, project)
    joint = TinyNet()
    joint.load_state_dict(load_file(result["checkpoint"]))
    joint.eval()
    images = rooms()
    for task in TASKS:
        alone = select_tasks(tiny_model(), [task.name], EXAMPLE).eval()
        with torch.no_grad():
            before = alone(images)[task.name]
            alone.network.load_state_dict(load_file(files[task.name]))
            wanted, given = alone(images)[task.name], joint(images)[task.output]
        far = (given - wanted).square().mean() / (wanted - before).square().mean()
        assert float(far) < 1, task.name  # nearer to the expert than what it was tuned from
    assert result["experts"].keys() == result["merged"].keys() == {*NAMES}
    assert result["delta_t"] == pytest.approx(np.mean(list(result["change_percent"].values())))
    assert result["likeness"] > 0.9 and result["images"] == 8
    code, _, stderr = run(capsys, "plan", recipe, "--cache", recipe.parent / "cache")
    assert code == 0, stderr


def test_equal_experts_give_themselves_back(capsys, project: Project) -> None:
    _, files = project
    for task, path in files.items():
        save_file(expert_of(task, 0.0, 0), path)
    result = merged(capsys, project)
    assert result["likeness"] == pytest.approx(1)
    joint, parent = TinyNet(), tiny_model()
    joint.load_state_dict(load_file(result["checkpoint"]))
    images = rooms()
    with torch.no_grad():
        given, wanted = joint.eval()(images), parent(images)
    for task in TASKS:
        spread = wanted[task.name].std()
        assert (given[task.output] - wanted[task.name]).abs().max() < 0.05 * spread


def test_a_file_may_hold_all_heads_a_wrapper_and_several_tasks(capsys, project: Project) -> None:
    recipe, files = project
    whole = {f"module.{k}": v for k, v in tiny_model().network.state_dict().items()}
    both = recipe.parent / "both.pt"
    torch.save({"state_dict": whole}, both)
    left = {task: path for task, path in files.items() if task == "room"}
    code, stdout, stderr = run(
        capsys, "merge", recipe, *words(left, **{"segmentation,depth": both}), "--json"
    )
    assert code == 0, stderr
    assert json.loads(stdout)["experts"].keys() == {*NAMES}


class Constant(TinyNet):
    """One whose forward makes constants, which torch.fx numbers anew in each trace."""

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        found = super().forward(image)
        found["room"] = found["room"] + torch.tensor([0.1, 0.2, 0.3, 0.4])
        return {**found, "depth": found["depth"] * torch.tensor(2.0)}


def test_constants_of_forward_are_no_weights(capsys, project: Project) -> None:
    recipe, _ = project
    recipe.write_text(recipe.read_text().replace("tinyproject:make", "test_merge:Constant"))
    result = merged(capsys, project)
    assert load_file(result["checkpoint"]).keys() == Constant().state_dict().keys()
    code, _, stderr = run(capsys, "plan", recipe, "--cache", recipe.parent / "cache")
    assert code == 0, stderr


def test_strangers_are_told(capsys, project: Project) -> None:
    recipe, files = project
    torch.manual_seed(9)
    save_file(TinyNet().state_dict(), files["depth"])
    code, stdout, _ = run(capsys, "merge", recipe, *words(files))
    assert code == 0 and "share hardly a weight" in " ".join(stdout.split())


def test_what_does_not_fit_is_told_and_nothing_is_written(capsys, project: Project) -> None:
    recipe, files = project
    wrong = recipe.parent / "wrong.safetensors"
    save_file({"body.weight": torch.ones(2, 2)}, wrong)
    two = {task: files[task] for task in NAMES[:2]}
    for given, told in {
        "tree": "'tree' is no task of the recipe",
        "": f"task '{NAMES[2]}' has no expert",
        f"{NAMES[2]},{NAMES[0]}": f"task '{NAMES[0]}' has more than one expert",
    }.items():
        more = {given: wrong} if given else {}
        code, _, stderr = run(capsys, "merge", recipe, *words(two, **more))
        assert code == 2 and told in " ".join(stderr.split())
    for path, told in ((wrong, "does not fit"), (recipe.parent / "no.pt", "there is no file")):
        code, _, stderr = run(capsys, "merge", recipe, *words({**files, NAMES[0]: path}))
        assert code == 2 and told in " ".join(stderr.split())
    code, _, stderr = run(capsys, "merge", recipe, *words({",".join(NAMES): files[NAMES[0]]}))
    assert code == 2 and "nothing to merge" in stderr
    for word, told in (("depth", "is not TASK=FILE"), ("=x.pt", "is not TASK=FILE")):
        code, _, stderr = run(capsys, "merge", recipe, "-e", word, "--out", wrong)
        assert code == 2 and told in stderr
    code, _, stderr = run(capsys, "merge", recipe, *words(files)[:-1], files[NAMES[0]])
    assert code == 2 and "no place for the merged weights" in stderr
    assert not (recipe.parent / "joint.safetensors").exists()
