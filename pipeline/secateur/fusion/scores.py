"""Fusion rules over normalised per-task scores ``s_t / sum(s_t)`` with user weights ``w_t``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import RecipeError

GroupScores = Mapping[str, NDArray[np.float64]]


def normalise(scores: GroupScores) -> dict[str, NDArray[np.float64]]:
    """Divide one task's scores by their sum over all groups, so that tasks weigh alike."""
    total = sum(float(values.sum()) for values in scores.values())
    return {name: values / total if total > 0 else values * 0 for name, values in scores.items()}


def mean(
    tasks: Mapping[str, GroupScores], weights: Mapping[str, float]
) -> dict[str, NDArray[np.float64]]:
    """Return the weighted mean of the tasks' normalised scores."""
    share = sum(weights[task] for task in tasks)
    groups = next(iter(tasks.values()))
    return {
        name: np.sum([weights[task] / share * tasks[task][name] for task in tasks], axis=0)
        for name in groups
    }


RULES = {"mean": mean}


def fuse(
    tasks: Mapping[str, GroupScores], weights: Mapping[str, float], rule: str
) -> dict[str, NDArray[np.float64]]:
    """Normalise each task's scores and fuse them by ``rule``.

    Raises:
        RecipeError: there is no such rule.
    """
    if rule not in RULES:
        raise RecipeError(
            f"prune.fusion: '{rule}' is not a fusion rule", hint=f"rules: {', '.join(RULES)}"
        )
    return RULES[rule]({task: normalise(scores) for task, scores in tasks.items()}, weights)
