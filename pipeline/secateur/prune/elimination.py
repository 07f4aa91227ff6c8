"""Minimise a sum of small tables over many discrete variables by eliminating one at a time.

Dynamic programming on the coupling graph (Dechter, "Bucket elimination", 1999): exact, and quick
as long as few variables meet in one table. Channel groups do: layers couple the groups before and
after them, and a residual stream is one group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Scope = tuple[int, ...]
LARGEST_TABLE = 3_000_000  # entries: 24 MB


class TooDense(Exception):
    """A table would have more than ``LARGEST_TABLE`` entries."""


class Elimination:
    """An order of elimination for tables over ``scopes`` (ascending variables).

    Raises:
        TooDense: the coupling is too dense for exact elimination.
    """

    def __init__(self, sizes: Sequence[int], scopes: Sequence[Scope]) -> None:
        self._sizes = tuple(sizes)
        self._scopes = tuple(scopes)
        self._steps: list[tuple[int, Scope]] = []  # (variable, its bucket's scope)
        live = {frozenset(scope) for scope in scopes}
        left = set(range(len(sizes)))
        while left:
            unions = {
                v: frozenset({v}).union(*(scope for scope in live if v in scope)) for v in left
            }
            variable = min(left, key=lambda v: (self._entries(unions[v]), v))
            bucket = unions[variable]
            if self._entries(bucket) > LARGEST_TABLE:
                raise TooDense
            self._steps.append((variable, tuple(sorted(bucket))))
            live = {scope for scope in live if variable not in scope}
            live.add(bucket - {variable})
            left.remove(variable)
        step_of = {variable: step for step, (variable, _) in enumerate(self._steps)}
        # per table the step that takes it in
        self._home = [min(step_of[v] for v in scope) for scope in scopes]
        self._parent = [
            min((step_of[v] for v in scope if v != variable), default=None)
            for variable, scope in self._steps
        ]

    def minimise(self, tables: Sequence[Floats]) -> tuple[float, list[int]]:
        """Return the least sum and the choice per variable; tables in the order of the scopes."""
        buckets, messages = self._upward(tables)
        value = sum(float(m) for m, p in zip(messages, self._parent, strict=True) if p is None)
        chosen = [0] * len(self._sizes)
        for (variable, scope), bucket in zip(reversed(self._steps), reversed(buckets), strict=True):
            index = tuple(slice(None) if v == variable else chosen[v] for v in scope)
            chosen[variable] = int(np.argmin(bucket[index]))
        return value, chosen

    def marginals(self, tables: Sequence[Floats]) -> list[Floats]:
        """Return, per variable and choice, the least sum with that choice."""
        buckets, messages = self._upward(tables)
        value = sum(float(m) for m, p in zip(messages, self._parent, strict=True) if p is None)
        result: list[Floats] = [np.zeros(0)] * len(self._sizes)
        for step in reversed(range(len(self._steps))):
            variable, scope = self._steps[step]
            parent = self._parent[step]
            if parent is not None:  # what the rest of the network adds, given this bucket's border
                border = tuple(v for v in scope if v != variable)
                outer = self._steps[parent][1]
                rest = buckets[parent] - self._spread(messages[step], border, outer)
                gone = tuple(axis for axis, v in enumerate(outer) if v not in border)
                buckets[step] = buckets[step] + self._spread(rest.min(axis=gone), border, scope)
            others = tuple(axis for axis, v in enumerate(scope) if v != variable)
            own = buckets[step].min(axis=others)
            result[variable] = own - own.min() + value
        return result

    def _upward(self, tables: Sequence[Floats]) -> tuple[list[Floats], list[Floats]]:
        buckets = [np.zeros([self._sizes[v] for v in scope]) for _, scope in self._steps]
        for table, home, given in zip(tables, self._home, self._scopes, strict=True):
            buckets[home] += self._spread(table, given, self._steps[home][1])
        messages = []
        for step, (variable, scope) in enumerate(self._steps):
            message = buckets[step].min(axis=scope.index(variable))
            messages.append(message)
            parent = self._parent[step]
            if parent is not None:
                border = tuple(v for v in scope if v != variable)
                buckets[parent] += self._spread(message, border, self._steps[parent][1])
        return buckets, messages

    def _spread(self, table: Floats, scope: Scope, outer: Scope) -> Floats:
        """Give ``table`` over ``scope`` an axis of length 1 per other variable of ``outer``."""
        return table.reshape([self._sizes[v] if v in scope else 1 for v in outer])

    def _entries(self, scope: frozenset[int]) -> int:
        return int(np.prod([self._sizes[v] for v in scope], dtype=np.float64))
