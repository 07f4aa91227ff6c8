"""Which of many lowered nodes spoil an output: halves are lowered alone, then their halves."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Noise = Mapping[str, float]

QUIET = 1e-4  # error power (40 dB below the output) that no task minds
LEAST_SHARE = 0.05  # of the whole error of some task: less is not followed
EVALUATIONS = 64


@dataclass(frozen=True)
class Culprit:
    """One node, or the nodes of a stretch whose error lies evenly or that was not split further.

    ``noise`` is each task's error power when they alone are lowered, ``task`` the one with the
    largest ``share`` of what all nodes together cause.
    """

    nodes: tuple[str, ...]
    noise: Noise
    task: str
    share: float


@dataclass(frozen=True)
class Bisection:
    """``culprits``, the worst first; ``whole`` is the error power of all nodes together."""

    culprits: tuple[Culprit, ...]
    whole: Noise
    evaluations: int


def bisect_noise(
    nodes: Sequence[str],
    noise: Callable[[Sequence[str]], Noise],
    *,
    least: float = LEAST_SHARE,
    evaluations: int = EVALUATIONS,
) -> Bisection:
    """Find the nodes with a share of at least ``least`` in some task's error, unless it is QUIET.

    ``noise(part)`` gives per task the error power when only ``part`` is lowered. Errors of
    different nodes are nearly independent, so their powers add up and a half that is quiet holds
    no culprit. The loudest stretch is split first; ``noise`` is asked at most ``evaluations``
    times.
    """
    whole = noise(nodes)
    asked, found = 1, []
    waiting = [(-1.0, 0, len(nodes), whole)] if max(whole.values(), default=0) > QUIET else []
    while waiting:
        _, first, last, own = heapq.heappop(waiting)
        if last - first == 1 or asked + 2 > evaluations:
            found.append(_culprit(nodes[first:last], own, whole))
            continue
        middle = (first + last) // 2
        asked += 2
        loud = []
        for part in ((first, middle), (middle, last)):
            heard = noise(nodes[slice(*part)])
            share = _culprit(nodes[slice(*part)], heard, whole).share
            if share >= least:
                loud.append((-share, *part, heard))
        for half in loud:
            heapq.heappush(waiting, half)
        if not loud:  # the error lies evenly in it, and no part of it is the one to blame
            found.append(_culprit(nodes[first:last], own, whole))
    return Bisection(tuple(sorted(found, key=lambda c: -c.share)), whole, asked)


def _culprit(nodes: Sequence[str], own: Noise, whole: Noise) -> Culprit:
    shares = {task: own[task] / power for task, power in whole.items() if power > QUIET}
    task = max(shares, key=lambda name: shares[name])
    return Culprit(tuple(nodes), own, task, shares[task])
