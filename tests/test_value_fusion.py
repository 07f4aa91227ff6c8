"""Experts' copies of a layer merged into one, and where tasks should stop sharing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur.core.errors import ModelError, PlanError, RecipeError
from secateur.core.model import MultiTaskModel
from secateur.core.task import Task
from secateur.fusion.layers import called_once, folded, following_norms, inputs_at, outputs_at
from secateur.fusion.linearised import Linearised
from secateur.fusion.merge_rules import MERGES
from secateur.fusion.regression import fit_to_experts
from secateur.fusion.sensitivity import diagonal_fisher, output_sensitivity
from secateur.fusion.sharing import apply_sharing, plan_sharing
from secateur.fusion.weights import (
    RULES,
    MergeSettings,
    measure_importance,
    merge_networks,
    merge_state,
    reestimate_norms,
)
from secateur.zoo.compose import ComposedModel, HeadSpec, compose
from torch import Tensor, nn

DEPTH = Task("depth", "depth", "depth", "depth")
SEG = Task("seg", "seg", "segmentation", "segmentation", classes=4)
WIDTHS = {"depth": 1, "seg": 4}


class Trunk(nn.Module):
    """A stem, an inverted residual block and a strided convolution without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.expand, self.expand_norm = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.deep_norm = nn.BatchNorm2d(12)
        self.project, self.project_norm = nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.down = nn.Conv2d(6, 8, 3, stride=2, padding="valid")

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(image)).relu()
        y = self.deep_norm(self.deep(self.expand_norm(self.expand(x)).relu())).relu()
        return self.down(x + self.project_norm(self.project(y))).relu()


def expert(task: Task, seed: int, spread: float = 0.15) -> MultiTaskModel:
    """One pre-trained trunk, moved by ``spread`` in a direction of its own, and its own head."""
    torch.manual_seed(0)
    trunk = Trunk()
    torch.manual_seed(seed)
    model = MultiTaskModel(
        ComposedModel(trunk, {task.name: nn.Conv2d(8, WIDTHS[task.name], 1)}), (task,)
    )
    for parameter in trunk.parameters():
        parameter.data += spread * parameter.std().nan_to_num(1) * torch.randn_like(parameter)
    for norm in trunk.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data.uniform_(0.7, 1.3)
            norm.bias.data += 0.2 * torch.randn_like(norm.bias)
    reestimate_norms(model, pictures(8, 5))
    return model.eval()


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 12, 16, generator=torch.Generator().manual_seed(seed))


def pair(spread: float = 0.15) -> dict[str, MultiTaskModel]:
    return {"depth": expert(DEPTH, 1, spread), "seg": expert(SEG, 2, spread)}


def joined(experts: dict[str, MultiTaskModel]) -> MultiTaskModel:
    networks = {name: model.network for name, model in experts.items()}
    heads = {name: copy.deepcopy(n.heads[name]) for name, n in networks.items()}
    trunk = copy.deepcopy(next(iter(networks.values())).backbone)
    return MultiTaskModel(ComposedModel(trunk, heads), (DEPTH, SEG)).eval()


def output_error(merged: MultiTaskModel, experts: dict[str, MultiTaskModel], x: Tensor) -> float:
    """The experts' outputs' unexplained variance, summed over tasks."""
    with torch.no_grad():
        got, total = merged(x), 0.0
        for name, model in experts.items():
            wanted = model(x)[name]
            total += float((got[name] - wanted).square().mean() / wanted.var())
        return total


def state(**values: list[float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


# --- rules on state dicts


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=2),
    weights=st.lists(st.floats(0.125, 4, width=32), min_size=2, max_size=2),
    rule=st.sampled_from(sorted(MERGES)),
)
def test_equal_experts_merge_into_themselves(values, weights, rule) -> None:
    theta = state(w=values)
    experts = {"a": theta, "b": theta}
    # Two task vectors add up; half of their sum is each of them. TIES keeps all of them here.
    merged = merge_state(
        state(w=[0.5, -0.25]), experts, rule, importance=experts | {"b": state(w=[1.0, 1.0])},
        weights={"a": 1.0, "b": 1.0} if rule == "ties" else dict(zip("ab", weights, strict=True)),
        strength=0.5 if rule == "task_arithmetic" else None, top_share=1.0,
    ) if rule != "fisher" else merge_state(
        {}, experts, rule, importance={"a": state(w=[0.0, 2.0]), "b": state(w=[0.0, 1.0])}
    )  # fmt: skip
    assert torch.allclose(merged["w"], theta["w"], atol=1e-5)


def test_average_follows_the_weights_and_copies_what_one_expert_owns() -> None:
    experts = {"a": state(w=[0.0, 4.0]), "b": state(w=[4.0, 0.0], only=[7.0])}
    merged = merge_state({}, experts, "average", weights={"a": 3, "b": 1})
    assert merged["w"].tolist() == [1.0, 3.0]
    assert merged["only"].tolist() == [7.0]


def test_ties_by_hand() -> None:
    # Task vectors: a = [5, 1, -3, 4], b = [-1, 2, 6, 4]. Half of each: [5, 0, 0, 4], [0, 0, 6, 4];
    # signs of the sum: + 0 + +; the mean counts only tasks that kept the entry.
    theta = state(w=[1.0, 1.0, 1.0, 1.0])
    experts = {"a": state(w=[6.0, 2.0, -2.0, 5.0]), "b": state(w=[0.0, 3.0, 7.0, 5.0])}
    merged = merge_state(theta, experts, "ties", top_share=0.5, strength=2.0)
    assert merged["w"].tolist() == [11.0, 1.0, 13.0, 9.0]


def test_ties_leaves_the_losing_sign_out() -> None:
    experts = {"a": state(w=[3.0]), "b": state(w=[-1.0]), "c": state(w=[1.0])}
    merged = merge_state(state(w=[0.0]), experts, "ties", top_share=1.0)
    assert merged["w"].tolist() == [2.0]  # of 3 and 1; -1 disagrees


def test_task_arithmetic_by_hand() -> None:
    experts = {"a": state(w=[3.0, 0.0]), "b": state(w=[1.0, 2.0])}
    merged = merge_state(state(w=[1.0, 1.0]), experts, "task_arithmetic", strength=0.5)
    assert merged["w"].tolist() == [2.0, 1.0]


def test_fisher_of_equal_importance_is_the_average_whatever_its_scale() -> None:
    experts = {"a": state(w=[0.0, 4.0]), "b": state(w=[4.0, 0.0])}
    importance = {"a": state(w=[1e-9, 2e-9]), "b": state(w=[1.0, 2.0])}
    merged = merge_state({}, experts, "fisher", importance=importance)
    assert torch.allclose(merged["w"], torch.tensor([2.0, 2.0]))


def test_fisher_follows_the_task_that_cares_and_averages_where_none_does() -> None:
    experts = {"a": state(w=[0.0, 0.0]), "b": state(w=[4.0, 4.0])}
    importance = {"a": state(w=[3.0, 0.0]), "b": state(w=[0.0, 0.0])}
    merged = merge_state({}, experts, "fisher", importance=importance)
    assert merged["w"][0] < 1e-4
    assert merged["w"][1] == 2.0


@pytest.mark.parametrize("rule", sorted(MERGES))
def test_statistics_are_averaged_and_counters_survive(rule: str) -> None:
    experts = {name: model.state_dict() for name, model in pair().items()}
    key = "network.backbone.stem_norm"
    counter = torch.tensor(41)
    experts["depth"][f"{key}.num_batches_tracked"] = counter
    ones = {t: {k: torch.ones_like(v) for k, v in s.items()} for t, s in experts.items()}
    merged = merge_state(experts["seg"], experts, rule, importance=ones, strength=9.0)
    assert merged[f"{key}.num_batches_tracked"] == counter
    assert merged[f"{key}.num_batches_tracked"].dtype == torch.int64
    both = (experts["depth"][f"{key}.running_var"] + experts["seg"][f"{key}.running_var"]) / 2
    assert torch.allclose(merged[f"{key}.running_var"], both)


def test_buffers_are_averaged_though_no_importance_of_them_is_known() -> None:
    experts = {"a": state(w=[0.0], scale=[2.0]), "b": state(w=[4.0], scale=[4.0])}
    importance = {"a": state(w=[1.0]), "b": state(w=[3.0])}
    merged = merge_state({}, experts, "fisher", importance=importance, buffers={"scale"})
    assert merged["scale"].tolist() == [3.0]
    assert torch.allclose(merged["w"], torch.tensor([2.0]))  # importance counts within its task


def test_what_cannot_be_merged_says_why() -> None:
    a, b = state(w=[1.0]), state(w=[1.0, 2.0])
    with pytest.raises(ModelError, match="shape"):
        merge_state({}, {"a": a, "b": b}, "average")
    with pytest.raises(ModelError, match="lack 'w'"):
        merge_state({}, {"a": a, "b": a}, "ties")
    with pytest.raises(ModelError, match="no importance"):
        merge_state({}, {"a": a, "b": a}, "fisher")
    with pytest.raises(RecipeError, match="'cut'"):
        merge_state({}, {"a": a, "b": a}, "cut")
    with pytest.raises(ModelError, match="no experts"):
        merge_state({}, {}, "average")
    with pytest.raises(ModelError, match="weights"):
        merge_state({}, {"a": a, "b": a}, "average", weights={"a": 0, "b": 0})


# --- rules on networks


@pytest.mark.parametrize("rule", RULES)
def test_equal_trunks_leave_every_task_as_it_was(rule: str) -> None:
    experts = pair(spread=0.0)
    trunk = experts["depth"].network.backbone.state_dict()
    experts["seg"].network.backbone.load_state_dict(trunk)
    chosen = MergeSettings(rule, strength=0.5 if rule == "task_arithmetic" else None,
                           top_share=1.0, reestimate=False)  # fmt: skip
    start = expert(DEPTH, 3).state_dict()
    merged = merge_networks(joined(experts), start, experts, pictures(16), chosen)
    assert output_error(merged, experts, pictures(4, 1)) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
        {"kernel_size": 4, "padding": "same"},
        {"kernel_size": 3, "groups": 2, "stride": 2, "padding": 1, "padding_mode": "reflect"},
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_a_layer_is_its_weight_times_the_gathered_inputs(options) -> None:
    layer, x = nn.Conv2d(4, 6, **options), torch.randn(3, 4, 13, 17)
    output = layer(x)
    positions = torch.randperm(output[0, 0].numel())[:20]
    inputs = inputs_at(layer, x, positions)
    made = (layer.weight.reshape(layer.groups, -1, inputs.shape[1]) @ inputs).flatten(0, 1)
    wanted = outputs_at(layer, output, positions)
    assert torch.allclose(made + layer.bias[:, None], wanted, atol=1e-5)


def test_folding_changes_no_output() -> None:
    model, x = expert(SEG, 2), pictures(2)
    norms = following_norms(model, x[:1])
    assert {name.rpartition(".")[2] for name in norms} == {"stem", "expand", "deep", "project"}
    assert torch.allclose(folded(model, norms)(x)["seg"], model(x)["seg"], atol=1e-5)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 100))
def test_cut_beats_the_other_rules_on_random_networks(seed: int) -> None:
    experts = {"depth": expert(DEPTH, 2 * seed + 1), "seg": expert(SEG, 2 * seed + 2)}
    start = expert(DEPTH, 0, spread=0.0).state_dict()
    error = {
        rule: output_error(
            merge_networks(joined(experts), start, experts, pictures(32), MergeSettings(rule)),
            experts,
            pictures(32, 1),
        )
        for rule in ("average", "fisher", "regmean", "cut")
    }
    assert error["cut"] < 0.9 * min(error["average"], error["fisher"], error["regmean"]), error


class Line(nn.Module):
    """One shared linear layer; each task reads all of its outputs."""

    def __init__(self, seed: int, *, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.line = nn.Conv2d(3, 4, 3, padding=1, bias=bias)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"seg": self.line(image)}


@pytest.mark.parametrize("bias", [True, False])
def test_cut_reaches_the_weighted_least_squares_optimum(bias: bool) -> None:
    experts = {name: MultiTaskModel(Line(i, bias=bias), (SEG,)).eval()
               for i, name in enumerate(("one", "two"))}  # fmt: skip
    network, images = MultiTaskModel(Line(2, bias=bias), (SEG,)).eval(), pictures(8)
    moments = {}
    for i, name in enumerate(experts):
        root = torch.randn(4, 4, generator=torch.Generator().manual_seed(i))
        moments[name] = root @ root.T + 0.1 * torch.eye(4)
        moments[name] /= moments[name].diagonal().mean()
    merged = fit_to_experts(
        network, experts, images, {name: {"network.line": m} for name, m in moments.items()},
        weights={"one": 1.5, "two": 0.5}, ridge=1e-9, damping=0.0,
    )  # fmt: skip
    views = torch.cat([images, images.flip(3)])
    merged.zero_grad()
    loss = torch.zeros(())
    for name, weight in (("one", 1.5), ("two", 0.5)):
        with torch.no_grad():
            wanted = experts[name](views)["seg"]
        error = (merged(views)["seg"] - wanted).transpose(0, 1).flatten(1)  # (4, S)
        loss = loss + weight * (error * (moments[name] @ error)).sum() / error.shape[1]
    loss.backward()
    assert loss > 1e-3  # the experts do disagree
    assert merged.network.line.weight.grad.abs().max() < 1e-4
    if bias:
        assert merged.network.line.bias.grad.abs().max() < 1e-4


def test_regmean_solves_the_sum_of_the_experts_own_problems() -> None:
    class Louder(Line):
        def forward(self, image: Tensor) -> dict[str, Tensor]:
            return super().forward(image * torch.tensor([10.0, 1, 1])[:, None, None])

    network, images = MultiTaskModel(Line(2, bias=False), (SEG,)).eval(), pictures(16)
    chosen = MergeSettings("regmean", off_diagonal=1.0)
    quiet = MultiTaskModel(Line(0, bias=False), (SEG,)).eval()
    w = quiet.network.line.weight
    for kind, share in ((Line, 0.5), (Louder, 100 / 101)):
        # The second expert's inputs are ten times as large in one channel: there it decides.
        loud = MultiTaskModel(kind(1, bias=False), (SEG,)).eval()
        experts = {"one": quiet, "two": loud}
        merged = merge_networks(network, {}, experts, images, chosen).network.line.weight
        wanted = (1 - share) * w + share * loud.network.line.weight
        assert torch.allclose(merged[:, 0], wanted[:, 0], atol=0.01)


def test_a_layer_called_twice_has_no_single_target_and_is_averaged() -> None:
    class Twice(Line):
        def forward(self, image: Tensor) -> dict[str, Tensor]:
            return {"seg": self.line(image) + self.line(image.flip(2))}

    experts = {name: MultiTaskModel(Twice(i, bias=True), (SEG,)).eval()
               for i, name in enumerate(("one", "two"))}  # fmt: skip
    network = MultiTaskModel(Twice(2, bias=True), (SEG,))
    both = sum(model.network.line.weight for model in experts.values()) / 2
    for rule in ("regmean", "cut"):
        merged = merge_networks(network, {}, experts, pictures(4), MergeSettings(rule))
        assert torch.allclose(merged.network.line.weight, both)


def test_a_weight_that_is_computed_or_another_layers_too_is_not_fitted() -> None:
    """What was written to it would be lost, or would be written to the other layer as well."""
    network = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)),
        nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1),
    )  # fmt: skip
    network[3].weight = network[2].weight
    assert called_once(network, torch.rand(1, 3, 4, 4)).keys() == {"0"}


def test_a_layer_that_one_task_does_not_need_follows_the_other() -> None:
    experts = pair()
    experts["depth"].network.heads["depth"].weight.data.zero_()  # depth is a constant now
    merged = merge_networks(joined(experts), {}, experts, pictures(32),
                            MergeSettings("cut", ridge=1e-3, damping=1e-4))  # fmt: skip
    with torch.no_grad():
        wanted = experts["seg"](pictures(8, 1))["seg"]
        error = (merged(pictures(8, 1))["seg"] - wanted).square().mean() / wanted.var()
    assert error < 1e-3
    with pytest.raises(ModelError, match="no importance of the outputs of 'seg'"):
        merge_networks(joined(experts), {}, experts, pictures(2), MergeSettings("cut"),
                       importance={"depth": {}})  # fmt: skip


def test_cut_leaves_statistics_that_training_mode_agrees_with() -> None:
    experts, images = pair(), pictures(32)
    merged = merge_networks(joined(experts), {}, experts, images, MergeSettings("cut"))
    views = torch.cat([images, images.flip(3)])
    with torch.no_grad():
        still = merged.eval()(views)
        moving = merged.train()(views)
    for name, output in still.items():
        assert (moving[name] - output).square().mean() < 0.01 * output.var(), name


def test_merging_keeps_its_inputs_and_is_the_same_twice() -> None:
    experts = pair()
    before = {name: copy.deepcopy(model.state_dict()) for name, model in experts.items()}
    network = joined(experts)
    for rule in ("fisher", "cut"):
        known = measure_importance(experts, pictures(8), rule)
        once = merge_networks(network, {}, experts, pictures(8), MergeSettings(rule))
        again = merge_networks(
            network, {}, experts, pictures(8), MergeSettings(rule), importance=known
        )
        for key, value in once.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key
    for name, model in experts.items():
        assert all(torch.equal(v, before[name][k]) for k, v in model.state_dict().items())


def test_a_layer_read_twice_is_refused_by_name() -> None:
    class Leak(Trunk):
        def forward(self, image: Tensor) -> Tensor:
            raw = self.stem(image)
            return self.down(self.stem_norm(raw).relu() + raw)

    model = MultiTaskModel(ComposedModel(Leak(), {"seg": nn.Conv2d(8, 4, 1)}), (SEG,)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.fill_(3.0)
    with pytest.raises(ModelError, match="batch norms are folded"):
        merge_networks(model, {}, {"seg": model}, pictures(4), MergeSettings("cut"))


def test_unknown_rule_and_unfit_network_say_what_is_wrong() -> None:
    experts = pair()
    with pytest.raises(RecipeError, match="magic"):
        merge_networks(joined(experts), {}, experts, pictures(2), MergeSettings("magic"))
    with pytest.raises(ModelError, match="do not fit"):
        merge_networks(experts["seg"], {}, experts, pictures(2), MergeSettings("average"))


# --- importance


def test_sensitivity_is_the_second_moment_of_the_gradient() -> None:
    model, images = MultiTaskModel(Line(0, bias=True), (SEG,)).eval(), pictures(3)
    moments = output_sensitivity(model, images)["network.line"]
    assert moments.shape == (4, 4)
    assert torch.allclose(moments, moments.T, atol=1e-8)
    assert torch.linalg.eigvalsh(moments).min() > -1e-7
    # Softmax: the logits' gradients sum to zero at each position.
    assert torch.allclose(moments.sum(1), torch.zeros(4), atol=1e-6)


def test_weights_that_no_output_needs_have_no_fisher() -> None:
    model = expert(SEG, 2)
    model.network.backbone.spare = nn.Conv2d(3, 3, 1)
    values = diagonal_fisher(model, pictures(3))
    assert values["network.backbone.spare.weight"].sum() == 0
    assert values["network.backbone.stem.weight"].min() >= 0
    assert values["network.backbone.stem.weight"].sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


# --- linearised


def test_linearised_at_the_start_is_the_network() -> None:
    trunk = expert(SEG, 2).network.backbone
    linear, x = Linearised(trunk).train(), pictures(2)
    assert torch.allclose(linear(x), trunk(x), atol=1e-6)
    assert not any(norm.training for norm in linear.modules() if isinstance(norm, nn.BatchNorm2d))


def test_linearised_slope_matches_finite_differences() -> None:
    trunk = expert(SEG, 2).network.backbone.double()
    linear, x, step = Linearised(trunk), pictures(2).double(), 1e-6
    ahead, behind = copy.deepcopy(trunk), copy.deepcopy(trunk)
    torch.manual_seed(7)
    with torch.no_grad():
        for tau, plus, minus in zip(
            linear.tau, ahead.parameters(), behind.parameters(), strict=True
        ):
            tau.copy_(torch.randn_like(tau))
            plus += step * tau
            minus -= step * tau
        slope = (ahead(x) - behind(x)) / (2 * step)
        assert torch.allclose(linear(x) - trunk(x), slope, atol=1e-4)


def test_linearised_trains_only_tau() -> None:
    linear = Linearised(expert(SEG, 2).network.backbone)
    start = linear.state()
    linear(pictures(2)).square().mean().backward()
    assert all(tau.grad is not None and tau.grad.abs().sum() > 0 for tau in linear.tau)
    assert all(parameter.grad is None for parameter in linear.network.parameters())
    with torch.no_grad():
        linear.tau[0] += 1.0
    assert torch.allclose(linear.state()["stem.weight"], start["stem.weight"] + 1)


def test_linearised_experts_add_up_exactly() -> None:
    # Outputs are linear in tau, so a mean of task vectors gives the mean of the outputs.
    trunk, x = expert(SEG, 2).network.backbone, pictures(2)
    experts = {"a": Linearised(trunk), "b": Linearised(trunk)}
    with torch.no_grad():
        for seed, one in enumerate(experts.values()):
            torch.manual_seed(seed)
            for tau in one.tau:
                tau.copy_(0.1 * torch.randn_like(tau))
        states = {name: one.state_dict() for name, one in experts.items()}
        start = Linearised(trunk)
        state = merge_state(start.state_dict(), states, "task_arithmetic", strength=0.5)
        wanted = sum(one(x) for one in experts.values()) / 2
        start.load_state_dict(state)
        assert torch.allclose(start(x), wanted, atol=1e-4)


def test_re_estimation_leaves_the_point_of_a_linearised_network() -> None:
    linear = Linearised(expert(SEG, 2).network.backbone)
    before = copy.deepcopy(linear.state_dict())
    reestimate_norms(linear, pictures(4))
    assert all(torch.equal(value, before[key]) for key, value in linear.state_dict().items())


# --- the watershed


def test_the_watershed_by_hand() -> None:
    # Each task keeps the best 4 of 8 channels over all layers.
    first = {"early": np.array([9.0, 8, 0, 0]), "late": np.array([7.0, 6, 0, 0])}
    second = {"early": np.array([9.0, 8, 0, 0]), "late": np.array([0.0, 6, 7, 0])}
    plan = plan_sharing({"a": first, "b": second}, keep_share=0.5, threshold=0.4)
    assert dict(plan.overlap) == {"early": 1.0, "late": pytest.approx(1 / 3)}
    assert plan.split == "late"
    assert plan.is_shared("early")
    assert not plan.is_shared("late")
    assert plan_sharing({"a": first, "b": second}, 0.5, 0.3).split is None


def test_layers_of_one_task_do_not_count_and_private_stays_private() -> None:
    one, two = np.array([1.0, 0]), np.array([0.0, 1])
    a = {"x": one, "y": one, "z": one, "head": one}
    b = {"x": one, "y": two, "z": one, "head": np.zeros(2)}
    plan = plan_sharing({"a": a, "b": b})
    assert [name for name, _ in plan.overlap] == ["x", "y", "z"]
    assert plan.split == "y"
    assert not plan.is_shared("z")  # its tasks agree, but it comes after the split
    with pytest.raises(PlanError, match="1 task"):
        plan_sharing({"a": a})


def small_parent() -> MultiTaskModel:
    torch.manual_seed(0)
    heads = {"depth": HeadSpec("depth", 1, width=8), "seg": HeadSpec("segmentation", 4, width=8)}
    model = MultiTaskModel(compose("mobilenetv2_050", heads), (DEPTH, SEG))
    reestimate_norms(model, torch.randn(4, 3, 32, 32))
    return model.eval()


@pytest.mark.parametrize(
    "split", ["network.backbone.blocks.3.1.conv_pw", "backbone.conv_stem#0", None]
)
def test_branching_computes_the_same_and_unties_the_copies(split: str | None) -> None:
    model, x = small_parent(), torch.randn(2, 3, 32, 32)
    plan = plan_sharing({"a": {"g": np.ones(2)}, "b": {"g": np.ones(2)}})
    branched = apply_sharing(model, type(plan)(plan.overlap, split), x)
    for name, wanted in model(x).items():
        assert torch.allclose(branched(x)[name], wanted, atol=1e-5)
    for parameter in branched.network.branches["seg"].parameters():
        parameter.data.zero_()
    assert torch.allclose(branched(x)["depth"], model(x)["depth"], atol=1e-5)
    alone = branched.network.select_outputs({"depth"})
    assert set(alone(x)) == {"depth"}
    assert not any("seg" in name for name in alone.state_dict())


def test_branched_experts_merge_their_trunks_only() -> None:
    parent, x = small_parent(), torch.randn(8, 3, 32, 32)
    plan = type(plan_sharing({"a": {"g": np.ones(1)}, "b": {"g": np.ones(1)}}))(
        (), "backbone.blocks.2.0.conv_pw"
    )
    experts = {}
    for seed, task in enumerate((DEPTH, SEG)):
        single = MultiTaskModel(parent.network.select_outputs({task.output}), (task,))
        torch.manual_seed(seed)
        for parameter in single.parameters():
            parameter.data += 0.05 * parameter.abs().mean() * torch.randn_like(parameter)
        experts[task.name] = apply_sharing(single.eval(), plan, x)
    network = apply_sharing(parent, plan, x)
    error = {}
    for rule in ("average", "cut"):
        chosen = MergeSettings(rule, reestimate=False)
        merged = merge_networks(network, {}, experts, x, chosen)
        error[rule] = output_error(merged, experts, x)
        if rule == "average":
            own = experts["seg"].network.branches["seg"].state_dict()
            got = merged.network.branches["seg"].state_dict()
            assert all(torch.equal(own[key], got[key]) for key in own)
    assert error["cut"] < error["average"]


def test_networks_that_cannot_be_branched_say_so() -> None:
    plan = plan_sharing({"a": {"g": np.ones(2)}, "b": {"g": np.ones(2)}})
    with pytest.raises(ModelError, match="not made of sequential blocks"):
        apply_sharing(joined(pair()), plan, pictures(1))
    with pytest.raises(ModelError, match="no backbone and heads"):
        apply_sharing(MultiTaskModel(Line(0, bias=True), (SEG,)), plan, pictures(1))
    with pytest.raises(ModelError, match="no layer of the backbone"):
        apply_sharing(small_parent(), type(plan)((), "heads.seg"), torch.randn(1, 3, 32, 32))
