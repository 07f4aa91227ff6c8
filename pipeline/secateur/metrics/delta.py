"""ΔT: how much a model lost against its parent, in percent, per task and over tasks.

Per task the mean over its metrics of the signed relative change (sign such that higher is
better), then the mean over tasks (the convention of AdaShare, arXiv 1911.12423). Papers that
*sum* the metrics within a task are not comparable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

ZERO = 1e-9
Metrics = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Delta:
    """``per_task`` and ``mean`` changes in percent; ``worst_task`` changed least favourably."""

    per_task: Mapping[str, float]
    mean: float
    worst_task: str

    @property
    def worst(self) -> float:
        """The worst task's change in percent."""
        return self.per_task[self.worst_task]


def delta(parent: Metrics, other: Metrics, higher: Mapping[str, Mapping[str, bool]]) -> Delta:
    """Compare ``other`` with ``parent``; each is ``{task: {metric: value}}``.

    ``higher`` says per task and metric whether higher is better. Nothing is relative to 0: a metric
    that is 0 in the parent counts as -100 % if it became worse, else not at all.
    """
    per_task = {task: _task_percent(parent[task], other[task], higher[task]) for task in other}
    worst = min(per_task, key=lambda task: (not math.isnan(per_task[task]), per_task[task]))
    return Delta(per_task, sum(per_task.values()) / len(per_task), worst)


def _task_percent(
    before: Mapping[str, float], after: Mapping[str, float], higher: Mapping[str, bool]
) -> float:
    changes = [_relative_percent(before[name], after[name], up) for name, up in higher.items()]
    told = [change for change in changes if change is not None]
    return sum(told) / len(told) if told else 0.0


def _relative_percent(before: float, after: float, higher_is_better: bool) -> float | None:
    gain = after - before if higher_is_better else before - after
    if math.isnan(gain):
        return gain
    if abs(before) < ZERO:
        return -100.0 if gain < 0 else None
    return 100 * gain / abs(before)
