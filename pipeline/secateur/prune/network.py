"""A problem of widths as tables over few variables each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.core.widths import Width
from secateur.prune.elimination import Scope
from secateur.prune.problem import Floats, Limit, Problem

FORBIDDEN = 1e12  # the cost of a sum that is none
Sum = tuple[tuple[int, int], tuple[int, int], int]


@dataclass(frozen=True)
class Network:
    """A problem as tables: variables 0..G-1 are the groups' rungs, later ones sums of widths.

    ``tables[0]`` is the loss, ``tables[1:]`` one limit each, all by the place in ``scopes``;
    ``sums`` say which variables, how many times, add up to which; ``values`` are a rung's widths.
    """

    sizes: tuple[int, ...]
    scopes: tuple[Scope, ...]
    tables: tuple[tuple[Floats | None, ...], ...]
    values: tuple[NDArray[np.int64], ...]
    sums: tuple[Sum, ...]
    sum_tables: tuple[Floats | None, ...]
    problem: Problem

    def holds(self, at: Sequence[int]) -> bool:
        """Say whether a choice of the groups' rungs is within every limit."""
        counts = self.problem.counts(at)
        return all(limit.total(counts) <= limit.most for limit in self.problem.limits)

    def priced(self, prices: Sequence[float]) -> list[Floats]:
        """Return the tables of loss plus priced costs, ready to be minimised."""
        merged = []
        for place, scope in enumerate(self.scopes):
            table = np.zeros([self.sizes[v] for v in scope])
            for price, tables in zip(prices, self.tables, strict=True):
                part = tables[place]
                if part is not None and price:
                    table += price * part
            forbidden = self.sum_tables[place]
            merged.append(table if forbidden is None else table + forbidden)
        return merged

    def sum_of(self, at: Sequence[int], which: int) -> float:
        """Return loss (0) or a limit's total (1..) at rungs of all variables."""
        return sum(
            float(table[tuple(at[v] for v in scope)])
            for scope, table in zip(self.scopes, self.tables[which], strict=True)
            if table is not None
        )


def compile_network(problem: Problem) -> Network:
    """Return the problem as tables over pairs of variables, sums of widths among these."""
    builder = _Builder(problem)
    loss: dict[Scope, Floats] = {(g,): np.array(lost) for g, lost in enumerate(problem.lost)}
    per_limit = [builder.tables_of(limit) for limit in problem.limits]
    forbidden = builder.sum_tables()
    scopes = sorted({*loss, *forbidden, *(scope for tables in per_limit for scope in tables)})
    return Network(
        sizes=tuple(len(values) for values in builder.values),
        scopes=tuple(scopes),
        tables=tuple(tuple(tables.get(scope) for scope in scopes) for tables in [loss, *per_limit]),
        values=tuple(builder.values),
        sums=tuple(builder.sums),
        sum_tables=tuple(forbidden.get(scope) for scope in scopes),
        problem=problem,
    )


class _Builder:
    """Makes a variable of every sum of widths that a term reads."""

    def __init__(self, problem: Problem) -> None:
        self.values = [np.array(widths, np.int64) for widths in problem.widths]
        self.sums: list[Sum] = []
        self._made: dict[tuple[tuple[int, int], ...], int] = {}

    def variable(self, of: tuple[tuple[int, int], ...]) -> tuple[int, int]:
        """Return (variable, times): the part of a width that is not fixed."""
        if len(of) == 1:
            return of[0]
        if of not in self._made:
            before, times = self.variable(of[:-1])
            group, own = of[-1]
            first, second = times * self.values[before], own * self.values[group]
            self._made[of] = len(self.values)
            self.sums.append(((before, times), (group, own), len(self.values)))
            self.values.append(np.unique(np.add.outer(first, second)))
        return self._made[of], 1

    def tables_of(self, limit: Limit) -> dict[Scope, Floats]:
        """Return a limit's costs by scope, its constant with the first."""
        tables: dict[Scope, Floats] = {(0,): np.full(len(self.values[0]), limit.constant)}
        for term in limit.terms:
            (a, first), (b, second) = self._widths(term.first), self._widths(term.second)
            cost = term.cost(first, second)
            scope, table = _as_scope(a, b, cost)
            tables[scope] = tables[scope] + table if scope in tables else table
        return tables

    def _widths(self, width: Width) -> tuple[int | None, NDArray[np.int64]]:
        if not width.of:
            return None, np.array([width.fixed])
        variable, times = self.variable(width.of)
        return variable, width.fixed + times * self.values[variable]

    def sum_tables(self) -> dict[Scope, Floats]:
        """Return, for each sum, 0 where the three variables agree and a prohibitive cost else."""
        tables = {}
        for (before, times), (group, own), made in self.sums:
            added = np.add.outer(times * self.values[before], own * self.values[group])
            wrong = added[:, :, None] != self.values[made]
            scope: Scope = (before, group, made)
            if before > group:
                scope, wrong = (group, before, made), wrong.transpose(1, 0, 2)
            tables[scope] = np.where(wrong, FORBIDDEN, 0.0)
        return tables


def _as_scope(a: int | None, b: int | None, cost: Floats) -> tuple[Scope, Floats]:
    """Return a term's variables, ascending, and its costs; a constant goes to group 0."""
    if a is None and b is None:
        return (0,), cost.reshape(1)
    if a is None:
        return _as_scope(b, a, cost)
    if b is None:
        return (a,), cost.reshape(-1)
    if a == b:
        return (a,), cost.diagonal()
    return ((a, b), cost) if a < b else ((b, a), cost.T)
