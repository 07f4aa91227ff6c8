"""Sketches of the kept tasks, one per measure of similarity, read off the scored model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.core.errors import RecipeError
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.task import Task
from secateur.data.labels import DENSE
from secateur.data.loading import Batch, Subset, batches, has_labels, spread
from secateur.flow.channel_scores import score_bank, score_key
from secateur.flow.job import Job
from secateur.flow.trunk import within
from secateur.importance.bank import load_scores, save_scores
from secateur.metrics.kind import resized
from secateur.prune import find_groups
from secateur.prune.groups import output_layers
from secateur.vote.similarity import cka, leep, mean_feature, score_cosine, task2vec

Array = NDArray[np.float32]
CHUNK = 16  # images per forward pass
SKETCH_IMAGES = 64  # CKA keeps N (N + 1) / 2 numbers of N images
PIXELS = 64  # of each image whose labels LEEP reads
WITH_CLASSES = ("classification", "segmentation")


def sketch_tasks(job: Job) -> Mapping[str, Array]:
    """Return a sketch of the kept tasks for each measure that can be had here.

    ``task2vec`` needs a backward pass of its own, so only where the recipe asks for that measure
    or scores by ``fisher`` anyway; ``leep`` needs labels of classes, and a parent with classes.
    Where the recipe names a trunk, sketches are of that, so that tasks of other networks on it
    compare. There is no ``leep``, which is of the parent's own classes, and no ``cka``: one trunk
    sees the same in the same images.

    Raises:
        RecipeError: no channel is the trunk's alone.
    """
    wanted = job.recipe.prune
    by_fisher = wanted.criterion == "fisher" or wanted.similarity == "task2vec"
    key = (*score_key(job, job.scored.tasks), [task.name for task in job.tasks], wanted.criterion)
    of_trunk = [job.trunk] if job.trunk else []
    path = job.cache.folder("sketches", *key, by_fisher, *of_trunk) / "sketches.safetensors"
    found = load_scores(path)
    if found is None:
        found = _sketches(job, by_fisher)
        save_scores(path, found)
    return {name: np.asarray(values, np.float32) for name, values in found.items()}


def _sketches(job: Job, by_fisher: bool) -> dict[str, NDArray[np.float64]]:
    names = [task.name for task in job.tasks]
    made: dict[str, Array] = {"score_cosine": score_cosine.sketch(_trunk_scores(job, names))}
    if by_fisher:
        made["task2vec"] = task2vec.sketch(_summed_fisher(job, names))
    chosen = Subset(job.train, spread(job.train, SKETCH_IMAGES))
    labelled = [task for task in job.tasks if has_labels(job.train, [task])]
    batch = next(batches(chosen, labelled, job.spec, len(chosen)))
    if job.trunk:
        given = _trunk_features(job, batch.images)
        if len(given) == len(chosen) > 1:
            made["mean_feature"] = mean_feature.sketch(given)
        return {name: values.astype(np.float64) for name, values in made.items()}
    features, outputs = _features(job.scored, batch.images, job.example)
    if features.keys() == {task.name for task in job.scored.tasks} and len(chosen) > 1:
        every = np.concatenate([features[task.name] for task in job.scored.tasks], axis=1)
        made["mean_feature"] = mean_feature.sketch(every)
        made["cka"] = cka.sketch(np.concatenate([features[name] for name in names], axis=1))
    pairs = _labels_and_sources(job.scored.tasks, labelled, outputs, batch)
    if pairs is not None:
        made["leep"] = leep.sketch(*pairs)
    return {name: values.astype(np.float64) for name, values in made.items()}


def _trunk_scores(
    job: Job, names: Sequence[str], criterion: str | None = None
) -> Mapping[str, Mapping[str, NDArray[np.float64]]]:
    """Return the tasks' scores of the trunk's groups; of all where the recipe names no trunk."""
    bank = score_bank(job, names, criterion)
    if not job.trunk:
        return bank
    shared = {group.name for group in within(find_groups(job.scored, job.example), job.trunk)}
    if not shared:
        raise RecipeError(
            f"model.trunk: no channel that can go is made in '{job.recipe.model.trunk}' alone",
            hint="name a larger part of the network, or leave trunk out",
        )
    return {
        task: {name: values for name, values in scores.items() if name in shared}
        for task, scores in bank.items()
    }


def _trunk_features(job: Job, images: Tensor) -> Array:
    """Return the mean over positions of what the parent's trunk gives, (N, D).

    There are no rows where it gives no tensors with one row per image, or is not called.
    """
    trunk = job.parent.get_submodule(job.trunk.rstrip("."))
    given: list[Tensor] = []

    def note(_module: nn.Module, _inputs: object, output: object) -> None:
        rows = rows_of(output)
        if rows is not None:
            given.append(rows)

    hook = trunk.register_forward_hook(note)
    try:
        with evaluating(job.parent):
            for chunk in torch.split(images, CHUNK):
                job.parent(chunk)
    finally:
        hook.remove()
    return torch.cat(given).float().cpu().numpy() if given else np.empty((0, 0), np.float32)


def rows_of(output: object) -> Tensor | None:
    """Return what a module gave, (N, D): tensors side by side, or None where their N differ."""
    rows = [_pooled(each) for each in _tensors(output) if each.dim() > 1]
    return torch.cat(rows, 1) if len({len(each) for each in rows}) == 1 else None


def _tensors(output: object) -> Iterator[Tensor]:
    """Yield the tensors in what a module gives: one, or several in lists, tuples and dicts."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for each in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(each)


def _pooled(output: Tensor) -> Tensor:
    """Return (N, C) of features (N, C), tokens (N, L, C) or maps (N, C, H, W)."""
    if output.dim() == 3:
        return output.mean(1)
    return output.flatten(2).mean(2) if output.dim() > 2 else output


def _summed_fisher(job: Job, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Return the tasks' Fisher information, each brought to sum 1 over the network, summed."""
    bank = list(_trunk_scores(job, names, "fisher").values())
    sums = [max(sum(float(v.sum()) for v in scores.values()), 1e-300) for scores in bank]
    return {
        group: np.sum([scores[group] / total for scores, total in zip(bank, sums, strict=True)], 0)
        for group in bank[0]
    }


def _features(
    model: MultiTaskModel, images: Tensor, example: Tensor
) -> tuple[dict[str, Array], dict[str, Tensor]]:
    """Return, per task, the mean over positions of what its last layers read (N, D), and outputs.

    A task whose last layer reads something else than the images' rows has no features.
    """
    last = {
        task.name: list(dict.fromkeys(output_layers(_only(model, task), example[:1])))
        for task in model.tasks
    }
    read: dict[nn.Module, list[Tensor]] = defaultdict(list)

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read[layer].append(_mean_over_positions(layer, inputs[0]))

    hooks = [
        layer.register_forward_pre_hook(note)
        for layer in {layer for layers in last.values() for layer in layers}
    ]
    try:
        with evaluating(model):
            parts = [model(chunk) for chunk in torch.split(images, CHUNK)]
    finally:
        for hook in hooks:
            hook.remove()
    features = {}
    for name, layers in last.items():
        rows = [torch.cat(read[layer]) for layer in layers if read[layer]]
        if rows and all(len(each) == len(images) for each in rows):
            features[name] = torch.cat(rows, 1).float().cpu().numpy()
    return features, {name: torch.cat([part[name] for part in parts]) for name in last}


def _only(model: MultiTaskModel, task: Task) -> MultiTaskModel:
    return MultiTaskModel(model.network, [task]).eval()


def _mean_over_positions(layer: nn.Module, tensor: Tensor) -> Tensor:
    if tensor.dim() < 3:
        return tensor
    if isinstance(layer, nn.Linear | nn.LayerNorm):  # channels last
        return tensor.flatten(1, -2).mean(1)
    return tensor.flatten(2).mean(2)


def _labels_and_sources(
    sources: Sequence[Task],
    labelled: Sequence[Task],
    outputs: Mapping[str, Tensor],
    batch: Batch,
) -> tuple[Array, NDArray[np.int64]] | None:
    """Return source-class probabilities (M, Z) and labels (M,) of images or sampled pixels.

    Source classes are those of all the parent's tasks that have any, each task with the same
    share; labels are those of the kept tasks that have any. None where either lacks.
    """
    sources = [task for task in sources if task.kind in WITH_CLASSES]
    kept = [task for task in labelled if task.kind in WITH_CLASSES]
    rows, labels, first = [], [], 0
    for task in kept if sources else ():
        target = batch.targets[task.name]
        given = [_probabilities(outputs[each.name], each, target) for each in sources]
        label = _pixels(target[:, None]).flatten() if target.dim() > 1 else target
        valid = label != task.ignore_index
        rows.append((torch.cat(given, 1) / len(given))[valid])
        labels.append(label[valid] + first)
        first += task.classes or 0
    if not rows or not sum(map(len, rows)):
        return None
    return torch.cat(rows).float().numpy(), torch.cat(labels).numpy().astype(np.int64)


def _probabilities(output: Tensor, source: Task, target: Tensor) -> Tensor:
    """Return a source task's class probabilities (M, classes) where ``target`` has its labels."""
    dense = source.kind in DENSE
    if target.dim() == 1:  # one label an image
        given = output.softmax(1)
        return given.flatten(2).mean(2) if dense else given
    if dense:
        return _pixels(resized(output, target).softmax(1)).flatten(0, 1)
    per_image = _pixels(target[:, None]).shape[1]
    return output.softmax(1).repeat_interleave(per_image, 0)


def _pixels(maps: Tensor) -> Tensor:
    """Return (N, P, C): at most ``PIXELS`` positions of (N, C, H, W), evenly spread."""
    flat = maps.flatten(2)
    count = min(PIXELS, flat.shape[2])
    at = torch.linspace(0, flat.shape[2] - 1, count).round().long()
    return flat[:, :, at].transpose(1, 2)
