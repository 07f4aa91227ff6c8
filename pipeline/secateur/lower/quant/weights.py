"""A layer's weights on the grid of a dialect: one scale per output channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from secateur.lower.quant.dialect import Dialect

CHANNEL_AXIS = {"Conv": 0, "MatMul": 1}  # of the weights; Gemm's depends on transB


@dataclass(frozen=True)
class QuantisedWeights:
    """``stored`` integers in the layer's own shape; ``scales`` (channels,) along ``axis``."""

    stored: NDArray[np.int8]
    scales: NDArray[np.float32]
    axis: int

    def floats(self) -> NDArray[np.float32]:
        """Return what the integers stand for."""
        shape = [1] * self.stored.ndim
        shape[self.axis] = -1
        return np.asarray(self.stored * self.scales.reshape(shape), dtype=np.float32)


def channel_axis(node: NodeProto) -> int:
    """Return the axis of a layer's weights that its output channels lie on."""
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return CHANNEL_AXIS.get(node.op_type, 0 if transposed else 1)


def quantise_weights(
    node: NodeProto,
    weights: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    input_scale: float,
    dialect: Dialect,
    *,
    fp16: bool = False,
) -> QuantisedWeights:
    """Round ``weights`` to S8.

    Batch norms lie in the weights already, so a channel that its norm made small or large has a
    scale of its own.
    """
    axis = channel_axis(node)
    first = np.moveaxis(weights, axis, 0)
    scales = dialect.weight_scales(first, bias, input_scale, fp16=fp16)
    steps = np.rint(first / scales.reshape(-1, *[1] * (first.ndim - 1)))
    limit = dialect.weight_limit
    stored = np.moveaxis(np.clip(steps, -limit, limit).astype(np.int8), 0, axis)
    return QuantisedWeights(np.ascontiguousarray(stored), scales, axis)
