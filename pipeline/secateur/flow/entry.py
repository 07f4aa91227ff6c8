"""What a build, or its finished bundle, has to tell the library of earlier cuts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import yaml

from secateur.bundle.read import check_files, read_bundle
from secateur.core.errors import BundleError, SecateurError
from secateur.core.plan import PrunePlan
from secateur.flow.evidence import Evidence
from secateur.flow.job import Job
from secateur.flow.sketches import sketch_tasks
from secateur.flow.stages import Cut
from secateur.flow.warm_start import Planned
from secateur.flow.witnesses import task_mark
from secateur.vote.entry import Entry, Facts, TaskMark
from secateur.vote.library import add_entry, open_library

UNSTATED = "unstated"  # axes that the bundle does not name: its keep-sets are shown, never compared
FILLED = 0.9  # a budget that the plan spends no more of was not the tightest


def add_build(job: Job, device: str, planned: Planned, cut: Cut, evidence: Evidence) -> str:
    """Add a build to the library unless the recipe says no; return a sentence on what was done.

    What keeps it from being added does not undo a build: the sentence says so. The same build made
    again is the same entry.
    """
    if not job.recipe.library.add:
        return ""
    if evidence.accuracy.too_low:
        return f"not added: {', '.join(evidence.accuracy.too_low)} lost more than max_drop allows"
    try:
        library = open_library(job.recipe.library_root())
        name = add_entry(library, _entry_of_build(job, device, planned, cut, evidence))
    except SecateurError as error:
        return f"not added: {error}"
    return f"entry {name} in {library.root}"


def _entry_of_build(job: Job, device: str, planned: Planned, cut: Cut, evidence: Evidence) -> Entry:
    plan = planned.plan
    facts = Facts(
        parent=job.library_key,
        parent_name=job.recipe.model.factory,
        tasks=tuple(task_mark(task) for task in job.tasks),
        data=job.train.fingerprint,
        budget=_share_of_macs(plan),
        basis=job.library_basis,
        network=job.network_key,
        accuracy=_numbers(evidence.accuracy.shipped),
        delta_t=evidence.accuracy.delta_t,
        steps=cut.steps,
        recipe=job.recipe.source,
        device=device,
    )
    state = cut.recovered.state_dict()
    return Entry(
        facts,
        plan,
        planned.scored.per_task,
        sketch_tasks(job),
        {name: tensor.detach().cpu().numpy() for name, tensor in state.items()},
        job.axes,
    )


def _numbers(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the metrics that are numbers, as JSON has them: one may have been of no pixel."""
    return {
        task: {name: value for name, value in own.items() if math.isfinite(value)}
        for task, own in metrics.items()
    }


def _share_of_macs(plan: PrunePlan) -> float:
    """Return the budget in MACs, 0..1; where another one was the tighter, what the plan came to."""
    if FILLED * plan.budget_macs < plan.macs_after and plan.budget_macs < plan.macs_before:
        return plan.budget_macs / plan.macs_before
    return plan.macs_after / plan.macs_before


def entry_of_bundle(folder: Path) -> Entry:
    """Return the entry of a bundle: its plan and what its manifest says of it.

    A bundle holds neither scores nor sketches, so it can be listed and its keep-sets looked at, but
    no measure finds it; its weights stay where they are.

    Raises:
        BundleError: it is no bundle, or its plan cannot be read.
        VerifyError: a file of it was altered.
    """
    manifest = read_bundle(folder)
    check_files(folder, manifest)
    try:
        plan = PrunePlan.from_json(json.loads((folder / "plan.json").read_text(encoding="utf-8")))
        steps = int(manifest.plan.get("recovery_steps", 0))
    except (ValueError, TypeError) as error:
        raise BundleError(
            f"the plan of {folder} cannot be read: {error}", hint="build the bundle again"
        ) from error
    facts = Facts(
        parent=manifest.parent.get("trunk", manifest.parent["fingerprint"]),
        parent_name=manifest.parent["factory"],
        tasks=tuple(TaskMark(task.name, task.kind, task.classes) for task in manifest.tasks),
        data=manifest.data["train"],
        budget=_share_of_macs(plan),
        basis=manifest.parent.get("basis", _stated_basis(manifest.recipe)),
        network=manifest.parent.get("network", ""),
        accuracy=_numbers(manifest.accuracy.shipped),
        delta_t=manifest.accuracy.delta_t,
        steps=steps,
        recipe=manifest.recipe,
        device=manifest.device,
        created=manifest.created,
        version=manifest.versions.get("secateur", ""),
    )
    return Entry(facts, plan)


def _stated_basis(recipe: str) -> str:
    """Return ``original`` where the recipe asks for it; other axes have no name in a bundle."""
    try:
        axes = yaml.safe_load(recipe)["prune"]["axes"]
    except (yaml.YAMLError, KeyError, TypeError):
        return UNSTATED
    return "original" if axes == "original" else UNSTATED
