"""An fp32 ONNX and a plan of precisions become the ONNX that one runtime runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from secateur.core.errors import BuildError, CalibrationError, first_line
from secateur.core.files import atomic_path, file_sha256
from secateur.lower.quant.dialect import Dialect
from secateur.lower.quant.fp16 import lower_floats
from secateur.lower.quant.graph import (
    FUSED_ACTIVATIONS,
    WEIGHTED,
    Graph,
    replace_constant,
    replace_nodes,
)
from secateur.lower.quant.plan import QuantPlan
from secateur.lower.quant.weights import quantise_weights

QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
WEIGHT, BIAS = "_weight", "_bias"  # after a node's name: what is stored of it in integers


def emit(model: Path, plan: QuantPlan, dialect: Dialect, out: Path) -> None:
    """Write ``model`` with the precisions of ``plan`` to ``out``, in the words of ``dialect``.

    int8 nodes get QuantizeLinear and DequantizeLinear (weights per output channel), fp16 nodes
    Casts; inputs and outputs of the model stay fp32. A node that is int8 in the plan stays in the
    carrier's type where the dialect has no integer form of it.

    Raises:
        CalibrationError: the plan is for another model.
        BuildError: the dialect cannot say what the plan asks for.
    """
    if dialect.int32_bias and plan.carrier == "fp16" and "int8" in plan.precisions.values():
        raise BuildError(
            f"{dialect.name} keeps int8 nodes between fp32 ones, the plan's carrier is fp16",
            hint="plan with carrier fp32 for a CPU",
        )
    proto = quantised_graph(model, plan, dialect)
    if plan.carrier == "fp16" or "fp16" in plan.precisions.values():
        lower_floats(proto, _float_types(proto, plan))
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # onnx raises several types of its own
        raise BuildError(
            f"the {dialect.name} form of {model} is not valid ONNX: {first_line(error)}",
            hint="report this with the model; keeping the node it names in fp32 helps meanwhile",
        ) from error
    with atomic_path(out) as temporary:
        onnx.save(proto, temporary)


def quantised_graph(model: Path, plan: QuantPlan, dialect: Dialect) -> ModelProto:
    """Return ``model`` with the Q/DQ nodes of ``plan``, all its floats still fp32.

    Raises:
        CalibrationError: the plan is for another model.
    """
    if file_sha256(model) != plan.model:
        raise CalibrationError(
            f"the plan of precisions was made for another model than {model}",
            hint="plan again with this model's calibration table",
        )
    proto = onnx.load(model)
    _Writer(proto, plan, dialect).write()
    return proto


def _float_types(proto: ModelProto, plan: QuantPlan) -> dict[str, str]:
    """Return fp16 or fp32 per node of the quantised graph."""
    return {
        node.name: plan.carrier
        if node.op_type in QDQ or plan.precisions.get(node.name, "int8") == "int8"
        else plan.precisions[node.name]
        for node in proto.graph.node
    }


class _Writer:
    """Rebuilds the node list of ``proto`` in order, with Q/DQ nodes where they are needed."""

    def __init__(self, proto: ModelProto, plan: QuantPlan, dialect: Dialect) -> None:
        self.proto = proto
        self.graph = Graph(proto)
        self.plan = plan
        self.dialect = dialect
        self.fp16 = plan.carrier == "fp16"
        self.nodes: list[NodeProto] = []
        self.before: dict[str, str] = {}  # per dequantised twin the tensor it stands for
        self.kept_raw = self._residuals() if dialect.fuses_residual else set()

    def write(self) -> None:
        """Change the model in place."""
        wanted = self._wanted_by_readers()
        for name in self.graph.inputs:
            self._pair_for_readers(name, wanted)
        for node in self.graph.nodes.values():
            if self._is_int8(node) and node.op_type in WEIGHTED:
                self._quantise_weights(node)
            if self._is_int8(node) and node.op_type == "HardSwish":
                self._gate(node)
            self.nodes.append(node)
            for position, name in enumerate(node.output):
                if self._runs_in_integers(node, name):
                    node.output[position] = f"{name}_raw"
                    self._pair(f"{name}_raw", name, name)
                else:
                    self._pair_for_readers(name, wanted)
        replace_nodes(self.proto, self.nodes)

    def _is_int8(self, node: NodeProto) -> bool:
        named = self.plan.precisions[node.name] == "int8"
        return named and node.op_type in self.dialect.operators

    def _runs_in_integers(self, node: NodeProto, name: str) -> bool:
        """Say whether ``name`` is what an integer operator gives after its fused activation."""
        if node.op_type in FUSED_ACTIVATIONS and self.plan.precisions[node.name] == "int8":
            before = self.graph.producer[node.input[0]]
            return before.op_type in self.dialect.output_operators
        reader = self.graph.only_reader(name)
        fused = reader is not None and reader.op_type in FUSED_ACTIVATIONS
        if fused and reader is not None and self.plan.precisions[reader.name] == "int8":
            return False  # the grid comes after the activation
        return self._is_int8(node) and node.op_type in self.dialect.output_operators

    def _residuals(self) -> set[tuple[str, str]]:
        """Return (Add node, input) of the branches whose convolution takes the sum in."""
        found = set()
        for node in self.graph.nodes.values():
            if node.op_type != "Add" or not self._is_int8(node):
                continue
            fusable = [
                name
                for name in node.input
                if (maker := self.graph.producer.get(name)) is not None
                and maker.op_type in WEIGHTED
                and self._is_int8(maker)
                and self.graph.only_reader(name) is node
            ]
            if fusable:
                found.add((node.name, fusable[-1]))
        return found

    def _wanted_by_readers(self) -> dict[str, list[NodeProto]]:
        """Return, per activation, the int8 nodes that read it on its grid."""
        wanted: dict[str, list[NodeProto]] = {}
        for node in self.graph.nodes.values():
            if self._is_int8(node):
                for name in self.graph.activations(node):
                    if (node.name, name) not in self.kept_raw:
                        wanted.setdefault(name, []).append(node)
        return wanted

    def _pair_for_readers(self, name: str, wanted: dict[str, list[NodeProto]]) -> None:
        """Quantise a tensor for its int8 readers alone; the others read it as it is."""
        if readers := wanted.get(name):
            self._pair(name, f"{name}_dequantized", name)
            self.before[f"{name}_dequantized"] = name
            for node in readers:
                renamed = [f"{name}_dequantized" if i == name else i for i in node.input]
                node.input[:] = renamed

    def _pair(self, source: str, target: str, tensor: str) -> None:
        """Append Q and DQ from ``source`` to ``target`` on the grid of ``tensor``."""
        scale, zero = self.dialect.grid(self.plan.ranges[tensor], fp16=self.fp16)
        grid = [self._constant(f"{tensor}_scale", np.float32(scale)),
                self._constant(f"{tensor}_zero_point", zero)]  # fmt: skip
        stored = f"{tensor}_quantized"
        self.nodes += [
            helper.make_node("QuantizeLinear", [source, *grid], [stored], f"{tensor}_quantize"),
            helper.make_node("DequantizeLinear", [stored, *grid], [target], f"{tensor}_dequantize"),
        ]

    def _gate(self, node: NodeProto) -> None:
        """Turn HardSwish, x · clip(x / 6 + 1 / 2, 0, 1), into an Add and a Mul.

        The grid of the sum ends at 0 and 1, so that its rounding clips. ONNX Runtime 1.32 has
        integer kernels of both and none of HardSwish.
        """
        (source,) = node.input
        tensor = self.before.get(source, source)
        scale, _ = self.dialect.grid(self.plan.ranges[tensor], fp16=self.fp16)
        steps, zero = self.dialect.grid((0.0, 1.0), fp16=self.fp16)
        gate = f"{node.name}_gate"
        sixth = self._constant(f"{gate}_sixth_scale", np.float32(scale / 6))
        half = [self._constant(f"{gate}_half_{part}", value) for part, value in
                (("quantized", np.full(1, 127, zero.dtype)), ("scale", np.float32(0.5 / 127)),
                 ("zero_point", np.zeros((), zero.dtype)))]  # fmt: skip
        grid = [self._constant(f"{gate}_scale", np.float32(steps)),
                self._constant(f"{gate}_zero_point", zero)]  # fmt: skip
        for operator, inputs, made in (
            ("DequantizeLinear", [f"{tensor}_quantized", sixth, f"{tensor}_zero_point"], "sixth"),
            ("DequantizeLinear", half, "half"),
            ("Add", [f"{gate}_sixth", f"{gate}_half"], "raw"),
            ("QuantizeLinear", [f"{gate}_raw", *grid], "quantized"),
            ("DequantizeLinear", [f"{gate}_quantized", *grid], "dequantized"),
        ):
            self.nodes.append(helper.make_node(operator, inputs, [f"{gate}_{made}"],
                                               f"{gate}_{made}"))  # fmt: skip
        node.op_type = "Mul"
        node.input.append(f"{gate}_dequantized")

    def _quantise_weights(self, node: NodeProto) -> None:
        """Store a node's constant weights as S8 per output channel, and its bias as int32."""
        source = node.input[1]
        if source not in self.graph.constants:
            return  # a MatMul of two activations
        bias = self.graph.array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if bias is not None and node.name in self.plan.shifts:
            bias = bias - np.array(self.plan.shifts[node.name], dtype=np.float32)
            replace_constant(self.proto, node, 2, bias)
        input_scale = self._input_scale(node)
        whole = quantise_weights(node, self.graph.array(source), bias, input_scale, self.dialect,
                                 fp16=self.fp16)  # fmt: skip
        node.input[1] = self._dequantised(
            f"{node.name}{WEIGHT}", whole.stored, whole.scales, whole.axis
        )
        if bias is not None and self.dialect.int32_bias:
            steps_of_sum = whole.scales * np.float32(input_scale)
            integers = np.rint(bias.astype(np.float64) / steps_of_sum).astype(np.int32)
            node.input[2] = self._dequantised(f"{node.name}{BIAS}", integers, steps_of_sum, 0)

    def _input_scale(self, node: NodeProto) -> float:
        tensor = self.before.get(node.input[0], node.input[0])
        return self.dialect.grid(self.plan.ranges[tensor], fp16=self.fp16)[0]

    def _dequantised(
        self,
        name: str,
        stored: NDArray[np.int8] | NDArray[np.int32],
        scales: NDArray[np.float32],
        axis: int,
    ) -> str:
        """Append a DequantizeLinear of constants and return the name of its result."""
        zeros = np.zeros(len(scales), stored.dtype)
        inputs = [self._constant(f"{name}_{part}", values) for part, values in
                  (("quantized", stored), ("scale", scales), ("zero_point", zeros))]  # fmt: skip
        self.nodes.append(
            helper.make_node(
                "DequantizeLinear", inputs, [f"{name}_dequantized"], f"{name}_dequantize", axis=axis
            )
        )
        return f"{name}_dequantized"

    def _constant(self, name: str, values: Any) -> str:
        """Add a constant of an array or a numpy number."""
        values = np.asarray(values)
        self.proto.graph.initializer.append(numpy_helper.from_array(values, name))
        return name
