"""Whose cuts may say something about a new task: the library's nearest tasks, and why."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import LibraryError
from secateur.vote.entry import Facts, parsed, unpack_sketch
from secateur.vote.library import Library
from secateur.vote.similarity.measure import Measure, measure_of
from secateur.vote.store import connect

DIGITS = 6  # of a similarity; sketches of two machines differ in later ones
Sketches = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Neighbour:
    """An entry, the measure's number (its range is in ``why``) and a sentence that explains it."""

    id: str
    facts: Facts
    similarity: float
    why: str


@dataclass(frozen=True)
class Refused:
    """An entry that cannot be compared, and why."""

    id: str
    why: str


@dataclass(frozen=True)
class Nearest:
    """``neighbours``, nearest first, the entries that were ``refused``, and how many are ``left``.

    Those are further away than the ones asked for.
    """

    neighbours: tuple[Neighbour, ...]
    refused: tuple[Refused, ...]
    left: int = 0


def nearest(
    library: Library,
    sketches: Sketches,
    parent: str,
    measure: str,
    count: int,
    *,
    basis: str = "original",
    budget: tuple[float, float] | None = None,
    wanted: float = 1.0,
    skip: Collection[str] = (),
    data: str = "",
) -> Nearest:
    """Return the ``count`` entries of ``parent`` whose tasks are nearest by ``measure``.

    ``sketches`` are the new task's, ``basis`` what its parent's channels are counted in (see
    ``entry.Facts``), ``budget`` the least and most share of MACs of the entries to look at,
    ``skip`` the ids to leave out (a task is its own nearest neighbour). ``data`` is the fingerprint
    of the images that the sketches are of: ``cka`` compares those of the same. Of entries as near
    that nearer to the share of MACs ``wanted`` comes first, then the id decides.

    Raises:
        LibraryError: there is no such measure, or no sketch of the new task for it.
    """
    found = measure_of(measure)
    if measure not in sketches:
        raise LibraryError(
            f"there is no '{measure}' sketch of this task to compare",
            hint=f"it has {', '.join(sorted(sketches)) or 'none: a bundle holds no sketches'}",
        )
    own = np.asarray(sketches[measure], np.float64)  # once, not for each entry
    close: list[tuple[float, float, str]] = []
    refused = []
    strangers = _of_other_images(library, data) if measure == "cka" and data else frozenset()
    for entry, of_parent, of_basis, share, packed in _rows(library, measure, parent, budget):
        if entry in skip:
            continue
        why = _stranger(of_parent, of_basis, parent, basis)
        if entry in strangers:
            why = why or "its features are of other images"
        value = 0.0
        if not why:
            value, why = _compared(found, own, packed)
        if why:
            refused.append(Refused(entry, why))
        else:
            close.append((-round(value, DIGITS), abs(math.log(share / wanted)), entry))
    best = heapq.nsmallest(count, close)
    facts, unreadable = _facts(library, [entry for *_, entry in best])
    refused += unreadable
    return Nearest(
        tuple(
            Neighbour(entry, facts[entry], -far, found.explained.format(value=-far))
            for far, _, entry in best
            if entry in facts  # else it was removed meanwhile, or cannot be read
        ),
        tuple(refused),
        len(close) - len(best),
    )


def _stranger(of_parent: str, of_basis: str, parent: str, basis: str) -> str:
    """Return why an entry's keep-sets mean other channels, or "" where they do not."""
    if of_parent != parent:
        return f"it was cut from another parent ({of_parent}, yours is {parent})"
    if of_basis != basis:
        return f"its channels are counted in other axes ({of_basis}, yours are {basis})"
    return ""


def _compared(measure: Measure, own: NDArray[Any], data: bytes | None) -> tuple[float, str]:
    """Return the similarity and "", or 0 and why there is none."""
    if data is None:
        return 0.0, f"it holds no '{measure.name}' sketch"
    try:
        return measure.similarity(own, unpack_sketch(data)), ""
    except LibraryError as error:
        return 0.0, error.message


def _of_other_images(library: Library, data: str) -> frozenset[str]:
    with connect(library.index) as connection:
        rows = connection.execute(
            "SELECT id FROM entries WHERE "
            "CASE WHEN json_valid(facts) THEN json_extract(facts, '$.data') END IS NOT ?",
            (data,),
        )
        return frozenset(row[0] for row in rows)


def _rows(
    library: Library, measure: str, parent: str, budget: tuple[float, float] | None
) -> Iterator[tuple[str, str, str, float, bytes | None]]:
    """Yield id, parent, basis, budget and packed sketch, one by one: all may be gigabytes.

    Of other parents' entries there is no sketch: nothing compares with it.
    """
    least, most = budget or (0.0, 1.0)
    with connect(library.index) as connection:
        yield from connection.execute(
            "SELECT id, parent, basis, budget, data FROM entries "
            "LEFT JOIN sketches ON entry = id AND name = ? AND parent = ? "
            "WHERE budget BETWEEN ? AND ?",
            (measure, parent, least, most),
        )


def _facts(library: Library, entries: list[str]) -> tuple[dict[str, Facts], list[Refused]]:
    with connect(library.index) as connection:
        rows = [
            connection.execute("SELECT id, facts FROM entries WHERE id = ?", (entry,)).fetchone()
            for entry in entries
        ]
    found, refused = {}, []
    for row in rows:
        if row is not None:
            try:
                found[row[0]] = parsed(Facts, row[1], f"entry {row[0]}")
            except LibraryError as error:  # one damaged entry stops nobody
                refused.append(Refused(row[0], error.message))
    return found, refused
