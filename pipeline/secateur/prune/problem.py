"""The choice of every group's width, as data: what is lost at each width, and what may be spent.

Each cost is a sum of terms that depend on two widths (those that a layer reads and makes), so
MACs, parameters, bytes, live activations, milliseconds and a task's lost importance are all of
the one form that ``prune.exact`` and the greedy baseline solve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum

import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import PlanError
from secateur.core.widths import Width

Floats = NDArray[np.float64]
PairCost = Callable[[NDArray[np.int64], NDArray[np.int64]], Floats]
ONE = Width(1)


@dataclass(frozen=True)
class Term:
    """``cost`` of (n,) first and (m,) second widths as (n, m) values."""

    first: Width
    second: Width
    cost: PairCost

    def at(self, kept: Sequence[int]) -> float:
        """Return the cost of one choice."""
        first, second = np.array([self.first(kept)]), np.array([self.second(kept)])
        return float(self.cost(first, second)[0, 0])


@dataclass(frozen=True)
class Limit:
    """``constant`` and the terms may add up to ``most``; messages show values as ``scale * unit``.

    ``key`` is what the user sets to change it.
    """

    name: str
    most: float
    terms: tuple[Term, ...]
    constant: float = 0.0
    unit: str = ""
    scale: float = 1.0
    key: str = ""

    def total(self, kept: Sequence[int]) -> float:
        """Return what the choice costs."""
        return fsum([self.constant, *(term.at(kept) for term in self.terms)])

    def said(self, value: float) -> str:
        """Return a value in the words of a message."""
        return f"{value * self.scale:.4g} {self.unit}".strip()


@dataclass(frozen=True)
class Problem:
    """``widths[g]`` are what group g may keep, widest first, and ``lost[g]`` the score lost there.

    Raises:
        PlanError: a group has no width to choose from, or not one loss per width.
    """

    widths: tuple[tuple[int, ...], ...]
    lost: tuple[tuple[float, ...], ...]
    limits: tuple[Limit, ...]

    def __post_init__(self) -> None:
        for group, (widths, lost) in enumerate(zip(self.widths, self.lost, strict=True)):
            if not widths or len(widths) != len(lost):
                raise PlanError(
                    f"group {group} has {len(widths)} widths and {len(lost)} losses",
                    hint="give every group at least one width, and a loss for each",
                )

    def counts(self, at: Sequence[int]) -> tuple[int, ...]:
        """Return the widths at rungs ``at``."""
        return tuple(widths[rung] for widths, rung in zip(self.widths, at, strict=True))

    def objective(self, at: Sequence[int]) -> float:
        """Return the score lost at rungs ``at``."""
        return sum(lost[rung] for lost, rung in zip(self.lost, at, strict=True))


@dataclass(frozen=True)
class Allocation:
    """``counts`` kept per group, what they lose, and what no choice can get below.

    ``gap`` is (objective - bound) / objective: 0 where the choice is proven the best one.
    ``spent`` is by the limits' names, the most of those of one name.
    """

    counts: tuple[int, ...]
    objective: float
    bound: float
    spent: Mapping[str, float]
    method: str

    @property
    def gap(self) -> float | None:
        """The proven distance to the best choice, as a share of the objective; None: unknown."""
        if not np.isfinite(self.bound):
            return None
        return max(0.0, self.objective - self.bound) / self.objective if self.objective else 0.0


class Totals:
    """Each limit's total at choices of rungs, quick where one choice differs little from the last.

    The sums are rounded once (``fsum``), so that they equal ``Limit.total`` to the last bit.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._terms = [(which, term) for which, limit in enumerate(problem.limits)
                       for term in limit.terms]  # fmt: skip
        self._places: list[list[int]] = [[] for _ in problem.widths]
        for place, (_, term) in enumerate(self._terms):
            for group in {group for width in (term.first, term.second) for group, _ in width.of}:
                self._places[group].append(place)
        self._known: dict[tuple[int, int, int], float] = {}
        self._at = [0] * len(problem.widths)
        self._counts = list(problem.counts(self._at))
        self._values = [[limit.constant] for limit in problem.limits]
        self._slots = []
        for place, (which, _) in enumerate(self._terms):
            self._slots.append(len(self._values[which]))
            self._values[which].append(self._value(place))

    def __call__(self, at: Sequence[int]) -> list[float]:
        """Return the totals, one per limit."""
        changed = [g for g, (new, old) in enumerate(zip(at, self._at, strict=True)) if new != old]
        for group in changed:
            self._counts[group] = self._problem.widths[group][at[group]]
        for place in {place for group in changed for place in self._places[group]}:
            self._values[self._terms[place][0]][self._slots[place]] = self._value(place)
        self._at = list(at)
        return [fsum(values) for values in self._values]

    def _value(self, place: int) -> float:
        term = self._terms[place][1]
        key = place, term.first(self._counts), term.second(self._counts)
        if key not in self._known:
            self._known[key] = term.at(self._counts)
        return self._known[key]


def allocation(problem: Problem, at: Sequence[int], bound: float, method: str) -> Allocation:
    """Return the choice of rungs ``at`` with what it spends."""
    counts, objective = problem.counts(at), problem.objective(at)
    spent: dict[str, float] = {}
    for limit in problem.limits:
        spent[limit.name] = max(limit.total(counts), spent.get(limit.name, 0.0))
    return Allocation(counts, objective, min(bound, objective), spent, method)


def impossible(limit: Limit, least: float) -> PlanError:
    """Return the error that says the least a limit can be set to."""
    return PlanError(
        f"the budget of {limit.said(limit.most)} for {limit.name} is below the least that the "
        f"offered widths reach: {limit.said(least)}",
        hint=f"raise {limit.key or limit.name}, or lower prune.floor or the grid",
    )


def impossible_together(limits: Sequence[Limit]) -> PlanError:
    """Return the error that says that each limit can be met and no choice was found for all."""
    named = ", ".join(f"{limit.name} <= {limit.said(limit.most)}" for limit in limits)
    return PlanError(
        f"each of these can be met alone, but no choice of widths was found for all: {named}",
        hint="raise one of them, or lower a task's floor",
    )


def product(unit: float) -> PairCost:
    """Return the cost ``unit * first * second``."""
    return lambda first, second: unit * np.outer(first, second).astype(np.float64)


def by_count(values: Sequence[float] | Floats) -> PairCost:
    """Return the cost ``values[first]``, whatever the second width is."""
    table = np.asarray(values, np.float64)
    return lambda first, second: np.repeat(table[first][:, None], len(second), axis=1)
