"""A start that several neighbours share: their networks merged into one, and that cut."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from secateur.core.model import MultiTaskModel
from secateur.flow.job import Job
from secateur.flow.stages import compensated, refit_images
from secateur.flow.warm_start import Donor, Planned
from secateur.fusion.weights import MergeSettings, merge_networks
from secateur.prune import apply_plan
from secateur.tasks import select_tasks
from secateur.vote.inherit import embed

THE_PARENT = "parent"


def merged_start(job: Job, planned: Planned, donors: Sequence[Donor]) -> MultiTaskModel | None:
    """Return the cut of the neighbours' networks in one, None where none has a kept task.

    Each task's expert is the nearest neighbour that has it, or else the parent. A neighbour did
    not keep what the others did: in the parent's shape, with zeros for what it dropped, it
    computes what it did, so that all can be merged (``fusion.weights``, rule ``cut``) before the
    plan is carried out. Both steps are fitted to features, on unlabelled training images.

    Raises:
        ModelError: the experts cannot be merged (``fit_to_experts``).
    """
    experts = _experts(job, donors)
    if not experts.keys() - {THE_PARENT}:
        return None
    if len(experts) == 1:
        [whole] = experts.values()
    else:
        whole = merge_networks(job.selected, job.selected.state_dict(), experts,
                               refit_images(job), MergeSettings())  # fmt: skip
    groups, plan = planned.scored.groups, planned.plan
    return compensated(job, groups, plan, apply_plan(whole, groups, plan), whole)


def _experts(job: Job, donors: Sequence[Donor]) -> dict[str, MultiTaskModel]:
    """Return, by a donor's id, its network for the kept tasks that no nearer one has."""
    left = [task.name for task in job.tasks]
    experts = {}
    for donor in donors:
        own = [task for task in left if task in donor.tasks]
        if own:
            left = [task for task in left if task not in own]
            experts[donor.id] = select_tasks(_embedded(job, donor), own, job.example).eval()
    if left:
        experts[THE_PARENT] = select_tasks(job.selected, left, job.example).eval()
    return experts


def _embedded(job: Job, donor: Donor) -> MultiTaskModel:
    model = copy.deepcopy(job.selected)
    whole = {name: tensor.cpu().numpy() for name, tensor in model.state_dict().items()}
    state = embed(whole, donor.network)
    model.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    return model
