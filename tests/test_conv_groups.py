"""Grouped convolutions lose whole groups, with what makes their inputs and reads their outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import SPEC
from secateur.compensate import refit
from secateur.core import registry
from secateur.core.model import MultiTaskModel, output_difference
from secateur.core.task import Task
from secateur.data.loading import Batch
from secateur.importance.bank import score_tasks
from secateur.lower import export_onnx
from secateur.lower.operators import list_operators
from secateur.lower.resized import Resized
from secateur.prune import apply_plan, count_macs, find_groups, macs_model, plan_widths
from secateur.prune.costs import layer_widths, params_limit
from secateur.prune.plan import Budget
from secateur.runtimes.base import runtime_of
from test_prune import masked, random_plan
from torch import Tensor, nn

EXAMPLE = SPEC.example(2)
ROOM = Task("room", "room", "classification", "room", 3)


class Bottlenecks(nn.Module):
    """1x1, grouped 3x3 with a squeeze-and-excitation, 1x1, twice, in ``groups`` and half of it."""

    def __init__(self, groups: int = 4, second: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4)
        self.reduce = nn.ModuleList(nn.Conv2d(8, 16, 1) for _ in range(2))
        self.norm = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))
        self.grouped = nn.ModuleList(
            nn.Conv2d(16, 16 * factor, 3, padding=1, groups=count)
            for factor, count in ((1, groups), (2, second))
        )
        self.squeeze = nn.Conv2d(16, 16, 1)
        self.expand = nn.ModuleList(nn.Conv2d(width, 8, 1) for width in (16, 32))
        self.last = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.stem(image)
        for number in range(2):
            y = self.grouped[number](torch.relu(self.norm[number](self.reduce[number](x))))
            if number == 0:
                y = y * torch.sigmoid(self.squeeze(y.mean((2, 3), keepdim=True)))
            x = x + self.expand[number](torch.relu(y))
        return {"room": self.last(x.mean((2, 3)))}


class Crossed(nn.Module):
    """Two grouped convolutions on one stream, of 4 and of 3 groups: they share no partition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=4)
        self.four, self.three = (nn.Conv2d(12, 12, 3, padding=1, groups=n) for n in (4, 3))
        self.last = nn.Linear(12, 3)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.stem(image))
        return {"room": self.last((self.four(x) + self.three(x)).mean((2, 3)))}


def settled(network: nn.Module) -> MultiTaskModel:
    torch.manual_seed(0)
    model = MultiTaskModel(network, (ROOM,)).train()
    for _ in range(20):
        model(torch.randn(8, 3, SPEC.height, SPEC.width))
    return model.eval()


def test_groups_of_a_grouped_convolution_go_with_their_makers_and_readers() -> None:
    groups = {g.name: g for g in find_groups(settled(Bottlenecks()), EXAMPLE)}
    first, second = groups["grouped.0.groups"], groups["grouped.1.groups"]
    assert (first.width, second.width) == (4, 2)
    members = {(m.layer.removeprefix("network."), m.axis): len(m.indices[0]) for m in first.members}
    assert members == {
        ("reduce.0", "out"): 4, ("norm.0", "out"): 4, ("grouped.0", "out"): 4,
        ("squeeze", "in"): 4, ("squeeze", "out"): 4, ("expand.0", "in"): 4,
    }  # fmt: skip
    assert {len(m.indices[0]) for m in second.members} == {8, 16}  # twice as many come out


@pytest.mark.parametrize("kept", [(1, 1), (3, 2), (4, 1)])
def test_a_cut_equals_its_masked_parent_and_costs_what_was_planned(kept: tuple[int, int]) -> None:
    model = settled(Bottlenecks())
    groups = find_groups(model, EXAMPLE)
    scores = {g.name: torch.rand(g.width).double().numpy() for g in groups}
    counts = [dict(zip(("grouped.0.groups", "grouped.1.groups"), kept, strict=True)).get(
        g.name, g.width) for g in groups]  # fmt: skip
    plan = plan_widths(
        groups, macs_model(model, groups, EXAMPLE), scores, counts, Budget(1.0),
        per_task={}, criterion="-", fusion="-",
    )  # fmt: skip
    cut = apply_plan(model, groups, plan)
    assert (cut.network.grouped[0].groups, cut.network.grouped[1].groups) == kept
    assert output_difference(masked(model, groups, plan), cut, EXAMPLE) <= 1e-5
    assert plan.macs_after == count_macs(cut, EXAMPLE)
    assert params_limit(model, groups, 0).total(counts) == sum(p.numel() for p in cut.parameters())


def test_convolutions_that_partition_a_stream_differently_stay_whole() -> None:
    model = settled(Crossed())
    layers = {m.layer for g in find_groups(model, EXAMPLE) for m in g.members}
    assert not layers & {"network.four", "network.three", "network.stem"}


@pytest.mark.parametrize("criterion", sorted(registry.entries("secateur.importance")))
def test_every_criterion_scores_whole_groups(criterion: str) -> None:
    model = settled(Bottlenecks())
    groups = find_groups(model, EXAMPLE)
    images, rooms = torch.randn(4, 3, SPEC.height, SPEC.width), torch.tensor([0, 1, 2, 0])
    batch = Batch(images, {"room": rooms}, ())
    scores = score_tasks(model, groups, (ROOM,), criterion, lambda: [batch], 1)["room"]
    for group in groups:
        assert scores[group.name].shape == (group.width,)
        assert np.isfinite(scores[group.name]).all() and (scores[group.name] >= 0).all()


def test_a_group_that_nobody_reads_scores_nothing() -> None:
    model = settled(Bottlenecks())
    with torch.no_grad():
        model.network.expand[0].weight[:, 4:8] = 0  # what the second of four makes
        model.network.squeeze.weight[:, 4:8] = 0
    groups = find_groups(model, EXAMPLE)
    batch = Batch(EXAMPLE, {"room": torch.tensor([0, 1])}, ())
    scores = score_tasks(model, groups, (ROOM,), "taylor", lambda: [batch], 1)["room"]
    first = scores["grouped.0.groups"]
    assert first[1] == 0 and (np.delete(first, 1) > 0).all()


def test_refit_mends_the_loss_of_whole_groups() -> None:
    model = settled(Bottlenecks())
    groups = find_groups(model, EXAMPLE)
    images = torch.randn(64, 3, SPEC.height, SPEC.width)
    plan = random_plan(groups, 0, 4, 0.7, macs_model(model, groups, EXAMPLE))
    cut = apply_plan(model, groups, plan)
    fitted = refit(model, cut, groups, plan, images)
    assert output_difference(model, fitted, images) < output_difference(model, cut, images)


def test_an_exported_file_narrows_as_the_network_does(tmp_path: Path) -> None:
    model = settled(Bottlenecks())
    groups = find_groups(model, EXAMPLE)
    export_onnx(model, EXAMPLE[:1], tmp_path / "whole.onnx")
    full = [group.width for group in groups]
    widths = layer_widths(model, groups)
    counts = [{"grouped.0.groups": 3, "grouped.1.groups": 1}.get(g.name, g.width) for g in groups]
    (tmp_path / "cut.onnx").write_bytes(Resized(tmp_path / "whole.onnx", widths, full).to(counts))
    scores = {group.name: np.ones(group.width) for group in groups}
    plan = plan_widths(
        groups, macs_model(model, groups, EXAMPLE), scores, counts, Budget(1.0),
        per_task={}, criterion="-", fusion="-",
    )  # fmt: skip
    export_onnx(apply_plan(model, groups, plan), EXAMPLE[:1], tmp_path / "wanted.onnx")
    shapes = [sorted(tuple(t.dims) for t in onnx.load(tmp_path / f"{name}.onnx").graph.initializer
                     if len(t.dims) == 4) for name in ("cut", "wanted")]  # fmt: skip
    assert shapes[0] == shapes[1]
    session = runtime_of("onnxruntime").open_session(tmp_path / "cut.onnx", 1)
    assert session.run(EXAMPLE[:1].numpy())["room"].shape == (1, 3)
    operators = list_operators(tmp_path / "whole.onnx", widths).timed
    heavy = sum(p.kind.macs(p.read(counts), p.made(counts)) for p in operators)
    assert heavy == plan.macs_after
