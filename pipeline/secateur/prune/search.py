"""Search how many channels each group keeps, judged by the network that comes out.

Importance ranks the channels *within* a group well; *how many* each group needs, once the kept
weights have been refitted, it tells badly. So the counts are found by trading: one group is
widened, others are narrowed until the budget holds again, and the trade stays if the judge (the
loss of the cut and refitted network) likes it. Groups that traded well are drawn more often.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.core.progress import track
from secateur.prune.budget import Ladder
from secateur.prune.macs import MacsModel

Judge = Callable[[Sequence[int]], float]
STRIDE = 0.12  # a trade widens a group by about this share of its rungs


@dataclass(frozen=True)
class Found:
    """``counts`` per group, their ``loss`` as judged, that of the best start, and the tries."""

    counts: tuple[int, ...]
    loss: float
    start_loss: float
    tries: int


def search_counts(
    rungs: Sequence[Ladder],
    cost: MacsModel,
    budget: int,
    starts: Sequence[Sequence[int]],
    judge: Judge,
    *,
    tries: int,
    seed: int = 0,
) -> Found:
    """Return the best counts found in ``tries`` calls of ``judge`` (lower is better).

    ``starts`` are counts within the budget, on the ladders' rungs; the best of them is improved.
    """
    climb = _Climb(rungs, cost, budget, np.random.default_rng(seed))
    progress = iter(track(range(tries), "searching the allocation", tries))
    judged = []
    for start in starts:
        next(progress, None)
        judged.append(
            (judge(start), [list(r.widths).index(k) for r, k in zip(rungs, start, strict=True)])
        )
    loss, at = min(judged, key=lambda pair: pair[0])
    start_loss = loss
    if not any(at):  # every group has its whole width, so nothing can be traded
        return Found(tuple(climb.counts(at)), loss, start_loss, len(judged))
    again: tuple[int, NDArray[np.int64]] | None = None
    for _ in progress:
        move = climb.repeat(at, again) if again is not None else None
        up, trial = move or climb.trade(at)
        trial_loss = judge(climb.counts(trial))
        better = trial_loss < loss
        climb.learn(up, at, trial, better=better)
        again = (up, np.subtract(trial, at)) if better else None
        if better:
            loss, at = trial_loss, trial
    return Found(tuple(climb.counts(at)), loss, start_loss, tries)


class _Climb:
    """Proposes trades; rung 0 is a group's full width, so a larger rung is narrower."""

    def __init__(
        self,
        rungs: Sequence[Ladder],
        cost: MacsModel,
        budget: int,
        rng: np.random.Generator,
    ) -> None:
        self._rungs, self._cost, self._budget, self._rng = rungs, cost, budget, rng
        self._likes_up = np.ones(len(rungs))
        self._likes_down = np.ones(len(rungs))

    def counts(self, at: Sequence[int]) -> list[int]:
        return [ladder.widths[rung] for ladder, rung in zip(self._rungs, at, strict=True)]

    def trade(self, at: Sequence[int]) -> tuple[int, list[int]]:
        """Return the widened group and the rungs after a random trade."""
        up = self._draw(self._likes_up * [rung > 0 for rung in at])
        trial = list(at)
        trial[up] -= min(trial[up], self._stride(up))
        while self._over(trial):
            free = [t + 1 < len(r.widths) for t, r in zip(trial, self._rungs, strict=True)]
            free[up] = False
            if not any(free):
                return up, list(at)
            down = self._draw(self._likes_down * free)
            trial[down] = min(trial[down] + self._stride(down), len(self._rungs[down].widths) - 1)
        return up, self._fill(trial, up)

    def repeat(
        self, at: Sequence[int], last: tuple[int, NDArray[np.int64]]
    ) -> tuple[int, list[int]] | None:
        """Return the same trade once more, if the ladders and the budget allow it."""
        up, step = last
        trial = [int(rung) for rung in np.add(at, step)]
        inside = all(0 <= t < len(r.widths) for t, r in zip(trial, self._rungs, strict=True))
        return (up, trial) if inside and not self._over(trial) else None

    def learn(self, up: int, at: Sequence[int], trial: Sequence[int], *, better: bool) -> None:
        """Draw the groups of a good trade more often, those of a bad one less."""
        factor = 1.6 if better else 0.85
        down = [g for g, (a, t) in enumerate(zip(at, trial, strict=True)) if t > a]
        self._likes_up[up] = np.clip(self._likes_up[up] * factor, 0.05, 20)
        self._likes_down[down] = np.clip(self._likes_down[down] * factor, 0.05, 20)

    def _fill(self, trial: list[int], up: int) -> list[int]:
        """Spend what the trade left over, on the widened group first, then at random."""
        order = [up, *(int(g) for g in self._rng.permutation(len(trial)))]
        for group in order:
            while trial[group] > 0:
                trial[group] -= 1
                if self._over(trial):
                    trial[group] += 1
                    break
        return trial

    def _stride(self, group: int) -> int:
        return max(1, round(STRIDE * len(self._rungs[group].widths) * self._rng.uniform(0.5, 1.5)))

    def _over(self, at: Sequence[int]) -> bool:
        return self._cost.macs(self.counts(at)) > self._budget

    def _draw(self, weights: NDArray[np.float64]) -> int:
        return int(self._rng.choice(len(weights), p=weights / weights.sum()))
