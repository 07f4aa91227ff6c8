"""Structural pruning over a dependency graph to a budget: groups, cost, plan, apply."""

from secateur.prune.apply import apply_plan
from secateur.prune.groups import find_groups
from secateur.prune.macs import MacsModel, count_macs, macs_model
from secateur.prune.plan import plan_prune, plan_widths

__all__ = [
    "MacsModel",
    "apply_plan",
    "count_macs",
    "find_groups",
    "macs_model",
    "plan_prune",
    "plan_widths",
]
