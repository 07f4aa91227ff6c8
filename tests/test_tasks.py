"""Who uses what, models without the tasks nobody wants, and layers folded for the task left."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from cli_run import RECIPE, make_project, run
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur.core.errors import ModelError
from secateur.core.model import MultiTaskModel
from secateur.core.task import Task
from secateur.lower import compare_outputs, export_onnx
from secateur.prune import apply_plan, count_macs, find_groups, macs_model, plan_prune
from secateur.prune.plan import Budget
from secateur.runtimes.base import runtime_of
from secateur.tasks import apply_folds, decompose, draw_use, plan_folds, select_tasks
from secateur.tasks.reparam import LoraLayer, RcmConv, TapsLayer, TaskPasses, set_task
from secateur.tasks.stub import Stub
from torch import Tensor, nn
from torch.nn import functional

NAMES = ("a", "b", "c")
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def conv(inputs: int, outputs: int, kernel: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def model_of(network: nn.Module) -> MultiTaskModel:
    """``network`` with outputs a, b, c, random weights and norms far from the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return MultiTaskModel(network, [Task(n, n, "regression", n) for n in NAMES]).eval()


class HardSharing(nn.Module):
    """One trunk, three heads; a is frozen and c reads the trunk without its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.norm = conv(3, 8, 3), nn.BatchNorm2d(8)
        self.heads = nn.ModuleDict({name: conv(8, 2) for name in NAMES})
        self.heads["a"].requires_grad_(False)

    def forward(self, image):
        x = functional.relu(self.norm(self.trunk(image)))
        with torch.no_grad():
            c = self.heads["c"](x.detach())
        return {"a": self.heads["a"](x), "b": self.heads["b"](x), "c": c}


class Branches(nn.Module):
    """a leaves after the stem, b and c part later."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = conv(3, 8, 3), nn.Sequential(conv(8, 8, 3), nn.ReLU(inplace=True))
        self.early, self.left, self.right = conv(8, 2), conv(8, 2), conv(8, 2)

    def forward(self, image):
        x = self.stem(image)
        y = self.deep(x)
        return {"a": self.early(x), "b": self.left(y), "c": self.right(y)}


class Adapters(nn.Module):
    """Backbone once per task: own norm, own residual adapter, own scalar gate, own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv(3, 8, 3), conv(8, 8, 3)
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(8) for name in NAMES})
        self.adapters = nn.ModuleDict({name: conv(8, 8) for name in NAMES})
        self.gates = nn.ParameterDict({name: torch.zeros(()) for name in NAMES})
        self.attend = nn.ModuleDict({name: conv(8, 1) for name in NAMES})
        self.extra = nn.Parameter(torch.zeros(8, 1, 1))  # of task b
        self.head = conv(8, 2)

    def forward(self, image):
        x, outputs = self.stem(image), {}
        for name in NAMES:
            y = functional.relu(self.norms[name](self.body(x)))
            y = y + torch.sigmoid(self.gates[name]) * self.adapters[name](y)
            y = y * torch.sigmoid(self.attend[name](y))
            outputs[name] = self.head(y + self.extra if name == "b" else y)
        return outputs


class FeedingHeads(nn.Module):
    """b reads a's answer, detached; c reads which of b's channels is the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b, self.c = conv(3, 8, 3), conv(8, 2), conv(10, 3), conv(8, 1)

    def forward(self, image):
        x = self.trunk(image)
        a = self.a(x)
        b = self.b(torch.cat([x, a.detach()], 1))
        return {"a": a, "b": b, "c": self.c(x) * b.argmax(1, keepdim=True)}


class Joined(nn.Module):
    """Heads of 2, 3 and 1 channels joined by a concat, resized, and taken apart again."""

    def __init__(self, split) -> None:
        super().__init__()
        self.trunk, self.a, self.b, self.c = conv(3, 8, 3), conv(8, 2), conv(8, 3), conv(8, 1)
        self.split = split

    def forward(self, image):
        x = self.trunk(image)
        joined = torch.cat([self.a(x), self.b(x), self.c(x)], dim=1)
        joined = functional.interpolate(torch.sigmoid(joined), scale_factor=2.0, mode="bilinear")
        a, b, c = self.split(joined)
        return {"a": a, "b": b, "c": c}


def by_slice(y):
    return y[:, :2], y[:, 2:5], y[:, -1:]


def by_split(y):
    a, b, c = torch.split(y, [2, 3, 1], dim=1)
    return a, b, c


def by_chunk(y):
    left, right = y.chunk(2, dim=1)  # channels 0 to 2 and 3 to 5: each spans two heads
    return left[:, :2], torch.cat([left[..., 2:, :, :][:, :1], right[:, :2]], 1), right[:, 2]


def by_narrow(y):
    return y.narrow(1, 0, 2), torch.narrow(y, 1, 2, 3), y[:, 5]


class Untraceable(nn.Module):
    """Python branches on values; heads with several outputs, on flattened batches, and a gate."""

    class Head(nn.Module):
        def __init__(self, outputs: int) -> None:
            super().__init__()
            self.mix, self.out = conv(8, 8), conv(8, outputs)

        def forward(self, x, scale=1.0):
            y = self.out(functional.relu(self.mix(x)))
            return {"map": y * scale, "tokens": y.flatten(0, 1)}

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.other = conv(3, 8, 3), conv(3, 8, 3)
        self.heads = nn.ModuleDict({name: self.Head(2) for name in NAMES})
        self.gates = nn.ParameterDict({name: torch.zeros(1) for name in NAMES})

    def forward(self, image):
        x = self.trunk(image) if image.mean() > 0 else self.other(image)
        out = {name: head(x, scale=2.0) for name, head in self.heads.items()}
        return {name: out[name]["map"] * self.gates[name] for name in NAMES}


NETWORKS = {
    "hard sharing": HardSharing,
    "branches": Branches,
    "adapters": Adapters,
    "feeding heads": FeedingHeads,
    "slice": lambda: Joined(by_slice),
    "split": lambda: Joined(by_split),
    "chunk": lambda: Joined(by_chunk),
    "narrow": lambda: Joined(by_narrow),
    "untraceable": Untraceable,
}
MODELS = {name: model_of(make()) for name, make in NETWORKS.items()}


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(MODELS)),
    keep=st.sets(st.sampled_from(NAMES), min_size=1, max_size=2),
    seed=st.integers(0, 2**16),
)
def test_dropping_removes_what_only_dropped_tasks_use_and_nothing_else(kind, keep, seed) -> None:
    model = MODELS[kind]
    selected = select_tasks(model, keep, IMAGE)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, 3, 16, 16, generator=generator) + seed % 3 - 1
    with torch.no_grad():
        before, after = model(images), selected(images)
    assert set(after) == keep
    assert all(torch.equal(before[name], after[name]) for name in keep)

    use = decompose(model, IMAGE)
    left = {name for name, _ in selected.named_parameters()}
    assert left == {name for name, users in use.parameters.items() if users & keep}


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_an_output_that_no_task_names_goes_though_every_task_is_kept(kind: str) -> None:
    whole = MODELS[kind]
    named = MultiTaskModel(whole.network, [t for t in whole.tasks if t.name != "b"]).eval()
    selected = select_tasks(named, ["a", "c"], IMAGE)
    wanted = select_tasks(whole, ["a", "c"], IMAGE)
    left = {name for name, _ in selected.named_parameters()}
    assert left == {name for name, _ in wanted.named_parameters()}
    assert all(torch.equal(selected(IMAGE)[name], whole(IMAGE)[name]) for name in ("a", "c"))


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(sorted(MODELS.keys() - {"untraceable"})),
    gone=st.sampled_from(NAMES),
)
def test_private_amounts_are_what_dropping_a_task_saves(kind, gone) -> None:
    model = MODELS[kind]
    use = decompose(model, IMAGE)
    selected = select_tasks(model, set(NAMES) - {gone}, IMAGE)
    size = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in selected.parameters()
    )
    assert use.private(gone, use.params) == size
    assert use.private(gone, use.macs) == count_macs(model, IMAGE) - count_macs(selected, IMAGE)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_parameter_and_mac_is_counted_once(kind: str) -> None:
    model = MODELS[kind]
    use = decompose(model, IMAGE)
    assert sum(use.shared_by(n, use.params) for n in range(4)) == sum(
        p.numel() for p in model.parameters()
    )
    image = IMAGE[:1]  # of the branch it takes
    assert sum(use.shared_by(n, use.macs) for n in range(4)) == count_macs(model, image)
    for task in NAMES:
        for amounts in (use.params, use.macs):
            shares = [use.shared(task, n, amounts) for n in (1, 2, 3)]
            assert sum(shares) == use.used(task, amounts)


def test_frozen_detached_and_compared_parts_are_found_and_no_flag_changes() -> None:
    model = MODELS["hard sharing"]
    before = [p.requires_grad for p in model.parameters()]
    use = decompose(model, IMAGE)
    assert use.layers["network.heads.a"] == {"a"}
    assert use.layers["network.trunk"] == use.layers["network.norm"] == set(NAMES)
    assert use.layers["network.heads.c"] == {"c"}
    assert [p.requires_grad for p in model.parameters()] == before and False in before
    feeding = decompose(MODELS["feeding heads"], IMAGE)
    assert feeding.layers["network.a"] == set(NAMES)  # through detach, then argmax
    assert feeding.layers["network.b"] == {"b", "c"}


@pytest.mark.parametrize("kind", ["slice", "split", "chunk", "narrow"])
def test_heads_joined_and_split_again_come_apart(kind: str) -> None:
    use = decompose(MODELS[kind], IMAGE)
    assert {name: use.layers[f"network.{name}"] for name in NAMES} == {n: {n} for n in NAMES}
    assert use.layers["network.trunk"] == set(NAMES)


def test_a_part_of_two_inputs_needs_both() -> None:
    model = model_of(Joined(lambda y: (y[:, :2], y[:, 1:3], y[:, 5])))
    use = decompose(model, IMAGE)
    assert use.layers["network.a"] == {"a", "b"} and use.layers["network.b"] == {"b"}


def test_a_layer_run_once_per_task_shares_its_weights_but_not_its_macs() -> None:
    use = decompose(MODELS["adapters"], IMAGE)
    everyone = frozenset(NAMES)
    assert use.params["network.body"] == {everyone: 8 * 8 * 9 + 8}
    assert use.macs["network.stem"] == {everyone: 3 * 8 * 9 * 256}
    assert use.macs["network.body"] == {frozenset({n}): 8 * 8 * 9 * 256 for n in NAMES}
    assert use.macs["network.head"] == {frozenset({n}): 8 * 2 * 256 for n in NAMES}
    assert use.parameters["network.gates.b"] == use.parameters["network.extra"] == {"b"}


def test_layers_come_in_execution_order_and_idle_ones_last() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.last, self.first = conv(1, 1), conv(8, 2), conv(3, 8)

        def forward(self, image):
            y = self.last(self.first(image))
            return {"a": y, "b": y, "c": y}

    use = decompose(model_of(Backwards()), IMAGE)
    assert list(use.layers) == ["network.first", "network.last", "network.idle"]
    assert use.layers["network.idle"] == frozenset() and use.shared_by(0, use.params) == 2


def test_a_channel_group_belongs_to_the_tasks_that_read_it() -> None:
    model = MODELS["branches"]
    use = decompose(model, IMAGE, find_groups(model, IMAGE))
    assert use.groups == {"stem": set(NAMES), "deep.0": {"b", "c"}}
    assert use.channels == {"stem": {frozenset(NAMES): 8}, "deep.0": {frozenset("bc"): 8}}


def test_a_zero_gradient_is_still_a_use() -> None:
    class Silenced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.side = conv(3, 2), conv(3, 2)

        def forward(self, image):
            x = self.trunk(image)
            shape_only = torch.zeros_like(self.side(image))
            return {"a": x + 0 * self.side(image), "b": x + shape_only, "c": x}

    assert decompose(model_of(Silenced()), IMAGE).layers["network.side"] == {"a"}


def test_an_in_place_write_nobody_assigns_is_kept() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.shift, self.act = conv(3, 2), conv(3, 2), nn.ReLU(inplace=True)

        def forward(self, image):
            x = self.trunk(image)
            x.add_(self.shift(image))
            self.act(x)
            return {"a": x * 2, "b": x, "c": self.shift(image)}

    model = model_of(Writes())
    selected = select_tasks(model, ["a"])  # no example, so nothing compares: it must be right
    assert torch.equal(selected(IMAGE)["a"], model(IMAGE)["a"])


def test_stubs_stand_for_whole_heads_and_follow_the_batch() -> None:
    model = MODELS["untraceable"]
    selected = select_tasks(model, ["b"], IMAGE)
    assert [n for n, m in selected.named_modules() if isinstance(m, Stub)] == [
        "network.heads.a", "network.heads.c"]  # fmt: skip
    assert count_macs(selected, IMAGE) < count_macs(model, IMAGE)
    tokens = selected.network.heads["a"](torch.zeros(5, 8, 16, 16), scale=2.0)["tokens"]
    assert tokens.shape == (5 * 2, 16, 16)
    narrower = selected.network.heads["a"](torch.zeros(5, 4, 16, 16), scale=2.0)["map"]
    assert narrower.shape == (5, 2, 16, 16)


def test_a_stubbed_network_can_be_cut_and_exported(tmp_path: Path) -> None:
    class BySize(nn.Module):
        """fx gives up at the comparison of sizes; torch.export does not."""

        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.down = conv(3, 8, 3), nn.Conv2d(8, 8, 3, 2, 1)
            self.heads = nn.ModuleDict({n: nn.Sequential(conv(16, 8), conv(8, 2)) for n in NAMES})

        def forward(self, image):
            x = self.trunk(image)
            y = self.down(x)
            if y.shape[-1] != x.shape[-1]:
                y = functional.interpolate(y, size=x.shape[-2:])
            return {name: head(torch.cat([x, y], 1)) for name, head in self.heads.items()}

    model = model_of(BySize())
    selected = select_tasks(model, ["a"], IMAGE)
    groups = find_groups(selected, IMAGE)
    plan = plan_prune(
        groups, macs_model(selected, groups, IMAGE), {g.name: np.ones(g.width) for g in groups}, {},
        Budget(0.5, 1), criterion="none", fusion="mean",
    )  # fmt: skip
    cut = apply_plan(selected, groups, plan)
    assert count_macs(cut, IMAGE) == plan.macs_after < count_macs(selected, IMAGE)
    export_onnx(cut, IMAGE, tmp_path / "model.onnx")
    session = runtime_of("onnxruntime").open_session(tmp_path / "model.onnx", threads=1)
    with torch.no_grad():
        wanted = {"a": cut(IMAGE)["a"].numpy()}
    compare_outputs(wanted, session.run(IMAGE.numpy()), tolerance=1e-4)


def test_a_network_that_defeats_tracing_and_stubs_is_refused() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.secret = conv(3, 2), conv(3, 2)

        def forward(self, image):
            x = self.trunk(image)
            factor = self.secret(image).sum().item()  # leaves torch: no recorder can follow
            if factor > 1e9:
                raise ValueError
            return {"a": x, "b": x * factor, "c": self.secret(image)}

    with pytest.raises(ModelError, match="'b' changes") as caught:
        select_tasks(model_of(Hidden()), ["b"], IMAGE)
    assert "select_outputs" in caught.value.hint


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_in_words() -> None:
    network = HardSharing()
    network.trunk = torch.jit.script(network.trunk)
    with pytest.raises(ModelError, match=r"'network\.trunk' is TorchScript"):
        decompose(MultiTaskModel(network, MODELS["branches"].tasks), IMAGE)


class Own(HardSharing):
    """A network that selects by itself; ``says`` is what its smaller one gives of an output."""

    def __init__(self, says: Callable[[Tensor], Tensor] = lambda output: output) -> None:
        super().__init__()
        self.says = says

    def select_outputs(self, names: Collection[str]) -> nn.Module:
        return Smaller(self, list(names))


class Smaller(nn.Module):
    def __init__(self, whole: Own, names: list[str]) -> None:
        super().__init__()
        self.whole, self.names = copy.deepcopy(whole), names

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        outputs = self.whole(image)
        return {name: self.whole.says(outputs[name]) for name in self.names}


def test_select_outputs_goes_first() -> None:
    assert isinstance(select_tasks(model_of(Own()), ["a"], IMAGE).network, Smaller)


def test_select_outputs_is_checked() -> None:
    with pytest.raises(ModelError, match=r"after select_outputs\(\['a'\]\), 'a' changes"):
        select_tasks(model_of(Own(lambda output: output + 1)), ["a"], IMAGE)
    select_tasks(model_of(Own(lambda output: output * (1 + 1e-7))), ["a"], IMAGE)  # rounding
    broken = Own()
    broken.select_outputs = lambda names: names["a"]  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"select_outputs\(\['a'\]\) failed: TypeError"):
        select_tasks(model_of(broken), ["a"], IMAGE)
    broken.select_outputs = lambda _names: None  # type: ignore[assignment,method-assign,return-value]
    with pytest.raises(ModelError, match=r"returned NoneType, no nn\.Module"):
        select_tasks(model_of(broken), ["a"], IMAGE)


def test_an_opaque_split_is_selected_once_an_image_shows_its_parts() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3, 2), conv(3, 3)

        def forward(self, image):
            return torch.cat([self.a(image), self.b(image)], 1).split([2, 3], 1)

    tasks = [Task("one", "0", "regression", "one"), Task("two", "1", "regression", "two")]
    model = MultiTaskModel(Opaque(), tasks).eval()
    selected = select_tasks(model, ["two"], IMAGE)
    assert {n for n, _ in selected.named_parameters()} == {"network.b.weight", "network.b.bias"}
    assert torch.equal(selected(IMAGE)["two"], model(IMAGE)["two"])


# -- folding -------------------------------------------------------------------------------------


class TaskNorm(nn.Module):
    """A batch norm per task, chosen by the task that is set."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.task = "a"
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(width) for name in NAMES})

    def forward(self, x):
        return self.norms[self.task](x)


class PeftLora(nn.Module):
    """peft's layout, without peft: base_layer, one adapter active at a time."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.task = base, "a"
        self.lora_A = nn.ModuleDict({n: nn.Linear(base.in_features, 2, bias=False) for n in NAMES})
        self.lora_B = nn.ModuleDict({n: nn.Linear(2, base.out_features) for n in NAMES})
        self.scaling = {name: 0.5 + i for i, name in enumerate(NAMES)}
        self.merged, self.use_dora = False, {}

    def forward(self, x):
        update = self.lora_B[self.task](self.lora_A[self.task](x))
        return self.base_layer(x) + self.scaling[self.task] * update


class Flat(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


LAYERS = {
    "lora conv": lambda: (LoraLayer(nn.Conv2d(8, 8, 3, 2, 1), NAMES, rank=2), nn.Conv2d),
    "lora linear": lambda: (LoraLayer(nn.Linear(8, 8), NAMES, rank=2), nn.Linear),
    "peft": lambda: (PeftLora(nn.Linear(8, 8, bias=False)), nn.Linear),
    "taps conv": lambda: (TapsLayer(nn.Conv2d(8, 8, 3, 2, 1, groups=2), NAMES, 0.0), nn.Conv2d),
    "taps linear": lambda: (TapsLayer(nn.Linear(8, 8), NAMES), nn.Linear),
    "rcm conv": lambda: (RcmConv(nn.Conv2d(8, 8, 3, 2, 1), NAMES), nn.Conv2d),
    "rcm linear": lambda: (RcmConv(nn.Linear(8, 8), NAMES), nn.Linear),
}


def passes_model(kind: str) -> tuple[MultiTaskModel, type[nn.Module]]:
    layer, plain = LAYERS[kind]()
    before = [conv(3, 8, 3), TaskNorm(8), nn.ReLU()]
    if plain is nn.Linear:
        backbone, head = nn.Sequential(*before, Flat(), layer), nn.Linear
    else:
        backbone, head = nn.Sequential(*before, layer, Flat()), nn.Linear
    return model_of(TaskPasses(backbone, {name: head(8, 2) for name in NAMES})), plain


def plain_layers(network: nn.Module) -> list[str]:
    return sorted(type(m).__name__ for m in network.modules() if not list(m.children()))


@settings(max_examples=15, deadline=None)
@given(kind=st.sampled_from(sorted(LAYERS)), task=st.sampled_from(NAMES))
def test_one_task_left_makes_plain_layers_that_answer_alike(kind: str, task: str) -> None:
    model, plain = passes_model(kind)
    plan = plan_folds(model, [task], IMAGE)
    assert set(plan.layers.values()) == {task} and len(plan.layers) == 1
    selected = select_tasks(apply_folds(model, plan, IMAGE), [task], IMAGE)
    with torch.no_grad():
        before, after = model(IMAGE)[task], selected(IMAGE)[task]
    assert torch.allclose(before, after, atol=1e-5, rtol=1e-5)
    names = plain_layers(selected.network)
    assert names.count("BatchNorm2d") == 1  # the one norm of that task
    expected = {"Conv2d": 2, "Linear": 1} if plain is nn.Conv2d else {"Conv2d": 1, "Linear": 2}
    assert {name: names.count(name) for name in expected} == expected
    weights = {n for n, _ in selected.named_parameters()}
    assert not [n for n in weights if "lora" in n or "delta" in n or "modulator" in n]
    assert count_macs(selected, IMAGE) <= count_macs(model, IMAGE) / 3


@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_a_layer_that_two_kept_tasks_use_stays_and_loses_the_third(kind: str) -> None:
    model, _ = passes_model(kind)
    plan = plan_folds(model, ["a", "c"], IMAGE)
    assert plan.layers == {}
    assert apply_folds(model, plan, IMAGE) is model
    selected = select_tasks(model, ["a", "c"], IMAGE)
    use = decompose(model, IMAGE)
    left = {name for name, _ in selected.named_parameters()}
    assert left == {name for name, users in use.parameters.items() if users & {"a", "c"}}
    assert set(use.parameters.values()) >= {frozenset("b"), frozenset(NAMES)}


def test_a_shut_gate_folds_to_the_base_layer() -> None:
    layer = TapsLayer(nn.Linear(4, 4), ["a", "b"], threshold=0.5)
    layer.delta["a"].data.fill_(1.0)
    layer.delta["b"].data.fill_(1.0)
    layer.score["b"].data.fill_(0.4)
    assert torch.equal(layer.folded("a").weight, layer.base.weight + 1)
    assert torch.equal(layer.folded("b").weight, layer.base.weight)


def test_the_adapter_in_use_is_folded_not_the_one_of_the_kept_task() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = LoraLayer(conv(3, 4, 3), ["a", "b"], rank=2)
            self.a, self.b, self.c = conv(4, 2), conv(2, 2), conv(4, 2)

        def forward(self, image):
            set_task(self, "a")
            x = self.trunk(image)
            a = self.a(x)
            return {"a": a, "b": self.b(a), "c": self.c(x)}

    model = model_of(Chain())
    plan = plan_folds(model, ["b"], IMAGE)
    assert plan.layers == {"network.trunk": "a"}
    folded = apply_folds(model, plan, IMAGE)
    assert torch.allclose(folded(IMAGE)["b"], model(IMAGE)["b"], atol=1e-5)


def test_a_wrong_fold_is_refused() -> None:
    class Wrong(LoraLayer):
        def folded(self, task):
            return self.base  # without the update

    model = model_of(TaskPasses(Wrong(conv(3, 4), NAMES), {n: conv(4, 2) for n in NAMES}))
    with pytest.raises(ModelError, match=r"network\.backbone changes task 'b'"):
        apply_folds(model, plan_folds(model, ["b"], IMAGE), IMAGE)


def test_grouped_convolutions_take_no_mixing_update() -> None:
    with pytest.raises(ModelError, match="4 groups"):
        LoraLayer(nn.Conv2d(8, 8, 3, groups=4), ["a"])
    with pytest.raises(ModelError, match="4 groups"):
        RcmConv(nn.Conv2d(8, 8, 3, groups=4), ["a"]).folded("a")


# -- the command line ----------------------------------------------------------------------------


def test_the_picture_has_a_bar_per_stage_and_is_a_png(tmp_path: Path) -> None:
    draw_use(decompose(MODELS["adapters"], IMAGE), tmp_path / "use.png")
    assert (tmp_path / "use.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_tells_private_shared_and_total(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = make_project(tmp_path)
    code, stdout, _ = run(capsys, "inspect", recipe, "--json", "--picture", tmp_path / "use.png")
    shown = json.loads(stdout)
    assert code == 0 and (tmp_path / "use.png").is_file()
    room = shown["tasks"]["room"]
    assert room["private"]["params"] == (32 * 32 + 32) + (32 * 4 + 4)
    for amount in ("params", "macs", "channels"):
        shared = sum(share[amount] for share in room["shared_by"].values())
        assert room["private"][amount] + shared == room["used"][amount]
    assert shown["layers"]["network.room"]["tasks"] == ["room"]
    assert shown["parameters"]["network.seg.bias"] == ["segmentation"]
    assert shown["groups"]["room_hidden"] == ["room"]
    code, stdout, _ = run(capsys, "inspect", recipe, "--layers")
    assert code == 0 and "shared by 3" in stdout and " seg_mix " in stdout


FOLDING = """\
from torch import Tensor, nn
from secateur.tasks.reparam import LoraLayer, TaskPasses

def make():
    tasks = ["seg", "depth", "room"]
    conv = nn.Conv2d(3, 16, 3, 2, 1)
    lora = LoraLayer(nn.Conv2d(16, 16, 3, 1, 1), tasks)
    room = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    heads = {"seg": nn.Conv2d(16, 8, 1), "depth": nn.Conv2d(16, 1, 1), "room": room}
    return TaskPasses(nn.Sequential(conv, nn.ReLU(), lora, nn.ReLU()), heads)
"""


def test_a_folded_layer_is_scored_and_planned_as_the_plain_one(capsys, tmp_path) -> None:
    (tmp_path / "loranet.py").write_text(FOLDING)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        RECIPE.replace("tinyproject", "loranet").replace("  checkpoint: tiny.safetensors\n", "")
        .replace("[segmentation, depth]", "[depth]")
    )  # fmt: skip
    code, stdout, stderr = run(capsys, "plan", recipe, "--cache", tmp_path / "cache", "--json")
    assert code == 0, (stdout, stderr)
    plan = json.loads(stdout)
    assert "backbone.2" in json.dumps(plan) and "lora" not in json.dumps(plan)
    assert plan["macs_after"] <= plan["budget_macs"]


class Timm(nn.Module):
    """A network on one of timm's backbones, as users compose them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, features_only=True)
        self.a, self.b = (nn.Conv2d(self.backbone.feature_info.channels()[-1], 2, 1) for _ in "ab")

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        last = self.backbone(image)[-1]
        return {"a": self.a(last), "b": self.b(last)}


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto", "resnetv2_50x1_bit"])
def test_layers_of_timm_stay_layers_when_a_task_goes(name: str) -> None:
    tasks = [Task(each, each, "segmentation", each, classes=2) for each in "ab"]
    model = MultiTaskModel(Timm(name), tasks).eval()
    example = torch.randn(1, 3, 64, 64)
    selected = select_tasks(model, ["a"], example).eval()
    layers = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)

    def kinds(network: nn.Module) -> list[str]:
        return sorted(type(each).__name__ for each in network.modules() if isinstance(each, layers))

    assert kinds(selected) == kinds(nn.ModuleList([model.network.backbone, model.network.a]))
    assert len(find_groups(selected, example)) == len(find_groups(model, example))


def test_attention_of_torch_is_counted() -> None:
    """torch's fused path hides the products of nn.MultiheadAttention from counters."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.attend = conv(3, 16), nn.MultiheadAttention(16, 2, batch_first=True)
            self.a = conv(16, 2)

        def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            tokens = self.stem(image).flatten(2).transpose(1, 2)
            mixed = self.attend(tokens, tokens, tokens, need_weights=False)[0]
            return {"a": self.a(mixed.transpose(1, 2).unflatten(2, image.shape[2:]))}

    model = MultiTaskModel(Attending(), [Task("a", "a", "segmentation", "a", classes=2)]).eval()
    pixels, width = 64, 16
    layers = pixels * (3 * width + 2 * width) + 4 * pixels * width * width
    assert count_macs(model, torch.randn(1, 3, 8, 8)) == layers + 2 * pixels * pixels * width
