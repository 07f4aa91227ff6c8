"""Turn layers re-parametrised per task into plain ones where one kept task is left to them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from secateur.core.bent import Bent
from secateur.core.errors import ModelError
from secateur.core.model import MultiTaskModel, evaluating
from secateur.tasks.reparam import folds_as_lora, merged_lora
from secateur.tasks.trace import record

TOLERANCE = 1e-3  # of an output's largest value; a wrong fold is off by as much as the output is


@dataclass(frozen=True)
class FoldPlan:
    """``layers``: the submodules to fold, and the task each is folded for; ``keep``: the tasks."""

    keep: tuple[str, ...]
    layers: Mapping[str, str]


def plan_folds(model: MultiTaskModel, keep: Collection[str], example: Tensor) -> FoldPlan:
    """Find the re-parametrised layers that the tasks in ``keep`` use in one way only.

    Such a layer has ``folded(task)`` and an attribute ``task`` (`secateur.tasks.reparam`), or
    peft's LoRA layout and one active adapter. Its task is the one set when a kept output calls
    it, which need not be that output's own: heads may feed each other.
    """
    kept = tuple(task.name for task in model.tasks if task.name in keep)
    foldable = [name for name, module in model.named_modules() if _fold_of(module)]
    if not foldable:
        return FoldPlan(kept, {})
    recording = record(model, example[:1])
    active: dict[str, set[str | None]] = defaultdict(set)
    for call in recording.calls:
        if recording.needed(call, kept):
            active[call.module].add(call.task)
    layers: dict[str, str] = {}
    for name in foldable:
        inside = any(name.startswith(f"{outer}.") for outer in layers)
        task = next(iter(active[name]), None) if len(active[name]) == 1 else None
        if task is not None and not inside:
            layers[name] = task
    return FoldPlan(kept, layers)


def apply_folds(model: MultiTaskModel, plan: FoldPlan, example: Tensor) -> MultiTaskModel:
    """Return a copy of ``model`` with the plan's layers folded; ``model`` itself if none are.

    Only the tasks in ``plan.keep`` still answer as before, so select them next
    (`secateur.tasks.select_tasks`). Folding comes first because tracing looks into the layers.

    Raises:
        ModelError: a layer cannot be folded, or a kept output changed.
    """
    if not plan.layers:
        return model
    folded = copy.deepcopy(model)
    for name, task in plan.layers.items():
        layer = folded.get_submodule(name)
        fold = _fold_of(layer)
        if fold is None:
            raise ModelError(
                f"'{name}' is not a layer that can be folded", hint="plan the folds of this model"
            )
        parent, _, key = name.rpartition(".")
        setattr(folded.get_submodule(parent), key, fold(task).train(layer.training))
    _check(model, folded, plan, example)
    return folded


def _fold_of(module: nn.Module) -> Callable[[str], nn.Module] | None:
    fold = getattr(module, "folded", None)
    if callable(fold):
        return fold  # type: ignore[no-any-return]
    return partial(merged_lora, module) if folds_as_lora(module) else None


def _check(model: MultiTaskModel, folded: MultiTaskModel, plan: FoldPlan, example: Tensor) -> None:
    with evaluating(model), evaluating(folded), Bent():  # a ReLU at the end may hide a wrong fold
        before, after = model(example), folded(example)
    for task in plan.keep:
        error = float((before[task] - after[task]).abs().max())
        if error > TOLERANCE * float(before[task].abs().max()):
            raise ModelError(
                f"folding {', '.join(plan.layers)} changes task '{task}' by up to {error:.3g}",
                hint="folded(task) must return a layer that answers as this one does for task",
            )
