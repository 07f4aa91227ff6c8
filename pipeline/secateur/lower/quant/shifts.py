"""Bias correction: what rounding adds to a layer's mean output, per channel, is taken off its bias.

Nagel et al. 2019 (arXiv 1906.04721, section 4.2) derive it from batch-norm statistics; here it is
measured on unlabelled images, inputs as the fp32 model has them. So a layer's shift does not depend
on the precision of the others, and the guard may move each of them as it likes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import NodeProto, helper
from torch import Tensor
from torch.nn import functional

from secateur.lower.quant.activations import Images, watch
from secateur.lower.quant.calibrators import Range
from secateur.lower.quant.dialect import Dialect
from secateur.lower.quant.graph import Graph
from secateur.lower.quant.plan import QuantPlan
from secateur.lower.quant.weights import quantise_weights

CORRECTED = frozenset({"Conv", "Gemm"})


def bias_shifts(
    model: Path, plan: QuantPlan, dialect: Dialect, images: Images
) -> dict[str, tuple[float, ...]]:
    """Return, per int8 node of ``plan`` with a bias, the mean error of each output channel.

    ``images`` (N, C, H, W) run one by one through the fp32 ``model``.

    Raises:
        CalibrationError: the model cannot run them.
    """
    graph = Graph(onnx.load(model))
    layers = {
        name: _Layer(graph, node, plan, dialect)
        for name, node in graph.nodes.items()
        if plan.precisions[name] == "int8" and node.op_type in CORRECTED
        and len(node.input) > 2 and node.input[2]
    }  # fmt: skip
    for activations in watch(model, images, {layer.source for layer in layers.values()}):
        for layer in layers.values():
            layer.add(activations[layer.source])
    return {name: layer.mean() for name, layer in layers.items()}


class _Layer:
    """One layer's mean error, over the images added so far."""

    def __init__(self, graph: Graph, node: NodeProto, plan: QuantPlan, dialect: Dialect) -> None:
        self.source = node.input[0]
        self._node = node
        self._fp16 = plan.carrier == "fp16"
        self._limits, self._dialect = plan.ranges[self.source], dialect
        exact = graph.array(node.input[1])
        scale = dialect.grid(self._limits, fp16=self._fp16)[0]
        whole = quantise_weights(node, exact, graph.array(node.input[2]), scale, dialect,
                                 fp16=self._fp16)  # fmt: skip
        self._exact, self._rounded = (
            torch.from_numpy(exact.copy()),
            torch.from_numpy(whole.floats()),
        )
        self._sums: NDArray[np.float64] = np.zeros(len(whole.scales))
        self._images = 0

    def add(self, values: Images) -> None:
        rounded = on_grid(values, self._limits, self._dialect, fp16=self._fp16)
        got = run_layer(self._node, torch.from_numpy(rounded), self._rounded)
        wanted = run_layer(self._node, torch.from_numpy(values), self._exact)
        error = (got - wanted).numpy()
        self._sums += error.mean(axis=(0, *range(2, error.ndim)), dtype=np.float64)
        self._images += 1

    def mean(self) -> tuple[float, ...]:
        return tuple(float(value) for value in self._sums / max(self._images, 1))


def on_grid(values: Images, limits: Range, dialect: Dialect, *, fp16: bool = False) -> Images:
    """Round ``values`` as QuantizeLinear and DequantizeLinear on the dialect's grid do."""
    scale, zero = dialect.grid(limits, fp16=fp16)
    ends = np.iinfo(zero.dtype)
    steps = np.clip(np.rint(values / np.float32(scale)) + int(zero), ends.min, ends.max)
    return np.asarray((steps - int(zero)) * np.float32(scale), dtype=np.float32)


def run_layer(node: NodeProto, values: Tensor, weights: Tensor) -> Tensor:
    """Return what a Conv or Gemm gives without its bias."""
    options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Gemm":
        return values @ (weights.T if options.get("transB", 0) else weights)
    return convolution(values, weights, None, options)


def convolution(
    values: Tensor, weights: Tensor, bias: Tensor | None, options: dict[str, object]
) -> Tensor:
    """Return ONNX's Conv (any rank, explicit padding, which need not be the same on both sides)."""
    rank = values.dim() - 2
    pads = list(options.get("pads", [0] * 2 * rank))  # type: ignore[call-overload]
    before, after = pads[:rank], pads[rank:]
    if before != after:
        both = [side for pair in zip(before[::-1], after[::-1], strict=True) for side in pair]
        values, before = functional.pad(values, both), [0] * rank
    ones = [1] * rank
    run = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[rank]
    return run(values, weights, bias, options.get("strides", ones), before,  # type: ignore
               options.get("dilations", ones), options.get("group", 1))  # fmt: skip
