"""Whether an exported ONNX file is 2:4 sparse where TensorRT could use it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from secateur.core.errors import BuildError
from secateur.prune.sparsity import KEPT, OF

PASSED_THROUGH = ("QuantizeLinear", "DequantizeLinear", "Cast", "Identity")  # zero stays zero


@dataclass(frozen=True)
class CheckedLayer:
    """An ONNX node with an eligible weight.

    ``shape`` is the weight's; ``zeros`` the share of it that is zero; ``dense_fours`` how many of
    its groups of four have more than two weights.
    """

    node: str
    weight: str
    shape: tuple[int, ...]
    zeros: float
    dense_fours: int


def sparse_layers(onnx_file: Path) -> tuple[CheckedLayer, ...]:
    """Return every layer whose weight may be 2:4, as ``plan_sparsity`` has it: sparse or not."""
    graph = onnx.load(onnx_file).graph
    constants = _Constants(graph)
    found = []
    for node, tensor, axis in _readers(graph):
        known = constants.find(tensor, axis)
        if known is None:
            continue
        name, weight, along = known
        if weight.ndim < 2 or weight.shape[along] % OF:
            continue
        fours = np.moveaxis(weight, along, -1).reshape(-1, OF)
        full = int((np.count_nonzero(fours, axis=1) > KEPT).sum())
        zeros = 1 - np.count_nonzero(weight) / weight.size
        label = node.name or f"node_of_{node.output[0]}"
        found.append(CheckedLayer(label, name, weight.shape, round(zeros, 4), full))
    return tuple(found)


def check_sparsity(onnx_file: Path) -> tuple[CheckedLayer, ...]:
    """Return the eligible layers of an ONNX file, all of them 2:4.

    Raises:
        BuildError: one of them is not, or there is none.
    """
    layers = sparse_layers(onnx_file)
    dense = [layer for layer in layers if layer.dense_fours]
    if dense:
        names = ", ".join(layer.node for layer in dense[:5])
        more = f" and {len(dense) - 5} more" if len(dense) > 5 else ""
        raise BuildError(
            f"{onnx_file}: {len(dense)} of {len(layers)} eligible layers are not 2:4 sparse: "
            f"{names}{more}; {dense[0].node} has {dense[0].dense_fours} groups of {OF} input "
            f"channels with more than {KEPT} weights",
            hint="apply the sparsity plan before recovery, and remove its masks before export",
        )
    if not layers:
        raise BuildError(
            f"{onnx_file}: no layer can be 2:4 sparse",
            hint="build without sparsity",
        )
    return layers


def _readers(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, str, int]]:
    """Yield (node, its weight's tensor, the axis of the input channels)."""
    for node in graph.node:
        values = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type == "Conv" and values.get("group", 1) == 1:
            yield node, node.input[1], 1
        elif node.op_type == "Gemm":
            yield node, node.input[1], 1 if values.get("transB") else 0
        elif node.op_type == "MatMul":
            yield node, node.input[1], -2


class _Constants:
    """The constants of a graph, found behind nodes that keep zeros where they are."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._values = {value.name: value for value in graph.initializer}
        self._makers = {node.output[0]: node for node in graph.node}
        for name, node in self._makers.items():
            tensors = [item.t for item in node.attribute if item.name == "value"]
            if node.op_type == "Constant" and tensors:
                self._values[name] = tensors[0]

    def find(self, tensor: str, axis: int) -> tuple[str, NDArray[np.generic], int] | None:
        """Return (name, array, axis there) of the constant that ``tensor`` is made from."""
        if tensor in self._values:
            array = np.asarray(numpy_helper.to_array(self._values[tensor]))
            return tensor, array, axis % array.ndim if array.ndim else 0
        node = self._makers.get(tensor)
        if node is None:
            return None
        if node.op_type in PASSED_THROUGH:
            return self.find(node.input[0], axis)
        if node.op_type == "Transpose":
            order = next((list(item.ints) for item in node.attribute if item.name == "perm"), None)
            if order is not None:
                return self.find(node.input[0], order[axis])
        return None
