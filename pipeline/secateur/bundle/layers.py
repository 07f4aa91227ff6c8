"""Which tasks need which layer of a bundle's model, read off its ONNX file."""

from __future__ import annotations

from pathlib import Path

import onnx

from secateur.bundle.write import node_tasks
from secateur.core.errors import BundleError, first_line

WRAPPER, WEIGHT = "model.network.", ".weight"  # what the export puts around a layer's name


def layer_tasks(onnx_file: Path) -> dict[str, tuple[str, ...]]:
    """Return, for each layer with a weight, in execution order, the outputs it is needed for.

    Layers have the names they had in the network; in int8, where weights are renamed, none is
    found.

    Raises:
        BundleError: the file is not an ONNX model.
    """
    try:
        graph = onnx.load(onnx_file, load_external_data=False).graph
        tasks = node_tasks(onnx_file)
    except Exception as error:  # protobuf's own exception types share no base with onnx's
        raise BundleError(
            f"{onnx_file} is not an ONNX model: {first_line(error)}", hint="build the bundle again"
        ) from error
    weights = {tensor.name for tensor in graph.initializer if tensor.name.endswith(WEIGHT)}
    found: dict[str, set[str]] = {}
    for node in graph.node:
        users = tasks.get(node.name or f"node_of_{node.output[0]}", [])
        for name in weights.intersection(node.input):
            layer = name.removeprefix(WRAPPER).removesuffix(WEIGHT)
            found.setdefault(layer, set()).update(users)
    return {layer: tuple(sorted(users)) for layer, users in found.items()}
