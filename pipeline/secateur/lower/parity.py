"""Compare two models' outputs task by task, on real images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import BuildError

Outputs = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Parity:
    """One task's largest absolute difference, and the range of the reference output."""

    max_abs_difference: float
    output_range: float

    @property
    def relative(self) -> float:
        """The difference as a share of the range."""
        return self.max_abs_difference / max(self.output_range, 1e-12)


def compare_outputs(
    reference: Outputs, other: Outputs, *, tolerance: float | None = None
) -> dict[str, Parity]:
    """Return the parity of each task.

    Raises:
        BuildError: a task differs by more than ``tolerance`` of its range, or in shape.
    """
    result = {}
    for task, wanted in reference.items():
        got = other[task]
        if got.shape != wanted.shape:
            raise BuildError(
                f"task '{task}' has shape {got.shape} after export, expected {wanted.shape}",
                hint="report this with the model: export must not change shapes",
            )
        spread = float(wanted.max() - wanted.min())
        # A single value has no spread; its own size is its range then.
        parity = Parity(float(np.abs(wanted - got).max()), spread or float(np.abs(wanted).max()))
        if tolerance is not None and not parity.relative <= tolerance:
            raise BuildError(
                f"task '{task}' differs by {parity.relative:.2e} of its range after export, "
                f"allowed {tolerance:.0e}",
                hint="run the model in eval mode and look for ops that the exporter approximates",
            )
        result[task] = parity
    return result
