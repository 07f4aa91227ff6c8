"""Inherited weights: a cut starts from what its neighbours' networks were after recovery.

A prototype found this worth more than the votes themselves. All functions take and give plain
arrays; where a tensor's rows and columns lie in the parent says which numbers mean the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.core.channels import Axis
from secateur.core.errors import LibraryError

Array = NDArray[Any]
AXES: tuple[Axis, ...] = ("out", "in")  # what the first two axes of a weight count


@dataclass(frozen=True, eq=False)
class SubNetwork:
    """A cut's ``weights`` by state name, and what it lacks of its parent.

    ``gone`` are, per layer and axis, the parent's positions that the cut dropped
    (``core.plan.dropped_indices``); ``bare`` are, per parameter that no layer of a known kind
    holds, those of its last axis (``core.plan.dropped_of_parameters``).
    """

    weights: Mapping[str, Array]
    gone: Mapping[tuple[str, Axis], Collection[int]]
    bare: Mapping[str, Collection[int]] = field(default_factory=dict)

    def lacks(self, name: str, axis: int) -> Collection[int]:
        """Return the parent's positions that are not there on one axis of a weight."""
        if name in self.bare:
            last = self.weights[name].ndim - 1
            return self.bare[name] if axis == last else ()
        layer = name.rpartition(".")[0]
        return self.gone.get((layer, AXES[axis]), ()) if axis < len(AXES) else ()


@dataclass(frozen=True, eq=False)
class Donor:
    """A neighbour's recovered network: its entry's ``id``, its tasks and its say (> 0).

    It has no tasks where it gives a trunk's weights alone.
    """

    id: str
    tasks: tuple[str, ...]
    network: SubNetwork
    weight: float


@dataclass(frozen=True, eq=False)
class Inherited:
    """``weights`` of the start's names and shapes; ``share`` (0..1) of them came from donors.

    ``given`` are the names of those that donors gave a number of.
    """

    weights: dict[str, Array]
    share: float
    given: frozenset[str] = frozenset()


def inherit(start: SubNetwork, donors: Sequence[SubNetwork], shares: Sequence[float]) -> Inherited:
    """Return the start's weights with the donors' where these have both row and column.

    Where several donors share a number, it is their mean weighted by ``shares`` (> 0). What none
    has, a counter or a tensor of another shape, stays as it is in ``start``, which should be the
    parent's compensated cut. A donor of the very same channels gives its own network back.

    Raises:
        LibraryError: there are no donors.
    """
    if not donors:
        raise LibraryError(
            "there is no network to inherit weights from", hint="start from the parent's"
        )
    weights, taken, count = {}, 0, 0
    names = set()
    for name, own in start.weights.items():
        total, say = np.zeros(own.shape), np.zeros(own.shape)
        for donor, share in zip(donors, shares, strict=True):
            places = _shared_places(name, start, donor)
            if places is not None:
                mine, theirs = places
                total[mine] += share * donor.weights[name][theirs]
                say[mine] += share
        given = say > 0
        mixed = np.divide(total, say, out=np.array(own, np.float64), where=given)
        weights[name] = mixed.astype(own.dtype) if given.any() else own
        names.update([name] if given.any() else [])
        if _is_weight(own):
            taken, count = taken + int(given.sum()), count + own.size
    return Inherited(weights, taken / count if count else 0.0, frozenset(names))


def embed(whole: Mapping[str, Array], donor: SubNetwork) -> dict[str, Array]:
    """Return the donor's network in the shape of ``whole``, its parent's weights by state name.

    Where the donor has no channel there are zeros (a variance of 1): without a norm over channels
    the network computes what the donor does. A layer that the donor lacks stays the parent's.
    """
    embedded = {}
    for name, own in whole.items():
        theirs = donor.weights.get(name)
        places = _shared_places(name, SubNetwork(whole, {}), donor)
        if theirs is None or places is None:
            alike = theirs is not None and theirs.shape == own.shape
            embedded[name] = theirs if theirs is not None and alike else own
            continue
        mine, given = places
        embedded[name] = np.full_like(own, 1.0 if name.endswith("running_var") else 0.0)
        embedded[name][mine] = theirs[given]
    return embedded


def ridge_head(features: Array, targets: Array, ridge: float = 0.3) -> tuple[Array, Array]:
    """Return the weight (K, D) and bias (K,) of a linear head in closed form.

    It minimises ``|features W^T + b - targets|^2 + N ridge v |W|^2`` over (N, D) features and
    (N, K) targets, with ``v`` the features' mean variance, so that ``ridge`` has no unit; the bias
    is not shrunk. The default was chosen on tasks of CIFAR-100's seen classes. For classes give
    ``class_targets``; for a dense task, features and targets of sampled positions.

    Raises:
        LibraryError: the arrays do not fit, or are not finite.
    """
    x, y = np.asarray(features, np.float64), np.asarray(targets, np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not len(x):
        raise _wrong(
            f"features have shape {x.shape} and targets {y.shape}, expected (N, D), (N, K)"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise _wrong("a feature or a target is not finite")
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    centred = x - mean_x
    gram = centred.T @ centred / len(x)
    shrink = ridge * float(np.trace(gram)) / len(gram) or 1.0  # features that never vary: W = 0
    gram[np.diag_indices_from(gram)] += shrink
    weight = np.linalg.solve(gram, centred.T @ (y - mean_y) / len(x)).T
    return weight, mean_y - weight @ mean_x


def class_targets(labels: Array, classes: int) -> Array:
    """Return (N, classes) targets of integer labels (N,): 1 for an image's class, 0 for others.

    Raises:
        LibraryError: a label is not a class.
    """
    given = np.asarray(labels)
    if given.ndim != 1 or (given < 0).any() or (given >= classes).any():
        raise _wrong(f"labels {np.unique(given)[:8]} are not classes 0..{classes - 1}")
    targets: Array = np.eye(classes)[given]
    return targets


def _shared_places(
    name: str, start: SubNetwork, donor: SubNetwork
) -> tuple[tuple[Array, ...], tuple[Array, ...]] | None:
    """Return where, in start's and donor's tensor, the numbers lie that both have; None if none."""
    own, theirs = start.weights[name], donor.weights.get(name)
    if theirs is None or not _is_weight(own) or theirs.ndim != own.ndim:
        return None
    mine_at, theirs_at = [], []
    for axis, (width, other) in enumerate(zip(own.shape, theirs.shape, strict=True)):
        kept = _kept(width, start.lacks(name, axis))
        given = _kept(other, donor.lacks(name, axis))
        if kept is None or given is None or len(kept[1]) != len(given[1]):
            return None
        _, at, there = np.intersect1d(kept[0], given[0], return_indices=True)
        mine_at.append(at)
        theirs_at.append(there)
    return np.ix_(*mine_at), np.ix_(*theirs_at)


def _kept(width: int, gone: Collection[int]) -> tuple[Array, range] | None:
    """Return the parent's positions that are left, and all of them; None where they do not fit."""
    whole = range(width + len({*gone}))
    kept = np.setdiff1d(np.array(whole), np.array([*gone], np.int64))
    return (kept, whole) if len(kept) == width else None


def _is_weight(array: Array) -> bool:
    return array.ndim > 0 and bool(np.issubdtype(array.dtype, np.floating))


def _wrong(what: str) -> LibraryError:
    return LibraryError(what, hint="give one row per image, in the same order")
