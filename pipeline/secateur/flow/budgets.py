"""Every budget of a recipe as limits of the plan; milliseconds are measured and met.

A cut's latency does not depend on its weights, so a plan is measured as soon as it is made. Where
it misses its budget, the table is corrected by what was measured, and the plan made again. What
ships is measured beside the parent at the end of a build, and judged by ``settle``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from secateur.bench.compare import Medians, Ratio, ratio_of_medians
from secateur.bench.estimate import table_estimate
from secateur.bench.latency import Latency, Protocol, measure
from secateur.bundle.manifest import BudgetRecord
from secateur.core.errors import PlanError
from secateur.core.files import write_json
from secateur.core.model import MultiTaskModel, model_fingerprint
from secateur.core.plan import PrunePlan
from secateur.devices.host import host_facts
from secateur.devices.latency_table import SCHEMA
from secateur.devices.target import Target
from secateur.flow import counted
from secateur.flow.blocks import Outline, without_least
from secateur.flow.evidence import Evidence
from secateur.flow.job import Job
from secateur.flow.latency import (
    corrected,
    profile_job,
    timed_file,
    timed_precision,
)
from secateur.flow.limits import (
    AIM,
    TABLED,
    Basis,
    Limits,
    Tables,
    basis_of,
    is_of_this_machine,
    limits_of,
    load_table_of,
    tabled_budget,
)
from secateur.flow.meters import emulated_cpu
from secateur.flow.stages import exported
from secateur.flow.warm_start import Planned, plan_job
from secateur.prune import apply_plan
from secateur.prune.costs import macs_limit
from secateur.runtimes.base import runtime_of

SURE = 0.99  # of the budget: what it may measure, since the next measure differs by up to a percent
LEAST_USED = 0.93  # of the budget; a cut that is quicker could have kept more
TRIES = 4
UNITS = {
    "macs": "of the parent's MACs",
    "params": "of the parent's parameters",
    "size_mb": "MB",
    "latency_ms": "ms",
    "instructions": counted.UNIT,
    "peak_memory_mb": "MB of activations",
}


def plan_within(
    job: Job, target: Target, protocol: Protocol | None = None, table_file: Path | None = None
) -> Planned:
    """Score and plan the cut within every budget of the recipe.

    ``table_file`` is a latency table of the target, or one of instructions; without one it is
    measured here, or counted on an emulated CPU. One of another machine is planned by and not
    corrected.

    Raises:
        PlanError: a budget cannot be met, or a plan's measured latency missed it every time.
        DeviceError: the budget is in milliseconds and this machine cannot measure them, or the
            table is damaged, has holes or is of another runtime.
    """
    wanted, blocks = job.recipe.prune.budget, job.recipe.prune.blocks
    tables = _tables(job, target, table_file)
    if set(wanted.given()) == {"macs"} and not blocks:
        planned = plan_job(job, job.grid(target), target.name)
        limit = macs_limit(planned.scored.cost, planned.plan.budget_macs)
        return _with_records(job, planned, {"macs": [limit]})
    if blocks:
        precision = job.recipe.precision
        by = [target.name, target.runtime, job.grid(target), timed_precision(job),
              precision.mode, precision.guard,
              {key: table.to_json() for key, table in tables.items()}]  # fmt: skip
        job = without_least(job, lambda trial: _outlined(trial, target, tables), by)
    basis = basis_of(job, target)
    table = tables.get("latency_ms")
    if table is not None and (table_file is None or is_of_this_machine(table, target)):
        return _measured_plan(job, target, basis, tables, protocol)
    if "instructions" in tables and table_file is None:
        return _counted_plan(job, target, basis, tables)
    return _planned(job, target, basis, tables)


def _tables(job: Job, target: Target, table_file: Path | None) -> Tables:
    """Return what the recipe's budget in milliseconds or instructions is planned by."""
    key = tabled_budget(job)
    if table_file is not None:
        table = load_table_of(job, target, table_file)
    elif key == "latency_ms":
        table = profile_job(job, target, _folder(job, target) / "latency.json")
    elif key == "instructions":
        file = _folder(job, target) / f"instructions-{emulated_cpu(target)}.json"
        table = counted.instruction_table(job, target, file)
    return {key: table} if key else {}


def _outlined(job: Job, target: Target, tables: Tables) -> Outline:
    """Return the plan for what the job leaves of its model, and how far that is from fitting.

    Its channels are scored once: many such plans are made, and each is judged.
    """
    prune = job.recipe.prune.model_copy(update={"rescore": False})
    job = replace(job, recipe=job.recipe.model_copy(update={"prune": prune}))
    basis = basis_of(job, target)
    limits = [limit for own in limits_of(job, target, basis, tables).values() for limit in own]
    over = max(limit.total(basis.full) / limit.most for limit in limits)
    return Outline(basis.groups, over, lambda: _planned(job, target, basis, tables).plan)


def _measured_plan(
    job: Job, target: Target, basis: Basis, tables: Tables, protocol: Protocol | None
) -> Planned:
    """Plan, measure the cut and correct the table, until the measure lies within the budget."""
    most, usual = job.recipe.prune.budget.latency_ms or 0.0, parent_ms(job, target, protocol)
    table = tables["latency_ms"]
    best: tuple[float, Planned] | None = None
    missed = []
    for _ in range(TRIES):
        try:
            planned = _planned(job, target, basis, {"latency_ms": table})
        except PlanError:
            if best is None:
                raise
            break  # by the corrected table nothing fits; what was measured to fit does
        counts = _counts(planned.plan)
        key = _measure_key(job, target, planned.plan)
        measured = partial(_measured_share, job, target, planned, protocol)
        took = usual * float(job.cache.json("planned_latency", key, measured))
        missed.append(took)
        if took <= SURE * most and (best is None or took > best[0]):
            best = took, planned
        if best is not None and (counts == basis.full or best[0] >= LEAST_USED * most):
            break
        table = corrected(table, table_estimate(basis.timed, table, counts).ms, took)
    if best is None:
        raise PlanError(
            f"no plan met the budget of {most:g} ms in {TRIES} tries; measured were "
            f"{', '.join(f'{ms:.3g}' for ms in missed)} ms",
            hint="raise prune.budget.latency_ms, or measure while nothing else runs",
        )
    took, planned = best
    record = planned.budgets["latency_ms"]
    record = record.model_copy(update={"planned": took, "how": "measured", "met": True})
    return replace(planned, budgets={**planned.budgets, "latency_ms": record})


def _counted_plan(job: Job, target: Target, basis: Basis, tables: Tables) -> Planned:
    """Plan, count the cut's instructions and correct the table, until they are within the budget.

    A count is the same every time, so that the first plan within it is taken.
    """
    most, missed, table = job.recipe.prune.budget.instructions or 0.0, [], tables["instructions"]
    for _ in range(TRIES):
        planned = _planned(job, target, basis, {"instructions": table})
        cut: MultiTaskModel = apply_plan(job.selected, planned.scored.groups, planned.plan)
        share = counted.share_counted(job, target, cut)
        if share <= most:
            record = planned.budgets["instructions"]
            record = record.model_copy(update={"planned": share, "how": "emulated", "met": True})
            return replace(planned, budgets={**planned.budgets, "instructions": record})
        missed.append(share)
        parent = counted.parent_instructions(job, target) / 1e6
        predicted = table_estimate(basis.timed, table, _counts(planned.plan)).ms
        table = corrected(table, predicted, share * parent)
    raise PlanError(
        f"no plan met the budget of {most:g} {counted.UNIT} in {TRIES} tries; counted were "
        f"{', '.join(f'{share:.3g}' for share in missed)}",
        hint="raise prune.budget.instructions",
    )


def _planned(job: Job, target: Target, basis: Basis, tables: Tables) -> Planned:
    """Return the plan within a limit for every budget; milliseconds and instructions by tables."""
    limits = limits_of(job, target, basis, tables)
    flat = tuple(limit for own in limits.values() for limit in own)
    share = min((limit.most / limit.total(basis.full) for limit in flat), default=1.0)
    limited = replace(job, limits=flat, kept_share=min(1.0, share))
    table = next(iter(tables.values()), None)
    return _with_records(job, plan_job(limited, job.grid(target, table), target.name), limits)


def _with_records(job: Job, planned: Planned, limits: Limits) -> Planned:
    """Return the plan with what it spends of each budget, and keeps of each task with a floor."""
    wanted, counts = job.recipe.prune.budget.given(), _counts(planned.plan)
    records = {}
    for key, own in limits.items():
        used = max(limit.total(counts) / limit.most for limit in own)
        aimed = AIM if key in TABLED else 1.0
        records[key] = BudgetRecord(
            wanted=wanted[key], unit=UNITS[key], planned=used * aimed * wanted[key],
            how="table" if key in TABLED else "counted",
        )  # fmt: skip
    for task, floor in job.recipe.floors().items():
        records[f"tasks.{task}.floor"] = BudgetRecord(
            wanted=floor, unit="of its importance", planned=1 - planned.plan.lost[task],
            how="counted", sense="least",
        )  # fmt: skip
    return replace(planned, budgets=records)


def settle(
    job: Job, target: Target, planned: Planned, evidence: Evidence, shipped: Path | None = None
) -> dict[str, BudgetRecord]:
    """Return the plan's budgets with what ships: what it spends there, and whether that is met.

    ``shipped`` is its ONNX file, which instructions are counted of.

    Milliseconds are missed where the median is above the budget beyond the noise of its run, and
    not because the parent beside it is slower, too, than when the plan was made. Then what was
    measured takes the place of the plan's own measure, so that the next build corrects it; so does
    the parent's time where it is much less than it was.
    """
    parent, cut = evidence.cost_parent, evidence.cost
    counts = {
        "macs": cut.macs / parent.macs,
        "params": cut.params / parent.params,
        "size_mb": cut.onnx_bytes / 1e6,
    }
    settled = {}
    for key, record in planned.budgets.items():
        update: dict[str, Any] = {"shipped": record.planned, "met": True}  # by widths alone
        if key in counts:
            update = {"shipped": counts[key], "met": counts[key] <= record.wanted}
        elif key == "latency_ms":
            update = {"met": None}
            if evidence.latency and record.how == "measured":
                update = _settled_latency(job, target, planned, evidence.latency)
        elif key == "instructions":
            share = counted.share_shipped(job, target, shipped) if shipped else None
            update = {"shipped": share, "met": None if share is None else share <= record.wanted}
        settled[key] = record.model_copy(update=update)
    return settled


def _settled_latency(
    job: Job, target: Target, planned: Planned, latency: Mapping[str, Latency]
) -> dict[str, Any]:
    wanted = planned.budgets["latency_ms"].wanted
    timed, usual, ratio = latency["cut"], parent_ms(job, target), _ratio(latency)
    medians = np.array(timed.block_medians_ms)
    over = ratio_of_medians(np.array([wanted]), medians, paired=False).verdict == "slower"
    missed = over and ratio.low * usual > wanted
    if missed:
        key = _measure_key(job, target, planned.plan)
        write_json(job.cache.folder("planned_latency", *key) / "value.json", ratio.value)
    parent = latency["parent"].median_ms
    if parent < LEAST_USED * usual:  # something else ran when it was measured first
        write_json(job.cache.folder("parent_latency", *_key(job, target)) / "value.json", parent)
    return {"shipped": timed.median_ms, "met": not missed}


def _counts(plan: PrunePlan) -> list[int]:
    return [len(cut.kept) for cut in plan.cuts]


def _key(job: Job, target: Target) -> tuple[Any, ...]:
    """Return what a latency depends on beside the plan: the network, the runtime, the machine."""
    host = host_facts()
    return (job.parent_key, job.basis, [task.name for task in job.tasks], job.spec.height,
            job.spec.width, target.name, target.threads,
            runtime_of(target.runtime).version(), host["cpu"], host["logical_cores"])  # fmt: skip


def _measure_key(job: Job, target: Target, plan: PrunePlan) -> tuple[Any, ...]:
    return (*_key(job, target), job.recipe.precision.mode, _counts(plan), *plan.removed)


def _folder(job: Job, target: Target) -> Path:
    """Return where the table of this model, target, runtime and machine is kept."""
    key = (*_key(job, target), job.grid(target), timed_precision(job))
    return job.cache.folder("latency", SCHEMA, *key)


def parent_ms(job: Job, target: Target, protocol: Protocol | None = None) -> float:
    """Return the median time of the fp32 parent with the kept tasks, measured once.

    Later measures are scaled by the parent's beside them, so that a machine whose clock has
    changed, or that is busy, does not change the plan.
    """

    def measured() -> float:
        call = _call(job, target, exported(job, job.selected, job.selected_key))
        return measure({"parent": call}, protocol, "measuring the parent")["parent"].median_ms

    return float(job.cache.json("parent_latency", _key(job, target), measured))


def _measured_share(job: Job, target: Target, planned: Planned, protocol: Protocol | None) -> float:
    """Return the latency of the planned cut on the target's runtime, over the fp32 parent's.

    It is the median over pairs of blocks that were measured side by side: on a machine that is
    half the time busy, the medians of the two may be of different halves.
    """
    cut: MultiTaskModel = apply_plan(job.selected, planned.scored.groups, planned.plan)
    calls = {
        "parent": _call(job, target, exported(job, job.selected, job.selected_key)),
        "cut": _call(job, target, timed_file(job, target, cut, model_fingerprint(cut))),
    }
    parent, cut_blocks = _blocks(measure(calls, protocol, "measuring the plan"))
    return float(np.median(cut_blocks / parent))


def _call(job: Job, target: Target, file: Path) -> Callable[[], object]:
    session = runtime_of(target.runtime).open_session(file, target.threads)
    return partial(session.run, job.example[:1].numpy())


def _ratio(latency: Mapping[str, Latency]) -> Ratio:
    """Return the cut's latency over that of the parent, which took turns with it."""
    return ratio_of_medians(*_blocks(latency), paired=True)


def _blocks(latency: Mapping[str, Latency]) -> tuple[Medians, Medians]:
    """Return the block medians of the parent and of the cut."""
    parent, cut = (np.array(latency[name].block_medians_ms) for name in ("parent", "cut"))
    return parent, cut
