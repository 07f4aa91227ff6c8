"""The vote: what the nearest tasks kept, or how they scored it, as one number per channel.

After meta-vote pruning (MVP, arXiv 2301.11560), where the keep-sets of the nearest tasks vote, and
its one-shot successor (SMSP, arXiv 2307.04365), where their scores do. Only their abstracts
were at hand: weights by similarity, ties and the blend are ours.

A voter's opinion is a mapping from a group (a layer's channels, a ViT's heads, its hidden or
embedding channels: all the same here) to a (width,) array, NaN where it has none: its network has
no such channel. No result depends on the order of the voters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import LibraryError

Vector = NDArray[np.float64]
Opinion = Mapping[str, NDArray[Any]]
TIE = 1e-9  # of a group's largest score: enough to tell channels apart, too little to weigh


def vote_weights(similarities: Sequence[float]) -> Vector:
    """Return each voter's say, in proportion to its similarity, of sum 1; negative ones have none.

    Raises:
        LibraryError: no voter is similar at all.
    """
    positive = [max(0.0, float(value)) for value in similarities]
    total = math.fsum(positive)
    if not total > 0:
        raise LibraryError(
            f"none of {len(positive)} neighbours is similar to the new task",
            hint="start cold with prune.warm_start: none, or compare by another prune.similarity",
        )
    return np.array(positive) / total


def keep_opinion(width: int, kept: Collection[int]) -> Vector:
    """Return a keep-set as an opinion: 1 for a kept channel of (width,), 0 for a dropped one."""
    opinion = np.zeros(width)
    opinion[list(kept)] = 1.0
    return opinion


def score_opinion(scores: Mapping[str, Opinion]) -> dict[str, Vector]:
    """Return one voter's scores, per task and group (width,), as its opinion.

    Each task's are divided by their sum over the network, then averaged over the tasks, as plans
    are fused by default; a group that only some tasks have is 0 to the others.
    """
    total: dict[str, Vector] = {}
    for groups in scores.values():
        norm = math.fsum(float(np.sum(values)) for values in groups.values()) * len(scores)
        for name, values in groups.items():
            share = np.asarray(values, np.float64) / norm if norm > 0 else np.zeros(len(values))
            total[name] = total.get(name, 0.0) + share
    return total


def tally(opinions: Sequence[Opinion], weights: NDArray[np.float64]) -> dict[str, Vector]:
    """Return, per group, the (width,) weighted mean of those who have an opinion.

    Of keep-sets this is the share of the say that keeps a channel, in 0..1; NaN where nobody has
    an opinion.

    Raises:
        LibraryError: two voters' widths of a group differ.
    """
    votes = {}
    for name, rows in _by_group(opinions).items():
        say = np.where(np.isnan(rows), 0.0, weights[:, None])
        votes[name] = _ratio(_total(say * np.nan_to_num(rows)), _total(say))
    return votes


def confidence(keeps: Sequence[Opinion], weights: NDArray[np.float64]) -> dict[str, float]:
    """Return, per group, how far the voters' keep-sets agree beyond chance, in 0..1.

    With ``p`` a channel's share of the say that keeps it, ``r`` the mean of ``p`` over the group
    and ``w`` the say of those who have an opinion (of sum 1):

        1 - mean(p (1 - p) / (1 - sum w^2)) / (r (1 - r)),   not below 0

    It is 1 when all keep the same channels and 0 when they agree no more than voters who draw that
    many channels at random (Fleiss' kappa for two answers, each voter weighted). A channel with a
    single voter says nothing; a group of such channels has 0.
    """
    found = {}
    for name, rows in _by_group(keeps).items():
        say = np.where(np.isnan(rows), 0.0, weights[:, None])
        say = say / np.maximum(_total(say), np.finfo(np.float64).tiny)
        alone = _total(say**2)
        several = (alone > 0) & (alone < 1 - 1e-12)
        if not several.any():
            found[name] = 0.0
            continue
        p = np.minimum(_total(say * np.nan_to_num(rows))[several], 1.0)
        p = np.where(p > 1 - 1e-12, 1.0, p)  # sums of shares round
        unsure = float((p * (1 - p) / (1 - alone[several])).mean())
        expected = float(p.mean() * (1 - p.mean()))
        found[name] = 1.0 if unsure == 0 else max(0.0, 1 - unsure / expected)
    return found


def blend(votes: Opinion, own: Opinion, weight: float) -> dict[str, Vector]:
    """Return own scores (width,) per group, handed out anew in the order that votes and they give.

    A channel's standing is ``(1 - weight) rank of its own score + weight rank of its votes``, both
    ranks in 0..1 within the group. The channel of the best standing gets the group's best own
    score, and so on: the votes decide which channels go, and how many go from each group stays
    what the own scores say. Without a vote a channel keeps its own rank; ties go by own score.
    """
    blended = {}
    for name, values in own.items():
        scores = np.asarray(values, np.float64)
        ranks = _ranks(scores)
        said = np.asarray(votes.get(name, np.full(len(scores), np.nan)), np.float64)
        known = ~np.isnan(said)
        standing = ranks.copy()
        standing[known] = (1 - weight) * ranks[known] + weight * _ranks(said[known])
        order = np.lexsort((scores, standing))
        result = np.empty(len(scores))
        apart = TIE * (float(scores.max(initial=0.0)) or TIE) / max(len(scores), 1)
        result[order] = np.sort(scores) + apart * np.arange(len(scores))
        blended[name] = result
    return blended


def keep_top(scores: Opinion, counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return, per group, the ``counts`` best channels in ascending order, of equals the first.

    A group keeps one channel at least, whatever its count says; NaN scores go first.
    """
    kept = {}
    for name, count in counts.items():
        values = np.nan_to_num(np.asarray(scores[name], np.float64), nan=-np.inf, neginf=-np.inf)
        best = np.argsort(-values, kind="stable")[: max(1, count)]
        kept[name] = tuple(int(channel) for channel in np.sort(best))
    return kept


def overlap(one: Mapping[str, Collection[int]], other: Mapping[str, Collection[int]]) -> float:
    """Return the IoU, in 0..1, of two keep-sets over the groups of ``one``; 1 for two empty."""
    pairs = [({*kept}, {*other.get(name, ())}) for name, kept in one.items()]
    union = sum(len(mine | theirs) for mine, theirs in pairs)
    return sum(len(mine & theirs) for mine, theirs in pairs) / union if union else 1.0


def _by_group(opinions: Sequence[Opinion]) -> dict[str, NDArray[np.float64]]:
    """Return, per group that any voter has, the (voters, width) opinions, NaN for none."""
    widths: dict[str, int] = {}
    for opinion in opinions:
        for name, values in opinion.items():
            if widths.setdefault(name, len(values)) != len(values):
                raise LibraryError(
                    f"the voters' group '{name}' has {widths[name]} and {len(values)} channels",
                    hint="let only cuts of one parent, in one basis, vote together",
                )
    return {
        name: np.stack(
            [np.asarray(each.get(name, np.full(width, np.nan)), np.float64) for each in opinions]
        )
        for name, width in widths.items()
    }


def _total(rows: NDArray[np.float64]) -> Vector:
    """Return the sum over voters; sorted first, since rounding depends on the order of a sum."""
    total: Vector = np.sort(rows, axis=0).sum(axis=0)
    return total


def _ratio(top: Vector, bottom: Vector) -> Vector:
    """Return top / bottom, NaN where both are 0."""
    ratio: Vector = np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom > 0)
    return ratio


def _ranks(values: Vector) -> Vector:
    """Return each value's rank in 0..1, equals sharing the middle of theirs."""
    ordered = np.sort(values)
    below = np.searchsorted(ordered, values, side="left")
    upto = np.searchsorted(ordered, values, side="right")
    ranks: Vector = (below + upto) / (2.0 * max(len(values), 1))
    return ranks
