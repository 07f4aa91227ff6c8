"""Which task uses what, and a model without the tasks nobody wants."""

from secateur.tasks.decompose import TaskUse, decompose
from secateur.tasks.fold import FoldPlan, apply_folds, plan_folds
from secateur.tasks.picture import draw_use
from secateur.tasks.select import select_tasks

__all__ = [
    "FoldPlan",
    "TaskUse",
    "apply_folds",
    "decompose",
    "draw_use",
    "plan_folds",
    "select_tasks",
]
