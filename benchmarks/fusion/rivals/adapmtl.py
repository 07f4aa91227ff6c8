"""AdapMTL (Xiang et al., arXiv 2408.03913) on channels: one learned threshold per component.

``W' = sign(W) relu(|W| - t_k)`` with one threshold for the backbone and one per head, learned with
the weights under a constant push upwards and frozen once the target is met. Departures: on a
channel's filter norm over its group's mean, so its gate is ``relu(1 - t_k / norm)``;
``t = exp(s)`` in place of a sigmoid, as such norms pass 1; a few hundred steps from the trained
parent in place of 100k; fixed task weights, as for every method here. What is left of the budget
scales the keep shares that the components have learned, channels by norm.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from fusion.bench import Bench
from fusion.rivals.gates import gates_of
from fusion.rivals.scoring import channel_norms, rank_share, users
from fusion.rivals.training import cut_to, start, train
from numpy.typing import NDArray
from secateur.core.model import MultiTaskModel
from torch import Tensor

STEPS = 200
FIRST = 0.1  # every component's first threshold, in mean norms of a group
PRESSURE = 0.05
RATE = 0.02  # of the logarithm of the thresholds
AJAR = 0.05  # a channel that stays although its gate is shut stays trainable


def cut(bench: Bench, share: float, seed: int) -> MultiTaskModel:
    """Return the cut with the keep shares and the weights learned."""
    stage = start(bench)
    modules = dict(stage.model.named_modules())
    gates = gates_of(stage.model, stage.groups)
    parts = _components(bench)
    part_of = torch.cat([torch.full((g.width,), parts[g.name]) for g in stage.groups])
    logs = torch.full((max(parts.values()) + 1,), float(np.log(FIRST)), requires_grad=True)
    frozen = False

    def norms() -> Tensor:
        return torch.cat(list(channel_norms(modules, stage.groups).values()))

    def forward(images: Tensor, step: int) -> tuple[Mapping[str, Tensor], Tensor | None]:
        nonlocal frozen
        gate = torch.relu(1 - (logs.detach() if frozen else logs).exp()[part_of] / norms())
        kept = [int((values > 0).sum()) for values in gates.split(gate).values()]
        frozen = frozen or bench.cost.macs(kept) <= share * bench.full_macs
        outputs = gates.outputs(stage.model, images, gate)
        return outputs, None if frozen else -PRESSURE * logs.sum()

    train(bench, stage.model, STEPS, seed, forward=forward, gates=[logs], gate_rate=RATE)
    with torch.no_grad():
        gate = torch.relu(1 - logs.exp()[part_of] / norms())
        scores = _scaled(gates.split(norms()), gates.split(gate), parts)
        gates.fold(stage.model, gate.clamp(min=AJAR))
    return cut_to(bench, stage, scores, share)


def _components(bench: Bench) -> dict[str, int]:
    """Return each group's component: 0 for what several tasks share, then one per task."""
    order = {task.name: number for number, task in enumerate(bench.parent.tasks, 1)}
    return {
        name: order[next(iter(tasks))] if len(tasks) == 1 else 0
        for name, tasks in users(bench).items()
    }


def _scaled(
    norms: Mapping[str, NDArray[np.float64]],
    gates: Mapping[str, NDArray[np.float64]],
    parts: Mapping[str, int],
) -> dict[str, NDArray[np.float64]]:
    """Return scores whose one threshold scales the components' keep shares alike."""
    scores: dict[str, NDArray[np.float64]] = {}
    for part in sorted(set(parts.values())):
        names = [name for name in norms if parts[name] == part]
        open_gates = np.concatenate([gates[name] > 0 for name in names])
        keep = max(float(open_gates.mean()), 1 / len(open_gates))
        ranks = rank_share({name: norms[name] for name in names})
        scores |= {name: (values - 1) / keep for name, values in ranks.items()}
    return scores
