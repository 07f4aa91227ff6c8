"""The plain training loop of the rivals that learn while they prune, and cuts on the way down."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice

import torch
from fusion.bench import GRID, Bench, Scores
from secateur.core.channels import ChannelGroup
from secateur.core.model import MultiTaskModel
from secateur.core.plan import PrunePlan
from secateur.data.loading import Batch
from secateur.prune import MacsModel, apply_plan, find_groups, macs_model, plan_prune
from secateur.prune.plan import Budget
from torch import Tensor

LEARNING_RATE = 5e-4
WEIGHT_DECAY = 1e-4
BATCH = 8
CLIP = 5.0
Forward = Callable[[Tensor, int], tuple[Mapping[str, Tensor], Tensor | None]]
"""From images and the step's number to the outputs and a penalty on top of the tasks' losses."""


def train(
    bench: Bench,
    model: MultiTaskModel,
    steps: int,
    seed: int,
    *,
    forward: Forward | None = None,
    gates: Sequence[Tensor] = (),
    gate_rate: float = 0.0,
) -> None:
    """Train ``model`` in place on the sum of the tasks' losses; ``gates`` learn along with it."""
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.parameters()), "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
            {"params": list(gates), "lr": gate_rate, "weight_decay": 0.0},
        ]
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # dropout
        for step, batch in enumerate(islice(_endless(bench, seed), steps)):
            images = batch.images.to(memory_format=torch.channels_last)
            outputs, penalty = forward(images, step) if forward else (model(images), None)
            loss = torch.stack(list(bench.losses(outputs, batch.targets).values())).sum()
            optimizer.zero_grad()
            torch.autograd.backward(loss if penalty is None else loss + penalty)
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
    optimizer.zero_grad()
    model.to(memory_format=torch.contiguous_format).eval()


def _endless(bench: Bench, seed: int) -> Iterator[Batch]:
    for draw in count(1):
        yield from bench.stream(BATCH, 1_000_003 * (seed + 1) + draw, BATCH)


@dataclass(frozen=True)
class Stage:
    """A network on its way down, with its groups and their cost."""

    model: MultiTaskModel
    groups: tuple[ChannelGroup, ...]
    cost: MacsModel

    @property
    def macs(self) -> int:
        """MACs of the network as it is."""
        return self.cost.macs([group.width for group in self.groups])


def start(bench: Bench) -> Stage:
    """Return a copy of the parent as the first stage."""
    return Stage(copy.deepcopy(bench.parent), bench.groups, bench.cost)


def opened(bench: Bench, model: MultiTaskModel) -> Stage:
    """Return ``model`` with its own groups and cost."""
    groups = find_groups(model, bench.example)
    return Stage(model, groups, macs_model(model, groups, bench.example))


def plan_to(bench: Bench, stage: Stage, scores: Scores, share: float) -> PrunePlan:
    """Plan a cut of ``stage`` to ``share`` of the *parent's* MACs, by global ranking."""
    # Only differences count in one ranking, and the solver wants no score below zero.
    least = min(float(values.min()) for values in scores.values())
    scores = {name: values - least for name, values in scores.items()}
    left = math.floor(share * bench.full_macs) / stage.macs
    budget = Budget(min(1.0, left), GRID, 0.0, 0.0)
    return plan_prune(stage.groups, stage.cost, scores, {}, budget, criterion="-", fusion="-")


def cut_to(bench: Bench, stage: Stage, scores: Scores, share: float) -> MultiTaskModel:
    """Carry out ``plan_to``."""
    plan = plan_to(bench, stage, scores, share)
    return apply_plan(stage.model, stage.groups, plan)
