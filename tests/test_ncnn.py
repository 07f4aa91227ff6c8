"""ncnn: conversion, names, precisions, the session, the bundle and its stand-alone runner."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_run import RECIPE, make_project, run
from conftest import SPEC, TASKS, tiny_model
from secateur.bench.latency import Protocol
from secateur.bundle.ncnn_run import NCNN_FILES
from secateur.core.errors import (
    BuildError,
    BundleError,
    CalibrationError,
    RecipeError,
    RuntimeMissing,
    SecateurError,
)
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.task import Task
from secateur.flow.build import build
from secateur.flow.cache import StageCache
from secateur.flow.emulated import prepared_userland
from secateur.flow.ncnn import target_of
from secateur.flow.recipe import parse_recipe
from secateur.lower import compare_outputs
from secateur.lower.attention import SplitAttention, split_attention
from secateur.lower.ncnn import export_ncnn, weights_file
from secateur.runtimes.base import runtime_of
from timm.layers import Attention
from torch import Tensor, nn

RECIPE = RECIPE.replace("recover:    {epochs: 1}", "recover: none").replace(
    "search: {tries: 3, images: 8}", "search: false, grid: 8"
)
PARITY = 1e-3
installed = all(importlib.util.find_spec(name) for name in ("ncnn", "pnnx"))
needs_ncnn = pytest.mark.skipif(not installed, reason="ncnn is absent: pip install '.[ncnn]'")


def torch_outputs(model: MultiTaskModel, images: Tensor) -> dict[str, np.ndarray]:
    with evaluating(model):
        return {name: tensor.numpy() for name, tensor in model(images).items()}


class Odd(nn.Module):
    """Outputs that others read on, an output twice, and names that pnnx gives to inner blobs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        y = self.stem(image)
        return {"a": y, "b": self.head(y).relu(), "c": y, "d": y.mean((2, 3))}


def odd_model(names: tuple[str, str, str, str] = ("1", "out0", "image_", "mean/é")) -> Any:
    torch.manual_seed(0)
    tasks = [Task(name, output, "regression", name)
             for name, output in zip(names, "abcd", strict=True)]  # fmt: skip
    return MultiTaskModel(Odd(), tasks).eval()


# -- conversion


@needs_ncnn
def test_every_task_keeps_its_name_shape_and_values(tmp_path: Path) -> None:
    model, images = tiny_model(), SPEC.example(3)
    path = tmp_path / "model.ncnn.param"
    export_ncnn(model, images, path, "fp32")
    got = runtime_of("ncnn").open_session(path, 1).run(images.numpy())
    assert set(got) == {task.name for task in TASKS}
    compare_outputs(torch_outputs(model, images), got, tolerance=1e-5)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(NCNN_FILES)


@needs_ncnn
@pytest.mark.parametrize("size", [(13, 17), (16, 16), (5, 31)])
def test_names_of_inner_blobs_and_reused_outputs_survive(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    model, images = odd_model(), torch.randn(2, 3, *size)
    path = tmp_path / "model.ncnn.param"
    export_ncnn(model, images, path, "fp32")
    got = runtime_of("ncnn").open_session(path, 1).run(images.numpy())
    compare_outputs(torch_outputs(model, images), got, tolerance=1e-5)


@needs_ncnn
def test_fp16_halves_the_weights_and_fp32_forbids_it(tmp_path: Path) -> None:
    model, images = tiny_model(), SPEC.example(2)
    exact, half = tmp_path / "exact.param", tmp_path / "half.param"
    export_ncnn(model, images, exact, "fp32")
    export_ncnn(model, images, half, "fp16")
    sizes = [weights_file(path).stat().st_size for path in (exact, half)]
    assert 0.45 < sizes[1] / sizes[0] < 0.65
    got = runtime_of("ncnn").open_session(half, 1).run(images.numpy())
    for parity in compare_outputs(torch_outputs(model, images), got).values():
        assert 1e-6 < parity.relative < 1e-2  # rounded, and no more than that
    for path, option in ((exact, "31=7"), (half, "31=4")):
        layers = path.read_text().splitlines()[2:]
        assert layers and all(line.split()[-1] == option for line in layers)


@needs_ncnn
@pytest.mark.parametrize("name", ["two words", "", "x" * 300])
def test_a_name_that_ncnn_cannot_hold_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BuildError, match="spaces"):
        export_ncnn(odd_model((name, "b", "c", "d")), torch.randn(1, 3, 16, 16),
                    tmp_path / "model.param", "fp32")  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@needs_ncnn
def test_what_ncnn_has_no_layer_for_is_named(tmp_path: Path) -> None:
    class Deep(nn.Module):
        def forward(self, image: Tensor) -> dict[str, Tensor]:
            n, c, h, w = image.shape
            y = image.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
            return {"a": y.softmax(2).reshape(n, 4 * c, h // 2, w // 2)}

    model = MultiTaskModel(Deep(), [Task("a", "a", "depth", "a")])
    with pytest.raises(BuildError, match=r"no layer for torch's \w+\.\w+") as caught:
        export_ncnn(model, torch.randn(1, 3, 8, 8), tmp_path / "model.param", "fp32")
    assert "onnxruntime" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@needs_ncnn
def test_weights_that_are_cut_short_are_not_run(tmp_path: Path) -> None:
    path = tmp_path / "model.param"
    export_ncnn(tiny_model(), SPEC.example(), path, "fp32")
    weights_file(path).unlink()
    with pytest.raises(BundleError, match=r"there is no .*model\.bin"):
        runtime_of("ncnn").open_session(path, 1)
    path.write_text(path.read_text().replace("Convolution ", "Convolutionary ", 1))
    weights_file(path).touch()
    with pytest.raises(BundleError, match="a layer or its weights do not fit"):
        runtime_of("ncnn").open_session(path, 1)


# -- attention


@pytest.mark.parametrize(
    "options",
    [{}, {"qkv_bias": True}, {"qk_norm": True, "norm_layer": nn.LayerNorm}, {"gated": True},
     {"scale_norm": True, "norm_layer": nn.LayerNorm}, {"attn_head_dim": 6}],
)  # fmt: skip
def test_split_attention_is_the_same_function(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    joint = nn.Sequential(Attention(16, num_heads=2, **options)).eval()
    split = split_attention(joint)
    assert isinstance(split[0], SplitAttention) and type(joint[0]) is Attention
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(split(x), joint(x))


def test_a_model_without_attention_is_not_copied() -> None:
    model = tiny_model()
    assert split_attention(model) is model


# -- the build


def recipe_with(folder: Path, lines: str, text: str = RECIPE) -> Any:
    return parse_recipe(f"{text}{lines}\n", folder / "recipe.yaml")


@pytest.mark.parametrize(
    ("target", "lines", "said"),
    [
        ("jetson-orin-nano-8gb", "runtime: ncnn", "computes on its GPU"),
        ("x86-64-cpu", "runtime: tflite", "runtime"),
    ],
)
def test_a_wrong_runtime_is_refused(tmp_path: Path, target: str, lines: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        target_of(recipe_with(tmp_path, lines), target)


def test_ncnn_meets_no_budget_in_milliseconds(tmp_path: Path) -> None:
    text = RECIPE.replace("macs: 0.5", "latency_ms: 5")
    with pytest.raises(RecipeError, match="latency_ms"):
        target_of(recipe_with(tmp_path, "runtime: ncnn", text), "x86-64-cpu")


def test_without_the_wheel_it_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pnnx", "ncnn"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeMissing, match="not installed") as caught:
        target_of(recipe_with(tmp_path, "runtime: ncnn"), "x86-64-cpu")
    assert caught.value.hint == "pip install 'secateur[ncnn]'"
    with pytest.raises(RuntimeMissing, match="ncnn is not installed"):
        runtime_of("ncnn").version()


def test_the_recipes_runtime_wins_over_the_targets(tmp_path: Path) -> None:
    assert target_of(recipe_with(tmp_path, ""), "raspberry-pi-5").runtime == "onnxruntime"
    if installed:
        target = target_of(recipe_with(tmp_path, "runtime: ncnn"), "raspberry-pi-5")
        assert (target.runtime, target.precisions) == ("ncnn", ("fp32", "fp16", "int8"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    return folder


def built(project: Path, name: str, lines: str, target: str = "x86-64-cpu") -> tuple[Path, Any]:
    made = build(recipe_with(project, lines), target, project / name,
                 cache=StageCache(project / "cache"), protocol=Protocol(10, 0.1, 10))  # fmt: skip
    return made.folder, json.loads((made.folder / "manifest.json").read_text())


@needs_ncnn
def test_a_bundle_runs_on_ncnn_and_says_so(
    capsys: pytest.CaptureFixture[str], project: Path
) -> None:
    folder, manifest = built(project, "fp32", "runtime: ncnn")
    assert manifest["runtime"] == "ncnn" and {*NCNN_FILES, "model.onnx"} <= set(manifest["files"])
    assert all(row["of_range"] <= PARITY for row in manifest["parity"].values())
    assert set(manifest["latency_ms"]) == {"parent", "cut"}
    assert {"ncnn", "pnnx"} <= set(manifest["versions"])
    code, out, err = run(capsys, "verify", folder, "--json")
    assert code == 0, err
    assert json.loads(out)["accuracy"] == manifest["accuracy"]["shipped"]

    picture = folder / "pictures/contact_sheet.png"
    found = {}
    for words in ([], ["--runtime", "onnxruntime"]):
        out = project / "-".join(["out", *words])
        command = [sys.executable, folder / "run.py", picture, "--out", out, *words]
        subprocess.run(command, check=True)
        with np.load(out / "contact_sheet.npz") as stored:
            found[len(words)] = dict(stored)
    assert set(found[0]) == {"segmentation", "depth"}
    compare_outputs(found[2], found[0], tolerance=PARITY)
    assert any(not np.array_equal(found[2][task], found[0][task]) for task in found[0])

    code, _, err = run(capsys, "diagnose", folder)
    assert code == 2 and "runs on ncnn" in err

    weights = folder / NCNN_FILES[1]
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    code, _, err = run(capsys, "verify", folder)
    assert code == 1 and "model.ncnn.bin was altered" in err
    ended = subprocess.run([sys.executable, folder / "run.py", picture],
                           capture_output=True, text=True, check=False)  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr == "error: model.ncnn.bin is not the file of this manifest; copy it again\n"


@needs_ncnn
def test_without_the_wheel_the_runner_says_what_to_do(project: Path, tmp_path: Path) -> None:
    folder, _ = built(project, "absent", "runtime: ncnn")
    (tmp_path / "ncnn.py").write_text("raise ImportError('absent')")
    command = [sys.executable, folder / "run.py", folder / "pictures/contact_sheet.png"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False,
                           env={"PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert ended.returncode == 2
    assert "pip install ncnn" in ended.stderr and ended.stderr.count("\n") == 1


@needs_ncnn
def test_an_fp16_bundle_is_smaller_and_verifies(
    capsys: pytest.CaptureFixture[str], project: Path
) -> None:
    _, exact = built(project, "fp32-again", "runtime: ncnn")
    folder, manifest = built(
        project, "fp16", "runtime: ncnn\nprecision: {mode: fp16}", "raspberry-pi-5"
    )
    assert manifest["precision"] == "fp16" and manifest["latency_ms"] == {}
    sizes = [each["files"][NCNN_FILES[1]]["bytes"] for each in (manifest, exact)]
    assert 0.45 < sizes[0] / sizes[1] < 0.65
    assert manifest["accuracy"]["pruned"] == exact["accuracy"]["shipped"]
    assert run(capsys, "verify", folder)[0] == 0


@needs_ncnn
def test_an_int8_bundle_is_calibrated_by_us_and_guarded(
    capsys: pytest.CaptureFixture[str], project: Path
) -> None:
    _, exact = built(project, "fp32-beside", "runtime: ncnn")
    lines = "runtime: ncnn\nprecision: {mode: int8, images: 8}"
    folder, manifest = built(project, "int8", lines, "raspberry-pi-5")
    assert manifest["precision"] == "int8" and run(capsys, "verify", folder)[0] == 0
    found = manifest["quantisation"]
    assert found["dialect"] == "ncnn" and found["images"] == 8
    assert {row["why"] for row in found["kept"]} == {"head"}
    assert found["nodes"]["fp32"] == 2 and found["nodes"]["int8"] >= 5
    assert 0.5 < found["macs_share"]["int8"] < 1
    sizes = [each["files"][NCNN_FILES[1]]["bytes"] for each in (manifest, exact)]
    assert 0.25 < sizes[0] / sizes[1] < 0.5
    assert manifest["accuracy"]["pruned"] == exact["accuracy"]["shipped"]
    assert all(0 < task["of_range"] < 0.2 for task in manifest["parity"].values())


@needs_ncnn
def test_pins_of_onnx_nodes_are_refused_with_ncnn(project: Path) -> None:
    lines = "runtime: ncnn\nprecision: {mode: int8, images: 8, pin: {seg: fp32}}"
    with pytest.raises(RecipeError, match="the runtime is ncnn"):
        built(project, "pin", lines, "raspberry-pi-5")


@needs_ncnn
def test_ncnn_makes_of_int8_weights_what_whole_numbers_make_of_them(tmp_path: Path) -> None:
    from secateur.lower.ncnn_int8 import write_int8
    from secateur.runtimes.ncnn import open_session

    weights = np.array([[1.0, -0.5, 0.25, 0.1], [0.02, 0.01, -0.04, 0.03]], "<f4")
    bias = np.array([0.5, -1.0], "<f4")
    (tmp_path / "m.param").write_text(
        "7767517\n2 2\nInput image 0 1 image\nInnerProduct fc 1 1 image out 0=2 1=1 2=8 31=7\n"
    )
    (tmp_path / "m.bin").write_bytes(bytes(4) + weights.tobytes() + bias.tobytes())
    lowered = write_int8(tmp_path / "m.param", {"image": 127 / 2}, tmp_path / "q.param")
    assert lowered == ["fc"]
    image = np.array([0.3, -1.2, 2.0, 0.7], np.float32)
    steps = np.abs(weights).max(axis=1) / 127
    whole = np.rint(weights / steps[:, None]) @ np.rint(image * 127 / 2)
    found = open_session(tmp_path / "q.param", 1).run(image[None])["out"][0]
    assert found == pytest.approx(whole * steps * 2 / 127 + bias, abs=1e-4)


@needs_ncnn
@pytest.mark.parametrize(
    ("images", "says"),
    [(np.zeros((4, 4)), "picture 0 is constant"), (np.ones((2, 1)) * np.arange(4), "2 images, 1")],
)
def test_ncnn_is_calibrated_on_images_that_say_something(
    tmp_path: Path, images: np.ndarray, says: str
) -> None:
    from secateur.lower.ncnn_int8 import observe_inputs

    (tmp_path / "m.param").write_text(
        "7767517\n2 2\nInput image 0 1 image\nInnerProduct fc 1 1 image out 0=2 1=1 2=8 31=7\n"
    )
    (tmp_path / "m.bin").write_bytes(bytes(4) + bytes(4 * 8) + bytes(8))
    read = images.astype(np.float32).reshape(-1, 1, 1, 4)
    with pytest.raises(CalibrationError, match=says):
        observe_inputs(tmp_path / "m.param", lambda: [read], called=lambda at: f"picture {at}")


def test_every_end_of_a_head_is_found(tmp_path: Path) -> None:
    from secateur.lower.ncnn_int8 import ending_layers

    (tmp_path / "m.param").write_text(
        "7767517\n5 6\nInput image 0 1 image\nSplit s 1 2 image i0 i1\n"
        "Convolution a 1 1 i0 left 0=2 1=1 6=6\nConvolution b 1 1 i1 right 0=2 1=1 6=6\n"
        "BinaryOp sum 2 1 left right depth 0=0\n"
    )
    assert ending_layers(tmp_path / "m.param", ["depth"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("layer", "data", "says"),
    [("LSTM a 1 1 image out 0=4", b"", "a layer LSTM"),
     ("InnerProduct a 1 1 image out 0=1 1=0 2=4", bytes(24), "4 bytes of ncnn's weights")],
)  # fmt: skip
def test_weights_of_an_unknown_form_are_refused(
    tmp_path: Path, layer: str, data: bytes, says: str
) -> None:
    from secateur.lower.ncnn_int8 import write_int8

    (tmp_path / "m.param").write_text(f"7767517\n2 2\nInput image 0 1 image\n{layer}\n")
    (tmp_path / "m.bin").write_bytes(data)
    with pytest.raises(BuildError, match=says):
        write_int8(tmp_path / "m.param", {}, tmp_path / "q.param")


@needs_ncnn
def test_a_build_for_another_runtime_takes_the_files_away(project: Path) -> None:
    folder, _ = built(project, "turn", "runtime: ncnn")
    assert (folder / NCNN_FILES[0]).exists()
    same, manifest = built(project, "turn", "runtime: onnxruntime")
    assert same == folder and not any((folder / name).exists() for name in NCNN_FILES)
    assert manifest["runtime"] == "onnxruntime" and not set(NCNN_FILES) & set(manifest["files"])
    ended = subprocess.run(
        [sys.executable, folder / "run.py", folder / "pictures/contact_sheet.png",
         "--runtime", "ncnn"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2 and "runtime: ncnn" in ended.stderr


# -- on ARM: a minute


@pytest.mark.slow
@needs_ncnn
def test_the_bundles_runner_gives_on_arm_what_it_gives_here(
    capsys: pytest.CaptureFixture[str], project: Path
) -> None:
    try:
        prepared_userland("ncnn")
    except SecateurError as error:
        pytest.skip(f"no aarch64 userland here: {error}")
    words = ["--device", "emulated:cortex-a72", "--cpu", "cortex-a76", "--limit", "1", "--json"]
    for mode in ("fp32", "fp16", "int8"):
        lines = f"runtime: ncnn\nprecision: {{mode: {mode}, images: 8}}"
        folder, manifest = built(project, f"arm-{mode}", lines, "raspberry-pi-5")
        assert manifest["precision"] == mode
        code, out, err = run(capsys, "verify", folder, *words)
        assert code == 0, err
        found = {
            row["cpu"]: max(task["parity"]["max_abs_difference"] / task["parity"]["output_range"]
                            for task in row["against_here"].values())
            for row in json.loads(out)["runs"]
        }  # fmt: skip
        if mode == "int8":  # rounds as here, but for what lies on the edge of a step
            assert max(found.values()) <= 0.1
            continue
        assert found["cortex-a72"] <= 1e-4  # has no fp16 arithmetic
        assert (found["cortex-a76"] <= 1e-4) == (mode == "fp32")
