"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from secateur.core.errors import BundleError, first_line

# It quantises biases with a scale that underflows in fp16 (seen in 1.31); every int8 file of ours
# that wants integer biases has them.
DISABLED = ["WeightBiasQuantization"]
WARM_UP = 3  # runs that are thrown away
CHAINS = (8, 64)  # nodes of the networks that overheads are read from


class OnnxRuntimeSession:
    """One model, a fixed number of intra-op threads, sequential execution."""

    def __init__(self, model: Path, threads: int) -> None:
        try:
            self._session = onnxruntime.InferenceSession(
                str(model), _options(threads), providers=["CPUExecutionProvider"],
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


def kernel_times(models: Sequence[bytes], threads: int, rounds: int) -> list[NDArray[np.float64]]:
    """Return, per model, (rounds,) microseconds within its kernels, the models taking turns.

    Read from ONNX Runtime's own profile. What only changes the memory layout (Reorder*) does not
    count: within a network neighbours mostly share a layout.

    Raises:
        BundleError: ONNX Runtime cannot run a model.
    """
    with tempfile.TemporaryDirectory() as folder:
        sessions = [_profiled(model, threads, f"{folder}/{i}") for i, model in enumerate(models)]
        feeds = [_random_feeds(session) for session in sessions]
        for _ in range(rounds + WARM_UP):
            for session, feed in zip(sessions, feeds, strict=True):
                session.run(None, feed)
        files = [Path(session.end_profiling()) for session in sessions]
        return [_kernel_sums(file)[WARM_UP:] for file in files]


def overheads(threads: int, rounds: int = 60) -> tuple[float, float]:
    """Return the microseconds beside the kernels, per node and per run.

    From chains of a few and of many tiny sums: a line through both times.
    """
    times = []
    for nodes in CHAINS:
        model = _chain(nodes)
        session = onnxruntime.InferenceSession(
            model, _options(threads), providers=["CPUExecutionProvider"]
        )
        feed = _random_feeds(session)
        spent = []
        for _ in range(rounds):
            start = time.perf_counter()
            session.run(None, feed)
            spent.append(1e6 * (time.perf_counter() - start))
        times.append(float(np.median(spent)))
    per_node = max(0.0, (times[1] - times[0]) / (CHAINS[1] - CHAINS[0]))
    return per_node, max(0.0, times[0] - CHAINS[0] * per_node)


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _profiled(model: bytes, threads: int, prefix: str) -> onnxruntime.InferenceSession:
    options = _options(threads)
    options.enable_profiling = True
    options.profile_file_prefix = prefix
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception types share no base
        raise BundleError(
            f"ONNX Runtime cannot load a model of one operator: {first_line(error)}",
            hint="report this with the recipe",
        ) from error


def _random_feeds(session: onnxruntime.InferenceSession) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return {
        value.name: rng.standard_normal(value.shape).astype(np.float32)
        for value in session.get_inputs()
    }


def _kernel_sums(profile: Path) -> NDArray[np.float64]:
    """Return (runs,) microseconds of the kernels that compute something."""
    by_node: dict[str, list[float]] = {}
    for event in json.loads(profile.read_text(encoding="utf-8")):
        name = event["name"]
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        if not event["args"]["op_name"].startswith("Reorder"):
            by_node.setdefault(name, []).append(float(event["dur"]))
    total: NDArray[np.float64] = np.array(list(by_node.values())).sum(axis=0)
    return total


def _chain(nodes: int) -> bytes:
    value = onnx.helper.make_tensor_value_info
    steps = [onnx.helper.make_node("Neg", [f"t{i}"], [f"t{i + 1}"]) for i in range(nodes)]
    graph = onnx.helper.make_graph(
        steps, "chain", [value("t0", 1, [1])], [value(f"t{nodes}", 1, [1])]
    )
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    return bytes(model.SerializeToString())
