"""The suite of cuts without recovery, as tables of README and index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PARENT_NAMES = {
    "nyuv2_lite0_96x128": "EfficientNet-Lite0: segmentation, depth, normals (NYUv2)",
    "pets_lite0": "EfficientNet-Lite0: breed, species, trimap (pets)",
    "scenes_vit": "ViT, 6 blocks of 128: segmentation, depth, normals, room (rendered)",
}
TREATMENTS = {
    ("balanced", "plain"): "pruned, nothing else",
    ("balanced", "batch norm"): "batch norms re-estimated",
    ("balanced", "refit"): "refitted",
    ("balanced", "axes and refit"): "axes rewritten, refitted",
    ("balanced", "axes and refit, no labels"): "... without any label",
    ("balanced", "axes and refit, scored again"): "... scored again after half of the cut",
    ("search", "axes and refit"): "... and widths searched",
    ("search", "axes and refit, scored again"): "... both",
    (
        "balanced",
        "axes and refit, scored again, all layers together",
    ): "scored again, then all layers refitted together",
    ("balanced", "axes and refit, no labels, all layers together"): "... without any label",
}


def training_free_table(suite: dict[str, Any]) -> str:
    """Return ΔT without recovery, per parent and treatment."""
    cells: dict[tuple[Any, ...], list[float]] = {}
    for row in suite["rows"]:
        key = row["parent"], (row["allocation"], row["what"]), row["keep"]
        cells.setdefault(key, []).append(row["delta_t"])
    lines = ["", "| MACs removed, no recovery | 20 % | 30 % | 50 % | 70 % |",
             "|---|---|---|---|---|"]  # fmt: skip
    for parent in (name for name in PARENT_NAMES if any(key[0] == name for key in cells)):
        lines.append(f"| **{PARENT_NAMES[parent]}** | | | | |")
        for treatment, name in TREATMENTS.items():
            found = [cells.get((parent, treatment, keep)) for keep in (0.8, 0.7, 0.5, 0.3)]
            values = [f"{sum(f) / len(f):+.2f}" if f else "" for f in found]
            if any(values):
                lines.append(f"| {name} | {' | '.join(values)} |")
    lines += [
        "",
        "ΔT in % on the test images. Importance and axes read 128 labelled images, and a search",
        "96; the refit reads 256, no labels, in one pass layer by layer; together they take four",
        "more passes, of gradient steps towards the parent's outputs. One seed; blank: not run.",
        "Seconds, on one core of a busy machine:",
        _seconds_without_training(suite["rows"]) + ".",
    ]
    return "\n".join([*lines, ""])


def allocation_table(suite: dict[str, Any]) -> str:
    """Return ΔT by how many channels each group keeps (rows), and by which ones (columns)."""
    selections = {"select random": "at random", "select l2": "by L2", "select taylor": "by Taylor"}
    allocations = {
        "uniform": "the same share of every group",
        "global": "as one global ranking by Taylor leaves",
        "balanced": "... balanced between groups (ours)",
        "search": "as a search after the refit finds",
    }
    cells = {(row["keep"], row["allocation"], row["what"]): row["delta_t"]
             for row in suite["rows"]}  # fmt: skip
    keeps = (0.5, 0.3)
    names = [f"{1 - keep:.0%}, {name}" for keep in keeps for name in selections.values()]
    lines = ["", f"| how many of each group \\ MACs removed, which | {' | '.join(names)} |",
             f"|---|{'---|' * len(names)}"]  # fmt: skip
    for allocation, told in allocations.items():
        found = [cells.get((keep, allocation, what)) for keep in keeps for what in selections]
        values = ["" if value is None else f"{value:+.1f}" for value in found]
        lines.append(f"| {told} | {' | '.join(values)} |")
    return "\n".join([*lines, "",
        "ΔT in % without training, after axes and refit; EfficientNet-Lite0 on NYUv2 at 96x128,",
        "one seed. Balanced axes level the sizes of weights, so that L2 falls behind chance:",
        "this is not what L2 is worth in a network as it was trained (see the table above).", "",
    ])  # fmt: skip


def _seconds_without_training(rows: Sequence[dict[str, Any]]) -> str:
    """Return how long refits, and searches of widths, took on each parent."""
    told = []
    for parent in (name for name in PARENT_NAMES if any(r["parent"] == name for r in rows)):
        own = [r for r in rows if r["parent"] == parent and r["what"] == "axes and refit"]
        refits = [row["seconds"] for row in own]
        every = [row for row in rows if row["parent"] == parent]
        jointly = [row["seconds"] for row in every if row["what"].endswith("layers together")]
        searches = [row["plan_seconds"] for row in own if row["allocation"] == "search"]
        images = PARENT_NAMES[parent].rpartition("(")[2].rstrip(")")
        found = f"{images} {min(refits):.0f} to {max(refits):.0f} to refit"
        if jointly:
            found += f", {min(jointly):.0f} to {max(jointly):.0f} with the layers together"
        told.append(found + (f", {max(searches):.0f} to search" if searches else ""))
    return ";\n".join(told)
