"""Choose how many channels each group keeps, on a grid, to fill a MACs budget and never pass it.

Greedy with a repair: the chunk (one grid step of one group) whose channels matter least per
channel goes first until the budget holds; then whatever still fits is put back, best first, and
swaps close the last gap. (torch-pruning's ``round_to`` rounds down after the fact and misses.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import PlanError
from secateur.prune.macs import MacsModel
from secateur.prune.problem import Limit

Scores = Sequence[NDArray[np.float64]]
Load = Callable[[Sequence[int]], float]  # the share of the budget that rungs use; it holds to 1
Allowed = Callable[[Sequence[int]], bool]  # whether rungs keep what narrower widths may break
WIDE = 12  # grid steps from which on a group counts as wide
FLOORS = (0.3, 0.1, 0.05)  # tried in turn; the first did best on the convolutional parents
ROOM = 0.55  # of the budget: what the narrowest network may cost, or there is little to choose
GAP = 0.005  # how far below the budget a solution may stay before swaps are tried


@dataclass(frozen=True)
class Ladder:
    """The widths a group may have, widest first, and the score kept at each."""

    widths: tuple[int, ...]
    kept_score: tuple[float, ...]


def ladders(scores: Scores, grids: Sequence[int], floor: float) -> list[Ladder]:
    """Return each group's ladder: its full width, then multiples of its grid down to the floor.

    The floor is ``max(grid, floor * width)``, rounded up. A wide group moves two grid steps at a
    time: relative to its width that is still fine, and runtimes with kernels of 16 channels
    (AVX-512) waste nothing there.
    """
    result = []
    for channel_scores, grid in zip(scores, grids, strict=True):
        width = len(channel_scores)
        step = 2 * grid if width >= WIDE * grid else grid
        least = max(step, int(np.ceil(floor * width / step)) * step)
        steps = [width, *range((width - 1) // step * step, least - 1, -step)]
        best_first = np.concatenate([[0.0], np.cumsum(np.sort(channel_scores)[::-1])])
        result.append(Ladder(tuple(steps), tuple(float(best_first[k]) for k in steps)))
    return result


def default_floor(widths: Sequence[int], grids: Sequence[int], limits: Sequence[Limit]) -> float:
    """Return the highest of ``FLOORS`` that leaves every limit something to choose.

    What no cut saves (of milliseconds and bytes that is much, of MACs almost nothing) counts
    neither as cost nor as budget.
    """
    nothing = [0] * len(widths)
    for floor in FLOORS:
        rungs = ladders([np.zeros(width) for width in widths], grids, floor)
        narrowest = [ladder.widths[-1] for ladder in rungs]
        fixed = ((limit, limit.total(nothing)) for limit in limits)
        if all(li.total(narrowest) - kept <= ROOM * (li.most - kept) for li, kept in fixed):
            return floor
    return FLOORS[-1]


def solve(
    scores: Scores, cost: MacsModel, budget: int, grids: Sequence[int], floor: float
) -> list[int]:
    """Return how many channels each group keeps: the most score found within ``budget`` MACs.

    Raises:
        PlanError: even the narrowest grid widths cost more than the budget.
    """
    rungs = ladders(scores, grids, floor)
    least = cost.macs([ladder.widths[-1] for ladder in rungs])
    full = cost.macs([ladder.widths[0] for ladder in rungs])
    if least > budget:
        raise PlanError(
            f"the budget of {budget / 1e6:.2f} M MACs ({budget / full:.3f} of the parent) is below "
            f"the least that whole channels in multiples of {max(grids)} allow: "
            f"{least / 1e6:.2f} M ({least / full:.3f})",
            hint=f"set prune.budget.macs to at least {np.ceil(1000 * least / full) / 1000:.3f}, "
            "or lower prune.floor" + (" or prune.grid" if max(grids) > 1 else ""),
        )

    def load(at: Sequence[int]) -> float:
        counts = [ladder.widths[rung] for ladder, rung in zip(rungs, at, strict=True)]
        return cost.macs(counts) / budget

    at = greedy(rungs, load)
    return [ladder.widths[rung] for ladder, rung in zip(rungs, at or (), strict=True)]


def greedy(
    rungs: Sequence[Ladder],
    load: Load,
    *,
    allowed: Allowed = lambda _: True,
    swaps: bool = True,
) -> list[int] | None:
    """Return a rung per group at which the load is at most 1, or None where the way down ends.

    What is not ``allowed`` at some widths must not be at narrower ones, and has a load above 1.
    """
    at = _descend(rungs, load, allowed)
    if at is None:
        return None
    at = fill(rungs, load, at)
    return _swap(rungs, load, at) if swaps else at


def _step_loss(ladder: Ladder, rung: int) -> float:
    """Return the score per channel lost by going one rung down from ``rung``."""
    channels = ladder.widths[rung] - ladder.widths[rung + 1]
    return (ladder.kept_score[rung] - ladder.kept_score[rung + 1]) / channels


def _descend(rungs: Sequence[Ladder], load: Load, allowed: Allowed) -> list[int] | None:
    at = [0] * len(rungs)
    while load(at) > 1:
        movable = [g for g, ladder in enumerate(rungs) if at[g] + 1 < len(ladder.widths)]
        movable.sort(key=lambda g: _step_loss(rungs[g], at[g]))
        steps = ([*at[:g], at[g] + 1, *at[g + 1 :]] for g in movable)
        below = next((step for step in steps if allowed(step)), None)
        if below is None:
            return None
        at = below
    return at


def fill(rungs: Sequence[Ladder], load: Load, start: list[int]) -> list[int]:
    """Put back the most valuable chunk that still fits, until none does."""
    at = list(start)
    while True:
        best, gain = None, 0.0
        for g, rung in enumerate(at):
            if rung == 0:
                continue
            trial = [*at[:g], rung - 1, *at[g + 1 :]]
            value = _step_loss(rungs[g], rung - 1)
            if value >= gain and load(trial) <= 1:
                best, gain = trial, value
        if best is None:
            return at
        at = best


def _swap(rungs: Sequence[Ladder], load: Load, start: list[int]) -> list[int]:
    """While the gap is wide, trade one chunk out for one chunk in that ends nearer below."""
    at = list(start)
    spent = load(at)
    while spent < 1 - GAP:
        best, best_spent = None, spent
        for out, ladder in enumerate(rungs):
            if at[out] + 1 >= len(ladder.widths):
                continue
            for back in range(len(rungs)):
                if back == out or at[back] == 0:
                    continue
                trial = list(at)
                trial[out] += 1
                trial[back] -= 1
                used = load(trial)
                if best_spent < used <= 1:
                    best, best_spent = trial, used
        if best is None:
            return at
        at, spent = best, best_spent
    return at
