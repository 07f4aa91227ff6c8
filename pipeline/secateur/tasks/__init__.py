"""Which task uses what, and a model without the tasks nobody wants."""

from secateur.tasks.decompose import TaskUse, decompose
from secateur.tasks.select import select_tasks

__all__ = ["TaskUse", "decompose", "select_tasks"]
