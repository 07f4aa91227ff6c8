"""Structural pruning over a dependency graph to a budget: groups, cost, plan, apply."""

from secateur.prune.apply import apply_plan, restore_cut, surgery_of
from secateur.prune.groups import find_groups
from secateur.prune.macs import MacsModel, count_macs, macs_model
from secateur.prune.plan import plan_prune, plan_widths
from secateur.prune.sparsity import SparsityPlan, apply_sparsity, plan_sparsity, without_masks
from secateur.prune.sparsity_check import check_sparsity

__all__ = [
    "MacsModel",
    "SparsityPlan",
    "apply_plan",
    "apply_sparsity",
    "check_sparsity",
    "count_macs",
    "find_groups",
    "macs_model",
    "plan_prune",
    "plan_sparsity",
    "plan_widths",
    "restore_cut",
    "surgery_of",
    "without_masks",
]
