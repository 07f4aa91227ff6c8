"""From a recipe to a bundle in a lower precision: the guard, pins, auto, verify and diagnose."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from cli_run import RECIPE, make_project, run
from conftest import tiny_model
from safetensors.torch import save_file
from secateur.bench.latency import Protocol
from secateur.core.errors import BuildError, CalibrationError, ModelError, SecateurError
from secateur.flow.build import build as run_build
from secateur.flow.cache import StageCache
from secateur.flow.lowering import Lowering, drop_limits
from secateur.flow.recipe import parse_recipe
from secateur.flow.trials import noise_power
from secateur.lower.quant import overflowing, plan_quant
from secateur.lower.reference import find_disagreements
from secateur.metrics.delta import Delta
from secateur.runtimes.base import runtime_of

# A cut that is not trained, so that several builds stay quick.
UNTRAINED = RECIPE.replace("recover:    {epochs: 1}", "recover: none").replace(
    "search: {tries: 3, images: 8}", "search: false, grid: 8"
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


def build(project: Path, name: str, recipe: str, target: str = "x86-64-cpu") -> tuple[Path, Any]:
    """Build a recipe of the project, timed briefly; return the bundle's folder and manifest."""
    made = run_build(
        parse_recipe(recipe, project / f"{name}.yaml"), target, project / name,
        cache=StageCache(project / CACHE), protocol=Protocol(10, 0.1, 10),
    )  # fmt: skip
    return made.folder, json.loads((made.folder / "manifest.json").read_text())


def test_a_guarded_int8_bundle_verifies_and_runs(capsys, project: Path) -> None:
    recipe = recipe_with("{mode: int8, calibrator: minmax, images: 8}", ", max_drop: 60")
    folder, manifest = build(project, "int8", recipe)
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


def test_a_pinned_block_gives_the_same_assignment_without_a_search(project: Path) -> None:
    searched = "{mode: int8, calibrator: minmax, images: 8}"
    first, manifest = build(project, "int8", recipe_with(searched, ", max_drop: 60"))
    pin = json.dumps(manifest["quantisation"]["pin"])
    pinned = f"{{mode: int8, calibrator: minmax, images: 8, guard: false, pin: {pin}}}"
    second, again = build(project, "pinned", recipe_with(pinned, ", max_drop: 60"))
    assert (second / "quant.json").read_bytes() == (first / "quant.json").read_bytes()
    assert again["files"]["model.onnx"] == manifest["files"]["model.onnx"]
    assert again["quantisation"]["guard"] is None and again["quantisation"]["kept"] == []


def plans(folder: Path) -> dict[str, str]:
    return json.loads((folder / "quant.json").read_text())["plan"]["precisions"]


def test_a_module_can_be_pinned_by_its_torch_name(project: Path) -> None:
    pinned = "{mode: int8, images: 8, guard: false, pin: {depthwise: fp32, seg: fp32}}"
    folder, _ = build(project, "module", recipe_with(pinned))
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
        ("{mode: int8, distill: {steps: 0}}", "precision.distill"),
        ("{mode: fp16, distill: {steps: 9}}", "distill: teaches a network to bear int8"),
        ("{mode: int8, equalise: maybe}", "precision.equalise"),
    ],
)
def test_wrong_keys_are_named(capsys, project: Path, precision: str, said: str) -> None:
    path = project / "wrong.yaml"
    path.write_text(recipe_with(precision))
    code, _, stderr = run(capsys, "build", path, "--cache", project / CACHE, "--out", project / "x")
    assert code == 2 and said in stderr


def test_int8_for_tensorrt_lies_between_fp16_and_is_judged_rightly(capsys, project: Path) -> None:
    recipe = recipe_with("{mode: int8, images: 8}")
    folder, manifest = build(project, "jetson", recipe, "jetson-orin-nano-8gb")
    assert manifest["quantisation"]["carrier"] == "fp16" and manifest["latency_ms"] == {}
    assert manifest["quantisation"]["dialect"] == "tensorrt"
    assert {"int8", "fp16"} <= set(plans(folder).values())
    # ONNX Runtime's own pass over biases would be off by whole outputs here.
    assert all(task["of_range"] < 0.2 for task in manifest["parity"].values())
    assert run(capsys, "verify", folder)[0] == 0


def test_auto_takes_the_fastest_that_passes_and_says_why(project: Path) -> None:
    recipe = recipe_with("{mode: auto, calibrator: minmax, images: 8}", ", max_drop: 60")
    folder, manifest = build(project, "auto", recipe)
    choice, times = manifest["precision_choice"], manifest["precision_choice"]["median_ms"]
    assert folder.name == manifest["precision"] == choice["chosen"] == min(times, key=times.get)
    assert set(times) | set(choice["too_low"]) == {"fp32", "fp16", "int8"}
    assert all(f"{name} {ms:.3g} ms" in choice["why"] for name, ms in times.items())
    folder, manifest = build(project, "auto", recipe, "raspberry-pi-5")
    choice = manifest["precision_choice"]
    assert folder.name == "fp32" and "int8 was left out: unmeasured" in choice["why"]
    assert choice["left_out"].keys() == {"int8"}


@pytest.mark.parametrize("error", [BuildError, CalibrationError])
def test_auto_goes_on_without_a_form_that_cannot_be_made(
    project: Path, monkeypatch: pytest.MonkeyPatch, error: type[SecateurError]
) -> None:
    def refuse(self: Lowering, source: object) -> None:
        raise error("no such operator in fp16", hint="-")

    monkeypatch.setattr(Lowering, "_to_fp16", refuse)
    recipe = recipe_with("{mode: auto, calibrator: minmax, images: 8}", ", max_drop: 60")
    _, manifest = build(project, "without", recipe)
    choice = manifest["precision_choice"]
    assert choice["left_out"] == {"fp16": "no such operator in fp16"}
    assert choice["why"].endswith("; fp16 was left out: no such operator in fp16")
    assert set(choice["median_ms"]) | set(choice["too_low"]) == {"fp32", "int8"}


def test_a_distillation_that_fails_leaves_what_was_found(
    capsys, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ModelError("the training loss became nan", hint="-")

    monkeypatch.setattr("secateur.flow.lowering.distilled", fail)
    wanted = "{mode: int8, calibrator: minmax, images: 8, guard: false, distill: {steps: 2}}"
    folder, manifest = build(project, "failed", recipe_with(wanted))
    assert manifest["quantisation"]["distilled"]["failed"] == "the training loss became nan"
    assert run(capsys, "verify", folder)[0] == 0


def test_a_task_that_is_too_low_in_fp32_may_lose_one_percent_more() -> None:
    tasks = [SimpleNamespace(name="a", max_drop=3.0), SimpleNamespace(name="b", max_drop=3.0),
             SimpleNamespace(name="c", max_drop=None)]  # fmt: skip
    exact = Delta({"a": -1.0, "b": -7.0, "c": -9.0}, -5.7, "c")
    assert drop_limits(SimpleNamespace(tasks=tasks), exact) == {"a": 3.0, "b": 8.0}


def test_where_every_form_takes_too_much_one_ships_all_the_same(project: Path) -> None:
    pytest.importorskip("pnnx", reason="ncnn is absent: pip install '.[ncnn]'")
    wanted = "{mode: int8, calibrator: minmax, images: 8}\nruntime: auto"
    recipe = recipe_with(wanted, ", max_drop: 0").replace("classes: 8}", "classes: 8, max_drop: 0}")
    folder, manifest = build(project, "low", recipe, "raspberry-pi-5")
    choice = manifest["precision_choice"]
    assert folder.name == manifest["precision"] == "int8" and choice["median_ms"] == {}
    lost = {task for task, by in manifest["accuracy"]["change_percent"].items() if by < 0}
    assert lost, "else this shows nothing"
    assert {*choice["too_low"]} == {"int8"} and {*choice["too_low"]["int8"]} >= lost
    assert choice["why"] == "each form takes a task below its max_drop"


PLANTED = """\
model: {factory: "tinyproject:make", checkpoint: planted.safetensors, input: {shape: [3, 32, 48]}}
tasks:
  segmentation: {output: seg, kind: segmentation, classes: 8, max_drop: 8}
  depth:        {output: depth, kind: depth, max_drop: 8}
data:
  train: {reader: scenes, split: train, options: {count: 16, height: 32, width: 48}}
  eval:  {reader: scenes, split: test, options: {count: 8, height: 32, width: 48}}
prune:      {budget: {macs: 1.0}, search: false, images: 4, axes: original, criterion: magnitude}
compensate: false
"""


@pytest.fixture(scope="module")
def planted(project: Path) -> Path:
    """A plain int8 bundle of a model in which one layer cannot bear int8.

    It is the same function, but one channel of seg_mix is 300 times larger than the others.
    """
    weights = tiny_model().network.state_dict()
    weights["seg_mix.weight"][0] *= 300
    weights["seg_mix.bias"][0] *= 300
    weights["seg.weight"][:, 0] /= 300
    save_file(weights, project / "planted.safetensors")
    plain = "precision: {mode: int8, calibrator: minmax, images: 8, guard: false, equalise: false}"
    folder, manifest = build(project, "planted", f"{PLANTED}{plain}\n")
    assert manifest["accuracy"]["change_percent"]["segmentation"] < -8
    return folder


def test_diagnose_names_the_planted_node_and_its_module(capsys, planted: Path) -> None:
    code, stdout, _ = run(capsys, "diagnose", planted, "--json")
    found = json.loads(stdout)
    assert code == 1 and found["too_low"] == ["segmentation"] and found["skipped"] == []
    worst = found["findings"][0]
    assert worst["kind"] == "precision" and worst["task"] == "segmentation"
    assert worst["modules"] in (["seg_mix"], ["seg"])  # the one makes the large channel
    assert worst["cost_percent"] < -8
    node = worst["nodes"][0]
    assert f"node {node} (torch module" in run(capsys, "diagnose", planted)[1]


def test_the_guard_repairs_what_was_planted(project: Path, planted: Path) -> None:
    guarded = "precision: {mode: int8, calibrator: minmax, images: 8, equalise: false}"
    _, manifest = build(project, "repaired", f"{PLANTED}{guarded}\n")
    assert manifest["accuracy"]["too_low"] == [] and manifest["quantisation"]["guard"]["passed"]
    kept = {row["module"]: row["why"] for row in manifest["quantisation"]["kept"]}
    assert kept == {"seg_mix": "segmentation", "seg": "head", "depth": "head"}


def test_diagnose_sees_a_wrong_preprocessing_constant(
    capsys, planted: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(planted, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["input"]["mean"][0] = 0.5
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    code, stdout, _ = run(capsys, "diagnose", bundle, "--json")
    first = json.loads(stdout)["findings"][0]
    assert code == 1 and first["kind"] == "preprocessing"
    assert "mean (0.5, 0.456, 0.406)" in first["message"] and "0.485" in first["message"]


def test_a_runtime_that_leaves_the_reference_is_found_at_its_node(
    planted: Path,
) -> None:
    model = planted / "fp32.onnx"
    image = np.random.default_rng(0).standard_normal((1, 3, 32, 48)).astype(np.float32)

    def honest(path: Path) -> dict[str, np.ndarray]:
        return dict(runtime_of("onnxruntime").open_session(path, 1).run(image))

    def broken(path: Path) -> dict[str, np.ndarray]:
        """A runtime with a wrong kernel, made by editing what it is given."""
        proto = onnx.load(path)
        for node in proto.graph.node:
            if node.name == "node_sigmoid":
                node.op_type = "Softplus"
        with tempfile.TemporaryDirectory() as scratch:
            onnx.save(proto, Path(scratch) / "model.onnx")
            return honest(Path(scratch) / "model.onnx")

    assert find_disagreements(model, image, honest, noise_power, 1e-6) == []
    found = find_disagreements(model, image, broken, noise_power, 1e-6)
    assert [(wrong.task, wrong.node) for wrong in found] == [("depth", "node_sigmoid")]


def test_values_beyond_fp16_are_found_where_they_arise(planted: Path) -> None:
    model = planted / "fp32.onnx"
    plan = plan_quant(model, None, {}, default="fp16")
    peaks = {"relu_1": 1e5, "add": 6e4}
    assert overflowing(model, plan, peaks) == {"node_relu_1": 1e5}
    kept = plan_quant(model, None, {"node_relu_1": "fp32"}, default="fp16")
    assert overflowing(model, kept, peaks) == {}
