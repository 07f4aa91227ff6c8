"""Fusion rules: many tasks' scores per channel into one.

A task's scores are first divided by their sum over the network, ``s_t / sum s_t``, so that tasks
weigh alike whatever the scale of their losses; user weights ``w_t`` sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import RecipeError

Vector = NDArray[np.float64]
GroupScores = Mapping[str, Vector]
Oracle = Callable[[GroupScores], Mapping[str, NDArray[np.bool_]]]
"""From fused scores to the channels, per group, that a cut to the budget would remove."""

ROUNDS = 40  # of the minimax; its worst task moves by < 0.002 after
NEEDS_AGREEMENT = frozenset({"cosine", "cosine_magnitude"})


@dataclass(frozen=True)
class Ballot:
    """What the rules see, with the network's n channels in one row.

    ``shares`` (T, n) are the tasks' normalised scores and ``weights`` (T,) sum to 1.
    ``agreement`` (n,) is how alike the tasks' gradients are, 0..1; ``removed`` says which of the n
    channels a cut by some fused scores takes; ``keep_share`` is the part of a task's channels that
    it may vote for.
    """

    shares: NDArray[np.float64]
    weights: Vector
    agreement: Vector
    removed: Callable[[Vector], NDArray[np.bool_]]
    keep_share: float


def mean(ballot: Ballot) -> Vector:
    """Return ``sum_t w_t s_t``: least mean importance lost."""
    return ballot.weights @ ballot.shares


def maximum(ballot: Ballot) -> Vector:
    """Return ``max_t w_t s_t``: a channel is worth what it is to the task that needs it most."""
    fused: Vector = (ballot.weights[:, None] * ballot.shares).max(axis=0)
    return fused


def unanimous(ballot: Ballot) -> Vector:
    """Return the best rank that any task gives: DiSparse (arXiv 2206.04662) on channels.

    There a channel goes only if every task's own mask drops it. A threshold q on the best rank
    keeps exactly the union of the tasks' masks of their top 1 - q, for any q, so no keep ratio has
    to be tuned by hand. Weights have no place in it.
    """
    fused: Vector = ranks(ballot.shares).max(axis=0)
    return fused


def rank_mean(ballot: Ballot) -> Vector:
    """Return the weighted mean of the tasks' ranks: only their orders count."""
    return ballot.weights @ ranks(ballot.shares)


def vote(ballot: Ballot) -> Vector:
    """Return the weight of the tasks whose own top ``keep_share`` has the channel.

    Ties are broken by ``mean``: its part stays below the least difference of two vote counts.
    """
    votes = ballot.weights @ (ranks(ballot.shares) > 1 - ballot.keep_share + 1e-9)
    steps = np.diff(np.unique(votes.round(9)))
    average = mean(ballot)
    fused: Vector = votes + 0.5 * min(steps, default=1.0) * average / max(average.max(), 1e-300)
    return fused


def cosine(ballot: Ballot) -> Vector:
    """Return the agreement of the tasks' gradients alone: CosPrune (arXiv 2304.06840)."""
    return ballot.agreement


def cosine_magnitude(ballot: Ballot) -> Vector:
    """Return agreement times ``mean``: a channel must matter, and not be fought over."""
    return ballot.agreement * mean(ballot)


def guarded(ballot: Ballot) -> Vector:
    """Return the weighted mean whose cut hurts the worst-off task least, as far as is found.

    ``min over cuts of max_t u_t * lost_t(cut)``, where ``lost_t`` is the share of the task's
    importance that goes and ``u_t`` its weight over the mean weight, is a problem of whole numbers.
    Its relaxation is a game over weights on the simplex, played by multiplicative weights (Freund &
    Schapire, 1999): the cut answers ``sum_t p_t u_t s_t``, then ``p_t`` grows with what task t
    lost. The best round is returned, no proven optimum; the first is ``mean``, so the worst task of
    that trial cut never does worse than there.
    """
    scaled = len(ballot.weights) * ballot.weights[:, None] * ballot.shares
    log_weights = np.zeros(len(scaled))
    best, least = mean(ballot), np.inf
    for number in range(ROUNDS):
        players = np.exp(log_weights - log_weights.max())
        fused = players / players.sum() @ scaled
        lost = scaled[:, ballot.removed(fused)].sum(axis=1)
        if lost.max() < least:
            best, least = fused, lost.max()
        if lost.max() == 0 or len(scaled) == 1:
            break
        log_weights += lost / lost.max() / np.sqrt(1 + number / 4)  # steps shrink: it settles
    return best


RULES: Mapping[str, Callable[[Ballot], Vector]] = {
    "cut": mean,  # the default from the start; no rule of the benchmark is clearly better
    "mean": mean,
    "max": maximum,
    "unanimous": unanimous,
    "vote": vote,
    "rank_mean": rank_mean,
    "cosine": cosine,
    "cosine_magnitude": cosine_magnitude,
    "guarded": guarded,
}


def fuse(
    tasks: Mapping[str, GroupScores],
    weights: Mapping[str, float],
    rule: str,
    *,
    agreement: GroupScores | None = None,
    oracle: Oracle | None = None,
    keep_share: float = 0.5,
) -> dict[str, Vector]:
    """Normalise each task's scores and fuse them by ``rule`` into (width,) per group.

    ``agreement`` (0..1 per channel) is what the rules in ``NEEDS_AGREEMENT`` need; ``oracle`` is
    for ``guarded`` (without one the lowest ``1 - keep_share`` of all channels go);
    ``keep_share`` is for ``vote``.

    Raises:
        RecipeError: there is no such rule.
        ValueError: the rule needs the agreement, and it was not given.
    """
    decide = rule_of(rule)
    if rule in NEEDS_AGREEMENT and agreement is None:
        raise ValueError(f"rule '{rule}' needs the agreement of the tasks' gradients")
    widths = {name: len(values) for name, values in next(iter(tasks.values())).items()}

    def flat(scores: Mapping[str, NDArray[np.float64]]) -> Vector:
        return np.concatenate([np.asarray(scores[name]) for name in widths])

    def unflat(values: Vector) -> dict[str, Vector]:
        return dict(zip(widths, np.split(values, np.cumsum([*widths.values()])[:-1]), strict=True))

    def removed(fused: Vector) -> NDArray[np.bool_]:
        if oracle is None:
            return fused < np.quantile(fused, 1 - keep_share)
        masks = oracle(unflat(fused))
        return np.concatenate([masks[name] for name in widths])

    say = np.array([weights[task] for task in tasks])
    ballot = Ballot(
        shares=np.stack([flat(normalise(scores)) for scores in tasks.values()]),
        weights=say / say.sum(),
        agreement=np.ones(sum(widths.values())) if agreement is None else flat(agreement),
        removed=removed,
        keep_share=keep_share,
    )
    return unflat(decide(ballot))


def rule_of(name: str) -> Callable[[Ballot], Vector]:
    """Return the rule ``name``.

    Raises:
        RecipeError: there is no such rule.
    """
    if name not in RULES:
        raise RecipeError(
            f"prune.fusion: '{name}' is not a fusion rule", hint=f"rules: {', '.join(RULES)}"
        )
    return RULES[name]


def normalise(scores: GroupScores) -> dict[str, Vector]:
    """Divide one task's scores by their sum over the network, so that tasks weigh alike."""
    total = sum(float(values.sum()) for values in scores.values())
    return {name: values / total if total > 0 else values * 0 for name, values in scores.items()}


def ranks(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return per task the share of its own channels that score no higher, in 0..1.

    Its own are those with a score above 0, so another task's head neither ranks nor counts; a
    channel that is not its own ranks 0, and equals share a rank.
    """
    result = np.zeros_like(shares)
    for row, values in enumerate(shares):
        own = np.sort(values[values > 0])
        if len(own):
            result[row] = np.searchsorted(own, values, side="right") / len(own)
    return result
