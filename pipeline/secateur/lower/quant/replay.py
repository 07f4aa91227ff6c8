"""A quantised ONNX graph as a torch module that can be trained: the same grids, rounded straight.

Own code on torch's ``fake_quantize`` operators, because no library follows a plan that is per node
of the ONNX file: torchao's pt2e and modelopt put their quantisers where torch modules are, with
ranges and schemes of their own (no U8 results of sums, no S8 without zero points beside them), and
what they export is another graph than the guard judged; onnx2torch 1.5.15 ends at opset 13's Resize
and ReduceMean, our files are of opset 20.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, helper, numpy_helper
from torch import Tensor, nn

from secateur.core.files import atomic_path
from secateur.lower.quant.dialect import BIAS_LIMIT, SMALLEST_FP16_SCALE, SMALLEST_SCALE, Dialect
from secateur.lower.quant.graph import WEIGHTED, Graph, replace_constant, replace_nodes
from secateur.lower.quant.plan import QuantPlan
from secateur.lower.quant.replay_ops import check_operators, needed, run_operator
from secateur.lower.quant.weights import channel_axis
from secateur.lower.quant.writer import BIAS, WEIGHT, quantised_graph


@dataclass(frozen=True)
class _Step:
    """One node, freed of its proto. ``layer`` is set for one with weights of its own."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: Mapping[str, Any]
    layer: _Layer | None = None


@dataclass(frozen=True)
class _Layer:
    """Where a layer's weights are; ``axis`` of their channels, ``input_scale`` where in int8."""

    weight: str
    bias: str | None
    axis: int
    int8: bool
    input_scale: float


class Replay(nn.Module):
    """``model`` under ``plan`` in the words of ``dialect``; ``forward`` gives ``{output: tensor}``.

    Parameters are the weights and biases of its convolutions and products. Their scales follow
    them, as the writer's do; the grids of activations are the plan's. Every rounding passes
    gradients as if it were not there, and stops them beyond the ends of its grid. Floats are fp32.

    Raises:
        BuildError: the graph has an operator that is not known here.
        CalibrationError: the plan is for another model.
    """

    def __init__(self, model: Path, plan: QuantPlan, dialect: Dialect) -> None:
        super().__init__()
        self._dialect = dialect
        self._fp16 = plan.carrier == "fp16"
        source = Graph(onnx.load(model))
        graph = Graph(quantised_graph(model, plan, dialect))
        check_operators([node.op_type for node in source.nodes.values()])
        self.learned = nn.ParameterDict()
        self._outputs = tuple(value.name for value in onnx.load(model).graph.output)
        self._input = graph.inputs[0]
        self._constants: dict[str, str] = {}
        stored = self._keep_constants(graph)
        self._gains = {  # of what is read as if its steps were finer than they were written
            node.name: self._scale_of(graph, node.output[0]) / self._scale_of(graph, node.input[0])
            for node in graph.nodes.values()
            if node.op_type == "DequantizeLinear" and node.name not in stored
        }
        self._steps = tuple(
            _Step(
                node.name, node.op_type, tuple(node.input), tuple(node.output),
                {a.name: helper.get_attribute_value(a) for a in node.attribute},
                self._layer(node, source.nodes[node.name], source, graph)
                if node.op_type in WEIGHTED else None,
            )
            for node in graph.nodes.values() if node.name not in stored
        )  # fmt: skip

    def _keep_constants(self, graph: Graph) -> set[str]:
        """Keep constants as they are, and those in integers as what they stand for, too.

        Returns the nodes that dequantise constants.
        """
        values = {name: numpy_helper.to_array(tensor) for name, tensor in graph.constants.items()}
        found = set()
        for node in graph.nodes.values():
            if node.op_type == "DequantizeLinear" and node.input[0] in graph.constants:
                found.add(node.name)
                if not any(r.op_type in WEIGHTED for r in graph.consumers[node.output[0]]):
                    steps, scale, zero = map(graph.array, node.input)
                    values[node.output[0]] = np.asarray((steps - zero) * scale)
        for number, (name, array) in enumerate(values.items()):
            self._constants[name] = f"constant_{number}"
            self.register_buffer(f"constant_{number}", torch.from_numpy(array.copy()))
        return found

    def _layer(
        self, node: NodeProto, original: NodeProto, source: Graph, graph: Graph
    ) -> _Layer | None:
        """Take a layer's weights from ``source`` and its bias, shifted, from ``graph``."""
        if original.input[1] not in source.constants:
            return None  # a product of two activations
        key = node.name.replace(".", "/")
        int8 = node.input[1] == f"{node.name}{WEIGHT}_dequantized"
        scale = self._scale_of(graph, node.input[0]) if int8 else 1.0
        self._learn(f"{key}{WEIGHT}", source.array(original.input[1]))
        bias = None
        if len(original.input) > 2 and original.input[2] in source.constants:
            bias = f"{key}{BIAS}"
            shifted = node.input[2] if node.input[2] in graph.constants else original.input[2]
            self._learn(bias, (graph if shifted in graph.constants else source).array(shifted))
            if int8 and node.input[2] == f"{node.name}{BIAS}_dequantized":
                steps = graph.array(f"{node.name}{BIAS}_scale")
                stored = graph.array(f"{node.name}{BIAS}_quantized")
                self._learn(bias, stored * steps)
        return _Layer(f"{key}{WEIGHT}", bias, channel_axis(node), int8, scale)

    def _learn(self, key: str, values: Any) -> None:
        self.learned[key] = nn.Parameter(torch.from_numpy(np.array(values, dtype=np.float32)))

    @staticmethod
    def _scale_of(graph: Graph, name: str) -> float:
        """Return the scale of the grid that a quantised or dequantised tensor lies on."""
        return float(graph.array(graph.producer[name].input[1]))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return each output for (N, C, H, W) images."""
        known: dict[str, Tensor] = {name: getattr(self, buffer)
                                    for name, buffer in self._constants.items()}  # fmt: skip
        known[self._input] = image
        last = {name: step.name for step in self._steps for name in step.inputs}
        for step in self._steps:
            inputs = [known.get(name) if name else None for name in step.inputs]
            made = self._run(step, inputs)
            known.update(zip(step.outputs, made, strict=False))
            for name in step.inputs:  # memory of what nothing reads any more
                if last.get(name) == step.name and name not in self._outputs:
                    known.pop(name, None)
        return {name: known[name] for name in self._outputs}

    def _run(self, step: _Step, inputs: list[Tensor | None]) -> list[Tensor]:
        if step.operator == "QuantizeLinear":
            image, scale, zero = map(needed, inputs)
            ends = torch.iinfo(zero.dtype)
            return [torch.fake_quantize_per_tensor_affine(
                image, float(scale), int(zero), ends.min, ends.max)]  # fmt: skip
        if step.operator == "DequantizeLinear":
            rounded, gain = needed(inputs[0]), self._gains[step.name]
            return [rounded if gain == 1 else rounded * gain]
        if step.layer is not None:
            inputs[1] = self._weights(step.layer)
            if step.layer.bias is not None:
                inputs[2] = self.learned[step.layer.bias]
        return run_operator(step.operator, inputs, step.options)

    def _weights(self, layer: _Layer) -> Tensor:
        weights: Tensor = self.learned[layer.weight]
        if not layer.int8:
            return weights
        limit = self._dialect.weight_limit
        channels = weights.detach().movedim(layer.axis, 0).flatten(1).abs().amax(1)
        scales = channels / limit
        if layer.bias is not None and self._dialect.int32_bias:
            least = self.learned[layer.bias].detach().abs() / (layer.input_scale * BIAS_LIMIT)
            scales = torch.maximum(scales, least)
        if self._fp16:
            scales = scales.clamp(min=SMALLEST_FP16_SCALE).half().float()
        else:
            scales = torch.where(scales > SMALLEST_SCALE, scales, torch.ones_like(scales))
        zeros = torch.zeros_like(scales, dtype=torch.int32)
        rounded: Tensor = torch.fake_quantize_per_channel_affine(
            weights, scales, zeros, layer.axis, -limit, limit
        )
        return rounded


def write_learned(model: Path, replay: Replay, out: Path) -> None:
    """Write ``model`` with the weights that ``replay``, made from it, has now."""
    proto = onnx.load(model)
    for node in proto.graph.node:
        key = node.name.replace(".", "/")
        for position, part in ((1, WEIGHT), (2, BIAS)):
            if f"{key}{part}" in replay.learned:
                values = replay.learned[f"{key}{part}"].detach().cpu().contiguous().numpy()
                replace_constant(proto, node, position, values)
    replace_nodes(proto, list(proto.graph.node))
    with atomic_path(out) as temporary:
        onnx.save(proto, temporary)
