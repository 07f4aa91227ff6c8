"""From a plan to the finished cut: compensated or inherited, sparse where asked for, recovered."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.flow.inherited import Origin, best_start
from secateur.flow.job import Job
from secateur.flow.sparsity import plan_zeros, with_zeros
from secateur.flow.stages import Cut, begin_cut, finish_cut
from secateur.flow.warm_start import Planned
from secateur.prune import SparsityPlan


@dataclass(frozen=True)
class Finished:
    """The cut; ``origin`` says whose weights it began with, ``zeros`` which of them are none."""

    cut: Cut
    origin: Origin | None
    zeros: SparsityPlan | None


def cut_planned(job: Job, planned: Planned) -> Finished:
    """Apply a plan, compensate or inherit, and recover as the recipe says.

    Raises:
        BuildError: the cut is not what the plan said.
    """
    begun = begin_cut(job, planned.scored.groups, planned.plan)
    begun, origin, key = best_start(job, planned, begun)
    zeros = plan_zeros(job, planned.plan, begun, key)
    begun, key = with_zeros(job, begun, zeros, key)
    inherited = origin is not None and origin.recovered
    cut = finish_cut(job, planned.plan, begun, key, inherited=inherited,
                     joint=origin is None or not origin.inherited)  # fmt: skip
    return Finished(cut, origin, zeros)
