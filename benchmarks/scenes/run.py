"""The demo's recipe, measured: python benchmarks/scenes/run.py"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from secateur.core.progress import shown
from secateur.flow.build import build
from secateur.flow.cache import StageCache
from secateur.flow.recipe import load_recipe
from suite import LEFT_OUT, Show, exit_status, write_suite

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    recipe = load_recipe(ROOT / "examples" / "scenes.yaml")
    started = time.monotonic()
    with shown(), tempfile.TemporaryDirectory() as scratch:  # an empty cache: nothing is found
        cache = StageCache(Path(scratch))
        result = build(recipe, "x86-64-cpu", ROOT / "out" / "scenes", cache=cache)
    seconds = time.monotonic() - started
    manifest = result.manifest
    ratio = manifest.cost.macs / manifest.cost_parent.macs
    shows = [
        Show("seconds of the whole job, nothing cached", 360, seconds, "<="),
        Show("MACs of the cut / parent with the same tasks, never above", 0.5, ratio, "<="),
        Show("... and within 1 % of the budget", 0.495, ratio, ">="),
        Show("tasks below their max_drop", 0, len(manifest.accuracy.too_low), "<="),
    ]
    row = manifest.model_dump(mode="json", exclude=LEFT_OUT)
    write_suite("scenes", "python benchmarks/scenes/run.py", [0], [row], shows)
    exit_status(shows)


if __name__ == "__main__":
    main()
