"""What the rows of the CIFAR suite say: the best start by bank tasks, each target, the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from suite import Show
from vote.starts import NEIGHBOURS

Row = dict[str, Any]
Run = tuple[str, int]  # start, iterations
COLD, LONG = "cold, iterative", 1000
NETWORKS = ("resnet", "vit")
# Share of the MACs kept: iterations of the library's start, points of accuracy it may be behind.
TARGETS = {0.5: (100, 0.0), 0.2: (100, 0.0), 0.1: (300, 0.0), 0.02: (300, -2.0)}
ITERATIONS = {share: iterations for share, (iterations, _) in TARGETS.items()}
SECONDS_AT = 0.2
USUAL = "leep"  # the measure that says who is near, unless a row says otherwise
ASKED = 100  # iterations in which the starts are asked the following, on the same tasks and seeds
QUESTIONS = (
    ("votes of the nearest", "votes of random tasks"),
    ("votes of the nearest", "votes of all"),
    ("votes of the nearest", "cold, one-shot"),
    ("voted scores", "cold, one-shot"),
    ("blend with own scores", "cold, one-shot"),
    ("cold, one-shot, refitted", "cold, one-shot"),
    ("nearest task's weights", "cold, one-shot"),
    ("average of weights", "cold, one-shot"),
    ("generic weights", "cold, one-shot"),
    *(
        (start, "cold, one-shot, refitted")
        for start in (
            "votes of the nearest, refitted",
            "nearest task's weights",
            "average of weights",
            "average of weights, refitted",
            "generic weights",
            "generic weights, refitted",
        )
    ),
    ("nearest task's weights", "generic weights"),
    ("staged from generic weights", "generic weights"),
)


def ranking(rows: Sequence[Row], network: str, share: float, iterations: int) -> list[str]:
    """Return the starts by their mean accuracy on bank tasks, best first."""
    chosen = [row for row in rows if (row["part"], row["network"], row["share"], row["iterations"])
              == ("choose", network, share, iterations)]  # fmt: skip
    mean = {start: float(np.mean([r["accuracy"] for r in chosen if r["start"] == start]))
            for start in sorted({row["start"] for row in chosen})}  # fmt: skip
    return sorted(mean, key=lambda start: -mean[start])


def claims(rows: Sequence[Row]) -> list[Show]:
    """Claim what the best library start, chosen on bank tasks, reaches on the new ones."""
    shows = []
    for network in NETWORKS:
        for share, (iterations, allowed) in TARGETS.items():
            best = ranking(rows, network, share, iterations)
            ours = (best[0] if best else "not chosen yet", iterations)
            pairs = _pairs(rows, network, share, ours, (COLD, LONG))
            mean, error = _difference(pairs) if pairs else (None, float("nan"))
            runs = f"{len(pairs)} runs, standard error {error:.1f}" if pairs else "no runs yet"
            shows.append(Show(
                f"{network}, {1 - share:.0%} of the MACs removed: points that the best library "
                f"start ({ours[0]}) in {iterations} iterations is ahead of cold iterative in "
                f"{LONG}, {runs}", allowed, mean, ">=",
            ))  # fmt: skip
            if share == SECONDS_AT:
                shows.append(_seconds(rows, network, ours))
    return shows


def _seconds(rows: Sequence[Row], network: str, ours: Run) -> Show:
    """Claim the share of the seconds that the cheapest cold schedule as accurate as ours takes.

    Any cold start counts. Where none is as accurate, cold iterative's longest stands for it.
    """
    told = (f"{network}, {1 - SECONDS_AT:.0%} removed: process seconds to equal accuracy (without "
            "what the library took once), share of")  # fmt: skip
    longest = _pairs(rows, network, SECONDS_AT, ours, (COLD, LONG))
    if not longest:
        return Show(f"{told} {COLD}'s", 0.2, None, "<=")
    runs = {(row["start"], row["iterations"]) for row in rows if row["start"].startswith("cold")}
    pairs_of = {run: _pairs(rows, network, SECONDS_AT, ours, run) for run in sorted(runs)}
    as_good = {run: pairs for run, pairs in pairs_of.items() if pairs and _ahead(pairs) <= 0}
    share = {run: _spent(pairs) for run, pairs in (as_good or {(COLD, LONG): longest}).items()}
    start, iterations = max(share, key=lambda run: share[run])  # the cheapest cold run
    why = "" if as_good else ", though no cold run was as accurate"
    return Show(f"{told} {start}'s in {iterations} iterations{why}", 0.2, max(share.values()), "<=")


def _ahead(pairs: Sequence[tuple[Row, Row]]) -> float:
    return _difference(pairs)[0]


def _spent(pairs: Sequence[tuple[Row, Row]]) -> float:
    """Return the first ones' seconds as a share of the others'."""
    mine, theirs = (sum(float(row["seconds"]) for row in own) for own in zip(*pairs, strict=True))
    return mine / theirs


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return accuracy (%) and process seconds, mean and deviation, per network, share and start."""
    keys = ("part", "network", "share", "start", "iterations", "measure")
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        {
            **dict(zip(keys, key, strict=True)),
            "runs": len(own),
            **{f"{what}_{name}": round(float(of([row[what] for row in own])), 2)
               for what in ("accuracy", "seconds") for name, of in _MOMENTS.items()},
        }
        for key, own in sorted(found.items(), key=str)
    ]  # fmt: skip


_MOMENTS: dict[str, Callable[[list[float]], Any]] = {"mean": np.mean, "std": np.std}


def answers(rows: Sequence[Row]) -> list[Row]:
    """Return how many points one start is ahead of another, and one measure of the first."""
    found = []
    for network in sorted({row["network"] for row in rows}):
        for share in TARGETS:
            for one, other in QUESTIONS:
                pairs = _pairs(rows, network, share, (one, ASKED), (other, ASKED))
                if pairs:
                    mean, error = _difference(pairs)
                    found.append({"network": network, "share": share, "start": one,
                                  "against": other, "runs": len(pairs), "points": round(mean, 2),
                                  "iterations": ASKED,
                                  "standard_error": round(error, 2)})  # fmt: skip
        found += _among_neighbours([r for r in rows if (r["part"], r["network"])
                                    == ("measures", network)], network)  # fmt: skip
    return found


def _among_neighbours(rows: Sequence[Row], network: str) -> list[Row]:
    """Return, per start, how far another measure or number of neighbours is ahead of the usual."""
    by: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        by.setdefault((row["start"], row["measure"]), {})[row["task"]] = row
    found = []
    for (start, measure), own in by.items():
        plain = start.split(", N = ")[0]
        if (plain, USUAL) == (start, measure):
            continue
        other = by.get((plain, USUAL), {})
        pairs = [(own[task], other[task]) for task in sorted(own.keys() & other.keys())]
        if not pairs:
            continue
        mean, error = _difference(pairs)
        asked = (f"{start}, by {measure}", f"by {USUAL}")
        if measure == USUAL:
            asked = (start, f"N = {NEIGHBOURS}")
        found.append({"network": network, "share": rows[0]["share"], "start": asked[0],
                      "against": asked[1], "runs": len(pairs), "points": round(mean, 2),
                      "iterations": rows[0]["iterations"],
                      "standard_error": round(error, 2)})  # fmt: skip
    return found


def _difference(pairs: Sequence[tuple[Row, Row]]) -> tuple[float, float]:
    """Return the mean difference in accuracy and its standard error over tasks.

    A task's seeds are averaged first: they share its images and are no runs of their own.
    """
    by_task: dict[str, list[float]] = {}
    for one, other in pairs:
        by_task.setdefault(one["task"], []).append(one["accuracy"] - other["accuracy"])
    means = np.array([np.mean(values) for values in by_task.values()])
    return float(means.mean()), float(means.std() / max(1, len(means) - 1) ** 0.5)


def _pairs(
    rows: Sequence[Row], network: str, share: float, one: Run, other: Run
) -> list[tuple[Row, Row]]:
    """Return the runs of two starts on the same tasks and seeds."""
    mine, theirs = (
        {(row["task"], row["seed"]): row for row in rows
         if row["part"] == "new" and row["network"] == network and row["share"] == share
         and (row["start"], row["iterations"]) == wanted}
        for wanted in (one, other)
    )  # fmt: skip
    return [(mine[key], theirs[key]) for key in sorted(mine.keys() & theirs.keys())]
