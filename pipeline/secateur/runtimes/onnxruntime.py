"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from secateur.core.errors import BundleError, first_line

# It quantises biases with a scale that underflows in fp16 (seen in 1.31); every int8 file of ours
# that wants integer biases has them.
DISABLED = ["WeightBiasQuantization"]


class OnnxRuntimeSession:
    """One model, a fixed number of intra-op threads, sequential execution."""

    def __init__(self, model: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"],
                disabled_optimizers=DISABLED,
            )  # fmt: skip
        except Exception as error:  # onnxruntime's own exception types share no base
            raise BundleError(
                f"ONNX Runtime cannot load {model}: {first_line(error)}",
                hint="check the file with `secateur verify`",
            ) from error
        self._input = self._session.get_inputs()[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, images: NDArray[np.float32]) -> Mapping[str, NDArray[np.float32]]:
        arrays = self._session.run(self._outputs, {self._input: images})
        return dict(zip(self._outputs, arrays, strict=True))


def open_session(model: Path, threads: int) -> OnnxRuntimeSession:
    """Load an ONNX file.

    Raises:
        BundleError: the file is not a model ONNX Runtime can run.
    """
    return OnnxRuntimeSession(model, threads)


def version() -> str:
    """Return the installed version."""
    return f"onnxruntime {onnxruntime.__version__}"
