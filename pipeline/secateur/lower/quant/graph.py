"""Who makes and who reads each tensor of an ONNX graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx.shape_inference
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from secateur.core.errors import BuildError

Values = NDArray[np.floating[Any]]
WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})
FUSED_ACTIVATIONS = frozenset({"Relu", "Clip"})  # a runtime clamps while it requantises
SAME_GRID = frozenset({"MaxPool", "Resize"})  # their results lie on their input's grid or within it


class Graph:
    """A view of the main graph of ``model``; it does not follow later changes of it.

    Raises:
        BuildError: a node has no name, or two have the same.
    """

    def __init__(self, model: ModelProto) -> None:
        self.nodes: dict[str, NodeProto] = {}
        self.producer: dict[str, NodeProto] = {}
        self.consumers: dict[str, list[NodeProto]] = defaultdict(list)
        self.outputs = {value.name for value in model.graph.output}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.inputs = [
            value.name for value in model.graph.input if value.name not in self.constants
        ]
        for node in model.graph.node:
            if not node.name or node.name in self.nodes:
                raise BuildError(
                    f"a {node.op_type} node has the name {node.name!r}, which is empty or that of "
                    "another node",
                    hint="export the model with secateur: its nodes have names of their own",
                )
            self.nodes[node.name] = node
            self.producer.update({name: node for name in node.output if name})
            for name in node.input:
                if name:
                    self.consumers[name].append(node)
        self.captured = _read_by(  # by the body of an If or a Loop
            [inner for node in model.graph.node for a in node.attribute for inner in a.g.node]
        )

    def array(self, name: str) -> NDArray[np.float32]:
        """Return a constant's values."""
        return np.asarray(numpy_helper.to_array(self.constants[name]), dtype=np.float32)

    def activations(self, node: NodeProto) -> list[str]:
        """Return the tensors a node computes on that are not constants, each once.

        Only those that are quantised count: not the bounds of a Clip or the sizes of a Resize.
        """
        count = {"Resize": 1, "Clip": 1}
        names = list(node.input)[: count.get(node.op_type, len(node.input))]
        return list(dict.fromkeys(name for name in names if name and name not in self.constants))

    def results(self) -> set[str]:
        """Return the outputs and the tensors that only move into one."""
        found, waiting = set(self.outputs), list(self.outputs)
        while waiting:
            node = self.producer.get(waiting.pop())
            if node is not None and node.op_type in SAME_GRID and node.input[0] not in found:
                found.add(node.input[0])
                waiting.append(node.input[0])
        return found

    def only_reader(self, name: str) -> NodeProto | None:
        """Return the one node that reads a tensor, None when there are others or outputs."""
        readers = self.consumers[name]
        return readers[0] if len(readers) == 1 and name not in self.outputs else None


def tensor_shapes(model: ModelProto) -> dict[str, tuple[int, ...]]:
    """Return each tensor's shape for a batch of one."""
    single = ModelProto()
    single.CopyFrom(model)
    for value in single.graph.input:
        for dim in value.type.tensor_type.shape.dim[:1]:
            dim.dim_value = 1
    # Stored shapes have the open batch in them, and hide what follows from a batch of one.
    del single.graph.value_info[:]
    for value in single.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(single, data_prop=True).graph
    stored = [*model.graph.value_info, *model.graph.output]
    return {
        value.name: tuple(dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim)
        for value in [*stored, *graph.input, *graph.value_info, *graph.output]
    }


def replace_constant(model: ModelProto, node: NodeProto, position: int, values: Values) -> None:
    """Give one node another constant as input ``position``; other readers keep the old one."""
    name = f"{node.name}_input_{position}"
    replaced = numpy_helper.from_array(np.ascontiguousarray(values, dtype=np.float32), name)
    node.input[position] = name
    old = [tensor for tensor in model.graph.initializer if tensor.name == name]
    if old:
        old[0].CopyFrom(replaced)
    else:
        model.graph.initializer.append(replaced)


def replace_nodes(model: ModelProto, nodes: Sequence[NodeProto]) -> None:
    """Give ``model`` other nodes, without the constants and types that no longer belong to any."""
    read = _read_by(nodes) | {value.name for value in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    for field, values in ((model.graph.node, nodes), (model.graph.initializer, kept)):
        del field[:]
        field.extend(values)
    del model.graph.value_info[:]


def _read_by(nodes: Iterable[NodeProto]) -> set[str]:
    """Return the tensors that nodes read, and the bodies of an If or a Loop among them."""
    read = set()
    for node in nodes:
        read |= set(node.input)
        for attribute in node.attribute:
            read |= _read_by(attribute.g.node)
    return read
