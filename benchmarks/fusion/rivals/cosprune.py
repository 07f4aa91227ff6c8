"""CosPrune (Garg, Zhang, Guan, arXiv 2304.06840): prune where the tasks' gradients disagree.

``Cos(f) = 2 / (T (T - 1)) sum_{i<j} cos(dL_i/dW_f, dL_j/dW_f)``, mean over batches; the filters
with the lowest go, in rounds, while training goes on. Departures: a coupled channel's filters are
taken as one vector; gradients are zeroed between tasks (the released code leaks them); the paper
prunes a shared trunk only, and a channel of one task has no cosine, so the heads keep the trunk's
share of channels, by L2 norm; rounds are equal steps in MACs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from fusion.bench import Bench
from fusion.rivals.scoring import channel_norms, rank_share, users
from fusion.rivals.training import BATCH, Stage, cut_to, opened, start, train
from numpy.typing import NDArray
from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from torch import Tensor, nn

ROUNDS = 5
STEPS = 150  # training steps of all rounds together
IMAGES = 64  # per round


def cut(bench: Bench, share: float, seed: int) -> MultiTaskModel:
    """Return the network after the last round."""
    shared = {name for name, tasks in users(bench).items() if len(tasks) > 1}
    stage = start(bench)
    for number in range(1, ROUNDS + 1):
        train(bench, stage.model, STEPS // ROUNDS, ROUNDS * seed + number)
        trunk = [group for group in stage.groups if group.name in shared]
        scores = rank_share(_agreement(bench, stage, trunk, seed + 1_000 * number))
        for name, norms in channel_norms(dict(stage.model.named_modules()), stage.groups).items():
            if name not in shared:
                scores |= rank_share({name: norms.detach().double().numpy()})
        model = cut_to(bench, stage, scores, 1 - (1 - share) * number / ROUNDS)
        stage = opened(bench, model)
    return stage.model


def _agreement(
    bench: Bench, stage: Stage, groups: Sequence[ChannelGroup], seed: int
) -> dict[str, NDArray[np.float64]]:
    """Return (width,) mean pairwise cosines per group."""
    modules = dict(stage.model.named_modules())
    filters = {
        group.name: [
            (member, modules[member.layer].weight)
            for member in group.members
            if member.axis == "out" and isinstance(modules[member.layer], nn.Conv2d | nn.Linear)
        ]
        for group in groups
    }
    weights = [weight for found in filters.values() for _, weight in found]
    total = {group.name: np.zeros(group.width) for group in groups}
    for batch in bench.stream(IMAGES, seed, BATCH):
        losses = bench.losses(stage.model(batch.images), batch.targets)
        gradients = [
            torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            for loss in losses.values()
        ]
        by_task = [dict(zip(map(id, weights), found, strict=True)) for found in gradients]
        for name, found in filters.items():
            vectors = [
                torch.cat([_rows(task[id(w)], w, m.indices) for m, w in found], 1)
                for task in by_task
            ]
            total[name] += _mean_cosine(vectors)
    return total


def _rows(gradient: Tensor | None, weight: Tensor, at: Sequence[Sequence[int]]) -> Tensor:
    """Return (width, n) gradients of the filters that make each channel."""
    rows = torch.zeros_like(weight) if gradient is None else gradient
    return rows.flatten(1)[torch.tensor(at)].flatten(1)


def _mean_cosine(vectors: Sequence[Tensor]) -> NDArray[np.float64]:
    cosines = [nn.functional.cosine_similarity(a, b, 1, 1e-30) for a, b in combinations(vectors, 2)]
    return torch.stack(cosines).mean(0).double().numpy()
