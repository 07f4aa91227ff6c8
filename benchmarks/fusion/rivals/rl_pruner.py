"""RL-Pruner (Wang, Kindratenko, arXiv 2411.06463): a sampled distribution of what is pruned where.

The policy is a distribution over the groups of the channels to remove, at first in proportion to
their widths. Each stage samples noised distributions, cuts by each (Taylor within a group),
rewards them by the loss they leave without any training, goes on from the best cut and moves the
policy towards its distribution. Departures: the reward is minus the summed loss on a few batches
in place of top-1 accuracy; stages are equal steps in MACs, so cost is no part of the reward; no
random exploration of worse cuts; and no training between stages, which the authors' code does (its
distillation after some of them), so that a row for it tells of the allocation alone.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from fusion.bench import Bench, Scores
from fusion.rivals.scoring import IMAGES, gate_squares, rank_share, roots, summed
from fusion.rivals.training import Stage, opened, plan_to, start
from numpy.typing import NDArray
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.plan import PrunePlan, dropped_indices
from secateur.data.loading import Batch
from secateur.prune import apply_plan

STAGES = 4
SAMPLES = 12  # per stage
NOISE = 0.5  # largest spread of a sample, in shares of the policy's own entries
STEP = 0.5  # how far the policy moves to the best sample
REWARD_IMAGES = 32


def cut(bench: Bench, share: float, seed: int) -> MultiTaskModel:
    """Return the best cut of the last stage."""
    rng = np.random.default_rng(seed)
    batches = list(bench.stream(REWARD_IMAGES, seed + 1))
    policy = np.array([group.width for group in bench.groups], np.float64)
    policy /= policy.sum()
    stage = start(bench)
    for number in range(1, STAGES + 1):
        stream = bench.stream(IMAGES, seed + number)
        taylor = roots(gate_squares(stage.model, stage.groups, stream, summed(bench))["sum"])
        goal = 1 - (1 - share) * number / STAGES
        tried: list[tuple[float, NDArray[np.float64], PrunePlan]] = []
        for _ in range(SAMPLES):
            sample = _noised(policy, rng)
            plan = plan_to(bench, stage, _by_distribution(stage, taylor, sample), goal)
            tried.append((_loss_after(bench, stage, plan, batches), sample, plan))
        _, best, plan = min(tried, key=lambda trial: trial[0])
        policy = policy + STEP * (best - policy)
        stage = opened(bench, apply_plan(stage.model, stage.groups, plan))
    return stage.model


def _noised(policy: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    noise = rng.normal(size=len(policy)) * NOISE * rng.uniform()
    sample = np.maximum(policy * (1 + noise), 1e-3 * policy)
    return np.asarray(sample / sample.sum())


def _by_distribution(stage: Stage, taylor: Scores, sample: NDArray[np.float64]) -> Scores:
    """Return scores whose one threshold ``n`` removes ``n * sample[g]`` channels of group ``g``."""
    return {
        group.name: group.width * rank_share({"": taylor[group.name]})[""] / sample[g]
        for g, group in enumerate(stage.groups)
    }


def _loss_after(bench: Bench, stage: Stage, plan: PrunePlan, batches: list[Batch]) -> float:
    """Return the summed loss of the cut, computed by silencing what it drops where it is read."""
    model = copy.deepcopy(stage.model)
    modules = dict(model.named_modules())
    for (layer, axis), gone in dropped_indices(stage.groups, plan).items():
        if axis == "in":
            weight = modules[layer].weight
            assert isinstance(weight, torch.Tensor)
            weight.data[:, sorted(gone)] = 0
    objective = summed(bench)
    with evaluating(model):
        return sum(float(objective(model(batch.images), batch)["sum"]) for batch in batches)
