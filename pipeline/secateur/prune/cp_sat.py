"""The choice of widths as a CP-SAT model: one Boolean per rung and per pair of coupled rungs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model

from secateur.prune.elimination import Scope
from secateur.prune.network import Network, Sum
from secateur.prune.problem import Floats

Pairs = dict[tuple[int, int], Any]
STEPS = 10**9  # integers that a whole budget, and all score, are divided into
LARGEST_WHOLE = 2.0**50
SLACK = 1e-3  # of a step: what binary fractions are off
STRUCK_OUT = 20  # choices that pass a limit by a rounding error, at most


def solve_cp_sat(
    network: Network,
    kept: Sequence[NDArray[np.int64]],
    hint: Sequence[int] | None,
    effort: float,
) -> tuple[list[int] | None, float]:
    """Return the best rungs of the groups among those kept, and a bound on their loss.

    Where there are none the bound is infinite; where none were found in time they are None. Costs
    are whole steps here, rounded down, so that they allow all that the limits do and the bound
    holds; a choice that passes a limit by less than that is struck out and the next one sought.
    """
    problem = network.problem
    model = cp_model.CpModel()
    chosen = [{int(r): model.new_bool_var(f"v{v}r{r}") for r in rungs}
              for v, rungs in enumerate(kept)]  # fmt: skip
    for variables in chosen:
        model.add_exactly_one(variables.values())
    pairs: dict[Scope, Pairs] = {scope: _pair_variables(model, chosen, scope)
             for scope in network.scopes if len(scope) == 2}  # fmt: skip
    for sums in network.sums:
        _add_sum(model, network, chosen, sums)
    for which, limit in enumerate(problem.limits, 1):
        step = _step(network.tables[which], limit.most)
        load = _weighted(network.tables[which], network, chosen, pairs, step, np.floor)
        model.add(load <= int(np.floor(limit.most / step + SLACK)))
    unit = (sum(max(lost) for lost in problem.lost) or 1.0) / STEPS
    model.minimize(_weighted(network.tables[0], network, chosen, pairs, unit, np.rint))
    for variable, rung in enumerate(hint or ()):
        for r, var in chosen[variable].items():
            model.add_hint(var, int(r == rung))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = effort
    for _ in range(STRUCK_OUT):
        status = solver.solve(model)
        if status == cp_model.INFEASIBLE:
            return None, np.inf
        bound = (solver.best_objective_bound - len(problem.lost)) * unit
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None, bound
        groups = chosen[: len(problem.widths)]
        at = [next(r for r, var in variables.items() if solver.value(var)) for variables in groups]
        if network.holds(at):
            return at, problem.objective(at) if status == cp_model.OPTIMAL else bound
        model.add_bool_or(~groups[group][rung] for group, rung in enumerate(at))
    return None, bound


def _pair_variables(model: Any, chosen: Sequence[dict[int, Any]], scope: Scope) -> Pairs:
    """Return a Boolean per pair of rungs, tied to those of either side."""
    first, second = (chosen[v] for v in scope)
    if len(first) == 1 or len(second) == 1:
        return {(a, b): y if len(first) == 1 else x
                for a, x in first.items() for b, y in second.items()}  # fmt: skip
    pairs = {(a, b): model.new_bool_var("") for a in first for b in second}
    for a, x in first.items():
        model.add(sum(pairs[a, b] for b in second) == x)
    for b, y in second.items():
        model.add(sum(pairs[a, b] for a in first) == y)
    return pairs


def _add_sum(model: Any, network: Network, chosen: Sequence[dict[int, Any]], sums: Sum) -> None:
    """Tie the rungs of a sum of widths to those of its parts."""
    (before, times), (group, own), made = sums

    def width(variable: int) -> Any:
        values = network.values[variable]
        return sum(int(values[rung]) * var for rung, var in chosen[variable].items())

    model.add(times * width(before) + own * width(group) == width(made))


def _step(tables: Sequence[Floats | None], most: float) -> float:
    """Return the unit that a limit is counted in: 1 where all is whole numbers already."""
    present = [table for table in tables if table is not None]
    whole = all(bool((table == np.rint(table)).all()) for table in present)
    largest = sum(float(np.abs(table).max()) for table in present)
    return 1.0 if whole and largest < LARGEST_WHOLE else (abs(most) or 1.0) / STEPS


def _weighted(
    tables: Sequence[Floats | None],
    network: Network,
    chosen: Sequence[dict[int, Any]],
    pairs: Mapping[Scope, Pairs],
    step: float,
    rounded: Callable[[Floats], Floats],
) -> Any:
    """Return the sum of a loss or a cost over all tables, in whole steps."""
    variables, factors = [], []
    for scope, table in zip(network.scopes, tables, strict=True):
        if table is None:
            continue
        steps = rounded(np.round(table / step, 6)).astype(np.int64)
        if len(scope) == 1:
            of: Iterable[tuple[Any, Any]] = chosen[scope[0]].items()
        else:
            of = pairs[scope].items()
        for at, variable in of:
            variables.append(variable)
            factors.append(int(steps[at]))
    return sum(v * f for v, f in zip(variables, factors, strict=True))
