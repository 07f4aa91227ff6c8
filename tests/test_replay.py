"""The trainable form of a quantised graph is the graph that ships."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import SPEC, tiny_model
from secateur.core.errors import BuildError, CalibrationError
from secateur.core.files import file_sha256
from secateur.lower.export import export_onnx
from secateur.lower.quant import (
    TENSORRT,
    Dialect,
    Replay,
    bias_shifts,
    calibrate,
    emit,
    onnxruntime_arm,
    onnxruntime_x86,
    plan_quant,
    write_learned,
)
from test_quant import IMAGES, hard_swish, run, save

X86 = onnxruntime_x86()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model.onnx"
    export_onnx(tiny_model(), SPEC.example(2), path)
    return path


def off(wanted: np.ndarray, got: np.ndarray) -> float:
    return float(np.linalg.norm(wanted - got) / np.linalg.norm(wanted))


def replayed(replay: Replay) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {name: found.numpy() for name, found in replay(torch.from_numpy(IMAGES)).items()}


@pytest.mark.parametrize("dialect", [X86, onnxruntime_x86(vnni=False), onnxruntime_arm(), TENSORRT],
                         ids=["x86", "x86-avx2", "arm", "tensorrt"])  # fmt: skip
def test_it_gives_what_the_written_file_gives(tiny: Path, dialect: Dialect, tmp_path: Path) -> None:
    plan = plan_quant(tiny, calibrate(tiny, lambda: [IMAGES], "percentile"), {})
    plan = replace(plan, shifts=bias_shifts(tiny, plan, dialect, IMAGES))
    emit(tiny, plan, dialect, tmp_path / "int8.onnx")
    written, fp32 = run(tmp_path / "int8.onnx", plain=True), run(tiny)
    for task, output in replayed(Replay(tiny, plan, dialect)).items():
        # A value half-way between two steps may go either way; bilinear resizes make many.
        assert off(written[task], output) < 0.6 * off(fp32[task], written[task]), task
    assert off(written["room"], replayed(Replay(tiny, plan, dialect))["room"]) < 1e-4


@pytest.mark.parametrize("dialect", [X86, onnxruntime_arm(), TENSORRT], ids=lambda d: d.name)
def test_hard_swish_is_what_is_written(tmp_path: Path, dialect: Dialect) -> None:
    model = hard_swish(tmp_path)
    plan = plan_quant(model, calibrate(model, lambda: [IMAGES], "minmax"), {})
    emit(model, plan, dialect, tmp_path / "int8.onnx")
    written = run(tmp_path / "int8.onnx", plain=True)["y"]
    assert (
        off(written, replayed(Replay(model, plan, dialect))["y"])
        < 1e-4
        < off(run(model)["y"], written)
    )


def test_in_fp32_it_is_the_model(tiny: Path) -> None:
    replay = Replay(tiny, plan_quant(tiny, None, {}, default="fp32"), X86)
    for task, output in replayed(replay).items():
        assert off(run(tiny)[task], output) < 1e-5, task


def test_gradients_reach_every_layer_and_stop_at_the_ends_of_a_grid(tmp_path: Path) -> None:
    model = save(
        "g (float[N,3,32,48] image) => (float[N,3,32,48] y) { y = Conv (image, w, b) }",
        tmp_path / "model.onnx",
        w=np.eye(3, dtype=np.float32)[:, :, None, None], b=np.zeros(3, dtype=np.float32),
    )  # fmt: skip
    plan = plan_quant(model, calibrate(model, lambda: [IMAGES], "minmax"), {})
    plan = replace(plan, ranges={**plan.ranges, "image": (-1.0, 1.0), "y": (-9.0, 9.0)})
    replay = Replay(model, plan, X86)
    image = torch.tensor([0.5, -0.5, 7.0]).reshape(1, 3, 1, 1).requires_grad_()
    replay(image)["y"].sum().backward()
    assert image.grad is not None and image.grad.flatten().tolist() == pytest.approx([1, 1, 0])
    learned = dict(replay.learned.items())
    assert set(learned) == {"y_weight", "y_bias"}
    assert all(parameter.grad is not None for parameter in learned.values())


def test_what_it_learned_is_written_and_ships_as_it_was_trained(tiny: Path, tmp_path: Path) -> None:
    plan = plan_quant(tiny, calibrate(tiny, lambda: [IMAGES], "minmax"), {})
    replay = Replay(tiny, plan, X86)
    assert len(replay.learned) == 22  # nine convolutions and two products, with their biases
    with torch.no_grad():
        for parameter in replay.parameters():
            parameter.mul_(1.03)
    write_learned(tiny, replay, tmp_path / "learned.onnx")
    assert len(onnx.load(tmp_path / "learned.onnx").graph.node) == len(onnx.load(tiny).graph.node)
    again = replace(plan, model=file_sha256(tmp_path / "learned.onnx"))
    emit(tmp_path / "learned.onnx", again, X86, tmp_path / "int8.onnx")
    shipped, trained = run(tmp_path / "int8.onnx", plain=True), replayed(replay)
    assert off(shipped["room"], trained["room"]) < 1e-4
    assert off(run(tiny)["room"], trained["room"]) > 0.03  # not what it was
    with pytest.raises(CalibrationError, match="another model"):
        Replay(tmp_path / "learned.onnx", plan, X86)


def test_an_operator_that_it_does_not_know_is_named(tmp_path: Path) -> None:
    model = save(
        "g (float[N,3,32,48] image) => (float[N,3,32,48] y) { y = Round (image) }",
        tmp_path / "model.onnx",
    )
    with pytest.raises(BuildError, match="operator Round"):
        Replay(model, plan_quant(model, None, {}, default="fp32"), X86)


@pytest.mark.parametrize("node", ["d = Cast <to=11> (image) y = Cast <to=1> (d)"])
def test_a_type_that_cannot_be_trained_is_told(tmp_path: Path, node: str) -> None:
    model = save(
        f"g (float[N,3,32,48] image) => (float[N,3,32,48] y) {{ {node} }}", tmp_path / "model.onnx"
    )
    replay = Replay(model, plan_quant(model, None, {}, default="fp32"), X86)
    with pytest.raises(BuildError, match="type 11 cannot be trained"):
        replay(torch.zeros(1, 3, 32, 48))


OPERATORS = {
    "MaxPool": "y = MaxPool <kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]> (image)",
    "AveragePool": "y = AveragePool <kernel_shape=[2,2], strides=[2,2]> (image)",
    "GlobalAveragePool": "y = GlobalAveragePool (image)",
    "Gemm": "f = Flatten (image) y = Gemm <alpha=0.5, beta=2.0, transB=1> (f, wide, bias)",
    "LayerNormalization": "y = LayerNormalization <axis=-1> (image, row, row)",
    "BatchNormalization": "y = BatchNormalization (image, bias3, bias3, bias3, one3)",
    "Gelu": 'y = Gelu <approximate="tanh"> (image)',
    "HardSwish": "h = HardSigmoid <alpha=0.2, beta=0.4> (image) s = HardSwish (image)"
    " y = Add (h, s)",
    "LeakyRelu": "y = LeakyRelu <alpha=0.2> (image)",
    "Softmax": "y = Softmax <axis=1> (image)",
    "Reduce": "m = ReduceMean <keepdims=0> (image, pixels) s = ReduceSum (image, pixels)"
              " f = Flatten (s) y = Add (m, f)",
    "Slice": "y = Slice (image, first, last, pixels, steps)",
    "Split": "a, b = Split <axis=2> (image, halves) y = Sub (a, b)",
    "Reshape": "y = Reshape (image, shape)",
    "Squeeze": "m = GlobalAveragePool (image) q = Squeeze (m, pixels) y = Unsqueeze (q, pixels)",
    "Gather": "y = Gather <axis=1> (image, order)",
    "Expand": "m = GlobalAveragePool (image) y = Expand (m, large)",
    "Shape": "s = Shape (image) c = Cast <to=1> (s) y = Div (c, bias4)",
    "Math": "e = Exp (image) n = Neg (e) p = Pow (n, two) q = Sqrt (p) t = Tanh (q)"
            " u = Erf (t) v = Softplus (u) y = Sigmoid (v)",
    "Clip": "y = Clip (image, , two)",
    "Nearest": 'y = Resize <mode="nearest", coordinate_transformation_mode="asymmetric",'
               ' nearest_mode="floor"> (image, , scales)',
    "Linear": 'y = Resize <mode="linear"> (image, , scales)',
    "Corners": 'y = Resize <mode="linear", coordinate_transformation_mode="align_corners">'
               " (image, , , sizes)",
    "Transpose": "y = Transpose <perm=[0,2,3,1]> (image)",
    "Padded": "y = Conv <pads=[0,1,2,1], strides=[2,2], dilations=[1,2]> (image, kernel)",
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_those_of_onnx(tmp_path: Path, name: str) -> None:
    random = np.random.default_rng(3)
    integers = {"pixels": [2, 3], "first": [30, 0], "last": [0, -3], "steps": [-2, 3],
                "halves": [16, 16], "shape": [0, 3, -1], "order": [2, 0], "large": [1, 3, 5, 1],
                "sizes": [8, 3, 50, 20]}  # fmt: skip
    floats = {"wide": random.normal(0, 1, (4, 3 * 32 * 48)), "bias": np.arange(4),
              "row": random.normal(1, 1, 48), "bias3": [0.5, 1, 2], "one3": np.ones(3),
              "bias4": np.arange(1, 5), "two": np.array(2.0), "scales": [1, 1, 2, 2],
              "kernel": random.normal(0, 1, (4, 3, 3, 3))}  # fmt: skip
    arrays = {key: np.array(value, dtype=np.int64) for key, value in integers.items()}
    arrays.update((key, np.array(value, dtype=np.float32)) for key, value in floats.items())
    model = save(f"g (float[N,3,32,48] image) => (float y) {{ {OPERATORS[name]} }}",
                 tmp_path / "model.onnx", **arrays)  # fmt: skip
    replay = Replay(model, plan_quant(model, None, {}, default="fp32"), X86)
    assert replayed(replay)["y"] == pytest.approx(run(model)["y"], rel=1e-4, abs=1e-4)
