"""What a dependency graph cannot know is tried: groups that break a network stay whole."""

from __future__ import annotations

import pytest
import torch
from conftest import SPEC, tiny_model
from secateur.core.model import MultiTaskModel, output_difference
from secateur.core.task import Task
from secateur.prune import apply_plan, count_macs, find_groups, macs_model
from test_prune import masked, random_plan
from torch import Tensor, nn

EXAMPLE = SPEC.example(2)
ROOM = Task("room", "room", "classification", "room", 3)


class Attention(nn.Module):
    """Queries, keys and values by layers of their own, reshaped by numbers known beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.last = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).reshape(len(x), -1, 4, 4).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = torch.softmax(q @ k.transpose(2, 3), -1) @ v
        return self.last(mixed.transpose(1, 2).flatten(2))


class Halves(nn.Module):
    """Splits its channels at a number known beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 12), nn.Linear(6, 16)

    def forward(self, x: Tensor) -> Tensor:
        both = self.first(x)
        return self.second(both[..., :6] * both[..., 6:])


class Mirror(nn.Module):
    """Reads its channels in reverse: without one of them shapes still fit, and numbers do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 12), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).flip(-1))


class ResponseNorm(nn.Module):
    """ConvNeXt V2's (arXiv 2301.00808): it measures over channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.ones(width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=1, keepdim=True)
        return x + self.bias + self.weight * x * size / (size.mean(-1, keepdim=True) + 1e-6)


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.before, self.mlp, self.after = nn.Linear(16, 8), nn.Linear(8, 16), nn.LayerNorm(16)
        self.block, self.last = block, nn.Linear(16, 3)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.stem(image).flatten(2).transpose(1, 2)
        x = x + self.mlp(torch.relu(self.before(x)))
        x = x + self.block(self.after(x))
        return {"room": self.last(x.mean(1))}


class Split(nn.Module):
    """CSPDarknet's: half of the channels goes by, the other half through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.deep, self.last = (
            nn.Conv2d(8, 16, 1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(16, 8, 1),
        )
        self.classes = nn.Linear(8, 3)
        self.stem = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        a, b = self.both(torch.relu(self.stem(image))).split(8, dim=1)
        x = torch.relu(self.last(torch.cat([a, torch.relu(self.deep(b))], 1)))
        return {"room": self.classes(x.mean((2, 3)))}


def cut_of(model: MultiTaskModel) -> tuple[MultiTaskModel, float]:
    """A cut to 0.8 of the MACs, and how far it is from its masked parent."""
    groups = find_groups(model, EXAMPLE)
    plan = random_plan(groups, 0, 2, 0.8, macs_model(model, groups, EXAMPLE))
    cut = apply_plan(model, groups, plan)
    assert count_macs(cut, EXAMPLE) == plan.macs_after
    return cut, output_difference(masked(model, groups, plan), cut, EXAMPLE)


def names(model: MultiTaskModel) -> set[str]:
    return {group.root.removeprefix("network.") for group in find_groups(model, EXAMPLE)}


@pytest.mark.parametrize(
    ("block", "whole"),
    [
        (Attention(), {"block.query", "block.key", "block.value"}),
        (Halves(), {"block.first"}),
        (Mirror(), {"block.first"}),
    ],
)
def test_what_a_reshape_or_a_slice_fixes_stays_and_the_rest_is_cut(
    block: nn.Module, whole: set[str]
) -> None:
    torch.manual_seed(0)
    model = MultiTaskModel(Net(block), (ROOM,)).eval()
    found = names(model)
    assert not found & whole and "before" in found
    _, difference = cut_of(model)
    assert difference <= 1e-5


def test_a_split_does_not_hide_the_channels_beside_it() -> None:
    torch.manual_seed(0)
    model = MultiTaskModel(Split(), (ROOM,)).eval()
    assert {"last", "stem"} <= names(model)
    assert cut_of(model)[1] <= 1e-5


def test_a_norm_that_measures_over_channels_does_not_keep_them() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(16, 24), ResponseNorm(24), nn.Linear(24, 16))
    assert names(MultiTaskModel(Net(block), (ROOM,)).eval()) == {"before", "block.0", "block.2"}


def test_a_network_without_surprises_keeps_all_its_groups() -> None:
    found = {group.name for group in find_groups(tiny_model(), EXAMPLE)}
    assert found == {"seg_mix", "down", "project", "depthwise", "depth_mix", "room_hidden"}


class Silent(Net):
    """Ends in a ReLU that gives nothing but zeros."""

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"room": (super().forward(image)["room"] - 10).relu()}


def test_an_output_that_gives_zeros_hides_nothing() -> None:
    torch.manual_seed(0)
    model = MultiTaskModel(Silent(Mirror()), (ROOM,)).eval()
    assert not model(EXAMPLE)["room"].any()
    assert "block.first" not in names(model) and "before" in names(model)
