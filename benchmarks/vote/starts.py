"""Where a cut for a new task may start: from its own scores, or from the library's cuts."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from secateur.compensate import refit
from secateur.core.model import MultiTaskModel
from secateur.core.plan import PrunePlan, dropped_indices, dropped_of_parameters
from secateur.vote.ballot import blend, keep_opinion, score_opinion, tally, vote_weights
from secateur.vote.inherit import SubNetwork, inherit
from vote.tasks import Images
from vote.training import Parent, taylor

NEIGHBOURS = 5
TIE = 1e-3  # votes are equal for many channels; then the voters' scores decide
BLEND = 0.5
REFIT_IMAGES = 256
Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Earlier:
    """One cut of the library: the task's scores on the parent, what it kept, its weights' file."""

    task: str
    scores: Mapping[str, NDArray[np.float64]]
    plan: PrunePlan
    file: Path

    @property
    def weights(self) -> Weights:
        """The recovered weights, read anew each time."""
        return load_file(self.file)


@dataclass(frozen=True, eq=False)
class Asked:
    """What a start is made from: the parent with the new task's head, and the library.

    ``earlier`` are the library's cuts to the same share, most similar task first, with their
    ``similarities``; ``generic`` is the parent's own task, cut to that share. Cold starts know
    nothing of these.
    """

    task: str
    parent: Parent
    images: Images
    share: float
    earlier: Sequence[Earlier]
    similarities: Sequence[float]
    generic: Earlier | None
    seed: int

    @property
    def nearest(self) -> list[tuple[Earlier, float]]:
        """The nearest tasks' cuts, and their say."""
        return self.nearest_of(NEIGHBOURS)

    def nearest_of(self, count: int) -> list[tuple[Earlier, float]]:
        """Return the cuts of so many tasks, and their say."""
        say = vote_weights(self.similarities[:count])
        return list(zip(self.earlier[:count], say.tolist(), strict=True))

    @property
    def own(self) -> dict[str, NDArray[np.float64]]:
        """One scoring pass on the new task."""
        return taylor(self.parent, self.images, np.random.default_rng(self.seed))


Start = Callable[[Asked], MultiTaskModel]


def cold(asked: Asked) -> MultiTaskModel:
    """Cut by the task's own gate-Taylor scores, the parent's weights."""
    return asked.parent.cut(asked.parent.plan(asked.own, asked.share))


def refitted(asked: Asked) -> MultiTaskModel:
    """The same, compensated on the task's images."""
    plan = asked.parent.plan(asked.own, asked.share)
    return _refitted(asked, plan, asked.parent.cut(plan))


def votes_of_nearest(asked: Asked, count: int = NEIGHBOURS) -> MultiTaskModel:
    """The channels that the nearest tasks' keep-sets vote for (MVP), the parent's weights."""
    return asked.parent.cut(_voted(asked, asked.nearest_of(count)))


def votes_of_random(asked: Asked) -> MultiTaskModel:
    """The same of as many tasks at random, others for each task and seed, with equal say."""
    rng = np.random.default_rng([asked.seed, zlib.crc32(asked.task.encode())])
    drawn = rng.permutation(len(asked.earlier))[:NEIGHBOURS]
    return asked.parent.cut(_voted(asked, [(asked.earlier[i], 1.0) for i in drawn]))


def votes_of_all(asked: Asked) -> MultiTaskModel:
    """The same of all tasks, with equal say."""
    return asked.parent.cut(_voted(asked, [(each, 1.0) for each in asked.earlier]))


def voted_scores(asked: Asked) -> MultiTaskModel:
    """The channels that the nearest tasks' scores are highest for (SMSP)."""
    voters, say = zip(*asked.nearest, strict=True)
    scores = tally([_opinion(each) for each in voters], np.array(say))
    return asked.parent.cut(asked.parent.plan(scores, asked.share))


def blended(asked: Asked) -> MultiTaskModel:
    """Own scores, handed out anew in the order that they and the nearest tasks' votes give."""
    scores = blend(_tallied(asked.nearest), asked.own, BLEND)
    return asked.parent.cut(asked.parent.plan(scores, asked.share))


def inherited(asked: Asked) -> MultiTaskModel:
    """The nearest task's own sub-network, its weights included."""
    return _as_it_was(asked.parent, asked.earlier[0])


def inherited_average(asked: Asked, count: int = NEIGHBOURS) -> MultiTaskModel:
    """The voted channels, weights averaged over the voters that have them."""
    voters = asked.nearest_of(count)
    plan = _voted(asked, voters)
    model = asked.parent.cut(plan)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    donors = [_sub_network(asked.parent, each.weights, each.plan) for each, _ in voters]
    found = inherit(_sub_network(asked.parent, state, plan), donors,
                    [weight for _, weight in voters])  # fmt: skip
    return _loaded(model, found.weights)


def inherited_generic(asked: Asked) -> MultiTaskModel:
    """The parent's own task cut and recovered once, its weights included."""
    assert asked.generic is not None
    return _as_it_was(asked.parent, asked.generic)


def votes_refitted(asked: Asked) -> MultiTaskModel:
    """The nearest tasks' channels, the parent's weights, compensated."""
    plan = _voted(asked, asked.nearest)
    return _refitted(asked, plan, asked.parent.cut(plan))


def average_refitted(asked: Asked) -> MultiTaskModel:
    """The voters' mean weights, compensated."""
    return _refitted(asked, _voted(asked, asked.nearest), inherited_average(asked))


def generic_refitted(asked: Asked) -> MultiTaskModel:
    """The generic weights, compensated."""
    assert asked.generic is not None
    return _refitted(asked, asked.generic.plan, inherited_generic(asked))


STARTS: Mapping[str, Start] = {
    "cold, one-shot": cold,
    "cold, one-shot, refitted": refitted,
    "votes of the nearest": votes_of_nearest,
    "votes of random tasks": votes_of_random,
    "votes of all": votes_of_all,
    "voted scores": voted_scores,
    "blend with own scores": blended,
    "nearest task's weights": inherited,
    "average of weights": inherited_average,
    "generic weights": inherited_generic,
}
REFITTED: Mapping[str, Start] = {  # towards what the parent's layers compute on the task's images
    "votes of the nearest, refitted": votes_refitted,
    "average of weights, refitted": average_refitted,
    "generic weights, refitted": generic_refitted,
}
COUNTS = (1, 2, 10, 20, 39)  # neighbours, besides NEIGHBOURS, of the 40 that a new task has
COUNTED = {"votes of the nearest": votes_of_nearest, "average of weights": inherited_average}
BY_COUNT: Mapping[str, Start] = {
    f"{name}, N = {count}": partial(start, count=count)
    for name, start in COUNTED.items()
    for count in COUNTS
}


def _refitted(asked: Asked, plan: PrunePlan, model: MultiTaskModel) -> MultiTaskModel:
    chosen = torch.linspace(0, len(asked.images.labels) - 1, REFIT_IMAGES).long()
    return refit(asked.parent.model, model, asked.parent.groups, plan,
                 asked.images.images[chosen])  # fmt: skip


def _voted(asked: Asked, voters: Sequence[tuple[Earlier, float]]) -> PrunePlan:
    return asked.parent.plan(_tallied(voters), asked.share, balance=0.0)


def _tallied(voters: Sequence[tuple[Earlier, float]]) -> dict[str, NDArray[np.float64]]:
    """Return the say (0..1) that keeps each channel; between equals the voters' scores decide."""
    earlier, weights = zip(*voters, strict=True)
    say = np.array(weights) / sum(weights)
    keeps = [{cut.name: keep_opinion(cut.width, cut.kept) for cut in each.plan.cuts}
             for each in earlier]  # fmt: skip
    votes, scores = tally(keeps, say), tally([_opinion(each) for each in earlier], say)
    tops = {name: float(own.max()) or 1.0 for name, own in scores.items()}
    return {name: votes[name] + TIE * scores[name] / tops[name] for name in votes}


def _opinion(earlier: Earlier) -> dict[str, NDArray[np.float64]]:
    return score_opinion({"label": earlier.scores})


def _sub_network(parent: Parent, weights: Weights, plan: PrunePlan) -> SubNetwork:
    groups = parent.groups
    return SubNetwork(weights, dropped_indices(groups, plan), dropped_of_parameters(groups, plan))


def _as_it_was(parent: Parent, earlier: Earlier) -> MultiTaskModel:
    return _loaded(parent.cut(earlier.plan), earlier.weights)


def _loaded(model: MultiTaskModel, weights: Weights) -> MultiTaskModel:
    """Put the weights in, but for the head's: a new one is made in closed form anyway."""
    body = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()
            if not name.startswith("network.head.")}  # fmt: skip
    model.load_state_dict(body, strict=False)
    return model


def begin(asked: Asked, start: Start) -> Parent:
    """Return the start as a network of its own groups; the caller makes its head."""
    return replace(asked.parent, model=start(asked))
