"""torch-pruning 1.6 exactly as its users call it, with the ratio found by bisection."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch_pruning
from fusion.bench import GRID, Bench
from secateur.core.errors import PlanError
from secateur.core.model import MultiTaskModel
from secateur.prune.groups import output_layers
from secateur.prune.macs import count_macs
from torch import Tensor

TRIALS = 8
RATIOS = tuple(number / 50 for number in range(25, 50))


def cut_as_its_users_do(
    bench: Bench,
    share: float,
    importance: Any,
    gradients: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> MultiTaskModel:
    """Return the largest network within the budget among the ratios of a bisection.

    Beyond some ratio MACs rise again, for a layer that rounding would empty stays whole, and a
    bisection may pass by what there is: then ratios are tried one by one.

    Raises:
        PlanError: no ratio tried meets the budget.
    """
    tried: list[tuple[int, MultiTaskModel]] = []

    def within(ratio: float) -> bool:
        model = _pruned(bench, ratio, importance, gradients or {}, options)
        tried.append((count_macs(model, bench.example), model))
        return tried[-1][0] <= share * bench.full_macs

    low, high = 0.0, 1.0
    for _ in range(TRIALS):
        ratio = (low + high) / 2
        low, high = (low, ratio) if within(ratio) else (ratio, high)
    for ratio in RATIOS if high == 1.0 else ():
        within(ratio)
    meeting = [one for one in tried if one[0] <= share * bench.full_macs]
    if not meeting:
        least = min(macs for macs, _ in tried) / bench.full_macs
        raise PlanError(
            f"torch-pruning, rounding to {GRID} channels, leaves {least:.1%} of the MACs at least, "
            f"at any of {len(tried)} ratios",
            hint="it leaves a layer whole that its ratio would empty; take a larger share",
        )
    return max(meeting, key=lambda one: one[0])[1].eval()


def _pruned(
    bench: Bench,
    ratio: float,
    importance: Any,
    gradients: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> MultiTaskModel:
    model = copy.deepcopy(bench.parent)
    ignored = output_layers(model, bench.example)
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone() if name in gradients else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_pruning.pruner.BasePruner(
            model,
            bench.example,
            importance=importance,
            pruning_ratio=ratio,
            round_to=GRID,
            ignored_layers=ignored,
            in_channel_groups={},  # the defaults are shared between all pruners of a process
            out_channel_groups={},
            **options,
        ).step()
    model.zero_grad()
    return model
