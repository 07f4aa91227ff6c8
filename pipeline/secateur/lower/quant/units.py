"""What changes precision on its own: where it comes from, what it costs, what follows it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
from onnx import NodeProto

from secateur.core.errors import RecipeError
from secateur.lower.export import MODULE_KEY
from secateur.lower.quant.graph import FUSED_ACTIVATIONS, WEIGHTED, Graph, tensor_shapes
from secateur.lower.quant.plan import PRECISIONS, Precision, QuantPlan, plan_quant
from secateur.lower.quant.table import CalibrationTable


@dataclass(frozen=True)
class Unit:
    """A node that changes precision, with the activation that is fused into it.

    ``module`` is the torch module it comes from ("" where none is known). ``macs`` are those of one
    image; ``cost`` adds one per value of the result. ``ends_head``: no other layer with weights
    lies between it and an output of the model.
    """

    name: str
    module: str
    operator: str
    macs: int
    cost: int
    ends_head: bool


def find_units(model: Path, plan: QuantPlan) -> tuple[Unit, ...]:
    """Return, in the order of the graph, the nodes of ``model`` that ``plan`` has below fp32.

    Activations that a runtime fuses are left to the node before them.
    """
    proto = onnx.load(model)
    graph, shapes = Graph(proto), tensor_shapes(proto)
    ends = _ends_of_heads(graph)
    return tuple(
        Unit(
            name, _module_of(node), node.op_type, macs := _macs(graph, node, shapes),
            macs + math.prod(shapes.get(node.output[0], ())), name in ends,
        )
        for name, node in graph.nodes.items()
        if plan.precisions[name] != "fp32" and node.op_type not in FUSED_ACTIVATIONS
    )  # fmt: skip


def plan_assigned(
    model: Path,
    table: CalibrationTable | None,
    precisions: Mapping[str, Precision],
    pins: Mapping[str, Precision],
    carrier: Literal["fp32", "fp16"],
) -> QuantPlan:
    """Plan with the ``precisions`` of units; nodes that are not named get the carrier's.

    An activation follows the node that it is fused into, unless ``pins`` names it.
    """
    operators = {node.name: node.op_type for node in onnx.load(model).graph.node}
    named = {name: precision for name, precision in precisions.items()
             if operators.get(name) not in FUSED_ACTIVATIONS}  # fmt: skip
    return plan_quant(model, table, {**named, **pins}, default=carrier, carrier=carrier)


def macs_share(model: Path, plan: QuantPlan) -> dict[Precision, float]:
    """Return the share of the model's MACs that is computed in each precision."""
    proto = onnx.load(model)
    graph, shapes = Graph(proto), tensor_shapes(proto)
    sums: dict[Precision, int] = dict.fromkeys(PRECISIONS, 0)
    for name, node in graph.nodes.items():
        sums[plan.precisions[name]] += _macs(graph, node, shapes)
    total = sum(sums.values()) or 1
    return {precision: macs / total for precision, macs in sums.items()}


def node_modules(model: Path) -> dict[str, str]:
    """Return, in the order of the graph, each node's torch module, "" where unknown."""
    return {node.name: _module_of(node) for node in onnx.load(model).graph.node}


def _module_of(node: NodeProto) -> str:
    return next((str(m.value) for m in node.metadata_props if m.key == MODULE_KEY), "")


def resolve_pins(model: Path, pins: Mapping[str, Precision]) -> dict[str, Precision]:
    """Return the precision of every node that ``pins`` names, itself or by its torch module.

    A module stands for all nodes in it; of several that hold a node the innermost decides, and a
    node's own name decides before any module.

    Raises:
        RecipeError: no node and no module has a name of ``pins``.
    """
    nodes = node_modules(model)
    found: dict[str, Precision] = {}
    for pin in sorted(pins, key=lambda name: (name in nodes, len(name))):
        inside = [pin] if pin in nodes else [
            name for name, module in nodes.items() if f"{module}.".startswith(f"{pin}.")
        ]  # fmt: skip
        if not inside:
            near = difflib.get_close_matches(pin, [*nodes, *nodes.values()], n=3)
            raise RecipeError(
                f"precision.pin: the model has no node and no torch module '{pin}'",
                hint=f"did you mean {' or '.join(near)}?" if near else
                f"nodes are called like {', '.join(list(nodes)[:3])}",
            )  # fmt: skip
        found.update(dict.fromkeys(inside, pins[pin]))
    return found


def _macs(graph: Graph, node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    if node.op_type not in WEIGHTED:
        return 0
    results = math.prod(shapes.get(node.output[0], ()))
    if node.op_type == "Conv":
        return results * math.prod(graph.array(node.input[1]).shape[1:])
    summed = shapes.get(node.input[0], (0,))[-1]  # export gives Gemm an untransposed input
    return results * summed


def _ends_of_heads(graph: Graph) -> set[str]:
    """Return the last layer with weights before each output, and everything after it."""
    found: set[str] = set()
    waiting = list(graph.outputs)
    while waiting:
        node = graph.producer.get(waiting.pop())
        if node is None or node.name in found:
            continue
        found.add(node.name)
        if node.op_type not in WEIGHTED:
            waiting += [name for name in node.input if name]
    return found
