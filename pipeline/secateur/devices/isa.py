"""From the instructions a CPU has to the form of int8 that suits it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

Int8Form = Literal["U8S8", "S8S8", "fp32"]
_ARM_INT8 = {"dotprod", "i8mm"}
_X86_INT8 = {"avx2", "avx512", "vnni", "avx_vnni", "amx_int8"}


def int8_form(isa: Collection[str]) -> Int8Form:
    """Return the types of activations and weights that suit ONNX Runtime's int8 kernels best.

    ``isa`` has the names of ``probe.CpuFacts.isa`` or of a profile's ``cpu.isa``. "fp32" says that
    int8 is not worth it: Arm cores without dot product or int8 matrix multiplication (Raspberry Pi
    4) are up to twice as slow in int8 (ARM-software/armnn#511), though they take fewer
    instructions.

    Instructions of one ResNet-18 inference in millions, ONNX Runtime 1.31 under QEMU 7.2: 199.2
    with U8S8 and 185.2 with S8S8 on Cortex-A76 (dot product); 189.3 and 185.1 with all extensions
    (int8 matrix multiplication). x86-64 is the other way round: 5.5 ms with U8S8, 14.4 with S8S8.
    """
    found = set(isa)
    if found & _ARM_INT8:
        return "S8S8"
    return "U8S8" if found & _X86_INT8 else "fp32"
