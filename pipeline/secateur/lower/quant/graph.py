"""Who makes and who reads each tensor of an ONNX graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from secateur.core.errors import BuildError

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
