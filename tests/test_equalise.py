"""Equalisation keeps the function and knows where it may; bias correction removes a mean error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import SPEC, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur.lower.export import export_onnx
from secateur.lower.quant import (
    TENSORRT,
    Dialect,
    QuantPlan,
    apply_equalisation,
    bias_shifts,
    calibrate,
    emit,
    onnxruntime_arm,
    onnxruntime_x86,
    plan_equalisation,
    plan_quant,
)
from secateur.lower.quant.channels import ChannelScales
from secateur.lower.quant.equalise import Equalisation
from test_quant import IMAGES, constants, run, save

RANDOM = np.random.default_rng(7)


def weights(*shape: int) -> np.ndarray:
    return RANDOM.normal(0, 0.3, shape).astype(np.float32)


def chain(tmp_path: Path, between: str, **more: np.ndarray) -> Path:
    """Two convolutions, 3 -> 8 -> 4 channels, with ``between`` making ``b`` of ``a``."""
    return save(
        f"""g (float[N,3,32,48] image) => (float[N,4,height,width] y)
            {{ a = Conv <pads=[1,1,1,1]> (image, w1, b1)  {between}  y = Conv (b, w2, b2) }}""",
        tmp_path / "chain.onnx",
        w1=weights(8, 3, 3, 3), b1=weights(8), w2=weights(4, 8, 1, 1), b2=weights(4), **more,
    )  # fmt: skip


def scalable(model: Path) -> set[str]:
    return set(ChannelScales(onnx.load(model)).places)


def off(model: Path, other: Path) -> float:
    """How far outputs are off, as a share of their largest value."""
    wanted, got = run(model), run(other)
    return max(float(np.abs(wanted[k] - got[k]).max() / np.abs(wanted[k]).max()) for k in wanted)


@pytest.mark.parametrize(
    "between",
    [
        "b = Relu (a)",
        "b = LeakyRelu <alpha=0.1> (a)",
        "b = Identity (a)",
        "r = Relu (a) b = MaxPool <kernel_shape=[2,2], strides=[2,2]> (r)",
        "b = AveragePool <kernel_shape=[2,2], strides=[2,2]> (a)",
        'b = Resize <mode="linear"> (a, , scales)',
    ],
)
def test_what_is_positively_homogeneous_lets_scales_through(tmp_path: Path, between: str) -> None:
    model = chain(tmp_path, between, scales=np.array([1, 1, 2, 2], dtype=np.float32))
    assert {"a", "b"} <= scalable(model)
    plan = plan_equalisation(model, IMAGES)
    assert plan.channels >= 7  # of eight
    apply_equalisation(model, plan, tmp_path / "equal.onnx")
    assert off(model, tmp_path / "equal.onnx") < 1e-5
    changed = constants(onnx.load(tmp_path / "equal.onnx"))["y_input_1"]
    assert not np.allclose(changed, constants(onnx.load(model))["w2"])  # it did something


@pytest.mark.parametrize(
    "between",
    [
        "b = Clip (a, zero, six)",  # ReLU6
        "b = HardSwish (a)",
        "b = Sigmoid (a)",
        "b = Softplus (a)",
        "s = Sigmoid (a) b = Mul (a, s)",  # SiLU
        "b = Add (a, k)",
        "b = Softmax <axis=1> (a)",
        "b = Clip (a, zero, )",  # a ReLU by another name is not worth a rule of its own
    ],
)
def test_what_is_not_stops_them(tmp_path: Path, between: str) -> None:
    model = chain(tmp_path, between, zero=np.float32(0), six=np.float32(6), k=np.float32(1))
    assert scalable(model) == set()
    assert plan_equalisation(model, IMAGES).channels == 0


def test_an_output_of_the_model_is_not_scaled(tmp_path: Path) -> None:
    model = save(
        """g (float[N,3,32,48] image) => (float[N,8,32,48] a, float[N,4,32,48] y)
           { a = Conv <pads=[1,1,1,1]> (image, w1)  b = Relu (a)  y = Conv (b, w2) }""",
        tmp_path / "model.onnx",
        w1=weights(8, 3, 3, 3), w2=weights(4, 8, 1, 1),
    )  # fmt: skip
    assert scalable(model) == set()


def test_sums_are_scaled_alike_and_concats_part_by_part(tmp_path: Path) -> None:
    model = save(
        """g (float[N,3,32,48] image) => (float[N,4,32,48] y, float[N,2] z)
           { a = Conv <pads=[1,1,1,1]> (image, wa, b8)  c = Conv (image, wc, b8)  s = Add (a, c)
             d = Conv <group=8, pads=[1,1,1,1]> (s, wd)  r = Relu (d)  e = Conv <group=2> (s, we)
             all = Concat <axis=1> (r, e)  y = Conv (all, wy)
             m = GlobalAveragePool (all)  f = Flatten (m)  z = Gemm <transB=1> (f, wz) }""",
        tmp_path / "model.onnx",
        wa=weights(8, 3, 3, 3), wc=weights(8, 3, 1, 1), b8=weights(8), wd=weights(8, 1, 3, 3),
        we=weights(6, 4, 1, 1), wy=weights(4, 14, 1, 1), wz=weights(2, 14),
    )  # fmt: skip
    places = ChannelScales(onnx.load(model)).places
    assert (places["a"] == places["c"]).all() and (places["a"] == places["s"]).all()
    assert (places["all"] == np.concatenate([places["d"], places["e"]])).all()
    assert set(places["f"]) == set(places["all"]) and not set(places["a"]) & set(places["d"])
    apply_equalisation(model, plan_equalisation(model, IMAGES), tmp_path / "equal.onnx")
    assert off(model, tmp_path / "equal.onnx") < 1e-5


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32 - 1))
def test_any_scales_keep_the_function(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = tmp_path_factory.mktemp("any")
    model = chain(folder, "b = Relu (a)")
    found = ChannelScales(onnx.load(model))
    chosen = np.exp(np.random.default_rng(seed).normal(0, 2, found.count))
    chosen[0] = 1
    plan = Equalisation({name: chosen[places] for name, places in found.places.items()}, 0)
    apply_equalisation(model, plan, folder / "equal.onnx")
    assert off(model, folder / "equal.onnx") < 1e-5


def test_a_whole_network_keeps_its_function(tmp_path: Path) -> None:
    export_onnx(tiny_model(), SPEC.example(2), tmp_path / "model.onnx")
    plan = plan_equalisation(tmp_path / "model.onnx", IMAGES)
    assert set(plan.scales) == {"conv2d_5", "relu_1"}  # ReLU6, SiLU, GELU and sigmoid elsewhere
    apply_equalisation(tmp_path / "model.onnx", plan, tmp_path / "equal.onnx")
    assert off(tmp_path / "model.onnx", tmp_path / "equal.onnx") < 1e-5


def test_a_channel_far_larger_than_the_others_costs_int8_nothing_any_more(tmp_path: Path) -> None:
    first, second = weights(8, 3, 3, 3), weights(4, 8, 1, 1)
    first[0] *= 500
    second[:, 0] /= 500
    model = save(
        """g (float[N,3,32,48] image) => (float[N,4,32,48] y)
           { a = Conv <pads=[1,1,1,1]> (image, w1)  b = Relu (a)  y = Conv (b, w2) }""",
        tmp_path / "model.onnx", w1=first, w2=second,
    )  # fmt: skip
    apply_equalisation(model, plan_equalisation(model, IMAGES), tmp_path / "equal.onnx")
    errors = []
    for path in (model, tmp_path / "equal.onnx"):
        plan = plan_quant(path, calibrate(path, lambda: [IMAGES], "minmax"), {})
        emit(path, plan, onnxruntime_x86(), tmp_path / "int8.onnx")
        errors.append(off(model, tmp_path / "int8.onnx"))
    assert errors[0] > 0.1 and errors[1] < 0.03


# -- weights of depth-wise layers whose norms differ


def test_each_channel_of_a_folded_norm_has_its_own_scale(tmp_path: Path) -> None:
    """Batch norms of depth-wise layers spread over decades; folded, a channel keeps 8 bits."""
    exact = weights(8, 1, 3, 3) * np.logspace(-4, 2, 8, dtype=np.float32)[:, None, None, None]
    model = save(
        """g (float[N,3,32,48] image) => (float[N,8,32,48] y)
           { a = Conv (image, w1)  y = Conv <group=8, pads=[1,1,1,1]> (a, w2, b2) }""",
        tmp_path / "model.onnx", w1=weights(8, 3, 1, 1), w2=exact, b2=weights(8),
    )  # fmt: skip
    plan = plan_quant(model, calibrate(model, lambda: [IMAGES], "minmax"), {})
    emit(model, plan, onnxruntime_x86(), tmp_path / "int8.onnx")
    found = constants(onnx.load(tmp_path / "int8.onnx"))
    stored, scales = found["y_weight_quantized"], found["y_weight_scale"]
    error = np.abs(stored * scales.reshape(-1, 1, 1, 1) - exact).max((1, 2, 3))
    peaks = np.abs(exact).max((1, 2, 3))
    assert (error <= 0.5001 * peaks / 127).all() and peaks.max() / peaks.min() > 1e5


# -- bias correction


@pytest.fixture(scope="module")
def clipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantPlan]:
    """A plan that clips its input from one side, which moves the mean of the result."""
    model = chain(tmp_path_factory.mktemp("clipped"), "b = Relu (a)")
    plan = plan_quant(model, calibrate(model, lambda: [IMAGES], "minmax"), {})
    return model, replace(plan, ranges={**plan.ranges, "image": (-4.0, 1.0), "b": (0.0, 1.0)})


@pytest.mark.parametrize("dialect", [onnxruntime_x86(), onnxruntime_arm(), TENSORRT],
                         ids=lambda d: d.name)  # fmt: skip
def test_a_shift_is_the_mean_error_and_the_writer_takes_it_off(
    clipped: tuple[Path, QuantPlan], tmp_path: Path, dialect: Dialect
) -> None:
    model, plan = clipped
    shifts = bias_shifts(model, plan, dialect, IMAGES)
    assert set(shifts) == {"a", "y"} and len(shifts["a"]) == 8

    def mean_errors(used: QuantPlan) -> np.ndarray:
        emit(model, used, dialect, tmp_path / "int8.onnx")
        difference = run(tmp_path / "int8.onnx")["y"] - run(model)["y"]
        return np.abs(difference.mean((0, 2, 3)))

    plain, corrected = mean_errors(plan), mean_errors(replace(plan, shifts=shifts))
    assert corrected.max() < 0.5 * plain.max()
    # A node in fp32 keeps its bias.
    mixed = plan_quant(model, calibrate(model, lambda: [IMAGES], "minmax"), {"y": "fp32"})
    emit(model, replace(mixed, shifts=shifts), dialect, tmp_path / "mixed.onnx")
    kept, own = (constants(onnx.load(path))["b2"] for path in (tmp_path / "mixed.onnx", model))
    assert (kept == own).all()
    assert QuantPlan.from_json(replace(plan, shifts=shifts).to_json()).shifts == shifts


def test_a_lone_layer_is_corrected_exactly(tmp_path: Path) -> None:
    model = save(
        """g (float[N,3,32,48] image) => (float[N,5,16,24] y)
           { y = Conv <pads=[0,0,1,1], strides=[2,2]> (image, w, b) }""",
        tmp_path / "model.onnx", w=weights(5, 3, 3, 3), b=weights(5),
    )  # fmt: skip
    plan = plan_quant(model, calibrate(model, lambda: [IMAGES], "minmax"), {})
    plan = replace(plan, ranges={**plan.ranges, "image": (-4.0, 0.5)})
    plan = replace(plan, shifts=bias_shifts(model, plan, TENSORRT, IMAGES))
    emit(model, plan, TENSORRT, tmp_path / "int8.onnx")
    error = run(tmp_path / "int8.onnx")["y"] - run(model)["y"]
    assert np.abs(error.mean((0, 2, 3))).max() < 1e-5 and np.abs(error).max() > 0.1
