"""The guard: the cheapest assignment of precisions that costs no task more than it may lose.

A search over which units stay in high precision. Sensitivities, measured one unit at a time, give
an order; the tasks' own metrics judge. Along an order the shortest prefix that passes is found by
doubling and bisection; then units are released one by one, the most expensive first, and the cheap
ones together. Ranking layers by sensitivity is what HAWQ's and AIMET's mixed precision do; here
there is a limit per task instead of one figure for the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from secateur.lower.quant.plan import Precision
from secateur.lower.quant.units import Unit

Assignment = Mapping[str, Precision]
Judge = Callable[[Assignment], Mapping[str, float]]
Sensitivity = Mapping[str, Mapping[str, float]]

EVALUATIONS = 40
WORTH_RELEASING = 1e-3  # of all units' cost: less is not worth an evaluation


@dataclass(frozen=True)
class Guarded:
    """What the guard decided.

    ``assignment`` is per unit; ``why`` names, for each unit in high precision, what it was kept
    for: "head" or the task that it would cost most. ``change`` is the judged change in percent per
    task, ``passed`` whether every limit is met, ``evaluations`` how often the judge was asked.
    """

    assignment: Mapping[str, Precision]
    why: Mapping[str, str]
    change: Mapping[str, float]
    passed: bool
    evaluations: int


def guard(
    units: Sequence[Unit],
    limits: Mapping[str, float],
    judge: Judge,
    sensitivity: Callable[[], Sensitivity],
    *,
    low: Precision,
    high: Callable[[str], Precision],
    evaluations: int = EVALUATIONS,
) -> Guarded:
    """Return the units' precisions, ``low`` or ``high(unit)``, of the least cost found.

    ``limits``: per task the loss in percent that is allowed; ``judge`` gives the change in percent
    (a loss is negative). ``sensitivity()`` gives per task and unit a number >= 0 that says how much
    the unit alone disturbs the task; it is asked for only if something has to be searched. Ends of
    heads are kept in high precision whatever the judge says. The judge is asked ``evaluations``
    times at most; if none of what it was asked passes, everything is left in high precision.
    """
    search = _Search(units, limits, judge, low, high, max(evaluations, 2))
    protected = frozenset(unit.name for unit in units if unit.ends_head)
    why = dict.fromkeys((u.name for u in units if u.ends_head), "head")
    if search.passes(protected):
        return search.result(protected, why)
    blame = _Blame(units, search.failing(protected), sensitivity())
    passed = [found for order in blame.orders(protected)
              if (found := search.shortest(protected, order)) is not None]  # fmt: skip
    kept = search.released(min(passed, key=search.cost), protected) if passed else None
    if kept is None:
        kept = frozenset(unit.name for unit in units)
        search.passes(kept, last=True)
    return search.result(kept, why | {name: blame.task(name) for name in kept - protected})


class _Search:
    """Asks the judge about sets of units kept in high precision, each once."""

    def __init__(
        self,
        units: Sequence[Unit],
        limits: Mapping[str, float],
        judge: Judge,
        low: Precision,
        high: Callable[[str], Precision],
        evaluations: int,
    ) -> None:
        self.units, self.limits, self._judge = units, limits, judge
        self._low, self._high = low, high
        self._most = evaluations
        self._judged: dict[frozenset[str], Mapping[str, float]] = {}
        self._costs = {unit.name: unit.cost for unit in units}

    def assignment(self, kept: frozenset[str]) -> dict[str, Precision]:
        return {unit.name: self._high(unit.name) if unit.name in kept else self._low
                for unit in self.units}  # fmt: skip

    def passes(self, kept: frozenset[str], *, last: bool = False) -> bool:
        """Say whether every limit is met; no, too, when the judge was asked often enough.

        One evaluation is held back for the ``last`` question.
        """
        if kept not in self._judged:
            if len(self._judged) >= self._most - (not last):
                return False
            self._judged[kept] = self._judge(self.assignment(kept))
        return not self.failing(kept)

    def failing(self, kept: frozenset[str]) -> dict[str, float]:
        """Return, for each task beyond its limit, by how many percent."""
        change = self._judged[kept]
        return {task: -change[task] - limit for task, limit in self.limits.items()
                if not -change[task] <= limit}  # fmt: skip

    def cost(self, kept: frozenset[str]) -> int:
        return sum(self._costs[name] for name in kept)

    def shortest(self, start: frozenset[str], order: Sequence[str]) -> frozenset[str] | None:
        """Return ``start`` with the shortest prefix of ``order`` that passes, None if none does."""

        def passes(length: int) -> bool:
            return self.passes(start | set(order[:length]))

        failed, length = 0, 1
        while not passes(length):
            if length >= len(order):
                return None
            failed, length = length, min(2 * length, len(order))
        while length - failed > 1:
            middle = (failed + length) // 2
            failed, length = (failed, middle) if passes(middle) else (middle, length)
        return start | set(order[:length])

    def released(self, kept: frozenset[str], protected: frozenset[str]) -> frozenset[str]:
        """Return what passes, too, with the most expensive units given up one after another.

        The cheap ones are then given up together, or not at all.
        """
        least = WORTH_RELEASING * sum(self._costs.values())
        cheap = {name for name in kept - protected if self._costs[name] < least}
        for name in sorted(kept - protected - cheap, key=lambda name: -self._costs[name]):
            if self.passes(kept - {name}):
                kept = kept - {name}
        return kept - cheap if self.passes(kept - cheap) else kept

    def result(self, kept: frozenset[str], why: Mapping[str, str]) -> Guarded:
        return Guarded(
            self.assignment(kept), {name: why[name] for name in self._costs if name in kept},
            self._judged[kept], not self.failing(kept), len(self._judged),
        )  # fmt: skip


class _Blame:
    """Each unit's share of the disturbance of the tasks that fail."""

    def __init__(
        self, units: Sequence[Unit], failing: Mapping[str, float], sensitivity: Sensitivity
    ) -> None:
        self._units = units
        self._shares = {
            task: {unit.name: sensitivity[task].get(unit.name, 0.0) / total for unit in units}
            for task in failing
            if (total := sum(sensitivity[task].values()) or 1.0)
        }

    def orders(self, protected: frozenset[str]) -> list[list[str]]:
        """Return the units to keep first: by need, and by need for what they cost."""
        free = [unit for unit in self._units if unit.name not in protected]
        total = sum(unit.cost for unit in free) or 1
        need = {unit.name: sum(s[unit.name] for s in self._shares.values()) for unit in free}
        # A unit that costs nothing else still needs a change of type at its edges.
        price = {unit.name: unit.cost / total + 1 / len(free) for unit in free}
        rules: tuple[Callable[[str], float], ...] = (
            lambda name: -need[name],
            lambda name: -need[name] / price[name],
        )
        return [sorted(need, key=rule) for rule in rules] if free else []

    def task(self, name: str) -> str:
        """Return the task that a unit disturbs most."""
        return max(self._shares, key=lambda task: self._shares[task][name])
