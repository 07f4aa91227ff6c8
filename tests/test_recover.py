"""Recovery: balancing, distillation, averaged weights, exact steps, resuming, early stop."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SPEC, TASKS, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from secateur.core.errors import DataError, ModelError, RecipeError
from secateur.core.model import MultiTaskModel
from secateur.core.task import Task
from secateur.data.loading import InMemory, batches, image_batch, open_reader, resized_reader
from secateur.data.sample import Reader, Sample
from secateur.data.transforms import Augment
from secateur.flow.cache import StageCache
from secateur.flow.job import Job, open_job
from secateur.flow.planning import make_plan
from secateur.flow.recipe import parse_recipe
from secateur.flow.recovery import check_recovery, freeze_norms, pieces
from secateur.flow.stages import begin_cut, finish_cut
from secateur.recover import TrainSettings, freeze_after, reinitialised, train
from secateur.recover.balance import (
    BALANCES,
    Balance,
    DynamicWeightAverage,
    ProjectedGradients,
    Uncertainty,
)
from secateur.recover.features import attention_distance, attention_points, captured
from secateur.recover.teacher import RememberedOutputs
from torch import Tensor, nn

EXAMPLE = SPEC.example(2)
FLIP = Augment(scale=1.0, jitter=0.0)


@cache
def scenes(count: int = 12, height: int = 32, width: int = 48) -> Reader:
    return InMemory(open_reader("scenes", None, "train", count=count, height=height, width=width))


def same(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


class Poisoned:
    """A reader whose labels no task could use."""

    fingerprint = "poisoned"

    def __init__(self, reader: Reader) -> None:
        self.reader, self.label_names = reader, reader.label_names

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Sample:
        sample = self.reader[index]
        return Sample(sample.id, sample.image, {name: np.full(3, -7) for name in sample.labels})


# ---- readers that resize once -----------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (20, 30), (32, 48)])
@pytest.mark.parametrize("augment", [None, FLIP, Augment(scale=1.0, jitter=0.2)])
def test_resizing_once_gives_the_same_bits(size: tuple[int, int], augment: Augment | None) -> None:
    tasks = (*TASKS, Task("normals", "normals", "normals", "normals"))
    reader = scenes(6, *size)

    class Wide:  # int64 labels take a way of their own
        fingerprint, label_names = "wide", reader.label_names

        def __len__(self) -> int:
            return len(reader)

        def __getitem__(self, index: int) -> Sample:
            sample = reader[index]
            wide = {**sample.labels, "segmentation": sample.labels["segmentation"].astype(np.int64)}
            return Sample(sample.id, sample.image, wide)

    for source in (reader, Wide()):
        quick = resized_reader(source, SPEC, tasks)
        assert quick.label_names == {task.label for task in tasks}
        for shuffle in (None, 3):
            both = [
                batches(r, tasks, SPEC, 4, augment=augment, shuffle_seed=shuffle)
                for r in (source, quick)
            ]
            for slow, fast in zip(*both, strict=True):
                assert slow.ids == fast.ids and torch.equal(slow.images, fast.images)
                assert all(torch.equal(slow.targets[t.name], fast.targets[t.name]) for t in tasks)


def test_resizing_once_decodes_once_and_holds_only_small_samples() -> None:
    reads = []

    class Counting:
        fingerprint, label_names = "counting", frozenset({"depth", "other"})

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Sample:
            reads.append(index)
            depth = np.ones((100, 100), np.float32)
            return Sample(str(index), np.zeros((100, 100, 3), np.uint8), {"depth": depth})

    quick = resized_reader(InMemory(Counting()), SPEC, [TASKS[1]])
    samples = [quick[i] for i in (0, 1, 2, 0, 1, 2)]
    assert reads == [0, 1, 2] and quick.label_names == {"depth"}
    assert {s.image.shape for s in samples} == {(32, 48, 3)}
    assert {s.labels["depth"].shape for s in samples} == {(32, 48)}


# ---- balancing --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BALANCES))
def test_every_balance_lowers_the_loss_and_leaves_nothing_in_the_model(name: str) -> None:
    model = tiny_model()
    settings_ = TrainSettings(epochs=4, batch_size=4, learning_rate=3e-3, balance=name)
    result = train(model, scenes(), SPEC, settings_, augment=FLIP)
    assert result.losses[-1] < 0.9 * result.losses[0]
    assert result.model.state_dict().keys() == model.state_dict().keys()
    assert all(torch.isfinite(tensor).all() for tensor in result.model.state_dict().values())


@given(losses=st.lists(st.floats(0.01, 100), min_size=1, max_size=4))
def test_uncertainty_starts_at_the_fixed_sum_and_settles_at_its_optimum(
    losses: list[float],
) -> None:
    named = {str(i): torch.tensor(value) for i, value in enumerate(losses)}
    weights = dict.fromkeys(named, 1.0)
    balance = Uncertainty(weights)
    assert torch.isclose(balance(named), Balance(weights)(named))
    with torch.no_grad():  # d/ds (exp(-s) L + s / 2) = 0 at s = log(2 L)
        balance.log_variances.copy_(torch.tensor(losses).mul(2).log())
    balance(named).backward()
    assert torch.allclose(balance.log_variances.grad, torch.zeros(len(losses)), atol=1e-5)


def test_a_users_weight_is_not_learned_away() -> None:
    """The optimal log variance depends on the raw loss, not on the weight: its effect stays."""
    for weight in (1.0, 5.0):
        balance = Uncertainty({"a": weight})
        with torch.no_grad():
            balance.log_variances.fill_(math.log(2 * 3.0))
        balance({"a": torch.tensor(weight * 3.0)}).backward()
        assert abs(float(balance.log_variances.grad)) < 1e-6


def test_dwa_weighs_the_slower_task_more_from_the_third_epoch_on() -> None:
    balance = DynamicWeightAverage({"fast": 1.0, "slow": 1.0})
    balance.end_epoch({"fast": 1.0, "slow": 2.0})
    assert balance.factors.tolist() == [1.0, 1.0]
    balance.end_epoch({"fast": 0.5, "slow": 2.0})  # ratios 0.5 and 1, temperature 2
    wanted = 2 / (1 + math.exp(0.25)), 2 / (1 + math.exp(-0.25))
    assert torch.allclose(balance.factors, torch.tensor(wanted))


def gradients(
    balance: Balance, losses: dict[str, Tensor], *parameters: nn.Parameter
) -> list[Tensor]:
    for parameter in parameters:
        parameter.grad = None
    balance.backward(losses, None, parameters, lambda loss: loss.backward(retain_graph=True))
    return [parameter.grad.clone() for parameter in parameters]


@given(
    rows=st.lists(st.lists(st.floats(0.1, 5), min_size=3, max_size=3), min_size=1, max_size=4),
)
def test_pcgrad_is_the_plain_sum_where_nothing_conflicts(rows: list[list[float]]) -> None:
    """Gradients in the positive octant never conflict."""
    weight = nn.Parameter(torch.ones(3))
    losses = {str(i): weight @ torch.tensor(row) for i, row in enumerate(rows)}
    names = dict.fromkeys(losses, 1.0)
    (plain,) = gradients(Balance(names), losses, weight)
    (projected,) = gradients(ProjectedGradients(names), losses, weight)
    assert torch.allclose(plain, projected, rtol=1e-5)


def test_pcgrad_projects_on_shared_parameters_only() -> None:
    shared, private = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    losses = {
        "a": shared @ torch.tensor([1.0, 0.0]) + 100 * private.sum(),
        "b": shared @ torch.tensor([-1.0, 1.0]),
    }
    balance = ProjectedGradients({"a": 1.0, "b": 1.0})
    got, alone = gradients(balance, losses, shared, private)
    # a - (a.b / b.b) b = (1/2, 1/2); b - (a.b / a.a) a = (0, 1), whatever the private part is
    assert torch.allclose(got, torch.tensor([0.5, 1.5])) and alone.tolist() == [100.0]
    extra = shared.sum()
    balance.backward(losses, extra, [shared, private], lambda loss: loss.backward())
    assert torch.allclose(shared.grad, torch.tensor([1.5, 2.5]))


# ---- distillation -----------------------------------------------------------------------------


def test_without_labels_no_label_is_read() -> None:
    reader, model, parent = scenes(8), tiny_model(seed=1), tiny_model()
    free = TrainSettings(epochs=2, batch_size=4, labels=False, distill=0.3)
    clean = train(model, reader, SPEC, free, parent=parent, augment=FLIP)
    poisoned = train(model, Poisoned(reader), SPEC, free, parent=parent, augment=FLIP)
    assert same(clean.model, poisoned.model) and clean.losses == poisoned.losses
    with pytest.raises(DataError):
        train(model, Poisoned(reader), SPEC, replace(free, labels=True), parent=parent)
    with pytest.raises(DataError, match="no parent"):
        train(model, reader, SPEC, free)


def test_attention_maps_need_no_equal_widths() -> None:
    parent, narrow = tiny_model(16), tiny_model(8, seed=2)
    points = attention_points(narrow, parent, SPEC.example())
    # The trunk's last layers at stride 2 and 4; heads are read by one task only.
    assert points == ("network.project_norm", "network.down")
    with captured(parent, points) as theirs, torch.no_grad():
        parent(EXAMPLE)
    with captured(narrow, points) as mine, torch.no_grad():
        narrow(EXAMPLE)
    assert 0 < float(attention_distance(mine, theirs)) < 2
    assert float(attention_distance(theirs, theirs)) == 0
    assert not any(module._forward_hooks for module in parent.modules())


def test_feature_distillation_brings_the_features_nearer() -> None:
    reader, parent, model = scenes(8), tiny_model(), tiny_model(8, seed=4)
    points = attention_points(model, parent, EXAMPLE)
    images = image_batch(reader, range(8), SPEC)

    def distance(network: MultiTaskModel) -> float:
        with captured(parent, points) as theirs, captured(network, points) as mine:
            with torch.no_grad():
                parent(images), network(images)
            return float(attention_distance(mine, theirs))

    with_features = TrainSettings(
        epochs=6, batch_size=4, learning_rate=5e-3, labels=False, feature_distill=30.0
    )
    plain = replace(with_features, feature_distill=0.0)
    runs = [train(model, reader, SPEC, s, parent=parent) for s in (with_features, plain)]
    near, far = (distance(run.model) for run in runs)
    assert near < 0.8 * far
    assert not any(module._forward_hooks for module in runs[0].model.modules())


def test_feature_distillation_without_a_teacher_to_compare_with_is_refused() -> None:
    settings_ = TrainSettings(steps=1, feature_distill=1.0)
    with pytest.raises(DataError, match="no parent to distil from"):
        train(tiny_model(), scenes(4), SPEC, settings_)

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 8, 1, stride=4)

        def forward(self, image: Tensor) -> dict[str, Tensor]:
            x = self.one(image)
            return {"seg": x, "depth": x[:, :1], "room": x.mean((2, 3))[:, :4]}

    with pytest.raises(ModelError, match="no layer in common"):
        other = MultiTaskModel(Other(), TASKS)
        train(tiny_model(), scenes(4), SPEC, settings_, parent=other)


# ---- the loop ---------------------------------------------------------------------------------


def test_steps_are_taken_exactly(tmp_path: Path) -> None:
    settings_ = TrainSettings(steps=7, batch_size=4, warmup=0.0)
    result = train(tiny_model(), scenes(), SPEC, settings_, checkpoint=tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)["optimizer"]
    assert result.steps == 7 and len(result.losses) == 3  # 3 + 3 + 1
    assert {int(entry["step"]) for entry in state["state"].values()} == {7}
    # The cosine spans the seven: the last step is taken after six of them.
    rate = settings_.learning_rate * 0.5 * (1 + math.cos(math.pi * 6 / 7))
    assert state["param_groups"][0]["lr"] == pytest.approx(rate)


def test_as_many_steps_as_the_epochs_have_are_the_same_training() -> None:
    whole = train(tiny_model(), scenes(), SPEC, TrainSettings(epochs=2, batch_size=4))
    exact = train(tiny_model(), scenes(), SPEC, TrainSettings(steps=6, batch_size=4))
    assert same(whole.model, exact.model) and whole.losses == exact.losses


def test_a_training_takes_epochs_or_steps() -> None:
    for wrong in ({}, {"epochs": 1, "steps": 1}):
        with pytest.raises(RecipeError, match="epochs or steps"):
            TrainSettings(**wrong)


class Counting(nn.Module):
    """A network that counts the images it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = 0

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.shown += len(images)
        return {"mean": images.mean(dim=(2, 3)), "double": 2 * images}


def test_a_remembered_image_is_not_computed_again() -> None:
    network = Counting()
    teacher = RememberedOutputs(network)
    a, b, c = torch.randn(3, 3, 4, 5)
    first, second = teacher(torch.stack([a, b])), teacher(torch.stack([c, a.clone(), b]))
    assert network.shown == 3
    assert torch.equal(second["double"], 2 * torch.stack([c, a, b]))
    assert torch.equal(second["mean"][1:], first["mean"])


def test_what_memory_does_not_hold_is_computed_each_time() -> None:
    network, images = Counting(), torch.randn(3, 3, 4, 5)
    each = 4 * (3 + 60)  # bytes of one image's outputs
    teacher = RememberedOutputs(network, max_bytes=2 * each)
    assert torch.equal(teacher(images)["double"], teacher(images)["double"])
    assert network.shown == 3 + 1


@pytest.mark.parametrize("augment", [None, FLIP, Augment()])
def test_the_parent_is_asked_once_for_each_image_that_comes_again(augment: Augment | None) -> None:
    shown: list[bytes] = []
    parent = tiny_model()
    parent.register_forward_pre_hook(
        lambda _m, args: shown.extend(image.numpy(force=True).tobytes() for image in args[0])
    )
    settings = TrainSettings(epochs=5, batch_size=4, distill=1.0)
    train(tiny_model(), scenes(), SPEC, settings, parent=parent, augment=augment)
    most = 5 * 12 if augment == Augment() else 2 * 12
    assert len(shown) == len(set(shown)) <= most
    assert len(shown) >= (5 * 12 if augment == Augment() else 12)


@pytest.mark.parametrize(("share", "counted"), [(0.0, 0), (0.5, 3), (0.7, 5), (1.0, 6)])
def test_frozen_norms_keep_their_statistics_and_the_rest_learns(share: float, counted: int) -> None:
    model = tiny_model()
    settings = TrainSettings(steps=6, batch_size=4, freeze_norms=share)
    before, after = model.state_dict(), train(model, scenes(), SPEC, settings).model.state_dict()
    name = "network.stem_norm"
    batches_seen = after[f"{name}.num_batches_tracked"] - before[f"{name}.num_batches_tracked"]
    assert int(batches_seen) == counted
    kept = torch.equal(before[f"{name}.running_mean"], after[f"{name}.running_mean"])
    assert kept == (counted == 0)
    assert not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])


def test_averaged_weights_follow_their_formula() -> None:
    reader, seen = scenes(8), []
    plain = TrainSettings(epochs=2, batch_size=8)

    def keep(_epoch: int, model: MultiTaskModel, _loss: float) -> None:
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    train(tiny_model(), reader, SPEC, plain, after_epoch=keep)  # one step an epoch
    averaged = train(tiny_model(), reader, SPEC, replace(plain, ema=0.25)).model.state_dict()
    first, second = seen
    for name, tensor in averaged.items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, 0.25 * first[name] + 0.75 * second[name], atol=1e-6)
    without = train(tiny_model(), reader, SPEC, replace(plain, ema=1e-12)).model.state_dict()
    assert all(torch.allclose(without[name], tensor) for name, tensor in second.items())


def test_averaged_weights_keep_indices() -> None:
    """57 read back as 56 is another pixel's bias: a mean of whole numbers is rounded down."""

    class Shuffled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("index", torch.arange(512).flip(0))
            self.weight = torch.nn.Parameter(torch.ones(512))

        def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"room": image.mean((1, 2, 3))[:, None] * self.weight[self.index][None, :4]}

    task = Task("room", "room", "classification", "room", classes=4)
    settings = TrainSettings(epochs=1, batch_size=4, ema=0.997)
    trained = train(MultiTaskModel(Shuffled(), (task,)), scenes(8), SPEC, settings).model
    assert torch.equal(trained.network.index, torch.arange(512).flip(0))


@given(st.integers(2, 60), st.data())
def test_what_is_held_out_is_spread_in_pieces(size: int, data: st.DataObject) -> None:
    count, length = data.draw(st.integers(1, size)), data.draw(st.integers(1, 8))
    found = pieces(size, count, length)
    assert len({*found}) == count and found == sorted(found) and 0 <= found[0] <= found[-1] < size
    runs = np.split(np.array(found), np.flatnonzero(np.diff(found) > 1) + 1)
    assert len(runs) <= -(-count // length), "images that follow one another stay together"


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_classes_that_take_turns_are_all_held_out(classes: int) -> None:
    assert {index % classes for index in pieces(640, 64, 1)} == {*range(classes)}


class Stop(Exception):
    pass


def stop_after(count: int):
    def stop(epoch: int, _model: MultiTaskModel, _loss: float) -> None:
        if epoch == count:
            raise Stop

    return stop


def brightness(model: MultiTaskModel) -> float:
    """A score of the weights alone."""
    return float(model.network.depth.bias.detach())


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 4, "balance": "uncertainty"},
        {"epochs": 4, "balance": "dwa"},
        {"steps": 8, "balance": "pcgrad", "ema": 0.8},
        {"epochs": 4, "ema": 0.9, "labels": False, "feature_distill": 1.0},
    ],
    ids=str,
)
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    options: dict[str, object], tmp_path: Path
) -> None:
    reader, model, parent = scenes(8), tiny_model(), tiny_model(seed=1)
    settings_ = TrainSettings(batch_size=4, learning_rate=3e-3, **options)
    common = {"parent": parent, "augment": FLIP, "validate": brightness}
    whole = train(model, reader, SPEC, settings_, **common)
    with pytest.raises(Stop):
        train(model, reader, SPEC, settings_, **common, checkpoint=tmp_path,
              after_epoch=stop_after(3))  # fmt: skip
    resumed = train(model, reader, SPEC, settings_, **common, checkpoint=tmp_path)
    assert resumed.steps == whole.steps == 8 and len(whole.scores) == 4
    assert resumed.losses == pytest.approx(whole.losses)
    assert resumed.scores == pytest.approx(whole.scores)
    for name, tensor in whole.model.state_dict().items():
        assert torch.allclose(resumed.model.state_dict()[name], tensor, atol=1e-6), name


def test_the_best_epoch_is_kept_and_patience_ends_the_training(tmp_path: Path) -> None:
    scores, kept = iter([1.0, 3.0, 2.0, 2.5, 9.0]), {}

    def validate(model: MultiTaskModel) -> float:
        score = next(scores)
        kept[score] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return score

    settings_ = TrainSettings(epochs=9, batch_size=4, patience=2)
    result = train(tiny_model(), scenes(8), SPEC, settings_, validate=validate, checkpoint=tmp_path)
    assert result.scores == (1.0, 3.0, 2.0, 2.5) and result.steps == 8
    assert all(torch.equal(t, kept[3.0][n]) for n, t in result.model.state_dict().items())
    again = train(tiny_model(), scenes(8), SPEC, settings_, validate=validate, checkpoint=tmp_path)
    assert again.scores == result.scores and same(again.model, result.model)


def test_an_epoch_whose_score_is_nan_is_not_the_best(tmp_path: Path) -> None:
    scores = iter([float("nan"), 1.0, 2.0, 0.5])
    settings_ = TrainSettings(epochs=4, batch_size=4, patience=2)
    result = train(tiny_model(), scenes(8), SPEC, settings_, validate=lambda _: next(scores))
    assert result.scores == (-math.inf, 1.0, 2.0, 0.5)


# ---- from scratch -----------------------------------------------------------------------------


def test_reinit_keeps_the_architecture_and_forgets_the_weights() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.randn(4000) * 0.1 + 3)  # no reset_parameters here

    model = tiny_model(8)
    model.network.scaled = Scaled()
    before = torch.get_rng_state()
    fresh = reinitialised(model, 5)
    assert torch.equal(torch.get_rng_state(), before)
    old, new = model.state_dict(), fresh.state_dict()
    assert {n: t.shape for n, t in old.items()} == {n: t.shape for n, t in new.items()}
    for name, parameter in fresh.named_parameters():
        assert not torch.equal(parameter, old[name]), name
    assert torch.equal(new["network.stem_norm.running_mean"], torch.zeros(8))
    assert torch.equal(new["network.stem_norm.running_var"], torch.ones(8))
    gain = new["network.scaled.gain"]
    assert abs(float(gain.mean()) - 3) < 0.02 and abs(float(gain.std()) - 0.1) < 0.02
    assert same(reinitialised(model, 5), fresh) and not same(reinitialised(model, 6), fresh)


# ---- the recipe -------------------------------------------------------------------------------

RECIPE = """
model: {{factory: "conftest:TinyNet", input: {{shape: [3, 32, 48]}}}}
tasks:
  segmentation: {{output: seg, kind: segmentation, classes: 8}}
  depth: {{output: depth, kind: depth}}
  room: {{output: room, kind: classification, classes: 4}}
data:
  train: {{reader: {reader}, split: train, options: {{count: {count}, height: 64, width: 96}}}}
  eval: {{reader: scenes, split: test, options: {{count: 4, height: 32, width: 48}}}}
prune: {{criterion: magnitude, budget: {{macs: 0.6}}, grid: 4, search: false}}
compensate: {{images: 4}}
recover: {{batch_size: 4, {recover}}}
"""


def job(recover: str, tmp_path: Path, count: int = 14) -> Job:
    torch.manual_seed(0)
    text = RECIPE.format(reader="scenes", count=count, recover=recover)
    return open_job(parse_recipe(text, tmp_path / "recipe.yaml"), StageCache(tmp_path / "cache"))


def test_a_recipe_recovers_from_scratch_with_an_early_stop_and_finds_it_again(
    tmp_path: Path,
) -> None:
    work = job("steps: 5, reinit: true, ema: 0.5, balance: dwa, feature_distill: 1, "
               "early_stop: {patience: 1, images: 6}", tmp_path)  # fmt: skip
    check_recovery(work)
    groups, plan = make_plan(work, 4)
    cut = finish_cut(work, plan, begin_cut(work, groups, plan))
    assert cut.steps in (4, 5)  # two steps an epoch on the eight images that are left
    assert sum(p.numel() for p in cut.recovered.parameters()) == sum(
        p.numel() for p in cut.compensated.parameters()
    )
    again = finish_cut(work, plan, begin_cut(work, groups, plan))
    assert (again.key, again.steps) == (cut.key, cut.steps)
    assert not list((tmp_path / "cache" / "recover").glob("*/state.pt"))


def test_recipes_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    for recover, message in {
        "epochs: 1, steps: 3": "epochs or steps",
        "seed: 1": "epochs or steps",
        "epochs: 1, labels: false, early_stop: {}": "labels: false",
        "epochs: 1, balance: fair": "recover.balance",
        "epochs: 1, ema: 1.0": "recover.ema",
    }.items():
        with pytest.raises(RecipeError, match=message):
            job(recover, tmp_path)
    with pytest.raises(RecipeError, match="less than one batch"):
        check_recovery(job("epochs: 1, early_stop: {images: 11}", tmp_path))
    work = job("epochs: 1, early_stop: {images: 4}", tmp_path)
    unlabelled = Poisoned(work.train)
    unlabelled.label_names = frozenset({"depth"})
    with pytest.raises(RecipeError, match="no label 'segmentation'"):
        check_recovery(replace(work, train=unlabelled))


@pytest.mark.parametrize(
    ("recover", "compensate", "share"),
    [
        ("epochs: 4", "{images: 4}", 0.0),  # short, of a mild cut
        ("epochs: 5", "{images: 4}", 0.5),
        ("steps: 20", "{images: 4}", 0.5),  # four an epoch
        ("steps: 19", "{images: 4}", 0.0),
        ("epochs: 4, freeze_norms: 0.3", "{images: 4}", 0.3),
        ("epochs: 4, reinit: true", "{images: 4}", 1.0),
        ("epochs: 4", "false", 1.0),
    ],
)
def test_norms_are_frozen_early_only_where_they_were_compensated(
    recover: str, compensate: str, share: float, tmp_path: Path
) -> None:
    work = job(recover, tmp_path)
    settled = parse_recipe(
        RECIPE.format(reader="scenes", count=8, recover=recover).replace(
            "compensate: {images: 4}", f"compensate: {compensate}"
        ),
        tmp_path / "recipe.yaml",
    )
    _, plan = make_plan(work, 8)
    assert settled.recover != "none"
    assert freeze_norms(replace(work, recipe=settled), plan, settled.recover) == share


def test_norms_of_inherited_weights_are_frozen_at_once_where_recovery_is_short() -> None:
    assert freeze_after(4.0, 0.3) == freeze_after(8.0, 0.3, inherited=True) == 0.5
    assert freeze_after(4.0, 0.3, inherited=True) == 0.0


@pytest.mark.parametrize(
    ("recover", "inherited", "rate"),
    [
        ("steps: 2", False, 3e-3),
        ("steps: 2", True, 1e-3),
        ("steps: 20", True, 3e-3),  # five epochs
        ("steps: 2, learning_rate: 0.002", True, 2e-3),
    ],
)
def test_a_short_recovery_of_inherited_weights_is_gentle(
    recover: str, inherited: bool, rate: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []

    def watched(*args: Any, **options: Any) -> Any:
        rates.append(args[3].learning_rate)
        return train(*args, **options)

    monkeypatch.setattr("secateur.flow.recovery.train", watched)
    work = job(recover, tmp_path)
    groups, plan = make_plan(work, 8)
    finish_cut(work, plan, begin_cut(work, groups, plan), inherited=inherited)
    assert rates == [rate]


@pytest.mark.parametrize(
    ("recover", "undone"),
    [
        ("steps: 2, learning_rate: 0.3", True),
        ("steps: 2, learning_rate: 0.3, labels: false", True),
        ("steps: 8, learning_rate: 0.001", False),
        ("steps: 2, learning_rate: 0.3, reinit: true", False),  # nothing to go back to
    ],
)
def test_a_recovery_that_does_harm_is_undone(recover: str, undone: bool, tmp_path: Path) -> None:
    work = job(recover, tmp_path)
    groups, plan = make_plan(work, 4)
    cut = finish_cut(work, plan, begin_cut(work, groups, plan))
    assert cut.undone == undone == (cut.steps == 0)
    assert same(cut.recovered, cut.compensated) == undone


def test_trainings_under_one_parent_share_what_it_said() -> None:
    parent, shown = tiny_model().eval(), []
    parent.register_forward_pre_hook(lambda _m, args: shown.append(len(args[0])))
    settings = TrainSettings(epochs=2, batch_size=4, distill=1.0)
    alone = train(tiny_model(), scenes(), SPEC, settings, parent=parent, augment=FLIP).model
    once = sum(shown)
    teacher = RememberedOutputs(parent)
    for _ in range(2):
        shared = train(
            tiny_model(), scenes(), SPEC, settings, parent=parent, augment=FLIP, remembered=teacher
        ).model
    assert sum(shown) == 2 * once
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], tensor)
