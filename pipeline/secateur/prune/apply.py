"""Carry out a plan on a copy of the model."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from secateur.core.channels import ChannelGroup
from secateur.core.errors import PlanError
from secateur.core.model import MultiTaskModel
from secateur.core.plan import PrunePlan
from secateur.prune.attention import drop_heads
from secateur.prune.groups import dependency_graph


def apply_plan(
    model: MultiTaskModel, groups: Sequence[ChannelGroup], plan: PrunePlan, example: Tensor
) -> MultiTaskModel:
    """Return a copy of ``model`` without the channels that ``plan`` drops.

    Raises:
        PlanError: the plan was made for a model with other groups.
    """
    planned = {cut.name: cut for cut in plan.cuts}
    if {group.name: group.width for group in groups} != {c.name: c.width for c in plan.cuts}:
        raise PlanError(
            "the plan was made for another model: its groups differ",
            hint="plan again for this recipe",
        )
    doomed: dict[str, list[int]] = defaultdict(list)
    pruned = copy.deepcopy(model)
    for group in groups:
        kept = set(planned[group.name].kept)
        gone = [channel for i, channel in enumerate(group.channels) if i not in kept]
        if group.heads_of:
            drop_heads(pruned, group, gone)
        else:
            doomed[group.root] += gone
    graph = dependency_graph(pruned, example)
    modules = dict(pruned.named_modules())
    for root, channels in doomed.items():
        if channels:
            layer = modules[root]
            cut = graph.get_pruner_of_module(layer).prune_out_channels
            graph.get_pruning_group(layer, cut, sorted(channels)).prune()
    return pruned.eval()
