"""A start from earlier cuts, on NYUv2: SECATEUR_DATA=... python benchmarks/vote/nyuv2.py [--quick]

{segmentation}, {depth} and {normals} are each cut to half of the MACs (``--earlier``) and recovered
for 15 % of the parent's steps; each build leaves its cut in a library. Then {segmentation, depth}
is cut to 30 %: cold with the same recovery, and with three tenths of it from the library (its votes
alone, or its weights too) and cold.
``--quick`` recovers for a twentieth of those steps.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from secateur.bundle.manifest import Manifest
from secateur.core.progress import shown
from secateur.flow.build import build
from secateur.flow.cache import StageCache
from secateur.flow.recipe import parse_recipe
from suite import LEFT_OUT, Show, exit_status, write_suite

ROOT = Path(__file__).resolve().parents[2]
PARENT = "nyuv2_lite0_96x128"
SINGLE = ("segmentation", "depth", "normals")
PAIR = ("segmentation", "depth")
SHORT = 0.3  # of the cold start's steps
SHARE = 0.3  # of the MACs that stays
RECIPE = """
model:
  factory: secateur.zoo:nyuv2_lite0
  checkpoint: benchmarks/parents/{parent}.safetensors
  input: {{shape: [3, 96, 128], mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}}
tasks:
  segmentation: {{output: segmentation, kind: segmentation, classes: 13}}
  depth: {{output: depth, kind: depth}}
  normals: {{output: normals, kind: normals, weight: 2.0}}
keep: [{keep}]
data:
  train: {{reader: nyuv2, root: {data}/nyuv2_288x384, split: fit}}
  eval: {{reader: nyuv2, root: {data}/nyuv2_288x384, split: test}}
prune: {{budget: {{macs: {share}}}, warm_start: {start}, neighbours: 3, inherit: {inherit}}}
recover: {{steps: {steps}, seed: {seed}}}
library: {{path: {library}, add: {add}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--earlier", type=float, default=0.5, help="MACs left by earlier cuts")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "vote-nyuv2")
    options = parser.parse_args()
    parent_steps = json.loads((ROOT / f"benchmarks/parents/{PARENT}.json").read_text())["steps"]
    steps = round(0.15 * parent_steps / (20 if options.quick else 1))
    rows = []
    for seed in options.seeds:
        library = options.out / f"library-{seed}"
        shutil.rmtree(library, ignore_errors=True)  # what is measured starts from three cuts
        for task in SINGLE:
            made((task,), "none", steps, seed, options.out, library, share=options.earlier)
        short = round(SHORT * steps)
        wanted = (("cold", "none", steps), ("cold, short", "none", short),
                  ("library, short", "library", short),
                  ("library, votes alone, short", "votes", short))  # fmt: skip
        for name, start, count in wanted:
            manifest = made(PAIR, start, count, seed, options.out, library)
            told = manifest.model_dump(mode="json", exclude=LEFT_OUT)
            (told["plan"].get("warm_start") or {}).pop("library", None)  # a path of the machine
            rows.append({"what": name, "seed": seed, "steps": count, **told})
            print(name, seed, count, f"{manifest.accuracy.delta_t:.2f}", flush=True)
    command = "python benchmarks/vote/nyuv2.py"
    write_suite("vote_nyuv2", command, options.seeds, rows, claims(rows))
    exit_status(claims(rows))


def made(
    keep: tuple[str, ...],
    start: str,
    steps: int,
    seed: int,
    out: Path,
    library: Path,
    *,
    share: float = 0.0,
) -> Manifest:
    """Build one cut; ``start``: none, library, or votes (the library without its weights).

    With a ``share`` it is an earlier cut, to that one, and goes into the library.
    """
    text = RECIPE.format(
        parent=PARENT, keep=", ".join(keep), data=os.environ["SECATEUR_DATA"], steps=steps,
        start="none" if start == "none" else "library",
        inherit="none" if start == "votes" else "average",
        seed=seed, library=library, add=str(bool(share)).lower(), share=share or SHARE,
    )  # fmt: skip
    name = f"{'-'.join(keep)}-{share or SHARE:g}-{start}-{steps}-{seed}"
    with shown():
        recipe = parse_recipe(text, ROOT / "recipe.yaml")
        result = build(recipe, "x86-64-cpu", out / name, cache=StageCache(out / "cache"))
    return result.manifest


def claims(rows: list[dict[str, object]]) -> list[Show]:
    """The short start from the library reaches the cold start's delta T, mean over the seeds."""
    change: dict[object, list[float]] = {}
    for row in rows:
        accuracy = row["accuracy"]
        assert isinstance(accuracy, dict)
        change.setdefault(row["what"], []).append(accuracy["delta_t"])
    mean = {what: sum(values) / len(values) for what, values in change.items()}
    return [
        Show("delta T % of {segmentation, depth} at 30 % of the MACs, started from the library, in "
             f"{SHORT:.0%} of the cold start's steps", mean["cold"], mean["library, short"], ">="),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
