"""Half precision written into the ONNX: some nodes' floats become fp16, with a Cast between types.

Own code, because those at hand did not do: onnxconverter-common and its twin in
onnxruntime.transformers leave nodes out of order, cast one tensor twice under one name, round the
constants that fp16 and fp32 nodes share, and forget an output made by a node kept in fp32;
modelopt's autocast is right but brings gigabytes and pins onnx and onnxruntime-gpu.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from secateur.lower.quant.graph import replace_nodes

# Inputs that stay fp32 whatever the node's type: Resize's region and scales.
ALWAYS_FP32 = {"Resize": frozenset({1, 2}), "Upsample": frozenset({1})}
FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16})


def lower_floats(model: ModelProto, types: Mapping[str, str]) -> None:
    """Compute nodes with ``types[name] == "fp16"`` in half precision, in place.

    Inputs and outputs of the model keep their fp32 type. A node without a float input that is
    computed (a constant, a cast of integers) stays as it is.
    """
    _HalfWriter(model, types).write()


class _HalfWriter:
    def __init__(self, model: ModelProto, types: Mapping[str, str]) -> None:
        self.model = model
        self.types = types
        inferred = onnx.shape_inference.infer_shapes(model).graph
        typed = [*inferred.input, *inferred.value_info, *inferred.output]
        self.now = {value.name: value.type.tensor_type.elem_type for value in typed}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.now.update({name: tensor.data_type for name, tensor in self.constants.items()})
        self.nodes: list[NodeProto] = []
        self.copies: dict[tuple[str, int], str] = {}

    def write(self) -> None:
        outputs = {value.name for value in self.model.graph.output}
        for node in self.model.graph.node:
            kind = TensorProto.FLOAT16 if self._is_half(node) else TensorProto.FLOAT
            fixed = ALWAYS_FP32.get(node.op_type, frozenset())
            for position, name in enumerate(node.input):
                if self.now.get(name) in FLOATS and position not in fixed:
                    node.input[position] = self._as(name, kind)
            self.nodes.append(node)
            for position, name in enumerate(node.output):
                if self.now.get(name) in FLOATS and kind == TensorProto.FLOAT16:
                    if name in outputs:
                        node.output[position] = f"{name}_fp16"
                        self._cast(f"{name}_fp16", name, TensorProto.FLOAT)
                        # Readers of an output take the half value, not its cast.
                        self.copies[name, TensorProto.FLOAT16] = f"{name}_fp16"
                    else:
                        self.now[name] = TensorProto.FLOAT16
        replace_nodes(self.model, self.nodes)

    def _is_half(self, node: NodeProto) -> bool:
        computed = [
            name
            for name in node.input
            if self.now.get(name) in FLOATS and name not in self.constants
        ]
        dequantises = node.op_type == "DequantizeLinear"  # of integers, with a float scale
        return self.types.get(node.name) == "fp16" and bool(computed or dequantises)

    def _as(self, name: str, kind: int) -> str:
        """Return the name of a tensor in the wanted float type, cast or stored once."""
        if self.now[name] == kind:
            return name
        known = self.copies.get((name, kind))
        if known is None:
            known = f"{name}_{'fp16' if kind == TensorProto.FLOAT16 else 'fp32'}"
            self.copies[name, kind] = known
            if name in self.constants:
                values = numpy_helper.to_array(self.constants[name]).astype(np.float16)
                self.model.graph.initializer.append(numpy_helper.from_array(values, known))
            else:
                self._cast(name, known, kind)
        return known

    def _cast(self, source: str, target: str, kind: int) -> None:
        self.nodes.append(helper.make_node("Cast", [source], [target], f"{target}_cast", to=kind))
