"""Every budget of a recipe as a limit of what may be planned; tables of a target are read here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from secateur.core.channels import ChannelGroup
from secateur.core.errors import DeviceError, PlanError
from secateur.devices.host import host_facts
from secateur.devices.latency_table import LatencyTable, load_table
from secateur.devices.operators import Operators
from secateur.devices.target import Target
from secateur.flow import counted
from secateur.flow.job import Job
from secateur.flow.latency import (
    latency_limit,
    network_operators,
    peak_limits,
    timed_file,
    timed_precision,
)
from secateur.flow.ncnn import NCNN
from secateur.flow.stages import exported
from secateur.lower.operators import placed_as
from secateur.prune import count_macs, find_groups, macs_model
from secateur.prune.costs import macs_limit, params_limit, size_limit
from secateur.prune.groups import output_layers
from secateur.prune.problem import Limit
from secateur.runtimes.base import runtime_of

# Of a weight in the file that ships, what stands beside it in int8 (scales, 32-bit biases, Q/DQ
# nodes) included: 1.13 to 1.17 were found. ``auto`` may ship fp32.
BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.2}

AIM = 0.98  # of the latency budget: what a plan is made for, so that its measure lies within
Limits = Mapping[str, Sequence[Limit]]  # by the budget's key in the recipe
Tables = Mapping[str, LatencyTable]  # by that, too
TABLED = ("latency_ms", "instructions")


@dataclass(frozen=True, eq=False)
class Basis:
    """What limits are read off: the ``groups`` of the job's outline, and, exported when they are
    asked for, its operators.
    """

    job: Job
    target: Target
    groups: Sequence[ChannelGroup]

    @property
    def full(self) -> list[int]:
        """Every group's width."""
        return [group.width for group in self.groups]

    @cached_property
    def onnx(self) -> Path:
        """The outline in fp32."""
        return exported(self.job, self.job.outline, self.job.outline_key)

    @cached_property
    def operators(self) -> Operators:
        """The operators of the outline in fp32."""
        return network_operators(self.job, self.groups, self.onnx)

    @cached_property
    def timed(self) -> Operators:
        """Those in the precision that plans are timed in, at their places in the whole network."""
        file = timed_file(self.job, self.target, self.job.outline, self.job.outline_key)
        found = network_operators(self.job, self.groups, file)
        if not self.job.removed:
            return found
        whole = timed_file(self.job, self.target)
        of_whole = network_operators(replace(self.job, removed=()), self.groups, whole)
        return placed_as(found, file, of_whole, whole)


def basis_of(job: Job, target: Target) -> Basis:
    """Return what the job's limits and latencies are read off."""
    return Basis(job, target, find_groups(job.outline, job.example))


def limits_of(job: Job, target: Target, basis: Basis, tables: Tables) -> Limits:
    """Return the limits of every budget; milliseconds and instructions by the tables."""
    wanted = job.recipe.prune.budget
    limits: dict[str, Sequence[Limit]] = {}
    if wanted.macs is not None:
        cost = macs_model(job.outline, basis.groups, job.example)
        most = int(wanted.macs * count_macs(job.selected, job.example))
        limits["macs"] = [macs_limit(cost, most)]
    if wanted.params is not None:
        most = int(wanted.params * sum(p.numel() for p in job.selected.parameters()))
        limits["params"] = [params_limit(job.outline, basis.groups, most)]
    if wanted.size_mb is not None:
        size, most = basis.onnx.stat().st_size, int(1e6 * wanted.size_mb)
        limits["size_mb"] = [_size_limit(job, target, basis, size, most)]
    if wanted.peak_memory_mb is not None:
        limits["peak_memory_mb"] = peak_limits(basis.operators, int(1e6 * wanted.peak_memory_mb))
    for key, table in tables.items():
        whole = 1.0 if key == "latency_ms" else _parent_by(job, target, table)
        limit = latency_limit(basis.timed, table, AIM * whole * wanted.given()[key])
        limits[key] = [replace(limit, scale=1 / AIM)]  # messages speak of the budget
    return limits


def _size_limit(job: Job, target: Target, basis: Basis, size: int, most: int) -> Limit:
    """Return the limit on the ONNX file that ships: for ncnn, which has files of its own, in fp32.

    In int8 a guard leaves the ends of heads in fp32.
    """
    precision = job.recipe.precision
    if target.runtime == NCNN:
        return size_limit(job.outline, basis.groups, size, most)
    guarded = precision.mode == "int8" and precision.guard
    ends = output_layers(job.outline, job.example) if guarded else ()
    each = BYTES.get(precision.mode, BYTES["fp32"])
    return size_limit(job.outline, basis.groups, size, most, each, ends)


def _parent_by(job: Job, target: Target, table: LatencyTable) -> float:
    """Return the parent's million instructions: of a table in fp32 its own, else counted."""
    if table.precision == "fp32":
        return table.parent_ms
    return counted.parent_instructions(job, target) / 1e6


def tabled_budget(job: Job) -> str:
    """Return the name of the budget that a table is needed for, or "".

    Raises:
        PlanError: the recipe has both.
    """
    keys = [key for key in TABLED if key in job.recipe.prune.budget.given()]
    if len(keys) > 1:
        raise PlanError(
            "prune.budget has latency_ms and instructions, which stands for it",
            hint="give latency_ms where it can be measured, else instructions",
        )
    return "".join(keys)


def load_table_of(job: Job, target: Target, path: Path) -> LatencyTable:
    """Read a latency table of the target, in the precision that the job's plans are timed in.

    Raises:
        PlanError: it is in another unit than the recipe's budget.
        DeviceError: it is damaged, or of another target, precision or number of threads, or was
            measured on this machine with another version of the runtime, or a network that is
            this one in other widths.
    """
    table, budget = load_table(path), tabled_budget(job)
    if budget and (table.unit == "ms") != (budget == "latency_ms"):
        raise PlanError(
            f"{path} is in {table.unit}, and the budget is prune.budget.{budget}",
            hint="give the table that `secateur profile` makes for that budget",
        )
    if table.unit == "ms" and table.threads != target.threads:
        raise DeviceError(
            f"{path} was measured with {table.threads} threads, {target.name} has {target.threads}",
            hint=f"measure one with `secateur profile RECIPE --target {target.name}`",
        )
    if table.precision != timed_precision(job):
        raise DeviceError(
            f"{path} was measured in {table.precision}, the recipe's plans are timed in "
            f"{timed_precision(job)}",
            hint=f"measure one with `secateur profile RECIPE --target {target.name}`",
        )
    if table.host.get("target", target.name) != target.name:
        where = "" if table.unit == "ms" else " --device emulated"
        raise DeviceError(
            f"{path} is of {table.host['target']}, and the target is {target.name}",
            hint=f"make one with `secateur profile RECIPE --target {target.name}{where}`",
        )
    if table.runs and not any(run.predicted_ms for run in table.runs):
        raise DeviceError(
            f"{path} is not finished: {len(table.runs)} networks were measured, none to check "
            "it by",
            hint="run the same `secateur profile` again: it goes on",
        )
    full = tuple(group.width for group in find_groups(job.selected, job.example))
    measured = {run.kept for run in table.runs if len(run.kept) == len(full)}
    if measured and full not in measured:  # of fewer or more groups: another choice of tasks
        raise DeviceError(
            f"{path} is of a network with the same layers in other widths",
            hint=f"measure this one with `secateur profile RECIPE --target {target.name}`",
        )
    if is_of_this_machine(table, target):
        table.check_runtime(runtime_of(target.runtime).version())
    return table


def is_of_this_machine(table: LatencyTable, target: Target) -> bool:
    """Say whether what the table predicts can be measured here."""
    return target.is_this_machine() and bool(table.host.get("cpu") == host_facts()["cpu"])
