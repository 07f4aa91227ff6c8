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


def test_a_pinned_block_gives_the_same_assignment_without_a_search(capsys, project: Path) -> None:
    searched = "{mode: int8, calibrator: minmax, images: 8}"
    first, manifest = build(capsys, project, "int8", recipe_with(searched, ", max_drop: 60"))
    pin = json.dumps(manifest["quantisation"]["pin"])
    pinned = f"{{mode: int8, calibrator: minmax, images: 8, guard: false, pin: {pin}}}"
    second, again = build(capsys, project, "pinned", recipe_with(pinned, ", max_drop: 60"))
    assert (second / "quant.json").read_bytes() == (first / "quant.json").read_bytes()
    assert again["files"]["model.onnx"] == manifest["files"]["model.onnx"]
    assert again["quantisation"]["guard"] is None and again["quantisation"]["kept"] == []


def plans(folder: Path) -> dict[str, str]:
    return json.loads((folder / "quant.json").read_text())["plan"]["precisions"]


def test_a_module_can_be_pinned_by_its_torch_name(capsys, project: Path) -> None:
    pinned = "{mode: int8, images: 8, guard: false, pin: {depthwise: fp32, seg: fp32}}"
    folder, _ = build(capsys, project, "module", recipe_with(pinned))
    modules = {
        node.name: next((m.value for m in node.metadata_props), "")
        for node in onnx.load(folder / "fp32.onnx").graph.node
        if node.op_type == "Conv"
    }
    high = {modules[name] for name, precision in plans(folder).items()
            if name in modules and precision == "fp32"}  # fmt: skip
    assert high == {"depthwise", "seg"}
    # nothing asks for the head of seg_mix: a name is a whole part of the path
    assert modules.keys() <= plans(folder).keys() and "seg_mix" in modules.values()


@pytest.mark.parametrize(
    ("precision", "said"),
    [
        ("{mode: int8, pin: {depthwize: fp32}}", "no torch module 'depthwize'"),
        ("{mode: fp32, pin: {seg: fp32}}", "pin: with mode fp32"),
        ("{mode: int4}", "precision.mode"),
        ("{mode: int8, calibrator: max}", "precision.calibrator"),
        ("{mode: int8, pin: {seg: int4}}", "precision.pin.seg"),
    ],
)
def test_wrong_keys_are_named(capsys, project: Path, precision: str, said: str) -> None:
    path = project / "wrong.yaml"
    path.write_text(recipe_with(precision))
    code, _, stderr = run(capsys, "build", path, "--cache", project / CACHE, "--out", project / "x")
    assert code == 2 and said in stderr


def test_int8_for_tensorrt_lies_between_fp16_and_is_judged_rightly(capsys, project: Path) -> None:
    recipe = recipe_with("{mode: int8, images: 8}")
    folder, manifest = build(
        capsys, project, "jetson", recipe, "--target", "jetson-orin-nano-8gb"
    )
    assert manifest["quantisation"]["carrier"] == "fp16" and manifest["latency_ms"] == {}
    assert manifest["quantisation"]["dialect"] == "tensorrt"
    assert {"int8", "fp16"} <= set(plans(folder).values())
    # ONNX Runtime's own pass over biases would be off by whole outputs here.
    assert all(task["of_range"] < 0.2 for task in manifest["parity"].values())
    assert run(capsys, "verify", folder)[0] == 0


def test_auto_takes_the_fastest_that_passes_and_says_why(capsys, project: Path) -> None:
    recipe = recipe_with("{mode: auto, calibrator: minmax, images: 8}", ", max_drop: 60")
    folder, manifest = build(capsys, project, "auto", recipe)
    choice, times = manifest["precision_choice"], manifest["precision_choice"]["median_ms"]
    assert folder.name == manifest["precision"] == choice["chosen"] == min(times, key=times.get)
    assert set(times) | set(choice["too_low"]) == {"fp32", "fp16", "int8"}
    assert all(f"{name} {ms:.3g} ms" in choice["why"] for name, ms in times.items())
    folder, manifest = build(capsys, project, "auto", recipe, "--target", "raspberry-pi-5")
    assert folder.name == "fp32" and "int8 is not chosen" in manifest["precision_choice"]["why"]
