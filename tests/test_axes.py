"""Balanced axes: the network stays the same, and what is cut afterwards was worth less."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur.core.model import MultiTaskModel, output_difference
from secateur.core.task import Task
from secateur.data.loading import Batch
from secateur.flow.axes import plan_axes
from secateur.prune import apply_plan, find_groups, macs_model, plan_widths
from secateur.prune.axes import apply_axes, balanced_axes, linear_groups
from secateur.prune.plan import Budget
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

TASKS = (
    Task("depth", "depth", "depth", "depth"),
    Task("room", "room", "classification", "room", classes=4),
)
IMAGES = torch.randn(8, 3, 16, 24, generator=torch.Generator().manual_seed(1))


class Bottlenecks(nn.Module):
    """Inverted residuals around a stream without activations, read in four ways.

    With ``rank``, all that the stream ever carries lies in so many directions of its channels.
    """

    def __init__(self, rank: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.expand = nn.Conv2d(16, 32, 3, padding=1)
        self.project = nn.Conv2d(32, 16, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(16)
        self.mix = nn.Conv2d(48, 8, 1)
        self.depth = nn.Conv2d(8, 1, 1)
        self.room = nn.Linear(16, 4)
        basis = torch.randn(16, rank)
        for maker in (self.stem, self.project):
            inner = torch.randn(rank, *maker.weight.shape[1:])
            maker.weight.data = torch.tensordot(basis, inner, 1)
        nn.init.zeros_(self.stem.bias)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        stream = self.norm(self.stem(image))
        stream = stream + self.project_norm(self.project(functional.relu(self.expand(stream))))
        small = functional.avg_pool2d(stream, 2)
        up = functional.interpolate(small, scale_factor=2.0, mode="bilinear")
        mixed = functional.relu(self.mix(torch.cat([stream, up, -stream], 1)))
        return {"depth": self.depth(mixed), "room": self.room(stream.mean((2, 3)))}


def bottlenecks(rank: int = 16) -> MultiTaskModel:
    """Return the network with batch norms that know the images and let them pass unchanged."""
    torch.manual_seed(3)
    model = MultiTaskModel(Bottlenecks(rank), TASKS)
    for norm in (model.network.norm, model.network.project_norm):
        norm.weight.data, norm.bias.data = torch.ones(16), torch.zeros(16)
        update_bn(IMAGES.split(4), model)
        norm.weight.data = (norm.running_var + norm.eps).sqrt()
        norm.bias.data = norm.running_mean.clone()
    return model.eval()


def largest_difference(one: MultiTaskModel, other: MultiTaskModel) -> float:
    with torch.no_grad():
        wanted, given_ = one(IMAGES), other(IMAGES)
    return max(
        float((wanted[name] - given_[name]).abs().max() / wanted[name].abs().max())
        for name in wanted
    )


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999))
def test_any_invertible_axes_leave_every_output_as_it_was(seed: int) -> None:
    model = bottlenecks()
    (stream,) = linear_groups(model, find_groups(model, IMAGES[:2]), IMAGES[:2])
    assert stream.width == 16
    axes = np.eye(16) + 0.2 * np.random.default_rng(seed).standard_normal((16, 16))
    turned = apply_axes(model, [stream], {stream.name: axes}, IMAGES)
    # Rounding of float32 grows with the condition of the axes, here up to 4000.
    assert largest_difference(model, turned) < 1e-6 * np.linalg.cond(axes)


def test_channels_behind_an_activation_are_not_linear() -> None:
    model = tiny_model()
    example = torch.randn(2, 3, 32, 48)
    assert linear_groups(model, find_groups(model, example), example) == ()


def test_a_turned_network_trains_on_from_where_it_was() -> None:
    model = bottlenecks()
    groups = linear_groups(model, find_groups(model, IMAGES[:2]), IMAGES[:2])
    axes = {group.name: 3 * np.eye(group.width)[::-1] for group in groups}
    turned = apply_axes(model, groups, axes, IMAGES)
    trained = copy.deepcopy(turned).train()  # batch norms now use the batch's own statistics
    assert largest_difference(turned, trained) < 1e-2


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999))
def test_balanced_axes_make_activity_and_sensitivity_diagonal_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, two = rng.standard_normal((2, 6, 30))
    activity, sensitivity = one @ one.T, two @ two.T
    axes = balanced_axes(activity, sensitivity)
    back = np.linalg.inv(axes)
    seen = axes @ (activity / np.trace(activity) * 6 + 1e-4 * np.eye(6)) @ axes.T
    felt = back.T @ (sensitivity / np.trace(sensitivity) * 6 + 1e-2 * np.eye(6)) @ back
    np.testing.assert_allclose(seen, np.eye(6), atol=1e-7)
    np.testing.assert_allclose(felt, np.diag(np.diag(felt)), atol=1e-7)
    assert (np.diff(np.diag(felt)) <= 1e-9).all()


class Pooled(nn.Module):
    """A linear layer without an activation, far from zero, on few numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.room = nn.Linear(24, 32), nn.Linear(32, 4)
        nn.init.constant_(self.stem.bias, 30.0)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"room": self.room(self.stem(image.mean((1, 2))))}


class ChannelsLast(nn.Module):
    """Its stream is (N, H, W, C) with as many rows as channels, read by linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.room = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"room": self.room(self.stem(image).permute(0, 2, 3, 1)).mean((1, 2))}


@pytest.mark.parametrize("network", [Pooled, ChannelsLast])
def test_axes_of_what_linear_layers_read(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = MultiTaskModel(network(), TASKS[1:]).eval()
    groups = linear_groups(model, find_groups(model, IMAGES[:1]), IMAGES[:1])
    (width,) = {group.width for group in groups}
    rooms = {"room": torch.arange(8) % 4}
    stream = [Batch(IMAGES, rooms, ())]
    axes = plan_axes(model, groups, model.tasks, lambda: stream, 1)
    turned = apply_axes(model, groups, axes, IMAGES)
    assert output_difference(model, turned, IMAGES) < 1e-4
    seen = {name: np.linalg.cond(matrix) for name, matrix in axes.items()}
    assert width in (16, 32) and all(np.isfinite(list(seen.values())))


def test_a_stream_of_low_rank_is_cut_to_its_rank_for_free() -> None:
    model = bottlenecks(rank=8)
    groups = find_groups(model, IMAGES[:2])
    (stream,) = linear_groups(model, groups, IMAGES[:2])
    targets = {"depth": torch.rand(8, 8, 12) + 1, "room": torch.arange(8) % 4}
    batch = Batch(IMAGES, targets, ())
    axes = plan_axes(model, [stream], TASKS, lambda: [batch], 1)
    turned = apply_axes(model, [stream], axes, IMAGES)

    def cut_to_half(parent: MultiTaskModel) -> float:
        own = find_groups(parent, IMAGES[:2])
        order = {group.name: np.arange(group.width, 0.0, -1.0) for group in own}
        counts = [8 if group.name == stream.name else group.width for group in own]
        cost = macs_model(parent, own, IMAGES[:2])
        plan = plan_widths(
            own, cost, order, counts, Budget(0.9, 1), per_task={}, criterion="-", fusion="-"
        )
        return largest_difference(parent, apply_plan(parent, own, plan))

    assert cut_to_half(turned) < 0.01
    assert cut_to_half(model) > 0.2


class Silent(nn.Module):
    """Two layers without an activation between, two with one, and an output that is all zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.depth = nn.Conv2d(8, 1, 1)
        nn.init.constant_(self.depth.bias, -10.0)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"depth": self.depth(self.c(self.b(self.a(image)).relu_()).relu_()).relu()}


def test_an_output_that_gives_zeros_hides_no_activation() -> None:
    """As depth may that ends in a ReLU, on the noise that turning is tried with."""
    torch.manual_seed(0)
    model = MultiTaskModel(Silent(), TASKS[:1]).eval()
    assert not model(IMAGES)["depth"].any()
    groups = find_groups(model, IMAGES)
    assert {group.name for group in groups} == {"a", "b", "c"}
    assert [group.name for group in linear_groups(model, groups, IMAGES)] == ["a"]
