"""Choose every group's width exactly: least score lost within all limits at once.

1. Lagrangian dual. With a price on every limit the rest is a sum of tables over few variables
   each, minimised exactly by elimination (``prune.elimination``). The best prices are found by
   cutting planes (Kelley 1960); the dual's value is a bound that no choice can beat.
2. Fixing. A width whose least priced cost is above the best choice known can not be in a better
   one, so it is struck out.
3. What is left goes to CP-SAT (OR-Tools), with one Boolean per width and per pair of widths.

Where the third step stops early, the result says how far from the best it can be at most. One
worker, a fixed seed and a limit in deterministic time: the same input gives the same plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from ortools.linear_solver import pywraplp

from secateur.prune.budget import Ladder, Load, fill, greedy
from secateur.prune.cp_sat import solve_cp_sat
from secateur.prune.elimination import Elimination, TooDense
from secateur.prune.network import FORBIDDEN, Network, compile_network
from secateur.prune.problem import (
    Allocation,
    Floats,
    Limit,
    Problem,
    Totals,
    allocation,
    impossible,
    impossible_together,
)

ROUNDS = 60  # of cutting planes; one budget takes about ten, five budgets about forty
PIVOTS = 1000  # of the small linear programme between them; GLOP cycles in a few degenerate ones
PRICE_LIMIT = 1e4  # of one whole budget, in units of all score that can be lost
DUAL_GAP = 1e-7
EFFORT = 3.0  # of CP-SAT, in its deterministic seconds (about those of an idle core)
MOST_PAIRS = 40_000  # Booleans that CP-SAT is given
MARGIN = 1e-9
FILLED = 8  # of the choices that the dual met, the best: what still fits is put back
NEAR = 2  # rungs to each side that are tried where no bound is known


def solve_exact(problem: Problem) -> Allocation:
    """Return the best choice found, and how far from the best of all it can be at most.

    Raises:
        PlanError: a limit is below what the widths reach, alone or together with the others.
    """
    network = compile_network(problem)
    try:
        order: Elimination | None = Elimination(network.sizes, network.scopes)
    except TooDense:
        order = None
    if order is not None:
        _check_each(problem, network, order)
    dual = _Dual(-np.inf, None, ()) if order is None else _best_prices(network, order)
    feasible = sorted({at for at in dual.visited if network.holds(at)}, key=problem.objective)
    starts: list[Sequence[int]] = [*_filled(problem, feasible[:FILLED])]
    best = min(starts or _greedy_start(problem), key=problem.objective, default=None)
    known = problem.objective(best) if best is not None else np.inf
    if known <= dual.bound + MARGIN * (1 + abs(known)) and best is not None:
        return allocation(problem, best, known, "exact")
    kept, least_removed = _unfixed(network, order, dual, best)
    found, bound = solve_cp_sat(network, kept, best, EFFORT)
    if found is not None and network.holds(found) and problem.objective(found) < known:
        best = found
    if best is None:
        _check_ends(problem)
        raise impossible_together(problem.limits)
    return allocation(problem, best, max(dual.bound, min(bound, least_removed)), "exact")


def lower_bound(problem: Problem) -> float:
    """Return a score that every choice within the limits loses at least, -inf if none is known."""
    network = compile_network(problem)
    try:
        order = Elimination(network.sizes, network.scopes)
    except TooDense:
        return -np.inf
    return _best_prices(network, order).bound


def solve_greedy(problem: Problem) -> Allocation:
    """Return the greedy choice (``prune.budget``), the baseline; its bound is unknown (-inf).

    Raises:
        PlanError: no choice was found that meets all limits.
    """
    for at in _greedy_start(problem, swaps=True):
        return allocation(problem, at, -np.inf, "greedy")
    _check_ends(problem)
    raise impossible_together(problem.limits)


def _filled(problem: Problem, choices: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield the choices with what still fits within the limits put back."""
    rungs, load = _ladders(problem), _load(problem, Totals(problem))
    for at in choices:
        yield fill(rungs, load, list(at))


def _ladders(problem: Problem) -> list[Ladder]:
    return [
        Ladder(widths, tuple(-value for value in lost))
        for widths, lost in zip(problem.widths, problem.lost, strict=True)
    ]


def _load(problem: Problem, totals: Totals) -> Load:
    """Return what says how much is used of the limit of which most is."""

    def load(at: Sequence[int]) -> float:
        used = zip(problem.limits, totals(at), strict=True)
        return max((_share(limit, total) for limit, total in used), default=0.0)

    return load


def _greedy_start(problem: Problem, *, swaps: bool = False) -> Iterator[list[int]]:
    """Yield the greedy choice if there is one."""
    totals = Totals(problem)
    widest, narrowest = _ends(problem)
    rising = [which for which, limit in enumerate(problem.limits)
              if limit.total(narrowest) > limit.total(widest)]  # fmt: skip

    def allowed(at: Sequence[int]) -> bool:
        found = totals(at) if rising else ()
        return all(found[which] <= problem.limits[which].most for which in rising)

    at = greedy(_ladders(problem), _load(problem, totals), allowed=allowed, swaps=swaps)
    if at is not None:
        yield at


def _check_ends(problem: Problem) -> None:
    """Raise where a limit is below what the widest and the narrowest widths reach.

    Raises:
        PlanError: one is.
    """
    widest, narrowest = _ends(problem)
    for limit in problem.limits:
        least = min(limit.total(widest), limit.total(narrowest))
        if least > limit.most:
            raise impossible(limit, least)


def _ends(problem: Problem) -> tuple[list[int], list[int]]:
    return [max(widths) for widths in problem.widths], [min(widths) for widths in problem.widths]


def _share(limit: Limit, total: float) -> float:
    """Return how much of a limit is used; above 1 exactly where it is passed."""
    return total / limit.most if limit.most > 0 else 1.0 + (total - limit.most)


def _check_each(problem: Problem, network: Network, order: Elimination) -> None:
    for which, limit in enumerate(problem.limits, 1):
        prices = [float(place == which) for place in range(len(network.tables))]
        least, at = order.minimise(network.priced(prices))
        if limit.total(problem.counts(at[: len(problem.widths)])) > limit.most:
            raise impossible(limit, least)


@dataclass(frozen=True)
class _Dual:
    bound: float
    prices: tuple[float, ...] | None
    visited: tuple[tuple[int, ...], ...]


def _best_prices(network: Network, order: Elimination) -> _Dual:
    """Return the prices with the highest bound (the first is that of the loss, always 1)."""
    limits = network.problem.limits
    scale = sum(max(lost) for lost in network.problem.lost) or 1.0
    units = [abs(limit.most) or 1.0 for limit in limits]
    master = _Master(len(limits))
    bound, best, visited = -np.inf, (0.0,) * len(limits), []
    prices: tuple[float, ...] = best
    for _ in range(ROUNDS):
        scaled = (1.0, *(price / unit for price, unit in zip(prices, units, strict=True)))
        value, at = order.minimise(network.priced(scaled))
        value -= sum(p * li.most / u for p, li, u in zip(prices, limits, units, strict=True))
        visited.append(tuple(at[: len(network.problem.widths)]))
        if value > bound:
            bound, best = value, prices
        over = [
            (network.sum_of(at, which) - limit.most) / unit
            for which, (limit, unit) in enumerate(zip(limits, units, strict=True), 1)
        ]
        step = master.next_prices(network.sum_of(at, 0) / scale, over)
        if step is None or step[0] * scale - bound <= DUAL_GAP * scale:
            break
        prices = tuple(price * scale for price in step[1])
    scaled_best = (1.0, *(price / unit for price, unit in zip(best, units, strict=True)))
    return _Dual(bound, scaled_best, tuple(visited))


class _Master:
    """Kelley's master problem: the prices at which the planes seen so far allow the most."""

    def __init__(self, limits: int) -> None:
        self._solver = pywraplp.Solver.CreateSolver("GLOP")
        self._solver.SetSolverSpecificParametersAsString(f"max_number_of_iterations: {PIVOTS}")
        self._done = pywraplp.Solver.OPTIMAL
        self._prices = [self._solver.NumVar(0, PRICE_LIMIT, f"price{i}") for i in range(limits)]
        self._value = self._solver.NumVar(-PRICE_LIMIT, PRICE_LIMIT, "value")
        self._solver.Maximize(self._value)

    def next_prices(
        self, loss: float, over: Sequence[float]
    ) -> tuple[float, tuple[float, ...]] | None:
        """Add the plane ``loss + over @ prices``; return the most reachable, and where."""
        row = self._solver.Constraint(-self._solver.infinity(), loss)  # value - over @ prices
        row.SetCoefficient(self._value, 1)
        for share, price in zip(over, self._prices, strict=True):
            row.SetCoefficient(price, -share)
        if self._solver.Solve() != self._done:
            return None  # the bound found so far holds
        prices = tuple(max(0.0, price.solution_value()) for price in self._prices)
        return self._value.solution_value(), prices


def _unfixed(
    network: Network, order: Elimination | None, dual: _Dual, best: Sequence[int] | None
) -> tuple[list[NDArray[np.int64]], float]:
    """Return the rungs per variable that a better choice may use, and the least cost of the rest.

    Where too many are left, only the most promising stay.
    """
    if order is None or dual.prices is None:
        return _near(network, best), -np.inf
    limits = network.problem.limits
    credit = sum(p * limit.most for p, limit in zip(dual.prices[1:], limits, strict=True))
    marginals = [m - credit for m in order.marginals(network.priced(dual.prices))]
    known = network.problem.objective(best) if best is not None else np.inf
    threshold = known + MARGIN * (1 + known) if best is not None else np.inf
    candidates = np.unique(np.concatenate(marginals))
    candidates = candidates[candidates <= threshold]
    if _pairs(network, marginals, threshold) > MOST_PAIRS:
        low, high = 0, len(candidates) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if _pairs(network, marginals, candidates[middle]) > MOST_PAIRS:
                high = middle - 1
            else:
                low = middle
        threshold = candidates[low]
    kept = [np.flatnonzero(m <= threshold) for m in marginals]
    removed = [m[m > threshold].min(initial=np.inf) for m in marginals]
    least = float(min(removed))
    return kept, least if least < FORBIDDEN / 2 else np.inf


def _near(network: Network, best: Sequence[int] | None) -> list[NDArray[np.int64]]:
    """Return the rungs around a choice, every rung where there is none, and every sum."""
    around: list[NDArray[np.int64]] = []
    for variable, size in enumerate(network.sizes):
        rungs = np.arange(size)
        if best is not None and variable < len(best):
            rungs = rungs[abs(rungs - best[variable]) <= NEAR]
        around.append(rungs)
    return around


def _pairs(network: Network, marginals: Sequence[Floats], threshold: float) -> int:
    sizes = [int((m <= threshold).sum()) for m in marginals]
    return sum(sizes[a] * sizes[b] for scope in network.scopes if len(scope) == 2
               for a, b in [scope])  # fmt: skip
