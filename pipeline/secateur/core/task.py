"""A task: one output of the model, what it means and how much of it may be lost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One task of a multi-task model.

    ``output`` names the entry of ``forward``'s dict (or the position in its tuple);
    ``label`` names the reader's label; ``max_drop`` is in percent, relative, on the mean of
    the task's metrics; ``weight`` multiplies its loss and its share in score fusion.
    """

    name: str
    output: str
    kind: str
    label: str
    classes: int | None = None
    ignore_index: int = 255
    max_drop: float | None = None
    weight: float = 1.0
