"""From a recipe to a bundle that runs, on a tiny model: every verb, resume, and the runner."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from cli_run import RECIPE, make_project, run
from secateur.bundle.write import drop_outdated, folder_lock
from secateur.core.model import ModelInput
from secateur.core.plan import PrunePlan
from secateur.data.loading import open_reader
from secateur.data.transforms import image_tensor
from secateur.runtimes.base import runtime_of


def test_the_bundle_holds_what_the_contract_names(bundle: Path) -> None:
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert files == {
        "manifest.json", "model.onnx", "run.py", "plan.json", "recipe.yaml", "check.npz",
        "cut.safetensors",
        "parent_images.npz", "pictures/contact_sheet.png", "pictures/savings.png",
    }  # fmt: skip
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["cost"]["macs"] == manifest["plan"]["macs_after"]
    assert manifest["cost"]["macs"] <= 0.5 * manifest["cost_parent"]["macs"]
    assert set(manifest["accuracy"]["shipped"]) == {"segmentation", "depth"}
    assert manifest["plan"]["recovery_learning_rate"] == 3e-3  # the usual one
    assert all(row["of_range"] <= 1e-4 for row in manifest["parity"].values())
    assert manifest["recipe"] == RECIPE


def test_run_py_gives_the_arrays_of_the_builds_own_onnx(bundle: Path, tmp_path: Path) -> None:
    sample = open_reader("scenes", None, "test", count=1, height=64, width=80)[0]
    image = tmp_path / "room.png"
    cv2.imwrite(str(image), sample.image[:, :, ::-1])
    command = [sys.executable, "-I", bundle / "run.py", image, "--out", tmp_path, "--full-size"]
    subprocess.run(command, check=True)
    got = np.load(tmp_path / "room.npz")
    spec = ModelInput(3, 32, 48, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    inputs = image_tensor(sample.image, spec)[None].numpy()
    wanted = runtime_of("onnxruntime").open_session(bundle / "model.onnx", 1).run(inputs)
    assert all(np.array_equal(got[name], array) for name, array in wanted.items())
    assert got["segmentation_decoded"].shape == got["depth_decoded"].shape == (64, 80)


@pytest.mark.parametrize("size", [(32, 48), (64, 80), (20, 30), (33, 200)])
def test_the_runner_prepares_images_as_training_does(bundle: Path, size: tuple[int, int]) -> None:
    from secateur.bundle.runner import preprocess

    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    for layout in ("RGB", "BGR"):
        spec = ModelInput(3, 32, 48, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), layout)
        mine = preprocess(image, {"height": 32, "width": 48, "mean": spec.mean, "std": spec.std,
                                  "layout": layout})  # fmt: skip
        assert np.array_equal(mine[0], image_tensor(image, spec).numpy())


def test_verify_passes_a_whole_bundle_and_says_how_good_it_is(capsys, bundle: Path) -> None:
    code, stdout, _ = run(capsys, "verify", bundle, "--json")
    result = json.loads(stdout)
    assert code == 0 and set(result["change"]["per_task"]) == {"segmentation", "depth"}
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert result["accuracy"]["depth"]["rmse"] == pytest.approx(
        manifest["accuracy"]["shipped"]["depth"]["rmse"], rel=1e-4
    )


@pytest.mark.parametrize("name", ["model.onnx", "run.py", "check.npz", "recipe.yaml"])
def test_one_flipped_byte_fails_verification(capsys, bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(bytes(data))
    code, _, stderr = run(capsys, "verify", bundle)
    assert code == 1 and f"{name} was altered" in stderr


def test_a_missing_file_fails_verification(capsys, bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    code, _, stderr = run(capsys, "verify", bundle)
    assert code == 1 and "model.onnx is missing" in stderr


def test_a_manifest_that_names_a_file_outside_is_refused(capsys, bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["../../secret"] = manifest["files"]["run.py"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    code, _, stderr = run(capsys, "verify", bundle)
    assert code == 1 and "outside the bundle" in stderr


def test_a_task_below_its_max_drop_fails_verification(capsys, bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["accuracy"]["parent"]["depth"]["rmse"] *= 0.1
    manifest["tasks"][1]["max_drop"] = 5.0
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    code, _, stderr = run(capsys, "verify", bundle)
    assert code == 1 and "task 'depth' lost" in stderr


def test_run_py_without_its_libraries_says_what_to_install(bundle: Path) -> None:
    bare = [sys.executable, "-I", "-S", bundle / "run.py", "image.png"]  # -S: no site-packages
    done = subprocess.run(bare, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "pip install numpy opencv-python-headless" in done.stderr
    assert "Traceback" not in done.stderr


def test_images_of_one_name_get_results_of_their_own(bundle: Path, tmp_path: Path) -> None:
    images = []
    for folder, level in (("left", 0), ("right", 255)):
        (tmp_path / folder).mkdir()
        images.append(tmp_path / folder / "0001.png")
        cv2.imwrite(str(images[-1]), np.full((32, 48, 3), level, np.uint8))
    command = [sys.executable, bundle / "run.py", *images, "--out", tmp_path / "out"]
    subprocess.run(command, check=True, capture_output=True)
    left, right = (np.load(tmp_path / "out" / name) for name in ("0001.npz", "0001-2.npz"))
    assert all(not np.array_equal(left[name], right[name]) for name in left.files)


def test_the_runner_refuses_another_model(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"another")
    command = [sys.executable, bundle / "run.py", "image.png"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "not the file of this manifest" in result.stderr


def test_bench_writes_the_protocols_figures(capsys, bundle: Path, full_measurements: None) -> None:
    code, stdout, _ = run(capsys, "bench", bundle, "--json")
    record = json.loads(stdout)
    alone, whole = record["latency"]["host_to_host"], record["latency"]["end_to_end"]
    assert code == 0 and record == json.loads((bundle / "bench.json").read_text())
    assert alone["runs"] >= 100 and alone["min_ms"] <= alone["median_ms"] <= alone["max_ms"]
    assert alone["runs"] * alone["mean_ms"] >= 3000
    assert whole["median_ms"] > alone["median_ms"]
    assert set(alone["percentiles_ms"]) == {"p90", "p95", "p97", "p99", "p99.9"}
    assert run(capsys, "verify", bundle, "--limit", "2")[0] == 0  # bench.json does not disturb


def test_a_second_build_finds_every_stage(capsys, project: Path, tmp_path: Path) -> None:
    arguments = ["build", project / "recipe.yaml", "--cache", project / "cache"]
    code, stdout, _ = run(capsys, *arguments, "--out", tmp_path / "again", "--json")
    (built,) = json.loads(stdout)
    first = json.loads((project / "out/x86-64-cpu/fp32/manifest.json").read_text())
    assert code == 0
    same = ("model.onnx", "plan.json", "check.npz")
    assert all(built["manifest"]["files"][f] == first["files"][f] for f in same)
    assert built["manifest"]["seconds"]["cut_compensate_recover"] < 20


def test_a_task_below_its_max_drop_makes_the_build_exit_1(capsys, project: Path) -> None:
    strict = project / "strict.yaml"
    strict.write_text(RECIPE.replace("kind: depth}", "kind: depth, max_drop: 0.0001}")
                      .replace("recover:    {epochs: 1}", "recover: none")
                      .replace("macs: 0.5", "macs: 0.3"))  # fmt: skip
    code, stdout, _ = run(
        capsys, "build", strict, "--cache", project / "cache", "--out", project / "strict", "--json"
    )
    (built,) = json.loads(stdout)
    assert code == (1 if built["manifest"]["accuracy"]["change_percent"]["depth"] < -1e-4 else 0)
    assert built["manifest"]["accuracy"]["too_low"] == (["depth"] if code else [])


POOLING = """
from conftest import TinyNet


class make(TinyNet):
    def forward(self, image):
        pooled = self.stem_norm(self.stem(image)).mean((2, 3))
        return {**super().forward(image), "room": pooled.view(image.shape[0], 4, 4).mean(2)}
"""


def test_channels_that_only_an_unwanted_task_fixed_can_go(capsys, tmp_path: Path) -> None:
    text = RECIPE.replace("tinyproject:make", "pooling:make")
    recipe = make_project(tmp_path, text.replace("search: {tries: 3, images: 8}", "search: false"))
    (tmp_path / "pooling.py").write_text(POOLING)
    code, stdout, stderr = run(capsys, "plan", recipe, "--json", "--cache", tmp_path / "cache")
    assert code == 0, stderr
    assert json.loads(stdout)["macs_after"] <= json.loads(stdout)["budget_macs"]


def test_a_budget_of_everything_plans_the_whole_network(capsys, tmp_path: Path) -> None:
    text = RECIPE.replace("recover:    {epochs: 1}", "recover: none")
    recipe = make_project(tmp_path, text.replace("macs: 0.5", "macs: 1.0"))
    code, stdout, stderr = run(capsys, "plan", recipe, "--json", "--cache", tmp_path / "cache")
    assert code == 0, stderr
    assert json.loads(stdout)["macs_after"] == json.loads(stdout)["macs_before"]


def test_inspect_score_and_plan_as_json(capsys, project: Path) -> None:
    recipe, cache = project / "recipe.yaml", project / "cache"
    code, stdout, _ = run(capsys, "inspect", recipe, "--json")
    assert code == 0 and set(json.loads(stdout)["tasks"]) == {"segmentation", "depth", "room"}
    code, stdout, _ = run(capsys, "score", recipe, "--cache", cache, "--json")
    assert code == 0 and set(json.loads(stdout)["bank"]) == {"segmentation", "depth", "room"}
    code, stdout, _ = run(capsys, "plan", recipe, "--cache", cache, "--json")
    plan = json.loads(stdout)
    assert code == 0 and plan["macs_after"] <= plan["budget_macs"]
    stored = json.loads((project / "out/x86-64-cpu/fp32/plan.json").read_text())
    assert plan.items() >= stored.items()
    assert PrunePlan.from_json(plan) == PrunePlan.from_json(stored)


def test_targets_and_doctor_report(capsys) -> None:
    code, stdout, _ = run(capsys, "targets", "--json")
    targets = {target["name"]: target for target in json.loads(stdout)}
    assert code == 0 and {"x86-64-cpu", "raspberry-pi-5", "jetson-orin-nano-8gb"} <= set(targets)
    assert all(f["source"] for target in targets.values() for f in target["facts"].values())
    assert run(capsys, "doctor", "--json")[0] == 0
    assert run(capsys, "targets", "raspberry-pi-5")[0] == 0


def test_a_bundle_for_another_kind_of_machine_claims_no_latency(capsys, project: Path) -> None:
    code, stdout, _ = run(
        capsys, "build", project / "recipe.yaml", "--target", "raspberry-pi-5", "--cache",
        project / "cache", "--out", project / "pi", "--json",
    )  # fmt: skip
    (built,) = json.loads(stdout)
    assert code == 0 and built["manifest"]["device"] == "raspberry-pi-5"
    if platform.machine() != "aarch64":
        assert built["manifest"]["latency_ms"] == {}


def test_a_bundle_for_a_device_with_a_gpu_brings_its_builder(capsys, project: Path) -> None:
    code, stdout, _ = run(
        capsys, "build", project / "recipe.yaml", "--target", "jetson-orin-nano-8gb", "--cache",
        project / "cache", "--out", project / "jetson", "--json",
    )  # fmt: skip
    (built,) = json.loads(stdout)
    assert code == 0 and {"build_engine.py", "nodes.json"} <= set(built["manifest"]["files"])
    folder = project / "jetson/jetson-orin-nano-8gb/fp32"
    nodes = json.loads((folder / "nodes.json").read_text())["nodes"]
    assert {task for tasks in nodes.values() for task in tasks} == {"segmentation", "depth"}


def test_a_new_model_takes_the_engine_of_the_old_one_away(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    folder.mkdir()
    shutil.copy(bundle / "model.onnx", folder)
    for name in ("model.engine", "engine.json", "bench.json", "timing.cache"):
        (folder / name).write_text("{}")
    drop_outdated(folder, bundle / "model.onnx")
    assert (folder / "model.engine").exists()  # it is the same model
    (folder / "model.onnx").write_bytes(b"another")
    drop_outdated(folder, bundle / "model.onnx")
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "timing.cache"]


def test_builds_into_one_folder_write_one_after_the_other(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with folder_lock(tmp_path):
            order.append("second")

    with folder_lock(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
