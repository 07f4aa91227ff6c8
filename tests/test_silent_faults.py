"""Plausible networks that were once cut, turned, refitted or scored wrongly without a word."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from secateur.compensate import refit
from secateur.core.model import MultiTaskModel, output_difference, parameter_count
from secateur.core.task import Task
from secateur.data.loading import Batch
from secateur.flow.allocation import RelativeLoss
from secateur.importance.bank import score_tasks
from secateur.prune import (
    apply_plan,
    count_macs,
    find_groups,
    macs_model,
)
from secateur.prune.axes import linear_groups
from secateur.prune.layer_norms import fold_layer_norms
from secateur.tasks import select_tasks
from test_prune import masked, random_plan
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

NOISE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TASK = Task("depth", "depth", "depth", "depth")
conv = partial(nn.Conv2d, kernel_size=3, padding=1)


class Net(nn.Module):
    """Two layers, what stands between, and a last layer: (N, 1, H, W)."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.last = conv(3, 8), conv(8, 8), nn.Conv2d(8, 1, 1)
        self.between = between

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"depth": self.last(functional.relu(self.b(self.between(self.a(image)))))}


class Shift(nn.Module):
    """Half of the channels moves by a pixel; with a learnt scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return torch.cat([x[:, :half].roll(1, 3), x[:, half:]], 1) * self.scale


class Mirror(Shift):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1) * self.scale


def model_of(network: nn.Module, *tasks: Task) -> MultiTaskModel:
    return MultiTaskModel(network, tasks or (TASK,)).eval()


def names(model: MultiTaskModel) -> set[str]:
    return {group.name for group in find_groups(model, NOISE)}


@pytest.mark.parametrize(
    "between",
    [lambda x: (x.flip(1) - 9).relu(), lambda x: (x.flip(1) + 9).relu(), Mirror(), Shift()],
    ids=["all zeros", "all let through", "mirror", "shift"],
)
def test_channels_that_move_stay_whole_though_noise_does_not_show_it(
    between: Callable[[Tensor], Tensor],
) -> None:
    assert names(model_of(Net(between))) == {"b"}


def test_a_scale_or_a_norm_between_lets_channels_go() -> None:
    for between in (nn.PReLU(8), nn.BatchNorm2d(8), nn.GroupNorm(1, 8), nn.InstanceNorm2d(8)):
        model = model_of(Net(between))
        assert names(model) == {"a", "b"}, between


@pytest.mark.parametrize(
    ("between", "linear"),
    [
        (nn.Identity(), True),
        (lambda x: x.clamp(-9, 9), False),
        (lambda x: functional.hardtanh(x, -9, 9), False),
        (lambda x: (x + 9).relu(), False),
        (nn.ReLU6(inplace=True), False),
    ],
)
def test_a_clamp_that_noise_does_not_reach_is_no_line(between, linear: bool) -> None:
    model = model_of(Net(between))
    found = linear_groups(model, find_groups(model, NOISE), NOISE)
    assert ("a" in {group.name for group in found}) == linear


def test_a_module_of_two_inputs_with_a_scale_is_no_norm_and_no_traceback() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8, 1, 1).flatten())

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return x * gate.sigmoid() * self.scale[:, None, None]

    gated = Gated()
    net = Net(lambda x: gated(x, x))
    net.gated = gated
    assert "b" in names(model_of(net))


def test_what_reads_past_a_norm_is_not_scaled_as_if_it_read_it() -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8, bias=False)
            self.read, self.past = nn.Linear(8, 4), nn.Linear(8, 4)
            self.last = nn.Linear(4, 1)
            nn.init.uniform_(self.norm.weight, 0.5, 2)

        def forward(self, image: Tensor) -> dict[str, Tensor]:
            tokens = self.stem(image).flatten(2).transpose(1, 2)
            read = self.read(self.norm(tokens)) + self.past((tokens - 6).relu())
            return {"depth": self.last(read.relu()).relu()}

    model = model_of(Past())
    folded = fold_layer_norms(model, find_groups(model, NOISE), NOISE)
    assert output_difference(model, folded, NOISE) < 1e-4
    assert output_difference(model, folded, 30 * NOISE.abs()) < 1e-4


class Residual(nn.Module):
    """A residual block whose ReLUs are one module, or three."""

    def __init__(self, relus: list[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.b0 = conv(3, 10), nn.BatchNorm2d(10)
        self.c1, self.b1 = conv(10, 8), nn.BatchNorm2d(8)
        self.c2, self.b2, self.last = conv(8, 10), nn.BatchNorm2d(10), nn.Conv2d(10, 1, 1)
        self.relus = nn.ModuleList(relus)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        one, two, three = self.relus
        x = one(self.b0(self.stem(image)))
        x = three(self.b2(self.c2(two(self.b1(self.c1(x))))) + x)
        return {"depth": self.last(x)}


def test_one_relu_for_all_of_a_block_is_refitted_as_three_are() -> None:
    images = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    relu = nn.ReLU()
    found = []
    for relus in ([relu, relu, relu], [nn.ReLU(), nn.ReLU(), nn.ReLU()]):
        model = model_of(Residual(relus))
        groups = find_groups(model, NOISE)
        plan = random_plan(groups, 0, 2, 0.6, macs_model(model, groups, NOISE))
        fitted = refit(model, apply_plan(model, groups, plan), groups, plan, images)
        with torch.no_grad():
            found.append(fitted(NOISE)["depth"])
    torch.testing.assert_close(found[0], found[1])


def test_weights_that_are_computed_are_left_as_the_cut_made_them() -> None:
    net = Net(functional.relu)
    net.last = weight_norm(net.last)
    model = model_of(net)
    groups = find_groups(model, NOISE)
    plan = random_plan(groups, 0, 2, 0.8, macs_model(model, groups, NOISE))
    cut = apply_plan(model, groups, plan)
    fitted = refit(model, cut, groups, plan, NOISE.repeat(8, 1, 1, 1))
    before, after = cut.get_submodule("network.last"), fitted.get_submodule("network.last")
    torch.testing.assert_close(dict(before.named_parameters()), dict(after.named_parameters()))


def test_slices_of_one_tensor_that_meet_again_end() -> None:
    def between(x: Tensor) -> Tensor:
        middle = x.mean((2, 3))
        near = functional.pad(middle[:, 1:] - middle[:, :-1], (1, 0))
        return x * torch.sigmoid(near)[:, :, None, None]

    assert "b" in names(model_of(Net(between)))


def test_layers_that_share_weights_stay_whole_and_share_them_on() -> None:
    net = Net(functional.relu)
    net.c, net.d = conv(8, 8), conv(8, 8)
    net.d.weight = net.c.weight
    net.between = lambda x: net.d(functional.relu(net.c(functional.relu(x))))
    model = model_of(net)
    groups = find_groups(model, NOISE)
    assert {group.name for group in groups} == {"b"}
    cost = macs_model(model, groups, NOISE)
    cut = apply_plan(model, groups, random_plan(groups, 0, 2, 0.9, cost))
    assert cut.get_submodule("network.c").weight is cut.get_submodule("network.d").weight
    assert parameter_count(cut) < parameter_count(model)


def test_a_network_that_keeps_a_tensor_on_itself_is_cut() -> None:
    class Keeps(Net):
        def forward(self, image: Tensor) -> dict[str, Tensor]:
            self.seen = self.a(image)
            return {"depth": self.last(self.b(self.seen.relu()).relu())}

    model = model_of(Keeps(nn.Identity()))
    assert names(model) == {"a", "b"}
    assert not hasattr(model.network, "seen")


def test_one_number_behind_a_learnt_scale_hides_no_group() -> None:
    class Count(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.hidden, self.last = conv(3, 8), nn.Linear(8, 8), nn.Linear(8, 1)
            self.scale = nn.PReLU()

        def forward(self, image: Tensor) -> dict[str, Tensor]:
            x = self.hidden(self.a(image).relu().mean((2, 3))).relu()
            return {"count": self.scale(self.last(x))}

    model = model_of(Count(), Task("count", "count", "regression", "count"))
    assert {group.name for group in find_groups(model, NOISE[:1])} == {"a", "hidden"}


def test_stochastic_depth_is_still_drawn_when_a_task_goes() -> None:
    from timm.layers import DropPath

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.drop = conv(3, 8), conv(8, 8), DropPath(0.5)
            self.depth, self.other = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 1, 1)

        def forward(self, image: Tensor) -> dict[str, Tensor]:
            x = self.a(image)
            x = x + self.drop(self.b(x).relu())
            return {"depth": self.depth(x), "other": self.other(x)}

    both = model_of(Deep(), TASK, Task("other", "other", "depth", "other"))
    one = select_tasks(both, ["depth"], NOISE)
    assert torch.equal(one.eval()(NOISE)["depth"], both(NOISE)["depth"])
    one.train()
    torch.manual_seed(0)
    drawn = {one(NOISE)["depth"].sum().item() for _ in range(8)}
    assert len(drawn) > 1


def test_finding_groups_leaves_frozen_parameters_frozen() -> None:
    model = model_of(Net(functional.relu))
    model.get_submodule("network.a").requires_grad_(False)
    groups = find_groups(model, NOISE)
    assert not model.get_parameter("network.a.weight").requires_grad
    plan = random_plan(groups, 0, 2, 0.7, macs_model(model, groups, NOISE))
    cut = apply_plan(model, groups, plan)
    assert not cut.get_parameter("network.a.weight").requires_grad
    assert count_macs(cut, NOISE) == plan.macs_after
    assert output_difference(masked(model, groups, plan), cut, NOISE) < 1e-5


def test_each_image_counts_by_itself_however_few_its_labels() -> None:
    """Fisher's information is of each sample's own loss, whatever images are beside it."""
    task = Task("segmentation", "depth", "segmentation", "segmentation", classes=3)
    net = Net(functional.relu)
    net.last = nn.Conv2d(8, 3, 1)
    model = model_of(net, task)
    target = torch.randint(0, 3, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    target[1].fill_(255)
    target[1, 3, 4] = 1
    groups = find_groups(model, NOISE)

    def scored(size: int):
        def stream():
            pairs = zip(NOISE.split(size), target.split(size), strict=True)
            return [Batch(x, {"segmentation": wanted}, ("",) * size) for x, wanted in pairs]

        return score_tasks(model, groups, [task], "fisher", stream, 2 // size)["segmentation"]

    together, alone = scored(2), scored(1)
    for name in alone:
        torch.testing.assert_close(
            torch.from_numpy(together[name]), torch.from_numpy(alone[name]), rtol=1e-4, atol=1e-12
        )


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    model = model_of(Net(functional.relu))
    judge = RelativeLoss(model, Batch(NOISE, {"depth": torch.ones(2, 1, 16, 16)}, ("", "")))
    broken = copy.deepcopy(model)
    broken.get_parameter("network.last.weight").data.fill_(math.nan)
    assert judge(model) == pytest.approx(1) and judge(broken) == math.inf
    unlabelled = RelativeLoss(model, Batch(NOISE, {}, ("", "")))
    other = copy.deepcopy(model)
    other.get_parameter("network.last.weight").data *= 0.5
    assert unlabelled(broken) == math.inf and unlabelled(other) == pytest.approx(1)
