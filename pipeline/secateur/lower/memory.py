"""What an exported model needs to run: its weights, and the most activations alive at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto

from secateur.lower.operators import FUSED, REGROUPED


@dataclass(frozen=True)
class ModelMemory:
    """Bytes of one image; ``activations`` is None where a tensor's shape is not known.

    They are the graph's, as a runtime with fused kernels may store it: an activation within a
    convolution, a reshape or the float form of an integer tensor takes nothing of its own. What a
    runtime allocates beside (buffers, other layouts of weights) is in no file.
    """

    weights: int
    activations: int | None


def model_memory(model: Path) -> ModelMemory:
    """Return the memory that an ONNX file of any precision asks for, for one image."""
    proto = onnx.load(model)
    for value in proto.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del proto.graph.value_info[:]
    proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    weights = sum(_size(t.data_type, t.dims) for t in proto.graph.initializer)
    return ModelMemory(weights, _peak(proto))


def _peak(proto: ModelProto) -> int | None:
    graph = proto.graph
    constants = {tensor.name for tensor in graph.initializer}
    values = (*graph.value_info, *graph.input, *graph.output)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    sizes = {v.name: _size(v.type.tensor_type.elem_type, shapes[v.name]) for v in values}
    stored = _stored_as(list(graph.node), {v.name for v in graph.output})
    births: dict[str, int] = {v.name: 0 for v in graph.input if v.name not in constants}
    deaths: dict[str, int] = {}
    least: dict[str, int] = {}
    for step, node in enumerate(graph.node):
        if all(name in constants for name in node.input):
            constants.update(node.output)  # of weights alone: worked out once
            continue
        for name in (name for name in (*node.input, *node.output) if name not in constants):
            if not name:
                continue
            if not sizes.get(name):
                return None
            root = stored.get(name, name)
            births.setdefault(root, step)
            deaths[root] = step
            least[root] = min(sizes[name], least.get(root, sizes[name]))
    deaths.update({stored.get(v.name, v.name): len(graph.node) for v in graph.output})
    return max(
        sum(least[root] for root in least if births[root] <= step <= deaths[root])
        for step in range(len(graph.node))
    )


def _stored_as(nodes: list[NodeProto], outputs: set[str]) -> dict[str, str]:
    """Return the tensor that stands for each one that shares its memory."""
    readers: dict[str, int] = {}
    for node in nodes:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    roots: dict[str, str] = {}
    for node in nodes:
        for first, second in _shared(node, readers, outputs):
            old, new = roots.get(second, second), roots.get(first, first)
            roots.update({name: new for name, root in roots.items() if root == old})
            roots[first] = roots[second] = roots[old] = new
    return roots


def _shared(
    node: NodeProto, readers: dict[str, int], outputs: set[str]
) -> Iterator[tuple[str, str]]:
    """Yield (what a node reads, what it gives) where the two need be stored only once."""
    if not node.input:
        return
    inside = readers[node.input[0]] == 1 and node.input[0] not in outputs
    in_place = node.op_type in FUSED or node.op_type == "QuantizeLinear"
    if (in_place and inside) or node.op_type in REGROUPED or node.op_type == "DequantizeLinear":
        yield node.input[0], node.output[0]


def _size(kind: int, shape: object) -> int:
    """Return a tensor's bytes; 0 where a dimension is not known."""
    item = onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize if kind else 0
    return int(np.prod(np.array(shape, dtype=np.int64), dtype=np.int64)) * int(item)
