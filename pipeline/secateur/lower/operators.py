"""The operators of an exported model, with the widths that a cut changes.

Read off the parent's ONNX once: its weights carry the names of the layers they are from, and the
widths of everything between are followed through the graph. So the operators of any planned cut
are known before it is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper

from secateur.core.widths import Width
from secateur.devices.operators import OperatorKind, Operators, PlacedOperator

FUSED = frozenset({"Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu", "Tanh"})
WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})
REGROUPED = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
REDUCED = frozenset({"ReduceMean", "ReduceMax", "ReduceSum", "GlobalAveragePool"})
# What the latency table can hold beside weighted operators; the rest counts as a bare node.
MEASURED = frozenset({
    "Add", "AveragePool", "Concat", "Gelu", "GlobalAveragePool", "HardSigmoid", "HardSwish",
    "LayerNormalization", "MaxPool", "Mul", "ReduceMean", "Relu", "Resize", "Sigmoid", "Softmax",
})  # fmt: skip
WEIGHT_PREFIX = "model."  # of export_onnx's wrapper
Dims = tuple[Width, ...]


def list_operators(model: Path, widths: Mapping[str, tuple[Width, Width]]) -> Operators:
    """Return the operators of an exported fp32 model; ``widths`` are its layers' (read, made)."""
    proto = onnx.shape_inference.infer_shapes(onnx.load(model))
    walk = _Walk(proto, widths)
    for node in proto.graph.node:
        walk.step(node)
    return Operators(tuple(walk.timed), walk.bare, tuple(_live_sets(proto, walk)))


class _Walk:
    """Follows widths through the graph in order."""

    def __init__(self, proto: ModelProto, widths: Mapping[str, tuple[Width, Width]]) -> None:
        graph = proto.graph
        self._widths = widths
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        values = (*graph.value_info, *graph.input, *graph.output)
        self.shapes = {v.name: _shape(v) for v in values}
        self.types = {v.name: v.type.tensor_type.elem_type for v in values}
        self.dims: dict[str, Dims] = {v.name: _fixed(self.shapes[v.name]) for v in graph.input}
        self.timed: list[PlacedOperator] = []
        self.bare = 0
        self.inside: set[str] = set()  # tensors that never exist: they stay within a fused kernel
        self._readers: dict[str, list[NodeProto]] = {}
        self._outputs = {v.name for v in graph.output}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._fused: set[str] = set()

    def step(self, node: NodeProto) -> None:
        for name in node.output:
            self.dims[name] = self._dims(node, name)
        if node.name in self._fused or node.op_type in REGROUPED:
            return
        kind = self._kind(node)
        if kind is None:
            self.bare += 1
            return
        read, made = self._channels(node)
        self.timed.append(PlacedOperator(node.name, kind, read, made))

    def _layer(self, node: NodeProto) -> str | None:
        """Return the layer that a node's weight is from, None where it has no weight of a layer."""
        if node.op_type not in WEIGHTED:
            return None
        name = node.input[1].removeprefix(WEIGHT_PREFIX).removesuffix(".weight")
        return name if name in self._widths else None

    def _dims(self, node: NodeProto, name: str) -> Dims:
        shape = self.shapes.get(name, ())
        layer = self._layer(node)
        sources = [(self.dims[i], self.shapes[i]) for i in node.input if i in self.dims]
        plain = list(_fixed(shape))
        if layer is not None:
            plain[_axis(node)] = self._widths[layer][1]
            return tuple(plain)
        if node.op_type == "Concat" and len(shape) > 1 and len(sources) == len(node.input):
            axis = _attributes(node)["axis"] % len(shape)
            for position in range(len(shape)):
                plain[position] = sources[0][0][position]
            plain[axis] = sum((dims[axis] for dims, _ in sources[1:]), sources[0][0][axis])
            return tuple(plain)
        if node.op_type == "Transpose" and sources:
            return tuple(sources[0][0][axis] for axis in _attributes(node)["perm"])
        if node.op_type in REGROUPED | REDUCED and sources and shape:
            return _regrouped(*sources[0], shape)
        for dims, other in sources:
            for back in range(1, min(len(shape), len(other)) + 1):
                if other[-back] == shape[-back] and dims[-back].of:
                    plain[-back] = dims[-back]
        return tuple(plain)

    def _channels(self, node: NodeProto) -> tuple[Width, Width]:
        layer = self._layer(node)
        out = self.dims[node.output[0]]
        made = out[_axis(node)]
        if layer is not None and _groups(node, self.constants) != 0:
            return self._widths[layer][0], made
        return made, made

    def _kind(self, node: NodeProto) -> OperatorKind | None:
        weighted = self._layer(node) is not None
        if not weighted and node.op_type not in MEASURED:
            return None
        source, shape = self.shapes.get(node.input[0], ()), self.shapes.get(node.output[0], ())
        if len(source) < 2 or len(shape) < 2 or self.types.get(node.output[0]) != 1:
            return None
        attributes = _attributes(node)
        (height, width), (out_height, out_width) = _positions(node, source), _positions(node, shape)
        detail = ""
        if node.op_type == "Conv":
            detail = self._fuse(node)
        elif node.op_type == "Resize":
            detail = bytes(attributes.get("mode", b"nearest")).decode()
        elif node.op_type in ("Add", "Mul"):
            others = [self.shapes.get(name, ()) for name in node.input]
            detail = "broadcast" if any(other != shape for other in others) else ""
        return OperatorKind(
            node.op_type, height, width, out_height, out_width,
            tuple(attributes.get("kernel_shape", (1, 1)))[:2] or (1, 1),
            tuple(attributes.get("strides", (1, 1)))[:2] or (1, 1),
            len(node.input) if node.op_type == "Concat" else _groups(node, self.constants),
            detail,
        )  # fmt: skip

    def _fuse(self, node: NodeProto) -> str:
        """Return the activation that runs within a convolution, or ""."""
        name = node.output[0]
        readers = self._readers.get(name, [])
        if len(readers) != 1 or name in self._outputs or readers[0].op_type not in FUSED:
            return ""
        self._fused.add(readers[0].name)
        self.inside.add(name)
        return str(readers[0].op_type)


def _shape(value: Any) -> tuple[int, ...]:
    """Return a tensor's shape for one image; an unknown dimension counts as 1."""
    return tuple(d.dim_value or 1 for d in value.type.tensor_type.shape.dim)


def _fixed(shape: Sequence[int]) -> Dims:
    return tuple(Width(size) for size in shape)


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _axis(node: NodeProto) -> int:
    """Return where an operator's output has its channels."""
    return -1 if node.op_type in ("Gemm", "MatMul", "LayerNormalization", "Softmax", "Gelu") else 1


def _groups(node: NodeProto, constants: Mapping[str, Any]) -> int:
    groups = int(_attributes(node).get("group", 1))
    depthwise = groups > 1 and groups == constants[node.input[1]].dims[0]
    return 0 if depthwise else groups


def _positions(node: NodeProto, shape: Sequence[int]) -> tuple[int, int]:
    """Return height and width, or the rows of a linear layer and 1."""
    if len(shape) == 4 and _axis(node) == 1:
        return shape[2], shape[3]
    return int(np.prod(shape)) // shape[_axis(node)], 1


def _regrouped(dims: Dims, before: Sequence[int], after: Sequence[int]) -> Dims:
    """Carry widths through a reshape: neighbouring sizes with equal products belong together."""
    result = list(_fixed(after))
    i = j = 0
    while i < len(before) and j < len(after):
        a, b, left, right = i, j, before[i], after[j]
        while left != right and (i + 1 < len(before) or j + 1 < len(after)):
            if left < right and i + 1 < len(before):
                i += 1
                left *= before[i]
            elif j + 1 < len(after):
                j += 1
                right *= after[j]
            else:
                break
        cut = [k for k in range(a, i + 1) if dims[k].of]
        if len(cut) == 1:
            same = [k for k in range(b, j + 1) if after[k] == before[cut[0]]]
            if len(same) == 1:
                result[same[0]] = dims[cut[0]]
            elif b == j and left == right:
                result[b] = dims[cut[0]] * (right // before[cut[0]])
        i, j = i + 1, j + 1
    return tuple(result)


def _live_sets(proto: ModelProto, walk: _Walk) -> list[tuple[tuple[Width, Width, int], ...]]:
    """Return what is alive while each node runs; inside a fused kernel nothing is stored."""
    last = {name: step for step, node in enumerate(proto.graph.node) for name in node.input}
    steps = len(proto.graph.node)
    last.update({value.name: steps for value in proto.graph.output})
    born = {value.name: 0 for value in proto.graph.input if value.name not in walk.constants}
    sets = []
    for step, node in enumerate(proto.graph.node):
        born.update(dict.fromkeys(node.output, step))
        alive = [n for n in born if last.get(n, -1) >= step and n not in walk.inside]
        sets.append(tuple(_bytes(walk.dims[name]) for name in alive if name in walk.dims))
    return sets


def _bytes(dims: Dims) -> tuple[Width, Width, int]:
    """Return a tensor's size as two widths and the bytes of each of their products (fp32)."""
    cut = [dim for dim in dims if dim.of][:2]
    rest = [dim for dim in dims if not any(dim is each for each in cut)]
    size = 4 * int(np.prod([dim.fixed for dim in rest], dtype=np.int64))
    pair = [*cut, Width(1), Width(1)][:2]
    return pair[0], pair[1], size
