"""2:4 sparsity: the choice, zeros that no training fills, and what the ONNX file really holds."""

from __future__ import annotations

import copy
import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli_run import RECIPE, make_project, run
from conftest import SPEC, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from secateur.bundle import build_engine
from secateur.compensate import refit_sparse
from secateur.compensate.moments import Moments, fit
from secateur.core.errors import BuildError, PlanError
from secateur.core.model import MultiTaskModel, output_difference
from secateur.core.norms import settle_norms
from secateur.core.task import Task
from secateur.data.loading import InMemory, open_reader
from secateur.data.sample import Reader
from secateur.flow.sparsity import fused_weights
from secateur.importance.criterion import TaskBatch, TaskData
from secateur.importance.single_weights import score_weights
from secateur.lower.export import export_onnx
from secateur.prune import (
    SparsityPlan,
    apply_sparsity,
    check_sparsity,
    plan_sparsity,
    without_masks,
)
from secateur.prune.sparsity_check import sparse_layers
from secateur.recover import TrainSettings, train
from torch import Tensor, nn

ELIGIBLE = {
    "network.expand.weight", "network.project.weight", "network.down.weight",
    "network.seg_mix.weight", "network.seg.weight", "network.depth_mix.weight",
    "network.depth.weight", "network.room_hidden.weight", "network.room.weight",
}  # fmt: skip


def fours(tensor: Tensor) -> Tensor:
    """(c_out, c_in, ...) -> (groups, 4) of consecutive input channels."""
    return tensor.movedim(1, -1).reshape(-1, 4)


def weights_of(model: nn.Module, plan: SparsityPlan) -> dict[str, Tensor]:
    """The weights as the layers see them, masked or not."""
    found = {}
    for name in plan.masks:
        path, _, parameter = name.rpartition(".")
        found[name] = getattr(model.get_submodule(path), parameter).detach()
    return found


def holds(model: nn.Module, plan: SparsityPlan) -> bool:
    return all(
        bool((weight[~plan.masks[name]] == 0).all())
        for name, weight in weights_of(model, plan).items()
    )


# -- the choice


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([(), (1, 1), (3, 2)]), st.data())
def test_the_two_most_important_of_each_four_stay(
    outputs: int, quads: int, kernel: tuple[int, ...], data: st.DataObject
) -> None:
    shape = (outputs, 4 * quads, *kernel)
    values = st.integers(0, 3).map(float)  # many ties
    count = int(np.prod(shape))
    numbers = data.draw(st.lists(values, min_size=count, max_size=count))
    scores = torch.tensor(numbers).reshape(shape)
    layer = nn.Conv2d(shape[1], shape[0], kernel) if kernel else nn.Linear(shape[1], shape[0])
    plan = plan_sparsity(layer, {"weight": scores})
    kept = fours(plan.masks["weight"])
    assert plan.masks["weight"].shape == shape and bool((kept.sum(1) == 2).all())
    magnitude = fours(layer.weight.detach().abs())
    for row, mask, size in zip(fours(scores), kept, magnitude, strict=True):
        pairs = itertools.combinations(range(4), 2)
        best = max((float(row[list(p)].sum()), float(size[list(p)].sum())) for p in pairs)
        assert (float(row[mask].sum()), float(size[mask].sum())) == pytest.approx(best)
    total = float(scores.sum())
    lost = float(scores[~plan.masks["weight"]].sum()) / total if total else 0.0
    assert plan.weights[0].lost == pytest.approx(lost) and lost <= 0.5


class Mixed(nn.Module):
    """A layer of every sort."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.wide = nn.Conv2d(8, 6, 1)
        self.odd = nn.Linear(6, 4)
        self.attention = nn.MultiheadAttention(4, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.norm = nn.BatchNorm2d(4)


def test_what_tensorrt_could_use_is_eligible_and_the_rest_stays_dense() -> None:
    plan = plan_sparsity(Mixed())
    assert set(plan.masks) == {
        "wide.weight", "attention.in_proj_weight", "attention.out_proj.weight",
    }  # fmt: skip
    assert set(plan.dense) == {"stem.weight", "depthwise.weight", "grouped.weight", "odd.weight"}
    assert set(plan_sparsity(tiny_model()).masks) == ELIGIBLE


def test_the_plan_says_what_each_task_loses() -> None:
    layer = nn.Linear(4, 1)
    first, second = torch.tensor([[4.0, 3, 2, 1]]), torch.tensor([[0.0, 0, 1, 3]])
    plan = plan_sparsity(
        layer, {"weight": first}, {"seg": {"weight": first}, "depth": {"weight": second}}
    )
    assert plan.masks["weight"].tolist() == [[True, True, False, False]]
    assert dict(plan.lost) == {"seg": pytest.approx(0.3), "depth": 1.0}
    assert json.loads(json.dumps(plan.to_json()))["lost"]["depth"] == 1.0


def test_plans_that_cannot_be_are_refused() -> None:
    with pytest.raises(PlanError, match=r"'weight' have shape \(4, 1\), the weight has \(1, 4\)"):
        plan_sparsity(nn.Linear(4, 1), {"weight": torch.ones(4, 1)})
    with pytest.raises(PlanError, match="no layer of the model can be 2:4 sparse"):
        plan_sparsity(nn.Linear(6, 4))
    with pytest.raises(PlanError, match="made for another model"):
        apply_sparsity(nn.Linear(8, 1), plan_sparsity(nn.Linear(4, 1)))
    twice = apply_sparsity(nn.Linear(4, 1), plan_sparsity(nn.Linear(4, 1)))
    with pytest.raises(PlanError, match="no layer"):
        plan_sparsity(twice)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert plan_sparsity(normed).dense == ("0.weight",)


def test_a_plan_is_read_back_with_its_own_masks_only() -> None:
    plan = plan_sparsity(tiny_model())
    data = json.loads(json.dumps(plan.to_json()))
    assert SparsityPlan.from_json(data, plan.masks) == plan
    with pytest.raises(ValueError, match="another sparsity plan"):
        SparsityPlan.from_json(data, plan_sparsity(nn.Linear(4, 1)).masks)
    with pytest.raises(ValueError, match="no sparsity plan"):
        SparsityPlan.from_json({"weights": [{}]}, plan.masks)


# -- importance of single weights


def linear_model() -> MultiTaskModel:
    """Two tasks that read one vector: the first with weights 1 and 2, the second with 3 and 4."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
            self.one.weight.data = torch.tensor([[1.0, 2.0]])
            self.two.weight.data = torch.tensor([[3.0, 4.0]])

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"one": self.one(x), "two": self.two(x)}

    tasks = (Task("one", "one", "regression", "one"), Task("two", "two", "regression", "two"))
    return MultiTaskModel(Net(), tasks)


def test_a_weights_score_is_its_size_times_its_gradient_for_each_task() -> None:
    model = linear_model()
    images = [torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, 1.0]])]
    losses = {"one": Tensor.sum, "two": lambda out: 10 * out.sum()}
    data = TaskData(("one", "two"), lambda _: [TaskBatch(batch, losses) for batch in images])
    before = copy.deepcopy(model.state_dict())
    names = ["network.one.weight", "network.two.weight"]
    found = score_weights(model, names, data)
    # |w x| averaged over the batches: inputs of size (1.5, 2), whose signs must not cancel
    assert found["one"][names[0]].tolist() == [[1.5, 4.0]]
    assert found["two"][names[1]].tolist() == [[45.0, 80.0]]
    assert not found["one"][names[1]].any() and not found["two"][names[0]].any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("rule", ["mean", "cut", "guarded", "cosine"])
def test_tasks_weigh_alike_whatever_the_scale_of_their_losses(rule: str) -> None:
    one, two = torch.tensor([[1.0, 0, 1, 0]]), torch.tensor([[0.0, 500, 300, 200]])
    fused = fused_weights({"one": {"w": one}, "two": {"w": two}}, {"one": 1, "two": 1}, rule)["w"]
    assert fused.shape == (1, 4) and torch.allclose(
        fused, torch.tensor([[0.25, 0.25, 0.4, 0.1]], dtype=torch.float64)
    )
    fused = fused_weights({"one": {"w": one}, "two": {"w": two}}, {"one": 1, "two": 1e-6}, rule)
    assert plan_sparsity(nn.Linear(4, 1), {"weight": fused["w"]}).masks["weight"].tolist() == [
        [True, False, True, False]
    ]


def test_max_keeps_what_one_task_needs_most() -> None:
    one, two = torch.tensor([[6.0, 0, 3, 3]]), torch.tensor([[0.0, 6, 3, 3]])
    scores = {"one": {"w": one}, "two": {"w": two}}
    kept = plan_sparsity(nn.Linear(4, 1), {
        "weight": fused_weights(scores, {"one": 1, "two": 1}, "max")["w"]
    }).masks["weight"]  # fmt: skip
    assert kept.tolist() == [[True, True, False, False]]


# -- from a recipe to a bundle

SPARSE = RECIPE.replace("prune:      {", 'prune:      {sparsity: "2:4", grid: 4, ')


def test_a_recipe_makes_a_sparse_bundle_whose_builder_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    engine = "engine: {batch: [1, 2, 4], workspace_mib: 64}\nprecision: {mode: fp16, images: 8}\n"
    recipe = make_project(tmp_path, SPARSE + engine)
    words = ("build", recipe, "--target", "rtx-pc", "--out", tmp_path, "--json")
    code, out, err = run(capsys, *words)
    assert code == 0, err
    folder = Path(json.loads(out)[0]["bundle"])
    sparsity = json.loads(out)[0]["manifest"]["plan"]["sparsity"]
    assert len(check_sparsity(folder / "model.onnx")) == len(sparsity["weights"]) > 5
    assert len(check_sparsity(folder / "fp32.onnx")) == len(sparsity["weights"])
    assert {task for task, lost in sparsity["lost"].items() if 0 < lost < 0.5} == {
        "segmentation", "depth",
    }  # fmt: skip
    options = json.loads((folder / "engine_options.json").read_text())
    assert options == {"batch": [1, 2, 4], "workspace_mib": 64, "sparse": True}
    code, out, err = run(capsys, "plan", recipe, "--target", "rtx-pc", "--json")
    assert code == 0 and json.loads(out)["sparsity"] == sparsity, err
    code, out, _ = run(capsys, "plan", recipe, "--target", "rtx-pc")
    assert f"2:4 in {len(sparsity['weights'])} layers" in out


def test_a_sparse_recovery_is_found_again_and_is_not_the_dense_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for text in (SPARSE, SPARSE.replace('sparsity: "2:4", ', ""), SPARSE):
        words = ("build", make_project(tmp_path, text), "--target", "rtx-pc", "--out", tmp_path)
        code, out, err = run(capsys, *words, "--json")
        assert code in (0, 1), err
        digests.append(json.loads(out)[0]["manifest"]["files"]["model.onnx"]["sha256"])
        assert ("sparsity" in json.loads(out)[0]["manifest"]["plan"]) == (text == SPARSE)
    assert digests[0] == digests[2] != digests[1]
    assert len([*(tmp_path / "cache").glob("recover/*/weights.safetensors")]) == 2
    assert len([*(tmp_path / "cache").glob("sparsity/*/masks.safetensors")]) == 1


@pytest.mark.parametrize(
    ("old", "new", "target", "said"),
    [
        ("", "", "x86-64-cpu", "x86-64-cpu has nothing that runs 2:4 sparse weights faster"),
        ('"2:4"', '"1:4"', "rtx-pc", "prune.sparsity"),
        ("{epochs: 1}", "{epochs: 1, reinit: true}", "rtx-pc", "which recover.reinit forgets"),
    ],
)  # fmt: skip
def test_sparsity_that_cannot_be_is_said_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    old: str, new: str, target: str, said: str,
) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    recipe = make_project(tmp_path, SPARSE.replace(old, new) if old else SPARSE)
    code, _, err = run(capsys, "build", recipe, "--target", target, "--out", tmp_path / "out")
    assert code == 2 and said in err and not (tmp_path / "out").exists()


# -- zeros that hold


@cache
def scenes() -> Reader:
    return InMemory(open_reader("scenes", None, "train", count=12, height=32, width=48))


def test_a_sparse_copy_computes_with_masked_weights_and_leaves_the_model_alone() -> None:
    model, example = tiny_model(), SPEC.example(2)
    before = copy.deepcopy(model.state_dict())
    plan = plan_sparsity(model)
    sparse = apply_sparsity(model, plan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    by_hand = copy.deepcopy(model)
    for name, mask in plan.masks.items():
        by_hand.get_parameter(name).data.mul_(mask)
    outputs = sparse(example)
    assert all(torch.equal(value, outputs[task]) for task, value in by_hand(example).items())
    assert not torch.equal(outputs["depth"], model(example)["depth"])


SETTINGS: list[dict[str, Any]] = [
    {"learning_rate": 0.01, "weight_decay": 0.1},
    {"learning_rate": 0.01, "ema": 0.5, "freeze_norms": 0.0, "distill": 1.0},
    {"learning_rate": 0.01, "balance": "pcgrad"},
]


def test_refitted_weights_make_up_for_the_zeros_and_leave_them() -> None:
    dense, images = tiny_model(), torch.cat([SPEC.example(16, seed=s) for s in range(4)])
    plan = plan_sparsity(dense)
    sparse = without_masks(apply_sparsity(dense, plan))
    fitted = refit_sparse(dense, sparse, plan.masks, images)
    for name, weight in weights_of(fitted, plan).items():
        assert (weight[~plan.masks[name].bool()] == 0).all()
    settle_norms(sparse, images)
    unseen = SPEC.example(16, seed=99)
    assert output_difference(dense, fitted, unseen) < 0.8 * output_difference(dense, sparse, unseen)


def test_a_row_is_the_least_squares_of_what_it_may_use() -> None:
    torch.manual_seed(0)
    x, e = torch.randn(1, 8, 500, dtype=torch.float64), torch.randn(1, 3, 500, dtype=torch.float64)
    support = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1, 1, 0], [0, 0, 1, 1] * 2])
    found = fit(Moments.of(x, e), None, 1e-9, support.bool())[0]
    for row, may in enumerate(support.bool()):
        centred = (x[0, may] - x[0, may].mean(1, keepdim=True)).T
        wanted = torch.linalg.lstsq(centred, e[0, row] - e[0, row].mean()).solution
        assert torch.allclose(found[row, may], wanted, atol=1e-6) and (found[row, ~may] == 0).all()


@pytest.mark.parametrize("settings", SETTINGS)
def test_recovery_moves_the_kept_weights_and_fills_no_zero(settings: dict[str, Any]) -> None:
    model = tiny_model()
    plan = plan_sparsity(model)
    sparse = apply_sparsity(model, plan)
    result = train(
        sparse, scenes(), SPEC, TrainSettings(steps=3, batch_size=4, **settings), parent=model
    )
    assert holds(result.model, plan)
    after, before = weights_of(result.model, plan), weights_of(sparse, plan)
    moved = [bool((after[name] != before[name])[mask].any()) for name, mask in plan.masks.items()]
    assert all(moved)
    plain = without_masks(result.model)
    assert holds(plain, plan) and set(plain.state_dict()) == set(model.state_dict())
    assert all(type(module) in (type(m) for m in model.modules()) for module in plain.modules())
    example = SPEC.example(2)
    outputs = plain(example)
    assert all(torch.equal(value, outputs[t]) for t, value in result.model(example).items())


def test_without_masks_training_would_fill_the_zeros() -> None:
    plan = plan_sparsity(tiny_model())
    loose = without_masks(apply_sparsity(tiny_model(), plan))
    settings = TrainSettings(steps=1, batch_size=4, learning_rate=0.01)
    assert holds(loose, plan)
    assert not holds(train(loose, scenes(), SPEC, settings).model, plan)


def test_a_stopped_recovery_resumes_sparse(tmp_path: Path) -> None:
    plan = plan_sparsity(tiny_model())
    sparse = apply_sparsity(tiny_model(), plan)
    settings = TrainSettings(epochs=2, batch_size=4, learning_rate=0.01)
    seen: list[int] = []

    def stop(epoch: int, model: MultiTaskModel, loss: float) -> None:
        seen.append(epoch)
        if len(seen) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(sparse, scenes(), SPEC, settings, checkpoint=tmp_path, after_epoch=stop)
    resumed = train(sparse, scenes(), SPEC, settings, checkpoint=tmp_path, after_epoch=stop).model
    assert seen == [1, 2] and holds(resumed, plan)
    whole = train(sparse, scenes(), SPEC, settings).model
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in resumed.state_dict().items())


# -- what the ONNX file holds


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """TinyNet in ONNX: dense, and sparse after a step of recovery."""
    folder = tmp_path_factory.mktemp("onnx")
    model = tiny_model()
    settings = TrainSettings(steps=1, batch_size=4)
    sparse = train(apply_sparsity(model, plan_sparsity(model)), scenes(), SPEC, settings).model
    files = {"dense": folder / "dense.onnx", "sparse": folder / "sparse" / "model.onnx"}
    files["sparse"].parent.mkdir()
    export_onnx(model, SPEC.example(2), files["dense"])
    export_onnx(without_masks(sparse), SPEC.example(2), files["sparse"])
    return files


def test_every_eligible_layer_of_the_export_is_2_to_4(exported: dict[str, Path]) -> None:
    layers = check_sparsity(exported["sparse"])
    assert len(layers) == len(ELIGIBLE)
    assert all(layer.zeros >= 0.5 and layer.dense_fours == 0 for layer in layers)


def test_a_dense_export_is_named_layer_by_layer(exported: dict[str, Path]) -> None:
    assert all(layer.dense_fours for layer in sparse_layers(exported["dense"]))
    with pytest.raises(BuildError, match=r"9 of 9 eligible layers are not 2:4 sparse: .* and 4 mo"):
        check_sparsity(exported["dense"])


def test_one_weight_too_many_is_found(exported: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(exported["sparse"])
    victim = check_sparsity(exported["sparse"])[3]
    (tensor,) = [value for value in model.graph.initializer if value.name == victim.weight]
    array = numpy_helper.to_array(tensor).copy()
    array[np.unravel_index(np.flatnonzero(array == 0)[0], array.shape)] = 1e-7
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "one.onnx")
    with pytest.raises(BuildError, match="1 of 9 eligible") as stop:
        check_sparsity(tmp_path / "one.onnx")
    assert f": {victim.node}; {victim.node} has 1 groups" in str(stop.value)


def graph_of(folder: Path, nodes: list[onnx.NodeProto], weight: np.ndarray) -> Path:
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.float32(0.1), "s"),
         numpy_helper.from_array(np.int8(0), "z")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), folder / "g.onnx")
    return folder / "g.onnx"


def made(*rows: str) -> list[onnx.NodeProto]:
    """``"Op a,b -> c"`` in a list; an operator's attributes are those of ATTRIBUTES."""
    nodes = []
    for row in rows:
        operator, inputs, _, output = row.split()
        kind, _, variant = operator.partition(":")
        attributes = {"T": {"transB": 1}, "P": {"perm": [1, 0]}, "G": {"group": 2}}.get(variant, {})
        nodes.append(helper.make_node(kind, inputs.split(","), [output], "n", **attributes))
    return nodes


IN_FIRST = np.array([[1, 2, 0, 0, 0, 3, 4, 0]], np.float32).repeat(4, 0).T.copy()  # (8, 4)
IN_LAST = IN_FIRST.T.copy()  # along the other axis each four is full or empty


@pytest.mark.parametrize(
    ("nodes", "weight", "dense"),
    [
        (made("Gemm x,w -> y"), IN_FIRST, 0),
        (made("Gemm x,w -> y"), IN_LAST, 4),
        (made("Gemm:T x,w -> y"), IN_LAST, 0),
        (made("MatMul x,w -> y"), IN_FIRST, 0),
        (made("Transpose:P w -> t", "MatMul x,t -> y"), IN_LAST, 0),
        (made("Transpose:P w -> t", "MatMul x,t -> y"), IN_FIRST, 4),
        (made("QuantizeLinear w,s,z -> q", "DequantizeLinear q,s,z -> d", "Gemm:T x,d -> y"),
         IN_LAST, 0),
        (made("DequantizeLinear w,s,z -> d", "Gemm:T x,d -> y"), IN_LAST.astype(np.int8), 0),
        (made("Conv x,w -> y"), IN_LAST.reshape(4, 8, 1, 1), 0),
        (made("Conv x,w -> y"), IN_LAST.reshape(4, 8, 1, 1) + 1, 8),
    ],
)  # fmt: skip
def test_the_input_channels_are_found_whatever_stands_between(
    tmp_path: Path, nodes: list[onnx.NodeProto], weight: np.ndarray, dense: int
) -> None:
    (layer,) = sparse_layers(graph_of(tmp_path, nodes, weight))
    assert (layer.weight, layer.dense_fours) == ("w", dense)


@pytest.mark.parametrize(
    ("nodes", "shape"),
    [
        (made("Conv:G x,w -> y"), (4, 4, 1, 1)),
        (made("Conv x,w -> y"), (4, 3, 1, 1)),
        (made("Gemm x,w -> y"), (6, 4)),
        (made("MatMul x,x -> y"), (4, 4)),
    ],
)
def test_a_file_with_nothing_eligible_is_said_so(
    tmp_path: Path, nodes: list[onnx.NodeProto], shape: tuple[int, ...]
) -> None:
    with pytest.raises(BuildError, match="no layer can be 2:4 sparse"):
        check_sparsity(graph_of(tmp_path, nodes, np.ones(shape, np.float32)))


def test_tensorrt_rtx_builds_it_with_the_flag(exported: dict[str, Path]) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    engine = build_engine.build(exported["sparse"].parent, {"sparse": True}, rtx)
    assert engine["options"]["sparse"] and engine["bytes"] > 50_000
