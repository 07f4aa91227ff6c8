"""What a plan will take where it cannot be measured: by a latency table, or a labelled roofline."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from secateur.bench.estimate import Estimate, roofline, table_estimate
from secateur.core.errors import DeviceError
from secateur.devices.latency_table import Unit
from secateur.devices.target import Precision, Target
from secateur.flow.job import Job
from secateur.flow.limits import Basis, basis_of, load_table_of
from secateur.flow.warm_start import Planned


@dataclass(frozen=True)
class PlanEstimate:
    """The latency of the parent, with the kept tasks only, and of the plan, in ``precision``.

    Of a table of instructions both are million instructions, as ``unit`` says.
    """

    parent: Estimate
    plan: Estimate
    precision: Precision
    unit: Unit = "ms"

    def said(self) -> str:
        """Return it in words."""
        label = "by the latency table" if self.plan.source == "table" else "roofline, not measured"
        if self.unit != "ms":
            label = "by the table of instructions, a proxy and no latency"
        return (
            f"estimate ({label}), {self.precision}: parent {self.parent.ms:.4g} ± "
            f"{self.parent.error_ms:.2g} {self.unit}, plan {self.plan.ms:.4g} ± "
            f"{self.plan.error_ms:.2g} {self.unit}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-like data."""
        return asdict(self)


def estimate_plan(
    job: Job, target: Target, planned: Planned, table_file: Path | None = None
) -> PlanEstimate:
    """Return what parent and plan take by a table of the target, or by its profile.

    Raises:
        DeviceError: the table does not fit; or, without one, the profile lacks a rate.
    """
    whole = basis_of(job, target)
    outline = basis_of(replace(job, removed=planned.plan.removed), target)
    pair = (whole, whole.full), (outline, [len(cut.kept) for cut in planned.plan.cuts])
    if table_file is None:
        return _roofline(job, target, pair)
    table = load_table_of(job, target, table_file)
    parent, plan = (table_estimate(basis.timed, table, kept) for basis, kept in pair)
    return PlanEstimate(parent, plan, table.precision, table.unit)


def _roofline(job: Job, target: Target, pair: tuple[tuple[Basis, list[int]], ...]) -> PlanEstimate:
    """Return the estimate in the recipe's precision, or else in one that the profile has rates of.

    Raises:
        DeviceError: the profile lacks the rates or the bandwidth.
    """
    mode = job.recipe.precision.mode
    first: Precision = (
        ("fp16" if target.accelerator == "gpu" else "fp32") if mode == "auto" else mode
    )
    refused: DeviceError | None = None
    for precision in dict.fromkeys((first, *target.precisions)):
        try:
            parent, plan = (
                roofline(basis.operators, target, kept, precision=precision) for basis, kept in pair
            )
            return PlanEstimate(parent, plan, precision)
        except DeviceError as error:
            refused = refused or error
    raise refused or DeviceError(f"{target.name} has no precision", hint="complete its profile")
