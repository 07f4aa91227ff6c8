"""Does a runtime compute what the ONNX file says? Its answer against onnx's reference evaluator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from onnx.reference import ReferenceEvaluator
from onnx.utils import Extractor

Array = NDArray[np.float32]
RunFile = Callable[[Path], Mapping[str, Array]]


@dataclass(frozen=True)
class Disagreement:
    """A runtime is off by ``difference`` (error power over variance) for ``task``.

    ``node`` is the first on the way there whose result differs.
    """

    task: str
    difference: float
    node: str


def find_disagreements(
    model: Path, image: Array, run: RunFile, distance: Callable[[Array, Array], float],
    tolerance: float,
) -> list[Disagreement]:  # fmt: skip
    """Return where a runtime leaves the reference by more than ``tolerance``.

    ``image``: (1, C, H, W); ``run`` opens a file in the runtime and gives its outputs for the same
    image. The node is found by cutting the graph short, with all that follows taken away: marking
    a result of the whole graph as an output would keep the runtime from fusing across it.
    """
    proto = onnx.load(model)
    exact = _reference(proto, image)
    got = run(model)
    wrong = {task: gap for task, values in got.items()
             if (gap := distance(exact[task], values)) > tolerance}  # fmt: skip
    found = []
    for task, gap in wrong.items():
        node = _first_wrong(proto, task, exact, run, distance, tolerance)
        found.append(Disagreement(task, gap, node))
    return found


def _reference(proto: ModelProto, image: Array) -> dict[str, Array]:
    """Return every float result of the model by the definitions of the operators."""
    marked = onnx.ModelProto()
    marked.CopyFrom(proto)
    known = {value.name for value in marked.graph.output}
    names = [name for node in marked.graph.node for name in node.output if name not in known]
    marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    evaluator = ReferenceEvaluator(marked)
    wanted = [*known, *names]
    results = evaluator.run(wanted, {proto.graph.input[0].name: image})
    return {name: values for name, values in zip(wanted, results, strict=True)
            if np.issubdtype(values.dtype, np.floating)}  # fmt: skip


def _first_wrong(
    proto: ModelProto, task: str, exact: Mapping[str, Array], run: RunFile,
    distance: Callable[[Array, Array], float], tolerance: float,
) -> str:  # fmt: skip
    """Bisect the nodes that ``task`` needs, in order, for the first whose result differs."""
    path = [node for node in _needed(proto, task) if node.output[0] in exact]
    inferred = onnx.shape_inference.infer_shapes(proto)
    input_name = proto.graph.input[0].name

    def differs(node: NodeProto) -> bool:
        with TemporaryDirectory(prefix="secateur-") as scratch:
            short = Path(scratch) / "model.onnx"
            name = node.output[0]
            onnx.save(Extractor(inferred).extract_model([input_name], [name]), short)
            return distance(exact[name], run(short)[name].astype(np.float32)) > tolerance

    first, last = 0, len(path) - 1  # the last, the task's own output, differs
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if differs(path[middle]) else (middle + 1, last)
    return str(path[last].name)


def _needed(proto: ModelProto, output: str) -> list[NodeProto]:
    """Return the nodes that an output needs, in the order of the graph."""
    wanted, chosen = {output}, []
    for node in reversed(proto.graph.node):
        if wanted & set(node.output):
            chosen.append(node)
            wanted |= set(node.input)
    return chosen[::-1]
