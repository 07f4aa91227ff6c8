"""NYUv2 at the committed parent's own resolution: all three tasks, 50, 70 and 90 % of MACs removed.

    SECATEUR_DATA=... python benchmarks/nyuv2/budgets.py [--seeds 0 1 2]

The program's own builds of ``examples/nyuv2.yaml`` with every task kept: 192x256, all 795 training
images, a recovery of 14 % of the parent's steps. Settings are those chosen on the validation split
of the grid at 96x128 (``benchmarks/fusion/``), the 654 test images are read once per build.
Resumable.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fusion.tables import TARGETS, WORST
from secateur.core.progress import shown
from secateur.flow.build import build
from secateur.flow.recipe import parse_recipe
from suite import LEFT_OUT, Show, exit_status, read_json, write_suite

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "examples" / "nyuv2.yaml"
STEPS = 0.15  # of the parent's, at most
CHANGES = (
    ("keep: [segmentation, depth]\n", ""),
    (", max_drop: 4.5", ""),
    ("macs: 0.5", "macs: {keep}"),
    ("epochs: 7", "epochs: 7, seed: {seed}"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "nyuv2-budgets")
    options = parser.parse_args()
    rows = []
    with shown():
        for seed in options.seeds:
            for keep in TARGETS[STEPS]:
                rows.append(one_row(keep, seed, options.out / f"{keep}-{seed}"))
    shows = claims(rows)
    write_suite("nyuv2_budgets", "python benchmarks/nyuv2/budgets.py", options.seeds, rows, shows)
    exit_status(shows)


def one_row(keep: float, seed: int, folder: Path) -> dict[str, Any]:
    """Build with ``keep`` of the MACs; return the manifest's figures."""
    command = "python benchmarks/nyuv2/budgets.py"
    recipe = parse_recipe(recipe_text(keep, seed), RECIPE)
    made = build(recipe, "x86-64-cpu", folder, command=command).manifest
    accuracy = made.accuracy
    print(f"keep {keep} seed {seed}: delta T {accuracy.delta_t_before_recovery:.2f} -> "
          f"{accuracy.delta_t:.2f}, worst {accuracy.worst_task}", flush=True)  # fmt: skip
    return {"what": "build", "keep": keep, "seed": seed,
            **made.model_dump(mode="json", exclude=LEFT_OUT)}  # fmt: skip


def recipe_text(keep: float, seed: int) -> str:
    """Return the example with every task kept, no guard, and this budget and seed."""
    text = RECIPE.read_text()
    for old, new in CHANGES:
        if old not in text:
            raise ValueError(f"{RECIPE} no longer has {old!r}")
        text = text.replace(old, new.format(keep=keep, seed=seed))
    return text


def claims(rows: list[dict[str, Any]]) -> list[Show]:
    """Return ΔT and the worst task at each budget, against the targets of the grid."""
    parent_steps = read_json(ROOT / "benchmarks" / "parents" / "nyuv2_lite0.json")["steps"]
    steps = max(row["plan"]["recovery_steps"] for row in rows)
    shows = [
        Show("recovery steps / the parent's training steps", STEPS, steps / parent_steps, "<=")
    ]
    for keep, target in TARGETS[STEPS].items():
        found = [row["accuracy"] for row in rows if row["keep"] == keep]
        where = f"192x256, {100 - 100 * keep:.0f} % of MACs removed, {len(found)} seed(s)"
        mean = statistics.fmean(one["delta_t"] for one in found)
        worst = statistics.fmean(one["change_percent"][one["worst_task"]] for one in found)
        shows.append(Show(f"delta T %, {where}", target, mean, ">="))
        shows.append(Show(f"worst task %, {where}", WORST * min(mean, 0.0), worst, ">="))
    return shows


if __name__ == "__main__":
    main()
