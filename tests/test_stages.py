"""Selection, the score bank, compensation, recovery and export, on a model made here."""

from __future__ import annotations

import copy
import importlib
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SPEC, TASKS, TinyNet, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur import zoo
from secateur.compensate import RefitSettings, refit
from secateur.core.errors import DataError, ModelError
from secateur.core.model import MultiTaskModel, evaluating, model_fingerprint
from secateur.core.source import source_files
from secateur.core.task import Task
from secateur.data.loading import open_reader
from secateur.importance.bank import load_scores, save_scores
from secateur.importance.passes import left_as_found
from secateur.lower import compare_outputs, export_onnx
from secateur.prune import apply_plan, find_groups, macs_model, plan_prune
from secateur.prune.plan import Budget
from secateur.recover import TrainSettings, train
from secateur.runtimes.base import runtime_of
from secateur.tasks import decompose, select_tasks
from torch import fx, nn

EXAMPLE = SPEC.example(2)


def scenes(count: int = 16):
    return open_reader("scenes", None, "train", count=count, height=32, width=48)


@settings(max_examples=8, deadline=None)
@given(keep=st.sets(st.sampled_from([t.name for t in TASKS]), min_size=1))
def test_dropping_tasks_leaves_the_others_bit_equal(keep: set[str]) -> None:
    model = tiny_model()
    selected = select_tasks(model, keep)
    with torch.no_grad():
        before, after = model(EXAMPLE), selected(EXAMPLE)
    assert set(after) == keep
    assert all(torch.equal(before[name], after[name]) for name in keep)


def test_what_only_dropped_tasks_need_is_gone() -> None:
    selected = select_tasks(tiny_model(), ["depth"])
    names = {name.split(".")[1] for name, _ in selected.named_parameters()}
    assert not names & {"seg", "seg_mix", "room", "room_hidden"}
    assert {"stem", "down", "depth_mix", "depth"} <= names


def test_a_tuple_model_is_selected_by_position() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 1, 1), nn.Conv2d(8, 2, 1)

        def forward(self, image):
            x = self.trunk(image)
            return self.a(x), self.b(x)

    tasks = [Task("one", "0", "depth", "depth"), Task("two", "1", "depth", "depth")]
    model = MultiTaskModel(Pair(), tasks).eval()
    selected = select_tasks(model, ["two"])
    assert torch.equal(selected(EXAMPLE)["two"], model(EXAMPLE)["two"])
    assert not any("network.a" in name for name, _ in selected.named_parameters())


def test_a_model_that_cannot_be_traced_says_what_to_add() -> None:
    class Branching(nn.Module):
        def forward(self, image):
            return {"seg": image if image.sum() > 0 else -image, "depth": image}

    model = MultiTaskModel(Branching(), TASKS[:2])
    with pytest.raises(ModelError, match="cannot be traced") as caught:
        select_tasks(model, ["depth"])
    assert "select_outputs" in caught.value.hint


def test_decompose_finds_use_not_names() -> None:
    model = tiny_model()
    use = decompose(model, EXAMPLE)
    assert use.layers["network.seg_mix"] == {"segmentation"}
    assert use.layers["network.down"] == {"segmentation", "depth", "room"}
    assert use.private("room", use.params) == (32 * 32 + 32) + (32 * 4 + 4)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(use.shared_by(n, use.params) for n in (1, 2, 3)) == total


def test_the_bank_on_disk_gives_back_what_was_stored(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    assert load_scores(path) is None
    save_scores(path, {"a": np.array([1.0, 2.0])})
    assert load_scores(path)["a"].tolist() == [1.0, 2.0]
    path.write_bytes(b"damaged")
    assert load_scores(path) is None


def half_cut(model: MultiTaskModel):
    groups = find_groups(model, EXAMPLE)
    scores = {g.name: np.random.default_rng(0).uniform(size=g.width) for g in groups}
    plan = plan_prune(
        groups, macs_model(model, groups, EXAMPLE), scores, {}, Budget(0.5, 4, floor=0.1),
        criterion="random", fusion="mean",
    )  # fmt: skip
    return groups, plan, apply_plan(model, groups, plan)


def test_refitting_brings_outputs_nearer_to_the_parent_on_images_not_seen() -> None:
    model = tiny_model()
    groups, plan, cut = half_cut(model)
    fitted = refit(model, cut, groups, plan, SPEC.example(32, seed=1), RefitSettings(ridge=0.01))
    unseen = SPEC.example(16, seed=2)
    with torch.no_grad():
        wanted, plain, better = model(unseen), cut(unseen), fitted(unseen)
    for name in wanted:
        assert (better[name] - wanted[name]).norm() < 0.8 * (plain[name] - wanted[name]).norm()


def test_refitting_an_uncut_model_changes_nothing() -> None:
    model = tiny_model()
    groups = find_groups(model, EXAMPLE)
    plan = plan_prune(
        groups, macs_model(model, groups, EXAMPLE), {g.name: np.ones(g.width) for g in groups}, {},
        Budget(1.0, 1), criterion="none", fusion="mean",
    )  # fmt: skip
    fitted = refit(model, model, groups, plan, SPEC.example(8))
    with torch.no_grad():
        for name, wanted in model(EXAMPLE).items():
            assert torch.allclose(fitted(EXAMPLE)[name], wanted, atol=5e-4)  # rounding


def test_training_resumes_exactly_where_it_stopped(tmp_path: Path) -> None:
    reader, model = scenes(8), tiny_model()
    settings_ = TrainSettings(epochs=3, batch_size=4, seed=1)
    whole = train(model, reader, SPEC, settings_, parent=model)

    class Stop(Exception):
        pass

    def stop_after_two(epoch: int, _model: MultiTaskModel, _loss: float) -> None:
        if epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        train(
            model, reader, SPEC, settings_,
            parent=model, checkpoint=tmp_path, after_epoch=stop_after_two,
        )  # fmt: skip
    resumed = train(model, reader, SPEC, settings_, parent=model, checkpoint=tmp_path)
    assert resumed.steps == whole.steps == 6
    for name, tensor in whole.model.state_dict().items():
        assert torch.allclose(resumed.model.state_dict()[name], tensor, atol=1e-6), name


def test_training_without_labels_distils_and_lowers_the_loss(tmp_path: Path) -> None:
    import cv2

    for i in range(8):
        cv2.imwrite(str(tmp_path / f"{i}.png"), scenes(8)[i].image)
    reader = open_reader("folder", tmp_path, ".")
    assert reader.label_names == frozenset()
    model = tiny_model()
    _, _, cut = half_cut(model)
    result = train(
        cut, reader, SPEC, TrainSettings(epochs=6, batch_size=4, learning_rate=3e-3), parent=model
    )
    assert result.losses[-1] < 0.8 * result.losses[0]
    with pytest.raises(DataError, match="has no labels"):
        train(cut, reader, SPEC, TrainSettings(epochs=1))


def test_onnx_equals_torch_at_any_batch(tmp_path: Path) -> None:
    _, _, cut = half_cut(tiny_model())
    path = tmp_path / "model.onnx"
    export_onnx(cut, EXAMPLE, path)
    session = runtime_of("onnxruntime").open_session(path, threads=1)
    for batch in (1, 3):
        images = SPEC.example(batch, seed=batch)
        with torch.no_grad():
            wanted = {name: tensor.numpy() for name, tensor in cut(images).items()}
        parity = compare_outputs(wanted, session.run(images.numpy()), tolerance=1e-4)
        assert set(parity) == {"segmentation", "depth", "room"}


def test_zoo_heads_have_the_stride_and_channels_asked_for() -> None:
    heads = {"seg": zoo.HeadSpec("segmentation", 5), "vector": zoo.HeadSpec("regression", 2)}
    for backbone, options in (
        ("resnet18", {}),
        ("vit_tiny_patch16_224", {"img_size": (64, 96)}),
        ("mambaout_femto", {}),  # channels last
    ):
        outputs = zoo.compose(backbone, heads, **options)(torch.randn(2, 3, 64, 96))
        assert outputs["seg"].shape == (2, 5, 16, 24)
        assert outputs["vector"].shape == (2, 2)
    with pytest.raises(ModelError, match="no backbone"):
        zoo.compose("resnet18x", heads)
    with pytest.raises(ModelError, match="unknown kind"):
        zoo.compose("resnet18", {"x": zoo.HeadSpec("smell", 1)})


def test_an_output_that_forward_does_not_return_is_named() -> None:
    model = MultiTaskModel(TinyNet(), [Task("depth", "dept", "depth", "depth")])
    with pytest.raises(ModelError, match=r"reads output 'dept'.*returns depth, room, seg"):
        model(EXAMPLE)


class Scaled(nn.Module):
    """A factor that no weight and no name of a layer tells."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most = most
        self.register_buffer("shift", torch.tensor(most), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.most * torch.sigmoid(image) + self.shift


class Activated(nn.Module):
    """What torch.fx makes of it has no source file."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.function(image)


class Holding(nn.Module):
    """Has an attribute of any kind beside a layer."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.layer, self.held = nn.Linear(2, 2, bias=False), held
        nn.init.ones_(self.layer.weight)


@pytest.mark.parametrize(
    ("held", "other"),
    [(torch.relu, torch.tanh), (partial(torch.clamp, min=0), partial(torch.clamp, min=1)),
     (np.arange(3), np.arange(1, 4)), ([torch.zeros(2)], [torch.ones(2)]), ("a", "b"),
     ({"a": [1.0]}, {"a": [2.0]})],
    ids=["function", "partial", "array", "tensors", "text", "nested"],
)  # fmt: skip
def test_a_fingerprint_tells_what_an_attribute_holds(held: object, other: object) -> None:
    assert model_fingerprint(Holding(held)) == model_fingerprint(Holding(held))
    assert model_fingerprint(Holding(held)) != model_fingerprint(Holding(other))


def test_a_fingerprint_tells_what_forward_calls_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that the network's own file imports, not one that something installed does."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_net.py").write_text(
        "import own_steps\nfrom torch import nn\n\nclass Net(nn.Module):\n"
        "    def forward(self, image):\n        return own_steps.last(image)\n"
    )

    def with_steps(code: str) -> str:
        for name in ("own_net", "own_steps"):
            sys.modules.pop(name, None)
        (tmp_path / "own_steps.py").write_text(code)
        importlib.invalidate_caches()
        with monkeypatch.context() as patched:
            patched.setattr(sys, "dont_write_bytecode", True)
            return model_fingerprint(importlib.import_module("own_net").Net())

    one = with_steps("def last(image):\n    return image\n")
    other = with_steps("def last(image):\n    return -image\n")
    assert one != other and one == with_steps("def last(image):\n    return image\n")
    model = importlib.import_module("own_net").Net()
    assert {file.name for file in source_files(model)} == {"own_net.py", "own_steps.py"}


class Storing(nn.Module):
    """Keeps its features for whoever looks, as research code does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.features = nn.Conv2d(3, 2, 1), None

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.features = self.last = self.layer(image)
        return self.features


def test_what_a_forward_stores_is_not_part_of_the_model() -> None:
    model = Storing()
    before = model_fingerprint(model)
    with evaluating(model):
        model(torch.randn(1, 3, 4, 4))
    with left_as_found(model, ()):
        model(torch.randn(1, 3, 4, 4, requires_grad=True))
    assert model_fingerprint(model) == before
    copy.deepcopy(model)  # torch refuses copies of what autograd made
    assert model.features is None and not hasattr(model, "last")


def test_a_fingerprint_tells_attributes_buffers_and_traced_code_apart() -> None:
    one, same, other = Scaled(10.0), Scaled(10.0), Scaled(80.0)
    assert model_fingerprint(one) == model_fingerprint(same.train())
    assert model_fingerprint(one) != model_fingerprint(other)
    other.most = 10.0  # the buffer still differs
    assert model_fingerprint(one) != model_fingerprint(other)
    traced = [fx.symbolic_trace(Activated(each)) for each in (torch.relu, torch.tanh, torch.relu)]
    first, second, third = (model_fingerprint(each) for each in traced)
    assert first == third != second
