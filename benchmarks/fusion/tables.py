"""From cells to tables: mean and spread over seeds, the claims, and the plots."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion.bench import PARENT, SECOND
from fusion.rivals import TRAINING_STEPS
from suite import RESULTS, Show, read_rows, write_suite

Key = tuple[str, str, float, float]
"""Parent, method, share of MACs kept, recovery."""
# ΔT that `cut` should reach, by recovery and share of MACs kept
TARGETS = {
    0.05: {0.5: -2.0, 0.3: -7.0, 0.1: -28.0},
    0.15: {0.5: -1.2, 0.3: -5.0, 0.1: -22.0},
    0.4: {0.5: 0.0, 0.3: -2.5, 0.1: -12.0},
}
WORST = 1.4  # the worst task may lose so many times ΔT
LABEL_FREE_GAP = 1.0  # points that doing without labels may cost at 50 % kept
LEAD = 10.0  # points ahead of plain torch-pruning at 30 % kept
PLAIN = {
    "tp_group_taylor": "ranked over all layers",
    "tp_group_taylor_uniform": "with the same ratio in every layer",
}


def write_tables(cells: Path) -> None:
    """Write ``results/fusion.json`` and the plots from the cells measured so far."""
    rows = read_rows(cells)
    unreached = [row for row in rows if "unreached" in row]
    table = summarise([row for row in rows if "unreached" not in row])
    seeds = sorted({row["seed"] for row in rows})
    write_suite(
        "fusion", "python benchmarks/fusion/run.py", seeds,
        [{**dict(zip(("parent", "method", "keep", "recovery"), key, strict=True)),
          "steps_before": TRAINING_STEPS.get(key[1], 0), **values}
         for key, values in sorted(table.items())] + unreached,
        claims(table),
    )  # fmt: skip
    from fusion.plots import draw_curves

    draw_curves(table, RESULTS / "fusion.png")


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[Key, dict[str, Any]]:
    """Return mean and standard deviation over seeds per cell."""
    grouped: dict[Key, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        grouped[row["parent"], row["method"], row["keep"], row["recovery"]].append(row)
    return {key: _summary(found) for key, found in grouped.items()}


def _summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def spread(values: Sequence[float]) -> dict[str, float]:
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return {"mean": round(statistics.fmean(values), 4), "std": round(deviation, 4)}

    tasks = found[0]["after"]["change_percent"]
    return {
        "seeds": [row["seed"] for row in found],
        "macs": round(statistics.fmean(row["macs"] for row in found), 4),
        "params": round(statistics.fmean(row["params"] for row in found), 4),
        "delta_t_before": spread([row["before"]["delta_t"] for row in found]),
        "delta_t": spread([row["after"]["delta_t"] for row in found]),
        "delta_t_by_seed": {str(row["seed"]): row["after"]["delta_t"] for row in found},
        "worst_task": spread([row["after"]["worst"] for row in found]),
        "change_percent": {
            task: spread([row["after"]["change_percent"][task] for row in found]) for task in tasks
        },
        "cut_seconds": round(statistics.fmean(row["cut_seconds"] for row in found), 1),
    }


def claims(table: Mapping[Key, Mapping[str, Any]]) -> list[Show]:
    """Return every claim whose cells have been measured, with the seeds behind it in words."""
    shows = []
    for parent in (PARENT, SECOND):
        for recovery, targets in TARGETS.items():
            for keep, target in targets.items():
                cut = table.get((parent, "cut", keep, recovery))
                if cut is None:
                    continue
                where = (f"{parent}, {100 - 100 * keep:.0f} % of MACs removed, recovery "
                         f"{100 * recovery:.0f} %, {len(cut['seeds'])} seed(s)")  # fmt: skip
                mean = cut["delta_t"]["mean"]
                shows.append(Show(f"delta T %, {where}", target, mean, ">="))
                shows.append(
                    Show(f"worst task %, {where}", round(WORST * min(mean, 0.0), 2),
                         cut["worst_task"]["mean"], ">=")
                )  # fmt: skip
        ours = table.get((parent, "cut", 0.3, 0.15))
        for rival, how in PLAIN.items():
            theirs = table.get((parent, rival, 0.3, 0.15))
            if ours and theirs:
                lead, seeds = _ahead(ours, theirs)
                claim = (f"points ahead of torch-pruning GroupTaylor {how}, {parent}, 70 % "
                         f"removed, 15 %, {seeds} seed(s)")  # fmt: skip
                shows.append(Show(claim, LEAD, round(lead, 2), ">="))
        labelled, free = (
            table.get((parent, method, 0.5, 0.15)) for method in ("cut", "cut, label-free")
        )
        if labelled and free:
            gap, seeds = _ahead(free, labelled)
            claim = (f"label-free against labelled, points of delta T, {parent}, 50 % removed, "
                     f"15 %, {seeds} seed(s)")  # fmt: skip
            shows.append(Show(claim, -LABEL_FREE_GAP, round(gap, 2), ">="))
    return shows


def _ahead(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, int]:
    """Return how much better ``one`` is on the mean over the seeds that both have, and how many."""
    mine, theirs = one["delta_t_by_seed"], other["delta_t_by_seed"]
    common = mine.keys() & theirs.keys()
    return statistics.fmean(mine[seed] - theirs[seed] for seed in common), len(common)
