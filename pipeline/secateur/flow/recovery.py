"""The recovery stage: the recipe's wishes turned into one training, found again when finished."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import torch

from secateur.bench.accuracy import evaluate_model, score_model
from secateur.core.errors import DataError, ModelError, RecipeError
from secateur.core.files import write_json
from secateur.core.model import MultiTaskModel
from secateur.core.plan import PrunePlan
from secateur.data.loading import Subset, batches, has_labels, resized_reader, spread
from secateur.data.sample import Reader
from secateur.data.transforms import Augment
from secateur.flow.allocation import RelativeLoss
from secateur.flow.cache import load_weights, save_weights
from secateur.flow.job import Job
from secateur.flow.recipe import RecoverSpec
from secateur.metrics.delta import delta
from secateur.metrics.kind import kind_of
from secateur.recover import (
    TrainSettings,
    freeze_after,
    reinitialised,
    steps_per_epoch,
    train,
    usual_rate,
)

JUDGE_IMAGES = 64
PIECE = 8  # images in a run, held out for an early stop
# Recovery is short: zooms and colour jitter would move batch norm away from deployment's images.
AUGMENTS = {"none": None, "flip": Augment(scale=1.0, jitter=0.0), "full": Augment()}


def forgets_weights(job: Job) -> bool:
    """Say whether recovery starts from random weights, which makes compensation pointless."""
    return job.recipe.recover != "none" and job.recipe.recover.reinit


def check_recovery(job: Job) -> None:
    """Raise when the model cannot be trained, or the data do not allow the early stop asked for.

    Raises:
        ModelError: forward fails in training mode, or lacks an output there.
        RecipeError: a kept task has no labels there, or no image would be left to train on.
    """
    wanted = job.recipe.recover
    if wanted == "none":
        return
    _check_training_mode(job)
    if not wanted.early_stop:
        return
    for task in job.tasks:
        if not has_labels(job.train, [task]):
            raise RecipeError(
                f"recover.early_stop: data.train has no label '{task.label}' for '{task.name}'",
                hint="leave early_stop out; the schedule ends on its own",
            )
    if wanted.early_stop.images + wanted.batch_size > len(job.train):
        raise RecipeError(
            f"recover.early_stop.images: {wanted.early_stop.images} of {len(job.train)} training "
            f"images leave less than one batch of {wanted.batch_size}",
            hint="hold out fewer images",
        )


def _check_training_mode(job: Job) -> None:
    training = copy.deepcopy(job.selected).train()
    pair = torch.cat([job.example, job.example])
    try:
        with torch.no_grad():
            training(pair)
    except Exception as error:  # the user's own code may raise anything
        said = error.message if isinstance(error, ModelError) else repr(error)
        raise ModelError(
            f"recovery trains the model, and in training mode its forward fails: {said}",
            hint="let forward(images) return the tasks' outputs in training mode, too, or give "
            "recover: none",
        ) from error


def recovered(
    job: Job, plan: PrunePlan, model: MultiTaskModel, origin: str = "", *, inherited: bool = False,
    title: str = "recovering", as_deployed: bool = False,
) -> tuple[MultiTaskModel, int]:  # fmt: skip
    """Return ``model`` trained as the recipe says, and the optimiser steps that took.

    ``origin`` tells weights that the recipe and the plan do not determine from those they do;
    ``inherited``: they are a neighbour's, recovered before. ``as_deployed``: see ``TrainSettings``.
    """
    wanted = job.recipe.recover
    if wanted == "none":
        return model, 0
    freeze = freeze_norms(job, plan, wanted, inherited=inherited)
    rate = learning_rate(job, wanted, inherited=inherited)
    wanted = wanted.model_copy(update={"learning_rate": rate})
    key = (job.parent_key, asdict(plan)["cuts"], str(job.recipe.compensate),
           job.recipe.axes(), job.basis, plan.removed, freeze, job.train.fingerprint,
           wanted.model_dump(), asdict(job.spec),
           [{**asdict(task), "max_drop": None} for task in job.tasks],
           *([origin] if origin else []))  # fmt: skip
    folder = job.cache.folder("recover", *key)
    weights, steps = folder / "weights.safetensors", folder / "steps.json"
    found = copy.deepcopy(model)
    with suppress(OSError, ValueError):  # a damaged file is as none
        taken = int(json.loads(steps.read_text(encoding="utf-8")))
        if load_weights(weights, found):
            return found, taken
    settings = TrainSettings(
        **wanted.model_dump(exclude={"augment", "early_stop", "reinit", "freeze_norms"}),
        freeze_norms=freeze,
        patience=wanted.early_stop.patience if wanted.early_stop else 0,
        as_deployed=as_deployed,
    )
    training, held_out = _split(job, wanted)
    result = train(
        reinitialised(model, wanted.seed) if wanted.reinit else model,
        training, job.spec, settings,
        parent=job.selected, augment=_augment(job, wanted), checkpoint=folder,
        validate=_validation(job, held_out) if held_out is not None else None, title=title,
    )  # fmt: skip
    write_json(steps, result.steps)
    save_weights(weights, result.model)
    (folder / "state.pt").unlink(missing_ok=True)
    return result.model, result.steps


def learning_rate(job: Job, wanted: RecoverSpec, *, inherited: bool) -> float:
    """Return the highest learning rate of the recovery: the recipe's, or what is usual."""
    if wanted.learning_rate is not None:
        return wanted.learning_rate
    return usual_rate(_epochs(job, wanted), inherited=inherited)


def _augment(job: Job, wanted: RecoverSpec) -> Augment | None:
    """Return the recipe's augmentation, without mirroring where points have names.

    The mirror image of a left eye is a right one, which no label says.
    """
    found = AUGMENTS[wanted.augment]
    points = any(task.kind == "keypoints" for task in job.tasks)
    return replace(found, flip=found.flip and not points) if found else None


def made_worse(job: Job, begun: MultiTaskModel, trained: MultiTaskModel) -> bool:
    """Say whether recovery left the tasks with more loss than it found, on training images.

    A few steps at a high rate do; images that it trained on judge it kindly.
    """
    wanted = job.recipe.recover
    if wanted == "none" or wanted.reinit:
        return False
    chosen = Subset(job.train, spread(job.train, JUDGE_IMAGES))
    labelled = [task for task in job.tasks if wanted.labels and has_labels(job.train, [task])]
    judged = next(batches(chosen, labelled, job.spec, len(chosen)))
    loss = RelativeLoss(job.selected, judged)
    return not loss(trained) <= loss(begun)  # NaN is worse, too


def freeze_norms(
    job: Job, plan: PrunePlan, wanted: RecoverSpec, *, inherited: bool = False
) -> float:
    """Return when batch norms are frozen: as told, never unless compensation settled them."""
    if wanted.freeze_norms is not None:
        return wanted.freeze_norms
    if job.recipe.compensate is False or wanted.reinit:
        return 1.0
    kept = plan.macs_after / plan.macs_before
    return freeze_after(_epochs(job, wanted), kept, inherited=inherited)


def _epochs(job: Job, wanted: RecoverSpec) -> float:
    steps = wanted.steps or 0
    return wanted.epochs or steps / steps_per_epoch(len(job.train), wanted.batch_size)


def _split(job: Job, wanted: RecoverSpec) -> tuple[Reader, Reader | None]:
    """Return what is trained on and, with an early stop, what is held out.

    These come in pieces, spread over all: neighbours often show the same scene, and sorted images
    end with a class of their own.
    """
    reader = job.train
    if wanted.augment != "full":  # nothing zooms, so every sample is resized once
        reader = resized_reader(reader, job.spec, job.tasks if wanted.labels else ())
    if not wanted.early_stop:
        return reader, None
    classes = any(task.kind in ("classification", "multilabel") for task in job.tasks)
    held_out = set(pieces(len(reader), wanted.early_stop.images, 1 if classes else PIECE))
    rest = [index for index in range(len(reader)) if index not in held_out]
    return Subset(reader, rest), Subset(reader, sorted(held_out))


def pieces(size: int, count: int, length: int) -> list[int]:
    """Return ``count`` of ``size`` indices, in runs of ``length`` spread over all.

    Each lies by chance within its part: an even stride would meet one class of images in turns.
    """
    runs = np.array_split(np.arange(count), -(-count // length))
    parts = np.linspace(0, size - count, len(runs) + 1).round().astype(int)
    random = np.random.default_rng(0)
    skipped = [random.integers(low, high + 1) for low, high in pairwise(parts)]
    return [int(i) for skip, run in zip(skipped, runs, strict=True) for i in run + skip]


def _validation(job: Job, held_out: Reader) -> Callable[[MultiTaskModel], float]:
    """Return a function that gives a network's ΔT in percent on ``held_out``.

    It is of the tasks that have labels there.
    """
    found = score_model(job.selected, held_out, job.spec, title="parent on held-out images")
    known = [task.name for task in job.tasks if task.name not in found.unlabelled]
    higher = {task.name: kind_of(task).higher_is_better for task in job.tasks if task.name in known}
    if not known:
        raise DataError(
            f"none of the {len(held_out)} held-out images has a label",
            hint="raise recover.early_stop.images, or leave early_stop out",
        )

    def change(model: MultiTaskModel) -> float:
        metrics = evaluate_model(model, held_out, job.spec, title="held-out images")
        return delta(found.metrics, {task: metrics[task] for task in known}, higher).mean

    return change
