"""The contract of a measure, how one is found, and the cosine that most of them end in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.core import registry
from secateur.core.errors import LibraryError

Array = NDArray[Any]
Sketch = NDArray[np.float32]
SMALL = 1e-200  # squares down to here are exact enough


@dataclass(frozen=True)
class Measure:
    """``similarity(own, other)`` of two sketches; ``explained`` says what ``{value}`` means."""

    name: str
    similarity: Callable[[Array, Array], float]
    explained: str


def measure_of(name: str) -> Measure:
    """Return the measure ``name``.

    Raises:
        LibraryError: there is no file (or entry point) of that name.
    """
    try:
        module = registry.load("secateur.vote.similarity", name)
    except KeyError as error:
        raise LibraryError(
            f"'{name}' is not a measure of task similarity",
            hint=f"measures: {', '.join(registry.entries('secateur.vote.similarity'))}",
        ) from error
    return Measure(name, module.similarity, module.EXPLAINED)


def cosine(own: Array, other: Array) -> float:
    """Return the cosine of two arrays of one shape, in -1..1; 0 where either is all zero.

    Raises:
        LibraryError: the shapes differ.
    """
    same_shape(own, other)
    mine, theirs = (np.asarray(each, np.float64).ravel() for each in (own, other))
    squares = [float(each @ each) for each in (mine, theirs)]
    if not all(SMALL < square < 1 / SMALL for square in squares):
        # squares of tiny or huge numbers leave the range of floats: the largest value first
        tops = [float(np.abs(each).max(initial=0.0)) for each in (mine, theirs)]
        if not all(tops):
            return 0.0
        mine, theirs = mine / tops[0], theirs / tops[1]
        squares = [float(each @ each) for each in (mine, theirs)]
    # the root of each, not of their product: one vector with itself then gives 1 to rounding
    value = float(mine @ theirs) / (math.sqrt(squares[0]) * math.sqrt(squares[1]))
    return min(1.0, max(-1.0, value))


def same_shape(own: Array, other: Array) -> None:
    """Raise when two sketches cannot be compared.

    Raises:
        LibraryError: their shapes differ.
    """
    if np.shape(own) != np.shape(other):
        raise wrong(f"its sketch has shape {np.shape(other)}, yours {np.shape(own)}")


def wrong(what: str) -> LibraryError:
    """Return the error of arrays that a measure cannot use."""
    return LibraryError(what, hint="make both sketches in the same way, from the same parent")
