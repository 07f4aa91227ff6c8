"""DAIS (Guan et al., arXiv 2011.02166): relaxed channel indicators, annealed to 0 or 1.

Indicator ``sigmoid(alpha / T)`` with ``T`` falling geometrically, learned together with the weights
on the tasks' losses plus a regulariser on the relaxed MACs; the final ranking is by ``alpha``.
Departures: joint training in place of the bi-level one; one indicator per coupled channel; the
regulariser is the distance of the relaxed MACs' logarithm to the budget's; the budget is met
exactly by the solver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from fusion.bench import Bench
from fusion.rivals.gates import gates_of
from fusion.rivals.training import cut_to, start, train
from secateur.core.model import MultiTaskModel
from secateur.prune import MacsModel
from torch import Tensor

STEPS = 200
FIRST = 2.0  # every alpha's first value: indicators begin at 0.88
HOT, COLD = 1.0, 0.1
WEIGHT = 2.0  # of the regulariser
RATE = 0.05  # of alpha
AJAR = 0.05  # a channel that stays although its indicator is shut stays trainable


def cut(bench: Bench, share: float, seed: int) -> MultiTaskModel:
    """Return the cut with the indicators and the weights learned."""
    stage = start(bench)
    gates = gates_of(stage.model, stage.groups)
    alpha = torch.full((gates.total,), FIRST, requires_grad=True)
    relaxed = _relaxed_macs(bench.cost, [group.width for group in bench.groups])
    target = share * bench.full_macs

    def indicators(step: int) -> Tensor:
        return torch.sigmoid(alpha / (HOT * (COLD / HOT) ** (step / max(1, STEPS - 1))))

    def forward(images: Tensor, step: int) -> tuple[Mapping[str, Tensor], Tensor]:
        gate = indicators(step)
        penalty = WEIGHT * (relaxed(gate) / target).log().abs()
        return gates.outputs(stage.model, images, gate), penalty

    train(bench, stage.model, STEPS, seed, forward=forward, gates=[alpha], gate_rate=RATE)
    gates.fold(stage.model, indicators(STEPS - 1).clamp(min=AJAR))
    return cut_to(bench, stage, gates.split(alpha), share)


def _relaxed_macs(cost: MacsModel, widths: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Return MACs of indicators, as ``MacsModel.macs`` counts them: a group keeps their sum."""
    arrays = (cost.unit, cost.in_fixed, cost.in_of, cost.out_fixed, cost.out_of)
    unit, in_fixed, in_of, out_fixed, out_of = (torch.from_numpy(array) for array in arrays)

    def macs(indicators: Tensor) -> Tensor:
        kept = torch.stack([part.sum() for part in torch.split(indicators, list(widths))]).double()
        return (
            cost.constant + (unit * (in_fixed + in_of @ kept) * (out_fixed + out_of @ kept)).sum()
        )

    return macs
