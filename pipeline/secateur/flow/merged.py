"""One network of what several neighbours recovered: what a cut from the library is a cut of."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from secateur.compensate import refit_layers
from secateur.core.errors import ModelError
from secateur.core.model import MultiTaskModel, model_fingerprint
from secateur.core.plan import PrunePlan
from secateur.core.task import Task
from secateur.data.loading import Subset, batches, has_labels, spread
from secateur.flow.allocation import RelativeLoss
from secateur.flow.cache import load_weights, save_weights
from secateur.flow.job import Job
from secateur.flow.recovery import forgets_weights
from secateur.flow.refit import refit_images, refit_indices, refit_settings
from secateur.flow.scoring import meaning
from secateur.fusion.weights import MergeSettings, merge_networks
from secateur.tasks import select_tasks
from secateur.vote.inherit import Donor, embed

THE_PARENT = "parent"
JUDGE_IMAGES = 64
NORMS_OF_CHANNELS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def merged_network(job: Job, donors: Sequence[Donor]) -> MultiTaskModel | None:
    """Return the neighbours' networks merged, in the parent's shape; None where there is none.

    Each task's expert is the nearest neighbour that has it, or else the parent; none is one whose
    layer or group norms saw fewer channels. A neighbour did not keep what the others did: with
    zeros for what it dropped it computes what it did, so that all can be merged
    (``fusion.weights``, rule ``cut``), on unlabelled training images. Where no neighbour has a kept
    task, but some has the trunk, that of the nearest is taken and the rest refitted to it. There is
    none where the recipe inherits or compensates nothing or starts from random weights, and where
    the networks cannot be parted or merged.
    """
    prune = job.recipe.prune
    if prune.inherit == "none" or forgets_weights(job) or job.recipe.compensate is False:
        return None
    donors = donors[:1] if prune.inherit == "nearest" else donors
    base = with_biases(job.selected, donors)
    try:
        experts = _experts(job, base, donors)
        if not experts.keys() - {THE_PARENT}:
            strangers = [d for d in donors if not d.tasks and not has_narrowed_norms(base, d)]
            return _on_trunk(job, base, strangers[0]) if strangers else None
        if len(experts) == 1:
            [whole] = experts.values()
            return whole
        return _merged(job, base, experts)
    except ModelError:  # a layer that more than its norm reads, say
        return None


def of_merged(job: Job, merged: MultiTaskModel) -> Job:
    """Return the job of cutting the merged network in the parent's place."""
    weights = f"merged {model_fingerprint(merged)}"
    return replace(job, selected=merged, scored=merged, weights=weights)


def start_loss(job: Job) -> RelativeLoss:
    """Return what judges starts: the loss on training images that compensation did not see."""
    seen = {*refit_indices(job)}
    fresh = [index for index in range(len(job.train)) if index not in seen]
    pool = Subset(job.train, fresh or range(len(job.train)))
    chosen = Subset(pool, spread(pool, JUDGE_IMAGES))
    labelled = [task for task in job.tasks if has_labels(job.train, [task])]
    return RelativeLoss(job.selected, next(batches(chosen, labelled, job.spec, len(chosen))))


def start_key(job: Job, plan: PrunePlan) -> tuple[Any, ...]:
    """Return what the loss of the start that ``plan`` makes depends on, but for the parent."""
    return (job.outline_key, plan.to_json(), str(job.recipe.compensate), refit_indices(job),
            job.train.fingerprint, _meaning(job.tasks), asdict(job.spec))  # fmt: skip


def _meaning(tasks: Sequence[Task]) -> list[Any]:
    return [(meaning(task), task.weight) for task in tasks]


def with_biases(model: MultiTaskModel, donors: Sequence[Donor]) -> MultiTaskModel:
    """Return a copy whose layers have a bias, of zeros, wherever a donor's has one.

    Compensation gives some layers a bias that their parent's lack.
    """
    wider = copy.deepcopy(model)
    layers = dict(wider.named_modules())
    for name in {name for donor in donors for name in donor.network.weights}:
        layer = layers.get(name.removesuffix(".bias")) if name.endswith(".bias") else None
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
    return wider


def _merged(
    job: Job, base: MultiTaskModel, experts: Mapping[str, MultiTaskModel]
) -> MultiTaskModel:
    key = [(name, _meaning(own.tasks)) for name, own in experts.items()]
    folder = job.cache.folder(
        "merged", job.selected_key, key, sorted(base.state_dict()), job.train.fingerprint,
        refit_indices(job), asdict(job.spec),
    )  # fmt: skip
    merged = copy.deepcopy(base)
    if load_weights(folder / "weights.safetensors", merged):
        return merged
    merged = merge_networks(base, base.state_dict(), experts, refit_images(job), MergeSettings())
    save_weights(folder / "weights.safetensors", merged)
    return merged


def _on_trunk(job: Job, base: MultiTaskModel, donor: Donor) -> MultiTaskModel:
    """Return ``base`` with the donor's trunk, and all other layers refitted to read that."""
    folder = job.cache.folder(
        "on_trunk", job.selected_key, _meaning(job.tasks), sorted(base.state_dict()), donor.id,
        sorted(donor.network.weights), str(job.recipe.compensate), job.train.fingerprint,
        refit_indices(job), asdict(job.spec),
    )  # fmt: skip
    known = copy.deepcopy(base)
    if load_weights(folder / "weights.safetensors", known):
        return known
    whole = _embedded(base, donor)
    given = {layer_of(name) for name in donor.network.weights}
    rest = {layer_of(name) for name in base.state_dict()} - given
    whole = refit_layers(base, whole, rest, refit_images(job), refit_settings(job))
    save_weights(folder / "weights.safetensors", whole)
    return whole


def layer_of(name: str) -> str:
    """Return the layer that holds a parameter, by their names."""
    return name.rpartition(".")[0]


def _experts(job: Job, base: MultiTaskModel, donors: Sequence[Donor]) -> dict[str, MultiTaskModel]:
    """Return, by a donor's id, its network for the kept tasks that no nearer one has."""
    left = [task.name for task in job.tasks]
    experts = {}
    for donor in donors:
        own = [task for task in left if task in donor.tasks]
        if own and not has_narrowed_norms(base, donor):
            left = [task for task in left if task not in own]
            experts[donor.id] = select_tasks(_embedded(base, donor), own, job.example).eval()
    if left:
        experts[THE_PARENT] = select_tasks(base, left, job.example).eval()
    return experts


def has_narrowed_norms(base: MultiTaskModel, donor: Donor) -> bool:
    """Say whether a norm over channels saw fewer there: zeros in a whole one would change it."""
    layers = dict(base.named_modules())
    return any(
        gone and isinstance(layers.get(layer), NORMS_OF_CHANNELS)
        for (layer, _), gone in donor.network.gone.items()
    )


def _embedded(base: MultiTaskModel, donor: Donor) -> MultiTaskModel:
    model = copy.deepcopy(base)
    whole = {name: tensor.cpu().numpy() for name, tensor in model.state_dict().items()}
    state = embed(whole, donor.network)
    model.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    return model
