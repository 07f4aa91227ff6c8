"""The CIFAR suite of starts from earlier cuts, as tables of the index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
NAMES = {"resnet": "a ResNet-18 of a quarter of the width", "vit": "a ViT, six blocks of 96"}


def starts_table(suite: dict[str, Any]) -> str:
    """Return accuracy on new tasks per start and share, then what that answers, by network."""
    lines: list[str] = []
    for network in sorted({row["network"] for row in suite["rows"] if row.get("part") == "new"}):
        every = [row for row in suite["rows"] if row["network"] == network]
        own = [row for row in every if row.get("part") == "new"]
        lines += ["", f"CIFAR-100, {NAMES[network]}:", *_accuracies(own), *_answers(every)]
        lines += _library([row for row in every if row.get("part") == "bank"])
    lines += [
        "",
        "Five-way tasks of 20 classes that neither parent nor library has seen: accuracy in %,",
        "mean ± standard deviation over tasks and seeds, and process seconds, the start included.",
        "Points: ahead of the other, mean over tasks ± its standard error, in equal iterations, on",
        "the tasks and seeds that both have (runs). Eight of the twelve tasks draw from the 20",
        "classes that the first four share out: not independent, so true errors are larger.",
        "`generic` was taught by the parent for 6000 iterations a share, a task's own cut for 150:",
        "how much of its lead is effort is not told apart.",
    ]
    return "\n".join([*lines, ""])


def _accuracies(rows: Sequence[Row]) -> list[str]:
    shares = sorted({row["share"] for row in rows}, reverse=True)
    cells = {(row["start"], row["iterations"], row["share"]): row for row in rows}
    starts = dict.fromkeys((row["start"], row["iterations"]) for row in rows)
    head = [f"{1 - share:.0%} removed" for share in shares]
    lines = ["", f"| start | iterations | {' | '.join(head)} | runs |",
             f"|---|---|{'---|' * len(head)}---|"]  # fmt: skip
    for start, iterations in sorted(starts, key=lambda one: (one[1], one[0])):
        found = [cells.get((start, iterations, share)) for share in shares]
        values = [f"{row['accuracy_mean']:.1f} ± {row['accuracy_std']:.1f}, "
                  f"{row['seconds_mean']:.0f} s" if row else "" for row in found]  # fmt: skip
        counts = dict.fromkeys(str(row["runs"]) for row in found if row)
        lines.append(f"| {start} | {iterations} | {' | '.join(values)} | {', '.join(counts)} |")
    return lines


def _library(rows: Sequence[Row]) -> list[str]:
    """Return what the library's cuts took, once."""
    if not rows:
        return []
    shares = sorted({row["share"] for row in rows}, reverse=True)
    cells = {(row["start"], row["share"]): row for row in rows}
    head = [f"{1 - share:.0%} removed" for share in shares]
    lines = ["", f"| the library, made once | iterations a share | runs | {' | '.join(head)} |",
             f"|---|---|---|{'---|' * len(head)}"]  # fmt: skip
    for start in dict.fromkeys(row["start"] for row in rows):
        own = [cells[start, share] for share in shares]
        values = [f"{row['seconds_mean']:.0f} s" for row in own]
        lines.append(f"| {start}, down to | {own[0]['iterations']} | {own[0]['runs']} "
                     f"| {' | '.join(values)} |")  # fmt: skip
    return lines


def _answers(rows: Sequence[Row]) -> list[str]:
    """Return who is ahead of whom, a column per share."""
    asked = [row for row in rows if "points" in row]
    if not asked:
        return []
    shares = sorted({row["share"] for row in asked}, reverse=True)
    cells = {(row["start"], row["against"], row["share"]): row for row in asked}
    head = [f"{1 - share:.0%} removed" for share in shares]
    lines = ["", f"| points ahead | of | iterations | {' | '.join(head)} | runs |",
             f"|---|---|---|{'---|' * len(head)}---|"]  # fmt: skip
    for start, against in dict.fromkeys((row["start"], row["against"]) for row in asked):
        found = [cells.get((start, against, share)) for share in shares]
        values = [_points(row) for row in found]
        iterations, runs = (
            ", ".join(dict.fromkeys(str(row[what]) for row in found if row))
            for what in ("iterations", "runs")
        )
        lines.append(f"| {start} | {against} | {iterations} | {' | '.join(values)} | {runs} |")
    return lines


def _points(row: Row | None) -> str:
    return f"{row['points']:+.1f} ± {row['standard_error']:.1f}" if row else ""
