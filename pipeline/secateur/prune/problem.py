"""The choice of every group's width, as data: what is lost at each width, and what may be spent.

Each cost is a sum of terms that depend on two widths (those that a layer reads and makes), so
MACs, parameters, bytes, live activations, milliseconds and a task's lost importance are all of
the one form that ``prune.exact`` and the greedy baseline solve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
        return self.constant + sum(term.at(kept) for term in self.terms)

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
    def gap(self) -> float:
        """The proven distance to the best choice, as a share of the objective."""
        return max(0.0, self.objective - self.bound) / self.objective if self.objective else 0.0


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
