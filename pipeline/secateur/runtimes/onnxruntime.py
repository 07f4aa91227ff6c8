"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from secateur.core.errors import BundleError, first_line
from secateur.devices import on_profile
from secateur.devices.profiled import NetworkTimes, ToldNetwork, by_place

# It quantises biases with a scale that underflows in fp16 (seen in 1.31); every int8 file of ours
# that wants integer biases has them.
DISABLED = on_profile.DISABLED
# On x86 it is off unless set: int8 activations become uint8, and an operator whose input has other
# readers, too, stays in fp32. So ties are rounded otherwise than by the integers of an Arm CPU.
INT8_ALLOWED = "session.qdqisint8allowed"
WARM_UP = 3  # runs that are thrown away


class OnnxRuntimeSession:
    """One model, a fixed number of intra-op threads, sequential execution."""

    def __init__(self, model: Path, threads: int, *, as_on_arm: bool = False) -> None:
        options = on_profile.options(threads)
        if as_on_arm:
            options.add_session_config_entry(INT8_ALLOWED, "1")
        try:
            self._session = onnxruntime.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"],
                disabled_optimizers=DISABLED,
            )  # fmt: skip
        except Exception as error:  # onnxruntime's own exception types share no base
            raise BundleError(
                f"ONNX Runtime cannot load {model}: {first_line(error)}",
                hint="it is damaged, or made for another release: build the bundle again",
            ) from error
        self._input = self._session.get_inputs()[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, images: NDArray[np.float32]) -> Mapping[str, NDArray[np.float32]]:
        arrays = self._session.run(self._outputs, {self._input: images})
        return dict(zip(self._outputs, arrays, strict=True))


def open_session(model: Path, threads: int, *, as_on_arm: bool = False) -> OnnxRuntimeSession:
    """Load an ONNX file.

    ``as_on_arm`` computes int8 activations by the operators that ONNX Runtime takes on an Arm CPU:
    to compare values, since on x86 they are several times slower than its own.

    Raises:
        BundleError: the file is not a model ONNX Runtime can run.
    """
    return OnnxRuntimeSession(model, threads, as_on_arm=as_on_arm)


def version() -> str:
    """Return the installed version."""
    return f"onnxruntime {onnxruntime.__version__}"


def network_times(
    models: Sequence[bytes], places: Mapping[str, str], threads: int, rounds: int
) -> list[NetworkTimes]:
    """Return how long serialised models take, the models taking turns.

    ``places`` gives the place of an operator by the names of its node and its results.

    Raises:
        BundleError: ONNX Runtime cannot run a model.
    """
    try:
        rows = on_profile.measured(models, threads, rounds, WARM_UP)
    except Exception as error:  # onnxruntime's own exception types share no base
        raise BundleError(
            f"ONNX Runtime cannot run the model at other widths: {first_line(error)}",
            hint="report this with the recipe; budgets in MACs need no such model",
        ) from error
    return [by_place(ToldNetwork.model_validate(row), places) for row in rows]
