"""An exported model at other widths, to time it: cut anywhere, so that its answers are wrong.

How long a network takes depends on its widths alone, and cutting its file takes milliseconds where
cutting and exporting the model takes many seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, numpy_helper

from secateur.core.widths import Width
from secateur.lower.operators import QDQ, attributes_of, walk_widths

Dims = tuple[Width | None, ...]  # None where an axis stays as it is


class Resized:
    """The model in a file, at any widths: its groups have ``full`` channels.

    ``widths`` are its layers' (read, made).
    """

    def __init__(
        self, model: Path, widths: Mapping[str, tuple[Width, Width]], full: Sequence[int]
    ) -> None:
        self._proto, self._walk = walk_widths(model, widths)
        self._widths, self._full = widths, full
        self._cuts: dict[str, Dims] = {}
        for node in self._proto.graph.node:
            self._cut_operands(node)

    def to(self, kept: Sequence[int]) -> bytes:
        """Return the serialised model whose group ``g`` keeps ``kept[g]`` channels."""
        made = ModelProto()
        made.CopyFrom(self._rest)
        graph = made.graph
        for name, values in self._values.items():
            dims = self._cuts.get(name, (None,) * values.ndim)
            part = tuple(slice(None if d is None else d(kept)) for d in dims)
            graph.initializer.append(numpy_helper.from_array(np.array(values[part]), name))
        for node in graph.node:
            self._set_sizes(graph, node, kept)
        return bytes(made.SerializeToString())

    @cached_property
    def _values(self) -> dict[str, NDArray[np.generic]]:
        return {name: numpy_helper.to_array(t) for name, t in self._walk.constants.items()}

    @cached_property
    def _rest(self) -> ModelProto:
        """The model without its constants, nor the shapes that its widths change."""
        rest = ModelProto()
        rest.CopyFrom(self._proto)
        del rest.graph.initializer[:]
        del rest.graph.value_info[:]
        for value in rest.graph.output:
            value.type.tensor_type.ClearField("shape")
        # Runtimes fold more where the batch is known, and what ships leaves it open.
        rest.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
        return rest

    def _cut_operands(self, node: NodeProto) -> None:
        """Say along which axes the constants that a node reads are cut."""
        layer = self._walk.layer(node)
        if layer is not None:
            read, made = self._widths[layer]
            self._cut_weight(node, read, made)
            for name in node.input[2:]:
                self._cut(name, (made,))
            return
        out = self._walk.dims.get(node.output[0], ())
        for name in node.input:
            if name in self._walk.constants and node.op_type not in QDQ:
                self._cut(name, self._aligned(name, out))

    def _cut_weight(self, node: NodeProto, read: Width, made: Width) -> None:
        if node.op_type == "Conv":
            groups = int(attributes_of(node).get("group", 1))
            self._cut(node.input[1], (made, read if groups == 1 else None, None, None))
        elif attributes_of(node).get("transB"):
            self._cut(node.input[1], (made, read))
        else:
            self._cut(node.input[1], (read, made))

    def _cut(self, name: str, dims: Dims) -> None:
        """Cut a constant, or what a constant is dequantised from."""
        maker = self._walk.producer.get(name)
        if maker is not None and maker.op_type == "DequantizeLinear":
            axis = attributes_of(maker).get("axis", 1)
            self._cut(maker.input[0], dims)
            for scale in maker.input[1:]:
                if len(self._walk.constants[scale].dims) == 1:
                    self._cut(scale, (dims[axis],))
        elif name in self._walk.constants:
            rank = len(self._walk.constants[name].dims)
            self._cuts[name] = dims[:rank] + (None,) * (rank - len(dims))

    def _aligned(self, name: str, out: Sequence[Width]) -> Dims:
        """Return how a constant that is broadcast to a tensor of ``out`` is cut with it."""
        sizes = list(self._walk.constants[name].dims)
        dims: list[Width | None] = [None] * len(sizes)
        for back in range(1, min(len(sizes), len(out)) + 1):
            if out[-back].of and sizes[-back] == out[-back](self._full):
                dims[-back] = out[-back]
        return tuple(dims)

    def _set_sizes(self, graph: GraphProto, node: NodeProto, kept: Sequence[int]) -> None:
        """Set what a node says of widths beside its operands."""
        dims = [self._walk.dims.get(name, ()) for name in node.output]
        if node.op_type == "Conv" and attributes_of(node).get("group", 1) > 1:
            made, attribute = dims[0][1], next(a for a in node.attribute if a.name == "group")
            per_group = made(self._full) // attribute.i
            attribute.i = made(kept) // per_group
        elif node.op_type == "Reshape" and any(dim.of for dim in dims[0]):
            sizes = [dim(kept) for dim in dims[0]]
            if node.input[1] in self._values:
                before = self._values[node.input[1]].tolist()
                sizes = [o if o <= 0 else n for o, n in zip(before, sizes, strict=True)]
            node.input[1] = _sizes(graph, node, sizes)
        elif node.op_type == "Split" and len(node.input) > 1:
            axis = attributes_of(node).get("axis", 0)
            node.input[1] = _sizes(graph, node, [each[axis](kept) for each in dims])


def _sizes(graph: GraphProto, node: NodeProto, sizes: Sequence[int]) -> str:
    name = f"{node.name}_sizes"
    graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), name))
    return name
