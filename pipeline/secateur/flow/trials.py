"""Forms of one fp32 ONNX under different plans, each written, opened and thrown away."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.devices.host import cpu_flags
from secateur.devices.target import Target
from secateur.lower.quant import (
    TENSORRT,
    Dialect,
    QuantPlan,
    emit,
    onnxruntime_arm,
    onnxruntime_x86,
)
from secateur.runtimes.base import Runtime

Outputs = Mapping[str, NDArray[np.float32]]
BROKEN = 1e12  # finite, so that sums and shares of it stay numbers
VNNI = frozenset({"avx512_vnni", "avx_vnni"})


def dialect_of(target: Target) -> Dialect:
    """Return how a target's runtime wants its Q/DQ nodes.

    Where this machine is the x86-64 target, its own instructions decide on 7 or 8 bits of weights.
    """
    if target.accelerator == "gpu":
        return TENSORRT
    if target.arch == "aarch64":
        return onnxruntime_arm()
    return onnxruntime_x86(vnni=bool(VNNI & cpu_flags()))


@dataclass(frozen=True)
class Reference:
    """Images (N, C, H, W), and each task's output for them in fp32."""

    images: NDArray[np.float32]
    outputs: Outputs


@dataclass(frozen=True)
class Trials:
    """Runs plans of the fp32 ONNX ``model`` in one dialect on one runtime."""

    model: Path
    dialect: Dialect
    runtime: Runtime
    threads: int

    @contextmanager
    def written(self, plan: QuantPlan) -> Iterator[Path]:
        """Yield the file of a plan; it is gone afterwards."""
        with tempfile.TemporaryDirectory(prefix="secateur-") as scratch:
            path = Path(scratch) / "model.onnx"
            emit(self.model, plan, self.dialect, path)
            yield path

    def reference(self, images: NDArray[np.float32]) -> Reference:
        """Return what the fp32 model makes of (N, C, H, W) images."""
        return Reference(images, self._outputs(self.model, images))

    def noise(self, plan: QuantPlan, reference: Reference) -> dict[str, float]:
        """Return per task the power of a plan's error, relative to the output's own variance."""
        with self.written(plan) as path:
            outputs = self._outputs(path, reference.images)
        return {task: noise_power(wanted, outputs[task])
                for task, wanted in reference.outputs.items()}  # fmt: skip

    def _outputs(self, path: Path, images: NDArray[np.float32]) -> Outputs:
        """Run the images one by one, as a device does."""
        session = self.runtime.open_session(path, self.threads)
        runs = [session.run(images[i : i + 1]) for i in range(len(images))]
        return {task: np.concatenate([run[task] for run in runs]) for task in runs[0]}


def noise_power(wanted: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Return ``|got - wanted|^2`` over the squared deviation of ``wanted`` from its mean.

    BROKEN where ``got`` holds a value that is not finite.
    """
    if not np.isfinite(got).all():
        return BROKEN
    exact = wanted.astype(np.float64)
    error = float(np.square(got - exact).sum())
    own = float(np.square(exact - exact.mean()).sum()) or float(np.square(exact).sum())
    return error / (own or 1.0)
