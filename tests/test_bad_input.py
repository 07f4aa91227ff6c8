"""The user's mistakes: exit 2, one sentence and a hint, no traceback, nothing half-written."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from cli_run import FACTORY, RECIPE, make_project, run
from conftest import tiny_model
from safetensors.torch import save_file
from secateur.flow.parent import load_parent
from secateur.flow.recipe import load_recipe

FOLDER_DATA = RECIPE.replace(
    "{reader: scenes, split: train, options: {count: 16, height: 32, width: 48}}",
    "{reader: folder, root: ROOT, split: train}",
)


def write_folder(root: Path, label: int = 3, broken: bool = False) -> None:
    """Four images with segmentation and 16-bit depth."""
    for name in ("image", "segmentation", "depth"):
        (root / "train" / name).mkdir(parents=True)
    for i in range(4):
        blank = np.full((32, 48), 1, np.uint8)
        cv2.imwrite(str(root / f"train/image/{i}.png"), np.dstack([blank * 50 * i] * 3))
        cv2.imwrite(str(root / f"train/segmentation/{i}.png"), blank * label)
        cv2.imwrite(str(root / f"train/depth/{i}.png"), blank.astype(np.uint16) * 2000)
    if broken:
        (root / "train/image/2.png").write_bytes(b"not an image")


def expect_error(capsys, folder: Path, *arguments, says: str, code: int = 2) -> None:
    out = folder / "out"
    got, stdout, stderr = run(capsys, *arguments, "--out", out)
    assert got == code, stderr
    assert says in stderr.replace("\n", " ")
    assert "hint:" in stderr and "Traceback" not in stderr + stdout
    assert not [path for path in out.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("  input: {shape: [3, 32, 48]}\n", ""), "line 1: key 'model.input' is missing"),
        (("budget: {macs: 0.5}", "budget: {macs: half}"), "line 13: prune.budget.macs: "),
        (("compensate:", "compensat:"), "line 14: key 'compensat' is not known"),
        (("keep: [segmentation, depth]", "keep: [segmentation, dept]"), "there is no task 'dept'"),
        (("compensate:", "compensat:"), "did you mean 'compensate'?"),
        (("macs: 0.5", "mac: 0.5"), "did you mean 'macs'?"),
        (("keep: [segmentation, depth]", "keep: depth"), "write keep: [depth]"),
        (("keep: [", "precision: int8\nkeep: ["), "write precision: {mode: int8}"),
        (
            ("recover:    {epochs: 1}", "recover: false"),
            "write recover: none or recover: {key: value}",
        ),
        (("budget: {macs: 0.5}", "budget: 0.5"), "with keys macs, params, size_mb, latency_ms"),
        (("keep: [segmentation, depth]", "keep: []"), "keep: is empty"),
        (("macs: 0.5", "macs: 0"), "greater than 0"),
        (("macs: 0.5", "macs: 2.0"), "less than or equal to 1"),
        (("macs: 0.5", "macs: 0.02"), "below the least that whole channels in multiples of 8"),
        (("reader: scenes, split: train", "reader: scene, split: train"), "no reader 'scene'"),
        (("split: test", "split: tset"), "no split 'tset'"),
        (("count: 8", "count: 0"), "is empty"),
        (("output: depth", "output: dept"), "reads output 'dept'"),
        (("kind: depth", "kind: dpth"), "'dpth' is not a task kind"),
        (("classes: 8}", "max_drop: 1}"), "tasks.segmentation.classes is missing"),
        (("classes: 8}", "classes: 3}"), "expected (N, C, h, w) with C = 3"),
        (("tinyproject:make", "tinyproject:mak"), "cannot import 'tinyproject:mak'"),
        (("tinyproject:make", "tinyproject:make_wide"), "is of another architecture"),
        (("tiny.safetensors", "absent.safetensors"), "there is no file absent.safetensors"),
        (("[3, 32, 48]", "[3, 30, 48]"), "forward fails on an input of shape (1, 3, 30, 48)"),
        (("[3, 32, 48]", "[1, 32, 48]"), "line 4: model.input.shape: expected [3, height, width]"),
        (
            ("[3, 32, 48]", "[3, 32, 48], mean: [123.7, 116.3, 103.5]"),
            "look like those of images of 0 to 255",
        ),
        (("tinyproject:make", "tinyproject.make"), "expected module:function, as in net:make"),
        (("tinyproject:make", "tinyproject.py:make"), "expected module:function, as in net:make"),
        (("reader: scenes, split: train", "reader: labels, split: train"), "no reader 'labels'"),
        (
            ("split: test, options: {count: 8", "split: train, options: {count: 16"),
            "are the same images",
        ),
        (("count: 16", "cuont: 16"), "reader 'scenes' does not take these options"),
        (("images: 16}", "images: 16, criterion: tailor}"), "'tailor' is not a criterion"),
        (("images: 16}", "images: 16, fusion: cutt}"), "'cutt' is not a fusion rule"),
        (("keep: [", "keep: [["), "is not YAML"),
        (("keep: [", "source: x\nkeep: ["), "unknown key 'source'"),
        (("  room:", "  image:"), "'image' cannot be a task's name"),
        (("  room:", "  'a,b':"), "'a,b' cannot be a task's name"),
        (
            ("images: 16}", "images: 16, warm_start: library, similarity: leap}"),
            "'leap' is not a measure",
        ),
        (
            ("keep: [", "precision: {mode: int8, pin: {steem: fp32}}\nkeep: ["),
            "no torch module 'steem'",
        ),
        (("split: train", "split: train, root: '${NO_SUCH_VARIABLE}'"), "which is not set"),
    ],
)
def test_a_wrong_recipe(capsys, tmp_path: Path, change: tuple[str, str], says: str) -> None:
    assert change[0] in RECIPE
    recipe = make_project(tmp_path, RECIPE.replace(*change, 1))
    expect_error(capsys, tmp_path, "build", recipe, says=says)


def test_a_forward_that_gives_losses_in_training_mode(capsys, tmp_path: Path) -> None:
    """Where tasks are dropped what runs is a trace of the eval mode; here none is."""
    text = RECIPE.replace("tinyproject:make", "tinyproject:make_losing")
    recipe = make_project(tmp_path, text.replace("keep: [segmentation, depth]\n", ""))
    expect_error(capsys, tmp_path, "build", recipe, says="in training mode its forward fails")


def test_an_unknown_target_with_a_near_name(capsys, tmp_path: Path) -> None:
    recipe = make_project(tmp_path)
    expect_error(
        capsys, tmp_path, "build", recipe, "--target", "raspberry-pi-6",
        says="there is no target 'raspberry-pi-6'; did you mean 'raspberry-pi-5'?",
    )  # fmt: skip


def test_a_checkpoint_with_missing_and_unexpected_keys(capsys, tmp_path: Path) -> None:
    recipe = make_project(tmp_path)
    state = tiny_model().network.state_dict()
    state["stranger"] = state.pop("stem.weight").clone()
    save_file(state, tmp_path / "tiny.safetensors")
    expect_error(
        capsys, tmp_path, "build", recipe,
        says="1 missing keys (first 'stem.weight') and 1 unexpected keys (first 'stranger')",
    )  # fmt: skip


@pytest.mark.parametrize(("content", "says"), [
    (b"weights to follow\n", "is no checkpoint: it begins with b'weights to follow"),
    (b"<!doctype html><title>Sign in</title>", "is no checkpoint: it begins with b'<!doctype"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "get it with `git lfs pull`"),
    (bytes(range(1, 200)), "is no checkpoint"),
    (b"", "is no checkpoint: it begins with b''"),
])  # fmt: skip
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_that_is_no_checkpoint(
    capsys, tmp_path: Path, content: bytes, says: str, suffix: str
) -> None:
    recipe = make_project(tmp_path, RECIPE.replace("tiny.safetensors", f"weights.{suffix}"))
    (tmp_path / f"weights.{suffix}").write_bytes(content)
    if suffix == "safetensors" and b"lfs" not in content:
        says = "cannot read the checkpoint"
    expect_error(capsys, tmp_path, "build", recipe, says=says)


class Payload:
    """What an attacker would put into a checkpoint."""

    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def test_a_pickled_checkpoint_is_not_executed(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = make_project(tmp_path, RECIPE.replace("tiny.safetensors", "evil.pt"))
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Payload()}))
    expect_error(capsys, tmp_path, "build", recipe, says="cannot read the checkpoint")
    torch.save({"state_dict": Payload()}, tmp_path / "evil.pt")
    expect_error(
        capsys, tmp_path, "build", recipe, says="torch.save(model.state_dict(), 'evil.pt')"
    )
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("prefix", ["module.", "net.", "model.network."])
def test_names_of_a_wrapper_are_taken_off(tmp_path: Path, prefix: str) -> None:
    weights = tiny_model().network.state_dict()
    wrapped = {f"{prefix}{key}": value for key, value in weights.items()}
    torch.save({"state_dict": wrapped}, tmp_path / "wrapped.ckpt")
    text = RECIPE.replace("tiny.safetensors", "wrapped.ckpt")
    network = load_parent(load_recipe(make_project(tmp_path, text))).network
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())


def test_a_class_in_the_place_of_logits(capsys, tmp_path: Path) -> None:
    recipe = make_project(tmp_path, RECIPE.replace("tinyproject:make", "choosing:make"))
    (tmp_path / "choosing.py").write_text(
        "from conftest import TinyNet\n\n\nclass make(TinyNet):\n    def forward(self, image):\n"
        "        found = super().forward(image)\n"
        "        return {**found, 'room': found['room'].argmax(1)}\n"
    )
    says = "task 'room' (classification) has an output of shape (1,), expected (N, C) with C = 4"
    expect_error(capsys, tmp_path, "build", recipe, says=says)


@pytest.mark.parametrize(
    ("output", "kind", "last"),
    [("'room'", "classification", "softmax"), ("'seg'", "segmentation", "softmax"),
     ("'depth'", "edges", "sigmoid")],
)  # fmt: skip
def test_probabilities_in_the_place_of_logits(
    capsys, tmp_path: Path, output: str, kind: str, last: str
) -> None:
    text = RECIPE.replace("tinyproject:make", "ending:make")
    recipe = make_project(tmp_path, text.replace("kind: depth", f"kind: {kind}")
                          if kind == "edges" else text)  # fmt: skip
    arguments = "1" if last == "softmax" else ""
    (tmp_path / "ending.py").write_text(
        "from conftest import TinyNet\n\n\nclass make(TinyNet):\n    def forward(self, image):\n"
        "        found = super().forward(image)\n"
        f"        return {{**found, {output}: found[{output}].{last}({arguments})}}\n"
    )
    says = f"({kind}) has an output of probabilities, expected logits"
    expect_error(capsys, tmp_path, "build", recipe, says=says)


def test_a_model_of_one_image_at_a_time(capsys, tmp_path: Path) -> None:
    recipe = make_project(tmp_path, RECIPE.replace("tinyproject:make", "alone:make"))
    (tmp_path / "alone.py").write_text(
        "from conftest import TinyNet\n\n\nclass make(TinyNet):\n    def forward(self, image):\n"
        "        return super().forward(image.reshape(1, 3, 32, 48))\n"
    )
    says = "forward fails on an input of shape (2, 3, 32, 48)"
    expect_error(capsys, tmp_path, "build", recipe, says=says)


def test_nan_in_the_parents_output(capsys, tmp_path: Path) -> None:
    recipe = make_project(tmp_path)
    model = tiny_model()
    model.network.depth.bias.data[:] = float("nan")
    save_file(model.network.state_dict(), tmp_path / "tiny.safetensors")
    expect_error(capsys, tmp_path, "build", recipe, says="output for task 'depth' has 96 NaN")


def test_a_class_label_out_of_range(capsys, tmp_path: Path) -> None:
    write_folder(tmp_path / "data", label=77)
    recipe = make_project(tmp_path, FOLDER_DATA.replace("ROOT", str(tmp_path / "data")))
    expect_error(capsys, tmp_path, "build", recipe, says="label 77 in sample 0 is out of range")


def test_an_unreadable_image(capsys, tmp_path: Path) -> None:
    write_folder(tmp_path / "data", broken=True)
    recipe = make_project(tmp_path, FOLDER_DATA.replace("ROOT", str(tmp_path / "data")))
    expect_error(capsys, tmp_path, "build", recipe, says="cannot decode image image/2.png")


def test_evaluation_data_without_labels(capsys, tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    eval_line = "{reader: scenes, split: test, options: {count: 8, height: 32, width: 48}}"
    images = f"{{reader: folder, root: {tmp_path / 'data/train/image'}, split: .}}"
    recipe = make_project(tmp_path, RECIPE.replace(eval_line, images))
    expect_error(capsys, tmp_path, "build", recipe, says="data.eval has no label 'segmentation'")


def test_an_output_folder_that_cannot_be_written(capsys, tmp_path: Path) -> None:
    recipe = make_project(tmp_path)
    (tmp_path / "file").write_text("in the way")
    code, _, stderr = run(capsys, "build", recipe, "--out", tmp_path / "file" / "out")
    assert code == 2 and "cannot write" in stderr and "Traceback" not in stderr


@pytest.mark.parametrize("verb", ["inspect", "score", "plan", "build"])
def test_no_such_recipe(capsys, verb: str) -> None:
    code, _, stderr = run(capsys, verb, "absent.yaml")
    assert code == 2 and "cannot read the recipe absent.yaml" in stderr


@pytest.mark.parametrize("verb", ["verify", "bench"])
def test_a_folder_that_is_no_bundle(capsys, tmp_path: Path, verb: str) -> None:
    code, _, stderr = run(capsys, verb, tmp_path)
    assert code == 2 and "is not a bundle" in stderr


def test_errors_are_json_when_asked(capsys) -> None:
    code, stdout, _ = run(capsys, "plan", "absent.yaml", "--json")
    assert code == 2 and '"hint"' in stdout


def test_a_model_file_that_fails_where_it_is_imported(capsys, tmp_path: Path) -> None:
    recipe = make_project(tmp_path, RECIPE.replace("tinyproject:make", "broken_factory:make"))
    (tmp_path / "broken_factory.py").write_text(f"WIDTH = wdth\n{FACTORY}")
    expect_error(capsys, tmp_path, "build", recipe, says="NameError")
    assert "broken_factory" not in sys.modules, "the next import is to start anew"


def test_a_second_target_is_looked_at_before_the_first_ones_work(capsys, tmp_path: Path) -> None:
    recipe = make_project(tmp_path, RECIPE.replace("keep: [", "engine: {dla: 5}\nkeep: ["))
    targets = ("--target", "x86-64-cpu", "--target", "jetson-orin-nx-16gb")
    expect_error(capsys, tmp_path, "build", recipe, *targets, says="DLA cores, got core 5")


def test_a_bench_counts_on_one_cpu_model(capsys, tmp_path: Path) -> None:
    code, _, stderr = run(capsys, "bench", tmp_path, "--device", "emulated:cortex-a53",
                          "--cpu", "cortex-a72")  # fmt: skip
    assert code == 2 and "counts on one CPU model, got cortex-a53, cortex-a72" in stderr


def test_a_factory_that_returns_no_module(capsys, tmp_path: Path) -> None:
    recipe = make_project(tmp_path, RECIPE.replace("tinyproject:make", "odd_factory:make"))
    (tmp_path / "odd_factory.py").write_text(FACTORY.replace("return TinyNet()", "return 3"))
    expect_error(capsys, tmp_path, "build", recipe, says="returned int")
