"""The worked example on one's own model runs as its README section says."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from cli_run import run
from conftest import REPOSITORY, SPEC
from safetensors.torch import save_file
from secateur.core.task import Task
from secateur.data.loading import batches, open_reader
from secateur.flow.recipe import load_recipe


def write_images(root: Path, labelled: bool) -> None:
    split = "test" if labelled else "train"
    reader = open_reader("scenes", None, split, count=6, height=64, width=96)
    (root / "image").mkdir(parents=True)
    rows = ["name,weather,daytime"]
    for i in range(6):
        cv2.imwrite(str(root / f"image/{i}.png"), reader[i].image[:, :, ::-1])
        rows.append(f"{i},{i % 4},{i % 2}")
    if labelled:
        (root / "lane").mkdir()
        for i in range(6):
            cv2.imwrite(str(root / f"lane/{i}.png"), reader[i].labels["segmentation"] % 3)
        (root / "labels.csv").write_text("\n".join(rows))


def test_bring_your_own_from_a_tuple_model_and_unlabelled_images(capsys, tmp_path: Path) -> None:
    project = Path(shutil.copytree(REPOSITORY / "examples/bring_your_own", tmp_path / "own"))
    spec = importlib.util.spec_from_file_location("own_model", project / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    save_file(module.make().state_dict(), project / "weights.safetensors")
    write_images(project / "images/train", labelled=False)
    write_images(project / "images/eval", labelled=True)
    recipe = (project / "recipe.yaml").read_text()
    for limit in (", max_drop: 5", "epochs: 2"):  # random weights have nothing to keep
        recipe = recipe.replace(limit, {"epochs: 2": "epochs: 1"}.get(limit, ""))
    recipe = recipe.replace("{budget: {macs: 0.6}}", "{budget: {macs: 0.6}, search: {tries: 2}}")
    (project / "recipe.yaml").write_text(recipe)
    code, stdout, stderr = run(
        capsys, "build", project / "recipe.yaml", "--out", tmp_path / "out", "--json"
    )
    assert code == 0, stderr
    (built,) = json.loads(stdout)
    assert [task["name"] for task in built["manifest"]["tasks"]] == ["lane", "daytime"]
    cost = built["manifest"]["cost"]["macs"] / built["manifest"]["cost_parent"]["macs"]
    assert 0.59 <= cost <= 0.6
    assert run(capsys, "verify", tmp_path / "out/x86-64-cpu/fp32")[0] == 0


def test_the_reader_in_the_docs_reads(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs/extending.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    (tmp_path / "own_reader.py").write_text(code)
    spec = importlib.util.spec_from_file_location("own_reader", tmp_path / "own_reader.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "train").mkdir()
    for name in ("a.jpg", "a.png", "b.jpg", "b.png"):
        cv2.imwrite(str(tmp_path / "train" / name), np.full((32, 48, 3), 1, np.uint8))
    reader = module.create(tmp_path, "train")
    assert [sample.id for sample in (reader[0], reader[1])] == ["a", "b"] and len(reader) == 2
    lane = Task("lane", "lane", "segmentation", "lane", classes=3)
    batch = next(batches(reader, [lane], SPEC, 2))
    assert batch.images.shape == (2, 3, 32, 48) and batch.targets["lane"].unique().tolist() == [1]
    before = reader.fingerprint
    cv2.imwrite(str(tmp_path / "train/a.jpg"), np.zeros((64, 48, 3), np.uint8))
    assert module.create(tmp_path, "train").fingerprint != before


RECIPES = sorted((REPOSITORY / "examples").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_valid(path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SECATEUR_DATA", "anywhere")
    assert load_recipe(path).kept_names()
