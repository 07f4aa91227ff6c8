"""Export to ONNX with torch's dynamo exporter: named outputs, dynamic batch, one file."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxslim
import torch
from torch import Tensor, nn

from secateur.core.errors import BuildError, first_line
from secateur.core.files import atomic_path
from secateur.core.model import MultiTaskModel

OPSET = 20
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
        BuildError: the exporter cannot express the model.
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
        _name_modules(exported, scopes)
        onnx.checker.check_model(exported)
    except Exception as error:  # the exporter raises dozens of types of its own
        raise BuildError(
            f"the model cannot be exported to ONNX: {first_line(error)}",
            hint="forward must be traceable by torch.export: no data-dependent Python branches",
        ) from error
    with atomic_path(path) as temporary:
        onnx.save(exported, temporary)


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


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep an exporter's own chatter off the terminal; its errors still come as exceptions."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
