"""How sure an accuracy is: 95 % intervals, by drawing images with replacement.

The percentile bootstrap (Efron, 1979; Efron and Tibshirani, 1993, chapter 13). Metrics such as
mIoU are ratios of sums over all images, so an image's part is its sums, not a metric of its own.
One draw serves all tasks, and the parent where its sums are at hand: what makes an image hard for
both then cancels, and the interval of their difference is narrower than either's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.bench.accuracy import Scores, Sums
from secateur.core.task import Task
from secateur.metrics.delta import Metrics, delta
from secateur.metrics.kind import kind_of

LEVEL = 0.95
RESAMPLES = 1000
FEWEST = 5  # images: of fewer, too few different draws exist

Interval = tuple[float, float]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Intervals:
    """95 % intervals (low, high) of metrics, of each task's change in percent, and of ΔT.

    ``paired``: the parent was drawn alike; else its metrics are taken as exact.
    """

    metrics: Mapping[str, Mapping[str, Interval]]
    change_percent: Mapping[str, Interval]
    delta_t: Interval
    paired: bool

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-like data."""
        return asdict(self)


def bootstrap(
    tasks: Sequence[Task], scores: Scores, parent: Scores, seed: int = 0
) -> Intervals | None:
    """Return the intervals of scores that have ``sums``; None where there are too few, or NaN.

    The parent's sums, if it has some, are of the same images in the same units.
    """
    units = len(next(iter(scores.sums.values())))
    figures = (*scores.metrics.values(), *parent.metrics.values())
    if units < FEWEST or any(math.isnan(value) for row in figures for value in row.values()):
        return None
    random = np.random.default_rng(seed)
    draws = random.multinomial(units, np.full(units, 1 / units), RESAMPLES).astype(np.float64)
    higher = {task.name: kind_of(task).higher_is_better for task in tasks}
    ours = _drawn(tasks, scores.sums, draws)
    alone: list[Metrics] = [parent.metrics] * RESAMPLES
    theirs = _drawn(tasks, parent.sums, draws) if parent.sums else alone
    changes = [delta(before, after, higher) for before, after in zip(theirs, ours, strict=True)]
    return Intervals(
        metrics={
            task: {name: _interval([each[task][name] for each in ours]) for name in ups}
            for task, ups in higher.items()
        },
        change_percent={task: _interval([c.per_task[task] for c in changes]) for task in higher},
        delta_t=_interval([change.mean for change in changes]),
        paired=bool(parent.sums),
    )


def _drawn(tasks: Sequence[Task], sums: Sums, draws: Values) -> list[Metrics]:
    """Return the metrics of each draw, a row of ``draws`` (resamples, units): how often a unit."""
    rows: list[dict[str, Mapping[str, float]]] = [{} for _ in draws]
    for task in tasks:
        found, evaluator = sums[task.name], kind_of(task).evaluator()
        totals = torch.from_numpy(draws @ found.reshape(len(found), -1))
        for row, total in zip(rows, totals, strict=True):
            evaluator.sums = total.reshape(found.shape[1:])
            row[task.name] = evaluator.compute()
    return list(rows)


def _interval(values: Sequence[float]) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
