"""What the rows of the CIFAR suite say: the best start by bank tasks, and each target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from suite import Show

Row = dict[str, Any]
COLD = "cold, iterative"
TARGETS = ((0.5, 100, 0.0), (0.2, 100, 0.0), (0.1, 300, 0.0), (0.02, 300, -2.0))


def best_by_share(rows: Sequence[Row], network: str) -> dict[tuple[float, int], str]:
    """Return, per share and iterations, the start with the best mean accuracy on bank tasks."""
    found: dict[tuple[float, int], str] = {}
    chosen = [row for row in rows if row["part"] == "choose" and row["network"] == network]
    for key in sorted({(row["share"], row["iterations"]) for row in chosen}):
        own = [row for row in chosen if (row["share"], row["iterations"]) == key]
        mean = {start: float(np.mean([r["accuracy"] for r in own if r["start"] == start]))
                for start in sorted({row["start"] for row in own})}  # fmt: skip
        found[key] = max(mean, key=mean.__getitem__)
    return found


def claims(rows: Sequence[Row]) -> list[Show]:
    """Claim what the best library start, chosen on bank tasks, reaches on the new ones."""
    shows = []
    for network in sorted({row["network"] for row in rows}):
        best = best_by_share(rows, network)
        for share, iterations, allowed in TARGETS:
            if (share, iterations) not in best:
                continue
            ours, cold = _pairs(rows, network, share, (best[share, iterations], iterations),
                                (COLD, 1000))  # fmt: skip
            if not ours:
                continue
            gained = np.array(
                [a["accuracy"] - b["accuracy"] for a, b in zip(ours, cold, strict=True)]
            )
            error = float(gained.std() / max(1, len(gained) - 1) ** 0.5)
            shows.append(Show(
                f"{network}, {1 - share:.0%} of the MACs removed: points that the best library "
                f"start ({best[share, iterations]}) in {iterations} iterations is ahead of cold "
                f"iterative in 1000, {len(gained)} runs, standard error {error:.1f}",
                allowed, float(gained.mean()), ">="))  # fmt: skip
            if share == 0.2:
                spent = sum(row["seconds"] for row in ours) / sum(row["seconds"] for row in cold)
                shows.append(Show(f"{network}, 80 % removed: its share of cold's process seconds",
                                  0.2, spent, "<="))  # fmt: skip
    return shows


def _pairs(
    rows: Sequence[Row], network: str, share: float, one: tuple[str, int], other: tuple[str, int]
) -> tuple[list[Row], list[Row]]:
    """Return the runs of two starts on the same tasks and seeds."""
    found: list[dict[tuple[str, int], Row]] = [
        {(row["task"], row["seed"]): row for row in rows
         if row["part"] == "new" and row["network"] == network and row["share"] == share
         and (row["start"], row["iterations"]) == wanted}
        for wanted in (one, other)
    ]  # fmt: skip
    both = sorted(found[0].keys() & found[1].keys())
    return [found[0][key] for key in both], [found[1][key] for key in both]
