"""What each channel is worth to each task, read once from the parent and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.core.channels import ChannelGroup
from secateur.core.model import model_fingerprint
from secateur.core.task import Task
from secateur.data.loading import Batch, Subset, batches, has_labels, spread
from secateur.flow.job import Job
from secateur.flow.scoring import meaning
from secateur.fusion.scores import GroupScores
from secateur.importance.agreement import agreement
from secateur.importance.bank import load_scores, save_scores, score_tasks, task_data
from secateur.prune import find_groups

SCORE_BATCH = 8
STOPPED = "sums.safetensors"  # of a pass over the images that was stopped
Scores = dict[str, NDArray[np.float64]]


def score_bank(job: Job, tasks: Sequence[str], criterion: str | None = None) -> dict[str, Scores]:
    """Return the scores of ``tasks`` on the groups of ``job.scored``, from the bank or made now.

    They are stored per task, so any subset of tasks is planned without another backward pass.
    The recipe's criterion gives them unless another is named.
    """
    criterion = criterion or job.recipe.prune.criterion
    paths = {
        task: job.cache.folder("scores", *score_key(job, [task]), criterion) / "scores.safetensors"
        for task in job.scored.tasks
        if task.name in tasks
    }
    bank = {task.name: load_scores(path) for task, path in paths.items()}
    missing = [task for task in paths if bank[task.name] is None]
    if missing:
        groups = find_groups(job.scored, job.example)
        stopped = job.cache.folder("scores", *score_key(job, missing), criterion, "stopped")
        made = score_tasks(
            job.scored, groups, missing, criterion, *score_stream(job, missing), stopped / STOPPED
        )
        for task in missing:
            save_scores(paths[task], made[task.name])
            bank[task.name] = made[task.name]
    return {name: scores for name, scores in bank.items() if scores is not None}


def score_key(job: Job, tasks: Sequence[Task]) -> tuple[Any, ...]:
    """Return what anything read from the tasks' gradients on the training images depends on."""
    return (model_fingerprint(job.scored), job.train.fingerprint,
            [meaning(task) for task in tasks],
            job.recipe.prune.images, asdict(job.spec))  # fmt: skip


def score_stream(job: Job, tasks: Sequence[Task]) -> tuple[Callable[[], Iterable[Batch]], int]:
    """Return the batches that importance is read from, and how many they are."""
    subset = Subset(job.train, spread(job.train, job.recipe.prune.images))
    labelled = [task for task in tasks if has_labels(job.train, [task])]
    stream = partial(batches, subset, labelled, job.spec, SCORE_BATCH)
    return stream, -(-len(subset) // SCORE_BATCH)


def task_agreement(job: Job, groups: Sequence[ChannelGroup]) -> Scores:
    """Return how alike the kept tasks' gradients are, 0..1, on the parent's groups."""
    folder = job.cache.folder("agreement", *score_key(job, job.tasks))
    found = load_scores(folder / "scores.safetensors")
    if found is None:
        data = task_data(job.scored, job.tasks, *score_stream(job, job.tasks), folder / STOPPED)
        found = agreement(job.scored, groups, data)
        save_scores(folder / "scores.safetensors", found)
    return found


def covers(known: Sequence[ChannelGroup], groups: Sequence[ChannelGroup]) -> bool:
    """Say whether every channel of ``groups`` is made where one of the ``known`` groups is."""
    made, there = (
        {
            (member.layer, place)
            for group in each
            for member in group.members
            if member.axis == "out"
            for places in member.indices
            for place in places
        }
        for each in (groups, known)
    )
    return made <= there


def scores_for(
    groups: Sequence[ChannelGroup],
    parent_groups: Sequence[ChannelGroup],
    scores: GroupScores,
    missing: float | None = None,
) -> Scores:
    """Carry scores from the whole parent's groups to those of the selected model.

    Dropping heads may split a group or give it another root, so channels are matched by the
    layer and position that makes them. ``missing`` is for channels that ``parent_groups`` lack,
    which those of a whole parent never do.
    """
    where = {
        (member.layer, place): (group.name, channel)
        for group in parent_groups
        for member in group.members
        if member.axis == "out"
        for channel, places in enumerate(member.indices)
        for place in places
    }
    carried = {}
    for group in groups:
        makers = [member for member in group.members if member.axis == "out"]
        values = np.zeros(group.width)
        for channel in range(group.width):
            places = [(maker.layer, maker.indices[channel][0]) for maker in makers]
            found = next((where[place] for place in places if place in where), None)
            if found is None and missing is None:
                raise KeyError(places)
            values[channel] = scores[found[0]][found[1]] if found else missing
        carried[group.name] = values
    return carried
