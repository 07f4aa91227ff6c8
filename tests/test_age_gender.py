"""Somebody else's trained two-task network goes the whole way, without a single label."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, need_data
from safetensors.torch import load_file, save_file
from secateur.compensate import refit
from secateur.core.errors import ModelError
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.task import Task
from secateur.data.loading import batches, image_batch, open_reader, spread
from secateur.fusion.scores import fuse
from secateur.importance.bank import score_tasks
from secateur.lower import compare_outputs, export_onnx
from secateur.prune import apply_plan, count_macs, find_groups, macs_model, plan_prune
from secateur.prune.plan import Budget
from secateur.runtimes.base import runtime_of
from secateur.tasks import decompose, select_tasks
from secateur.zoo import AGE_GENDER_INPUT, age_gender
from test_prune import largest_relative_difference, masked
from torch.nn import functional

WEIGHTS = DATA.parent / "weights" / "faceapi_age_gender.safetensors"
TASKS = (
    Task("age", "age", "regression", "age"),
    Task("gender", "gender", "classification", "gender", classes=2),
)
EXAMPLE = AGE_GENDER_INPUT.example(2)
pytestmark = pytest.mark.skipif(
    not WEIGHTS.exists(), reason=f"no {WEIGHTS}: set SECATEUR_DATA to the folder beside weights/"
)


@pytest.fixture(scope="module")
def parent() -> MultiTaskModel:
    return MultiTaskModel(age_gender(WEIGHTS), TASKS).eval()


class Few:
    """The first and every 25th pet, as a data set without labels."""

    fingerprint = "few pets"
    label_names = frozenset()

    def __init__(self, split: str) -> None:
        self.reader = open_reader("pets", need_data("pets3"), split)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int):
        return self.reader[25 * index]


@pytest.fixture(scope="module")
def cut(parent):
    """The plan to half the MACs by what matters to both tasks, and the model it leaves."""
    reader = Few("train")
    groups = find_groups(parent, EXAMPLE)
    scores = score_tasks(
        parent, groups, TASKS, "taylor", lambda: batches(reader, [], AGE_GENDER_INPUT, 6), 2
    )
    plan = plan_prune(
        groups, macs_model(parent, groups, EXAMPLE), fuse(scores, {"age": 1, "gender": 1}, "mean"),
        scores, Budget(0.5), criterion="taylor", fusion="mean",
    )  # fmt: skip
    return groups, plan, apply_plan(parent, groups, plan)


def outputs(model: MultiTaskModel, images: torch.Tensor) -> dict[str, torch.Tensor]:
    with evaluating(model):
        return model(images)


def as_in_its_source(w: dict[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """TinyXception.ts and AgeGenderNet.ts of face-api.js line by line."""

    def same(x, value=0.0):  # TensorFlow's "same" at stride 2 and an even size
        return functional.pad(x, (0, 1, 0, 1), value=value)

    def separable(x, name):
        depthwise = w[f"{name}.dw.weight"]
        x = functional.conv2d(x, depthwise, padding=1, groups=len(depthwise))
        return functional.conv2d(x, w[f"{name}.pw.weight"], w[f"{name}.pw.bias"])

    def reduction(x, name, activate=True):
        y = separable(torch.relu(x) if activate else x, f"{name}.c0")
        y = functional.max_pool2d(same(separable(torch.relu(y), f"{name}.c1"), -torch.inf), 3, 2)
        return y + functional.conv2d(x, w[f"{name}.exp.weight"], w[f"{name}.exp.bias"], stride=2)

    def main(x, name):
        y = x
        for step in range(3):
            y = separable(torch.relu(y), f"{name}.c{step}")
        return y + x

    x = torch.relu(functional.conv2d(same(x), w["conv_in.weight"], w["conv_in.bias"], stride=2))
    x = main(main(reduction(reduction(x, "r0", False), "r1"), "m0"), "m1")
    x = torch.relu(separable(reduction(x, "r2"), "sep"))
    x = functional.avg_pool2d(x, 7, 2).flatten(1)
    return {n: functional.linear(x, w[f"{n}.weight"], w[f"{n}.bias"]) for n in ("age", "gender")}


def test_it_computes_what_its_source_does(parent) -> None:
    images = image_batch(Few("test"), range(4), AGE_GENDER_INPUT)
    wanted = as_in_its_source(load_file(WEIGHTS), images)
    assert largest_relative_difference(wanted, outputs(parent, images)) <= 1e-5
    assert wanted["age"].min() > 0 and wanted["age"].max() < 100  # years


def test_preprocessing_is_its_authors() -> None:
    reader = Few("test")
    spec = AGE_GENDER_INPUT
    got = image_batch(reader, [0], spec)[0] * 255
    pixels = torch.from_numpy(np.array(reader[0].image)).permute(2, 0, 1).float()
    mean = got.mean((1, 2)) + torch.tensor([122.782, 117.001, 104.298])
    assert torch.allclose(mean, pixels.mean((1, 2)), atol=0.5)  # resizing moves it a little


def test_other_weights_are_refused(tmp_path: Path) -> None:
    weights = load_file(WEIGHTS)
    del weights["age.bias"]
    save_file(weights, tmp_path / "lacking.safetensors")
    for name in ("lacking.safetensors", "absent.safetensors"):
        with pytest.raises(ModelError, match=name):
            age_gender(tmp_path / name)


def test_each_task_owns_its_last_layer_alone(parent) -> None:
    use = decompose(parent, EXAMPLE)
    assert use.private("age", use.params) == 512 + 1
    assert use.private("gender", use.params) == 2 * 512 + 2
    everything = sum(tensor.numel() for tensor in load_file(WEIGHTS).values())
    assert use.shared_by(2, use.params) == everything - 513 - 1026


@pytest.mark.parametrize("task", ["age", "gender"])
def test_a_task_alone_gives_the_same_bits(parent, task: str) -> None:
    alone = select_tasks(parent, [task])
    assert torch.equal(outputs(parent, EXAMPLE)[task], outputs(alone, EXAMPLE)[task])
    other = {"age": "gender", "gender": "age"}[task]
    assert not any(other in name for name, _ in alone.named_parameters())


def test_tracing_a_task_alone_on_one_image_prints_no_traceback(parent, capsys) -> None:
    alone = select_tasks(parent, ["age"])
    assert len(find_groups(alone, EXAMPLE[:1])) == len(find_groups(parent, EXAMPLE))
    assert capsys.readouterr().err == ""


def test_half_the_macs_go_and_the_rest_is_the_masked_parent(parent, cut) -> None:
    groups, plan, pruned = cut
    share = count_macs(pruned, EXAMPLE) / count_macs(parent, EXAMPLE)
    assert 0.495 <= share <= 0.5
    images = image_batch(Few("test"), range(4), AGE_GENDER_INPUT)
    wanted = outputs(masked(parent, groups, plan), images)
    assert largest_relative_difference(wanted, outputs(pruned, images)) <= 1e-5
    narrowed = {cut.name for cut in plan.cuts if len(cut.kept) < cut.width}
    depthwise = {m.layer for g in groups for m in g.members if m.layer.endswith(".dw")}
    assert len(depthwise) == 13 and any(name.endswith(".dw") for name in narrowed)


def test_compensation_without_labels_brings_the_outputs_nearer(parent, cut) -> None:
    groups, plan, pruned = cut
    reader = Few("train")
    fitted = refit(
        parent, pruned, groups, plan, image_batch(reader, spread(reader, 12), AGE_GENDER_INPUT)
    )
    unseen = image_batch(Few("test"), range(11), AGE_GENDER_INPUT)
    wanted, before, after = (outputs(m, unseen) for m in (parent, pruned, fitted))
    for task in ("age", "gender"):  # how much nearer is benchmarks/age_gender's to say
        distance = (after[task] - wanted[task]).abs().mean()
        assert distance < 0.8 * (before[task] - wanted[task]).abs().mean()


def test_the_exported_cut_says_the_same(cut, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(cut[2], EXAMPLE, path)
    images = image_batch(Few("test"), range(4), AGE_GENDER_INPUT)
    wanted = {name: tensor.numpy() for name, tensor in outputs(cut[2], images).items()}
    session = runtime_of("onnxruntime").open_session(path, 1)
    assert set(compare_outputs(wanted, session.run(images.numpy()), tolerance=1e-5)) == {
        "age", "gender",
    }  # fmt: skip
