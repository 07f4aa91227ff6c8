"""Groups, cost, budget and surgery: what must hold for any cut."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import SPEC, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur import zoo
from secateur.core.errors import PlanError
from secateur.core.model import MultiTaskModel
from secateur.core.plan import GroupCut, PrunePlan, dropped_indices, groups_after
from secateur.core.task import Task
from secateur.prune import apply_plan, count_macs, find_groups, macs_model, plan_prune
from secateur.prune.groups import whole_layers
from secateur.prune.plan import Budget, default_budget
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn import functional

EXAMPLE = SPEC.example(2)


def random_plan(groups, seed, grid=4, macs=0.5, cost=None) -> PrunePlan:
    rng = np.random.default_rng(seed)
    scores = {group.name: rng.uniform(size=group.width) for group in groups}
    return plan_prune(
        groups,
        cost,
        scores,
        {"any": scores},
        Budget(macs, grid, floor=0.1),
        criterion="random",
        fusion="mean",
    )


def masked(model: MultiTaskModel, groups, plan: PrunePlan) -> MultiTaskModel:
    """The parent with every dropped channel silenced where it is read."""
    silent = copy.deepcopy(model)
    modules = dict(silent.named_modules())
    for (layer, axis), gone in dropped_indices(groups, plan).items():
        if axis == "in":
            modules[layer].weight.data[:, sorted(gone)] = 0
        elif gone and isinstance(modules[layer], nn.LayerNorm):
            normalise_what_is_kept(modules[layer], gone)
    return silent


def normalise_what_is_kept(norm: nn.LayerNorm, gone: set[int]) -> None:
    """Take the norm's mean and variance over the channels that are not ``gone``."""
    on_last = not isinstance(norm, LayerNorm2d)
    kept = [i for i in range(len(norm.weight)) if i not in gone]
    weight, bias = norm.weight.detach()[kept], norm.bias.detach()[kept]

    def forward(x: torch.Tensor) -> torch.Tensor:
        last = x if on_last else x.movedim(1, -1)
        out = torch.zeros_like(last)
        out[..., kept] = nn.functional.layer_norm(
            last[..., kept], (len(kept),), weight, bias, norm.eps
        )
        return out if on_last else out.movedim(-1, 1)

    norm.forward = forward


def largest_relative_difference(a, b) -> float:
    return max(float((a[n] - b[n]).abs().max() / a[n].abs().max()) for n in a)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), macs=st.floats(0.35, 0.95), grid=st.sampled_from([1, 2, 4, 8]))
def test_pruned_model_equals_masked_parent(seed: int, macs: float, grid: int) -> None:
    model = tiny_model(seed=seed)
    groups = find_groups(model, EXAMPLE)
    plan = random_plan(groups, seed, grid, macs, macs_model(model, groups, EXAMPLE))
    pruned = apply_plan(model, groups, plan)
    with torch.no_grad():
        difference = largest_relative_difference(
            masked(model, groups, plan)(EXAMPLE), pruned(EXAMPLE)
        )
    assert difference <= 1e-5


class Blurred(nn.Module):
    """Blurs as many channels as there are, by constant weights that no layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 16, 1)
        self.head = nn.Conv2d(16, 1, 1)
        self.register_buffer("kernel", torch.ones(1, 1, 3, 3) / 9)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.relu(self.stem(image))
        x = functional.conv2d(x, self.kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1])
        return {"depth": self.head(torch.relu(self.mix(x)))}


class Attending(nn.Module):
    """One head of attention written by hand: queries and keys may be narrower than values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 1, 1)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in "qkv")

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.stem(image)
        t = x.flatten(2).transpose(1, 2)
        t = functional.scaled_dot_product_attention(self.q(t), self.k(t), self.v(t), scale=0.25)
        return {"depth": self.head(t.transpose(1, 2).unflatten(2, x.shape[2:]))}


@pytest.mark.parametrize("network", [Blurred, Attending])
def test_what_functions_multiply_is_planned_exactly(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = MultiTaskModel(network(), [Task("depth", "depth", "depth", "depth")]).eval()
    groups = find_groups(model, EXAMPLE)
    cost = macs_model(model, groups, EXAMPLE)
    assert groups and cost.macs([g.width for g in groups]) == count_macs(model, EXAMPLE)
    for seed in range(3):
        plan = random_plan(groups, seed, macs=0.85, cost=cost)
        assert count_macs(apply_plan(model, groups, plan), EXAMPLE) == plan.macs_after


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), macs=st.floats(0.35, 1.0), grid=st.sampled_from([1, 4, 8]))
def test_planned_macs_are_the_counted_macs_and_within_the_budget(
    seed: int, macs: float, grid: int
) -> None:
    model = tiny_model()
    groups = find_groups(model, EXAMPLE)
    plan = random_plan(groups, seed, grid, macs, macs_model(model, groups, EXAMPLE))
    pruned = apply_plan(model, groups, plan)
    assert plan.macs_before == count_macs(model, EXAMPLE)
    assert plan.macs_after == count_macs(pruned, EXAMPLE)
    assert plan.macs_after <= macs * plan.macs_before


@pytest.mark.parametrize("budget", [0.25, 0.5, 0.8])
def test_a_real_model_lands_within_one_percent_below_its_budget(budget: float) -> None:
    heads = {
        "seg": zoo.HeadSpec("segmentation", 13),
        "depth": zoo.HeadSpec("depth", 1),
        "room": zoo.HeadSpec("classification", 4),
    }
    tasks = [Task(name, name, spec.kind, name, spec.channels) for name, spec in heads.items()]
    model = MultiTaskModel(zoo.compose("mobilenetv2_050", heads), tasks).eval()
    example = SPEC.example()
    groups = find_groups(model, example)
    plan = random_plan(groups, 0, 8, budget, macs_model(model, groups, example))
    pruned = apply_plan(model, groups, plan)
    counted = count_macs(pruned, example)
    assert 0.99 * budget * plan.macs_before <= counted <= budget * plan.macs_before
    changed = [len(cut.kept) for cut in plan.cuts if len(cut.kept) < cut.width]
    assert changed and all(width % 8 == 0 for width in changed)


@pytest.mark.parametrize(
    "backbone",
    [
        "resnet18",
        "mobilenetv3_small_050",
        "regnety_002",
        "resnext50_32x4d",
        "convnext_atto",
        "vit_tiny_patch16_224",
        "deit3_small_patch16_224",
    ],
)
def test_backbones_of_many_kinds_survive_a_cut(backbone: str) -> None:
    options = {"img_size": (64, 64)} if backbone[:3] in ("vit", "dei") else {}
    heads = {"seg": zoo.HeadSpec("segmentation", 5, 16), "room": zoo.HeadSpec("classification", 4)}
    tasks = [Task(name, name, spec.kind, name, spec.channels) for name, spec in heads.items()]
    model = MultiTaskModel(zoo.compose(backbone, heads, **options), tasks).eval()
    example = torch.randn(1, 3, 64, 64)
    groups = find_groups(model, example)
    cost = macs_model(model, groups, example)
    plan = random_plan(groups, 1, 8, 0.3, cost)
    pruned = apply_plan(model, groups, plan)
    with torch.no_grad():
        assert largest_relative_difference(
            masked(model, groups, plan)(example), pruned(example)
        ) <= 1e-4  # fmt: skip
    assert count_macs(pruned, example) == plan.macs_after


def test_outputs_keep_all_their_channels(model: MultiTaskModel) -> None:
    groups = find_groups(model, EXAMPLE)
    made = {m.layer for g in groups for m in g.members if m.axis == "out"}
    assert not made & {"network.seg", "network.depth", "network.room"}


def test_a_concat_is_split_into_its_sources(model: MultiTaskModel) -> None:
    groups = {group.name: group for group in find_groups(model, EXAMPLE)}
    readers = [
        group
        for group in groups.values()
        if any((m.layer, m.axis) == ("network.seg_mix", "in") for m in group.members)
    ]
    assert sorted(group.width for group in readers) == [16, 32]


def test_the_floor_gives_way_where_it_would_leave_nothing_to_choose(model: MultiTaskModel) -> None:
    groups = find_groups(model, EXAMPLE)
    cost = macs_model(model, groups, EXAMPLE)
    floors = [default_budget(groups, cost, macs, 1).floor for macs in (0.9, 0.5, 0.25, 0.1)]
    assert floors == sorted(floors, reverse=True)
    assert floors[0] == 0.3 and floors[-1] < 0.3
    for macs, floor in zip((0.9, 0.5, 0.25, 0.1), floors, strict=True):
        least = cost.macs([-(-floor * group.width // 1) for group in groups])
        assert least <= macs * cost.macs([group.width for group in groups])


def test_budget_below_what_the_grid_allows_says_the_least(model: MultiTaskModel) -> None:
    groups = find_groups(model, EXAMPLE)
    cost = macs_model(model, groups, EXAMPLE)
    with pytest.raises(PlanError, match="below the least that whole channels in multiples of 8"):
        random_plan(groups, 0, 8, 0.01, cost)


def test_layers_that_stay_whole_are_told_most_parameters_first() -> None:
    """A buffer of a value per channel, which nothing here can cut, fixes its layer's channels."""

    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.free, self.fixed = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3)
            self.last = nn.Conv2d(16, 2, 1)
            self.register_buffer("temperature", torch.linspace(1, 2, 16).reshape(1, 16, 1, 1))

        def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            x = self.fixed(self.free(image).relu()) * self.temperature
            return {"depth": self.last(x)[:, :1]}

    model = MultiTaskModel(Tempered(), [Task("depth", "depth", "depth", "depth")]).eval()
    example = torch.randn(2, 3, 16, 16)
    groups = find_groups(model, example)
    assert whole_layers(model, groups, example) == {"network.fixed": 8 * 16 * 9 + 16}


def test_a_plan_of_another_model_is_refused(model: MultiTaskModel) -> None:
    groups = find_groups(model, EXAMPLE)
    foreign = PrunePlan((GroupCut("elsewhere", 8, (0,)),), 1, 1, 1, 8, "taylor", "mean", {})
    with pytest.raises(PlanError, match="another model"):
        apply_plan(model, groups, foreign)


def test_a_plan_survives_json(model: MultiTaskModel) -> None:
    groups = find_groups(model, EXAMPLE)
    plan = random_plan(groups, 0, 4, 0.5, macs_model(model, groups, EXAMPLE))
    assert PrunePlan.from_json(plan.to_json()) == plan


def test_apply_leaves_the_parent_as_it_was(model: MultiTaskModel) -> None:
    groups = find_groups(model, EXAMPLE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = random_plan(groups, 0, 4, 0.5, macs_model(model, groups, EXAMPLE))
    apply_plan(model, groups, plan)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_linear_layers_on_tokens_count_their_tokens() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(3 * 16, 24), nn.Linear(24, 4)

        def forward(self, image):
            tokens = image.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)
            return {"room": self.out(self.inner(tokens.flatten(1, 2))).mean(1)}

    model = MultiTaskModel(Mlp(), [Task("room", "room", "classification", "room", 4)]).eval()
    example = torch.randn(2, 3, 8, 8)  # 4 tokens
    cost = macs_model(model, find_groups(model, example), example)
    assert cost.macs([24]) == 4 * (48 * 24 + 24 * 4)
    assert cost.macs([8]) == 4 * (48 * 8 + 8 * 4)


def test_a_learnt_scale_after_the_last_layer_does_not_unprotect_it() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, image):
            return {"seg": self.scale * self.head(self.trunk(image))}

    model = MultiTaskModel(Scaled(), [Task("seg", "seg", "segmentation", "seg", 8)]).eval()
    assert [group.name for group in find_groups(model, EXAMPLE)] == ["trunk"]


def test_layers_the_cost_model_does_not_follow_stay_whole() -> None:
    class Upsampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.mid = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)
            self.up, self.head = nn.ConvTranspose2d(16, 16, 2, 2), nn.Conv2d(16, 1, 1)

        def forward(self, image):
            return {"depth": self.head(self.up(self.mid(self.inner(image))))}

    model = MultiTaskModel(Upsampling(), [Task("depth", "depth", "depth", "depth")]).eval()
    groups = find_groups(model, EXAMPLE)
    assert [group.name for group in groups] == ["inner"]
    plan = random_plan(groups, 0, 4, 0.97, macs_model(model, groups, EXAMPLE))
    assert count_macs(apply_plan(model, groups, plan), EXAMPLE) == plan.macs_after


@pytest.mark.parametrize("factory", [zoo.cifar_resnet, zoo.cifar_vit])
def test_parents_of_small_images_are_cut_like_others(factory) -> None:
    """What is left has the groups that the plan says, without looking for them again."""
    task = Task("label", "label", "classification", "fine", 80)
    model, example = MultiTaskModel(factory(), (task,)).eval(), torch.randn(2, 3, 32, 32)
    groups = find_groups(model, example)
    cost = macs_model(model, groups, example)
    plan = random_plan(groups, 0, grid=2, macs=0.1, cost=cost)
    cut, left = apply_plan(model, groups, plan), groups_after(groups, plan)
    assert count_macs(cut, example) == plan.macs_after <= 0.1 * plan.macs_before
    assert cut(example)["label"].shape == (2, 80)
    looked_for = {group.name: group for group in find_groups(cut, example)}
    assert {group.name: group for group in left if group.name in looked_for} == looked_for
    assert all(group.width == 1 for group in left if group.name not in looked_for)
    assert cost.macs([group.width for group in left]) == plan.macs_after
