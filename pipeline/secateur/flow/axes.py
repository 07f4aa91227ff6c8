"""Before anything is scored: the parent in the axes in which it is best cut (``prune.axes``)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.core.channels import ChannelGroup
from secateur.core.errors import SecateurError
from secateur.core.files import value_digest
from secateur.core.model import MultiTaskModel, output_difference
from secateur.core.task import Task
from secateur.data.loading import image_batch, spread
from secateur.flow.channel_scores import STOPPED, covers, score_key, score_stream
from secateur.flow.job import Job
from secateur.flow.trunk import within
from secateur.fusion.directions import fuse_gradients
from secateur.importance.bank import Stream, load_scores, save_scores, task_data
from secateur.importance.directions import measure_directions
from secateur.prune import find_groups
from secateur.prune.axes import apply_axes, balanced_axes, linear_groups
from secateur.prune.layer_norms import fold_layer_norms, is_normalised, rotated_axes
from secateur.tasks import select_tasks
from secateur.vote.library import find_axes, load_entry, open_library

UNTOUCHED, JUDGED = 1e-2, 8  # of an output's largest value, on so many images
NORM_IMAGES = 64  # tell batch norms what their turned channels hold
BUDGET_FACTOR = 2.0  # cuts to between half and twice the new budget may vote
WORST_CONDITION, ROTATION = 1e8, 1e-4  # of axes that another machine made


def turn_axes(job: Job) -> Job:
    """Return the job with its model in balanced axes: the same function, better to cut.

    The axes are those of all tasks of ``job.scored``, so that one score bank serves every subset.
    Where an unwanted task alone fixed some channels, they have scores in the selected model only,
    and that is what is scored.

    Raises:
        RecipeError: the recipe asks for axes that its criterion cannot be used in.
    """
    own = find_groups(job.selected, job.example)
    if job.scored is not job.selected and not covers(find_groups(job.scored, job.example), own):
        job = replace(job, scored=job.selected)
    if job.recipe.axes() == "original":
        return job
    every = find_groups(job.scored, job.example)
    model = fold_layer_norms(job.scored, every, job.example)
    groups = linear_groups(model, every, job.example)
    if not groups:
        return job
    axes = _axes(job, model, groups)
    images = image_batch(job.train, spread(job.train, NORM_IMAGES), job.spec)
    turned = apply_axes(model, groups, axes, images)
    if not output_difference(model, turned, images[:JUDGED]) <= UNTOUCHED:
        return job  # the trial on noise was wrong, or the axes are too uneven for these numbers
    of_trunk = _axes_of(within(groups, job.trunk), axes)
    turned_job = replace(
        job, scored=turned, selected=turned, basis=_basis(job, axes), axes=axes,
        trunk_basis=_basis(job, of_trunk) if of_trunk else job.basis,
    )  # fmt: skip
    if job.scored is job.selected:
        return turned_job
    keep = [task.name for task in job.tasks]
    return replace(turned_job, selected=select_tasks(turned, keep, job.example).eval())


def plan_axes(
    model: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    tasks: Sequence[Task],
    stream: Stream,
    batch_count: int,
    kept: Path | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Return the axes (W, W) of each linear group, all tasks having their say.

    They are balanced, or where layer norms stand before readers the rotation that comes nearest.
    For ``kept``, see ``task_data``.
    """
    data = task_data(model, tasks, stream, batch_count, kept)
    weights = {task.name: task.weight for task in tasks}
    measured = measure_directions(model, groups, data)
    axes = {}
    for group in groups:
        found = measured[group.name]
        best = rotated_axes if is_normalised(model, group) else balanced_axes
        axes[group.name] = best(found.activity, fuse_gradients(found.gradients, weights))
    return axes


def _axes_of_library(
    job: Job,
    model: MultiTaskModel,
    groups: Sequence[ChannelGroup],
    own: Mapping[str, NDArray[np.float64]] | None,
) -> Mapping[str, NDArray[np.float64]] | None:
    """Return axes in which the library has cuts of this trunk: ``own`` if these are among them.

    Axes are found by gradients, which differ with the machine and the images. Only in the very same
    ones does an earlier cut's channel mean anything, so it brings its axes along. A damaged entry,
    or one that somebody removes meanwhile, is passed over.
    """
    library = open_library(job.recipe.library_root())
    macs = job.recipe.prune.budget.macs  # what other budgets leave is known after the scoring
    known = find_axes(library, job.library_key, votable(macs) if macs else (0.0, 1.0))
    if own is not None and _basis(job, own) in known:
        return own
    for basis, entries in known.items():
        for entry in entries:
            with suppress(SecateurError):
                axes = _axes_of(groups, load_entry(library, entry).axes)
                if _basis(job, axes) == basis and fit(model, groups, axes):
                    return axes
    return None


def _axes_of(
    groups: Sequence[ChannelGroup], axes: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.float64]]:
    return {group.name: axes[group.name] for group in groups if group.name in axes}


def votable(budget: float) -> tuple[float, float]:
    """Return the shares of the MACs between which an earlier cut may vote on one to ``budget``."""
    return budget / BUDGET_FACTOR, min(1.0, budget * BUDGET_FACTOR)


def fit(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], axes: Mapping[str, NDArray[np.float64]]
) -> bool:
    """Say whether the axes are of these groups and leave the model's outputs as they are."""
    if axes.keys() != {group.name for group in groups}:
        return False
    for group in groups:
        matrix = axes[group.name]
        if matrix.shape != (group.width, group.width) or not np.isfinite(matrix).all():
            return False
        if np.linalg.cond(matrix) > WORST_CONDITION:
            return False
        off = np.abs(matrix @ matrix.T - np.eye(group.width)).max()
        if is_normalised(model, group) and off > ROTATION:  # a norm lets rotations through
            return False
    return True


def _basis(job: Job, axes: Mapping[str, NDArray[np.float64]]) -> str:
    """Return a digest of the axes' bytes: in others, even nearly equal, a channel is another."""
    bytes_of = {name: hashlib.sha256(matrix.tobytes()).hexdigest() for name, matrix in axes.items()}
    return f"balanced-{value_digest([job.basis, bytes_of])}"


def _axes(
    job: Job, model: MultiTaskModel, groups: Sequence[ChannelGroup]
) -> Mapping[str, NDArray[np.float64]]:
    tasks = job.scored.tasks
    weights = [task.weight for task in tasks]
    path = job.cache.folder("axes", *score_key(job, tasks), weights) / "axes.safetensors"
    found = load_scores(path)
    taken: Mapping[str, NDArray[np.float64]] = {}
    if job.recipe.prune.warm_start == "library":
        shared = within(groups, job.trunk)
        own = None if found is None else _axes_of(shared, found)
        taken = _axes_of_library(job, model, shared, own) or {}
        if taken.keys() == {group.name for group in groups}:
            return taken
    if found is None:
        found = plan_axes(model, groups, tasks, *score_stream(job, tasks), path.parent / STOPPED)
        save_scores(path, found)
    return {**found, **taken}
