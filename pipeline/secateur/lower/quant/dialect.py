"""How each runtime wants its Q/DQ nodes; facts and measurements are named beside each choice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import BuildError
from secateur.lower.quant.calibrators import Range
from secateur.lower.quant.graph import SAME_GRID

Integers = NDArray[np.int8] | NDArray[np.uint8]
SMALLEST_FP16_SCALE = 2.0**-20  # four bits of an fp16 subnormal
SMALLEST_SCALE = 1e-12
BIAS_LIMIT = 2.0**30  # of int32, with room for the sum that is added


@dataclass(frozen=True)
class Dialect:
    """One runtime's rules.

    ``activations`` is the 8-bit type of activations; ``symmetric`` puts their zero at 0.
    ``operators`` read 8-bit values; the results of ``output_operators`` are quantised too, so that
    the whole operator runs in integers. ``weight_limit`` is the largest integer of a weight.
    ``int32_bias`` stores biases as integers. With ``fuses_residual`` the sum after a convolution
    is part of it: that input of an Add is left as it is.
    """

    name: str
    activations: Literal["uint8", "int8"]
    symmetric: bool
    operators: frozenset[str]
    output_operators: frozenset[str]
    weight_limit: int = 127
    int32_bias: bool = False
    fuses_residual: bool = False

    def mark(self) -> dict[str, str | int]:
        """Return what ``dialect_named`` makes it again from."""
        return {"name": self.name, "weight_limit": self.weight_limit}

    def grid(self, limits: Range, *, fp16: bool = False) -> tuple[float, Integers]:
        """Return the scale and the zero point that reach ``limits`` and keep 0 exact.

        The scale is a value that fp16 has when ``fp16`` is set.
        """
        low, high = min(limits[0], 0.0), max(limits[1], 0.0)
        if self.symmetric:
            scale = _positive(max(-low, high) / 127, fp16)
            return scale, np.zeros((), dtype=self.activations)
        first, last = (0, 255) if self.activations == "uint8" else (-128, 127)
        scale = _positive((high - low) / 255, fp16)
        zero = np.clip(np.rint(first - low / scale), first, last)
        return scale, np.asarray(zero, dtype=self.activations)

    def weight_scales(
        self,
        weights: NDArray[np.float32],
        bias: NDArray[np.float32] | None,
        input_scale: float,
        *,
        fp16: bool = False,
    ) -> NDArray[np.float32]:
        """Return one scale per output channel of ``weights`` (channels first).

        A channel of tiny weights gets a scale at which its bias still fits into int32.
        """
        peaks = np.abs(weights.reshape(len(weights), -1)).max(axis=1)
        scales = peaks / self.weight_limit
        if bias is not None and self.int32_bias:
            scales = np.maximum(scales, np.abs(bias) / (input_scale * BIAS_LIMIT))
        return np.array([_positive(float(scale), fp16) for scale in scales], dtype=np.float32)


def _positive(scale: float, fp16: bool) -> float:
    if fp16:
        return float(np.float16(max(scale, SMALLEST_FP16_SCALE)))
    return float(np.float32(scale)) if scale > SMALLEST_SCALE else 1.0


# QLinear kernels of ONNX Runtime 1.31's CPU provider. A convolution runs in integers only when its
# result is quantised too; Gemm and MatMul can give floats, which are more exact. HardSwish is
# written as a sum and a product.
_ORT_OUTPUTS = SAME_GRID | {
    "Conv", "Add", "AveragePool", "Concat", "GlobalAveragePool", "HardSwish", "LeakyRelu", "Mul",
    "Sigmoid",
}  # fmt: skip
_ORT_OPERATORS = _ORT_OUTPUTS | {"Gemm", "MatMul"}


def onnxruntime_x86(*, vnni: bool = True) -> Dialect:
    """ONNX Runtime on x86-64: U8 activations, S8 weights.

    S8 activations are 2.6 times slower there (ResNet-18, 1 thread: 14.4 ms against 5.5). Without
    ``vnni`` (AVX2, AVX-512 before Cascade Lake) pairs of products are summed in 16 bits, which
    overflow; weights of 7 bits keep them in.
    """
    return Dialect("onnxruntime-x86", "uint8", False, _ORT_OPERATORS, _ORT_OUTPUTS,
                   weight_limit=127 if vnni else 64, int32_bias=True)  # fmt: skip


def onnxruntime_arm(*, signed: bool = True) -> Dialect:
    """ONNX Runtime on aarch64: S8 (``signed``) or U8 activations, S8 weights.

    Counted on ResNet-18, S8 takes 5 to 7 % fewer instructions on Cortex-A72 (no dot product) and
    A76 alike; whether int8 is quicker than fp32 at all is a matter of measuring (it needs the dot
    product). Zero is free to lie anywhere on the grid, so S8 is as fine as U8.
    """
    return Dialect("onnxruntime-arm", "int8" if signed else "uint8", False, _ORT_OPERATORS,
                   _ORT_OUTPUTS, int32_bias=True)  # fmt: skip


# TensorRT takes zero points of 0 alone, refuses a DequantizeLinear of int32, and wants the inputs
# of its integer layers quantised, not the results, and the shortcut of a residual sum. To judge
# such a file with a carrier of fp16 on ONNX Runtime 1.31, open it with
# disabled_optimizers=["WeightBiasQuantization"]: its bias scales underflow in fp16.
TENSORRT = Dialect(
    "tensorrt",
    "int8",
    True,
    frozenset({"Add", "AveragePool", "Conv", "Gemm", "GlobalAveragePool", "MatMul", "MaxPool"}),
    frozenset(),
    fuses_residual=True,
)


def dialect_named(name: str, weight_limit: int) -> Dialect:
    """Return the dialect that a bundle names.

    Raises:
        BuildError: there is none of that name.
    """
    known = {d.name: d for d in (onnxruntime_x86(), onnxruntime_arm(), TENSORRT)}
    if name not in known:
        raise BuildError(
            f"there is no dialect of quantised ONNX called '{name}'",
            hint=f"dialects: {', '.join(known)}; use the Secateur that built the bundle",
        )
    return replace(known[name], weight_limit=weight_limit)
