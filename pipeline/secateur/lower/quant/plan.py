"""The precision of every node and the range of every tensor, free of any runtime's dialect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
from onnx import NodeProto, helper

from secateur.core.errors import BuildError, CalibrationError
from secateur.core.files import file_sha256
from secateur.lower.quant.calibrators import Range
from secateur.lower.quant.graph import FUSED_ACTIVATIONS, SAME_GRID, WEIGHTED, Graph
from secateur.lower.quant.table import CalibrationTable

Precision = Literal["int8", "fp16", "fp32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

INT8_OPERATORS = WEIGHTED | SAME_GRID | FUSED_ACTIVATIONS | {
    "Add", "AveragePool", "Concat", "GlobalAveragePool", "HardSwish", "LeakyRelu", "Mul", "Sigmoid",
}  # fmt: skip
HARD_SWISH_ENDS = -3.0  # it is 0 below
# What sums many terms or divides small numbers loses too much of fp16's 11 bits.
FP32_OPERATORS = frozenset({
    "BatchNormalization", "CumSum", "Exp", "GlobalAveragePool", "GroupNormalization",
    "InstanceNormalization", "LayerNormalization", "Log", "LogSoftmax", "LpNormalization", "Pow",
    "RMSNormalization", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean",
    "ReduceProd", "ReduceSum", "ReduceSumSquare", "Softmax",
})  # fmt: skip
FP16_LARGEST = 65504.0


@dataclass(frozen=True)
class QuantPlan:
    """``precisions`` are per node, ``ranges`` (lowest, highest) per tensor next to an int8 node.

    An int8 node reads 8-bit values; its results, where a dialect does not quantise them too, are in
    the float type ``carrier``. ``model`` is the SHA-256 of the fp32 ONNX file that the plan is for,
    ``calibrator`` the rule its ranges come from. ``shifts`` are, per node and output channel, what
    rounding adds to the mean of the result when the node is in int8: its bias is lower by that.
    """

    model: str
    calibrator: str
    carrier: Literal["fp32", "fp16"]
    precisions: Mapping[str, Precision]
    ranges: Mapping[str, Range]
    shifts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-like data."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> QuantPlan:
        """Read what ``to_json`` wrote.

        Raises:
            BuildError: a field is missing or has another form.
        """
        try:
            wrong = [p for p in data["precisions"].values() if p not in PRECISIONS]
            if wrong:
                raise ValueError(f"precision {wrong[0]!r}")
            ranges = {name: (float(low), float(high)) for name, (low, high)
                      in data["ranges"].items()}  # fmt: skip
            shifts = {name: tuple(map(float, values)) for name, values
                      in data.get("shifts", {}).items()}  # fmt: skip
            return QuantPlan(**{**data, "ranges": ranges, "shifts": shifts})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BuildError(
                f"this is not a plan of precisions: {error!r}", hint="plan it again"
            ) from error


def plan_quant(
    model: Path,
    table: CalibrationTable | None,
    precision_of_nodes: Mapping[str, Precision],
    *,
    default: Precision = "int8",
    carrier: Literal["fp32", "fp16"] = "fp32",
) -> QuantPlan:
    """Decide the precision of every node of an fp32 ONNX ``model``.

    Nodes not named in ``precision_of_nodes`` get ``default``; an activation that a runtime fuses
    (Relu, Clip) follows the node before it. A node stays in fp32 where it cannot be lower: int8
    needs an operator that runtimes have in int8 and calibrated tensors; fp16 is refused to norms,
    softmax and reductions, and to values beyond 65504. Without a ``table`` nothing can be int8.

    Raises:
        BuildError: ``precision_of_nodes`` names a node the model does not have.
        CalibrationError: int8 is asked for without a table, or with another model's.
    """
    _check_table(model, table, {default, *precision_of_nodes.values()})
    graph = Graph(onnx.load(model))
    unknown = sorted(set(precision_of_nodes) - set(graph.nodes))
    if unknown:
        raise BuildError(
            f"the model has no node '{unknown[0]}'",
            hint=f"its nodes are {', '.join(list(graph.nodes)[:5])} …",
        )
    seen: Mapping[str, Range] = table.ranges if table is not None else {}
    precisions: dict[str, Precision] = {}
    for name, node in graph.nodes.items():
        before = _fused_into(graph, node)
        followed = precisions.get(before.name) if before is not None else None
        wanted = precision_of_nodes.get(name) or followed or default
        if node.op_type in FUSED_ACTIVATIONS and wanted == "int8" and followed != "int8":
            wanted = "fp32"  # alone it would have nothing to do in integers
        precisions[name] = wanted if _possible(graph, node, wanted, carrier, seen) else "fp32"
    ranges = _ranges(graph, precisions, seen)
    calibrator = table.calibrator if table is not None else "none"
    return QuantPlan(file_sha256(model), calibrator, carrier, precisions, ranges)


def _check_table(model: Path, table: CalibrationTable | None, asked: set[Precision]) -> None:
    if table is not None:
        table.check_model(model)
    elif "int8" in asked:
        raise CalibrationError(
            "int8 needs the ranges of activations, and there is no calibration table",
            hint="calibrate first, or plan fp16 or fp32 only",
        )


def _fused_into(graph: Graph, node: NodeProto) -> NodeProto | None:
    """Return the node that an activation is fused into, if it is one and can be."""
    if node.op_type in FUSED_ACTIVATIONS and graph.only_reader(node.input[0]) is not None:
        return graph.producer.get(node.input[0])
    return None


def _possible(
    graph: Graph, node: NodeProto, wanted: Precision, carrier: str, seen: Mapping[str, Range]
) -> bool:
    if wanted == "int8":
        fits = carrier == "fp32" or _fits_fp16(graph, node, seen)
        return fits and _can_be_int8(graph, node, seen)
    if wanted == "fp16":
        return node.op_type not in FP32_OPERATORS and _fits_fp16(graph, node, seen)
    return True


def _can_be_int8(graph: Graph, node: NodeProto, seen: Mapping[str, Range]) -> bool:
    activations = graph.activations(node)
    if node.op_type not in INT8_OPERATORS or not activations or len(node.output) > 1:
        return False
    if not all(name in seen for name in [*activations, node.output[0]]):
        return False
    constants = [name in graph.constants for name in node.input if name]
    if node.op_type in {"Conv", "Gemm"}:
        stored = not constants[0] and all(constants[1:])
        return stored and _is_plain(node) and all(graph.array(b).ndim == 1 for b in node.input[2:])
    if node.op_type == "MatMul":
        return not constants[0] and (not constants[1] or graph.array(node.input[1]).ndim == 2)
    # Adding a constant is a bias, multiplying by one a scale: neither is worth a grid of its own.
    moves_only = node.op_type in SAME_GRID | FUSED_ACTIVATIONS
    return _is_plain(node) if moves_only else not any(constants)


def _is_plain(node: NodeProto) -> bool:
    """Say whether a node has none of the options that integer kernels lack."""
    options = {
        attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute
    }
    return (
        options.get("mode", b"") != b"cubic"  # its results lie outside of its input's range
        and not options.get("transA", 0)
        and options.get("alpha", 1.0) == options.get("beta", 1.0) == 1.0
    )


def _fits_fp16(graph: Graph, node: NodeProto, seen: Mapping[str, Range]) -> bool:
    """Say whether no value that is known, constant or calibrated, is beyond fp16."""
    if any(attribute.HasField("g") for attribute in node.attribute):  # If, Loop, Scan
        return False
    constants = [graph.constants[name] for name in node.input if name in graph.constants]
    floats = [graph.array(t.name) for t in constants if t.data_type == onnx.TensorProto.FLOAT]
    largest = [float(np.abs(values).max(initial=0.0)) for values in floats]
    largest += [max(-low, high) for low, high in
                (seen[name] for name in [*node.input, *node.output] if name in seen)]  # fmt: skip
    return max(largest, default=0.0) < FP16_LARGEST


def overflowing(model: Path, plan: QuantPlan, peaks: Mapping[str, float]) -> dict[str, float]:
    """Return the nodes that ``plan`` computes in fp16 and whose result is beyond it, and how far.

    ``peaks``: the largest absolute value seen per tensor of the fp32 ``model``.
    """
    halves = {"fp16", "int8"} if plan.carrier == "fp16" else {"fp16"}
    results = {node.name: node.output[0] for node in onnx.load(model).graph.node}
    return {
        name: peaks[results[name]]
        for name, precision in plan.precisions.items()
        if precision in halves and peaks.get(results[name], 0.0) >= FP16_LARGEST
    }


def _ranges(
    graph: Graph, precisions: Mapping[str, Precision], seen: Mapping[str, Range]
) -> dict[str, Range]:
    """Return the ranges next to int8 nodes.

    What only moves values keeps its input's grid; what HardSwish alone reads needs no steps for the
    values that it makes 0.
    """
    ranges: dict[str, Range] = {}
    for name, node in graph.nodes.items():
        if precisions[name] != "int8":
            continue
        for tensor in [*graph.activations(node), node.output[0]]:
            ranges.setdefault(tensor, seen[tensor])
        if node.op_type in SAME_GRID:
            ranges[node.output[0]] = ranges[node.input[0]]
    for tensor, (low, high) in ranges.items():
        reader, maker = graph.only_reader(tensor), graph.producer.get(tensor)
        moved = maker is not None and maker.op_type in SAME_GRID
        if reader is not None and reader.op_type == "HardSwish" and not moved:
            ranges[tensor] = (max(low, HARD_SWISH_ENDS), max(high, HARD_SWISH_ENDS))
    return ranges
