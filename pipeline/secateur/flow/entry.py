"""What a finished bundle has to tell the library of earlier cuts."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from secateur.bundle.read import check_files, read_bundle
from secateur.core.errors import BundleError
from secateur.core.plan import PrunePlan
from secateur.vote.entry import Entry, Facts, TaskMark

UNSTATED = "unstated"  # axes that the bundle does not name: its keep-sets are shown, never compared


def entry_of_bundle(folder: Path) -> Entry:
    """Return the entry of a bundle: its plan and what its manifest says of it.

    A bundle holds neither scores nor weights nor sketches, so it can be listed and its keep-sets
    looked at, but no measure finds it.

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
        parent=manifest.parent["fingerprint"],
        parent_name=manifest.parent["factory"],
        tasks=tuple(TaskMark(task.name, task.kind, task.classes) for task in manifest.tasks),
        data=manifest.data["train"],
        budget=plan.budget_macs / plan.macs_before,
        basis=manifest.parent.get("basis", _stated_basis(manifest.recipe)),
        accuracy=manifest.accuracy.shipped,
        delta_t=manifest.accuracy.delta_t,
        steps=steps,
        recipe=manifest.recipe,
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
