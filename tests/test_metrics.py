"""Task kinds: known values, streaming equal to whole, and the contract every kind keeps."""

from __future__ import annotations

import math

import pytest
import torch
from secateur.core import registry
from secateur.core.errors import DataError
from secateur.core.task import Task
from secateur.metrics.delta import delta
from secateur.metrics.kind import kind_of

torch.manual_seed(0)
SAMPLES = {  # kind: (output, target)
    "segmentation": (torch.randn(4, 3, 6, 8), torch.randint(0, 3, (4, 12, 16))),
    "depth": (torch.rand(4, 1, 6, 8) + 1, torch.rand(4, 12, 16) + 1),
    "normals": (torch.randn(4, 3, 6, 8), torch.nn.functional.normalize(torch.randn(4, 3, 12, 16))),
    "edges": (torch.randn(4, 1, 6, 8), torch.randint(0, 2, (4, 12, 16)).float()),
    "classification": (torch.randn(4, 3), torch.randint(0, 3, (4,))),
    "multilabel": (torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float()),
    "regression": (torch.randn(4, 2), torch.randn(4, 2)),
    "keypoints": (torch.rand(4, 6), torch.rand(4, 3, 2)),
}


def kind(name: str):
    return kind_of(Task("t", "t", name, "t", classes=3))


def test_every_kind_is_covered_here() -> None:
    assert set(registry.entries("secateur.metrics")) == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_streaming_in_parts_equals_the_whole(name: str) -> None:
    output, target = SAMPLES[name]
    whole, parts = kind(name).evaluator(), kind(name).evaluator()
    whole.update(output, target)
    for i in range(4):
        parts.update(output[i : i + 1], target[i : i + 1])
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-5)
    assert set(whole.compute()) == set(kind(name).higher_is_better)


@pytest.mark.parametrize("name", SAMPLES)
def test_distillation_is_zero_at_the_parent_and_positive_elsewhere(name: str) -> None:
    output, _ = SAMPLES[name]
    other = output + torch.randn_like(output)
    assert float(kind(name).distillation_loss(output, output)) == pytest.approx(0, abs=1e-5)
    assert float(kind(name).distillation_loss(other, output)) > 0.01


@pytest.mark.parametrize("name", SAMPLES)
def test_a_drawn_target_gives_a_gradient(name: str) -> None:
    output = SAMPLES[name][0].clone().requires_grad_(True)
    target = kind(name).sample_target(output.detach(), torch.Generator().manual_seed(0))
    kind(name).loss(output, target).backward()
    assert float(output.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", ["segmentation", "depth", "normals", "edges", "regression"])
def test_no_labelled_pixel_means_no_loss_and_no_nan(name: str) -> None:
    output, target = SAMPLES[name]
    unknown = {"segmentation": 255, "edges": 255.0, "regression": float("nan")}.get(name, 0.0)
    loss = kind(name).loss(output.clone().requires_grad_(True), torch.full_like(target, unknown))
    assert float(loss.detach()) == 0.0


def test_segmentation_by_hand() -> None:
    logits = torch.tensor([[[[9.0, 9, 0, 0]], [[0.0, 0, 9, 9]], [[0.0, 0, 0, 0]]]])
    evaluator = kind("segmentation").evaluator()
    evaluator.update(logits, torch.tensor([[[0, 1, 1, 255]]]))
    # class 0: hit 1, union 2; class 1: hit 1, union 2; class 2 never occurs
    assert evaluator.compute() == pytest.approx({"miou": 50.0, "pixel_accuracy": 200 / 3})


def test_depth_by_hand() -> None:
    evaluator = kind("depth").evaluator()
    evaluator.update(torch.tensor([[[[2.0, 3.0, 9.0]]]]), torch.tensor([[[2.0, 2.0, 0.0]]]))
    assert evaluator.compute() == pytest.approx(
        {"abs_rel": 0.25, "rmse": math.sqrt(0.5), "delta1": 50.0}
    )


def test_normals_by_hand() -> None:
    evaluator = kind("normals").evaluator()
    output = torch.tensor([[0.0, 0, 5], [0.0, 3, 3], [1.0, 0, 0]]).T.reshape(1, 3, 1, 3)
    truth = torch.tensor([[0.0, 0, 1]] * 3).T.reshape(1, 3, 1, 3)
    evaluator.update(output, truth)
    result = evaluator.compute()
    assert result["mean_angle"] == pytest.approx(45, abs=0.01)
    assert result["median_angle"] == pytest.approx(45, abs=0.1)
    assert result["within_11"] == pytest.approx(100 / 3)


def test_delta_is_the_mean_within_a_task_then_over_tasks() -> None:
    parent = {"a": {"up": 50.0, "down": 2.0}, "b": {"up": 10.0}}
    other = {"a": {"up": 45.0, "down": 2.2}, "b": {"up": 11.0}}
    result = delta(parent, other, {"a": {"up": True, "down": False}, "b": {"up": True}})
    assert result.per_task == pytest.approx({"a": -10.0, "b": 10.0})
    assert result.mean == pytest.approx(0.0)
    assert (result.worst_task, result.worst) == ("a", pytest.approx(-10.0))


@pytest.mark.parametrize(("before", "after", "change"), [
    ({"up": 0.0, "down": 2.0}, {"up": 2.0, "down": 4.0}, -100.0),  # a gain on 0 says nothing
    ({"up": 50.0, "down": 0.0}, {"up": 50.0, "down": 0.1}, -50.0),  # a loss on 0 counts as whole
    ({"up": 0.0, "down": 0.0}, {"up": 3.0, "down": 0.0}, 0.0),
    ({"up": 0.0, "down": 1.0}, {"up": math.nan, "down": 1.0}, math.nan),
])  # fmt: skip
def test_nothing_is_relative_to_zero(
    before: dict[str, float], after: dict[str, float], change: float
) -> None:
    found = delta({"t": before}, {"t": after}, {"t": {"up": True, "down": False}})
    assert found.per_task["t"] == pytest.approx(change, nan_ok=True)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_task_that_is_no_number_is_the_worst(order: tuple[str, str]) -> None:
    after = {"a": {"up": 5.0}, "b": {"up": math.nan}}
    parent, up = {"a": {"up": 10.0}, "b": {"up": 10.0}}, {"a": {"up": True}, "b": {"up": True}}
    found = delta(parent, {name: after[name] for name in order}, up)
    assert found.worst_task == "b" and math.isnan(found.worst) and math.isnan(found.mean)


def test_normals_that_are_unknown_give_no_gradient() -> None:
    output = torch.ones(1, 3, 1, 2, requires_grad=True)
    target = torch.tensor([[0.0, 0, 1], [math.nan] * 3]).T.reshape(1, 3, 1, 2)
    kind("normals").loss(output, target).backward()
    assert output.grad is not None and output.grad.isfinite().all()
    assert output.grad[..., 1].eq(0).all() and output.grad[..., 0].ne(0).any()


@pytest.mark.parametrize("unknown", [math.nan, math.inf, -math.inf, 0.0])
def test_depth_that_is_unknown_gives_no_loss_and_no_gradient(unknown: float) -> None:
    output = torch.ones(1, 1, 2, 2, requires_grad=True)
    target = torch.tensor([[[unknown, 3.0], [unknown, 1.0]]])
    loss = kind("depth").loss(output, target)
    loss.backward()
    assert float(loss.detach()) == 1.0
    assert output.grad is not None and output.grad.flatten().tolist() == [0.0, -0.5, 0.0, 0.0]
    evaluator = kind("depth").evaluator()
    evaluator.update(output.detach(), target)
    assert evaluator.compute()["rmse"] == pytest.approx(math.sqrt(2))


def test_a_class_that_is_not_judged_has_no_part_in_the_mean() -> None:
    evaluator = kind_of(Task("t", "t", "segmentation", "t", classes=3, ignore_index=0)).evaluator()
    truth = torch.tensor([[[0, 1], [1, 2]]])
    said = torch.tensor([[[1, 1], [1, 0]]])  # one pixel of class 2 is taken for class 0
    evaluator.update(torch.nn.functional.one_hot(said, 3).movedim(-1, 1).float(), truth)
    assert evaluator.compute()["miou"] == pytest.approx(50.0)  # class 1: all, class 2: none


@pytest.mark.parametrize(("name", "target"), [("regression", torch.zeros(4, 1)),
                                              ("keypoints", torch.zeros(4, 2, 2))])  # fmt: skip
def test_a_label_of_another_width_is_told(name: str, target: torch.Tensor) -> None:
    output, _ = SAMPLES[name]
    with pytest.raises(DataError, match="per image, the output"):
        kind(name).loss(output, target)
    with pytest.raises(DataError, match="per image, the output"):
        kind(name).evaluator().update(output, target)
