"""From a recipe to a bundle in a lower precision: the guard, pins, auto, verify and diagnose."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_run import RECIPE, make_project, run

# A cut that is not trained, so that several builds stay quick.
UNTRAINED = RECIPE.replace("recover:    {epochs: 1}", "recover: none").replace(
    "search: {tries: 3, images: 8}", "search: false"
)
CACHE = "cache"


def recipe_with(precision: str, limits: str = "") -> str:
    """The small recipe in a precision; ``limits`` are the depth task's."""
    text = UNTRAINED.replace("kind: depth}", f"kind: depth{limits}}}")
    return f"{text}precision: {precision}\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    return folder


def build(capsys: Any, project: Path, name: str, recipe: str, *options: str) -> tuple[Path, Any]:
    """Build a recipe of the project; return the bundle's folder and its manifest."""
    path = project / f"{name}.yaml"
    path.write_text(recipe)
    code, stdout, _ = run(capsys, "build", path, "--out", project / name, "--cache",
                          project / CACHE, "--json", *options)  # fmt: skip
    built = json.loads(stdout)
    assert code in (0, 1), built
    return Path(built[0]["bundle"]), built[0]["manifest"]


def test_a_guarded_int8_bundle_verifies_and_runs(capsys, project: Path) -> None:
    recipe = recipe_with("{mode: int8, calibrator: minmax, images: 8}", ", max_drop: 60")
    folder, manifest = build(capsys, project, "int8", recipe)
    assert folder == project / "int8/x86-64-cpu/int8" and manifest["precision"] == "int8"
    assert {"fp32.onnx", "quant.json"} <= set(manifest["files"])
    operators = {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}
    assert "QuantizeLinear" in operators
    accuracy, found = manifest["accuracy"], manifest["quantisation"]
    assert set(accuracy["pruned"]) == set(accuracy["shipped"]) == set(accuracy["parent"])
    assert accuracy["pruned"] != accuracy["shipped"]
    assert found["guard"]["passed"] and found["images"] == 8 and found["calibrator"] == "minmax"
    assert 0.5 < found["macs_share"]["int8"] < 1
    ends = {row["module"] for row in found["kept"] if row["why"] == "head"}
    assert ends == {"seg", "depth"} and set(found["pin"].values()) == {"fp32"}
    code, stdout, _ = run(capsys, "verify", folder, "--json")
    assert code == 0
    assert json.loads(stdout)["accuracy"] == accuracy["shipped"]
    picture = folder / "pictures/contact_sheet.png"
    subprocess.run([sys.executable, folder / "run.py", picture, "--out", project], check=True)
    assert np.isfinite(np.load(project / "contact_sheet.npz")["depth"]).all()
