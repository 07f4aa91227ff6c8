"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from secateur.core.errors import BundleError, first_line

# It quantises biases with a scale that underflows in fp16 (seen in 1.31); every int8 file of ours
# that wants integer biases has them.
DISABLED = ["WeightBiasQuantization"]
WARM_UP = 3  # runs that are thrown away
KERNEL = "_kernel_time"
# What it adds to the name of a node, or of its result, that it writes anew.
ADDED = re.compile(r"(/.*|_nchwc|_token_\d+)+$")


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


@dataclass(frozen=True)
class NetworkTimes:
    """Microseconds of (rounds,) runs: the whole run, and the kernels of each place.

    Those that belong to no place are part of the run alone.
    """

    run_us: NDArray[np.float64]
    places_us: Mapping[str, NDArray[np.float64]]


def network_times(
    models: Sequence[bytes], places: Mapping[str, str], threads: int, rounds: int
) -> list[NetworkTimes]:
    """Return how long serialised models take, the models taking turns.

    ``places`` gives the place of an operator by the names of its node and its results. Kernels
    are read from ONNX Runtime's own profile, in a session beside the one whose runs are timed.
    What it inserts (Reorder*, Transpose, a second DequantizeLinear) counts to the operator whose
    result it takes.

    Raises:
        BundleError: ONNX Runtime cannot run a model.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain = [_opened(model, _options(threads)) for model in models]
        traced = [_opened(model, _traced(threads, f"{folder}/{i}"))
                  for i, model in enumerate(models)]  # fmt: skip
        feeds = [_random_feeds(session) for session in plain]
        spent: list[list[float]] = [[] for _ in models]
        for _ in range(rounds + WARM_UP):
            for session, other, feed, own in zip(plain, traced, feeds, spent, strict=True):
                start = time.perf_counter()
                session.run(None, feed)
                own.append(1e6 * (time.perf_counter() - start))
                other.run(None, feed)
        files = [Path(session.end_profiling()) for session in traced]
        return [
            NetworkTimes(np.array(own[WARM_UP:]), _by_place(file, places))
            for own, file in zip(spent, files, strict=True)
        ]


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _traced(threads: int, prefix: str) -> onnxruntime.SessionOptions:
    options = _options(threads)
    options.enable_profiling = True
    options.profile_file_prefix = prefix
    return options


def _opened(model: bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED
        )
    except Exception as error:  # onnxruntime's own exception types share no base
        raise BundleError(
            f"ONNX Runtime cannot load the model at other widths: {first_line(error)}",
            hint="report this with the recipe; budgets in MACs need no such model",
        ) from error


def _random_feeds(session: onnxruntime.InferenceSession) -> dict[str, NDArray[np.float32]]:
    """Return noise for every input; a size that is open is 1."""
    rng = np.random.default_rng(0)
    return {
        value.name: rng.standard_normal(
            [size if isinstance(size, int) else 1 for size in value.shape]
        ).astype(np.float32)
        for value in session.get_inputs()
    }


def _by_place(profile: Path, places: Mapping[str, str]) -> dict[str, NDArray[np.float64]]:
    """Return (rounds,) microseconds of the kernels of each place."""
    nodes: dict[str, list[dict[str, Any]]] = {}
    for event in json.loads(profile.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith(KERNEL):
            nodes.setdefault(event["name"].removesuffix(KERNEL), []).append(event)
    sums: dict[str, NDArray[np.float64]] = {}
    results: list[tuple[object, str]] = []  # of earlier nodes: shape and place
    for name, events in nodes.items():
        reads, makes = (events[0]["args"][f"{side}_type_shape"] for side in ("input", "output"))
        place = places.get(name) or places.get(ADDED.sub("", name))
        if place is None:
            sources = [_shape(each) for each in reads[:1]]
            place = next((p for shape, p in reversed(results) if shape in sources), None)
        if place is not None:
            times = np.array([event["dur"] for event in events[WARM_UP:]], np.float64)
            sums[place] = sums.get(place, 0.0) + times
            results += [(_shape(each), place) for each in makes]
    return sums


def _shape(typed: Mapping[str, list[int]]) -> list[int]:
    """Return the shape in an entry {type: shape} of a profile."""
    return next(iter(typed.values()), [])
