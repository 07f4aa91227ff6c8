"""Every budget of a recipe as limits of the plan; milliseconds are measured and met.

A cut's latency does not depend on its weights, so a plan is measured as soon as it is made. Where
it misses its budget, the table is corrected by what was measured, and the plan made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from secateur.bench.estimate import table_estimate
from secateur.bench.latency import Protocol, measure
from secateur.core.channels import ChannelGroup
from secateur.core.errors import PlanError
from secateur.core.model import MultiTaskModel, model_fingerprint
from secateur.devices.host import host_facts
from secateur.devices.latency_table import LatencyTable
from secateur.devices.operators import Operators
from secateur.devices.target import Target
from secateur.flow.job import Job
from secateur.flow.latency import (
    corrected,
    latency_limit,
    network_operators,
    peak_limits,
    profile_job,
)
from secateur.flow.stages import exported
from secateur.flow.warm_start import Planned, plan_job
from secateur.prune import apply_plan, find_groups, macs_model
from secateur.prune.costs import macs_limit, params_limit, size_limit
from secateur.prune.problem import Limit
from secateur.runtimes.base import runtime_of

AIM = 0.98  # of the latency budget: what a plan is made for, so that its measure lies within
LEAST_USED = 0.93  # of the budget; a cut that is quicker could have kept more
TRIES = 4


def plan_within(job: Job, target: Target, protocol: Protocol | None = None) -> Planned:
    """Score and plan the cut within every budget of the recipe.

    Raises:
        PlanError: a budget cannot be met, or a plan's measured latency missed it every time.
        DeviceError: the budget is in milliseconds and this machine cannot measure them.
    """
    wanted = job.recipe.prune.budget
    if wanted.model_fields_set == {"macs"}:
        return plan_job(job, job.grid(target))
    basis = _basis(job)
    if wanted.latency_ms is None:
        return plan_job(limited(job, basis, None), job.grid(target))
    table = profile_job(job, target, _table_file(job, target))
    best: tuple[float, Planned] | None = None
    missed = []
    for _ in range(TRIES):
        planned = plan_job(limited(job, basis, table), job.grid(target))
        counts = [len(cut.kept) for cut in planned.plan.cuts]
        took = _measured_ms(job, target, planned, protocol)
        missed.append(took)
        whole = all(len(cut.kept) == cut.width for cut in planned.plan.cuts)
        if took <= wanted.latency_ms and (best is None or took > best[0]):
            best = took, planned
        if best is not None and (whole or best[0] >= LEAST_USED * wanted.latency_ms):
            break
        table = corrected(table, table_estimate(basis.operators, table, counts).ms, took)
    if best is None:
        raise PlanError(
            f"no plan met the budget of {wanted.latency_ms:g} ms in {TRIES} tries; measured were "
            f"{', '.join(f'{ms:.3g}' for ms in missed)} ms",
            hint="raise prune.budget.latency_ms, or measure while nothing else runs",
        )
    return best[1]


@dataclass(frozen=True)
class _Basis:
    """What limits are read off: the groups of the selected model, and its operators."""

    groups: Sequence[ChannelGroup]
    operators: Operators
    onnx: Path

    @property
    def full(self) -> list[int]:
        return [group.width for group in self.groups]


def _basis(job: Job) -> _Basis:
    groups = find_groups(job.selected, job.example)
    onnx = exported(job, job.selected, job.parent_key)
    return _Basis(groups, network_operators(job, groups), onnx)


def limited(job: Job, basis: _Basis, table: LatencyTable | None) -> Job:
    """Return the job with a limit for every budget of its recipe; milliseconds by ``table``."""
    wanted, full = job.recipe.prune.budget, basis.full
    limits: list[Limit] = []
    if wanted.macs is not None:
        cost = macs_model(job.selected, basis.groups, job.example)
        limits.append(macs_limit(cost, int(wanted.macs * cost.macs(full))))
    if wanted.params is not None:
        every = params_limit(job.selected, basis.groups, 0)
        limits.append(replace(every, most=int(wanted.params * every.total(full))))
    if wanted.size_mb is not None:
        size = basis.onnx.stat().st_size
        limits.append(size_limit(job.selected, basis.groups, size, int(1e6 * wanted.size_mb)))
    if wanted.peak_memory_mb is not None:
        limits += peak_limits(basis.operators, int(1e6 * wanted.peak_memory_mb))
    if wanted.latency_ms is not None and table is not None:
        limits.append(latency_limit(basis.operators, table, AIM * wanted.latency_ms))
    share = min((limit.most / limit.total(full) for limit in limits), default=1.0)
    return replace(job, limits=tuple(limits), kept_share=min(1.0, share))


def _table_file(job: Job, target: Target) -> Path:
    """Return where the table of this model, target, runtime and machine is kept."""
    host = host_facts()
    key = (job.parent_key, job.basis, [task.name for task in job.tasks], job.spec.height,
           job.spec.width, target.name, target.threads, job.grid(target),
           runtime_of(target.runtime).version(), host["cpu"], host["logical_cores"])  # fmt: skip
    return job.cache.folder("latency", *key) / "latency.json"


def _measured_ms(job: Job, target: Target, planned: Planned, protocol: Protocol | None) -> float:
    """Return the median time of the planned cut on the target's runtime."""
    cut: MultiTaskModel = apply_plan(job.selected, planned.scored.groups, planned.plan, job.example)
    path = exported(job, cut, model_fingerprint(cut))
    session = runtime_of(target.runtime).open_session(path, target.threads)
    image = job.example[:1].numpy()
    return measure({"cut": lambda: session.run(image)}, protocol, "measuring the plan")[
        "cut"
    ].median_ms
