"""New tasks on a pre-trained trunk, by the program itself: python benchmarks/vote/product.py

    SECATEUR_DATA=... python benchmarks/vote/product.py [--tasks 12] [--steps 100] [--quick]

The network that knows 80 classes of CIFAR-100 is cut once, for these, and recovered; its cut goes
into a library. Then each new five-way task, of classes that nobody has seen, is given the trunk and
a head, and cut to the same budget by ``secateur build``: cold, with as many steps and with ten
times as many, and from the library (``model.trunk``, ``warm_start: library``). ``--quick`` takes
one task and a few steps, and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from secateur.bundle.manifest import Manifest
from secateur.core.progress import shown
from secateur.flow.build import build
from secateur.flow.cache import StageCache
from secateur.flow.recipe import parse_recipe
from suite import Show, exit_status, write_suite
from train_parent import PARENTS, SEEN
from vote.tasks import Cifar, FiveWay

ROOT = Path(__file__).resolve().parents[2]
NETWORK, TARGET = "cifar_resnet", "raspberry-pi-5"  # a target of which no latency is measured here
SHARE, LONGER, GENERIC_STEPS = 0.2, 10, 3000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=12)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "benchmarks"))
    with shown():
        if options.quick:
            with TemporaryDirectory(prefix="secateur-") as scratch:
                measured(Path(scratch), Cifar().new_tasks()[:1], 4, 8)
            return
        out = ROOT / "out" / "vote-product"
        tasks = Cifar().new_tasks()[: options.tasks]
        rows = measured(out, tasks, options.steps, GENERIC_STEPS)
    command = f"python benchmarks/vote/product.py --tasks {len(tasks)}"
    write_suite("vote_product", command, [0], rows, claims(rows))
    exit_status(claims(rows))


def measured(
    out: Path, tasks: list[FiveWay], steps: int, generic_steps: int
) -> list[dict[str, Any]]:
    """Cut the 80 classes' network, then every new task in three ways; return what came of it."""
    library = out / "library"
    shutil.rmtree(library, ignore_errors=True)  # what is measured starts from one cut
    whole = recipe(None, "none", generic_steps, library, add=True)
    generic = made(whole, out / "generic", out)
    print(f"80 classes: {top1(generic):.1f} % after {generic_steps} steps", flush=True)
    ways = (("cold", "none", steps), (f"cold, {LONGER} times the steps", "none", LONGER * steps),
            ("library", "library", steps))  # fmt: skip
    rows = []
    for task in tasks:
        for name, start, count in ways:
            asked = recipe(task, start, count, library, add=False)
            manifest = made(asked, out / f"{task.name}-{start}-{count}", out)
            said = manifest.plan.get("warm_start") or {}
            rows.append({
                "task": task.name, "start": name, "steps": count, "top1": top1(manifest),
                "top1 of the uncut network": manifest.accuracy.parent["label"]["top1"],
                "macs": manifest.cost.macs / manifest.cost_parent.macs,
                "voters": len(said.get("voters", ())), "why cold": said.get("cold", ""),
                "started from": (said.get("weights") or {}).get("chosen", ""),
            })  # fmt: skip
            print(task.name, name, count, f"{top1(manifest):.1f} %", flush=True)
    return rows


def recipe(
    task: FiveWay | None, start: str, steps: int, library: Path, *, add: bool
) -> dict[str, Any]:
    """Return a recipe: for a new task, or with None for the classes the network was trained on."""
    spec = PARENTS[NETWORK].spec
    own: dict[str, Any] = {"coarse": SEEN} if task is None else {"fine": [*task.classes]}
    data = {"reader": "cifar100", "root": f"{os.environ['SECATEUR_DATA']}/cifar100_sub"}
    arguments: dict[str, Any] = {"network": NETWORK}
    if task is not None:
        arguments["fine"] = own["fine"]
    return {
        "model": {
            "factory": f"vote.probed:{'pretrained' if task is None else 'probed'}",
            "arguments": arguments, "trunk": "body",
            "input": {"shape": [3, 32, 32], "mean": [*spec.mean], "std": [*spec.std]},
        },
        "tasks": {"label": {
            "output": "label", "kind": "classification", "label": "fine",
            "classes": 5 * len(SEEN) if task is None else len(task.classes),
        }},
        "data": {"train": {**data, "split": "train", "options": own},
                 "eval": {**data, "split": "test", "options": own}},
        "prune": {"budget": {"macs": SHARE}, "warm_start": start, "grid": 2},
        # Its own network is no teacher for a task that it was not trained for.
        "recover": {"steps": steps, "batch_size": 32, "distill": 1.0 if task is None else 0.0},
        "library": {"path": str(library), "add": add},
    }  # fmt: skip


def made(asked: dict[str, Any], folder: Path, out: Path) -> Manifest:
    text = yaml.safe_dump(asked, sort_keys=False)
    cache = StageCache(out / "cache")
    return build(parse_recipe(text, ROOT / "recipe.yaml"), TARGET, folder, cache=cache).manifest


def top1(manifest: Manifest) -> float:
    return manifest.accuracy.shipped["label"]["top1"]


def claims(rows: list[dict[str, Any]]) -> list[Show]:
    """The start from the library is ahead of a cold one, and of one of ten times the steps."""
    by = {(row["task"], row["start"]): row["top1"] for row in rows}
    tasks = sorted({row["task"] for row in rows})
    shows = []
    for other in ("cold", f"cold, {LONGER} times the steps"):
        ahead = np.array([by[task, "library"] - by[task, other] for task in tasks])
        error = float(ahead.std(ddof=1) / len(ahead) ** 0.5) if len(ahead) > 1 else 0.0
        claim = (
            f"points that builds from the library (model.trunk) are ahead of {other}, "
            f"{1 - SHARE:.0%} of the MACs removed, {len(ahead)} new tasks, standard error "
            f"{error:.1f}"
        )
        shows.append(Show(claim, 0.0, float(ahead.mean()), ">="))
    return shows


if __name__ == "__main__":
    main()
