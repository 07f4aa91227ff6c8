"""The operators of a network as a runtime sees them, whatever their widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from secateur.core.widths import Width
from secateur.devices.target import Precision


@dataclass(frozen=True, order=True)
class OperatorKind:
    """An operator in all but its widths, as it occurs in a network.

    ``operator`` is ONNX's; ``detail`` the activation that a runtime fuses into it, or the mode of a
    Resize. ``height`` and ``width`` are those of the input, ``out_height`` and ``out_width`` of the
    output; a linear layer has its rows (tokens) as ``height``. ``groups`` is 0 for a depth-wise
    convolution, 1 for a dense one; a Concat has the number of its inputs there. ``place`` is its
    node's name in the network: what a runtime makes of an operator depends on its neighbours.
    """

    operator: str
    height: int
    width: int
    out_height: int
    out_width: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    groups: int = 1
    detail: str = ""
    precision: Precision = "fp32"
    place: str = ""

    def said(self) -> str:
        """Return the kind in a few words."""
        shape = (
            f" {self.kernel[0]}x{self.kernel[1]}/{self.stride[0]}" if self.kernel > (1, 1) else ""
        )
        wide = " depth-wise" if self.groups == 0 else ""
        more = f"+{self.detail}" if self.detail else ""
        return f"{self.operator}{more}{shape}{wide} at {self.height}x{self.width} {self.precision}"

    def macs(self, c_in: int, c_out: int) -> int:
        """Return the multiply-accumulates of one image, 0 for an operator without weights."""
        if self.operator not in ("Conv", "Gemm", "MatMul"):
            return 0
        read = 1 if self.groups == 0 else c_in  # of one group, where there are several
        kernel = self.kernel[0] * self.kernel[1]
        return self.out_height * self.out_width * kernel * read * c_out

    def traffic(self, c_in: int, c_out: int) -> int:
        """Return the values read and written for one image, weights included."""
        weights = self.macs(c_in, c_out) // (self.out_height * self.out_width)
        inputs, outputs = c_in * self.height * self.width, c_out * self.out_height * self.out_width
        return inputs + outputs + weights


@dataclass(frozen=True)
class PlacedOperator:
    """One operator of a network: its kind, and the channels it reads and makes after any cut."""

    name: str
    kind: OperatorKind
    read: Width
    made: Width


@dataclass(frozen=True)
class Operators:
    """``timed`` are those whose time a cut may change, ``bare`` counts the other nodes that run.

    ``live`` are, per node in order, the activations alive then: each as (first, second, bytes),
    bytes for each product of the two widths. ``places`` gives the place of a timed operator by each
    name that a runtime may know it by: its node's, its result's, and those of an activation that is
    part of it.
    """

    timed: tuple[PlacedOperator, ...]
    bare: int
    live: tuple[tuple[tuple[Width, Width, int], ...], ...]
    places: Mapping[str, str] = field(default_factory=dict)
