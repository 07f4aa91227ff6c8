"""The weights a cut starts from: its own compensated ones, or those that neighbours recovered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from secateur.core.model import MultiTaskModel, model_fingerprint
from secateur.core.plan import dropped_indices, dropped_of_parameters
from secateur.data.loading import image_batch, spread
from secateur.flow.job import Job
from secateur.flow.merged import (
    THE_PARENT,
    has_narrowed_norms,
    layer_of,
    of_merged,
    start_loss,
    with_biases,
)
from secateur.flow.recovery import forgets_weights
from secateur.flow.refit import compensated
from secateur.flow.stages import begin_cut
from secateur.flow.warm_start import Planned
from secateur.fusion.weights import reestimate_norms
from secateur.vote.inherit import Donor, SubNetwork, inherit

NORM_IMAGES = 256
MERGED = "merged"


@dataclass(frozen=True)
class Origin:
    """Where a cut's first weights are from: ``chosen`` of the starts that were compared.

    ``losses`` are, per start, the mean over tasks of the loss relative to the parent's, on
    training images that compensation did not see (recovered weights may have: they are judged
    kindly). ``donors`` are entries' ids, ``share`` (0..1) of the numbers came from them, and
    ``of_tasks`` says whether one of them was for a task that is kept. ``reason`` says why there
    was nothing to compare.
    """

    chosen: str
    losses: dict[str, float]
    donors: tuple[str, ...] = ()
    share: float = 0.0
    of_tasks: bool = False
    reason: str = ""

    @property
    def inherited(self) -> bool:
        """Whether a neighbour gave weights."""
        return self.chosen != THE_PARENT

    @property
    def recovered(self) -> bool:
        """Whether these weights were recovered for the tasks: little is left to learn then."""
        return self.inherited and self.of_tasks

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-like data."""
        return asdict(self)


def best_start(
    job: Job, planned: Planned, begun: MultiTaskModel
) -> tuple[MultiTaskModel, Origin | None, str]:
    """Return the best start by loss, where it is from, and a digest of it where it is inherited.

    Compared are ``begun``, the cut as compensation left it; the same with the neighbours' weights
    wherever they have the channels; that compensated once more, since the channels that they lack
    are strangers to their weights; that with those layers alone refitted that they gave nothing of,
    such as the heads of another network; and the cut of their merged network, where the plan is of
    that.
    Batch norms of a mean are estimated anew, since their statistics are of none of the networks.
    Origin is None where the recipe does not ask the library.
    """
    wanted = job.recipe.prune.inherit
    if planned.vote is None:
        return begun, None, ""
    reason = planned.vote.cold or _why_not(job, planned)
    if reason:
        return begun, Origin(THE_PARENT, {}, reason=reason), ""
    groups, plan = planned.scored.groups, planned.plan
    donors = planned.donors[:1] if wanted == "nearest" else planned.donors
    taken = with_biases(begun, donors)
    own = {name: tensor.cpu().numpy() for name, tensor in taken.state_dict().items()}
    result = inherit(
        SubNetwork(own, dropped_indices(groups, plan), dropped_of_parameters(groups, plan)),
        [donor.network for donor in donors],
        [donor.weight for donor in donors],
    )
    taken.load_state_dict({name: torch.tensor(array) for name, array in result.weights.items()})
    reestimate_norms(taken, image_batch(job.train, spread(job.train, NORM_IMAGES), job.spec))
    starts = {THE_PARENT: begun, "inherited": taken}
    if job.recipe.compensate is not False:
        starts["inherited and compensated"] = compensated(job, groups, plan, taken)
        rest = _fittable(taken) - {layer_of(name) for name in result.given}
        if rest:
            starts["inherited, the rest refitted"] = compensated(
                job, groups, plan, taken, only=rest
            )
    if planned.merged is not None:
        starts[MERGED] = begin_cut(of_merged(job, planned.merged), groups, plan)
    loss = start_loss(job)
    losses = {name: loss(model) for name, model in starts.items()}
    chosen = min(losses, key=lambda name: losses[name])
    ids, of_tasks = tuple(donor.id for donor in donors), _were_for(job, donors, chosen)
    origin = Origin(chosen, losses, ids, result.share, of_tasks)
    key = model_fingerprint(starts[chosen]) if origin.inherited else ""
    return starts[chosen], origin, key


def _fittable(model: MultiTaskModel) -> set[str]:
    layers = model.named_modules()
    return {name for name, layer in layers if isinstance(layer, nn.Conv2d | nn.Linear)}


def _were_for(job: Job, donors: Sequence[Donor], chosen: str) -> bool:
    """Say whether weights of the ``chosen`` start were recovered for a task that is kept."""
    kept = {task.name for task in job.tasks}
    return any(
        kept & {*donor.tasks}
        and not (chosen == MERGED and has_narrowed_norms(job.selected, donor))  # has no part in it
        for donor in donors
    )


def _why_not(job: Job, planned: Planned) -> str:
    if job.recipe.prune.inherit == "none":
        return "the recipe inherits no weights"
    if forgets_weights(job):
        return "recover.reinit forgets all weights"
    if not planned.donors:
        return "no voter holds weights"
    return ""
