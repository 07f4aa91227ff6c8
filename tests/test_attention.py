"""Heads and residual streams of transformers as channel groups."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur import zoo
from secateur.core.model import MultiTaskModel
from secateur.core.task import Task
from secateur.prune import apply_plan, find_groups, macs_model, plan_prune
from secateur.prune.axes import apply_axes, linear_groups
from secateur.prune.costs import params_limit
from secateur.prune.layer_norms import fold_layer_norms, is_plain_norm, rotated_axes
from secateur.prune.plan import Budget
from test_prune import largest_relative_difference, masked, random_plan
from torch import nn

EXAMPLE = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ROOM = Task("room", "room", "classification", "room", 4)


@pytest.fixture(scope="module")
def vit() -> MultiTaskModel:
    torch.manual_seed(0)
    heads = {"room": zoo.HeadSpec("classification", 4), "seg": zoo.HeadSpec("segmentation", 5, 16)}
    network = zoo.compose(
        "vit_tiny_patch16_224", heads, img_size=(32, 32), patch_size=8, embed_dim=48, depth=4,
        num_heads=3, out_indices=(1, 3),
    )  # fmt: skip
    return MultiTaskModel(network, [ROOM, Task("seg", "seg", "segmentation", "seg", 5)]).eval()


class Attention(nn.Module):
    """Plain attention; ``own_shape``: the heads' total width is read off ``qkv``, not the input."""

    def __init__(self, *, own_shape: bool) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = nn.Linear(24, 72), nn.Linear(24, 24), 3
        self.own_shape = own_shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2)
        return self.proj(mixed.reshape(batch, tokens, -1 if self.own_shape else width))


class Tokens(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.attention = nn.Conv2d(3, 24, 8, 8), attention
        self.out = nn.Linear(24, 4)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = self.embed(image).flatten(2).transpose(1, 2)
        return {"room": self.out(self.attention(tokens)).mean(1)}


def test_heads_stream_and_hidden_channels_are_groups(vit: MultiTaskModel) -> None:
    groups = {group.name: group for group in find_groups(vit, EXAMPLE)}
    backbone = [group for name, group in groups.items() if name.startswith("backbone")]
    assert sorted(group.width for group in backbone if group.heads_of) == [3, 3, 3, 3]
    streams = [group for group in backbone if group.parameters]
    assert [group.width for group in streams] == [48]
    names = [name.removeprefix("network.backbone.model.") for name in streams[0].parameters]
    assert names == ["cls_token", "pos_embed"]
    assert sorted(group.width for group in backbone if ".mlp." in group.name)[-4:] == [192] * 4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("macs", [0.2, 0.5, 0.8])
def test_a_cut_transformer_equals_its_masked_parent(
    vit: MultiTaskModel, macs: float, seed: int
) -> None:
    groups = find_groups(vit, EXAMPLE)
    plan = random_plan(groups, seed, 4, macs, macs_model(vit, groups, EXAMPLE))
    cut = apply_plan(vit, groups, plan)
    with torch.no_grad():
        wanted = masked(vit, groups, plan)(EXAMPLE)
        assert largest_relative_difference(wanted, cut(EXAMPLE)) <= 1e-4


def test_parameters_of_any_cut_are_known_with_position_embeddings(vit: MultiTaskModel) -> None:
    groups = find_groups(vit, EXAMPLE)
    limit = params_limit(vit, groups, 0)
    for seed in range(3):
        plan = random_plan(groups, seed, 4, 0.4, macs_model(vit, groups, EXAMPLE))
        cut = apply_plan(vit, groups, plan)
        counted = sum(parameter.numel() for parameter in cut.parameters())
        assert limit.total([len(c.kept) for c in plan.cuts]) == counted


def test_a_head_that_is_not_read_goes_first_and_costs_nothing(vit: MultiTaskModel) -> None:
    groups = find_groups(vit, EXAMPLE)
    scores = {group.name: np.ones(group.width) for group in groups}
    dull = next(group for group in groups if group.heads_of)
    scores[dull.name][1] = 0.0
    cost = macs_model(vit, groups, EXAMPLE)
    plan = plan_prune(groups, cost, scores, {}, Budget(0.99, 4, 0.1, 0.0), criterion="-",
                      fusion="-")  # fmt: skip
    assert next(cut.kept for cut in plan.cuts if cut.name == dull.name) == (0, 2)


@pytest.mark.parametrize("balance", [0.0, 0.65, 1.0])
def test_a_head_counts_by_its_channels(vit: MultiTaskModel, balance: float) -> None:
    """Where every channel is worth the same, 16 in a head, heads go as hidden channels do."""
    groups = find_groups(vit, EXAMPLE)
    rng = np.random.default_rng(0)
    scores = {group.name: group.spread * rng.uniform(0.5, 1.5, group.width) for group in groups}
    assert {group.spread for group in groups if group.heads_of} == {16}
    cost = macs_model(vit, groups, EXAMPLE)
    plan = plan_prune(groups, cost, scores, {}, Budget(0.3, 4, 0.1, balance), criterion="-",
                      fusion="-")  # fmt: skip
    shares = {cut.name: len(cut.kept) / cut.width for cut in plan.cuts}
    heads = [shares[group.name] for group in groups if group.heads_of]
    hidden = [share for name, share in shares.items() if ".mlp." in name]
    assert abs(np.mean(heads) - np.mean(hidden)) < 0.25


def trained_norms(vit: MultiTaskModel) -> MultiTaskModel:
    """The same with layer norms that scale and shift, as trained ones do."""
    torch.manual_seed(1)
    changed = copy.deepcopy(vit)
    for module in changed.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return changed


def test_folding_layer_norms_and_rotating_the_stream_change_no_output(vit: MultiTaskModel) -> None:
    parent = trained_norms(vit)
    groups = find_groups(parent, EXAMPLE)
    folded = fold_layer_norms(parent, groups, EXAMPLE)
    norms = [module for module in folded.modules() if isinstance(module, nn.LayerNorm)]
    assert all(is_plain_norm(norm) for norm in norms)
    stream = [group for group in groups if group.parameters]
    assert stream == [g for g in linear_groups(folded, groups, EXAMPLE) if g.parameters]
    assert not [g for g in linear_groups(parent, groups, EXAMPLE) if g.parameters]
    axes = {stream[0].name: rotated_axes(*_two_covariances(48))}
    turned = apply_axes(folded, stream, axes, EXAMPLE)
    with torch.no_grad():
        assert largest_relative_difference(parent(EXAMPLE), turned(EXAMPLE)) <= 1e-4


def _two_covariances(width: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, width, width))
    return [matrix @ matrix.T for matrix in noise]


@settings(max_examples=20, deadline=None)
@given(width=st.integers(24, 48), rank=st.integers(1, 8), seed=st.integers(0, 99))
def test_rotated_axes_gather_what_a_stream_carries(width: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    across = np.linalg.qr(np.hstack([np.ones((width, 1)), rng.standard_normal((width, rank))]))[0]
    signal = across[:, 1:] * rng.uniform(1, 3, rank)  # nothing but ``rank`` directions off the mean
    axes = rotated_axes(signal @ signal.T, np.eye(width))
    np.testing.assert_allclose(axes @ axes.T, np.eye(width), atol=1e-9)
    np.testing.assert_allclose(axes @ np.ones(width), np.ones(width), atol=1e-9)
    turned = axes @ signal
    centred = turned - turned.mean(0)
    # All that varies lies in the first channels; the others repeat a common share of it.
    np.testing.assert_allclose(np.ptp(turned[rank + 1 :], axis=0), 0, atol=1e-2)
    assert np.square(centred[: rank + 1]).sum() >= 0.9 * np.square(signal).sum()


def test_a_block_that_takes_its_width_from_the_input_keeps_its_heads() -> None:
    for own_shape in (True, False):
        network = Tokens(Attention(own_shape=own_shape))
        model = MultiTaskModel(network, [ROOM]).eval()
        heads = [group for group in find_groups(model, EXAMPLE) if group.heads_of]
        assert len(heads) == own_shape
