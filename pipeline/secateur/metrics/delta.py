"""ΔT: how much a model lost against its parent, in percent, per task and over tasks.

Per task the mean over its metrics of the signed relative change (sign such that higher is
better), then the mean over tasks (the convention of AdaShare, arXiv 1911.12423). Papers that
*sum* the metrics within a task are not comparable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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

    ``higher`` says per task and metric whether higher is better.
    """
    per_task = {
        task: sum(
            _relative_percent(parent[task][name], other[task][name], up)
            for name, up in higher[task].items()
        )
        / len(higher[task])
        for task in other
    }
    worst = min(per_task, key=lambda task: per_task[task])
    return Delta(per_task, sum(per_task.values()) / len(per_task), worst)


def _relative_percent(before: float, after: float, higher_is_better: bool) -> float:
    change = 100 * (after - before) / max(abs(before), 1e-9)
    return change if higher_is_better else -change
