"""The operators of an exported model, with the widths that a cut changes.

Read off the parent's ONNX once: its weights carry the names of the layers they are from, and the
widths of everything between are followed through the graph. So the operators of any planned cut
are known before it is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from secateur.core.widths import Width
from secateur.devices.operators import OperatorKind, Operators, PlacedOperator
from secateur.lower.export import MODULE_KEY

FUSED = frozenset({"Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu", "Tanh"})
WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})
REGROUPED = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
REDUCED = frozenset({"ReduceMean", "ReduceMax", "ReduceSum", "GlobalAveragePool"})
QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
VALUES = frozenset({TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8, TensorProto.FLOAT16})
WEIGHT_PREFIX, NETWORK_PREFIX = "model.", "network."  # of export_onnx's wrapper, of ours
Dims = tuple[Width, ...]


def list_operators(model: Path, widths: Mapping[str, tuple[Width, Width]]) -> Operators:
    """Return the operators of an exported model, in fp32 or with Q/DQ nodes, for one image.

    ``widths`` are its layers' (read, made).
    """
    proto, walk = walk_widths(model, widths)
    live = tuple(_live_sets(proto, walk))
    return Operators(tuple(walk.timed), walk.bare, live, walk.places)


def placed_as(operators: Operators, shorter: Path, of_whole: Operators, whole: Path) -> Operators:
    """Return the ``operators`` of ``shorter`` at the places that they have in ``whole``.

    ``shorter`` is the network of ``whole`` without some blocks: what is measured of an operator in
    the one holds in the other, but an export numbers the nodes of each anew.
    """
    modules, whole_modules = _modules(shorter), _modules(whole)
    there = [
        ((replace(each.kind, place=""), whole_modules.get(each.name)), each.kind)
        for each in of_whole.timed
    ]
    placed, at = [], 0
    for each in operators.timed:
        wanted = replace(each.kind, place=""), modules.get(each.name)
        found = next((n for n in range(at, len(there)) if there[n][0] == wanted), None)
        if found is not None:
            each, at = replace(each, kind=there[found][1]), found + 1
        placed.append(each)
    return replace(operators, timed=tuple(placed))


def _modules(model: Path) -> dict[str, str]:
    """Return each node's torch module, "" where unknown."""
    return {
        node.name: next((str(m.value) for m in node.metadata_props if m.key == MODULE_KEY), "")
        for node in onnx.load(model, load_external_data=False).graph.node
    }


def walk_widths(
    model: Path, widths: Mapping[str, tuple[Width, Width]]
) -> tuple[ModelProto, WidthWalk]:
    """Return the model for a batch of one, and the widths of all its tensors."""
    proto = onnx.load(model)
    for value in proto.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del proto.graph.value_info[:]
    proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    walk = WidthWalk(proto, widths)
    for node in proto.graph.node:
        walk.step(node)
    return proto, walk


class WidthWalk:
    """Follows widths through the graph in order.

    ``dims`` are every tensor's, ``timed`` and ``places`` as in ``Operators``.
    """

    def __init__(self, proto: ModelProto, widths: Mapping[str, tuple[Width, Width]]) -> None:
        graph = proto.graph
        self._widths = widths
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        values = (*graph.value_info, *graph.input, *graph.output)
        self.shapes = {v.name: _shape(v) for v in values}
        self.types = {v.name: v.type.tensor_type.elem_type for v in values}
        self.dims: dict[str, Dims] = {v.name: _fixed(self.shapes[v.name]) for v in graph.input}
        self.timed: list[PlacedOperator] = []
        self.places: dict[str, str] = {}
        self.bare = 0
        self.inside: set[str] = set()  # tensors that never exist: they stay within a fused kernel
        self.producer = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        self._outputs = {v.name for v in graph.output}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._fused: set[str] = set()

    def step(self, node: NodeProto) -> None:
        """Add one node."""
        for name in node.output:
            self.dims[name] = self._dims(node, name)
        if node.op_type == "Concat":
            self._pass_back(node)
        if node.name in self._fused or node.op_type in REGROUPED:
            return
        if not self._is_timed(node):
            self.bare += 1
            return
        detail = self._detail(node)
        self.places.update(dict.fromkeys((node.name, *node.output), node.name))
        read, made = self._channels(node)
        self.timed.append(PlacedOperator(node.name, self._kind(node, detail), read, made))

    def layer(self, node: NodeProto) -> str | None:
        """Return the layer that a node's weight is from, None where it has no weight of a layer."""
        if node.op_type not in WEIGHTED:
            return None
        module = next((m.value for m in node.metadata_props if m.key == MODULE_KEY), "")
        weight = node.input[1].removeprefix(WEIGHT_PREFIX).removesuffix(".weight")
        named = (weight, f"{NETWORK_PREFIX}{module}")
        return next((name for name in named if name in self._widths), None)

    def _dims(self, node: NodeProto, name: str) -> Dims:
        shape = self.shapes.get(name, ())
        layer = self.layer(node)
        sources = [(self.dims[i], self.shapes[i]) for i in node.input if i in self.shapes]
        plain = list(_fixed(shape))
        if layer is not None:
            plain[channel_axis(node)] = self._widths[layer][1]
            return tuple(plain)
        if node.op_type == "Concat" and len(shape) > 1 and len(sources) == len(node.input):
            axis = attributes_of(node)["axis"] % len(shape)
            for position in range(len(shape)):
                plain[position] = _cut_one([dims[position] for dims, _ in sources])
            plain[axis] = sum((dims[axis] for dims, _ in sources[1:]), sources[0][0][axis])
            return tuple(plain)
        if node.op_type == "Transpose" and sources:
            return tuple(sources[0][0][axis] for axis in attributes_of(node)["perm"])
        if node.op_type in REGROUPED | REDUCED and sources and shape:
            return _regrouped(*sources[0], shape)
        for dims, other in sources:
            for back in range(1, min(len(shape), len(other)) + 1):
                if other[-back] == shape[-back] and dims[-back].of:
                    plain[-back] = dims[-back]
        return tuple(plain)

    def _pass_back(self, concat: NodeProto) -> None:
        """Give what joins a cut tensor its widths, such as a class token that joins patches."""
        dims = self.dims[concat.output[0]]
        axis = attributes_of(concat)["axis"] % max(1, len(dims))
        for name in concat.input:
            own = self.dims.get(name, ())
            if len(own) != len(dims) or len(dims) < 2:
                continue
            pairs = enumerate(zip(own, dims, strict=True))
            joined = tuple(mine if place == axis else other for place, (mine, other) in pairs)
            while joined != self.dims[name]:
                self.dims[name] = joined
                maker = self.producer.get(name)
                if maker is not None and maker.op_type in QDQ:
                    name = maker.input[0]

    def _channels(self, node: NodeProto) -> tuple[Width, Width]:
        layer, out = self.layer(node), self.dims[node.output[0]]
        if layer is not None:
            read, made = self._widths[layer][0], out[channel_axis(node)]
            return (made if self._groups(node) == 0 else read), made
        inputs = [dim for name in node.input for dim in self.dims.get(name, ())]
        cut = [dim for dim in (*out, *inputs) if dim.of]
        made = cut[0] if cut else out[channel_axis(node)] if len(out) > 1 else Width(1)
        return made, made

    def _is_timed(self, node: NodeProto) -> bool:
        if self.layer(node) is not None:
            return True
        if self.types.get(node.output[0]) not in VALUES:
            return False
        names = (*node.input, *node.output)
        return any(dim.of for name in names for dim in self.dims.get(name, ()))

    def _kind(self, node: NodeProto, detail: str) -> OperatorKind:
        source, shape = self.shapes.get(node.input[0], ()), self.shapes.get(node.output[0], ())
        attributes = attributes_of(node)
        (height, width), (out_height, out_width) = _positions(node, source), _positions(node, shape)
        maker = self.producer.get(node.input[0])
        integers = node.op_type in QDQ or (maker is not None and maker.op_type in QDQ)
        return OperatorKind(
            node.op_type, height, width, out_height, out_width,
            tuple(attributes.get("kernel_shape", (1, 1)))[:2] or (1, 1),
            tuple(attributes.get("strides", (1, 1)))[:2] or (1, 1),
            len(node.input) if node.op_type == "Concat" else self._groups(node),
            detail, "int8" if integers else "fp32", node.name,
        )  # fmt: skip

    def _detail(self, node: NodeProto) -> str:
        if node.op_type == "Conv":
            return self._fuse(node)
        if node.op_type == "Resize":
            return bytes(attributes_of(node).get("mode", b"nearest")).decode()
        if node.op_type in ("Add", "Mul"):
            shape = self.shapes.get(node.output[0], ())
            others = [self.shapes.get(name, ()) for name in node.input]
            return "broadcast" if any(other != shape for other in others) else ""
        return ""

    def _groups(self, node: NodeProto) -> int:
        """Return the groups of a convolution, 0 for a depth-wise one."""
        groups = int(attributes_of(node).get("group", 1))
        return 0 if groups > 1 and groups == self.shapes[node.output[0]][1] else groups

    def _fuse(self, node: NodeProto) -> str:
        """Return the activation that runs within a convolution, or ""."""
        name = node.output[0]
        readers = self._readers.get(name, [])
        if len(readers) != 1 or name in self._outputs or readers[0].op_type not in FUSED:
            return ""
        self._fused.add(readers[0].name)
        self.inside.add(name)
        self.places.update(dict.fromkeys((readers[0].name, *readers[0].output), node.name))
        return str(readers[0].op_type)


def _shape(value: Any) -> tuple[int, ...]:
    """Return a tensor's shape for one image; an unknown dimension counts as 1."""
    return tuple(d.dim_value or 1 for d in value.type.tensor_type.shape.dim)


def _fixed(shape: Sequence[int]) -> Dims:
    return tuple(Width(size) for size in shape)


def _cut_one(dims: Sequence[Width]) -> Width:
    return next((dim for dim in dims if dim.of), dims[0])


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Return a node's attributes as Python values."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def channel_axis(node: NodeProto) -> int:
    """Return where an operator's output has its channels."""
    return -1 if node.op_type in ("Gemm", "MatMul", "LayerNormalization", "Softmax", "Gelu") else 1


def _positions(node: NodeProto, shape: Sequence[int]) -> tuple[int, int]:
    """Return height and width, or the rows of a linear layer and 1."""
    if len(shape) == 4 and channel_axis(node) == 1:
        return shape[2], shape[3]
    return (int(np.prod(shape)) // shape[-1], 1) if shape else (1, 1)


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
            elif a == i:
                _divide(dims[a], after, range(b, j + 1), result)
        i, j = i + 1, j + 1
    return tuple(result)


def _divide(whole: Width, after: Sequence[int], places: range, result: list[Width]) -> None:
    """Give one of the sizes that ``whole`` falls apart into its groups: the least that can be cut.

    Of (query | key | value, heads, a head's channels) that is the heads.
    """
    for place in sorted(places, key=lambda at: (after[at], -at)):
        rest = int(np.prod([after[other] for other in places if other != place]))
        parts = (whole.fixed, *(times for _, times in whole.of))
        if after[place] > 1 and all(part % rest == 0 for part in parts):
            result[place] = Width(whole.fixed // rest, tuple((g, t // rest) for g, t in whole.of))
            return


def _live_sets(proto: ModelProto, walk: WidthWalk) -> list[tuple[tuple[Width, Width, int], ...]]:
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
