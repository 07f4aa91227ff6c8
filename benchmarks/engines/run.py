"""Does CI turn red when it should: python benchmarks/engines/run.py

``.ci/engines`` as it stands, on the recipe examples/scenes.yaml, then on the same with a planted
fault, the first run's bundles as baseline: unchanged (green), a cut that leaves more MACs and so
is slower (red, by the latency), one that is hardly recovered (red, by the accuracy) and one that
loses more than its recipe allows (red, by the build). Takes about twenty minutes; needs apt for the
emulator.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from suite import Show, exit_status, write_suite

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "examples/scenes.yaml"
OUT = ROOT / "out" / "engines-suite"
# What is planted: text of the recipe, its replacement, and what the red lines must speak of.
PLANTED = {
    "unchanged": ("", "", ""),
    "slower": ("budget: {macs: 0.5}", "budget: {macs: 0.8}", r"compare .*x86-64-cpu"),
    "worse": ("recover:    {epochs: 8,", "recover:    {epochs: 1,", r"compare "),
    "too low": ("max_drop: 6}\n  depth", "max_drop: 0.01}\n  depth", r"build"),
}


def main() -> None:
    rows = [engines("baseline", RECIPE)]
    text = (ROOT / RECIPE).read_text()
    for name, (before, after, _) in PLANTED.items():
        assert before in text, f"{RECIPE} has no {before!r}"
        recipe = ROOT / "examples" / f"planted-{name.replace(' ', '-')}.yaml"  # paths are relative
        recipe.write_text(text.replace(before, after, 1) if before else text)
        try:
            rows.append(engines(name, f"examples/{recipe.name}", OUT / "baseline"))
        finally:
            recipe.unlink()
    shows = [Show("exit code of the baseline and of the same again", 0,
                  max(row["exit"] for row in rows[:2]), "<=")]  # fmt: skip
    for row in rows[2:]:
        told = [line for line in row["red"] if re.match(PLANTED[row["planted"]][2], line)]
        shows.append(Show(f"planted '{row['planted']}': exit code", 1, row["exit"], ">="))
        shows.append(
            Show(f"planted '{row['planted']}': red lines that name it", 1, len(told), ">=")
        )
    write_suite("engines", "python benchmarks/engines/run.py", [0], rows, shows)
    exit_status(shows)


def engines(planted: str, recipe: str, baseline: Path | None = None) -> dict[str, Any]:
    """Run ``.ci/engines``; return its exit code, its red lines and what the comparisons said."""
    out = OUT / planted.replace(" ", "-")
    words = [
        str(ROOT / ".ci" / "engines"),
        recipe,
        str(out),
        *([str(baseline)] if baseline else []),
    ]
    start = time.monotonic()
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    log = out.with_suffix(".log")
    log.write_text(run.stdout + run.stderr)
    said = [line.strip() for line in run.stdout.splitlines() if re.search(r"slower|worse", line)]
    return {
        "planted": planted, "exit": run.returncode, "seconds": round(time.monotonic() - start),
        "red": re.findall(r"^red: (.*)", run.stderr.replace(str(ROOT), "."), re.MULTILINE),
        "said": [line.replace(str(ROOT), ".") for line in said],
        "bundles": sorted(str(p.parent.relative_to(out)) for p in out.glob("*/*/manifest.json")),
        "engines": sorted(str(p.relative_to(out)) for p in out.glob("*/*/*.engine")),
    }  # fmt: skip


if __name__ == "__main__":
    main()
