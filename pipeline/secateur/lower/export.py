"""Export to ONNX with torch's dynamo exporter: named outputs, dynamic batch, one file."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.shape_inference
import onnxslim
import torch
from torch import Tensor, nn

from secateur.core.errors import BuildError, first_line
from secateur.core.files import atomic_path
from secateur.core.model import MultiTaskModel
from secateur.core.source import is_own

OPSET = 20
FORM = 2  # of what is written for the same model: files in another are exported anew
INPUT_NAME = "image"
MAX_BATCH = 64
MODULE_KEY = "secateur.module"  # of a node's metadata: the torch module that it comes from
SCOPES_KEY = "pkg.torch.onnx.name_scopes"  # where torch writes it
WRAPPERS = "model.network."  # ours, around the user's module


class TupleOutputs(nn.Module):
    """A multi-task model with a tuple of outputs, in the order of its tasks.

    Exporters name a tuple's entries in order; a dict's keys they would flatten by themselves.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return one tensor per task for (N, C, H, W) images."""
        return tuple(self.model(image).values())


def export_onnx(model: MultiTaskModel, example: Tensor, path: Path) -> None:
    """Write ``model`` to ``path``: input ``image`` (batch, C, H, W), one output per task name.

    Raises:
        BuildError: the exporter cannot express the model, or fixes its batch size.
    """
    names = [task.name for task in model.tasks]
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    wrapped = TupleOutputs(model).eval()
    two = torch.cat([example[:1]] * 2)  # a batch of one would be taken for a constant
    try:
        with silence():
            program = torch.onnx.export(
                wrapped,
                (two,),
                dynamo=True,
                input_names=[INPUT_NAME],
                output_names=names,
                dynamic_shapes={"image": {0: batch}},
                opset_version=OPSET,
                verbose=False,
            )
        if program is None:
            raise RuntimeError("the exporter returned nothing")
        scopes = _scopes(program.model_proto)
        exported = onnxslim.slim(program.model_proto)  # which drops what torch says of a node
        if _resize_by_constants(exported):
            exported = onnxslim.slim(exported)  # what computed the sizes goes
        _name_modules(exported, scopes)
        onnx.checker.check_model(exported)
    except Exception as error:  # the exporter raises dozens of types of its own
        raise BuildError(
            f"the model cannot be exported to ONNX: {_reason(error)}",
            hint="forward must be traceable by torch.export: no data-dependent Python branches",
        ) from error
    if not exported.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise BuildError(
            "the model cannot be exported to ONNX for any number of images: forward makes its "
            "batch size a constant",
            hint="there, write images.shape[0] for len(images), and -1 for a number of images",
        )
    with atomic_path(path) as temporary:
        onnx.save(exported, temporary)


def _resize_by_constants(model: onnx.ModelProto) -> bool:
    """Give each Resize by whole numbers its scales as constants; say whether there was any.

    torch writes the sizes, computed while it runs if the batch is open. ONNX Runtime then leaves
    its blocked layout around every Resize: a tenth of the time of a light decoder in fp32.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    del fixed.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    found = False
    for node in model.graph.node:
        if node.op_type != "Resize" or len(node.input) != 4 or _has(node, "axes"):
            continue
        before, after = (shapes.get(name, []) for name in (node.input[0], node.output[0]))
        known = len(before) == len(after) > 2 and all(before) and all(after)
        if not known or any(b % a for a, b in zip(before, after, strict=True)):
            continue  # sizes round otherwise than scales might
        scales = np.array([b / a for a, b in zip(before, after, strict=True)], np.float32)
        name = f"{node.name}_scales"
        model.graph.initializer.append(onnx.numpy_helper.from_array(scales, name))
        del node.input[2:]
        node.input.append(name)
        found = True
    return found


def _has(node: onnx.NodeProto, attribute: str) -> bool:
    return any(each.name == attribute for each in node.attribute)


def _scopes(model: onnx.ModelProto) -> dict[str, str]:
    """Return the torch module of each node that torch says one of."""
    found = {}
    for node in model.graph.node:
        scopes = next((m.value for m in node.metadata_props if m.key == SCOPES_KEY), "[]")
        # A list from the outermost module to the operation itself; literal_eval runs no code.
        found[node.name] = "".join(ast.literal_eval(scopes)[-2:-1])
    return found


def _name_modules(model: onnx.ModelProto, scopes: dict[str, str]) -> None:
    """Write each node's torch module into its metadata; a layer's is the one that owns its weights.

    A batch norm that was folded into a convolution would name the norm.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        owners = [name.removesuffix(".weight") for name in node.input
                  if name in constants and name.endswith(".weight")]  # fmt: skip
        module = (*owners, scopes.get(node.name, ""))[0]
        if f"{module}." != WRAPPERS:
            node.metadata_props.add(key=MODULE_KEY, value=module.removeprefix(WRAPPERS))


def _reason(error: BaseException) -> str:
    """Return what the first cause of an error says, and the line of the user's that it is of."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if is_own(Path(frame.filename))]
    where = f" ({own[-1].filename}, line {own[-1].lineno}: {own[-1].line})" if own else ""
    return first_line(error) + where


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep an exporter's own chatter off the terminal; its errors still come as exceptions."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),  # the graph so far, where tracing fails
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
