"""Criteria, the pass they share, and the agreement of tasks: what must hold for every one."""

from __future__ import annotations

import copy
import functools
import weakref

import numpy as np
import pytest
import torch
from conftest import SPEC, TASKS, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur.core import registry
from secateur.core.errors import DataError, ModelError, RecipeError
from secateur.core.model import MultiTaskModel
from secateur.core.task import Task
from secateur.data.loading import batches, open_reader
from secateur.importance.agreement import agreement
from secateur.importance.bank import score_tasks, task_data
from secateur.importance.criterion import TaskBatch, TaskData, criterion_of, goes_by_scale
from secateur.importance.passes import gate_pass, weight_pass
from secateur.importance.places import gates
from secateur.prune import find_groups
from secateur.prune.tracing import dependency_graph
from torch import nn
from torch_pruning.pruner.importance import GroupTaylorImportance, LAMPImportance

EXAMPLE = SPEC.example(2)
CRITERIA = sorted(registry.entries("secateur.importance"))
DATA_FREE = {"bn_scale", "fpgm", "l1", "lamp", "magnitude", "random"}
GRADIENT = [name for name in CRITERIA if name not in DATA_FREE]


GROUPS = find_groups(tiny_model(), EXAMPLE)  # of every tiny model: weights play no part
BY_MAKER = {m.layer: group for group in GROUPS for m in group.members if m.axis == "out"}


@functools.cache
def scenes(labelled: bool = True):
    """Two batches of four rendered rooms."""
    reader = open_reader("scenes", None, "train", count=8, height=32, width=48)
    return tuple(batches(reader, TASKS if labelled else (), SPEC, 4))


def scored(model, criterion, tasks=TASKS):
    return score_tasks(model, GROUPS, tasks, criterion, scenes, 2)


def close(a, b, rtol=1e-4) -> bool:
    """Whether two tasks' scores agree relative to the largest of them."""
    size = max(float(np.abs(values).max()) for values in a.values())
    return all(np.allclose(a[name], b[name], rtol=0, atol=rtol * size) for name in a)


def state(model: MultiTaskModel):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    return tensors, flags, modes, hooks


def test_the_criteria_are_those_of_the_issue() -> None:
    assert set(CRITERIA) == DATA_FREE | {
        "taylor", "squared_taylor", "weight_taylor", "fisher", "obdc", "activation_gradient",
        "movement",
    }  # fmt: skip


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_scores_are_finite_and_positive_and_the_model_is_left_as_it_was(
    criterion: str, labelled: bool
) -> None:
    model = tiny_model()
    model.network.stem.weight.requires_grad_(False)  # frozen by its owner
    model.network.project_norm.train()
    before = state(model)
    bank = score_tasks(model, GROUPS, TASKS, criterion, lambda: scenes(labelled), 2)
    after = state(model)
    assert before[1:] == after[1:]
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert list(bank) == [task.name for task in TASKS]
    for scores in bank.values():
        assert {name: len(v) for name, v in scores.items()} == {g.name: g.width for g in GROUPS}
        assert all(np.isfinite(values).all() and (values >= 0).all() for values in scores.values())
        assert sum(values.sum() for values in scores.values()) > 0


@pytest.mark.parametrize("criterion", CRITERIA)
def test_one_pass_over_all_tasks_gives_what_one_pass_each_gives_in_any_order(criterion) -> None:
    model = tiny_model()
    together = scored(model, criterion)
    backwards = scored(model, criterion, tasks=TASKS[::-1])
    for task in TASKS:
        alone = scored(model, criterion, tasks=[task])[task.name]
        assert close(together[task.name], alone)
        assert close(backwards[task.name], alone)


@pytest.mark.parametrize("criterion", GRADIENT)
def test_tasks_differ_and_a_loss_times_ten_gives_the_same_shares(criterion: str) -> None:
    model = tiny_model()
    plain = task_data(model, TASKS, scenes, 2)

    def louder(_skipped: int):
        for batch in plain:
            losses = {
                task: (lambda out, loss=loss: 10 * loss(out)) for task, loss in batch.losses.items()
            }
            yield TaskBatch(batch.images, losses)

    def shares(data):
        made = criterion_of(criterion)(model, GROUPS, data)
        total = {task: sum(v.sum() for v in scores.values()) for task, scores in made.items()}
        return {t: {n: v / total[t] for n, v in scores.items()} for t, scores in made.items()}

    quiet, loud = shares(plain), shares(TaskData(plain.tasks, louder))
    assert all(close(quiet[task], loud[task], 1e-3) for task in plain.tasks)
    assert not close(quiet["segmentation"], quiet["depth"], 1e-3)


@pytest.mark.parametrize("criterion", [name for name in GRADIENT if name != "movement"])
def test_a_dead_channel_scores_zero(criterion: str) -> None:
    """Movement is left out: its shift lifts what does not move above what moves to zero."""
    model = tiny_model()
    net = model.network
    for module in (net.expand, net.expand_norm, net.depthwise, net.depthwise_norm):
        module.weight.data[5] = 0
        if module.bias is not None:
            module.bias.data[5] = 0
    for scores in scored(model, criterion).values():
        values = scores[BY_MAKER["network.depthwise"].name]
        assert values[5] == 0 and np.delete(values, 5).min() >= 0 < np.delete(values, 5).mean()


@pytest.mark.parametrize("criterion", GRADIENT)
def test_another_tasks_head_scores_zero(criterion: str) -> None:
    scores = scored(tiny_model(), criterion, tasks=[TASKS[1]])["depth"]
    for layer in ("network.seg_mix", "network.room_hidden"):
        assert (scores[BY_MAKER[layer].name] == 0).all()
    assert (scores[BY_MAKER["network.depth_mix"].name] > 0).any()


def linear_model() -> MultiTaskModel:
    """Two channels by a 1x1 convolution, read by a sum: gradients by hand are one line."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1, bias=False)

        def forward(self, image):
            return {"y": self.read(self.make(image)).mean((2, 3))}

    model = MultiTaskModel(Net(), [Task("y", "y", "regression", "y")]).eval()
    model.network.make.weight.data[:] = torch.tensor([2.0, -3.0])[:, None, None, None]
    model.network.make.bias.data[:] = torch.tensor([0.5, 0.0])
    model.network.read.weight.data[:] = torch.tensor([1.0, 4.0])[None, :, None, None]
    return model


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        # loss = mean y = mean over samples of read . (make * x + bias), x is 1 and 3 in a batch:
        # channel 0 contributes 2x + .5 per sample, channel 1 contributes -12x
        ("taylor", [4.5, 24.0]),  # |mean of both samples|
        ("squared_taylor", [4.5**2, 24.0**2]),
        ("fisher", [(2.5**2 + 6.5**2) / 2, (12**2 + 36**2) / 2]),  # mean of squares per sample
        ("activation_gradient", [4.5 / 4, 24.0 / 4]),  # over 4 positions
        ("obdc", [4.0**2, 24.0**2]),  # one weight, no bias
        ("weight_taylor", [4.0 + 4.5, 24.0 + 24.0]),  # the maker's weight and the reader's
        ("magnitude", [2.0, 3.0]),
        ("l1", [2.0, 3.0]),
        ("fpgm", [5.0, 5.0]),
        ("lamp", [(4 + 1) / 30, 1.0]),  # (w_made² + w_read²)/2, share of it and all larger
        ("bn_scale", [2.0, 3.0]),  # no batch norm anywhere: plain norms
    ],
)
def test_a_case_by_hand(criterion: str, expected: list[float]) -> None:
    model = linear_model()
    images = torch.tensor([1.0, 3.0])[:, None, None, None].expand(2, 1, 2, 2)
    data = TaskData(("y",), lambda _: [TaskBatch(images, {"y": lambda y: y.mean()})])
    groups = find_groups(model, images)
    (values,) = criterion_of(criterion)(model, groups, data)["y"].values()
    assert values.tolist() == pytest.approx(expected, rel=1e-5)


def test_movement_follows_weights_away_from_zero() -> None:
    """Descending -channel 0 + channel 1: the first grows, the second shrinks."""
    model = linear_model()
    model.network.make.weight.data[:] = 1
    model.network.read.weight.data[:] = torch.tensor([-1.0, 1.0])[None, :, None, None]
    images = torch.ones(2, 1, 2, 2)
    data = TaskData(("y",), lambda _: [TaskBatch(images, {"y": lambda y: y.mean()})] * 3)
    (values,) = criterion_of("movement")(model, find_groups(model, images), data)["y"].values()
    assert values[0] > 0 == values[1]


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000))
def test_gates_per_sample_add_up_to_the_gates_of_the_batch(seed: int) -> None:
    """Two ways to the same number: batch norm's own weights, and gates behind it."""
    model = tiny_model(seed=seed)
    found = gates(model, GROUPS)
    images = SPEC.example(3, seed=seed)
    data = TaskData(("room",), lambda _: [TaskBatch(images, {"room": lambda y: y.square().mean()})])
    by_weights = weight_pass(model, found, data, lambda w, gradient: (w * gradient).sum(1))
    by_gates = gate_pass(model, found, data, lambda gradient, _: gradient.sum(0))
    assert close(by_weights["room"], by_gates["room"])


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("lamp", LAMPImportance()),
     ("weight_taylor", GroupTaylorImportance("sum", None, multivariable=True))],
)  # fmt: skip
def test_equal_to_torch_pruning(name: str, theirs) -> None:
    """On groups without batch norm and depth-wise layers, which torch-pruning 1.6.1 passes over."""
    model = tiny_model()
    losses = {task.name: lambda y: y.square().mean() for task in TASKS}
    data = TaskData(tuple(losses), lambda _: [TaskBatch(EXAMPLE, losses)])
    ours = criterion_of(name)(model, GROUPS, data)
    graph = dependency_graph(model, EXAMPLE)
    sum(output.square().mean() for output in model(EXAMPLE).values()).backward()
    task_of = {"seg_mix": "segmentation", "depth_mix": "depth", "room_hidden": "room"}
    for root, task in task_of.items():
        layer = getattr(model.network, root)
        cut = graph.get_pruner_of_module(layer).prune_out_channels
        wanted = theirs(graph.get_pruning_group(layer, cut, list(range(len(layer.weight)))))
        found = ours[task][BY_MAKER[f"network.{root}"].name]
        assert found == pytest.approx(wanted.detach().numpy(), rel=1e-3), root


def test_bn_scale_reads_gammas_and_puts_bare_groups_on_their_scale() -> None:
    model = tiny_model()
    scores = scored(model, "bn_scale")["depth"]
    inner = BY_MAKER["network.depthwise"]
    gammas = [model.network.expand_norm.weight, model.network.depthwise_norm.weight]
    assert scores[inner.name] == pytest.approx(torch.stack(gammas).mean(0).detach().numpy())
    with_norm = {g.name for n, g in BY_MAKER.items() if n.endswith("norm")}
    means = [
        np.concatenate([v for n, v in scores.items() if (n in with_norm) is side]).mean()
        for side in (True, False)
    ]
    assert means[0] == pytest.approx(means[1])


def test_one_batch_is_held_at_a_time() -> None:
    model, alive, most = tiny_model(), [], 0

    def stream():
        nonlocal most
        for number in range(6):
            batch = copy.deepcopy(scenes()[number % 2])
            alive.append(weakref.ref(batch.targets["depth"]))
            yield batch
            del batch
            most = max(most, sum(reference() is not None for reference in alive))

    for criterion in ("taylor", "fisher", "movement"):  # one of each pass
        score_tasks(model, GROUPS, TASKS, criterion, stream, 6)
    assert 1 <= most <= 2  # the one at work, and the next one while it is made


def test_a_forward_serves_all_tasks_and_backwards_ask_for_gates_only() -> None:
    model, forwards = tiny_model(), []

    def note(_model, images, _outputs) -> None:
        if len(images[0]) > 1:  # else it is tried what gradients reach
            forwards.append([parameter.requires_grad for parameter in wide])

    model.register_forward_hook(note)
    wide = [model.network.expand.weight, model.network.seg.weight]
    scored(model, "taylor")
    assert forwards == [[False, False]] * 2  # as many as batches


class OneDetached(nn.Module):
    """Two heads on a trunk, which the second one does not train."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.trunk = how, nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.other = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 1, 1)

    def forward(self, image):
        x = self.trunk(image).relu()
        if self.how == "straight through":
            x = x + (x.round() - x).detach()
        return {"one": self.one(x), "other": self.other(x.detach() if self.how == "detach" else x)}


@pytest.mark.parametrize("criterion", GRADIENT)
def test_what_a_detached_head_reads_has_a_worth(criterion: str) -> None:
    tasks = [Task(name, name, "depth", "depth") for name in ("one", "other")]
    found = {}
    for how in ("detach", "plain"):
        model = MultiTaskModel(OneDetached(how), tasks).eval()
        groups = find_groups(model, EXAMPLE)
        found[how] = score_tasks(model, groups, tasks, criterion, lambda: scenes(False), 2)
    assert close(found["detach"]["other"], found["plain"]["other"])


def test_a_straight_through_estimator_keeps_its_detach() -> None:
    tasks = [Task(name, name, "depth", "depth") for name in ("one", "other")]
    model = MultiTaskModel(OneDetached("straight through"), tasks).eval()
    scores = score_tasks(model, find_groups(model, EXAMPLE), tasks, "taylor",
                         lambda: scenes(False), 2)  # fmt: skip
    assert all(values.any() for own in scores.values() for values in own.values())


def test_a_task_without_any_gradient_is_told() -> None:
    class Without(OneDetached):
        def forward(self, image):
            with torch.no_grad():
                return super().forward(image)

    tasks = [Task(name, name, "depth", "depth") for name in ("one", "other")]
    model = MultiTaskModel(Without("plain"), tasks).eval()
    groups = find_groups(model, EXAMPLE)
    with pytest.raises(ModelError, match="no gradient of task 'one'") as caught:
        score_tasks(model, groups, tasks, "taylor", lambda: scenes(False), 2)
    assert "torch.no_grad" in caught.value.hint
    score_tasks(model, groups, tasks, "magnitude", lambda: scenes(False), 2)  # which needs none


def test_random_takes_its_seed_from_the_name() -> None:
    model = tiny_model()
    plain, zero, seven = (
        scored(model, name)["depth"] for name in ("random", "random:0", "random:7")
    )
    assert all(np.array_equal(plain[name], zero[name]) for name in plain)
    assert not any(np.array_equal(plain[name], seven[name]) for name in plain)
    for name, message in (("random:x", "not a seed"), ("taylor:3", "takes no option"),
                          ("tailor", "not a criterion")):  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            criterion_of(name)


def test_criteria_that_only_look_at_weights_go_by_their_size() -> None:
    assert {name for name in CRITERIA if goes_by_scale(name)} == DATA_FREE - {"random"}
    assert not goes_by_scale("random:3")


def test_scores_that_are_not_finite_name_the_task() -> None:
    model = tiny_model()
    model.network.depth.weight.data[:] = float("nan")
    for criterion in ("taylor", "fisher", "movement"):
        with pytest.raises(DataError, match="for task 'depth' is not finite"):
            scored(model, criterion)


def test_per_sample_gates_refuse_layers_that_mix_images() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Linear(3, 8), nn.Linear(8, 1)

        def forward(self, image):
            return {"y": self.read(self.make(image.mean((2, 3))[:1])).expand(len(image), 1)}

    model = MultiTaskModel(Mixing(), [Task("y", "y", "regression", "y")]).eval()
    data = TaskData(("y",), lambda _: [TaskBatch(EXAMPLE, {"y": lambda y: y.mean()})])
    with pytest.raises(ModelError, match=r"'network.make' gives \(1, 8\) for 2 images"):
        criterion_of("fisher")(model, find_groups(model, EXAMPLE), data)
    assert not model.network.make._forward_hooks


def test_agreement_is_the_cosine_of_the_tasks_gradients() -> None:
    """Tasks with the same loss agree wholly, with opposite ones not at all, whatever their size."""
    model = linear_model()
    images = SPEC.example(3)[:, :1]
    groups = find_groups(model, images)

    def agree(**factors):
        losses = {name: (lambda y, f=factor: f * y.mean()) for name, factor in factors.items()}
        outputs = MultiTaskModel(model.network, [Task(n, "y", "regression", "y") for n in factors])
        data = TaskData(tuple(factors), lambda _: [TaskBatch(images, losses)] * 2)
        (values,) = agreement(outputs, groups, data).values()
        return values.tolist()

    assert agree(a=1.0, b=5.0) == pytest.approx([1, 1])
    assert agree(a=1.0, b=-5.0) == pytest.approx([0, 0], abs=1e-6)
    assert agree(a=1.0, b=2.0, c=-1.0) == pytest.approx([1 / 3, 1 / 3])  # cosines 1, -1, -1
    assert agree(a=1.0) == [1, 1]


def test_agreement_does_not_depend_on_the_order_of_tasks_and_leaves_the_model_alone() -> None:
    model = tiny_model()
    before = state(model)
    both = [
        agreement(model, GROUPS, task_data(model, order, scenes, 2))
        for order in (TASKS, TASKS[::-1])
    ]
    assert close(*both)
    after = state(model)
    assert before[1:] == after[1:]
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    heads = both[0][BY_MAKER["network.seg_mix"].name]
    assert heads == pytest.approx(np.full(len(heads), 0.5))  # one task's own: no cosine
    assert both[0][BY_MAKER["network.stem"].name].std() > 0.01
