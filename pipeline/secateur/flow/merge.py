"""Single-task networks of one architecture become one multi-task network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.bench.accuracy import evaluate_model
from secateur.core.errors import ModelError, RecipeError
from secateur.core.model import MultiTaskModel
from secateur.core.task import Task
from secateur.data.loading import has_labels, image_batch, spread
from secateur.data.sample import Reader
from secateur.flow.job import open_data
from secateur.flow.parent import checked_model, load_checkpoint, new_network
from secateur.flow.recipe import Recipe
from secateur.flow.refit import REFIT_PIXELS
from secateur.flow.stages import Metrics
from secateur.fusion.weights import MergeSettings, merge_networks
from secateur.metrics.delta import Delta, delta
from secateur.metrics.kind import kind_of
from secateur.tasks import select_tasks

STRANGERS = 0.3  # cosine of two experts' weights; copies of one network stay far above, others at 0
Experts = Mapping[tuple[str, ...], Path]
"""An expert's checkpoint, by the names of its tasks."""


@dataclass(frozen=True, eq=False)
class Merged:
    """``state``: the joint network's state dict, for the recipe's factory.

    ``experts`` and ``merged`` are metrics on ``data.eval`` of the tasks that have labels there, and
    ``change`` is from one to the other, None without such a task. ``images``: how many unlabelled
    training images it was fitted on. ``likeness``: the least cosine (-1..1) between the weights
    that two experts share.
    """

    state: dict[str, Tensor]
    experts: Metrics
    merged: Metrics
    change: Delta | None
    images: int
    likeness: float

    @property
    def strangers(self) -> bool:
        """Whether two experts do not look like copies of one network."""
        return self.likeness < STRANGERS

    def to_json(self) -> dict[str, Any]:
        """Return all but the weights as JSON-like data."""
        change = self.change
        return {
            "experts": self.experts,
            "merged": self.merged,
            "change_percent": dict(change.per_task) if change else {},
            "delta_t": change.mean if change else None,
            "worst_task": change.worst_task if change else None,
            "images": self.images,
            "likeness": self.likeness,
        }


def merge_experts(recipe: Recipe, files: Experts, images: int) -> Merged:
    """Merge fine-tuned copies of one network, each for its tasks, by the rule ``cut``.

    The recipe's factory makes the joint network, its checkpoint is not read; a file holds, by that
    network's names, at least the weights that its tasks use. Layers are fitted in execution order
    to what the experts compute on ``images`` unlabelled training images (``fusion.weights``).

    Raises:
        RecipeError: a task has no expert, or two, or is none of the recipe's.
        ModelError: a file does not fit, or the network cannot be parted or merged.
    """
    _check_tasks(recipe, files)
    joint = checked_model(recipe, new_network(recipe))
    spec = recipe.model.input.model_input()
    example = spec.example()
    experts = {", ".join(names): _expert(joint, names, path, example)
               for names, path in files.items()}  # fmt: skip
    train, evaluation = open_data(recipe, recipe.data.train), open_data(recipe, recipe.data.eval)
    chosen = spread(train, max(2, min(images, REFIT_PIXELS // (spec.height * spec.width))))
    every = select_tasks(joint, [task.name for task in joint.tasks], example).eval()
    merged = merge_networks(
        every, {}, experts, image_batch(train, chosen, spec), MergeSettings(),
        weights={name: sum(task.weight for task in each.tasks) for name, each in experts.items()},
    )  # fmt: skip
    apart: Metrics = {}
    for name, expert in experts.items():
        apart |= _metrics(expert, evaluation, recipe, f"accuracy of {name} alone")
    together = _metrics(merged, evaluation, recipe, "accuracy of the merged network")
    apart = {task: apart[task] for task in together}
    whole, found = joint.network.state_dict(), merged.network.state_dict()
    state = {name: found.get(name, value) for name, value in whole.items()}
    return Merged(
        {name: tensor.detach().clone().contiguous() for name, tensor in state.items()},
        apart, together, _change(joint.tasks, apart, together), len(chosen),
        _likeness([expert.network for expert in experts.values()]),
    )  # fmt: skip


def _check_tasks(recipe: Recipe, files: Experts) -> None:
    known = [task.name for task in recipe.all_tasks()]
    given = [name for names in files for name in names]
    unknown = sorted({*given} - {*known})
    if unknown:
        raise RecipeError(
            f"--expert: '{unknown[0]}' is no task of the recipe",
            hint=f"its tasks: {', '.join(known)}",
        )
    twice = next((name for name in known if given.count(name) > 1), "")
    missing = next((name for name in known if name not in given), "")
    if twice or missing:
        raise RecipeError(
            f"--expert: task '{twice}' has more than one expert" if twice
            else f"--expert: task '{missing}' has no expert",
            hint="name each task of the recipe once, or take it out of the recipe's tasks",
        )  # fmt: skip
    if len(files) < 2:
        raise RecipeError(
            "--expert: one network for all tasks leaves nothing to merge",
            hint="give two or more, or name the file as the recipe's model.checkpoint",
        )


def _expert(
    joint: MultiTaskModel, names: Sequence[str], path: Path, example: Tensor
) -> MultiTaskModel:
    if not path.is_file():
        raise ModelError(
            f"--expert: there is no file {path}", hint=f"give the checkpoint of {', '.join(names)}"
        )
    expert = select_tasks(joint, names, example).eval()
    try:
        load_checkpoint(expert.network, path, others=joint.network.state_dict().keys())
    except ModelError as error:
        raise ModelError(
            f"--expert: {error.message}",
            hint=f"the file holds what {', '.join(names)} need(s), by the names that the network "
            "of model.factory has for it; rename its keys where they differ",
        ) from error
    return expert


def _metrics(model: MultiTaskModel, reader: Reader, recipe: Recipe, title: str) -> Metrics:
    told = [task for task in model.tasks if has_labels(reader, [task])]
    if not told:
        return {}
    judged = MultiTaskModel(model.network, told)
    return evaluate_model(judged, reader, recipe.model.input.model_input(), title=title)


def _change(tasks: Sequence[Task], before: Metrics, after: Metrics) -> Delta | None:
    higher = {task.name: kind_of(task).higher_is_better for task in tasks if task.name in after}
    return delta(before, after, higher) if after else None


def _likeness(networks: Sequence[nn.Module]) -> float:
    """Return the least cosine between two networks' shared matrices and kernels, all in one row."""
    states = [network.state_dict() for network in networks]
    found = []
    for one, other in combinations(states, 2):
        shared = [name for name in one.keys() & other.keys() if one[name].dim() > 1]
        if shared:
            a, b = (torch.cat([state[name].flatten().double() for name in shared])
                    for state in (one, other))  # fmt: skip
            found.append(float(functional.cosine_similarity(a, b, dim=0)))
    if not found:
        raise ModelError(
            "the experts have no layer in common", hint="an expert is a network of its own then"
        )
    return min(found)
