"""Compensation where a layer has other readers, shared weights or inputs that never change."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from secateur.compensate import RefitSettings, refit
from secateur.compensate.clips import find_readers
from secateur.compensate.moments import RIDGES, _solve
from secateur.compensate.refit import _single_calls
from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.core.plan import GroupCut, PrunePlan
from secateur.core.task import Task
from secateur.prune import apply_plan, find_groups, macs_model, plan_prune
from secateur.prune.plan import Budget
from torch import Tensor, nn
from torch.nn import functional

IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TASKS = (Task("a", "a", "depth", "a"), Task("b", "b", "depth", "b"))


class Parts(nn.Module):
    """Layers by name, joined by a function of them."""

    def __init__(self, join: Callable[[Parts, Tensor], dict[str, Tensor]], **parts: nn.Module):
        super().__init__()
        self.join = join
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self.join(self, image)


def two_norms() -> Parts:
    """A neck without a bias that two heads read, each through a norm of its own."""

    def join(net: Parts, image: Tensor) -> dict[str, Tensor]:
        neck = net.neck(functional.relu(net.stem(image)))
        return {"a": net.to_a(net.norm_a(neck)), "b": net.to_b(net.norm_b(neck))}

    return Parts(
        join, stem=nn.Conv2d(3, 16, 3), neck=nn.Conv2d(16, 8, 1, bias=False),
        norm_a=nn.BatchNorm2d(8), norm_b=nn.BatchNorm2d(8),
        to_a=nn.Conv2d(8, 1, 1), to_b=nn.Conv2d(8, 1, 1),
    )  # fmt: skip


def both_ways() -> Parts:
    """A layer whose output is read as it is, too, beside what a ReLU leaves of it."""

    def join(net: Parts, image: Tensor) -> dict[str, Tensor]:
        made = net.inner(functional.relu(net.stem(image)))
        return {"a": net.to_a(functional.relu(made) + made), "b": net.to_b(functional.relu(made))}

    return Parts(
        join, stem=nn.Conv2d(3, 16, 3), inner=nn.Conv2d(16, 8, 1), to_a=nn.Conv2d(8, 1, 1),
        to_b=nn.Conv2d(8, 1, 1),
    )  # fmt: skip


def batch_statistics() -> Parts:
    """A norm that takes each batch's own statistics."""

    def join(net: Parts, image: Tensor) -> dict[str, Tensor]:
        made = functional.relu(net.norm(net.inner(functional.relu(net.stem(image)))))
        return {"a": net.to_a(made), "b": net.to_b(made)}

    return Parts(
        join, stem=nn.Conv2d(3, 16, 3), inner=nn.Conv2d(16, 8, 1, bias=False),
        norm=nn.BatchNorm2d(8, track_running_stats=False), to_a=nn.Conv2d(8, 1, 1),
        to_b=nn.Conv2d(8, 1, 1),
    )  # fmt: skip


def channels_last() -> Parts:
    """A linear layer on (N, H, W, C) before a ReLU."""

    def join(net: Parts, image: Tensor) -> dict[str, Tensor]:
        made = functional.relu(net.inner(net.stem(image).permute(0, 2, 3, 1)))
        made = made.permute(0, 3, 1, 2)
        return {"a": net.to_a(made), "b": net.to_b(made)}

    return Parts(
        join, stem=nn.Conv2d(3, 16, 3), inner=nn.Linear(16, 8), to_a=nn.Conv2d(8, 1, 1),
        to_b=nn.Conv2d(8, 1, 1),
    )  # fmt: skip


@pytest.mark.parametrize("make", [two_norms, both_ways, batch_statistics, channels_last])
def test_a_refit_brings_every_reader_nearer_to_the_parent(make: Callable[[], Parts]) -> None:
    torch.manual_seed(0)
    parent = MultiTaskModel(make(), TASKS).eval()
    example = IMAGES[:2]
    groups = find_groups(parent, example)
    cost = macs_model(parent, groups, example)
    scores = {g.name: torch.rand(g.width).double().numpy() for g in groups}
    plan = plan_prune(groups, cost, scores, {}, Budget(0.6, 2), criterion="-", fusion="-")
    cut = apply_plan(parent, groups, plan)
    fitted = refit(parent, cut, groups, plan, IMAGES)
    with torch.no_grad():
        wanted, before, after = (net(IMAGES) for net in (parent, cut, fitted))
    for task in ("a", "b"):
        assert torch.isfinite(after[task]).all()
        errors = [(found[task] - wanted[task]).square().mean() for found in (after, before)]
        assert errors[0] < 0.9 * errors[1], task


def test_only_the_layers_that_are_named_are_refitted() -> None:
    torch.manual_seed(0)
    parent = MultiTaskModel(two_norms(), TASKS).eval()
    groups = find_groups(parent, IMAGES[:2])
    plan = without(groups, "stem", {0, 3, 4, 9})
    cut = apply_plan(parent, groups, plan)
    fitted = refit(parent, cut, groups, plan, IMAGES, RefitSettings(settle=False),
                   only={"network.to_a"})  # fmt: skip
    before = cut.state_dict()
    changed = {k for k, v in fitted.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"network.to_a.weight", "network.to_a.bias"}


@pytest.mark.parametrize("dead", [{2}, {0, 5, 11}, {*range(3, 15)}])
def test_channels_that_never_change_are_cut_without_a_trace(dead: set[int]) -> None:
    torch.manual_seed(0)
    network = two_norms()
    with torch.no_grad():
        for channel in dead:
            network.stem.weight[channel] = 0
            network.stem.bias[channel] = 1 + channel  # what it gives, everywhere
    parent = MultiTaskModel(network, TASKS).eval()
    groups = find_groups(parent, IMAGES[:2])
    plan = without(groups, "stem", dead)
    fitted = refit(parent, apply_plan(parent, groups, plan), groups, plan, IMAGES)
    other = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found = parent(other), fitted(other)
    for task in ("a", "b"):
        torch.testing.assert_close(found[task], wanted[task], rtol=1e-3, atol=1e-4)


def without(groups: Sequence[ChannelGroup], name: str, gone: set[int]) -> PrunePlan:
    """The plan that drops these channels of one group and nothing else."""
    cuts = tuple(
        GroupCut(
            g.name, g.width, tuple(c for c in range(g.width) if g.name != name or c not in gone)
        )
        for g in groups
    )
    assert any(len(cut.kept) == cut.width - len(gone) for cut in cuts)
    return PrunePlan(cuts, 2, 1, 1, 1, "-", "-", {})


def test_readers_are_counted() -> None:
    model = MultiTaskModel(both_ways(), TASKS).eval()
    found = find_readers(model, ["network.stem", "network.inner"], IMAGES[:1])
    assert set(found.clips) == {"network.stem"} and found.single == {"network.stem"}


def test_a_layer_whose_weights_are_anothers_too_is_left_alone() -> None:
    network = both_ways()
    assert {"network.to_a", "network.to_b"} < set(single(network))
    network.to_b.weight = network.to_a.weight
    assert set(single(network)) == {"network.stem", "network.inner"}


def single(network: Parts) -> dict[str, nn.Module]:
    return _single_calls(MultiTaskModel(network, TASKS).eval(), IMAGES[:1])


def test_inputs_that_never_change_leave_a_layer_as_it_is() -> None:
    gram = torch.full((1, 4, 4), -1e-3)  # rounding noise: not positive definite
    gram[0].fill_diagonal_(1e-4)
    cross = torch.ones(1, 2, 4)
    assert not _solve(gram, cross, RIDGES[0], None).any()
    sound = _solve(torch.eye(4)[None], cross, 0.0, None)
    torch.testing.assert_close(sound, cross)
