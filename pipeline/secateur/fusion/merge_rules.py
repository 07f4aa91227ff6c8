"""Rules that merge several experts' weights into one: what each does with one weight's copies.

A rule sees only weights that at least two experts own, and returns one tensor for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.errors import ModelError

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Copies:
    """Weights owned by several experts, in float64.

    ``experts[task]`` holds the keys that the task shares with another one; ``pretrained`` what
    all of them started from; ``weights`` are the user's, with mean one; ``importance[task]`` has
    the same keys as ``experts[task]``. ``strength`` is the factor lambda of the task vectors
    (None: the rule's own), ``top_share`` the share of a task vector that TIES keeps.
    """

    pretrained: State
    experts: Mapping[str, State]
    weights: Mapping[str, float]
    importance: Mapping[str, State]
    strength: float | None = None
    top_share: float = 0.2

    def owners(self) -> dict[str, list[str]]:
        """Return the tasks that own each key."""
        found: dict[str, list[str]] = {}
        for task, state in self.experts.items():
            for key in state:
                found.setdefault(key, []).append(task)
        return found

    def task_vectors(self) -> dict[str, dict[str, Tensor]]:
        """Return ``weight * (expert - pretrained)`` per task and key.

        Raises:
            ModelError: the pre-trained weights lack a key.
        """
        missing = sorted(set(self.owners()) - set(self.pretrained))
        if missing:
            raise ModelError(
                f"the pre-trained weights lack '{missing[0]}', which several experts own",
                hint="give the state that the experts started from, or merge by 'average'",
            )
        return {
            task: {k: self.weights[task] * (v - self.pretrained[k]) for k, v in state.items()}
            for task, state in self.experts.items()
        }


def average(copies: Copies) -> dict[str, Tensor]:
    """Return the weighted mean of the copies."""
    equal = {t: {k: torch.ones_like(v) for k, v in s.items()} for t, s in copies.experts.items()}
    return _weighted(copies, equal)


def fisher(copies: Copies) -> dict[str, Tensor]:
    """Return ``sum F_t theta_t / sum F_t`` (Matena and Raffel, arXiv 2111.09832, section 3).

    Each task's diagonal Fisher is divided by its mean, so that tasks weigh alike. A millionth of
    that mean is added: where no task cares, the copies are averaged.

    Raises:
        ModelError: there is no importance for a task or a key.
    """
    importance = {}
    for task, state in copies.experts.items():
        given = copies.importance.get(task, {})
        missing = [key for key in state if key not in given]
        if missing:
            raise ModelError(
                f"no importance of '{missing[0]}' for task '{task}'",
                hint="give what diagonal_fisher returns for each expert",
            )
        total = sum(float(given[key].sum()) for key in state)
        mean = total / sum(value.numel() for value in state.values())
        scale = 1 / mean if mean > 0 else 0.0
        importance[task] = {key: given[key].double() * scale + 1e-6 for key in state}
    return _weighted(copies, importance)


def task_arithmetic(copies: Copies) -> dict[str, Tensor]:
    """Return ``theta_0 + lambda * sum tau_t`` (Ilharco et al., arXiv 2212.04089, section 2).

    Without a lambda, 0.4 is used: what arXiv 2306.01708 recommends where none can be chosen.
    """
    strength = 0.4 if copies.strength is None else copies.strength
    vectors = copies.task_vectors()
    return {
        key: copies.pretrained[key] + strength * sum(vectors[task][key] for task in tasks)
        for key, tasks in copies.owners().items()
    }


def ties(copies: Copies) -> dict[str, Tensor]:
    """Trim, elect signs, disjoint merge (Yadav et al., arXiv 2306.01708, algorithm 1).

    Each task vector keeps its largest ``top_share`` over all keys together; the sign of the sum
    wins; the mean is over the trimmed vectors of that sign. Default lambda: 1.
    """
    strength = 1.0 if copies.strength is None else copies.strength
    trimmed = {
        task: _trim(vector, copies.top_share) for task, vector in copies.task_vectors().items()
    }
    merged = {}
    for key, tasks in copies.owners().items():
        vectors = torch.stack([trimmed[task][key] for task in tasks])
        elected = vectors.sum(0).sign()
        agreeing = (vectors.sign() == elected) & (vectors != 0)
        mean = (vectors * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)
        merged[key] = copies.pretrained[key] + strength * mean
    return merged


def _trim(vector: State, top_share: float) -> dict[str, Tensor]:
    """Return ``vector`` with all but its largest entries zeroed."""
    sizes = torch.cat([value.abs().flatten() for value in vector.values()])
    kept = max(1, round(top_share * len(sizes)))
    least = sizes.topk(kept).values[-1]
    return {key: value * (value.abs() >= least) for key, value in vector.items()}


def _weighted(copies: Copies, importance: Mapping[str, State]) -> dict[str, Tensor]:
    """Return ``sum w_t I_t theta_t / sum w_t I_t``."""
    merged = {}
    for key, tasks in copies.owners().items():
        shares = torch.stack([copies.weights[task] * importance[task][key] for task in tasks])
        values = torch.stack([copies.experts[task][key] for task in tasks])
        merged[key] = (shares * values).sum(0) / shares.sum(0)
    return merged


MERGES = {
    "average": average,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "fisher": fisher,
}
