"""Two classifiers and a segmentation head on pets: python benchmarks/pets/run.py [--quick]

The recipe at 50 and 70 % of the MACs removed. The targets for delta T are those set for NYUv2 at
the same cuts and the same share of the parent's steps in recovery. ``--quick`` cuts to 50 % only
and recovers for one epoch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from secateur.bundle.manifest import Manifest
from secateur.core.progress import shown
from secateur.flow.build import build
from secateur.flow.recipe import BudgetSpec, Recipe, load_recipe
from suite import LEFT_OUT, Show, exit_status, write_suite

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {0.5: -1.2, 0.3: -5.0}  # share of MACs that stays: least delta T in %


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "pets")
    options = parser.parse_args()
    recipe = load_recipe(ROOT / "examples" / "pets.yaml")
    if options.quick and recipe.recover != "none":
        quick = recipe.recover.model_copy(update={"epochs": 1})
        recipe = recipe.model_copy(update={"recover": quick})
    rows, shows = [], []
    for share in (0.5,) if options.quick else TARGETS:
        with shown():
            result = build(at_budget(recipe, share), "x86-64-cpu", options.out / f"{share:g}")
        rows.append({"what": f"{share:g} of the MACs stay",
                     **result.manifest.model_dump(mode="json", exclude=LEFT_OUT)})  # fmt: skip
        shows += claims(share, result.manifest)
    write_suite("pets", "python benchmarks/pets/run.py", [0], rows, shows)
    exit_status(shows)


def at_budget(recipe: Recipe, share: float) -> Recipe:
    prune = recipe.prune.model_copy(update={"budget": BudgetSpec(macs=share)})
    return recipe.model_copy(update={"prune": prune})


def claims(share: float, manifest: Manifest) -> list[Show]:
    ratio = manifest.cost.macs / manifest.cost_parent.macs
    accuracy = manifest.accuracy
    least = TARGETS[share]
    return [
        Show(f"MACs of the {share:g} cut / parent, never above", share, ratio, "<="),
        Show("... and within 1 % of the budget", 0.99 * share, ratio, ">="),
        Show(f"delta T % at {share:g} of the MACs, 298 test images", least, accuracy.delta_t, ">="),
        Show(f"worst task % at {share:g} of the MACs", 1.4 * least,
             accuracy.change_percent[accuracy.worst_task], ">="),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
